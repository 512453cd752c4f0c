"""Sessions of stateful tools over Serve's handles. The handle of one tool is the named seam: a script in its place."""

from __future__ import annotations

import asyncio

import pytest

from tools_service import serve_handles
from tools_service.protocol import ToolCall, ToolResult, ToolStatus
from tools_service.serve_handles import ToolHandles, TransportError


class Method:
    def __init__(self, remote):
        self.remote = remote


class Replica:
    """Serve's handle of one tool that runs in one replica: holds sessions, runs "slow" until `go`, raises at "break", ends none before
    `go`, and opens one once it is `ready`."""

    def __init__(self):
        self.sessions: dict[str, int] = {}  # -> calls
        self.deadlines_s: list[float] = []
        self.go, self.ready, self.asked = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.ready.set()
        self.open_session, self.call_batch, self.end_session = Method(self._open), Method(self._call), Method(self._end)

    def options(self, session_id):
        assert session_id == "home"
        return self

    async def _open(self, session):
        self.asked.set()
        await self.ready.wait()
        self.sessions[session] = 0
        return "home"

    async def _call(self, calls):
        [call] = calls
        self.deadlines_s.append(call.deadline_s)
        if call.argument == "slow":
            await self.go.wait()
        if call.argument == "break":
            raise ValueError("a defect on the way")
        if call.session not in self.sessions:
            return [None]
        self.sessions[call.session] += 1
        return [ToolResult(ToolStatus.OK, str(self.sessions[call.session]))]

    async def _end(self, session):
        await self.go.wait()
        self.sessions.pop(session, None)


def handles_of(replica: Replica) -> ToolHandles:
    handles = ToolHandles("app")
    handles._handles["Notebook"] = replica
    return handles


async def call(handles: ToolHandles, session: str, argument: str = "", deadline_s: float = 10.0) -> str:
    [result] = await handles.send("Notebook", [ToolCall("Notebook", argument, deadline_s, session)])
    assert result is not None
    return result.text


async def test_a_session_that_ends_late_ends_no_later_one_of_its_name():
    replica = Replica()
    handles = handles_of(replica)
    assert [await call(handles, "s"), await call(handles, "s")] == ["1", "2"]
    handles.end_session("Notebook", "s")
    assert await call(handles, "s") == "1"
    replica.go.set()
    await handles.close()
    assert await call(handles, "s") == "2"
    assert len(replica.sessions) == 1


async def test_a_session_that_is_forgotten_for_newer_ones_is_ended(monkeypatch):
    monkeypatch.setattr(serve_handles, "MAX_SESSIONS", 2)
    replica = Replica()
    replica.go.set()
    handles = handles_of(replica)
    for session in ("a", "b", "c"):
        await call(handles, session)
    await handles.close()
    assert len(replica.sessions) == 2
    assert [await call(handles, "b"), await call(handles, "c"), await call(handles, "a")] == ["2", "2", "1"]


async def test_a_call_that_waited_for_the_one_before_it_has_only_what_is_left_of_its_deadline():
    replica = Replica()
    handles = handles_of(replica)
    calls = asyncio.gather(call(handles, "s", "slow"), call(handles, "s", deadline_s=7.0))
    await asyncio.sleep(0.05)
    replica.go.set()
    assert await calls == ["1", "2"]
    assert replica.deadlines_s[1] < 7.0 - 0.025


async def test_a_session_that_is_ended_while_its_first_call_opens_it_ends_after_that_call():
    replica = Replica()
    replica.go.set()
    replica.ready.clear()
    handles = handles_of(replica)
    first = asyncio.ensure_future(call(handles, "s"))
    await replica.asked.wait()
    handles.end_session("Notebook", "s")
    replica.ready.set()
    assert await first == "1"
    await handles.close()
    assert replica.sessions == {}


async def test_a_session_that_is_ended_as_it_opens_ends_also_where_its_first_call_is_cancelled():
    replica = Replica()
    replica.ready.clear()
    handles = handles_of(replica)
    first = asyncio.ensure_future(call(handles, "s", "slow"))
    await replica.asked.wait()
    handles.end_session("Notebook", "s")
    replica.ready.set()
    while not replica.deadlines_s:
        await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    replica.go.set()
    await handles.close()
    assert replica.sessions == {}


async def test_whatever_a_request_fails_with_is_a_transport_error_that_names_it():
    handles = handles_of(Replica())
    with pytest.raises(TransportError) as failed:
        await handles.send("Notebook", [ToolCall("Notebook", "break")])
    assert (failed.value.reason, failed.value.not_started) == ("ValueError", False)
