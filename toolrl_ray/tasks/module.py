"""The task module of a run: the built-in calculator, or a person's own."""

from __future__ import annotations

from typing import Protocol

from toolrl_ray.config import TaskConfig
from toolrl_ray.errors import ConfigError
from toolrl_ray.types import Task, Trajectory
from tools_service.loading import LoadingError, load_module


class TaskModule(Protocol):
    """Three pure functions."""

    def load_tasks(self, config: TaskConfig) -> tuple[list[Task], list[Task]]:
        """(training tasks, held-out tasks)."""
        ...

    def render_prompt(self, task: Task, few_shot: int) -> str:
        """The text that the policy continues."""
        ...

    def reward(self, trajectory: Trajectory) -> float:
        """Of a finished episode; 1.0 counts as solved."""
        ...


def task_module(config: TaskConfig) -> TaskModule:
    """Raises ConfigError when task.module cannot be loaded or lacks a function."""
    try:
        module = load_module(config.module)
    except LoadingError as error:
        raise ConfigError(f"task.module={config.module!r}: {error}") from None
    missing = [name for name in ("load_tasks", "render_prompt", "reward") if not callable(getattr(module, name, None))]
    if missing:
        raise ConfigError(f"task.module={config.module!r} lacks {', '.join(missing)}")
    return module
