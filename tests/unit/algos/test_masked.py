"""Masked statistics: hand-computed numbers, NaN at padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolrl_ray.algos.masked import masked_mean, masked_mean_var, masked_sum, masked_whiten

NAN = float("nan")
X = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_sum_and_mean_of_hand_computed_numbers():
    assert masked_sum(X, MASK).item() == 9.0
    assert masked_mean(X, MASK).item() == 3.0
    mean, var = masked_mean_var(X, MASK)
    assert mean.item() == 3.0 and var.item() == pytest.approx((4 + 1 + 9) / 3)


def test_sum_has_gradient_one_on_tokens_and_exactly_zero_at_nan_padding():
    x = X.clone().requires_grad_()
    masked_sum(x, MASK).backward()
    assert torch.equal(x.grad, MASK.float())


def test_whiten_of_hand_computed_numbers_is_zero_at_padding():
    std = (14 / 3) ** 0.5
    expected = torch.tensor([[-2 / std, -1 / std, 0.0], [3 / std, 0.0, 0.0]])
    torch.testing.assert_close(masked_whiten(X, MASK), expected)


def test_no_token_gives_zero_everywhere():
    none = torch.zeros_like(MASK)
    assert masked_sum(X, none).item() == 0.0 and masked_mean(X, none).item() == 0.0
    assert torch.equal(masked_whiten(X, none), torch.zeros(2, 3))
    empty = torch.zeros(0, 0)
    assert masked_mean(empty, empty.bool()).item() == 0.0


@pytest.mark.parametrize("value", [0.1, 1e6])
def test_one_token_or_equal_tokens_whiten_to_zero(value):
    x = torch.full((2, 3), value)
    one = torch.tensor([[True, False, False], [False, False, False]])
    assert masked_whiten(x, one).abs().max().item() == 0.0
    assert masked_whiten(x, torch.ones(2, 3, dtype=torch.bool)).abs().max().item() < 1e-5


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=30), st.floats(-50, 50), st.floats(0.5, 20))
def test_whitened_tokens_have_mean_zero_and_at_most_unit_variance_whatever_shift_and_scale(numbers, shift, scale):
    x = torch.tensor([numbers], dtype=torch.float64)
    mask = torch.ones_like(x, dtype=torch.bool)
    white = masked_whiten(x, mask)
    assert abs(white.mean().item()) < 1e-6 and white.var(unbiased=False).item() <= 1 + 1e-6
    if x.std() > 0.1:
        torch.testing.assert_close(masked_whiten(x * scale + shift, mask), white, rtol=1e-4, atol=1e-4)


def test_a_mask_of_another_shape_or_type_is_refused():
    with pytest.raises(AssertionError, match="shape"):
        masked_sum(X, MASK[:1])
    with pytest.raises(AssertionError, match="bool"):
        masked_sum(X, MASK.float())
