"""Conversations as a model reads them."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .tasks import TemplatedPrompt


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> str:
    """Return the messages in the tokenizer's chat template, up to where the model replies.

    Without a template, a system message and one of a user are joined; a longer conversation is a
    ValueError. A template that refuses a system message gets it in front of the user's first.
    """
    if tokenizer.chat_template is None:
        if [m["role"] for m in messages] not in (["user"], ["system", "user"]):
            raise ValueError("expected a tokenizer with a chat template for this conversation")
        return _joined(messages) + "\n"
    try:
        return _templated(tokenizer, messages)
    except TemplateError as error:
        if [m["role"] for m in messages[:2]] != ["system", "user"]:
            raise ValueError(f"expected messages that the chat template takes: {error}") from error
        first = {"role": "user", "content": _joined(messages[:2])}
        return _templated(tokenizer, [first, *messages[2:]])


def _joined(messages: Sequence[dict[str, str]]) -> str:
    return "\n\n".join(m["content"] for m in messages)


def _templated(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]
) -> TemplatedPrompt:
    return TemplatedPrompt(
        tokenizer.apply_chat_template([*messages], tokenize=False, add_generation_prompt=True)
    )
