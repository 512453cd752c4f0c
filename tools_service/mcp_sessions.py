"""Sessions with an MCP server, a URL or a command. The constructor starts no server; the first use does.

They are kept by a thread with an event loop of its own: a session outlives the loop of whoever calls, and a constructor can use one.
The thread also is the parent of a command, so that the command ends with it (see mcp_child.py). A session that failed is replaced by
the next call; after a failed attempt calls are answered UNAVAILABLE at once until a growing pause is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tools_service.adapters import valid_text
from tools_service.protocol import ToolStatus

STATUS_KEY = "toolrl/status"  # in a result's _meta: see mcp_server.py
MAX_PAGES = 100  # of a server's list of tools
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 30.0
CLOSED = "the MCP server was closed"
CLOSE_TIMEOUT_S = 10.0  # the SDK takes up to 5 s to end a server that ignores the end of its input


class _Session:
    """One connection. `num_calls` are in flight; it is closed when it is `done` and none is left."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.closed_by_server = False
        self.done = asyncio.Event()
        self.client: Any = None


class Sessions:
    """The thread, its loop and the current session. The coroutines run in that loop; `submit` and `stop` are for other threads."""

    def __init__(self, server: str | list[str], env: dict[str, str], headers: dict[str, str], start_timeout_s: float):
        self._server, self._env, self._headers, self._start_timeout_s = server, env, headers, start_timeout_s
        self._current: _Session | None = None
        self._calls: set[asyncio.Task[Any]] = set()
        self._keepers: set[asyncio.Task[None]] = set()
        self._ended = False
        self._pause_s, self._not_before = FIRST_PAUSE_S, 0.0
        self._loop = asyncio.new_event_loop()
        self._attempt: asyncio.Task[_Session] | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="mcp", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Any) -> Any:
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:
            coroutine.close()
            raise

    def stop(self) -> None:
        """Ends every session and the thread. Bounded."""
        if threading.current_thread() is self._thread:  # the garbage collector can run anywhere
            return threading.Thread(target=self.stop, daemon=True).start()
        with contextlib.suppress(TimeoutError, RuntimeError):
            self.submit(self._end()).result(CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()

    async def tools(self) -> list[Any]:
        session = await self._session()
        listed, cursor = [], None
        async with asyncio.timeout(self._start_timeout_s):
            for _ in range(MAX_PAGES):
                page = await session.client.list_tools(cursor=cursor)
                listed += page.tools
                if (cursor := page.next_cursor) is None:
                    break
        return listed

    async def call(self, tool_name: str, arguments: dict[str, Any], deadline_s: float) -> tuple[ToolStatus, str]:
        from mcp import MCPError

        task = asyncio.current_task()
        assert task is not None  # this is a coroutine
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        try:
            async with asyncio.timeout(deadline_s) as deadline:
                session = await self._session()
                session.num_calls += 1
                try:
                    result = await session.client.call_tool(tool_name, arguments)
                except MCPError as error:
                    return self._failure(session, error)
                except Exception:
                    self._drop(session)
                    raise
                finally:
                    session.num_calls -= 1
                    self._close_if_idle(session)
        except Exception as error:
            if isinstance(error, TimeoutError) and deadline.expired():
                return ToolStatus.TIMEOUT, f"no answer within {deadline_s:.3g} s"
            return ToolStatus.UNAVAILABLE, f"the MCP server failed: {reason(error)}"
        except asyncio.CancelledError:
            if not self._ended:
                raise
            return ToolStatus.UNAVAILABLE, CLOSED
        return _status(result), _text(result)

    def _failure(self, session: _Session, error: Any) -> tuple[ToolStatus, str]:
        import mcp_types as types

        if error.code == types.INVALID_PARAMS:
            return ToolStatus.BAD_ARGUMENTS, reason(error)
        if error.code == types.REQUEST_TIMEOUT:
            return ToolStatus.TIMEOUT, reason(error)
        if error.code in (types.CONNECTION_CLOSED, types.INVALID_REQUEST, types.METHOD_NOT_FOUND, types.PARSE_ERROR):
            self._drop(session)  # what the SDK makes of a session that the server has forgotten, among others
            return ToolStatus.UNAVAILABLE, f"the MCP server failed: {reason(error)}"
        if error.code == types.INTERNAL_ERROR and isinstance(self._server, str):  # what the SDK makes of an HTTP status of 500 and above
            return ToolStatus.UNAVAILABLE, f"the MCP server failed: {reason(error)}"
        return ToolStatus.TOOL_ERROR, reason(error)

    async def _session(self) -> _Session:
        """The current session, or a new one. Raises what the attempt raises, or ConnectionError while none is made. The attempt is
        shared, and goes on when a caller's deadline is over: a server may take longer to start than a call may take."""
        if self._current is not None and self._current.closed_by_server:
            self._drop(self._current)
        if self._current is not None:
            return self._current
        if self._ended:
            raise ConnectionError(CLOSED)
        if self._attempt is None:
            if (wait_s := self._not_before - time.monotonic()) > 0:
                raise ConnectionError(f"it could not be started; tried again in {wait_s:.1f} s")
            self._attempt = self._loop.create_task(self._open())
            self._attempt.add_done_callback(self._attempted)
        return await asyncio.shield(self._attempt)

    def _attempted(self, attempt: asyncio.Task[_Session]) -> None:
        self._attempt = None
        if attempt.cancelled():
            return
        if attempt.exception() is None:  # which also marks it as seen, where every caller has gone
            self._pause_s, self._current = FIRST_PAUSE_S, attempt.result()
        else:
            self._not_before = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)

    async def _open(self) -> _Session:
        session, opened = _Session(), self._loop.create_future()
        keeper = self._loop.create_task(self._keep(session, opened))
        self._keepers.add(keeper)
        keeper.add_done_callback(self._keepers.discard)
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await asyncio.shield(opened)
        except BaseException:
            keeper.cancel()
            raise
        return session

    async def _keep(self, session: _Session, opened: asyncio.Future[None]) -> None:
        """Holds the session open. Its own task, since the SDK's contexts must be left by the task that entered them."""
        from mcp import Client

        try:
            async with Client(self._transport(session), cache=None) as session.client:
                opened.set_result(None)
                await session.done.wait()
        except BaseException as error:
            if not opened.done():
                opened.set_exception(error if isinstance(error, Exception) else ConnectionError("the attempt was cancelled"))
                opened.exception()  # seen, even where the caller has gone
            if not isinstance(error, Exception | asyncio.CancelledError):
                raise
        finally:
            session.closed_by_server = True

    @contextlib.asynccontextmanager
    async def _transport(self, session: _Session) -> AsyncIterator[Any]:
        from mcp import StdioServerParameters, stdio_client
        from mcp.client.streamable_http import streamable_http_client
        from mcp.shared._httpx_utils import create_mcp_http_client

        async with contextlib.AsyncExitStack() as stack:
            if isinstance(self._server, str):
                client = await stack.enter_async_context(create_mcp_http_client(headers=self._headers))
                read, write = await stack.enter_async_context(streamable_http_client(self._server, http_client=client))
            else:
                child = str(Path(__file__).with_name("mcp_child.py"))
                args = ["-I", "-S", child, str(os.getpid()), *self._server]
                parameters = StdioServerParameters(command=sys.executable, args=args, env=self._env)
                log = sys.__stderr__ or stack.enter_context(open(os.devnull, "w"))
                read, write = await stack.enter_async_context(stdio_client(parameters, errlog=log))
            yield _Watched(read, session), write

    def _drop(self, session: _Session) -> None:
        """No new call gets it; those in flight may still end."""
        if self._current is session:
            self._current = None
        self._close_if_idle(session)

    def _close_if_idle(self, session: _Session) -> None:
        if session is not self._current and session.num_calls == 0:
            session.done.set()

    async def _end(self) -> None:
        self._ended = True
        for task in self._calls:
            task.cancel()
        if (attempt := self._attempt) is not None:
            attempt.cancel()
            await asyncio.gather(attempt, return_exceptions=True)
        if self._current is not None:
            self._current.done.set()
        await asyncio.gather(*self._keepers, return_exceptions=True)


class _Watched:
    """What the SDK reads of a session's messages: notes when the server ends them."""

    def __init__(self, stream: Any, session: _Session):
        self._stream, self._session = stream, session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def __aenter__(self) -> _Watched:
        await self._stream.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> bool | None:
        return await self._stream.__aexit__(*error)

    def __aiter__(self) -> _Watched:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self._stream.__anext__()
        except Exception:  # StopAsyncIteration among it
            self._session.closed_by_server = True
            raise


def reason(error: BaseException) -> str:
    """One line; of a group of errors the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return " ".join(str(error).split()) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)


def _text(result: Any) -> str:
    """The text that the server answers; what else there is, is named."""
    parts = []
    for block in result.content:
        if (text := getattr(getattr(block, "resource", block), "text", None)) is not None:
            parts.append(text)
        else:
            parts.append(f"[{block.type}: {getattr(block, 'mime_type', None) or getattr(block, 'uri', None) or 'no text'}]")
    if not parts and result.structured_content is not None:
        parts.append(json.dumps(result.structured_content, ensure_ascii=False))
    return valid_text("\n".join(parts))


def _status(result: Any) -> ToolStatus:
    """What the server says it is, where that is one of ours."""
    if not result.is_error:
        return ToolStatus.OK
    said = (result.meta or {}).get(STATUS_KEY)
    return next((status for status in ToolStatus if status == said and status is not ToolStatus.OK), ToolStatus.TOOL_ERROR)
