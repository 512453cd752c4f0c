"""What a tool is, what is asked of it and what comes back. Standard library only.

Failure is data with a name: a call always ends in a `ToolResult`, and its `ToolStatus` says how. An error of the
harness is never handed on as a tool's output text.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class ToolStatus(StrEnum):
    OK = "ok"
    TOOL_ERROR = "tool_error"  # the tool ran and reported an error of its own (division by zero, an exception)
    TIMEOUT = "timeout"
    OUTPUT_LIMIT = "output_limit"
    MEMORY_LIMIT = "memory_limit"
    UNKNOWN_TOOL = "unknown_tool"
    BAD_ARGUMENTS = "bad_arguments"  # the call could not be understood
    OVERLOADED = "overloaded"  # refused at once because the queue is full
    UNAVAILABLE = "unavailable"  # the infrastructure failed: never the policy's fault


@dataclass(frozen=True)
class ToolCall:
    """One request to one tool.

    tool: the name under which the tool is served.
    argument: the raw text between the call markers; for a tool with several parameters, a JSON object.
    deadline_s: seconds from now after which the caller no longer waits.
    session: calls of one episode to a tool that keeps state share it; None for a call on its own.
    seed: of whatever the tool draws at random, so that a call can be repeated.
    """

    tool: str
    argument: str
    deadline_s: float = 10.0
    session: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class ToolResult:
    """How one call ended.

    status: see `ToolStatus`.
    text: the tool's output when status is OK, otherwise a short reason that the policy may be shown.
    latency_s: seconds between the request and this result, as the caller saw them.
    truncated: the tool itself cut its output.
    """

    status: ToolStatus
    text: str
    latency_s: float = 0.0
    truncated: bool = False


class Tool(Protocol):
    """A tool as the service runs it, in a thread. `__call__` may raise `ToolError`; anything else it raises is reported as
    TOOL_ERROR with the exception's class name, and never reaches another caller.

    Optional attributes: `parameters` (JSON schema of its arguments, an object; default: one string), `probe` (an argument that
    it must answer with OK: the health check), `max_batch` (see ToolInfo), `cacheable` (same argument, same answer).
    """

    name: str
    description: str
    idempotent: bool  # may be run again when a replica dies in mid-call

    def __call__(self, argument: str) -> str: ...


class AsyncTool(Protocol):
    """A tool that minds deadlines and cancellation itself: it must end the call when its task is cancelled, and return by
    `call.deadline_s`. It never raises but for that cancellation.

    Instead of `call` it may offer `call_many(calls) -> results`, in the same order, with `max_batch` above 1. Optional beyond
    those of `Tool`: `async end_session(session)`, `stats() -> dict[str, float]`, `async close()`, and `last_done`: time.monotonic()
    when it last ended some of its work, also such as nobody waits for any more. By it a tool that is busy when its probe's time
    is over is told from one that hangs.
    """

    name: str
    description: str
    idempotent: bool

    async def call(self, call: ToolCall) -> ToolResult: ...


class ToolError(Exception):
    """An error that the tool itself reports, with a message that the policy may be shown."""

    def __init__(self, message: str, status: ToolStatus = ToolStatus.TOOL_ERROR):
        super().__init__(message, status)
        self.message = message
        self.status = status
