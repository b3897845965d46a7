"""TRL 1.15 and 1.16: `patch` for all of its trainers, `FastGRPOTrainer` for GRPO.

chunked_head    TRL's head and what may stand in its autograd function's place; `patch`
settings        from a trainer's settings to a `LossConfig`
fused_loss      the loss inside the model's forward
trainer         `FastGRPOTrainer`
"""

from importlib.util import find_spec

_NEEDED = ("trl", "accelerate", "datasets", "transformers")
_MISSING = [name for name in _NEEDED if find_spec(name) is None]
if _MISSING:
    raise ModuleNotFoundError(
        f"fastgrpo.integrations.trl: expected {', '.join(_NEEDED)}, got no "
        f"{' and no '.join(_MISSING)}: pip install 'fastgrpo[trl]'"
    )

from fastgrpo.integrations.trl.chunked_head import Patch, patch  # noqa: E402
from fastgrpo.integrations.trl.trainer import FastGRPOTrainer  # noqa: E402

__all__ = ["FastGRPOTrainer", "Patch", "patch"]
