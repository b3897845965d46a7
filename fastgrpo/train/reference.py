"""The policy that the KL term holds on to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .completions import Rollout
from .model import Policy
from .optimizer import copy_all


class Reference:
    """The policy with the weights that it had here or at the last `refresh`.

    Only what is trained is kept a second time: with LoRA, the adapter. For its passes the kept
    weights take their places in the policy's own model.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._trained = [p for p in policy.model.parameters() if p.requires_grad]
        self._kept = [p.detach().clone() for p in self._trained]

    def logps(self, rollout: Rollout, max_tokens: int, temperature: float, backend: str) -> Tensor:
        """Return the log-probs (N,) fp32 of the sampled tokens, as `Policy.logps`."""
        with self._in_place():
            return self.policy.logps(rollout, max_tokens, temperature, backend)

    def refresh(self) -> None:
        """Take over the policy's weights as they are."""
        copy_all(self._kept, [p.detach() for p in self._trained])

    def state_dict(self) -> dict[str, Any]:
        """Return the weights that are kept."""
        return {"weights": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, of a policy with the same parameters."""
        copy_all(self._kept, state["weights"])

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for i, parameter in enumerate(self._trained):
            kept = self._kept[i]
            if isinstance(parameter, DTensor):  # FSDP2 holds on to the memory of its parameters
                own = parameter.detach().clone()
                parameter.copy_(kept)
                kept.copy_(own)
            else:
                parameter.data, self._kept[i] = kept, parameter.data
