"""Tools of one's own: functions, objects, classes, transformers-style tools; and JSON arguments to a tool's one text and back."""

from __future__ import annotations

import asyncio
import json
import textwrap
import threading

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tools_service.adapters import argument_text, arguments_of, load_tool, result_fields, text_parameter, valid_text
from tools_service.executor import Executor
from tools_service.loading import LoadingError
from tools_service.protocol import ToolCall, ToolError, ToolResult, ToolStatus
from tools_service.runner import one_string, tool_info

OK, TOOL_ERROR, BAD_ARGUMENTS, TIMEOUT = ToolStatus.OK, ToolStatus.TOOL_ERROR, ToolStatus.BAD_ARGUMENTS, ToolStatus.TIMEOUT

MODULE = '''
from __future__ import annotations

import asyncio
import enum
import functools
from dataclasses import dataclass
from typing import Annotated, Literal, Optional

from pydantic import Field

from tools_service.protocol import ToolError, ToolResult, ToolStatus

STATE = []

def shout(text: str) -> str:
    """Says it
    loudly.

    What follows is for programmers.
    """
    return text.upper() + "!"

def weekday(year: int, month: int, day: int = 1) -> str:
    """Says the day of the week."""
    import datetime
    return f"{datetime.date(year, month, day):%A}"

def everything(
    number: float, flag: bool = False, kind: Literal["a", "b"] = "a", names: Optional[list[str]] = None,
    size: Annotated[int, Field(ge=1, le=3, description="of it")] = 2, *, schema: dict[str, int] | None = None,
) -> dict:
    """Takes all that there is."""
    return {"number": number, "flag": flag, "kind": kind, "names": names, "size": size, "schema": schema}

def optional(text: str = "x") -> str:
    """May be left alone."""
    return text

def nothing() -> str:
    """Takes nothing."""
    return "done"

def value(text: str):
    """Returns what JSON has a word for, and what it has none for."""
    loop = []
    loop.append(loop)
    return {"list": [1, None], "true": True, "none": None, "number": 2.5, "set": {1}, "keys": {(1, 2): 3}, "loop": loop}[text]

def fails(text: str) -> str:
    """Fails as told."""
    if text == "own":
        raise ToolError("no such thing")
    if text == "exit":
        raise SystemExit(3)
    raise KeyError("secret")

fails.idempotent, fails.probe, fails.max_batch, fails.cacheable = True, "own", 4, True

async def waits(text: str) -> str:
    """Waits for ever, or fails."""
    if text == "stall":
        try:
            await asyncio.Event().wait()
        finally:
            STATE.append("cancelled")
    if text == "late":
        raise TimeoutError
    if text == "lie":
        raise ToolError("all is well", ToolStatus.OK)
    return text

def no_docstring(text: str) -> str:
    return text

def no_type(text) -> str:
    """Has a parameter without a type."""
    return text

def positional(text: str, /) -> str:
    """Cannot be called by name."""
    return text

def many(*texts: str) -> str:
    """Takes any number."""
    return ""

def strange(text: str, thing: STATE.__class__.__class__) -> str:
    """Takes what JSON cannot say."""
    return text

def unknown_type(thing: Nowhere) -> str:
    """Takes what is not there."""
    return ""

def noted(text: "a text") -> str:
    """Has a note where a type should be."""
    return text

def misspelled(text: functools.Nowhere) -> str:
    """Names a type that is not there."""
    return text

def returns_a_note(text: str) -> "the text, louder":
    """Says what it returns in words."""
    return text.upper()

def described(
    name: str = Field(description="whose"), count: int = Field(3, ge=1, le=9, description="many"), tags: list = Field(default_factory=list)
) -> list:
    """Has its defaults in pydantic's words."""
    tags.append(name)
    return tags * count

def yields(text: str):
    """Yields what it should return."""
    yield text

async def yields_later(text: str):
    """Yields what it should return."""
    yield text

def passes_on(text: str):
    """Returns what yields."""
    return yields(text)

class Level(enum.StrEnum):
    low, high = "low", "high"

def patience(
    s: float = float("inf"), t: float = Field(float("inf"), ge=0), n: int = 10**5000, half: float = 0.5, level: Level = Level.low
) -> str:
    """Has defaults that JSON has no word for."""
    return f"{s} {t} {n > 1} {half} {level}"

def square(n: int) -> int:
    """Squares."""
    return n * n

def half(n: float) -> float:
    """Halves."""
    return n / 2

@functools.cache
def kept(n: int) -> int:
    """Squares, and remembers it."""
    return n * n

def total(numbers: list[int]) -> int:
    """Adds up."""
    return sum(numbers)

def decorated(function):
    @functools.wraps(function)
    def wrapper(**arguments):
        return function(**arguments)
    return wrapper

@decorated
async def patient(text: str) -> dict:
    """Waits a little."""
    await asyncio.sleep(0)
    if text == "stall":
        try:
            await asyncio.Event().wait()
        finally:
            STATE.append("given up")
    return {"waited": text}

class Counter:
    """From 1."""
    name, description, idempotent = "Counter", "Counts.", False
    def __init__(self, start: int = 0, secret: str = ""):
        if start < 0:
            raise ValueError("start must not\\nbe negative")
        self.count = start
    def __call__(self, argument):
        self.count += 1
        return str(self.count)

counter = Counter(10)

class Incomplete:
    name = "Incomplete"
    def __call__(self, argument):
        return ""

class NotCallable:
    name, description, idempotent = "NotCallable", "", True

class Asynchronous:
    name, description, idempotent = "Asynchronous", "Waits.", True
    async def call(self, call):
        return ToolResult(ToolStatus.OK, call.argument)

class Translate:
    """As a transformers or smolagents Tool looks."""
    name, description, output_type = "translate", "Translates  text.", "string"
    inputs = {
        "text": {"type": "string", "description": "what"},
        "to": {"type": "string", "description": "language", "nullable": True},
        "times": {"type": ["integer", "number"], "nullable": True},
        "extra": {"type": "any", "nullable": True},
    }
    def __init__(self, default="fr"):
        self.default = default
    def __call__(self, *args, sanitize_inputs_outputs=False, **kwargs):
        return self.forward(*args, **kwargs)
    def forward(self, text, to=None, times=1, extra=None):
        return f"{text} in {to or self.default}" * int(times)

class OnlyForward:
    description, inputs, idempotent = "Forwards.", {"text": {"type": "string", "description": ""}}, True
    def forward(self, text):
        return text

class Image:
    description, inputs = "Draws.", {"picture": {"type": "image", "description": ""}}
    def forward(self, picture):
        return ""

class Silent:
    inputs = {}
    def forward(self):
        return ""

class Inert:
    description, inputs = "Does nothing.", {}
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own_tools.py"
    path.write_text(textwrap.dedent(MODULE))
    return lambda name, options=None, served=None: load_tool(served or name, f"{path}:{name}", options or {})


def run(tool, argument: str, deadline_s: float = 10.0):
    async def once():
        executor = Executor(tool, 4)
        await executor.start()
        return await executor.run([ToolCall(tool.name, argument, deadline_s)])

    [result] = asyncio.run(once())
    assert result is not None
    return result.status, result.text


def test_a_documented_function_tells_all_that_a_model_needs(own):
    info = tool_info(own("weekday", served="Weekday"))
    assert (info.name, info.description, info.idempotent, info.max_batch) == ("Weekday", "Says the day of the week.", False, 1)
    assert info.parameters == {
        "type": "object",
        "properties": {"year": {"type": "integer"}, "month": {"type": "integer"}, "day": {"type": "integer", "default": 1}},
        "required": ["year", "month"],
        "additionalProperties": False,
    }
    assert own("shout").description == "Says it loudly."


def test_types_become_a_schema_with_their_bounds_and_choices(own):
    properties = own("everything").parameters["properties"]
    assert properties["number"] == {"type": "number"}
    assert properties["kind"] == {"type": "string", "enum": ["a", "b"], "default": "a"}
    assert properties["size"] == {"type": "integer", "minimum": 1, "maximum": 3, "description": "of it", "default": 2}
    described = own("described").parameters
    assert described["properties"]["name"] == {"type": "string", "description": "whose"} and described["required"] == ["name"]
    assert described["properties"]["count"] == {"type": "integer", "minimum": 1, "maximum": 9, "description": "many", "default": 3}
    assert properties["names"]["anyOf"] == [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]


def test_a_default_that_json_cannot_say_stays_out_of_the_schema(own):
    parameters = own("patience").parameters
    defaults = {name: schema["default"] for name, schema in parameters["properties"].items() if "default" in schema}
    assert json.loads(json.dumps(parameters, allow_nan=False)) == parameters
    assert defaults == {"half": 0.5, "level": "low"}
    assert run(own("patience"), "") == (OK, "inf inf True 0.5 low")


@pytest.mark.parametrize(
    ("name", "argument", "status", "text"),
    [
        ("shout", "hey", OK, "HEY!"),
        ("shout", '{"text": "hey"}', OK, '{"TEXT": "HEY"}!'),  # one required string: the text as it is
        ("shout", "", OK, "!"),
        ("weekday", '{"year": 2024, "month": 2, "day": 29}', OK, "Thursday"),
        ("weekday", '{"year": 2024, "month": 2}', OK, "Thursday"),
        ("weekday", '{"year": 2024}', BAD_ARGUMENTS, "argument month: Field required"),
        ("weekday", '{"year": 2024, "month": 2, "hour": 1}', BAD_ARGUMENTS, "argument hour: Extra inputs are not permitted"),
        ("weekday", '{"year": 2024, "month": "two"}', BAD_ARGUMENTS, "argument month: Input should be a valid integer, "),
        ("weekday", "2024", BAD_ARGUMENTS, "the call is a JSON int, not an object"),
        ("weekday", "[]", BAD_ARGUMENTS, "the call is a JSON list, not an object"),
        ("weekday", "Monday?", BAD_ARGUMENTS, "the call is not a JSON object with year, month, day (JSONDecodeError: "),
        ("weekday", "[" * 100_000, BAD_ARGUMENTS, "the call is not a JSON object with year, month, day (RecursionError: "),
        ("weekday", '{"year": NaN}', BAD_ARGUMENTS, "the call is not a JSON object with year, month, day (ValueError: NaN is not finite)"),
        ("weekday", '{"year": 2024, "month": 13}', TOOL_ERROR, "the tool failed with ValueError"),
        ("everything", '{"number": 1}', OK, '{"number": 1.0, "flag": false, "kind": "a", "names": null, "size": 2, "schema": null}'),
        ("everything", '{"number": 1, "size": 4}', BAD_ARGUMENTS, "argument size: Input should be less than or equal to 3"),
        ("everything", '{"number": 1, "kind": "c"}', BAD_ARGUMENTS, "argument kind: Input should be 'a' or 'b'"),
        ("everything", '{"number": 1, "schema": {"a": "b"}}', BAD_ARGUMENTS, "argument schema.a: Input should be a valid integer"),
        ("optional", "", OK, "x"),
        ("optional", '{"text": "y"}', OK, "y"),
        ("optional", "y", BAD_ARGUMENTS, "the call is not a JSON object with text"),
        ("nothing", "", OK, "done"),
        ("nothing", " {} ", OK, "done"),
        ("nothing", "now", BAD_ARGUMENTS, "the call is not a JSON object with no keys"),
        ("value", "list", OK, "[1, null]"),
        ("value", "true", OK, "true"),
        ("value", "none", OK, "null"),
        ("value", "number", OK, "2.5"),
        ("value", "set", OK, "{1}"),
        ("value", "keys", OK, "{(1, 2): 3}"),  # what JSON cannot say
        ("value", "loop", OK, "[[...]]"),
        ("square", '{"n": 5}', OK, "25"),
        ("square", " 5", OK, "25"),  # the only parameter: its value alone will do
        ("square", "five", BAD_ARGUMENTS, "the call is not a JSON object with n"),
        ("half", "1e400", BAD_ARGUMENTS, "the call is not a JSON object with n (ValueError: 1e400 is not finite)"),
        ("half", '{"n": -1e999}', BAD_ARGUMENTS, "the call is not a JSON object with n (ValueError: -1e999 is not finite)"),
        ("half", "1e-400", OK, "0.0"),
        ("kept", "7", OK, "49"),
        ("square", "[5]", BAD_ARGUMENTS, "argument n: Input should be a valid integer"),
        ("total", "[1, 2]", OK, "3"),
        ("optional", '"y"', OK, "y"),
        ("returns_a_note", "a", OK, "A"),
        ("passes_on", "a", TOOL_ERROR, "the tool returned generator instead of text"),
        ("described", '{"name": "a"}', OK, '["a", "a", "a"]'),
        ("described", '{"name": "b", "count": 1}', OK, '["b"]'),
        ("described", '{"name": "a", "count": 0}', BAD_ARGUMENTS, "argument count: Input should be greater than or equal to 1"),
        ("described", "{}", BAD_ARGUMENTS, "argument name: Field required"),
        ("patient", "a", OK, '{"waited": "a"}'),
        ("fails", "own", TOOL_ERROR, "no such thing"),
        ("fails", "exit", TOOL_ERROR, "the tool failed with SystemExit"),
        ("fails", "", TOOL_ERROR, "the tool failed with KeyError"),
        ("waits", "a", OK, "a"),
        ("waits", "late", TOOL_ERROR, "the tool failed with TimeoutError"),  # its own, not the call's
        ("waits", "lie", TOOL_ERROR, "all is well"),
    ],
)
def test_a_function_is_called_by_name_and_every_end_is_a_named_result(own, name, argument, status, text):
    found = run(own(name), argument)
    assert found[0] is status and found[1].startswith(text)
    assert status is BAD_ARGUMENTS or found[1] == text


def test_an_async_function_is_cancelled_at_the_deadline_of_its_call(own):
    tool = own("waits")
    state = tool._function.__globals__["STATE"]
    assert run(tool, "stall", 0.2)[0] is TIMEOUT
    assert state == ["cancelled"]


def test_what_a_function_returns_to_be_awaited_is_cancelled_at_the_deadline_of_its_call(own, caplog):
    tool = own("patient")
    state = tool._function.__globals__["STATE"]

    async def once():
        executor = Executor(tool, 4)
        await executor.start()
        [result] = await executor.run([ToolCall(tool.name, "stall", 0.2)])
        async with asyncio.timeout(30):  # in this loop, which would end all that is left in it
            while "given up" not in state or any(thread.name == "tool-patient" for thread in threading.enumerate()):
                await asyncio.sleep(0.01)
        return result.status

    assert asyncio.run(once()) is TIMEOUT and not caplog.records


def test_a_function_states_the_rest_in_its_attributes(own):
    tool = own("fails")
    info = tool_info(tool)
    assert (info.idempotent, info.max_batch, info.cacheable, tool.probe) == (True, 4, True, "own")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_docstring", "the function has no docstring; its first paragraph tells the model what the tool does"),
        ("no_type", "parameter 'text' has no type; write one, for example text: str"),
        ("positional", "parameter 'text' cannot be given by name; use plain named parameters"),
        ("many", "parameter '*texts' cannot be given by name"),
        ("strange", "a parameter's type has no JSON form: "),
        ("unknown_type", "its type hints cannot be read: name 'Nowhere' is not defined"),
        ("yields", "the function yields; return the whole answer"),
        ("yields_later", "the function yields; return the whole answer"),
        ("noted", "its type hints cannot be read: Forward reference must be an expression -- got 'a text'"),
        ("misspelled", "its type hints cannot be read: module 'functools' has no attribute 'Nowhere'"),
        ("Incomplete", "Incomplete lacks description, idempotent; a tool has name, description, idempotent, __call__"),
        ("NotCallable", "NotCallable lacks __call__"),
        ("STATE", "list lacks name, description, idempotent"),
        ("nowhere", "has no 'nowhere'"),
        ("Image", "input 'picture' has type 'image'; a tool here takes string, boolean, "),
        ("Silent", "has no description; the model reads it"),
        ("Inert", "has inputs but neither __call__ nor forward"),
    ],
)
def test_what_is_no_tool_is_refused_in_one_line(own, name, message):
    with pytest.raises(LoadingError) as refused:
        own(name)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_class_is_made_with_its_options(own):
    assert run(own("Counter", {"start": 5}), "") == (OK, "6")
    assert run(own("counter", served="Counter"), "") == (OK, "11")
    assert run(own("Asynchronous"), "a") == (OK, "a")


@pytest.mark.parametrize(
    ("name", "served", "options", "message"),
    [
        (
            "Counter",
            "Counter",
            {"start": -1, "secret": "abc"},
            "cannot be made with options start, secret: ValueError: start must not be negative",
        ),
        ("Counter", "Counter", {"end": 1}, "cannot be made with options end: TypeError: "),
        ("Counter", "Other", {}, "calls itself 'Counter'; use one name"),
        ("counter", "Counter", {"start": 1}, "takes no options (only a class does), but has start"),
        ("shout", "shout", {"loud": 1}, "takes no options (only a class does), but has loud"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line_without_their_values(own, name, served, options, message):
    with pytest.raises(LoadingError) as refused:
        own(name, options, served)
    assert message in str(refused.value) and "\n" not in str(refused.value) and "abc" not in str(refused.value)


def test_a_transformers_style_tool_is_called_by_keyword_under_the_name_it_is_served_by(own):
    tool = own("Translate", {"default": "de"}, "Translator")
    assert (tool.name, tool.description, tool.idempotent) == ("Translator", "Translates text.", False)
    assert tool.parameters == {
        "type": "object",
        "properties": {
            "text": {"type": "string", "description": "what"},
            "to": {"type": ["string", "null"], "description": "language"},
            "times": {"type": ["integer", "number", "null"], "description": ""},
            "extra": {"description": ""},
        },
        "required": ["text"],
        "additionalProperties": False,
    }
    assert run(tool, '{"text": "hey"}') == (OK, "hey in de")
    assert run(tool, '{"text": "hey", "to": null, "extra": [1]}') == (OK, "hey in de")
    assert run(tool, '{"text": "hey", "to": "it", "times": 2}') == (OK, "hey in ithey in it")
    assert run(tool, '{"text": 1}') == (BAD_ARGUMENTS, "argument 'text' must be string, not 1")
    assert run(tool, '{"to": "it"}') == (BAD_ARGUMENTS, "argument 'text' is missing; required: text")
    assert run(tool, '{"text": "a", "from": "b"}') == (BAD_ARGUMENTS, "unknown argument 'from'; arguments: text, to, times, extra")


def test_a_transformers_style_tool_with_one_text_takes_it_as_it_is(own):
    tool = own("OnlyForward")
    assert tool.idempotent and run(tool, "{}") == (OK, "{}")


# Text with surrogates is replaced on the way, so that round trips are over text that UTF-8 can carry.
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON_VALUES))
def test_arguments_survive_the_way_through_the_text(arguments):
    parameters = {"type": "object", "properties": {"a": {}, "b": {}}}
    assert arguments_of(parameters, argument_text(parameters, arguments)) == arguments


@given(st.text())
@example("")
@example("{}")
def test_the_one_text_of_a_tool_is_handed_on_as_it_is(text):
    assert argument_text(one_string(), {"argument": text}) == text
    assert arguments_of(one_string(), text) == {"argument": text}


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_becomes_text_that_utf_8_can_carry_and_sound_text_stays(text):
    assert valid_text(text).encode().decode() == valid_text(valid_text(text))
    fields = result_fields(ToolResult(OK, text))
    assert json.loads(json.dumps(fields, ensure_ascii=False).encode())["text"] == valid_text(text)


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        (one_string(), "argument"),
        ({"properties": {"q": {"type": "string", "maxLength": 3}}, "required": ["q"]}, "q"),
        ({"properties": {"q": {"type": "string"}}}, None),
        ({"properties": {"q": {"type": "integer"}}, "required": ["q"]}, None),
        ({"properties": {"q": {"type": ["string", "null"]}}, "required": ["q"]}, None),
        ({"properties": {"q": True}, "required": ["q"]}, None),
        ({"properties": {"q": {"type": "string"}, "k": {}}, "required": ["q"]}, None),
        ({"type": "object"}, None),
        ({}, None),
    ],
)
def test_a_tool_takes_plain_text_where_its_only_parameter_is_a_required_string(parameters, name):
    assert text_parameter(parameters) == name


NUMBERS = {"properties": {"n": {"type": "number"}, "i": {"type": ["integer", "null"]}, "any": {}}, "additionalProperties": False}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": True}, "argument 'n' must be number, not true"),
        ({"i": 1.5}, "argument 'i' must be integer or null, not 1.5"),
        ({"i": "x" * 100}, "argument 'i' must be integer or null, not \"" + "x" * 59),
        ({"x": 1}, "unknown argument 'x'; arguments: n, i, any"),
        ({"n": float("inf")}, "the arguments hold a number that JSON cannot carry"),
        ({"any": {"deep": [float("nan")]}}, "the arguments hold a number that JSON cannot carry"),
        ({"any": 10**5000}, "the arguments hold a number that JSON cannot carry"),
        ({"n": [10**5000]}, "the arguments hold a number that JSON cannot carry"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_one_line(arguments, message):
    with pytest.raises(ToolError) as refused:
        argument_text(NUMBERS, arguments)
    assert (refused.value.status, refused.value.message) == (BAD_ARGUMENTS, message)


def test_arguments_nested_beyond_reason_are_refused():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for arguments in ({"any": deep}, {"n": deep}):
        with pytest.raises(ToolError, match="the arguments are nested too deeply"):
            argument_text(NUMBERS, arguments)


@pytest.mark.parametrize("arguments", [{}, {"n": 1, "i": None}, {"i": 2.0}, {"any": [None, {"a": "\ud83d"}]}])
def test_arguments_that_fit_become_the_text_of_an_object(arguments):
    text = argument_text(NUMBERS, arguments)
    assert list(json.loads(text.encode())) == list(arguments)
