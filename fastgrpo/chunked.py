"""The loops over logits tiles: everything vocabulary-sized happens here, one tile at a time.

With NVH = tokens * vocabulary * hidden size, one GEMM costs 2NVH. Three loops share the same steps
(logits GEMM -> `tile_stats` -> `tile_grad` -> gradient GEMMs), which the backends implement:

    logps_fwd        2NVH   a tile is a slice of the vocabulary; nothing is kept
    logps_and_grads  6NVH   a tile is a chunk of rows with all its logits, which become gradients as
                            soon as the loss knows dL/dlogp (4NVH when only `hidden` needs one)
    logps_bwd        6NVH   recomputes slices of the vocabulary from the saved lse; each slice of
                            dweight is written once, so that no fp32 copy of it exists

Rows are packed: callers have dropped masked ones. All per-row tensors are (n,) in the accumulation
dtype (fp32; fp64 for fp64 inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastgrpo_kernels import RowState

MIB = 2**20
# Columns of a tile that holds some of the logits: on a CPU what its cache keeps between the GEMM
# and the elementwise steps, on a GPU what keeps GEMMs efficient.
SLICE = {"cpu": 4096, "cuda": 32768}
# Rows of a CPU's tiles: with all logits, and with a slice of them. More make no GEMM faster there.
CPU_CHUNK_ROWS = 256
CPU_SLICE_ROWS = 512


class Head(NamedTuple):
    """The lm_head: z = softcap(logit_scale * (h @ weight.T + bias)) / temperature."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float  # 0 = off


class Rows(NamedTuple):
    """The positions to score."""

    hidden: Tensor  # (n, H)
    ids: Tensor  # (n,) int64
    inv_temperature: Tensor | None  # (n,), None = 1

    def __getitem__(self, index: slice | Tensor) -> Rows:  # type: ignore[override]
        temperature = self.inv_temperature
        return Rows(
            self.hidden[index], self.ids[index], None if temperature is None else temperature[index]
        )


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class Grads(NamedTuple):
    hidden: Tensor | None  # (n, H) accumulation dtype
    weight: Tensor | None  # (V, H) weight's dtype; fp32 for fp16
    bias: Tensor | None  # (V,) accumulation dtype


class Logps(NamedTuple):
    logps: Tensor  # (n,)
    lse: Tensor  # (n,)
    entropy: Tensor | None  # (n,)


class Upstream(NamedTuple):
    """Gradients of the loss with respect to what a row gives."""

    dlogps: Tensor  # (n,)
    dentropy: Tensor | None  # (n,)

    def live(self) -> Tensor:
        """Return the indices of the rows with a gradient: the others cost nothing."""
        live = self.dlogps != 0
        return (live if self.dentropy is None else live | (self.dentropy != 0)).nonzero()[:, 0]


Policy = Callable[[slice, Logps], Upstream]
"""How the loss of a slice of the rows depends on their log-probs."""


class Plan(NamedTuple):
    """How a workspace budget is spent."""

    operand: torch.dtype  # of the GEMMs' inputs
    accumulator: torch.dtype  # of their results
    chunk: int  # rows of a tile that holds all logits of its rows
    slice_width: int  # columns of a tile that holds some logits
    slice_rows: int  # and its rows

    def one_pass(self, n: int, head: Head, needs: Needs) -> bool:
        """Whether `logps_and_grads` suits: not where only two phases keep their memory promise.

        Over several chunks a 16-bit dweight needs an fp32 accumulator of its size, which GPUs
        spend for 6NVH instead of 8NVH, and CPUs, where fp32 operands are copies as well, do not.
        """
        by_slice = needs.weight and head.weight.dtype != self.accumulator
        return n <= self.chunk or not by_slice or head.weight.is_cuda

    def new_tile(self, impl: ModuleType, rows: Rows, width: int) -> Tensor:
        """Return an uninitialised tile of logits (len(rows), width)."""
        n = len(rows.ids)
        if impl.ROW_MAJOR_TILES:
            return rows.hidden.new_empty((n, width), dtype=self.accumulator)
        return rows.hidden.new_empty((width, n), dtype=self.accumulator).t()

    def slices(self, head: Head) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield the vocabulary in slices: weight in the operands' dtype, bias in the results'."""
        weight, bias = head.weight, head.bias
        for start in range(0, weight.shape[0], self.slice_width):
            v = slice(start, min(start + self.slice_width, weight.shape[0]))
            b = None if bias is None else bias[v].to(self.accumulator)
            yield v, weight[v].to(self.operand), b


def default_workspace_mb(vocab: int, device_type: str) -> float:
    """Return the default budget in MiB for the logits tile.

    A CPU gets 256 rows of fp32 logits, a GPU 8192 rows of an fp32 and a 16-bit tile, at most 2 GiB.
    """
    if device_type == "cpu":
        return CPU_CHUNK_ROWS * vocab * 4 / MIB
    return min(2048.0, 8192 * vocab * 6 / MIB)


def plan(hidden: Tensor, weight: Tensor, workspace_mb: float | None) -> Plan:
    """Divide the budget into tiles. Raises ValueError if it holds not even one row of logits."""
    vocab = weight.shape[0]
    accumulator = torch.promote_types(hidden.dtype, torch.float32)
    # cuBLAS multiplies 16-bit operands into fp32 results. CPUs cannot (and without AMX their bf16
    # GEMMs are slower than fp32 ones by orders of magnitude): they get fp32 operands, slice by
    # slice.
    native = hidden.is_cuda and torch.version.hip is None and hidden.dtype == weight.dtype
    operand = hidden.dtype if native else accumulator
    per_logit = accumulator.itemsize + (operand.itemsize if operand != accumulator else 0)
    default = default_workspace_mb(vocab, hidden.device.type) * accumulator.itemsize / 4
    budget = int((default if workspace_mb is None else workspace_mb) * MIB)
    if budget < vocab * per_logit:
        need = vocab * per_logit / MIB
        raise ValueError(
            f"workspace_mb: expected at least {need:.3g} MiB, one row of {vocab} logits; "
            f"got {workspace_mb}"
        )
    width = min(vocab, SLICE.get(hidden.device.type, SLICE["cpu"]))
    slice_rows = budget // (width * per_logit)
    return Plan(
        operand=operand,
        accumulator=accumulator,
        chunk=budget // (vocab * per_logit),
        slice_width=width,
        slice_rows=slice_rows if hidden.is_cuda else min(slice_rows, CPU_SLICE_ROWS),
    )


def logps_fwd(impl: ModuleType, rows: Rows, head: Head, plan: Plan, with_entropy: bool) -> Logps:
    """Score rows: 2NVH, O(n) numbers written."""
    if hasattr(impl, "linear_logps_fwd"):
        scored = impl.linear_logps_fwd(
            rows.hidden, head.weight, rows.ids, head.bias, rows.inv_temperature,
            head.logit_scale, head.softcap, with_entropy,
        )  # fmt: skip
        return Logps(*scored)
    state = _new_state(rows, plan)
    hidden = rows.hidden.to(plan.operand)
    for v, weight, bias in plan.slices(head):
        for c in _chunks(len(rows.ids), plan.slice_rows):
            z = plan.new_tile(impl, rows[c], v.stop - v.start)
            _matmul(z, hidden[c], weight.t())
            _fold(impl, z, v, bias, rows[c], head, take(state, c), with_entropy)
    return _finish(state, with_entropy)


def logps_and_grads(
    impl: ModuleType,
    rows: Rows,
    head: Head,
    plan: Plan,
    with_entropy: bool,
    policy: Policy,
    needs: Needs,
) -> tuple[Logps, Grads]:
    """Score rows and make the gradients of the loss while their logits are at hand: 6NVH.

    `policy` turns the log-probs of a chunk into dL/dlogp, so the loss must be separable over rows.
    """
    n, one_chunk = len(rows.ids), len(rows.ids) <= plan.chunk
    state = _new_state(rows, plan)
    sums = _GradSums.of(rows, head, plan, needs, whole=not one_chunk)
    buffer = plan.new_tile(impl, rows[: plan.chunk], head.weight.shape[0])
    for c in _chunks(n, plan.chunk):
        part, tile = rows[c], buffer[: c.stop - c.start]
        hidden = part.hidden.to(plan.operand)
        for v, weight, bias in plan.slices(head):
            _matmul(tile[:, v], hidden, weight.t())
            _fold(impl, tile[:, v], v, bias, part, head, take(state, c), with_entropy)
        scored = _finish(take(state, c), with_entropy)
        upstream = policy(c, scored)
        live = None
        # Dropping the rows without gradient would stall a GPU once per chunk.
        if not rows.hidden.is_cuda and len(found := upstream.live()) < len(part.ids):
            live, part, hidden = found, part[found], hidden[found]
            scored, upstream = take(scored, live), take(upstream, live)
        targets = _Targets.of(part, plan)
        dhidden = sums.rows(c, live)
        for v, weight, bias in plan.slices(head):
            z = tile[:, v] if live is None else tile[:, v].index_select(0, live)
            grads = Grads(dhidden, *sums.slice(v))
            _backprop(impl, z, v, weight, bias, part, hidden, head, scored, upstream, targets,
                      grads, accumulate=c.start > 0)  # fmt: skip
            if one_chunk:
                sums.store(v)
        targets.add_to(dhidden, part, head)
        sums.store_rows(c, live, dhidden)
    return _finish(state, with_entropy), sums.result()


def logps_bwd(
    impl: ModuleType,
    rows: Rows,
    head: Head,
    plan: Plan,
    scored: Logps,
    upstream: Upstream,
    needs: Needs,
) -> Grads:
    """Recompute the logits in slices of the vocabulary and return the gradients: 6NVH."""
    sums = _GradSums.of(rows, head, plan, needs, whole=False)
    hidden = rows.hidden.to(plan.operand)
    chunks = list(_chunks(len(rows.ids), plan.slice_rows))
    targets = [_Targets.of(rows[c], plan) for c in chunks]
    for v, weight, bias in plan.slices(head):
        for c, chunk_targets in zip(chunks, targets, strict=True):
            z = plan.new_tile(impl, rows[c], v.stop - v.start)
            _matmul(z, hidden[c], weight.t())
            grads = Grads(sums.rows(c), *sums.slice(v))
            _backprop(impl, z, v, weight, bias, rows[c], hidden[c], head, take(scored, c),
                      take(upstream, c), chunk_targets, grads, accumulate=c.start > 0)  # fmt: skip
        sums.store(v)
    for c, chunk_targets in zip(chunks, targets, strict=True):
        chunk_targets.add_to(sums.rows(c), rows[c], head)
    return sums.result()


class _Targets(NamedTuple):
    """The target entries of 16-bit gradient tiles, kept in fp32 and out of the GEMMs.

    Next to the target's 1 - p the others are small: rounded alone, they keep their own precision.
    """

    coef: Tensor | None = None  # (n,) dL/dz0 at the target; None: the tiles are fp32 and hold it
    sorted_ids: Tensor | None = None  # (n,)
    order: Tensor | None = None  # (n,)

    @classmethod
    def of(cls, rows: Rows, plan: Plan) -> _Targets:
        if plan.operand == plan.accumulator:
            return cls()
        coef = torch.zeros_like(rows.ids, dtype=plan.accumulator)
        return cls(coef, *rows.ids.sort(stable=True))

    def add_to(self, dhidden: Tensor | None, rows: Rows, head: Head) -> None:
        if self.coef is not None and dhidden is not None:
            dhidden.addcmul_(self.coef[:, None], head.weight[rows.ids].to(dhidden.dtype))


class _GradSums(NamedTuple):
    """The gradients while they grow.

    dweight is summed in the accumulation dtype: in place where that is its dtype or where row
        chunks
    are the outer loop, otherwise in a scratch of one slice, which is then written once.
    """

    dhidden: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    scratch: Tensor | None
    dtype: torch.dtype  # of the dweight that is asked for

    @classmethod
    def of(cls, rows: Rows, head: Head, plan: Plan, needs: Needs, whole: bool) -> _GradSums:
        weight, dtype = head.weight, plan.accumulator
        # A loss scaler's upstream gradient must reach fp16 gradients before they are rounded.
        final = dtype if weight.dtype == torch.float16 else weight.dtype
        in_place = whole or final == dtype
        new_weight = torch.empty_like if len(rows.ids) else torch.zeros_like
        scratch_shape = (plan.slice_width, weight.shape[1])
        return cls(
            rows.hidden.new_zeros(rows.hidden.shape, dtype=dtype) if needs.hidden else None,
            new_weight(weight, dtype=dtype if in_place else final) if needs.weight else None,
            weight.new_zeros(len(weight), dtype=dtype) if needs.bias else None,
            None if in_place or not needs.weight else weight.new_empty(scratch_shape, dtype=dtype),
            final,
        )

    def rows(self, c: slice, live: Tensor | None = None) -> Tensor | None:
        if self.dhidden is None or live is None:
            return None if self.dhidden is None else self.dhidden[c]
        return self.dhidden.new_empty((len(live), self.dhidden.shape[1]))

    def store_rows(self, c: slice, live: Tensor | None, dhidden: Tensor | None) -> None:
        if self.dhidden is not None and live is not None:
            self.dhidden[c].index_copy_(0, live, dhidden)

    def slice(self, v: slice) -> tuple[Tensor | None, Tensor | None]:
        dweight = self.dweight[v] if self.dweight is not None else None
        if self.scratch is not None:
            dweight = self.scratch[: v.stop - v.start]
        return dweight, None if self.dbias is None else self.dbias[v]

    def store(self, v: slice) -> None:
        if self.scratch is not None:
            self.dweight[v] = self.scratch[: v.stop - v.start]

    def result(self) -> Grads:
        dweight = None if self.dweight is None else self.dweight.to(self.dtype)
        return Grads(self.dhidden, dweight, self.dbias)


def _backprop(
    impl: ModuleType,
    z: Tensor,
    v: slice,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    hidden: Tensor,
    head: Head,
    scored: Logps,
    upstream: Upstream,
    targets: _Targets,
    grads: Grads,
    accumulate: bool,
) -> None:
    """Turn a tile of logits into its gradient and add what it gives to hidden, weight and bias.

    `accumulate` False overwrites the slice of dweight instead of adding to it.
    """
    dz = z if targets.coef is None else torch.empty_like(z, dtype=hidden.dtype)
    impl.tile_grad(
        z, rows.ids, v.start, bias, rows.inv_temperature, head.logit_scale, head.softcap,
        scored.lse, scored.entropy, upstream.dlogps, upstream.dentropy, dz, targets.coef,
    )  # fmt: skip
    if grads.hidden is not None:
        _matmul(grads.hidden, dz, weight, accumulate=v.start > 0)
    if grads.weight is not None:
        _matmul(grads.weight, dz.t(), hidden, accumulate)
    if grads.bias is not None:
        grads.bias.add_(dz.sum(0, dtype=grads.bias.dtype))
    if targets.coef is not None:
        where = (targets.sorted_ids, targets.order, targets.coef)
        if grads.weight is not None:
            impl.scatter_rows(grads.weight, *where, hidden, v.start)
        if grads.bias is not None:
            ones = torch.ones_like(targets.coef)[:, None]
            impl.scatter_rows(grads.bias[:, None], *where, ones, v.start)


def _fold(
    impl: ModuleType,
    z: Tensor,
    v: slice,
    bias: Tensor | None,
    rows: Rows,
    head: Head,
    state: RowState,
    with_entropy: bool,
) -> None:
    """Fold a tile of logits into the statistics of its rows."""
    impl.tile_stats(
        z, rows.ids, v.start, bias, rows.inv_temperature, head.logit_scale, head.softcap,
        state, with_entropy,
    )  # fmt: skip


def _new_state(rows: Rows, plan: Plan) -> RowState:
    """Return the statistics of rows that have seen no logits. A target outside [0, V) stays NaN."""

    def full(value: float) -> Tensor:
        return torch.full_like(rows.ids, value, dtype=plan.accumulator)

    return RowState(max=full(-torch.inf), sum=full(0.0), dot=full(0.0), target=full(torch.nan))


def _finish(state: RowState, with_entropy: bool) -> Logps:
    log_sum = state.sum.log()
    # (target - max) first: exact where the target is the maximum, so that logp never exceeds 0.
    logps = (state.target - state.max) - log_sum
    return Logps(
        logps, state.max + log_sum, log_sum - state.dot / state.sum if with_entropy else None
    )


def _matmul(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b, in out's dtype also where the operands have 16 bits."""
    mixed = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, out=out, **mixed)
    else:
        torch.mm(a, b, out=out, **mixed)


def _chunks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


T = TypeVar("T", Logps, Upstream, RowState)


def take(rows: T, index: slice | Tensor) -> T:
    """Return some rows of a tuple of per-row tensors."""
    return type(rows)(*(None if x is None else x[index] for x in rows))
