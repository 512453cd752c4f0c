"""Many calls of one tool: a bounded window that fits the tool's pace, order, and output that is whole or not there."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from toolrl_ray.errors import UserError
from toolrl_ray.tools import many_calls
from toolrl_ray.tools.http_client import ServiceGone
from toolrl_ray.tools.many_calls import BATCH, REQUESTS_IN_FLIGHT, Window, call_file, call_rows, count_rows, measure, read_rows
from tools_service.protocol import ToolCall, ToolResult, ToolStatus

MOST = BATCH * REQUESTS_IN_FLIGHT


class Echo:
    """Answers with the argument; every later request is quicker than the one before it, within a group of four."""

    def __init__(self, latency_s: float = 0.0):
        self.sizes: list[int] = []
        self.in_flight = self.most_in_flight = 0
        self.latency_s = latency_s

    async def __call__(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        self.sizes.append(len(calls))
        self.in_flight += len(calls)
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        for _ in range(4 - len(self.sizes) % 4):
            await asyncio.sleep(0)
        self.in_flight -= len(calls)
        return [ToolResult(ToolStatus.OK, call.argument, self.latency_s) for call in calls]


def rows(number: int) -> Iterator[dict]:
    return ({"argument": str(index)} for index in range(number))


async def test_results_come_in_the_order_of_the_rows() -> None:
    seen: list[tuple[str, str]] = []
    counts = await call_rows(Echo(), "Echo", rows(3000), lambda row, result: seen.append((row["argument"], result.text)), 10.0)
    assert seen == [(str(index), str(index)) for index in range(3000)]
    assert counts == {ToolStatus.OK: 3000}


async def test_the_calls_of_a_quick_tool_come_in_full_batches_and_never_more_than_the_window() -> None:
    echo = Echo()
    await call_rows(echo, "Echo", rows(10_000), lambda row, result: None, 10.0)
    assert echo.sizes[0] == 1 and echo.sizes.count(BATCH) > 100
    assert BATCH < echo.most_in_flight <= MOST


async def test_the_calls_of_a_slow_tool_do_not_wait_for_each_other() -> None:
    echo = Echo(latency_s=4.5)
    await call_rows(echo, "Echo", rows(40), lambda row, result: None, 10.0)
    assert echo.most_in_flight == 1 and echo.sizes == [1] * 40


def test_the_window_halves_when_the_service_sheds_load_and_never_closes() -> None:
    window = Window(10.0)
    for _ in range(20):
        window.note([ToolResult(ToolStatus.OK, "")] * window.size)
    assert (window.size, window.batch) == (MOST, BATCH)
    window.note([ToolResult(ToolStatus.OK, ""), ToolResult(ToolStatus.OVERLOADED, "")])
    assert window.size == MOST // 2
    for _ in range(20):
        window.note([ToolResult(ToolStatus.TIMEOUT, "", latency_s=10.0)])
    assert (window.size, window.batch) == (1, 1)


async def test_calls_that_are_shed_are_sent_again_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_calls, "BACKOFF_S", 0.001)
    asked: list[str] = []

    async def sheds(calls: Sequence[ToolCall]) -> list[ToolResult]:
        asked.extend(call.argument for call in calls)
        status = {"1": ToolStatus.TIMEOUT, "2": ToolStatus.OVERLOADED}
        first = [asked.count(call.argument) < 3 for call in calls]
        return [ToolResult(status.get(c.argument, ToolStatus.OK) if f else ToolStatus.OK, "") for c, f in zip(calls, first, strict=True)]

    counts = await call_rows(sheds, "Echo", rows(4), lambda row, result: None, 10.0)
    assert {argument: asked.count(argument) for argument in "0123"} == {"0": 1, "1": 1, "2": 3, "3": 1}
    assert counts == {ToolStatus.OK: 3, ToolStatus.TIMEOUT: 1}


async def test_a_service_that_always_sheds_is_not_asked_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_calls, "BACKOFF_S", 0.001)
    asked: list[str] = []

    async def sheds(calls: Sequence[ToolCall]) -> list[ToolResult]:
        asked.extend(call.argument for call in calls)
        return [ToolResult(ToolStatus.OVERLOADED, "") for _ in calls]

    assert await call_rows(sheds, "Echo", rows(2), lambda row, result: None, 10.0) == {ToolStatus.OVERLOADED: 2}
    assert len(asked) == 2 * many_calls.MAX_TRIES


async def test_a_file_of_any_length_is_held_in_part_only(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = json.dumps({"argument": "x" * 2000}) + "\n"
    num_rows = 16 * MOST
    source.write_text(line * num_rows)  # 16 MB
    tracemalloc.start()
    try:
        assert count_rows(source) == num_rows
        await call_file(Echo(), "Echo", source, out, 10.0, lambda: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < source.stat().st_size / 2
    assert sum(1 for _ in read_rows(out)) == num_rows


async def test_a_row_keeps_what_it_has_and_text_of_any_kind_comes_out_as_valid_json(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"argument": "\xc3\xa9\\n", "id": 7, "half": "\\ud800"}\r\n\n  {"argument": "b", "text": "old"}')
    await call_file(Echo(0.25), "Echo", source, out, 10.0, lambda: None)
    added = {"status": "ok", "latency_s": 0.25, "truncated": False}
    lines = out.read_bytes().decode().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"argument": "é\n", "id": 7, "half": "\ud800", "text": "é\n", **added},
        {"argument": "b", "text": "b", **added},
    ]
    assert "é" in lines[0]


async def test_a_failure_in_mid_file_leaves_the_old_output_and_nothing_beside_it(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"argument": "1"}\n' * 100)
    out.write_text("old")
    calls = 0

    async def breaks(asked: Sequence[ToolCall]) -> list[ToolResult]:
        nonlocal calls
        calls += len(asked)
        if calls > 50:
            raise ServiceGone("the service is gone")
        return [ToolResult(ToolStatus.OK, "") for _ in asked]

    with pytest.raises(ServiceGone):
        await call_file(breaks, "Echo", source, out, 10.0, lambda: None)
    assert out.read_text() == "old" and sorted(tmp_path.iterdir()) == [source, out]


async def test_two_that_name_the_same_output_do_not_touch_each_others(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"argument": "1"}\n' * 100)
    under_way, go = asyncio.Event(), asyncio.Event()

    async def slow(calls: Sequence[ToolCall]) -> list[ToolResult]:
        under_way.set()
        await go.wait()
        return [ToolResult(ToolStatus.OK, "slow") for _ in calls]

    async def written() -> set[str]:
        rows = list(read_rows(out))
        assert len(rows) == 100 and len(list(tmp_path.iterdir())) == (2 if go.is_set() else 3)
        return {row["text"] for row in rows}

    first = asyncio.ensure_future(call_file(slow, "Echo", source, out, 10.0, lambda: None))
    await under_way.wait()
    await call_file(Echo(), "Echo", source, out, 10.0, lambda: None)
    assert await written() == {"1"}
    go.set()
    await first
    assert await written() == {"slow"}


async def test_the_output_may_have_the_longest_name_that_there_is(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / ("n" * 255)
    source.write_text('{"argument": "1"}\n')
    await call_file(Echo(), "Echo", source, out, 10.0, lambda: None)
    assert len(list(read_rows(out))) == 1


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ('{"argument": "1"}\n\n{"argument": 1}\n', 3, "argument=1 is no string"),
        ('{"argument": "1"}\n[]\n', 2, "a JSON list"),
        ('{"query": "1"}\n', 1, "no \"argument\" among ['query']"),
        ("{}\n", 1, 'no "argument"'),
        ('{"argument": "1"}\n{"argument": "1"\n', 2, "not JSON"),
        ("[" * 100_000, 1, "not JSON"),
        ('{"argument": "1"}\n\udcff\n', 2, "not JSON"),
        ('{"argument": "1", "x": [1e400]}\n', 1, "not JSON (1e400 is no number that a float can hold)"),
        ('{"argument": "1", "x": NaN}\n', 1, "not JSON (NaN is no number that a float can hold)"),
        ('{"argument": "1", "x": -Infinity}\n', 1, "not JSON (-Infinity is no number that a float can hold)"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, text: str, line: int, part: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as error:
        count_rows(source)
    assert str(error.value).startswith(f"{source}:{line}: ") and part in str(error.value)


@pytest.mark.parametrize("batch", [1, 4])
async def test_a_measurement_keeps_its_calls_in_flight_and_adds_up(batch: int) -> None:
    echo = Echo()
    measured = await measure(echo, ToolCall("Echo", "1"), in_flight=8, batch=batch, seconds=0.05)
    assert set(echo.sizes) == {batch} and echo.most_in_flight == 8
    assert len(measured.latencies_s) == sum(echo.sizes) == measured.counts[ToolStatus.OK]
    assert measured.latency_s(0) <= measured.latency_s(50) <= measured.latency_s(100) == max(measured.latencies_s)
    assert measured.calls_per_s == pytest.approx(sum(echo.sizes) / measured.seconds)
