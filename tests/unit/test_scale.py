"""A simulated run of scripts/bench/scale.py, small: what must hold at any size. Its timings are not looked at."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from scripts.bench import scale

SMALL = "--trajectories 200 --actors 4 --in-flight 20 --tasks-per-step 20 --turn-tokens 16 --speed-up 100".split()


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return scale.measure(scale.parse([*SMALL, "--staleness", "1", "--group-size", "2"]), lambda line: None)


def test_every_episode_is_trained_on_once(found: dict[str, Any]) -> None:
    assert found["steps"] == 5 and found["trajectories"] == found["trained_once"] == 200
    assert found["dropped_prompts"] == found["late_episodes"] == 0


def test_episodes_run_ahead_of_the_updates_and_none_is_staler_than_the_bound(found: dict[str, Any]) -> None:
    assert found["staleness_max"] == found["staleness_bound"] == 1
    assert 0 < found["staleness_mean"] < 1
    assert 20 <= found["in_flight_peak"] <= 80  # as many as were asked for, and no more than the stream admits


def test_nothing_is_left_running(found: dict[str, Any]) -> None:
    assert found["left_running"] == 0
    assert not [thread for thread in threading.enumerate() if "run_forever" in thread.name]


def test_some_calls_of_tools_end_and_others_reach_their_deadline(found: dict[str, Any]) -> None:
    assert found["tool_calls"] > 100
    assert 0 < found["tool_timeouts"] < found["tool_calls"] / 4


def test_a_goal_that_is_missed_is_named_with_both_numbers(found: dict[str, Any]) -> None:
    reached = found | {"control_ms": 0.5, "memory_growth_percent": 0.0}
    options = scale.parse(SMALL)
    assert scale.missed(options, reached) == []
    assert scale.missed(options, reached | {"control_ms": 1.5}) == ["missed: control_ms is 1.5, the goal is at most 1"]
    assert json.loads(json.dumps(found)) == found and "trained exactly once" in scale.show(found)


def test_more_in_flight_than_the_stream_admits_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        scale.parse(["--in-flight", "100", "--tasks-per-step", "20"])
    assert error.value.code == 2
    assert "--in-flight 100 is more than the stream admits" in capsys.readouterr().err
