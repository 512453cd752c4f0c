"""The whole loop in one process, with no Ray: `--in-process`. A breakpoint works anywhere in it.

The same episode loop, the same learner arithmetic and the same tools; transformers samples in place of vLLM, and plain
PyTorch steps in place of DeepSpeed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from toolrl_ray.config import RunConfig
from toolrl_ray.errors import EpisodeError
from toolrl_ray.learner.update import Learner
from toolrl_ray.parts import Parts
from toolrl_ray.rollout.inbox import Inbox
from toolrl_ray.rollout.load import load_codec, load_transformers_engine, make_call_format
from toolrl_ray.rollout.runner import EpisodeRunner
from toolrl_ray.tools.local import LocalTools
from toolrl_ray.types import EpisodeRequest, Trajectory


class InProcessRollout:
    concurrent = False  # episodes stand still while nobody polls
    num_restarts = 0
    num_rerun = 0

    def __init__(self, config: RunConfig, policy_dir: str):
        codec = load_codec(policy_dir)
        self.engine = load_transformers_engine(config, policy_dir, codec)
        self._config = config
        self._tools = LocalTools(config.tools)
        self._loop = asyncio.Runner()
        self._loop.run(self._tools.start())
        call_format = make_call_format(config, codec, self._tools.infos())
        self._inbox = Inbox()
        generate = self._inbox.sampling(self.engine.generate)
        runner = EpisodeRunner(config, generate, self._tools, codec, call_format)
        self._inbox.run = runner.run
        self._clock = runner.clock
        self._outstanding: set[str] = set()

    @property
    def num_outstanding(self) -> int:
        return len(self._outstanding)

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """What it returns. The clock of the deadlines goes only meanwhile: what an update between two calls takes, no episode can help."""

        async def timed() -> Any:
            self._clock.go()
            try:
                return await coroutine
            finally:
                self._clock.stop()

        return self._loop.run(timed())

    def submit(self, requests: list[EpisodeRequest], *, max_in_flight: int | None = None) -> None:
        async def start() -> None:
            self._inbox.submit(requests, max_in_flight or self._config.rollout.max_in_flight)

        self._outstanding |= {request.episode_id for request in requests}
        self._run(start())

    def poll(self, max_wait_s: float = 1.0) -> list[Trajectory]:
        outcomes = self._run(self._inbox.take(max_wait_s)) if self._outstanding else []
        trajectories = []
        for outcome in outcomes:
            if outcome.mistake:
                raise outcome.mistake
            if outcome.trajectory is None:
                raise EpisodeError(f"episode {outcome.episode_id} failed: {outcome.failure}")
            trajectories.append(outcome.trajectory)
        self._outstanding -= {outcome.episode_id for outcome in outcomes}
        return trajectories

    def cancel(self, episode_ids: Collection[str]) -> None:
        async def stop() -> None:
            self._inbox.cancel(list(episode_ids))

        self._run(stop())
        self._outstanding -= set(episode_ids)

    def cancel_all(self) -> None:
        self.cancel(self._outstanding.copy())

    def describe(self) -> str:
        return f"rollout: {self.num_outstanding} episodes under way in this process"

    def tool_stats(self) -> dict[str, Any]:
        return self._tools.stats()

    def close(self) -> None:
        self.cancel_all()
        self._loop.run(self._tools.close())
        self._loop.close()


class InProcessWeights:
    backend = "in_process"
    changing: AbstractContextManager[Any] = nullcontext()

    def __init__(self, rollout: InProcessRollout, learner: Learner):
        self._rollout, self._learner = rollout, learner

    def reconnect(self) -> None:
        """There is nothing in between."""

    def take(self, policy_version: int) -> Callable[[], dict[str, float]]:
        return partial(self.sync, policy_version)

    def sync(self, policy_version: int) -> dict[str, float]:
        started = time.monotonic()
        self._rollout.engine.load_weights(self._learner.named_weights())
        asyncio.run(self._rollout.engine.finish_weight_update(policy_version))
        return {"time/weight_sync_s": time.monotonic() - started, "weights/policy_version": policy_version}


def in_process_parts(config: RunConfig, policy_dir: str, *, learner: bool = True) -> Parts:
    torch.set_num_threads(config.learner.num_threads)
    rollout = InProcessRollout(config, policy_dir)
    if not learner:
        return Parts(rollout, None, None, rollout.close)
    trained = Learner(config, policy_dir, in_process=True)
    return Parts(rollout, trained, InProcessWeights(rollout, trained), rollout.close)
