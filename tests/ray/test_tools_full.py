"""What is full waits or is refused, and what is left of a service that ends: sessions' homes, the HTTP proxy, drain."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tools_service import serve_app
from tools_service.config import PoolConfig
from tools_service.protocol import ToolCall

TIMEOUT_S = 60
HOME_IN_FLIGHT, HTTP_IN_FLIGHT, HTTP_QUEUED = 8, 3, 2


def _tools():
    """Tools made here, so that they travel by value."""
    import asyncio
    import os
    from pathlib import Path

    from tools_service.protocol import ToolResult, ToolStatus

    class Notebook:
        """Counts the calls of a session: "PID COUNT". With "PATH" it waits for the file PATH first, after PATH.begun; a session called
        with "end PATH" makes that file when it is ended."""

        name, description, idempotent = "Notebook", "for tests", False

        def __init__(self):
            self.counts, self.at_end = {}, {}

        async def call(self, call):
            if call.argument.startswith("end "):
                self.at_end[call.session] = Path(call.argument[4:])
            elif call.argument:
                Path(f"{call.argument}.begun").touch()
                while not Path(call.argument).exists():
                    await asyncio.sleep(0.02)
            self.counts[call.session] = self.counts.get(call.session, 0) + 1
            return ToolResult(ToolStatus.OK, f"{os.getpid()} {self.counts[call.session]}")

        async def end_session(self, session):
            self.counts.pop(session)
            if session in self.at_end:
                self.at_end[session].touch()

    class Refuser(Notebook):
        name = "Refuser"

        async def start(self):
            raise RuntimeError("nothing to start with")

    return {"Notebook": Notebook, "Refuser": Refuser}


@pytest.fixture
def url(cluster):
    """A service for one test: with another's requests behind it, its proxy was seen to refuse none of the surplus."""
    pools = {"Notebook": PoolConfig(min_replicas=2, max_in_flight=HOME_IN_FLIGHT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve_app, "HTTP_IN_FLIGHT", HTTP_IN_FLIGHT)
        patch.setattr(serve_app, "HTTP_QUEUED", HTTP_QUEUED)
        tools = {"Notebook": _tools()["Notebook"]}
        serve_app.start(tools, app_name="full", pools=pools, http=cluster, start_timeout_s=TIMEOUT_S)
    yield f"http://{cluster.host}:{cluster.port}"
    serve_app.shutdown("full")


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
        yield client


def ask(client, calls):
    """[(session, argument), ...] in one request; (status, pid, count) of each."""
    rows = [{"tool": "Notebook", "session": session, "argument": argument, "deadline_s": 50.0} for session, argument in calls]
    results = client.post("/v1/call", json={"calls": rows}).json()["results"]
    return [(result["status"], *result["text"].split(maxsplit=1)) for result in results]


def until(condition):
    """Waits for something that another process does and nothing announces."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_session_whose_home_is_full_waits_for_it_and_holds_up_no_other(client, tmp_path):
    first = ask(client, [(f"s{n}", "") for n in range(60)])
    assert {(status, count) for status, _, count in first} == {("ok", "1")}
    pids = [pid for _, pid, _ in first]
    home = max(pids, key=pids.count)
    there = [f"s{n}" for n, pid in enumerate(pids) if pid == home]
    elsewhere = next(f"s{n}" for n, pid in enumerate(pids) if pid != home)
    [leaving, *there] = there
    assert ask(client, [(leaving, f"end {tmp_path}/ended")])[0][0] == "ok"
    paths = [tmp_path / f"go{n}" for n in range(HOME_IN_FLIGHT)]
    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(ask, client, [(session, str(path)) for session, path in zip(there, paths, strict=False)])
        until(lambda: all(path.with_name(f"{path.name}.begun").exists() for path in paths))
        waiting = threads.submit(ask, client, [(session, "") for session in there[HOME_IN_FLIGHT:]])
        assert client.delete(f"/v1/sessions/{leaving}").status_code == 204
        for count in range(2, 22):
            [(status, pid, text)] = ask(client, [(elsewhere, "")])
            assert (status, text) == ("ok", str(count)) and pid != home
        for path in paths:
            path.touch()
        results = slow.result(timeout=TIMEOUT_S) + waiting.result(timeout=TIMEOUT_S)
    assert results == [("ok", home, "2")] * len(there)
    until((tmp_path / "ended").exists)


def test_requests_beyond_the_proxys_queue_are_503_in_one_line(client, tmp_path):
    # Serve promises a bound, not its exact place: a request that a full replica gave back is for a moment neither in flight nor queued.
    until_then, num = tmp_path / "go", 32
    most = 2 * (HTTP_IN_FLIGHT + HTTP_QUEUED)
    call = {"argument": str(until_then), "deadline_s": TIMEOUT_S}
    with ThreadPoolExecutor(num) as threads:
        asked = [threads.submit(client.post, "/v1/tools/Notebook/call", json=call) for _ in range(num)]
        try:
            until(lambda: sum(future.done() for future in asked) >= num - most)
        finally:
            until_then.touch()
        answers = [future.result(timeout=TIMEOUT_S) for future in asked]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert num - most <= len(refused) < num
    assert {(answer.status_code, answer.headers["retry-after"]) for answer in refused} == {(503, "1")}
    assert all(answer.text.startswith("Request dropped") and "\n" not in answer.text for answer in refused)
    assert {answer.json()["status"] for answer in answers if answer.status_code == 200} == {"ok"}


def test_a_service_that_does_not_end_in_time_says_whose_calls_it_waits_for(cluster, tmp_path):
    path = tmp_path / "go"
    pools = {"Notebook": PoolConfig(drain_s=300)}
    tools = {"Notebook": _tools()["Notebook"]}
    handle = serve_app.start(tools, app_name="drains", pools=pools, start_timeout_s=TIMEOUT_S)["Notebook"]
    handle._init(_run_router_in_separate_loop=True)  # this thread has no event loop
    pending = handle.call_batch.remote([ToolCall("Notebook", str(path), 50.0)])
    until(path.with_name("go.begun").exists)
    message = r"'drains' is not gone after 1 s; calls may go on for .* \(Notebook 300 s\), then Serve removes it; .* a lower drain_s$"
    with pytest.raises(serve_app.ServiceError, match=message):
        serve_app.shutdown("drains", timeout_s=1.0)
    path.touch()
    [result] = pending.result(timeout_s=TIMEOUT_S)
    assert result is not None and result.status == "ok"
    serve_app.shutdown("drains")
    assert serve_app._state("drains")[0] == "NOT_STARTED"


def test_why_a_tool_does_not_start_is_told_though_what_did_start_takes_time_to_go(cluster, monkeypatch):
    monkeypatch.setattr(serve_app, "REMOVE_S", 0.0)
    with pytest.raises(serve_app.ToolStartError, match="tool Refuser does not start: nothing to start with"):
        serve_app.start(_tools(), app_name="refused", start_timeout_s=TIMEOUT_S)
    until(lambda: serve_app._state("refused")[0] == "NOT_STARTED")
