"""Controllers of the KL penalty's coefficient. Plain Python; what they hold goes into the checkpoint."""

from __future__ import annotations

import math

MAX_ERROR = 0.2


class FixedKLController:
    """beta_{k+1} = beta_k."""

    def __init__(self, kl_coef: float):
        self.value = kl_coef

    def update(self, current_kl: float, num_episodes: int) -> None:
        """Nothing to adapt; takes what `AdaptiveKLController.update` takes."""

    def state_dict(self) -> dict[str, float]:
        return {"kl_coef": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["kl_coef"]


class AdaptiveKLController(FixedKLController):
    """beta_{k+1} = beta_k (1 + K e_k), e_k = clip((KL_k - target) / target, -0.2, 0.2), K = num_episodes / horizon.

    Ziegler et al. 2019 (arXiv 1909.08593) section 2.2 (a log-space proportional controller; K = 0.1 there, made to depend on the
    episodes seen so that its pace does not depend on the batch). K is at most 1: one update changes beta by at most a fifth,
    and beta stays positive. kl_coef 0 stays 0. target: nats per episode. horizon: episodes.
    """

    def __init__(self, kl_coef: float, target: float, horizon: float):
        super().__init__(kl_coef)
        self.target = target
        self.horizon = horizon

    def update(self, current_kl: float, num_episodes: int) -> None:
        """current_kl: mean over the episodes of the sum of per-token KL, in nats. Raises ValueError when it is NaN."""
        if math.isnan(current_kl):
            raise ValueError(f"KL controller: current_kl is {current_kl}, expected nats per episode; the logprobs it came from hold NaN")
        error = min(max((current_kl - self.target) / self.target, -MAX_ERROR), MAX_ERROR)
        self.value *= 1 + min(num_episodes / self.horizon, 1.0) * error
