"""The number that an answer states: English, digits and simple LaTeX.

A wrong value earns a reward for a wrong answer, so whatever can be read in two ways is no number.

    answer     = {left "="} [label ":"] statement
    statement  = words [sign] [currency] value words          one value, in the last part alone
    value      = decimal [exponent] | decimal "/" decimal | whole fraction
    decimal    = digits ["." digits] | "." digits             1250, 1,250, 1{,}250
    exponent   = "e" integer | "×" "10" "^" integer

Words may name a unit, and a percent sign is a unit too. Words that change the value (minus,
million, half, less) make the answer unclear, and so do brackets around the number: in accounts (3)
is a loss. Nothing is computed: 10-3 states no number.
"""

from __future__ import annotations

import re
from fractions import Fraction

MOST_CHARACTERS = 300  # an answer that is longer is an essay

_MINUS = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"), "-")
_LATEX = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[()\[\]]|\\(?:left|right)(?![A-Za-z])|\\!", ""),
        (r"\{,\}", ","),
        (r"(?<=[0-9])(?:\\,|~)(?=[0-9])", "\u202f"),
        (r"\\[,;:> ]|~", " "),
        (r"\\([$%])", r"\1"),
        (r"\\(?:times|cdot)(?![A-Za-z])", "×"),
        (r"\\div(?![A-Za-z])", "÷"),
        (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", "°"),
        (r"\\[dt]?frac\s*([0-9])\s*([0-9])(?![0-9.,])", r" \1/\2 "),
        (r"\\[dt]?frac\s*\{\s*(-?[0-9.,]+)\s*\}\s*\{\s*([0-9.,]+)\s*\}", r" \1/\2 "),
    )
)
_WRAPPED = re.compile(
    r"\\(?:boxed|fbox|mbox|text|textbf|textit|textrm|mathbf|mathrm)\s*\{([^{}]*)\}"
)
_EMPHASIS = re.compile(r"(?<![\w)])(\*\*|\*|__|_|`)(?=\S)(.+?)(?<=\S)\1(?![\w(])")
_AREA = re.compile(r"\b(mm|cm|m|km|in|ft|yd|mi)\s*(?:\^\s*(?:[23]|\{[23]\})|[²³])(?![0-9])")
_TIMES = re.compile(r"(?<=[0-9])\s*[xX]\s*(?=[0-9])")

_DIGITS = r"(?:[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?:[\u00a0\u2009\u202f][0-9]{3})+)(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"""(?<![\w.+-])(?:(?P<sign>[-+])(?P<gap>\s*))?(?:[$€£¥₹]\s*)?
    (?:(?P<whole>[0-9]+)[^\S\n]+(?P<part>[0-9]+)\s*/\s*(?P<parts>[0-9]+)
    |(?P<decimal>{_DECIMAL})
     (?:[eE](?P<e>[-+]?[0-9]{{1,3}})(?![0-9])
     |\s*[×*·]\s*10\s*\^\s*(?P<brace>\{{)?(?P<power>[-+]?[0-9]{{1,3}})(?(brace)\}}|(?![0-9]))
     |\s*/\s*(?P<divisor>{_DECIMAL}))?)""",
    re.VERBOSE,
)
_SURROUNDING = re.compile(r"[A-Za-z\s.,;:'\"()$€£¥₹#%°¢&!]*")
_INSIDE_WORD = re.compile(r"(?<=[A-Za-z])[-/](?=[A-Za-z])")
_NOT_A_UNIT = frozenset(
    """
    minus negative neg plus less fewer than not no never nor neither without least most under over
    below above between or ish
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
    hundred hundreds thousand thousands million millions billion billions trillion trillions
    dozen dozens mn bn half halves third thirds quarter quarters fourth fourths fifth fifths sixth
    sixths eighth eighths tenth tenths hundredth hundredths thousandth thousandths
    tens lakh lakhs crore crores twice thrice double doubled triple tripled halved
    squared cubed factorial root power point divided multiplied
    log ln exp sin cos tan sqrt abs mod reciprocal inverse
    st nd rd th pi
    """.split()
)
_SHORT_UNITS = frozenset("aghlmsCFL")
_SHORT_WORDS = frozenset("aAI")
_ARITHMETIC = re.compile(r"(?=.*[0-9)%]\s*[-+*/×÷·])[0-9.,+*/×÷·()$€£%\s-]+", re.DOTALL)


def stated_number(text: str) -> Fraction | None:
    """Return the value of a text that states one number, as in -$1,250.50; None if unclear."""
    *left, last = _sides(text)
    return _value(last) if all(map(_is_name, left)) else None


def calculated_number(text: str) -> Fraction | None:
    """Return `stated_number`, or the right side of a calculation, as in 9 + 9 = 18."""
    *left, last = _sides(text)
    written_out = all(_is_name(side) or _ARITHMETIC.fullmatch(side) for side in left)
    return _value(last) if written_out else None


def _sides(text: str) -> list[str]:
    """Return what stands between the equals signs, without LaTeX and emphasis."""
    if len(text) > MOST_CHARACTERS:
        return [""]
    text = text.translate(_MINUS)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    wrapped = 1
    while wrapped:
        text, wrapped = _WRAPPED.subn(r" \1 ", text)
    text = _EMPHASIS.sub(r"\2", text)
    return re.split("[=≈]", _TIMES.sub(" × ", _AREA.sub(r"\1", text)))


def _is_name(side: str) -> bool:
    """Whether this side of an equation only names the other, as x and "Total cost" do."""
    name = side.strip(" $\n")
    return name.isascii() and name.isalpha() if len(name) == 1 else _is_plain(name, _SHORT_WORDS)


def _is_plain(text: str, short: frozenset[str]) -> bool:
    """Whether no character or word of ``text`` can change the value of a number beside it."""
    text = _INSIDE_WORD.sub(" ", re.sub("['’]s\\b", "", text))
    if not _SURROUNDING.fullmatch(text):
        return False
    words = re.findall("[A-Za-z]+", text)
    return all(
        word in short if len(word) == 1 else word.lower() not in _NOT_A_UNIT for word in words
    )


def _value(statement: str) -> Fraction | None:
    label, _, statement = statement.rpartition(":")
    found = list(_NUMBER.finditer(statement))
    if len(found) != 1 or not _is_plain(label, _SHORT_WORDS):
        return None
    (number,) = found
    before, after = statement[: number.start()], statement[number.end() :]
    raised = re.search(r"\b(?:square|cube)\b", before, re.IGNORECASE)  # behind it a unit
    detached = number["gap"] and re.search("[A-Za-z]", before)  # a dash, or a minus sign?
    enclosed = before.rstrip(" $").endswith("(") and after.lstrip(" $.").startswith(")")
    endless = "." in number[0] and re.match(r"\s*(?:\.\.|…)", after)  # 0.333...
    after = re.sub(r"^(\s*)/\s*(?=[A-Za-z])", r"\1 per ", after.replace("…", "..."))
    if raised or detached or enclosed or endless or after.startswith("!"):
        return None
    if not (_is_plain(before, _SHORT_WORDS) and _is_plain(after, _SHORT_UNITS)):
        return None
    size = _size(number)
    return -size if size is not None and number["sign"] == "-" else size


def _size(number: re.Match[str]) -> Fraction | None:
    """Return the value without its sign; None for a fraction that is none."""
    if number["whole"]:
        part, parts = int(number["part"]), int(number["parts"])
        return int(number["whole"]) + Fraction(part, parts) if part < parts else None
    size = _decimal(number["decimal"])
    if number["divisor"]:
        divisor = _decimal(number["divisor"])
        return size / divisor if divisor else None
    return size * Fraction(10) ** int(number["e"] or number["power"] or 0)


def _decimal(digits: str) -> Fraction:
    return Fraction(re.sub("[^0-9.]", "", digits))
