"""The pool of RolloutActors, with actors that misbehave on demand: every episode comes back once, and nothing is waited for without end."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import ray
from learner_synthetic import run_config
from ray import cloudpickle
from ray.exceptions import ActorUnavailableError

from toolrl_ray.errors import NotLoaded, RolloutError
from toolrl_ray.rollout import pool as module
from toolrl_ray.rollout.assignment import Outcome
from toolrl_ray.rollout.inbox import Inbox
from toolrl_ray.rollout.pool import RolloutPool
from toolrl_ray.types import EpisodeRequest, StopReason, Task, Trajectory

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a worker process cannot import what this file imports
TASK = Task("t/0", "1+1", "2", "t")


class Scripted:
    """The surface of a RolloutActor that the pool sees, with the real inbox. fate: what befalls its first process in which method;
    always: every process."""

    def __init__(self, method: str = "", fate: str = "", always: bool = False):
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self.method, self.fate = (method, fate) if always or not restarted else ("", "")
        self.inbox = Inbox()
        self.is_loaded = False
        runs: Counter[str] = Counter()

        async def run(request: EpisodeRequest) -> Trajectory:
            """`num_turns` says which run of this episode it is."""
            runs[request.episode_id] += 1
            if self.method == "run" and request.episode_id == "1:0" and runs["1:0"] == 1:
                await asyncio.sleep(0.05)
                time.sleep(6)
                await asyncio.sleep(600)
            of_run = runs[request.episode_id]
            return Trajectory(request, [1, 2], [False, True], [0.0, -1.0], [-1, 0], [], [], StopReason.SUBMITTED, of_run, 0.01, reward=1.0)

        self.inbox.run = run

    def _note(self, method: str) -> None:
        if method == self.method:
            if self.fate == "hangs":
                time.sleep(600)
            if self.fate == "dies":
                os._exit(1)
            raise RuntimeError("no such\nmodel")

    @ray.method(max_task_retries=-1)
    async def start(self) -> int:
        self._note("start")
        self.is_loaded = True
        return os.getpid()

    async def alive(self) -> int:
        self._note("alive")
        if not self.is_loaded:
            raise NotLoaded("its engine is not loaded")
        return os.getpid()

    async def submit(self, requests: list[EpisodeRequest], max_in_flight: int, era: int) -> None:
        self._note("submit")
        self.inbox.submit(requests, max_in_flight, era)

    async def cancel(self, episode_ids: list[str], era: int) -> None:
        self.inbox.cancel(episode_ids, era)

    async def take(self, max_wait_s: float) -> list[Outcome]:
        self._note("take")
        return await self.inbox.take(max_wait_s)

    async def stats(self) -> tuple[int, dict[str, float]]:
        return os.getpid(), {"calls": 1.0}


class HangingStart(Scripted):
    """Dies of its first requests, and hangs in the second of its starts, which it counts in the file `starts`."""

    def __init__(self, starts: str):
        super().__init__()
        self.starts = Path(starts)

    @ray.method(max_task_retries=-1)
    async def start(self) -> int:
        with self.starts.open("a") as file:
            file.write(".")
        if len(self.starts.read_text()) == 2:
            time.sleep(600)
        return os.getpid()

    async def submit(self, requests: list[EpisodeRequest], max_in_flight: int, era: int) -> None:
        if len(self.starts.read_text()) == 1:
            os._exit(1)
        await super().submit(requests, max_in_flight, era)


on_ray = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=100)
Actor = on_ray(Scripted)


def up(*actors: Any) -> tuple[Any, ...]:
    """Once their processes are there: these take longer on a busy machine than the timeouts that are tested."""
    ray.get([actor.__ray_ready__.remote() for actor in actors], timeout=120)
    return actors


def restart(actor: Any) -> None:
    """Ends its process, and waits for the next one to be there."""
    before, _ = ray.get(actor.stats.remote(), timeout=60)
    ray.kill(actor, no_restart=False)
    deadline = time.monotonic() + 60
    while True:
        with suppress(ActorUnavailableError):
            if ray.get(actor.stats.remote(), timeout=60)[0] != before:
                return
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def make(cluster):
    """make(*actors, **rollout settings) -> RolloutPool, whose actors are ended with the test."""
    made = []

    def make(*actors, **rollout) -> RolloutPool:
        made.extend(actors)
        return RolloutPool(run_config(rollout={"num_actors": len(actors), **rollout}), list(actors))

    yield make
    for actor in made:
        ray.kill(actor)


def requests(count: int) -> list[EpisodeRequest]:
    return [EpisodeRequest(f"{i}:0", str(i), TASK) for i in range(count)]


def polled(pool: RolloutPool, count: int, timeout_s: float = 90) -> Counter[str]:
    """How often each episode came back, once `count` have."""
    seen: Counter[str] = Counter()
    deadline = time.monotonic() + timeout_s
    while seen.total() < count:
        assert time.monotonic() < deadline, pool.describe()
        seen.update(t.request.episode_id for t in pool.poll(0.5))
    return seen


@pytest.mark.parametrize(
    ("fate", "message"),
    [
        ("hangs", r"RolloutActor 1 was not ready within 3 s \(rollout.start_timeout_s\)"),
        ("fails", "RolloutActor 1 could not load its engine: RuntimeError: no such model"),
    ],
)
def test_an_actor_that_does_not_start_is_named(fate, message, make) -> None:
    pool = make(*up(Actor.remote(), Actor.remote("start", fate, always=True)), start_timeout_s=3)
    with pytest.raises(RolloutError, match=message):
        pool.start()


@pytest.mark.parametrize("fate", ["hangs", "dies"])
def test_the_episodes_of_an_actor_that_stops_answering_are_run_by_others_and_it_comes_back(fate, make, monkeypatch) -> None:
    monkeypatch.setattr(module, "UNRESPONSIVE_S", 3.0)
    pool = make(Actor.remote(), Actor.remote("take", fate), max_in_flight=4)
    pool.start()
    assert pool.tool_stats() == {"calls": 2.0}
    pool.submit(requests(40))
    assert polled(pool, 40) == Counter({f"{i}:0": 1 for i in range(40)})
    assert pool.num_rerun > 0 and pool.num_outstanding == 0
    deadline = time.monotonic() + 60
    while pool.num_restarts == 0 and time.monotonic() < deadline:
        pool.poll(0.2)
    assert pool.num_restarts == 1
    pool.submit(requests(8))
    assert polled(pool, 8).total() == 8
    assert pool.tool_stats() == {"calls": 3.0}


@pytest.mark.parametrize("fate", ["idle", "hangs", "dies"])
def test_an_actor_that_died_unseen_is_left_out_of_a_sync_and_gets_no_work_before_it_has_the_weights(fate, make, monkeypatch) -> None:
    """It is seen by the sync alone, as it has no episodes. "idle": its new process is there, and not loaded."""
    monkeypatch.setattr(module, "PING_S", 5.0)
    healthy, dead = up(Actor.remote(), Actor.remote("" if fate == "idle" else "alive", fate))
    pool = make(healthy, dead)
    has_weights = []
    pool._readmit = lambda: bool(has_weights)
    pool.start()
    assert pool.holds([healthy, dead])
    if fate == "idle":
        restart(dead)
    assert pool.reachable() == [healthy]
    pool.submit(requests(8))
    assert not pool.holds([healthy, dead]) and pool.holds([healthy])
    assert polled(pool, 8) == Counter({f"{i}:0": 1 for i in range(8)})
    if fate == "hangs":
        ray.kill(dead, no_restart=False)  # as its `pause` does
    deadline = time.monotonic() + 60
    while not pool.holds([dead]):
        assert time.monotonic() < deadline
        pool.poll(0.2)
    assert "RolloutActor 1 (down): 0 running" in pool.describe() and pool.num_restarts == 1
    has_weights.append(True)
    pool.poll(0)
    assert "(down)" not in pool.describe() and pool.reachable() == [healthy, dead]


def test_where_no_actor_answers_a_sync_waits_for_the_first_that_starts_again(make) -> None:
    pool = make(*up(alone := Actor.remote()))
    pool.start()
    restart(alone)
    assert pool.reachable() == [alone]
    pool.submit(requests(4))
    assert polled(pool, 4).total() == 4 and pool.num_restarts == 1


def test_an_actor_that_keeps_dying_is_given_up_and_without_another_the_run_ends(make, monkeypatch, caplog) -> None:
    monkeypatch.setattr(module, "MAX_RESTARTS_IN_A_ROW", 1)
    pool = make(Actor.remote(), Actor.remote("take", "dies", always=True), max_in_flight=2, max_tries=9)
    pool.start()
    with caplog.at_level(logging.WARNING):
        pool.submit(requests(12))
        assert polled(pool, 12).total() == 12
        deadline = time.monotonic() + 60
        while "the run goes on without it" not in caplog.text:
            assert time.monotonic() < deadline
            pool.submit(more := [EpisodeRequest(f"{time.monotonic_ns()}-{i}:0", "0", TASK) for i in range(12)])
            polled(pool, len(more))
    assert "RolloutActor 1 died 1 times in a row" in caplog.text
    alone = make(Actor.remote("take", "fails", always=True), max_tries=9)
    alone.start()
    alone.submit(requests(2))
    with pytest.raises(RolloutError, match="^RolloutActor 0 died 1 times in a row; last: RuntimeError: no such model$"):
        polled(alone, 2)


def test_requests_that_an_actor_cannot_read_end_the_run_at_once_and_are_named(make, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "of_this_process", ModuleType("of_this_process"))

    @dataclass(frozen=True)
    class OwnTask(Task):
        pass

    OwnTask.__module__, OwnTask.__qualname__ = "of_this_process", "OwnTask"
    sys.modules["of_this_process"].OwnTask = OwnTask
    pool = make(Actor.remote(), Actor.remote())
    pool.start()
    pool.submit([EpisodeRequest("0:0", "0", OwnTask("t/0", "1+1", "2", "t"))])
    with pytest.raises(RolloutError, match="RolloutActor 0 cannot read the requests for its episodes: .*No module named 'of_this_process'"):
        polled(pool, 1, timeout_s=30)


@pytest.mark.parametrize("fate", ["fails", "dies"])
def test_an_actor_that_cannot_take_requests_is_replaced_and_one_that_never_can_is_given_up(fate, make, monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_RESTARTS_IN_A_ROW", 1)
    pool = make(Actor.remote(), Actor.remote("submit", fate), max_in_flight=4)
    pool.start()
    pool.submit(requests(40))
    assert polled(pool, 40) == Counter({f"{i}:0": 1 for i in range(40)})
    alone = make(Actor.remote("submit", fate, always=True), max_tries=9)
    alone.start()
    alone.submit(requests(2))
    with pytest.raises(RolloutError, match="RolloutActor 0 died 1 times in a row"):
        polled(alone, 2, timeout_s=30)


def test_what_was_called_off_is_not_handed_back_and_the_same_episodes_can_be_asked_for_again(make) -> None:
    pool = make(Actor.remote())
    pool.start()
    pool.submit(requests(30))
    pool.poll(0)
    started = time.monotonic()
    pool.cancel_all()
    assert pool.num_outstanding == 0 and time.monotonic() - started < 1
    pool.submit(requests(30))
    assert polled(pool, 30) == Counter({f"{i}:0": 1 for i in range(30)})
    assert pool.poll(0.5) == []


def test_an_actor_that_is_late_to_call_episodes_off_hands_nothing_of_before_back(make) -> None:
    """As one whose engine holds the loop with a long batch, while the run goes back to a checkpoint."""
    pool = make(actor := Actor.remote("run", "stalls"))
    pool.start()
    pool.submit(requests(2))
    time.sleep(1)
    pool.cancel_all()
    ray.get(actor.start.remote(), timeout=20)  # the loop is free again, and what had finished before is on its way
    pool.submit(requests(2))
    finished = []
    deadline = time.monotonic() + 30
    while len(finished) < 2:
        assert time.monotonic() < deadline, pool.describe()
        finished += pool.poll(0.5)
    assert {t.request.episode_id: t.num_turns for t in finished} == {"0:0": 2, "1:0": 2}


def test_a_late_actor_that_the_cluster_has_no_room_for_is_told_of_once_and_not_given_up(make, monkeypatch, caplog) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.0)
    monkeypatch.setattr(module, "MAX_RESTARTS_IN_A_ROW", 0)
    pool = make(*up(Actor.remote()), start_timeout_s=2, max_actors=2)
    pool.start()
    late = Actor.options(num_cpus=1000).remote()
    pool.expect([late])
    try:
        with caplog.at_level(logging.WARNING):
            deadline = time.monotonic() + 7
            while time.monotonic() < deadline:
                pool.poll(0.5)
        [message] = caplog.messages
        assert message.startswith("RolloutActor 1 has no room in the cluster for ")
        pool.submit(requests(5))
        assert polled(pool, 5).total() == 5
    finally:
        ray.kill(late)


@pytest.mark.parametrize("num_others", [0, 1])
def test_an_actor_that_hangs_when_it_starts_again_is_replaced(num_others, make, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.0)
    others = [Actor.remote() for _ in range(num_others)]
    pool = make(*up(on_ray(HangingStart).remote(str(tmp_path / "starts")), *others), start_timeout_s=10)
    pool.start()
    pool.submit(requests(8))
    assert polled(pool, 8, timeout_s=60).total() == 8
    deadline = time.monotonic() + 60
    while pool.num_restarts == 0 and time.monotonic() < deadline:
        pool.poll(0.2)
    assert pool.num_restarts == 1 and len((tmp_path / "starts").read_text()) == 3


def test_an_actor_that_always_hangs_when_it_starts_is_given_up(make, monkeypatch, caplog) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.0)
    monkeypatch.setattr(module, "MAX_RESTARTS_IN_A_ROW", 1)
    pool = make(*up(Actor.remote()), start_timeout_s=2, max_actors=2)
    pool.start()
    late = Actor.remote("start", "hangs", always=True)
    pool.expect([late])
    try:
        with caplog.at_level(logging.WARNING):
            deadline = time.monotonic() + 60
            while "RolloutActor 1 died" not in caplog.text:
                assert time.monotonic() < deadline
                pool.poll(0.5)
        *before, lost, message = [line for line in caplog.messages if "has no room in the cluster" not in line]  # said of a slow process
        assert before == [] and re.search(r"^RolloutActor 1 is lost and is started again: it was not ready within \d+ s", lost)
        assert re.search(r"RolloutActor 1 died 1 times in a row; last: it was not ready within \d+ s .*the run goes on without it", message)
    finally:
        ray.kill(late)
