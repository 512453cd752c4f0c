"""What stands behind the HTTP face: calls of any tools of the service, each answered with a ToolResult, whatever happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace

from tools_service.executor import timed_out
from tools_service.protocol import ToolCall, ToolResult, ToolStatus
from tools_service.runner import ToolInfo, unknown_tool
from tools_service.serve_handles import MAX_TRIES, ToolHandles, TransportError, backoff_s


class Gateway:
    """Gateway(handles, infos).call(calls); one for each event loop."""

    def __init__(self, handles: ToolHandles, infos: Mapping[str, ToolInfo]):
        self._handles, self._infos = handles, infos

    async def call(self, calls: list[ToolCall]) -> list[ToolResult]:
        """The results in the order of the calls, each with its own latency. Calls of one tool share requests up to its max_batch.

        Deadlines count from now, whatever becomes of a call's request.
        """
        arrived = time.perf_counter()
        parts: dict[str, list[list[int]]] = {}
        for index, call in enumerate(calls):
            size = self._infos[call.tool].max_batch if call.tool in self._infos and call.session is None else 1
            rows = parts.setdefault(call.tool, [[]])
            if len(rows[-1]) >= size:
                rows.append([])
            rows[-1].append(index)
        batches = [rows for of_tool in parts.values() for rows in of_tool]
        answers = await asyncio.gather(*(self._answer([calls[index] for index in rows], arrived) for rows in batches))
        results = {index: result for rows, part in zip(batches, answers, strict=True) for index, result in zip(rows, part, strict=True)}
        return [results[index] for index in range(len(calls))]

    def end_session(self, session: str) -> None:
        """Lets every tool that keeps state forget the session, in the background."""
        for name, info in self._infos.items():
            if info.stateful:
                self._handles.end_session(name, session)

    async def _answer(self, calls: list[ToolCall], arrived: float, again: bool = False) -> list[ToolResult]:
        """Of calls that share a request; those that must be sent again alone are."""
        results = await self._send(calls, arrived, again)
        latency_s = time.perf_counter() - arrived
        if len(calls) == 1 and results[0] is None:
            results = [_unavailable("the call was not run")]
        unfinished = [call for call, result in zip(calls, results, strict=True) if result is None]
        alone = iter(await asyncio.gather(*(self._answer([call], arrived, again=True) for call in unfinished)))
        return [next(alone)[0] if result is None else replace(result, latency_s=latency_s) for result in results]

    async def _send(self, calls: list[ToolCall], arrived: float, again: bool) -> list[ToolResult | None]:
        """A request, tried MAX_TRIES times where it failed on its way and the calls may be repeated."""
        info = self._infos.get(calls[0].tool)
        if info is None:
            return [unknown_tool(calls[0].tool, self._infos) for _ in calls]
        session = calls[0].session if info.stateful else None
        calls = [replace(call, session=session) for call in calls]
        left_s = max(call.deadline_s for call in calls) - (time.perf_counter() - arrived)
        failure = ""
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                for attempt in range(MAX_TRIES):
                    try:
                        return await self._handles.send(info.name, _late(calls, arrived) if again or attempt else calls)
                    except TransportError as error:
                        may_repeat = error.not_started or (info.idempotent and session is None)
                        if error.overloaded or not may_repeat or attempt == MAX_TRIES - 1:
                            raise
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


def _late(calls: list[ToolCall], arrived: float) -> list[ToolCall]:
    """With what is left of their deadlines."""
    elapsed_s = time.perf_counter() - arrived
    return [replace(call, deadline_s=max(0.0, call.deadline_s - elapsed_s)) for call in calls]


def _unavailable(reason: str) -> ToolResult:
    return ToolResult(ToolStatus.UNAVAILABLE, f"tool unavailable: {reason}")
