"""A loss from outside the package: registered by a module in a file, trained through, refused."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import multiprocessing
import pickle
import subprocess
import sys
import textwrap
from unittest import mock

import pytest
import torch

import fastgrpo
from fastgrpo import LossConfig, reference, register_surrogate, torch_kernels
from fastgrpo.objective.config import config_from_key
from fastgrpo.objective.contexts import CONTEXTS, Population
from fastgrpo.objective.segments import Segments
from fastgrpo.testing import make_batch, relative_error
from fastgrpo_kernels.runtime import HAS_TRITON, INTERPRETED, jit, launch_for, tl
from fastgrpo_kernels.surrogates import CONTEXT_FIELDS, SURROGATES

LOSSES = '''
import fastgrpo
from fastgrpo.testing import make_batch
from fastgrpo_kernels.runtime import jit, tl
from fastgrpo_kernels.twins import bounded_exp, choose, clip, outside


def leaky_clip(logp, log_ratio, advantage, context, width, leak):
    """-A d, of whose gradient only `leak` is left beyond +-width."""
    held = clip(log_ratio, -width, width)
    side = outside(log_ratio, -width, width)
    slope = choose(side == 0.0, 1.0, leak, advantage)
    return -advantage * (held + leak * (log_ratio - held)), -advantage * slope, side


def leaky_clip_formula(logp, log_ratio, advantage, context, width, leak):
    held = log_ratio.clamp(-width, width)
    return -advantage * (held + leak * (log_ratio - held))


def squared_gap(logp, log_ratio, advantage, context, step):
    """Half the square of what the log-ratio lacks of step A: a gradient where A is 0, too."""
    gap = log_ratio - step * advantage
    return 0.5 * gap * gap, gap, advantage * 0.0


def squared_gap_formula(logp, log_ratio, advantage, context, step):
    return (log_ratio - step * advantage) ** 2 / 2


@jit
def bounded_weight(log_ratio, cap):
    ratio = bounded_exp(log_ratio)
    return tl.where(ratio > cap, cap, ratio)


@jit
def capped(logp, log_ratio, advantage, context, cap):
    """-sg(min(r, cap)) A logp."""
    weight = bounded_weight(log_ratio, cap)
    return -weight * advantage * logp, -weight * advantage, outside(bounded_exp(log_ratio), 0, cap)


def capped_formula(logp, log_ratio, advantage, context, cap):
    return -log_ratio.exp().clamp(max=cap).detach() * advantage * logp


def pulled(logp, log_ratio, advantage, context, coef):
    """`kl_cov` with a coefficient of its own."""
    policy = -bounded_exp(log_ratio) * advantage
    pull = coef * context * outside(log_ratio, 0.0, 0.0)
    return policy + pull * log_ratio, policy + pull, advantage * 0.0


def pulled_formula(logp, log_ratio, advantage, context, coef):
    return -log_ratio.exp() * advantage + coef * context * log_ratio.abs()


EVERY = ("token", "sequence", "sequence_token", "sequence_sum")
fastgrpo.register_surrogate(
    "leaky_clip", leaky_clip, leaky_clip_formula, {"width": 0.2, "leak": 0.1}, ratio_levels=EVERY
)
fastgrpo.register_surrogate(
    "squared_gap", squared_gap, squared_gap_formula, {"step": 0.5}, inert=False
)
fastgrpo.register_surrogate(
    "capped", capped, capped_formula, {"cap": 1}, ratio_levels=("none", *EVERY[:2]), slope="logp"
)
fastgrpo.register_surrogate(
    "pulled", pulled, pulled_formula, {"coef": 0.1}, ratio_levels=("token",),
    context="top_covariance", inert=False,
)


def gradient(config):
    """What a process of its own computes."""
    batch = make_batch()
    hidden = batch.hidden.requires_grad_()
    out = fastgrpo.grpo_loss(hidden, *batch[1:5], old_logps=batch.old_logps, config=config)
    out.loss.backward()
    return out.loss.item(), hidden.grad.tolist()
'''
OPTIONS = {"leaky_clip": {"width": 0.13, "leak": 0.3}, "squared_gap": {}, "capped": {"cap": 1.07}}
# Of the gradients, in the L2 norm: float64 on torch, the house's bar for fp32 in the kernels.
BAR = {"torch": 1e-9, "triton": 1e-5}


@pytest.fixture
def losses(tmp_path, monkeypatch):
    """The module above, in a file, imported; what it registers is gone afterwards."""
    (tmp_path / "losses_of_mine.py").write_text(LOSSES, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with mock.patch.dict(SURROGATES):
        yield importlib.import_module("losses_of_mine")
    del sys.modules["losses_of_mine"]


def config_of(name, **fields):
    return LossConfig(surrogate=name, surrogate_parameters=OPTIONS.get(name, {}), **fields)


def fused(batch, config, backend, *, on_policy=False, frozen=False, **options):
    dtype = torch.float64 if backend == "torch" else torch.float32
    hidden = batch.hidden.to(dtype, copy=True).requires_grad_()
    weight = batch.weight.to(dtype, copy=True).requires_grad_(not frozen)
    old_logps = None if on_policy else batch.old_logps
    out = fastgrpo.grpo_loss(
        hidden, weight, *batch[2:5], old_logps=old_logps, config=config, backend=backend, **options
    )
    out.loss.backward()
    return out, hidden.grad, weight.grad


def exact(batch, config, *, on_policy=False):
    hidden, weight = (x.double().requires_grad_() for x in batch[:2])
    logps, entropy, _ = reference.token_logps(hidden, weight, batch.completion_ids)
    old_logps = None if on_policy else batch.old_logps.double()
    loss = reference.policy_loss(
        logps, entropy, batch.completion_mask, batch.advantages.double(), config,
        old_logps=old_logps,
    )  # fmt: skip
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def with_a_zero(batch):
    return batch._replace(advantages=torch.tensor([0.7, -1.2, 0.0, 1.0]))


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_autograd_of_its_formula(losses, backend, name, on_policy):
    batch = with_a_zero(make_batch())
    for level in SURROGATES[name].ratio_levels:
        config = config_of(name, ratio_level=level)
        loss, dhidden, dweight = exact(batch, config, on_policy=on_policy)
        for frozen in (False, True):
            out, *grads = fused(batch, config, backend, on_policy=on_policy, frozen=frozen)
            assert out.loss.item() == pytest.approx(loss.item(), rel=BAR[backend], abs=2e-5)
            assert relative_error(grads[0], dhidden) <= BAR[backend], (level, frozen)
            assert frozen or relative_error(grads[1], dweight) <= BAR[backend], level


def test_learns(losses, backend):
    """Gradient descent through it makes the tokens of positive advantage more probable."""
    batch = make_batch()
    weight = batch.weight.requires_grad_()
    scored = []
    for _ in range(6):
        out = fastgrpo.grpo_loss(
            batch.hidden, weight, *batch[2:5], old_logps=batch.old_logps,
            config=config_of("leaky_clip"), backend=backend,
        )  # fmt: skip
        scored.append(out.logps)
        (gradient,) = torch.autograd.grad(out.loss, weight)
        weight.data -= 0.5 * gradient
    moved = (scored[-1] - scored[0]) * batch.completion_mask
    assert (batch.advantages * moved.sum(1)).sum() > 0.1


def test_metrics_count_its_sides(losses, backend):
    batch = with_a_zero(make_batch(off_policy=0.3))
    out, *_ = fused(batch, config_of("leaky_clip"), backend)
    counted = batch.completion_mask & (batch.advantages != 0)[:, None]
    log_ratio = (out.logps.double() - batch.old_logps)[counted]
    tokens, width = batch.completion_mask.sum(), OPTIONS["leaky_clip"]["width"]
    low, high = (log_ratio < -width).sum() / tokens, (log_ratio > width).sum() / tokens
    assert low > 0 and high > 0
    assert out.metrics["clip_low"].item() == pytest.approx(low.item())
    assert out.metrics["clip_high"].item() == pytest.approx(high.item())


def test_tokens_of_advantage_0(losses, backend):
    """They are left out where the loss is inert, and nowhere else."""
    batch = with_a_zero(make_batch())
    idle = (batch.advantages == 0)[:, None] & batch.completion_mask
    share = (idle.sum() / batch.completion_mask.sum()).item()
    assert share > 0
    for name, level, separable, inert in (
        ("leaky_clip", "token", True, True),
        ("leaky_clip", "sequence", False, False),
        ("squared_gap", "token", True, False),
        ("capped", "none", True, True),
        ("pulled", "token", False, False),
    ):
        config = config_of(name, ratio_level=level)
        assert (config.separable, config.zero_advantage_is_inert) == (separable, inert)
    out, dhidden, _ = fused(batch, config_of("leaky_clip"), backend)
    assert out.metrics["live_rows"].item() == pytest.approx(1 - share)
    skipped, same, _ = fused(batch, config_of("leaky_clip"), backend, skip_zero_advantage=True)
    torch.testing.assert_close(skipped.loss, out.loss)
    torch.testing.assert_close(same, dhidden)
    out, dhidden, _ = fused(batch, config_of("squared_gap"), backend)
    assert out.metrics["live_rows"] == 1 and dhidden[idle].ne(0).any(-1).all()
    with pytest.raises(ValueError, match="skip_zero_advantage: .* got one with a gradient there"):
        fused(batch, config_of("squared_gap"), backend, skip_zero_advantage=True)


def test_a_context_of_the_package(losses, backend):
    """With the rule of `kl_cov` and its field, the loss is `kl_cov`."""
    batch = make_batch(off_policy=0.5)
    mine = LossConfig(surrogate="pulled", surrogate_parameters={"coef": 0.4}, cov_ratio=0.2)
    theirs = LossConfig(surrogate="kl_cov", kl_cov_coef=0.4, cov_ratio=0.2)
    actual, wanted = (fused(batch, config, backend) for config in (mine, theirs))
    assert actual[0].loss == wanted[0].loss
    assert all(torch.equal(x, y) for x, y in zip(actual[1:], wanted[1:], strict=True))


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_fields_of_a_context_are_those_that_it_reads(context):
    read = set()

    class Recorded:
        def __getattr__(self, name):
            read.add(name)
            return 2.0 if name == "delta" else getattr(LossConfig(), name)

    x = torch.linspace(-1, 1, 6)
    owner = torch.tensor([0, 4, 6])
    segments = Segments(torch_kernels, owner, owner.diff())
    CONTEXTS[context](Recorded(), Population(x - 2, x, x.flip(0), None, segments, 0))
    assert read == set(CONTEXT_FIELDS[context]) and set(CONTEXT_FIELDS) == set(CONTEXTS)


def test_a_draw_takes_a_seed(losses):
    # Without `monkeypatch`: its undo would come after that of `losses` and register "pulled" again.
    SURROGATES["pulled"] = SURROGATES["pulled"]._replace(context="drawn_covariance")
    config = config_of("pulled", cov_ratio=0.5, cov_low=-50.0, cov_high=50.0)
    first, again, other = (fused(make_batch(), config, "torch", seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_config_is_a_value(losses):
    given, defaults = {"leak": 0.3, "width": 0.13}, LossConfig(surrogate="leaky_clip")
    config = LossConfig(surrogate="leaky_clip", surrogate_parameters=given, beta=0.1)
    assert config.surrogate_parameters == (("width", 0.13), ("leak", 0.3))
    assert config.parameters == (0.13, 0.3)
    for same in (
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
        config_from_key(config.key),
        LossConfig(**dataclasses.asdict(config)),
        LossConfig(**json.loads(json.dumps(dataclasses.asdict(config)))),
        dataclasses.replace(
            LossConfig(surrogate="leaky_clip", beta=0.1), surrogate_parameters=given
        ),
        dataclasses.replace(config, beta=0.1),
        LossConfig.preset("grpo", surrogate="leaky_clip", surrogate_parameters=given, beta=0.1),
        eval(repr(config)),
    ):
        assert same == config and hash(same) == hash(config) and same.key == config.key
    given["leak"] = 0.5
    assert config.parameters == (0.13, 0.3)
    assert dataclasses.replace(config, surrogate_parameters=given) != config
    # What is left out has its default.
    assert defaults == LossConfig(surrogate="leaky_clip", surrogate_parameters={"width": 0.2})
    assert defaults.parameters == (0.2, 0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.surrogate_parameters = ()
    # The package's losses do not know of it.
    assert LossConfig() == LossConfig.preset("grpo")
    assert LossConfig(surrogate="sapo").surrogate_parameters == ()


def test_compiled_equals_eager(losses):
    batch, config = make_batch(), config_of("leaky_clip", ratio_level="sequence", beta=0.1)

    def step(hidden, weight):
        return fastgrpo.grpo_loss(
            hidden, weight, *batch[2:5], old_logps=batch.old_logps, ref_logps=batch.ref_logps,
            config=config,
        ).loss  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, step):
        hidden, weight = (x.clone().requires_grad_() for x in batch[:2])
        loss = function(hidden, weight)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for traced, eager in zip(*results, strict=True):
        assert torch.equal(traced, eager)


def test_without_triton(losses):
    code = """
        import sys; sys.modules["triton"] = None
        import fastgrpo, losses_of_mine
        print(losses_of_mine.gradient(fastgrpo.LossConfig(surrogate="leaky_clip"))[0])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    paths = {"PYTHONPATH": ":".join(sys.path)}
    printed = subprocess.run(command, capture_output=True, text=True, env=paths, check=True).stdout
    assert float(printed) == losses.gradient(LossConfig(surrogate="leaky_clip"))[0]


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="Triton compiles in other processes")
@pytest.mark.parametrize("name", [*OPTIONS, "pulled"])
def test_compiles_without_a_gpu(losses, name):
    from tests.kernels.compile import compiling

    launch, part = launch_for("token_loss", 0, "sm_90"), compiling.PARTS["sm_90"]
    kernel = compiling.compile_case(compiling._token_loss(name), launch, part)
    assert compiling.usage(kernel).stack == 0


def test_a_seed_is_taken_under_compile_too():
    """Which losses draw is told by the context, of a config that is a constant of the trace."""
    batch = make_batch()

    def step(hidden, weight):
        return fastgrpo.grpo_loss(
            hidden, weight, *batch[2:5], old_logps=batch.old_logps, config="clip_cov", seed=3
        ).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*batch[:2]), step(*batch[:2]))


def test_in_a_process_of_its_own(losses):
    config = config_of("leaky_clip")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        # Neither a config that was pickled nor one from its key finds what nobody registered.
        missing = "surrogate: expected one of .* got 'leaky_clip'.* register_surrogate is imported"
        with pytest.raises(ValueError, match=missing):
            pool.apply(config_from_key, (config.key,))
        with pytest.raises(ValueError, match=missing):
            pool.apply(getattr, (config, "parameters"))
        # The function's module is imported, and registers.
        loss, gradient = pool.apply(losses.gradient, (config,))
    here = losses.gradient(config)
    assert loss == here[0] and gradient == here[1]
    # What came through a pickle is not checked before it is used.
    del SURROGATES["leaky_clip"]
    with pytest.raises(ValueError, match=missing):
        losses.gradient(config)


def test_a_reload_replaces_it(losses, tmp_path, backend):
    batch, config = make_batch(), LossConfig(surrogate="squared_gap")
    before = fused(batch, config, backend)[0].loss
    entry = SURROGATES["squared_gap"]
    importlib.reload(losses)
    assert SURROGATES["squared_gap"].fn is not entry.fn
    assert fused(batch, config, backend)[0].loss == before
    # A loss that was edited is the edited one.
    edited = LOSSES.replace("0.5 * gap * gap, gap,", "gap * gap, 2.0 * gap,").replace(
        "(log_ratio - step * advantage) ** 2 / 2", "(log_ratio - step * advantage) ** 2"
    )
    (tmp_path / "losses_of_mine.py").write_text(edited + "\n# edited", encoding="utf-8")
    importlib.reload(losses)
    torch.testing.assert_close(fused(batch, config, backend)[0].loss, 2 * before)


def test_the_same_file_under_another_name_is_the_same_loss(losses, tmp_path):
    """A script that registers, imported as a module as well."""
    path = tmp_path / "losses_of_mine.py"
    spec = importlib.util.spec_from_file_location("__mp_main__", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert SURROGATES["leaky_clip"].formula.__module__ == "__mp_main__"


def test_a_name_that_is_taken(losses, tmp_path):
    message = "name: expected one that is not taken, got 'leaky_clip', .* losses_of_mine.leaky_clip"
    with pytest.raises(ValueError, match=message):
        register_surrogate("leaky_clip", losses.capped, losses.capped_formula, {"cap": 2.0})
    # The same name in another file.
    (tmp_path / "others.py").write_text(LOSSES, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        importlib.import_module("others")
    theirs = SURROGATES["reinforce"]
    with pytest.raises(ValueError, match="name: .* got 'reinforce', which is fastgrpo_kernels"):
        register_surrogate("reinforce", theirs.fn, theirs.formula)


def formula(logp, log_ratio, advantage, context, step):
    return -advantage * log_ratio * step


def right(logp, log_ratio, advantage, context, step):
    return -advantage * log_ratio * step, -advantage * step, advantage * 0.0


def wrong_sign(logp, log_ratio, advantage, context, step):
    return -advantage * log_ratio * step, advantage * step, advantage * 0.0


def wrong_value(logp, log_ratio, advantage, context, step):
    return -advantage * log_ratio, -advantage * step, advantage * 0.0


def wrong_side(logp, log_ratio, advantage, context, step):
    return -advantage * log_ratio * step, -advantage * step, log_ratio


def wrong_far_away(logp, log_ratio, advantage, context, step):
    loss, slope = -advantage * log_ratio * step, -advantage * step
    return loss, slope * (log_ratio < 2.0), advantage * 0.0


def no_side(logp, log_ratio, advantage, context, step):
    return -advantage * log_ratio * step, -advantage * step


def not_of_tl(logp, log_ratio, advantage, context, step):
    return -advantage * torch.sin(log_ratio) * step, -advantage * step, advantage * 0.0


def forgotten_term(logp, log_ratio, advantage, context, step):
    return -advantage * log_ratio, -advantage, advantage * 0.0


def pulling(logp, log_ratio, advantage, context, step):
    return 0.5 * step * log_ratio * log_ratio, step * log_ratio, advantage * 0.0


def shifted(logp, log_ratio, advantage, context, step):
    return step - advantage * log_ratio, -advantage, advantage * 0.0


def in_place(logp, log_ratio, advantage, context, step):
    advantage *= step
    return -advantage * log_ratio, -advantage, advantage * 0.0


def a_power(logp, log_ratio, advantage, context, step):
    return -advantage * log_ratio * step + 0.0 * log_ratio**2, -advantage * step, advantage * 0.0


@jit
def squared(x):
    return x**2


def a_power_further_down(logp, log_ratio, advantage, context, step):
    return -advantage * log_ratio * step + 0.0 * squared(logp), -advantage * step, advantage * 0.0


def of_torch_alone(logp, log_ratio, advantage, context, step):
    zero = tl.expm1(log_ratio * 0.0)
    return -advantage * log_ratio * step + zero, -advantage * step, advantage * 0.0


def sigmoid(logp, log_ratio, advantage, context, step):
    """Named like what it calls, with a slope of numbers that torch makes fp32."""
    gate = tl.sigmoid(log_ratio * 0.0) * 2.0
    slope = tl.where(advantage > 0.0, -1.0, 0.0)
    return tl.where(advantage > 0.0, -log_ratio * gate, 0.0), slope, advantage * 0.0


def around(scale):
    def inner(logp, log_ratio, advantage, context, step):
        return -advantage * log_ratio * scale, -advantage * scale, advantage * 0.0

    return inner


def in_no_file():
    scope = {}
    exec("def right(logp, log_ratio, advantage, context, step):\n    return 0", scope)
    return scope["right"]


REFUSED = {
    r"fn: expected the slope dL/dlog_ratio -0.685 of the formula; got 0.685 at logp=.*, "
    r"log_ratio=0, advantage=1.37, context=0, step=0.5, ratio_level='token'": dict(fn=wrong_sign),
    "fn: expected the loss .* of the formula; got": dict(fn=wrong_value),
    "fn: expected the slope .* got -?0 at .* log_ratio=2.6": dict(fn=wrong_far_away),
    "fn: expected clipped to be -1, 0 or 1; got": dict(fn=wrong_side),
    r"fn: expected tensors \(loss, slope, clipped\).* got \[\(225,\), \(225,\)\]": dict(fn=no_side),
    "fn: expected arithmetic, functions of tl that torch has too": dict(fn=not_of_tl),
    "fn: expected arguments left as they are, got one that is assigned to": dict(fn=in_place),
    r"fn: expected no power \(\*\*\) in a_power": dict(fn=a_power),
    r"fn: expected no power \(\*\*\) in squared": dict(fn=a_power_further_down),
    "fn: expected functions that triton.language has in of_torch_alone, got tl.expm1": dict(
        fn=of_torch_alone
    ),
    "formula: expected a loss of tensors, got NameError": dict(
        formula=lambda logp, d, a, context, step: -a * d * undefined  # noqa: F821
    ),
    "formula: expected a tensor, one loss per token, got tuple": dict(
        formula=lambda logp, d, a, context, step: (-a * d, d)
    ),
    # With its default of 0 nothing is wrong.
    "fn: expected the loss .* step=0.1": dict(
        fn=forgotten_term, parameters={"step": 0.0},
        formula=lambda logp, d, a, context, step: -a * d + step * d**2,
    ),
    "inert: expected False for a loss with a gradient at advantage 0": dict(
        fn=pulling, formula=lambda logp, d, a, context, step: step / 2 * d**2
    ),
    "inert: expected False for a loss with a value at advantage 0; got 0.5": dict(
        fn=shifted, formula=lambda logp, d, a, context, step: step - a * d
    ),
    "formula: expected all of its gradient with respect to log_ratio, as slope='ratio'": dict(
        formula=lambda logp, d, a, context, step: -a * logp * step
    ),
    "formula: expected all of its gradient with respect to logp, as slope='logp'": dict(
        slope="logp"
    ),
    "formula: expected a finite loss and gradient; got inf at": dict(
        formula=lambda logp, d, a, context, step: (1e3 * d.abs()).exp()
    ),
    "formula: expected a tensor, one loss per token, got int": dict(formula=lambda *tensors: 0),
    "formula: expected a loss with a gradient, got one that is detached": dict(
        formula=lambda logp, d, a, context, step: -a * d.detach()
    ),
    r"formula: expected the arguments .*step\), got \(logp\)": dict(formula=lambda logp: logp),
    "formula: expected a function, got None": dict(formula=None),
    "fn: expected a function that def makes, got .*lambda": dict(fn=lambda *tensors: tensors),
    "fn: expected a function that def makes, got 3": dict(fn=3),
    "fn: expected no variables of a function around inner, got .'scale'.; make": dict(fn=around(2)),
    "fn: expected a function defined in a file, .* got right of <string>": dict(fn=in_no_file()),
    r"fn: expected the arguments \(logp, .*, pull\).* got \(logp, .*, step\)": dict(
        parameters={"pull": 0.5}
    ),
    "parameters: expected names that LossConfig has no field of, got 'delta'": dict(
        parameters={"delta": 0.5}
    ),
    r"parameters\['step'\]: expected a finite number, got inf": dict(
        parameters={"step": float("inf")}
    ),
    r"parameters\['step'\]: expected a finite number, got True": dict(parameters={"step": True}),
    "parameters: expected a mapping of names to defaults": dict(parameters=("step",)),
    "ratio_levels: expected one of .* got 'tokens'": dict(ratio_levels=("tokens",)),
    "ratio_levels: expected some of .* got 'token'": dict(ratio_levels="token"),
    r"ratio_levels: expected some of .* got \(\)": dict(ratio_levels=()),
    "ratio_levels: expected a ratio with slope='ratio', got 'none'": dict(ratio_levels=("none",)),
    "slope: expected one of .* got 'logps'": dict(slope="logps"),
    "context: expected one of .* got 'covariance'": dict(context="covariance"),
    "name: expected a string, got 3": dict(name=3),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    given = dict(name="mine", fn=right, formula=formula, parameters={"step": 0.5})
    before = dict(SURROGATES)
    with torch.inference_mode(), pytest.raises(ValueError, match=message):
        register_surrogate(**{**given, **REFUSED[message]})
    assert before == SURROGATES
    with mock.patch.dict(SURROGATES), torch.inference_mode():
        register_surrogate(**given)
        assert LossConfig(surrogate="mine").parameters == (0.5,)


def test_names_that_it_shares_and_slopes_of_numbers():
    def formula(logp, d, a, context, step):
        return torch.where(a > 0, -d, 0.0) + 0.0 * step

    with mock.patch.dict(SURROGATES):
        register_surrogate("mine", sigmoid, formula, {"step": 0.5})
        batch = make_batch()
        out, dhidden, _ = fused(batch, LossConfig(surrogate="mine"), "torch")
        assert out.loss.isfinite() and dhidden.norm() > 0


@pytest.mark.parametrize("message, name, given", [
    (r"expected a mapping of \['width', 'leak'\] .* got \{'with': 1\}", "leaky_clip", {"with": 1}),
    (r"surrogate_parameters\['leak'\]: expected a finite number, got nan", "leaky_clip",
     {"leak": float("nan")}),
    (r"surrogate_parameters\['leak'\]: expected a finite number, got '1'", "leaky_clip",
     {"leak": "1"}),
    ("surrogate_parameters: expected a mapping .* got 0.3", "leaky_clip", 0.3),
    (r"expected nothing with surrogate='ppo_clip', .* fields \['epsilon_low', 'epsilon_high', "
     r"'delta'\] .* got \{'epsilon_low': 0.1\}", "ppo_clip", {"epsilon_low": 0.1}),
    ("expected nothing with surrogate='sapo'", "sapo", (("width", 0.1),)),
])  # fmt: skip
def test_parameters_that_are_refused(losses, message, name, given):
    with pytest.raises(ValueError, match=message):
        LossConfig(surrogate=name, surrogate_parameters=given)


def test_fields_that_it_does_not_read_are_refused(losses):
    for name, field in (("leaky_clip", "epsilon_low"), ("leaky_clip", "cov_ratio"),
                        ("pulled", "kl_cov_coef")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{field}=0.5 has no effect with surrogate='{name}'"):
            config_of(name, **{field: 0.5})
    with pytest.raises(ValueError, match="ratio_level: expected one of .* surrogate='squared_gap'"):
        config_of("squared_gap", ratio_level="sequence_token")
