"""Grade-school math with answers in tags: one reward for the answer and one for the tags."""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .stated_number import calculated_number, stated_number
from .tasks import Example, Task, TemplatedPrompt

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


def reward(completion: str, answer: str) -> float:
    """Return the sum of both rewards, between 0 and 2.8."""
    return correctness_reward(completion, answer) + format_reward(completion)


def is_correct(completion: str, answer: str) -> bool:
    """Return whether the enclosed answer, or the result of a calculation in it, is ``answer``."""
    if correctness_reward(completion, answer) > 0:
        return True
    number = calculated_number(extract_answer(completion) or "")
    return number is not None and number == stated_number(answer)


def build_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """Return system prompt and question in the chat template, or joined if there is none."""
    system, user = (
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": question},
    )
    joined = f"{SYSTEM_PROMPT}\n\n{question}\n"
    if tokenizer.chat_template is None:
        return joined
    try:
        return _templated(tokenizer, [system, user])
    except TemplateError:  # some templates, Gemma's among them, refuse a system message
        user["content"] = joined
        return _templated(tokenizer, [user])


def _templated(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> TemplatedPrompt:
    return TemplatedPrompt(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    )


def read_examples(path: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Read a JSONL file: ``question`` and ``answer`` (the result follows the last ####) a line.

    The file is UTF-8, with or without a byte order mark. Lines end with \\n or \\r\\n and with
    nothing else: a JSON string may hold other separators. Blank lines are passed over.
    """
    examples = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip(" \t\r")
            if text:
                question, answer = _read_row(json.loads(text))
                examples.append(Example(build_prompt(tokenizer, question), answer))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: expected UTF-8, got {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path}, line {number}: expected {{"question": "...", "answer": "... #### 42"}}, '
                f"got {error!r}"
            ) from error
    if not examples:
        raise ValueError(f"{path}: expected at least one example, got an empty file")
    return examples


def _read_row(row: dict[str, str]) -> tuple[str, str]:
    """Return question and result."""
    question, (_, mark, answer) = row["question"].strip(), row["answer"].rpartition("####")
    if not mark:
        raise ValueError("the answer has no '####'")
    if not answer.strip():
        raise ValueError("the answer has nothing behind its last '####'")
    return question, answer.strip()


def gsm8k_task(
    tokenizer: PreTrainedTokenizerBase, data: str, eval_data: str | None, eval_size: int
) -> Task:
    """Return the task; without ``eval_data``, at most the last tenth of ``data`` is held out."""
    train = read_examples(data, tokenizer)
    if eval_data is None:
        if len(train) < 2:
            raise ValueError(
                f"{data}: expected two examples or more to hold one out, or --eval-data"
            )
        count = max(1, min(eval_size or len(train), len(train) // 10))
        train, held_out = train[:-count], train[-count:]
    else:
        held_out = read_examples(eval_data, tokenizer)
        held_out = held_out[: eval_size or None]
    return Task(
        train=train, held_out=held_out, reward=reward, is_correct=is_correct, demonstrations=[]
    )
