"""Which kernels a call takes, and what is done about kernels that fail or are wrong.

Kernels and their check are stand-ins here; tests/kernels/interpreter/test_interpreter_self_check.py
has real ones.
"""

from __future__ import annotations

import json
import logging
import os
import warnings

import pytest
import torch

import fastgrpo
import fastgrpo_kernels
from fastgrpo import torch_kernels
from fastgrpo.dispatch import choice, self_check, verdicts
from fastgrpo.dispatch.choice import PORTABLE, Route
from fastgrpo.dispatch.self_check import Figure
from fastgrpo_kernels import Head, Rows
from fastgrpo_kernels.runtime import LaunchError

LIKE = torch.ones(2, 4, dtype=torch.bfloat16)
SCORED = Rows(LIKE, torch.zeros(2, dtype=torch.int64)), Head(LIKE)
DTYPES = (torch.bfloat16, torch.bfloat16)
GOOD = Figure("logps", 1e-6, 2e-5)
BAD = Figure("entropy", 1e-3, 2e-5)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A process on a part with every kernel; its checks are counted and can be told to fail."""
    checked, outcome = [], [GOOD]

    def figures(kernels, device, dtypes, modes, vocab=None):
        checked.append(kernels)
        for figure in outcome:
            if isinstance(figure, Exception):
                raise figure
            yield figure

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTGRPO_BACKEND", raising=False)
    monkeypatch.delenv("FASTGRPO_ANCHORED", raising=False)
    monkeypatch.setattr(choice, "obstacle", lambda device: "")
    monkeypatch.setattr(choice, "INTERPRETED", False)
    monkeypatch.setattr(choice, "_verdicts", {})
    monkeypatch.setattr(fastgrpo_kernels, "has_anchored", lambda rows, head: True)
    monkeypatch.setattr(self_check, "figures", figures)
    return checked, outcome


def kernels_of(backend="auto", **how):
    """The kernels that a call gets."""
    return choice.run(lambda kernels: kernels, backend, LIKE, SCORED, **how)


def failing(*those, error=None):
    """Work that cannot be launched with some kernels."""

    def work(kernels):
        if kernels in those:
            raise error or LaunchError("_some_kernel cannot be launched: out of resource")
        return kernels

    return work


def quietly(call, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call(*arguments)


# ---- what is asked for -------------------------------------------------------------------------


def test_the_best_kernels_run(hopper):
    assert kernels_of() is kernels_of("triton") is fastgrpo_kernels
    assert kernels_of("torch") is torch_kernels
    assert choice.run(lambda kernels: kernels, "auto", LIKE) is PORTABLE, "no rows are scored"


def test_environment_variables_take_the_place_of_auto(hopper, monkeypatch):
    monkeypatch.setenv("FASTGRPO_ANCHORED", "0")
    assert kernels_of() is kernels_of("triton") is PORTABLE
    monkeypatch.setenv("FASTGRPO_BACKEND", "torch")
    assert kernels_of() is torch_kernels
    assert kernels_of("triton") is PORTABLE, "a named backend is what it says"


@pytest.mark.parametrize("name, value, expected", [
    ("FASTGRPO_BACKEND", "cuda", r"one of \['auto', 'triton', 'torch'\]"),
    ("FASTGRPO_BACKEND", "", r"one of \['auto', 'triton', 'torch'\]"),
    ("FASTGRPO_ANCHORED", "no", "0 or 1, or no such variable"),
    ("FASTGRPO_SELF_CHECK", "2", "0 or 1, or no such variable"),
    ("FASTGRPO_WARP_SPECIALIZE", "on", "0 or 1, or no such variable"),
])  # fmt: skip
def test_a_bad_value_is_an_error_that_names_the_variable(monkeypatch, name, value, expected):
    """On a CPU too, where no kernel reads it."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}: expected {expected}, got '{value}'"):
        kernels_of()


@pytest.mark.parametrize("name", ["FASTGRPO_BACKEND", "FASTGRPO_ANCHORED"])
def test_the_variable_reaches_every_public_function(monkeypatch, name):
    monkeypatch.setenv(name, "cuda")
    hidden, ids = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    rewards = torch.tensor([1.0, 0.0])
    for call in (
        lambda: fastgrpo.linear_logps(hidden, hidden[0], ids),
        lambda: fastgrpo.grpo_loss(hidden, hidden[0], ids, ids == 0, rewards),
        lambda: fastgrpo.group_advantages(rewards, 2),
    ):
        with pytest.raises(ValueError, match=name):
            call()


def test_float64_is_torchs(hopper):
    like = LIKE.double()
    assert choice.run(lambda kernels: kernels, "auto", like) is torch_kernels
    with pytest.raises(ValueError, match="float64"):
        choice.run(lambda kernels: kernels, "triton", like)


# ---- what cannot be launched -------------------------------------------------------------------


def test_auto_degrades_to_torch_and_remembers(hopper):
    work = failing(fastgrpo_kernels, PORTABLE)
    with pytest.warns(RuntimeWarning) as said:
        assert choice.run(work, "auto", LIKE, SCORED) is torch_kernels
    taken = [str(w.message).rpartition(" takes ")[2] for w in said]
    assert taken == ["the portable kernels.", "the torch backend."]
    assert all("_some_kernel cannot be launched" in str(w.message) for w in said)
    assert quietly(choice.run, work, "auto", LIKE, SCORED) is torch_kernels
    assert quietly(kernels_of) is torch_kernels, "other work takes the same route"


def test_a_named_backend_degrades_to_the_portable_kernels_and_raises_then(hopper):
    with pytest.warns(RuntimeWarning, match="portable kernels"):
        assert choice.run(failing(fastgrpo_kernels), "triton", LIKE, SCORED) is PORTABLE
    assert quietly(kernels_of, "triton") is PORTABLE
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(RuntimeError, match="backend='triton'.*_some_kernel cannot be launched"),
    ):
        choice.run(failing(PORTABLE), "triton", LIKE, SCORED)


def test_routes_fail_apart(hopper):
    with pytest.warns(RuntimeWarning):
        choice.run(failing(fastgrpo_kernels, PORTABLE), "auto", LIKE, SCORED)
    rows, head = SCORED
    single = rows._replace(hidden=rows.hidden.float()), head._replace(weight=head.weight.float())
    assert quietly(choice.run, lambda k: k, "auto", LIKE, single) is fastgrpo_kernels
    assert quietly(choice.run, lambda k: k, "auto", LIKE) is PORTABLE
    assert quietly(choice.run, lambda k: k, "auto", LIKE, SCORED, "sparse") is fastgrpo_kernels


@pytest.mark.parametrize("error", [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700),
    torch.OutOfMemoryError("CUDA out of memory"),
    ValueError("a bad argument"),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_no_other_error_is_swallowed(hopper, error):
    with pytest.raises(type(error)) as caught:
        quietly(choice.run, failing(fastgrpo_kernels, error=error), "auto", LIKE, SCORED)
    assert caught.value is error
    assert kernels_of() is fastgrpo_kernels


# ---- what is wrong -----------------------------------------------------------------------------


def test_a_route_is_checked_once(hopper, caplog):
    checked, _ = hopper
    with caplog.at_level(logging.WARNING, "fastgrpo"):
        for _ in range(3):
            assert quietly(kernels_of) is fastgrpo_kernels
    assert checked == [fastgrpo_kernels]
    announced, done = (record.message for record in caplog.records)
    assert "bfloat16 bfloat16 anchored on cpu" in announced and "checked" in done
    choice._verdicts.clear()  # another process
    assert quietly(kernels_of) is fastgrpo_kernels
    assert len(checked) == 1, "the verdict is on disk"


def test_a_wrong_figure_is_one_warning_torch_and_an_error_for_a_named_backend(hopper):
    checked, outcome = hopper
    outcome[:] = [GOOD, BAD]
    for _ in range(2):
        with pytest.warns(RuntimeWarning) as said:
            assert kernels_of() is torch_kernels
        (warning,) = said
        assert "entropy off by 1.0e-03 (allowed: 2e-05)" in str(warning.message)
        assert "logps" not in str(warning.message) and "torch backend" in str(warning.message)
        assert "wrong numbers: " in str(warning.message)
        assert quietly(kernels_of) is torch_kernels
        with pytest.raises(RuntimeError, match="entropy off by 1.0e-03"):
            kernels_of("triton")
        choice._verdicts.clear()  # another process: it reads the verdict
    assert len(checked) == 1


def test_what_is_not_a_number_does_not_hold(hopper):
    hopper[1][:] = [Figure("logps", float("nan"), 2e-5)]
    with pytest.warns(RuntimeWarning, match="logps off by nan"):
        assert kernels_of() is torch_kernels


def test_a_check_that_cannot_be_launched_degrades_and_is_not_kept(hopper):
    checked, outcome = hopper
    outcome[:] = [LaunchError("_some_kernel cannot be launched: no compiler")]
    with pytest.warns(RuntimeWarning, match="no compiler"):
        assert kernels_of() is torch_kernels
    assert checked == [fastgrpo_kernels, PORTABLE]
    choice._verdicts.clear()
    outcome[:] = [GOOD]
    assert quietly(kernels_of) is fastgrpo_kernels


def test_other_software_is_checked_again(hopper, monkeypatch):
    checked, _ = hopper
    for value in ("", "570.1", "580.2"):
        monkeypatch.setattr(verdicts, "_driver", lambda value=value: value)
        choice._verdicts.clear()
        kernels_of()
    monkeypatch.setattr(verdicts, "_sources", lambda: "another hash")
    choice._verdicts.clear()
    kernels_of()
    assert len(checked) == 4


def test_what_a_verdict_depends_on(monkeypatch):
    facts = verdicts.facts(torch.device("cpu"), "bfloat16 bfloat16 portable")
    names = ["device", "driver", "torch", "triton", "sources", "products", "route"]
    assert list(facts) == names
    assert facts["torch"] == torch.__version__ and len(facts["sources"]) == 64
    monkeypatch.setenv("FASTGRPO_WARP_SPECIALIZE", "1")
    assert verdicts.facts(torch.device("cpu"), "bfloat16 bfloat16 portable") != facts


def test_a_check_without_time_left_is_not_kept(hopper, monkeypatch, caplog):
    checked, outcome = hopper
    outcome[:] = [GOOD, BAD]
    monkeypatch.setattr(choice, "MOST_SECONDS", -1.0)
    assert quietly(kernels_of) is fastgrpo_kernels, "the second figure was not looked at"
    assert "no time left" in caplog.text
    choice._verdicts.clear()
    kernels_of()
    assert len(checked) == 2


def test_nothing_is_checked_during_a_capture(hopper, monkeypatch):
    checked, outcome = hopper
    outcome[:] = [BAD]
    monkeypatch.setattr(choice, "capturing", lambda device: True)
    assert quietly(kernels_of) is fastgrpo_kernels
    assert not checked
    monkeypatch.setattr(choice, "capturing", lambda device: False)
    with pytest.warns(RuntimeWarning):
        assert kernels_of() is torch_kernels


def test_a_stored_verdict_holds_during_a_capture_too(hopper, monkeypatch):
    hopper[1][:] = [BAD]
    with pytest.warns(RuntimeWarning):
        kernels_of()
    choice._verdicts.clear()
    monkeypatch.setattr(choice, "capturing", lambda device: True)
    assert quietly(kernels_of) is torch_kernels


def test_the_check_can_be_left_out(hopper, monkeypatch):
    """And what it found is then no matter: the way past a false alarm."""
    checked, outcome = hopper
    outcome[:] = [BAD]
    with pytest.warns(RuntimeWarning):
        kernels_of()
    choice._verdicts.clear()
    monkeypatch.setenv("FASTGRPO_SELF_CHECK", "0")
    assert quietly(kernels_of) is quietly(kernels_of, "triton") is fastgrpo_kernels
    assert len(checked) == 1


def test_a_check_without_memory_is_no_verdict(hopper, caplog):
    checked, outcome = hopper
    outcome[:] = [torch.OutOfMemoryError("CUDA out of memory")]
    assert quietly(kernels_of) is fastgrpo_kernels
    assert "no memory left" in caplog.text
    choice._verdicts.clear()
    outcome[:] = [GOOD]
    kernels_of()
    assert len(checked) == 2


def test_an_error_names_what_asked_for_the_kernels(monkeypatch):
    monkeypatch.setattr(choice, "obstacle", lambda device: "no GPU")
    with pytest.raises(ValueError, match="^backend='triton': no GPU"):
        kernels_of("triton")
    monkeypatch.setenv("FASTGRPO_BACKEND", "triton")
    with pytest.raises(ValueError, match="^FASTGRPO_BACKEND=triton: no GPU"):
        kernels_of()


# ---- the files ---------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_is_no_error(hopper, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert quietly(kernels_of) is fastgrpo_kernels
    assert (tmp_path / "file").read_text() == ""


def test_a_verdict_is_written_whole_or_not_at_all(hopper, monkeypatch, tmp_path):
    kernels_of()
    (path,) = (tmp_path / "fastgrpo").iterdir()
    assert json.loads(path.read_text())["reason"] == ""
    path.unlink()

    def full(source, target):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    choice._verdicts.clear()
    assert quietly(kernels_of) is fastgrpo_kernels
    assert not list((tmp_path / "fastgrpo").iterdir()), "no half of it is left behind"


@pytest.mark.parametrize("home", ["relative", "~/nobody"])
def test_without_a_place_for_it_nothing_is_kept(hopper, monkeypatch, tmp_path, home):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    assert quietly(kernels_of) is fastgrpo_kernels
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"reason": ""}', '{"facts": {}, "reason": ""}']
)
def test_a_file_that_is_not_a_verdict_counts_as_none(hopper, tmp_path, content):
    checked, _ = hopper
    kernels_of()
    (path,) = (tmp_path / "fastgrpo").iterdir()
    path.write_text(content)
    choice._verdicts.clear()
    assert quietly(kernels_of) is fastgrpo_kernels
    assert len(checked) == 2 and json.loads(path.read_text())["reason"] == ""


# ---- the check itself --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lost", [slice(-2, -1), slice(-11, None)], ids=["a row without target", "a tile's rest"]
)
def test_rows_that_are_lost_show(monkeypatch, lost):
    """Few of them change little of the whole."""
    own = self_check.logps_bwd

    def shortened(rows, head, plan, *rest):
        grads = own(rows, head, plan, *rest)
        if plan.accumulator == torch.float32:
            grads.weight[lost] = 0
        return grads

    monkeypatch.setattr(self_check, "logps_bwd", shortened)
    figures = list(self_check.figures(torch_kernels, torch.device("cpu"), DTYPES, ("dense",)))
    assert "row of dweight in the backward" in [f.name for f in figures if not f.holds]


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)])
def test_products_in_tf32_have_bars_of_their_own(monkeypatch, dtypes):
    monkeypatch.setattr(self_check, "dot_precision", lambda bits: "tf32")
    figures = list(self_check.figures(torch_kernels, torch.device("cpu"), dtypes, ("dense",)))
    bars = {figure.name: figure.bar for figure in figures}
    assert (bars["logps"], bars["dhidden in the forward"]) == self_check.TF32_BARS


@pytest.mark.parametrize("mode", self_check.MODES)
def test_the_torch_backend_passes_the_check(mode):
    """Against itself in float64: the bars are what rounding takes, with room."""
    figures = list(self_check.figures(torch_kernels, torch.device("cpu"), DTYPES, (mode,)))
    names = " ".join(figure.name for figure in figures)
    for name in ("logps", "entropy", "dhidden in the", "dweight in the", "token_loss"):
        assert name in names
    for other in ("sparse", "support"):
        assert (other in names) == (other == mode)
    assert all(figure.holds for figure in figures), [str(figure) for figure in figures]


def test_the_check_leaves_the_state_of_torch_alone(monkeypatch):
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    before, seen = torch.get_rng_state(), []
    token_loss = torch_kernels.token_loss

    def watched(*given):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return token_loss(*given)

    monkeypatch.setattr(torch_kernels, "token_loss", watched)
    try:
        figures = list(
            self_check.figures(torch_kernels, torch.device("cpu"), DTYPES, self_check.MODES)
        )
        assert torch.are_deterministic_algorithms_enabled() and not any(seen) and seen
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(figure.holds for figure in figures)


def test_a_verdict_is_of_a_device_and_its_route():
    one = Route(torch.device("cuda:0"), DTYPES, "dense", True)
    assert str(one) == "bfloat16 bfloat16 anchored on cuda:0"
    assert Route(torch.device("cuda:1"), (), "dense", False).name == "tokens portable"
    for mode in ("sparse", "support"):
        route = Route(torch.device("cuda"), DTYPES, mode, False)
        assert route.name == f"bfloat16 bfloat16 {mode} portable"
