"""What stands behind the HTTP face. The handles are the named seam: a script in their place."""

from __future__ import annotations

import asyncio
import time

import pytest

from tools_service import gateway, serve_handles
from tools_service.gateway import Gateway
from tools_service.protocol import ToolCall, ToolResult, ToolStatus
from tools_service.runner import MAX_ARGUMENT_CHARS, ToolInfo
from tools_service.serve_handles import MAX_TRIES, TransportError

SLOW_S = 0.05


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(serve_handles, "BACKOFF_S", 0.001)


class Handles:
    """Arguments: "stall" never ends, "slow" takes SLOW_S, "alone" only runs alone and takes SLOW_S to say so, "die" loses the request,
    "lost" loses one that others share, "full" is refused."""

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
        if "die" in arguments or len(calls) > 1 and "lost" in arguments:
            raise TransportError("ActorDiedError")
        if "full" in arguments:
            raise TransportError("too many", not_started=True, overloaded=True)
        results = [ToolResult(ToolStatus.OK, f"{tool} {call.argument} {call.session}") for call in calls]
        return [None if len(calls) > 1 and a == "alone" else r for a, r in zip(arguments, results, strict=True)]

    def end_session(self, tool, name):
        self.ended.append((tool, name))


INFOS = {"many": ToolInfo("many", "", True, 2), "one": ToolInfo("one", "", False), "book": ToolInfo("book", "", True, stateful=True)}


def ask(*calls: ToolCall, handles: Handles | None = None):
    return asyncio.run(asyncio.wait_for(Gateway(handles or Handles(), INFOS).call(list(calls)), 30))


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


def test_an_argument_that_is_too_long_is_refused_and_costs_no_other_call():
    handles = Handles()
    results = ask(ToolCall("one", "a"), ToolCall("many", "x" * (MAX_ARGUMENT_CHARS + 1)), ToolCall("many", "b"), handles=handles)
    refused = (ToolStatus.BAD_ARGUMENTS, "the argument has 1,048,577 characters; 1,048,576 at most")
    assert [(r.status, r.text) for r in results] == [(ToolStatus.OK, "one a None"), refused, (ToolStatus.OK, "many b None")]
    assert sorted(handles.sent) == [("many", ["b"]), ("one", ["a"])]


def test_long_arguments_share_no_request():
    handles = Handles()
    longest, half = "x" * MAX_ARGUMENT_CHARS, "y" * (MAX_ARGUMENT_CHARS // 2)
    results = ask(*(ToolCall("many", argument) for argument in (longest, half, half, "z", longest)), handles=handles)
    assert {r.status for r in results} == {ToolStatus.OK}
    assert [arguments for _, arguments in handles.sent] == [[longest], [half, half], ["z"], [longest]]


def test_calls_whose_shared_request_is_lost_are_sent_again_each_alone():
    handles = Handles()
    assert [r.text for r in ask(ToolCall("many", "lost"), ToolCall("many", "b"), handles=handles)] == ["many lost None", "many b None"]
    assert handles.sent == [("many", ["lost", "b"]), ("many", ["lost"]), ("many", ["b"])]


async def test_a_tool_that_stalls_keeps_its_share_of_the_requests_and_no_more(monkeypatch):
    monkeypatch.setattr(gateway, "HTTP_IN_FLIGHT", 8)  # for three tools: two each, and two for all else
    face = Gateway(handles := Handles(), INFOS)
    stalled = [asyncio.ensure_future(face.call([ToolCall("one", "stall"), ToolCall("many", "a")])) for _ in range(2)]
    for _ in range(100):
        await asyncio.sleep(0)
    assert sorted(handles.sent) == [("many", ["a"])] * 2 + [("one", ["stall"])] * 2
    results = await face.call([ToolCall("one", "a"), ToolCall("many", "a"), ToolCall("one", "b")])
    overloaded = (ToolStatus.OVERLOADED, "2 requests wait for one already")
    assert [(r.status, r.text) for r in results] == [overloaded, (ToolStatus.OK, "many a None"), overloaded]
    for request in stalled:
        request.cancel()
    await asyncio.gather(*stalled, return_exceptions=True)
    [result] = await face.call([ToolCall("one", "a")])
    assert result.status is ToolStatus.OK


def test_deadline_and_latency_count_from_the_arrival_of_the_request():
    handles = Handles()
    token = gateway.ARRIVED.set(time.perf_counter() - 5.0)
    try:
        slow, over = ask(ToolCall("one", "a", 7.0), ToolCall("one", "stall", 4.0), handles=handles)
    finally:
        gateway.ARRIVED.reset(token)
    assert slow.status is ToolStatus.OK and slow.latency_s >= 5.0 and handles.deadlines_s["a"][0] <= 2.0
    assert (over.status, over.text) == (ToolStatus.TIMEOUT, "no answer within 4 s")
