"""A strictly on-policy run that was killed and resumed is, step by step, the run that was not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from toolrl_ray import cli, in_process
from toolrl_ray.tracking.trajectories import load_trajectories

SETTINGS = [
    *("task.num_train=64", "task.num_heldout=8", "eval.num_tasks=8", "train.tasks_per_step=16"),
    *("bootstrap.num_layers=1", "bootstrap.num_steps=150"),  # so that it calls the tool now and then
    *("train.num_steps=5", "checkpoint.every_steps=2", "eval.every_steps=2", "tracking.wandb=off"),
]
OF_A_MACHINE = re.compile(r"time/.*|system/.*|weights/backend|.*_per_s|.*/latency_s_\w+|env/episode_s_mean")
WITH_EVALUATION = re.compile(r"rollout/eval_episodes|tools/(client|SimpleCalculatorTool)/.*")  # these count its episodes too


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("TOOLRL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def train(*arguments: str) -> int:
    return cli.main(["train", "--in-process", *arguments])


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_killed_and_resumed_gives_the_same_episodes_and_the_same_metrics_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train("calculator", f"run_dir={whole}", *SETTINGS) == 0

    def killed(weights: in_process.InProcessWeights, policy_version: int) -> dict[str, float]:
        if policy_version == 4:
            raise KeyboardInterrupt
        return sync(weights, policy_version)

    sync = in_process.InProcessWeights.sync
    with monkeypatch.context() as patch:
        patch.setattr(in_process.InProcessWeights, "sync", killed)
        assert train("calculator", f"run_dir={resumed}", *SETTINGS) == 130
    assert f"to go on from step 2: toolrl train --in-process --resume {resumed}" in capsys.readouterr().err
    assert [m["step"] for m in metrics(resumed)] == [1, 2, 3]
    assert train("--resume", str(resumed)) == 0

    sampled = [
        [(step, t.request.episode_id, t.token_ids) for step, t in load_trajectories(d / "trajectories.jsonl")] for d in (whole, resumed)
    ]
    assert sampled[0] == sampled[1]
    assert 0 < metrics(whole)[3]["tools/client/calls"] < metrics(whole)[3]["rollout/episodes"]
    for ours, theirs in zip(metrics(resumed), metrics(whole), strict=True):
        assert ours["step"] == theirs["step"]
        names = {name for name in ours.keys() | theirs.keys() if not OF_A_MACHINE.fullmatch(name)}
        if ours["step"] == 3:  # the evaluation of step 2, which went with it, was done and is not done again
            assert (ours["rollout/eval_episodes"], theirs["rollout/eval_episodes"]) == (0, 8)
            names = {name for name in names if not WITH_EVALUATION.fullmatch(name)}
        assert len(names) > 50
        for name in names:
            assert ours.get(name) == pytest.approx(theirs.get(name), rel=1e-5, abs=1e-7), (ours["step"], name)
    evals = [json.loads((run_dir / "eval.json").read_text()) for run_dir in (whole, resumed)]
    assert [list(found) for found in evals] == [["before", "step-2", "step-4", "after"]] * 2
    assert [[result["accuracy"] for result in found.values()] for found in evals] == [[e["accuracy"] for e in evals[0].values()]] * 2
    assert train("--resume", str(resumed)) == 2
    assert "finished" in capsys.readouterr().err
