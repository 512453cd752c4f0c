"""Muon in the parameters' own dtype, with matrices of one shape taken together.

torch.optim.Muon does its matrix products in bfloat16, which a CPU without instructions for it emulates: of the calculator's warm start
that was half the time (175 ms of a step, 9 ms here, one thread of an AVX2 machine).
"""

from __future__ import annotations

from collections import defaultdict

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024
NUM_ITERATIONS = 5
EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal; for matrices alone. As torch.optim.Muon without weight decay."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for (rows, columns), parameters in alike.items():
                update = orthogonalised(torch.stack([self._nesterov(p, group["momentum"]) for p in parameters]))
                lr = group["lr"] * max(1.0, rows / columns) ** 0.5
                for parameter, matrix in zip(parameters, update, strict=True):
                    parameter.sub_(matrix, alpha=lr)

    def _nesterov(self, parameter: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        average = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        average.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """matrices [N, R, C] with their singular values moved to about 1 (0.7 to 1.2), by Newton-Schulz iterations."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
