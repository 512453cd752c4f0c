"""A study's numbers, computed by hand, from run folders and from W&B."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from toolrl_ray import cli, sweep
from toolrl_ray.errors import UserError
from toolrl_ray.sweep import State
from toolrl_ray.tracking import wandb_read
from toolrl_ray.tracking.results import RunResult, curve, markdown, read_run, summarise, table_csv

REWARD = "env/reward_mean"


def done(seed: int, accuracy: float, rewards: list[float], time_s: float) -> RunResult:
    return RunResult("a", seed, State.DONE, {REWARD: list(enumerate(rewards, start=1))}, 0.0, accuracy, 1.0, time_s)


RESULTS = [
    done(0, 0.9, [0.5, 0.96, 0.94], 60.0),
    done(1, 1.0, [0.5, 0.6, 0.7, 0.95], 120.0),
    done(2, 0.8, [0.5, 0.949], 60.0),
    RunResult("a", 3, State.FAILED, {REWARD: [(1, 1.0)]}, 0.1),
    RunResult("b", 0, State.MISSING, {}),
]


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    (run,) = sweep.plan(sweep.make_study("calculator", [], [4]), tmp_path)
    assert read_run(tmp_path, run, ["objective/kl"]) == RunResult("calculator", 4, State.MISSING, {REWARD: [], "objective/kl": []})
    (tmp_path / "seed-4").mkdir()
    rows = [
        {"step": 1, REWARD: 0.5, "objective/kl": None, "nonfinite": ["objective/kl"], "time/step_s": 2.0},
        {"step": 2, REWARD: 0.75, "objective/kl": 0.125, "time/step_s": 3.0},
    ]
    (tmp_path / "seed-4" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "env')
    evaluations = {
        "before": {"accuracy": 0.25, "tool_use_rate": 0.5, "duration_s": 4.0},
        "step-1": {"accuracy": 0.3},  # rode along with a step, whose time it is in
        "after": {"accuracy": 0.875, "tool_use_rate": 1.0, "duration_s": 1.0},
    }
    (tmp_path / "seed-4" / "eval.json").write_text(json.dumps(evaluations))
    curves = {REWARD: [(1, 0.5), (2, 0.75)], "objective/kl": [(2, 0.125)]}
    known = frozenset({*curves, "time/step_s"})
    expected = RunResult("calculator", 4, State.DONE, curves, 0.25, 0.875, 1.0, 10.0, known=known)
    assert read_run(tmp_path, run, ["objective/kl"]) == expected


def test_a_curve_has_numbers_alone() -> None:
    values = [0.5, 1, True, None, "NaN", float("nan"), "Infinity", float("inf"), "object_store"]
    rows = [{"_step": step, "m": value} for step, value in enumerate(values)] + [{"_step": len(values)}]
    assert curve(rows, "m", "_step") == [(0, 0.5), (1, 1.0), (2, 1.0)]


def test_a_metric_of_text_has_no_values_and_the_run_stays_good(tmp_path: Path) -> None:
    (run,) = sweep.plan(sweep.make_study("calculator", [], [0]), tmp_path)
    (tmp_path / run.name).mkdir()
    (tmp_path / run.name / "metrics.jsonl").write_text('{"step": 1, "env/reward_mean": 0.5, "weights/backend": "object_store"}\n')
    (tmp_path / run.name / "eval.json").write_text('{"after": {"accuracy": 0.5}}')
    result = read_run(tmp_path, run, ["weights/backend"])
    assert (result.state, result.problem, result.curves) == (State.DONE, "", {REWARD: [(1, 0.5)], "weights/backend": []})


@pytest.mark.parametrize(
    "damaged", [b'{"step": 1}\n\0\0\0\n{"step": 3}\n', b'{"step": 2, "env/rew\n', b"[1]\n", b'{"env/reward_mean": 0.5}\n', b"\xff\n"]
)
def test_a_run_whose_metrics_are_damaged_counts_as_failed_and_the_others_are_told(tmp_path: Path, damaged: bytes) -> None:
    runs = sweep.plan(sweep.make_study("calculator", [], [0, 1]), tmp_path)
    for run, metrics in zip(runs, (damaged, b'{"step": 1, "env/reward_mean": 0.5, "time/step_s": 60}\n'), strict=True):
        (tmp_path / run.name).mkdir()
        (tmp_path / run.name / "metrics.jsonl").write_bytes(metrics)
        (tmp_path / run.name / "eval.json").write_text(json.dumps({"after": {"accuracy": 0.5 + run.seed / 4, "tool_use_rate": 1.0}}))
    results = [read_run(tmp_path, run, [REWARD]) for run in runs]
    assert [(result.state, result.curves[REWARD]) for result in results] == [(State.FAILED, []), (State.DONE, [(1, 0.5)])]
    lines = markdown(results).splitlines()
    named = f"calculator seed 0 (failed: {tmp_path / 'seed-0' / 'metrics.jsonl'} is damaged)"
    assert lines[0] == f"**1 of 2 runs are not done and in no mean: {named}.**"
    assert lines[4].startswith("| calculator | 1 of 2 | 0.7500 |")


def test_a_variants_numbers_are_of_its_seeds_that_are_done() -> None:
    a, b = summarise(RESULTS)
    assert (a["done"], a["seeds"], a["reached"], a["steps_median"], a["time_mean_s"]) == (3, 4, 2, 3, 80.0)
    assert a["accuracy_mean"] == pytest.approx(0.9) and a["accuracy_min"] == 0.8
    # One resample in 27 is 0.8 thrice, more than 2.5 %, and so are three times 1.0.
    assert a["accuracy_interval"] == pytest.approx((0.8, 1.0))
    assert (b["done"], b["seeds"], b["accuracy_mean"], b["accuracy_interval"], b["steps_median"]) == (0, 1, None, None, None)


def test_one_seed_has_no_interval() -> None:
    assert summarise(RESULTS[:1])[0]["accuracy_interval"] is None


def test_the_tables_show_the_numbers_and_name_what_is_not_done() -> None:
    lines = markdown(RESULTS).splitlines()
    assert lines[0] == "**2 of 5 runs are not done and in no mean: a seed 3 (failed), b seed 0 (missing).**"
    assert lines[4:6] == [
        "| a | 3 of 4 | 0.9000 | 0.8000 to 1.0000 | 0.8000 | 3 (2 of 3) | 1.3 min |",
        "| b | 0 of 1 | - | - | - | - (0 of 0) | - |",
    ]
    assert lines[9] == "| a | 0 | done | 0.0000 | 0.9000 | 1.0000 | 2 | 1.0 min |"
    assert lines[12] == "| a | 3 | failed | 0.1000 | - | - | 1 | - |"
    assert table_csv(RESULTS).splitlines()[1:5] == [
        "a,0,done,0.0,0.9,1.0,2,60.0",
        "a,1,done,0.0,1.0,1.0,4,120.0",
        "a,2,done,0.0,0.8,1.0,,60.0",
        "a,3,failed,0.1,,,1,",
    ]


class Run:
    """One run as wandb.Api shows it."""

    def __init__(self, seed: int, kl_coef: float, state: str = "finished", accuracy: float | None = 0.9):
        self.state = state
        self.config = {"recipe": "calculator", "seed": seed, "run_dir": f"/x/{seed}", "isolation": {"Python": "landlock"}}
        self.config |= {"bootstrap": {"seed": seed, "lr": 0.005}, "algo": {"kl_coef": kl_coef}, "tracking": {"wandb_tags": [str(seed)]}}
        self.summary = {"eval/before/accuracy": 0.1, "eval/after/accuracy": accuracy, "eval/after/tool_use_rate": 1.0, "_runtime": 90}

    def scan_history(self, keys: list[str]) -> list[dict[str, Any]]:
        rows = [{"_step": 2, REWARD: 0.97, "objective/kl": 0.2}, {"_step": 1, REWARD: 0.5}, {"_step": 0, "eval/accuracy": 0.1}]
        return [{key: row[key] for key in keys} for row in rows if all(key in row for key in keys)]


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    runs: list[Any] = []

    def find(project: str, filters: dict[str, Any], order: str) -> list[Any]:
        assert (project, filters, order) == ("me/toolrl", {"tags": {"$in": ["study"]}}, "+created_at")
        return runs

    monkeypatch.setattr(wandb_read, "wandb_api", lambda: SimpleNamespace(runs=find))
    return runs


def test_runs_of_wandb_are_found_by_tag_and_told_apart_by_what_differs_beside_the_seed(wandb_runs: list[Any]) -> None:
    wandb_runs += [Run(seed, kl_coef) for kl_coef in (0.1, 0.05) for seed in (1, 0)]
    results = wandb_read.runs_by_tag("me/toolrl", "study", ["objective/kl"])
    assert [(result.variant, result.seed) for result in results] == [
        ("kl_coef=0.05", 0),
        ("kl_coef=0.05", 1),
        ("kl_coef=0.1", 0),
        ("kl_coef=0.1", 1),
    ]
    assert results[0].curves == {REWARD: [(1, 0.5), (2, 0.97)], "objective/kl": [(2, 0.2)]}
    assert results[0].known == {"eval/before/accuracy", "eval/after/accuracy", "eval/after/tool_use_rate"}
    assert (results[0].state, results[0].accuracy_before, results[0].accuracy_after, results[0].time_s) == (State.DONE, 0.1, 0.9, 90)
    assert results[0].steps_to_threshold == 2


def test_of_two_runs_of_one_seed_the_one_that_is_done_counts(wandb_runs: list[Any]) -> None:
    wandb_runs += [Run(0, 0.1, "crashed", None), Run(0, 0.1, accuracy=0.8), Run(0, 0.1, "running", None), Run(1, 0.1, "failed", None)]
    results = wandb_read.runs_by_tag("me/toolrl", "study", [REWARD])
    assert [(result.variant, result.seed, result.state) for result in results] == [
        ("calculator", 0, State.DONE),
        ("calculator", 1, State.FAILED),
    ]


def test_what_wandb_lacks_or_refuses_is_one_line(wandb_runs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="has no run tagged 'study'"):
        wandb_read.runs_by_tag("me/toolrl", "study", [REWARD])

    def refuse() -> Any:
        raise ValueError("no API key\nconfigured")

    monkeypatch.setattr(wandb_read, "wandb_api", refuse)
    with pytest.raises(UserError, match=r"cannot be read \(no API key configured\); give ENTITY/PROJECT, and log in"):
        wandb_read.runs_by_tag("me/toolrl", "study", [REWARD])


def test_the_command_draws_runs_of_wandb(
    wandb_runs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    wandb_runs += [Run(0, 0.1), Run(1, 0.1)]
    assert cli.main(["sweep", "--from-wandb", "me/toolrl", "--tag", "study"]) == 0
    assert {path.name for path in Path("sweeps/study").iterdir()} == {"plot.png", "plot.svg", "table.md", "table.csv"}
    assert "| calculator | 2 of 2 |" in capsys.readouterr().out
