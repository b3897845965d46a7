"""Pieces of a lean GRPO loop. The loop itself, top to bottom, is ``examples/grpo_train.py``.

``config`` the flags, ``tasks`` prompts and rewards, ``model`` policy and head, ``completions`` a
batch, ``rollout`` sampling, ``warmup`` the supervised start, ``optimizer`` the step, ``evaluation``
greedy accuracy, ``run`` with ``metrics``, ``report``, ``checkpoint`` and ``interrupt`` what a run
leaves and how it ends. ``evolution`` and ``fitness`` are REINFORCE over parameters:
``examples/evolution.py``. Left out of the loop: several processes (torchrun, FSDP), resuming,
inference engines.
"""

from importlib.util import find_spec

_NEEDED = ("transformers", "matplotlib", "tqdm")
_MISSING = [name for name in _NEEDED if find_spec(name) is None]
if _MISSING:
    raise ModuleNotFoundError(
        f"fastgrpo.train: expected {', '.join(_NEEDED)}, got no {' and no '.join(_MISSING)}: "
        "pip install 'fastgrpo[train]'"
    )
