"""What an episode tells its tools: whose call it is, with which seed, and when the episode is over."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.episode.script import REQUEST, FakeTool, Script, play, said
from tests.unit.episode.vocabularies import codec as vocabulary
from toolrl_ray.episode.loop import call_seed

CODEC = vocabulary("tiny")
CALL = "<request><SimpleCalculatorTool>13.1-3<call>"
SUBMIT = "\n\nResult=10.1<submit>"


class SessionTool(FakeTool):
    def __init__(self):
        super().__init__()
        self.ended: list[str] = []

    def end_session(self, session):
        self.ended.append(session)


def test_every_call_names_its_episode_and_has_a_seed_of_its_own_that_is_the_same_every_time():
    tool, again = SessionTool(), SessionTool()
    for one in (tool, again):
        play(CODEC, Script(said(CODEC, CALL), said(CODEC, CALL), said(CODEC, SUBMIT)), one)
    assert [call.session for call in tool.calls] == [REQUEST.episode_id] * 2
    assert [call.seed for call in tool.calls] == [call.seed for call in again.calls] == [call_seed(REQUEST.episode_id, n) for n in (1, 2)]
    assert len({call.seed for call in tool.calls}) == 2


def test_a_seed_is_the_same_in_every_process_and_run():
    assert (call_seed("1:0:0", 1), call_seed("1:0:0", 2), call_seed("1:0:1", 1)) == (1362907332, 676534837, 3529387108)


def test_an_episode_that_ends_ends_its_session():
    tool = SessionTool()
    play(CODEC, Script(said(CODEC, CALL), said(CODEC, SUBMIT)), tool)
    assert tool.ended == [REQUEST.episode_id]


@pytest.mark.parametrize("failure", [RuntimeError("the engine is gone"), asyncio.CancelledError()])
def test_an_episode_that_fails_or_is_cancelled_ends_its_session_too(failure):
    tool = SessionTool()

    async def generate(token_ids, params):
        raise failure

    with pytest.raises(type(failure)):
        play(CODEC, generate, tool)
    assert tool.ended == [REQUEST.episode_id]


def test_a_tool_without_sessions_needs_nothing():
    tool = FakeTool()
    play(CODEC, Script(said(CODEC, CALL), said(CODEC, SUBMIT)), tool)
    assert len(tool.calls) == 1
