"""The whole loop in one process, with no Ray: `--in-process`. A breakpoint works anywhere in it.

The same episode loop, the same learner arithmetic and the same tools; transformers samples in place of vLLM, and plain
PyTorch steps in place of DeepSpeed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import torch

from toolrl_ray.config import RunConfig
from toolrl_ray.driver import Parts
from toolrl_ray.errors import EpisodeError
from toolrl_ray.learner.update import Learner
from toolrl_ray.rollout.load import load_codec, load_transformers_engine, make_call_format
from toolrl_ray.rollout.runner import EpisodeRunner
from toolrl_ray.tools.local import LocalTools
from toolrl_ray.types import EpisodeRequest, Trajectory


class InProcessRollout:
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
        self._runner = EpisodeRunner(config, self.engine.generate, self._tools, codec, call_format)

    def collect(
        self,
        requests: list[EpisodeRequest],
        *,
        temperature: float,
        max_in_flight: int | None = None,
        on_trajectories: Callable[[list[Trajectory]], None] = lambda _: None,
    ) -> list[Trajectory]:
        return self._loop.run(self._collect(requests, temperature, max_in_flight or self._config.rollout.max_in_flight, on_trajectories))

    async def _collect(
        self, requests: list[EpisodeRequest], temperature: float, max_in_flight: int, on_trajectories: Callable[[list[Trajectory]], None]
    ) -> list[Trajectory]:
        room = asyncio.Semaphore(max_in_flight)

        async def one(request: EpisodeRequest) -> Trajectory:
            async with room:
                try:
                    trajectory = await self._runner.run(request, temperature)
                except Exception as error:
                    raise EpisodeError(f"episode {request.episode_id} of task {request.task.id} failed") from error
                on_trajectories([trajectory])
                return trajectory

        return list(await asyncio.gather(*(one(request) for request in requests)))

    def tool_stats(self) -> dict[str, Any]:
        return self._tools.stats()

    def close(self) -> None:
        self._loop.run(self._tools.close())
        self._loop.close()


class InProcessWeights:
    backend = "in_process"

    def __init__(self, rollout: InProcessRollout, learner: Learner):
        self._rollout, self._learner = rollout, learner

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
