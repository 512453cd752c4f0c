from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
from pydantic import ValidationError

from toolrl_ray.config import ToolsConfig
from toolrl_ray.errors import ConfigError
from toolrl_ray.tools.call_queue import BATCHES_IN_FLIGHT, MAX_TRIES, TransportError
from toolrl_ray.tools.dispatch import Dispatcher
from toolrl_ray.tools.local import LocalTools
from tools_service import serve_handles
from tools_service.protocol import ToolCall, ToolResult, ToolStatus
from tools_service.runner import MAX_ARGUMENT_CHARS, ToolInfo

TOO_LONG = "the argument has 1,048,577 characters; 1,048,576 at most"
OK, TIMEOUT, OVERLOADED, UNAVAILABLE = ToolStatus.OK, ToolStatus.TIMEOUT, ToolStatus.OVERLOADED, ToolStatus.UNAVAILABLE


class Fake:
    """A transport whose requests answer when `gate` is open. Arguments: "stall" never ends alone and breaks its batch up,
    "die" loses the request, "refuse" is refused before it starts, "full" because too many wait, "bug" raises, "cancel" is
    cancelled by the other side."""

    def __init__(self, max_batch=4, idempotent=True, **facts):
        self.info = ToolInfo("t", "", idempotent, max_batch, **facts)
        self.gate = asyncio.Event()
        self.gate.set()
        self.sent: list[list[str]] = []
        self.calls: list[ToolCall] = []
        self.ended_sessions: list[tuple[str, str]] = []
        self.ended: Counter[str] = Counter()
        self.describe_failures, self.describe_error = 0, TransportError("NoController", not_started=True)

    async def describe(self, tool):
        if self.describe_failures:
            self.describe_failures -= 1
            raise self.describe_error
        return replace(self.info, name=tool)

    async def send(self, tool, calls):
        arguments = [call.argument for call in calls]
        self.calls += calls
        self.sent.append(arguments)
        try:
            await self.gate.wait()
            if "stall" in arguments:
                if len(arguments) > 1:
                    return [ToolResult(OK, a) if a != "stall" else None for a in arguments]
                await asyncio.Event().wait()
            if "die" in arguments:
                raise TransportError("ActorDiedError")
            if "full" in arguments:
                raise TransportError("too many requests wait already", not_started=True, overloaded=True)
            if "refuse" in arguments:
                raise TransportError("BackPressureError", not_started=True)
            if "bug" in arguments:
                raise RuntimeError("defect")
            if "cancel" in arguments:
                raise asyncio.CancelledError
            if "short" in arguments:
                return []
            return [ToolResult(OK, a) for a in arguments]
        except asyncio.CancelledError:
            self.ended["cancelled"] += 1
            raise

    def end_session(self, tool, name):
        self.ended_sessions.append((tool, name))


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(serve_handles, "BACKOFF_S", 0.001)


def run(scenario, **options):
    """Runs scenario(dispatcher, transport) with a limit far above what it takes."""
    limits = {"max_queued": options.pop("max_queued", 1000), "cache_size": options.pop("cache_size", 0)}

    async def main():
        transport = Fake(**{"max_in_flight": 8} | options)
        dispatcher = Dispatcher(transport, ["t", "u"], **limits)
        try:
            return await asyncio.wait_for(scenario(dispatcher, transport), 30)
        finally:
            await dispatcher.close()

    return asyncio.run(main())


def ask(dispatcher, *arguments, deadline_s=20.0, tool="t"):
    return asyncio.gather(*(dispatcher(ToolCall(tool, a, deadline_s)) for a in arguments))


def test_a_call_with_nothing_in_flight_goes_alone_and_at_once():
    async def scenario(dispatcher, transport):
        for argument in "abc":
            [result] = await ask(dispatcher, argument)
            assert (result.status, result.text) == (OK, argument)
        assert transport.sent == [["a"], ["b"], ["c"]]
        assert dispatcher.stats()["coalesced_requests"] == 0

    run(scenario)


def test_calls_that_would_wait_share_requests_up_to_the_tools_limit():
    async def scenario(dispatcher, transport):
        await dispatcher.connect()
        transport.gate.clear()
        calls = ask(dispatcher, *map(str, range(25)))
        while len(transport.sent) < BATCHES_IN_FLIGHT:
            await asyncio.sleep(0)
        assert [len(s) for s in transport.sent] == [4] * BATCHES_IN_FLIGHT  # the other nine wait
        transport.gate.set()
        assert [r.text for r in await calls] == list(map(str, range(25)))
        assert [len(s) for s in transport.sent] == [4] * 6 + [1]
        stats = dispatcher.stats()
        assert sum(count for key, count in stats.items() if key.startswith("t/latency_bucket/")) == 25
        assert {key: count for key, count in stats.items() if "latency" not in key} == {
            "calls": 25, "requests": 7, "coalesced_requests": 6, "coalesced_calls": 24, "broken_batches": 0, "retries": 0, "status/ok": 25,
            "t/calls": 25, "t/status/ok": 25,
        }  # fmt: skip

    run(scenario)


def test_calls_share_requests_up_to_so_many_characters():
    async def scenario(dispatcher, transport):
        await dispatcher.connect()
        longest, half = "x" * MAX_ARGUMENT_CHARS, "y" * (MAX_ARGUMENT_CHARS // 2)
        arguments = [longest, half, half, "z", longest]
        assert [r.text for r in await ask(dispatcher, *arguments)] == arguments
        assert transport.sent == [[longest], [half, half], ["z"], [longest]]

    run(scenario)


def test_an_argument_that_is_too_long_is_refused_without_a_request():
    async def scenario(dispatcher, transport):
        refused, answered = await ask(dispatcher, "x" * (MAX_ARGUMENT_CHARS + 1), "a")
        assert (refused.status, refused.text) == (ToolStatus.BAD_ARGUMENTS, TOO_LONG)
        assert answered.status is OK and transport.sent == [["a"]]

    run(scenario)


def test_a_slow_tool_never_shares_requests():
    async def scenario(dispatcher, transport):
        await ask(dispatcher, *"abcdefghijkl")
        assert sorted(transport.sent) == [[a] for a in "abcdefghijkl"]

    run(scenario, max_batch=1)


def test_a_stalled_call_costs_its_own_caller_its_deadline_and_no_other_call_anything():
    async def scenario(dispatcher, transport):
        await dispatcher.connect()
        transport.gate.clear()
        stalled = ask(dispatcher, *["stall"] * 6, deadline_s=1.0)
        others = ask(dispatcher, *map(str, range(40)))
        transport.gate.set()
        assert [r.text for r in await others] == list(map(str, range(40)))
        assert not stalled.done()
        later = await ask(dispatcher, "x", "y")
        assert [r.status for r in later] == [OK, OK] and not stalled.done()
        assert [r.status for r in await stalled] == [TIMEOUT] * 6
        assert dispatcher.stats()["broken_batches"] == 2

    run(scenario)


def test_single_stalled_calls_do_not_hold_the_slots_of_the_batches():
    async def scenario(dispatcher, transport):
        stalled = []
        for _ in range(BATCHES_IN_FLIGHT):  # one by one, so that each fills a slot by itself
            stalled.append(ask(dispatcher, "stall", deadline_s=5.0))
            while len(transport.sent) < len(stalled):
                await asyncio.sleep(0)
        assert [r.status for r in await ask(dispatcher, "a", "b")] == [OK, OK]
        assert not any(s.done() for s in stalled)

    run(scenario)


def test_tools_do_not_wait_for_each_other():
    async def scenario(dispatcher, transport):
        stalled = ask(dispatcher, *["stall"] * 2, deadline_s=1.0)
        assert [r.text for r in await ask(dispatcher, "a", "b", tool="u")] == ["a", "b"]
        assert not stalled.done()
        await stalled

    run(scenario, max_batch=1, max_in_flight=2)


def test_the_caller_is_released_at_its_deadline_and_the_hung_request_is_cancelled():
    async def scenario(dispatcher, transport):
        transport.gate.clear()
        results = await ask(dispatcher, "a", "b", deadline_s=0.05)
        assert [r.status for r in results] == [TIMEOUT] * 2 and results[0].text == "no answer within 0.05 s"
        while not transport.ended["cancelled"]:
            await asyncio.sleep(0)
        transport.gate.set()
        assert [r.status for r in await ask(dispatcher, "c")] == [OK]

    run(scenario)


def test_a_deadline_that_has_passed_is_a_timeout_without_a_request():
    async def scenario(dispatcher, transport):
        assert [r.status for r in await ask(dispatcher, "a", deadline_s=0)] == [TIMEOUT]
        assert transport.sent == []

    run(scenario)


def test_an_unknown_tool_is_answered_with_the_known_names():
    async def scenario(dispatcher, transport):
        [result] = await ask(dispatcher, "a", tool="Wiki")
        assert (result.status, result.text) == (ToolStatus.UNKNOWN_TOOL, "no tool 'Wiki'; tools: t, u")

    run(scenario)


def test_past_the_queue_bound_calls_are_overloaded_at_once_and_the_others_answered():
    async def scenario(dispatcher, transport):
        await dispatcher.connect()
        transport.gate.clear()
        calls = [asyncio.ensure_future(dispatcher(ToolCall("t", str(n), 20.0))) for n in range(100)]
        refused = 100 - BATCHES_IN_FLIGHT * 4 - 8
        while sum(c.done() for c in calls) < refused:
            await asyncio.sleep(0)
        assert all(c.result().status is OVERLOADED for c in calls if c.done())
        transport.gate.set()
        statuses = Counter(r.status for r in await asyncio.gather(*calls))
        assert statuses == {OVERLOADED: refused, OK: 100 - refused}
        assert [r.status for r in await ask(dispatcher, "after")] == [OK]

    run(scenario, max_queued=8)


def test_idempotent_calls_are_tried_again_a_bounded_number_of_times_each_alone():
    async def scenario(dispatcher, transport):
        results = await ask(dispatcher, "a", "die", "b")
        assert [r.status for r in results] == [OK, UNAVAILABLE, OK]
        assert results[1].text == "tool unavailable: ActorDiedError"
        assert transport.sent[0] == ["a", "die", "b"]
        assert sorted(transport.sent[1:]) == [["a"], ["b"]] + [["die"]] * (MAX_TRIES - 1)
        assert dispatcher.stats()["retries"] == MAX_TRIES - 1 + 2

    run(scenario)


def test_a_call_that_must_not_run_twice_is_not_tried_again_once_it_may_have_run():
    async def scenario(dispatcher, transport):
        assert [r.status for r in await ask(dispatcher, "die", "refuse")] == [UNAVAILABLE] * 2
        assert sorted(transport.sent) == [["die"]] + [["refuse"]] * MAX_TRIES  # what never started may be repeated

    run(scenario, max_batch=1, idempotent=False)


@pytest.mark.parametrize(
    ("argument", "reason"), [("bug", "RuntimeError"), ("cancel", "the request was cancelled"), ("short", "0 results for 1 calls")]
)
def test_an_error_of_the_harness_is_unavailable_and_never_output(argument, reason):
    async def scenario(dispatcher, transport):
        [result] = await ask(dispatcher, argument)
        assert (result.status, result.text) == (UNAVAILABLE, f"tool unavailable: {reason}")

    run(scenario, idempotent=False, max_batch=1)


def test_a_deadline_that_passes_between_tries_names_the_failure(monkeypatch):
    monkeypatch.setattr(serve_handles, "BACKOFF_S", 1000.0)

    async def scenario(dispatcher, transport):
        [result] = await ask(dispatcher, "die", deadline_s=0.05)
        assert (result.status, result.text) == (UNAVAILABLE, "tool unavailable: ActorDiedError")

    run(scenario)


def test_a_cancelled_caller_leaves_its_batch_whole():
    async def scenario(dispatcher, transport):
        await dispatcher.connect()
        transport.gate.clear()
        calls = [asyncio.ensure_future(dispatcher(ToolCall("t", a, 20.0))) for a in "abcd"]
        while not transport.sent:
            await asyncio.sleep(0)
        calls[1].cancel()
        await asyncio.sleep(0)
        transport.gate.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [getattr(r, "text", type(r)) for r in results] == ["a", asyncio.CancelledError, "c", "d"]
        assert transport.ended["cancelled"] == 0

    run(scenario)


def test_a_request_that_nobody_waits_for_is_cancelled_and_waiting_calls_that_end_are_never_sent():
    async def scenario(dispatcher, transport):
        await dispatcher.connect()
        transport.gate.clear()
        sent = asyncio.ensure_future(dispatcher(ToolCall("t", "sent", 20.0)))
        while not transport.sent:
            await asyncio.sleep(0)
        queued = asyncio.ensure_future(dispatcher(ToolCall("t", "queued", 20.0)))
        await asyncio.sleep(0)
        queued.cancel()
        sent.cancel()
        while not transport.ended["cancelled"]:
            await asyncio.sleep(0)
        assert transport.sent == [["sent"]]

    run(scenario, max_batch=1, max_in_flight=1)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TransportError("NoController"), "NoController"),
        (KeyError("defect"), "KeyError"),
        (asyncio.CancelledError(), "the request was cancelled"),
    ],
)
def test_a_service_that_is_not_there_makes_its_calls_unavailable_and_is_asked_again_later(error, reason):
    async def scenario(dispatcher, transport):
        transport.describe_failures, transport.describe_error = MAX_TRIES, error
        results = await ask(dispatcher, "a", "b")
        assert [(r.status, r.text) for r in results] == [(UNAVAILABLE, f"tool unavailable: {reason}")] * 2
        assert [r.status for r in await ask(dispatcher, "c")] == [OK]

    run(scenario)


def test_close_answers_who_still_waits():
    async def scenario(dispatcher, transport):
        transport.gate.clear()
        calls = ask(dispatcher, "a", "b")
        while not transport.sent:
            await asyncio.sleep(0)
        await dispatcher.close()
        assert [r.status for r in await calls] == [UNAVAILABLE] * 2

    run(scenario)


def test_local_tools_answer_like_the_service():
    async def scenario():
        tools = LocalTools(ToolsConfig())
        calls = [("SimpleCalculatorTool", "13.1-3"), ("SimpleCalculatorTool", "1/0"), ("SimpleCalculatorTool", "?"), ("Wiki", "x")]
        calls.append(("SimpleCalculatorTool", "1" * (MAX_ARGUMENT_CHARS + 1)))
        return [await tools(ToolCall(*call)) for call in calls], tools.stats()

    results, stats = asyncio.run(scenario())
    assert [(r.status, r.text) for r in results] == [
        (OK, "10.1"),
        (ToolStatus.TOOL_ERROR, "division by zero"),
        (ToolStatus.BAD_ARGUMENTS, "unexpected character '?'"),
        (ToolStatus.UNKNOWN_TOOL, "no tool 'Wiki'; tools: SimpleCalculatorTool"),
        (ToolStatus.BAD_ARGUMENTS, TOO_LONG),
    ]
    assert stats["calls"] == 5 and stats["status/ok"] == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Wikipedia"], r"unknown tool 'Wikipedia' in tools\.names; tools: SimpleCalculatorTool, Wiki, PythonInterpreter"),
        (["SimpleCalculatorTool"] * 2, r"tools\.names=.* holds a name twice"),
    ],
)
def test_a_recipe_with_wrong_tool_names_is_refused(names, message):
    with pytest.raises((ConfigError, ValidationError), match=message):
        LocalTools(ToolsConfig(names=names))


def test_a_request_that_the_service_sheds_is_overloaded_at_once():
    async def scenario(dispatcher, transport):
        [result] = await ask(dispatcher, "full")
        assert (result.status, result.text) == (OVERLOADED, "too many requests wait already")
        assert transport.sent == [["full"]]

    run(scenario)


def test_a_call_travels_whole_with_what_is_left_of_its_deadline():
    async def scenario(dispatcher, transport):
        await dispatcher(ToolCall("t", "a", 5.0, "episode", 7))
        [sent] = transport.calls
        assert 4.0 < sent.deadline_s <= 5.0
        assert replace(sent, deadline_s=5.0) == ToolCall("t", "a", 5.0, None, 7)  # a tool without state has no sessions

    run(scenario)


def test_calls_of_a_session_of_a_stateful_tool_keep_it_and_run_at_most_once():
    async def scenario(dispatcher, transport):
        call = ToolCall("t", "die", 5.0, "episode")
        assert (await dispatcher(call)).status is UNAVAILABLE
        assert [c.session for c in transport.calls] == ["episode"]  # one try, though the tool is idempotent
        assert transport.ended_sessions == [("t", "episode")]  # lost: the next call starts anew
        assert (await dispatcher(replace(call, session=None))).status is UNAVAILABLE
        assert len(transport.calls) == 1 + MAX_TRIES

    run(scenario, max_batch=1, stateful=True)


def test_the_end_of_a_session_reaches_stateful_tools_only():
    async def stateless(dispatcher, transport):
        await dispatcher.connect()
        dispatcher.end_session("episode")
        assert transport.ended_sessions == []

    async def stateful(dispatcher, transport):
        await dispatcher.connect()
        dispatcher.end_session("episode")
        assert transport.ended_sessions == [("t", "episode"), ("u", "episode")]

    run(stateless)
    run(stateful, max_batch=1, stateful=True)


def test_results_of_a_cacheable_tool_are_kept_up_to_the_bound_the_last_used_longest():
    async def scenario(dispatcher, transport):
        for argument in ("a", "b", "a", "c", "a", "b"):
            assert [r.text for r in await ask(dispatcher, argument)] == [argument]
        assert transport.sent == [["a"], ["b"], ["c"], ["b"]]
        stats = dispatcher.stats()
        assert (stats["t/cache_hits"], stats["t/cache_misses"], stats["t/calls"]) == (2, 4, 6)

    run(scenario, cacheable=True, cache_size=2)


def test_only_results_that_are_ok_are_kept_and_only_of_cacheable_tools():
    async def scenario(dispatcher, transport):
        for argument in ("full", "full", "a", "a"):
            await ask(dispatcher, argument)
        return transport.sent

    async def kept(dispatcher, transport):
        assert await scenario(dispatcher, transport) == [["full"], ["full"], ["a"]]

    async def not_cacheable(dispatcher, transport):
        assert await scenario(dispatcher, transport) == [["full"], ["full"], ["a"], ["a"]]

    run(kept, cacheable=True, cache_size=8)
    run(not_cacheable, cache_size=8)
    run(not_cacheable, cacheable=True)


def test_slots_grow_with_the_replicas_that_the_service_may_have():
    async def scenario(dispatcher, transport):
        await dispatcher.connect()
        transport.gate.clear()
        calls = ask(dispatcher, *map(str, range(64)))
        for _ in range(100):
            await asyncio.sleep(0)
        assert [len(s) for s in transport.sent] == [4] * BATCHES_IN_FLIGHT * 3
        transport.gate.set()
        await calls

    run(scenario, max_replicas=3)


def test_what_the_tools_say_of_themselves_is_waited_for_while_they_start():
    async def scenario(dispatcher, transport):
        transport.describe_failures = MAX_TRIES + 1
        infos = await dispatcher.infos()
        assert {name: info.name for name, info in infos.items()} == {"t": "t", "u": "u"}

    run(scenario)
