"""Folders and files that are written completely or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Context that fills a folder, which gets its name when all of it is on the disk.

    An older ``folder`` is replaced. After an error nothing is left of the new one.
    """
    finish_replacing(folder)
    written, replaced = _beside(folder)
    for path in (written, replaced):
        shutil.rmtree(path, ignore_errors=True)
    written.mkdir(parents=True)
    try:
        yield written
        for path in (written, *written.rglob("*")):
            sync(path)
    except BaseException:
        shutil.rmtree(written, ignore_errors=True)
        raise
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(written, folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def finish_replacing(folder: Path) -> None:
    """Give ``folder`` its name where `whole` was killed after it had taken that from an older one.

    All of the new one is then on the disk.
    """
    written, replaced = _beside(folder)
    if replaced.exists() and not folder.exists():
        os.replace(written if written.exists() else replaced, folder)


def finish_all(parent: Path) -> None:
    """Call `finish_replacing` for every folder that was being replaced in ``parent``."""
    for replaced in parent.glob("checkpoint*.old"):
        finish_replacing(replaced.with_suffix(""))


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Context that fills a file under another name; it gets ``path`` when it is on the disk.

    An older file is replaced. After an error nothing is left of the new one.
    """
    written = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield written
        sync(written)
        os.replace(written, path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the disk hold what was written."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Return where the new folder is filled, and where the older one waits to be removed."""
    return folder.with_name(f"{folder.name}.tmp"), folder.with_name(f"{folder.name}.old")
