"""An MCP server, given as a command or a URL, as a tool: how it is named, what it is asked. The connection is kept by
mcp_sessions.py."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import time
import weakref
from collections.abc import Sequence
from typing import Any

from tools_service.adapters import arguments_of, check_arguments, valid_text
from tools_service.mcp_sessions import CLOSED, Sessions, reason
from tools_service.protocol import ToolCall, ToolError, ToolResult, ToolStatus
from tools_service.runner import MAX_MESSAGE_CHARS, MAX_OUTPUT_CHARS


class MCPTool:
    """One tool of an MCP server. target: "COMMAND ARGS" or "http(s)://...", then "#tool" where the server has several.

    env: names of environment variables that a command gets besides HOME, LOGNAME, PATH, SHELL, TERM and USER. token_env: the
    environment variable whose value a URL gets as its bearer token. Names, not values: a configuration is saved with the run.
    Raises ValueError for a target or an option that is wrong, and where the server does not answer within start_timeout_s.
    """

    def __init__(self, name: str, target: str, *, env: Sequence[str] = (), token_env: str | None = None, start_timeout_s: float = 60.0):
        address, separator, wanted = target.strip().rpartition("#")
        if not separator or "/" in wanted or " " in wanted:
            address, wanted = target.strip(), ""
        self.name = name
        is_url = address.startswith(("http://", "https://"))
        if env and is_url or token_env and not is_url:
            raise ValueError(f"env is for a command and token_env for a URL; {address!r} is a {'URL' if is_url else 'command'}")
        server = address if is_url else _split(address)
        headers = {"Authorization": f"Bearer {_environment([token_env])[token_env]}"} if token_env else {}
        self._sessions = Sessions(server, _environment(env), headers, start_timeout_s)
        self._finalizer = weakref.finalize(self, self._sessions.stop)
        try:
            listed = self._sessions.submit(self._sessions.tools()).result(start_timeout_s + 1.0)
            tool = _choose(listed, wanted, address)
        except BaseException as error:
            self._finalizer()
            if isinstance(error, ValueError) or not isinstance(error, Exception):
                raise
            raise ValueError(f"the MCP server {address!r} cannot be used: {reason(error)}") from error
        self.description = " ".join((tool.description or tool.title or tool.name).split())
        self.parameters: dict[str, Any] = tool.input_schema
        hints = tool.annotations
        self.idempotent = bool(hints and (hints.idempotent_hint or hints.read_only_hint))
        self._tool_name = tool.name

    async def call(self, call: ToolCall) -> ToolResult:
        start = time.perf_counter()
        try:
            arguments = arguments_of(self.parameters, valid_text(call.argument))
            check_arguments(self.parameters, arguments)
        except ToolError as error:
            return ToolResult(error.status, error.message[:MAX_MESSAGE_CHARS], time.perf_counter() - start)
        try:
            future = self._sessions.submit(self._sessions.call(self._tool_name, arguments, call.deadline_s))
            # The second deadline is for a loop that does not run any more.
            status, text = await asyncio.wait_for(asyncio.wrap_future(future), call.deadline_s + 1.0)
        except RuntimeError:
            status, text = ToolStatus.UNAVAILABLE, CLOSED
        except TimeoutError:
            status, text = ToolStatus.TIMEOUT, f"no answer within {call.deadline_s:.3g} s"
        limit = MAX_OUTPUT_CHARS if status is ToolStatus.OK else MAX_MESSAGE_CHARS
        return ToolResult(status, text[:limit], time.perf_counter() - start, len(text) > limit)

    async def close(self) -> None:
        """Ends the session and, where it is a command, the server."""
        await asyncio.to_thread(self._finalizer)


def _environment(names: Sequence[str]) -> dict[str, str]:
    if missing := [name for name in names if name not in os.environ]:
        raise ValueError(f"the environment variable {missing[0]!r} that the tool is to get is not set; export it or take its name away")
    return {name: os.environ[name] for name in names}


def _split(address: str) -> list[str]:
    try:
        command = shlex.split(address)
    except ValueError as error:
        raise ValueError(f"the command {address!r} cannot be read: {error}") from None
    if not command or shutil.which(command[0]) is None:
        raise ValueError(f"there is no command {command[0] if command else ''!r} on this machine's PATH; install it or give its path")
    return command


def _choose(listed: list[Any], wanted: str, address: str) -> Any:
    names = ", ".join(tool.name for tool in listed) or "none"
    if wanted:
        for tool in listed:
            if tool.name == wanted:
                return tool
        raise ValueError(f"the MCP server {address!r} has no tool {wanted!r}; tools: {names}")
    if len(listed) != 1:
        raise ValueError(f"the MCP server {address!r} has {len(listed)} tools ({names}); name one as {address}#TOOL")
    return listed[0]
