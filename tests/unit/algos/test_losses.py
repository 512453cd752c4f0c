"""Policy and value loss: hand-computed numbers, float64 references with gradients, reductions, padding, microbatches."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolrl_ray.algos.losses import explained_variance, mean_abs_difference, policy_loss, value_loss

NAN = float("nan")
MASK = torch.tensor([[True, True, True, False], [True, True, False, False], [False] * 4])


def randn(*shape, seed, scale=1.0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def policy_inputs(shape=(3, 4), spread=0.4):
    """logprobs, old_logprobs, advantages, weights: float64, ratios on both sides of the clip."""
    old = -randn(*shape, seed=1).abs()
    return old + randn(*shape, seed=2, scale=spread), old, randn(*shape, seed=3), randn(*shape, seed=4).abs()


def policy_reference(logprobs, old, advantages, weights, mask, num_tokens, low, high):
    """(loss, d loss / d logprobs) by the formula, in python floats: the gradient is -w r A / num_tokens where not clipped, else 0."""
    loss, grad = 0.0, torch.zeros_like(logprobs)
    for i in mask.nonzero().tolist():
        i = tuple(i)
        ratio = math.exp(logprobs[i].item() - old[i].item())
        a, w = advantages[i].item(), weights[i].item()
        unclipped, clipped = ratio * a, min(max(ratio, 1 - low), 1 + high) * a
        loss -= w * min(unclipped, clipped) / num_tokens
        grad[i] = -w * ratio * a / num_tokens if unclipped <= clipped else 0.0
    return loss, grad


def test_policy_loss_of_hand_computed_numbers():
    ratios = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.1]])
    advantages = torch.tensor([[2.0, 2.0, -2.0, -2.0, 1.0]])
    # objectives 1.2*2, 0.5*2, 1.5*-2, 0.8*-2, 1.1; the clip binds on the first and the fourth
    mask = torch.ones(1, 5, dtype=torch.bool)
    loss, stats = policy_loss(ratios.log(), torch.zeros(1, 5), advantages, mask, 10, 0.2, 0.2)
    assert loss.item() == pytest.approx(-(2.4 + 1.0 - 3.0 - 1.6 + 1.1) / 10)
    assert stats["pg_clipfrac"].item() == 2
    assert stats["ratio"].item() == pytest.approx(5.1)
    assert stats["approx_kl"].item() == pytest.approx(sum(r - 1 - math.log(r) for r in ratios[0].tolist()), rel=1e-5)


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.3), (0.9, 50.0)])
def test_policy_loss_and_gradient_equal_the_plain_reference(low, high):
    logprobs, old, advantages, weights = policy_inputs()
    logprobs.requires_grad_()
    loss, _ = policy_loss(logprobs, old, advantages, MASK, 7, low, high, weights)
    loss.backward()
    expected, grad = policy_reference(logprobs, old, advantages, weights, MASK, 7, low, high)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(logprobs.grad, grad)


def test_policy_gradient_equals_finite_differences():
    logprobs, old, advantages, weights = policy_inputs()
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old, advantages, MASK, 5, 0.2, 0.3, weights)[0], logprobs.requires_grad_(), atol=1e-6
    )


def test_with_clipping_off_and_ratio_one_the_gradient_is_reinforce():
    logprobs, _, advantages, _ = policy_inputs()
    logprobs.requires_grad_()
    loss, stats = policy_loss(logprobs, logprobs.detach().clone(), advantages, MASK, 5, 1e9, 1e9)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.where(MASK, -advantages / 5, 0.0))
    assert stats["pg_clipfrac"].item() == 0 and stats["approx_kl"].item() == 0 and stats["ratio"].item() == 5


def test_gradient_goes_to_logprobs_and_values_alone():
    inputs = [x.requires_grad_() for x in policy_inputs()]
    policy_loss(*inputs[:3], MASK, 5, 0.2, 0.2, inputs[3])[0].backward()
    assert [x.grad is not None for x in inputs] == [True, False, False, False]
    values = [randn(3, 4, seed=s).requires_grad_() for s in range(3)]
    value_loss(*values, MASK, 5, 0.2)[0].backward()
    assert [x.grad is not None for x in values] == [True, False, False]


@pytest.mark.parametrize("garbage", [NAN, float("inf"), 1e30])
def test_garbage_at_padding_changes_nothing_and_gets_gradient_exactly_zero(garbage):
    def run(fill):
        tensors = [torch.where(MASK, x, fill) for x in policy_inputs()]
        logprobs = tensors[0].requires_grad_()
        loss, stats = policy_loss(logprobs, *tensors[1:3], MASK, 5, 0.2, 0.2, tensors[3])
        values = torch.where(MASK, randn(3, 4, seed=5), fill).requires_grad_()
        old_values, returns = (torch.where(MASK, randn(3, 4, seed=s), fill) for s in (6, 7))
        v_loss, v_stats = value_loss(values, old_values, returns, MASK, 5, 0.2)
        (loss + v_loss).backward()
        variance = explained_variance(values, returns, MASK)
        difference = mean_abs_difference(values.detach(), returns, MASK)
        return [loss.detach(), v_loss.detach(), variance, difference, *stats.values(), *v_stats.values()], logprobs.grad, values.grad

    clean, dirty = run(0.0), run(garbage)
    assert all(torch.equal(a, b) for a, b in zip(clean[0], dirty[0], strict=True))
    for a, b in zip(clean[1:], dirty[1:], strict=True):
        assert torch.equal(a, b) and torch.all(b[~MASK] == 0) and torch.isfinite(b).all() and b[MASK].abs().sum() > 0


def test_a_call_without_tokens_has_loss_zero_and_still_backpropagates():
    x = torch.zeros(2, 3, requires_grad=True)
    none = torch.zeros(2, 3, dtype=torch.bool)
    for num_tokens in (4, 0):
        loss = policy_loss(x, x.detach(), x.detach(), none, num_tokens, 0.2, 0.2)[0] + value_loss(x, x, x, none, num_tokens, 0.2)[0]
        loss.backward()
        assert loss.item() == 0 and torch.equal(x.grad, torch.zeros(2, 3))
    empty = torch.zeros(0, requires_grad=True)
    loss, stats = policy_loss(empty, empty, empty, empty.bool(), 4, 0.2, 0.2)
    loss.backward()
    assert loss.item() == 0 and stats["ratio"].item() == 0


@given(st.lists(st.integers(0, 2), min_size=3, max_size=3), st.booleans())
def test_sum_over_microbatches_and_ranks_is_the_whole_batch(assignment, compressed):
    """Rows dealt to three microbatches (some may be empty), each given the global count: losses, gradients, sums add up."""
    logprobs, old, advantages, weights = policy_inputs()
    values, old_values, returns = (randn(3, 4, seed=s) for s in (5, 6, 7))
    count = MASK.sum()

    def run(rows):
        picked = [x[rows] for x in (logprobs, old, advantages, weights, values, old_values, returns, MASK)]
        mask = picked.pop()
        if compressed:  # only the tokens, with a mask of all True
            picked, mask = [x[mask] for x in picked], torch.ones(int(mask.sum()), dtype=torch.bool)
        lp, v = picked[0].clone().requires_grad_(), picked[4].clone().requires_grad_()
        loss, stats = policy_loss(lp, *picked[1:3], mask, count, 0.2, 0.2, picked[3])
        v_loss, v_stats = value_loss(v, *picked[5:], mask, count, 0.2)
        (loss + v_loss).backward()
        full = torch.zeros(2, 3, 4, dtype=torch.float64)
        for k, grad in enumerate((lp.grad, v.grad)):
            full[k, rows] = torch.zeros(len(rows), 4, dtype=torch.float64).masked_scatter(MASK[rows], grad) if compressed else grad
        return torch.stack([loss.detach(), v_loss.detach(), *stats.values(), *v_stats.values()]), full

    parts = [run([row for row in range(3) if assignment[row] == k]) for k in range(3)]
    whole = run([0, 1, 2])
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
    torch.testing.assert_close(sum(p[1] for p in parts), whole[1])


def test_huge_logprob_differences_stay_finite():
    logprobs = torch.tensor([[200.0, -200.0]], requires_grad=True)
    for sign in (1.0, -1.0):
        loss, stats = policy_loss(logprobs, torch.zeros(1, 2), torch.full((1, 2), sign), torch.ones(1, 2, dtype=torch.bool), 2, 0.2, 0.2)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(logprobs.grad).all() and all(torch.isfinite(x) for x in stats.values())


def test_value_loss_of_hand_computed_numbers():
    values, old, returns = torch.tensor([[1.0, 0.1, 3.0]]), torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])
    # unclipped 1, 0.81, 9; clipped to 0.5, 0.1, 0.5: 2.25, 0.81, 0.25; larger: 2.25 (clipped), 0.81, 9
    loss, stats = value_loss(values, old, returns, torch.ones(1, 3, dtype=torch.bool), 4, 0.5)
    assert loss.item() == pytest.approx(0.5 * (2.25 + 0.81 + 9) / 4)
    assert stats["vf_clipfrac"].item() == 1


def test_value_gradient_is_v_minus_r_where_the_clip_does_not_bind_and_zero_where_it_does():
    values, old, returns = (randn(3, 4, seed=s) for s in (5, 6, 7))
    values.requires_grad_()
    value_loss(values, old, returns, MASK, 6, 0.3)[0].backward()
    v = values.detach()
    clipped = torch.minimum(torch.maximum(v, old - 0.3), old + 0.3)
    binds = (clipped - returns).abs() > (v - returns).abs()
    assert (binds & MASK).any() and (~binds & MASK).any()
    torch.testing.assert_close(values.grad, torch.where(MASK & ~binds, (v - returns) / 6, 0.0))
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, returns, MASK, 6, 0.3)[0], v.clone().requires_grad_())


def test_value_loss_with_clipping_off_is_half_the_mean_squared_error():
    values, old, returns = (randn(3, 4, seed=s) for s in (5, 6, 7))
    loss, _ = value_loss(values, old, returns, MASK, MASK.sum(), 1e9)
    assert loss.item() == pytest.approx(0.5 * ((values - returns)[MASK] ** 2).mean().item())


def test_explained_variance_of_hand_computed_numbers():
    mask = torch.ones(1, 4, dtype=torch.bool)
    returns = torch.tensor([[1.0, 2.0, 3.0, 4.0]])  # variance 1.25
    assert explained_variance(returns + 7, returns, mask).item() == 1.0
    assert explained_variance(torch.zeros(1, 4), returns, mask).item() == 0.0
    residual = torch.tensor([[1.0, -1.0, 1.0, -1.0]])  # variance 1
    assert explained_variance(returns - residual, returns, mask).item() == pytest.approx(1 - 1 / 1.25)
    assert explained_variance(residual, torch.full((1, 4), 0.1), mask).item() == 0.0
    assert explained_variance(returns, returns, torch.zeros_like(mask)).item() == 0.0


def test_mean_abs_difference_of_hand_computed_numbers():
    x, y = torch.tensor([1.0, -2.0, 5.0]), torch.tensor([2.0, 1.0, 0.0])
    assert mean_abs_difference(x, y, torch.tensor([True, True, False])).item() == 2.0


def test_importing_losses_loads_torch_and_nothing_heavier():
    code = (
        "import sys, toolrl_ray.algos.losses, toolrl_ray.algos.advantages, toolrl_ray.algos.kl_control, toolrl_ray.algos.packing\n"
        "print('torch' in sys.modules, sorted({'transformers', 'ray', 'vllm', 'deepspeed', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split("\n")[0] == "True []"
