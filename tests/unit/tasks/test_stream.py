from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolrl_ray.tasks.stream import TaskStream
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
