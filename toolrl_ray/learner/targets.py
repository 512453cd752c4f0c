"""What the update aims at: computed once per batch, from its scores and the log-probabilities of three policies.

Letters as in batch.py: B = rows, A = trained tokens of the longest row. Every rank holds the whole [B, A] tensors (a float per
trained token), so every rank computes the same targets, bit for bit, whatever the number of ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from toolrl_ray.algos import advantages, losses, off_policy
from toolrl_ray.algos.masked import masked_mean, masked_whiten
from toolrl_ray.config import AlgoConfig
from toolrl_ray.learner.batch import Batch
from toolrl_ray.learner.engine import Engine, Forward


@dataclass(frozen=True)
class Targets:
    """All float32 [B, A], 0 where masked. returns is None unless advantages are estimated with a value function; ref_logprobs
    is None without a reference. weights: see algos/off_policy.py."""

    old_logprobs: Tensor
    old_values: Tensor | None
    ref_logprobs: Tensor | None
    weights: Tensor
    advantages: Tensor
    returns: Tensor | None


@torch.no_grad()
def score(forward: Forward, engine: Engine, batch: Batch, microbatches: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(logprobs, values), each [B, A] on every rank, 0 where masked: each rank computes its microbatches, then they are summed."""
    result = torch.zeros(2, *batch.mask.shape, device=engine.device)
    for rows in microbatches:
        logprobs, _, values = forward(*batch.select(rows), entropy=False)
        for part, flat in zip(result, (logprobs, values), strict=True):
            if rows and flat is not None:
                part[rows] = part[rows].masked_scatter_(batch.mask[rows], flat)
    return tuple(engine.all_sum(result))


@torch.no_grad()
def make_targets(
    batch: Batch, algo: AlgoConfig, kl_coef: float, old_logprobs: Tensor, old_values: Tensor | None, ref_logprobs: Tensor | None
) -> Targets:
    kl_in_reward = ref_logprobs is not None and algo.kl_in == "reward"
    kl = losses.kl_estimate(old_logprobs, ref_logprobs, algo.kl_estimator) if kl_in_reward else torch.zeros_like(old_logprobs)
    returns = None
    if algo.advantage == "grpo":
        advantage = advantages.broadcast_rows(advantages.grpo(batch.scores, batch.group_index), batch.mask)
    elif algo.advantage == "rloo":
        advantage = advantages.broadcast_rows(advantages.rloo(batch.scores, batch.group_index), batch.mask)
    else:
        rewards = advantages.token_rewards(batch.scores, kl, batch.mask, kl_coef)
        if algo.advantage == "reinforce_pp":
            advantage = advantages.reinforce_pp(rewards, batch.mask, algo.gamma)
        else:
            advantage, returns = advantages.gae(rewards, old_values, batch.mask, algo.gamma, algo.gae_lambda)
            if algo.whiten_advantages:
                advantage = masked_whiten(advantage, batch.mask)
    weights = off_policy.truncated_importance_weights(
        old_logprobs, batch.rollout_logprobs, batch.mask, algo.tis_clip, algo.tis_level, algo.ratio_band
    )
    return Targets(old_logprobs, old_values, ref_logprobs, weights, advantage, returns)


def target_metrics(batch: Batch, targets: Targets, algo: AlgoConfig) -> dict[str, float]:
    """Of the batch before its update. objective/kl (nats per episode, k1) is there only where there is a reference."""
    metrics = off_policy_metrics(batch, targets, algo)
    if targets.ref_logprobs is not None:
        metrics["objective/kl"] = float((targets.old_logprobs - targets.ref_logprobs).sum() / len(batch.mask))  # both are 0 where masked
    if targets.returns is not None:
        metrics["ppo/explained_variance"] = float(losses.explained_variance(targets.old_values, targets.returns, batch.mask))
    return metrics


def off_policy_metrics(batch: Batch, targets: Targets, algo: AlgoConfig) -> dict[str, float]:
    """How far the sampler was from the weights that the update starts from, over the batch's trained tokens.

    mismatch/*: of tokens that these weights sampled (staleness 0); off_policy/kl: of older ones. Left out where there is no such token.
    off_policy/tis_mean: of the weights as they are used, 0 outside algo.ratio_band. off_policy/tis_clipped_share: tokens in the band whose
    weight is cut; off_policy/masked_share: tokens outside it.
    """
    old, rollout, mask = targets.old_logprobs, batch.rollout_logprobs, batch.mask
    fresh, stale = mask & (batch.staleness == 0), mask & (batch.staleness > 0)
    kl = off_policy.sampler_kl(old, rollout)
    inside = off_policy.in_band(old, rollout, mask, algo.ratio_band)
    cut = inside & (off_policy.log_importance(old, rollout, mask, algo.tis_level) > math.log(algo.tis_clip))
    tokens = {
        "off_policy/stale_share": stale.float(),
        "off_policy/staleness_mean": batch.staleness.float(),
        "off_policy/tis_mean": targets.weights,
        "off_policy/tis_clipped_share": cut.float(),
        "off_policy/masked_share": (~inside).float(),
    }
    metrics = {name: float(masked_mean(x, mask)) for name, x in tokens.items()}
    metrics["off_policy/staleness_max"] = float(batch.staleness.max())
    if fresh.any():
        metrics["mismatch/kl"] = float(masked_mean(kl, fresh))
        metrics["mismatch/mean_abs_logprob_diff"] = float(losses.mean_abs_difference(old, rollout, fresh))
    if stale.any():
        metrics["off_policy/kl"] = float(masked_mean(kl, stale))
    return metrics
