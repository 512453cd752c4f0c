"""What the update aims at: computed once per batch, from its scores and the log-probabilities of three policies.

Letters as in batch.py: B = rows, A = trained tokens of the longest row. Every rank holds the whole [B, A] tensors (a float per
trained token), so every rank computes the same targets, bit for bit, whatever the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolrl_ray.algos import advantages, losses
from toolrl_ray.algos.masked import masked_mean, masked_whiten
from toolrl_ray.config import AlgoConfig
from toolrl_ray.learner.batch import Batch
from toolrl_ray.learner.engine import Engine, Forward


@dataclass(frozen=True)
class Targets:
    """All float32 [B, A], 0 where masked. returns is None unless advantages are estimated with a value function; ref_logprobs
    is None without a reference."""

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
    weights = losses.truncated_importance_weights(old_logprobs, batch.rollout_logprobs, algo.tis_clip)
    return Targets(old_logprobs, old_values, ref_logprobs, weights, advantage, returns)


def target_metrics(batch: Batch, targets: Targets, tis_clip: float) -> dict[str, float]:
    """Of the batch before its update. objective/kl (nats per episode, k1) is there only where there is a reference."""
    old, rollout, mask = targets.old_logprobs, batch.rollout_logprobs, batch.mask
    tokens = {
        "mismatch/kl": losses.mismatch_kl(old, rollout),
        "mismatch/mean_abs_logprob_diff": (old - rollout).abs(),
        "mismatch/tis_mean": targets.weights,
        "mismatch/tis_clipped_share": (old - rollout > torch.tensor(tis_clip).log().item()).float(),
    }
    metrics = {name: float(masked_mean(x, mask)) for name, x in tokens.items()}
    if targets.ref_logprobs is not None:
        metrics["objective/kl"] = float((old - targets.ref_logprobs).sum() / len(mask))  # both are 0 where masked
    if targets.returns is not None:
        metrics["ppo/explained_variance"] = float(losses.explained_variance(targets.old_values, targets.returns, mask))
    return metrics
