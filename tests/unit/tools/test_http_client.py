"""The HTTP client of the service against a server that answers as the script says: what is sent again, and what never is."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from toolrl_ray.errors import UserError
from toolrl_ray.tools import http_client
from toolrl_ray.tools.http_client import HttpTools, ServiceGone
from tools_service.protocol import ToolCall, ToolStatus

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FUNCTION = {"name": "Echo", "description": "Says it again.", "parameters": SCHEMA}
DROP = "drop the connection"
ANSWER = "answer"


class Scripted(ThreadingHTTPServer):
    """Echoes the calls of a batch. `script`: what to do with the next calls instead: a status with its body, or DROP."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list = []
        self.bodies: list[dict] = []
        self.deleted: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def log_message(self, *arguments: object) -> None:
        return

    def do_GET(self) -> None:
        self.answer(200, [{"type": "function", "function": FUNCTION}] if self.path == "/v1/tools" else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        step = self.server.script.pop(0) if self.server.script else ANSWER
        if step == DROP:
            self.close_connection = True
        elif step == ANSWER:
            row = {"status": "ok", "latency_s": 0.5, "truncated": False}
            self.answer(200, {"results": [{**row, "text": call["argument"]} for call in body["calls"]]})
        else:
            self.answer(*step)

    def do_DELETE(self) -> None:
        self.server.deleted.append(self.path)
        self.answer(200, {})

    def answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    monkeypatch.setattr(http_client, "BACKOFF_S", 0.01)
    monkeypatch.setattr(http_client, "RECONNECT_S", 0.3)
    server = Scripted()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
async def tools(server: Scripted):
    tools = HttpTools(server.url)
    yield tools
    await tools.close()


CALLS = [ToolCall("Echo", "one", 2.0), ToolCall("Echo", "two \ud800", 3.0, session="s", seed=7)]


async def test_calls_travel_in_one_request_and_come_back_in_order(server: Scripted, tools: HttpTools) -> None:
    results = await tools.call(CALLS)
    assert [(result.status, result.text, result.latency_s) for result in results] == [("ok", "one", 0.5), ("ok", "two \ufffd", 0.5)]
    first = {"tool": "Echo", "argument": "one", "deadline_s": 2.0}
    assert server.bodies == [{"calls": [first, {"tool": "Echo", "argument": "two \ufffd", "deadline_s": 3.0, "session": "s", "seed": 7}]}]


async def test_a_request_is_given_up_soon_after_the_longest_deadline_of_its_calls(tools: HttpTools) -> None:
    waits: list[float] = []

    async def note(request: httpx.Request) -> None:
        waits.append(request.extensions["timeout"]["read"])

    tools._client.event_hooks = {"request": [note]}
    await tools.call(CALLS)
    assert waits == [3.0 + http_client.ANSWER_S]


async def test_what_a_service_says_of_its_tools_is_taken_over(tools: HttpTools) -> None:
    infos = await tools.infos()
    assert [(info.name, info.description, info.parameters) for info in infos.values()] == [("Echo", "Says it again.", SCHEMA)]


@pytest.mark.parametrize("status", [404, 408, 503])
async def test_a_request_that_reached_no_tool_is_sent_again(server: Scripted, tools: HttpTools, status: int) -> None:
    server.script = [(status, {}), (status, {})]
    assert [result.text for result in await tools.call(CALLS[:1])] == ["one"]
    assert len(server.bodies) == 3


@pytest.mark.parametrize("step", [DROP, (500, {"detail": "broken"}), (200, {"results": []}), (200, {"results": [{"status": "fine"}]})])
async def test_calls_whose_fate_is_not_known_are_never_sent_again(server: Scripted, tools: HttpTools, step) -> None:
    server.script = [step]
    results = await tools.call(CALLS)
    assert [result.status for result in results] == [ToolStatus.UNAVAILABLE] * 2
    assert results[0].text.startswith("tool unavailable: ") and len(server.bodies) == 1


async def test_calls_that_the_service_refuses_are_the_callers_mistake(server: Scripted, tools: HttpTools) -> None:
    server.script = [(422, {"error": "deadline_s\nis too long"})]
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+ refuses the call: deadline_s is too long \(HTTP status 422\)$"):
        await tools.call(CALLS)


async def test_long_calls_travel_in_several_requests_and_one_that_is_too_long_is_answered(server: Scripted, tools: HttpTools) -> None:
    calls = [ToolCall("Echo", f"{number}" + "é" * 700_000) for number in range(5)]
    assert [result.text[0] for result in await tools.call(calls)] == list("01234")
    assert [len(body["calls"]) for body in server.bodies] == [2, 1, 2]
    server.script = [(413, {"error": "the body is larger than 8 bytes"})]
    [result] = await tools.call(calls[:1])
    assert (result.status, result.text) == ("bad_arguments", "the call is too long: the body is larger than 8 bytes (HTTP status 413)")


async def test_a_service_that_stays_away_is_given_up(server: Scripted, tools: HttpTools) -> None:
    server.script = [(503, {})] * 1000
    with pytest.raises(ServiceGone, match=r"127\.0\.0\.1:\d+ went away and was not back after 0\.3 s \(HTTP status 503\)"):
        await tools.call(CALLS)
    assert len(server.bodies) > 2


async def test_a_session_is_ended_by_its_whole_name_and_where_nobody_can_be_told_it_is_left(server: Scripted, tools: HttpTools) -> None:
    await tools.end_session("mine/1?#")
    assert server.deleted == ["/v1/sessions/mine%2F1%3F%23"]
    gone = HttpTools("127.0.0.1:9")
    await gone.end_session("mine")
    await gone.close()


async def test_where_nothing_listens_there_is_no_service() -> None:
    tools = HttpTools("127.0.0.1:9")
    with pytest.raises(UserError, match=r"no tools service at http://127\.0\.0\.1:9; start one with: toolrl tools serve, or use --local"):
        await tools.infos()
    await tools.close()


async def test_a_server_of_something_else_is_told_apart(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FUNCTION, "name", None)
    monkeypatch.delitem(FUNCTION, "parameters")
    tools = HttpTools(server.url)
    with pytest.raises(UserError, match="answers, but no tools service runs there"):
        await tools.infos()
    await tools.close()


@pytest.mark.parametrize("address", ["ftp://host:1", "http://", "http://host:port", "127.0.0.1:99999", "127.0.0.1:0"])
def test_what_is_not_a_url_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="is not a URL; give one as http"):
        HttpTools(address)
