"""An MCP server as a tool: real servers of the SDK, over stdio and over HTTP on loopback."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import mcp_types as types
import psutil
import pytest
from mcp.server.lowlevel import Server

from tests.unit.tools_in_process import over_http
from tools_service.adapters import load_tool
from tools_service.executor import Executor
from tools_service.loading import LoadingError
from tools_service.mcp_client import MCPTool
from tools_service.protocol import ToolCall, ToolStatus

OK, TOOL_ERROR, BAD_ARGUMENTS = ToolStatus.OK, ToolStatus.TOOL_ERROR, ToolStatus.BAD_ARGUMENTS
TIMEOUT, UNAVAILABLE = ToolStatus.TIMEOUT, ToolStatus.UNAVAILABLE
DEADLINE_S = 30.0

SERVER = """
import asyncio, os, subprocess, sys
import mcp_types as types
from mcp import MCPError
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server

TEXT = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
HINTS = {"echo": types.ToolAnnotations(idempotent_hint=True)}

async def list_tools(context, parameters):
    return types.ListToolsResult(tools=[types.Tool(name=n, description=f"The  {n}\\ntool.", input_schema=TEXT, annotations=HINTS.get(n))
                                        for n in NAMES])

async def call_tool(context, parameters):
    text = (parameters.arguments or {}).get("text", "")
    match text.split(" ")[0]:
        case "die": os._exit(3)
        case "stall": await asyncio.Event().wait()
        case "error": return types.CallToolResult(content=[types.TextContent(text="no luck")], is_error=True)
        case "refuse": raise MCPError(types.INVALID_PARAMS, "not\\nso")
        case "pid": text = str(os.getpid())
        case "env": text = " ".join(sorted(os.environ))
        case "child": text = str(subprocess.Popen(["sleep", "600"]).pid)
        case "image":
            image = types.ImageContent(data="", mime_type="image/png")
            return types.CallToolResult(content=[types.TextContent(text="see"), image])
        case "structured": return types.CallToolResult(content=[], structured_content={"a": "\\u00e9"})
    return types.CallToolResult(content=[types.TextContent(text=text)])

async def main():
    server = Server("test", on_list_tools=list_tools, on_call_tool=call_tool)
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())

if __name__ == "__main__":
    NAMES = sys.argv[1:]
    asyncio.run(main())
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mcp") / "server with a space.py"
    path.write_text(SERVER)
    return path


def command(script: Path, *names: str) -> str:
    return shlex.join([sys.executable, str(script), *names])


@contextmanager
def opened(target: str, **options):
    tool = MCPTool("Tool", target, **options)
    try:
        yield tool
    finally:
        asyncio.run(tool.close())


@pytest.fixture(scope="module")
def echo(script):
    with opened(command(script, "echo")) as tool:
        yield tool


def ask(tool, argument: str, deadline_s: float = DEADLINE_S):
    result = asyncio.run(tool.call(ToolCall("Tool", argument, deadline_s)))
    return result.status, result.text


def gone(pid: int) -> bool:
    """Whether the process ends within ten seconds."""
    try:
        psutil.Process(pid).wait(10)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


def test_the_tool_is_what_the_server_says_of_it(echo):
    assert (echo.name, echo.description, echo.idempotent) == ("Tool", "The echo tool.", True)
    assert echo.parameters["properties"] == {"text": {"type": "string"}}


def test_a_tool_that_says_nothing_of_itself_is_not_run_twice(script):
    with opened(command(script, "plain")) as tool:
        assert tool.idempotent is False


@pytest.mark.parametrize(
    ("argument", "status", "text"),
    [
        ("hello", OK, "hello"),
        ("", OK, ""),
        ("{}", OK, "{}"),  # a tool with one required string gets the text as it is
        ("error", TOOL_ERROR, "no luck"),
        ("refuse", BAD_ARGUMENTS, "not so"),
        ("image", OK, "see\n[image: image/png]"),
        ("structured", OK, '{"a": "é"}'),
        ("\ud800", OK, "\ufffd"),
    ],
)
def test_every_answer_of_a_server_is_a_named_result(echo, argument, status, text):
    assert ask(echo, argument) == (status, text)


def test_calls_run_side_by_side_in_one_server(echo):
    async def scenario():
        stalled = asyncio.create_task(echo.call(ToolCall("Tool", "stall", DEADLINE_S)))
        answers = await asyncio.gather(*(echo.call(ToolCall("Tool", text, DEADLINE_S)) for text in ("pid", "pid", "a")))
        assert not stalled.done()
        stalled.cancel()
        return [answer.text for answer in answers]

    first, second, last = asyncio.run(scenario())
    assert (first, last) == (second, "a")


def test_an_answer_that_never_comes_is_a_timeout_at_the_deadline_and_harms_no_other_call(echo):
    before = ask(echo, "pid")
    assert ask(echo, "stall", 0.3) == (TIMEOUT, "no answer within 0.3 s")
    assert ask(echo, "pid") == before


def test_a_server_that_dies_in_mid_call_is_replaced_by_the_next_call(script):
    with opened(command(script, "echo")) as tool:
        _, pid = ask(tool, "pid")
        status, text = ask(tool, "die")
        assert status is UNAVAILABLE and text.startswith("the MCP server failed: ")
        status, other = ask(tool, "pid")
        assert status is OK and other != pid


def test_a_server_that_was_killed_between_calls_is_replaced_by_the_next_call(script):
    with opened(command(script, "echo")) as tool:
        pid = int(ask(tool, "pid")[1])
        os.kill(pid, 9)
        assert gone(pid)
        deadline = time.monotonic() + 10
        while ask(tool, "again") != (OK, "again"):  # the call that meets the closing connection is lost, by name
            assert time.monotonic() < deadline


def test_a_server_that_starts_slowly_comes_back_although_the_calls_that_wait_for_it_time_out(script, tmp_path):
    slow = tmp_path / "slow.sh"
    slow.write_text(f'[ -e "{tmp_path}/died" ] && sleep 2\ntouch "{tmp_path}/died"\nexec {command(script, "echo")}\n')
    with opened(f"sh {shlex.quote(str(slow))}") as tool:
        assert ask(tool, "die")[0] is UNAVAILABLE
        deadline = time.monotonic() + 30
        while (answer := ask(tool, "back", 0.5)) != (OK, "back"):
            assert answer[0] is TIMEOUT and time.monotonic() < deadline


def test_a_server_that_cannot_be_started_again_is_unavailable_at_once_and_not_tried_all_the_time(script, tmp_path):
    once, died, tries = (tmp_path / name for name in ("once.sh", "died", "tries"))
    once.write_text(f'[ -e "{died}" ] && {{ echo . >> "{tries}"; exit 1; }}\ntouch "{died}"\nexec {command(script, "echo")}\n')
    with opened(f"sh {shlex.quote(str(once))}") as tool:
        answers = [ask(tool, "die")] + [ask(tool, "x") for _ in range(20)]
    assert all(status is UNAVAILABLE for status, _ in answers)
    assert any("it could not be started; tried again in " in text for _, text in answers)
    assert len(tries.read_text().splitlines()) < 10


def test_nothing_of_a_server_is_left_when_the_tool_is_closed_not_even_its_children(script):
    with opened(command(script, "echo")) as tool:
        pids = [int(ask(tool, text)[1]) for text in ("pid", "child")]
    assert [gone(pid) for pid in pids] == [True, True]
    assert ask(tool, "late") == (UNAVAILABLE, "the MCP server was closed")


def test_a_tool_that_is_forgotten_is_closed(script):
    tool = MCPTool("Tool", command(script, "echo"))
    pid = int(ask(tool, "pid")[1])
    del tool
    assert gone(pid)


def test_nothing_of_a_server_is_left_when_its_owner_is_killed(script):
    code = (
        "import asyncio, sys, time\n"
        "from tools_service.mcp_client import MCPTool\n"
        "from tools_service.protocol import ToolCall\n"
        "tool = MCPTool('Tool', sys.argv[1])\n"
        "ask = lambda text: asyncio.run(tool.call(ToolCall('Tool', text, 30.0))).text\n"
        "print(ask('pid'), ask('child'), flush=True)\n"
        "time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, command(script, "echo")], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    try:
        pids = [int(pid) for pid in owner.stdout.readline().split()]
    finally:
        owner.kill()
        owner.communicate(timeout=10)
    assert len(pids) == 2 and [gone(pid) for pid in pids] == [True, True]


def test_a_call_in_flight_when_the_tool_is_closed_is_unavailable(script):
    with opened(command(script, "echo")) as tool:

        async def scenario():
            call = asyncio.create_task(tool.call(ToolCall("Tool", "stall", DEADLINE_S)))
            await tool.call(ToolCall("Tool", "x", DEADLINE_S))
            await tool.close()
            return await asyncio.wait_for(call, 10)

        result = asyncio.run(scenario())
    assert (result.status, result.text) == (UNAVAILABLE, "the MCP server was closed")


def test_a_command_sees_the_environment_that_is_named_and_no_more(script, monkeypatch):
    monkeypatch.setenv("MCP_TEST_KEY", "1")
    monkeypatch.setenv("MCP_TEST_SECRET", "2")
    with opened(command(script, "echo"), env=["MCP_TEST_KEY"]) as tool:
        seen = set(ask(tool, "env")[1].split())
    assert "MCP_TEST_KEY" in seen
    assert seen <= {"MCP_TEST_KEY", "HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER", "LC_CTYPE", "__CF_USER_TEXT_ENCODING"}


@pytest.mark.parametrize(
    ("names", "suffix", "message"),
    [
        (["a", "b"], "", r"has 2 tools \(a, b\); name one as .*#TOOL"),
        ([], "", r"has 0 tools \(none\)"),
        (["a", "b"], "#c", "has no tool 'c'; tools: a, b"),
    ],
)
def test_a_tool_that_is_not_named_or_not_there_is_refused_in_one_line(script, names, suffix, message):
    with pytest.raises(ValueError, match=message) as refused:
        MCPTool("Tool", command(script, *names) + suffix)
    assert "\n" not in str(refused.value)


def test_one_of_several_tools_is_chosen_by_its_name(script):
    with opened(command(script, "a", "b") + "#b") as tool:
        assert tool.description == "The b tool."


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("no-such-command --flag", {}, "there is no command 'no-such-command'"),
        ("", {}, "there is no command ''"),
        ("echo 'open", {}, "cannot be read: No closing quotation"),
        ("true", {}, "the MCP server 'true' cannot be used: "),
        ("sleep 60", {"start_timeout_s": 0.5}, "the MCP server 'sleep 60' cannot be used: no answer in time"),
        ("http://127.0.0.1:9/mcp", {}, "the MCP server 'http://127.0.0.1:9/mcp' cannot be used: "),
        ("true", {"env": ["MCP_TEST_UNSET"]}, "the environment variable 'MCP_TEST_UNSET' .* is not set"),
        ("true", {"token_env": "HOME"}, "token_env for a URL; 'true' is a command"),
        ("http://127.0.0.1:9/mcp", {"env": ["HOME"]}, "is a URL"),
    ],
)
def test_a_server_that_cannot_be_used_is_refused_in_one_line(target, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        MCPTool("Tool", target, **options)
    assert "\n" not in str(refused.value)


def test_a_recipe_names_a_server_as_a_tool_of_its_own(script):
    tool = load_tool("Tool", f"mcp:{command(script, 'echo')}", {})
    executor = Executor(tool, 4)

    async def scenario():
        [result] = await executor.run([ToolCall("Tool", "hello", DEADLINE_S)])
        await executor.close()
        return result

    result = asyncio.run(scenario())
    assert result is not None and (result.status, result.text) == (OK, "hello")
    with pytest.raises(LoadingError, match="'mcp:no-such-command' cannot be made: ValueError: there is no command"):
        load_tool("Tool", "mcp:no-such-command", {})


class Remote:
    """A server with the tool `add`; `headers` of the last call, `cancelled` calls."""

    def __init__(self):
        self.headers: dict[str, str] = {}
        self.cancelled = threading.Event()

    async def _list(self, context, parameters):
        numbers = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a"]}
        return types.ListToolsResult(tools=[types.Tool(name="add", title="Adds.", input_schema=numbers)])

    async def _call(self, context, parameters):
        self.headers = dict(context.request.headers)
        numbers = parameters.arguments
        if numbers["a"] < 0:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        return types.CallToolResult(content=[types.TextContent(text=str(numbers["a"] + numbers.get("b", 0)))])

    def app(self, stateless: bool):
        return Server("remote", on_list_tools=self._list, on_call_tool=self._call).streamable_http_app(stateless_http=stateless)


@pytest.mark.parametrize("stateless", [True, False])
def test_a_server_behind_a_url_is_called_with_the_token_and_told_of_cancelled_calls(monkeypatch, stateless):
    monkeypatch.setenv("MCP_TEST_TOKEN", "open sesame")
    remote = Remote()
    with over_http(remote.app(stateless)) as port, opened(f"http://127.0.0.1:{port}/mcp#add", token_env="MCP_TEST_TOKEN") as tool:
        assert tool.description == "Adds."
        assert ask(tool, json.dumps({"a": 1, "b": 2})) == (OK, "3")
        assert remote.headers["authorization"] == "Bearer open sesame"
        assert ask(tool, "1")[0] is BAD_ARGUMENTS
        assert ask(tool, '{"b": 1}') == (BAD_ARGUMENTS, "argument 'a' is missing; required: a")
        assert ask(tool, '{"a": "1"}') == (BAD_ARGUMENTS, "argument 'a' must be integer, not \"1\"")
        assert ask(tool, '{"a": -1}', 0.5) == (TIMEOUT, "no answer within 0.5 s")
        assert remote.cancelled.wait(10)


def test_a_server_behind_a_url_that_comes_back_is_used_again():
    with over_http(Remote().app(False)) as port:
        tool = MCPTool("Tool", f"http://127.0.0.1:{port}/mcp")
    try:
        assert ask(tool, '{"a": 1}')[0] is UNAVAILABLE
        with over_http(Remote().app(False), port):
            deadline = time.monotonic() + 20
            while (answer := ask(tool, '{"a": 1}')) != (OK, "1"):
                assert answer[0] is UNAVAILABLE and time.monotonic() < deadline
                time.sleep(0.1)
    finally:
        asyncio.run(tool.close())
