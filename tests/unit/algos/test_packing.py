"""Packing: every row exactly once, budgets kept, ranks in step, determinism."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolrl_ray.algos.packing import microbatches, minibatch_rows, plan, shard_rows

lengths_lists = st.lists(st.integers(0, 40), max_size=30)
budgets = st.integers(1, 120)
small = st.integers(1, 5)


@given(st.integers(0, 50), st.integers(1, 8), st.integers(0, 9))
def test_minibatches_hold_every_row_once_in_even_parts_and_none_is_empty(num_rows, num_minibatches, seed):
    parts = minibatch_rows(num_rows, num_minibatches, seed)
    assert sorted(row for part in parts for row in part) == list(range(num_rows))
    assert len(parts) == min(num_rows, num_minibatches) and all(parts)
    sizes = [len(part) for part in parts]
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_minibatches_depend_on_the_seed_and_on_nothing_else():
    assert minibatch_rows(40, 4, "7:3:1") == minibatch_rows(40, 4, "7:3:1")
    assert minibatch_rows(40, 4, "7:3:1") != minibatch_rows(40, 4, "7:3:2")


def test_shards_of_hand_computed_lengths():
    assert shard_rows([0, 1, 2, 3, 4], [3, 9, 4, 5, 3], 2) == [[1, 0], [3, 2, 4]]  # 12 tokens each


@given(lengths_lists, small)
def test_shards_hold_every_row_once_and_differ_by_at_most_the_longest_row(lengths, num_ranks):
    shards = shard_rows(range(len(lengths)), lengths, num_ranks)
    assert len(shards) == num_ranks and sorted(row for shard in shards for row in shard) == list(range(len(lengths)))
    loads = [sum(lengths[row] for row in shard) for shard in shards]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_microbatches_of_hand_computed_lengths():
    lengths = [4, 30, 5, 10, 4, 9]
    assert microbatches(range(6), lengths, 20) == [[1], [3, 5], [2, 0, 4]]  # padded: 30 (alone), 20, 15


@given(lengths_lists, budgets)
def test_microbatches_hold_every_row_once_and_keep_the_budget_unless_a_row_is_alone(lengths, max_tokens):
    batches = microbatches(range(len(lengths)), lengths, max_tokens)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch and (len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= max_tokens)


@given(lengths_lists, budgets)
def test_microbatches_group_rows_of_like_length(lengths, max_tokens):
    batches = [[lengths[row] for row in batch] for batch in microbatches(range(len(lengths)), lengths, max_tokens)]
    assert all(min(a) >= max(b) for a, b in zip(batches, batches[1:], strict=False))


@given(lengths_lists, small, budgets, st.randoms(use_true_random=False))
def test_plan_gives_every_rank_as_many_microbatches_and_ignores_the_order_of_rows(lengths, num_ranks, max_tokens, rng):
    rows = [row for row in range(len(lengths)) if row % 3]  # a minibatch is a part of the batch
    ranks = plan(rows, lengths, num_ranks, max_tokens)
    assert len(ranks) == num_ranks and len({len(batches) for batches in ranks}) == 1
    assert sorted(row for batches in ranks for batch in batches for row in batch) == rows
    assert any(batches and batches[-1] for batches in ranks) == bool(rows)  # filled up no further than the busiest rank
    shuffled = rows.copy()
    rng.shuffle(shuffled)
    assert plan(shuffled, lengths, num_ranks, max_tokens) == ranks


def test_one_row_on_two_ranks_leaves_the_other_an_empty_microbatch():
    assert plan([3], [0, 0, 0, 8], 2, 100) == [[[3]], [[]]]


@pytest.mark.parametrize(
    "call",
    [lambda: minibatch_rows(3, 0, 0), lambda: shard_rows([0], [1], 0), lambda: microbatches([0], [1], 0)],
    ids=["parts", "ranks", "tokens"],
)
def test_counts_below_one_are_refused_by_name(call):
    with pytest.raises(ValueError, match=r"=0: must be at least 1"):
        call()
