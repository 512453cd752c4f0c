from __future__ import annotations

import pytest

from toolrl_ray.tracking.summary import render

FULL = {
    "before": {"accuracy": 0.412, "tool_use": 0.39},
    "after": {"accuracy": 0.968, "tool_use": 1.0},
    "num_tasks": 500,
    "episodes_per_s": 41.26,
    "tokens_per_s": 2871.4,
    "time_s": 312.4,
    "run_dir": "runs/calculator-1",
}


def test_the_summary_is_one_aligned_table() -> None:
    assert render(FULL) == (
        "                               before       after\n"
        "held-out accuracy (500 tasks)   0.412       0.968\n"
        "tool-use rate                   0.390       1.000\n"
        "episodes/s                                   41.3\n"
        "tokens/s                                    2,871\n"
        "time                                   5 min 12 s\n"
        "run folder                     runs/calculator-1"
    )


def test_what_is_missing_is_shown_as_a_dash() -> None:
    lines = render({"before": {"accuracy": 0.25}}).splitlines()
    assert lines[1].split() == ["held-out", "accuracy", "0.250", "-"]
    assert [line.split()[-1] for line in lines[2:]] == ["-"] * 5


TIMES = [(0, "0 s"), (59.6, "1 min 0 s"), (312.4, "5 min 12 s"), (3600, "1 h 0 s"), (7384, "2 h 3 min 4 s")]


@pytest.mark.parametrize(("seconds", "text"), TIMES)
def test_times_are_written_as_a_person_says_them(seconds: float, text: str) -> None:
    name, _, rest = render({"time_s": seconds}).splitlines()[5].partition(" ")
    assert (name, rest.strip()) == ("time", text)
