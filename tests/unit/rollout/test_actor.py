"""What the shell around an engine does besides passing calls on."""

from __future__ import annotations

import sys
from pathlib import Path

from toolrl_ray.recipe import load
from toolrl_ray.rollout.actor import RolloutActor


def actor(*overrides: str) -> RolloutActor:
    return RolloutActor(load("calculator", list(overrides)), "policy-dir", "object_store", "app")


def test_the_task_module_is_there_before_the_first_request_and_one_that_is_broken_is_left_to_start(tmp_path: Path) -> None:
    (tmp_path / "whole.py").write_text("def load_tasks(config): ...\ndef render_prompt(task, few_shot): ...\ndef reward(trajectory): ...\n")
    (tmp_path / "broken.py").write_text("x = y\n")
    actor(f"task.module={tmp_path}/whole.py")
    assert [name for name in sys.modules if name.startswith("toolrl_user_whole_")]
    actor(f"task.module={tmp_path}/broken.py")
