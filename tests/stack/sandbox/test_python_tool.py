"""The sandbox as a tool: what models write is understood, every end has its status, sessions keep state, nothing outlives a call."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stack.sandbox.core_helpers import alive, descendants, gone, namespaces_work

from tools_service.executor import Executor
from tools_service.protocol import ToolCall, ToolResult, ToolStatus
from tools_service.sandbox.limits import MIB
from tools_service.sandbox.outcome import IsolationUnavailable
from tools_service.sandbox.session import RESTARTED
from tools_service.sandbox.text import code_of, dedented
from tools_service.sandbox.tool import PythonTool, limits_of

ISOLATION = "bubblewrap" if namespaces_work() else "landlock"


@contextlib.asynccontextmanager
async def python_tool(**options) -> AsyncIterator[PythonTool]:
    tool = PythonTool(**{"isolation": ISOLATION, "wall_s": 2.0, **options})
    await tool.start()
    try:
        yield tool
    finally:
        await tool.close()


def call(code: str, **fields) -> ToolCall:
    return ToolCall("PythonInterpreter", code, **fields)


def running(tool: PythonTool) -> set[int]:
    """Every process of the tool's sandbox but the fork server."""
    return descendants(tool._sandbox.zygote_pid)


async def started(tool: PythonTool, before: set[int]) -> set[int]:
    """The processes that came since, once there are any that are not just children kept ahead."""
    for _ in range(500):
        if new := running(tool) - before:
            return new
        await asyncio.sleep(0.01)
    raise AssertionError("nothing was started")


@pytest.mark.parametrize(
    ("argument", "code"),
    [
        ("print(1)", "print(1)"),
        ("\n\n  print(1)\n  print(2)\n", "print(1)\nprint(2)"),
        ("```python\nprint(1)\n```", "print(1)"),
        ("```\nprint(1)\n```", "print(1)"),
        ("  ```py\n  x = 1\n  print(x)\n  ```", "x = 1\nprint(x)"),
        ("```python\nprint(1)", "print(1)"),
        ("```python\nprint('```')\n```\nand that is it", "print('```')"),
        ("```python\ns = '''\n```\n'''\nprint(s)\n```\nand that is it", "s = '''\n```\n'''\nprint(s)"),
        ("```\n# it's # no \"\"\"\ns = \"it's\" ''\nprint(s)\n```\n2\n```", "# it's # no \"\"\"\ns = \"it's\" ''\nprint(s)"),
        ("```python\nprint('''a)\n```\nan error", "print('''a)"),
        (" x = 1\nprint(x)", "x = 1\nprint(x)"),
        ("if x:\n    print(1)\n", "if x:\n    print(1)"),
        ("\tprint(1)\n\tprint(2)", "print(1)\nprint(2)"),
        ("a = 1\r\nb = 2\r\n", "a = 1\nb = 2"),
        ("s = '''\n  kept\n'''", "s = '''\n  kept\n'''"),
        ("\ufeffprint(1)", "print(1)"),
        ("", ""),
        (" \n\t\n", ""),
        ("```", "```"),
    ],
)
def test_code_is_found_as_models_write_it(argument: str, code: str) -> None:
    assert code_of(argument) == code


def test_code_is_found_in_time_that_grows_with_the_argument_alone() -> None:
    """Of these, looking again from each line or blank would take hours."""
    assert code_of(" \n" * 2_000_000 + "print(1)") == "print(1)"
    assert code_of("```" + " " * 2_000_000 + "x") == "```" + " " * 2_000_000 + "x"


@settings(max_examples=500, deadline=None)
@given(st.lists(st.text(st.sampled_from(" \t\r\f\v\xa0\u2028ab\n"), max_size=12), max_size=6).map("\n".join))
def test_an_indentation_of_the_whole_is_taken_away_as_textwrap_does(text: str) -> None:
    assert dedented(text.split("\n")) == textwrap.dedent(text).split("\n")


def test_a_margin_is_compiled_to_no_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one as long as an argument may be, `re` would keep tens of megabytes for each call."""

    def compile(pattern: str, flags: int) -> None:
        raise AssertionError(f"compiled: {len(pattern)} characters")

    monkeypatch.setattr("re._compiler.compile", compile)
    assert code_of(" " * 500_001 + "print(1)") == "print(1)"


MARKS = ["```", "```python\n", "\n", " ", "\t", "print(1)", "\r\n", "'''", "\x00", "\ud800", "\u2028"]
PIECES = st.one_of(st.text(), st.sampled_from(MARKS))


@settings(max_examples=500, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join))
def test_code_of_never_raises_and_adds_nothing(argument: str) -> None:
    code = code_of(argument)
    assert len(code) <= len(argument)
    assert "".join(code.split()) in "".join(argument.split())


ENDS = [
    ("print(1+1)", ToolStatus.OK, "2"),
    ("import sys\nsys.exit(0)", ToolStatus.OK, ""),
    ("1/0", ToolStatus.TOOL_ERROR, "ZeroDivisionError"),
    ("x = (", ToolStatus.TOOL_ERROR, "SyntaxError"),
    ("import ctypes; ctypes.string_at(0)", ToolStatus.TOOL_ERROR, "[the interpreter crashed]"),
    ("print('part')\nwhile True: pass", ToolStatus.TIMEOUT, "part\n[stopped: it ran longer than "),
    ("while True: print('x' * 99)", ToolStatus.OUTPUT_LIMIT, "[stopped: it printed more than 5000 bytes]"),
    ("x = [bytearray(1 << 24) for _ in range(999)]", ToolStatus.MEMORY_LIMIT, "[stopped: it needed more than 128 MiB of memory]"),
    ("print('\ud800')", ToolStatus.BAD_ARGUMENTS, "the code was not run"),
    ("x = '" + "y" * 3000 + "'", ToolStatus.BAD_ARGUMENTS, "at most 2000 bytes"),
]


@pytest.mark.parametrize("stateful", [False, True])
async def test_every_end_has_its_status_and_says_why(stateful: bool) -> None:
    limits = {"max_output_bytes": 5000, "memory_mib": 128, "max_code_bytes": 2000, "wall_s": 1.0}
    async with python_tool(stateful=stateful, **limits) as tool:
        for number, (code, status, text) in enumerate(ENDS):
            result = await tool.call(call(code, session=f"s{number}"))
            assert result.status is status and text in result.text, (code, result)
            assert result.truncated is (status is ToolStatus.OUTPUT_LIMIT) and result.latency_s > 0
        counts = {name: number for name, number in tool.stats().items() if name.startswith("num_") and name[4:] in tuple(ToolStatus)}
        assert sum(counts.values()) == len(ENDS) and counts["num_tool_error"] == 3
        assert tool.stats()["num_sessions"] == (len(ENDS) if stateful else 0)


async def test_an_argument_much_longer_than_any_code_is_refused_before_the_code_is_looked_for() -> None:
    async with python_tool(max_code_bytes=100) as tool:
        for num_lines, status in ((1100, ToolStatus.OK), (1200, ToolStatus.BAD_ARGUMENTS)):
            result = await tool.call(call("\n" * num_lines + "print(1)"))
            assert result.status is status and ("at most 100 bytes" in result.text) is (status is ToolStatus.BAD_ARGUMENTS)


@pytest.mark.parametrize("stateful", [False, True])
async def test_cpu_time_beyond_its_limit_is_timeout_that_names_it(stateful: bool) -> None:
    async with python_tool(stateful=stateful, cpu_s=1.0, wall_s=30.0) as tool:
        result = await tool.call(call("while True: pass", session="s", deadline_s=30.0))
        assert result.status is ToolStatus.TIMEOUT and result.text == "[stopped: it used more than 1 s of CPU time]"


async def test_long_traceback_keeps_its_end() -> None:
    async with python_tool() as tool:
        result = await tool.call(call("raise ValueError('a' * 200 + '\\n' + 'b\\n' * 2000 + 'the end')"))
        assert result.status is ToolStatus.TOOL_ERROR and result.truncated
        assert result.text.startswith("[...]\n") and result.text.endswith("the end") and len(result.text) < 2100


@pytest.mark.parametrize(
    ("code", "start", "end"),
    [
        ("raise ValueError('x' * 3000 + 'y')", "[...]\nValueError: xxx", "xxxy"),
        ("raise ValueError('x' * 3000 + '\\ny')", "[...]\nValueError: xxx", "xxx\ny"),
        ("print('result 42')\nraise SystemExit('bye' * 1000 + 'y')", "[...]\nbyebye", "byebyey"),
        ("print('a' * 5000 + 'b')\nimport sys\nsys.exit(1)", "aaa", "aaab"),
        ("print('a' * 5000 + 'b')\nimport os\nos.abort()", "aaa", "aaab\n[the interpreter crashed]"),
    ],
)
async def test_long_last_line_of_an_error_is_cut_in_its_middle(code: str, start: str, end: str) -> None:
    async with python_tool() as tool:
        result = await tool.call(call(code))
        assert result.status is ToolStatus.TOOL_ERROR and result.truncated
        assert result.text.startswith(start) and result.text.endswith(end) and 1900 < len(result.text) < 2100


async def test_what_stopped_a_snippet_is_told_however_much_it_printed() -> None:
    async with python_tool(max_output_mib=1) as tool:
        executor = Executor(tool, 1)
        for code, end in (("print('x' * 3_000_000)", "[stopped: it printed more than 1048576 bytes]"),
                          ("print('x' * 300_000)\nwhile True: pass", "[stopped: it ran longer than 2 s]")):  # fmt: skip
            [result] = await executor.run([call(code, deadline_s=20.0)])
            assert result is not None and result.truncated and result.text.endswith(f"xxx\n{end}")


async def test_same_seed_same_numbers_in_calls_and_sessions() -> None:
    code = "import random\nprint(random.random(), random.choice('abcdefgh'))"
    async with python_tool(stateful=True) as tool:
        texts = {}
        for session in (None, "one", "two"):
            first, again = [(await tool.call(call(code, seed=7, session=session))).text for _ in range(2)]
            other = (await tool.call(call(code, seed=8, session=session))).text
            assert first == again != other
            texts[session] = first
        assert len(set(texts.values())) == 1
        free = {(await tool.call(call(code))).text for _ in range(3)}
        assert len(free) == 3


async def test_preloaded_packages_work() -> None:
    code = "import numpy as np, sympy\nx = sympy.symbols('x')\nprint(np.arange(4).sum(), sympy.integrate(2 * x, x), sympy.factorint(84))"
    async with python_tool(preload=("numpy", "sympy")) as tool:
        first, again = await tool.call(call(code)), await tool.call(call("import numpy\nprint(numpy.linalg.inv(numpy.eye(3)).trace())"))
        assert (first.status, first.text) == (ToolStatus.OK, "6 x**2 {2: 2, 3: 1, 7: 1}")
        assert (again.status, again.text) == (ToolStatus.OK, "3.0")


async def test_session_variables_persist_and_belong_to_it_alone() -> None:
    async with python_tool(stateful=True) as tool:
        await asyncio.gather(*(tool.call(call(f"x = {number}", session=str(number))) for number in range(4)))
        results = await asyncio.gather(*(tool.call(call("x += 1; print(x)", session=str(number))) for number in range(4)))
        assert [result.text for result in results] == ["1", "2", "3", "4"]
        assert (await tool.call(call("print(x)"))).status is ToolStatus.TOOL_ERROR  # without a session it runs alone
        assert (await tool.call(call("print(x)", session="new"))).status is ToolStatus.TOOL_ERROR
        failed = await tool.call(call("y = 5\n1/0", session="0"))
        assert failed.status is ToolStatus.TOOL_ERROR
        assert (await tool.call(call("print(x, y)", session="0"))).text == "1 5"


async def test_a_tool_without_state_keeps_nothing_of_a_session() -> None:
    async with python_tool() as tool:
        assert tool.idempotent and not tool.stateful and not tool.cacheable
        await tool.call(call("x = 1", session="s"))
        assert (await tool.call(call("print(x)", session="s"))).status is ToolStatus.TOOL_ERROR
        await tool.end_session("s")


async def test_end_session_kills_its_process_and_the_next_call_starts_afresh() -> None:
    async with python_tool(stateful=True, max_concurrency=1) as tool:
        before = running(tool)
        await tool.call(call("x = 1", session="s"))
        process = await started(tool, before)
        await tool.end_session("s")
        assert await gone(process) and tool.stats()["num_sessions"] == 0
        result = await tool.call(call("print('x' in globals())", session="s"))
        assert (result.status, result.text) == (ToolStatus.OK, "False")  # by its end, not by our doing: no note
        await tool.end_session("never seen")


async def test_ending_a_session_in_mid_call_answers_the_call() -> None:
    async with python_tool(stateful=True, wall_s=30.0) as tool:
        before = running(tool)
        calling = asyncio.create_task(tool.call(call("while True: pass", session="s", deadline_s=30.0)))
        while not tool.stats()["num_sessions"]:  # a child kept ahead may come first
            await asyncio.sleep(0.01)
        process = await started(tool, before)
        await tool.end_session("s")
        result = await calling
        assert result.status is ToolStatus.UNAVAILABLE and "ended" in result.text
        assert await gone(process - running(tool))


async def test_room_is_made_by_closing_the_idlest_session_whose_next_call_says_so() -> None:
    async with python_tool(stateful=True, max_sessions=2) as tool:
        for name in ("a", "b", "a"):
            await tool.call(call("x = 1", session=name))
        await tool.call(call("x = 1", session="c"))  # b has been idle longest
        assert tool.stats()["num_sessions"] == 2
        assert (await tool.call(call("print(x)", session="a"))).text == "1"
        result = await tool.call(call("print('x' in globals())", session="b"))
        assert result.text == f"{RESTARTED}False"
        assert (await tool.call(call("print(1)", session="b"))).text == "1"  # told once


async def test_sessions_that_are_all_busy_are_overload() -> None:
    async with python_tool(stateful=True, max_sessions=1, max_concurrency=4) as tool:
        busy = asyncio.create_task(tool.call(call("import time; time.sleep(1)", session="a")))
        await asyncio.sleep(0.2)
        result = await tool.call(call("print(1)", session="b"))
        assert result.status is ToolStatus.OVERLOADED and "all 1 sessions" in result.text
        assert (await busy).status is ToolStatus.OK


async def test_session_that_a_limit_ended_says_so_at_its_next_call() -> None:
    async with python_tool(stateful=True) as tool:
        await tool.call(call("x = 1", session="s"))
        assert (await tool.call(call("while True: pass", session="s", deadline_s=0.5))).status is ToolStatus.TIMEOUT
        result = await tool.call(call("print('x' in globals())", session="s"))
        assert (result.status, result.text) == (ToolStatus.OK, f"{RESTARTED}False")


async def test_deadline_below_the_limit_ends_the_snippet_and_the_answer_comes_in_time() -> None:
    async with python_tool(wall_s=30.0) as tool:
        result = await tool.call(call("print('part')\nwhile True: pass", deadline_s=0.5))
        assert result.status is ToolStatus.TIMEOUT and result.text.startswith("part\n[stopped")
        late = await tool.call(call("print(1)", deadline_s=0.0))
        assert late.status is ToolStatus.OVERLOADED


async def test_more_calls_than_turns_wait_and_are_overloaded_at_their_deadline() -> None:
    async with python_tool(max_concurrency=1) as tool:
        slow = [asyncio.create_task(tool.call(call("import time; time.sleep(1.2)", deadline_s=10.0))) for _ in range(2)]
        await asyncio.sleep(0.1)
        result = await tool.call(call("print(1)", deadline_s=0.3))
        assert result.status is ToolStatus.OVERLOADED and "no turn" in result.text
        assert [(await task).status for task in slow] == [ToolStatus.OK] * 2
        assert (await tool.call(call("print(1)"))).text == "1"


@pytest.mark.parametrize("session", [None, "s"])
async def test_cancelling_a_call_kills_its_process(session: str | None) -> None:
    async with python_tool(stateful=True, wall_s=30.0, max_concurrency=1) as tool:
        before = running(tool)
        calling = asyncio.create_task(tool.call(call("while True: pass", session=session, deadline_s=30.0)))
        await asyncio.sleep(0.5)
        busy = {pid for pid in running(tool) | before if cpu_ticks(pid) >= 10}
        assert len(busy) == 1
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        assert await gone(busy)
        assert (await tool.call(call("print(1)", session=session))).text.endswith("1")  # the turn was given back


def cpu_ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


async def test_fork_server_that_dies_costs_its_calls_and_no_others() -> None:
    async with python_tool(stateful=True) as tool:
        await tool.call(call("x = 1", session="s"))
        os.kill(tool._sandbox.zygote_pid, signal.SIGKILL)
        await asyncio.sleep(0.05)  # what is handed to a child that lives for another moment may begin
        results = [await tool.call(call("print(1)")) for _ in range(3)]
        assert [(result.status, result.text) for result in results] == [(ToolStatus.OK, "1")] * 3
        assert (await tool.call(call("print('x' in globals())", session="s"))).text == f"{RESTARTED}False"
        assert tool.stats()["num_restarts"] == 1


async def test_limits_reach_the_snippet() -> None:
    async with python_tool(memory_mib=256, max_open_files=30, max_file_mib=1, max_files=3) as tool:
        code = "import resource as r\nprint(r.getrlimit(r.RLIMIT_NOFILE)[0], r.getrlimit(r.RLIMIT_FSIZE)[0])"
        assert (await tool.call(call(code))).text == f"30 {MIB}"
        assert (await tool.call(call("x = bytearray(300 << 20)"))).status is ToolStatus.MEMORY_LIMIT
        assert (await tool.call(call("x = bytearray(200 << 20)\nprint(len(x))"))).status is ToolStatus.OK


def test_limits_are_given_in_bytes_or_mib() -> None:
    assert limits_of({"memory_mib": 64}).memory_bytes == 64 * MIB
    assert limits_of({"memory_bytes": 1000, "max_output_mib": 0.5}).max_output_bytes == MIB // 2
    assert limits_of({}).wall_s == 5.0


async def test_whole_numbers_may_be_written_as_floats() -> None:
    options = {"memory_bytes": 1e9, "max_output_bytes": 1000.0, "max_open_files": 64.0, "max_threads": 4.0, "max_files": 5.0}
    assert all(isinstance(getattr(limits_of(options), name), int) for name in options)
    async with python_tool(**options) as tool:
        result = await tool.call(call("print('x' * 5000)"))
        assert result.status is ToolStatus.OUTPUT_LIMIT and result.text.startswith("x" * 1000 + "\n[stopped")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"wal_s": 3}, ["wal_s=3", "wall_s", "memory_mib"]),
        ({"wall_s": 0}, ["wall_s=0", "positive"]),
        ({"wall_s": float("nan")}, ["wall_s=nan"]),
        ({"wall_s": True}, ["wall_s=True"]),
        ({"max_threads": 1.5}, ["max_threads=1.5", "integer"]),
        ({"max_open_files": 3}, ["max_open_files=3", "16"]),
        ({"memory_bytes": 1 << 64}, ["memory_bytes=18446744073709551616", "at most"]),
        ({"max_file_mib": 1e300}, ["max_file_bytes=", "at most"]),
        ({"cpu_s": 1e30}, ["cpu_s=1e+30", "1e+09 at most"]),
        ({"max_files": 10**400}, ["max_files=", "at most"]),
        ({"memory_mib": float("inf")}, ["memory_mib=inf", "MiB"]),
        ({"memory_mib": -1}, ["memory_mib=-1", "MiB"]),
        ({"memory_mib": "big"}, ["memory_mib='big'"]),
        ({"memory_mib": 1, "memory_bytes": 1}, ["memory_bytes", "both"]),
        ({"stateful": "yes"}, ["stateful='yes'"]),
        ({"max_sessions": 0}, ["max_sessions=0"]),
        ({"max_concurrency": True}, ["max_concurrency=True"]),
        ({"unsafe_no_isolation": 1}, ["unsafe_no_isolation=1"]),
        ({"isolation": "docker"}, ["docker", "bubblewrap"]),
        ({"preload": "numpy"}, ["preload='numpy'", "list"]),
        ({"preload": [3]}, ["preload"]),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(options: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        PythonTool(**options)
    text = str(refused.value)
    assert "\n" not in text and all(word in text for word in words), text


async def test_sandbox_that_cannot_start_is_unavailable_every_time_and_attacked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from tools_service.sandbox import owner

    attacks = []

    async def found(box: object) -> list[str]:
        attacks.append(1)
        return ["read a file of the host"]

    monkeypatch.setattr(owner, "breaches", found)
    tool = PythonTool(isolation=ISOLATION)
    results = [await tool.call(call("print(1)")) for _ in range(3)]
    assert {result.status for result in results} == {ToolStatus.UNAVAILABLE} and len(attacks) == 1
    assert all("read a file of the host" in result.text and "\n" not in result.text for result in results)
    assert tool.isolation == "" and tool.stats()["num_unavailable"] == 3
    with pytest.raises(owner.IsolationUnavailable):
        await tool.start()
    await tool.close()


async def test_limits_under_which_nothing_runs_are_named_at_the_start() -> None:
    tool = PythonTool(isolation=ISOLATION, memory_mib=1)
    with pytest.raises(IsolationUnavailable, match=r"a snippet cannot run within Limits\(.*memory_bytes=1048576, .*\): \w+: \w"):
        await tool.start()
    await tool.close()


async def test_missing_preload_is_refused_at_start_by_name() -> None:
    tool = PythonTool(isolation=ISOLATION, preload=["no_such_module"])
    with pytest.raises(ValueError, match="no_such_module"):
        await tool.start()
    result = await tool.call(call("print(1)"))
    assert result.status is ToolStatus.UNAVAILABLE and "no_such_module" in result.text
    await tool.close()


async def test_stats_name_the_isolation_that_holds() -> None:
    async with python_tool() as tool:
        await tool.call(call("print(1)"))
        stats = tool.stats()
        assert stats["num_ok"] == 1 and stats[f"isolation/{tool.isolation}"] == 1 and ISOLATION in tool.isolation
        assert all(isinstance(value, float) for value in stats.values())


async def test_close_in_mid_call_leaves_nothing() -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    before = descendants(os.getpid())
    async with python_tool(stateful=True, wall_s=30.0, max_concurrency=3) as tool:
        calls = [asyncio.create_task(tool.call(call("while True: pass", session=name, deadline_s=30.0))) for name in (None, "a", "b")]
        await tool.call(call("x = 1", session="idle"))
        await asyncio.sleep(0.3)
        below = descendants(os.getpid()) - before
        assert len(below) >= 5
    results: list[ToolResult] = await asyncio.gather(*calls)
    assert {result.status for result in results} == {ToolStatus.UNAVAILABLE}
    assert not alive(below) and len(os.listdir("/proc/self/fd")) <= descriptors
    assert (await tool.call(call("print(1)"))).status is ToolStatus.UNAVAILABLE
