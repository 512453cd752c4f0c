"""What stands behind the HTTP face: calls of any tools of the service, each answered with a ToolResult, whatever happens."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import replace

from tools_service.executor import timed_out
from tools_service.protocol import ToolCall, ToolResult, ToolStatus
from tools_service.runner import MAX_ARGUMENT_CHARS, ToolInfo, too_long, unknown_tool
from tools_service.serve_handles import MAX_TRIES, ToolHandles, TransportError, backoff_s

HTTP_IN_FLIGHT = 5000  # requests at once in a replica of the HTTP face: an equal share for each tool, and one for all else
LATE_S = 0.01  # from which on the time that a request took to arrive is taken off the deadline that the replica is told
ARRIVED: ContextVar[float | None] = ContextVar("arrived", default=None)  # time.perf_counter() when the request began to arrive


class Gateway:
    """Gateway(handles, infos).call(calls); one for each event loop."""

    def __init__(self, handles: ToolHandles, infos: Mapping[str, ToolInfo]):
        self._handles, self._infos = handles, infos
        self._share = HTTP_IN_FLIGHT // (len(infos) + 1)
        self._waiting: Counter[str] = Counter()  # requests over HTTP that wait for calls of the tool

    async def call(self, calls: list[ToolCall]) -> list[ToolResult]:
        """The results in the order of the calls, each with its own latency. Calls of one tool share requests up to its max_batch and to
        MAX_ARGUMENT_CHARS in all.

        Deadlines count from ARRIVED or else from now, whatever becomes of a call's request. A tool that stalls keeps no more than its
        share of HTTP_IN_FLIGHT waiting, and its calls beyond that are OVERLOADED.
        """
        arrived = ARRIVED.get() or time.perf_counter()
        results = {index: too_long(call.argument) for index, call in enumerate(calls) if len(call.argument) > MAX_ARGUMENT_CHARS}
        of_tool: dict[str, list[int]] = {}
        for index, call in enumerate(calls):
            if index not in results:
                of_tool.setdefault(call.tool, []).append(index)
        parts = (self._call_tool(tool, [calls[index] for index in indices], arrived) for tool, indices in of_tool.items())
        for indices, part in zip(of_tool.values(), await asyncio.gather(*parts), strict=True):
            results |= zip(indices, part, strict=True)
        return [results[index] for index in range(len(calls))]

    async def _call_tool(self, tool: str, calls: list[ToolCall], arrived: float) -> list[ToolResult]:
        if tool not in self._infos:
            return [unknown_tool(tool, self._infos) for _ in calls]
        if self._waiting[tool] >= self._share:
            return [ToolResult(ToolStatus.OVERLOADED, f"{self._share} requests wait for {tool} already") for _ in calls]
        late = time.perf_counter() - arrived > LATE_S
        self._waiting[tool] += 1
        try:
            batches = _batches(calls, self._infos[tool].max_batch)
            return [result for part in await asyncio.gather(*(self._answer(b, arrived, late) for b in batches)) for result in part]
        finally:
            self._waiting[tool] -= 1

    def end_session(self, session: str) -> None:
        """Lets every tool that keeps state forget the session, in the background."""
        for name, info in self._infos.items():
            if info.stateful:
                self._handles.end_session(name, session)

    async def _answer(self, calls: list[ToolCall], arrived: float, late: bool) -> list[ToolResult]:
        """Of calls that share a request; those that must be sent again alone are."""
        results = await self._send(calls, arrived, late)
        latency_s = time.perf_counter() - arrived
        if len(calls) == 1 and results[0] is None:
            results = [_unavailable("the call was not run")]
        unfinished = [call for call, result in zip(calls, results, strict=True) if result is None]
        alone = iter(await asyncio.gather(*(self._answer([call], arrived, late=True) for call in unfinished)))
        return [next(alone)[0] if result is None else replace(result, latency_s=latency_s) for result in results]

    async def _send(self, calls: list[ToolCall], arrived: float, late: bool) -> list[ToolResult | None]:
        """A request, tried MAX_TRIES times where it failed on its way and the calls may be repeated; those that shared it alone."""
        info = self._infos[calls[0].tool]
        session = calls[0].session if info.stateful else None
        calls = [replace(call, session=session) for call in calls]
        left_s = max(call.deadline_s for call in calls) - (time.perf_counter() - arrived)
        failure = ""
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                for attempt in range(MAX_TRIES):
                    try:
                        return await self._handles.send(info.name, _late(calls, arrived) if late or attempt else calls)
                    except TransportError as error:
                        may_repeat = error.not_started or (info.idempotent and session is None)
                        if error.overloaded or not may_repeat or attempt == MAX_TRIES - 1:
                            raise
                        if len(calls) > 1:
                            return [None] * len(calls)
                        failure = error.reason
                    await asyncio.sleep(backoff_s(attempt))
        except TimeoutError:
            if not failure:
                return [timed_out(call.deadline_s) for call in calls]
        except TransportError as error:
            if error.overloaded:  # nothing ran: a session is as it was
                return [ToolResult(ToolStatus.OVERLOADED, error.reason) for _ in calls]
            failure = error.reason
        if session is not None:
            self._handles.end_session(info.name, session)  # lost: the next call starts anew
        return [_unavailable(failure) for _ in calls]


def _batches(calls: list[ToolCall], max_batch: int) -> Iterator[list[ToolCall]]:
    batch: list[ToolCall] = []
    room = MAX_ARGUMENT_CHARS
    for call in calls:
        room -= len(call.argument)
        if batch and (len(batch) == max_batch or room < 0):
            yield batch
            batch, room = [], MAX_ARGUMENT_CHARS - len(call.argument)
        batch.append(call)
    yield batch


def _late(calls: list[ToolCall], arrived: float) -> list[ToolCall]:
    """With what is left of their deadlines."""
    elapsed_s = time.perf_counter() - arrived
    return [replace(call, deadline_s=max(0.0, call.deadline_s - elapsed_s)) for call in calls]


def _unavailable(reason: str) -> ToolResult:
    return ToolResult(ToolStatus.UNAVAILABLE, f"tool unavailable: {reason}")
