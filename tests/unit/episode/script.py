"""A scripted engine and fake tools: the two seams of the turn loop."""

from __future__ import annotations

import asyncio

from toolrl_ray.episode.call_format import CallFormat, TextMarkers
from toolrl_ray.episode.loop import Limits, run_episode
from toolrl_ray.types import Completion, EpisodeRequest, SamplingParams, Task, Trajectory
from tools_service.protocol import ToolCall, ToolResult, ToolStatus

REQUEST = EpisodeRequest("1:0:0", "1:0", Task("test/0", "What is 13.1-3?", "10.1", "test"))
LIMITS = Limits(
    max_turns=4,
    max_turn_tokens=200,
    max_observation_tokens=50,
    max_context_tokens=2000,
    tool_deadline_s=5,
    turn_deadline_s=5,
    episode_deadline_s=20,
)


class Script:
    """Engine that returns prepared completions, one per turn, and keeps what it was given."""

    def __init__(self, *completions: Completion):
        self.completions = list(completions)
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []

    async def __call__(self, token_ids: list[int], params: SamplingParams) -> Completion:
        self.prompts.append(list(token_ids))
        self.params.append(params)
        return self.completions.pop(0)


def said(codec, text: str, finish_reason: str = "stop", eos: bool = False, version: int = 3) -> Completion:
    ids = codec.encode(text) + ([min(codec.eos_token_ids)] if eos else [])
    return Completion(ids, [-0.25] * len(ids), [version] * len(ids), finish_reason)


class FakeTool:
    """Answers every call with one result; keeps the calls."""

    def __init__(self, text: str = "10.1", status: ToolStatus = ToolStatus.OK):
        self.result = ToolResult(status, text)
        self.calls: list[ToolCall] = []

    async def __call__(self, call: ToolCall) -> ToolResult:
        self.calls.append(call)
        return self.result


def play(
    codec,
    generate,
    call_tool,
    limits: Limits = LIMITS,
    prompt: str = "What is 13.1-3?\n\n",
    call_format: CallFormat = TextMarkers(),  # noqa: B008 - it is frozen
    **options,
) -> Trajectory:
    return asyncio.run(
        run_episode(
            REQUEST,
            prompt,
            generate=generate,
            call_tool=call_tool,
            codec=codec,
            call_format=call_format,
            limits=limits,
            temperature=1.0,
            **options,
        )
    )
