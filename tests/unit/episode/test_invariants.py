"""The six invariants of the token ledger, for any sampled tokens and any tool output, on real vocabularies."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.episode.invariants import check_invariants
from tests.unit.episode.script import LIMITS, FakeTool, Script, play
from tests.unit.episode.vocabularies import MAKERS
from tests.unit.episode.vocabularies import codec as vocabulary
from toolrl_ray.types import Completion
from tools_service.protocol import ToolStatus

MARKERS = ["<request><T>1+1<call>", "<call>", "Result=2<submit>", "<request>", ">", "\n", "><", "é🙂", "x"]


@st.composite
def completions(draw, codec):
    """What an engine might return: markers written in any tokens, random ids, markers that straddle, EOS anywhere at the end."""
    ids = []
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            ids += codec.encode(draw(st.sampled_from(MARKERS)))
        else:
            ids += draw(st.lists(st.integers(0, codec.vocab_size - 1), max_size=6))
    if draw(st.booleans()):
        ids += codec.encode(draw(st.sampled_from(["<request><T>2*3<call>", "Result=6<submit>"])))
    if draw(st.integers(0, 5)) == 0:
        ids.append(min(codec.eos_token_ids))
    logprobs = draw(st.lists(st.floats(-30, 0), min_size=len(ids), max_size=len(ids)))
    versions = sorted(draw(st.lists(st.integers(0, 5), min_size=len(ids), max_size=len(ids))))
    return Completion(ids, logprobs, versions, draw(st.sampled_from(["stop", "length", "abort"])))


@pytest.mark.parametrize("name", sorted(MAKERS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_six_invariants_hold(name, data):
    codec = vocabulary(name)
    turns = data.draw(st.lists(completions(codec), min_size=6, max_size=6))
    tool = FakeTool(data.draw(st.text(max_size=40)), data.draw(st.sampled_from(list(ToolStatus))))
    limits = replace(
        LIMITS,
        max_turns=data.draw(st.integers(1, 6)),
        max_context_tokens=data.draw(st.sampled_from([40, 120, 2000])),
        max_observation_tokens=12,
    )
    script = Script(*turns)
    trajectory = play(codec, script, tool, limits)
    check_invariants(codec, trajectory, turns[: trajectory.num_turns], script)


@pytest.mark.parametrize("name", sorted(MAKERS))
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_foreign_text_never_becomes_a_special_token(name, text):
    codec = vocabulary(name)
    assert not codec.eos_token_ids & set(codec.encode(text + "<eos></s><|endoftext|>" + text))
