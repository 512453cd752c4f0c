"""The HTTP face against its own description, and against bytes that no description allows: never a 5xx but the documented 503."""

from __future__ import annotations

import json

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.unit.tools_in_process import InProcess, Notebook, Scripted
from tools_service.adapters import load_tool
from tools_service.calculator import SimpleCalculatorTool
from tools_service.http_app import make_app

CALCULATOR = "SimpleCalculatorTool"
PATHS = [f"/v1/tools/{CALCULATOR}/call", "/v1/tools/pad/call", "/v1/tools/Scripted/call", "/v1/call", "/mcp"]
FEW = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=150)


def pad(text: str, width: int = 3, left: bool = False, marks: list[str] | None = None) -> str:
    """Makes a text longer."""
    mark = (marks or [" "])[0][:1] or " "
    return text.ljust(min(width, 100), mark) if left else text.rjust(min(width, 100), mark)


def make():
    tools = InProcess(SimpleCalculatorTool(), load_tool("pad", f"{__file__}:pad", {}), Scripted(), Notebook())
    return make_app(tools.infos, tools.gateway.call, tools.gateway.end_session)


schema = schemathesis.openapi.from_asgi("/openapi.json", make())


@schema.parametrize()
@FEW
def test_every_answer_is_as_described_and_every_request_is_judged_as_described(case):
    case.call_and_validate()


@pytest.fixture(scope="module")
def client():
    with TestClient(make(), raise_server_exceptions=False) as client:
        yield client


def check(client, path: str, body: bytes) -> None:
    headers = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
    answer = client.post(path, content=body, headers=headers)
    if path == "/mcp":
        assert answer.status_code in (200, 202, 400, 404), answer.text
        return
    assert answer.status_code in (200, 404, 422, 503), answer.text
    fields = answer.json()
    shapes = [{"error"}, {"results"}] if path == "/v1/call" else [{"error"}, {"status", "text", "latency_s", "truncated"}]
    assert set(fields) in shapes and "\n" not in fields.get("error", "")
    assert (answer.status_code == 503) == (fields.get("status") == "overloaded")


@pytest.mark.parametrize("path", PATHS)
@given(body=st.binary(max_size=200))
@example(body=b"\xff\xfe{\x00")
@example(body=b"[" * 1_000_000)
@example(body=b'{"a":' * 200_000)
@example(body=b'{"arguments": ' + b"[" * 190 + b"]" * 190 + b"}")
@example(body=b"1" * 1_000_000)
@example(body=b'"' + b"\\ud800" * 1000 + b'"')
@example(body=b'{"argument": "full"}')
@MANY
def test_no_bytes_make_the_service_fail(client, path, body):
    check(client, path, body)


def documents(leaves, keys):
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12)


# Surrogates too: json.dumps escapes them, as a careless client does.
TEXT = st.text(st.characters(exclude_categories=()), max_size=8)
WORDS = ["argument", "arguments", "deadline_s", "session", "seed", "calls", "tool", "text", "width", "left", "marks"]
RPC = ["jsonrpc", "id", "method", "params", "name", "_meta"]
NAMES = [CALCULATOR, "pad", "Scripted", "Notebook", "2.0", "tools/call", "tools/list", "initialize", "ping", "error", "crash", "half"]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from([10**400, 2**63, -1, 1e-320, *NAMES])
ANYTHING = documents(LEAVES, TEXT | st.sampled_from([*WORDS, *RPC]))
ARGUMENTS = st.fixed_dictionaries({}, optional={"text": ANYTHING, "width": LEAVES, "left": LEAVES, "marks": ANYTHING, "argument": ANYTHING})
CALL = st.fixed_dictionaries(
    {},
    optional={
        "argument": TEXT,
        "arguments": ARGUMENTS,
        "deadline_s": st.floats(0, 10),
        "session": TEXT,
        "seed": LEAVES,
        "tool": st.sampled_from(NAMES),
    },
)
REQUEST = st.fixed_dictionaries(
    {"jsonrpc": st.just("2.0"), "method": st.sampled_from(NAMES)},
    optional={
        "id": LEAVES,
        "params": st.fixed_dictionaries({"name": st.sampled_from(NAMES) | TEXT}, optional={"arguments": ARGUMENTS, "_meta": ANYTHING}),
    },
)


@pytest.mark.parametrize("path", PATHS)
@given(document=CALL | st.fixed_dictionaries({"calls": st.lists(CALL, max_size=4)}) | REQUEST | ANYTHING)
@MANY
def test_no_json_makes_the_service_fail(client, path, document):
    check(client, path, json.dumps(document).encode())


@example(name="\n/")
@given(name=TEXT.map(lambda text: text.encode("utf-8", "replace").decode()))
@FEW
def test_no_name_of_a_tool_or_a_session_makes_the_service_fail(client, name):
    from urllib.parse import quote

    if name in (".", ".."):  # a client resolves these before it sends
        return
    answer = client.post(f"/v1/tools/{quote(name, safe='')}/call", json={"argument": "1"})
    assert (answer.status_code, answer.json()["status"]) == (404, "unknown_tool")
    assert client.delete(f"/v1/sessions/{quote(name, safe='')}").status_code == (204 if name else 422)
