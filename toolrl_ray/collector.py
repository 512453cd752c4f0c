"""Keeps episodes going. Whatever the run waits for, the main thread waits for it here, and meanwhile starts what the stream admits and
takes in what has finished; so nothing that is waited for can stop rollout, and a wait that leads nowhere is noticed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Protocol, TypeVar

from toolrl_ray.config import RunConfig
from toolrl_ray.errors import LearnerLost, RolloutError, StallError
from toolrl_ray.evaluation import eval_requests, eval_result, speed
from toolrl_ray.stream.buffer import Stream
from toolrl_ray.types import EpisodeRequest, Task, Trajectory

POLL_S = 1.0
POLL_BESIDE_S = 0.05
HELD_S = 5.0  # between two polls: this thread stood still, which is no fault of the episodes
TELL_S = 30.0  # a wait longer than that is described, and again after as long

T = TypeVar("T")


class Rollout(Protocol):
    """concurrent: episodes go on, elsewhere, while nobody polls."""

    concurrent: bool
    num_restarts: int
    num_rerun: int
    num_outstanding: int  # episodes submitted and not handed back

    def submit(self, requests: list[EpisodeRequest], *, max_in_flight: int | None = None) -> None: ...
    def poll(self, max_wait_s: float) -> list[Trajectory]: ...
    def cancel(self, episode_ids: Collection[str]) -> None: ...
    def cancel_all(self) -> None: ...
    def tool_stats(self) -> dict[str, float]: ...
    def describe(self) -> str: ...


def collect(rollout: Rollout, requests: list[EpisodeRequest], *, timeout_s: float, max_in_flight: int | None = None) -> list[Trajectory]:
    """All of these and nothing else, in the order of the requests. Raises RolloutError after timeout_s (rollout.collect_timeout_s)."""
    rollout.submit(requests, max_in_flight=max_in_flight)
    finished: dict[str, Trajectory] = {}
    deadline = time.monotonic() + timeout_s
    while len(finished) < len(requests):
        finished |= {t.request.episode_id: t for t in rollout.poll(POLL_S)}
        if time.monotonic() > deadline:
            raise RolloutError(
                f"{len(finished)} of {len(requests)} episodes within {timeout_s:g} s (rollout.collect_timeout_s); {rollout.describe()}"
            )
    return [finished[request.episode_id] for request in requests]


def evaluate(
    config: RunConfig, rollout: Rollout, tasks: list[Task], label: str, *, num_samples: int, without_tools: bool = False
) -> tuple[dict[str, float], list[Trajectory]]:
    """An evaluation on its own: all its episodes (`evaluation.eval_requests`) in one collection. Its numbers, and the episodes."""
    requests = eval_requests(config.eval, tasks, label, num_samples=num_samples, without_tools=without_tools)
    started = time.monotonic()
    trajectories = collect(rollout, requests, timeout_s=config.rollout.collect_timeout_s, max_in_flight=config.eval.max_in_flight)
    duration_s = time.monotonic() - started
    return eval_result(trajectories) | speed(trajectories, duration_s), trajectories


class Collector:
    """stall_timeout_s: with no group of episodes complete and no job done for so long, StallError says who waits for whom."""

    def __init__(self, rollout: Rollout, stream: Stream, stall_timeout_s: float, say: Callable[[str], None]):
        self._rollout = rollout
        self._stream = stream
        self._stall_timeout_s = stall_timeout_s
        self._say = say
        self._evaluation: dict[str, Trajectory | None] = {}
        self._loading: tuple[int, Future[dict[str, float]]] | None = None  # version that is on its way to the engines
        # Of the weights that the engines have; after the first ones, what the last load has told.
        self.load_numbers: dict[str, float] = {"time/weight_sync_s": 0.0, "weights/policy_version": stream.loaded_version}
        self._awaited = ""
        self._began_at = self._told_at = self._moved_at = self._polled_at = time.monotonic()
        self._held_at = float("-inf")
        self._is_idle = True
        self.idle_s = 0.0  # time in which no episode was under way

    def evaluate(self, requests: list[EpisodeRequest]) -> None:
        """These ride along, and the next batch comes with them finished."""
        self._evaluation = {request.episode_id: None for request in requests}
        if requests:
            self._rollout.submit(requests)

    def batch(self) -> tuple[list[Trajectory], list[Trajectory]]:
        """(the next batch, the evaluation's episodes), once both are there."""
        batch = None
        self._wait_for("the next batch")
        self._pump(0)  # also where the batch is there already: a replaced engine may be waiting for its weights
        while (batch := batch or self._stream.next_batch()) is None or None in self._evaluation.values():
            if self._loading is None:
                self._pump(POLL_S)
            else:  # what has loaded releases slots, at once
                wait([self._loading[1]], POLL_BESIDE_S)
                self._pump(0)
        evaluated = [t for t in self._evaluation.values() if t is not None]
        self._evaluation = {}
        return batch, evaluated

    def load(self, version: int, job: Callable[[], dict[str, float]]) -> None:
        """The job brings weights of this version to the engines; slots are released once it has. Episodes go on, and so may the learner.
        What it raises, whatever is waited for next raises."""
        self.finish_loading()
        if self._rollout.concurrent:
            self._loading = version, in_thread(job)
        else:
            self._loaded(version, job())

    def finish_loading(self) -> None:
        """Waits for that, if it is under way."""
        if self._loading is not None:
            self.wait("the engines to load new weights", self._loading[1])
            self._note_loaded()

    def _note_loaded(self) -> None:
        if self._loading is not None and self._loading[1].done():
            (version, future), self._loading = self._loading, None
            self._loaded(version, future.result(timeout=0))

    def _loaded(self, version: int, numbers: dict[str, float]) -> None:
        self.load_numbers = numbers
        self._stream.loaded(version)

    def beside(self, what: str, job: Callable[[], T]) -> T:
        """The job's result, or what it raises; episodes go on meanwhile. what: names it to a person."""
        return self.wait(what, in_thread(job)) if self._rollout.concurrent else job()

    def wait(self, what: str, future: Future[T]) -> T:
        """The same, of a job that was begun before."""
        self._wait_for(what)
        while not self._is_done(future):
            try:
                self._pump(0)
            except LearnerLost as error:  # the run is about to go back to a checkpoint: what the job still writes must come before that
                if not wait([future], timeout=TELL_S).done:
                    self._say(f"{error}; waiting for {what} to end before the learner starts again")
                if not wait([future], timeout=self._stall_timeout_s).done:
                    late = f"{what} did not end within {self._stall_timeout_s:g} s (train.stall_timeout_s)"
                    raise StallError(f"{error}; and {late}") from None
                raise
        return future.result(timeout=0)

    def _is_done(self, future: Future[Any]) -> bool:
        """Within POLL_BESIDE_S, or as soon as the engines have loaded."""
        wait([future] if self._loading is None else [future, self._loading[1]], POLL_BESIDE_S, FIRST_COMPLETED)
        return future.done()

    def _pump(self, max_wait_s: float) -> None:
        """Takes in what has finished before it lets late groups go. A poll brings only a part of what finished while this thread was held
        up, so for HELD_S after that no group is late; and nothing could be seen to move meanwhile."""
        self.idle_s += time.monotonic() - self._polled_at if self._is_idle else 0.0
        self._note_loaded()
        num_completed = self._stream.num_completed
        finished = self._rollout.poll(max_wait_s)
        now = time.monotonic()
        if (held_s := now - self._polled_at) > HELD_S:
            self._held_at, self._moved_at = now, min(now, self._moved_at + held_s)
        of_evaluation = {t.request.episode_id: t for t in finished if t.request.episode_id in self._evaluation}
        self._evaluation |= of_evaluation
        self._stream.add(t for t in finished if t.request.episode_id not in of_evaluation)
        if of_evaluation or self._stream.num_completed > num_completed:  # not by episodes of groups that are then dropped as late
            self._moved_at = now
        if now - self._held_at > HELD_S and (late := self._stream.expire()):
            self._rollout.cancel(late)
        if admitted := self._stream.admit():
            self._rollout.submit(admitted)
        self._polled_at, self._is_idle = now, self._rollout.num_outstanding == 0
        self._watch(now)

    def _wait_for(self, what: str) -> None:
        self._awaited = what
        self._began_at = self._told_at = self._moved_at = time.monotonic()

    def _watch(self, now: float) -> None:
        if now - self._moved_at > self._stall_timeout_s:
            raise StallError(f"nothing has moved for {now - self._moved_at:.0f} s (train.stall_timeout_s), {self.describe()}")
        if now - self._told_at > TELL_S:
            self._told_at = now
            self._say(self.describe())

    def describe(self) -> str:
        """Who waits for whom."""
        missing = sum(t is None for t in self._evaluation.values())
        evaluation = f"; {missing} episodes of an evaluation are missing" if missing else ""
        loading = f"; weights of version {self._loading[0]} are on their way to the engines" if self._loading else ""
        waited_s = time.monotonic() - self._began_at
        awaited = f"waiting for {self._awaited} for {waited_s:.0f} s{loading}"
        return f"{awaited}. {self._stream.describe()}. {self._rollout.describe()}{evaluation}"


def in_thread(job: Callable[[], T]) -> Future[T]:
    """Runs it beside this thread; a daemon: after an error or Ctrl-C it may wait for a part that is gone, and must not hold up the exit."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
