"""What runs in the replicas: one class for the tools, one for their HTTP face. Deployed by serve_app.py."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

from tools_service.executor import PROBE_TIMEOUT_S, Executor
from tools_service.protocol import ToolCall, ToolResult
from tools_service.runner import Factory, ToolInfo

SESSION_IDLE_S = 1800.0  # a session that nobody has used for so long has lost its caller
PROBE_SHARE = 0.8  # of the time that Serve gives to a health check, so that it learns how the probe has ended
START_FAILED, END_OF_REASON = "the tool does not start: ", " [end]"


class ToolDeployment:
    """One replica of one tool."""

    async def __init__(
        self, factory: Factory, max_in_flight: int, max_replicas: int, health_timeout_s: float, siblings: tuple[Any, ...] = ()
    ):
        # siblings: handles that make Serve deploy the other tools as parts of the same application.
        try:
            self._executor = Executor(factory(), max_in_flight, min(PROBE_TIMEOUT_S, PROBE_SHARE * health_timeout_s))
            await self._executor.start()
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RuntimeError(f"{START_FAILED}{reason}{END_OF_REASON}") from None  # it arrives amid Serve's own words
        self._info = replace(self._executor.info, max_in_flight=max_in_flight, max_replicas=max_replicas)
        self._sessions: dict[str, float] = {}  # -> when it was last used

    async def describe(self) -> ToolInfo:
        return self._info

    async def call_batch(self, calls: list[ToolCall]) -> list[ToolResult | None]:
        """One entry per call, in order; None where the call must be sent again alone (see Executor.run), and for a call whose
        session this replica does not hold."""
        if (session := calls[0].session) is not None:
            if session not in self._sessions:
                return [None] * len(calls)
            self._sessions[session] = time.monotonic()
        return await self._executor.run(calls)

    async def open_session(self, session: str) -> str:
        """This replica holds the session from now on; returns the replica's id."""
        from ray import serve

        self._sessions[session] = time.monotonic()
        return serve.get_replica_context().replica_id.unique_id

    async def end_session(self, session: str) -> None:
        if self._sessions.pop(session, None) is not None:
            await self._executor.end_session(session)

    async def stats(self) -> dict[str, float]:
        """The numbers of one replica."""
        return self._executor.stats() | {"sessions": float(len(self._sessions))}

    async def check_health(self) -> None:
        for session in [name for name, used in self._sessions.items() if time.monotonic() - used > SESSION_IDLE_S]:
            await self.end_session(session)
        await self._executor.check()

    async def inspect(self) -> dict[str, Any]:
        """This replica's process and how Serve runs in it, to see that the flag took effect."""
        from ray.serve._private import constants

        return {
            "pid": os.getpid(),
            "throughput_optimized": constants.RAY_SERVE_THROUGHPUT_OPTIMIZED,
            "user_code_in_separate_thread": constants.RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD,
            "direct_ingress": constants.RAY_SERVE_ENABLE_DIRECT_INGRESS,
        }

    async def __del__(self) -> None:  # awaited by Serve when a replica has drained
        if hasattr(self, "_executor"):
            await self._executor.close()


class HttpDeployment:
    """The HTTP face, behind Serve's proxy: the tools of the application by their names."""

    async def __init__(self, names: list[str], tools: tuple[Any, ...]):
        # tools: handles that make Serve deploy the tools as parts of the same application.
        self._names = names

    async def __serve_build_asgi_app__(self) -> Any:
        from ray import serve

        from tools_service.gateway import Gateway
        from tools_service.http_app import make_app
        from tools_service.serve_handles import ToolHandles

        handles = ToolHandles(serve.get_replica_context().app_name)
        infos = {name: await handles.describe(name) for name in self._names}
        gateway = Gateway(handles, infos)
        return make_app(infos, gateway.call, gateway.end_session)
