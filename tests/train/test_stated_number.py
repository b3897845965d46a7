"""What number an answer states, and that an unclear one states none."""

from __future__ import annotations

from fractions import Fraction

import pytest

from fastgrpo.train import gsm8k
from fastgrpo.train.stated_number import MOST_CHARACTERS, calculated_number, stated_number

READ = {
    "whole": {"18": "18", "007": "7", " 18\n": "18", "18.": "18", "18...": "18", "18…": "18"},
    "sign": {
        "-3": "-3",
        "- 3": "-3",
        "+3": "3",
        "\u22123": "-3",
        "\u2212 3": "-3",
        "\u20133": "-3",
        "-.5": "-1/2",
        "The answer is -3": "-3",
    },
    "currency": {
        "$18": "18",
        "-$3": "-3",
        "$-3": "-3",
        "- $ 3": "-3",
        "\u2212\u20ac3": "-3",
        "18\u20ac": "18",
        "a loss of -$3": "-3",
        "Change: -$3": "-3",
        "US $18": "18",
    },
    "thousands": {
        "1,250": "1250",
        "1,250,000.75": "1250000.75",
        "1{,}250": "1250",
        "1,\\!250": "1250",
        "1\\,250": "1250",
        "1\u202f250": "1250",
        "1\u00a0250\u00a0000": "1250000",
        "-$1,250.50": "-1250.5",
    },
    "decimal": {"18.00": "18", ".5": "1/2", "0.50": "1/2", "18.5 kg": "18.5"},
    "fraction": {
        "1/2": "1/2",
        "-1/2": "-1/2",
        "10/4": "2.5",
        "1 / 2 cup": "1/2",
        "1 1/2": "1.5",
        "-2 3/4 cups": "-2.75",
        "\\frac{1}{2}": "1/2",
        "-\\dfrac{1}{2}": "-1/2",
        "\\frac{-1}{2}": "-1/2",
        "1\\frac12": "1.5",
        "1,250/2": "625",
    },
    "exponent": {
        "3e2": "300",
        "1E3": "1000",
        "-2.5e-1": "-1/4",
        "3 \\times 10^{2}": "300",
        "3 × 10^2": "300",
        "3x10^-2": "3/100",
        "3*10^2 meters": "300",
    },
    "LaTeX": {
        "$18$": "18",
        "\\boxed{18}": "18",
        "-\\boxed{3}": "-3",
        "$$\\boxed{\\frac{1}{2}}$$": "1/2",
        "\\(18\\)": "18",
        "\\[ x = 18 \\]": "18",
        "\\$18": "18",
        "18\\%": "18",
        "\\boxed{\\text{18 apples}}": "18",
        "18\\text{ cm}^2": "18",
        "90^\\circ": "90",
    },
    "unit": {
        "18%": "18",
        "18 percent": "18",
        "18 apples": "18",
        "18kg": "18",
        "18 g": "18",
        "18 m²": "18",
        "18 square feet": "18",
        "18 km/h": "18",
        "18/day": "18",
        "5 pm": "5",
        "18 dollars a day.": "18",
        "John's total is 18 dollars!": "18",
    },
    "frame": {
        "x = 3": "3",
        "Total cost: $18": "18",
        "Total cost = $18": "18",
        "**18**": "18",
        "*-3*": "-3",
        "`18`": "18",
        '"18"': "18",
        "#### 18": "18",
    },
}  # fmt: skip

UNCLEAR = {
    "no number": ["", "...", "eighteen", "a - b", "-", "$", "٣", "½", "\\frac{x}{y}"],
    "several": ["1 2", "3, 4", "18 or 19", "9 + 9 = 18", "18 out of 20", "5:30", "2020-01-02"],
    "calculation": ["10-3", "10 - 3", "10+3", "3*4", "2(3)", "2x3", "1/2/3", "5\u20136", "48/2/3"],
    "sign": [
        "minus 5",
        "negative 5",
        "--3",
        "- -3",
        "±3",
        "-(3)",
        "(3)",
        "($3)",
        "3-",
        "apples-3",
        "Total - 3",
        "-USD 3",
        "-x = 3",
    ],
    "grouping": ["1,25", "1,2345", "1,250,00", "0,250", "12,34,567", "1250,000", "1.250,50",
                 "1 250"],
    "decimal": ["1.2.3", "0.333...", "0.3…", "Rs.3", "3e2.5"],
    "fraction": ["1/0", "1 3/2", "1-1/2", "1 and 1/2", "1½", "-1/-2", "\\frac{1}{x}", "x\\frac12",
                 "3\n1/2"],
    "power": ["3^2", "3²", "2**3", "3!", "\\sqrt{9}", "9 squared", "3 e 2", "log 3", "square of 3",
              "1e9999", "10^2^2", "0x12"],
    "scale": ["3k", "3 K", "3M", "3B", "2 million", "3 dozen", "5 hundred", "3 halves",
              "3万", "half 3"],
    "variable": ["3x", "x3", "3 x", "3\\pi", "3i", "CO2", "x 3", "2x = 6", "half = 3",
                 "x + y = 18"],
    "hedge": ["not 18", "isn't 18", "less than 18", ">18", "< 18", "18?", "at least 18", "3 less",
              "3 or so"],
    "other": ["3rd", "5th", "|-3|", "[18]", "f(3)", "18\u20b2", "18 = total", "3 тысячи", "1_250"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"), [pair for cases in READ.values() for pair in cases.items()]
)
def test_a_stated_number_is_read(text: str, value: str) -> None:
    assert stated_number(text) == calculated_number(text) == Fraction(value)
    assert gsm8k.is_correct(f"<answer>{text}</answer>", value)


@pytest.mark.parametrize("text", [text for texts in UNCLEAR.values() for text in texts])
def test_an_unclear_number_is_not_guessed(text: str) -> None:
    assert stated_number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("9 + 9 = 18", "18"),
        ("3 × $6 = $18", "18"),
        ("3 x 6 = 18 apples", "18"),
        ("x = 10 - 3 = 7", "7"),
        ("3 - 10 = -7", "-7"),
        ("48 \\div 2 = 24", "24"),
        ("1/2", "1/2"),
        ("10 - 3", None),
        ("2x = 6", None),
        ("x + 3 = 18", None),
        ("-x = 3", None),
        ("\\sqrt{9} = 3", None),
        ("7 = 10 - 3", None),
        ("18 = 3", None),
        ("-3 = 3", None),
        ("3:18", None),
        ("3: 18", None),
    ],
)
def test_the_right_side_of_a_calculation(text: str, value: str | None) -> None:
    assert calculated_number(text) == (None if value is None else Fraction(value))


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("-$3", "3"),
        ("\u22123", "3"),
        ("- 3", "3"),
        ("minus 5", "5"),
        ("1/2", "2"),
        ("3e2", "2"),
        ("10-3", "-3"),
        ("10-3", "3"),
        ("0.5", "5"),
        ("18.5", "18"),
        ("1,250", "1"),
        ("1 1/2", "1/2"),
        ("2 million", "2"),
        ("50%", "0.5"),
        ("18 apples, 9 of them green", "9"),
    ],
)
def test_another_number_earns_nothing(text: str, gold: str) -> None:
    completion = f"<answer>{text}</answer>"
    assert gsm8k.correctness_reward(completion, gold) == 0.0
    assert not gsm8k.is_correct(completion, gold)


def test_a_text_that_is_too_long_to_be_an_answer_states_no_number() -> None:
    assert stated_number("18" + " apples" * 20) == 18
    assert stated_number("9" * (MOST_CHARACTERS + 1)) is None
    assert stated_number("18" + " " * MOST_CHARACTERS) is None
