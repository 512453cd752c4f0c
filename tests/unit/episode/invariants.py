"""The six invariants of the token ledger, checked on a finished trajectory."""

from __future__ import annotations

from tests.unit.episode.script import Script
from toolrl_ray.types import NO_VERSION, Completion, SegmentKind, StopReason, Trajectory


def check_invariants(codec, trajectory: Trajectory, returned: list[Completion], script: Script) -> None:
    """returned: the completions of the trajectory's turns, as the engine gave them. script: knows the prompts that it was given."""
    columns = [trajectory.token_ids, trajectory.loss_mask, trajectory.rollout_logprobs, trajectory.policy_versions]

    # 1. equal length
    assert len({len(column) for column in columns}) == 1
    # 2. sampled ids exactly as returned, and 6. whole tokens however the marker ends
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
