"""Ray: connect, create the actors of a run where the plan says, and take them down again."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any

from toolrl_ray.config import LearnerConfig, RolloutConfig, RunConfig
from toolrl_ray.driver import Parts
from toolrl_ray.errors import UserError
from toolrl_ray.placement import check, plan, reserve
from toolrl_ray.weights.sync import WeightSync, select_backend
from tools_service.serve_handles import ReplicaStats

log = logging.getLogger(__name__)
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20
CONNECT_S = 10.0


def connect(config: RunConfig, say: Callable[[str], None], *, learner: bool = True, verbose: bool = False) -> None:
    """Connect to the cluster that RAY_ADDRESS names (a submitted job has it), or start a local one.

    Raises PlacementError when it cannot hold the plan, and UserError when there is no cluster at RAY_ADDRESS.
    """
    reach(os.environ.get("RAY_ADDRESS"), say, verbose=verbose)
    import ray

    check(plan(config, learner=learner), ray.cluster_resources(), [n["Resources"] for n in ray.nodes() if n["Alive"]])


def reach(address: str | None, say: Callable[[str], None], *, verbose: bool = False) -> None:
    """Connect to the cluster at `address`, or start a local one where it is None. Raises UserError when there is none at `address`."""
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")  # read by Serve's controller, which may inherit it from here
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "1" if verbose else "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    if address:
        say(f"connecting to the Ray cluster at {address}")
        options["address"] = address
        _check_reachable(address)
    else:
        say("starting a local Ray")
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": LOCAL_OBJECT_STORE_BYTES}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"no Ray cluster answers at {address!r}" if address else "a local Ray does not start"
        raise UserError(f"{where}: {' '.join(str(error).split())[:200]}") from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own handler in the place of the caller's


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes, and talks meanwhile."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"no Ray cluster answers at {address!r}: {error.strerror or error}") from None


def ray_parts(config: RunConfig, policy_dir: str, say: Callable[[str], None], *, learner: bool = True) -> Parts:
    """The parts of a run on the cluster that `connect` reached, all started and ready for work."""
    from toolrl_ray.learner.group import LearnerGroup
    from toolrl_ray.rollout.pool import RolloutPool
    from toolrl_ray.tools.serve_client import join_tools, start_tools, stop_tools

    group, rollout_bundles, learner_bundles = reserve(config, say, learner=learner)
    app_name = config.tools.app or f"toolrl-{uuid.uuid4().hex[:8]}"
    rollout_actors, learners = _actors(config, policy_dir, app_name, group, rollout_bundles, learner_bundles)

    def close() -> None:
        import ray

        # The tools first: Serve is detached and would outlive this job, the actors would not.
        for what, undo in [
            *([] if config.tools.app else [("the tools", lambda: stop_tools(app_name, wait=False))]),
            *((f"actor {actor}", lambda actor=actor: ray.kill(actor)) for actor in [*rollout_actors, *learners]),
            ("the placement group", lambda: ray.util.remove_placement_group(group)),
        ]:
            try:
                undo()
            except Exception:
                log.exception("%s could not be taken down", what)

    weights: Any = None
    pool = RolloutPool(
        config,
        rollout_actors,
        readmit=lambda: weights.readmit() if weights else None,
        service_stats=ReplicaStats(app_name, config.tools.names),
    )
    learner_group = LearnerGroup(config, learners) if learner else None
    try:
        say(f"starting {len(rollout_actors)} x {config.rollout.engine}, {len(learners)} x learner, tools: {', '.join(config.tools.names)}")
        jobs: list[Callable[[], Any]] = [pool.start, lambda: (join_tools if config.tools.app else start_tools)(config.tools, app_name)]
        _all_at_once(jobs + ([learner_group.start] if learner_group else []))
        if learner_group:
            weights = WeightSync(config, pool, rollout_actors, learners)
            weights.connect()
    except BaseException:
        close()
        raise
    return Parts(pool, learner_group, weights, close)


def _actors(
    config: RunConfig, policy_dir: str, app_name: str, group: Any, rollout_bundles: list[int], learner_bundles: list[int]
) -> tuple[list[Any], list[Any]]:
    import ray

    from toolrl_ray.learner.actor import LearnerActor
    from toolrl_ray.rollout.actor import RolloutActor

    rollout_options = {"max_restarts": -1, "max_concurrency": 1000}
    rollout_class, learner_class = ray.remote(RolloutActor), ray.remote(LearnerActor)
    rollout_actors = [
        rollout_class.options(**_where(group, bundle, config.rollout), **rollout_options).remote(
            config, policy_dir, select_backend(config), app_name
        )
        for bundle in rollout_bundles
    ]
    learners = [
        learner_class.options(**_where(group, bundle, config.learner)).remote(config, policy_dir, rank, len(learner_bundles))
        for rank, bundle in enumerate(learner_bundles)
    ]
    return rollout_actors, learners


def _where(group: Any, bundle: int, share: RolloutConfig | LearnerConfig) -> dict[str, Any]:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)
    return {"num_cpus": share.num_cpus, "num_gpus": share.num_gpus, "scheduling_strategy": strategy}


def _all_at_once(jobs: list[Callable[[], Any]]) -> None:
    """Run the jobs in threads; the first failure is raised at once. Each job has a deadline of its own.

    The threads are daemons: after a failure or Ctrl-C one may wait for a cluster that is gone, and must not hold up the exit.
    """
    futures: list[Future[Any]] = [Future() for _ in jobs]

    def run(job: Callable[[], Any], future: Future[Any]) -> None:
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)

    for job, future in zip(jobs, futures, strict=True):
        threading.Thread(target=run, args=(job, future), daemon=True).start()
    for future in wait(futures, return_when=FIRST_EXCEPTION).done:
        future.result(timeout=0)


def disconnect() -> None:
    import ray

    ray.shutdown()
