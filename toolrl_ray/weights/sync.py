"""The driver's weight sync: pause the engines, bring them the learner's weights, resume. Each phase has a deadline that names it.

Consumes: the learner's weights at a policy version. Waits for: the learner ranks and every RolloutActor. Unblocked by: their
answers, their death, or weights.timeout_s. Episodes that are under way stay where they are and go on by the new weights, every token with
the version that sampled it. What becomes of the engines' caches, which the weights before have computed, weights.kv_cache says.

Through the object store the learner only packs its weights, and is free for its next update while the engines take up the copy. With
nccl and ipc it sends them itself, and is free when all engines have them.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from toolrl_ray.config import RunConfig
from toolrl_ray.errors import WeightSyncError
from toolrl_ray.weights.client import RayWeightClient, wait_all

log = logging.getLogger(__name__)
MAX_TRIES = 3
READMIT_S = 2.0  # that a readmission waits for a load; few take longer, and whoever asks has other things to do
T = TypeVar("T")


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

    changing: held, from before an update begins until its weights are taken, by whoever does that. Meanwhile nobody else may take any:
    the learner's weights would be taken for those of another version.
    """

    def __init__(self, config: RunConfig, pool: Any, learners: list[Any]):
        self._timeout_s = config.weights.timeout_s
        self._pool = pool
        self._learners = learners
        self._client = RayWeightClient([], self._timeout_s)
        self.backend = select_backend(config)
        self.policy_version = 0
        self.changing = threading.RLock()
        self._loading = threading.RLock()  # held by whoever brings weights to the engines; taken after `changing`, never before
        self._num_syncs = 0
        self._connected = self._closed = False

    def connect(self) -> None:
        """Rendezvous of the learner and all engines that are up; again after one was lost or has joined."""
        self._client = RayWeightClient(self._pool.reachable(), self._timeout_s)
        if not self._client.actors:
            raise WeightSyncError("weight sync: no RolloutActor answers")
        if self.backend == "object_store":
            self._client.init_weight_transfer_engine({})
        else:
            refs = [learner.connect_weights.remote(self.backend, self._client.actors) for learner in self._learners]
            wait_all("connect", refs, 2 * self._timeout_s, "LearnerActor")  # the engines' answers have timeout_s
        self._connected = True

    def sync(self, policy_version: int) -> dict[str, float]:
        """Bring every engine that is up to the learner's current weights.

        Raises WeightSyncError after MAX_TRIES attempts; between them, engines that died are left out, to be readmitted later.
        """
        with self.changing:
            self._num_syncs += 1
            return self.take(policy_version)()

    def take(self, policy_version: int) -> Callable[[], dict[str, float]]:
        """Take the learner's weights as they are. The job that comes back, to be called once, brings every engine that is up to them, and
        raises as `sync` does. It leaves the engines alone once a `sync` has followed, whose weights are as new, or of another history.
        """
        with self.changing:
            started = time.monotonic()
            self.policy_version = policy_version
            payload = self._try(self._pack) if self.backend == "object_store" else self._load(self._send)
            num_syncs, taken_s = self._num_syncs, time.monotonic() - started

        def job() -> dict[str, float]:
            started = time.monotonic()
            with self._loading:
                if payload is not None and num_syncs == self._num_syncs:
                    self._load(partial(self._hand_out, payload, policy_version))
            return {"time/weight_sync_s": taken_s + time.monotonic() - started, "weights/policy_version": policy_version}

        return job

    def readmit(self) -> bool:
        """Connect to engines that have come up and bring all to the current version. False, and nothing done, while `changing` is held.
        A load is waited for, but not long, since one may be under way whenever `changing` is free."""
        if not self.changing.acquire(blocking=False):
            return False
        try:
            if not self._loading.acquire(timeout=READMIT_S):
                return False
            try:
                self._connected = False
                self.sync(self.policy_version)
            finally:
                self._loading.release()
            return True
        finally:
            self.changing.release()

    def reconnect(self) -> None:
        """The learner's processes are new ones."""
        self._connected = False

    def close(self) -> None:
        """The actors are about to be taken down: what fails from now on fails for that, and is not tried again."""
        self._closed = True

    def _pack(self) -> Any:
        """A reference to the first rank's weights, which stay where they are until an engine asks for them."""
        refs = [learner.pack_weights.options(num_returns=2).remote() for learner in self._learners]
        wait_all("pack", [done for done, _ in refs], self._timeout_s, "LearnerActor")
        return refs[0][1]

    def _hand_out(self, payload: Any, policy_version: int) -> None:
        self._client.start_weight_update()
        self._client.update_weights(payload)
        self._client.finish_weight_update(str(policy_version))

    def _send(self) -> None:
        refs = [learner.send_weights.remote(self.policy_version) for learner in self._learners]
        wait_all("send", refs, 4 * self._timeout_s, "LearnerActor")  # init, start, update and finish have timeout_s each

    def _load(self, send: Callable[[], None]) -> None:
        """An engine whose update broke off is of no version at all, and stays frozen until the next attempt has come through."""

        def load() -> None:
            if not self._connected or not self._pool.holds(self._client.actors):  # one that starts again would hold up the others
                self.connect()
            actors = self._client.actors
            wait_all("pause", [actor.pause.remote() for actor in actors], self._timeout_s, replace=actors)
            send()
            wait_all("resume", [actor.resume.remote() for actor in actors], self._timeout_s, replace=actors)

        with self._loading:
            self._try(load)

    def _try(self, action: Callable[[], T]) -> T:
        for attempt in itertools.count(1):
            try:
                return action()
            except WeightSyncError as error:
                self._connected = False
                if attempt == MAX_TRIES or self._closed:
                    raise
                log.warning("%s; trying again (%d of %d)", error, attempt + 1, MAX_TRIES)
