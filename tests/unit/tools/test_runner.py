from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from tools_service.executor import Executor, UnhealthyTool
from tools_service.protocol import ToolCall, ToolError, ToolStatus
from tools_service.runner import MAX_OUTPUT_CHARS, builtin_tools, run_tool, tool_info


class Panic(BaseException):
    """As Rust code raises it through pyo3."""


class Scripted:
    """A tool that does what its argument says. "stall" waits until `release`."""

    name, description, idempotent, max_batch = "Scripted", "for tests", True, 8

    def __init__(self):
        self.release = threading.Event()
        self.ran: list[str] = []

    def __call__(self, argument):
        self.ran.append(argument)
        match argument:
            case "error":
                raise ToolError("no such thing")
            case "bad":
                raise ToolError("unreadable", ToolStatus.BAD_ARGUMENTS)
            case "lie":
                raise ToolError("all is well", ToolStatus.OK)
            case "crash":
                raise KeyError("secret detail")
            case "exit":
                raise SystemExit(1)
            case "panic":
                raise Panic
            case "cancelled":
                raise asyncio.CancelledError
            case "interrupt":
                raise KeyboardInterrupt
            case "none":
                return None
            case "long":
                return "x" * (MAX_OUTPUT_CHARS + 1)
            case "stall":
                assert self.release.wait(60)
        return argument


def calls(*pairs):
    return [ToolCall("Scripted", argument, deadline_s) for argument, deadline_s in pairs]


@pytest.mark.parametrize(
    ("argument", "status", "text"),
    [
        ("fine", ToolStatus.OK, "fine"),
        ("", ToolStatus.OK, ""),
        ("error", ToolStatus.TOOL_ERROR, "no such thing"),
        ("bad", ToolStatus.BAD_ARGUMENTS, "unreadable"),
        ("lie", ToolStatus.TOOL_ERROR, "all is well"),
        ("crash", ToolStatus.TOOL_ERROR, "the tool failed with KeyError"),
        ("exit", ToolStatus.TOOL_ERROR, "the tool failed with SystemExit"),
        ("panic", ToolStatus.TOOL_ERROR, "the tool failed with Panic"),
        ("cancelled", ToolStatus.TOOL_ERROR, "the tool failed with CancelledError"),
        ("none", ToolStatus.TOOL_ERROR, "the tool returned NoneType instead of text"),
    ],
)
def test_every_end_of_a_tool_is_a_named_result(argument, status, text):
    result = run_tool(Scripted(), argument)
    assert (result.status, result.text, result.truncated) == (status, text, False)
    assert result.latency_s >= 0


def test_ctrl_c_ends_the_program_and_not_the_call():
    with pytest.raises(KeyboardInterrupt):
        run_tool(Scripted(), "interrupt")


@pytest.mark.parametrize("argument", ["panic", "cancelled", "interrupt"])
def test_whatever_a_tool_raises_in_its_thread_ends_its_call_and_blocks_no_other(argument):
    async def scenario():
        executor = Executor(Scripted(), 1)
        results = [await executor.run(calls((name, 60.0))) for name in (argument, argument, "fine")]
        return [result.status for [result] in results], executor.stats()

    errors = [ToolStatus.TOOL_ERROR] * 2
    assert asyncio.run(asyncio.wait_for(scenario(), 30)) == ([*errors, ToolStatus.OK], {"overdue": 0.0})


def test_endless_output_is_cut_and_marked():
    result = run_tool(Scripted(), "long")
    assert result.status is ToolStatus.OK and len(result.text) == MAX_OUTPUT_CHARS and result.truncated


def test_output_that_is_no_unicode_is_made_so():
    def half(argument):
        if argument == "raise":
            raise ToolError("half \ud83d")
        return "half \ud83d, whole \ud83d\ude00"

    half.name, half.description, half.idempotent = "Half", "", True
    assert run_tool(half, "").text == "half \ufffd, whole 😀"
    assert run_tool(half, "raise").text == "half \ufffd"


def test_the_calculator_carries_its_own_name_and_answers_its_probe():
    tool = builtin_tools()["SimpleCalculatorTool"]()
    assert tool_info(tool).name == "SimpleCalculatorTool"
    assert run_tool(tool, tool.probe).status is ToolStatus.OK


def test_a_tool_that_must_not_run_twice_cannot_share_requests():
    tool = Scripted()
    tool.idempotent = False
    with pytest.raises(ValueError, match="max_batch=8 contradicts idempotent=False"):
        tool_info(tool)


def test_a_batch_is_answered_in_order():
    results = asyncio.run(Executor(Scripted(), 4).run(calls(("a", 5.0), ("error", 5.0), ("b", 5.0))))
    assert [r and r.text for r in results] == ["a", "no such thing", "b"]


def test_a_stalled_call_in_a_batch_sends_the_unfinished_calls_back_and_the_later_ones_never_begin():
    tool = Scripted()

    async def scenario():
        executor = Executor(tool, 4)
        results = await executor.run(calls(("a", 60.0), ("stall", 60.0), ("b", 60.0)))
        tool.release.set()
        again = await executor.run(calls(("b", 5.0)))
        return results, again

    results, again = asyncio.run(scenario())
    assert [r and r.text for r in results] == ["a", None, None]
    assert again[0] is not None and again[0].text == "b"
    assert tool.ran.count("b") == 1


def test_a_stalled_call_alone_is_answered_at_its_deadline_and_makes_the_tool_unhealthy():
    tool = Scripted()

    async def scenario():
        executor = Executor(tool, 2)
        [first] = await executor.run(calls(("stall", 0.05)))
        with pytest.raises(UnhealthyTool, match="1 of 2 calls run past their deadline"):
            await executor.check()
        [_] = await executor.run(calls(("stall", 0.05)))
        [refused] = await executor.run(calls(("a", 5.0)))
        tool.release.set()
        return first, refused

    first, refused = asyncio.run(scenario())
    assert first is not None and first.status is ToolStatus.TIMEOUT
    assert refused is not None and refused.status is ToolStatus.OVERLOADED
    assert "a" not in tool.ran


async def test_a_late_call_takes_up_its_place_until_it_ends_and_no_longer():
    tool = Scripted()
    executor = Executor(tool, 1)
    assert [r.status for r in await executor.run(calls(("stall", 0.05)))] == [ToolStatus.TIMEOUT]
    assert [r.status for r in await executor.run(calls(("a", 5.0)))] == [ToolStatus.OVERLOADED]
    tool.release.set()
    while executor.stats()["overdue"]:
        await asyncio.sleep(0.01)
    assert [r.status for r in await executor.run(calls(("a", 5.0)))] == [ToolStatus.OK]


async def test_a_tool_is_unhealthy_once_half_of_its_places_are_taken_by_late_calls():
    tool = Scripted()
    executor = Executor(tool, 8)
    for _ in range(3):
        await executor.run(calls(("stall", 0.02)))
    await executor.check()
    await executor.run(calls(("stall", 0.02)))
    with pytest.raises(UnhealthyTool, match="4 of 8 calls run past their deadline"):
        await executor.check()
    tool.release.set()


async def test_a_probe_that_ends_in_an_error_is_unhealthy_whatever_other_calls_end():
    tool = Scripted()
    tool.probe = "error"
    executor = Executor(tool, 8)
    await executor.run(calls(("fine", 5.0)))
    with pytest.raises(UnhealthyTool, match="the probe 'error' ended in tool_error"):
        await executor.check()


async def test_calls_whose_callers_have_gone_are_not_past_their_deadline_and_still_take_up_room():
    tool = Scripted()
    executor = Executor(tool, 2)
    requests = [asyncio.ensure_future(executor.run(calls(("stall", 60.0)))) for _ in range(2)]
    while len(tool.ran) < 2:
        await asyncio.sleep(0.01)
    for request in requests:
        request.cancel()
    await asyncio.gather(*requests, return_exceptions=True)
    await executor.check()
    [refused] = await executor.run(calls(("a", 5.0)))
    tool.release.set()
    assert (refused.status, executor.stats()) == (ToolStatus.OVERLOADED, {"overdue": 0.0})


def test_a_call_whose_deadline_passed_before_its_turn_is_not_run():
    tool = Scripted()
    results = asyncio.run(Executor(tool, 2).run(calls(("a", 5.0), ("b", -1.0))))
    assert [r and r.status for r in results] == [ToolStatus.OK, ToolStatus.TIMEOUT]
    assert tool.ran == ["a"]


def test_health_is_a_real_call_of_the_probe():
    tool = Scripted()
    tool.probe = "fine"
    asyncio.run(Executor(tool, 2).check())
    assert tool.ran == ["fine"]
    tool.probe = "crash"
    with pytest.raises(UnhealthyTool, match="'crash' ended in tool_error: the tool failed with KeyError"):
        asyncio.run(Executor(tool, 2).check())


def test_the_service_imports_nothing_of_the_training_side():
    code = (
        "import sys, tools_service.serve_app, tools_service.runner\n"
        "bad = {'toolrl_ray', 'torch', 'vllm', 'transformers', 'ray', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "print(sorted(bad)); sys.exit(bool(bad))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_search_tool_of_any_name_is_checked_without_a_jvm(tmp_path):
    """A JVM that a process starts before Ray takes it down later."""
    (tmp_path / "segments_1").touch()  # for all that is looked at without Java, an index
    code = (
        "import sys\n"
        "from tools_service.runner import tool_factories\n"
        "spec, index = 'tools_service.search.tool:WikiTool', sys.argv[1]\n"
        "for options in ({}, {'k': 0}, {'name': 'Other'}):\n"
        "    try: tool_factories(['Papers'], {'Papers': spec}, {'Papers': {'index': index, 'name': 'Papers'} | options})\n"
        "    except ValueError as error: print(error)\n"
        "    else: print('fine')\n"
        "sys.exit('libjvm' in open('/proc/self/maps').read())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    where = "custom: Papers='tools_service.search.tool:WikiTool' is not a tool: "
    assert done.stdout.splitlines() == [
        "fine",
        f"{where}tool Papers: k=0 must be a whole number from 1 to 100",
        f"{where}it calls itself 'Other'; use one name",
    ]
