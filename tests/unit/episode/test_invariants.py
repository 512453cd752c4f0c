"""The six invariants of the token ledger, for any sampled tokens and any tool output, on real vocabularies."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.episode.script import LIMITS, FakeTool, Script, play
from tests.unit.episode.vocabularies import MAKERS
from tests.unit.episode.vocabularies import codec as vocabulary
from toolrl_ray.types import NO_VERSION, Completion, SegmentKind, StopReason
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
    columns = [trajectory.token_ids, trajectory.loss_mask, trajectory.rollout_logprobs, trajectory.policy_versions]

    # 1. equal length
    assert len({len(column) for column in columns}) == 1
    # 2. sampled ids exactly as returned, and 6. whole tokens however the marker ends
    returned = turns[: trajectory.num_turns]
    policy = [s for s in trajectory.segments if s.kind is SegmentKind.POLICY]
    assert [trajectory.token_ids[s.start : s.end] for s in policy] == [c.token_ids for c in returned]
    assert [s.text + s.overhang for s in policy] == [codec.decode(c.token_ids) for c in returned]
    # 3. mask, logprobs and versions
    sampled = {i for s in policy for i in range(s.start, s.end)}
    for i, (trained, logprob, version) in enumerate(zip(*columns[1:], strict=True)):
        assert trained == (i in sampled)
        if not trained:
            assert (logprob, version) == (0.0, NO_VERSION)
    assert [lp for s in policy for lp in trajectory.rollout_logprobs[s.start : s.end]] == [lp for c in returned for lp in c.logprobs]
    assert [v for s in policy for v in trajectory.policy_versions[s.start : s.end]] == [v for c in returned for v in c.policy_versions]
    # 4. each prompt is a prefix of the next, and of the trajectory
    for earlier, later in zip(script.prompts, [*script.prompts[1:], trajectory.token_ids], strict=False):
        assert later[: len(earlier)] == earlier
    # 5. exactly one reason, and nothing after the end
    assert isinstance(trajectory.stop_reason, StopReason)
    if trajectory.stop_reason in (StopReason.SUBMITTED, StopReason.EOS):
        assert trajectory.segments[-1].kind is SegmentKind.POLICY
    # segments tile the columns
    assert [s.start for s in trajectory.segments] == [0, *(s.end for s in trajectory.segments[:-1])]
    assert trajectory.segments[-1].end == len(trajectory.token_ids)


@pytest.mark.parametrize("name", sorted(MAKERS))
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_foreign_text_never_becomes_a_special_token(name, text):
    codec = vocabulary(name)
    assert not codec.eos_token_ids & set(codec.encode(text + "<eos></s><|endoftext|>" + text))
