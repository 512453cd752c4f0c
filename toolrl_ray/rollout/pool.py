"""The driver's side of collection: hands requests to the RolloutActors, takes trajectories, replaces what dies.

Consumes: a list of requests. Waits for: `take` of each actor. Unblocked by: a finished episode, `TAKE_WAIT_S`, or the death
of the actor. An actor that dies is restarted by Ray, loads its engine, gets the current weights through `readmit`, and only
then gets work; meanwhile the others go on with its episodes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from toolrl_ray.config import RunConfig
from toolrl_ray.errors import RolloutError, ToolRLError
from toolrl_ray.rollout.assignment import Assignment
from toolrl_ray.types import EpisodeRequest, Trajectory

log = logging.getLogger(__name__)
TAKE_WAIT_S = 2.0
AHEAD = 2  # an actor is given so many times what it runs at once, so that it never waits for this process
UNRESPONSIVE_S = 120.0  # a process that does not answer `take` for so long is killed and replaced
MAX_RESTARTS_IN_A_ROW = 3  # of one actor, with no episode finished in between


def _start_error(index: int, error: RayError) -> ToolRLError:
    """A person's mistake as it is; anything else in one line, with the remote traceback in the log."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, ToolRLError):
        return cause
    log.debug("RolloutActor %d: %s", index, error)
    reason = " ".join(str(cause).split())[:500]
    return RolloutError(f"RolloutActor {index} could not load its engine: {type(cause).__name__}: {reason}")


class RolloutPool:
    """readmit: called when restarted engines are up, before they get work; brings every engine to the current weights.
    service_stats: the tools' own numbers, beside those that the actors' clients count."""

    def __init__(
        self, config: RunConfig, actors: list[Any], readmit: Callable[[], None], service_stats: Callable[[], dict[str, float]] = dict
    ):
        self._config = config
        self._actors = actors
        self._readmit = readmit
        self._service_stats = service_stats
        self._takes: dict[Any, tuple[int, float]] = {}  # pending `take` -> (actor, asked at)
        self._starts: dict[Any, tuple[int, float]] = {}  # pending `start` of a restarted actor -> (actor, asked at)
        self._restarts_in_a_row = [0] * len(actors)
        self._pids: list[int | None] = [None] * len(actors)
        self.num_restarts = 0
        self.num_rerun = 0

    def start(self) -> list[int]:
        """Load all engines that are not loaded, after a death too; returns their process ids.

        Raises RolloutError naming the actor that did not come up within rollout.start_timeout_s.
        """
        refs = [actor.start.remote() for actor in self._actors]
        deadline = time.monotonic() + self._config.rollout.start_timeout_s
        for i, ref in enumerate(refs):
            try:
                self._note(i, ray.get(ref, timeout=max(0.1, deadline - time.monotonic())))
            except GetTimeoutError:
                seconds = self._config.rollout.start_timeout_s
                raise RolloutError(f"RolloutActor {i} was not ready within {seconds:g} s (rollout.start_timeout_s)") from None
            except RayError as error:
                raise _start_error(i, error) from None
        return [pid for pid in self._pids if pid is not None]

    def _note(self, index: int, pid: int) -> None:
        self.num_restarts += self._pids[index] not in (None, pid)
        self._pids[index] = pid

    def collect(
        self,
        requests: list[EpisodeRequest],
        *,
        temperature: float,
        max_in_flight: int | None = None,
        on_trajectories: Callable[[list[Trajectory]], None] = lambda _: None,
    ) -> list[Trajectory]:
        """Run every request to its end; trajectories come back in the order of the requests.

        Raises RolloutError when rollout.collect_timeout_s is over, or when actors keep dying.
        """
        rollout = self._config.rollout
        in_flight = max_in_flight or rollout.max_in_flight
        book = Assignment(requests, len(self._actors), AHEAD * in_flight, rollout.max_tries)
        for index, _ in self._starts.values():
            book.lost(index, "still starting")
        deadline = time.monotonic() + rollout.collect_timeout_s
        while not book.done:
            if time.monotonic() > deadline:
                raise RolloutError(f"no full batch within {rollout.collect_timeout_s:g} s (rollout.collect_timeout_s): {book.describe()}")
            self._hand_out(book, temperature, in_flight)
            ready, _ = ray.wait([*self._takes, *self._starts], num_returns=1, timeout=TAKE_WAIT_S)
            for ref in ready:
                if ref in self._starts:
                    self._rejoin(ref, book)
                else:
                    on_trajectories(self._take(ref, book))
            self._kill_unresponsive()
        self.num_rerun += book.num_rerun
        return book.trajectories()

    def _hand_out(self, book: Assignment, temperature: float, in_flight: int) -> None:
        asked = {index for index, _ in self._takes.values()}
        for index, actor in enumerate(self._actors):
            if requests := book.next_for(index):
                actor.submit.remote(requests, temperature, in_flight)  # a death in between shows in `take`
            if book.num_running(index) and index not in asked:
                self._takes[actor.take.remote(TAKE_WAIT_S)] = (index, time.monotonic())

    def _take(self, ref: Any, book: Assignment) -> list[Trajectory]:
        index, _ = self._takes.pop(ref)
        try:
            outcomes = ray.get(ref, timeout=TAKE_WAIT_S)
        except (RayActorError, RayTaskError) as error:  # dead, or replaced by Ray while it had no work and not loaded yet
            self._lost(index, book, error)
            return []
        trajectories = book.take(index, outcomes)
        if trajectories:
            self._restarts_in_a_row[index] = 0
        return trajectories

    def _lost(self, index: int, book: Assignment, error: Exception) -> None:
        self._restarts_in_a_row[index] += 1
        reason = " ".join(str(error).split())[:300]
        if self._restarts_in_a_row[index] > MAX_RESTARTS_IN_A_ROW:
            raise RolloutError(f"RolloutActor {index} died {MAX_RESTARTS_IN_A_ROW} times in a row; last: {reason}")
        book.lost(index, reason)
        # Ray restarts the process; its engine has to be loaded again.
        self._starts[self._actors[index].start.remote()] = (index, time.monotonic())

    def _rejoin(self, ref: Any, book: Assignment) -> None:
        index, _ = self._starts.pop(ref)
        try:
            self._note(index, ray.get(ref, timeout=TAKE_WAIT_S))
        except RayActorError as error:
            return self._lost(index, book, error)
        except RayTaskError as error:
            raise _start_error(index, error) from None
        self._readmit()
        book.back(index)

    def _kill_unresponsive(self) -> None:
        now = time.monotonic()
        start_timeout_s = self._config.rollout.start_timeout_s
        for index, asked_at in self._starts.values():
            if now - asked_at > start_timeout_s:
                raise RolloutError(f"RolloutActor {index} did not come up again within {start_timeout_s:g} s (rollout.start_timeout_s)")
        for ref, (index, asked_at) in list(self._takes.items()):
            if now - asked_at > UNRESPONSIVE_S and not ray.wait([ref], timeout=0)[0]:
                log.warning("RolloutActor %d does not answer for %.0f s: replacing it", index, now - asked_at)
                ray.kill(self._actors[index], no_restart=False)
                self._takes[ref] = (index, now)  # its `take` ends with the actor's death

    def tool_stats(self) -> dict[str, float]:
        """Sums of the tool clients' counters over the actors that answer, and the service's own."""
        total: dict[str, float] = {}
        for ref in [actor.stats.remote() for actor in self._actors]:
            try:
                stats = ray.get(ref, timeout=10)
            except (RayError, GetTimeoutError):
                continue
            for key, value in stats.items():
                total[key] = total.get(key, 0) + value
        return total | self._service_stats()
