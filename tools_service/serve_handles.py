"""Requests to the tools of an application through Serve's deployment handles: what a training run's client and the HTTP face share.

A stateful tool keeps a session in one replica, its home. The first call of a session opens it in any replica and learns which;
the others go there, and wait where it is full (see serve_router.py). Where the home has gone, so has the session: a replica that does
not hold a session never runs its calls.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from tools_service.protocol import ToolCall, ToolResult
from tools_service.runner import ToolInfo

logger = logging.getLogger(__name__)

MAX_SESSIONS = 100_000  # whose homes are remembered; the oldest is ended first
END_TIMEOUT_S = 600.0  # in which a session is ended: the longest deadline of a call over HTTP, after which a full home has room
CLOSE_TIMEOUT_S = 10.0
MAX_TRIES = 3  # of a call that may be repeated, where its request failed on its way
BACKOFF_S = 0.1  # before try n+1: 2**n times this, times a random factor in [0.5, 1.5)


def backoff_s(attempt: int) -> float:
    return BACKOFF_S * 2**attempt * random.uniform(0.5, 1.5)


class TransportError(Exception):
    """A request failed on its way. not_started: it certainly never reached the tool. overloaded: because too many wait already.
    The reason may be shown to the policy."""

    def __init__(self, reason: str, not_started: bool = False, overloaded: bool = False):
        super().__init__(reason, not_started, overloaded)
        self.reason, self.not_started, self.overloaded = reason, not_started, overloaded


class ReplicaStats:
    """The numbers of the replicas of an application's tools, for a thread without an event loop. Construction does no I/O."""

    def __init__(self, app_name: str, tools: Iterable[str], timeout_s: float = 5.0):
        self._app_name, self._tools, self._timeout_s = app_name, tuple(tools), timeout_s
        self._handles: dict[str, Any] = {}

    def __call__(self) -> dict[str, float]:
        """`TOOL/service/replicas` that answered, and `TOOL/service/NUMBER` for every number of theirs, added up.

        A tool that does not answer within timeout_s is left out.
        """
        from ray.serve.exceptions import RayServeException

        totals: Counter[str] = Counter()
        for tool in self._tools:
            try:
                answers = self._handle(tool).broadcast("stats").results(timeout_s=self._timeout_s, return_exceptions=True)
            except (RayServeException, TimeoutError):
                continue
            for numbers in answers:
                if isinstance(numbers, dict):
                    totals.update({f"{tool}/service/{name}": number for name, number in {"replicas": 1.0, **numbers}.items()})
        return dict(totals)

    def _handle(self, tool: str) -> Any:
        from ray import serve

        if tool not in self._handles:
            handle = serve.get_deployment_handle(tool, self._app_name)
            handle._init(_run_router_in_separate_loop=True)  # the throughput flag would want the caller's own event loop
            self._handles[tool] = handle
        return self._handles[tool]


@dataclass
class _Session:
    # In its replica: callers that share the service share no session, nor do two of one caller that follow each other by one name.
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    home: str | None = None  # the replica's id
    over: bool = False  # ended before it had a home: the call that finds it one ends it
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # calls of one session run one after another


class ToolHandles:
    """For one event loop. Every failure on the way is a TransportError that names its class. Construction does no I/O."""

    def __init__(self, app_name: str):
        import tools_service.serve_app  # noqa: F401  sets the Serve flags of this process before ray.serve is imported

        self._app_name = app_name
        self._handles: dict[str, Any] = {}
        self._sessions: dict[tuple[str, str], _Session] = {}
        self._ending: set[asyncio.Task[None]] = set()

    async def describe(self, tool: str) -> ToolInfo:
        return await self._request(tool, "describe")

    async def send(self, tool: str, calls: list[ToolCall]) -> list[ToolResult | None]:
        """One entry per call, in order; deadlines count from now. None: that call must be sent again alone. A call with a session
        travels alone."""
        if len(calls) == 1 and calls[0].session is not None:
            return await self._send_in_session(tool, calls[0], calls[0].session)
        return await self._request(tool, "call_batch", calls)

    async def _send_in_session(self, tool: str, call: ToolCall, name: str) -> list[ToolResult | None]:
        start = asyncio.get_running_loop().time()
        session = self._sessions.setdefault((tool, name), _Session())
        if len(self._sessions) > MAX_SESSIONS:
            self.end_session(*next(iter(self._sessions)))
        async with session.lock:
            if session.home is None:
                try:
                    session.home = await self._request(tool, "open_session", session.id)
                except TransportError as error:
                    raise TransportError(error.reason, True, error.overloaded) from error
            left_s = max(0.0, call.deadline_s - (asyncio.get_running_loop().time() - start))
            here = [replace(call, session=session.id, deadline_s=left_s)]
            try:
                results = await self._request(tool, "call_batch", here, home=session.home)
            finally:
                if session.over:
                    self._end_in_background(tool, session.id, session.home)
        if results == [None]:
            raise TransportError("the replica that holds the session is gone", not_started=True)
        return results

    def end_session(self, tool: str, name: str) -> None:
        """Forgets the session and lets its home forget it, in the background: once its first call has ended, where that still looks for
        a home. Does nothing for a session without calls."""
        session = self._sessions.pop((tool, name), None)
        if session is None:
            return
        if session.home is None:
            session.over = True
        else:
            self._end_in_background(tool, session.id, session.home)

    def _end_in_background(self, tool: str, session_id: str, home: str) -> None:
        task = asyncio.get_running_loop().create_task(self._end(tool, session_id, home))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _end(self, tool: str, session_id: str, home: str) -> None:
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await self._request(tool, "end_session", session_id, home=home)
        except (TransportError, TimeoutError) as error:  # the replica ends sessions that nobody uses
            logger.debug("a session of tool %s was not ended: %r", tool, error)

    async def close(self) -> None:
        """Waits until the sessions that are ending have ended, at most CLOSE_TIMEOUT_S."""
        if self._ending:
            await asyncio.wait(self._ending, timeout=CLOSE_TIMEOUT_S)

    async def _request(self, tool: str, method: str, *arguments: Any, home: str | None = None) -> Any:
        from ray.exceptions import RayError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

        try:
            handle = await self._handle(tool)
        except Exception as error:  # a KeyError where there is no such application, or not yet
            raise TransportError(type(error).__name__, not_started=True) from error
        if home is not None:
            handle = handle.options(session_id=home)
        try:
            # In a context of its own: requests that are made while the HTTP face answers one would all bear the id of that, and
            # SessionRouter's base finds a replica for one request of an id only.
            return await contextvars.Context().run(getattr(handle, method).remote, *arguments)
        except BackPressureError as error:
            raise TransportError("too many requests wait already", not_started=True, overloaded=True) from error
        except DeploymentUnavailableError as error:
            raise TransportError(type(error).__name__, not_started=True) from error
        except (RayError, RayServeException) as error:
            raise TransportError(type(error).__name__) from error
        except Exception as error:  # of gRPC for one, a message beyond its limit
            logger.warning("a request to tool %s failed on its way", tool, exc_info=True)
            raise TransportError(type(error).__name__) from error

    async def _handle(self, tool: str) -> Any:
        from ray import serve

        if tool not in self._handles:  # asks the controller, which would block the event loop
            self._handles[tool] = await asyncio.to_thread(serve.get_deployment_handle, tool, self._app_name)
        return self._handles[tool]
