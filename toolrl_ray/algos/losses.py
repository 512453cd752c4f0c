"""Losses and per-token quantities of the policy, the value head and the sampler.

Letters: B rows, A trained tokens of the longest row, N trained tokens, V vocabulary. Per-token tensors may have any one shape
([B, A] with a mask, [N] with a mask of all True). Padding may hold anything, NaN included; its gradient is exactly 0.

Losses are sums over this call's tokens divided by `num_tokens`, the count of trained tokens of the whole optimiser step that
the caller gives: added up over microbatches and ranks they are the loss of the whole. (Where ranks' gradients are averaged
instead, give num_tokens / num_ranks.) Statistics are detached SUMS over this call's tokens, under the name of the metric
that they become when the caller divides by the count.

exp() of a difference of logprobs: the difference is first clamped to +-20 nats (e^20 = 4.9e8, finite in float32 and bfloat16
with room to add up). Beyond that the value stays finite and its gradient is 0; no healthy run comes near.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from toolrl_ray.algos.masked import check_shapes, masked_mean, masked_mean_var, masked_sum

MAX_LOG_RATIO = 20.0
CHUNK_ELEMENTS = 2**24  # logits worked on at once: 64 MiB in float32


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    num_tokens: float | Tensor,
    clip_eps_low: float,
    clip_eps_high: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = -(1/num_tokens) sum_t w_t min(r_t A_t, clip(r_t, 1 - eps_low, 1 + eps_high) A_t), r_t = exp(logprob_t - old_logprob_t).

    Schulman et al. 2017 (arXiv 1707.06347) eq. 7, with the two bounds and the normalisation by tokens of Yu et al. 2025 (DAPO,
    arXiv 2503.14476) eq. 8. t over all tokens with mask. Gradient flows to `logprobs` alone.
    weights: w_t >= 0, default 1: `off_policy.truncated_importance_weights`, with which this is decoupled PPO. Where 0 the token takes
        no part, whatever its logprob is, but in the statistics.
    Returns (scalar, {"pg_clipfrac": tokens on which the clipped term is the smaller, "approx_kl": k3 of KL(old || new), "ratio": r}).
    """
    check_shapes(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    log_ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    advantages = torch.where(mask, advantages.detach(), 0.0)
    ratio = log_ratio.exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip_eps_low, 1 + clip_eps_high) * advantages
    objective = torch.minimum(unclipped, clipped)
    if weights is not None:
        check_shapes(mask, weights=weights)
        weights = torch.where(mask, weights.detach(), 0.0)
        objective = torch.where(weights > 0, weights * objective, 0.0)
    stats = {"pg_clipfrac": (clipped < unclipped).to(ratio.dtype), "approx_kl": torch.expm1(log_ratio) - log_ratio, "ratio": ratio}
    return -masked_sum(objective, mask) / (num_tokens or 1), _sums(stats, mask)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, num_tokens: float | Tensor, clip_value: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = (1/num_tokens) sum_t (1/2) max((V_t - R_t)^2, (clip(V_t, V_old_t - c, V_old_t + c) - R_t)^2), c = clip_value.

    The clipped value loss of OpenAI Baselines' ppo2 (not in the PPO paper; described by Engstrom et al. 2020, arXiv 2005.12729).
    t over all tokens with mask. Gradient flows to `values` alone.
    Returns (scalar, {"vf_clipfrac": tokens on which the clipped term is the larger}).
    """
    check_shapes(mask, values=values, old_values=old_values, returns=returns)
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values.detach(), returns.detach()))
    unclipped = (values - returns) ** 2
    clipped = (torch.clamp(values, old_values - clip_value, old_values + clip_value) - returns) ** 2
    loss = 0.5 * masked_sum(torch.maximum(unclipped, clipped), mask) / (num_tokens or 1)
    return loss, _sums({"vf_clipfrac": (clipped > unclipped).to(values.dtype)}, mask)


def _sums(stats: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    return {name: masked_sum(x.detach(), mask) for name, x in stats.items()}


def logprobs_from_logits(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log p_i = z_{i,ids_i} - log sum_{v=0}^{V-1} exp z_{i,v}, z = logits / temperature, for i = 0..N-1. logits [N, V] of any float
    dtype, ids long [N].

    Returns float32 (float64 for float64) [N]. For the backward pass it keeps the logits and at most CHUNK_ELEMENTS numbers more.
    """
    assert logits.dim() == 2 and ids.shape == logits.shape[:1], f"logits {tuple(logits.shape)}, ids {tuple(ids.shape)}"
    return _by_row_chunks(partial(_chunk_logprobs, temperature), logits, ids)


def entropy_from_logits(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """H_i = -sum_{v=0}^{V-1} p_{i,v} log p_{i,v}, p = softmax(logits / temperature), in nats, for i = 0..N-1; 0 log 0 = 0. [N, V] to [N].

    dtype and memory as for `logprobs_from_logits`. A logit of -inf is allowed: no entropy, no gradient.
    """
    assert logits.dim() == 2, f"logits {tuple(logits.shape)}"
    return _by_row_chunks(partial(_chunk_entropy, temperature), logits)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return x if temperature == 1 else x / temperature


def _chunk_logprobs(temperature: float, logits: Tensor, ids: Tensor) -> Tensor:
    # Fused: 2.5 times as fast as gather and logsumexp.
    return -torch.nn.functional.cross_entropy(_tempered(logits, temperature), ids, reduction="none")


def _chunk_entropy(temperature: float, logits: Tensor) -> Tensor:
    logp = _tempered(logits, temperature).log_softmax(1)
    p = logp.exp()
    return -(p * torch.where(p > 0, logp, 0.0)).sum(1)


def _by_row_chunks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function over chunks of rows, each recomputed in the backward pass: float32 copies exist for one chunk at a time."""
    num_rows, width = tensors[0].shape
    chunk = max(1, CHUNK_ELEMENTS // max(1, width))
    if num_rows <= chunk:
        return function(*tensors)
    parts = zip(*(x.split(chunk) for x in tensors), strict=True)
    return torch.cat([checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Per-token estimate of KL(policy || reference) from a token that the policy sampled; x = log(p_ref / p_policy) of that token.

    k1 = -x (unbiased), k2 = x^2 / 2 (biased, low variance), k3 = e^x - 1 - x (unbiased, never negative).
    Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html). As a loss on those tokens, the expected
    gradient of k1 is 0, that of k2 is the gradient of KL(policy || reference), that of k3 the gradient of KL(reference || policy).
    Any one shape; differentiable in both arguments; padding is the caller's to select away.
    """
    assert logprobs.shape == ref_logprobs.shape, f"logprobs {tuple(logprobs.shape)}, ref_logprobs {tuple(ref_logprobs.shape)}"
    x = ref_logprobs - logprobs
    if estimator == "k1":
        return -x
    if estimator == "k2":
        return 0.5 * x**2
    if estimator == "k3":
        x = x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return torch.expm1(x) - x  # expm1: e^x - 1 alone loses every digit for the small x that matter
    raise ValueError(f"unknown KL estimator {estimator!r}; allowed: k1, k2, k3")


def mean_abs_difference(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """(1/n) sum_i |x_i - y_i| over i with mask_i, 0 when n = 0: for |rollout - old logprob|. Scalar, no gradient."""
    return masked_mean((x - y).abs(), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R), population variances over the tokens with mask: 1 is perfect, 0 no better than a constant.

    Where R does not vary (or there is no token) nothing can be explained: 0. Scalar, no gradient.
    """
    check_shapes(mask, values=values, returns=returns)
    returns = returns.double()
    mean, var = masked_mean_var(returns, mask)
    _, residual_var = masked_mean_var(returns - values.double(), mask)
    varies = var > 1e-12 * (1 + mean**2)  # below that it is the rounding error of float32 rewards
    return torch.where(varies, 1 - residual_var / torch.where(varies, var, 1.0), 0.0).to(values.dtype)
