"""The task module of a run: a built-in one, a person's own, or several at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any, Protocol, cast

from toolrl_ray.config_task import TaskConfig, TaskSource
from toolrl_ray.errors import ConfigError, UserError
from toolrl_ray.types import Task, Trajectory
from tools_service.loading import LoadingError, failure, load_module


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


def load_tasks(config: TaskConfig) -> tuple[list[Task], list[Task]]:
    """(training tasks, held-out tasks) of the run's task module.

    Raises ConfigError when it gives something else, no task at all, or two of one id, or the module itself fails.
    """
    loaded = task_module(config).load_tasks(config)
    named = f"task.module={config.module!r}: load_tasks"
    if not (isinstance(loaded, (tuple, list)) and len(loaded) == 2 and all(isinstance(part, list) for part in loaded)):
        raise ConfigError(f"{named} must return two lists, training and held-out tasks, not {loaded!r:.100}")
    for tasks, kind in zip(loaded, ("training", "held-out"), strict=True):
        if not tasks:
            raise ConfigError(f"{named} returned no {kind} task; it must return at least one")
        if wrong := [task for task in tasks if not isinstance(task, Task)]:
            raise ConfigError(f"{named} returned {wrong[0]!r:.100} among the {kind} tasks; it must return Task objects")
        if len({task.id for task in tasks}) < len(tasks):
            raise ConfigError(f"{named} returned two {kind} tasks of one id; give each an id of its own")
    return loaded[0], loaded[1]


def task_module(config: TaskSource) -> TaskModule:
    """With the reward function that task.reward names. Raises ConfigError when task.module cannot be loaded or lacks a function."""
    if isinstance(config, TaskConfig) and config.parts:
        from toolrl_ray.tasks.mixed import Mixed

        return Mixed(config, task_module)
    try:
        module = load_module(config.module)
    except LoadingError as error:
        raise ConfigError(f"task.module={config.module!r}: {error}") from None
    functions = {"load_tasks": "load_tasks", "render_prompt": "render_prompt", "reward": config.reward}
    if missing := [name for name in functions.values() if not callable(getattr(module, name, None))]:
        raise ConfigError(f"task.module={config.module!r} lacks {', '.join(missing)}")
    found = {role: getattr(module, name) for role, name in functions.items()}
    if is_own(config):
        found = {role: _told(config.module, function) for role, function in found.items()}
        found["render_prompt"] = _rendering(config.module, found["render_prompt"])
    return cast(TaskModule, SimpleNamespace(**found))


def is_own(config: TaskSource) -> bool:
    """Whether it is a person's module, or one part of it is."""
    parts = config.parts.values() if isinstance(config, TaskConfig) and config.parts else [config]
    return any(not part.module.startswith("toolrl_ray.") for part in parts)


def _rendering(module: str, render: Callable[[Task, int], str]) -> Callable[[Task, int], str]:
    """Raises ConfigError for what is no prompt: an engine's word on it would name neither task nor file."""

    def call(task: Task, few_shot: int) -> str:
        prompt = render(task, few_shot)
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError(f"task.module={module!r}: render_prompt returned {prompt!r:.100} for task {task.id!r}; it must return a text")
        return prompt

    return call


def _told(module: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A person's own function, whose mistakes are told by file and line."""
    @wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            where = failure(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
            raise ConfigError(f"task.module={module!r}: {getattr(function, '__name__', 'its function')} failed: {where}") from error

    return call
