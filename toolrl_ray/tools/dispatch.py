"""The client of the tools, for one event loop: names, deadlines, the queue bound, counts. Knows no Ray; see call_queue.py for
how calls travel. Tools do not wait for each other: each has its own queue, bound and slots.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from toolrl_ray.tools.call_queue import CallQueue, PendingCall, Transport
from tools_service.protocol import ToolCall, ToolResult, ToolStatus


class Dispatcher:
    """A `CallToolFn` over a transport. Every call ends in exactly one ToolResult; none raises but for the caller's own cancellation.

    names: the tools that may be called. max_in_flight: requests in flight at once per tool.
    max_queued: calls per tool that may wait for a slot, beyond which a call is answered OVERLOADED at once.
    """

    def __init__(self, transport: Transport, names: Iterable[str], *, max_in_flight: int, max_queued: int):
        self._counts: Counter[str] = Counter()
        self._queues = {name: CallQueue(name, transport, max_in_flight, self._counts) for name in names}
        self._max_queued = max_queued

    async def __call__(self, call: ToolCall) -> ToolResult:
        start = time.perf_counter()  # uvloop's clock counts whole milliseconds
        result = await self._answer(call, asyncio.get_running_loop())
        self._counts["calls"] += 1
        self._counts[f"status/{result.status}"] += 1
        return replace(result, latency_s=time.perf_counter() - start)

    async def _answer(self, call: ToolCall, loop: asyncio.AbstractEventLoop) -> ToolResult:
        queue = self._queues.get(call.tool)
        if queue is None:
            return unknown_tool(call.tool, self._queues)
        if call.deadline_s <= 0:
            return ToolResult(ToolStatus.TIMEOUT, "the deadline had passed before the call")
        if queue.is_full(self._max_queued):
            return ToolResult(ToolStatus.OVERLOADED, f"{self._max_queued} calls are waiting already")
        item = PendingCall(call.argument, loop.time() + call.deadline_s, loop.create_future())
        timer = loop.call_at(item.deadline, item.expire, call.deadline_s)
        queue.add(item)
        try:
            return await item.future  # cancelled together with its caller
        finally:
            timer.cancel()
            queue.forget(item)

    def stats(self) -> dict[str, int]:
        """Counts since the start: calls, status/<ToolStatus>, requests, coalesced_requests, coalesced_calls, broken_batches, retries."""
        names = ("calls", "requests", "coalesced_requests", "coalesced_calls", "broken_batches", "retries")
        return {name: self._counts[name] for name in names} | {k: v for k, v in self._counts.items() if k.startswith("status/")}

    async def connect(self) -> None:
        """Asks for every tool's description now instead of within the deadline of its first call. Optional; never raises:
        a tool that cannot be reached is asked for again by its first call."""
        for queue in self._queues.values():
            await queue.connect()

    async def close(self) -> None:
        """Cancels what is in flight; callers that still wait are answered UNAVAILABLE."""
        for queue in self._queues.values():
            await queue.close()


def unknown_tool(name: str, known: Iterable[str]) -> ToolResult:
    return ToolResult(ToolStatus.UNKNOWN_TOOL, f"no tool {name[:50]!r}; tools: {', '.join(known)}")
