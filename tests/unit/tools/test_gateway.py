"""What stands behind the HTTP face. The handles are the named seam: a script in their place."""

from __future__ import annotations

import asyncio

import pytest

from tools_service import serve_handles
from tools_service.gateway import Gateway
from tools_service.protocol import ToolCall, ToolResult, ToolStatus
from tools_service.runner import ToolInfo
from tools_service.serve_handles import MAX_TRIES, TransportError

SLOW_S = 0.05


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(serve_handles, "BACKOFF_S", 0.001)


class Handles:
    """Arguments: "stall" never ends, "slow" takes SLOW_S, "alone" only runs alone and takes SLOW_S to say so, "die" loses the request,
    "full" is refused."""

    def __init__(self):
        self.sent: list[tuple[str, list[str]]] = []
        self.deadlines_s: dict[str, list[float]] = {}
        self.ended: list[tuple[str, str]] = []

    async def send(self, tool, calls):
        arguments = [call.argument for call in calls]
        self.sent.append((tool, arguments))
        for call in calls:
            self.deadlines_s.setdefault(call.argument, []).append(call.deadline_s)
        if "slow" in arguments or len(calls) > 1 and "alone" in arguments:
            await asyncio.sleep(SLOW_S)
        if "stall" in arguments:
            await asyncio.Event().wait()
        if "die" in arguments:
            raise TransportError("ActorDiedError")
        if "full" in arguments:
            raise TransportError("too many", not_started=True, overloaded=True)
        results = [ToolResult(ToolStatus.OK, f"{tool} {call.argument} {call.session}") for call in calls]
        return [None if len(calls) > 1 and a == "alone" else r for a, r in zip(arguments, results, strict=True)]

    def end_session(self, tool, name):
        self.ended.append((tool, name))


def ask(*calls: ToolCall, handles: Handles | None = None):
    infos = {"many": ToolInfo("many", "", True, 2), "one": ToolInfo("one", "", False), "book": ToolInfo("book", "", True, stateful=True)}
    return asyncio.run(asyncio.wait_for(Gateway(handles or Handles(), infos).call(list(calls)), 30))


def test_calls_of_a_batch_share_requests_by_tool_and_come_back_in_order():
    handles = Handles()
    calls = [ToolCall(tool, str(n)) for n, tool in enumerate(["many", "one", "many", "many", "one"])]
    assert [r.text for r in ask(*calls, handles=handles)] == ["many 0 None", "one 1 None", "many 2 None", "many 3 None", "one 4 None"]
    assert sorted(handles.sent) == [("many", ["0", "2"]), ("many", ["3"]), ("one", ["1"]), ("one", ["4"])]


def test_a_call_that_must_be_sent_again_alone_is():
    handles = Handles()
    results = ask(ToolCall("many", "alone"), ToolCall("many", "b"), handles=handles)
    assert [r.text for r in results] == ["many alone None", "many b None"]
    assert handles.sent == [("many", ["alone", "b"]), ("many", ["alone"])]


def test_what_is_sent_again_has_only_what_is_left_of_its_deadline():
    handles = Handles()
    ask(ToolCall("many", "alone", 7.0), ToolCall("many", "b", 9.0), ToolCall("many", "die", 8.0), handles=handles)
    first, again = handles.deadlines_s["alone"]
    assert first == 7.0 and again < 7.0 - SLOW_S / 2
    first, *again = handles.deadlines_s["die"]
    assert first == 8.0 and len(again) == 2 and 8.0 > again[0] > again[1]


def test_a_call_whose_deadline_passes_between_tries_is_unavailable_for_the_reason_of_the_last(monkeypatch):
    monkeypatch.setattr(serve_handles, "BACKOFF_S", 1000.0)
    [result] = ask(ToolCall("many", "die", 0.05))
    assert (result.status, result.text) == (ToolStatus.UNAVAILABLE, "tool unavailable: ActorDiedError")


def test_each_call_has_the_latency_of_its_own_request():
    quick, slow, shared, alone = ask(ToolCall("one", "a"), ToolCall("one", "slow"), ToolCall("many", "b"), ToolCall("many", "alone"))
    assert quick.latency_s < slow.latency_s
    assert shared.latency_s < alone.latency_s


def test_every_failure_has_a_name_and_costs_no_other_call():
    handles = Handles()
    calls = [("none", "a"), ("one", "die"), ("one", "full"), ("one", "stall"), ("one", "a")]
    results = ask(*(ToolCall(tool, argument, 0.2) for tool, argument in calls), handles=handles)
    assert [(r.status, r.text) for r in results] == [
        (ToolStatus.UNKNOWN_TOOL, "no tool 'none'; tools: many, one, book"),
        (ToolStatus.UNAVAILABLE, "tool unavailable: ActorDiedError"),
        (ToolStatus.OVERLOADED, "too many"),
        (ToolStatus.TIMEOUT, "no answer within 0.2 s"),
        (ToolStatus.OK, "one a None"),
    ]
    assert handles.sent.count(("one", ["die"])) == 1  # may have run


def test_an_idempotent_call_is_tried_again_and_a_call_of_a_session_is_not():
    handles = Handles()
    ask(ToolCall("many", "die"), ToolCall("book", "die", 10.0, "s"), ToolCall("book", "a", 10.0, "t"), handles=handles)
    assert handles.sent.count(("many", ["die"])) == MAX_TRIES and handles.sent.count(("book", ["die"])) == 1
    assert handles.ended == [("book", "s")]


def test_a_tool_without_state_is_told_of_no_session():
    assert [r.text for r in ask(ToolCall("one", "a", 10.0, "s"), ToolCall("book", "a", 10.0, "s"))] == ["one a None", "book a s"]


def test_a_call_that_is_shed_leaves_its_session_as_it_was():
    handles = Handles()
    assert [r.status for r in ask(ToolCall("book", "full", 10.0, "s"), handles=handles)] == [ToolStatus.OVERLOADED]
    assert handles.ended == []
