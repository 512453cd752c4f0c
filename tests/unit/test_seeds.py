"""`seed` changes the order of tasks, what is sampled and how minibatches are cut, `bootstrap.seed` the initial policy; and the same ones
repeat a run, whatever the tools' threads do in between."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from toolrl_ray import recipe, sweep
from toolrl_ray.bootstrap.build import ensure_tiny_policy
from toolrl_ray.driver import Run
from toolrl_ray.in_process import in_process_parts
from toolrl_ray.tools.local import LocalTools
from toolrl_ray.tracking.metrics import load_metrics
from toolrl_ray.tracking.trajectories import load_trajectories
from toolrl_ray.types import Trajectory
from tools_service.protocol import ToolCall, ToolResult

SMALL = ["task.num_train=64", "task.num_heldout=4", "eval.num_tasks=4", "train.tasks_per_step=12", "train.group_size=2"]
SMALL += ["train.num_steps=2", "learner.lr=1e-3", "episode.max_turn_tokens=24", "tracking.wandb=off"]
SMALL += ["bootstrap.num_steps=200", "bootstrap.hidden_size=32", "bootstrap.num_layers=2", "bootstrap.tool_share=0.49"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def unsteady_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers come in another order in every run."""
    run, rng = LocalTools._run, random.Random()

    async def late(tools: LocalTools, call: ToolCall) -> ToolResult:
        await asyncio.sleep(rng.choice([0.0, 0.01, 0.03]))
        return await run(tools, call)

    monkeypatch.setattr(LocalTools, "_run", late)


def train(run_dir: Path, *overrides: str) -> tuple[list[Trajectory], list[dict[str, Any]]]:
    """The trajectories and metrics of a whole run in this process."""
    config = recipe.load("calculator", [*SMALL, *overrides])
    policy_dir = str(ensure_tiny_policy(config, lambda line: None))
    parts = in_process_parts(config, policy_dir)
    try:
        Run(config, run_dir, policy_dir, lambda line: None).train(parts)
    finally:
        parts.close()
    return [trajectory for _, trajectory in load_trajectories(run_dir / "trajectories.jsonl")], load_metrics(run_dir / "metrics.jsonl")


def sampled(trajectories: list[Trajectory]) -> list[list[int]]:
    return [trajectory.token_ids for trajectory in trajectories]


def tasks(trajectories: list[Trajectory]) -> list[str]:
    return [trajectory.request.task.id for trajectory in trajectories]


def test_the_same_seed_repeats_a_run_and_another_changes_tasks_and_samples(tmp_path: Path) -> None:
    first, first_metrics = train(tmp_path / "first")
    again, again_metrics = train(tmp_path / "again")
    assert sum(len(trajectory.tool_calls) for trajectory in first) > 5
    assert tasks(first) == tasks(again)
    assert sampled(first) == sampled(again)
    for key in ("env/reward_mean", "objective/kl", "ppo/policy_loss", "ppo/value_loss"):
        assert [m[key] for m in again_metrics] == pytest.approx([m[key] for m in first_metrics], rel=1e-3, abs=1e-6)
    other, _ = train(tmp_path / "other", "seed=1")
    assert tasks(first) != tasks(other)
    assert set(map(tuple, sampled(first))) != set(map(tuple, sampled(other)))


def test_episodes_of_one_task_are_sampled_apart_and_every_step_anew(tmp_path: Path) -> None:
    trajectories, _ = train(tmp_path / "run", "task.num_train=1", "train.tasks_per_step=4")
    assert len({tuple(trajectory.token_ids) for trajectory in trajectories}) > len(trajectories) / 2


def test_seeds_of_a_study_begin_with_policies_of_their_own(tmp_path: Path) -> None:
    runs = sweep.plan(sweep.make_study("calculator", [*SMALL, "bootstrap.num_steps=1"], [0, 1]), tmp_path)
    zero, one = ((ensure_tiny_policy(run.config, lambda line: None) / "model.safetensors").read_bytes() for run in runs)
    assert zero != one
