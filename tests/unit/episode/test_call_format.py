from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolrl_ray.episode.call_format import RequestedCall, TextMarkers, TurnKind

FORMAT = TextMarkers()


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("<request><SimpleCalculatorTool>13.1-3<call>", [("SimpleCalculatorTool", "13.1-3")]),
        ("I will ask. <request>\n<Wiki> Bruce Willis <call>", [("Wiki", " Bruce Willis ")]),
        ("<request><Python>print(1 > 0 and 2 < 3)<call>", [("Python", "print(1 > 0 and 2 < 3)")]),
        ("<request><Tool><call>", [("Tool", "")]),
        ("<request><Tool>a\nb<call>", [("Tool", "a\nb")]),
    ],
)
def test_a_call_keeps_its_argument_as_written(text, calls):
    parsed = FORMAT.parse(text)
    assert parsed.kind is TurnKind.CALL
    assert parsed.calls == tuple(RequestedCall(*call) for call in calls)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("13.1-3<call>", "<call> without <request>"),
        ("<request>13.1-3<call>", "no <tool name> after <request>"),
        ("<request><>13.1-3<call>", "no <tool name> after <request>"),
        ("<request><A>1<request><B>2<call>", "2 requests before one <call>"),
    ],
)
def test_a_malformed_call_says_what_is_wrong(text, problem):
    parsed = FORMAT.parse(text)
    assert (parsed.kind, parsed.problem, parsed.calls) == (TurnKind.MALFORMED, problem, ())


@pytest.mark.parametrize(
    ("text", "kind", "end"),
    [
        ("Result=1<submit>", TurnKind.SUBMIT, 16),
        ("Result=1<submit><request><A>1<call>", TurnKind.SUBMIT, 16),
        ("<request><A>1<call>2<submit>", TurnKind.CALL, 19),
        ("<submit>", TurnKind.SUBMIT, 8),
        ("<call>", TurnKind.MALFORMED, 6),
        ("<call<submi", TurnKind.PLAIN, 11),
        ("", TurnKind.PLAIN, 0),
    ],
)
def test_the_first_marker_decides(text, kind, end):
    parsed = FORMAT.parse(text)
    assert (parsed.kind, parsed.end) == (kind, end)


@given(st.text(alphabet="<>requstcalbmip A1\n", max_size=80))
def test_parsing_never_fails_and_ends_at_a_marker(text):
    parsed = FORMAT.parse(text)
    if parsed.kind is TurnKind.PLAIN:
        assert parsed.end == len(text)
        assert not any(marker in text for marker in FORMAT.stop)
    else:
        assert text[: parsed.end].endswith(FORMAT.stop)
        assert not any(marker in text[: parsed.end - 1] for marker in FORMAT.stop)
