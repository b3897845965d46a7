"""The ops that autograd and `torch.compile` see, registered with `torch.library`.

All of them take rows (N, ...) with a mask. Masked rows are dropped before anything is computed, so
that their content never matters. A result that is not asked for is an empty tensor.

The schema of an op is a flat list of tensors and numbers. The modules here convert between it and
the named tuples of the package.
"""

from fastgrpo.ops.logps import Scores, linear_logps, linear_logps_bwd
from fastgrpo.ops.loss import grpo_loss
from fastgrpo.ops.operands import Operands
from fastgrpo.ops.policy import policy_loss
from fastgrpo.ops.selected import selected_logps, selected_logps_bwd

__all__ = [
    "Operands",
    "Scores",
    "grpo_loss",
    "linear_logps",
    "linear_logps_bwd",
    "policy_loss",
    "selected_logps",
    "selected_logps_bwd",
]
