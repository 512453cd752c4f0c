"""From an `EpisodeRequest` to a finished, rewarded `Trajectory`: what a RolloutActor and the in-process loop share."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from toolrl_ray.config import RunConfig, TaskConfig
from toolrl_ray.episode.call_format import CallFormat
from toolrl_ray.episode.clock import Clock
from toolrl_ray.episode.codec import HFCodec
from toolrl_ray.episode.loop import Limits, run_episode
from toolrl_ray.errors import ConfigError
from toolrl_ray.tasks.module import is_own, task_module
from toolrl_ray.types import CallToolFn, Completion, EpisodeRequest, SamplingParams, StopReason, Task, Trajectory
from tools_service.protocol import ToolCall, ToolResult, ToolStatus


class RolloutEngine(Protocol):
    """What samples: vLLM, transformers, or a script in a test."""

    async def ready(self, policy_version: int) -> None: ...
    async def check_alive(self) -> None: ...
    async def generate(self, token_ids: list[int], params: SamplingParams) -> Completion: ...
    async def pause(self) -> None: ...
    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None: ...
    async def start_weight_update(self) -> None: ...
    async def update_weights(self, update_info: dict[str, Any]) -> None: ...
    async def finish_weight_update(self, policy_version: int) -> None: ...
    async def resume(self) -> None: ...
    def close(self) -> None: ...


async def _no_tool(call: ToolCall) -> ToolResult:
    return ToolResult(ToolStatus.UNAVAILABLE, "")


class EpisodeRunner:
    """clock: stopped by whoever pauses the engine. check_alive: raises where the engine is dead or hangs."""

    def __init__(
        self,
        config: RunConfig,
        generate: Any,
        call_tool: CallToolFn,
        codec: HFCodec,
        call_format: CallFormat,
        check_alive: Callable[[], Awaitable[None]] | None = None,
    ):
        self._config = config
        self._generate = generate
        self._call_tool = call_tool
        self._codec = codec
        self._call_format = call_format
        self._check_alive = check_alive
        self.clock = Clock()
        self._task = task_module(config.task)
        self._limits = Limits(**config.episode.model_dump(exclude={"shown", "call_format", "system"}))

    async def run(self, request: EpisodeRequest) -> Trajectory:
        trajectory = await run_episode(
            request,
            self._task.render_prompt(request.task, self._config.task.few_shot),
            generate=self._generate,
            call_tool=self._call_tool if request.with_tools else _no_tool,
            codec=self._codec,
            call_format=self._call_format,
            limits=self._limits,
            temperature=self._config.rollout.temperature if request.temperature is None else request.temperature,
            shown=self._config.episode.shown,
            clock=self.clock,
        )
        if trajectory.stop_reason in (StopReason.TURN_DEADLINE, StopReason.EPISODE_DEADLINE) and self._check_alive:
            await self._check_alive()  # what an engine that hangs did not sample is no failure of the policy
        trajectory.reward = _checked(await self._reward(trajectory), self._config.task, request.task)
        return trajectory

    async def _reward(self, trajectory: Trajectory) -> Any:
        """A person's own function may ask a judge or run a test: in a thread, so that the other episodes go on."""
        if not is_own(self._config.task):
            return self._task.reward(trajectory)
        try:
            async with asyncio.timeout(self._limits.episode_deadline_s):
                return await asyncio.to_thread(self._task.reward, trajectory)
        except TimeoutError:
            task, deadline = trajectory.request.task, self._limits.episode_deadline_s
            raise ConfigError(
                f"{_reward_of(self._config.task, task)} took longer than episode.episode_deadline_s={deadline:g} for task {task.id!r}; "
                "make it faster, or set a later deadline"
            ) from None


def _checked(reward: Any, config: TaskConfig, task: Task) -> float:
    """Raises ConfigError for what is no finite number: it would spoil every mean that it goes into."""
    try:
        if math.isfinite(reward):
            return float(reward)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of a tensor of several numbers
        pass
    raise ConfigError(f"{_reward_of(config, task)} returned {reward!r:.100} for task {task.id!r}; it must return a finite number")


def _reward_of(config: TaskConfig, task: Task) -> str:
    name, source = (f"task.parts.{task.source}", config.parts[task.source]) if config.parts else ("task", config)
    return f"{name}.module={source.module!r}: {source.reward}"
