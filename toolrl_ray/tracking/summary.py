"""What a run ends with on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def render(summary: Mapping[str, Any]) -> str:
    """The final table as plain text, aligned, without a trailing newline.

    summary: `before` and `after`, each a mapping with `accuracy` and `tool_use` (shares, 0 to 1), and optionally
    `num_tasks` (held-out tasks evaluated), `episodes_per_s`, `tokens_per_s`, `time_s`, `run_dir`. What is missing or None
    appears as "-", so that a run that ended early still has its summary.
    """
    before, after = summary.get("before") or {}, summary.get("after") or {}
    count = summary.get("num_tasks")
    accuracy = f"held-out accuracy ({count} tasks)" if count is not None else "held-out accuracy"
    rows = [
        ("", "before", "after"),
        (accuracy, _share(before.get("accuracy")), _share(after.get("accuracy"))),
        ("tool-use rate", _share(before.get("tool_use")), _share(after.get("tool_use"))),
        ("episodes/s", "", _number(summary.get("episodes_per_s"))),
        ("tokens/s", "", _number(summary.get("tokens_per_s"))),
        ("time", "", _duration(summary.get("time_s"))),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{name:<{widths[0]}}  {left:>{widths[1]}}  {right:>{widths[2]}}".rstrip() for name, left, right in rows]
    run_dir = summary.get("run_dir")
    return "\n".join([*lines, f"{'run folder':<{widths[0]}}  {run_dir if run_dir is not None else '-'}"])


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{value} {unit}" for value, unit in parts if value or unit == "s")


def step_line(step: int, num_steps: int, numbers: Mapping[str, Any]) -> str:
    """One finished step; "-" where a number is missing. idle: the shares of the step in which rollout and learner stood still."""

    def number(key: str, form: str) -> str:
        value = numbers.get(key)
        return "-" if value is None else format(value, form)

    width = len(str(num_steps))
    return (
        f"step {step:{width}}/{num_steps}  reward {number('env/reward_mean', '.3f')}  tool use {number('env/tool_use_rate', '.3f')}  "
        f"kl {number('objective/kl', '.3f')}  mismatch kl {number('mismatch/kl', '.1e')}  "
        f"{number('rollout/tokens_per_s', ',.0f')} tok/s, {number('rollout/in_flight_episodes', 'd')} in flight, "
        f"staleness {number('stream/staleness_mean', '.1f')}  idle: rollout {number('time/rollout_idle_share', '.0%')}, "
        f"learner {number('time/learner_idle_share', '.0%')}  {number('time/step_s', '.1f')} s"
    )
