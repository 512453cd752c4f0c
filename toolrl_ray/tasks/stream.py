"""Seeded epochs over tasks without replacement."""

from __future__ import annotations

import random

from toolrl_ray.types import Task


class TaskStream:
    """Gives every task exactly once per epoch, in an order that depends on the seed and the epoch's number alone."""

    def __init__(self, tasks: list[Task], seed: int):
        if not tasks:
            raise ValueError("a TaskStream needs at least one task")
        self._tasks = tasks
        self._seed = seed
        self._epoch, self._position = 0, 0
        self._order = self._shuffled()

    def next_batch(self, size: int) -> list[Task]:
        batch = []
        while len(batch) < size:
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._shuffled()
            chosen = self._order[self._position : self._position + size - len(batch)]
            self._position += len(chosen)
            batch += [self._tasks[i] for i in chosen]
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(len(self._tasks)))
        random.Random(f"{self._seed}/{self._epoch}").shuffle(order)
        return order
