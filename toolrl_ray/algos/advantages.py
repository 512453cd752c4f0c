"""Rewards per token and estimators of advantage.

Letters: B rows (episodes); A trained tokens of the longest row; t = 0..n-1 runs over the n trained tokens of one row.
Tensors are [B, A], right-padded; mask bool [B, A]. A tool's tokens are not in these rows, so they neither discount nor carry
value. Padding may hold anything, NaN included; results are 0 there. Nothing here carries gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolrl_ray.algos.masked import check_shapes, masked_whiten


def _check_rows(mask: Tensor, **tensors: Tensor) -> None:
    check_shapes(mask, **tensors)
    assert mask.dim() == 2, f"expected rows [B, A], got shape {tuple(mask.shape)}"
    assert bool((mask[:, 1:] <= mask[:, :-1]).all()), "mask must be right-padded: no True after a False in a row"


def _discounted_sums(x: Tensor, discount: float) -> Tensor:
    """y_t = sum_{k=t}^{A-1} discount^{k-t} x_k, by the recursion y_t = x_t + discount y_{t+1} with y_A = 0."""
    result = torch.zeros_like(x)
    carry = x.new_zeros(x.shape[0])
    for t in reversed(range(x.shape[1])):
        carry = x[:, t] + discount * carry
        result[:, t] = carry
    return result


@torch.no_grad()
def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef kl_t + [t = n-1] score, for t = 0..n-1; a row without trained tokens is all 0.

    Ziegler et al. 2019 (arXiv 1909.08593) eq. 2, R = r - beta log(pi/rho), its sum over tokens taken apart: sum_t r_t = R.
    scores [B]: one per episode. kl [B, A]: per-token estimate against the reference. Returns [B, A].
    """
    _check_rows(mask, kl=kl)
    assert scores.shape == mask.shape[:1], f"scores has shape {tuple(scores.shape)}, mask has {tuple(mask.shape)}"
    is_last = torch.arange(mask.shape[1], device=mask.device) == mask.sum(1, keepdim=True) - 1  # nowhere in a row without tokens
    return torch.where(mask, -kl_coef * kl, 0.0) + torch.where(is_last, scores[:, None], 0.0)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """A_t = sum_{l=0}^{n-1-t} (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, V_n = 0; returns R_t = A_t + V_t.

    Schulman et al. 2015 (arXiv 1506.02438) eq. 16; the sum ends with the episode, so nothing is bootstrapped after it.
    lambda = 0 gives delta_t (eq. 17), lambda = 1 gives sum_{k=t}^{n-1} gamma^{k-t} r_k - V_t (eq. 18).
    values [B, A]: V_t is the value before token t is sampled. Returns (advantages [B, A], returns [B, A]).
    """
    _check_rows(mask, rewards=rewards, values=values)
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1)) if values.shape[1] else values
    advantages = _discounted_sums(rewards + gamma * next_values - values, gamma * gae_lambda)
    return advantages, advantages + values


@torch.no_grad()
def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = sum_{k=t}^{n-1} gamma^{k-t} r_k, for t = 0..n-1 (Sutton and Barto 2018, eq. 3.11). Returns [B, A]."""
    _check_rows(mask, rewards=rewards)
    return _discounted_sums(torch.where(mask, rewards, 0.0), gamma)


def _group_sums(x: Tensor, group_index: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of x over each row's group, size of each row's group), both [B]; x is float64."""
    groups, of_row = torch.unique(group_index, return_inverse=True)
    sums = x.new_zeros(len(groups)).index_add_(0, of_row, x)
    sizes = x.new_zeros(len(groups)).index_add_(0, of_row, torch.ones_like(x))
    return sums[of_row], sizes[of_row]


def _check_groups(scores: Tensor, group_index: Tensor) -> None:
    assert scores.dim() == 1 and scores.shape == group_index.shape, (
        f"expected two tensors [B], got {tuple(scores.shape)} and {tuple(group_index.shape)}"
    )


@torch.no_grad()
def grpo(scores: Tensor, group_index: Tensor) -> Tensor:
    """A_i = (s_i - mean_g) / (std_g + 1e-6), mean and std over the rows j of i's group g; a group of one gives 0.

    Shao et al. 2024 (arXiv 2402.03300) section 4.1.2; std with n-1, which the paper leaves open.
    scores [B]; group_index long [B], any labels; a group's rows must all be in the call. Returns [B].
    """
    _check_groups(scores, group_index)
    s = scores.double()  # in float32 the rounding error of a group of equal scores would be blown up by the division
    sums, sizes = _group_sums(s, group_index)
    centred = s - sums / sizes
    squares, _ = _group_sums(centred**2, group_index)
    return (centred / ((squares / (sizes - 1).clamp(min=1)).sqrt() + 1e-6)).to(scores.dtype)


@torch.no_grad()
def rloo(scores: Tensor, group_index: Tensor) -> Tensor:
    """A_i = s_i - (1/(n-1)) sum_{j != i} s_j over the n rows j of i's group; a group of one gives 0.

    Kool et al. 2019 ("Buy 4 REINFORCE samples, get a baseline for free"); Ahmadian et al. 2024 (arXiv 2402.14740), RLOO.
    Equal to n/(n-1) (s_i - mean_g). scores [B]; group_index long [B], as for `grpo`. Returns [B].
    """
    _check_groups(scores, group_index)
    s = scores.double()
    sums, sizes = _group_sums(s, group_index)
    return torch.where(sizes > 1, s - (sums - s) / (sizes - 1).clamp(min=1), 0.0).to(scores.dtype)


def reinforce_pp(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """A_t = (G_t - mean) / std, G_t the return to go, mean and std over every trained token of the global batch.

    Hu et al. 2025 (arXiv 2501.03262), global advantage normalisation; with gamma = 1 and the KL penalty in the rewards,
    G_t = score - kl_coef sum_{k=t}^{n-1} kl_k. Returns [B, A].
    """
    return masked_whiten(returns_to_go(rewards, mask, gamma), mask)


@torch.no_grad()
def broadcast_rows(row_advantages: Tensor, mask: Tensor) -> Tensor:
    """A_{i,t} = A_i on every trained token t = 0..n_i-1 of row i. [B] and bool [B, A] to [B, A]."""
    assert mask.dim() == 2 and row_advantages.shape == mask.shape[:1], (
        f"row_advantages has shape {tuple(row_advantages.shape)}, mask has {tuple(mask.shape)}"
    )
    return torch.where(mask, row_advantages[:, None], 0.0)
