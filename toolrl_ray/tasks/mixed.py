"""Several tasks in one run, by weight: what `task.parts` makes of task modules. A task's `source` is the name of its part, by which metrics
and evaluations are told apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from toolrl_ray.config_task import TaskConfig, TaskPart
from toolrl_ray.errors import ConfigError
from toolrl_ray.types import Task, Trajectory

if TYPE_CHECKING:
    from toolrl_ray.tasks.module import TaskModule


class PartTask(Task):
    """A task under the name of its part. own: as the part's module made it and sees it again; no field, so that it is in no record."""

    own: Task

    def __init__(self, part: str, own: Task):
        super().__init__(f"{part}/{own.id}", own.prompt, own.answer, part, own.aliases)
        object.__setattr__(self, "own", own)


class Mixed:
    """The task module of a run with parts."""

    def __init__(self, config: TaskConfig, load: Callable[[TaskPart], TaskModule]):
        self._parts = {name: (part, load(part)) for name, part in config.parts.items()}

    def load_tasks(self, config: TaskConfig) -> tuple[list[Task], list[Task]]:
        """Every part's tasks; together num_train and num_heldout. The held-out ones come in turn, since an evaluation may take but the
        first of them. Raises ConfigError when a part has fewer than its share."""
        train_counts, heldout_counts = shares(config.num_train, config.parts), shares(config.num_heldout, config.parts)
        train: list[Task] = []
        heldout: list[list[Task]] = []
        for name, (part, module) in self._parts.items():
            counts = {"num_train": train_counts[name], "num_heldout": heldout_counts[name]}
            loaded = module.load_tasks(TaskConfig(**part.model_dump(exclude={"weight", *counts}) | counts))
            for tasks, key in zip(loaded, counts, strict=True):
                if len(tasks) < counts[key]:
                    raise ConfigError(
                        f"task.parts.{name} has {len(tasks)} tasks, and its share of task.{key}={getattr(config, key)} is {counts[key]}; "
                        f"lower task.{key} or task.parts.{name}.weight={part.weight:g}"
                    )
            own = [[PartTask(name, task) for task in tasks] for tasks in loaded]
            train += own[0][: counts["num_train"]]
            heldout.append(own[1][: counts["num_heldout"]])
        return train, interleaved(heldout)

    def render_prompt(self, task: Task, few_shot: int) -> str:
        """few_shot is the part's own."""
        part, module = self._parts[task.source]
        return module.render_prompt(_own(task), part.few_shot)

    def reward(self, trajectory: Trajectory) -> float:
        request = trajectory.request
        own = replace(trajectory, request=replace(request, task=_own(request.task)))
        return self._parts[request.task.source][1].reward(own)


def _own(task: Task) -> Task:
    return task.own if isinstance(task, PartTask) else task  # one that was read from a record has lost it


def interleaved(lists: list[list[Task]]) -> list[Task]:
    """All of them, each list in its order: every prefix holds each list in about its share."""
    placed = [((i + 0.5) / len(tasks), task) for tasks in lists for i, task in enumerate(tasks)]
    return [task for _, task in sorted(placed, key=lambda one: one[0])]


def shares(total: int, parts: dict[str, TaskPart]) -> dict[str, int]:
    """`total` divided by weight: whole numbers whose sum it is, each at least 1 and less than 1 from its exact share where that is
    above 1 (largest remainders first). Raises ConfigError when there are more parts than tasks."""
    if total < len(parts):
        named = ", ".join(parts)
        raise ConfigError(f"{total} tasks cannot be shared by {len(parts)} parts ({named}); raise task.num_train and task.num_heldout")
    weight = sum(part.weight for part in parts.values())
    exact = {name: total * part.weight / weight for name, part in parts.items()}
    counts = {name: max(1, int(share)) for name, share in exact.items()}
    by_need = sorted(parts, key=lambda name: exact[name] - counts[name], reverse=True)
    while (missing := total - sum(counts.values())) > 0:
        for name in by_need[:missing]:
            counts[name] += 1
    while sum(counts.values()) > total:  # small parts were rounded up to 1
        counts[max(counts, key=lambda name: counts[name] - exact[name] if counts[name] > 1 else -1.0)] -= 1
    return counts
