"""Runs calls of one tool in threads, each with a deadline, from one event loop. What a replica and `--in-process` share.

A thread cannot be killed. A call that runs past its deadline is answered TIMEOUT and its thread left to finish by itself;
`check` reports a tool that has too many of them, so that whoever supervises the process can replace it.
"""

from __future__ import annotations

import asyncio
import threading
import time

from tools_service.protocol import Tool, ToolResult, ToolStatus
from tools_service.runner import run_tool, tool_info

BATCH_PATIENCE_S = 0.1  # after which a batch is broken up; 64 calculations take about a millisecond
PROBE_TIMEOUT_S = 10.0


class UnhealthyTool(RuntimeError):
    """The tool does not answer its probe, or too many of its calls run past their deadline."""


class _Job:
    """The calls of one request, run one after another in one thread. `results` fills up from the front."""

    def __init__(self, tool: Tool, calls: list[tuple[str, float]]):
        self.results: list[ToolResult] = []
        self.stop = False
        self.finished = False
        self._tool, self._calls = tool, calls
        self._received = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self.done = asyncio.Event()

    def run(self) -> None:
        for argument, deadline_s in self._calls:
            if self.stop:
                break
            late = time.monotonic() - self._received > deadline_s
            self.results.append(timed_out(deadline_s) if late else run_tool(self._tool, argument))
        self.finished = True
        try:
            self._loop.call_soon_threadsafe(self.done.set)
        except RuntimeError:  # the loop has ended: nobody waits any more
            return


class Executor:
    """Executor(tool, max_threads).run(calls), for one event loop."""

    def __init__(self, tool: Tool, max_threads: int):
        self.info = tool_info(tool)
        self._tool = tool
        self._max_threads = max_threads
        self._overdue: list[_Job] = []

    async def run(self, calls: list[tuple[str, float]]) -> list[ToolResult | None]:
        """One entry per (argument, deadline in seconds from now), in order.

        A call alone has its deadline and always gets a ToolResult. A batch has BATCH_PATIENCE_S: after that it is answered
        with what is finished, and None stands for every call that must be sent again alone. So one stalled call costs the
        calls that share its request that little time and no more.
        """
        if self._num_overdue() >= self._max_threads:
            text = f"{self._max_threads} earlier calls still run past their deadline"
            return [ToolResult(ToolStatus.OVERLOADED, text) for _ in calls]
        job = _Job(self._tool, calls)
        threading.Thread(target=job.run, name=f"tool-{self.info.name}", daemon=True).start()
        deadline_s = max(deadline for _, deadline in calls)
        alone = len(calls) == 1
        try:
            async with asyncio.timeout(deadline_s if alone else min(deadline_s, BATCH_PATIENCE_S)):
                await job.done.wait()
        except TimeoutError:
            pass  # told apart by what is finished
        finally:
            job.stop = True  # also when the caller has gone: calls that have not begun never begin
            if not job.finished:
                self._overdue.append(job)
        results: list[ToolResult | None] = list(job.results)
        unfinished = timed_out(deadline_s) if alone else None
        return results + [unfinished] * (len(calls) - len(results))

    async def check(self) -> None:
        """Raises UnhealthyTool unless the tool answers its `probe` (an optional attribute: an argument) with OK."""
        if (overdue := self._num_overdue()) >= max(1, self._max_threads // 2):
            raise UnhealthyTool(f"{self.info.name}: {overdue} of {self._max_threads} threads run past their deadline")
        probe = getattr(self._tool, "probe", None)
        if probe is None:
            return
        [result] = await self.run([(probe, PROBE_TIMEOUT_S)])
        if result.status is not ToolStatus.OK:
            raise UnhealthyTool(f"{self.info.name}: the probe {probe!r} ended in {result.status}: {result.text}")

    def _num_overdue(self) -> int:
        if self._overdue:
            self._overdue = [job for job in self._overdue if not job.finished]
        return len(self._overdue)


def timed_out(deadline_s: float) -> ToolResult:
    return ToolResult(ToolStatus.TIMEOUT, f"no answer within {deadline_s:.3g} s", deadline_s)
