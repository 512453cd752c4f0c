"""Staleness per token, from the policy versions in the token ledger and the learner's count of updates."""

from __future__ import annotations

import pytest
import torch
from learner_synthetic import random_trajectories, trajectory

from toolrl_ray.errors import LearnerError
from toolrl_ray.learner.batch import make_batch
from toolrl_ray.types import NO_VERSION


def with_versions(row, versions):
    """The trajectory with these policy versions on its trained tokens, in order."""
    left = iter(versions)
    row.policy_versions = [next(left) if trained else NO_VERSION for trained in row.loss_mask]
    assert next(left, None) is None
    return row


def test_every_token_counts_from_the_version_that_sampled_it():
    turns = [([1, 2], False), ([3, 4, 5], True), ([6, 7], False), ([8], True)]
    rows = [
        with_versions(trajectory(turns), [3, 3, 5, 6]),  # new weights in mid-turn and between turns
        with_versions(trajectory([([1], False), ([2, 3], True)]), [0, 6]),
        trajectory([([1, 2], False)]),
    ]
    batch = make_batch(rows, num_updates=6)
    assert batch.staleness.dtype == torch.int64
    assert batch.staleness.tolist() == [[3, 3, 1, 0], [6, 0, 0, 0], [0, 0, 0, 0]]


def test_fresh_tokens_have_staleness_zero():
    assert not make_batch(random_trajectories(5)).staleness.any()


def test_a_token_of_a_version_that_is_yet_to_come_is_refused_by_name():
    rows = random_trajectories(3)
    with_versions(rows[1], [7] * (rows[1].num_trained_tokens - 1) + [8])
    with pytest.raises(LearnerError, match=r"trajectory '1': token \d+ is of policy version 8, but .* 7 updates: .* -1;") as caught:
        make_batch(rows, num_updates=7)
    assert "\n" not in str(caught.value)
    assert make_batch(rows, num_updates=8).staleness.min() == 0


def test_a_trained_token_without_a_version_is_refused_by_name():
    rows = random_trajectories(3)
    with_versions(rows[2], [NO_VERSION] + [0] * (rows[2].num_trained_tokens - 1))
    with pytest.raises(LearnerError, match=r"trajectory '2': token \d+ .* no policy version"):
        make_batch(rows)
