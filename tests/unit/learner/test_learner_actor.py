"""What the shell around a learner does besides passing calls on."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from toolrl_ray.learner.actor import LearnerActor
from toolrl_ray.recipe import load

EACH = ["rollout.num_gpus=1", "learner.num_gpus=1"]
SHARED = ["rollout.num_gpus=0.5", "learner.num_gpus=0.5", "rollout.gpu_memory_utilization=0.4"]


@pytest.mark.parametrize(("overrides", "order"), [(SHARED, ["update", "empty_cache"]), (EACH, ["update"]), ([], ["update"])])
def test_memory_of_a_shared_gpu_is_given_back_after_each_update(overrides, order, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Learner:
        def update(self, trajectories: list) -> dict[str, float]:
            calls.append("update")
            return {"ppo/lr": 0.1}

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the actor sets it, for a process of its own
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    actor = LearnerActor(load("calculator", overrides), "")
    actor.learner = Learner()
    assert actor.update([]) == {"ppo/lr": 0.1}
    assert calls == order


def test_the_task_module_is_there_before_the_first_trajectory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "for_the_learner.py"
    path.write_text("def load_tasks(config): ...\ndef render_prompt(task, few_shot): ...\ndef reward(trajectory): ...\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("toolrl_ray.learner.update.Learner", lambda *args: SimpleNamespace(weights_to_send=lambda: None))
    LearnerActor(load("calculator", ["learner.num_threads=1", f"task.module={path}"]), "").start()
    assert [name for name in sys.modules if name.startswith("toolrl_user_for_the_learner_")]


def test_a_new_connection_closes_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Sender:
        def __init__(self, *args: object):
            self.number = sum(entry.startswith("open") for entry in log)
            log.append(f"open {self.number}")

        def close(self) -> None:
            log.append(f"close {self.number}")

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("toolrl_ray.weights.trainer.VLLMSender", Sender)
    actor = LearnerActor(load("calculator"), "")
    actor.weights = object()
    for _ in range(3):
        actor.connect_weights("nccl", [])
    assert log == ["open 0", "close 0", "open 1", "close 1", "open 2"]
