"""Statistics over trained tokens only.

Letters: B rows, A trained tokens of the longest row. x [B, A] or any other shape; mask bool of the same shape, True = a real
trained token. What stands at masked positions (NaN included) never matters and gets gradient exactly 0: masks select with
`where` and never multiply. Sums are taken in float64, so that the result does not depend on the order of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_shapes(mask: Tensor, **tensors: Tensor) -> None:
    """Assert that every tensor has the mask's shape and that the mask is boolean."""
    assert mask.dtype is torch.bool, f"mask must be bool, got {mask.dtype}"
    for name, x in tensors.items():
        assert x.shape == mask.shape, f"{name} has shape {tuple(x.shape)}, mask has {tuple(mask.shape)}"


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """sum_i x_i over i with mask_i; 0 when there is none. Scalar, differentiable."""
    check_shapes(mask, x=x)
    return torch.where(mask, x, 0.0).sum()


@torch.no_grad()
def masked_mean_var(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """mean = (1/n) sum_i x_i and var = (1/n) sum_i (x_i - mean)^2 over i with mask_i; both 0 when n = 0.

    float64 scalars without gradient. Two passes (no cancellation); the population variance, so that n = 1 gives 0.
    """
    check_shapes(mask, x=x)
    x = x.double()
    count = mask.sum().clamp(min=1)
    mean = masked_sum(x, mask) / count
    return mean, masked_sum((x - mean) ** 2, mask) / count


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(1/n) sum_i x_i over i with mask_i; 0 when n = 0. Scalar of x's dtype, without gradient."""
    return masked_mean_var(x, mask)[0].to(x.dtype)


@torch.no_grad()
def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x_i - mean) / sqrt(var + 1e-8) where mask_i, with mean and var over all such i; 0 elsewhere. x's shape and dtype.

    A single token, or equal tokens, become 0.
    """
    mean, var = masked_mean_var(x, mask)
    return torch.where(mask, (x.double() - mean) / (var + 1e-8).sqrt(), 0.0).to(x.dtype)
