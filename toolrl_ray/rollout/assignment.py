"""Which actor runs which episode: the pure part of collection, with neither Ray nor clocks.

Every request is in exactly one place: waiting or running on one actor, until it is handed back finished; so none is lost and none is kept
twice. An episode whose actor died, or that the harness could not run, goes back to waiting until its tries are used up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from toolrl_ray.errors import RolloutError, UserError
from toolrl_ray.types import EpisodeRequest, Trajectory

MAX_DESCRIBED = 8  # actors one by one


@dataclass(frozen=True)
class Outcome:
    """How one episode ended: with a trajectory, or with the reason why the harness could not run it, or with the mistake of a person,
    which no second try mends. era: see Assignment."""

    episode_id: str
    trajectory: Trajectory | None
    failure: str | None = None
    mistake: UserError | None = None
    era: int = 0


class Assignment:
    """absent: actors that get no work until they are `back`.

    era: travels with the requests and comes back with their outcomes; those of another era are dropped. So one that is late to be called
    off is not taken for the same episode asked for again.
    """

    def __init__(self, num_actors: int, max_tries: int, absent: Iterable[int] = ()):
        self._waiting: deque[EpisodeRequest] = deque()
        self._running: list[dict[str, EpisodeRequest]] = [{} for _ in range(num_actors)]
        self._absent = set(absent)
        self._ids: set[str] = set()
        self._tries: dict[str, int] = {}
        self._max_tries = max_tries
        self.era = 0
        self.num_rerun = 0  # episodes started again because their actor died or the harness failed

    def add(self, requests: Collection[EpisodeRequest]) -> None:
        for request in requests:
            if request.episode_id in self._ids:
                raise RolloutError(f"episode {request.episode_id} is asked for twice at once")
            self._ids.add(request.episode_id)
        self._waiting.extend(requests)

    @property
    def num_outstanding(self) -> int:
        return len(self._ids)

    @property
    def present(self) -> list[int]:
        return [actor for actor in range(len(self._running)) if actor not in self._absent]

    def num_running(self, actor: int) -> int:
        return len(self._running[actor])

    def running(self, actor: int) -> list[str]:
        return list(self._running[actor])

    def next_for(self, actor: int, max_running: int) -> list[EpisodeRequest]:
        """The requests to submit to this actor now, which then holds at most max_running. Waiting work is spread evenly over the actors
        that are present."""
        if actor in self._absent or not self._waiting:
            return []
        fair = -(-len(self._ids) // (len(self._running) - len(self._absent)))
        room = min(max_running, fair) - len(self._running[actor])
        chosen = [self._waiting.popleft() for _ in range(max(0, min(room, len(self._waiting))))]
        self._running[actor].update((request.episode_id, request) for request in chosen)
        return chosen

    def take(self, actor: int, outcomes: list[Outcome]) -> list[Trajectory]:
        """Book what an actor handed over; returns the trajectories that were waited for. Raises the UserError that one ended with."""
        finished = []
        for outcome in outcomes:
            if outcome.era != self.era:
                continue
            request = self._running[actor].pop(outcome.episode_id, None)
            if request is None:
                continue  # called off
            if outcome.mistake:
                raise outcome.mistake
            if outcome.trajectory is None:
                self._count_try(request, outcome.failure or "no reason given")
                self._waiting.appendleft(request)
            else:
                self._forget(outcome.episode_id)
                finished.append(outcome.trajectory)
        return finished

    def lost(self, actor: int, reason: str, num_begun: int) -> None:
        """The actor died: its episodes wait again, in their order and before all others, and it gets no work until `back`.

        num_begun: at most so many, the first of them, had begun. The others only queued there, and it costs them no try.
        """
        self._absent.add(actor)
        requests, self._running[actor] = list(self._running[actor].values()), {}
        for request in requests[:num_begun]:
            self._count_try(request, reason)
        self._waiting.extendleft(reversed(requests))

    def back(self, actor: int) -> None:
        self._absent.discard(actor)

    def cancel(self, episode_ids: Collection[str]) -> dict[int, list[str]]:
        """Forget these; those that run are returned, by their actor."""
        gone = set(episode_ids)
        self._waiting = deque(request for request in self._waiting if request.episode_id not in gone)
        running: dict[int, list[str]] = {}
        for actor, requests in enumerate(self._running):
            if here := [episode_id for episode_id in requests if episode_id in gone]:
                running[actor] = here
            for episode_id in here:
                del requests[episode_id]
        for episode_id in gone:
            self._forget(episode_id)
        return running

    def cancel_all(self) -> dict[int, list[str]]:
        """The same for all, and a new era begins."""
        self.era += 1
        return self.cancel(self._ids.copy())

    def _forget(self, episode_id: str) -> None:
        self._ids.discard(episode_id)
        self._tries.pop(episode_id, None)

    def _count_try(self, request: EpisodeRequest, reason: str) -> None:
        tries = self._tries[request.episode_id] = self._tries.get(request.episode_id, 1) + 1
        if tries > self._max_tries:
            raise RolloutError(
                f"episode {request.episode_id} of task {request.task.id} failed {self._max_tries} times (rollout.max_tries); last: {reason}"
            )
        self.num_rerun += 1

    def describe(self) -> str:
        running = [f"RolloutActor {i}{' (down)' if i in self._absent else ''}: {len(r)} running" for i, r in enumerate(self._running)]
        if len(running) > MAX_DESCRIBED:
            total = sum(map(len, self._running))
            running = [f"{total} running on {len(running)} RolloutActors, {len(self._absent)} of them down {sorted(self._absent)}"]
        return f"rollout: {len(self._ids)} episodes under way, {len(self._waiting)} of them waiting; {', '.join(running)}"
