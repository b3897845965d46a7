"""Checkpoints that are written completely or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .model import Policy


def save_checkpoint(policy: Policy, folder: Path) -> None:
    """Write model and tokenizer; an old ``folder`` is replaced only when all is written."""
    written, replaced = (
        folder.with_name(f"{folder.name}.tmp-{os.getpid()}"),
        folder.with_name(f"{folder.name}.old"),
    )
    policy.model.save_pretrained(written)
    policy.tokenizer.save_pretrained(written)
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(written, folder)
    shutil.rmtree(replaced, ignore_errors=True)
