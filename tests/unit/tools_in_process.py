"""What stands in for Ray and Serve in the tests of the open faces: tools in this process behind the real Gateway, and a web server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from tools_service.executor import Executor
from tools_service.gateway import Gateway
from tools_service.protocol import AsyncTool, Tool, ToolCall, ToolError, ToolResult, ToolStatus
from tools_service.serve_handles import TransportError


class Scripted:
    """Does what its argument says; "full" is what a full queue answers."""

    name, description, idempotent = "Scripted", "for tests", False

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    async def call(self, call: ToolCall) -> ToolResult:
        match call.argument:
            case "stall":
                try:
                    await asyncio.Event().wait()
                finally:
                    self.cancelled.set()
            case "error":
                raise ToolError("no luck")
            case "crash":
                raise KeyError("secret")
            case "half":
                return ToolResult(ToolStatus.OUTPUT_LIMIT, "half of it", truncated=True)
            case "surrogates":
                return ToolResult(ToolStatus.OK, "\ud83d\ude00 \ud800")
            case "seen":
                return ToolResult(ToolStatus.OK, f"session={call.session} seed={call.seed}")
        return ToolResult(ToolStatus.OK, call.argument)


class Notebook(Scripted):
    """Remembers a session's calls."""

    name = "Notebook"

    def __init__(self) -> None:
        super().__init__()
        self.pages: dict[str | None, list[str]] = {}

    async def call(self, call: ToolCall) -> ToolResult:
        self.pages.setdefault(call.session, []).append(call.argument)
        return ToolResult(ToolStatus.OK, " ".join(self.pages[call.session]))

    async def end_session(self, session: str) -> None:
        self.pages.pop(session, None)


class InProcess:
    """Handles as the Gateway takes them, of tools in this process."""

    def __init__(self, *tools: Tool | AsyncTool):
        self._executors = {tool.name: Executor(tool, 64) for tool in tools}
        self._ending: set[asyncio.Task[None]] = set()
        self.infos = {name: executor.info for name, executor in self._executors.items()}
        self.gateway = Gateway(self, self.infos)  # type: ignore[arg-type]

    async def send(self, tool: str, calls: list[ToolCall]) -> list[ToolResult | None]:
        if any(call.argument == "full" for call in calls):
            raise TransportError("too many requests wait already", not_started=True, overloaded=True)
        return await self._executors[tool].run(calls)

    def end_session(self, tool: str, name: str) -> None:
        task = asyncio.get_running_loop().create_task(self._executors[tool].end_session(name))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


@contextmanager
def over_http(app: Any, port: int = 0) -> Iterator[int]:
    """Serves the app on loopback; the value is the port."""
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
