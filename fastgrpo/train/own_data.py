"""A task of one's own: prompts and columns from JSON lines."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from .chat import chat_prompt
from .data import read_jsonl, text_field, train_and_held_out
from .tasks import Example, Task

ROLES = ("system", "user", "assistant", "tool")


def read_examples(path: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Read a JSONL file with a prompt on every line; all other fields are columns for rewards.

        {"prompt": "text as the model reads it", "answer": "42", "level": 3}
        {"prompt": [{"role": "user", "content": "..."}], "answer": "42"}
        {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "42"}]}

    A list of messages goes through the chat template. A last message of the assistant is no part
    of the prompt, but the ``answer``; "messages" and "prompt" mean the same.
    """

    def example(row: dict[str, Any]) -> Example:
        names = [name for name in ("prompt", "messages") if name in row]
        if len(names) != 1:
            raise ValueError(f"expected either 'prompt' or 'messages', got the fields {[*row]}")
        prompt = row[names[0]]
        columns = {k: v for k, v in row.items() if k not in ("prompt", "messages", "answer")}
        if {"prompts", "completions"} & columns.keys():
            raise ValueError("expected no fields 'prompts' or 'completions', which rewards get")
        answer = text_field(row, "answer") if row.get("answer") is not None else None
        if isinstance(prompt, str):
            return Example(prompt, answer, columns)
        messages = _messages(prompt)
        if messages[-1]["role"] == "assistant":
            if answer is not None:
                raise ValueError("expected one answer, got a field and an assistant's last message")
            answer = messages.pop()["content"]
        if not messages:
            raise ValueError("expected a message before the assistant's, got none")
        return Example(chat_prompt(tokenizer, messages), answer, columns, tuple(messages))

    return read_jsonl(path, example)


def own_task(
    tokenizer: PreTrainedTokenizerBase, data: str, eval_data: str | None, eval_size: int
) -> Task:
    """Return the task without rewards; without ``eval_data``, part of ``data`` is held out."""
    train, held_out = train_and_held_out(read_examples, tokenizer, data, eval_data, eval_size)
    return Task("jsonl", train, held_out, rewards=())


def _messages(prompt: object) -> list[dict[str, str]]:
    if not (isinstance(prompt, list) and prompt):
        raise ValueError(f"expected a text or a list of messages, got {prompt!r:.80}")
    for message in prompt:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"expected a role among {list(ROLES)} in {message!r:.80}")
        text_field(message, "content")
    return [*prompt]
