"""Ray: connect, create the actors of a run where the plan says, and take them down again."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from toolrl_ray.config import RunConfig
from toolrl_ray.driver import Parts
from toolrl_ray.placement import check, plan, reserve
from toolrl_ray.weights.sync import WeightSync, select_backend

LOCAL_OBJECT_STORE_BYTES = 512 * 2**20


def connect(config: RunConfig, say: Callable[[str], None], *, learner: bool = True, verbose: bool = False) -> bool:
    """Connect to the cluster that RAY_ADDRESS names (a submitted job has it), or start a local one.

    Returns whether the cluster is local and ours. Raises PlacementError when it cannot hold the plan.
    """
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")  # read by Serve's controller, which may inherit it from here
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "1" if verbose else "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    address = os.environ.get("RAY_ADDRESS")
    level = logging.INFO if verbose else logging.ERROR
    if address:
        say(f"connecting to the Ray cluster at {address}")
        ray.init(address=address, log_to_driver=verbose, logging_level=level)
    else:
        say("starting a local Ray")
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            log_to_driver=verbose,
            logging_level=level,
        )
    check(plan(config, learner=learner), ray.cluster_resources(), [n["Resources"] for n in ray.nodes() if n["Alive"]])
    return not address


def ray_parts(config: RunConfig, policy_dir: str, say: Callable[[str], None], *, learner: bool = True) -> Parts:
    """The parts of a run on the cluster that `connect` reached, all started and ready for work."""
    import ray

    from toolrl_ray.learner.actor import LearnerActor
    from toolrl_ray.learner.group import LearnerGroup
    from toolrl_ray.rollout.actor import RolloutActor
    from toolrl_ray.rollout.pool import RolloutPool
    from toolrl_ray.tools.serve_client import start_tools, stop_tools

    group, rollout_bundles, learner_bundles = reserve(config, say, learner=learner)
    app_name = f"toolrl-{uuid.uuid4().hex[:8]}"
    backend = select_backend(config)
    rollout_class = ray.remote(RolloutActor)
    rollout_actors = [
        rollout_class.options(
            **_options(group, bundle, config.rollout.num_cpus, config.rollout.num_gpus), max_restarts=-1, max_concurrency=1000
        ).remote(config, policy_dir, backend, app_name)
        for bundle in rollout_bundles
    ]
    learner_class = ray.remote(LearnerActor)
    learners = [
        learner_class.options(**_options(group, bundle, config.learner.num_cpus, config.learner.num_gpus)).remote(
            config, policy_dir, rank, len(learner_bundles)
        )
        for rank, bundle in enumerate(learner_bundles)
    ]

    def close() -> None:
        for actor in [*rollout_actors, *learners]:
            ray.kill(actor)
        stop_tools(app_name)
        ray.util.remove_placement_group(group)

    weights: Any = None
    pool = RolloutPool(config, rollout_actors, readmit=lambda: weights.readmit() if weights else None)
    learner_group = LearnerGroup(config, learners) if learner else None
    try:
        say(
            f"starting {len(rollout_actors)} RolloutActor(s) on {config.rollout.engine}, {len(learners)} LearnerActor(s), the tools service"
        )
        with ThreadPoolExecutor() as threads:
            jobs = [threads.submit(pool.start), threads.submit(start_tools, config.tools, app_name)]
            if learner_group:
                jobs.append(threads.submit(learner_group.start))
            for job in jobs:
                job.result(timeout=config.rollout.start_timeout_s + config.learner.start_timeout_s)
        if learner_group:
            weights = WeightSync(config, pool, rollout_actors, learners)
            weights.connect()
    except BaseException:
        close()
        raise
    return Parts(pool, learner_group, weights, close)


def disconnect() -> None:
    import ray

    ray.shutdown()


def _options(group: Any, bundle: int, num_cpus: float, num_gpus: float) -> dict[str, Any]:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)
    return {"num_cpus": num_cpus, "num_gpus": num_gpus, "scheduling_strategy": strategy}
