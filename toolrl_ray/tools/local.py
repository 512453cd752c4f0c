"""Tools in this process, without Ray: the `CallToolFn` of `--in-process`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from toolrl_ray.config import ToolsConfig
from toolrl_ray.errors import ConfigError
from toolrl_ray.tools.dispatch import unknown_tool
from tools_service.executor import Executor
from tools_service.loading import LoadingError, load_name
from tools_service.protocol import Tool, ToolCall, ToolResult
from tools_service.runner import builtin_tools, tool_info


def tool_factories(config: ToolsConfig) -> dict[str, Callable[[], Tool]]:
    """What makes each tool of the recipe: built-in ones by name, a person's own from tools.custom.

    Raises ConfigError for an unknown or repeated name, and for a tool that cannot be loaded or is not what `Tool` asks for.
    """
    known: dict[str, Callable[[], Tool]] = {**builtin_tools(), **{name: partial(_load, name, spec) for name, spec in config.custom.items()}}
    unknown = [name for name in config.names if name not in known]
    if unknown:
        raise ConfigError(f"unknown tool {unknown[0]!r} in tools.names; tools: {', '.join(known)}; name your own in tools.custom")
    if len(set(config.names)) < len(config.names):
        raise ConfigError(f"tools.names={config.names} holds a name twice")
    for name in set(config.names) & set(config.custom):
        _load(name, config.custom[name])  # a mistake shows here, not in a replica
    return {name: known[name] for name in config.names}


def _load(name: str, spec: str) -> Tool:
    try:
        tool = load_name(spec)()
        info = tool_info(tool)
    except (LoadingError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"tools.custom: {name}={spec!r} is not a tool: {' '.join(str(error).split())}") from None
    if info.name != name:
        raise ConfigError(f"tools.custom: {name}={spec!r} calls itself {info.name!r}; use one name")
    return tool


class LocalTools:
    """Runs the recipe's tools in threads, at most `max_in_flight` calls past their deadline. Raises as `tool_factories` does."""

    def __init__(self, config: ToolsConfig):
        factories = tool_factories(config)
        self._executors = {name: Executor(factory(), config.max_in_flight) for name, factory in factories.items()}
        self._counts: Counter[str] = Counter()

    async def __call__(self, call: ToolCall) -> ToolResult:
        start = time.monotonic()
        executor = self._executors.get(call.tool)
        if executor is None:
            result = unknown_tool(call.tool, self._executors)
        else:
            [answer] = await executor.run([(call.argument, call.deadline_s)])
            assert answer is not None  # a call alone always has a result
            result = answer
        self._counts["calls"] += 1
        self._counts[f"status/{result.status}"] += 1
        return replace(result, latency_s=time.monotonic() - start)

    def stats(self) -> dict[str, int]:
        """Counts since the start: calls and status/<ToolStatus>."""
        return dict(self._counts)

    async def close(self) -> None:
        """For symmetry with ToolClient: nothing outlives this object but calls past their deadline, in daemon threads."""
