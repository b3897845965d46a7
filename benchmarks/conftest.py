"""Shared by the pytest benchmarks: batches, oracles, the bound, and the summary at the end.

On a CPU the parametrized shapes are tiny. They only check results there: what a tiny shape takes is
the time of Python, and says nothing about a real head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import pytest
import torch

from benchmarks import environment, providers
from benchmarks.batches import make_batch
from benchmarks.cases import distances
from benchmarks.compare import Comparison, table
from benchmarks.data import LossInputs
from benchmarks.measure import MODES, SUPPORT_MODES, Errors, Outcome, check, oracle, run
from benchmarks.peak_memory import allocated_peak_mib
from benchmarks.shapes import CUDA_SHAPES, TINY_SHAPES, Shape
from benchmarks.timing import GemmBound, bound_dtype, describe, percentile, time_once

ORACLE_ROWS = 2048  # the oracle's logits are fp64
ON_GPU = torch.cuda.is_available()
AVAILABLE, MISSING = providers.load()
LINES = pytest.StashKey[list[str]]()
COMPARISON = pytest.StashKey[Comparison]()


class Case(NamedTuple):
    part: LossInputs  # as many of the completions as the oracle can take
    exact: Outcome  # what they should give
    batch: LossInputs
    bound_ms: float


# One at a time: the gradients and the bound's logits of a real head fill a GPU.
@lru_cache(maxsize=1)
def _case(shape: Shape, dtype: torch.dtype, mode: str) -> Case:
    device = environment.device()
    batch = make_batch(shape, dtype, mode, device)
    length = shape.rows // shape.sequences
    part = batch
    if shape.rows > ORACLE_ROWS:
        # From the end: the completions without an advantage come first.
        part = batch.sequences(slice(shape.sequences - ORACLE_ROWS // length, None))
    gemms = (MODES | SUPPORT_MODES)[mode].gemms
    bound = GemmBound(batch, gemms, bound_dtype(dtype, device))
    flush = torch.empty(1, device=device) if ON_GPU else None
    bound()
    bound_ms = percentile([time_once(bound, flush) for _ in range(9)], 0.5)
    return Case(part, oracle(mode, part), batch, bound_ms)


@pytest.fixture
def measure(benchmark, request) -> Callable[[str, str, Shape, torch.dtype], None]:
    """Return a function that checks a provider in a mode; on a GPU it times it, adds a line."""

    def measure_case(name: str, mode: str, shape: Shape, dtype: torch.dtype) -> None:
        if name in MISSING:
            pytest.skip(f"{name}: {MISSING[name]}")
        provider = next(p for p in AVAILABLE if p.name == name)
        case = _case(shape, dtype, mode)
        call = partial(run, provider, mode, case.batch)
        try:
            found = distances(provider, mode, case.part, case.exact)
            peak = allocated_peak_mib(call, case.batch.hidden.device)
        except Exception as error:
            if name.startswith("fastgrpo"):
                raise
            pytest.skip(f"{name}: {describe(error)}")  # a shape it does not take, no memory
        check(provider, found, dtype)
        benchmark.group = f"{shape.label} {str(dtype).removeprefix('torch.')} {mode}"
        benchmark.extra_info |= {"peak_mib": peak, "bound_ms": case.bound_ms, **found._asdict()}
        benchmark.disabled |= not ON_GPU  # one call, no clock
        benchmark.pedantic(call, rounds=5, warmup_rounds=1)
        if benchmark.stats is not None:  # None where disabled
            median_ms = benchmark.stats.stats.median * 1e3
            line = _line(benchmark.group, name, median_ms, case.bound_ms, peak, found)
            request.config.stash.setdefault(LINES, []).append(line)

    return measure_case


def _line(
    group: str, name: str, median_ms: float, bound_ms: float, peak_mib: float, found: Errors
) -> str:
    distances = [
        f"{label} {value:.1e}"
        for label, value in (
            ("logps", found.logps_rms),
            ("dhidden", found.dhidden),
            ("dweight", found.dweight),
        )
        if value is not None
    ]
    share = bound_ms / median_ms
    head = f"{group} | {name} | {median_ms:.2f} ms | {share:.2f} of the bound | {peak_mib:.1f} MiB"
    return " | ".join([head, *distances])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        shapes = CUDA_SHAPES if ON_GPU else TINY_SHAPES
        labels = [f"{shape.name}-{shape.rows}" for shape in shapes]
        metafunc.parametrize("shape", shapes, ids=labels, scope="session")
    if "dtype" in metafunc.fixturenames:
        dtypes = [torch.bfloat16] if ON_GPU else [torch.float32, torch.bfloat16]
        metafunc.parametrize("dtype", dtypes, ids=[str(d)[6:] for d in dtypes], scope="session")
    if "provider" in metafunc.fixturenames:
        metafunc.parametrize("provider", providers.LOADERS, ids=lambda n: n.replace(" ", "-"))


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's own table
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    lines = config.stash.get(LINES, [])
    if COMPARISON in config.stash:
        lines = [*lines, *table(config.stash[COMPARISON]).splitlines()]
    if lines:
        terminalreporter.section("fastgrpo benchmarks")
        terminalreporter.write_line(environment.header())
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture
def keep_for_summary(request: pytest.FixtureRequest) -> Callable[[Comparison], None]:
    """Return a function that puts a comparison at the end of the terminal's summary."""
    return partial(request.config.stash.__setitem__, COMPARISON)
