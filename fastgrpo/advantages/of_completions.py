"""Critic-free advantages of completions, from the rewards of their groups."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastgrpo import checks
from fastgrpo.advantages.estimators import ESTIMATORS, RewardBatch
from fastgrpo.advantages.groups import Groups, check_ddof, check_lengths, check_rewards
from fastgrpo.backend import Kernels
from fastgrpo.checks import finite, one_of
from fastgrpo.dispatch import choice


def group_advantages(
    rewards: Tensor,  # (B,), or (B, K) for "gdpo"
    group_ids_or_size: int | Tensor,  # G, or (B,) int64
    *,
    estimator: str = "grpo",
    ddof: int = 1,
    eps: float = 1e-4,
    lengths: Tensor | None = None,  # (B,)
    reward_weights: Sequence[float] | None = None,  # K
    greedy_rewards: Tensor | None = None,  # (B,)
    f_norm: float = 1.0,
    return_live_groups: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return each completion's advantage over the other completions of its prompt, (B,) fp32.

    r is a completion's reward; n, mean and std are those of its group. A prime means "of the others
    in the group":

        grpo           (r - mean) / (std + eps)                          arXiv 2402.03300
        dr_grpo        r - mean                                          arXiv 2503.20783
        grpo_batch     (r - mean) / (std of the batch + eps)             arXiv 2508.08221
        grpo_loo       (r - mean') / (std' + eps), r - mean' if std' = 0 NeMo-RL's default
        grpo_passk     (r - max') / (std + eps) for the best r, else 0   arXiv 2503.19595
        rloo           r - mean'                                         arXiv 2402.14740
        gpg            B / #(r != 0) * (r - mean) / f_norm               arXiv 2504.02546
        opo            r - sum(length * r) / sum(length)                 arXiv 2505.23585
        max_rl         (r - mean) / mean, 0 if mean <= 0                 arXiv 2602.02710
        remax          r - greedy_rewards                                arXiv 2310.10505
        gdpo           a / (std of a in the batch + eps), where          arXiv 2601.05242
                       a = sum_k weight_k * grpo(r_k); whitened over tokens if lengths are given
        reinforce_plus_plus_baseline
                       r - mean, whitened over tokens                    arXiv 2501.03262

    Whitening over tokens is (a - m) / sqrt(v + 1e-8). m and v are the mean and the variance of a,
    each completion weighed by its length. REINFORCE++ itself has one advantage per token:
    `reinforce_plus_plus`.

    An unscored completion (NaN) always has advantage 0 and is in no mean, std, count or maximum.
    A constant group, and a group with one scored member, have exactly 0, except under

        remax                           r - greedy_rewards: the group plays no part
        whitening over tokens           -m / sqrt(v + 1e-8), the same for all such groups

    Args:
        rewards: (B,) fp32, finite or NaN; (B, K) for "gdpo". There a completion is unscored if all
            its K rewards are NaN. One NaN leaves it out of the groups of that reward alone.
        group_ids_or_size: the group size G, where the completions of a prompt are adjacent; or (B,)
            int64 ids, in any order, for groups of any size.
        estimator: a name of the table.
        ddof: a variance divides by (number - ddof). The number is that of completions, or of tokens
            where these are whitened.
        eps: added to a std.
        lengths: (B,) int or fp32, tokens of each completion. Needed by "opo" and
            "reinforce_plus_plus_baseline"; chooses whitening over tokens for "gdpo".
        reward_weights: one weight for each of the K rewards of "gdpo"; None: 1 each.
        greedy_rewards: (B,) fp32, for "remax": the reward of the prompt's greedy completion. Where
            it is NaN the advantage is 0.
        f_norm: the divisor of "gpg".
        return_live_groups: return (advantages, live_groups) instead, live_groups () int64 on the
            device: the number of groups with an advantage other than 0.

    docs/advantages.md says which trainer uses which of them with which values.

    Raises:
        ValueError: for a wrong shape, dtype or value, for an option that the estimator needs and
            that is missing, and for one that it ignores.
    """
    one_of("estimator", estimator, tuple(ESTIMATORS))
    checks.tensor("rewards", rewards)
    dims, shape = (2, "(B, K)") if estimator == "gdpo" else (1, "(B,)")
    if rewards.dim() != dims:
        raise ValueError(
            f"rewards: expected shape {shape} for estimator={estimator!r}, got "
            f"{tuple(rewards.shape)}"
        )
    if dims == 2 and not rewards.shape[1]:
        raise ValueError(f"rewards: expected K >= 1 rewards each, got {tuple(rewards.shape)}")
    check_rewards("rewards", rewards, tuple(rewards.shape))
    options = dict(
        ddof=ddof,
        eps=eps,
        lengths=lengths,
        reward_weights=reward_weights,
        greedy_rewards=greedy_rewards,
        f_norm=f_norm,
    )
    _check_options(estimator, options, rewards)

    def estimate(kernels: Kernels) -> tuple[Tensor, Tensor]:
        groups, sorted_options = Groups(group_ids_or_size, rewards, kernels), dict(options)
        for name in ("lengths", "greedy_rewards"):
            if options[name] is not None:
                sorted_options[name] = groups.sort(options[name].detach().float())
        batch = RewardBatch(groups.sort(rewards.detach()), groups, sorted_options)
        advantages = ESTIMATORS[estimator].formula(batch).where(batch.scored, 0.0)
        return groups.restore(advantages), groups.live(advantages)

    advantages, live_groups = choice.run(estimate, "auto", rewards)
    return (advantages, live_groups) if return_live_groups else advantages


def _check_options(estimator: str, options: dict[str, object], rewards: Tensor) -> None:
    """Raise ValueError for an ignored option, a missing one, or a wrong value."""
    defaults = group_advantages.__kwdefaults__
    for name, value in options.items():
        default = defaults[name]
        given = value is not None if default is None else value != default
        if given and name not in ESTIMATORS[estimator].uses:
            raise ValueError(f"{name} has no effect with estimator={estimator!r}")
        if not given and name in ESTIMATORS[estimator].needs:
            raise ValueError(f"{name}: expected shape (B,) for estimator={estimator!r}, got None")
    check_ddof(options["ddof"])
    if finite("eps", options["eps"]) < 0:
        raise ValueError(f"eps: expected a number >= 0, got {options['eps']}")
    if finite("f_norm", options["f_norm"]) <= 0:
        raise ValueError(f"f_norm: expected a number > 0, got {options['f_norm']}")
    if options["lengths"] is not None:
        check_lengths(options["lengths"], (len(rewards),), rewards)
    if options["greedy_rewards"] is not None:
        check_rewards("greedy_rewards", options["greedy_rewards"], (len(rewards),), rewards)
    if (weights := options["reward_weights"]) is not None:
        if not isinstance(weights, Sequence) or len(weights) != rewards.shape[1]:
            raise ValueError(
                f"reward_weights: expected {rewards.shape[1]} numbers, got {weights!r}"
            )
        for weight in weights:
            finite("reward_weights", weight)
