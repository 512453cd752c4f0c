"""Which resources a run needs, whether the cluster can hold them, and where the actors go.

The check is made before anything is created, so that nothing waits in PENDING without a word.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from toolrl_ray.config import RunConfig
from toolrl_ray.errors import PlacementError
from toolrl_ray.weights.sync import shares_gpu

WAIT_FOR_FREE_S = 60.0


@dataclass(frozen=True)
class Share:
    """`count` actors of one kind, each with so many CPUs and GPUs. section: where the recipe asks for them."""

    section: str
    count: int
    num_cpus: float
    num_gpus: float = 0.0


def plan(config: RunConfig, *, learner: bool = True) -> list[Share]:
    """The shares of a run by name; without the learner for an evaluation."""
    rollout, tools = config.rollout, config.tools
    shares = [Share("rollout", rollout.num_actors, rollout.num_cpus, rollout.num_gpus)]
    if learner:
        shares.append(Share("learner", config.learner.num_ranks, config.learner.num_cpus, config.learner.num_gpus))
    if tools.app is None:
        pools = [tools.pool(name) for name in tools.names]
        shares += [Share("tools", pool.min_replicas, pool.num_cpus) for pool in pools]
    return shares


def missing(shares: list[Share], resources: dict[str, float]) -> list[str]:
    """One entry per resource that the cluster lacks, with what asks for it; empty when the plan fits in total."""
    lines = []
    for key, attribute in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        asked = Counter[str]()
        for share in shares:
            asked[share.section] += share.count * getattr(share, attribute)
        need, have = sum(asked.values()), resources.get(key, 0.0)
        if need > have + 1e-6:
            parts = ", ".join(f"{section} {amount:g}" for section, amount in asked.items() if amount)
            lines.append(f"{need:g} {key}s are needed ({parts}) and {have:g} are there")
    return lines


def check(shares: list[Share], resources: dict[str, float], nodes: list[dict[str, float]]) -> None:
    """Raises PlacementError when the cluster cannot ever hold the plan: in total, or because no node holds one actor."""
    lines = missing(shares, resources)
    for share in shares:
        wants = {"CPU": share.num_cpus, "GPU": share.num_gpus}
        if not any(all(node.get(key, 0.0) + 1e-6 >= amount for key, amount in wants.items()) for node in nodes):
            lines.append(f"no node holds one of {share.section} ({share.num_cpus:g} CPUs, {share.num_gpus:g} GPUs)")
    if lines:
        raise PlacementError(
            f"this cluster cannot hold the plan: {'; '.join(lines)}. Ask for less (rollout.num_actors, rollout.num_cpus, rollout.num_gpus, "
            "learner.num_ranks, learner.num_cpus, learner.num_gpus, tools.num_replicas, tools.num_cpus, tools.pools) or add nodes"
        )


def bundles(config: RunConfig, *, learner: bool = True) -> tuple[list[dict[str, float]], list[int], list[int]]:
    """Placement-group bundles, and the bundle index of each RolloutActor and LearnerActor.

    A learner and an engine that share a GPU share a bundle, because only a bundle is sure to be one GPU.
    """
    rollout = {"CPU": config.rollout.num_cpus, "GPU": config.rollout.num_gpus}
    rank = {"CPU": config.learner.num_cpus, "GPU": config.learner.num_gpus}
    if learner and shares_gpu(config):
        return [{key: rollout[key] + rank[key] for key in rollout}], [0], [0]
    num_ranks = config.learner.num_ranks if learner else 0
    all_bundles = [rollout] * config.rollout.num_actors + [rank] * num_ranks
    indices = list(range(len(all_bundles)))
    used = [{key: amount for key, amount in bundle.items() if amount} for bundle in all_bundles]
    return used, indices[: config.rollout.num_actors], indices[config.rollout.num_actors :]


def reserve(config: RunConfig, say: Callable[[str], None], *, learner: bool = True) -> tuple[Any, list[int], list[int]]:
    """Reserve the plan on the cluster that Ray is connected to; returns (placement group, rollout bundles, learner bundles).

    `check` has found the cluster large enough. Raises PlacementError after WAIT_FOR_FREE_S when others hold what is needed.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    shares = plan(config, learner=learner)
    wanted, rollout_bundles, learner_bundles = bundles(config, learner=learner)
    group = placement_group(wanted, strategy="PACK")
    started = time.monotonic()
    while not group.wait(timeout_seconds=5):
        lack = "; ".join(missing(shares, ray.available_resources())) or "free resources are scattered over nodes"
        if time.monotonic() - started > WAIT_FOR_FREE_S:
            remove_placement_group(group)
            raise PlacementError(f"the cluster is busy: of what is free, {lack}. Stop other jobs, ask for less, or add nodes")
        say(f"waiting for the cluster: of what is free, {lack}")
    return group, rollout_bundles, learner_bundles
