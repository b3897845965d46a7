"""How prompts and completions stand in a forward, and which of the ways a model allows.

    shared    a row of [prompt, completion, ..., completion] per group: a prompt is forwarded once
    packed    a row of [prompt, completion] after [prompt, completion], without padding
    padded    [prompt, completion, padding] in a row of their own

All give the same hidden states. The last token of a completion predicts nothing and stays out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from fastgrpo.model.head import backbone_of, unwrapped

from .attention import NAME
from .completions import Rollout
from .packed_row import Packing, Prefix

# Roundings of hidden states that are as good as none, in steps of the dtype; and how many times
# its own rounding (a padded batch against single sequences) a model may differ.
ROUNDING, TOLERANCE = 2, 4
CHECKED = ((5, (4, 1, 3)), (3, (2, 6)))  # lengths of a prompt and its completions


class Layout(NamedTuple):
    """A way to forward completions."""

    name: str
    hidden: Callable[..., Tensor]
    """(model, rollout) -> (N, H): the state in row n predicts token n of the completions."""
    tokens: Callable[[Sequence[tuple[int, Sequence[int]]]], int]
    """What it forwards for [(length of a prompt, lengths of its completions)], with padding."""
    shares: bool = False
    """Whether completions of a prompt cost less together."""


def shared(model: nn.Module, rollout: Rollout, windows: list[int | None] | None = None) -> Tensor:
    """Return the states (N, H) that predict the completions, with each prompt forwarded once.

    Positions go on from the prompt in every completion. `windows` as in `attention`.
    """
    row, prefixes, (ids, prompts, completions) = _Row(), [], _places(rollout)
    for prompt, chosen in zip(prompts, _members(rollout), strict=True):
        suffixes = [completions[i][:-1] for i in chosen]
        prefixes.append(Prefix(len(prompt), tuple(map(len, suffixes))))
        row.add(prompt, 0)
        last = len(row.tokens) - 1
        for suffix in suffixes:
            row.states += [last, *range(len(row.tokens), len(row.tokens) + len(suffix))]
            row.add(suffix, len(prompt))
    return _hidden(model, ids, row, prefixes, windows)


def packed(model: nn.Module, rollout: Rollout, windows: list[int | None] | None = None) -> Tensor:
    """Return the states (N, H) that predict the completions, forwarded in one row."""
    row, prefixes, (ids, prompts, completions) = _Row(), [], _places(rollout)
    for i, completion in zip(rollout.prompt_index.tolist(), completions, strict=True):
        row.add(prompts[i], 0)
        start = len(row.tokens) - 1
        row.states += range(start, start + len(completion))
        row.add(completion[:-1], len(prompts[i]))
        prefixes.append(Prefix(len(prompts[i]) + len(completion) - 1))
    return _hidden(model, ids, row, prefixes, windows)


def padded(model: nn.Module, rollout: Rollout) -> Tensor:
    """Return the states (N, H) that predict the completions, forwarded in rows of equal length."""
    prompts = [rollout.prompts[i] for i in rollout.prompt_index.tolist()]
    rows = [
        torch.cat((prompt, completion[:-1]))
        for prompt, completion in zip(prompts, rollout.completions(), strict=True)
    ]
    ids = pad_sequence(rows, batch_first=True)
    ends = torch.tensor([[len(row)] for row in rows], device=ids.device)
    starts = torch.tensor([[len(prompt) - 1] for prompt in prompts], device=ids.device)
    places = torch.arange(ids.shape[1], device=ids.device)
    used = places < ends
    hidden = backbone_of(unwrapped(model))(
        input_ids=ids,
        attention_mask=None if all(len(row) == len(rows[0]) for row in rows) else used.long(),
        use_cache=False,
    ).last_hidden_state
    return hidden[used & (places >= starts)]


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "shared",
            shared,
            lambda groups: sum(p + sum(c) - len(c) for p, c in groups),
            shares=True,
        ),
        Layout("packed", packed, lambda groups: sum(p + t - 1 for p, c in groups for t in c)),
        Layout(
            "padded",
            padded,
            lambda groups: (
                sum(len(c) for _, c in groups) * max(p + t - 1 for p, c in groups for t in c)
            ),
        ),
    )
}
PADDED = LAYOUTS["padded"]


@torch.no_grad()
def choose_layout(model: PreTrainedModel) -> tuple[Layout, str]:
    """Return the first layout that gives this model's own hidden states, and a line that says why.

    The model forwards a few tokens in every way. It keeps the attention that the layout needs;
    where all else fails it is padded, with the attention that it had.
    """
    if reason := _ruled_out(model):
        return PADDED, f"completions are padded: {reason}"
    why: list[str] = []
    try:
        model.set_attn_implementation(NAME)
        rollout = _trial(model)
        expected = _alone(model, rollout)
        rounding = _distance(padded(model, rollout), expected)
        for name in ("shared", "packed"):
            difference = _try(model, LAYOUTS[name], rollout, expected)
            if isinstance(difference, float) and difference <= _allowed(rounding, expected.dtype):
                says = "each prompt is forwarded once for its group"
                if name == "packed":
                    says = f"completions are packed, each behind its prompt: {'; '.join(why)}"
                return LAYOUTS[name], f"{says} (differs by {difference:.1e})"
            if isinstance(difference, float):
                difference = f"hidden states differ by {difference:.1e}"
            why.append(f"{name}: {difference}")
    except Exception as error:  # the model's code, which may be anything
        why.append(_said(error))
    model.set_attn_implementation("sdpa")
    return PADDED, f"completions are padded: {'; '.join(why)}"


def _ruled_out(model: PreTrainedModel) -> str | None:
    """Return why a model cannot take a row of several sequences, None if it may."""
    config = model.config.get_text_config()
    if model.config._attn_implementation not in ("sdpa", NAME):
        return f"its attention is {model.config._attn_implementation!r}, not 'sdpa'"
    if getattr(model.config, "is_encoder_decoder", False):
        return "it has an encoder"
    kinds = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}"
    if not type(model)._can_set_attn_implementation():
        return "its attention is code of its own"
    return None


def _windows(model: PreTrainedModel) -> list[int | None]:
    """Return the sliding window of each layer, as the config has it."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _try(model: PreTrainedModel, layout: Layout, rollout: Rollout, expected: Tensor) -> float | str:
    """Return how far a layout's hidden states are from the expected ones, or why there are none."""
    windows: list[int | None] = []
    try:
        hidden = layout.hidden(model, rollout, windows)
    except Exception as error:  # as above
        return _said(error)
    if windows != _windows(model):
        return "its layers do not say which of them have a sliding window"
    return _distance(hidden, expected)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _trial(model: PreTrainedModel) -> Rollout:
    """Return completions of random tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = model.get_input_embeddings().weight.shape[0]
    device = model.get_input_embeddings().weight.device

    def draw(n: int) -> Tensor:
        return torch.randint(rows, (n,), generator=generator).to(device)

    lengths = [n for _, completions in CHECKED for n in completions]
    index = [i for i, (_, completions) in enumerate(CHECKED) for _ in completions]
    return Rollout(
        prompts=tuple(draw(n) for n, _ in CHECKED),
        prompt_index=torch.tensor(index, device=device),
        token_ids=draw(sum(lengths)),
        lengths=torch.tensor(lengths, device=device),
        finished=torch.ones(len(lengths), dtype=torch.bool, device=device),
    )


def _alone(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """Return the states of each completion from a forward of its own."""
    each = torch.arange(len(rollout), device=rollout.lengths.device).split(1)
    return torch.cat([padded(model, rollout[i]) for i in each])


def _distance(hidden: Tensor, expected: Tensor) -> float:
    """Return the largest relative error of a row."""
    error = (hidden.double() - expected.double()).norm(dim=1) / expected.double().norm(dim=1)
    return float(error.nan_to_num(nan=float("inf")).max())


def _allowed(rounding: float, dtype: torch.dtype) -> float:
    return TOLERANCE * max(rounding, ROUNDING * torch.finfo(dtype).eps)


def _members(rollout: Rollout) -> list[list[int]]:
    """Return the completions of each prompt."""
    members: list[list[int]] = [[] for _ in rollout.prompts]
    for i, prompt in enumerate(rollout.prompt_index.tolist()):
        members[prompt].append(i)
    return members


@dataclass
class _Row:
    """A row of tokens, in lists: a tensor for each completion would take longer than a layer."""

    tokens: list[int] = field(default_factory=list)  # where each of them is in the rollout
    positions: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=list)  # those that predict the completions

    def add(self, tokens: range, position: int) -> None:
        self.tokens += tokens
        self.positions += range(position, position + len(tokens))


def _places(rollout: Rollout) -> tuple[Tensor, list[range], list[range]]:
    """Return the tokens of all prompts and completions (M,), and where each of them is there."""
    ids = torch.cat((*rollout.prompts, rollout.token_ids))
    lengths = [*map(len, rollout.prompts), *rollout.lengths.tolist()]
    places = [range(end - n, end) for n, end in zip(lengths, accumulate(lengths), strict=True)]
    return ids, places[: len(rollout.prompts)], places[len(rollout.prompts) :]


def _hidden(
    model: nn.Module,
    ids: Tensor,  # (M,) int64
    row: _Row,
    prefixes: list[Prefix],
    windows: list[int | None] | None,
) -> Tensor:
    """Return the states (N, H) of a row."""
    tokens, positions, states = (
        torch.tensor(places, device=ids.device)
        for places in (row.tokens, row.positions, row.states)
    )
    kept = {} if windows is None else {"windows": windows}
    hidden = backbone_of(unwrapped(model))(
        input_ids=ids[None, tokens],
        position_ids=positions[None],
        # A mask of four dimensions is taken as it is, so that transformers makes none of L x L.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
        packing=Packing(tuple(prefixes), ids.device),
        use_cache=False,
        **kept,
    ).last_hidden_state
    return hidden[0, states]
