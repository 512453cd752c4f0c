"""What a chat model's turn asks for, however it is written."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.episode.chatml import call, chat_codec, chat_format
from toolrl_ray.episode.call_format import ParsedTurn, RequestedCall, TurnKind
from tools_service.protocol import ToolStatus

CODEC, FORMAT = chat_codec("made"), chat_format("made")
ECHO = call("Echo", '{"argument": "hi"}')
ADD = call("Add", '{"a": 1, "b": 2}')


def parse(text: str, end: str = "<|im_end|>") -> ParsedTurn:
    return FORMAT.parse(text + end, CODEC.encode(text) + CODEC.encode_markup(end))


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (ECHO, [("Echo", "hi")]),
        (f"I will ask.\n{ECHO}\nSo.", [("Echo", "hi")]),
        (f"{ECHO}\n{ADD}", [("Echo", "hi"), ("Add", '{"a": 1, "b": 2}')]),
        (ECHO + ECHO, [("Echo", "hi")] * 2),
        ('<tool_call>{"arguments":{"argument":""},"name":"Echo","id":7}</tool_call>', [("Echo", "")]),
        (call("Echo", json.dumps({"argument": "</tool_call><tool_call>é\n"})), [("Echo", "</tool_call><tool_call>é\n")]),
        (call("Echo", r'{"argument": "\ud83d\ude42 \ud800"}'), [("Echo", "🙂 �")]),
        (call("Add", '{"a": 3}'), [("Add", '{"a": 3}')]),
    ],
)
def test_calls_are_read_in_the_order_written_as_their_tools_take_them(text: str, calls: list[tuple[str, str]]) -> None:
    parsed = parse(text)
    assert (parsed.kind, parsed.calls) == (TurnKind.CALL, tuple(RequestedCall(*one) for one in calls))


def test_a_tool_that_nobody_knows_is_left_to_who_knows_the_tools() -> None:
    [asked] = parse(call("Nobody", '{"x": 1}')).calls
    assert (asked.tool, asked.refused) == ("Nobody", None)


@pytest.mark.parametrize(
    ("text", "tool", "problem"),
    [
        ("<tool_call>\nEcho('hi')\n</tool_call>", "", "the call is not JSON: Expecting value at character 1"),
        (
            '<tool_call>{"name": "Echo", "arguments": {"argument": "a\nb"}}</tool_call>',
            "",
            "not JSON: Invalid control character at character",
        ),
        ("<tool_call></tool_call>", "", "the call is not JSON: Expecting value at character 1"),
        (call("Add", '{"a": NaN}'), "", "NaN is not a JSON value"),
        (f"<tool_call>{'[' * 100_000}</tool_call>", "", "the call is not JSON: nested too deeply"),
        (f'<tool_call>{{"name": "Add", "arguments": {{"a": 1{"0" * 5000}}}}}</tool_call>', "", "the call is not JSON: Exceeds the limit"),
        ('<tool_call>{"name": "Echo", "arguments": {"argument": "hi"}}', "", "<tool_call> without </tool_call>"),
        ("<tool_call>", "", "<tool_call> without </tool_call>"),
        ('<tool_call>{"name": "Echo"} and so on</tool_call>', "", "followed by something else than </tool_call>"),
        ("<tool_call>[1]</tool_call>", "", "not a JSON object with name and arguments"),
        ('<tool_call>{"tool": "Echo"}</tool_call>', "", 'the call has no "name"'),
        ('<tool_call>{"name": ["Echo"]}</tool_call>', "", 'the call has no "name"'),
        (call("Echo", '"hi"'), "Echo", '"arguments" must be a JSON object'),
        (call("Echo", "null"), "Echo", '"arguments" must be a JSON object'),
        ('<tool_call>{"name": "Add"}</tool_call>', "Add", "argument 'a' is missing; required: a"),
        (call("Add", '{"a": 1, "c": 2}'), "Add", "unknown argument 'c'; arguments: a, b"),
        (call("Add", '{"a": "1"}'), "Add", "argument 'a' must be integer, not \"1\""),
        (call("Add", '{"a": true}'), "Add", "argument 'a' must be integer, not true"),
        (call("Echo", '{"argument": 5}'), "Echo", "argument 'argument' must be string, not 5"),
    ],
)
def test_a_call_that_cannot_be_understood_says_what_is_wrong(text: str, tool: str, problem: str) -> None:
    parsed = parse(text)
    assert parsed.kind is TurnKind.CALL
    [asked] = parsed.calls
    assert asked.refused is not None
    assert (asked.tool, asked.refused.status) == (tool, ToolStatus.BAD_ARGUMENTS)
    assert problem in asked.refused.text


@pytest.mark.parametrize("before", ["", "I look it up: ", "I look it up:\n"])
@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ('```json\n{"name": "Echo", "arguments": {"argument": "x"}}\n```', "the call is not JSON: Expecting value at character 1"),
        ('[{"name": "Echo", "arguments": {"argument": "x"}}]', "the call is not a JSON object with name and arguments"),
        ('Echo(argument="x")', "the call is not JSON: Expecting value at character 1"),
        ('"name": "Echo", "arguments": {}', "followed by something else than </tool_call>"),
        ("<function=Echo><parameter=argument>x</parameter></function>", "the call is not JSON: Expecting value at character 1"),
    ],
)
def test_whatever_stands_in_a_call_that_closes_it_is_told_what_is_wrong_also_behind_prose(before: str, said: str, problem: str) -> None:
    parsed = parse(f"{before}<tool_call>{said}</tool_call>")
    assert parsed.kind is TurnKind.CALL
    [asked] = parsed.calls
    assert asked.refused is not None and problem in asked.refused.text


@pytest.mark.parametrize(
    "bad",
    [
        "<tool_call>{</tool_call>",
        '<tool_call>["</tool_call><tool_call>"] x</tool_call>',
        "<tool_call>{",
        call("Add", "{}"),
        "<tool_call>nothing ",
    ],
)
def test_a_wrong_call_takes_no_other_call_of_its_turn_with_it(bad: str) -> None:
    calls = parse(f"{ECHO}{bad}\n{ECHO}").calls
    assert [one.refused is None for one in calls] == [True, False, True]


@pytest.mark.parametrize(
    "text",
    [
        f"<think>\nI might send {ECHO}, but need not.\n</think>\n\nResult=5",
        f"I might send {ECHO}, but need not.\n</think>\n\nResult=5",  # where the template opens the thought
        "<think>\nNo <tool_call> is needed, or\n<tool_call>\nat most one.\n</think>\n\nResult=5",
        "I will not send <tool_call>{.\n</think>\nResult=5",
        f"<think>\nI send\n{ECHO}",
        "A call begins with `<tool_call>` and ends with `</tool_call>`. Result=5",
        'I could write "<tool_call>Echo</tool_call>". Result=5',
        "I need no <tool_call> here. Result=5",
        "I need a <tool_call>\n</think>\nA </tool_call> ends nothing. Result=5",
    ],
)
def test_what_a_thought_or_prose_mentions_is_no_call(text: str) -> None:
    parsed = parse(text)
    assert (parsed.kind, parsed.end, parsed.calls) == (TurnKind.SUBMIT, len(text), ())


@pytest.mark.parametrize(
    ("text", "tools"),
    [
        (f"<think>\nNot {ADD}.\n</think>\n\n{ECHO}", ["Echo"]),
        (f"Not {ADD}.\n</think>\n\n{ECHO}", ["Echo"]),
        (f"I send a <tool_call> now: {ECHO}", ["Echo"]),
        (f"I send a <tool_call>, that is: <tool_call>Echo('hi')</tool_call>{ECHO}", ["", "Echo"]),
        (f"<think>a</think>{ECHO}<think>b</think>{ADD}", ["Echo", "Add"]),
        (call("Echo", '{"argument": "</think> <think>"}') + ADD, ["Echo", "Add"]),
        ("<think>a</think><tool_call>\nEcho('hi')\n</tool_call>", [""]),
        (f"Not <tool_call>{{\n</think>{ECHO}", ["Echo"]),
        (f"<think>a</think>b {ECHO}</think>c", ["Echo"]),  # a stray end of a thought takes nothing away
        (f"<think>a<think>b</think>{ECHO}</think>", ["Echo"]),
        ('<tool_call>{"name": "Echo", "arguments": {"argument": "</think>"}</tool_call>', [""]),  # a brace is missing: that is said
    ],
)
def test_calls_behind_a_thought_are_calls(text: str, tools: list[str]) -> None:
    assert [one.tool for one in parse(text).calls] == tools


@pytest.mark.parametrize("text", ["It is 3.", "", "</tool_call>", "<tool_cal", "Result=1<submit>"])
def test_a_turn_without_a_call_that_ended_is_the_answer(text: str) -> None:
    parsed = parse(text)
    assert (parsed.kind, parsed.end) == (TurnKind.SUBMIT, len(text))


@pytest.mark.parametrize("text", ["It is 3.", ECHO])
@pytest.mark.parametrize("end", ["", "<|endoftext|>"])
def test_a_turn_that_did_not_end_with_the_end_of_turn_token_is_neither_call_nor_answer(text: str, end: str) -> None:
    assert parse(text, end).kind is TurnKind.PLAIN


def test_the_end_of_turn_written_in_plain_characters_ends_nothing() -> None:
    text = "It is 3.<|im_end|>"
    assert FORMAT.parse(text, CODEC.encode(text)).kind is TurnKind.PLAIN


PIECES = [
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    '{"name": "Echo", ',
    '"arguments": {"argument": "a"}}',
    "{",
    "}",
    '"',
    "\\",
    "\n",
    "1",
]


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=20).map("".join))
@settings(max_examples=300, deadline=None)
def test_parsing_never_fails_and_calls_have_a_problem_or_a_tool(text: str) -> None:
    parsed = parse(text)
    assert (parsed.kind is TurnKind.CALL) == bool(parsed.calls)
    assert all(one.tool or one.refused for one in parsed.calls)
    assert len(parsed.calls) <= text.count("<tool_call>")
