from __future__ import annotations

import random
from itertools import combinations

import pytest

from toolrl_ray import intervals
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


def test_values_that_are_all_equal_give_a_point_unless_it_is_said_how_far_they_could_differ() -> None:
    assert bootstrap_interval([0.75] * 20) == (0.75, 0.75)
    # One more task that fails among 21 of 22 is drawn up to 3 times; Wilson's limits of 20 of 20 are 0.839 and 1.
    assert bootstrap_interval([1.0] * 20, bounds=(0.0, 1.0)) == (pytest.approx(1 - 3 / 22), 1.0)
    assert bootstrap_interval([0.0] * 20, bounds=(0.0, 1.0)) == (0.0, pytest.approx(3 / 22))
    low, high = bootstrap_interval([0.0] * 500, bounds=(-1.0, 1.0))  # no task is solved with tools alone, and none without alone
    assert -0.007 < low < -0.004 and 0.004 < high < 0.007


def test_far_from_the_bounds_the_interval_is_the_bootstraps_own() -> None:
    values = [0.25, 0.5, 0.75] * 150
    assert bootstrap_interval(values, bounds=(0.0, 1.0)) == pytest.approx(bootstrap_interval(values), abs=0.003)


@pytest.mark.parametrize(
    ("num_tasks", "shares", "mean"),
    [
        (500, {1.0: 0.998, 0.0: 0.002}, 0.998),
        (500, {1.0: 0.993, 0.0: 0.007}, 0.993),
        (100, {1.0: 0.98, 0.75: 0.02}, 0.995),  # pass@1 of 4 samples
        (20, {0.0: 0.95, 1.0: 0.05}, 0.05),
        (500, {0.0: 0.993, 1.0: 0.007}, 0.007),
    ],
)
def test_ninety_five_of_a_hundred_intervals_hold_the_mean_also_near_a_bound(
    num_tasks: int, shares: dict[float, float], mean: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", 200)
    rng = random.Random(0)
    for bounds in ((0.0, 1.0), (-1.0, 1.0)):
        drawn = [bootstrap_interval(rng.choices(list(shares), list(shares.values()), k=num_tasks), bounds=bounds) for _ in range(150)]
        assert sum(low <= mean <= high for low, high in drawn) / len(drawn) > 0.92
