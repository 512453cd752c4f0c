"""Runs a tool so that every call ends in a `ToolResult`, says what a tool is, and lists the tools that the service knows by name."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tools_service.adapters import MCP_PREFIX, valid_text
from tools_service.loading import LoadingError, load_name
from tools_service.protocol import AsyncTool, Tool, ToolError, ToolResult, ToolStatus

logger = logging.getLogger(__name__)

GATEWAY = "http"  # the deployment behind Serve's HTTP proxy, so no tool's name
MAX_OUTPUT_CHARS = 100_000
MAX_ARGUMENT_CHARS = 2**20  # of a call, and of those that share a request; it fits a body over HTTP, whatever is escaped in it
MAX_MESSAGE_CHARS = 500

Factory = Callable[[], Tool | AsyncTool]


def one_string() -> dict[str, Any]:
    """The JSON schema of a tool that says nothing of its parameters."""
    return {"type": "object", "properties": {"argument": {"type": "string"}}, "required": ["argument"]}


@dataclass(frozen=True)
class ToolInfo:
    """What a client has to know of a tool.

    idempotent: a call may be run again when it is not known whether it ran.
    max_batch: calls that one request may carry. 1, the default, for every tool that can be slow: calls that share a request
        share a thread. More only for tools that answer in microseconds, or all calls of a batch at once; they must be idempotent.
    parameters: JSON schema (an object) of the arguments.
    cacheable: the same argument has the same answer, however often and whenever it is asked for.
    stateful: calls of one session find what the calls before them left; they must reach the replica that holds it.
    max_in_flight: requests at once per replica. max_replicas: the most that there can be. Both of the pool it runs in.
    """

    name: str
    description: str
    idempotent: bool
    max_batch: int = 1
    parameters: dict[str, Any] = field(default_factory=one_string)
    cacheable: bool = False
    stateful: bool = False
    max_in_flight: int = 64
    max_replicas: int = 1


def tool_info(tool: Tool | AsyncTool) -> ToolInfo:
    """The tool's own statements; all but the first three are optional attributes. A tool with `end_session` is stateful unless its
    attribute `stateful` says otherwise. Raises ValueError where they contradict each other."""
    info = ToolInfo(
        tool.name,
        tool.description,
        tool.idempotent,
        getattr(tool, "max_batch", 1),
        getattr(tool, "parameters", None) or one_string(),
        getattr(tool, "cacheable", False),
        bool(getattr(tool, "stateful", hasattr(tool, "end_session"))),
    )
    if info.max_batch < 1:
        raise ValueError(f"tool {info.name}: max_batch={info.max_batch} must be 1 or more")
    if info.max_batch > 1 and not info.idempotent:
        raise ValueError(f"tool {info.name}: max_batch={info.max_batch} contradicts idempotent=False; set max_batch=1")
    if info.max_batch > 1 and info.stateful:
        raise ValueError(f"tool {info.name}: max_batch={info.max_batch} contradicts stateful=True; set max_batch=1")
    if info.cacheable and info.stateful:
        raise ValueError(f"tool {info.name}: cacheable=True contradicts stateful=True; set cacheable=False")
    return info


def run_tool(tool: Tool, argument: str) -> ToolResult:
    """Calls the tool once. Never raises but for Ctrl-C; output beyond MAX_OUTPUT_CHARS is cut and marked as truncated."""
    start = time.perf_counter()
    try:
        output = tool(argument)
    except BaseException as error:  # a panic of Rust code among it
        if ends_program(error):
            raise
        return failed(tool.name, argument, error, time.perf_counter() - start)
    if not isinstance(output, str):
        return not_text(tool.name, argument, output, time.perf_counter() - start)
    truncated = len(output) > MAX_OUTPUT_CHARS
    return ToolResult(ToolStatus.OK, valid_text(output[:MAX_OUTPUT_CHARS]), time.perf_counter() - start, truncated)


def ends_program(error: BaseException) -> bool:
    """Ctrl-C, which arrives in the main thread, in whatever runs there. In another thread the tool itself has raised it."""
    return isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()


def failed(name: str, argument: str, error: BaseException, latency_s: float = 0.0) -> ToolResult:
    """What a call ends in whose tool raised: a ToolError speaks for itself, of anything else the class is named."""
    if isinstance(error, ToolError):
        # A tool cannot report an error as a success.
        status = ToolStatus.TOOL_ERROR if error.status is ToolStatus.OK else error.status
        return ToolResult(status, valid_text(str(error.message)[:MAX_MESSAGE_CHARS]), latency_s)
    logger.warning("tool %s raised on %.200r", name, argument, exc_info=error)
    return ToolResult(ToolStatus.TOOL_ERROR, f"the tool failed with {type(error).__name__}", latency_s)


def not_text(name: str, argument: str, output: object, latency_s: float = 0.0) -> ToolResult:
    logger.warning("tool %s returned %s instead of text on %.200r", name, type(output).__name__, argument)
    return ToolResult(ToolStatus.TOOL_ERROR, f"the tool returned {type(output).__name__} instead of text", latency_s)


def too_long(argument: str) -> ToolResult:
    """Of an argument beyond MAX_ARGUMENT_CHARS."""
    text = f"the argument has {len(argument):,} characters; {MAX_ARGUMENT_CHARS:,} at most"
    return ToolResult(ToolStatus.BAD_ARGUMENTS, text)


def unknown_tool(name: str, known: Iterable[str]) -> ToolResult:
    return ToolResult(ToolStatus.UNKNOWN_TOOL, f"no tool {name[:50]!r}; tools: {', '.join(known)}")


def _calculator(**options: Any) -> Tool:
    from tools_service.calculator import SimpleCalculatorTool

    return SimpleCalculatorTool(**options)


def _wiki(**options: Any) -> AsyncTool:
    from tools_service.search.tool import WikiTool

    return WikiTool(**options)


def _python(**options: Any) -> AsyncTool:
    from tools_service.sandbox.tool import PythonTool

    return PythonTool(**options)


def is_search(name: str, spec: str | None) -> bool:
    """Whether the tool is a WikiTool. One takes memory and seconds to make, and its JVM takes down the process that starts Ray after it.
    spec: of a tool of one's own. Raises LoadingError."""
    if spec is None:
        return name == "Wiki"
    if spec.startswith(MCP_PREFIX):
        return False
    from tools_service.search.tool import WikiTool

    return load_name(spec) is WikiTool


def builtin_tools() -> dict[str, Callable[..., Tool | AsyncTool]]:
    """What makes each tool that can be served by name; the tool's options are keyword arguments."""
    return {"SimpleCalculatorTool": _calculator, "Wiki": _wiki, "PythonInterpreter": _python}


def tool_factories(
    names: list[str], custom: Mapping[str, str], options: Mapping[str, Mapping[str, Any]], prefix: str = ""
) -> dict[str, Factory]:
    """What makes each tool of a service, in the order of `names`. Every tool is made once (of a search tool the options are), so that
    mistakes show here and not in a replica. Raises ValueError with one line. prefix: of the keys that it names, where they stand in a
    section."""
    known = [*builtin_tools(), *custom]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown tool {unknown[0]!r} in {prefix}names; tools: {', '.join(known)}; name your own in {prefix}custom")
    if len(set(names)) < len(names):
        raise ValueError(f"{prefix}names={names} holds a name twice")
    return {name: _factory(name, custom.get(name), dict(options.get(name, {})), prefix) for name in names}


def _factory(name: str, spec: str | None, options: dict[str, Any], prefix: str) -> Factory:
    from tools_service.search.options import WikiOptions

    factory = partial(_load, name, spec, options) if spec is not None else partial(builtin_tools()[name], **options)
    where = f"{prefix}custom: {name}={spec!r} is not a tool" if spec is not None else f"{prefix}options.{name}={options}"
    try:
        own_name = WikiOptions(**options).name if is_search(name, spec) else tool_info(factory()).name
    except (LoadingError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None
    if own_name != name:
        raise ValueError(f"{where}: it calls itself {own_name!r}; use one name")
    return factory


def _load(name: str, spec: str, options: dict[str, Any]) -> Tool | AsyncTool:
    from tools_service.adapters import load_tool

    return load_tool(name, spec, options)
