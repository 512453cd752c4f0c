"""Decoupled PPO: hand-computed numbers, a float64 reference with gradients, exact expectations, padding, the band's edges."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolrl_ray.algos.losses import policy_loss
from toolrl_ray.algos.off_policy import in_band, log_importance, sampler_kl, truncated_importance_weights

MASK = torch.tensor([[True, True, True, False], [True, True, False, False], [False] * 4])
logit_rows = st.lists(st.floats(-8, 8), min_size=4, max_size=4)


def randn(*shape, seed, scale=1.0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def three_policies():
    """(current, proximal, behaviour logprobs, advantages), float64 [3, 4]; ratios on both sides of every bound that the tests use."""
    rollout = -randn(3, 4, seed=1).abs()
    old = rollout + randn(3, 4, seed=2, scale=0.7)
    return old + randn(3, 4, seed=3, scale=0.4), old, rollout, randn(3, 4, seed=4)


def everything(*probabilities):
    """Probabilities as float64 logprobs [1, A], and a mask that takes all of them."""
    rows = [torch.tensor([row], dtype=torch.float64).log() for row in probabilities]
    return *rows, torch.ones_like(rows[0], dtype=torch.bool)


def test_the_loss_and_gradient_of_two_tokens_computed_by_hand():
    current, old, rollout, mask = everything([0.44, 0.7], [0.4, 0.5], [0.5, 0.25])
    current.requires_grad_()
    weights = truncated_importance_weights(old, rollout, mask, 1.5)
    torch.testing.assert_close(weights, torch.tensor([[0.8, 1.5]], dtype=torch.float64))  # 0.4 / 0.5, and 0.5 / 0.25 cut
    loss, _ = policy_loss(current, old, torch.tensor([[2.0, -1.0]]).double(), mask, 2, 0.2, 0.2, weights)
    loss.backward()
    # r = 1.1 within the clip, and 1.4 above it, which for A < 0 does not bind: objectives 0.8 * 1.1 * 2 = 1.76 and 1.5 * 1.4 * -1 = -2.1
    assert loss.item() == pytest.approx(-(1.76 - 2.1) / 2)
    torch.testing.assert_close(current.grad, torch.tensor([[-1.76 / 2, 2.1 / 2]], dtype=torch.float64))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_no_importance_is_where_no_token_is(level):
    _, old, rollout, _ = three_policies()
    x = log_importance(torch.where(MASK, old, float("nan")), rollout, MASK, level)
    assert torch.equal(x != 0, MASK)


def test_the_clip_is_around_the_proximal_policy_so_a_stale_token_still_has_its_gradient():
    current, old, rollout, mask = everything([0.6], [0.6], [0.4])
    advantages, gradients = torch.ones(1, 1, dtype=torch.float64), []
    for anchor, weights in ((old, truncated_importance_weights(old, rollout, mask, 2.0)), (rollout, None)):
        x = current.clone().requires_grad_()
        policy_loss(x, anchor, advantages, mask, 1, 0.2, 0.2, weights)[0].backward()
        gradients.append(x.grad.item())
    assert gradients == pytest.approx([-1.5, 0.0])  # plain PPO, with 1.5 for its ratio, clips before the first step


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("band", [None, (0.999, 1.001)])
def test_a_sampler_that_is_the_proximal_policy_leaves_plain_ppo_bit_for_bit(level, band):
    current, old, _, advantages = three_policies()
    results = []
    for weights in (None, truncated_importance_weights(old, old.clone(), MASK, 2.0, level, band)):
        x = current.clone().requires_grad_()
        loss, stats = policy_loss(x, old, advantages, MASK, 5, 0.2, 0.3, weights)
        loss.backward()
        results.append([loss.detach(), x.grad, *stats.values()])
    assert torch.equal(weights, MASK.double()) and results[0][1].abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def reference_weight(row, t, old, rollout, clip, level, band):
    """By the definition, in python floats."""
    ratios = {u: math.exp(old[row, u].item()) / math.exp(rollout[row, u].item()) for u in range(4) if MASK[row, u]}
    if band and not band[0] <= ratios[t] <= band[1]:
        return 0.0
    return min(ratios[t] if level == "token" else math.prod(ratios.values()), clip)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("band", [None, (0.5, 1.8)])
@pytest.mark.parametrize("clip", [1.3, 1e9])
def test_loss_and_gradient_equal_the_plain_reference(level, band, clip):
    current, old, rollout, advantages = three_policies()
    expected, gradient = 0.0, torch.zeros_like(current)
    for row, t in MASK.nonzero().tolist():
        w = reference_weight(row, t, old, rollout, clip, level, band)
        r, a = math.exp((current - old)[row, t].item()), advantages[row, t].item()
        unclipped, clipped = r * a, min(max(r, 0.8), 1.3) * a
        expected -= w * min(unclipped, clipped) / 9
        gradient[row, t] = -w * r * a / 9 if unclipped <= clipped else 0.0

    def loss(x):
        return policy_loss(x, old, advantages, MASK, 9, 0.2, 0.3, truncated_importance_weights(old, rollout, MASK, clip, level, band))[0]

    current.requires_grad_()
    loss(current).backward()
    assert loss(current).item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(current.grad, gradient)
    assert torch.autograd.gradcheck(loss, current.detach().clone().requires_grad_())


def test_a_sequence_has_one_weight_the_product_of_its_tokens_even_of_those_outside_the_band():
    old, rollout, mask = everything([0.6, 0.1, 0.5, 0.9], [0.4, 0.25, 0.5, 0.1])
    mask[0, 3] = False
    expected = 1.5 * 0.4 * 1.0
    weights = truncated_importance_weights(old, rollout, mask, 2.0, "sequence")
    torch.testing.assert_close(weights, torch.tensor([[expected] * 3 + [0.0]], dtype=torch.float64))
    weights = truncated_importance_weights(old, rollout, mask, 0.5, "sequence", (0.5, 2.0))
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.0, 0.5, 0.0]], dtype=torch.float64))  # cut, and the second outside


@pytest.mark.parametrize("level, is_exact", [("sequence", True), ("token", False)])
def test_sequence_weights_correct_what_the_behaviour_policy_comes_to_and_token_weights_do_not(level, is_exact):
    """Two choices of three, the second given the first. Expectation of w_1 f(choices) over the behaviour policy, all nine summed up."""
    behaviour, proximal = (randn(4, 3, seed=s).log_softmax(1) for s in (8, 9))  # row 0: first choice; row 1 + i: second after i
    value = randn(3, 3, seed=10)

    def path(policy, i, j):
        return torch.stack([policy[0, i], policy[1 + i, j]])[None]

    mask = torch.ones(1, 2, dtype=torch.bool)
    corrected = target = 0.0
    for i, j in product(range(3), repeat=2):
        b, p = path(behaviour, i, j), path(proximal, i, j)
        weight = truncated_importance_weights(p, b, mask, 1e9, level)[0, 1]
        corrected += (b.sum().exp() * weight * value[i, j]).item()
        target += (p.sum().exp() * value[i, j]).item()
    assert (corrected == pytest.approx(target, rel=1e-9)) is is_exact


@given(logit_rows, logit_rows, st.floats(0.5, 1e9))
def test_token_weights_correct_the_samplers_expectation_when_the_cut_does_not_bind(learner, sampler, clip):
    p, q = (torch.tensor([x], dtype=torch.float64).log_softmax(1) for x in (learner, sampler))
    weights = truncated_importance_weights(p, q, torch.ones(1, 4, dtype=torch.bool), clip)
    assert weights.max() <= clip
    if (p - q).exp().max() <= clip:
        torch.testing.assert_close(q.exp() * weights, p.exp())


@given(logit_rows, logit_rows)
def test_sampler_kl_is_unbiased_for_kl_of_sampler_to_learner(learner, sampler):
    p, q = (torch.tensor(x, dtype=torch.float64).log_softmax(0) for x in (learner, sampler))
    expected = (q.exp() * (q - p)).sum().item()
    assert (q.exp() * sampler_kl(p, q)).sum().item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_the_edges_of_the_band_are_inside_it():
    ratios = torch.tensor([[0.0, 0.4999, 0.5, 1.0, 2.0, 2.0001]], dtype=torch.float64)
    old, rollout, mask = ratios.log(), torch.zeros_like(ratios), torch.ones_like(ratios, dtype=torch.bool)
    assert log_importance(old, rollout, mask).exp()[0, [2, 4]].tolist() == [0.5, 2.0]  # what is compared is exact
    assert in_band(old, rollout, mask, (0.5, 2.0)).tolist() == [[False, False, True, True, True, False]]
    assert in_band(old, rollout, mask, (0.0, 2.0)).tolist() == [[True, True, True, True, True, False]]
    assert in_band(old, rollout, mask, None).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("logprob", [-1.0, -1e30, float("-inf"), float("nan")])
def test_a_token_outside_the_band_has_gradient_exactly_zero_and_the_others_keep_theirs(level, logprob):
    current, old, rollout, advantages = three_policies()
    rollout[0, 1] = old[0, 1] - 3  # e^3 times as likely: outside
    weights = truncated_importance_weights(old, rollout, MASK, 2.0, level, (0.01, 10.0))
    without = MASK.clone()
    without[0, 1] = False
    assert torch.equal(weights > 0, without)
    gradients, losses = [], []
    for mask in (MASK, without):  # num_tokens is the same for both
        x = current.clone()
        x[0, 1] = logprob
        x.requires_grad_()
        loss, _ = policy_loss(x, old, advantages, mask, 5, 0.2, 0.2, weights)
        loss.backward()
        gradients.append(x.grad)
        losses.append(loss)
    assert gradients[0][0, 1].item() == 0 and (gradients[0][0, [0, 2]] != 0).any()
    assert torch.equal(*gradients) and torch.equal(*losses) and torch.isfinite(losses[0])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30])
def test_garbage_at_padding_is_harmless(level, garbage):
    current, old, rollout, advantages = three_policies()
    results = []
    for fill in (0.0, garbage):
        c, o, b, a = (torch.where(MASK, x, fill) for x in (current, old, rollout, advantages))
        weights = truncated_importance_weights(o, b, MASK, 2.0, level, (0.5, 1.8))
        c.requires_grad_()
        policy_loss(c, o, a, MASK, 5, 0.2, 0.2, weights)[0].backward()
        results.append((weights, c.grad, in_band(o, b, MASK, (0.5, 1.8)), log_importance(o, b, MASK, level)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not results[1][0][~MASK].any() and not results[1][1][~MASK].any() and results[1][1].abs().sum() > 0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_huge_differences_are_cut_have_no_gradient_and_are_outside_every_band(level):
    old, rollout = torch.tensor([[500.0], [-500.0]], requires_grad=True), torch.zeros(2, 1)
    mask = torch.ones(2, 1, dtype=torch.bool)
    weights = truncated_importance_weights(old, rollout, mask, 2.0, level)
    assert weights.tolist() == [[2.0], [0.0]] and not weights.requires_grad
    assert not truncated_importance_weights(old, rollout, mask, 2.0, level, (1e-9, 1e9)).any()
