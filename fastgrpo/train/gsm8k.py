"""Grade-school math with answers in tags: one reward for the answer and one for the tags."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from .chat import chat_prompt
from .data import read_jsonl, text_field, train_and_held_out
from .rewards import Accuracy, Reward, one_by_one
from .stated_number import calculated_number, stated_number
from .tasks import Example, Task

SYSTEM_PROMPT = """Solve the problem. Write your reply in exactly this form:
<reasoning>
the steps that lead to the result
</reasoning>
<answer>
the result, a number and nothing else
</answer>"""
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")


def extract_answer(completion: str) -> str | None:
    """Return the text in the last answer tag; None if it is empty, missing or not closed."""
    _, opened, rest = completion.rpartition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    answer = answer.strip()
    return answer if opened and closed and answer not in ("", "...") else None


def correctness_reward(completion: str, answer: str) -> float:
    """Return 2.0 for exactly the answer, 1.5 for a text that states its number, else 0."""
    extracted = extract_answer(completion)
    if extracted is None:
        return 0.0
    if extracted == answer:
        return 2.0
    number = stated_number(extracted)
    return 1.5 if number is not None and number == stated_number(answer) else 0.0


def format_reward(completion: str) -> float:
    """Return 0.2 for each of the four tags that the completion contains."""
    return 0.2 * sum(tag in completion for tag in TAGS)


def is_correct(completion: str, answer: str) -> bool:
    """Return whether the enclosed answer, or the result of a calculation in it, is ``answer``."""
    if correctness_reward(completion, answer) > 0:
        return True
    number = calculated_number(extract_answer(completion) or "")
    return number is not None and number == stated_number(answer)


def messages(question: str) -> list[dict[str, str]]:
    """Return system prompt and question."""
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": question},
    ]


def read_examples(path: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Read a JSONL file: ``question`` and ``answer`` (the result follows the last ####) a line."""

    def example(row: dict[str, Any]) -> Example:
        chat = messages(text_field(row, "question").strip())
        _, mark, answer = text_field(row, "answer").rpartition("####")
        if not mark:
            raise ValueError("expected an answer with '####' before its result, got none")
        if not answer.strip():
            raise ValueError("expected a result behind the answer's last '####', got nothing")
        return Example(
            chat_prompt(tokenizer, chat),
            answer.strip(),
            {"question": row["question"]},
            messages=tuple(chat),
        )

    return read_jsonl(path, example)


def gsm8k_task(
    tokenizer: PreTrainedTokenizerBase, data: str, eval_data: str | None, eval_size: int
) -> Task:
    """Return the task; without ``eval_data``, at most the last tenth of ``data`` is held out."""
    train, held_out = train_and_held_out(read_examples, tokenizer, data, eval_data, eval_size)
    return Task("gsm8k", train, held_out, REWARDS, Accuracy(one_by_one(is_correct)))


REWARDS = (
    Reward("correctness", one_by_one(correctness_reward)),
    Reward("format", one_by_one(lambda completion, _: format_reward(completion))),
)
