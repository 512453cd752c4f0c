"""The learner's control plane towards the RolloutActors, over Ray. Every wait has a deadline, and what fails is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from toolrl_ray.errors import LearnerLost, WeightSyncError


class RayWeightClient:
    """vLLM's weight-sync protocol, fanned out to all RolloutActors. `policy_version` is stamped at `finish_weight_update`."""

    def __init__(self, actors: list[Any], timeout_s: float):
        self._actors = actors
        self._timeout_s = timeout_s
        self.policy_version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        # In an NCCL group rank 0 is the learner, and each engine has a rank of its own.
        infos = [{**init_info, "rank_offset": 1 + i} if "rank_offset" in init_info else init_info for i in range(len(self._actors))]
        refs = [actor.init_weight_transfer.remote(info) for actor, info in zip(self._actors, infos, strict=True)]
        self._all("init_weight_transfer", refs)

    def start_weight_update(self) -> None:
        self._all("start_weight_update", [actor.start_weight_update.remote() for actor in self._actors])

    def update_weights(self, update_info: Any) -> None:
        shared = ray.put(update_info)  # one copy in the object store, however many engines read it
        self._all("update_weights", [actor.update_weights.remote(shared) for actor in self._actors])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        version = self.policy_version if weight_version is None else int(weight_version)
        self._all("finish_weight_update", [actor.finish_weight_update.remote(version) for actor in self._actors])

    def _all(self, phase: str, refs: list[Any]) -> None:
        wait_all(phase, refs, self._timeout_s, replace=self._actors)


def wait_all(phase: str, refs: list[Any], timeout_s: float, who: str = "RolloutActor", replace: Sequence[Any] = ()) -> list[Any]:
    """The results of one phase from all actors. replace: those actors; one that does not answer is killed, for Ray to start it anew.

    Raises WeightSyncError naming the actor and the phase when one fails, dies or does not answer within `timeout_s`; LearnerLost, saying
    the same, for a LearnerActor that died or does not answer.
    """
    done, late = ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
    results = [_result(phase, who, i, ref, timeout_s) for i, ref in enumerate(refs) if ref in done]  # the first cause before its effects
    if late:
        indices = [i for i, ref in enumerate(refs) if ref in late]
        for i in indices if replace else []:
            ray.kill(replace[i], no_restart=False)
        kind = LearnerLost if who == "LearnerActor" else WeightSyncError
        raise kind(f"weight sync: {who} {indices} did not answer phase {phase} within {timeout_s:g} s (weights.timeout_s)")
    return results


def _result(phase: str, who: str, index: int, ref: Any, timeout_s: float) -> Any:
    try:
        return ray.get(ref, timeout=timeout_s)
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, WeightSyncError):
            raise cause from None
        kind = LearnerLost if who == "LearnerActor" and isinstance(error, RayActorError) else WeightSyncError
        reason = " ".join(str(cause).split())[:300]
        raise kind(f"weight sync: {who} {index} failed in phase {phase}: {type(cause).__name__}: {reason}") from error
