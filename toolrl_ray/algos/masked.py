"""Statistics over trained tokens only, optionally over all data-parallel ranks.

Letters: B rows, A trained tokens of the longest row. x [B, A] or any other shape; mask bool of the same shape, True = a real
trained token. What stands at masked positions (NaN included) never matters and gets gradient exactly 0: masks select with
`where` and never multiply. `all_sum` sums a tensor over ranks; it may work in place, and no gradient goes through it.
Sums over ranks are taken in float64, so that the result does not depend on how the rows were dealt out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AllSum = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    return x


def check_shapes(mask: Tensor, **tensors: Tensor) -> None:
    """Assert that every tensor has the mask's shape and that the mask is boolean."""
    assert mask.dtype is torch.bool, f"mask must be bool, got {mask.dtype}"
    for name, x in tensors.items():
        assert x.shape == mask.shape, f"{name} has shape {tuple(x.shape)}, mask has {tuple(mask.shape)}"


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """sum_i x_i over i with mask_i; 0 when there is none. Scalar, differentiable, of this rank alone."""
    check_shapes(mask, x=x)
    return torch.where(mask, x, 0.0).sum()


@torch.no_grad()
def masked_mean_var(x: Tensor, mask: Tensor, all_sum: AllSum = identity) -> tuple[Tensor, Tensor]:
    """mean = (1/n) sum_i x_i and var = (1/n) sum_i (x_i - mean)^2 over all ranks' i with mask_i; both 0 when n = 0.

    float64 scalars without gradient. Two passes (no cancellation); the population variance, so that n = 1 gives 0.
    """
    check_shapes(mask, x=x)
    x = x.double()
    total, count = all_sum(torch.stack([masked_sum(x, mask), mask.sum().double()])).unbind()
    count = count.clamp(min=1)
    mean = total / count
    return mean, all_sum(masked_sum((x - mean) ** 2, mask)) / count


def masked_mean(x: Tensor, mask: Tensor, all_sum: AllSum = identity) -> Tensor:
    """(1/n) sum_i x_i over all ranks' i with mask_i; 0 when n = 0. Scalar of x's dtype, without gradient."""
    return masked_mean_var(x, mask, all_sum)[0].to(x.dtype)


@torch.no_grad()
def masked_whiten(x: Tensor, mask: Tensor, all_sum: AllSum = identity, eps: float = 1e-8) -> Tensor:
    """(x_i - mean) / sqrt(var + eps) where mask_i, with mean and var over all ranks; 0 elsewhere. x's shape and dtype.

    A single token, or equal tokens, become 0.
    """
    mean, var = masked_mean_var(x, mask, all_sum)
    return torch.where(mask, (x.double() - mean) / (var + eps).sqrt(), 0.0).to(x.dtype)
