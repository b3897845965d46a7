"""`launch` tells what failed before the device ran from what the device says."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest
import torch

from fastgrpo_kernels import runtime
from fastgrpo_kernels.runtime import HAS_TRITON, INTERPRETED, Launch, LaunchError, launch

pytestmark = pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="compiled kernels")
CPU = torch.device("cpu")


class Kernel:
    """A kernel whose launch raises an error, or returns what it was given."""

    def __init__(self, error: Exception | None = None):
        self.error, self.calls = error, []
        self.fn = lambda: None
        self.fn.__name__ = "_some_kernel"

    def __getitem__(self, grid):
        def run(**arguments):
            self.calls.append((grid, arguments))
            if self.error:
                raise self.error
            return "compiled"

        return run


def before_the_device():
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return {
        "shared memory": OutOfResources(300_000, 232_448, "shared memory"),
        "compiler": CompilationError("source", None, "unsupported"),
        "ptxas": PTXASError("unknown architecture"),
        "passes": RuntimeError("PassManager::run failed"),
        "no C compiler": RuntimeError("Failed to find C compiler. Please specify via CC"),
        "no ptxas": RuntimeError("Cannot find ptxas"),
        "cache on a file system without execution": ImportError("failed to map segment"),
        "LLVM": RuntimeError("failed to translate module to LLVM IR"),
        "C compiler": subprocess.CalledProcessError(1, "gcc"),
        "cache": PermissionError(13, "Permission denied", "/cache"),
        "driver": RuntimeError(
            "Triton Error [CUDA]: no kernel image is available for execution on the device"
        ),
        "descriptor": RuntimeError(
            "Triton Error [CUDA]: Failed to create tensor map descriptor: invalid argument"
        ),
        "hip": RuntimeError("Triton Error [HIP]:  Code: 1, Message: invalid argument"),
    }


OF_THE_DEVICE = {
    "illegal address": RuntimeError(
        "Triton Error [CUDA]: an illegal memory access was encountered"
    ),
    "assertion": RuntimeError("Triton Error [CUDA]: device-side assert triggered"),
    "launch failure": RuntimeError("Triton Error [CUDA]: unspecified launch failure"),
    "torch": torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700),
    "memory": torch.OutOfMemoryError("CUDA out of memory"),
    "a bug": TypeError("dynamic_func() missing 1 required positional argument: 'N'"),
}


@pytest.mark.parametrize("name", before_the_device() if HAS_TRITON else ())
def test_what_fails_before_the_device_runs_is_one_error(name):
    error = before_the_device()[name]
    with pytest.raises(LaunchError, match="_some_kernel cannot be launched: ") as caught:
        launch(Kernel(error), (1,), Launch(), CPU)
    assert caught.value.__cause__ is error
    assert type(error).__name__ in str(caught.value) and str(error) in str(caught.value)


@pytest.mark.parametrize("name", OF_THE_DEVICE)
def test_an_error_of_the_device_passes_unchanged(name):
    error = OF_THE_DEVICE[name]
    with pytest.raises(type(error)) as caught:
        launch(Kernel(error), (1,), Launch(), CPU)
    assert caught.value is error


def test_what_a_launch_takes_and_returns():
    kernel = Kernel()
    assert launch(kernel, (2, 3), Launch({"BLOCK": 8}, num_warps=2), CPU, N=5) == "compiled"
    settings = dict(BLOCK=8, num_warps=2, num_stages=1, enable_fp_fusion=True)
    assert kernel.calls == [((2, 3), {"N": 5} | settings)]


def test_row_31_a_launch_is_on_the_device_of_its_data(monkeypatch):
    """Triton launches on the current one; afterwards that is current again."""
    current = ["cuda:0"]

    @contextlib.contextmanager
    def device(which):
        before, current[0] = current[0], str(which)
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    seen = []

    class Watched(Kernel):
        def __getitem__(self, grid):
            seen.append(current[0])
            return super().__getitem__(grid)

    launch(Watched(), (1,), Launch(), torch.device("cuda:1"))
    assert seen == ["cuda:1"] and current == ["cuda:0"]
    with pytest.raises(TypeError):
        launch(Watched(TypeError("a bug")), (1,), Launch(), torch.device("cuda:1"))
    assert seen[1:] == ["cuda:1"]


@pytest.mark.parametrize("grid", [(0,), (0, 4), (4, 0)])
def test_a_grid_without_programs_launches_nothing(grid):
    kernel = Kernel()
    assert launch(kernel, grid, Launch(), CPU) is None
    assert not kernel.calls


def test_every_kernel_is_launched_by_it():
    """A launch elsewhere would not be caught."""
    sources = list(Path(runtime.__file__).parent.glob("*.py"))
    assert len(sources) > 10
    for path in sources:
        text = path.read_text()
        assert "_kernel[" not in text, path
        assert ".kwargs()" not in text or path.name == "runtime.py", path
