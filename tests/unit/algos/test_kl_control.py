"""KL controllers: direction, bound, state."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolrl_ray.algos.kl_control import AdaptiveKLController, FixedKLController


def test_fixed_controller_never_moves():
    controller = FixedKLController(0.05)
    controller.update(1e9, 64)
    assert controller.value == 0.05


def test_adaptive_controller_of_hand_computed_numbers():
    controller = AdaptiveKLController(0.1, target=6.0, horizon=1000)
    controller.update(6.6, 100)  # error 0.1, K 0.1
    assert controller.value == pytest.approx(0.1 * 1.01)
    controller.update(60.0, 100)  # error 9, clipped to 0.2
    assert controller.value == pytest.approx(0.1 * 1.01 * 1.02)
    controller.update(-1.0, 50)  # a k1 estimate may be negative: clipped to -0.2, K 0.05
    assert controller.value == pytest.approx(0.1 * 1.01 * 1.02 * 0.99)


@given(st.floats(-1e6, 1e6), st.floats(0.01, 100), st.integers(0, 10**6), st.floats(1, 1e5))
def test_adaptive_controller_moves_towards_the_target_by_at_most_a_fifth(kl, target, num_episodes, horizon):
    controller = AdaptiveKLController(0.1, target, horizon)
    controller.update(kl, num_episodes)
    assert 0.08 - 1e-12 <= controller.value <= 0.12 + 1e-12
    assert controller.value >= 0.1 if kl >= target else controller.value <= 0.1


def test_infinite_kl_is_clipped_and_nan_is_refused():
    controller = AdaptiveKLController(0.1, 6.0, 100)
    controller.update(float("inf"), 10)
    assert controller.value == pytest.approx(0.102)
    with pytest.raises(ValueError, match="current_kl is nan"):
        controller.update(float("nan"), 10)
    assert controller.value == pytest.approx(0.102)


@pytest.mark.parametrize("make", [lambda: FixedKLController(0.3), lambda: AdaptiveKLController(0.3, 6.0, 100)])
def test_a_restored_controller_goes_on_where_the_saved_one_stood(make):
    saved, restored = make(), make()
    saved.update(1.0, 50)
    restored.load_state_dict(saved.state_dict())
    for controller in (saved, restored):
        controller.update(20.0, 50)
    assert restored.value == saved.value
