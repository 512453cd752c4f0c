from __future__ import annotations

from itertools import combinations

import pytest

from toolrl_ray.intervals import bootstrap_interval, pass_at_k, wilson_interval


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k", "expected"),
    [
        (4, 2, 1, 1 / 2),
        (4, 2, 2, 5 / 6),  # of the 6 pairs, one has neither of the two right samples
        (4, 2, 3, 1.0),  # of 3 samples one is right
        (5, 1, 2, 2 / 5),
        (4, 0, 4, 0.0),
        (4, 1, 4, 1.0),
        (200, 1, 100, 1 / 2),
    ],
)
def test_pass_at_k_by_hand(num_samples: int, num_correct: int, k: int, expected: float) -> None:
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_the_share_of_the_choices_of_k_samples_that_hold_a_right_one() -> None:
    for num_correct in range(7):
        for k in range(1, 7):
            choices = list(combinations([1] * num_correct + [0] * (6 - num_correct), k))
            assert pass_at_k(6, num_correct, k) == pytest.approx(sum(map(any, choices)) / len(choices))


@pytest.mark.parametrize(("num_samples", "num_correct", "k"), [(4, 2, 5), (4, 5, 1), (4, -1, 1), (4, 2, 0)])
def test_pass_at_k_of_more_than_there_is_is_refused(num_samples: int, num_correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} cannot be told from 4 samples"):
        pass_at_k(num_samples, num_correct, k)


@pytest.mark.parametrize(
    ("num_successes", "num_trials", "low", "high"),
    [
        (8, 10, 0.49016, 0.94332),  # (0.8 + 0.19207 -+ 1.95996 * sqrt(0.016 + 0.009604)) / 1.38415
        (0, 10, 0.0, 0.27753),  # 3.84146 / 13.84146
        (10, 10, 0.72247, 1.0),
    ],
)
def test_wilsons_interval_by_hand(num_successes: int, num_trials: int, low: float, high: float) -> None:
    assert wilson_interval(num_successes, num_trials) == pytest.approx((low, high), abs=1e-5)


def test_wilsons_interval_ends_exactly_at_0_and_1() -> None:
    assert (wilson_interval(0, 7)[0], wilson_interval(7, 7)[1]) == (0.0, 1.0)


def test_the_bootstrap_interval_is_as_wide_as_the_standard_error_says() -> None:
    low, high = bootstrap_interval([0.0] * 200 + [1.0] * 200)  # standard error 0.025
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.005)


def test_the_bootstrap_interval_depends_on_values_and_seed_alone() -> None:
    values = [i**0.5 for i in range(40)]
    assert bootstrap_interval(values, 1) == bootstrap_interval(values, 1) != bootstrap_interval(values, 2)


def test_values_that_are_all_equal_give_a_point() -> None:
    assert bootstrap_interval([0.75] * 20) == (0.75, 0.75)
