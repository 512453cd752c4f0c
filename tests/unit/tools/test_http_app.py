"""The HTTP face over tools in this process: what each request is answered, and what is refused."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from datetime import date

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.unit.tools_in_process import InProcess, Notebook, Scripted, over_http
from tools_service import http_guard
from tools_service.adapters import load_tool
from tools_service.calculator import SimpleCalculatorTool
from tools_service.gateway import ARRIVED
from tools_service.http_app import MAX_CALLS, MAX_SEED, make_app
from tools_service.http_guard import MAX_BODY_BYTES
from tools_service.protocol import ToolResult, ToolStatus
from tools_service.runner import MAX_ARGUMENT_CHARS

CALCULATOR = "SimpleCalculatorTool"
NAMES = [CALCULATOR, "weekday", "Scripted", "Notebook"]
TOO_LONG = "the argument has 1,048,577 characters; 1,048,576 at most"
NOT_JSON = "the body is not valid JSON: "
JSON = {"content-type": "application/json"}


def weekday(year: int, month: int, day: int = 1) -> str:
    """Says on which day of the week a date falls."""
    return f"{date(year, month, day):%A}"


@pytest.fixture(scope="module")
def client():
    own = load_tool("weekday", f"{__file__}:weekday", {})
    tools = InProcess(SimpleCalculatorTool(), own, Scripted(), Notebook())
    with TestClient(make_app(tools.infos, tools.gateway.call, tools.gateway.end_session)) as client:
        yield client


def call(client, tool, **body):
    return client.post(f"/v1/tools/{tool}/call", json=body)


def ended(answer):
    """Status and text, after a look at the rest."""
    fields = answer if isinstance(answer, dict) else answer.json()
    assert list(fields) == ["status", "text", "latency_s", "truncated"]
    assert fields["latency_s"] >= 0 and isinstance(fields["truncated"], bool)
    return fields["status"], fields["text"]


@pytest.mark.parametrize(
    ("tool", "body", "status", "text"),
    [
        (CALCULATOR, {"argument": "13.1-3"}, "ok", "10.1"),
        (CALCULATOR, {"arguments": {"argument": "13.1-3"}}, "ok", "10.1"),
        (CALCULATOR, {"argument": "1/0"}, "tool_error", "division by zero"),
        (CALCULATOR, {"argument": "?"}, "bad_arguments", "unexpected character '?'"),
        (CALCULATOR, {"argument": "1" * (MAX_ARGUMENT_CHARS + 1)}, "bad_arguments", TOO_LONG),
        (CALCULATOR, {"arguments": {"argument": "1" * (MAX_ARGUMENT_CHARS + 1)}}, "bad_arguments", TOO_LONG),
        (CALCULATOR, {"arguments": {}}, "bad_arguments", "argument 'argument' is missing; required: argument"),
        (CALCULATOR, {"arguments": {"argument": 1}}, "bad_arguments", "argument 'argument' must be string, not 1"),
        ("weekday", {"arguments": {"year": 2024, "month": 2, "day": 29}}, "ok", "Thursday"),
        ("weekday", {"argument": '{"year": 2024, "month": 2}'}, "ok", "Thursday"),
        ("weekday", {"arguments": {"year": 2024}}, "bad_arguments", "argument 'month' is missing; required: year, month"),
        (
            "weekday",
            {"arguments": {"year": 2024, "month": 1, "x": 1}},
            "bad_arguments",
            "unknown argument 'x'; arguments: year, month, day",
        ),
        ("Scripted", {"argument": "error"}, "tool_error", "no luck"),
        ("Scripted", {"argument": "crash"}, "tool_error", "the tool failed with KeyError"),
        ("Scripted", {"argument": "half"}, "output_limit", "half of it"),
        ("Scripted", {"argument": "stall", "deadline_s": 0.1}, "timeout", "no answer within 0.1 s"),
        ("Scripted", {"argument": "surrogates"}, "ok", "😀 \ufffd"),
        ("Scripted", {"argument": "\0ü😀"}, "ok", "\0ü😀"),
        ("Scripted", {"argument": ""}, "ok", ""),
        ("Scripted", {"argument": "seen", "session": "s", "seed": MAX_SEED}, "ok", f"session=None seed={MAX_SEED}"),
        ("Scripted", {"argument": "seen", "session": None, "seed": None}, "ok", "session=None seed=None"),
    ],
)
def test_a_call_is_answered_200_however_the_tool_ended(client, tool, body, status, text):
    answer = call(client, tool, **body)
    assert answer.status_code == 200
    assert ended(answer) == (status, text)


def test_what_a_tool_has_cut_is_marked(client):
    assert [call(client, "Scripted", argument=text).json()["truncated"] for text in ("half", "whole")] == [True, False]


@pytest.mark.parametrize("name", ["none", "a/b", "", "a%0Ab", "%C3%BC", "%FF", "a b", "call"])
def test_an_unknown_tool_is_404_in_the_same_shape_with_the_tools_listed(client, name):
    answer = call(client, name, argument="1")
    assert answer.status_code == 404
    status, text = ended(answer)
    assert status == "unknown_tool" and text.startswith("no tool ") and text.endswith(f"tools: {', '.join(NAMES)}")
    assert call(client, name, arguments={"any": 1}).status_code == 404


def test_a_full_queue_is_503_in_the_same_shape_and_says_when_to_come_back(client):
    answer = call(client, "Scripted", argument="full")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert ended(answer) == ("overloaded", "too many requests wait already")


def test_calls_of_a_batch_are_answered_in_order_each_with_its_own_status(client):
    calls = [
        {"tool": CALCULATOR, "argument": "1+1"},
        {"tool": "none", "argument": "1"},
        {"tool": "weekday", "arguments": {"year": 1}},
        {"tool": "Scripted", "argument": "full"},
        {"tool": "Scripted", "argument": "stall", "deadline_s": 0.1},
        {"tool": "weekday", "arguments": {"year": 2024, "month": 1}},
        *({"tool": CALCULATOR, "argument": f"{n}"} for n in range(200)),
    ]
    answer = client.post("/v1/call", json={"calls": calls})
    assert answer.status_code == 200
    results = [ended(result) for result in answer.json()["results"]]
    assert [status for status, _ in results[:6]] == ["ok", "unknown_tool", "bad_arguments", "overloaded", "timeout", "ok"]
    assert [text for _, text in results[6:]] == [str(n) for n in range(200)]


def test_a_batch_of_nothing_but_mistakes_is_answered_too(client):
    answer = client.post("/v1/call", json={"calls": [{"tool": CALCULATOR, "arguments": {}}]})
    assert [result["status"] for result in answer.json()["results"]] == ["bad_arguments"]


def test_a_session_belongs_to_whoever_knows_its_name_until_it_is_ended(client):
    def write(page, session):
        return ended(call(client, "Notebook", argument=page, session=session))[1]

    assert [write("a", "mine/1"), write("b", "mine/1"), write("c", "other")] == ["a", "a b", "c"]
    assert client.delete("/v1/sessions/mine%2F1").status_code == 204
    assert [write("d", "mine/1"), write("e", "other")] == ["d", "c e"]
    assert client.delete("/v1/sessions/never-there").status_code == 204


def test_the_list_of_tools_can_be_pasted_into_a_function_calling_client(client):
    tools = client.get("/v1/tools").json()
    assert [tool["function"]["name"] for tool in tools] == NAMES
    assert all(list(tool) == ["type", "function"] and tool["type"] == "function" for tool in tools)
    assert all(list(tool["function"]) == ["name", "description", "parameters"] for tool in tools)
    assert tools[1]["function"]["description"] == "Says on which day of the week a date falls."
    assert tools[1]["function"]["parameters"]["required"] == ["year", "month"]


def test_health_names_the_tools(client):
    assert client.get("/healthz").json() == {"status": "ok", "tools": NAMES}
    assert client.head("/healthz").status_code == 200  # as load balancers ask


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", "the body must be a JSON object, with the header Content-Type: application/json"),
        (b"[1]", "the body must be a JSON object, with the header Content-Type: application/json"),
        (b"null", "the body must be a JSON object, with the header Content-Type: application/json"),
        (b"{", NOT_JSON),
        (b'{"argument": "\xff"}', NOT_JSON),
        (b'{"argument": "\\ud800"}', NOT_JSON),
        (b'{"argument": NaN}', NOT_JSON),
        (b'{"arguments": {"a": -Infinity}}', NOT_JSON),
        (b"[" * 100_000, NOT_JSON),
        (b'{"seed": 1' + b"0" * 10_000 + b"}", NOT_JSON),
        (b"{}", 'give either "argument" (text) or "arguments" (an object)'),
        (b'{"argument": "1", "arguments": {}}', 'give either "argument" (text) or "arguments" (an object)'),
        (b'{"argument": "1", "timeout": 3}', "unknown key 'timeout'"),
        (b'{"argument": "1", "\\n\\u0000": 3}', "unknown key '\\n\\x00'"),
        (b'{"argument": 1}', "argument: Input should be a valid string (1)"),
        (b'{"arguments": "x"}', "arguments: Input should be a valid dictionary ('x')"),
        (b'{"argument": "1", "deadline_s": 0}', "deadline_s: Input should be greater than 0 (0)"),
        (b'{"argument": "1", "deadline_s": 601}', "deadline_s: Input should be less than or equal to 600 (601)"),
        (b'{"argument": "1", "deadline_s": 1e999}', "deadline_s: Input should be a finite number (inf)"),
        (b'{"argument": "1", "deadline_s": "1"}', "deadline_s: Input should be a valid number ('1')"),
        (b'{"argument": "1", "deadline_s": true}', "deadline_s: Input should be a valid number (True)"),
        (b'{"argument": "1", "seed": -1}', "seed: Input should be greater than or equal to 0 (-1)"),
        (b'{"argument": "1", "seed": 1.5}', "seed: Input should be a valid integer (1.5)"),
        (b'{"argument": "1", "session": ""}', "session: String should have at least 1 character ('')"),
    ],
)
def test_a_body_that_cannot_be_understood_is_refused_in_one_line(client, body, error):
    answer = client.post(f"/v1/tools/{CALCULATOR}/call", content=body, headers=JSON)
    assert (answer.status_code, list(answer.json())) == (422, ["error"])
    found = answer.json()["error"]
    assert found.startswith(error) and "\n" not in found
    assert found == error or error is NOT_JSON and found.endswith(tuple("0123456789"))  # the parser says at which column


def test_the_call_of_a_batch_that_is_wrong_is_named(client):
    rows = [{"tool": CALCULATOR, "argument": "1"}, {"tool": CALCULATOR}]
    assert client.post("/v1/call", json={"calls": rows}).json() == {
        "error": 'calls.1: give either "argument" (text) or "arguments" (an object)'
    }
    assert client.post("/v1/call", json={"calls": [{"argument": "1"}]}).json() == {"error": "calls.0.tool: Field required"}
    assert client.post("/v1/call", json={"calls": []}).status_code == 422
    assert client.post("/v1/call", json={"calls": rows[:1] * (MAX_CALLS + 1)}).status_code == 422


def test_a_body_that_does_not_say_it_is_json_is_refused(client):
    """What a form of a web page of elsewhere can send without being asked for leave."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = client.post(f"/v1/tools/{CALCULATOR}/call", content=b'{"argument": "1"}', headers={"content-type": kind})
        assert answer.status_code == 422 and "Content-Type: application/json" in answer.json()["error"]


@pytest.mark.parametrize("path", [f"/v1/tools/{CALCULATOR}/call", "/v1/call", "/mcp"])
def test_a_body_beyond_the_bound_is_413_whether_its_length_is_told_or_not(client, path):
    body = b" " * (MAX_BODY_BYTES + 1)
    for content in (body, iter([body[:-1], body[-1:]])):
        answer = client.post(path, content=content, headers=JSON)
        assert (answer.status_code, answer.json()) == (413, {"error": f"the body is larger than {MAX_BODY_BYTES} bytes; send less at once"})
    answer = client.post(f"/v1/tools/{CALCULATOR}/call", content=b'{"argument": "1"}'.ljust(MAX_BODY_BYTES), headers=JSON)
    assert ended(answer) == ("ok", "1")


def test_the_longest_argument_arrives_whatever_is_escaped_in_it(client):
    answer = call(client, "Scripted", argument="\x01" * MAX_ARGUMENT_CHARS)
    status, text = ended(answer)
    assert status == "ok" and len(text) == 100_000


def test_a_body_that_does_not_come_is_408_and_the_connection_ends(monkeypatch):
    monkeypatch.setattr(http_guard, "BODY_S", 0.05)
    tools = InProcess(SimpleCalculatorTool())
    head = b"POST /v1/call HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with over_http(make_app(tools.infos, tools.gateway.call)) as port, socket.create_connection(("127.0.0.1", port), 30) as half:
        half.sendall(head)
        answer = half.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 408 ") and answer.endswith(b'{"error":"the body did not arrive within 0.05 s"}')


async def test_a_request_has_arrived_when_its_first_byte_has():
    asked = []

    async def answer(calls):
        asked.append(ARRIVED.get())
        return [ToolResult(ToolStatus.OK, "")]

    async def body():
        yield b'{"argument": '
        asked.append(time.perf_counter())
        yield b'"1"}'

    app = make_app(InProcess(SimpleCalculatorTool()).infos, answer)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        assert (await client.post(f"/v1/tools/{CALCULATOR}/call", content=body(), headers=JSON)).status_code == 200
    last_sent, arrived = asked
    assert arrived <= last_sent


@pytest.mark.parametrize(
    ("value", "status", "text"),
    [
        (b"[" * 150 + b"]" * 150, "bad_arguments", "argument 'year' must be integer, not " + "[" * 60),
        (b"1" + b"0" * 4000, "tool_error", "the tool failed with OverflowError"),
        (b"1e999", "bad_arguments", "argument 'year' must be integer, not Infinity"),
        (b"2024.0", "ok", "Monday"),
        (b"true", "bad_arguments", "argument 'year' must be integer, not true"),
    ],
)
def test_arguments_of_any_depth_and_size_end_in_a_result(client, value, status, text):
    answer = client.post("/v1/tools/weekday/call", content=b'{"arguments": {"month": 1, "year": %b}}' % value, headers=JSON)
    assert answer.status_code == 200
    found = ended(answer)
    assert found[0] == status and found[1].startswith(text)


def test_paths_and_methods_that_there_are_not_are_refused_in_the_same_shape(client):
    assert client.get("/v2").status_code == 404 and client.get("/v2").json() == {
        "error": "there is nothing at this path; see /openapi.json"
    }
    answer = client.get("/v1/call")
    assert (answer.status_code, answer.headers["allow"], answer.json()) == (405, "POST", {"error": "Method Not Allowed"})
    assert client.get("/mcp").status_code == 405


def test_at_a_loopback_address_no_other_host_and_no_web_page_of_elsewhere_is_served():
    tools = InProcess(SimpleCalculatorTool())
    with over_http(make_app(tools.infos, tools.gateway.call)) as port:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:

            def asked(path, **headers):
                return client.post(path, json={"argument": "1"}, headers=headers).status_code

            path = f"/v1/tools/{CALCULATOR}/call"
            for host in (f"localhost:{port}", "127.0.0.1", "[::1]:8000", "[::ffff:127.0.0.1]", "127.0.0.2", socket.gethostname()):
                assert asked(path, host=host) == 200
            for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example", "[::1", "0.0.0.0", ""):
                assert (asked(path, host=host), asked("/mcp", host=host)) == (421, 421)
            assert client.get("/healthz", headers={"host": "evil.example"}).json() == {
                "error": "this service is at a loopback address, not at 'evil.example'; ask for 127.0.0.1 or localhost"
            }
            assert asked(path, origin=f"http://localhost:{port}") == 200
            for origin in ("http://evil.example", "null", "http://[", "http://localhost.evil.example"):
                assert (asked(path, origin=origin), asked("/mcp", origin=origin)) == (403, 403)


def test_behind_another_address_any_host_name_is_served():
    tools = InProcess(SimpleCalculatorTool())
    app = make_app(tools.infos, tools.gateway.call)

    async def scenario():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://10.0.0.7:8000") as client:
            return await client.get("/healthz", headers={"host": "tools.example.com"})

    assert asyncio.run(scenario()).status_code == 200


def test_the_description_is_complete(client):
    described = client.get("/openapi.json").json()
    found = {
        f"{method} {path}": sorted(operation["responses"])
        for path, item in described["paths"].items()
        for method, operation in item.items()
    }
    assert found == {
        "get /v1/tools": ["200", "403", "421"],
        "get /healthz": ["200", "403", "421"],
        "post /v1/tools/{name}/call": ["200", "403", "404", "408", "413", "421", "422", "503"],
        "post /v1/call": ["200", "403", "408", "413", "421", "422"],
        "delete /v1/sessions/{session}": ["204", "403", "421", "422"],
    }
    text = json.dumps(described)
    assert "HTTPValidationError" not in text and '"ToolStatus"' in text
    assert described["components"]["schemas"]["Arguments"]["additionalProperties"] is False


def test_a_service_without_sessions_offers_none_to_end():
    tools = InProcess(SimpleCalculatorTool())
    with TestClient(make_app(tools.infos, tools.gateway.call)) as client:
        assert client.delete("/v1/sessions/s").status_code == 404
