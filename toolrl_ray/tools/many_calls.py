"""Many calls of one tool: those of a JSON-lines file, in order, and a measurement. Only a bounded window of them is held at a time."""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
import uuid
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from toolrl_ray.errors import UserError
from tools_service.adapters import result_fields
from tools_service.protocol import ToolCall, ToolResult, ToolStatus

BATCH = 64  # calls per request
REQUESTS_IN_FLIGHT = 8
MAX_TRIES = 5  # of a call that was answered OVERLOADED, and so not run
BACKOFF_S = 0.2  # before try n+1: 2**n times this
SLOW = 0.4  # share of the deadline from which on calls count as queueing for each other
Call = Callable[[Sequence[ToolCall]], Awaitable[list[ToolResult]]]
Row = dict[str, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """The objects of a JSON-lines file, each with its `argument`; blank lines are skipped. Raises UserError at the first bad line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _row(line, f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _row(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line.strip().decode("utf-8-sig"), parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f'{where}: not JSON ({reason}); write one object a line, as {{"argument": "1+1"}}') from None
    if not isinstance(row, dict):
        raise UserError(f'{where}: a JSON {type(row).__name__}; write one object a line, as {{"argument": "1+1"}}')
    if not isinstance(row.get("argument"), str):
        wrong = f"argument={json.dumps(row['argument'])[:60]} is no string" if "argument" in row else f'no "argument" among {list(row)[:9]}'
        raise UserError(f'{where}: {wrong}; write it as {{"argument": "1+1"}}')
    return row


def _finite(text: str) -> float:
    """What could not be written again as JSON is refused, though 1e400 is a number of its own right."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is no number that a float can hold")
    return value


def count_rows(path: Path) -> int:
    """Looks at every line, so that a file with a bad one is refused before anything runs."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file; it is read twice, first to check every line")
    if num_rows := sum(1 for _ in read_rows(path)):
        return num_rows
    raise UserError(f'{path}: no line in it; write one object a line, as {{"argument": "1+1"}}')


class Window:
    """How many calls may be in flight: it grows with every call that is answered soon and halves with every request that is not. So a
    slow tool's calls do not use up their deadlines while they wait for each other, and a quick tool's come in full batches."""

    def __init__(self, deadline_s: float):
        self.size = 1
        self._slow_s = SLOW * deadline_s

    def note(self, results: Sequence[ToolResult]) -> None:
        if any(result.status is ToolStatus.OVERLOADED or result.latency_s > self._slow_s for result in results):
            self.size = max(1, self.size // 2)
        else:
            self.size = min(BATCH * REQUESTS_IN_FLIGHT, self.size + len(results))

    @property
    def batch(self) -> int:
        return max(1, self.size // REQUESTS_IN_FLIGHT)


async def call_rows(
    call: Call, tool: str, rows: Iterator[Row], write: Callable[[Row, ToolResult], None], deadline_s: float
) -> Counter[ToolStatus]:
    """Calls the tool with the argument of each row and hands row and result on, in the order of the rows. Counts by status."""
    window, counts = Window(deadline_s), Counter[ToolStatus]()
    pending: deque[tuple[list[Row], asyncio.Task[list[ToolResult]]]] = deque()
    try:
        while True:
            num_in_flight = sum(len(batch) for batch, task in pending if not task.done())
            if len(pending) < REQUESTS_IN_FLIGHT and num_in_flight + window.batch <= window.size:
                if batch := list(islice(rows, window.batch)):
                    calls = [ToolCall(tool, row["argument"], deadline_s) for row in batch]
                    pending.append((batch, asyncio.create_task(_answered(call, calls, window))))
                    continue
            if not pending:
                return counts
            batch, task = pending[0]
            await asyncio.wait([task])
            pending.popleft()
            for row, result in zip(batch, task.result(), strict=True):
                counts[result.status] += 1
                write(row, result)
    finally:
        for _, task in pending:
            task.cancel()
        await asyncio.gather(*(task for _, task in pending), return_exceptions=True)


async def _answered(call: Call, calls: list[ToolCall], window: Window) -> list[ToolResult]:
    """Calls that the service sheds are not run, and are sent again, with pauses that grow."""
    results = await call(calls)
    window.note(results)
    for attempt in range(MAX_TRIES - 1):
        shed = [index for index, result in enumerate(results) if result.status is ToolStatus.OVERLOADED]
        if not shed:
            break
        await asyncio.sleep(BACKOFF_S * 2**attempt)
        again = await call([calls[index] for index in shed])
        window.note(again)
        for index, result in zip(shed, again, strict=True):
            results[index] = result
    return results


async def call_file(call: Call, tool: str, source: Path, out: Path, deadline_s: float, tick: Callable[[], Any]) -> Counter[ToolStatus]:
    """Every row of `source` with the result's fields to `out`, in the same order; written aside and renamed whole, or not at all. A
    link stays, and what it leads to is written. Of several at once that name the same `out`, the last to end leaves its own.

    tick: called after every row. The rows must have been looked at by `count_rows`.
    """
    target = Path(os.path.realpath(out))
    aside = target.with_name(f".{uuid.uuid4().hex}.writing")  # not by the name of `out`, which others may write and may be long
    try:
        with aside.open("xb") as file:

            def write(row: Row, result: ToolResult) -> None:
                line = json.dumps({**row, **result_fields(result)}, ensure_ascii=False)
                file.write(line.encode("utf-8", "backslashreplace") + b"\n")  # half a surrogate pair becomes JSON's own escape
                tick()

            counts = await call_rows(call, tool, read_rows(source), write, deadline_s)
        os.replace(aside, target)
        return counts
    except OSError as error:
        raise UserError(f"{str(out)!r} cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            aside.unlink()


@dataclass(frozen=True)
class Measured:
    seconds: float
    latencies_s: list[float]  # as the caller saw them, sorted
    counts: Counter[ToolStatus]

    @property
    def calls_per_s(self) -> float:
        return len(self.latencies_s) / self.seconds

    def latency_s(self, percent: float) -> float:
        return self.latencies_s[min(len(self.latencies_s) - 1, int(len(self.latencies_s) * percent / 100))]


async def measure(call: Call, asked: ToolCall, in_flight: int, batch: int, seconds: float) -> Measured:
    """Keeps `in_flight` calls under way, `batch` in a request, for so many seconds; those that are under way then are waited for."""
    latencies_s: list[float] = []
    counts: Counter[ToolStatus] = Counter()
    start = time.perf_counter()

    async def caller() -> None:
        while (sent := time.perf_counter()) < start + seconds:
            results = await call([asked] * batch)
            latencies_s.extend([time.perf_counter() - sent] * batch)
            counts.update(result.status for result in results)

    callers = [asyncio.create_task(caller()) for _ in range(in_flight // batch)]
    try:
        await asyncio.gather(*callers)
    finally:
        for task in callers:
            task.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
    return Measured(time.perf_counter() - start, sorted(latencies_s), counts)
