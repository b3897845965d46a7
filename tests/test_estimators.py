"""Gradient estimators against the exact gradient, on a model whose sentences can be enumerated.

The oracle is autograd through the sum over all sentences of probability times reward. It does not
sample, and uses nothing of fastgrpo.
"""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import fastgrpo
from fastgrpo.train.evolution import add_noises, generator, noise_like, perturbed

VOCAB, END, HIDDEN = 3, 2, 5


class Writer(nn.Module):
    """A recurrent network over letters 0 and 1 and an end token, in fp64."""

    def __init__(self, longest: int = 4, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.letters = nn.Embedding(VOCAB + 1, HIDDEN)
        self.memory = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.double()
        rows = [
            list(letters) + [last]
            for length in range(longest)
            for letters in product((0, 1), repeat=length)
            for last in ((END,) if length < longest - 1 else (0, 1, END))
        ]
        padded = [row + [END] * (longest - len(row)) for row in rows]
        self.ids = torch.tensor(padded)  # (S, T): every sentence there is
        lengths = torch.tensor([len(row) for row in rows])
        self.mask = torch.arange(longest) < lengths[:, None]
        letters = ((self.ids != END) & self.mask).sum(1)
        self.rewards = -((2.0 - letters.double()) ** 2) + 0.3 * self.ids[:, 0]

    def forward(self) -> Tensor:
        """Return the expected reward."""
        return (self.log_pi().exp() * self.rewards).sum()

    def hidden(self) -> Tensor:
        """Return the states (S, T, H) that predict each token."""
        start = torch.full_like(self.ids[:, :1], VOCAB)
        state, states = torch.zeros(len(self.ids), HIDDEN).to(self.head.weight), []
        for token in torch.cat((start, self.ids[:, :-1]), 1).T:
            state = torch.tanh(self.letters(token) + self.memory(state))
            states.append(state)
        return torch.stack(states, 1)

    def logps(self) -> Tensor:
        """Return the log-probs (S, T) of all tokens, by the full softmax."""
        return self.head(self.hidden()).log_softmax(-1).gather(-1, self.ids[..., None])[..., 0]

    def log_pi(self) -> Tensor:
        """Return the log-prob (S,) of each sentence."""
        return (self.logps() * self.mask).sum(1)

    def gradient(self, value: Tensor) -> Tensor:
        """Return d value / d parameters, all in one row."""
        grads = torch.autograd.grad(value, list(self.parameters()), retain_graph=True)
        return torch.cat([grad.flatten() for grad in grads])

    def fused(self, advantages: Tensor, rows: Tensor | slice = slice(None), **options) -> Tensor:
        """Return the gradient of -grpo_loss for some of the sentences: the way to more reward."""
        out = fastgrpo.grpo_loss(
            self.hidden()[rows],
            self.head.weight,
            self.ids[rows],
            self.mask[rows],
            advantages,
            **options,
        )
        return -self.gradient(out.loss)


@pytest.fixture
def writer() -> Writer:
    return Writer()


@pytest.fixture
def exact(writer: Writer) -> Tensor:
    return writer.gradient(writer())


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-9) -> bool:
    return bool((actual - expected).norm() <= rtol * expected.norm())


def test_the_sentences_are_all_there_are(writer) -> None:
    assert len(writer.ids) == 1 + 2 + 4 + 24
    assert writer.log_pi().exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_reinforce_weighted_by_probability_is_the_gradient(writer, exact) -> None:
    pi = writer.log_pi().detach().exp()
    assert close(writer.fused(pi * writer.rewards, normalizer=1, config="reinforce"), exact)


@pytest.mark.parametrize("old", ["given", "left out"])
def test_ppo_at_ratio_1_is_the_gradient(writer, exact, old: str) -> None:
    pi = writer.log_pi().detach().exp()
    old_logps = writer.logps().detach() if old == "given" else None
    gradient = writer.fused(pi * writer.rewards, normalizer=1, config="bnpo", old_logps=old_logps)
    assert close(gradient, exact)


def test_grpo_at_ratio_1_is_the_gradient_of_a_mean_over_each_sentence(writer, exact) -> None:
    """The preset divides by the length of each sentence: not the policy gradient, and it shows."""
    pi = writer.log_pi().detach().exp()
    lengths = writer.mask.sum(1)
    expected = writer.gradient((pi * writer.rewards / lengths * writer.log_pi()).sum())
    gradient = writer.fused(pi * writer.rewards, normalizer=1, config="grpo")
    assert close(gradient, expected)
    assert not close(gradient, exact, rtol=0.1)


UNCLIPPED = fastgrpo.LossConfig.preset("grpo", epsilon_low=1.0, epsilon_high=1e6)


def test_grpo_without_clipping_corrects_for_who_wrote_the_sentences() -> None:
    """Of one token each: the ratio of the token is that of the sentence, and nothing is lost."""
    writer, other = Writer(longest=1), Writer(longest=1, seed=1)
    q = other.log_pi().detach()
    ratio = (writer.log_pi() - q).exp()
    assert ratio.max() > 1.2 and ratio.min() < 0.8
    options = {"normalizer": 1, "old_logps": other.logps().detach()}
    exact = writer.gradient(writer())
    assert close(writer.fused(q.exp() * writer.rewards, config=UNCLIPPED, **options), exact)
    clipped = writer.fused(q.exp() * writer.rewards, config="grpo", **options)
    assert not close(clipped, exact, rtol=0.1)


def test_grpo_without_clipping_is_its_surrogate_differentiated(writer) -> None:
    """Off-policy and of several tokens, with the surrogate's expectation by enumeration."""
    other = Writer(seed=1)
    q, old_logps = other.log_pi().detach().exp(), other.logps().detach()
    ratio = (writer.logps() - old_logps).exp()
    means = (ratio * writer.mask).sum(1) / writer.mask.sum(1)
    expected = writer.gradient((q * writer.rewards * means).sum())
    options = {"normalizer": 1, "old_logps": old_logps, "config": UNCLIPPED}
    assert close(writer.fused(q * writer.rewards, **options), expected)


@pytest.mark.parametrize("size", [2, 3])
def test_the_mean_of_the_group_costs_its_own_share_and_no_direction(
    writer, exact, size: int
) -> None:
    """Over all groups that can be drawn: (1 - 1/G) of the gradient."""
    pi = writer.log_pi().detach().exp()
    groups = torch.cartesian_prod(*[torch.arange(len(pi))] * size)  # (groups, G)
    chances = pi[groups].prod(1, keepdim=True)
    advantages = fastgrpo.group_advantages(
        writer.rewards[groups].float().flatten(), size, estimator="dr_grpo"
    )
    weights = torch.zeros_like(pi)
    weights.index_add_(0, groups.flatten(), (chances * advantages.view(-1, size)).flatten())
    gradient = writer.fused(weights / size, normalizer=1, config="reinforce")
    assert close(gradient, (1 - 1 / size) * exact, rtol=1e-5)


def within(samples: Tensor, exact: Tensor, bound: float = 4.5) -> bool:
    """Return whether the mean of samples (n, d) is within ``bound`` standard errors everywhere.

    For 50 coordinates, chance goes past 4.5 once in 3000 draws; the seeds are fixed.
    """
    error = samples.std(0) / len(samples) ** 0.5
    return bool(((samples.mean(0) - exact).abs() <= bound * error + 1e-12).all())


def sentence_gradients(writer: Writer, rewards: Tensor, config: str) -> Tensor:
    """Return the estimate (S, d) that `grpo_loss` makes of each sentence alone."""
    return torch.stack(
        [
            writer.fused(rewards[i : i + 1], slice(i, i + 1), normalizer=1, config=config)
            for i in range(len(rewards))
        ]
    )


def test_reinforce_over_tokens_is_unbiased(writer, exact) -> None:
    pi = writer.log_pi().detach().exp()
    draw = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(pi, 40_000, replacement=True, generator=draw)
    assert within(sentence_gradients(writer, writer.rewards, "reinforce")[drawn], exact)
    # What has a bias is told apart by as many sentences.
    assert not within(sentence_gradients(writer, writer.rewards, "grpo")[drawn], exact)


def test_a_baseline_of_the_other_sentences_is_unbiased_and_varies_less(writer, exact) -> None:
    pi = writer.log_pi().detach().exp()
    draw = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(pi, 40_000, replacement=True, generator=draw).view(-1, 4)
    scores = sentence_gradients(writer, torch.ones_like(pi), "reinforce")
    rewards = writer.rewards[drawn]
    others = (rewards.sum(1, keepdim=True) - rewards) / 3
    plain, baselined = (
        (weights[..., None] * scores[drawn]).mean(1) for weights in (rewards, rewards - others)
    )
    assert within(baselined, exact) and within(plain, exact)
    assert baselined.var(0).sum() < 0.8 * plain.var(0).sum()


def test_reinforce_over_parameters_is_unbiased(writer) -> None:
    """Against the same noise differentiated, E[grad J(mu + sigma e)]: what it is the gradient of.

    A model's score is its expected reward; what luck with the sentences adds has mean zero.
    """
    writer.float()
    writer.rewards = writer.rewards.float()
    sigma, pairs = 0.2, 400
    estimates, smoothed = [], []
    for seed in range(pairs):
        places = enumerate(writer.parameters())
        noise = [noise_like(p, generator(seed, i, p.device)).flatten() for i, p in places]
        rewards = []
        for sign in (1, -1):
            with torch.no_grad(), perturbed(writer, seed, sign * sigma):
                rewards.append(writer().item())
            moved = copy.deepcopy(writer)
            add_noises(moved, [seed], [sign * sigma])
            smoothed.append(moved.gradient(moved()))
        estimates.append((rewards[0] - rewards[1]) / (2 * sigma) * torch.cat(noise))
    # The oracle has an error as well, smaller by far.
    difference = torch.stack(estimates) - torch.stack(smoothed).view(pairs, 2, -1).mean(1)
    assert within(difference, torch.zeros(()))
    assert not within(difference + 0.5 * torch.stack(smoothed).mean(0), torch.zeros(()))


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0])
def test_the_second_moment_of_a_ratio_is_exponential_in_the_squared_distance(shift: float) -> None:
    """E_q[(p/q)^2] = e^(shift^2) for normal p and q: by quadrature."""
    x = torch.linspace(-14, 14, 28_001, dtype=torch.float64)
    log_q, log_p = (torch.distributions.Normal(m, 1.0).log_prob(x) for m in (0.0, shift))
    second = torch.trapezoid((2 * log_p - log_q).exp(), x).item()
    assert second == pytest.approx(torch.tensor(shift**2).exp().item(), rel=1e-6)
