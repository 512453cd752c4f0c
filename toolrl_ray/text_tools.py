"""The tools of a `TextEnvironment`: callables, objects, MCP tools and names of deployed ones, behind one `CallToolFn`.

What takes one text is called with the text between the markers, as TRL calls it; what takes more, or something else by its types, gets
JSON (see tools_service/adapters.py).
"""

from __future__ import annotations

import asyncio
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any
from uuid import uuid4

from toolrl_ray import tools_access
from toolrl_ray.config import ToolsConfig
from toolrl_ray.episode import shown
from toolrl_ray.errors import ConfigError, UserError
from toolrl_ray.tools.http_client import HttpTools
from toolrl_ray.tools.local import LocalTools
from tools_service.adapters import MCP_PREFIX, CallableTool, adapt, awaited, load_tool, output_text
from tools_service.loading import LoadingError
from tools_service.protocol import AsyncTool, Tool, ToolCall, ToolError, ToolResult, ToolStatus
from tools_service.runner import unknown_tool

# What the policy is shown, in TRL's words where TRL has some.
SHOWN = {
    **shown.SHOWN,
    ToolStatus.TOOL_ERROR: "Tool error: {text}",
    ToolStatus.BAD_ARGUMENTS: "Unknown tool call: {text}",
    ToolStatus.UNKNOWN_TOOL: "Unknown tool {tool}.",
}
MAX_STALLED = 1024  # threads per tool that may hang before its calls are refused


class TextTools:
    """A `CallToolFn`, for one event loop: `start` first, `close` last.

    tools: name -> callable, tool object, "mcp:COMMAND or URL" or the name of a deployed tool; or a list of those. In a list a
    function is named by its __name__, a tool of this project by its name, an MCP tool by what follows its "#", and any other object
    by its class, as in TRL.
    Raises ConfigError for what is none of these, and for a name that is there twice or that no call can spell.
    """

    def __init__(self, tools: Mapping[str, Any] | Iterable[Any]):
        self.named = _named(tools)
        self._deployed = {name: thing for name, thing in self.named.items() if _is_deployed(thing)}
        own = {name: _make(name, thing) for name, thing in self.named.items() if name not in self._deployed}
        self._local = LocalTools(ToolsConfig(max_in_flight=MAX_STALLED), {name: lambda tool=tool: tool for name, tool in own.items()})
        self._service: HttpTools | None = None
        self._id = uuid4().hex  # sessions of other environments at the same service are not ours
        self._sessions: set[str] = set()  # at the service
        self._ending: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Raises ConfigError for a tool that does not start and UserError for one that is not deployed."""
        await self._local.start()
        if not self._deployed:
            return
        self._service = HttpTools(os.environ.get("TOOLRL_TOOLS") or tools_access.DEFAULT_ADDRESS)
        known = await self._service.infos()
        if missing := [name for name in self._deployed.values() if name not in known]:
            where = f"{self._service.where}; it has {', '.join(known)}; TOOLRL_TOOLS names another service"
            raise UserError(f"no tool {missing[0]!r} is deployed {where}")

    async def __call__(self, call: ToolCall) -> ToolResult:
        if call.tool not in self.named:
            return unknown_tool(call.tool, self.named)
        if call.tool in self._deployed:
            assert self._service is not None, "start comes first"
            session = f"{self._id}/{call.session}"
            self._sessions.add(session)
            [result] = await self._service.call([replace(call, tool=self._deployed[call.tool], session=session)])
            return result
        return await self._local(call)

    def end_session(self, session: str) -> None:
        self._local.end_session(session)
        if (at_service := f"{self._id}/{session}") in self._sessions:
            self._sessions.remove(at_service)
            task = asyncio.create_task(self._service.end_session(at_service))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        await self._local.close()
        await asyncio.gather(*self._ending)
        if self._service is not None:
            await self._service.close()


class _TextTool:
    """A callable of one text as a Tool. The policy is told what it raises, in its own words."""

    description, idempotent = "", False

    def __init__(self, name: str, function: Callable[[str], Any]):
        self.name, self._function = name, function
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()

    def __call__(self, argument: str) -> str:
        try:
            return output_text(awaited(self._function(argument), self._loop))
        except ToolError:
            raise
        except Exception as error:
            raise ToolError(str(error) or type(error).__name__) from error


class _AsyncTextTool(_TextTool):
    """The same of an `async def`."""

    async def call(self, call: ToolCall) -> ToolResult:
        try:
            return ToolResult(ToolStatus.OK, output_text(await self._function(call.argument)))
        except ToolError:
            raise
        except Exception as error:
            raise ToolError(str(error) or type(error).__name__) from error


def _make(name: str, thing: Any) -> Tool | AsyncTool:
    try:
        if isinstance(thing, str):
            return load_tool(name, thing, {})
        if inspect.isclass(thing):
            raise LoadingError(f"tool {name} is the class {thing.__name__}; give an object of it")
        if _is_tool(thing):
            return thing
        if _takes_text(thing):
            return (_AsyncTextTool if _is_async(thing) else _TextTool)(name, thing)
        tool = adapt(name, getattr(thing, "__qualname__", type(thing).__name__), _typed(thing), {})
        return _TextTool(name, tool.apply) if type(tool) is CallableTool else tool
    except LoadingError as error:
        raise ConfigError(str(error)) from None


def _named(tools: Mapping[str, Any] | Iterable[Any]) -> dict[str, Any]:
    if isinstance(tools, str) or not isinstance(tools, Iterable):
        raise ConfigError(f"tools={' '.join(repr(tools).split())}; give a list of tools, or a dict of names and tools")
    pairs = list(tools.items()) if isinstance(tools, Mapping) else [(_own_name(tool), tool) for tool in tools]
    names = [name for name, _ in pairs]
    for name in names:
        if not isinstance(name, str) or not name or name != name.strip() or "<" in name or ">" in name:
            raise ConfigError(f"a tool cannot be called {name!r}: the policy writes <NAME>; give a dict of names and tools")
        if names.count(name) > 1:
            raise ConfigError(f"two tools are called {name!r}; give a dict of names and tools")
    return dict(pairs)


def _own_name(tool: Any) -> str:
    if isinstance(tool, str):
        return tool.rpartition("#")[2] if tool.startswith(MCP_PREFIX) else tool
    if inspect.isroutine(tool):
        return tool.__name__
    return tool.name if _is_tool(tool) else type(tool).__name__


def _is_deployed(tool: Any) -> bool:
    return isinstance(tool, str) and not tool.startswith(MCP_PREFIX)


def _is_tool(thing: Any) -> bool:
    """What `tools_service.protocol` asks for."""
    return all(hasattr(thing, attribute) for attribute in ("name", "description", "idempotent"))


def _is_async(thing: Any) -> bool:
    return inspect.iscoroutinefunction(thing) or inspect.iscoroutinefunction(getattr(thing, "__call__", None))  # noqa: B004


def _typed(thing: Any) -> Any:
    """What tells its parameters: of an object, unless it says by `inputs` what it takes, the method that it is called by."""
    method = getattr(thing, "__call__", None)  # noqa: B004
    return method if inspect.ismethod(method) and not isinstance(getattr(thing, "inputs", None), Mapping) else thing


def _takes_text(thing: Any) -> bool:
    """Whether it is called with the text as it is: one text is enough for it, and it has no type for that, or one that text is of. A
    transformers tool says by its inputs what it takes."""
    if isinstance(inputs := getattr(thing, "inputs", None), Mapping):
        kinds = [given.get("type") if isinstance(given, Mapping) else None for given in inputs.values()]
        return callable(thing) and kinds == ["string"]
    try:
        signature = inspect.signature(thing)
        [name, *_] = signature.bind("").arguments
    except ValueError:  # a builtin that tells nothing of its parameters
        return True
    except TypeError:
        return False
    with suppress(Exception):  # types as text, of which one may not be known
        signature = inspect.signature(thing, eval_str=True)
    kind = signature.parameters[name].annotation
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return any(one in (inspect.Parameter.empty, str, "str", object, Any) for one in (typing.get_args(kind) if is_union else [kind]))
