"""The driver's side of the learner: one LearnerActor per rank, called together, each wait with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from toolrl_ray.config import RunConfig
from toolrl_ray.errors import LearnerError, LearnerLost, ToolRLError
from toolrl_ray.types import Trajectory
from toolrl_ray.weights.client import RAISED

DEATH_SHOWS_S = 20.0  # so long after a failure of one rank the death of another, which caused it, may become known


class LearnerGroup:
    """make_actors: creates the LearnerActors, in the order of their ranks.

    actors: always the same list, refilled by `restart`. Every method raises LearnerLost, after which only `restart` helps, when a rank
    died or was not done in time, and what the learner raised (a LearnerError where that was no error of the project's) otherwise.
    """

    def __init__(self, config: RunConfig, make_actors: Callable[[], list[Any]]):
        self._config = config
        self._make_actors = make_actors
        self.actors = make_actors()

    def start(self) -> None:
        """Load the policy on every rank, within learner.start_timeout_s."""
        timeout_s = self._config.learner.start_timeout_s
        address = None
        if len(self.actors) > 1:
            address = self._all("rendezvous", [self.actors[0].rendezvous.remote()], timeout_s)[0]
        self._all("start", [actor.start.remote(address) for actor in self.actors], timeout_s)

    def restart(self) -> None:
        """New processes in the place of all that are left, with the initial policy; follow with `load_state`."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors[:] = self._make_actors()
        self.start()

    def update(self, trajectories: list[Trajectory]) -> dict[str, float]:
        return self._call("update", ray.put(trajectories))[0]

    def save_policy(self, directory: str, tokenizer_dir: str) -> None:
        self._call("save_policy", directory, tokenizer_dir)

    def save_state(self, directory: str) -> None:
        self._call("save_state", directory)

    def finish_save(self) -> None:
        self._call("finish_save")

    def load_state(self, directory: str) -> None:
        self._call("load_state", directory)

    def _call(self, method: str, *args: Any) -> list[Any]:
        refs = [getattr(actor, method).remote(*args) for actor in self.actors]
        return self._all(method, refs, self._config.learner.update_timeout_s)

    def _all(self, what: str, refs: list[Any], timeout_s: float) -> list[Any]:
        # One rank that fails leaves the others waiting in a collective, so the first failure ends the wait.
        waiting, give_up = list(refs), time.monotonic() + timeout_s
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, give_up - time.monotonic()))
            if not done:
                late = [refs.index(ref) for ref in waiting]
                raise LearnerLost(f"learner ranks {late} did not finish {what} within {timeout_s:g} s")
            try:
                self._result(what, refs.index(done[0]), done[0])
            except LearnerLost:
                raise
            except ToolRLError:
                self._raise_if_lost(what, refs)
                raise
        return [self._result(what, rank, ref) for rank, ref in enumerate(refs)]

    def _raise_if_lost(self, what: str, refs: list[Any]) -> None:
        """A rank that dies in a collective makes the others fail in it, and their failure may be known first."""
        for ref in ray.wait(refs, num_returns=len(refs), timeout=DEATH_SHOWS_S)[0]:
            try:
                self._result(what, refs.index(ref), ref)
            except LearnerLost:
                raise
            except ToolRLError:
                continue

    @staticmethod
    def _result(what: str, rank: int, ref: Any) -> Any:
        try:
            return ray.get(ref, timeout=60)
        except RAISED as error:
            if isinstance(cause := getattr(error, "cause", None), ToolRLError):
                raise cause from None
            raise LearnerError(f"learner rank {rank} failed in {what}:\n{error}") from None
        except (RayError, GetTimeoutError) as error:
            raise LearnerLost(f"learner rank {rank} died in {what}: {' '.join(str(error).split())[:300]}") from None
