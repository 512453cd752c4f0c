"""Rewards, GAE and its relatives: hand-computed numbers, plain float64 references, reductions."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolrl_ray.algos.advantages import broadcast_rows, gae, grpo, reinforce_pp, returns_to_go, rloo, token_rewards

NAN = float("nan")
MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])


def rows(lists, fill=NAN):
    """Lists of unequal length as [B, A] float64 and the mask, right-padded with `fill`."""
    width = max(map(len, lists), default=0)
    x = torch.tensor([row + [fill] * (width - len(row)) for row in lists], dtype=torch.float64).reshape(len(lists), width)
    return x, torch.arange(width) < torch.tensor([len(row) for row in lists], dtype=torch.long)[:, None]


def gae_reference(rewards, values, gamma, gae_lambda):
    """The double sum as it is written, for one row of python floats."""
    n = len(rewards)
    values = values + [0.0]
    delta = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(n)]
    return [sum((gamma * gae_lambda) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]


row_lists = st.lists(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), max_size=6), min_size=1, max_size=4)
unit = st.floats(0, 1)


def test_token_rewards_of_hand_computed_numbers():
    scores = torch.tensor([1.0, 2.0, 3.0])
    kl = torch.tensor([[0.5, -0.25, 1.0], [2.0, NAN, NAN], [NAN, NAN, NAN]])
    expected = torch.tensor([[-0.05, 0.025, 0.9], [1.8, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(token_rewards(scores, kl, MASK, kl_coef=0.1), expected)


@given(row_lists, st.floats(0, 2))
def test_token_rewards_add_up_to_score_minus_kl_penalty(lists, kl_coef):
    kl, mask = rows([[a for a, _ in row] for row in lists])
    scores = torch.arange(len(lists), dtype=torch.float64) + 1
    total = token_rewards(scores, kl, mask, kl_coef).sum(1)
    expected = [scores[i].item() - kl_coef * sum(a for a, _ in row) if row else 0.0 for i, row in enumerate(lists)]
    torch.testing.assert_close(total, torch.tensor(expected, dtype=torch.float64))


def test_gae_of_hand_computed_numbers():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [2.0, NAN, NAN], [NAN, NAN, NAN]])
    values = torch.tensor([[0.5, 0.25, 0.75], [1.5, NAN, NAN], [NAN, NAN, NAN]])
    # deltas of row 0 with gamma 0.9: 0.9*0.25-0.5, 0.9*0.75-0.25, 1-0.75 = -0.275, 0.425, 0.25; gamma*lambda = 0.45
    expected = torch.tensor([[-0.275 + 0.45 * 0.425 + 0.2025 * 0.25, 0.425 + 0.45 * 0.25, 0.25], [0.5, 0, 0], [0, 0, 0]])
    advantages, returns = gae(rewards, values, MASK, gamma=0.9, gae_lambda=0.5)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + torch.where(MASK, values, 0.0))


@given(row_lists, unit, unit)
def test_gae_equals_the_plain_double_sum_and_is_zero_at_padding(lists, gamma, gae_lambda):
    rewards, mask = rows([[r for r, _ in row] for row in lists])
    values, _ = rows([[v for _, v in row] for row in lists])
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    expected, _ = rows([gae_reference([r for r, _ in row], [v for _, v in row], gamma, gae_lambda) for row in lists], fill=0.0)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns[mask], (advantages + values)[mask])
    assert torch.all(returns[~mask] == 0)


@given(row_lists, unit)
def test_gae_with_lambda_one_is_monte_carlo_minus_value_and_with_lambda_zero_is_td(lists, gamma):
    rewards, mask = rows([[r for r, _ in row] for row in lists])
    values, _ = rows([[v for _, v in row] for row in lists])
    monte_carlo, returns = gae(rewards, values, mask, gamma, 1.0)
    torch.testing.assert_close(returns, returns_to_go(rewards, mask, gamma))
    torch.testing.assert_close(monte_carlo[mask], (returns_to_go(rewards, mask, gamma) - values)[mask])
    td, _ = gae(rewards, values, mask, gamma, 0.0)
    expected, _ = rows([gae_reference([r for r, _ in row], [v for _, v in row], gamma, 0.0) for row in lists], fill=0.0)
    torch.testing.assert_close(td, expected)


def test_returns_to_go_of_hand_computed_numbers():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [3.0, NAN, NAN], [NAN, NAN, NAN]])
    torch.testing.assert_close(returns_to_go(rewards, MASK, 0.5), torch.tensor([[3.0, 4.0, 4.0], [3.0, 0, 0], [0, 0, 0]]))


def test_targets_carry_no_gradient():
    values = torch.zeros(3, 3, requires_grad=True)
    advantages, returns = gae(torch.ones(3, 3), values, MASK, 1.0, 0.95)
    assert not advantages.requires_grad and not returns.requires_grad


def test_rows_without_columns_are_handled():
    empty = torch.zeros(2, 0)
    advantages, returns = gae(empty, empty, empty.bool(), 1.0, 0.95)
    assert advantages.shape == returns.shape == returns_to_go(empty, empty.bool(), 1.0).shape == (2, 0)
    assert token_rewards(torch.ones(2), empty, empty.bool(), 0.1).shape == (2, 0)


def test_a_mask_with_a_hole_is_refused():
    with pytest.raises(AssertionError, match="right-padded"):
        returns_to_go(torch.ones(1, 3), torch.tensor([[True, False, True]]), 1.0)


ROWS = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    "call",
    [
        lambda: token_rewards(torch.ones(1), torch.zeros(2, 3), ROWS, 0.1),
        lambda: token_rewards(torch.ones(2), torch.zeros(1, 3), ROWS, 0.1),
        lambda: gae(torch.zeros(2, 3), torch.zeros(2, 1), ROWS, 1.0, 1.0),
        lambda: gae(torch.zeros(1, 3), torch.zeros(2, 3), ROWS, 1.0, 1.0),
        lambda: returns_to_go(torch.zeros(3), ROWS[0], 1.0),
        lambda: returns_to_go(torch.zeros(2, 1), ROWS, 1.0),
        lambda: reinforce_pp(torch.zeros(1, 3), ROWS, 1.0),
        lambda: grpo(torch.ones(2), torch.zeros(1, dtype=torch.long)),
        lambda: rloo(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.long)),
        lambda: broadcast_rows(torch.ones(1), ROWS),
    ],
)
def test_a_shape_that_would_broadcast_is_refused(call):
    with pytest.raises(AssertionError, match="shape|expected"):
        call()


def test_grpo_of_hand_computed_numbers():
    scores = torch.tensor([1.0, 7.0, 0.0, 3.0, 2.0])
    groups = torch.tensor([4, 9, 4, 9, 4])  # 1, 0, 2: mean 1, std 1; 7, 3: mean 5, std sqrt 8
    root = 8**0.5
    torch.testing.assert_close(grpo(scores, groups), torch.tensor([0.0, 2 / root, -1.0, -2 / root, 1.0]))


def test_rloo_of_hand_computed_numbers():
    scores = torch.tensor([1.0, 7.0, 0.0, 3.0, 2.0])
    groups = torch.tensor([4, 9, 4, 9, 4])
    torch.testing.assert_close(rloo(scores, groups), torch.tensor([0.0, 4.0, -1.5, -4.0, 1.5]))


@pytest.mark.parametrize("estimator", [grpo, rloo])
def test_equal_scores_and_groups_of_one_have_no_advantage(estimator):
    for size in range(1, 40):  # float32 sums of 0.1 round differently for every size
        scores = torch.tensor([0.1] * size + [0.7])
        assert estimator(scores, torch.tensor([0] * size + [1])).abs().max().item() < 1e-6


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-3, 3)), min_size=1, max_size=12))
def test_grpo_and_rloo_equal_plain_references(pairs):
    groups = torch.tensor([g for g, _ in pairs])
    scores = torch.tensor([s for _, s in pairs], dtype=torch.float64)
    for i, (g, s) in enumerate(pairs):
        members = [other for group, other in pairs if group == g]
        others = [other for j, (group, other) in enumerate(pairs) if group == g and j != i]
        std = statistics.stdev(members) if others else 0.0
        assert grpo(scores, groups)[i].item() == pytest.approx((s - statistics.fmean(members)) / (std + 1e-6), abs=1e-6)
        assert rloo(scores, groups)[i].item() == pytest.approx(s - statistics.fmean(others) if others else 0.0, abs=1e-9)


@settings(max_examples=25)
@given(st.permutations(range(6)))
def test_group_advantages_do_not_depend_on_the_order_of_rows(order):
    scores, groups = torch.tensor([0.0, 1.0, 1.0, 0.5, 2.0, 0.0]), torch.tensor([0, 1, 0, 1, 0, 2])
    for estimator in (grpo, rloo):
        torch.testing.assert_close(estimator(scores[order], groups[order]), estimator(scores, groups)[order])


def test_reinforce_pp_is_the_return_to_go_whitened_over_the_batch():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [3.0, NAN, NAN], [NAN, NAN, NAN]])  # returns 1, 1, 1, 3: mean 1.5, var 0.75
    std = 0.75**0.5
    expected = torch.tensor([[-0.5 / std] * 3, [1.5 / std, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(reinforce_pp(rewards, MASK, gamma=1.0), expected)


def test_broadcast_rows_puts_the_rows_number_on_its_tokens_only():
    got = broadcast_rows(torch.tensor([1.5, -2.0, NAN]), MASK)
    assert torch.equal(got, torch.tensor([[1.5, 1.5, 1.5], [-2.0, 0, 0], [0, 0, 0]]))
