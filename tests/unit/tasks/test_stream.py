from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolrl_ray.tasks.stream import TaskStream
from toolrl_ray.types import Task


def some_tasks(count: int) -> list[Task]:
    return [Task(f"t/{i}", f"{i}+1", str(i + 1), "t") for i in range(count)]


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(0, 5), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_every_task_comes_exactly_once_per_epoch(count: int, seed: int, sizes: list[int]) -> None:
    stream = TaskStream(some_tasks(count), seed)
    batches = [stream.next_batch(size) for size in sizes]
    assert [len(batch) for batch in batches] == sizes
    drawn = [task.id for batch in batches for task in batch]
    for start in range(0, len(drawn), count):
        epoch = Counter(drawn[start : start + count])
        assert max(epoch.values()) == 1


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(0, 50), st.integers(1, 40))
def test_a_stream_goes_on_where_its_state_was_taken(count: int, consumed: int, size: int) -> None:
    stream, other = TaskStream(some_tasks(count), 3), TaskStream(some_tasks(count), 3)
    stream.next_batch(consumed)
    other.load_state_dict(stream.state_dict())
    assert other.next_batch(size) == stream.next_batch(size)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    stream = TaskStream(some_tasks(50), 0)
    first, second = stream.next_batch(50), stream.next_batch(50)
    assert first != second
    assert TaskStream(some_tasks(50), 0).next_batch(50) == first
    assert TaskStream(some_tasks(50), 1).next_batch(50) != first


def test_no_tasks_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        TaskStream([], 0)
