"""The driver's weight sync: pause the engines, let the learner send, resume. Each phase has a deadline that names it.

Consumes: the learner's weights at a policy version. Waits for: the learner ranks and every RolloutActor. Unblocked by: their
answers, their death, or weights.timeout_s. Episodes that are under way stay where they are and go on by the new weights, every token with
the version that sampled it. What becomes of the engines' caches, which the weights before have computed, weights.kv_cache says.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from toolrl_ray.config import RunConfig
from toolrl_ray.errors import WeightSyncError
from toolrl_ray.weights.client import wait_all

log = logging.getLogger(__name__)
MAX_TRIES = 3


def select_backend(config: RunConfig) -> str:
    """weights.backend, or for "auto": ipc when learner and engine share a GPU, nccl between GPUs, else object_store."""
    if config.weights.backend != "auto":
        return config.weights.backend
    if config.rollout.num_gpus == 0 or config.learner.num_gpus == 0 or config.rollout.engine != "vllm":
        return "object_store"
    return "ipc" if shares_gpu(config) else "nccl"


def shares_gpu(config: RunConfig) -> bool:
    """Whether one RolloutActor and one LearnerActor ask for shares of the same GPU."""
    rollout, learner = config.rollout, config.learner
    one_each = max(rollout.num_actors, rollout.max_actors or 1) == 1 and learner.num_ranks == 1
    return one_each and rollout.num_gpus > 0 and learner.num_gpus > 0 and rollout.num_gpus + learner.num_gpus <= 1


class WeightSync:
    """pool: the RolloutPool. learners: LearnerActor handles, rank order; the list may be refilled by others.

    changing: held, from before an update begins until its weights are synced, by whoever does that. Meanwhile nobody else may send:
    the learner's weights would be taken for those of another version.
    """

    def __init__(self, config: RunConfig, pool: Any, learners: list[Any]):
        self._config = config
        self._pool = pool
        self._actors: list[Any] = []
        self._learners = learners
        self.backend = select_backend(config)
        self.policy_version = 0
        self.changing = threading.RLock()
        self._connected = False

    def connect(self) -> None:
        """Rendezvous of the learner and all engines that are up; again after one was lost or has joined."""
        self._actors = self._pool.reachable()
        refs = [learner.connect_weights.remote(self.backend, self._actors) for learner in self._learners]
        wait_all("connect", refs, 2 * self._config.weights.timeout_s, "LearnerActor")  # the engines' answers have timeout_s
        self._connected = True

    def sync(self, policy_version: int) -> dict[str, float]:
        """Bring every engine that is up to the learner's current weights.

        Raises WeightSyncError after MAX_TRIES attempts; between them, engines that died are left out, to be readmitted later.
        """
        with self.changing:
            self.policy_version = policy_version
            started = time.monotonic()
            for attempt in range(1, MAX_TRIES + 1):
                try:
                    if not self._connected:
                        self.connect()
                    self._sync_once()
                    break
                except WeightSyncError as error:
                    self._connected = False
                    if attempt == MAX_TRIES:
                        raise
                    log.warning("%s; trying again (%d of %d)", error, attempt + 1, MAX_TRIES)
        return {"time/weight_sync_s": time.monotonic() - started, "weights/policy_version": policy_version}

    def readmit(self) -> bool:
        """Connect to engines that have come up and bring all to the current version. False, and nothing done, while `changing` is held."""
        if not self.changing.acquire(blocking=False):
            return False
        try:
            self._connected = False
            self.sync(self.policy_version)
            return True
        finally:
            self.changing.release()

    def reconnect(self) -> None:
        """The learner's processes are new ones."""
        self._connected = False

    def _sync_once(self) -> None:
        """An engine whose update broke off is of no version at all, and stays frozen until the next attempt has come through."""
        timeout_s = self._config.weights.timeout_s
        wait_all("pause", [actor.pause.remote() for actor in self._actors], timeout_s, replace=self._actors)
        refs = [learner.send_weights.remote(self.policy_version) for learner in self._learners]
        wait_all("send", refs, 4 * timeout_s, "LearnerActor")  # init, start, update and finish have timeout_s each
        wait_all("resume", [actor.resume.remote() for actor in self._actors], timeout_s, replace=self._actors)
