"""The driver's side of the learner: one LearnerActor per rank, called together, each wait with a deadline."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from toolrl_ray.config import RunConfig
from toolrl_ray.errors import LearnerError, ToolRLError
from toolrl_ray.types import Trajectory


class LearnerGroup:
    def __init__(self, config: RunConfig, actors: list[Any]):
        self._config = config
        self._actors = actors

    def start(self) -> None:
        """Load the policy on every rank. Raises LearnerError naming ranks that are not ready within learner.start_timeout_s."""
        timeout_s = self._config.learner.start_timeout_s
        address = None
        if len(self._actors) > 1:
            address = self._all("rendezvous", [self._actors[0].rendezvous.remote()], timeout_s)[0]
        self._all("start", [actor.start.remote(address) for actor in self._actors], timeout_s)

    def update(self, trajectories: list[Trajectory]) -> dict[str, float]:
        batch = ray.put(trajectories)
        return self._all("update", [actor.update.remote(batch) for actor in self._actors], self._config.learner.update_timeout_s)[0]

    def save_policy(self, directory: str, tokenizer_dir: str) -> None:
        refs = [actor.save_policy.remote(directory, tokenizer_dir) for actor in self._actors]
        self._all("save_policy", refs, self._config.learner.update_timeout_s)

    def _all(self, what: str, refs: list[Any], timeout_s: float) -> list[Any]:
        # One rank that fails leaves the others waiting in a collective, so the first failure ends the wait.
        waiting = list(refs)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=timeout_s)
            if not done:
                late = [refs.index(ref) for ref in waiting]
                raise LearnerError(f"learner ranks {late} did not finish {what} within {timeout_s:g} s")
            self._result(what, refs.index(done[0]), done[0])
        return [self._result(what, rank, ref) for rank, ref in enumerate(refs)]

    @staticmethod
    def _result(what: str, rank: int, ref: Any) -> Any:
        try:
            return ray.get(ref, timeout=60)
        except RayTaskError as error:
            if isinstance(error.cause, ToolRLError):
                raise error.cause from None
            raise LearnerError(f"learner rank {rank} failed in {what}:\n{error}") from None
        except (RayError, GetTimeoutError) as error:
            raise LearnerError(f"learner rank {rank} died in {what}: {' '.join(str(error).split())[:300]}") from None
