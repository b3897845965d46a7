"""The parts of a lean GRPO loop. The loop itself, top to bottom, is ``examples/grpo_train.py``.

    config, flags, rules, defaults, the flags
    loss_flags
    tasks, rewards, scoring,        prompts, and what their completions are worth
    reward_process
    catalogue, arithmetic, sums,    the tasks by name, and a file of one's own
    gsm8k, own_data, data, chat,
    stated_number
    model, load                     the policy and its head, and where they come from
    completions, rollout            a batch of completions, as tokens and as text
    sampler, sampling, kept_ids,    how it is sampled
    kv_cache, dynamic_sampling
    warmup                          the supervised start
    microbatches, layouts,          what enters the model, and how prompts and completions stand
    attention, packed_row, memory
    optimizer, reference            the step, and the policy that the KL holds on to
    evaluation                      greedy accuracy
    run, run_folder, metrics,       what a run writes and warns of, and how it ends
    samples, stalled, not_finite,
    report, interrupt, best_effort,
    atomic
    checkpoint, random_state        what it goes on from
    ranks, sharded, parts           several processes, and a model that lies in all of them
    evolution, fitness              REINFORCE over parameters: ``examples/evolution.py``

Left out of the loop: tensors and experts in parallel, inference engines.
"""

from importlib.util import find_spec

_NEEDED = ("transformers", "matplotlib", "tqdm")
_MISSING = [name for name in _NEEDED if find_spec(name) is None]
if _MISSING:
    raise ModuleNotFoundError(
        f"fastgrpo.train: expected {', '.join(_NEEDED)}, got no {' and no '.join(_MISSING)}: "
        "pip install 'fastgrpo[train]'"
    )
