"""RolloutActor: a Ray shell around an engine. Every episode is a coroutine; finished ones are handed over in `take`."""

from __future__ import annotations

import asyncio
import gc
import os
from contextlib import suppress
from typing import Any

import ray

from toolrl_ray.config import RunConfig
from toolrl_ray.errors import ConfigError, NotLoaded, RolloutError
from toolrl_ray.rollout.assignment import Outcome
from toolrl_ray.rollout.inbox import Inbox
from toolrl_ray.rollout.load import load_call_format, load_codec, load_engine
from toolrl_ray.rollout.runner import EpisodeRunner
from toolrl_ray.tasks.module import task_module
from toolrl_ray.tools.serve_client import ToolClient
from toolrl_ray.types import EpisodeRequest

TELL_S = 0.5  # that a process without its engine lives on, so that its answers arrive


class RolloutActor:
    """Created with `ray.remote`; `start` must be called first, and again after each restart by Ray."""

    def __init__(self, config: RunConfig, policy_dir: str, weight_backend: str, tools_app: str):
        self._config = config
        self._policy_dir = policy_dir
        self._weight_backend = weight_backend
        self._tools_app = tools_app
        self._starting = asyncio.Lock()
        self._inbox = Inbox()
        with suppress(ConfigError):  # which `start` raises
            task_module(config.task)  # requests with tasks of a class of its own unpickle only where it is loaded

    @ray.method(max_task_retries=-1)  # waits for Ray to restart the process; the caller sets the deadline
    async def start(self) -> int:
        """Load the engine unless it is loaded; returns this process's id. The policy in `policy_dir` is version 0."""
        async with self._starting:
            if hasattr(self, "_engine"):
                try:
                    await self._engine.check_alive()
                except RolloutError:
                    await asyncio.Event().wait()  # for the end of this process: Ray asks the next one
            if hasattr(self, "_runner"):
                return os.getpid()
            codec = load_codec(self._policy_dir)
            if not hasattr(self, "_engine"):  # it is there where a start before has failed at what follows
                self._engine = load_engine(self._config, self._policy_dir, codec, self._weight_backend, self._engine_is_lost)
            await self._engine.ready(0)
            self._tools = ToolClient(self._tools_app, self._config.tools)
            call_format = await load_call_format(self._config, codec, self._tools.infos)
            generate = self._inbox.sampling(self._engine.generate)
            self._runner = EpisodeRunner(self._config, generate, self._tools, codec, call_format, self._engine.check_alive)
            self._inbox.run = self._runner.run
            # What imports left behind lives as long as the process: going through it stalls every episode for a quarter of a second.
            gc.collect()
            gc.freeze()
            return os.getpid()

    def _engine_is_lost(self, error: RolloutError) -> None:
        """Without its engine this process is of no use: `take` tells why, and Ray replaces it."""
        self._inbox.break_off(error)
        asyncio.get_running_loop().call_later(TELL_S, os._exit, 1)

    async def alive(self) -> int:
        """This process's id, where its engine is loaded and answers."""
        self._check_loaded()
        await self._engine.check_alive()
        return os.getpid()

    def _check_loaded(self) -> None:
        if not hasattr(self, "_runner"):
            raise NotLoaded("its engine is not loaded")

    async def submit(self, requests: list[EpisodeRequest], max_in_flight: int, era: int) -> None:
        self._check_loaded()
        self._inbox.submit(requests, max_in_flight, era)

    async def cancel(self, episode_ids: list[str], era: int) -> None:
        self._inbox.cancel(episode_ids, era)

    async def take(self, max_wait_s: float) -> list[Outcome]:
        return await self._inbox.take(max_wait_s)

    async def stats(self) -> tuple[int, dict[str, int]]:
        """This process's id, and what its tool client has counted."""
        return os.getpid(), self._tools.stats()

    async def pause(self) -> None:
        self._check_loaded()
        self._runner.clock.stop()
        await self._engine.pause()

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        await self._engine.init_weight_transfer(init_info)

    async def start_weight_update(self) -> None:
        await self._engine.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        await self._engine.update_weights(update_info)

    async def finish_weight_update(self, policy_version: int) -> None:
        await self._engine.finish_weight_update(policy_version)

    async def resume(self) -> None:
        await self._engine.resume()
        self._runner.clock.go()

    async def close(self) -> None:
        """Before this process is killed at the end of a run."""
        if hasattr(self, "_engine"):
            self._engine.close()
