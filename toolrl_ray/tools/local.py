"""Tools in this process, without Ray: the `CallToolFn` of `--in-process`."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from toolrl_ray.config import ToolsConfig
from toolrl_ray.errors import ConfigError
from toolrl_ray.tools.stats import count_call
from tools_service import runner
from tools_service.executor import Executor
from tools_service.protocol import ToolCall, ToolResult, ToolStatus
from tools_service.runner import MAX_ARGUMENT_CHARS, Factory, ToolInfo, too_long, unknown_tool

CLOSE_TIMEOUT_S = 10.0


def tool_factories(config: ToolsConfig) -> dict[str, Factory]:
    """What makes each tool of the recipe: built-in ones by name, a person's own from tools.custom; nothing for a recipe whose tools
    run already (tools.app).

    Raises ConfigError for an unknown or repeated name, and for a tool that cannot be loaded or is not what `Tool` asks for.
    """
    if config.app is not None:
        return {}
    try:
        return runner.tool_factories(config.names, config.custom, config.options, config.prefix)
    except ValueError as error:
        raise ConfigError(str(error)) from None


class LocalTools:
    """Runs the recipe's tools in this process; each starts at its first call. factories: what makes the tools by name, in place of what
    the recipe names. Raises as `tool_factories` does, and ConfigError for a recipe whose tools run on a cluster."""

    def __init__(self, config: ToolsConfig, factories: Mapping[str, Factory] | None = None):
        if config.app is not None:
            raise ConfigError(f"tools.app={config.app!r} names a service on a Ray cluster, out of reach in process; set tools.app=null")
        self._factories = tool_factories(config) if factories is None else dict(factories)
        self._pools = {name: config.pool(name) for name in self._factories}
        self._start_timeout_s = config.start_timeout_s
        self._executors: dict[str, Executor] = {}
        self._starting = {name: asyncio.Lock() for name in self._factories}
        self._ending: set[asyncio.Task[None]] = set()
        self._counts: Counter[str] = Counter()

    async def __call__(self, call: ToolCall) -> ToolResult:
        start = time.monotonic()
        if call.tool in self._factories:
            result = await self._run(call)
        else:
            result = unknown_tool(call.tool, self._factories)
        result = replace(result, latency_s=time.monotonic() - start)
        count_call(self._counts, call.tool if call.tool in self._factories else "unknown", result.status, result.latency_s)
        return result

    async def _run(self, call: ToolCall) -> ToolResult:
        if len(call.argument) > MAX_ARGUMENT_CHARS:
            return too_long(call.argument)
        executor = self._executors.get(call.tool)
        if executor is None:
            try:
                executor = await self._start(call.tool)
            except Exception as error:
                return ToolResult(ToolStatus.UNAVAILABLE, f"tool unavailable: {' '.join(str(error).split())}")
        if not executor.info.stateful:
            call = replace(call, session=None)
        [result] = await executor.run([call])
        assert result is not None  # a call alone always has a result
        return result

    async def start(self) -> None:
        """Starts every tool now. Raises ConfigError that names the tool that does not start, and why: among it, that all have not
        started within start_timeout_s, which of a tool that blocks this thread as it starts is noticed when it lets go."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._start_timeout_s
        for name in self._factories:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._start(name)
                if loop.time() >= deadline:
                    raise TimeoutError
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                if isinstance(error, TimeoutError) and loop.time() >= deadline:
                    reason = f"start_timeout_s={self._start_timeout_s:g} is over"
                raise ConfigError(f"tool {name} does not start: {reason}") from error

    async def _start(self, name: str) -> Executor:
        async with self._starting[name]:
            if name not in self._executors:
                executor = Executor(self._factories[name](), self._pools[name].max_in_flight)
                await executor.start()
                self._executors[name] = executor
            return self._executors[name]

    def infos(self) -> dict[str, ToolInfo]:
        """What the tools say of themselves; of those that have started."""
        return {name: executor.info for name, executor in self._executors.items()}

    def end_session(self, session: str) -> None:
        """The calls of this session are over: tools that keep something for it forget it, in the background."""
        for executor in self._executors.values():
            if executor.info.stateful:
                task = asyncio.get_running_loop().create_task(executor.end_session(session))
                self._ending.add(task)
                task.add_done_callback(self._ending.discard)

    def stats(self) -> dict[str, float]:
        """Counts since the start as those of ToolClient, and NAME/service/... of each tool's own."""
        own = {f"{name}/service/{key}": value for name, executor in self._executors.items() for key, value in executor.stats().items()}
        return {**self._counts, **own}

    async def close(self) -> None:
        """Ends what the tools hold, their processes among it. Calls past their deadline in daemon threads may outlive this object."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await asyncio.gather(*self._ending, return_exceptions=True)
                await asyncio.gather(*(executor.close() for executor in self._executors.values()), return_exceptions=True)
        except TimeoutError:
            pass  # what does not end in time ends with this process
