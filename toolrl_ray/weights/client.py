"""The learner's control plane towards the RolloutActors, over Ray. Every wait has a deadline, and what fails is named."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError, UnserializableException

from toolrl_ray.errors import LearnerLost, NotLoaded, UserError, WeightSyncError

GET_S = 10.0  # for an answer that is there
AFTER_FAILURE_S = 10.0  # after one of a collective failed: for the others, which may be done soon or wait for it for ever

# What an actor that lives has raised, the second of a class that does not unpickle here. Any other RayError is the loss of the actor.
RAISED = (RayTaskError, UnserializableException)
# Of these, what is no fault of the engine: what it was to load is nowhere any more; it is still starting.
NO_FAULT = (ObjectLostError, NotLoaded)


def what_it_raised(error: RayError) -> str:
    """`CLASS: MESSAGE`, in one line."""
    if isinstance(error, UnserializableException):
        return str(error).strip().splitlines()[-1][:300]  # of the remote traceback
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"


class RayWeightClient:
    """vLLM's weight-sync protocol, fanned out to all RolloutActors. policy_version: of a `finish_weight_update` that names none."""

    def __init__(self, actors: list[Any], timeout_s: float):
        self.actors = actors
        self._timeout_s = timeout_s
        self._in_one_collective = False  # with the learner, when they connect and take weights
        self.policy_version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        # In an NCCL group rank 0 is the learner, and each engine has a rank of its own.
        self._in_one_collective = "rank_offset" in init_info
        infos = [{**init_info, "rank_offset": 1 + i} if self._in_one_collective else init_info for i in range(len(self.actors))]
        refs = [actor.init_weight_transfer.remote(info) for actor, info in zip(self.actors, infos, strict=True)]
        self._all("init_weight_transfer", refs, self._in_one_collective)

    def start_weight_update(self) -> None:
        self._all("start_weight_update", [actor.start_weight_update.remote() for actor in self.actors])

    def update_weights(self, update_info: Any) -> None:
        """update_info: as such or by reference; there is one copy in the object store, however many engines read it."""
        shared = update_info if isinstance(update_info, ray.ObjectRef) else ray.put(update_info)
        self._all("update_weights", [actor.update_weights.remote(shared) for actor in self.actors], self._in_one_collective)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        version = self.policy_version if weight_version is None else int(weight_version)
        self._all("finish_weight_update", [actor.finish_weight_update.remote(version) for actor in self.actors])

    def _all(self, phase: str, refs: list[Any], is_collective: bool = False) -> None:
        wait_all(phase, refs, self._timeout_s, replace=self.actors, is_collective=is_collective)


def wait_all(
    phase: str,
    refs: list[Any],
    timeout_s: float,
    who: str = "RolloutActor",
    replace: Sequence[Any] = (),
    is_collective: bool = False,
) -> list[Any]:
    """The results of one phase from all actors. replace: those actors; one that does not answer is killed, for Ray to start it anew, and so
    is one that fails where others do not: what all fail in is no fault of theirs, nor is it one to have only just been started.

    Raises WeightSyncError naming the actor and the phase when one fails, dies or does not answer within `timeout_s`; LearnerLost, saying
    the same, for a LearnerActor that died or does not answer, or whose node has gone with the weights that it packed. For learners, and
    for engines where the phase is a collective, the first failure ends the wait soon: the others wait for the one that failed. Elsewhere
    engines are independent, and one that is only slower must not be killed.
    """
    is_collective = is_collective or who == "LearnerActor"
    if is_collective:
        done, late = _until_one_fails(refs, timeout_s)
    else:
        done, late = ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
    results, failed = [], {}
    for i, ref in enumerate(refs):
        try:
            if ref in done:
                results.append(ray.get(ref, timeout=GET_S))
        except RayError as error:
            failed[i] = error
    silent = [i for i, ref in enumerate(refs) if ref in late]
    own = [i for i, error in failed.items() if isinstance(error, RAISED) and not isinstance(getattr(error, "cause", None), NO_FAULT)]
    alone = own if len(failed) < len(refs) else []
    for i in [*silent, *alone] if replace else []:
        ray.kill(replace[i], no_restart=False)
    if failed:  # the first cause before its effects
        i, error = next(iter(failed.items()))
        failure = _failure(phase, who, i, error)
        if silent and is_collective:
            kind = LearnerLost if who == "LearnerActor" else type(failure)
            failure = kind(f"{failure}; and {who} {silent} did not come out of phase {phase} after that")
        raise failure from error
    if silent:
        kind = LearnerLost if who == "LearnerActor" else WeightSyncError
        raise kind(f"weight sync: {who} {silent} did not answer phase {phase} within {timeout_s:g} s (weights.timeout_s)")
    return results


def _until_one_fails(refs: list[Any], timeout_s: float) -> tuple[list[Any], list[Any]]:
    """As `ray.wait` for all, but after a failure the others have no more than AFTER_FAILURE_S."""
    done: list[Any] = []
    late, give_up = refs, time.monotonic() + timeout_s
    while late:
        some, late = ray.wait(late, num_returns=1, timeout=max(0.0, give_up - time.monotonic()))
        if not some:
            break
        done += some
        try:
            ray.get(some[0], timeout=GET_S)
        except RayError:
            give_up = min(give_up, time.monotonic() + AFTER_FAILURE_S)
    return done, late


def _failure(phase: str, who: str, index: int, error: RayError) -> Exception:
    if isinstance(cause := getattr(error, "cause", None), ObjectLostError):
        return LearnerLost(f"weight sync: the packed weights were gone, with their node, when {who} {index} came to load them")
    if isinstance(cause, (WeightSyncError, UserError)):
        return cause
    kind = LearnerLost if who == "LearnerActor" and not isinstance(error, RAISED) else WeightSyncError
    return kind(f"weight sync: {who} {index} failed in phase {phase}: {what_it_raised(error)}")
