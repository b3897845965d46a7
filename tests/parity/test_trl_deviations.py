"""Where `grpo_loss` and TRL 1.16 differ, by how much, and why."""

from __future__ import annotations

import pytest

from fastgrpo import LossConfig

pytest.importorskip("trl", minversion="1.16")

from trl import GRPOConfig  # noqa: E402
from trl.experimental.gmpo import GMPOTrainer  # noqa: E402

from trl_cases import (  # noqa: E402
    CASES,
    CISPO,
    CORRECTED_KL,
    GMPO,
    QUANTILE,
    TOKENS,
)
from trl_source import (  # noqa: E402
    assert_same,
    errors,
    exact_logps,
    make_setting,
    our_loss,
    trl_loss,
    trl_trainer,
)


def test_metrics_of_sequences(setting, dtype, tmp_path):
    """Deviation: TRL counts sequences that are clipped, the empty one among them; we their tokens.

    A rate per token is what stays right when calls are combined.
    """
    given, wanted = CASES["gspo, asymmetric"]
    trainer = trl_trainer(setting, tmp_path, **given)
    trl_loss(trainer, setting)
    metrics = our_loss(setting, LossConfig(**wanted))[0].metrics
    lengths, logged = setting.mask.sum(1), trainer._metrics["train"]
    # Row 3 is clipped below, row 0 above.
    for name, ours, row in (("low_mean", "clip_low", 3), ("high_mean", "clip_high", 0)):
        assert logged[f"clip_ratio/{name}"][-1] == pytest.approx(1 / 6)
        assert metrics[ours].item() == pytest.approx((lengths[row] / lengths.sum()).item())


def test_the_entropy_bonus_of_a_token_mean(setting, dtype, tmp_path):
    trainer = trl_trainer(setting, tmp_path, loss_type="bnpo", entropy_coef=0.2)
    ours = our_loss(setting, LossConfig(**TOKENS, entropy_coef=0.2))
    assert_same(trl_loss(trainer, setting), ours, dtype)


def test_metrics_of_cispo(setting, dtype, tmp_path):
    """Deviation: TRL counts bounded weights where A > 0; we all of them, as each takes effect."""
    given, wanted = CASES["cispo"]
    trainer = trl_trainer(setting, tmp_path, **given)
    trl_loss(trainer, setting)
    mask = setting.mask.bool()
    ratio = (exact_logps(*setting)[0] - setting.inputs["old_per_token_logps"]).exp()
    above = (ratio > given["epsilon_high"]) & mask
    theirs = above & (setting.inputs["advantages"] > 0)[:, None]
    logged = trainer._metrics["train"]["cispo_clip_ratio"][-1]
    assert logged == pytest.approx((theirs.sum() / mask.sum()).item())
    metrics = our_loss(setting, LossConfig(**wanted))[0].metrics
    assert metrics["clip_high"].item() == pytest.approx((above.sum() / mask.sum()).item())
    assert logged < metrics["clip_high"]


def test_metrics_of_a_corrected_kl(setting, dtype, tmp_path):
    """Deviation: TRL logs ratio * k3 then; we k3, the estimate itself, whatever its gradient."""
    plain, corrected = (
        trl_trainer(setting, tmp_path, loss_type="grpo", beta=0.3, use_bias_correction_kl=corrects)
        for corrects in (False, True)
    )
    for trainer in (plain, corrected):
        trl_loss(trainer, setting)
    ours = our_loss(setting, LossConfig(**CORRECTED_KL))[0].metrics["kl"].item()
    theirs = [trainer._metrics["train"]["kl"][-1] for trainer in (plain, corrected)]
    assert ours == pytest.approx(theirs[0], rel=1e-5) and ours != pytest.approx(theirs[1], rel=1e-3)


@pytest.mark.parametrize("config, given", [
    ({}, {"loss_type": "grpo"}),
    ({**TOKENS, **QUANTILE}, {"loss_type": "bnpo", **QUANTILE}),
])  # fmt: skip
def test_the_entropy_bonus_elsewhere(config, given, setting, dtype, tmp_path):
    """Deviation: TRL's bonus is a mean over the tokens it acts on, whatever the loss is; ours has
    the weights of the loss, as verl's and slime's, so that a token's bonus and loss keep their
    proportion.
    """
    entropy = exact_logps(*setting)[1].detach()
    mask = setting.mask.bool()
    chosen = mask
    if "top_entropy_quantile" in config:
        chosen = mask & (entropy >= entropy[mask].quantile(0.7))
    theirs, ours = (
        [run(coef) for coef in (0.0, 0.2)]
        for run in (
            lambda coef: trl_loss(
                trl_trainer(setting, tmp_path, **given, entropy_coef=coef), setting
            )[0].item(),
            lambda coef: our_loss(setting, LossConfig(**config, entropy_coef=coef))[0].loss.item(),
        )
    )
    assert theirs[0] - theirs[1] == pytest.approx(0.2 * entropy[chosen].mean().item(), rel=1e-5)
    summed = (entropy * chosen).sum(1)
    aggregated = summed.sum() / mask.sum()
    if not config:
        aggregated = (summed / mask.sum(1).clamp(min=1)).mean()
    assert ours[0] - ours[1] == pytest.approx(0.2 * aggregated.item(), rel=1e-5)
    assert ours[1] != pytest.approx(theirs[1], rel=1e-3)


def test_gmpo_with_an_empty_completion(setting, dtype, tmp_path):
    """Deviation: TRL's loss holds -A for a completion without tokens, ours nothing. The gradients
    agree: it has none.
    """
    trainer = trl_trainer(setting, tmp_path, trainer=GMPOTrainer)
    loss, gradients = trl_loss(trainer, setting)
    ours = our_loss(setting, LossConfig(**GMPO))
    advantage = setting.inputs["advantages"][5]
    assert setting.mask[5].sum() == 0 and advantage != 0
    assert_same((loss + advantage / 6, gradients), ours, dtype)


def test_gmpo_with_a_quantile_of_entropies(dtype, tmp_path):
    """Deviation: TRL takes tokens of low entropy out of the geometric mean, ratio and length; ours
    keeps the mean and takes their share of the loss, as with every other surrogate.
    """
    setting = make_setting(dtype, empty=False)
    trainer = trl_trainer(setting, tmp_path, trainer=GMPOTrainer, **QUANTILE)
    theirs = trl_loss(trainer, setting)
    entropy, mask = exact_logps(*setting)[1].detach(), setting.mask.bool()
    chosen = mask & (entropy >= entropy[mask].quantile(0.7))
    # Theirs is ours on a batch in which only those tokens count. Completions with none of them
    # have -A each in TRL's value.
    inputs = {**setting.inputs, "tool_mask": chosen.long()}
    ours = our_loss(setting._replace(inputs=inputs), LossConfig(**GMPO))
    rest = (setting.inputs["advantages"] * (chosen.sum(1) == 0)).sum() / 6
    assert_same((theirs[0] + rest, theirs[1]), ours, dtype)
    assert errors(theirs, our_loss(setting, LossConfig(**GMPO, **QUANTILE)))[1] > 0.1


def test_cispo_with_an_upper_bound_below_one_is_refused():
    """Deviation: TRL's default of 0.2 is an offset elsewhere, and scales every token by it here."""
    with pytest.raises(ValueError, match="epsilon_high"):
        LossConfig(**{**CISPO, "epsilon_high": GRPOConfig.__dataclass_fields__["epsilon"].default})
