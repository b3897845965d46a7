"""TRL 1.15 and 1.16: `patch` gives its trainers other log-probs."""

from importlib.util import find_spec

_NEEDED = ("trl", "accelerate", "datasets", "transformers")
_MISSING = [name for name in _NEEDED if find_spec(name) is None]
if _MISSING:
    raise ModuleNotFoundError(
        f"fastgrpo.integrations.trl: expected {', '.join(_NEEDED)}, got no "
        f"{' and no '.join(_MISSING)}: pip install 'fastgrpo[trl]'"
    )

from fastgrpo.integrations.trl.chunked_head import Patch, patch  # noqa: E402

__all__ = ["Patch", "patch"]
