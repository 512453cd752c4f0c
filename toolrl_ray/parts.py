"""What a run is made of, by what it does: `cluster.py` builds it on Ray, `in_process.py` in this process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from toolrl_ray.collector import Rollout
from toolrl_ray.types import Trajectory


class Learner(Protocol):
    """save_state snapshots at once and writes behind; finish_save waits for that. See learner/state.py."""

    def update(self, trajectories: list[Trajectory]) -> dict[str, float]: ...
    def save_policy(self, directory: str, tokenizer_dir: str) -> None: ...
    def save_state(self, directory: str) -> None: ...
    def finish_save(self) -> None: ...
    def load_state(self, directory: str) -> None: ...
    def restart(self) -> None: ...


class Weights(Protocol):
    """changing: held from before an update until its weights are taken. take: as they are now; the job that comes back brings them to the
    engines, and the learner may change them meanwhile. sync: both at once. The numbers are of the weights that the engines then have."""

    backend: str
    changing: AbstractContextManager[Any]

    def take(self, policy_version: int) -> Callable[[], dict[str, float]]: ...
    def sync(self, policy_version: int) -> dict[str, float]: ...
    def reconnect(self) -> None: ...


@dataclass
class Parts:
    """What a run is made of. learner and weights are None for an evaluation."""

    rollout: Rollout
    learner: Learner | None
    weights: Weights | None
    close: Callable[[], None]
