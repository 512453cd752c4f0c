"""The records that travel between the parts. Plain dataclasses of plain values: they pickle, cross Ray and dump to JSON.

Letters: L = number of tokens of one episode (prompt, sampled and observation tokens together).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tools_service.protocol import ToolCall, ToolResult, ToolStatus

NO_VERSION = -1  # policy version of a token that no policy sampled (prompt and observation tokens)


class StopReason(StrEnum):
    """Why an episode ended: exactly one per episode."""

    SUBMITTED = "submitted"  # the policy wrote the submit marker, or as a chat model answered without a call
    EOS = "eos"  # the policy ended its text without submitting
    MAX_TURNS = "max_turns"  # the last allowed turn asked for another call; it is not executed
    TURN_TOKENS = "turn_tokens"  # one turn reached its token limit without a call or a submit
    CONTEXT = "context"  # no room left for the observation and one more token
    TURN_DEADLINE = "turn_deadline"  # one completion took longer than its deadline
    EPISODE_DEADLINE = "episode_deadline"  # the episode as a whole took longer than its deadline
    ABORTED = "aborted"  # the engine gave the completion up


TRUNCATED = frozenset(StopReason) - {StopReason.SUBMITTED, StopReason.EOS}


@dataclass(frozen=True)
class Task:
    """One problem. `prompt` is the question alone; the recipe's prompt template goes around it.

    id: stable and unique within its source and split ("generated/train/17").
    answer: the reference answer as text. aliases: other texts that are as right.
    """

    id: str
    prompt: str
    answer: str
    source: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class EpisodeRequest:
    """One episode to run: a task and where it belongs.

    episode_id: unique within the run ("17:0" = prompt 17, episode 0 of its group).
    group_id: episodes of one task that grouped advantages compare.
    temperature: of this episode; None is rollout.temperature.
    with_tools: False answers every call as UNAVAILABLE, and nothing is executed.
    """

    episode_id: str
    group_id: str
    task: Task
    temperature: float | None = None
    with_tools: bool = True


@dataclass(frozen=True)
class SamplingParams:
    """How a turn is sampled. temperature 0.0 is greedy. max_tokens limits one completion.

    seed: of this completion within the run, for an engine that can draw for each one apart. It makes no two turns differ in kind, so
        it is no part of equality.
    """

    temperature: float
    max_tokens: int
    stop: tuple[str, ...]
    seed: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Completion:
    """One completion, as the engine returned it.

    token_ids: every sampled id, the one that held the stop string (whole) or EOS included.
    logprobs: of each sampled id, under the distribution that it was sampled from; same length.
    policy_versions: of each sampled id; same length.
    finish_reason: "stop", "length" or "abort", as vLLM names them.
    """

    token_ids: list[int]
    logprobs: list[float]
    policy_versions: list[int]
    finish_reason: str


GenerateFn = Callable[[list[int], SamplingParams], Awaitable[Completion]]
CallToolFn = Callable[[ToolCall], Awaitable[ToolResult]]


class SegmentKind(StrEnum):
    PROMPT = "prompt"
    POLICY = "policy"
    OBSERVATION = "observation"


@dataclass(frozen=True)
class Segment:
    """A stretch of tokens [start, end) of one kind, with its text.

    overhang: for policy segments, what the last sampled token holds behind the text: what followed a stop marker, or a chat's end of turn.
    """

    kind: SegmentKind
    start: int
    end: int
    text: str
    overhang: str = ""


@dataclass(frozen=True)
class ToolCallRecord:
    """One tool call of an episode. `truncated` is True where tool or ledger cut the output."""

    turn: int
    tool: str
    argument: str
    status: ToolStatus
    text: str
    latency_s: float
    truncated: bool


@dataclass
class Trajectory:
    """A finished episode. The four token columns all have length L.

    loss_mask: True exactly on tokens that the policy sampled.
    rollout_logprobs: 0.0 where loss_mask is False.
    policy_versions: NO_VERSION where loss_mask is False.
    """

    request: EpisodeRequest
    token_ids: list[int]
    loss_mask: list[bool]
    rollout_logprobs: list[float]
    policy_versions: list[int]
    segments: list[Segment]
    tool_calls: list[ToolCallRecord]
    stop_reason: StopReason
    num_turns: int
    duration_s: float
    reward: float | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def num_trained_tokens(self) -> int:
        return sum(self.loss_mask)

    @property
    def truncated(self) -> bool:
        return self.stop_reason in TRUNCATED

    @property
    def final_text(self) -> str:
        """Text of the last policy turn, "" when the policy sampled nothing."""
        return next((s.text for s in reversed(self.segments) if s.kind is SegmentKind.POLICY), "")

    @property
    def used_tool(self) -> bool:
        return any(call.status is ToolStatus.OK for call in self.tool_calls)
