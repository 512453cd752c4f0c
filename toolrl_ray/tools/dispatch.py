"""The client of the tools, for one event loop: names, deadlines, the queue bound, the cache, counts. Knows no Ray; see call_queue.py
for how calls travel. Tools do not wait for each other: each has its own queue, bound and slots.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import replace

from toolrl_ray.tools.call_queue import CallQueue, PendingCall, Transport
from toolrl_ray.tools.stats import count_call
from tools_service.protocol import ToolCall, ToolResult, ToolStatus
from tools_service.runner import MAX_ARGUMENT_CHARS, ToolInfo, too_long, unknown_tool

START_POLL_S = 0.2


class Dispatcher:
    """A `CallToolFn` over a transport. Every call ends in exactly one ToolResult; none raises but for the caller's own cancellation.

    names: the tools that may be called. max_queued: calls per tool that may wait for a slot, beyond which a call is answered
    OVERLOADED at once. cache_size: results kept of tools that always answer alike, of all tools together; 0 keeps none.
    A session belongs to the calls that name it until `end_session`; only a stateful tool is told of it.
    """

    def __init__(self, transport: Transport, names: Iterable[str], *, max_queued: int, cache_size: int = 0):
        self._counts: Counter[str] = Counter()
        self._transport = transport
        self._queues = {name: CallQueue(name, transport, self._counts) for name in names}
        self._max_queued = max_queued
        self._cache_size = cache_size
        self._cache: OrderedDict[tuple[str, str], ToolResult] = OrderedDict()  # (tool, argument), the last used last

    async def __call__(self, call: ToolCall) -> ToolResult:
        start = time.perf_counter()  # uvloop's clock counts whole milliseconds
        queue = self._queues.get(call.tool)
        if queue is None:
            result = unknown_tool(call.tool, self._queues)
        elif (kept := self._look_up(call)) is not None:
            result = kept
        else:
            result = await self._answer(queue, call, asyncio.get_running_loop())
            self._keep(queue, call, result)
            if result.status is ToolStatus.UNAVAILABLE and call.session is not None:
                self._transport.end_session(call.tool, call.session)  # lost: the next call starts anew
        result = replace(result, latency_s=time.perf_counter() - start)
        count_call(self._counts, call.tool if queue else "unknown", result.status, result.latency_s)
        return result

    async def _answer(self, queue: CallQueue, call: ToolCall, loop: asyncio.AbstractEventLoop) -> ToolResult:
        if call.deadline_s <= 0:
            return ToolResult(ToolStatus.TIMEOUT, "the deadline had passed before the call")
        if len(call.argument) > MAX_ARGUMENT_CHARS:
            return too_long(call.argument)
        if queue.is_full(self._max_queued):
            return ToolResult(ToolStatus.OVERLOADED, f"{self._max_queued} calls are waiting already")
        item = PendingCall(call, loop.time() + call.deadline_s, loop.create_future())
        timer = loop.call_at(item.deadline, item.expire)
        queue.add(item)
        try:
            return await item.future  # cancelled together with its caller
        finally:
            timer.cancel()
            queue.forget(item)

    def _look_up(self, call: ToolCall) -> ToolResult | None:
        result = self._cache.get((call.tool, call.argument))
        if result is not None:
            self._cache.move_to_end((call.tool, call.argument))
            self._counts[f"{call.tool}/cache_hits"] += 1
        return result

    def _keep(self, queue: CallQueue, call: ToolCall, result: ToolResult) -> None:
        if not self._cache_size or queue.info is None or not queue.info.cacheable:
            return
        self._counts[f"{call.tool}/cache_misses"] += 1
        if result.status is ToolStatus.OK:
            self._cache[call.tool, call.argument] = result
            if len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)

    def end_session(self, session: str) -> None:
        """The calls of this session are over: the replicas that keep something for it forget it, in the background."""
        for name, queue in self._queues.items():
            if queue.info is not None and queue.info.stateful:
                self._transport.end_session(name, session)

    def stats(self) -> dict[str, int]:
        """Counts since the start, which can be added up over clients: calls, status/<ToolStatus>, requests, coalesced_requests,
        coalesced_calls, broken_batches, retries, and by tool NAME/calls, NAME/status/..., NAME/retries, NAME/cache_hits ..."""
        names = ("calls", "requests", "coalesced_requests", "coalesced_calls", "broken_batches", "retries")
        return {name: self._counts[name] for name in names} | {key: value for key, value in self._counts.items() if "/" in key}

    async def connect(self) -> None:
        """Asks for every tool's description now instead of within the deadline of its first call. Optional; never raises:
        a tool that cannot be reached is asked for again by its first call."""
        for queue in self._queues.values():
            await queue.connect()

    async def infos(self) -> dict[str, ToolInfo]:
        """What every tool says of itself; waits for those that cannot be reached yet, so the caller sets the deadline."""
        while True:
            await self.connect()
            if all(queue.info is not None for queue in self._queues.values()):
                return {name: queue.info for name, queue in self._queues.items() if queue.info is not None}
            await asyncio.sleep(START_POLL_S)

    async def close(self) -> None:
        """Cancels what is in flight; callers that still wait are answered UNAVAILABLE."""
        for queue in self._queues.values():
            await queue.close()
