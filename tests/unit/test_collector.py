"""The main thread's waits: rollout goes on beside them, and one that leads nowhere ends by name."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from tests.unit.scripted_parts import ScriptedParts, trajectory
from toolrl_ray import collector as module
from toolrl_ray.collector import Collector, collect
from toolrl_ray.config import EvalConfig, StreamConfig
from toolrl_ray.errors import LearnerError, LearnerLost, RolloutError, StallError, WeightSyncError
from toolrl_ray.evaluation import eval_requests
from toolrl_ray.stream.buffer import Stream
from toolrl_ray.tasks.stream import TaskStream
from toolrl_ray.types import Task

TASKS = [Task(f"t/{i}", f"{i}+1", str(i + 1), "t") for i in range(7)]


class Concurrent(ScriptedParts):
    concurrent = True
    num_polls = 0

    def poll(self, max_wait_s: float):
        self.num_polls += 1
        return super().poll(max_wait_s)


class Slow(Concurrent):
    """Nothing finishes while it is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.is_open = threading.Event()

    def poll(self, max_wait_s: float):
        return super().poll(max_wait_s) if self.is_open.is_set() else []


class Stalled(Concurrent):
    def poll(self, max_wait_s: float):
        return []


def collector(rollout: ScriptedParts, k: int = 1, stall_timeout_s: float = 60, said: list[str] | None = None) -> tuple[Collector, Stream]:
    stream = Stream(StreamConfig(max_staleness_steps=k), TaskStream(TASKS, 0), groups_per_batch=2, group_size=1, num_batches=9)
    return Collector(rollout, stream, stall_timeout_s, (said if said is not None else []).append), stream


def test_episodes_go_on_beside_a_job_as_far_as_the_staleness_bound_allows() -> None:
    rollout = Concurrent()
    a_collector, stream = collector(rollout)
    batch, _ = a_collector.batch()
    assert [t.request.group_id for t in batch] == ["0", "1"]

    def job() -> str:
        polls = rollout.num_polls
        while rollout.num_polls < polls + 5:  # ends only because the collector goes on polling
            threading.Event().wait(0.01)
        return "done"

    assert a_collector.beside("the update", job) == "done"
    assert stream.counts()["buffered"] == 2  # the next batch, and nothing beyond it before new weights are loaded
    assert len(rollout.collections) == 1
    stream.loaded(1)
    assert [t.request.group_id for t in a_collector.batch()[0]] == ["2", "3"]


def test_the_next_update_may_run_while_the_engines_load_and_slots_are_released_once_they_have() -> None:
    rollout = Concurrent()
    a_collector, stream = collector(rollout)
    a_collector.batch()
    loaded, updated = threading.Event(), threading.Event()

    def load() -> dict[str, float]:
        assert updated.wait(30)
        loaded.wait(30)
        rollout.version = 1
        return {"weights/policy_version": 1}

    a_collector.load(1, load)
    batch, _ = a_collector.batch()  # which was admitted with the first one
    assert [t.request.group_id for t in batch] == ["2", "3"]
    a_collector.beside("the next update", updated.set)
    assert (stream.loaded_version, a_collector.load_numbers["weights/policy_version"], len(rollout.collections)) == (0, 0, 1)
    loaded.set()
    assert [t.request.group_id for t in a_collector.batch()[0]] == ["4", "5"]
    assert (stream.loaded_version, a_collector.load_numbers) == (1, {"weights/policy_version": 1})


def test_a_batch_that_is_complete_while_the_engines_load_is_handed_over_at_once() -> None:
    rollout = Slow()
    a_collector, stream = collector(rollout)
    rollout.is_open.set()
    a_collector.batch()
    rollout.is_open.clear()
    never = threading.Event()
    a_collector.load(1, lambda: never.wait(30) and {})
    threading.Timer(0.1, rollout.is_open.set).start()
    try:
        assert [t.request.group_id for t in a_collector.batch()[0]] == ["2", "3"]
        assert stream.loaded_version == 0
    finally:
        never.set()


def test_a_load_waits_for_the_one_before_it() -> None:
    a_collector, stream = collector(Concurrent())
    first, log = threading.Event(), []
    a_collector.load(1, lambda: first.wait(30) and log.append(1) or {})
    threading.Timer(0.1, first.set).start()
    a_collector.load(2, lambda: log.append(2) or {})
    a_collector.finish_loading()
    assert (log, stream.loaded_version) == ([1, 2], 2)


def test_what_a_load_raises_the_next_wait_raises() -> None:
    def load() -> dict[str, float]:
        raise WeightSyncError("RolloutActor 1 failed")

    never = threading.Event()
    a_collector, stream = collector(Concurrent())
    a_collector.load(1, load)
    with pytest.raises(WeightSyncError, match="RolloutActor 1 failed"):
        a_collector.beside("the next update", never.wait)
    never.set()
    assert stream.loaded_version == 0


def test_engines_that_never_come_to_their_weights_are_noticed() -> None:
    never = threading.Event()
    a_collector, _ = collector(Stalled(), stall_timeout_s=0.05)
    a_collector.load(1, never.wait)
    with pytest.raises(StallError, match="waiting for the next batch for 0 s; weights of version 1 are on their way"):
        a_collector.batch()
    with pytest.raises(StallError, match="waiting for the engines to load new weights"):
        a_collector.finish_loading()
    never.set()


def test_what_a_job_raises_is_raised() -> None:
    def job() -> None:
        raise LearnerError("rank 1 failed")

    with pytest.raises(LearnerError, match="rank 1 failed"):
        collector(Concurrent())[0].beside("the update", job)


def test_a_batch_comes_with_the_evaluation_that_rides_along_and_waits_for_it() -> None:
    rollout = ScriptedParts()
    a_collector, stream = collector(rollout, k=0)
    requests = eval_requests(EvalConfig(num_tasks=3), TASKS, "step-1", num_samples=0)
    a_collector.evaluate(requests)
    batch, evaluated = a_collector.batch()
    assert [t.request for t in evaluated] == requests
    assert [t.request.group_id for t in batch] == ["0", "1"]
    rollout.sync(1)
    stream.loaded(1)
    assert a_collector.batch()[1] == []


def test_a_run_in_which_nothing_moves_ends_and_says_who_waits_for_whom() -> None:
    a_collector, _ = collector(Stalled(), k=0, stall_timeout_s=0.05)
    with pytest.raises(StallError) as error:
        a_collector.batch()
    message = str(error.value)
    assert message.startswith("nothing has moved for 0 s (train.stall_timeout_s), waiting for the next batch for 0 s. ")
    assert "2 in_flight, 0 buffered" in message and "2 of those in flight are due at the next update" in message
    assert message.endswith("rollout: 2 under way")


def test_a_job_that_never_ends_is_noticed_too() -> None:
    never = threading.Event()
    with pytest.raises(StallError, match="waiting for the update"):
        collector(Stalled(), stall_timeout_s=0.05)[0].beside("the update", never.wait)
    never.set()


def test_groups_that_are_all_dropped_as_late_are_no_movement() -> None:
    """One episode of each group finishes in time, so that something is always going on."""

    class OneOfEach(Concurrent):
        def poll(self, max_wait_s: float):
            threading.Event().wait(0.005)
            return [t for t in super().poll(max_wait_s) if t.request.episode_id.endswith(":0")]

    stream = Stream(
        StreamConfig(group_deadline_s=0.01, group_quorum=2), TaskStream(TASKS, 0), groups_per_batch=2, group_size=3, num_batches=9
    )
    with pytest.raises(StallError, match="waiting for the next batch"):
        Collector(OneOfEach(), stream, 0.2, print).batch()
    assert stream.metrics()["stream/dropped/group_deadline"] > 2


@pytest.mark.parametrize("num_at_once", [16, 1])
def test_what_finished_while_the_main_thread_was_held_up_is_not_late(monkeypatch: pytest.MonkeyPatch, num_at_once: int) -> None:
    """All episodes finish at second 1, the main thread comes back at second 62, and then each poll brings so many of them."""
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class InParts(Concurrent):
        def poll(self, max_wait_s: float):
            if now[0] > 62:
                finished, waiting = self._running[:num_at_once], self._running[num_at_once:]
                self._running = finished
                finished = super().poll(max_wait_s)
                self._running = waiting
                return finished
            if now[0] == 1:  # the first one is taken in before
                self._running, first = self._running[1:], self._running[0]
                return [trajectory(first)]
            return []

    config = StreamConfig(max_staleness_steps=1, group_deadline_s=60, group_quorum=2)
    tasks = TaskStream(TASKS, 0)
    stream = Stream(config, tasks, groups_per_batch=4, group_size=2, num_batches=9, clock=lambda: now[0])
    a_collector = Collector(InParts(), stream, 1000, print)
    for at in (0, 1, *(62 + 0.1 * n for n in range(1, 20))):
        now[0] = at
        a_collector._pump(0)
    assert stream.counts()["buffered"] == 8 and stream.counts()["dropped"] == 0


def test_a_group_that_is_late_goes_all_the_same_a_while_after_the_main_thread_was_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class OneOfEach(Concurrent):
        def poll(self, max_wait_s: float):
            return [t for t in super().poll(max_wait_s) if t.request.episode_id.endswith(":0")]

    config = StreamConfig(group_deadline_s=60, group_quorum=1)
    stream = Stream(config, TaskStream(TASKS, 0), groups_per_batch=4, group_size=2, num_batches=9, clock=lambda: now[0])
    a_collector = Collector(OneOfEach(), stream, 1000, print)
    buffered = []
    for at in (0, 1, 100, 104, 106):
        now[0] = at
        a_collector._pump(0)
        buffered.append(stream.counts()["buffered"])
    assert buffered == [0, 0, 0, 0, 4]


def test_a_job_ends_before_a_lost_learner_is_told_of() -> None:
    """The run then goes back to a checkpoint, which the job must not write into."""

    class Lost(Concurrent):
        def poll(self, max_wait_s: float):
            raise LearnerLost("learner rank 0 died in connect")

    ended: list[bool] = []

    def job() -> None:
        threading.Event().wait(0.2)
        ended.append(True)

    with pytest.raises(LearnerLost):
        collector(Lost())[0].beside("the last checkpoint", job)
    assert ended


def test_a_job_that_a_lost_learner_waits_for_is_told_and_no_run_goes_back_while_it_may_write(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost(Concurrent):
        def poll(self, max_wait_s: float):
            raise LearnerLost("learner rank 0 died in connect")

    monkeypatch.setattr(module, "TELL_S", 0.02)
    never, said = threading.Event(), []
    with pytest.raises(StallError, match=r"^learner rank 0 died in connect; and the last checkpoint did not end within 0.1 s"):
        collector(Lost(), stall_timeout_s=0.1, said=said)[0].beside("the last checkpoint", never.wait)
    never.set()
    assert said == ["learner rank 0 died in connect; waiting for the last checkpoint to end before the learner starts again"]


def test_time_in_which_the_main_thread_was_held_up_is_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a replaced engine that gets its weights. What stands still otherwise adds up all the same."""
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    a_collector, _ = collector(Stalled(), stall_timeout_s=30)
    for at in (0, 4, 44, 48, 90, 91, 95, 99, 103, 107, 110):  # held up from 4 to 44 and from 48 to 90
        now[0] = at
        a_collector._pump(0)
    now[0] = 113
    with pytest.raises(StallError, match="nothing has moved for 31 s"):
        a_collector._pump(0)


def test_a_group_that_completes_is_movement_and_a_part_of_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class InTurn(Concurrent):
        """An episode every 2 seconds: whole groups at first, from second 20 on one of each group."""

        def poll(self, max_wait_s: float):
            fit = [request for request in self._running if now[0] < 20 or request.episode_id.endswith(":0")][:1]
            self._running = [request for request in self._running if request not in fit]
            return [trajectory(request) for request in fit]

    stream = Stream(StreamConfig(), TaskStream(TASKS, 0), groups_per_batch=12, group_size=3, num_batches=1)
    a_collector = Collector(InTurn(), stream, 10, print)
    with pytest.raises(StallError, match="nothing has moved for 12 s"):
        for at in range(0, 60, 2):
            now[0] = at
            a_collector._pump(0)
    assert (now[0], stream.num_completed) == (30, 3)


def test_time_with_episodes_under_way_is_not_counted_as_idle() -> None:
    a_collector, _ = collector(Stalled())
    a_collector._pump(0)
    before = a_collector.idle_s
    a_collector.beside("the update", lambda: threading.Event().wait(0.1))
    assert a_collector.idle_s == before


def test_a_long_wait_is_told_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TELL_S", 0.02)
    said: list[str] = []
    with pytest.raises(StallError):
        collector(Stalled(), stall_timeout_s=0.2, said=said)[0].batch()
    assert len(said) > 1 and all(line.startswith("waiting for the next batch for 0 s. stream: 0 batches") for line in said)


def test_a_collection_ends_at_its_deadline_with_what_is_missing() -> None:
    requests = eval_requests(EvalConfig(num_tasks=2), TASKS, "x", num_samples=0)
    with pytest.raises(RolloutError, match=r"0 of 2 episodes within 0.01 s \(rollout.collect_timeout_s\); rollout: 2 under way"):
        collect(Stalled(), requests, timeout_s=0.01)


def test_time_without_an_episode_under_way_is_counted_as_idle() -> None:
    rollout = Concurrent()
    a_collector, _ = collector(rollout, k=0)
    a_collector.batch()  # engines stand still now: no slot before new weights
    before = a_collector.idle_s
    a_collector.beside("the update", lambda: threading.Event().wait(0.2))
    assert a_collector.idle_s - before > 0.1
