"""Seeded epochs over tasks without replacement."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import astuple
from typing import Any

import msgspec

from toolrl_ray.errors import ConfigError
from toolrl_ray.types import Task


def digest(tasks: Iterable[Task]) -> str:
    """Of every task, in order. Raises ConfigError for one of a class of its own with a value that cannot be written as text."""
    whole = hashlib.sha256()
    for task in tasks:
        try:
            whole.update(json.dumps(astuple(task), default=_plain).encode())
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"task {task.id!r:.100} has a value that cannot be written as JSON ({' '.join(str(error).split())[:160]}); "
                "text, numbers, dates, bytes, lists, sets, and dicts with text as keys can"
            ) from None
    return whole.hexdigest()


def _plain(value: Any) -> Any:
    """For what JSON lacks. The order of a set is another one in every process."""
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(item, default=_plain) for item in value)
    return msgspec.to_builtins(value, order="deterministic")


class TaskStream:
    """The prompts of a run, numbered 0, 1, 2, ...: every task exactly once per epoch, in an order that depends on the seed and the epoch
    alone. So a number is all that a run has to remember of a prompt."""

    def __init__(self, tasks: list[Task], seed: int):
        if not tasks:
            raise ValueError("a TaskStream needs at least one task")
        self._tasks = tasks
        self._seed = seed
        self._orders: dict[int, list[int]] = {}
        self.digest = digest(tasks)  # numbers mean the same prompts only where this is the same

    def task(self, number: int) -> Task:
        epoch, position = divmod(number, len(self._tasks))
        if epoch not in self._orders:
            order = list(range(len(self._tasks)))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            self._orders = {e: kept for e, kept in self._orders.items() if e == epoch - 1} | {epoch: order}
        return self._tasks[self._orders[epoch][position]]
