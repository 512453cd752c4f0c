"""Runs a tool so that every call ends in a `ToolResult`, and lists the tools that the service knows by name."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from tools_service.calculator import SimpleCalculatorTool
from tools_service.protocol import Tool, ToolError, ToolResult, ToolStatus

logger = logging.getLogger(__name__)

MAX_OUTPUT_CHARS = 100_000
MAX_MESSAGE_CHARS = 500


@dataclass(frozen=True)
class ToolInfo:
    """What a client has to know of a tool.

    idempotent: a call may be run again when it is not known whether it ran.
    max_batch: calls that one request may carry. 1, the default, for every tool that can be slow: calls that share a request
        share a thread. More only for tools that answer in microseconds; they must be idempotent.
    """

    name: str
    description: str
    idempotent: bool
    max_batch: int = 1


def tool_info(tool: Tool) -> ToolInfo:
    """The tool's own statements; `max_batch` is an optional attribute. Raises ValueError where they contradict each other."""
    info = ToolInfo(tool.name, tool.description, tool.idempotent, getattr(tool, "max_batch", 1))
    if info.max_batch < 1:
        raise ValueError(f"tool {info.name}: max_batch={info.max_batch} must be 1 or more")
    if info.max_batch > 1 and not info.idempotent:
        raise ValueError(f"tool {info.name}: max_batch={info.max_batch} contradicts idempotent=False; set max_batch=1")
    return info


def run_tool(tool: Tool, argument: str) -> ToolResult:
    """Calls the tool once. Never raises; output beyond MAX_OUTPUT_CHARS is cut and marked as truncated."""
    start = time.perf_counter()

    def result(status: ToolStatus, text: str, truncated: bool = False) -> ToolResult:
        return ToolResult(status, text, time.perf_counter() - start, truncated)

    try:
        output = tool(argument)
    except ToolError as error:
        # A tool cannot report an error as a success.
        status = ToolStatus.TOOL_ERROR if error.status is ToolStatus.OK else error.status
        return result(status, str(error.message)[:MAX_MESSAGE_CHARS])
    except (Exception, SystemExit) as error:
        logger.warning("tool %s raised on %.200r", tool.name, argument, exc_info=True)
        return result(ToolStatus.TOOL_ERROR, f"the tool failed with {type(error).__name__}")
    if not isinstance(output, str):
        logger.warning("tool %s returned %s instead of text on %.200r", tool.name, type(output).__name__, argument)
        return result(ToolStatus.TOOL_ERROR, f"the tool returned {type(output).__name__} instead of text")
    return result(ToolStatus.OK, output[:MAX_OUTPUT_CHARS], len(output) > MAX_OUTPUT_CHARS)


def builtin_tools() -> dict[str, Callable[[], Tool]]:
    """Factories of the tools that can be served by name."""
    return {SimpleCalculatorTool.name: SimpleCalculatorTool}
