"""Tools in this process, without Ray: the `CallToolFn` of `--in-process`."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

from toolrl_ray.config import ToolsConfig
from toolrl_ray.errors import ConfigError
from toolrl_ray.tools.dispatch import unknown_tool
from tools_service.executor import Executor
from tools_service.protocol import ToolCall, ToolResult
from tools_service.runner import builtin_tools


def check_names(names: list[str]) -> None:
    """Raises ConfigError unless every name is a built-in tool, each named once."""
    known = builtin_tools()
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown tool {name!r} in tools.names; tools: {', '.join(known)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"tools.names={names} holds a name twice")


class LocalTools:
    """Runs the built-in tools in threads, at most `max_in_flight` calls past their deadline. Raises ConfigError for unknown names."""

    def __init__(self, config: ToolsConfig):
        check_names(config.names)
        factories = builtin_tools()
        self._executors = {name: Executor(factories[name](), config.max_in_flight) for name in config.names}
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
