"""The tools as an MCP server: over stdin and stdout for one client, or over streamable HTTP beside the HTTP face (http_app.py).

Over HTTP every request stands alone ("stateless"): requests of one client may come through several proxies and reach several replicas,
which would have to share the MCP sessions otherwise. No tool needs one. A client that goes away, or gives a call up, cancels it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, redirect_stdout, suppress
from typing import Any, TextIO

import anyio
import mcp_types as types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from starlette.types import Receive, Scope, Send

from tools_service.adapters import argument_text, valid_text
from tools_service.mcp_sessions import STATUS_KEY
from tools_service.protocol import ToolCall, ToolError, ToolResult, ToolStatus
from tools_service.runner import ToolInfo

logger = logging.getLogger(__name__)

Call = Callable[[list[ToolCall]], Awaitable[list[ToolResult]]]

DEADLINE_S = 50.0  # of every call: MCP has no word for it, and clients commonly wait for 60 s


def make_server(infos: Mapping[str, ToolInfo], call: Call, session: str | None = None) -> Server[Any]:
    """session: that of every call, for tools that keep state; None where each call stands alone."""

    async def list_tools(context: Any, parameters: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[_tool(info) for info in infos.values()])

    async def call_tool(context: Any, parameters: types.CallToolRequestParams) -> types.CallToolResult:
        return _shown(await _answer(infos, call, parameters.name, parameters.arguments or {}, session))

    return Server(
        "toolrl-tools",
        on_list_tools=list_tools,
        on_call_tool=call_tool,
        get_tool_input_schema=lambda name: infos[name].parameters if name in infos else None,
    )


class HttpFace:
    """The streamable HTTP face: an ASGI app, while its `run()` is entered. Host and Origin are the web application's to check."""

    def __init__(self, infos: Mapping[str, ToolInfo], call: Call, max_body_bytes: int):
        self._server, self._max_body_bytes = make_server(infos, call), max_body_bytes
        self._sessions: StreamableHTTPSessionManager | None = None

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        self._sessions = StreamableHTTPSessionManager(self._server, stateless=True, max_request_body_size=self._max_body_bytes)
        async with self._sessions.run():
            yield

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._sessions is None:
            raise RuntimeError("the lifespan of the web application does not run; serve it with one that does")
        await self._sessions.handle_request(scope, receive, send)


@contextmanager
def own_stdout() -> Iterator[TextIO]:
    """stdout, for the protocol alone: what is printed meanwhile, by a tool's module or a process of its, goes to stderr."""
    sys.stdout.flush()
    wire = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield os.fdopen(wire, "w", encoding="utf-8", closefd=False)  # open to the end: a thread may still write to it
    finally:
        sys.stdout.flush()
        os.dup2(wire, 1)


async def serve_stdio(
    infos: Mapping[str, ToolInfo],
    call: Call,
    end_session: Callable[[str], Awaitable[None]] | None = None,
    stdout: TextIO | None = None,
) -> None:
    """Serves one client until it closes stdin, or until the caller cancels this. Nothing but the protocol reaches its stdout: what else
    is printed goes to stderr.

    All calls share one session, so that a tool that keeps state keeps it for this client. end_session: what lets the tools forget it.
    stdout: where the client reads, of `own_stdout`, which a caller enters before it starts tools that may print.
    """
    session = uuid.uuid4().hex
    server = make_server(infos, call, session)
    try:
        with _stdin_lines() as lines:
            async with stdio_server(stdin=lines, stdout=None if stdout is None else anyio.wrap_file(stdout)) as (read, write):
                await server.run(read, write, server.create_initialization_options())
    finally:
        if end_session is not None:
            await end_session(session)


@contextmanager
def _stdin_lines() -> Iterator[Any]:
    """An asynchronous iterator. Read by a daemon thread: the SDK's own reader would keep a process that Ctrl-C ends until its client
    sends another line. Meanwhile file descriptor 0 is empty, so that no tool reads what is the server's."""
    loop, lines = asyncio.get_running_loop(), asyncio.Queue[str]()

    def read(stdin: TextIO) -> None:
        with suppress(RuntimeError):  # the loop has ended
            for line in stdin:
                loop.call_soon_threadsafe(lines.put_nowait, line)
            loop.call_soon_threadsafe(lines.put_nowait, "")

    async def iterate() -> AsyncIterator[str]:
        while line := await lines.get():
            yield line

    stdin, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    file = os.fdopen(stdin, encoding="utf-8", errors="replace", closefd=False)
    threading.Thread(target=read, args=(file,), name="stdin", daemon=True).start()
    try:
        yield iterate()
    finally:
        os.dup2(stdin, 0)


async def _answer(infos: Mapping[str, ToolInfo], call: Call, name: str, arguments: dict[str, Any], session: str | None) -> ToolResult:
    if name not in infos:
        return ToolResult(ToolStatus.UNKNOWN_TOOL, f"no tool {name[:50]!r}; tools: {', '.join(infos)}")
    try:
        argument = argument_text(infos[name].parameters, arguments)
    except ToolError as error:
        return ToolResult(error.status, error.message)
    try:
        [result] = await call([ToolCall(name, argument, DEADLINE_S, session)])
    except Exception as error:  # the way to a service elsewhere: a client is told in words, as of any other failure
        logger.warning("tool %s could not be called", name, exc_info=True)
        return ToolResult(ToolStatus.UNAVAILABLE, f"tool unavailable: {' '.join(str(error).split()) or type(error).__name__}")
    return result


def _shown(result: ToolResult) -> types.CallToolResult:
    """A model reads the text alone: whatever is not OK opens with its status."""
    failed = result.status is not ToolStatus.OK
    text = valid_text(f"{result.status}: {result.text}" if failed else result.text)
    return types.CallToolResult(
        content=[types.TextContent(text=text)],
        is_error=failed,
        _meta={STATUS_KEY: str(result.status), "toolrl/truncated": result.truncated},
    )


def _tool(info: ToolInfo) -> types.Tool:
    return types.Tool(
        name=info.name,
        description=info.description,
        input_schema={"type": "object", **info.parameters},
        annotations=types.ToolAnnotations(idempotent_hint=info.idempotent),
    )
