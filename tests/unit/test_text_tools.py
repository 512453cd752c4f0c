"""What a TextEnvironment takes for tools, what it calls them, and what the model is shown."""

from __future__ import annotations

import asyncio
import functools
import shlex
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.unit.text_parts import call, environment
from tests.unit.tools_in_process import InProcess, Notebook, over_http
from toolrl_ray.errors import ConfigError, UserError
from tools_service.calculator import SimpleCalculatorTool
from tools_service.http_app import make_app
from tools_service.protocol import ToolStatus

SUBMIT = "ok<submit>"


def reverse(text):
    return text[::-1]


async def shout(text):
    await asyncio.sleep(0)
    return text.upper()


def add(a: int, b: int = 1) -> int:
    """Adds."""
    return a + b


def multiply(a: int, b: int) -> int:
    """Multiplies."""
    if b == 0:
        raise ValueError("not by zero")
    return a * b


def square(n: int) -> int:
    """Squares."""
    return n * n


async def plus(a: int, b: int) -> int:
    """Adds, in time."""
    await asyncio.sleep(0)
    return a + b


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Squares:
    def square(self, n: int) -> int:
        """Squares."""
        return n * n

    def __call__(self, n: int) -> int:
        """Squares."""
        return n * n


class Texts:
    def given(self, text: str, times: int = 1) -> str:
        return text + "!" * times

    def either(self, text: str | None) -> str:
        return f"{text}!"

    def unread(self, text: str) -> Nowhere:  # noqa: F821
        return text + "!"


class Searcher:
    """In the manner of transformers' tools."""

    name, description = "search", "Looks for something."
    inputs = {"query": {"type": "string", "description": "what to look for"}}

    def __call__(self, query):
        return f"found {query}"


class Ranger(Searcher):
    inputs = {"low": {"type": "integer"}, "high": {"type": "integer"}}

    def __call__(self, *, low, high):
        return list(range(low, high))


class Doubler(Searcher):
    inputs = {"n": {"type": "integer"}}

    def __call__(self, n):
        return n * 2


def shown(tools, *calls: tuple[str, str], **options) -> list[tuple[str, ToolStatus]]:
    """Of each call, in an episode of its own: the text that the model is shown and the status."""
    script = {f"{i}.": [call(tool, argument), SUBMIT] for i, (tool, argument) in enumerate(calls)}
    env = environment(script, tools, **options)
    *_, histories = env.run(list(script))
    env.close()
    texts = [h.text.partition("<call>")[2].removesuffix(f"<response>{SUBMIT}") for h in histories]
    return list(zip(texts, [h.trajectory.tool_calls[0].status for h in histories], strict=True))


OK, ERROR = ToolStatus.OK, ToolStatus.TOOL_ERROR


def test_a_dict_of_callables_is_called_with_the_text_between_the_markers():
    tools = {"rev": reverse, "one": lambda text: f"<{text}>", "upper": str.upper, "Search": Searcher()}
    calls = ("rev", "abc"), ("one", ' "x" '), ("upper", "abc"), ("Search", "Bruce Willis")
    assert shown(tools, *calls) == [("cba", OK), ('< "x" >', OK), ("ABC", OK), ("found Bruce Willis", OK)]


def test_a_list_names_functions_by_their_name_objects_by_their_class_and_this_projects_tools_by_theirs():
    tools = [reverse, Searcher(), SimpleCalculatorTool(), shout]
    assert list(environment({}, tools).tools) == ["reverse", "Searcher", "SimpleCalculatorTool", "shout"]
    calls = ("reverse", "abc"), ("Searcher", "x"), ("SimpleCalculatorTool", "13.1-3"), ("shout", "abc")
    assert shown(tools, *calls) == [("cba", OK), ("found x", OK), ("10.1", OK), ("ABC", OK)]


def test_an_object_may_be_served_under_another_name():
    assert shown({"Calc": SimpleCalculatorTool()}, ("Calc", "6*7")) == [("42", OK)]


def test_what_takes_several_arguments_gets_a_json_object():
    calls = (
        ("multiply", '{"a": 6, "b": 7}'),
        ("multiply", '{"a": 6}'),
        ("multiply", '{"a": 1, "b": 0}'),
        ("Ranger", '{"low": 1, "high": 4}'),
    )
    texts = [text for text, _ in shown([multiply, Ranger()], *calls)]
    assert texts[0] == "42" and texts[2:] == ["Tool error: not by zero", "[1, 2, 3]"]
    assert texts[1].startswith("Unknown tool call: argument ")


def test_one_argument_that_is_no_text_is_converted_and_needs_no_object():
    calls = ("add", '{"a": 3}'), ("square", "5"), ("square", '{"n": 5}'), ("Doubler", "5"), ("Doubler", '{"n": 5}')
    assert [text for text, _ in shown([add, square, Doubler()], *calls)] == ["4", "25", "25", "10", "10"]
    (five, status), (one_of_two, _) = shown([square, add], ("square", "five"), ("add", "3"))
    assert status is ToolStatus.BAD_ARGUMENTS and "not a JSON object with n" in five
    assert one_of_two == "Unknown tool call: the call is a JSON int, not an object"


def test_a_method_or_an_object_says_by_its_types_what_it_takes_as_a_function_does():
    tools = {"square": Squares().square, "object": Squares(), "text": Texts().given, "either": Texts().either, "unread": Texts().unread}
    assert shown(tools, *((name, "5") for name in tools)) == [("25", OK), ("25", OK), ("5!", OK), ("5!", OK), ("5!", OK)]


@pytest.mark.parametrize("wrapped", [lambda text: shout(text), decorated(shout), decorated(decorated(shout)), functools.partial(shout)])
def test_what_a_tool_returns_to_be_awaited_is_awaited(wrapped):
    assert shown({"shout": wrapped}, ("shout", "abc")) == [("ABC", OK)]


def test_what_is_awaited_runs_on_one_loop_and_costs_its_own_episode_at_most():
    lock = asyncio.Lock()  # of one loop, once it was waited for

    async def turn(text):
        if text == "stall":
            await asyncio.Event().wait()
        if text == "fail":
            raise ValueError("no luck")
        async with lock:
            await asyncio.sleep(0.01)
        return text

    calls = [("turn", text) for text in ("a", "b", "stall", "fail")]
    found = shown({"turn": lambda text: turn(text)}, *calls, tool_timeout_s=0.5)
    assert found[:2] == [("a", OK), ("b", OK)]
    assert [status for _, status in found[2:]] == [ToolStatus.TIMEOUT, ERROR] and found[3][0] == "Tool error: no luck"


def test_an_async_function_of_several_arguments_may_be_decorated():
    assert shown({"plus": decorated(plus)}, ("plus", '{"a": 6, "b": 7}')) == [("13", OK)]


def test_an_error_of_an_async_tool_is_told_in_its_own_words():
    async def fails(text):
        raise ValueError("no luck")

    assert shown([fails], ("fails", "x")) == [("Tool error: no luck", ERROR)]


def test_an_exception_without_words_is_told_by_its_class():
    def fails(text):
        raise KeyError

    assert shown([fails], ("fails", "x")) == [("Tool error: KeyError", ERROR)]


def test_output_is_cut_by_characters_as_in_trl():
    tools = {"long": lambda text: "é" * 200, "fits": lambda text: "y" * 20, "raises": lambda text: text[9], "deep": lambda text: 1 / 0}
    env = environment({name: [call(name, "x"), SUBMIT] for name in tools}, tools, max_tool_response=20)
    *_, histories = env.run(list(tools))
    texts = [h.text.partition("<call>")[2].partition("<response>")[0] for h in histories]
    assert texts == ["é" * 17 + "...", "y" * 20, "Tool error: strin...", "Tool error: divis..."]
    assert [h.trajectory.tool_calls[0].truncated for h in histories] == [True, False, True, True]


def test_so_is_what_is_shown_where_no_tool_answers_and_the_limit_may_be_set_later():
    forever = threading.Event()
    turns = {"unknown": call("n" * 50, "x"), "stalls": call("stalls", "x"), "odd": "<request>x<call>"}
    env = environment({name: [turn] * 2 + [SUBMIT] for name, turn in turns.items()}, {"stalls": lambda _: forever.wait()}, tool_timeout_s=1)
    env.max_tool_response = 20
    *_, histories = env.run(list(turns))
    forever.set()
    texts = [h.text.partition("<call>")[2].partition("<response>")[0] for h in histories]
    assert texts == ["Unknown tool nnnn...", "Error: the tool t...", "Unknown tool call..."]
    assert all(c.truncated for h in histories for c in h.trajectory.tool_calls)


def test_tools_are_those_of_the_construction_and_cannot_be_changed_without_a_word():
    env = environment({}, [reverse])
    with pytest.raises(TypeError):
        env.tools["shout"] = shout
    with pytest.raises(AttributeError):
        env.tools = [shout]
    assert env.tools == {"reverse": reverse}


def test_a_deployed_tool_is_called_by_its_name_and_keeps_a_session_per_episode_which_ends_with_it(monkeypatch):
    notebook = Notebook()
    tools = InProcess(SimpleCalculatorTool(), notebook)
    with over_http(make_app(tools.infos, tools.gateway.call, tools.gateway.end_session)) as port:
        monkeypatch.setenv("TOOLRL_TOOLS", f"http://127.0.0.1:{port}")
        script = {"a": [call("Notebook", "1"), call("Notebook", "2"), SUBMIT], "b": [call("Notebook", "3"), call("Calc", "6*7"), SUBMIT]}
        env = environment(script, {"Notebook": "Notebook", "Calc": "SimpleCalculatorTool", "reverse": reverse})
        *_, histories = env.run(["a", "b"])
        assert [[c.text for c in h.trajectory.tool_calls] for h in histories] == [["1", "1 2"], ["3", "42"]]
        env.close()
        until = time.monotonic() + 10
        while notebook.pages and time.monotonic() < until:
            time.sleep(0.01)
        assert notebook.pages == {}
        assert shown(["SimpleCalculatorTool"], ("SimpleCalculatorTool", "1+1")) == [("2", OK)]
        with pytest.raises(UserError, match="no tool 'Wiki' is deployed at http://127.0.0.1.*it has SimpleCalculatorTool, Notebook"):
            environment({}, ["Wiki"])


def test_without_a_service_the_name_of_a_deployed_tool_is_refused_at_once(monkeypatch):
    monkeypatch.setenv("TOOLRL_TOOLS", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="no tools service at http://127.0.0.1:9"):
        environment({}, ["Wiki"])


def test_a_tool_of_an_mcp_server_is_named_by_what_follows_its_number_sign():
    server = shlex.join([str(Path(sys.executable).with_name("toolrl")), "tools", "mcp", "--local"])
    env = environment({"a": [call("SimpleCalculatorTool", "6*7"), SUBMIT]}, [f"mcp:{server}#SimpleCalculatorTool"])
    *_, [history] = env.run(["a"])
    env.close()
    assert history.trajectory.tool_calls[0].text == "42"


@pytest.mark.parametrize(
    "tools, said",
    [
        ([reverse, reverse], "two tools are called 'reverse'"),
        ([lambda text: text], "a tool cannot be called '<lambda>'"),
        ({"a>b": reverse}, "a tool cannot be called 'a>b'"),
        ({" a": reverse}, "a tool cannot be called ' a'"),
        ({"x": 3}, "tool x='int': int lacks name"),
        ({"x": Searcher}, "tool x is the class Searcher; give an object of it"),
        ({"x": lambda a, b: a}, "the function has no docstring"),
        (["mcp:no-such-command#x"], "no command 'no-such-command'"),
    ],
)
def test_what_is_no_tool_is_refused_in_one_line(tools, said):
    with pytest.raises(ConfigError) as refused:
        environment({}, tools)
    assert said in str(refused.value) and "\n" not in str(refused.value)
