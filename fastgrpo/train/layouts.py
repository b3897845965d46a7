"""How prompts and completions stand in a forward, and which of the ways a model allows.

    shared    a row of [prompt, completion, ..., completion] per group: a prompt is forwarded once
    packed    a row of [prompt, completion] after [prompt, completion], without padding
    padded    [prompt, completion, padding] in a row of their own

All give the same hidden states. The last token of a completion predicts nothing and stays out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from fastgrpo.model.head import backbone_of, unwrapped

from .attention import NAME, Packing, Prefix
from .completions import Rollout

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
    tokens, positions, states, prefixes, start = [], [], [], [], 0
    completions = rollout.completions()
    for prompt, chosen in zip(rollout.prompts, _members(rollout), strict=True):
        suffixes = [completions[i][:-1] for i in chosen]
        prefixes.append(Prefix(len(prompt), tuple(map(len, suffixes))))
        tokens += [prompt, *suffixes]
        positions.append(torch.arange(len(prompt)))
        last = start + len(prompt) - 1
        start += len(prompt)
        for suffix in suffixes:
            positions.append(len(prompt) + torch.arange(len(suffix)))
            states += [torch.tensor([last]), torch.arange(start, start + len(suffix))]
            start += len(suffix)
    return _row(model, tokens, positions, states, prefixes, windows)


def packed(model: nn.Module, rollout: Rollout, windows: list[int | None] | None = None) -> Tensor:
    """Return the states (N, H) that predict the completions, forwarded in one row."""
    tokens, positions, states, prefixes, start = [], [], [], [], 0
    for i, completion in zip(rollout.prompt_index.tolist(), rollout.completions(), strict=True):
        prompt = rollout.prompts[i]
        length = len(prompt) + len(completion) - 1
        tokens += [prompt, completion[:-1]]
        positions.append(torch.arange(length))
        states.append(torch.arange(start + len(prompt) - 1, start + length))
        prefixes.append(Prefix(length))
        start += length
    return _row(model, tokens, positions, states, prefixes, windows)


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


def _row(
    model: nn.Module,
    tokens: list[Tensor],
    positions: list[Tensor],
    states: list[Tensor],
    prefixes: list[Prefix],
    windows: list[int | None] | None,
) -> Tensor:
    ids = torch.cat(tokens)
    kept = {} if windows is None else {"windows": windows}
    hidden = backbone_of(unwrapped(model))(
        input_ids=ids[None],
        position_ids=torch.cat(positions).to(ids.device)[None],
        # A mask of four dimensions is taken as it is, so that transformers makes none of L x L.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
        packing=Packing(tuple(prefixes), ids.device),
        use_cache=False,
        **kept,
    ).last_hidden_state
    return hidden[0, torch.cat(states).to(ids.device)]
