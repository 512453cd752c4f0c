"""The stream's promises, tried on any order of events: each test bears the name of one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolrl_ray.config import StreamConfig
from toolrl_ray.errors import StreamError, UserError
from toolrl_ray.stream.buffer import DropReason, Stream, staleness_steps
from toolrl_ray.tasks.stream import TaskStream
from toolrl_ray.types import EpisodeRequest, StopReason, Task, Trajectory

TASKS = [Task(f"t/{i}", f"{i}+1", str(i + 1), "t") for i in range(7)]


def stream(k: int = 0, batch: int = 2, size: int = 1, num_batches: int = 6, clock=lambda: 0.0, **config) -> Stream:
    asked = StreamConfig(max_staleness_steps=k, **config)
    return Stream(asked, TaskStream(TASKS, 0), groups_per_batch=batch, group_size=size, num_batches=num_batches, clock=clock)


def finished(request: EpisodeRequest, version: int, reward: float = 1.0, last_version: int | None = None) -> Trajectory:
    versions = [-1, version, version if last_version is None else last_version]
    columns: tuple = ([1, 2, 3], [False, True, True], [0.0, -1.0, -1.0], versions)
    return Trajectory(request, *columns, [], [], StopReason.SUBMITTED, 1, 0.1, reward=reward)


def groups(batch: list[Trajectory]) -> list[int]:
    return [int(t.request.group_id) for t in batch]


class Simulation:
    """A run whose events come in an order that hypothesis draws. Engines sample with the version that is loaded when an episode starts, or
    with a later one."""

    def __init__(self, data: st.DataObject, the_stream: Stream, k: int, batch: int):
        self.data, self.stream, self.k, self.batch = data, the_stream, k, batch
        self.running: dict[str, tuple[EpisodeRequest, int]] = {}
        self.trained: list[int] = []
        self.num_started = 0

    def step(self) -> None:
        event = self.data.draw(st.sampled_from(["admit", "finish", "finish", "batch", "load"]))
        if event == "admit":
            self.admit()
        elif event == "finish" and self.running:
            self.finish(self.data.draw(st.sampled_from(sorted(self.running))))
        elif event == "batch":
            self.take()
        elif event == "load":
            self.stream.loaded(self.data.draw(st.integers(self.stream.loaded_version, self.stream.num_handed)))
        self.check()

    def admit(self) -> None:
        for request in self.stream.admit():
            self.running[request.episode_id] = (request, self.stream.loaded_version)
            self.num_started += 1

    def finish(self, episode_id: str) -> None:
        request, version = self.running.pop(episode_id)
        self.stream.add([finished(request, version, last_version=self.stream.loaded_version)])

    def take(self) -> bool:
        batch = self.stream.next_batch()
        if batch is None:
            return False
        update = self.stream.num_handed
        assert max(staleness_steps(t, update) for t in batch) <= self.k
        numbers = groups(batch)
        assert len(set(numbers)) == self.batch and numbers == sorted(numbers)
        self.trained += sorted(set(numbers))
        return True

    def check(self) -> None:
        due = Counter(group.due for group in self.stream._groups.values())
        assert due == self.stream._in_flight + self.stream._buffered
        for d in due:
            assert sum(count for other, count in due.items() if other <= d) <= (d - self.stream.num_handed) * self.batch

    def finish_run(self) -> None:
        while self.stream.num_handed < self.stream._num_batches:
            self.stream.loaded(self.stream.num_handed)
            self.admit()
            for episode_id in list(self.running):
                self.finish(episode_id)
            assert self.take(), "every episode has finished, but there is no batch: nothing could ever unblock it"
            self.check()


@given(data=st.data(), k=st.integers(0, 3), batch=st.integers(1, 3), size=st.integers(1, 2), num_batches=st.integers(1, 5))
def test_no_token_is_older_than_the_bound_nothing_is_wasted_and_nothing_blocks(data, k, batch, size, num_batches) -> None:
    simulation = Simulation(data, stream(k, batch, size, num_batches), k, batch)
    for _ in range(data.draw(st.integers(0, 60))):
        simulation.step()
    simulation.finish_run()
    assert simulation.num_started == num_batches * batch * size  # none was started and not trained on
    assert sorted(simulation.trained) == list(range(num_batches * batch))  # every prompt once, none left out
    assert not simulation.running and simulation.stream.admit() == []


@given(data=st.data(), k=st.integers(0, 2), batch=st.integers(1, 3))
def test_killed_anywhere_and_resumed_every_prompt_is_trained_exactly_once(data, k, batch) -> None:
    num_batches = 5
    simulation = Simulation(data, stream(k, batch, 1, num_batches), k, batch)
    saved, trained = simulation.stream.state_dict(), 0
    for _ in range(data.draw(st.integers(0, 60))):
        simulation.step()
        if simulation.stream.num_handed * batch > trained and data.draw(st.booleans()):
            saved, trained = simulation.stream.state_dict(), len(simulation.trained)
    resumed = Simulation(data, stream(k, batch, 1, num_batches), k, batch)
    resumed.stream.load_state_dict(saved)
    resumed.trained = simulation.trained[:trained]  # what came after the checkpoint is forgotten, by the weights too
    resumed.finish_run()
    assert sorted(resumed.trained) == list(range(num_batches * batch))
    assert resumed.stream.counts() == {"pending": 0, "in_flight": 0, "buffered": 0, "trained": num_batches * batch, "dropped": 0}


def test_a_state_saved_with_other_tasks_is_refused() -> None:
    """Numbers would mean other prompts: some would be trained on twice, and others never."""
    state = stream().state_dict()
    other = Stream(StreamConfig(), TaskStream([*TASKS, Task("t/new", "1+1", "2", "t")], 0), groups_per_batch=1, group_size=1, num_batches=1)
    with pytest.raises(UserError, match="the training tasks are not those that the checkpoint was saved with"):
        other.load_state_dict(state)


def test_strictly_on_policy_admits_one_batch_and_the_next_only_once_weights_are_loaded() -> None:
    s = stream(k=0, batch=2)
    requests = s.admit()
    assert [r.episode_id for r in requests] == ["0:0", "1:0"] and s.admit() == []
    s.add([finished(requests[1], 0)])
    assert s.next_batch() is None
    s.add([finished(requests[0], 0)])
    assert groups(s.next_batch() or []) == [0, 1]
    assert s.admit() == []
    s.loaded(1)
    assert [r.episode_id for r in s.admit()] == ["2:0", "3:0"]


def test_a_long_tail_does_not_block_a_batch_until_it_is_due() -> None:
    s = stream(k=2, batch=1)
    first, slow, quick = s.admit()
    s.add([finished(first, 0)])
    assert groups(s.next_batch() or []) == [0]
    s.loaded(1)
    s.add([finished(quick, 0)])
    assert groups(s.next_batch() or []) == [2]  # the slow one may still wait for update 3
    s.loaded(2)
    fourth, *_ = s.admit()
    s.add([finished(fourth, 2)])
    assert s.next_batch() is None  # now it is due, and nothing goes before it
    s.add([finished(slow, 0)])
    assert groups(s.next_batch() or []) == [1]


def test_the_first_batch_is_not_made_of_the_episodes_that_end_soonest_nor_is_that_after_a_resume() -> None:
    s = stream(k=2, batch=2)
    for resumed in (False, True):
        if resumed:
            state = s.state_dict()
            s = stream(k=2, batch=2)
            s.load_state_dict(state)
        first, second, *others = s.admit()
        assert len(others) == 4
        s.add([finished(request, s.loaded_version) for request in [*others, second]])
        assert s.next_batch() is None
        s.add([finished(first, s.loaded_version)])
        assert groups(s.next_batch() or []) == [int(first.group_id), int(second.group_id)]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_batch_holds_slow_episodes_as_often_as_they_begin(k: int) -> None:
    """Every other episode takes ten times as long as the one before it, and more than a learner's step (clock ticks)."""
    quick, slow, learn, batch, num_batches = 3, 30, 5, 8, 12
    s, running, now, busy_until, shares = stream(k=k, batch=batch, num_batches=num_batches), [], 0, 0, []
    while s.num_handed < num_batches:
        running += [(now + (slow if int(r.group_id) % 2 else quick), r, s.loaded_version) for r in s.admit()]
        s.add([finished(request, version) for end, request, version in running if end == now])
        running = [one for one in running if one[0] > now]
        if now >= busy_until:
            s.loaded(s.num_handed)
            if ready := s.next_batch():
                shares.append(sum(group % 2 for group in groups(ready)) / batch)
                busy_until = now + learn
        now += 1
    assert shares == pytest.approx([0.5] * num_batches, abs=1 / batch)


def test_a_token_older_than_the_bound_is_an_error_that_names_the_episode() -> None:
    s = stream(k=0, batch=1)
    s.add([finished(s.admit()[0], 0)])
    s.next_batch()
    s.loaded(1)
    s.add([finished(s.admit()[0], 0, last_version=1)])
    with pytest.raises(StreamError, match=r"episode 1:0 holds a token that is 1 updates old, more than stream.max_staleness_steps=0"):
        s.next_batch()


def test_a_group_without_signal_is_replaced_by_another_prompt_up_to_a_limit() -> None:
    s = stream(k=0, batch=1, size=2, filter_zero_signal=True, max_filtered=1)
    s.add([finished(request, 0, reward=1.0) for request in s.admit()])
    assert s.next_batch() is None
    replacement = s.admit()
    assert [r.group_id for r in replacement] == ["1", "1"]
    s.add([finished(request, 0, reward=1.0) for request in replacement])
    assert groups(s.next_batch() or []) == [1, 1]  # the limit is reached: trained on as it is
    assert s.metrics()["stream/dropped/zero_signal"] == 1
    assert s.counts() == {"pending": 0, "in_flight": 0, "buffered": 0, "trained": 1, "dropped": 1}


def test_the_limit_on_groups_without_signal_is_one_of_each_step() -> None:
    s = stream(k=0, batch=1, size=2, filter_zero_signal=True, max_filtered=2)
    for step in range(3):
        for _ in range(2):
            s.add([finished(request, step, reward=0.0) for request in s.admit()])
        s.add([finished(request, step, reward=reward) for request, reward in zip(s.admit(), (0.0, 1.0), strict=True)])
        assert groups(s.next_batch() or []) == [3 * step + 2] * 2
        assert s.dropped_episodes == [(0.0, 2)] * 4
        s.loaded(step + 1)


def test_the_finished_episodes_of_dropped_groups_are_told_with_the_next_batch_alone() -> None:
    now = [0.0]
    s = stream(k=0, batch=1, size=2, filter_zero_signal=True, group_deadline_s=10, clock=lambda: now[0])
    s.add([finished(request, 0, reward=1.0) for request in s.admit()])
    s.add([finished(s.admit()[0], 0, reward=0.25)])
    now[0] = 11.0
    s.expire()
    assert s.dropped_episodes == []
    s.add([finished(request, 0, reward=reward) for request, reward in zip(s.admit(), (0.0, 1.0), strict=True)])
    assert groups(s.next_batch() or []) == [2, 2]
    assert s.dropped_episodes == [(1.0, 2), (1.0, 2), (0.25, 2)]
    s.loaded(1)
    s.add([finished(request, 1, reward=reward) for request, reward in zip(s.admit(), (0.0, 1.0), strict=True)])
    assert groups(s.next_batch() or []) == [3, 3] and s.dropped_episodes == []


def test_a_group_with_signal_is_kept() -> None:
    s = stream(k=0, batch=1, size=2, filter_zero_signal=True)
    s.add([finished(request, 0, reward=reward) for request, reward in zip(s.admit(), (0.0, 1.0), strict=True)])
    assert groups(s.next_batch() or []) == [0, 0]


@pytest.mark.parametrize(("num_finished", "goes"), [(2, True), (1, False)])
def test_a_late_group_goes_with_its_quorum_or_not_at_all(num_finished: int, goes: bool) -> None:
    now = [0.0]
    s = stream(k=0, batch=1, size=3, group_deadline_s=10, group_quorum=2, clock=lambda: now[0])
    requests = s.admit()
    s.add([finished(request, 0) for request in requests[:num_finished]])
    now[0] = 10.0
    assert s.expire() == []
    now[0] = 10.1
    assert s.expire() == [request.episode_id for request in requests[num_finished:]]
    batch = s.next_batch()
    assert (batch is not None and len(batch) == 2) is goes
    assert s.metrics()[f"stream/dropped/{DropReason.GROUP_DEADLINE}"] == (0 if goes else 1)
    s.add([finished(requests[2], 0)])  # comes all the same
    assert s.metrics()["stream/late_episodes"] == 1
    assert len(s.admit()) == (0 if goes else 3)


def test_a_groups_time_runs_from_its_first_finished_episode_however_long_all_of_them_waited_for_a_place() -> None:
    now = [0.0]
    s = stream(k=0, batch=2, size=2, group_deadline_s=10, clock=lambda: now[0])
    early, _, late, _ = requests = s.admit()
    now[0] = 100.0
    assert s.expire() == []
    s.add([finished(late, 0)])  # groups do not begin in the order in which they were admitted
    now[0] = 105.0
    s.add([finished(early, 0)])
    now[0] = 110.1
    assert s.expire() == [requests[3].episode_id]
    now[0] = 115.1
    assert s.expire() == [requests[1].episode_id]
    assert s.metrics()["stream/dropped/group_deadline"] == 2 and s.expire() == []


@pytest.mark.parametrize("k", [0, 1, 3])
def test_no_prompt_is_dropped_as_late_because_its_episodes_waited_in_a_queue(k: int) -> None:
    """64 places for (K + 1) 512 episodes of 5 seconds each."""
    now = [0.0]
    s = stream(k=k, batch=64, size=8, num_batches=6, group_deadline_s=20, clock=lambda: now[0])
    queue: list[EpisodeRequest] = []
    running: list[tuple[float, EpisodeRequest, int]] = []
    while s.num_handed < 6:
        queue += s.admit()
        assert s.expire() == []
        begin, queue = queue[: 64 - len(running)], queue[64 - len(running) :]
        running += [(now[0] + 5, request, s.loaded_version) for request in begin]
        now[0] += 1
        s.add([finished(request, version) for end, request, version in running if end <= now[0]])
        running = [one for one in running if one[0] > now[0]]
        if s.next_batch():
            s.loaded(s.num_handed)


def test_what_is_counted_by_the_update_at_which_it_is_due_does_not_grow_with_the_updates() -> None:
    s = stream(k=1, batch=1, num_batches=6)
    for step in range(1, 7):
        s.add([finished(request, s.loaded_version) for request in s.admit()])
        s.next_batch()
        s.loaded(step)
    assert len(s._in_flight) == len(s._buffered) == 0


def test_a_trajectory_that_comes_twice_counts_once() -> None:
    s = stream(k=0, batch=1, size=2)
    requests = s.admit()
    s.add([finished(requests[0], 0), finished(requests[0], 0)])
    assert s.next_batch() is None
    s.add([finished(requests[1], 0)])
    assert len(s.next_batch() or []) == 2


@given(st.lists(st.integers(0, 4), max_size=5), st.integers(5, 9))
def test_staleness_is_that_of_the_oldest_sampled_token(versions: list[int], update: int) -> None:
    trajectory = replace(finished(EpisodeRequest("0:0", "0", TASKS[0]), 0), policy_versions=[-1, *versions, -1])
    assert staleness_steps(trajectory, update) == (update - 1 - min(versions) if versions else 0)


def test_what_is_there_is_described() -> None:
    s = stream(k=1, batch=2)
    requests = s.admit()
    s.add([finished(requests[0], 0)])
    assert s.describe() == (
        "stream: 0 batches handed over, engines at version 0; prompts: 0 pending, 3 in_flight, 1 buffered, 0 trained, 0 dropped"
    )


def test_what_holds_up_the_next_update_is_described() -> None:
    s = stream(k=0, batch=3)
    s.add([finished(s.admit()[0], 0)])
    assert s.describe().endswith(", 0 dropped; 2 of those in flight are due at the next update")


def test_prompts_that_are_run_again_are_admitted_in_their_order_however_often_a_run_is_killed() -> None:
    saved = stream(k=1, batch=2)
    saved.admit()
    for _ in range(2):
        resumed = stream(k=0, batch=2)
        resumed.load_state_dict(saved.state_dict())
        assert [request.group_id for request in resumed.admit()] == ["0", "1"]  # 2 and 3 are pending still
        saved = resumed
