"""The folder of a run: a new one, or one with a run that goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, flock
from io import FileIO
from pathlib import Path
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from . import ranks
from .atomic import whole_file
from .best_effort import say
from .checkpoint import checkpoints, load_training
from .flags import Flags
from .tasks import Task

SETTINGS = "settings.json"


def run_folder(config: Flags, task: str) -> Path:
    """Create and return ``output_dir``, or a new folder under runs/ named by task, seed, time.

    Raises ValueError for a folder that cannot be written. All processes but the first get a folder
    that nobody sees, for the system to remove.
    """
    if ranks.rank() > 0:
        return Path(tempfile.mkdtemp())
    if config.output_dir is not None:
        return _created(Path(config.output_dir))
    name = f"{task}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        folder = Path("runs") / (name + suffix)
        if not folder.exists():
            break
    return _created(folder)


def check_output_dir(output_dir: str | None, goes_on: bool = True) -> None:
    """Raise ValueError if there is a run in the folder, or if it cannot be written.

    ``goes_on``: a run can go on there by ``--resume``.
    """
    if ranks.rank() > 0:  # the first may have begun there
        return
    if output_dir == "":  # a variable of a shell without a value, not the folder that one is in
        raise ValueError("output_dir: expected a folder, got ''")
    folder = Path(output_dir or "runs")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"output_dir: expected a folder that can be written, got {folder}")
    if output_dir is not None and (folder / SETTINGS).exists():
        how = f"; --resume {output_dir} goes on with that run" if goes_on else ""
        raise ValueError(f"output_dir: expected a folder without a run, got {output_dir}{how}")
    if output_dir is not None and checkpoints(folder):  # older ones would be removed
        raise ValueError(f"output_dir: expected a folder without checkpoints, got {output_dir}")


def check_folder(config: Flags) -> None:
    """Raise ValueError unless a run can start in its folder, or can go on there."""
    if config.resume is None:
        check_output_dir(config.output_dir)
    elif _has_ended(Path(config.resume)):
        raise ValueError(f"resume: the run in {config.resume} has ended after its last step")


def lock(folder: Path) -> FileIO:
    """Lock the folder until the file is closed; ValueError if another process trains there."""
    file = (folder / "metrics.jsonl").open("ab", buffering=0)
    try:
        flock(file, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"output_dir: another process trains in {folder}") from None
    except OSError as error:  # some file systems have no locks
        say(f"a second process that trains in {folder} will not be noticed: {error!r}")
    return file


def check_unchanged(folder: Path, config: Any, step: int) -> None:
    """Raise ValueError if the locked folder is not as it was when the run began to load.

    ``step`` is that of the checkpoint which the run goes on from.
    """
    goes_on = getattr(config, "resume", None) is not None  # evolution has no such setting
    newest = max((at for at, _ in checkpoints(folder)), default=0)
    there = (folder / SETTINGS).exists()
    if ranks.rank() == 0 and (there != goes_on or newest != step or _has_ended(folder)):
        raise ValueError(f"output_dir: another process has trained in {folder} meanwhile")


def write_settings(folder: Path, config: Any) -> None:
    """Write the settings, from which a run goes on; those of a run that does stay."""
    if not (folder / SETTINGS).exists():
        text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
        with whole_file(folder / SETTINGS) as path:
            path.write_text(text, encoding="utf-8")


def saved_settings(folder: str) -> dict[str, Any]:
    """Return the settings of the run in a folder; ValueError if there is none."""
    path = Path(folder, SETTINGS)
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"resume: expected the folder of a run, got {folder}: {error}") from error
    known = {field.name for field in dataclasses.fields(Flags)}
    if not isinstance(saved, dict) or saved.keys() != known:
        raise ValueError(f"resume: expected the settings {sorted(known)} in {path}, got {saved}")
    return saved | {"resume": folder, "output_dir": folder}


def newest_state(
    config: Flags, task: Task, mesh: DeviceMesh | None = None
) -> dict[str, Any] | None:
    """Return the state of the newest checkpoint of the run that goes on; None: it starts.

    ``mesh`` is that of the policy. Raises ValueError if the checkpoint is not whole, or is of
    another task.
    """
    if config.resume is None:
        return None
    folder = Path(config.resume)
    if not (found := checkpoints(folder)):
        print(f"no checkpoint in {folder}: the run starts again")
        return None
    step, path = found[-1]
    state = load_training(path, mesh)
    if state["task"] != task.digest:
        raise ValueError(f"resume: expected the examples of the run in {folder}, got others")
    print(f"the run in {folder} goes on after step {step}")
    return state


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Context in which an error of the system is a ValueError that names the folder."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"output_dir: expected a folder that can be written, got {folder}: {error}"
        ) from error


def _has_ended(folder: Path) -> bool:
    if not (result := folder / "result.json").exists():
        return False
    try:
        return json.loads(result.read_text(encoding="utf-8"))["whole"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"resume: expected the report of a run in {result}") from error


def _created(folder: Path) -> Path:
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder
