"""Which row goes to which minibatch, rank and microbatch. Plain Python, no tensors.

Everything is a deterministic function of its arguments, so every rank computes the plan of all ranks and none has to ask.
`rows` are indices into the batch, `lengths[row]` the tokens of that row as the model will read it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence


def minibatch_rows(num_rows: int, num_minibatches: int, seed: int | str) -> list[list[int]]:
    """A permutation of 0..num_rows-1, drawn from seed, cut into num_minibatches parts whose sizes differ by at most one.

    No part is empty: fewer rows than minibatches give fewer minibatches, no rows give none. ValueError for num_minibatches < 1.
    """
    if num_minibatches < 1:
        raise ValueError(f"num_minibatches={num_minibatches}: must be at least 1")
    rows = list(range(num_rows))
    random.Random(seed).shuffle(rows)
    parts = min(num_minibatches, num_rows)
    return [rows[num_rows * part // parts : num_rows * (part + 1) // parts] for part in range(parts)]


def shard_rows(rows: Sequence[int], lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """One list of rows per rank, total tokens balanced: the longest row first, each to the rank with the fewest tokens so far.

    Graham 1969's LPT rule: two ranks' totals differ by at most the longest row. A rank may get nothing. ValueError for num_ranks < 1.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks={num_ranks}: must be at least 1")
    shards: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for row in _longest_first(rows, lengths):
        rank = min(range(num_ranks), key=lambda rank: (loads[rank], len(shards[rank]), rank))
        shards[rank].append(row)
        loads[rank] += lengths[row]
    return shards


def microbatches(rows: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Rows of like length together: padded size, rows times longest row, at most max_tokens; a row above that goes alone.

    Longest first, so that a run which will not fit in memory fails on its first microbatch. ValueError for max_tokens < 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: must be at least 1")
    batches: list[list[int]] = []
    for row in _longest_first(rows, lengths):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def plan(rows: Sequence[int], lengths: Sequence[int], num_ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """plan[rank] is that rank's list of microbatches for one optimiser step.

    All ranks have the same number of them, filled up with empty ones at the end: under ZeRO-3 every forward and backward is a
    collective, so a rank with fewer would leave the others waiting for ever.
    """
    ranks = [microbatches(shard, lengths, max_tokens) for shard in shard_rows(rows, lengths, num_ranks)]
    count = max(len(batches) for batches in ranks)
    return [batches + [[] for _ in range(count - len(batches))] for batches in ranks]


def _longest_first(rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
    return sorted(rows, key=lambda row: (-lengths[row], row))
