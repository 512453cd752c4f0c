from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolrl_ray.errors import ConfigError
from toolrl_ray.tasks.stream import TaskStream, digest
from toolrl_ray.types import Task


def some_tasks(count: int) -> list[Task]:
    return [Task(f"t/{i}", f"{i}+1", str(i + 1), "t") for i in range(count)]


@given(st.integers(1, 30), st.integers(0, 5), st.integers(0, 3))
def test_every_task_comes_exactly_once_per_epoch(count: int, seed: int, epoch: int) -> None:
    stream = TaskStream(some_tasks(count), seed)
    drawn = [stream.task(number).id for number in range(epoch * count, (epoch + 1) * count)]
    assert sorted(drawn) == sorted(task.id for task in some_tasks(count))


@given(st.integers(1, 30), st.lists(st.integers(0, 100), min_size=1))
def test_a_number_is_the_same_task_in_whatever_order_it_is_asked_for(count: int, numbers: list[int]) -> None:
    stream, other = TaskStream(some_tasks(count), 3), TaskStream(some_tasks(count), 3)
    assert [stream.task(n) for n in numbers] == [other.task(n) for n in reversed(numbers)][::-1]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def epoch(seed: int, number: int) -> list[Task]:
        stream = TaskStream(some_tasks(50), seed)
        return [stream.task(n) for n in range(50 * number, 50 * number + 50)]

    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) == epoch(0, 0) != epoch(1, 0)


def test_no_tasks_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        TaskStream([], 0)


@dataclass(frozen=True)
class OwnTask(Task):
    value: Any = None
    more: dict[str, Any] = field(default_factory=dict)


def own(value: Any) -> OwnTask:
    return OwnTask("own/1", "1+1", "2", "own", ("two",), value, {"n": 1, "x": [0.5, None, "é"]})


def test_the_digest_of_tasks_of_plain_values_is_that_of_the_checkpoints_that_there_are() -> None:
    assert TaskStream(some_tasks(3), 5).digest == "3eb7349aced9cd0a42d50b767b7836a0ab2eece9f684eb1ced4bf2d0cb40f523"
    assert digest([own((1, 2.5, True))]) == "23ae7159e726db460f2014b197959f0e6e5a81a99906aa46332be5be8e79cf08"


VALUES = {
    "decimal": Decimal("0.01"),
    "date": date(2026, 1, 2),
    "uuid": UUID(int=3),
    "bytes": b"ab",
    "set": {"b", "a", "c", 1, Decimal(1)},
    "deeper": {"k": [frozenset("abcdef")]},
}


def test_what_is_no_json_has_a_digest_too_the_same_in_every_process() -> None:
    code = "from tests.unit.tasks.test_stream import *; print(*(digest([own(value)]) for value in VALUES.values()))"
    here = [digest([own(value)]) for value in VALUES.values()]
    for seed in ("1", "2"):  # of the order of sets
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60)
        assert there.stdout.split() == here
    assert len({digest([own(None)]), *here}) == 1 + len(VALUES)


@pytest.mark.parametrize("value", [object(), {(1, 2): 3}, threading.Lock()], ids=["an object", "keys that are no text", "a lock"])
def test_a_value_that_cannot_be_written_is_one_line_that_names_the_task(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^task 'own/1' has a value that cannot be written as JSON \(.+\); text, numbers") as caught:
        TaskStream([own(value)], 0)
    assert "\n" not in str(caught.value)
