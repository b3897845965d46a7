"""Conditions of a CPU that a user's machine may be in: fewer threads, or other work beside."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch

# Multiplies matrices on one thread, as other work on a shared machine does.
WORK = """
import torch
torch.set_num_threads(1)
a = torch.randn(1024, 1024)
while True:
    a @ a
"""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within, PyTorch computes on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def beside_a_busy_process() -> Iterator[None]:
    """Within, another process keeps one core busy."""
    with subprocess.Popen([sys.executable, "-c", WORK]) as busy:
        try:
            yield
        finally:
            busy.kill()


CONDITIONS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "one thread": one_thread,
    "beside a busy process": beside_a_busy_process,
}
