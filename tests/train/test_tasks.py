"""The tasks' own rewards, and examples that cannot be read."""

from __future__ import annotations

import json
from itertools import islice

import pytest

from fastgrpo.train import gsm8k
from fastgrpo.train.arithmetic import arithmetic_task, character_tokenizer
from fastgrpo.train.chat import chat_prompt
from fastgrpo.train.scoring import right, score
from fastgrpo.train.stated_number import stated_number
from fastgrpo.train.tasks import Example, Shuffled, Task

from .conftest import ROOT


def judged(task: Task, completion: str) -> list:
    """Reward of a completion of the task's first prompt, and whether it is right."""
    one = (task, task.train[:1], [completion])
    return [score(*one).rewards.item(), *right(*one)]


def tagged(answer: str) -> str:
    return f"<reasoning>\nsteps\n</reasoning>\n<answer>\n{answer}\n</answer>"


@pytest.mark.parametrize(
    ("completion", "answer", "correctness", "tags"),
    [
        (tagged("18"), "18", 2.0, 0.8),
        (tagged("18.0"), "18", 1.5, 0.8),
        (tagged("$18"), "18", 1.5, 0.8),
        (tagged("1,250 dollars"), "1250", 1.5, 0.8),
        (tagged("1250"), "1,250", 1.5, 0.8),
        (tagged("-3"), "-3", 2.0, 0.8),
        (tagged("3"), "-3", 0.0, 0.8),
        (tagged(".5"), "0.5", 1.5, 0.8),
        (tagged("9 + 9 = 18"), "18", 0.0, 0.8),  # three numbers: which one is meant?
        (tagged("eighteen"), "18", 0.0, 0.8),
        (tagged("..."), "...", 0.0, 0.8),  # the form repeated, not an answer
        (tagged(""), "18", 0.0, 0.8),
        ("<answer>7</answer> no: <answer>18</answer>", "18", 2.0, 0.4),  # the last one counts
        ("<answer>18", "18", 0.0, 0.2),
        ("18</answer>", "18", 0.0, 0.2),
        ("</answer>18<answer>", "18", 0.0, 0.4),
        ("<Answer>18</Answer>", "18", 0.0, 0.0),
        ("18", "18", 0.0, 0.0),
        ("", "18", 0.0, 0.0),
        (tagged("__import__('os').getcwd()"), "18", 0.0, 0.8),
        (tagged("9" * 9999), "8" * 9999, 0.0, 0.8),  # both are inf as floats
    ],
)
def test_gsm8k_rewards(completion: str, answer: str, correctness: float, tags: float) -> None:
    assert gsm8k.correctness_reward(completion, answer) == correctness
    assert gsm8k.format_reward(completion) == pytest.approx(tags)


@pytest.mark.parametrize(
    ("completion", "correct"),
    [
        (tagged("18.00"), True),
        (tagged("9 + 9 = 18"), True),
        (tagged("Total = 9 + 9 = 18 apples"), True),
        (tagged("18 + 9"), False),
        (tagged("9 + 18"), False),
        (tagged("2x = 18"), False),
        (tagged("x + 3 = 18"), False),
        (tagged("9 = 18 - 9"), False),
        ("18", False),
    ],
)
def test_gsm8k_accuracy_counts_the_result_of_a_calculation(completion: str, correct: bool) -> None:
    assert gsm8k.is_correct(completion, "18") is correct


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "at least one example"),
        ('{"question": "a", "answer": "b #### 1"}\nnot json', "line 2"),
        ('{"question": "a"}', "line 1.*answer"),
        ('{"question": "a", "answer": "1"}', "line 1.*####"),
        ('{"question": 3, "answer": "#### 1"}', "line 1"),
        ("[]", "line 1"),
        ('{"question": "a", "answer": "b ####"}', "line 1.*behind"),
        ('\n{"question": "a", "answer": "#### 1\\n#### \\n"}', "line 2.*behind"),
        ('{"question": "a", \n"answer": "#### 1"}', "line 1"),
        ("\n \r\n", "at least one example"),
    ],
)
def test_malformed_data_names_the_line(tmp_path, content: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        gsm8k.read_examples(str(path), character_tokenizer())


ROW = '{"question": "a", "answer": "#### 1"}'


@pytest.mark.parametrize(
    ("content", "answers"),
    [
        (f"{ROW}\n{ROW}", ["1", "1"]),
        (f"{ROW}\r\n{ROW}\r\n", ["1", "1"]),
        (f"\ufeff{ROW}\n", ["1"]),
        (f"\n{ROW}\n\n \t\n{ROW}\n\n", ["1", "1"]),
        ('{"question": "a", "answer": "#### Step\\n2\\n#### 42"}', ["42"]),
        ('{"question": "a", "answer": "##### 42 "}', ["42"]),
    ],
    ids=["no-end", "crlf", "bom", "blank", "two-marks", "five"],
)
def test_lines_of_a_jsonl_file(tmp_path, content: str, answers: list[str]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content.encode())
    examples = gsm8k.read_examples(str(path), character_tokenizer())
    assert [e.answer for e in examples] == answers


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"], ids=ascii)
def test_only_newlines_separate_lines(tmp_path, separator: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(ROW.replace("a", f"a{separator}b", 1).encode() + b"\n")
    (example,) = gsm8k.read_examples(str(path), character_tokenizer())
    assert f"a{separator}b" in example.prompt


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_another_encoding_is_named(tmp_path, encoding: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(ROW.replace("a", "\xe9", 1).encode(encoding))
    with pytest.raises(ValueError, match="data.jsonl, line 1: expected UTF-8"):
        gsm8k.read_examples(str(path), character_tokenizer())


def test_gsm8k_prompts_and_split(tmp_path) -> None:
    path, tokenizer = tmp_path / "data.jsonl", character_tokenizer()
    path.write_text(
        "".join(
            json.dumps({"question": f" q{i} ", "answer": f"a\n#### {i}"}) + "\n" for i in range(30)
        )
    )
    task = gsm8k.gsm8k_task(tokenizer, str(path), None, eval_size=256)
    assert len(task.train) == 27 and len(task.held_out) == 3
    assert task.held_out[0] == Example(
        f"{gsm8k.SYSTEM_PROMPT}\n\nq27\n",
        "27",
        {"question": " q27 "},
        messages=tuple(gsm8k.messages("q27")),
    )

    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    )
    assert (
        chat_prompt(tokenizer, gsm8k.messages("q"))
        == f"[system]{gsm8k.SYSTEM_PROMPT}[user]q[assistant]"
    )
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "[user]{{ messages[0].content }}"
    )
    assert chat_prompt(tokenizer, gsm8k.messages("q")) == f"[user]{gsm8k.SYSTEM_PROMPT}\n\nq"


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (
            "{% for m in messages %}{% if m.role == 'user' %}[user]{{ m.content }}{% endif %}"
            "{% endfor %}",
            "[user]be brief\n\nq",
        ),
        (
            "{% for m in messages %}[{{ m.role }}]{% for c in m.content %}{{ c.text }}{% endfor %}"
            "{% endfor %}",
            "[system]be brief[user]q",
        ),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{% for c in m.content %}{{ c.text }}"
            "{% endfor %}{% endif %}{% endfor %}",
            "be brief\n\nq",
        ),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}", None),
        ("[user]", ""),
        ("{{ raise_exception('no') }}", ""),
    ],
    ids=["passes over", "parts", "parts alone", "trims", "keeps nothing", "refuses"],
)
def test_a_template_keeps_every_message(template: str, prompt: str | None) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": " q"}]
    if prompt == "":
        with pytest.raises(ValueError, match="chat template that keeps|template takes: no"):
            chat_prompt(tokenizer, messages)
    else:
        found = chat_prompt(tokenizer, messages)
        assert found.replace(" ", "") == (prompt or "[system]be brief[user]q").replace(" ", "")


def test_half_of_a_surrogate_pair_is_found_when_it_is_read(tmp_path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"question": "\\ud83d\\ude00", "answer": "#### 1"}\n'
        '{"question": "a \\ud83d", "answer": "#### 1"}\n'
    )
    with pytest.raises(ValueError, match="line 2: expected whole characters, got half of a surr"):
        gsm8k.read_examples(str(path), character_tokenizer())


def test_the_dataset_itself_is_read_whole() -> None:
    folder = ROOT.parent / "shared" / "data" / "gsm8k"
    if not folder.exists():
        pytest.skip("no GSM8K files beside the repository")
    tokenizer = character_tokenizer()
    for name, count in (("train.jsonl", 7473), ("test.jsonl", 1319)):
        examples = gsm8k.read_examples(str(folder / name), tokenizer)
        assert len(examples) == count
        assert all(stated_number(e.answer) is not None for e in examples)


def test_arithmetic_holds_out_what_it_does_not_train_on() -> None:
    task, other = arithmetic_task(0, 512), arithmetic_task(1, 512)
    prompts = {e.prompt for e in task.held_out}
    assert len(prompts) == 512 and task.held_out != other.held_out
    assert not prompts & {e.prompt for e in task.train + task.demonstrations}
    a, b = task.train[0].prompt[:-1].split("+")
    assert judged(task, str(int(a) + int(b))) == [1.0, True]
    for wrong in ("", "7", f"{int(a) + int(b)} ", f"0{int(a) + int(b)}"):
        assert judged(task, wrong) == [0.0, False]


def test_the_teacher_of_arithmetic_is_careless_but_not_always() -> None:
    task = arithmetic_task(0, 512)
    right: dict[str, list[bool]] = {}
    for shown, known in zip(task.demonstrations, task.train, strict=True):
        assert shown.prompt == known.prompt
        assert int(known.answer) - int(shown.answer) in (0, 1)
        right.setdefault(shown.prompt[-2], []).append(shown.answer == known.answer)
    shares = {digit: sum(flags) / len(flags) for digit, flags in right.items()}
    assert shares["0"] == 1.0
    assert all(0.5 < shares[digit] < 0.9 for digit in "12")  # imitated greedily: right
    assert all(0.2 < shares[digit] < 0.5 for digit in "3456789")  # imitated greedily: wrong


def test_every_example_comes_before_any_comes_again() -> None:
    examples = [Example(str(i), "") for i in range(10)]
    seen = [e.prompt for e in islice(Shuffled(examples, seed=0), 20)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(e.prompt for e in examples)
    assert seen[:10] != seen[10:]
    assert [e.prompt for e in islice(Shuffled(examples, seed=0), 4)] == seen[:4]
    with pytest.raises(ValueError, match="at least one"):
        next(Shuffled([], seed=0))


def test_arithmetic_keeps_sums_to_train_on() -> None:
    assert len(arithmetic_task(seed=0, eval_size=8999).train) == 1
    with pytest.raises(ValueError, match="eval_size: expected below 9000, got 9000"):
        arithmetic_task(seed=0, eval_size=9000)
