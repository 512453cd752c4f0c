"""The device that a part of the run computes on in its own process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolrl_ray.errors import PlacementError

if TYPE_CHECKING:
    import torch


def torch_device(section: str, num_gpus: float) -> torch.device:
    """Of `section` of the configuration, rollout or learner. Raises PlacementError when it asks for a GPU and none is seen."""
    import torch

    if num_gpus == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise PlacementError(f"{section}.num_gpus={num_gpus:g}, but PyTorch sees no GPU here; set {section}.num_gpus=0 to use the CPU")
    return torch.device("cuda", 0)
