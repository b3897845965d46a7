"""Data files: JSON lines, read with errors that name file and line, and a part held out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .tasks import Example


def read_jsonl(path: str, example: Callable[[dict[str, Any]], Example]) -> list[Example]:
    """Return ``example(row)`` for every JSON object of a file; it raises ValueError for a bad one.

    The file is UTF-8, with or without a byte order mark. Lines end with \\n or \\r\\n and with
    nothing else: a JSON string may hold other separators. Blank lines are passed over.
    """
    examples = []
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"data: expected a file that can be read, got {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip(" \t\r")
            if text:
                row = json.loads(text)
                if not isinstance(row, dict):
                    raise ValueError(f"expected a JSON object, got {text[:80]!r}")
                _check_characters(row)
                examples.append(example(row))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: expected UTF-8, got {error}") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: expected JSON, got {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not examples:
        raise ValueError(f"{path}: expected at least one example, got an empty file")
    return examples


def _check_characters(row: dict[str, Any]) -> None:
    r"""Raise ValueError for half of a surrogate pair (\ud83d alone), which no tokenizer reads."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = text[max(0, error.start - 20) : error.end + 20]
        raise ValueError(
            f"expected whole characters, got half of a surrogate pair in {shown!r}"
        ) from error


def text_field(row: dict[str, Any], name: str) -> str:
    """Return a field that must be a text; anything else is a ValueError."""
    if not isinstance(row.get(name), str):
        raise ValueError(f"expected a text as {name!r}, got {row.get(name)!r:.80}")
    return row[name]


def train_and_held_out(
    read: Callable[[str, PreTrainedTokenizerBase], list[Example]],
    tokenizer: PreTrainedTokenizerBase,
    data: str,
    eval_data: str | None,
    eval_size: int,
) -> tuple[list[Example], list[Example]]:
    """Return examples to train and to evaluate on, at most ``eval_size`` unless that is 0.

    Without ``eval_data``, at most the last tenth of ``data`` is held out.
    """
    train = read(data, tokenizer)
    if eval_data is not None:
        return train, read(eval_data, tokenizer)[: eval_size or None]
    if len(train) < 2:
        raise ValueError(f"{data}: expected two examples or more to hold one out, or --eval-data")
    count = max(1, min(eval_size or len(train), len(train) // 10))
    return train[:-count], train[-count:]
