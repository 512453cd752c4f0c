"""`--in-process`: episodes stand still while nobody polls."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from toolrl_ray import recipe
from toolrl_ray.bootstrap.build import ensure_tiny_policy
from toolrl_ray.in_process import InProcessRollout
from toolrl_ray.tasks.module import task_module
from toolrl_ray.types import EpisodeRequest, StopReason


def test_the_time_of_an_update_counts_against_no_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLRL_CACHE", str(tmp_path))
    small = ["bootstrap.num_steps=1", "bootstrap.num_layers=1", "bootstrap.hidden_size=32", "task.num_train=8", "task.num_heldout=4"]
    config = recipe.load("calculator", [*small, "eval.num_tasks=4", "episode.turn_deadline_s=50", "episode.episode_deadline_s=60"])
    rollout = InProcessRollout(config, str(ensure_tiny_policy(config, lambda line: None)))
    try:
        tasks = task_module(config.task).load_tasks(config.task)[0]
        rollout.submit([EpisodeRequest(f"{task.id}:0", task.id, task) for task in tasks])
        trajectories = rollout.poll(0.0)
        late, now = 100.0, time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: now() + late)  # the update took so long
        while rollout.num_outstanding:
            trajectories += rollout.poll()
    finally:
        rollout.close()
    assert len(trajectories) == 8
    assert not {StopReason.TURN_DEADLINE, StopReason.EPISODE_DEADLINE} & {t.stop_reason for t in trajectories}
