"""How the commands reach the tools: those of a service by its URL, or their own, in this process."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from toolrl_ray.errors import UserError
from toolrl_ray.tools.http_client import HttpTools
from tools_service.protocol import ToolCall, ToolResult
from tools_service.runner import Factory, ToolInfo, tool_factories

if TYPE_CHECKING:
    from toolrl_ray.tools.local import LocalTools
    from tools_service.config import ServiceConfig

DEFAULT_ADDRESS = "http://127.0.0.1:8000"  # where a service listens unless told otherwise
DEFAULT_APP = "tools"
DEFAULT_NAMES = ["SimpleCalculatorTool", "PythonInterpreter"]
EXAMPLES = {"SimpleCalculatorTool": "13.1-3", "PythonInterpreter": "print(sum(range(10)))", "Wiki": "Bruce Willis"}


class Tools(Protocol):
    """What the commands need of the tools, wherever these run. where: in words."""

    where: str

    async def infos(self) -> dict[str, ToolInfo]: ...

    async def call(self, calls: Sequence[ToolCall]) -> list[ToolResult]: ...

    async def end_session(self, session: str) -> None: ...


class _LocalTools:
    where = "in this process"

    def __init__(self, local: LocalTools):
        self._local = local

    async def infos(self) -> dict[str, ToolInfo]:
        return self._local.infos()

    async def call(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        return list(await asyncio.gather(*map(self._local, calls)))

    async def end_session(self, session: str) -> None:
        self._local.end_session(session)


@asynccontextmanager
async def open_tools(options: argparse.Namespace, name: str | None = None) -> AsyncIterator[Tools]:
    """The tools that the options name, ready to be called. name: the only one that is wanted. Raises UserError."""
    if options.local and options.address:
        raise UserError("--local contradicts --address; take one of them away")
    if options.config and not options.local:
        raise UserError(f"--config={options.config!r} says what --local runs; a service that runs is named with --address")
    if options.local:
        from toolrl_ray.config import ToolsConfig
        from toolrl_ray.tools.local import LocalTools

        config = service_config(options.config)
        _check_name(name, config.names, _LocalTools.where)
        factories = service_factories(config, None if name is None else [name])
        pools = {tool: config.pool(tool) for tool in factories}
        local = LocalTools(ToolsConfig(names=list(factories), pools=pools, start_timeout_s=config.start_timeout_s), factories)
        try:
            await local.start()
            yield _LocalTools(local)
        finally:
            await local.close()
        return
    service = HttpTools(options.address or os.environ.get("TOOLRL_TOOLS") or DEFAULT_ADDRESS)
    try:
        _check_name(name, await service.infos(), service.where)
        yield service
    finally:
        await service.close()


def _check_name(name: str | None, known: Collection[str], where: str) -> None:
    if name is not None and name not in known:
        raise UserError(f"no tool {name!r} {where}; tools: {', '.join(known)}")


def service_config(path: str | None) -> ServiceConfig:
    """What the file describes, or the tools that need no settings. Raises UserError."""
    from tools_service.config import ServiceConfig, ServiceConfigError, load

    if path is None:
        return ServiceConfig(names=DEFAULT_NAMES)
    try:
        return load(path)
    except ServiceConfigError as error:
        raise UserError(str(error)) from None


def service_factories(config: ServiceConfig, names: list[str] | None = None) -> dict[str, Factory]:
    """What makes its tools, or those of `names`. Raises UserError."""
    try:
        return tool_factories(names or config.names, config.custom, config.options)
    except ValueError as error:
        raise UserError(str(error)) from None
