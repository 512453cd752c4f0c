"""Which actor runs which episode: the pure part of collection, with neither Ray nor clocks.

Every request is in exactly one place: waiting, running on one actor, or finished; so none is lost and none is kept twice.
An episode whose actor died, or that the harness could not run, goes back to waiting until its tries are used up.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from toolrl_ray.errors import RolloutError
from toolrl_ray.types import EpisodeRequest, Trajectory


@dataclass(frozen=True)
class Outcome:
    """How one episode ended: with a trajectory, or with the reason why the harness could not run it."""

    episode_id: str
    trajectory: Trajectory | None
    failure: str | None = None


class Assignment:
    def __init__(self, requests: list[EpisodeRequest], num_actors: int, max_in_flight: int, max_tries: int):
        """max_in_flight: requests that one actor holds at once."""
        self._order = [request.episode_id for request in requests]
        if len(set(self._order)) != len(self._order):
            raise RolloutError("two requests of one collection share an episode id")
        self._waiting = deque(requests)
        self._running: list[dict[str, EpisodeRequest]] = [{} for _ in range(num_actors)]
        self._absent: set[int] = set()
        self._finished: dict[str, Trajectory] = {}
        self._tries: dict[str, int] = {}
        self._max_in_flight = max_in_flight
        self._max_tries = max_tries
        self.num_rerun = 0  # episodes started again because their actor died or the harness failed

    @property
    def done(self) -> bool:
        return len(self._finished) == len(self._order)

    def num_running(self, actor: int) -> int:
        return len(self._running[actor])

    def next_for(self, actor: int) -> list[EpisodeRequest]:
        """The requests to submit to this actor now. Waiting work is spread evenly over the actors that are present."""
        if actor in self._absent or not self._waiting:
            return []
        present = len(self._running) - len(self._absent)
        fair = -(-(len(self._waiting) + sum(map(len, self._running))) // present)
        room = min(self._max_in_flight, fair) - len(self._running[actor])
        chosen = [self._waiting.popleft() for _ in range(max(0, min(room, len(self._waiting))))]
        self._running[actor].update((request.episode_id, request) for request in chosen)
        return chosen

    def take(self, actor: int, outcomes: list[Outcome]) -> list[Trajectory]:
        """Book what an actor handed over; returns the trajectories that are new."""
        new = []
        for outcome in outcomes:
            request = self._running[actor].pop(outcome.episode_id, None)
            if request is None:
                continue  # of an earlier collection that was given up
            if outcome.trajectory is None:
                self._again(request, outcome.failure or "no reason given")
            else:
                self._finished[outcome.episode_id] = outcome.trajectory
                new.append(outcome.trajectory)
        return new

    def lost(self, actor: int, reason: str) -> None:
        """The actor died: its episodes wait again, and it gets no work until `back`."""
        self._absent.add(actor)
        requests, self._running[actor] = self._running[actor], {}
        for request in requests.values():
            self._again(request, reason)

    def back(self, actor: int) -> None:
        self._absent.discard(actor)

    def _again(self, request: EpisodeRequest, reason: str) -> None:
        tries = self._tries[request.episode_id] = self._tries.get(request.episode_id, 1) + 1
        if tries > self._max_tries:
            raise RolloutError(
                f"episode {request.episode_id} of task {request.task.id} failed {self._max_tries} times (rollout.max_tries); last: {reason}"
            )
        self.num_rerun += 1
        self._waiting.appendleft(request)

    def trajectories(self) -> list[Trajectory]:
        """The finished trajectories in the order of the requests."""
        return [self._finished[episode_id] for episode_id in self._order]

    def describe(self) -> str:
        running = ", ".join(
            f"RolloutActor {i}{' (down)' if i in self._absent else ''}: {len(r)} running" for i, r in enumerate(self._running)
        )
        return f"{len(self._finished)} of {len(self._order)} episodes finished, {len(self._waiting)} waiting; {running}"
