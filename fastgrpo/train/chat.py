"""Conversations as a model reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .tasks import TemplatedPrompt


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> str:
    """Return the messages in the tokenizer's chat template, up to where the model replies.

    Without a template, a system message and one of a user are joined; a longer conversation is a
    ValueError. A template that refuses a system message, or passes over it, gets it in front of the
    user's first. One that wants parts of messages gets each as one part. A ValueError where a text
    of system or user does not come out in any of these ways.
    """
    if tokenizer.chat_template is None:
        if [m["role"] for m in messages] not in (["user"], ["system", "user"]):
            raise ValueError("expected a tokenizer with a chat template for this conversation")
        return _joined(messages) + "\n"
    texts = [m["content"].strip() for m in messages if m["role"] in ("system", "user")]
    refused: TemplateError | None = None
    for way in _ways(messages):
        try:
            prompt = _templated(tokenizer, way)
        except TemplateError as error:
            refused = refused or error
            continue
        if all(text in prompt for text in texts):
            return prompt
    if refused is not None:
        raise ValueError(f"expected messages that the chat template takes: {refused}") from refused
    raise ValueError("expected a chat template that keeps every message of system and user")


def _ways(messages: Sequence[dict[str, str]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages as a template may want them."""
    ways = [[*messages]]
    if [m["role"] for m in messages[:2]] == ["system", "user"]:
        ways.append([{"role": "user", "content": _joined(messages[:2])}, *messages[2:]])
    yield from ways
    for way in ways:
        yield [m | {"content": [{"type": "text", "text": m["content"]}]} for m in way]


def _joined(messages: Sequence[dict[str, str]]) -> str:
    return "\n\n".join(m["content"] for m in messages)


def _templated(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]
) -> TemplatedPrompt:
    return TemplatedPrompt(
        tokenizer.apply_chat_template([*messages], tokenize=False, add_generation_prompt=True)
    )
