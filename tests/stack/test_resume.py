"""A strictly on-policy run that was killed and resumed is, step by step, the run that was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from toolrl_ray import cli, in_process
from toolrl_ray.tracking.trajectories import load_trajectories

SETTINGS = [
    *("task.num_train=64", "task.num_heldout=8", "eval.num_tasks=8", "bootstrap.num_steps=20", "train.tasks_per_step=16"),
    *("train.num_steps=5", "checkpoint.every_steps=2", "tracking.wandb=off"),
]
COMPARED = (
    "env/reward_mean",
    "env/sampled_tokens_mean",
    "objective/kl",
    "objective/kl_coef",
    "ppo/policy_loss",
    "ppo/value_loss",
    "ppo/lr",
)


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
    for ours, theirs in zip(metrics(resumed), metrics(whole), strict=True):
        assert ours["step"] == theirs["step"]
        for name in COMPARED:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), (ours["step"], name)
    assert train("--resume", str(resumed)) == 2
    assert "finished" in capsys.readouterr().err
