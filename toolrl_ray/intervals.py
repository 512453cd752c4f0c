"""pass@k, and how sure a number about a few hundred tasks is: 95 % intervals. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that at least one of k samples of a task is right, without bias from num_samples of which num_correct are:
    1 - C(n-c, k) / C(n, k), Chen et al. 2021 (arXiv:2107.03374), equation 1.

    Raises ValueError unless 1 <= k <= num_samples and 0 <= num_correct <= num_samples.
    """
    if not (1 <= k <= num_samples and 0 <= num_correct <= num_samples):
        raise ValueError(f"pass@{k} cannot be told from {num_samples} samples of which {num_correct} are right")
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def wilson_interval(num_successes: int, num_trials: int) -> tuple[float, float]:
    """95 % interval of a share: Wilson 1927, "Probable inference", JASA 22. It does not shrink to a point at 0 and 1."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, spread = num_successes / num_trials, z * z / num_trials
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * sqrt(share * (1 - share) / num_trials + spread / (4 * num_trials))
    return middle - half if num_successes else 0.0, middle + half if num_successes < num_trials else 1.0  # exact at the ends


def bootstrap_interval(values: Sequence[float], seed: int = 0, *, bounds: tuple[float, float] | None = None) -> tuple[float, float]:
    """95 % percentile interval of the mean of one value per task, over tasks drawn with replacement.

    With differences of two numbers of one task as values, this is the paired bootstrap. Values that are all equal give a point, unless
    bounds say how low and how high a value can be: then the interval also covers that of the same tasks with one more at each bound. So
    near a bound, where the tasks at hand may lack the few that differ, it still holds the mean in 95 % of cases. (Pseudo-observations
    at both ends: Agresti and Coull 1998, "Approximate is better than 'exact'", The American Statistician 52.)
    """
    low, high = _percentiles(values, seed)
    if bounds:
        wider = _percentiles([*values, *bounds], seed)
        low, high = min(low, wider[0]), max(high, wider[1])
    return low, high


def _percentiles(values: Sequence[float], seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    column = np.asarray(values, dtype=np.float64)
    means = [column[rng.integers(len(column), size=len(column))].mean() for _ in range(NUM_RESAMPLES)]
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
