"""What stands behind the HTTP face: calls of any tools of the service, each answered with a ToolResult, whatever happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace

from tools_service.executor import timed_out
from tools_service.protocol import ToolCall, ToolResult, ToolStatus
from tools_service.runner import ToolInfo
from tools_service.serve_handles import ToolHandles, TransportError

MAX_TRIES = 2  # of an idempotent call whose request failed on its way


class Gateway:
    """Gateway(handles, infos).call(calls); one for each event loop."""

    def __init__(self, handles: ToolHandles, infos: Mapping[str, ToolInfo]):
        self._handles, self._infos = handles, infos

    async def call(self, calls: list[ToolCall]) -> list[ToolResult]:
        """The results in the order of the calls. Calls of one tool share requests up to its max_batch."""
        start = time.perf_counter()
        parts: dict[str, list[list[int]]] = {}
        for index, call in enumerate(calls):
            size = self._infos[call.tool].max_batch if call.tool in self._infos and call.session is None else 1
            rows = parts.setdefault(call.tool, [[]])
            if len(rows[-1]) >= size:
                rows.append([])
            rows[-1].append(index)
        batches = [rows for of_tool in parts.values() for rows in of_tool]
        answers = await asyncio.gather(*(self._answer([calls[index] for index in rows]) for rows in batches))
        results = {index: result for rows, part in zip(batches, answers, strict=True) for index, result in zip(rows, part, strict=True)}
        return [replace(results[index], latency_s=time.perf_counter() - start) for index in range(len(calls))]

    def end_session(self, session: str) -> None:
        """Lets every tool that keeps state forget the session, in the background."""
        for name, info in self._infos.items():
            if info.stateful:
                self._handles.end_session(name, session)

    async def _answer(self, calls: list[ToolCall]) -> list[ToolResult]:
        """Of calls that share a request; those that must be sent again alone are."""
        results = await self._send(calls)
        if len(calls) > 1 and None in results:
            again = await asyncio.gather(*(self._answer([call]) for call, result in zip(calls, results, strict=True) if result is None))
            alone = iter(again)
            return [result if result is not None else next(alone)[0] for result in results]
        return [result if result is not None else _unavailable("the call was not run") for result in results]

    async def _send(self, calls: list[ToolCall]) -> list[ToolResult | None]:
        info = self._infos.get(calls[0].tool)
        if info is None:
            text = f"no tool {calls[0].tool[:50]!r}; tools: {', '.join(self._infos)}"
            return [ToolResult(ToolStatus.UNKNOWN_TOOL, text) for _ in calls]
        if not info.stateful:
            calls = [replace(call, session=None) for call in calls]
        deadline_s = max(call.deadline_s for call in calls)
        try:
            async with asyncio.timeout(deadline_s):
                return await self._tries(info, calls)
        except TimeoutError:
            return [timed_out(call.deadline_s) for call in calls]
        except TransportError as error:
            if error.overloaded:  # nothing ran: a session is as it was
                return [ToolResult(ToolStatus.OVERLOADED, error.reason) for _ in calls]
            if calls[0].session is not None:
                self._handles.end_session(info.name, calls[0].session)  # lost: the next call starts anew
            return [_unavailable(error.reason) for _ in calls]

    async def _tries(self, info: ToolInfo, calls: list[ToolCall]) -> list[ToolResult | None]:
        for _ in range(MAX_TRIES - 1):
            try:
                return await self._handles.send(info.name, calls)
            except TransportError as error:
                if error.overloaded or not (error.not_started or (info.idempotent and calls[0].session is None)):
                    raise
        return await self._handles.send(info.name, calls)


def _unavailable(reason: str) -> ToolResult:
    return ToolResult(ToolStatus.UNAVAILABLE, f"tool unavailable: {reason}")
