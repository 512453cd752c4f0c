"""What the runs of a study came to: read from their run folders or from W&B, and told as tables."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from statistics import fmean, median
from typing import Any

from toolrl_ray.intervals import bootstrap_interval
from toolrl_ray.sweep import PlannedRun, State, evaluations, state
from toolrl_ray.tracking.metrics import load_metrics

REWARD = "env/reward_mean"
THRESHOLD = 0.95  # of REWARD: a policy that has learned the task
COLUMNS = ("variant", "seed", "state", "accuracy_before", "accuracy_after", "tool_use_after", "steps_to_threshold", "time_s")


@dataclass(frozen=True)
class RunResult:
    """curves: of each metric, (step, value) in the order of steps. What is not known is None. time_s: training and evaluation. problem: why
    the run counts as failed whatever else is there. known: the names of all that it measured."""

    variant: str
    seed: int
    state: State
    curves: Mapping[str, Sequence[tuple[int, float]]]
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    tool_use_after: float | None = None
    time_s: float | None = None
    problem: str = ""
    known: frozenset[str] = frozenset()

    @property
    def steps_to_threshold(self) -> int | None:
        """The first step whose reward reaches THRESHOLD."""
        return next((step for step, value in self.curves.get(REWARD, ()) if value >= THRESHOLD), None)


def curve(rows: Sequence[Mapping[str, Any]], metric: str, step_key: str = "step") -> list[tuple[int, float]]:
    """The steps at which the metric is a finite number: a NaN, which W&B tells as text, is no value, and neither is any other text."""
    return [(row[step_key], float(row[metric])) for row in rows if is_number(row.get(metric))]


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def read_run(folder: Path, run: PlannedRun, metrics: Sequence[str]) -> RunResult:
    """A run with damaged metrics counts as failed, and costs the study's report itself alone."""
    path, names = folder / run.name / "metrics.jsonl", {REWARD, *metrics}
    try:
        rows = load_metrics(path) if path.exists() else []
        curves = {metric: curve(rows, metric) for metric in names}
        known = frozenset(name for row in rows for name, value in row.items() if is_number(value)) - {"step"}
        trained_s = sum(row.get("time/step_s") or 0.0 for row in rows)
    except (ValueError, TypeError, AttributeError, KeyError):
        return RunResult(run.variant, run.seed, State.FAILED, {metric: [] for metric in names}, problem=f"{path} is damaged")
    results = evaluations(folder / run.name)
    after = results.get("after", {})
    seconds = trained_s + sum(result.get("duration_s", 0.0) for result in results.values())
    return RunResult(
        run.variant,
        run.seed,
        state(folder, run),
        curves,
        results.get("before", {}).get("accuracy"),
        after.get("accuracy"),
        after.get("tool_use_rate"),
        seconds or None,
        known=known,
    )


def summarise(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """A row per variant, over the seeds that are done. Intervals: 95 % bootstrap of the mean over seeds, None for fewer than two."""
    rows = []
    for variant in dict.fromkeys(result.variant for result in results):
        own = [result for result in results if result.variant == variant]
        done = [result for result in own if result.state is State.DONE]
        accuracies = [result.accuracy_after for result in done if result.accuracy_after is not None]
        reached = [steps for result in done if (steps := result.steps_to_threshold) is not None]
        times = [result.time_s for result in done if result.time_s is not None]
        rows.append(
            {
                "variant": variant,
                "done": len(done),
                "seeds": len(own),
                "accuracy_mean": fmean(accuracies) if accuracies else None,
                "accuracy_interval": bootstrap_interval(accuracies) if len(accuracies) > 1 else None,
                "accuracy_min": min(accuracies, default=None),
                "reached": len(reached),
                "steps_median": median(reached) if reached else None,
                "time_mean_s": fmean(times) if times else None,
            }
        )
    return rows


def markdown(results: Sequence[RunResult]) -> str:
    """The study as two tables, of variants and of runs, and above them what is not done."""
    lines = []
    if not_done := [result for result in results if result.state is not State.DONE]:
        why = [f"{result.state}: {result.problem}" if result.problem else result.state for result in not_done]
        named = ", ".join(f"{result.variant} seed {result.seed} ({reason})" for result, reason in zip(not_done, why, strict=True))
        lines += [f"**{len(not_done)} of {len(results)} runs are not done and in no mean: {named}.**", ""]
    lines += [
        f"| variant | seeds done | held-out accuracy, mean | 95 % interval | min | steps to reward {THRESHOLD}, median | time, mean |",
        f"|{'---|' * 7}",
    ]
    for row in summarise(results):
        interval = row["accuracy_interval"]
        cells = (
            row["variant"],
            f"{row['done']} of {row['seeds']}",
            _number(row["accuracy_mean"]),
            f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "-",
            _number(row["accuracy_min"]),
            f"{_number(row['steps_median'], 'g')} ({row['reached']} of {row['done']})",
            _minutes(row["time_mean_s"]),
        )
        lines.append(_line(cells))
    lines += ["", "| variant | seed | state | accuracy before | after | tool use after | steps | time |", f"|{'---|' * 8}"]
    for result in results:
        numbers = [_number(value) for value in (result.accuracy_before, result.accuracy_after, result.tool_use_after)]
        last = (_number(result.steps_to_threshold, "d"), _minutes(result.time_s))
        lines.append(_line((result.variant, str(result.seed), result.state, *numbers, *last)))
    return "\n".join(lines) + "\n"


def table_csv(results: Sequence[RunResult]) -> str:
    """A row per run; what is not known is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([getattr(result, column) for column in COLUMNS] for result in results)
    return file.getvalue()


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _minutes(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds / 60:.1f} min"
