from __future__ import annotations

import math

import pytest

from toolrl_ray.episode.ledger import Ledger
from toolrl_ray.errors import LedgerError
from toolrl_ray.types import NO_VERSION, Completion, SegmentKind, StopReason


def test_columns_of_a_worked_example():
    ledger = Ledger([1, 2], "ab")
    ledger.append_completion(Completion([3, 4], [-0.5, -1.0], [7, 8], "stop"), "c>", "d")
    ledger.append_observation([5], "e")
    assert ledger.token_ids == [1, 2, 3, 4, 5]
    assert ledger.loss_mask == [False, False, True, True, False]
    assert ledger.rollout_logprobs == [0.0, 0.0, -0.5, -1.0, 0.0]
    assert ledger.policy_versions == [NO_VERSION, NO_VERSION, 7, 8, NO_VERSION]
    assert [(s.kind, s.start, s.end, s.text, s.overhang) for s in ledger.segments] == [
        (SegmentKind.PROMPT, 0, 2, "ab", ""),
        (SegmentKind.POLICY, 2, 4, "c>", "d"),
        (SegmentKind.OBSERVATION, 4, 5, "e", ""),
    ]


def test_nothing_is_appended_after_the_end():
    ledger = Ledger([1])
    ledger.finish(StopReason.EOS)
    with pytest.raises(LedgerError, match="ended with eos"):
        ledger.append_observation([2], "x")
    with pytest.raises(LedgerError, match="ended with eos"):
        ledger.append_completion(Completion([2], [-1.0], [0], "stop"), "x")
    assert ledger.token_ids == [1]


def test_an_episode_ends_once():
    ledger = Ledger([1])
    ledger.finish(StopReason.EOS)
    with pytest.raises(LedgerError, match="already ended with eos"):
        ledger.finish(StopReason.SUBMITTED)
    assert ledger.stop_reason is StopReason.EOS


@pytest.mark.parametrize(("ids", "logprobs", "versions"), [([1, 2], [-1.0], [0, 0]), ([1], [-1.0], []), ([], [-1.0], [0])])
def test_columns_of_unequal_length_are_refused_and_leave_no_trace(ids, logprobs, versions):
    ledger = Ledger([9])
    with pytest.raises(LedgerError, match="engine returned"):
        ledger.append_completion(Completion(ids, logprobs, versions, "stop"), "")
    assert ledger.token_ids == [9]
    assert len(ledger.segments) == 1


@pytest.mark.parametrize("logprob", [math.nan, -math.inf, 0.5])
def test_a_logprob_that_is_none_is_refused(logprob):
    ledger = Ledger([9])
    with pytest.raises(LedgerError, match="sampled token 1"):
        ledger.append_completion(Completion([1, 2], [-1.0, logprob], [0, 0], "stop"), "")
    assert ledger.token_ids == [9]
