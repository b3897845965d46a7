"""Measure one case, a shape, a dtype and a mode, for all providers against each other."""

from __future__ import annotations

import subprocess
import time
from functools import partial
from typing import Any

import torch

from benchmarks import environment
from benchmarks.batches import make_batch
from benchmarks.conditions import CONDITIONS
from benchmarks.data import LossInputs
from benchmarks.measure import MODES, Errors, Outcome, check, errors, oracle, run, sampling_noise
from benchmarks.peak_memory import allocated_peak_mib, resident_peak_mib
from benchmarks.profiles import expected_kept, newest_profile
from benchmarks.providers import Provider
from benchmarks.shapes import Shape
from benchmarks.timing import GemmBound, bound_dtype, describe, interleave, summary

BOUND = "GEMM bound"


def distances(provider: Provider, mode: str, batch: LossInputs, exact: Outcome) -> Errors:
    """Return the errors of one call. If the mode gives no log-probs, a second call adds theirs."""
    found = errors(run(provider, mode, batch), exact, batch.completion_mask)
    if found.logps_rms is None:
        logps = errors(run(provider, "logps", batch), exact, batch.completion_mask)
        found = found._replace(logps_rms=logps.logps_rms, logps_max=logps.logps_max)
    if provider.sparsity and mode != "logps":
        noise = sampling_noise(mode, batch, exact, provider.sparsity)
        found = found._replace(dhidden_noise=noise.dhidden_noise, dweight_noise=noise.dweight_noise)
    batch.hidden.grad = batch.weight.grad = None
    return found


def accuracy(
    providers: list[Provider], shape: Shape, dtype: torch.dtype, mode: str, device: torch.device
) -> list[dict[str, Any]]:
    """Return one row for each provider: its errors against the oracle, and whether they pass."""
    batch = make_batch(shape, dtype, mode, device)
    exact = oracle(mode, batch)
    rows = []
    for provider in providers:
        row = _identity(provider.name, shape, dtype, mode)
        try:
            found = distances(provider, mode, batch, exact)
            row["errors"] = found._asdict()
            check(provider, found, dtype)
        except Exception as error:  # noqa: BLE001  a provider's failure is a result
            row["failure"] = describe(error)
        rows.append(row)
        _release()
    return rows


def speed(
    providers: list[Provider],
    shape: Shape,
    dtype: torch.dtype,
    mode: str,
    device: torch.device,
    *,
    rounds: int,
    seconds: float,
    peaks: bool,
) -> list[dict[str, Any]]:
    """Return one row for each provider and one for the bound: samples and shares of the bound.

    With `peaks` each provider runs before it is timed, and its row has the MiB that PyTorch
    allocated. Only CUDA needs a call to warm up: on a CPU the first call is like the others.
    """
    batch = make_batch(shape, dtype, mode, device)
    bound = GemmBound(batch, MODES[mode].gemms, bound_dtype(dtype, device))
    calls = {BOUND: bound}
    rows = {BOUND: _identity(BOUND, shape, bound_dtype(dtype, device), mode)}
    deadline = time.monotonic() + seconds
    bound()
    for provider in providers:
        row = rows[provider.name] = _identity(provider.name, shape, dtype, mode)
        call = calls[provider.name] = partial(run, provider, mode, batch)
        if not peaks:
            continue
        try:
            if device.type == "cuda":
                call()
            row["peak_mib"] = allocated_peak_mib(call, device)
        except Exception as error:  # noqa: BLE001
            row["failure"] = describe(error)
            del calls[provider.name]
        batch.hidden.grad = batch.weight.grad = None
        _release()
    samples, failures = interleave(
        calls, device=device, rounds=rounds, seconds=deadline - time.monotonic()
    )
    for name, row in rows.items():
        if name in samples:
            row |= summary(samples[name], samples[BOUND])
        elif name in failures:
            row["failure"] = failures[name]
    if MODES[mode].policy is not None:
        kept = expected_kept(batch.hidden.detach().flatten(0, 1), batch.weight.detach())
        for row in rows.values():
            row |= {"kept": kept, "profile": newest_profile(MODES[mode].policy).source}
    rows[BOUND]["tflops"] = bound.flop / rows[BOUND]["median_ms"] / 1e9
    rows[BOUND]["gpu"] = environment.gpu_state()
    return list(rows.values())


def conditioned(
    condition: str,
    providers: list[Provider],
    shape: Shape,
    device: torch.device,
    rounds: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """Return the rows of `speed` for an fp32 loss under one of CONDITIONS, with its name."""
    with CONDITIONS[condition]():
        rows = speed(
            providers,
            shape,
            torch.float32,
            "loss",
            device,
            rounds=rounds,
            seconds=seconds,
            peaks=False,
        )
    return [row | {"condition": condition} for row in rows]


def memory(
    providers: list[Provider], shape: Shape, dtype: torch.dtype, mode: str, *, timeout: float
) -> list[dict[str, Any]]:
    """Return one row for each provider: the peak resident MiB of a fresh process each.

    One that does not finish within `timeout` seconds is a failure, by name.
    """
    rows = []
    for provider in providers:
        row = _identity(provider.name, shape, dtype, mode)
        try:
            row["peak_mib"] = resident_peak_mib(provider.name, mode, shape, dtype, timeout)
        except subprocess.TimeoutExpired:
            row["failure"] = f"did not finish in {timeout:.0f} s"
        except ChildProcessError as error:
            row["failure"] = describe(error)
        rows.append(row)
    return rows


def _identity(provider: str, shape: Shape, dtype: torch.dtype, mode: str) -> dict[str, Any]:
    return {
        "provider": provider,
        "shape": shape._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "mode": mode,
    }


def _release() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
