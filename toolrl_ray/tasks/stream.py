"""Seeded epochs over tasks without replacement."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import astuple
from functools import cached_property

from toolrl_ray.types import Task


class TaskStream:
    """The prompts of a run, numbered 0, 1, 2, ...: every task exactly once per epoch, in an order that depends on the seed and the epoch
    alone. So a number is all that a run has to remember of a prompt."""

    def __init__(self, tasks: list[Task], seed: int):
        if not tasks:
            raise ValueError("a TaskStream needs at least one task")
        self._tasks = tasks
        self._seed = seed
        self._orders: dict[int, list[int]] = {}

    @cached_property
    def digest(self) -> str:
        """Of every task, in order: numbers mean the same prompts only where this is the same."""
        whole = hashlib.sha256()
        for task in self._tasks:
            whole.update(json.dumps(astuple(task)).encode())
        return whole.hexdigest()

    def task(self, number: int) -> Task:
        epoch, position = divmod(number, len(self._tasks))
        if epoch not in self._orders:
            order = list(range(len(self._tasks)))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            self._orders = {e: kept for e, kept in self._orders.items() if e == epoch - 1} | {epoch: order}
        return self._tasks[self._orders[epoch][position]]
