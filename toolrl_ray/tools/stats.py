"""Counts of tool calls that can be added up over processes, and the metrics that they give for a step. Pure.

Latencies are counted in buckets that grow by a factor, so that percentiles of many clients can be had from sums: a percentile is
right within BUCKET_FACTOR.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from tools_service.protocol import ToolStatus

MIN_LATENCY_S = 1e-4  # upper end of the first bucket
BUCKET_FACTOR = 1.1
PERCENTILES = (50, 95)


def count_call(counts: Counter[str], tool: str, status: ToolStatus, latency_s: float) -> None:
    """Adds one call that has ended."""
    counts["calls"] += 1
    counts[f"status/{status}"] += 1
    counts[f"{tool}/calls"] += 1
    counts[f"{tool}/status/{status}"] += 1
    bucket = max(0, math.ceil(math.log(max(latency_s, MIN_LATENCY_S) / MIN_LATENCY_S, BUCKET_FACTOR)))
    counts[f"{tool}/latency_bucket/{bucket}"] += 1


class ClientCounts:
    """Sums over the clients of all processes that there have been, which never fall: one that ended or does not answer counts as it last
    answered, and one in its place starts from 0 beside it."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, int], Mapping[str, float]] = {}

    def answered(self, actor: int, pid: int, counts: Mapping[str, float]) -> None:
        """counts: of that process of the actor, since its start."""
        self._last[actor, pid] = counts

    def total(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for counts in self._last.values():
            total.update(counts)
        return dict(total)


def tool_metrics(stats: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a step from the counts after it and before it, which never fall: `tools/client/*`, of all tools, and `tools/NAME/*` in the
    step, those that are known from before alone too; `tools/NAME/service/*` as they are."""
    counts = {key: before.get(key, 0) for key in (*before, *stats) if "/service/" not in key}
    step = {key: stats.get(key, known) - known for key, known in counts.items()}
    metrics = {f"tools/client/{key}": value for key, value in step.items() if "/" not in key or key.startswith("status/")}
    metrics |= {f"tools/{key}": value for key, value in stats.items() if "/service/" in key}
    for tool in sorted({key.partition("/")[0] for key in step if "/" in key} - {"status"}):
        own = {key.removeprefix(f"{tool}/"): value for key, value in step.items() if key.startswith(f"{tool}/")}
        buckets = {int(key.rpartition("/")[2]): value for key, value in own.items() if key.startswith("latency_bucket/")}
        metrics |= {f"tools/{tool}/{key}": value for key, value in own.items() if key in ("calls", "retries") or key.startswith("status/")}
        if any(buckets.values()):
            metrics |= {f"tools/{tool}/latency_s_p{percent}": _percentile_s(buckets, percent) for percent in PERCENTILES}
        if looked_up := own.get("cache_hits", 0) + own.get("cache_misses", 0):
            metrics[f"tools/{tool}/cache_hit_rate"] = own.get("cache_hits", 0) / looked_up
    return metrics


def isolations(stats: Mapping[str, float]) -> dict[str, str]:
    """What holds the code of each tool that runs untrusted code, by the tool's name: as its replicas found by attacking themselves."""
    parts = [key.partition("/service/isolation/") for key in sorted(stats)]
    tiers: dict[str, list[str]] = {}
    for tool, found, tier in parts:
        if found:
            tiers.setdefault(tool, []).append(tier)
    return {tool: ", ".join(names) for tool, names in tiers.items()}


def _percentile_s(buckets: Mapping[int, float], percent: int) -> float:
    """The upper end of the bucket that holds the percentile."""
    wanted, seen = sum(buckets.values()) * percent / 100, 0.0
    for bucket in sorted(buckets):
        seen += buckets[bucket]
        if seen >= wanted:
            break
    return MIN_LATENCY_S * BUCKET_FACTOR**bucket
