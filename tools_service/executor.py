"""Runs calls of one tool from one event loop, each with a deadline: a `Tool` in threads, an `AsyncTool` in the loop itself. What a
replica and `--in-process` share.

A thread cannot be killed. A call that runs past its deadline is answered TIMEOUT and its thread left to finish by itself, and so is that
of a call whose caller has gone. What such a thread awaits in the loop is cancelled, and so is the task of an AsyncTool, at its deadline
and when its caller has gone. `check` reports a tool that has too many threads or tasks which run past their deadline and do not end, so
that whoever supervises the process can replace it.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from tools_service.adapters import valid_text
from tools_service.protocol import AsyncTool, Tool, ToolCall, ToolResult, ToolStatus
from tools_service.runner import MAX_OUTPUT_CHARS, ends_program, failed, not_text, run_tool, tool_info

BATCH_PATIENCE_S = 0.1  # after which a batch in a thread is broken up; 64 calculations take about a millisecond
ANSWER_MARGIN_S = 0.05  # by which an AsyncTool has less time than its caller waits, so that its own answer arrives
CANCEL_PATIENCE_S = 5.0  # in which a cancelled task has to end
PROBE_TIMEOUT_S = 10.0  # at most


class UnhealthyTool(RuntimeError):
    """The tool does not answer its probe, or too many of its calls run past their deadline."""


class _Job:
    """The calls of one request, run one after another in one thread. `results` fills up from the front."""

    def __init__(self, tool: Tool, calls: list[ToolCall], note: Callable[[ToolResult], None]):
        self.results: list[ToolResult] = []
        self.stop = False
        self.finished = False
        self._tool, self._calls, self._note = tool, calls, note
        self._received = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self.done = asyncio.Event()

    def run(self) -> None:
        try:
            for call in self._calls:
                if self.stop:
                    break
                late = time.monotonic() - self._received > call.deadline_s
                self.results.append(timed_out(call.deadline_s) if late else run_tool(self._tool, call.argument))
                self._note(self.results[-1])
        finally:
            self.finished = True
            with suppress(RuntimeError):  # the loop has ended: nobody waits any more
                self._loop.call_soon_threadsafe(self.done.set)


class Executor:
    """Executor(tool, max_in_flight).run(calls), for one event loop; `start` first, `close` last. probe_timeout_s: of `check`."""

    def __init__(self, tool: Tool | AsyncTool, max_in_flight: int, probe_timeout_s: float = PROBE_TIMEOUT_S):
        self.info = tool_info(tool)
        self._tool = tool
        self._is_async = hasattr(tool, "call") or hasattr(tool, "call_many")
        self._max_in_flight = max_in_flight
        self._probe_timeout_s = probe_timeout_s
        # Calls that nobody waits for and that still run: (refuses others from, is overdue from, has ended).
        self._left: list[tuple[float, float, Callable[[], bool]]] = []
        self._answered = self._checked = time.monotonic()  # when a call last ended in OK, and when `check` last ended

    async def start(self) -> None:
        """What the tool needs before its first call, where it has a `start`. Raises what that raises."""
        await self._optional("start")

    async def run(self, calls: list[ToolCall]) -> list[ToolResult | None]:
        """One entry per call, in order; deadlines count from now.

        A call alone has its deadline and always gets a ToolResult. A batch has BATCH_PATIENCE_S in a thread, half its shortest
        deadline in the event loop: after that it is answered with what is finished, and None stands for every call that must be
        sent again alone. So one stalled call costs the calls that share its request that little time and no more.
        """
        if self._num_left() >= self._max_in_flight:
            text = f"{self._max_in_flight} earlier calls that nobody waits for still run"
            return [ToolResult(ToolStatus.OVERLOADED, text) for _ in calls]
        return await (self._run_in_loop(calls) if self._is_async else self._run_in_thread(calls))

    async def _run_in_thread(self, calls: list[ToolCall]) -> list[ToolResult | None]:
        start = time.monotonic()
        job = _Job(self._tool, calls, self._note)
        thread = threading.Thread(target=job.run, name=f"tool-{self.info.name}", daemon=True)
        thread.start()
        deadline_s = max(call.deadline_s for call in calls)
        alone = len(calls) == 1
        try:
            async with asyncio.timeout(deadline_s if alone else min(deadline_s, BATCH_PATIENCE_S)):
                await job.done.wait()
        except TimeoutError:
            pass  # told apart by what is finished
        finally:
            job.stop = True  # also when the caller has gone: calls that have not begun never begin
            if not job.finished:
                self._left.append((start, start + deadline_s, lambda: job.finished))
                if (task := getattr(thread, "task", None)) is not None:  # see adapters.awaited
                    task.cancel()
        results: list[ToolResult | None] = list(job.results)
        unfinished = timed_out(deadline_s) if alone else None
        return results + [unfinished] * (len(calls) - len(results))

    async def _run_in_loop(self, calls: list[ToolCall]) -> list[ToolResult | None]:
        alone = len(calls) == 1
        limit_s = calls[0].deadline_s if alone else min(call.deadline_s for call in calls) / 2
        if limit_s <= 0:
            return [timed_out(call.deadline_s) if call.deadline_s <= 0 else None for call in calls]
        asked = [replace(call, deadline_s=call.deadline_s - min(ANSWER_MARGIN_S, 0.1 * call.deadline_s)) for call in calls]
        if hasattr(self._tool, "call_many"):
            parts = [(asked, asyncio.create_task(self._call_many(asked)))]
        else:
            parts = [([call], asyncio.create_task(self._call_one(call))) for call in asked]
        try:
            await asyncio.wait([task for _, task in parts], timeout=limit_s)
        finally:
            for _, task in parts:
                if not task.done():  # the tool has gone past its deadline, or the caller has gone
                    task.cancel()
                    patient = time.monotonic() + CANCEL_PATIENCE_S
                    self._left.append((patient, patient, task.done))
                elif not task.cancelled():
                    task.exception()  # seen: of a task that Ctrl-C has ended nobody asks for the result
        results: list[ToolResult | None] = []
        for part, task in parts:
            if not task.done():
                results += [timed_out(call.deadline_s) if alone else None for call in (calls if alone else part)]
            elif task.cancelled():  # by the tool itself
                results += [failed(self.info.name, call.argument, asyncio.CancelledError()) for call in part]
            else:
                results += task.result()
        for result in results:
            if result is not None:
                self._note(result)
        return results

    def _note(self, result: ToolResult) -> None:
        """Of every result, also those that come too late; from any thread."""
        if result.status is ToolStatus.OK:
            self._answered = time.monotonic()

    async def _call_one(self, call: ToolCall) -> list[ToolResult]:
        try:
            return [self._sound(call, await self._tool.call(call))]
        except BaseException as error:
            if _comes_from_outside(error):
                raise
            return [failed(self.info.name, call.argument, error)]

    async def _call_many(self, calls: list[ToolCall]) -> list[ToolResult]:
        try:
            results = await self._tool.call_many(calls)
            if len(results) != len(calls):
                raise ValueError(f"{len(results)} results for {len(calls)} calls")
        except BaseException as error:
            if _comes_from_outside(error):
                raise
            return [failed(self.info.name, call.argument, error) for call in calls]
        return [self._sound(call, result) for call, result in zip(calls, results, strict=True)]

    def _sound(self, call: ToolCall, result: object) -> ToolResult:
        if not isinstance(result, ToolResult) or not isinstance(result.text, str):
            return not_text(self.info.name, call.argument, result)
        cut = len(result.text) > MAX_OUTPUT_CHARS
        return replace(result, text=valid_text(result.text[:MAX_OUTPUT_CHARS]), truncated=result.truncated or cut)

    async def check(self) -> None:
        """Raises UnhealthyTool unless the tool answers its `probe` (an optional attribute: an argument). A tool that sheds load is
        not broken, nor is one whose probe waits behind its work: one that has ended some of it since the check before."""
        if (overdue := self._num_overdue()) >= max(1, self._max_in_flight // 2):
            raise UnhealthyTool(f"{self.info.name}: {overdue} of {self._max_in_flight} calls run past their deadline and do not end")
        probe = getattr(self._tool, "probe", None)
        if probe is None:
            return
        try:
            [result] = await self.run([ToolCall(self.info.name, probe, self._probe_timeout_s)])
            assert result is not None  # a call alone always has a result
            moves = max(self._answered, getattr(self._tool, "last_done", 0.0)) > self._checked
            if result.status not in (ToolStatus.OK, ToolStatus.OVERLOADED) and not (result.status is ToolStatus.TIMEOUT and moves):
                raise UnhealthyTool(f"{self.info.name}: the probe {probe!r} ended in {result.status}: {result.text}")
        finally:
            self._checked = time.monotonic()

    async def end_session(self, session: str) -> None:
        """Lets the tool forget what it keeps for the session. Does nothing for a tool that keeps nothing."""
        await self._optional("end_session", session)

    def stats(self) -> dict[str, float]:
        """The tool's own numbers, and `overdue`: calls past their deadline that have not ended."""
        own = self._tool.stats() if hasattr(self._tool, "stats") else {}
        return {**own, "overdue": float(self._num_overdue())}

    async def close(self) -> None:
        await self._optional("close")

    async def _optional(self, method: str, *arguments: str) -> None:
        function = getattr(self._tool, method, None)
        if function is not None and inspect.isawaitable(outcome := function(*arguments)):
            await outcome

    def _num_left(self) -> int:
        self._left = [left for left in self._left if not left[2]()]
        now = time.monotonic()
        return sum(since <= now for since, _, _ in self._left)

    def _num_overdue(self) -> int:
        now = time.monotonic()
        return sum(due <= now and not ended() for _, due, ended in self._left)


def _comes_from_outside(error: BaseException) -> bool:
    """What reaches a tool in the event loop and is not its own: the cancellation of its call, and Ctrl-C."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0
    return ends_program(error)


def timed_out(deadline_s: float) -> ToolResult:
    return ToolResult(ToolStatus.TIMEOUT, f"no answer within {deadline_s:.3g} s", deadline_s)
