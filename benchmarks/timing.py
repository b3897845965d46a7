"""Time calls against each other: one process, rotated order, the GEMM bound among them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.data import LossInputs

L2_FLUSH_BYTES = 256 << 20

Call = Callable[[], object]


class GemmBound:
    """The matrix products that a call cannot avoid, into preallocated outputs.

    With `gemms` = 1 these are the logits, with 2 dhidden as well (a frozen head), with 3 dweight
    too. The operands of the gradient products have the size and layout of dlogits, in `dtype`. Long
    batches go in blocks of rows, as in any implementation whose logits have to fit.
    """

    def __init__(
        self, batch: LossInputs, gemms: int, dtype: torch.dtype, block: int = 8192
    ) -> None:
        self.hidden = batch.hidden.detach().flatten(0, 1).to(dtype)  # (N, H)
        self.weight = batch.weight.detach().to(dtype)  # (V, H)
        rows, vocab = self.hidden.shape[0], self.weight.shape[0]
        self.logits = self.hidden.new_empty(min(rows, block), vocab)
        self.dhidden = torch.empty_like(self.hidden) if gemms > 1 else None
        self.dweight = torch.empty_like(self.weight) if gemms > 2 else None
        self.flop = 2 * rows * vocab * self.hidden.shape[1] * gemms

    def __call__(self) -> None:
        block = self.logits.shape[0]
        for start in range(0, self.hidden.shape[0], block):
            hidden = self.hidden[start : start + block]
            logits = self.logits[: hidden.shape[0]]
            torch.mm(hidden, self.weight.T, out=logits)
            if self.dhidden is not None:
                torch.mm(logits, self.weight, out=self.dhidden[start : start + block])
            if self.dweight is not None and start == 0:
                torch.mm(logits.T, hidden, out=self.dweight)
            elif self.dweight is not None:
                self.dweight.addmm_(logits.T, hidden)


def bound_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype whose GEMMs bound a call: 16-bit ones are emulated on most CPUs."""
    return dtype if device.type == "cuda" else torch.promote_types(dtype, torch.float32)


def synced_clock() -> float:
    """Return seconds, once everything that was launched is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def time_once(call: Call, flush: Tensor | None = None) -> float:
    """Return the milliseconds of one call; with `flush`, by CUDA events and with a cold L2."""
    if flush is None:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    flush.zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def interleave(
    calls: Mapping[str, Call],
    *,
    device: torch.device,
    rounds: int,
    seconds: float,
    slow_ms: float = 20_000.0,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return each call's samples in ms, one per round, and the errors of the calls that failed.

    Every round runs every call once, and starts one call further on than the round before. One
    round is always run. Others follow up to `rounds`, as long as the next one fits into `seconds`.
    A call that takes longer than `slow_ms` is left out of the later rounds.
    """
    flush = None
    if device.type == "cuda":
        flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    failures: dict[str, str] = {}
    begun = time.monotonic()
    for index in range(rounds):
        running = [
            name for name, done in samples.items() if name not in failures and len(done) == index
        ]
        expected = sum(samples[name][-1] for name in running if samples[name]) / 1e3
        if index and time.monotonic() - begun + expected > seconds:
            break
        shift = index % max(len(running), 1)
        for name in running[shift:] + running[:shift]:
            if index and samples[name][-1] > slow_ms:
                continue
            try:
                samples[name].append(time_once(calls[name], flush))
            except Exception as error:  # noqa: BLE001  a peer's failure is a result
                failures[name] = describe(error)
    return {name: done for name, done in samples.items() if name not in failures}, failures


def describe(error: Exception) -> str:
    """Return one line of text for a record."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def percentile(samples: list[float], share: float) -> float:
    """Return the `share` quantile of `samples`, interpolated."""
    return torch.tensor(samples, dtype=torch.float64).quantile(share).item()


def summary(samples: list[float], bound: list[float]) -> dict[str, float | list[float]]:
    """Return median, p10, p90 in ms, and the median over rounds of bound / call."""
    ratios = [floor / sample for floor, sample in zip(bound, samples, strict=False)]
    return {
        "median_ms": percentile(samples, 0.5),
        "p10_ms": percentile(samples, 0.1),
        "p90_ms": percentile(samples, 0.9),
        "share_of_bound": percentile(ratios, 0.5) if ratios else float("nan"),
        "samples_ms": [round(sample, 4) for sample in samples],
        "shares": [round(ratio, 4) for ratio in ratios],
    }
