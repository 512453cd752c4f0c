"""What `PPOTrainer.step` returns: the statistics of TRL's trainer, under its names, from what the learner tells.

Letters: B = rows, A = trained tokens of the longest row (at least 1). The distributions are numpy arrays: objective/kl_dist [B];
objective/logprobs and objective/ref_logprobs [B, A], over a row's trained tokens, 0 behind them; ppo/policy/advantages, over all
trained tokens; tokens/queries_dist and tokens/responses_dist [B].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolrl_ray.algos.losses import kl_estimate
from toolrl_ray.algos.masked import masked_mean, masked_mean_var
from toolrl_ray.config import RunConfig
from toolrl_ray.learner.batch import Batch
from toolrl_ray.learner.targets import Targets


def update_statistics(metrics: dict[str, float], config: RunConfig, num_rows: int, seen: tuple[Batch, Targets] | None) -> dict[str, Any]:
    """metrics: what `Learner.update` returned. seen: its batch and targets, None where nothing was trained; then all that it would tell
    is 0. ppo/loss/*, ppo/policy/entropy, approxkl and the clip fractions are means over the update's minibatches; the rest is of
    the policy before the update."""
    policy_loss, value_loss = metrics.get("ppo/policy_loss", 0.0), metrics.get("ppo/value_loss", 0.0)
    statistics: dict[str, Any] = {
        "objective/kl": metrics.get("objective/kl", 0.0),
        "objective/kl_coef": metrics["objective/kl_coef"],
        "ppo/loss/policy": policy_loss,
        "ppo/loss/value": value_loss,
        "ppo/loss/total": policy_loss + config.algo.vf_coef * value_loss,
        "ppo/policy/entropy": metrics.get("ppo/entropy", 0.0),
        "ppo/policy/approxkl": metrics.get("ppo/approx_kl", 0.0),
        "ppo/policy/clipfrac": metrics.get("ppo/pg_clipfrac", 0.0),
        "ppo/val/clipfrac": metrics.get("ppo/vf_clipfrac", 0.0),
        "ppo/grad_norm": metrics.get("ppo/grad_norm", 0.0),
        "ppo/num_updates": metrics["ppo/num_updates"],
        "ppo/num_skipped_updates": metrics["ppo/num_skipped_updates"],
        "ppo/learning_rate": metrics["ppo/lr"],
        "tokens/trained": metrics["tokens/trained"],
        "time/ppo/total": metrics["time/learner_update_s"],
    }
    if seen is None:
        mask = torch.zeros(num_rows, 1, dtype=torch.bool)
        old = reference = advantages = returns = values = torch.zeros(num_rows, 1)
    else:
        batch, targets = seen
        mask, old, reference = batch.mask, targets.old_logprobs, targets.ref_logprobs
        advantages, returns, values = targets.advantages, targets.returns, targets.old_values
    kl = torch.where(mask, kl_estimate(old, reference, config.algo.kl_estimator), 0.0)
    for name, x in (("ppo/returns", returns), ("ppo/val", values)):
        mean, var = masked_mean_var(x, mask)
        statistics |= {f"{name}/mean": float(mean), f"{name}/var": float(var)}
    error, var = float(masked_mean((values - returns) ** 2, mask)), statistics["ppo/returns/var"]
    return statistics | {
        "objective/kl_dist": torch.where(mask, old - reference, 0.0).sum(1).cpu().numpy(),  # whatever kl_penalty says, as is objective/kl
        "objective/entropy": float(-old.sum(1).mean()),  # 0 where masked
        "objective/logprobs": old.cpu().numpy(),
        "objective/ref_logprobs": reference.cpu().numpy(),
        "ppo/mean_non_score_reward": -metrics["objective/kl_coef"] * float(masked_mean(kl, mask)),
        "ppo/policy/advantages": advantages[mask].cpu().numpy(),
        "ppo/policy/advantages_mean": float(masked_mean(advantages, mask)),
        "ppo/val/error": error,
        "ppo/val/var_explained": 1 - error / var if var > 1e-12 else 0.0,  # of the error, as in TRL, so that a constant one counts, too
    }


def row_statistics(queries: Sequence[Tensor], responses: Sequence[Tensor], rewards: Sequence[float]) -> dict[str, Any]:
    """Of the rows as they came in. Standard deviations are those of TRL, with B - 1; 0 for a single row."""
    query_lens, response_lens, scores = (
        np.array(column, dtype=np.float32) for column in ([len(x) for x in queries], [len(x) for x in responses], rewards)
    )
    columns = {
        ("tokens/queries_len_mean", "tokens/queries_len_std"): query_lens,
        ("tokens/responses_len_mean", "tokens/responses_len_std"): response_lens,
        ("ppo/mean_scores", "ppo/std_scores"): scores,
        ("env/reward_mean", "env/reward_std"): scores,
    }
    statistics: dict[str, Any] = {"tokens/queries_dist": query_lens, "tokens/responses_dist": response_lens, "env/reward_dist": scores}
    for (mean, std), column in columns.items():
        statistics |= {mean: float(column.mean()), std: float(column.std(ddof=1)) if len(column) > 1 else 0.0}
    return statistics
