"""The stream's promises hold also where groups are dropped, at any bound on staleness, with kills and resumes in between."""

from __future__ import annotations

import json
import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from toolrl_ray.config import StreamConfig
from toolrl_ray.stream.buffer import Stream, staleness_steps
from toolrl_ray.tasks.stream import TaskStream
from toolrl_ray.types import EpisodeRequest, StopReason, Task, Trajectory

TASKS = [Task(f"t/{i}", f"{i}+1", str(i + 1), "t") for i in range(7)]
MAX_EVENTS = 20_000


def finished(request: EpisodeRequest, began: int, ended: int, reward: float) -> Trajectory:
    columns: tuple = ([1, 2, 3], [False, True, True], [0.0, -1.0, -1.0], [-1, began, ended])
    return Trajectory(request, *columns, [], [], StopReason.SUBMITTED, 1, 0.1, reward=reward)


class Simulation:
    """A run with events in random order. `saved`: the stream's state, and what was trained, at the last checkpoint."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.k, self.batch, self.num_batches = rng.randint(0, 3), rng.randint(1, 3), rng.randint(1, 6)
        self.size = rng.randint(2, 3)
        self.config = StreamConfig(
            max_staleness_steps=self.k,
            filter_zero_signal=rng.random() < 0.7,
            max_filtered=rng.choice([1, 3, 256]),
            group_deadline_s=rng.choice([None, 5.0]),
            group_quorum=rng.randint(1, self.size),
        )
        self.now = 0.0
        self.trained: Counter[int] = Counter()
        self.start(None)
        self.saved = (self.stream.state_dict(), Counter(self.trained))

    def start(self, state) -> None:
        self.running: dict[str, tuple[EpisodeRequest, int]] = {}
        self.stream = Stream(
            self.config,
            TaskStream(TASKS, 0),
            groups_per_batch=self.batch,
            group_size=self.size,
            num_batches=self.num_batches,
            clock=lambda: self.now,
        )
        if state:
            self.stream.load_state_dict(state)

    def event(self) -> None:
        stream, rng, kind = self.stream, self.rng, self.rng.random()
        self.now += rng.random() * 0.3
        if kind < 0.2:
            for request in stream.admit():
                assert request.episode_id not in self.running
                self.running[request.episode_id] = (request, stream.loaded_version)
        elif kind < 0.7 and self.running:
            request, began = self.running.pop(rng.choice(sorted(self.running)))
            stream.add([finished(request, began, stream.loaded_version, float(rng.random() < 0.5))])
        elif kind < 0.8:
            for episode_id in stream.expire():
                del self.running[episode_id]
        elif kind < 0.9:
            self.take(stream.next_batch())
        elif kind < 0.97:
            stream.loaded(rng.randint(stream.loaded_version, stream.num_handed))
        elif kind < 0.98 and stream.loaded_version == stream.num_handed:
            self.saved = (stream.state_dict(), Counter(self.trained))
        elif kind < 0.985:  # killed and resumed
            self.trained = Counter(self.saved[1])
            self.start(self.saved[0])

    def take(self, batch: list[Trajectory] | None) -> None:
        if batch is None:
            return
        assert max(staleness_steps(t, self.stream.num_handed) for t in batch) <= self.k
        groups = {int(t.request.group_id) for t in batch}
        assert len(groups) == self.batch
        self.trained.update(groups)
        assert set(self.trained.values()) == {1}

    def check(self) -> None:
        counts = self.stream.counts()
        assert counts["trained"] == len(self.trained) and min(counts.values()) >= 0


@settings(deadline=None, max_examples=300)
@given(seed=st.integers(0, 2**32))
def test_with_drops_no_prompt_is_trained_twice_or_forgotten_and_the_bound_holds(seed: int) -> None:
    simulation = Simulation(random.Random(seed))
    for _ in range(MAX_EVENTS):
        if simulation.stream.num_handed == simulation.num_batches:
            break
        simulation.event()
        simulation.check()
    counts = simulation.stream.counts()
    assert simulation.stream.num_handed == simulation.num_batches
    assert counts["trained"] == simulation.batch * simulation.num_batches == len(simulation.trained)
    dropped = set(map(int, simulation.stream.state_dict()["dropped"]))
    assert not dropped & set(simulation.trained)
    assert set(range(max(simulation.trained) + 1)) <= dropped | set(simulation.trained) | set(simulation.stream.state_dict()["again"])


def test_what_was_dropped_since_the_last_batch_counts_after_a_resume_too() -> None:
    def stream() -> Stream:
        config = StreamConfig(filter_zero_signal=True, max_filtered=1)
        return Stream(config, TaskStream(TASKS, 0), groups_per_batch=2, group_size=2, num_batches=2)

    def finish(one: Stream, number: int, *rewards: float) -> None:
        requests = [EpisodeRequest(f"{number}:{member}", str(number), TASKS[number]) for member in range(2)]
        one.add(finished(request, 0, 0, reward) for request, reward in zip(requests, rewards, strict=True))

    whole, resumed = stream(), stream()
    whole.admit()
    finish(whole, 0, 1.0, 1.0)  # until the next batch no other may be replaced
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for one in (whole, resumed):
        one.admit()
        finish(one, 1, 0.0, 0.0)
        finish(one, 2, 0.0, 1.0)
        assert [t.request.group_id for t in one.next_batch() or []] == ["1", "1", "2", "2"]
        assert one.dropped_episodes == [(1.0, 2), (1.0, 2)]
    older = {key: value for key, value in whole.state_dict().items() if key not in ("num_filtered", "dropped_since")}
    stream().load_state_dict(older)  # of a checkpoint of an earlier version
