"""The executor with an AsyncTool: deadlines, cancellation, batches, and tools that break their promises."""

from __future__ import annotations

import asyncio
import time

import pytest

from tools_service import executor as module
from tools_service.executor import Executor, UnhealthyTool
from tools_service.protocol import ToolCall, ToolError, ToolResult, ToolStatus
from tools_service.serve_replica import ToolDeployment

OK, TIMEOUT, TOOL_ERROR = ToolStatus.OK, ToolStatus.TIMEOUT, ToolStatus.TOOL_ERROR


class Panic(BaseException):
    """As Rust code raises it through pyo3."""


class Scripted:
    """Does what the argument says. "stall" never ends, "stubborn" not even when it is cancelled; what happens is in `log`."""

    name, description, idempotent, probe = "Scripted", "for tests", True, "probe"

    def __init__(self):
        self.log: list[str] = []
        self.deadlines: list[float] = []

    async def start(self):
        self.log.append("start")

    async def close(self):
        self.log.append("close")

    async def end_session(self, session):
        self.log.append(f"end {session}")

    def stats(self):
        return {"seen": float(len(self.deadlines))}

    async def call(self, call):
        self.deadlines.append(call.deadline_s)
        match call.argument:
            case "stall" | "stubborn":
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    self.log.append("cancelled")
                    if call.argument == "stall":
                        raise
                    await asyncio.Event().wait()
            case "own answer":
                await asyncio.sleep(call.deadline_s)
                return ToolResult(TIMEOUT, "partial output")
            case "error":
                raise ToolError("no such thing")
            case "crash":
                raise KeyError("secret")
            case "panic":
                raise Panic
            case "cancel itself":
                raise asyncio.CancelledError
            case "interrupt":
                raise KeyboardInterrupt
            case "none":
                return None
            case "long":
                return ToolResult(OK, "x" * (module.MAX_OUTPUT_CHARS + 1))
        return ToolResult(OK, call.argument)


class Many(Scripted):
    max_batch, end_session = 4, None
    stateful = False
    call = None

    async def call_many(self, calls):
        self.log.append(" ".join(call.argument for call in calls))
        if any(call.argument == "stall" for call in calls):
            await asyncio.Event().wait()
        if any(call.argument == "panic" for call in calls):
            raise Panic
        return [ToolResult(OK, call.argument) for call in calls if call.argument != "lose one"]


def run(tool, *arguments, deadline_s=5.0):
    async def scenario():
        return await Executor(tool, 4).run([ToolCall("Scripted", a, deadline_s) for a in arguments])

    return asyncio.run(scenario())


@pytest.mark.parametrize(
    ("argument", "status", "text"),
    [
        ("fine", OK, "fine"),
        ("error", TOOL_ERROR, "no such thing"),
        ("crash", TOOL_ERROR, "the tool failed with KeyError"),
        ("panic", TOOL_ERROR, "the tool failed with Panic"),
        ("cancel itself", TOOL_ERROR, "the tool failed with CancelledError"),
        ("none", TOOL_ERROR, "the tool returned NoneType instead of text"),
    ],
)
def test_every_end_of_a_call_is_a_named_result(argument, status, text):
    [result] = run(Scripted(), argument)
    assert (result.status, result.text) == (status, text)


def test_output_beyond_the_limit_is_cut_and_marked():
    [result] = run(Scripted(), "long")
    assert len(result.text) == module.MAX_OUTPUT_CHARS and result.truncated


def test_output_that_is_no_unicode_is_made_so():
    [result] = run(Scripted(), "half \ud83d")
    assert result.text == "half \ufffd" and not result.truncated


def test_the_tools_own_answer_at_its_deadline_arrives_before_the_callers():
    tool = Scripted()
    [result] = run(tool, "own answer", deadline_s=0.5)
    assert (result.status, result.text) == (TIMEOUT, "partial output")
    assert tool.deadlines == [0.45]


def test_a_call_past_its_deadline_is_cancelled_in_the_tool():
    tool = Scripted()

    async def scenario():
        [result] = await Executor(tool, 4).run([ToolCall("Scripted", "stall", 0.05)])
        await asyncio.sleep(0)
        return result

    result = asyncio.run(scenario())
    assert (result.status, result.text, tool.log) == (TIMEOUT, "no answer within 0.05 s", ["cancelled"])


def test_a_caller_that_goes_cancels_its_call_in_the_tool():
    tool = Scripted()

    async def scenario():
        request = asyncio.ensure_future(Executor(tool, 4).run([ToolCall("Scripted", "stall", 50.0)]))
        while not tool.deadlines:
            await asyncio.sleep(0)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await asyncio.sleep(0)

    asyncio.run(scenario())
    assert tool.log == ["cancelled"]


def test_a_call_whose_deadline_passed_on_its_way_is_not_run():
    tool = Scripted()
    [result] = run(tool, "fine", deadline_s=0.0)
    assert result.status is TIMEOUT and tool.deadlines == []


def test_tasks_that_ignore_their_cancellation_make_the_tool_unhealthy_and_then_refused(monkeypatch):
    monkeypatch.setattr(module, "CANCEL_PATIENCE_S", 0.0)
    tool = Scripted()

    async def scenario():
        executor = Executor(tool, 2)
        await executor.run([ToolCall("Scripted", "stubborn", 0.02)])
        with pytest.raises(UnhealthyTool, match="1 of 2 calls run past their deadline"):
            await executor.check()
        await executor.run([ToolCall("Scripted", "stubborn", 0.02)])
        [refused] = await executor.run([ToolCall("Scripted", "fine", 5.0)])
        return refused, executor.stats()

    refused, stats = asyncio.run(scenario())
    assert refused.status is ToolStatus.OVERLOADED
    assert stats == {"seen": 2.0, "overdue": 2.0}


def test_a_burst_of_cancelled_calls_that_end_in_time_refuses_nobody():
    async def scenario():
        executor = Executor(Scripted(), 2)
        await asyncio.gather(*(executor.run([ToolCall("Scripted", "stall", 0.02)]) for _ in range(8)))
        [result] = await executor.run([ToolCall("Scripted", "fine", 5.0)])
        return result

    assert asyncio.run(scenario()).status is OK


def test_a_batch_goes_to_call_many_whole_and_in_order():
    tool = Many()
    assert [r.text for r in run(tool, "a", "b", "c")] == ["a", "b", "c"]
    assert tool.log == ["a b c"]


def test_a_batch_that_stalls_is_sent_back_at_half_its_shortest_deadline():
    assert run(Many(), "a", "stall", deadline_s=0.1) == [None, None]
    [alone] = run(Many(), "stall", deadline_s=0.1)
    assert alone.status is TIMEOUT


@pytest.mark.parametrize("deadlines", [(0.2, 3600.0), (3600.0, 0.2)])
async def test_a_batch_waits_for_half_the_shortest_deadline_of_its_calls(deadlines, monkeypatch):
    waited = []

    async def wait(tasks, *, timeout):
        waited.append(timeout)
        return await original(tasks, timeout=timeout)

    original = asyncio.wait
    monkeypatch.setattr(module.asyncio, "wait", wait)
    batch = [ToolCall("Scripted", "stall", deadline_s) for deadline_s in deadlines]
    assert (await Executor(Many(), 64).run(batch), waited) == ([None, None], [0.1])


def test_a_batch_with_a_result_too_few_is_an_error_of_the_tool():
    assert [(r.status, r.text) for r in run(Many(), "a", "lose one")] == [(TOOL_ERROR, "the tool failed with ValueError")] * 2


def test_a_batch_whose_tool_panics_is_an_error_of_the_tool():
    assert [(r.status, r.text) for r in run(Many(), "a", "panic")] == [(TOOL_ERROR, "the tool failed with Panic")] * 2


def test_ctrl_c_ends_the_program_and_not_the_call():
    with pytest.raises(KeyboardInterrupt):
        run(Scripted(), "interrupt")


def test_start_sessions_and_close_reach_the_tool_that_has_them():
    tool = Scripted()

    async def scenario():
        executor = Executor(tool, 2)
        await executor.start()
        await executor.check()
        await executor.end_session("s")
        await executor.close()

    asyncio.run(scenario())
    assert tool.log == ["start", "end s", "close"]


async def test_a_tool_whose_probe_waits_is_busy_while_it_ends_other_work_and_hangs_otherwise():
    tool = Scripted()
    tool.probe = "stall"
    executor = Executor(tool, 64, probe_timeout_s=0.02)
    await executor.run([ToolCall("Scripted", "fine", 5.0)])
    await executor.check()
    with pytest.raises(UnhealthyTool, match="the probe 'stall' ended in timeout"):
        await executor.check()  # nothing has ended since
    for argument in ("error", "own answer"):
        await executor.run([ToolCall("Scripted", argument, 0.05)])
    with pytest.raises(UnhealthyTool, match="the probe 'stall' ended in timeout"):
        await executor.check()  # nothing has ended well
    tool.last_done = time.monotonic()
    await executor.check()


@pytest.mark.parametrize(("health_timeout_s", "probe_s"), [(5.0, 4.0), (30.0, 10.0)])
async def test_the_probe_of_a_replica_ends_before_serve_gives_its_check_up(health_timeout_s, probe_s, monkeypatch):
    monkeypatch.delattr(ToolDeployment, "__del__")  # Serve awaits it
    tool = Scripted()
    replica = ToolDeployment.__new__(ToolDeployment)
    await replica.__init__(lambda: tool, 64, 1, health_timeout_s)
    await replica.check_health()
    assert tool.deadlines == [probe_s - module.ANSWER_MARGIN_S]
