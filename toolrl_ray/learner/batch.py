"""Trajectories as tensors.

Letters: B = rows (episodes), L = tokens of the longest row, A = trained tokens of the longest row (at least 1), N = trained
tokens of a microbatch. [B, A] tensors are "compressed": they run over a row's trained tokens only, right-padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from toolrl_ray.errors import LearnerError
from toolrl_ray.types import NO_VERSION, Trajectory


@dataclass(frozen=True)
class Batch:
    """One collection of episodes, the same on every rank.

    token_ids: int64 [B, L], right-padded with 0.
    positions: int64 [B, A]; trained token a of a row is token_ids[row, positions[row, a] + 1].
    mask: bool [B, A]. rollout_logprobs: float32 [B, A], 0 where masked. scores: float32 [B], the rewards.
    staleness: int64 [B, A], updates between the version that sampled a token and the weights that the update starts from, 0 where masked.
    group_index: int64 [B], equal for the episodes of one group.
    lengths: tokens that must be read to train a row: up to its last trained token, observations after it left out.
    counts: trained tokens of each row.
    """

    token_ids: Tensor
    positions: Tensor
    mask: Tensor
    rollout_logprobs: Tensor
    staleness: Tensor
    scores: Tensor
    group_index: Tensor
    lengths: list[int]
    counts: list[int]

    @property
    def num_trained(self) -> int:
        return sum(self.counts)

    def select(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(input_ids [b, l], row of each trained token [N], its position [N]), as `PolicyWithValue.forward` takes them.

        Tokens come row after row, as `x[rows][mask[rows]]` lists them. No rows give one padding row and N = 0, so that a rank
        that has nothing left still takes part in the collectives of the others.
        """
        if not rows:
            empty = self.positions.new_zeros(0)
            return self.token_ids.new_zeros(1, 1), empty, empty
        mask = self.mask[rows]
        return self.token_ids[rows, : max(self.lengths[row] for row in rows)], mask.nonzero()[:, 0], self.positions[rows][mask]


def make_batch(trajectories: Sequence[Trajectory], num_updates: int = 0, device: torch.device | str = "cpu") -> Batch:
    """Pads and compresses. num_updates: those before this one; the weights after update s are version s, those before any version 0.

    Raises LearnerError, naming the episode, for a row that no ledger can have made, or whose versions are none that there has been.
    """
    if not trajectories:
        raise LearnerError("the learner got an empty batch of trajectories")
    for trajectory in trajectories:
        _check(trajectory, num_updates)
    num_rows = len(trajectories)
    trained = [np.flatnonzero(t.loss_mask) for t in trajectories]
    counts = [len(index) for index in trained]
    width, longest = max(max(counts), 1), max(len(t.token_ids) for t in trajectories)
    token_ids = np.zeros((num_rows, longest), dtype=np.int64)
    positions = np.zeros((num_rows, width), dtype=np.int64)
    mask = np.zeros((num_rows, width), dtype=bool)
    logprobs = np.zeros((num_rows, width), dtype=np.float32)
    staleness = np.zeros((num_rows, width), dtype=np.int64)
    for row, (trajectory, index) in enumerate(zip(trajectories, trained, strict=True)):
        token_ids[row, : len(trajectory.token_ids)] = trajectory.token_ids
        positions[row, : len(index)] = index - 1
        mask[row, : len(index)] = True
        logprobs[row, : len(index)] = np.asarray(trajectory.rollout_logprobs, dtype=np.float32)[index]
        staleness[row, : len(index)] = num_updates - np.asarray(trajectory.policy_versions, dtype=np.int64)[index]
    groups = {group: i for i, group in enumerate(dict.fromkeys(t.request.group_id for t in trajectories))}
    return Batch(
        token_ids=torch.from_numpy(token_ids).to(device),
        positions=torch.from_numpy(positions).to(device),
        mask=torch.from_numpy(mask).to(device),
        rollout_logprobs=torch.from_numpy(logprobs).to(device),
        staleness=torch.from_numpy(staleness).to(device),
        scores=torch.tensor([t.reward for t in trajectories], dtype=torch.float32, device=device),
        group_index=torch.tensor([groups[t.request.group_id] for t in trajectories], device=device),
        lengths=[int(index[-1]) + 1 if len(index) else 1 for index in trained],
        counts=counts,
    )


def _check(trajectory: Trajectory, num_updates: int) -> None:
    name = f"trajectory {trajectory.request.episode_id!r}"
    columns = {
        "token_ids": len(trajectory.token_ids),
        "loss_mask": len(trajectory.loss_mask),
        "rollout_logprobs": len(trajectory.rollout_logprobs),
        "policy_versions": len(trajectory.policy_versions),
    }
    if len(set(columns.values())) != 1:
        raise LearnerError(f"{name}: its columns differ in length: {columns}")
    if not trajectory.token_ids:
        raise LearnerError(f"{name} has no tokens")
    if trajectory.loss_mask[0]:
        raise LearnerError(f"{name}: its first token is marked as trained, but nothing comes before it to predict it from")
    if trajectory.reward is None or not math.isfinite(trajectory.reward):
        raise LearnerError(f"{name}: reward={trajectory.reward}; score it with a finite number before training on it")
    for t in np.flatnonzero(trajectory.loss_mask).tolist():
        logprob, version = trajectory.rollout_logprobs[t], trajectory.policy_versions[t]
        if not math.isfinite(logprob):
            raise LearnerError(f"{name}: rollout logprob of token {t} is {logprob}")
        if version == NO_VERSION:
            raise LearnerError(f"{name}: token {t} is marked as trained, but has no policy version: nothing says who sampled it")
        if version > num_updates:
            raise LearnerError(
                f"{name}: token {t} is of policy version {version}, but the learner has made {num_updates} updates: its staleness would be "
                f"{num_updates - version}; the engine's label or the learner's count is wrong"
            )
