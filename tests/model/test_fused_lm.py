"""`FusedLM` against the model's own logits: values and the gradients of all parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastgrpo
from fastgrpo import FusedLM, LossConfig, Support, checks, reference
from model_families import FAMILIES, VOCAB, tiny

LENGTHS = (9, 6, 8)  # tokens of each sequence, the prompt's three among them
PROMPT = 3


def sequences() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (n,), generator=g) for n in LENGTHS]


def batch(side: str):
    """input_ids, attention_mask and loss_mask, padded on a side; one token of a turn is a hole."""
    longest = max(LENGTHS)
    ids, mask, loss = (torch.zeros(3, longest, dtype=torch.int64) for _ in range(3))
    for row, tokens in enumerate(sequences()):
        n = len(tokens)
        span = slice(longest - n, longest) if side == "left" else slice(0, n)
        ids[row, span], mask[row, span], loss[row, span] = tokens, 1, 1
        loss[row, span.start : span.start + PROMPT] = 0
    loss[0, longest - 3] = 0
    return ids, mask, loss.bool()


def own_logps(model: nn.Module, side: str) -> torch.Tensor:
    """(3, L) log-probs by the model's own logits of each sequence alone, without any padding."""
    ids, _, _ = batch(side)
    rows = torch.zeros(ids.shape)
    for row, tokens in enumerate(sequences()):
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
        logps = logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        end = ids.shape[1] if side == "left" else len(tokens)
        index = torch.arange(end - len(tokens) + 1, end)
        rows = rows.index_put((torch.tensor(row), index), logps)
    return rows


def grads_of(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(actual, wanted, bar=2e-5):
    assert actual.keys() == wanted.keys() and actual
    for name, exact in wanted.items():
        scale = exact.norm().clamp(min=1e-6)
        assert (actual[name] - exact).norm() / scale <= bar, name


@pytest.fixture
def off_policy():
    """Advantages (3,), and log-probs near the model's (3, 9)."""
    g = torch.Generator().manual_seed(2)
    return torch.tensor([1.0, -0.5, 0.7]), 0.1 * torch.randn(3, max(LENGTHS), generator=g)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, side, off_policy):
    model, (advantages, noise) = tiny(family), off_policy
    ids, mask, loss_mask = batch(side)
    logps = own_logps(model, side)
    old = (logps.detach() + noise).masked_fill(~loss_mask, 0.0)
    config = LossConfig.preset("dapo")
    exact = reference.policy_loss(logps, None, loss_mask, advantages, config, old_logps=old)
    exact.backward()
    wanted = grads_of(model)
    lm = FusedLM(model)
    out = lm(ids, mask, loss_mask, advantages, old_logps=old, config=config)
    out.loss.backward()
    assert (out.logps - logps.detach()).masked_fill(~loss_mask, 0).abs().max() <= 2e-5
    assert (out.logps[~loss_mask] == 0).all()
    torch.testing.assert_close(out.loss, exact.float(), rtol=1e-5, atol=1e-6)
    actual = grads_of(model)
    assert_same_gradients(actual, {n: g for n, g in wanted.items() if n in actual})
    missing = wanted.keys() - actual.keys()
    assert all(wanted[name].abs().max() == 0 for name in missing), missing


# ---- layouts -----------------------------------------------------------------------------------


def loss_and_grads(model, *arguments, **options):
    out = FusedLM(model)(*arguments, **options)
    out.loss.backward()
    return out, grads_of(model)


@pytest.mark.parametrize("config", ["dapo", "gspo", "grpo"])
def test_packed_rows_are_padded_rows(config, off_policy):
    """All sequences in one row, with positions that begin anew, one after the other."""
    model, (advantages, noise) = tiny("qwen2"), off_policy
    ids, mask, loss_mask = batch("right")
    options = dict(config=config)
    padded, wanted = loss_and_grads(
        model, ids, mask, loss_mask, advantages, old_logps=noise - 3, **options
    )
    kept = mask.bool()
    packed = [x[kept][None] for x in (ids, loss_mask, noise - 3)]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    owner = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])[None]
    out, actual = loss_and_grads(
        model, packed[0], None, packed[1], advantages,
        position_ids=positions, sequence_ids=owner, old_logps=packed[2], **options,
    )  # fmt: skip
    torch.testing.assert_close(out.loss, padded.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.logps[0], padded.logps[kept], rtol=1e-5, atol=2e-5)
    assert_same_gradients(actual, wanted)


def test_packed_rows_need_positions():
    ids, _, loss_mask = batch("right")
    owner = torch.arange(9).expand(3, 9) // 5
    with pytest.raises(ValueError, match="position_ids: expected for rows that hold several"):
        FusedLM(tiny("qwen2"))(ids, None, loss_mask, torch.ones(2), sequence_ids=owner)


def test_a_shared_prompt_by_source(off_policy):
    """Two completions after one prompt in one row, under a mask of blocks: as two rows."""
    model = tiny("qwen2")
    prompt, first, second = (torch.tensor(x) for x in ([5, 6, 7], [8, 9, 10, 11], [12, 13]))
    rows = torch.zeros(2, 7, dtype=torch.int64)
    rows[0], rows[1, :5] = torch.cat([prompt, first]), torch.cat([prompt, second])
    mask = (rows != 0).long()
    loss_mask = mask.bool()
    loss_mask[:, :3] = False
    advantages = torch.tensor([1.0, -0.5])
    apart, wanted = loss_and_grads(model, rows, mask, loss_mask, advantages)

    shared = torch.cat([prompt, first, second])[None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 3, 4]])
    source = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 2, 7]])
    owner = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1]])
    visible = torch.ones(9, 9).tril().bool()
    visible[7:, 3:7] = False
    lm = FusedLM(model)
    hidden = lm.base_model(
        input_ids=shared, position_ids=positions, use_cache=False,
        attention_mask=torch.zeros(1, 1, 9, 9).masked_fill(~visible, -torch.inf),
    ).last_hidden_state  # fmt: skip
    lm._hidden = lambda *_: (hidden, None)
    out = lm(
        shared, None, torch.arange(9)[None] >= 3, advantages,
        position_ids=positions, source=source, sequence_ids=owner,
    )  # fmt: skip
    out.loss.backward()
    torch.testing.assert_close(out.loss, apart.loss)
    assert_same_gradients(grads_of(model), wanted)


def test_advantages_and_temperature_per_token(off_policy):
    model, advantages = tiny("llama"), off_policy[0]
    ids, mask, loss_mask = batch("left")
    per_token = advantages[:, None].expand(3, 9).contiguous()
    warm = torch.full((3, 9), 0.7)
    one, wanted = loss_and_grads(model, ids, mask, loss_mask, advantages, temperature=0.7)
    other, actual = loss_and_grads(model, ids, mask, loss_mask, per_token, temperature=warm)
    torch.testing.assert_close(one.loss, other.loss)
    torch.testing.assert_close(one.logps, other.logps)
    assert_same_gradients(actual, wanted)


def test_without_advantages_log_probs_and_entropy():
    model = tiny("gemma2")
    ids, mask, loss_mask = batch("left")
    out = FusedLM(model)(ids, mask, loss_mask, entropy="detached")
    wanted = own_logps(model, "left").masked_fill(~loss_mask, 0)
    torch.testing.assert_close(out.logps, wanted, rtol=1e-5, atol=2e-5)
    assert (out.entropy[loss_mask] > 0).all() and (out.entropy[~loss_mask] == 0).all()
    assert out.logps.requires_grad


def test_nothing_to_train_on_is_a_zero_with_a_gradient():
    model = tiny("qwen2")
    ids, mask, loss_mask = batch("left")
    out, grads = loss_and_grads(model, ids, mask, loss_mask & False, torch.ones(3), normalizer=7)
    assert out.loss == 0 and all((g == 0).all() for g in grads.values()) and grads


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss", "granite-moe-hybrid"])
@pytest.mark.parametrize("aux_scale", [1.0, 0.5])
def test_the_routers_loss(family, aux_scale):
    fields = {} if family != "granite-moe-hybrid" else {"layer_types": ["attention", "attention"]}
    model = tiny(family, output_router_logits=True, router_aux_loss_coef=0.3, **fields)
    ids, mask, loss_mask = batch("left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    own = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
    ).aux_loss  # fmt: skip
    own.mul(0.3 * aux_scale).backward()
    wanted = grads_of(model)
    out = FusedLM(model)(ids, mask, loss_mask, torch.zeros(3), aux_scale=aux_scale)
    out.loss.backward()
    torch.testing.assert_close(out.metrics["aux_loss"], own.detach())
    torch.testing.assert_close(out.loss.detach(), 0.3 * aux_scale * own.detach())
    actual = {name: g for name, g in grads_of(model).items() if name in wanted}
    assert_same_gradients(actual, wanted)


# ---- on the meta device ------------------------------------------------------------------------


def materialised(scale: float = 1.0):
    """FusedLM of a model made on the meta device, whose own logits are scaled, with its parameters
    put in since then; and the model that these are of.
    """
    source = tiny("qwen2")
    with torch.device("meta"):
        model = type(source)(source.config)
    own = model.forward
    model.forward = lambda *args, **kwargs: _scaled(own(*args, **kwargs), scale)
    lm = FusedLM(model.eval())
    lm.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    for name, buffer in source.named_buffers():  # those that no state dict holds
        model.get_buffer(name).copy_(buffer)
    return lm, source


def test_a_model_on_the_meta_device_is_compared_at_its_first_call():
    ids, mask, loss_mask = batch("left")
    lm, source = materialised()
    assert torch.equal(lm(ids, mask, loss_mask).logps, FusedLM(source)(ids, mask, loss_mask).logps)
    lm.model.forward = None  # what has passed is not compared again
    lm(ids, mask, loss_mask)


def test_a_wrong_head_is_refused_at_every_call_after_meta():
    lm, _ = materialised(scale=0.5)
    for _ in range(2):
        with pytest.raises(fastgrpo.UnsupportedHeadError, match="its hidden states and head"):
            lm(*batch("left"))


def test_a_first_call_after_meta_is_not_compiled():
    lm, _ = materialised()
    with pytest.raises(Exception, match="expected one call before torch.compile"):
        torch.compile(lm, fullgraph=True, backend="eager")(*batch("left"))


def test_a_check_that_could_not_end_is_taken_again(monkeypatch):
    lm, _ = materialised(scale=0.5)
    with monkeypatch.context() as failing:
        failing.setattr(lm.model, "forward", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lm(*batch("left"))
    with pytest.raises(fastgrpo.UnsupportedHeadError, match="its hidden states and head"):
        lm(*batch("left"))


def test_a_call_on_the_meta_device_says_what_to_do():
    source = tiny("qwen2")
    with torch.device("meta"):
        lm = FusedLM(type(source)(source.config))
    for call in (lambda: lm(*batch("left")), lambda: fastgrpo.head_of(lm.model)):
        with pytest.raises(ValueError, match=r"^model: .* on the meta device; materialise them"):
            call()


# ---- what it leaves alone ----------------------------------------------------------------------


def test_the_check_touches_neither_random_state_nor_modes():
    model = tiny("gpt2")  # its default has dropout
    model.train()
    model.transformer.h[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    lm = FusedLM(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and lm.model is model


def test_what_the_model_has_stays_reachable(tmp_path):
    model = tiny("qwen2")
    lm = FusedLM(model)
    assert lm.config is model.config and lm._no_split_modules == model._no_split_modules
    assert lm.generate(torch.ones(1, 3, dtype=torch.int64), max_new_tokens=2).shape == (1, 5)
    lm.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists()
    with pytest.raises(AttributeError, match="nonsense"):
        lm.nonsense  # noqa: B018


# ---- what it refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize("family, field, value", [
    ("cohere", "logit_scale", 1.0), ("granite", "logits_scaling", 1.0),
    ("gemma2", "final_logit_softcapping", None), ("falcon-h1", "lm_head_multiplier", 1.0),
])  # fmt: skip
def test_a_head_that_the_config_does_not_describe_is_refused(family, field, value):
    """As if next month's model scaled its logits by a field of another name."""
    model = tiny(family)
    own = model.forward

    def forward(*args, **kwargs):
        current = getattr(model.config, field)
        setattr(model.config, field, right)
        try:
            return own(*args, **kwargs)
        finally:
            setattr(model.config, field, current)

    right = getattr(model.config, field)
    setattr(model.config, field, value)
    if family == "falcon-h1":
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1.5)
        model.forward = lambda *a, **k: _scaled(own(*a, **k))
    else:
        model.forward = forward if family != "cohere" else lambda *a, **k: _scaled(own(*a, **k))
    with pytest.raises(fastgrpo.UnsupportedHeadError, match="its hidden states and head"):
        FusedLM(model)
    assert FusedLM(model, check=False) is not None


def _scaled(out, scale=0.5):
    out.logits = out.logits * scale
    return out


def test_a_model_that_ignores_the_mask_is_refused():
    model = tiny("qwen2")
    backbone, own = model.base_model, model.base_model.forward
    backbone.forward = lambda *a, attention_mask=None, **k: own(*a, **k)
    with pytest.raises(fastgrpo.UnsupportedHeadError, match="a row padded on the left"):
        FusedLM(model)


def test_wrapped_models_are_refused_with_the_right_order():
    model = tiny("qwen2")
    with pytest.raises(ValueError, match=r"DataParallel.*FusedLM\(model\)"):
        FusedLM(nn.DataParallel(model))
    with pytest.raises(ValueError, match=r"compile FusedLM\(model\)"):
        FusedLM(torch.compile(model))
    with pytest.raises(ValueError, match="model: expected a bare model, got a FusedLM"):
        FusedLM(FusedLM(model))
    assert fastgrpo.head_of(FusedLM(model)).weight is model.lm_head.weight
    replica = FusedLM(model)
    replica._is_replica = True
    ids, mask, loss_mask = batch("left")
    with pytest.raises(ValueError, match="got nn.DataParallel"):
        replica(ids, mask, loss_mask)


BAD = {
    "loss_mask: expected False at position 0": dict(loss_mask=torch.ones(3, 9, dtype=torch.bool)),
    "loss_mask: expected False where attention_mask is 0": dict(
        attention_mask=torch.zeros(3, 9).long()
    ),
    "loss_mask: expected shape": dict(loss_mask=torch.ones(3, 8, dtype=torch.bool)),
    "input_ids: expected dtype": dict(input_ids=torch.ones(3, 9)),
    "source: expected positions": dict(source=torch.full((3, 9), 9)),
    "old_logps: expected float32, got torch.bfloat16; under FSDP2": dict(
        old_logps=torch.zeros(3, 9).bfloat16()
    ),
    "sequence_ids: expected numbers in": dict(sequence_ids=torch.full((3, 9), 3)),
    "advantages: expected float32": dict(advantages=torch.zeros(3).half()),
    "ref_logps: expected with advantages": dict(advantages=None, ref_logps=torch.zeros(3, 9)),
    "advantages: expected shape": dict(advantages=torch.zeros(4)),
    "advantages: expected a tensor, got list": dict(advantages=[1.0, 2.0, 3.0]),
    "aux_scale: expected 1 without advantages": dict(aux_scale=0.5),
    "config: expected with advantages only, got 'dapo'": dict(advantages=None, config="dapo"),
    "entropy: expected config.entropy": dict(entropy="detached"),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    ids, mask, loss_mask = batch("left")
    given = dict(input_ids=ids, attention_mask=mask, loss_mask=loss_mask, advantages=torch.ones(3))
    with pytest.raises(ValueError, match=message):
        FusedLM(tiny("qwen2"))(**given | BAD[message])


def test_positions_that_a_model_does_not_take_are_refused():
    model = tiny("qwen2")
    own = model.base_model.forward
    model.base_model.forward = lambda input_ids, attention_mask=None, use_cache=False: own(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
    )
    ids, mask, loss_mask = batch("left")
    lm = FusedLM(model, check=False)
    assert lm(ids, mask, loss_mask).logps.shape == ids.shape
    with pytest.raises(ValueError, match="position_ids: expected None for Qwen2ForCausalLM"):
        lm(ids, mask, loss_mask, position_ids=torch.arange(9).expand(3, 9))


def test_head_of():
    model = tiny("granite")
    head = fastgrpo.head_of(model)
    assert head.weight is model.lm_head.weight and head.logit_scale == 0.25
    assert head.options() == dict(bias=None, logit_scale=0.25, softcap=None, lora=None)
    assert fastgrpo.head_of(torch.compile(model)).weight is model.lm_head.weight
    assert fastgrpo.head_of(tiny("phi")).bias is not None
    with pytest.raises(fastgrpo.UnsupportedHeadError, match="got Linear"):
        fastgrpo.head_of(nn.Linear(2, 2))


# ---- what the sampler could have drawn ---------------------------------------------------------


def drawn_from(ids, seed=0):
    """(B, L, V) bool: a few ids beside each token, all of them where a token is divisible by 3."""
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(*ids.shape, VOCAB, generator=g) < 0.1
    return kept.scatter(-1, ids[..., None], True) | (ids % 3 == 0)[..., None]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_support_in_the_layout_of_the_tokens(side, off_policy):
    """Entry t is of token t, whatever states predict it, and prompts need no ids."""
    model, (advantages, noise) = tiny("granite"), off_policy
    ids, mask, loss_mask = batch(side)
    kept = drawn_from(ids)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    ).logits[:, :-1]
    logps = logits.masked_fill(~kept[:, 1:], -torch.inf).log_softmax(-1)
    logps = logps.gather(-1, ids[:, 1:, None])[..., 0]
    exact = reference.policy_loss(
        logps, None, loss_mask[:, 1:], advantages, LossConfig.preset("dapo"),
        old_logps=(noise - 1)[:, 1:],
    )  # fmt: skip
    exact.backward()
    wanted = grads_of(model)
    support = Support.of_mask(kept & loss_mask[..., None])
    out, actual = loss_and_grads(
        model, ids, mask, loss_mask, advantages, old_logps=noise - 1, support=support, config="dapo"
    )
    torch.testing.assert_close(out.loss, exact.float(), rtol=1e-5, atol=1e-6)
    assert_same_gradients(actual, wanted)
    scored = FusedLM(model)(ids, mask, loss_mask, support=support).logps
    assert torch.equal(scored, out.logps) and (scored[~loss_mask] == 0).all()
    packed = FusedLM(model)(
        ids, mask, loss_mask, advantages, old_logps=noise - 1, support=support, config="dapo",
        sequence_ids=torch.arange(3)[:, None].expand(3, ids.shape[1]),
    )  # fmt: skip
    torch.testing.assert_close(packed.loss, out.loss)
    with pytest.raises(ValueError, match=r"support: expected one of tokens \(3, 9\), got \(27,\)"):
        FusedLM(model)(ids, mask, loss_mask, support=support.view(27))


def test_advantages_per_token_stay_so_with_a_support():
    """Also where a batch has as many trained tokens as rows, and a row without any."""
    model = tiny("qwen2")
    ids, mask, loss_mask = batch("right")
    loss_mask = torch.zeros_like(loss_mask)
    loss_mask[0, 2:5] = True
    advantages = torch.zeros(ids.shape)
    advantages[0, 2:5] = torch.tensor([1.0, -3.0, 0.5])
    whole = Support.of_lists([[]] * ids.numel(), torch.ones_like(loss_mask))
    wanted = FusedLM(model)(ids, mask, loss_mask, advantages)
    out = FusedLM(model)(ids, mask, loss_mask, advantages, support=whole)
    torch.testing.assert_close(out.loss, wanted.loss)
    torch.testing.assert_close(out.logps, wanted.logps)


def test_advantages_per_token_are_not_taken_for_those_of_sequences(monkeypatch):
    """Of a packed batch with as many of both; also where no other value is looked at."""
    monkeypatch.setattr(checks, "looks_at_values", lambda tensor: False)
    ids, mask, loss_mask = batch("right")
    loss_mask = torch.zeros_like(loss_mask)
    loss_mask[0, 2:5] = True
    rows = torch.arange(3)[:, None].expand(ids.shape)
    with pytest.raises(ValueError, match="a shape that tells sequences from tokens"):
        FusedLM(tiny("qwen2"))(ids, mask, loss_mask, torch.zeros(ids.shape), sequence_ids=rows)


# ---- under torch.compile and checkpointing -----------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", pytest.param("granite", marks=pytest.mark.slow)])
def test_it_compiles_whole(family):
    """One graph, and at most two recompiles over five shapes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = tiny(family)
    lm = FusedLM(model)
    compiled = torch.compile(lm, backend=counter, fullgraph=True)
    g = torch.Generator().manual_seed(0)
    for rows, length in ((3, 9), (4, 9), (2, 12), (5, 7), (3, 15)):
        ids = torch.randint(3, VOCAB, (rows, length), generator=g)
        mask = (torch.arange(length) >= torch.arange(rows)[:, None] % 3).long()
        loss_mask = mask.bool() & (torch.arange(length) > 3)
        arguments = ids, mask, loss_mask, torch.randn(rows, generator=g)
        compiled(*arguments, config="dapo").loss.backward()
        actual = grads_of(model)
        lm(*arguments, config="dapo").loss.backward()
        assert_same_gradients(actual, grads_of(model))
    assert counter.frame_count <= 3


@pytest.mark.slow
def test_it_compiles_whole_with_a_support():
    """One graph, and at most two recompiles, however many ids there are."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = tiny("qwen2")
    lm = FusedLM(model)
    compiled = torch.compile(lm, backend=counter, fullgraph=True)
    ids, mask, loss_mask = batch("right")
    for seed in range(4):
        support = Support.of_mask(drawn_from(ids, seed) & loss_mask[..., None])
        options = dict(support=support, config="dapo")
        compiled(ids, mask, loss_mask, torch.ones(3), **options).loss.backward()
        actual = grads_of(model)
        lm(ids, mask, loss_mask, torch.ones(3), **options).loss.backward()
        assert_same_gradients(actual, grads_of(model))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_model_checkpoints_within(reentrant):
    model = tiny("qwen2")
    ids, mask, loss_mask = batch("left")
    advantages = torch.ones(3)
    _, wanted = loss_and_grads(model, ids, mask, loss_mask, advantages)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    if reentrant:
        model.enable_input_require_grads()
    _, actual = loss_and_grads(model, ids, mask, loss_mask, advantages)
    assert_same_gradients(actual, wanted)


def test_a_checkpoint_around_it_gives_the_same():
    model = tiny("qwen2")
    ids, mask, loss_mask = batch("left")
    _, wanted = loss_and_grads(model, ids, mask, loss_mask, torch.ones(3))
    lm = FusedLM(model)
    torch.utils.checkpoint.checkpoint(
        lambda: lm(ids, mask, loss_mask, torch.ones(3)).loss, use_reentrant=False
    ).backward()
    assert_same_gradients(grads_of(model), wanted)
