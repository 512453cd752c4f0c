"""From results to curves, and the figure: numbers by hand, and what the files show."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from toolrl_ray.sweep import State
from toolrl_ray.tracking import plots
from toolrl_ray.tracking.results import RunResult

REWARD, KL = "env/reward_mean", "objective/kl"
METRICS = [REWARD, KL]


def result(variant: str, seed: int, rewards: list[float], state: State = State.DONE) -> RunResult:
    steps = range(1, len(rewards) + 1)
    return RunResult(
        variant, seed, state, {REWARD: list(zip(steps, rewards, strict=True)), KL: [(step, 0.1 * step + seed) for step in steps]}
    )


def test_the_mean_is_over_the_seeds_that_are_done_and_a_missing_value_counts_for_nobody() -> None:
    results = [result("a", 0, [0.0, 0.5, 1.0]), result("a", 1, [0.5, 0.75]), result("a", 2, [9.0, 9.0, 9.0], State.FAILED)]
    drawn = plots.curves(results, REWARD)
    assert drawn is not None
    assert drawn.steps.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(drawn.values, [[0.0, 0.5, 1.0], [0.5, 0.75, np.nan]])
    assert drawn.mean.tolist() == [0.25, 0.625, 1.0]
    # Of two seeds the means of resamples are 0 (1/4), the middle (1/2) and 0.5 (1/4): the 95 % interval spans both seeds.
    assert drawn.low.tolist() == [0.0, 0.5, 1.0] and drawn.high.tolist() == [0.5, 0.75, 1.0]
    assert plots.curves(results[2:], REWARD) is None and plots.curves(results, "no/metric") is None


def test_the_interval_is_that_of_the_normal_distribution_for_many_seeds() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=(400, 2))
    low, high = plots.interval(values)
    half = 1.96 * values.std(axis=0) / np.sqrt(400)
    np.testing.assert_allclose(low, values.mean(axis=0) - half, atol=0.02)
    np.testing.assert_allclose(high, values.mean(axis=0) + half, atol=0.02)


def test_the_interval_is_the_same_at_every_call_and_a_point_where_all_seeds_agree() -> None:
    values = np.random.default_rng(0).random((5, 3))
    assert plots.interval(values)[0].tolist() == plots.interval(values)[0].tolist()
    assert plots.interval(values, seed=1)[0].tolist() != plots.interval(values)[0].tolist()
    low, high = plots.interval(np.full((4, 2), 0.5))
    assert low.tolist() == high.tolist() == [0.5, 0.5]


@pytest.fixture
def figure(tmp_path: Path) -> tuple[bytes, str]:
    results = [result(variant, seed, [0.1 * seed, 0.5, 0.9]) for variant in ("lr=1e-3", "lr=1e-4") for seed in range(3)]
    png, svg = plots.draw([*results, result("lr=1e-4", 3, [0.2, 0.3], State.FAILED)], METRICS, "my-study", tmp_path)
    return png.read_bytes(), svg.read_text()


def test_the_figure_has_a_panel_per_metric_with_named_axes_and_a_legend_of_variants(figure: tuple[bytes, str]) -> None:
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", figure[1])
    assert {"my-study", REWARD, KL, "mean reward of the step's episodes", "KL to the reference, nats per episode"} <= set(texts)
    assert texts.count("step") == 2
    legend = ["lr=1e-3: mean of 3 seeds, 95 % interval", "lr=1e-4: mean of 3 seeds, 95 % interval", "not done, in no mean"]
    assert [texts.count(label) for label in legend] == [1, 1, 1]


def test_the_figure_draws_every_seed_thin_every_mean_bold_and_what_failed_dashed(figure: tuple[bytes, str]) -> None:
    lines = re.findall(r"<path [^>]*clip-path[^>]*>", figure[1])

    def drawn(style: str) -> int:
        return sum(style in line for line in lines)

    assert drawn("stroke-width: 0.6") == 2 * 2 * 3  # panels, variants, seeds
    assert drawn("stroke-width: 2.2") == 2 * 2
    assert drawn("stroke-dasharray") == 2


def test_the_picture_is_a_png_wide_enough_for_its_panels(figure: tuple[bytes, str]) -> None:
    assert figure[0][:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", figure[0][16:24])
    assert (width, height) == (1920, 720)


@pytest.mark.parametrize("metrics", [[REWARD], METRICS])
@pytest.mark.parametrize("variants", [["learner.lr=1e-3", "learner.lr=1e-4"], [f"system={'words ' * 20}{number}" for number in range(9)]])
def test_no_text_is_cut_off_at_the_edges(metrics: list[str], variants: list[str], tmp_path: Path) -> None:
    results = [result(variant, seed, [0.1, 0.5]) for variant in variants for seed in range(2)]
    picture = imread(plots.draw(results, metrics, "a-long-name-of-a-study-" * 8, tmp_path)[0])[..., :3]
    for edge in (picture[:, :2], picture[:, -2:], picture[:2], picture[-2:]):
        assert (edge == 1.0).all()


def test_the_same_results_give_the_same_svg(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    first, second = (plots.draw([result("a", 0, [0.5])], METRICS, "t", folder)[1].read_text() for folder in (tmp_path, tmp_path / "again"))
    assert first == second


def test_a_metric_that_no_run_has_leaves_its_panel_empty_and_says_so(tmp_path: Path) -> None:
    _, svg = plots.draw([result("a", 0, [0.5, 0.6])], [REWARD, "no/metric"], "t", tmp_path)
    assert svg.read_text().count(">no values<") == 1


@pytest.mark.parametrize("name", [r"system=a $\frac{$ b", "system=$5 or $6", "system=one $"])
def test_a_dollar_in_a_name_is_a_dollar(name: str, tmp_path: Path) -> None:
    _, svg = plots.draw([result(name, 0, [0.5, 0.6])], [REWARD, f"{name}/metric"], name, tmp_path)
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", svg.read_text())
    assert {name, f"{name}/metric", f"{name}: mean of 1 seeds, 95 % interval"} <= set(texts)
