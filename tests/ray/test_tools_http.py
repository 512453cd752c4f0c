"""The HTTP and MCP faces through Serve's proxy; what they answer in detail is tested without Ray."""

from __future__ import annotations

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tools_service import serve_app
from tools_service.config import HttpConfig, PoolConfig
from tools_service.mcp_client import MCPTool
from tools_service.protocol import ToolCall, ToolStatus
from tools_service.runner import builtin_tools

CALCULATOR = "SimpleCalculatorTool"
TIMEOUT_S = 60


def _scripted():
    """Tools made here, so that they travel by value: one that takes numbers and waits when told, and one that keeps a session."""
    import asyncio
    from pathlib import Path

    from tools_service.protocol import ToolResult, ToolStatus

    class Adder:
        name, description, idempotent = "Adder", "Adds two numbers.", False
        parameters = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}, "until": {"type": "string"}}}

        async def call(self, call):
            import json

            numbers = json.loads(call.argument)
            if path := numbers.get("until"):
                Path(f"{path}.began").touch()
                try:
                    while not Path(path).exists():
                        await asyncio.sleep(0.02)
                except asyncio.CancelledError:
                    Path(f"{path}.cancelled").touch()
                    raise
            return ToolResult(ToolStatus.OK, str(numbers.get("a", 0) + numbers.get("b", 0)))

    class Notebook:
        name, description, idempotent = "Notebook", "Remembers.", False

        def __init__(self):
            self.pages = {}

        async def call(self, call):
            self.pages.setdefault(call.session, []).append(call.argument)
            return ToolResult(ToolStatus.OK, " ".join(self.pages[call.session]))

        async def end_session(self, session):
            self.pages.pop(session, None)

    class Loud:
        name, description, idempotent, max_batch = "Loud", "Answers at length.", True, 64

        def __call__(self, argument):
            return "\U0001d54f" * 100_000

    return {CALCULATOR: builtin_tools()[CALCULATOR], "Adder": Adder, "Notebook": Notebook, "Loud": Loud}


@pytest.fixture(scope="module")
def url(cluster):
    pools = {"Adder": PoolConfig(max_in_flight=1, max_queued=1)}
    serve_app.start(_scripted(), app_name="over-http", pools=pools, http=cluster, start_timeout_s=TIMEOUT_S)
    yield f"http://{cluster.host}:{cluster.port}"
    serve_app.shutdown("over-http")
    assert httpx.get(f"http://{cluster.host}:{cluster.port}/v1/tools", timeout=TIMEOUT_S).status_code == 404


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
        yield client


def ended(answer):
    return answer.json()["status"], answer.json()["text"]


def appears(path):
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)


def test_tools_are_called_by_text_and_by_their_parameters(client):
    answer = client.post(f"/v1/tools/{CALCULATOR}/call", json={"argument": "13.1-3"})
    assert (answer.status_code, ended(answer)) == (200, ("ok", "10.1"))
    assert ended(client.post("/v1/tools/Adder/call", json={"arguments": {"a": 1, "b": 2}})) == ("ok", "3")
    assert ended(client.post("/v1/tools/Adder/call", json={"arguments": {"a": "1"}}))[0] == "bad_arguments"
    answer = client.post("/v1/tools/Wiki/call", json={"argument": "x"})
    assert (answer.status_code, ended(answer)) == (404, ("unknown_tool", f"no tool 'Wiki'; tools: {CALCULATOR}, Adder, Notebook, Loud"))


def test_a_batch_is_answered_in_order(client):
    calls = [{"tool": CALCULATOR, "argument": f"{n}+1"} for n in range(300)] + [{"tool": "Wiki", "argument": "x"}]
    results = client.post("/v1/call", json={"calls": calls}).json()["results"]
    assert [result["text"] for result in results[:300]] == [str(n + 1) for n in range(300)]
    assert results[300]["status"] == "unknown_tool"


def test_long_arguments_and_answers_cost_no_other_call_its_answer(client):
    calls = [{"tool": "Notebook", "argument": "a", "session": "long"}, {"tool": CALCULATOR, "argument": "1" * 5 * 2**20}]
    noted, refused = client.post("/v1/call", json={"calls": calls}).json()["results"]
    assert (noted["status"], refused["status"]) == ("ok", "bad_arguments")
    calls = [{"tool": CALCULATOR, "argument": "1" * 70_000}] * 64 + [{"tool": "Loud", "argument": "", "deadline_s": TIMEOUT_S}] * 64
    results = client.post("/v1/call", json={"calls": calls}).json()["results"]
    assert {(result["status"], result["text"]) for result in results[:64]} == {("bad_arguments", "expression longer than 1000 characters")}
    assert {(result["status"], len(result["text"])) for result in results[64:]} == {("ok", 100_000)}


def test_the_service_says_what_it_offers_and_that_it_is_there(client):
    names = [tool["function"]["name"] for tool in client.get("/v1/tools").json()]
    assert names == [CALCULATOR, "Adder", "Notebook", "Loud"]
    assert client.get("/healthz").json() == {"status": "ok", "tools": names}
    described = client.get("/openapi.json").json()
    assert {"/v1/call", "/v1/tools", "/v1/tools/{name}/call", "/v1/sessions/{session}", "/healthz"} == set(described["paths"])


def test_what_is_wrong_is_refused_through_the_proxy_too(client):
    path = f"/v1/tools/{CALCULATOR}/call"
    headers = {"content-type": "application/json"}
    assert client.post(path, content=b'{"argument": "\\ud800"}', headers=headers).status_code == 422
    assert client.post(path, content=b" " * (8 * 2**20 + 1), headers=headers).status_code == 413
    assert client.post(path, json={"argument": "1"}, headers={"host": "evil.example"}).status_code == 421
    assert client.get("/nowhere").json() == {"error": "there is nothing at this path; see /openapi.json"}


def test_a_full_pool_is_503_with_the_time_to_come_back(client, tmp_path):
    until = tmp_path / "until"
    with ThreadPoolExecutor(8) as threads:
        asked = [
            threads.submit(client.post, "/v1/tools/Adder/call", json={"arguments": {"until": str(until)}, "deadline_s": TIMEOUT_S})
            for _ in range(8)
        ]
        appears(tmp_path / "until.began")
        deadline = time.monotonic() + TIMEOUT_S
        while sum(future.done() for future in asked) < 4:  # one runs, one or two wait, the rest is refused
            assert time.monotonic() < deadline
            time.sleep(0.02)
        until.touch()
        answers = [future.result(timeout=TIMEOUT_S) for future in asked]
    refused = [answer for answer in answers if answer.status_code == 503]
    assert len(refused) >= 4 and len(refused) < 8
    assert all(answer.headers["retry-after"] == "1" and answer.json()["status"] == "overloaded" for answer in refused)
    assert all(ended(answer) == ("ok", "0") for answer in answers if answer not in refused)


def test_a_client_that_goes_away_cancels_its_call(url, tmp_path):
    until = tmp_path / "until"
    with httpx.Client(base_url=url, timeout=httpx.Timeout(TIMEOUT_S, read=1.0)) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/tools/Adder/call", json={"arguments": {"until": str(until)}, "deadline_s": TIMEOUT_S})
    appears(tmp_path / "until.cancelled")


def test_a_session_lasts_until_it_is_ended(client):
    def write(page):
        return ended(client.post("/v1/tools/Notebook/call", json={"argument": page, "session": "s"}))

    assert [write("a"), write("b")] == [("ok", "a"), ("ok", "a b")]
    assert client.delete("/v1/sessions/s").status_code == 204
    assert write("c") == ("ok", "c")


def test_mcp_clients_find_the_same_tools_at_mcp(client, url, tmp_path):
    adder = MCPTool("Sum", f"{url}/mcp#Adder")

    def ask(argument, deadline_s=float(TIMEOUT_S)):
        result = asyncio.run(adder.call(ToolCall("Sum", argument, deadline_s)))
        return result.status, result.text

    try:
        assert adder.description == "Adds two numbers."
        assert ask('{"a": 1, "b": 2}') == (ToolStatus.OK, "3")
        assert ask(json.dumps({"until": str(tmp_path / "until")}), 1.0)[0] is ToolStatus.TIMEOUT
        appears(tmp_path / "until.cancelled")
    finally:
        asyncio.run(adder.close())
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": CALCULATOR, "arguments": {"argument": "1/0"}}}
    answer = client.post("/mcp", json=call, headers={"accept": "application/json, text/event-stream"})
    assert '"text":"tool_error: division by zero"' in answer.text and '"isError":true' in answer.text


def test_another_address_than_the_clusters_is_refused_with_both_said(cluster):
    with pytest.raises(serve_app.ServiceError, match=rf"runs at 127\.0\.0\.1:{cluster.port} on this cluster already"):
        serve_app.start({CALCULATOR: builtin_tools()[CALCULATOR]}, app_name="elsewhere", http=HttpConfig(port=cluster.port + 1))
