"""Tokens that were sampled by another policy than the one that an update starts from: decoupled PPO's correction.

Letters as in losses.py. Three policies know a trained token t:

    behaviour b_t: the one that sampled it, of whatever version, and the versions of one row may differ (rollout_logprobs)
    proximal  p_t: the weights that the update starts from, recomputed by the learner (old_logprobs)
    current   c_t: the weights of this optimiser step (logprobs)

    L = -(1/num_tokens) sum_t w_t min(r_t A_t, clip(r_t, 1 - eps_low, 1 + eps_high) A_t),  r_t = c_t / p_t,  w_t = min(p_t / b_t, clip)

`losses.policy_loss` is this L, given the weights from here: decoupled PPO of Hilton et al. 2021 (arXiv 2110.00641), as AReaL uses it for
episodes of several versions (Fu et al. 2025, arXiv 2505.24298), with the weight cut from above. Two things are apart in it that plain
PPO has in one ratio c_t / b_t: the clip holds the step near p, however old a token is, and the weight corrects for b. With b = p every
weight is exactly 1, and L is plain PPO.

b differs from p for two reasons that the metrics tell apart: older weights (staleness > 0), and at one and the same version the sampler's
own arithmetic (mismatch). The correction is the same for both.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from toolrl_ray.algos.losses import kl_estimate
from toolrl_ray.algos.masked import check_shapes

Level = Literal["token", "sequence"]
Band = tuple[float, float]


@torch.no_grad()
def log_importance(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, level: Level = "token") -> Tensor:
    """log(p_t / b_t) of each token or, for "sequence", sum_t log(p_t / b_t) over the row's tokens with mask, at each of them.

    [B, A]; 0 where masked. No gradient.
    """
    check_shapes(mask, old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs)
    x = torch.where(mask, old_logprobs - rollout_logprobs, 0.0)
    return x if level == "token" else torch.where(mask, x.sum(-1, keepdim=True), 0.0)


@torch.no_grad()
def in_band(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, band: Band | None) -> Tensor:
    """bool [B, A]: tokens with mask and low <= p_t / b_t <= high, (low, high) = band; without a band all tokens with mask.

    The masking of IcePop (Ling Team 2025, arXiv 2510.18855). A token outside has weight 0 in the policy loss and nowhere else: it
    stays in num_tokens, so that one token's share of the gradient does not depend on how many others were masked and the count is the same
    for every microbatch and rank, and in the losses of value, entropy and KL.
    """
    if band is None:
        return mask
    ratio = log_importance(old_logprobs, rollout_logprobs, mask).exp()
    return mask & (ratio >= band[0]) & (ratio <= band[1])


@torch.no_grad()
def truncated_importance_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, clip: float, level: Level = "token", band: Band | None = None
) -> Tensor:
    """w_t = min(exp(log_importance_t), clip), and 0 where masked or outside the band (of single tokens, at either level).

    Ionides 2008, "Truncated Importance Sampling" (section 2); the cut of Espeholt et al. 2018 (arXiv 1802.01561) eq. 1's rho.
    "token" corrects for each choice, but not for how likely p is to come to where it was made. "sequence" corrects for the whole row, at a
    price: the variance of a product of ratios grows exponentially with its length (Liu et al. 2018, arXiv 1810.12429), so in long or very
    stale rows most weights are near 0 or cut, and the cut biases all of a row's tokens. For short episodes.
    [B, A]; no gradient. An overflow of exp is cut like any other large ratio.
    """
    weights = log_importance(old_logprobs, rollout_logprobs, mask, level).exp().clamp(max=clip)
    return torch.where(in_band(old_logprobs, rollout_logprobs, mask, band), weights, 0.0)


@torch.no_grad()
def sampler_kl(old_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """Per-token k3 estimate of KL(b || p), from tokens that b sampled: mismatch_kl where both are of one version.

    `kl_estimate` with the sampler as policy and the learner's recomputation as reference. Any one shape; no gradient.
    """
    return kl_estimate(rollout_logprobs, old_logprobs, "k3")
