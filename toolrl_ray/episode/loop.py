"""One episode: the turn loop as a function of two callables, `generate` and `call_tool`.

Each turn: the policy samples until its turn ends as the call format says; calls are executed, their output is appended as observation
tokens, and the next turn starts; a submit, an EOS or a limit ends the episode. Every outcome has a name (`StopReason`, `ToolStatus`).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from toolrl_ray.episode.call_format import CallFormat, ParsedTurn, RequestedCall, Shown, TurnKind
from toolrl_ray.episode.clock import Clock
from toolrl_ray.episode.codec import Codec
from toolrl_ray.episode.ledger import Ledger
from toolrl_ray.episode.shown import SHOWN, show
from toolrl_ray.types import (
    CallToolFn,
    Completion,
    EpisodeRequest,
    GenerateFn,
    SamplingParams,
    StopReason,
    ToolCallRecord,
    Trajectory,
)
from tools_service.protocol import ToolCall, ToolResult, ToolStatus

log = logging.getLogger(__name__)

BACKSTOP_S = 0.5  # beyond a call's deadline, at which the client answers TIMEOUT and counts it


@dataclass(frozen=True)
class Limits:
    """max_turns: completions per episode. Tokens: per completion, per call in an observation (markers apart), and in all.
    max_observation_chars: per call in an observation, too.
    Deadlines in seconds: per call, per completion, per episode; the last two on the episode's `Clock`."""

    max_turns: int
    max_turn_tokens: int
    max_observation_tokens: int
    max_context_tokens: int
    tool_deadline_s: float
    turn_deadline_s: float
    episode_deadline_s: float
    max_observation_chars: int | None = None


async def run_episode(
    request: EpisodeRequest,
    prompt: str,
    *,
    generate: GenerateFn,
    call_tool: CallToolFn,
    codec: Codec,
    call_format: CallFormat,
    limits: Limits,
    temperature: float,
    shown: Mapping[ToolStatus, str] = SHOWN,
    clock: Clock | None = None,
) -> Trajectory:
    """Run one episode to its end. shown: a template for every status, see shown.py. clock: of the engine, where it can be paused.

    Raises what `generate` raises (the harness failed: the episode has to be run again). What a tool does never raises:
    a tool that fails, stalls or breaks costs a call, and its status says so.
    """
    ledger = Ledger(*call_format.prompt(codec, prompt))
    episode = _Episode(request.episode_id, ledger, generate, call_tool, codec, call_format, limits, temperature, shown, clock or Clock())
    started = time.monotonic()
    try:
        while ledger.stop_reason is None:
            await episode.turn()
    finally:
        if (end_session := getattr(call_tool, "end_session", None)) is not None:  # also of an episode that is cancelled
            end_session(request.episode_id)
    return Trajectory(
        request=request,
        token_ids=ledger.token_ids,
        loss_mask=ledger.loss_mask,
        rollout_logprobs=ledger.rollout_logprobs,
        policy_versions=ledger.policy_versions,
        segments=ledger.segments,
        tool_calls=episode.tool_calls,
        stop_reason=ledger.stop_reason,
        num_turns=episode.num_turns,
        duration_s=time.monotonic() - started,
    )


def call_seed(episode_id: str, number: int) -> int:
    """Of the episode's call with this number, counted from 1: the same in every process and run, below 2**32."""
    return int.from_bytes(hashlib.blake2b(f"{episode_id}/{number}".encode(), digest_size=4).digest())


class _Episode:
    def __init__(
        self,
        episode_id: str,
        ledger: Ledger,
        generate: GenerateFn,
        call_tool: CallToolFn,
        codec: Codec,
        call_format: CallFormat,
        limits: Limits,
        temperature: float,
        shown: Mapping[ToolStatus, str],
        clock: Clock,
    ):
        self.episode_id = episode_id
        self.ledger = ledger
        self.generate = generate
        self.call_tool = call_tool
        self.codec = codec
        self.call_format = call_format
        self.limits = limits
        self.temperature = temperature
        self.shown = shown
        self.tool_calls: list[ToolCallRecord] = []
        self.num_turns = 0
        self.num_calls = 0
        self.clock = clock
        self.deadline = clock.now() + limits.episode_deadline_s

    def left_s(self) -> float:
        return max(0.0, self.deadline - self.clock.now())

    async def turn(self) -> None:
        room = self.limits.max_context_tokens - len(self.ledger)
        if room < 1:
            return self.ledger.finish(StopReason.CONTEXT)
        seed = call_seed(f"{self.episode_id}/turn", self.num_turns + 1)
        params = SamplingParams(self.temperature, min(self.limits.max_turn_tokens, room), self.call_format.stop, seed)
        budget_s = min(self.limits.turn_deadline_s, self.left_s())
        try:
            # A copy: the engine may keep what it is given, and the ledger grows.
            async with self.clock.timeout(budget_s):
                completion = await self.generate(list(self.ledger.token_ids), params)
        except TimeoutError:
            return self.ledger.finish(StopReason.TURN_DEADLINE if self.left_s() > 0 else StopReason.EPISODE_DEADLINE)
        self.num_turns += 1
        text = self.codec.decode(completion.token_ids)
        parsed = self.call_format.parse(text, completion.token_ids)
        self.ledger.append_completion(completion, text[: parsed.end], text[parsed.end :])
        if (reason := self._ending(completion, parsed, room)) is not None:
            return self.ledger.finish(reason)
        results = await self._run_calls(parsed)
        self._observe(results)

    def _ending(self, completion: Completion, parsed: ParsedTurn, room: int) -> StopReason | None:
        """The reason to stop after this completion, or None when it asks for a call that may be executed."""
        if parsed.kind is TurnKind.SUBMIT:
            return StopReason.SUBMITTED
        if parsed.kind in (TurnKind.CALL, TurnKind.MALFORMED):
            return StopReason.MAX_TURNS if self.num_turns >= self.limits.max_turns else None
        if completion.finish_reason == "abort":
            return StopReason.ABORTED
        if completion.token_ids and completion.token_ids[-1] in self.codec.eos_token_ids:
            return StopReason.EOS
        if completion.finish_reason == "length":
            return StopReason.CONTEXT if room <= self.limits.max_turn_tokens else StopReason.TURN_TOKENS
        return StopReason.EOS  # the engine stopped at an end-of-text token that it does not return

    async def _run_calls(self, parsed: ParsedTurn) -> list[tuple[RequestedCall, ToolResult]]:
        """Run the turn's calls at once; results in the order of the calls."""
        if parsed.kind is TurnKind.MALFORMED:
            return [(RequestedCall("", ""), ToolResult(ToolStatus.BAD_ARGUMENTS, parsed.problem))]
        results = await asyncio.gather(*(self._run_call(call) for call in parsed.calls))
        return list(zip(parsed.calls, results, strict=True))

    async def _run_call(self, call: RequestedCall) -> ToolResult:
        if call.refused is not None:
            return call.refused
        budget_s = min(self.limits.tool_deadline_s, self.left_s())
        started = time.monotonic()
        self.num_calls += 1
        seed = call_seed(self.episode_id, self.num_calls)
        try:
            async with asyncio.timeout(budget_s + BACKSTOP_S):
                return await self.call_tool(ToolCall(call.tool, call.argument, budget_s, self.episode_id, seed))
        except TimeoutError:
            return ToolResult(ToolStatus.TIMEOUT, f"no answer within {budget_s:.3g} s", time.monotonic() - started)
        except Exception as error:  # the harness, not the tool: shown as UNAVAILABLE, with no text of ours
            log.warning("call of tool %r failed in the harness: %s: %s", call.tool, type(error).__name__, error)
            return ToolResult(ToolStatus.UNAVAILABLE, "", time.monotonic() - started)

    def _observe(self, results: list[tuple[RequestedCall, ToolResult]]) -> None:
        """Record the calls and append what the policy is shown, or end the episode where that does not fit."""
        shown: list[Shown] = []
        for call, result in results:
            text = self.call_format.shown(show(self.shown[result.status], call.tool, result.text))
            shown.append(self._cut(text))
            truncated = result.truncated or shown[-1].was_cut
            self.tool_calls.append(
                ToolCallRecord(self.num_turns, call.tool, call.argument, result.status, result.text, round(result.latency_s, 6), truncated)
            )
        token_ids = self.call_format.observation(self.codec, shown)
        if len(self.ledger) + len(token_ids) + 1 > self.limits.max_context_tokens:
            return self.ledger.finish(StopReason.CONTEXT)
        self.ledger.append_observation(token_ids, self.codec.decode(token_ids))
        if self.left_s() == 0:
            self.ledger.finish(StopReason.EPISODE_DEADLINE)

    def _cut(self, text: str) -> Shown:
        mark, max_chars, limit = self.call_format.cut, self.limits.max_observation_chars, self.limits.max_observation_tokens
        was_cut = max_chars is not None and len(text) > max_chars
        if was_cut:
            text = text[: max_chars - len(mark)] + mark
        token_ids = self.codec.encode(text)
        if len(token_ids) <= limit:
            return Shown(text, token_ids, was_cut)
        mark_ids = self.codec.encode(mark)[:limit]
        return Shown(text, token_ids[: limit - len(mark_ids)] + mark_ids, True)
