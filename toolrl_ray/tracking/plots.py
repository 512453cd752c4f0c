"""The curves of a study: every seed thin, their mean bold, a 95 % bootstrap interval shaded; a panel per metric, a colour per variant.

Letters: S seeds, T steps.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolrl_ray.intervals import CONFIDENCE, NUM_RESAMPLES
from toolrl_ray.sweep import State
from toolrl_ray.tracking.results import RunResult

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "toolrl",
    "text.parse_math": False,  # names may have a $
    "axes.spines.top": False,
    "axes.spines.right": False,
}
PANEL_INCHES = (6.4, 4.0)
ONE_ROW_INCHES = 0.3  # of the legend
TITLE_CHARACTERS, LEGEND_CHARACTERS = 50, 64  # that a panel has room for in a line
LABELS = {"env/reward_mean": "mean reward of the step's episodes", "objective/kl": "KL to the reference, nats per episode"}


@dataclass(frozen=True)
class Curves:
    """values [S, T]: of the seeds that are done, NaN where a seed has no value at a step. mean, low, high [T]."""

    steps: np.ndarray
    values: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def curves(results: Sequence[RunResult], metric: str) -> Curves | None:
    """Of one variant's runs; None where no run that is done has the metric."""
    lines = [dict(result.curves.get(metric, ())) for result in results if result.state is State.DONE]
    lines = [line for line in lines if line]
    if not lines:
        return None
    steps = sorted(set().union(*lines))
    values = np.array([[line.get(step, np.nan) for step in steps] for line in lines], dtype=np.float64)
    low, high = interval(values)
    return Curves(np.array(steps), values, np.nanmean(values, axis=0), low, high)


def interval(values: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile bootstrap of the mean over seeds, at every step: values [S, T] -> low [T], high [T].

    One resample draws whole seeds, the same ones for all steps; NaN values are left out of its mean.
    """
    num_seeds = len(values)
    drawn = np.random.default_rng(seed).integers(num_seeds, size=(NUM_RESAMPLES, num_seeds))
    times = np.stack([np.bincount(row, minlength=num_seeds) for row in drawn]).astype(np.float64)  # [resamples, S]
    known = ~np.isnan(values)
    weights = times @ known
    with np.errstate(invalid="ignore"):
        means = times @ np.where(known, values, 0.0) / np.where(weights > 0, weights, np.nan)
    low, high = np.nanquantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high


def draw(results: Sequence[RunResult], metrics: Sequence[str], title: str, folder: Path) -> list[Path]:
    """Writes FOLDER/plot.png and FOLDER/plot.svg, whose text is text. Runs that are not done are dashed and in no mean."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    paths = [folder / "plot.png", folder / "plot.svg"]
    with rc_context(STYLE):
        width, height = PANEL_INCHES
        figure = Figure(figsize=(width * len(metrics), height + 0.8), layout="constrained")
        figure.suptitle(textwrap.fill(title, TITLE_CHARACTERS * len(metrics)))
        axes = figure.subplots(1, len(metrics), squeeze=False)[0]
        for panel, metric in zip(axes, metrics, strict=True):
            _panel(panel, results, metric)
        _legend(figure, *axes[0].get_legend_handles_labels(), len(metrics))
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _legend(figure: Any, handles: list[Any], labels: list[str], num_panels: int) -> None:
    """In as many columns as the figure has room for; the figure grows by the rows below the first."""
    labels = [textwrap.fill(label, LEGEND_CHARACTERS * num_panels) for label in labels]
    for columns in range(min(4, max(1, len(labels))), 0, -1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
        extent = legend.get_window_extent()
        if extent.width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + max(0.0, extent.height / figure.dpi - ONE_ROW_INCHES))


def _panel(panel: Any, results: Sequence[RunResult], metric: str) -> None:
    variants = list(dict.fromkeys(result.variant for result in results))
    for number, variant in enumerate(variants):
        colour = f"C{number % 10}"
        own = [result for result in results if result.variant == variant]
        if (drawn := curves(own, metric)) is not None:
            for line in drawn.values:
                panel.plot(drawn.steps, line, color=colour, linewidth=0.6, alpha=0.45)
            if len(drawn.values) > 1:
                panel.fill_between(drawn.steps, drawn.low, drawn.high, color=colour, alpha=0.25, linewidth=0)
        num_done = sum(result.state is State.DONE for result in own)
        steps, mean = (drawn.steps, drawn.mean) if drawn else ([], [])
        panel.plot(steps, mean, color=colour, linewidth=2.2, zorder=3, label=f"{variant}: mean of {num_done} seeds, 95 % interval")
        for result in own:
            if result.state is not State.DONE and (points := result.curves.get(metric)):
                label = _once(panel, "not done, in no mean")
                panel.plot(*zip(*points, strict=True), color=colour, linewidth=0.8, linestyle="--", label=label)
    panel.set_title(metric)
    panel.set_xlabel("step")
    panel.set_ylabel(LABELS.get(metric, metric))
    panel.grid(alpha=0.25)
    panel.margins(x=0.01)
    panel.xaxis.get_major_locator().set_params(integer=True)
    if not panel.has_data() or not any(len(line.get_xdata()) for line in panel.lines):
        panel.text(0.5, 0.5, "no values", ha="center", va="center", transform=panel.transAxes)


def _once(panel: Any, label: str) -> str:
    return "_" if label in panel.get_legend_handles_labels()[1] else label
