"""The driver's side of collection: hands requests to the RolloutActors, takes trajectories, replaces what dies.

Consumes: what `submit` is given. Waits for: `take` of each actor. Unblocked by: a finished episode, the deadline of `poll`, or the
death of an actor. An actor is present, or starting (after a death, or because the cluster had no room for it yet), or loaded and waiting
for the weights; only a present one gets work. Its episodes go to the others meanwhile, and the run goes on as long as one is present.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RaySystemError, RayTaskError

from toolrl_ray.config import RunConfig
from toolrl_ray.errors import RolloutError
from toolrl_ray.rollout.assignment import Assignment
from toolrl_ray.rollout.inbox import num_places
from toolrl_ray.rollout.process import process_of, start_error
from toolrl_ray.tools.stats import ClientCounts
from toolrl_ray.types import EpisodeRequest, Trajectory
from toolrl_ray.weights.client import RAISED, what_it_raised

log = logging.getLogger(__name__)
TAKE_WAIT_S = 2.0
IDLE_S = 0.05
PING_S = 10.0
FETCH_S = 30.0
STATS_S = 10.0
AHEAD = 2  # an actor is given so many times what it runs at once, so that it never waits for this process
LOOK_S = 10.0  # between two looks at actors that are starting
UNRESPONSIVE_S = 120.0  # a process that does not answer `take` for so long is killed and replaced
MAX_RESTARTS_IN_A_ROW = 3  # of one actor, with no episode finished in between


class RolloutPool:
    """actors: must come up before the run begins; those that `expect` is given join it when the cluster has room for them.
    readmit: brings loaded engines to the current weights before they get work; False when that has to wait.
    service_stats: the tools' own numbers, beside those that the actors' clients count.

    Everything but `reachable` belongs to one thread.
    """

    concurrent = True  # episodes go on while nobody polls

    def __init__(
        self,
        config: RunConfig,
        actors: list[Any],
        readmit: Callable[[], bool] = lambda: True,
        service_stats: Callable[[], dict[str, float]] = dict,
    ):
        self._config = config
        self._actors = actors
        self._readmit = readmit
        self._service_stats = service_stats
        self._max_in_flight = config.rollout.max_in_flight
        num_actors = max(len(actors), config.rollout.max_actors or 0)
        self._book = Assignment(num_actors, config.rollout.max_tries, absent=range(len(actors), num_actors))
        self._takes: dict[Any, tuple[int, float]] = {}  # pending `take` -> (actor, asked at)
        self._submits: dict[Any, int] = {}  # pending `submit` -> actor
        self._starts: dict[Any, tuple[int, float]] = {}  # pending `start` of an actor that is not up -> (actor, asked at)
        self._loading: dict[int, tuple[tuple[str, int], float]] = {}  # of those: actor -> (the process that is seen to load, since when)
        self._looked_at = 0.0  # at processes
        self._loaded: set[int] = set()  # up, but not yet given the current weights
        self._missed: deque[int] = deque()  # found dead by `reachable`
        self._told: set[int] = set()  # of those that are not ready for long, a person knows
        self._restarts_in_a_row = [0] * num_actors
        self._client_counts = ClientCounts()
        self.pids: list[int | None] = [None] * num_actors  # of their processes, as far as they are known
        self.num_restarts = 0

    @property
    def num_rerun(self) -> int:
        return self._book.num_rerun

    @property
    def num_outstanding(self) -> int:
        return self._book.num_outstanding

    def start(self) -> None:
        """Load the first engines. Raises RolloutError naming the actor that did not come up within rollout.start_timeout_s."""
        refs = [actor.start.remote() for actor in self._actors]
        timeout_s = self._config.rollout.start_timeout_s
        deadline = time.monotonic() + timeout_s
        for i, ref in enumerate(refs):
            try:
                self._note(i, ray.get(ref, timeout=max(0.1, deadline - time.monotonic())))
            except GetTimeoutError:
                raise RolloutError(f"RolloutActor {i} was not ready within {timeout_s:g} s (rollout.start_timeout_s)") from None
            except RayError as error:
                raise start_error(i, error) from None

    def expect(self, actors: list[Any]) -> None:
        """Further actors, which may never come."""
        now, first = time.monotonic(), len(self._actors)
        self._actors += actors
        self._starts |= {actor.start.remote(): (first + i, now) for i, actor in enumerate(actors)}

    def _note(self, index: int, pid: int) -> None:
        self.num_restarts += self.pids[index] not in (None, pid)
        self.pids[index] = pid

    def holds(self, actors: list[Any]) -> bool:
        """Whether all of these are up, as far as is known. May be called from another thread."""
        return {*actors} <= {self._actors[index] for index in self._up()}

    def _up(self) -> list[int]:
        return sorted({*self._book.present, *self._loaded})

    def reachable(self) -> list[Any]:
        """The actors whose engines are loaded, for a weight sync; may be called from another thread. One that does not answer is left out,
        and joins again as after any death. Waits for the first one, if none is there, as long as an actor may take to start."""
        up = self._up()
        here = self._answering({self._actors[index].alive.remote(): index for index in up}, len(up), PING_S)
        self._missed += (index for index in up if index not in here)
        if not here:
            starts = {actor.start.remote(): index for index, actor in enumerate(self._actors)}
            here = self._answering(starts, 1, self._config.rollout.start_timeout_s)
        return [self._actors[index] for index in here]

    def _answering(self, refs: dict[Any, int], count: int, timeout_s: float) -> list[int]:
        """Those who have told their process's id, once `count` of them have answered."""
        here = []
        for ref in ray.wait(list(refs), num_returns=count, timeout=timeout_s)[0] if refs else []:
            try:
                self._note(refs[ref], ray.get(ref, timeout=PING_S))
                here.append(refs[ref])
            except RayError:
                log.debug("RolloutActor %d is gone", refs[ref], exc_info=True)
        return sorted(here)

    def submit(self, requests: list[EpisodeRequest], *, max_in_flight: int | None = None) -> None:
        """max_in_flight: episodes that one engine samples at once, from now on; default rollout.max_in_flight."""
        self._max_in_flight = max_in_flight or self._config.rollout.max_in_flight
        self._book.add(requests)
        self._hand_out()

    def poll(self, max_wait_s: float = TAKE_WAIT_S) -> list[Trajectory]:
        """What has finished since the last call; waits for it at most `max_wait_s`.

        Raises RolloutError when actors keep dying, none has been there for rollout.start_timeout_s, or one cannot read its requests.
        """
        self._admit_loaded()
        self._hand_out()
        finished: list[Trajectory] = []
        if waiting := [*self._takes, *self._starts]:
            ray.wait(waiting, num_returns=1, timeout=max_wait_s)
            refs = [*waiting, *self._submits]  # a `submit` that is over is no reason to wake up: there is a `take` with it
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
            for ref in ready:
                if ref in self._starts:
                    self._rejoin(ref)
                elif ref in self._takes:
                    finished += self._take(ref)
                elif ref in self._submits:
                    self._submitted(ref)
        elif max_wait_s:
            time.sleep(min(max_wait_s, IDLE_S))
        self._kill_unresponsive()
        return finished

    def cancel(self, episode_ids: Collection[str]) -> None:
        self._call_off(self._book.era, self._book.cancel(episode_ids))

    def cancel_all(self) -> None:
        """Nothing that was submitted is handed back any more, even if the same episodes are submitted again."""
        self._call_off(self._book.era, self._book.cancel_all())

    def _call_off(self, era: int, running: dict[int, list[str]]) -> None:
        for index, episode_ids in running.items():
            self._actors[index].cancel.remote(episode_ids, era)

    def _admit_loaded(self) -> None:
        if self._loaded and self._readmit():
            for index in self._loaded:
                self._book.back(index)
            self._loaded = set()

    def _hand_out(self) -> None:
        while self._missed:  # of these none gets work before it has the weights
            index = self._missed.popleft()
            if index in self._book.present or index in self._loaded:
                self._lost(index, RolloutError("it did not answer at a weight sync"))
        asked = {index for index, _ in self._takes.values()}
        for index, actor in enumerate(self._actors):
            if requests := self._book.next_for(index, AHEAD * self._max_in_flight):
                self._submits[actor.submit.remote(requests, self._max_in_flight, self._book.era)] = index
            if self._book.num_running(index) and index not in asked:
                self._takes[actor.take.remote(TAKE_WAIT_S)] = (index, time.monotonic())

    def _submitted(self, ref: Any) -> None:
        index = self._submits.pop(ref)
        try:
            ray.get(ref, timeout=FETCH_S)
        except RayError as error:
            if isinstance(error, RayTaskError) and isinstance(error.cause, RaySystemError):  # the same whenever it is tried
                reason = str(error).strip().splitlines()[-1]
                raise RolloutError(f"RolloutActor {index} cannot read the requests for its episodes: {reason}") from None
            self._lost(index, error)

    def _take(self, ref: Any) -> list[Trajectory]:
        index, _ = self._takes.pop(ref)
        try:
            outcomes = ray.get(ref, timeout=FETCH_S)
        except RayError as error:  # dead, replaced by Ray while it had no work and not loaded yet, or its node is gone with what it had
            self._lost(index, error)
            return []
        trajectories = self._book.take(index, outcomes)
        if trajectories:
            self._restarts_in_a_row[index] = 0
        return trajectories

    def _lost(self, index: int, error: Exception) -> None:
        if index in (i for i, _ in self._starts.values()):
            return
        reason = what_it_raised(error) if isinstance(error, RAISED) else " ".join(str(error).split())[:300]
        self._call_off(self._book.era, {index: self._book.running(index)})  # it may be alive, but nothing of these may come from it
        self._submits = {ref: other for ref, other in self._submits.items() if other != index}
        self._loaded.discard(index)
        self._book.lost(index, reason, num_places(self._max_in_flight))
        if self._may_restart(index, reason):
            # Ray restarts the process, where and when there is room; its engine has to be loaded again.
            self._starts[self._actors[index].start.remote()] = (index, time.monotonic())

    def _may_restart(self, index: int, reason: str) -> bool:
        """Counts it. False where the actor is given up; raises RolloutError where there is no other."""
        self._restarts_in_a_row[index] += 1
        if self._restarts_in_a_row[index] <= MAX_RESTARTS_IN_A_ROW:
            log.warning("RolloutActor %d is lost and is started again: %s", index, reason)
            return True
        message = f"RolloutActor {index} died {MAX_RESTARTS_IN_A_ROW} times in a row; last: {reason}"
        if not self._book.present:
            raise RolloutError(message)
        log.warning("%s; the run goes on without it", message)
        return False

    def _rejoin(self, ref: Any) -> None:
        index, _ = self._starts.pop(ref)
        self._loading.pop(index, None)
        try:
            self._note(index, ray.get(ref, timeout=TAKE_WAIT_S))
        except RayError as error:  # what it raised; or its process died, or could not be made: no node, no runtime environment, no memory
            return self._lost(index, start_error(index, error) if isinstance(error, RAISED) else error)
        self._loaded.add(index)
        self._told.discard(index)

    def _kill_unresponsive(self) -> None:
        now, start_timeout_s = time.monotonic(), self._config.rollout.start_timeout_s
        self._kill_hung_starts(now, start_timeout_s)
        late = {index: now - asked_at for index, asked_at in self._starts.values() if now - asked_at > start_timeout_s}
        if not self._book.present and not self._loaded and not self._loading and 0 < len(self._starts) == len(late):
            index = min(late, key=late.__getitem__)
            raise RolloutError(f"RolloutActor {index} did not come up again within {start_timeout_s:g} s (rollout.start_timeout_s)")
        for index in late.keys() - self._told - self._loading.keys():
            self._told.add(index)
            log.warning("RolloutActor %d has no room in the cluster for %.0f s; the run goes on without it", index, late[index])
        for ref, (index, asked_at) in list(self._takes.items()):
            if now - asked_at > UNRESPONSIVE_S and not ray.wait([ref], timeout=0)[0]:
                log.warning("RolloutActor %d does not answer for %.0f s: replacing it", index, now - asked_at)
                ray.kill(self._actors[index], no_restart=False)
                self._takes[ref] = (index, now)  # its `take` ends with the actor's death

    def _kill_hung_starts(self, now: float, timeout_s: float) -> None:
        """Replaces those that have had a process for so long and are not ready."""
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        for ref, (index, _) in list(self._starts.items()):
            seen, since = self._loading.pop(index, (None, now))
            if (process := process_of(self._actors[index])) is None:
                continue
            since = since if process == seen else now
            self._loading[index] = process, since
            if now - since > timeout_s and not ray.wait([ref], timeout=0)[0]:
                del self._starts[ref], self._loading[index]
                ray.kill(self._actors[index], no_restart=False)
                if self._may_restart(index, f"it was not ready within {now - since:.0f} s (rollout.start_timeout_s)"):
                    self._starts[ref] = (index, now)  # Ray asks the new process again

    def describe(self) -> str:
        return self._book.describe()

    def tool_stats(self) -> dict[str, float]:
        """Sums of the tool clients' counters since the start, as far as they are known, and the service's own."""
        refs = {self._actors[index].stats.remote(): index for index in self._book.present}
        for ref in ray.wait(list(refs), num_returns=len(refs), timeout=STATS_S)[0] if refs else []:
            try:
                self._client_counts.answered(refs[ref], *ray.get(ref, timeout=FETCH_S))
            except RayError:
                continue
        return self._client_counts.total() | self._service_stats()
