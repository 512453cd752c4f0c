"""Rollout, learner and weights of a simulated run, for `scale.py`; simulated_engine.py has what they are made of."""

from __future__ import annotations

import asyncio
import pickle
import queue
import threading
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from scripts.bench.simulated_engine import SimEngine, SimService, WordCodec
from toolrl_ray.config import RunConfig
from toolrl_ray.episode.call_format import TextMarkers
from toolrl_ray.rollout.assignment import Assignment, Outcome
from toolrl_ray.rollout.inbox import Inbox
from toolrl_ray.rollout.pool import AHEAD, TAKE_WAIT_S
from toolrl_ray.rollout.runner import EpisodeRunner
from toolrl_ray.tasks.prompts import TOOL
from toolrl_ray.tools.dispatch import Dispatcher
from toolrl_ray.types import EpisodeRequest, Trajectory

UPDATE_S_PER_TRAJECTORY = 1.6e-3
SYNC_S = 1.0
END_TIMEOUT_S = 30.0


class Flight:
    """Episodes under way, over time."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._idle_s = self._episode_s = 0.0
        self._at = time.monotonic()

    def change(self, by: int) -> None:
        self.totals()
        self.now += by
        self.peak = max(self.peak, self.now)

    def totals(self) -> tuple[float, float]:
        """(seconds with none, sum of all their seconds) until now."""
        now = time.monotonic()
        if self.now == 0:
            self._idle_s += now - self._at
        self._episode_s += self.now * (now - self._at)
        self._at = now
        return self._idle_s, self._episode_s


class SimActor:
    """A RolloutActor without Ray."""

    def __init__(self, config: RunConfig, median_turn_tokens: int, speed_up: float, flight: Flight):
        self.engine = SimEngine(config.rollout.max_in_flight, median_turn_tokens, speed_up, config.seed)
        self.tools = Dispatcher(SimService(speed_up, config.seed), [TOOL], max_queued=config.tools.max_queued)
        self.inbox = Inbox()
        codec: Any = WordCodec()
        runner = EpisodeRunner(config, self.inbox.sampling(self.engine.generate), self.tools, codec, TextMarkers())

        async def run(request: EpisodeRequest) -> Trajectory:
            flight.change(1)
            try:
                return await runner.run(request)
            finally:
                flight.change(-1)

        self.inbox.run = run

    def submit(self, message: bytes, max_in_flight: int, era: int) -> None:
        self.inbox.submit(pickle.loads(message), max_in_flight, era)


class SimRollout:
    """RolloutPool without Ray: all actors on one event loop in a thread, messages pickled on one side and unpickled on the other.

    began: called when the first training episodes are submitted.
    """

    concurrent = True
    num_restarts = 0

    def __init__(self, config: RunConfig, median_turn_tokens: int, speed_up: float, began: Callable[[], None]):
        self._config = config
        self._began: Callable[[], None] | None = began
        self._max_in_flight = config.rollout.max_in_flight
        self._book = Assignment(config.rollout.num_actors, config.rollout.max_tries)
        self._asked: set[int] = set()
        self._messages: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
        self.num_polls = self.num_takes = 0
        self.flight = Flight()
        self.actors = [SimActor(config, median_turn_tokens, speed_up, self.flight) for _ in range(config.rollout.num_actors)]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    @property
    def num_rerun(self) -> int:
        return self._book.num_rerun

    @property
    def num_outstanding(self) -> int:
        return self._book.num_outstanding

    def submit(self, requests: list[EpisodeRequest], *, max_in_flight: int | None = None) -> None:
        if self._began and max_in_flight is None:  # an evaluation on its own says how many
            self._began()
            self._began = None
        self._max_in_flight = max_in_flight or self._config.rollout.max_in_flight
        self._book.add(requests)
        self._hand_out()

    def poll(self, max_wait_s: float) -> list[Trajectory]:
        self.num_polls += 1
        self._hand_out()
        finished: list[Trajectory] = []
        try:
            message = self._messages.get(timeout=max_wait_s) if max_wait_s else self._messages.get_nowait()
            while True:
                finished += self._take(*message)
                message = self._messages.get_nowait()
        except queue.Empty:
            return finished

    def _hand_out(self) -> None:
        for index, actor in enumerate(self.actors):
            if requests := self._book.next_for(index, AHEAD * self._max_in_flight):
                self._loop.call_soon_threadsafe(actor.submit, pickle.dumps(requests), self._max_in_flight, self._book.era)
            if self._book.num_running(index) and index not in self._asked:
                self._asked.add(index)
                asyncio.run_coroutine_threadsafe(self._send(index), self._loop)

    async def _send(self, index: int) -> None:
        self._messages.put((index, pickle.dumps(await self.actors[index].inbox.take(TAKE_WAIT_S))))

    def _take(self, index: int, message: bytes) -> list[Trajectory]:
        self.num_takes += 1
        self._asked.discard(index)
        outcomes: list[Outcome] = pickle.loads(message)
        return self._book.take(index, outcomes)

    def cancel(self, episode_ids: Collection[str]) -> None:
        self._call_off(self._book.era, self._book.cancel(episode_ids))

    def cancel_all(self) -> None:
        self._call_off(self._book.era, self._book.cancel_all())

    def _call_off(self, era: int, running: dict[int, list[str]]) -> None:
        for index, episode_ids in running.items():
            self._loop.call_soon_threadsafe(self.actors[index].inbox.cancel, episode_ids, era)

    def describe(self) -> str:
        return self._book.describe()

    def tool_stats(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for stats in self.on_loop(lambda: [actor.tools.stats() for actor in self.actors]):
            for key, value in stats.items():
                total[key] = total.get(key, 0) + value
        return total

    def on_loop(self, function: Callable[[], Any]) -> Any:
        """What the function returns in the actors' thread."""

        async def call() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(timeout=END_TIMEOUT_S)

    def close(self) -> None:
        """Ends whatever runs, and the thread."""

        async def end() -> None:
            for actor in self.actors:
                await actor.tools.close()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            self._loop.stop()

        self.cancel_all()
        asyncio.run_coroutine_threadsafe(end(), self._loop)
        self._thread.join(END_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()


class SimLearner:
    """updated: called with every batch. ended: called when the last update is over."""

    def __init__(self, speed_up: float, updated: Callable[[list[Trajectory]], None], ended: Callable[[], None]):
        self._speed_up, self._updated, self._ended = speed_up, updated, ended
        self._state = Path()

    def update(self, trajectories: list[Trajectory]) -> dict[str, float]:
        self._updated(trajectories)
        update_s = UPDATE_S_PER_TRAJECTORY * len(trajectories) / self._speed_up
        time.sleep(update_s)
        return {"time/update_s": update_s}

    def save_policy(self, directory: str, tokenizer_dir: str) -> None:
        self._ended()

    def save_state(self, directory: str) -> None:
        self._state = Path(directory)

    def finish_save(self) -> None:
        (self._state / "weights").write_bytes(b"weights")

    def load_state(self, directory: str) -> None:
        raise NotImplementedError("a simulated run is not resumed")

    def restart(self) -> None:
        raise NotImplementedError("a simulated learner is not lost")


class SimWeights:
    backend = "simulated"
    changing = nullcontext()

    def __init__(self, rollout: SimRollout, speed_up: float):
        self._rollout, self._speed_up = rollout, speed_up

    def take(self, policy_version: int) -> Callable[[], dict[str, float]]:
        return partial(self.sync, policy_version)

    def sync(self, policy_version: int) -> dict[str, float]:
        engines = [actor.engine for actor in self._rollout.actors]
        self._rollout.on_loop(lambda: [engine.pause() for engine in engines])
        time.sleep(SYNC_S / self._speed_up)
        self._rollout.on_loop(lambda: [engine.resume(policy_version) for engine in engines])
        return {"time/weight_sync_s": SYNC_S / self._speed_up}

    def reconnect(self) -> None:
        """There is nothing in between."""
