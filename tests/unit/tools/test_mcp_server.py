"""Our tools as an MCP server, seen by the SDK's own client and by our tool that stands for an MCP server."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import mcp_types as types
import pytest
from fastapi.testclient import TestClient
from mcp import Client

from tests.conftest import HEARS_CTRL_C
from tests.unit.tools_in_process import InProcess, Notebook, Scripted, over_http
from tools_service import mcp_server
from tools_service.adapters import load_tool
from tools_service.calculator import SimpleCalculatorTool
from tools_service.http_app import make_app
from tools_service.mcp_client import MCPTool
from tools_service.protocol import ToolCall, ToolStatus

CALCULATOR = "SimpleCalculatorTool"
ROOT = Path(__file__).resolve().parents[3]
STDIO = """
import asyncio, os, sys
from tests.unit.tools_in_process import InProcess, Notebook
from tools_service.calculator import SimpleCalculatorTool
from tools_service.mcp_server import serve_stdio

class Loud(SimpleCalculatorTool):
    def __call__(self, argument):
        print("not the protocol")
        os.write(1, b"nor this\\n")
        return super().__call__(argument)

tools = InProcess(Loud(), Notebook())
asyncio.run(serve_stdio(tools.infos, tools.gateway.call))
"""


def add(a: int, b: int = 1) -> str:
    """Adds two numbers."""
    return str(a + b)


def in_process() -> InProcess:
    return InProcess(SimpleCalculatorTool(), load_tool("add", f"{__file__}:add", {}), Scripted(), Notebook())


def talk(use, **options):
    """What `use(client)` returns of a client of a server in this process."""

    async def scenario():
        tools = in_process()
        async with Client(mcp_server.make_server(tools.infos, tools.gateway.call, **options)) as client:
            return await asyncio.wait_for(use(client), 30)

    return asyncio.run(scenario())


def shown(result: types.CallToolResult) -> tuple[bool, str, str]:
    [content] = result.content
    assert isinstance(content, types.TextContent) and result.meta is not None
    return result.is_error, content.text, result.meta["toolrl/status"]


def test_tools_are_listed_with_their_schemas_and_whether_they_may_be_called_twice():
    tools = talk(lambda client: client.list_tools()).tools
    assert [tool.name for tool in tools] == [CALCULATOR, "add", "Scripted", "Notebook"]
    assert [tool.annotations and tool.annotations.idempotent_hint for tool in tools] == [True, False, False, False]
    assert tools[1].description == "Adds two numbers."
    assert tools[1].input_schema["type"] == "object" and tools[1].input_schema["required"] == ["a"]


@pytest.mark.parametrize(
    ("tool", "arguments", "expected"),
    [
        (CALCULATOR, {"argument": "13.1-3"}, (False, "10.1", "ok")),
        ("add", {"a": 1}, (False, "2", "ok")),
        ("add", {"a": 1, "b": 2}, (False, "3", "ok")),
        ("add", {"a": "1"}, (True, "bad_arguments: argument 'a' must be integer, not \"1\"", "bad_arguments")),
        ("add", None, (True, "bad_arguments: argument 'a' is missing; required: a", "bad_arguments")),
        (CALCULATOR, {"argument": "1/0"}, (True, "tool_error: division by zero", "tool_error")),
        ("Scripted", {"argument": "half"}, (True, "output_limit: half of it", "output_limit")),
        ("Scripted", {"argument": "full"}, (True, "overloaded: too many requests wait already", "overloaded")),
        ("Scripted", {"argument": "surrogates"}, (False, "😀 \ufffd", "ok")),
        ("none", {}, (True, f"unknown_tool: no tool 'none'; tools: {CALCULATOR}, add, Scripted, Notebook", "unknown_tool")),
    ],
)
def test_a_result_that_is_not_ok_is_an_error_that_names_its_status(tool, arguments, expected):
    assert shown(talk(lambda client: client.call_tool(tool, arguments))) == expected


def test_a_call_has_a_deadline(monkeypatch):
    monkeypatch.setattr(mcp_server, "DEADLINE_S", 0.1)
    result = talk(lambda client: client.call_tool("Scripted", {"argument": "stall"}))
    assert shown(result) == (True, "timeout: no answer within 0.1 s", "timeout")


def test_a_service_that_is_out_of_reach_is_told_as_a_result():
    async def gone(calls):
        raise ConnectionError("the service\nwent away")

    async def scenario():
        async with Client(mcp_server.make_server(in_process().infos, gone)) as client:
            return await client.call_tool(CALCULATOR, {"argument": "1"})

    assert shown(asyncio.run(scenario())) == (True, "unavailable: tool unavailable: the service went away", "unavailable")


def test_calls_of_a_session_find_what_the_calls_before_them_left():
    async def use(client):
        return [shown(await client.call_tool("Notebook", {"argument": page}))[1] for page in "ab"]

    assert talk(use, session="s") == ["a", "a b"]


@pytest.fixture(scope="module")
def stdio(tmp_path_factory) -> str:
    script = tmp_path_factory.mktemp("stdio") / "serve.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{STDIO}")
    return shlex.join([sys.executable, str(script)])


def ask(tool: MCPTool, argument: str, deadline_s: float = 30.0):
    result = asyncio.run(tool.call(ToolCall(tool.name, argument, deadline_s)))
    return result.status, result.text


def test_our_own_stdio_face_is_a_tool_for_us_whatever_a_tool_prints(stdio):
    tool = MCPTool("Sum", f"{stdio}#{CALCULATOR}")
    try:
        assert tool.idempotent and tool.description == SimpleCalculatorTool.description
        assert ask(tool, "1+1") == (ToolStatus.OK, "2")
        assert ask(tool, "1/0") == (ToolStatus.TOOL_ERROR, "tool_error: division by zero")
        assert ask(tool, "?") == (ToolStatus.BAD_ARGUMENTS, "bad_arguments: unexpected character '?'")  # its status survives the way
    finally:
        asyncio.run(tool.close())


def test_one_client_of_the_stdio_face_is_one_session(stdio):
    tool = MCPTool("Pages", f"{stdio}#Notebook")
    try:
        assert [ask(tool, page)[1] for page in "ab"] == ["a", "a b"]
    finally:
        asyncio.run(tool.close())


def started(stdio: str) -> subprocess.Popen[str]:
    """A server that has answered its first message."""
    command = [*HEARS_CTRL_C, *shlex.split(stdio)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.stdin is not None and server.stdout is not None
    client = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    server.stdin.write(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": client}) + "\n")
    server.stdin.flush()
    assert json.loads(server.stdout.readline())["id"] == 1
    return server


def test_stdout_carries_nothing_but_the_protocol_and_the_end_of_stdin_ends_the_server(stdio):
    server = started(stdio)
    call = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": CALCULATOR, "arguments": {"argument": "1+1"}}}
    assert server.stdin is not None and server.stdout is not None
    for line in (json.dumps({"jsonrpc": "2.0", "method": "notifications/initialized"}), "not JSON", json.dumps(call)):
        server.stdin.write(line + "\n")
        server.stdin.flush()
    answer = server.stdout.readline()
    out, errors = server.communicate(timeout=30)
    assert json.loads(answer)["result"]["content"][0]["text"] == "2"
    assert (out, server.returncode) == ("", 0)
    assert "not the protocol" in errors and "nor this" in errors


def test_ctrl_c_ends_the_stdio_server(stdio):
    server = started(stdio)
    try:
        os.kill(server.pid, signal.SIGINT)
        server.wait(10)
    finally:
        server.kill()
        server.communicate(timeout=10)


def test_our_own_http_face_is_a_tool_for_us_and_learns_of_calls_that_are_given_up():
    scripted = Scripted()
    tools = InProcess(SimpleCalculatorTool(), scripted)
    with over_http(make_app(tools.infos, tools.gateway.call)) as port:
        for name, asked in ((CALCULATOR, "1+1"), ("Scripted", "2")):
            tool = MCPTool("Remote", f"http://127.0.0.1:{port}/mcp#{name}")
            try:
                assert ask(tool, asked) == (ToolStatus.OK, "2")
                if name == "Scripted":
                    assert ask(tool, "stall", 0.3)[0] is ToolStatus.TIMEOUT
                    assert scripted.cancelled.wait(10)
                    assert ask(tool, "full") == (ToolStatus.OVERLOADED, "overloaded: too many requests wait already")
            finally:
                asyncio.run(tool.close())


@pytest.mark.parametrize("mode", ["legacy", "auto"])
def test_clients_of_both_generations_of_the_protocol_are_served_over_http(mode):
    async def scenario(url):
        async with Client(url, mode=mode) as client:
            names = [tool.name for tool in (await client.list_tools()).tools]
            return names, shown(await client.call_tool(CALCULATOR, {"argument": "2**10"}))

    tools = in_process()
    with over_http(make_app(tools.infos, tools.gateway.call)) as port:
        names, result = asyncio.run(asyncio.wait_for(scenario(f"http://127.0.0.1:{port}/mcp"), 30))
    assert CALCULATOR in names and result == (False, "1024", "ok")


def test_requests_over_http_stand_alone_without_a_handshake():
    """So that they can come through any proxy and reach any replica."""
    tools = in_process()
    call = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": CALCULATOR, "arguments": {"argument": "1+1"}}}
    with TestClient(make_app(tools.infos, tools.gateway.call)) as client:
        answer = client.post("/mcp", json=call, headers={"accept": "application/json, text/event-stream"})
    assert answer.status_code == 200 and "mcp-session-id" not in answer.headers
    message = json.loads(answer.text.split("data: ", 1)[1])
    assert (message["id"], message["result"]["content"][0]["text"]) == (7, "2")
