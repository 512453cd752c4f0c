"""The waiting calls and the requests in flight of one tool, for one event loop. Knows no Ray.

    call -> waiting -> request in flight -> result
               ^             |
               +-- again ----+   batch broken up, or transport failed and the call may run again

- A call that finds a slot free is sent in the same turn of the event loop, with those that arrived in that turn. Only calls
  that would have to wait share a request, up to the tool's `max_batch` and to MAX_ARGUMENT_CHARS in all.
- A request whose callers have all gone is cancelled.
- What must run again runs alone, in slots of its own: a call that stalls or kills its replica takes no other call with it.
- A call of a session of a stateful tool travels alone and is never run again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from tools_service.protocol import ToolCall, ToolResult, ToolStatus
from tools_service.runner import MAX_ARGUMENT_CHARS, ToolInfo
from tools_service.serve_handles import MAX_TRIES, TransportError, backoff_s

logger = logging.getLogger(__name__)
T = TypeVar("T")

BATCHES_IN_FLIGHT = 3  # per replica: two that run or end, one on the wire; more would only make the batches smaller
SLOW_S = 0.2  # after which a request no longer holds a slot of the batches; more than the service takes to break a batch up


class Transport(Protocol):
    """What carries requests; `describe` and `send` raise TransportError and are cancelled when nobody waits for them any more."""

    async def describe(self, tool: str) -> ToolInfo: ...

    async def send(self, tool: str, calls: list[ToolCall]) -> list[ToolResult | None]:
        """One entry per call, in order; deadlines count from now. None: that call must be sent again alone."""
        ...

    def end_session(self, tool: str, name: str) -> None: ...


@dataclass(eq=False)
class PendingCall:
    call: ToolCall
    deadline: float  # of the event loop's clock
    future: asyncio.Future[ToolResult]
    tries: int = 0
    failure: str = ""  # why the last try failed

    def settle(self, result: ToolResult) -> None:
        if not self.future.done():
            self.future.set_result(result)

    def expire(self) -> None:
        if self.failure:
            self.settle(ToolResult(ToolStatus.UNAVAILABLE, f"tool unavailable: {self.failure}"))
        else:
            self.settle(ToolResult(ToolStatus.TIMEOUT, f"no answer within {self.call.deadline_s:.3g} s"))


@dataclass
class _Slot:
    shared: bool  # among the batches; otherwise among the requests that carry one call


class CallQueue:
    """The waiting calls and the requests in flight of one tool."""

    def __init__(self, name: str, transport: Transport, counts: Counter[str]):
        self._name, self._transport, self._counts = name, transport, counts
        self.info: ToolInfo | None = None  # once the service has been asked
        self._max_in_flight = 1
        self._live: set[PendingCall] = set()
        self._waiting: dict[PendingCall, None] = {}  # in order of arrival; a call that ends while it waits is taken out at once
        self._again: dict[PendingCall, None] = {}
        self._in_flight: Counter[bool] = Counter()  # requests by _Slot.shared
        self._tasks: set[asyncio.Task[None]] = set()
        self._learning = self._pump_scheduled = False

    def is_full(self, max_queued: int) -> bool:
        if len(self._waiting) + len(self._again) >= max_queued:
            self._pump()  # what arrived in this turn and finds a slot does not wait
        return len(self._waiting) + len(self._again) >= max_queued

    def add(self, item: PendingCall) -> None:
        self._live.add(item)
        self._waiting[item] = None
        self._schedule()

    def forget(self, item: PendingCall) -> None:
        self._live.discard(item)
        self._waiting.pop(item, None)
        self._again.pop(item, None)

    async def connect(self) -> None:
        if self.info is None and not self._learning:
            self._learning = True
            await self._learn()

    async def close(self) -> None:
        for item in list(self._live):
            item.settle(ToolResult(ToolStatus.UNAVAILABLE, "tool unavailable: the client was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _schedule(self) -> None:
        if not self._pump_scheduled:
            self._pump_scheduled = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        if not self._pump_scheduled:
            return
        self._pump_scheduled = False
        if self.info is None:
            if self._live and not self._learning:
                self._learning = True
                self._spawn(self._learn())
            return
        coalesces = self.info.max_batch > 1
        self._max_in_flight = self.info.max_in_flight * self.info.max_replicas
        slots = min(BATCHES_IN_FLIGHT * self.info.max_replicas, self._max_in_flight) if coalesces else self._max_in_flight
        self._fill(self._waiting, self.info.max_batch, slots)
        self._fill(self._again, 1, self._max_in_flight)

    def _fill(self, waiting: dict[PendingCall, None], size: int, slots: int) -> None:
        while waiting and self._in_flight[size > 1] < slots:
            batch, room = [], MAX_ARGUMENT_CHARS
            for item in itertools.islice(waiting, size):
                room -= len(item.call.argument)
                if batch and room < 0:
                    break
                batch.append(item)
            for item in batch:
                del waiting[item]
            self._in_flight[size > 1] += 1
            self._spawn(self._send(batch, _Slot(size > 1)))

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _learn(self) -> None:
        """Asks the service what the tool is, before its first call."""
        try:
            for attempt in range(MAX_TRIES):
                try:
                    self.info = await self._outcome(asyncio.ensure_future(self._transport.describe(self._name)))
                    return
                except TransportError as error:
                    reason = error.reason
                    await asyncio.sleep(backoff_s(attempt))
            for item in list(self._live):
                item.settle(ToolResult(ToolStatus.UNAVAILABLE, f"tool unavailable: {reason}"))
        finally:
            self._learning = False
            self._schedule()

    async def _send(self, batch: list[PendingCall], slot: _Slot) -> None:
        timer = asyncio.get_running_loop().call_later(SLOW_S, self._move, slot)
        try:
            results = await self._request(batch)
            if len(results) != len(batch):
                raise TransportError(f"{len(results)} results for {len(batch)} calls")
        except TransportError as error:
            for item in batch:
                self._try_again(item, error)
        else:
            if len(batch) > 1 and None in results:
                self._counts["broken_batches"] += 1
            for item, result in zip(batch, results, strict=True):
                if result is not None:
                    item.settle(result)
                elif len(batch) > 1:
                    self._requeue(item)
                else:
                    self._try_again(item, TransportError("the call was not run", not_started=True))
        finally:
            timer.cancel()
            self._in_flight[slot.shared] -= 1
            self._schedule()

    def _move(self, slot: _Slot) -> None:
        """Lets a slow request hold a slot of the single calls instead, so that slow calls do not stop the batches."""
        if slot.shared and self._in_flight[False] < self._max_in_flight:
            slot.shared = False
            self._in_flight[True] -= 1
            self._in_flight[False] += 1
            self._schedule()

    async def _request(self, batch: list[PendingCall]) -> list[ToolResult | None]:
        """Sends one request and gives it up, with no results wanted, as soon as no caller waits for it any more."""
        now = asyncio.get_running_loop().time()
        live = [item for item in batch if not item.future.done()]
        if not live:
            return [None] * len(batch)
        self._counts["requests"] += 1
        if len(batch) > 1:
            self._counts["coalesced_requests"] += 1
            self._counts["coalesced_calls"] += len(batch)
        calls = [self._as_sent(item, now) for item in batch]
        request = asyncio.ensure_future(self._transport.send(self._name, calls))
        num_live = len(live)

        def one_gone(_: asyncio.Future[ToolResult]) -> None:
            nonlocal num_live
            num_live -= 1
            if num_live == 0:
                request.cancel()

        for item in live:
            item.future.add_done_callback(one_gone)
        return await self._outcome(request)

    def _as_sent(self, item: PendingCall, now: float) -> ToolCall:
        """The call with what is left of its deadline; without the session where the tool keeps none."""
        assert self.info is not None
        session = item.call.session if self.info.stateful else None
        return replace(item.call, deadline_s=max(0.0, item.deadline - now), session=session)

    async def _outcome(self, request: asyncio.Future[T]) -> T:
        """What the transport answers. Whatever else happens to the request, a defect included, is a TransportError."""
        try:
            await asyncio.wait([request])
        finally:
            request.cancel()  # does nothing to a request that has ended
        if request.cancelled():
            raise TransportError("the request was cancelled")
        error = request.exception()
        if error is None:
            return request.result()
        if isinstance(error, TransportError):
            raise error
        logger.error("transport of tool %s", self._name, exc_info=error)
        raise TransportError(type(error).__name__) from error

    def _try_again(self, item: PendingCall, error: TransportError) -> None:
        if item.future.done():
            return
        item.tries += 1
        assert self.info is not None
        in_session = self.info.stateful and item.call.session is not None
        may_repeat = error.not_started or (self.info.idempotent and not in_session)
        if error.overloaded:
            return item.settle(ToolResult(ToolStatus.OVERLOADED, error.reason))
        if not may_repeat or item.tries >= MAX_TRIES:
            item.settle(ToolResult(ToolStatus.UNAVAILABLE, f"tool unavailable: {error.reason}"))
            return
        self._counts["retries"] += 1
        self._counts[f"{self._name}/retries"] += 1
        item.failure = error.reason
        asyncio.get_running_loop().call_later(backoff_s(item.tries - 1), self._requeue, item)

    def _requeue(self, item: PendingCall) -> None:
        if not item.future.done():
            self._again[item] = None
            self._schedule()
