"""Ray: connect, create the actors of a run where the plan says, and take them down again."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from pathlib import Path
from typing import Any

from toolrl_ray.config import LearnerConfig, RolloutConfig, RunConfig
from toolrl_ray.errors import PlacementError, UserError
from toolrl_ray.local_ray import cluster_address, own_sigterm, start_local
from toolrl_ray.parts import Parts
from toolrl_ray.placement import check, plan, reserve
from toolrl_ray.run_dir import write_whole
from toolrl_ray.weights.sync import WeightSync, select_backend, shares_gpu
from tools_service.serve_handles import ReplicaStats

log = logging.getLogger(__name__)
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20
SEED_STRIDE = 1_000_003  # between the engines of one run: further apart than the seeds of a study
CONNECT_S = 10.0
REMOVE_S, REMOVE_POLL_S, END_S = 30.0, 0.2, 1.0
TOOLS_NOTE = ".tools"  # in a run folder: the name of the run's tools on a cluster that it does not own
ACTORS_CLOSE_S = 1.0
CLOSE_S, CLOSE_LOCAL_S = 60.0, 5.0  # for each of a run's parts to be taken down


def connect(config: RunConfig, say: Callable[[str], None], *, learner: bool = True, verbose: bool = False) -> None:
    """Connect to the cluster that RAY_ADDRESS names (a submitted job has it), or start a local one.

    Raises PlacementError when it cannot hold the plan, and UserError when there is no cluster at RAY_ADDRESS.
    """
    reach(cluster_address(), say, verbose=verbose)
    import ray

    check(plan(config, learner=learner), ray.cluster_resources(), [n["Resources"] for n in ray.nodes() if n["Alive"]])


def reach(address: str | None, say: Callable[[str], None], *, verbose: bool = False) -> None:
    """Connect to the cluster at `address`, or start a local one where it is None. Raises UserError when there is none at `address`."""
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")  # read by Serve's controller, which may inherit it from here
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "1" if verbose else "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    from ray.exceptions import AuthenticationError

    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    if not address:
        say("starting a local Ray")
        start_local(say, object_store_memory=LOCAL_OBJECT_STORE_BYTES, **options)
    else:
        say(f"connecting to the Ray cluster at {address}")
        check_reachable(address)
        try:
            with own_sigterm():
                ray.init(address=address, **options)
        except AuthenticationError:
            raise UserError(f"the cluster at {address} wants a token: export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN=...") from None
        except Exception as error:  # of no class of its own
            raise UserError(f"no Ray cluster answers at {address!r}: {' '.join(str(error).split())[:200]}") from None


def check_reachable(address: str) -> None:
    """Ray itself tries for minutes, and talks meanwhile. And it shows its token only to a cluster that it has found by itself, where
    most clusters want one: here also to one that is named and asks for it."""
    host, _, port = address.rpartition(":")
    if not (host and "/" not in host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster answers at {address!r}: {error.strerror or error}") from None
    if "RAY_AUTH_MODE" not in os.environ and _wants_token(address):
        show_token()


def show_token() -> None:
    """Let Ray's clients in this process show their token, if Ray was imported before, too."""
    from ray._raylet import Config

    os.environ["RAY_AUTH_MODE"] = "token"
    Config.initialize("")  # it has read the environment before


def _wants_token(address: str) -> bool:
    import grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=CONNECT_S)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNAUTHENTICATED
    return False


def ray_parts(config: RunConfig, policy_dir: str, say: Callable[[str], None], *, learner: bool = True) -> Parts:
    """The parts of a run on the cluster that `connect` reached, all started and ready for work."""
    from toolrl_ray.learner.group import LearnerGroup
    from toolrl_ray.rollout.pool import RolloutPool
    from toolrl_ray.tools.serve_client import join_tools, start_tools

    app_name = config.tools.app or _own_app(config.run_dir if learner else None, say)
    group, rollout_bundles, learner_bundles = reserve(config, say, learner=learner)
    places = [_where(group, bundle, config.rollout) for bundle in rollout_bundles]
    rollout_actors = _rollout_actors(config, policy_dir, app_name, places)
    learner_group = LearnerGroup(config, lambda: _learners(config, policy_dir, group, learner_bundles)) if learner else None
    learners = learner_group.actors if learner_group else []
    tools_start: Future[Any] = Future()

    def close() -> None:
        import ray

        is_shared = cluster_address() is not None
        if weights:
            weights.close()
        undos = [("the engines' files", lambda: _close(rollout_actors))]
        undos += [(f"actor {actor}", lambda actor=actor: ray.kill(actor)) for actor in [*rollout_actors, *learners]]
        if is_shared:  # a Ray of one's own ends anyway, and all that runs on it
            undos.append(("the placement group", lambda: ray.util.remove_placement_group(group)))
            if not config.tools.app:  # first: Serve is detached and would outlive this job, the actors would not
                undos.insert(0, ("the tools", lambda: _remove_tools(app_name, tools_start, say)))
        for what, undo in undos:
            try:
                _within(CLOSE_S if is_shared else CLOSE_LOCAL_S, undo)
            except TimeoutError:
                log.warning("%s could not be taken down: Ray does not answer", what)
                if not is_shared:  # a scheduler's SIGTERM has reached Ray as it has this process: nobody will answer any more
                    return
            except Exception:
                log.exception("%s could not be taken down", what)

    weights: Any = None
    pool = RolloutPool(
        config,
        rollout_actors,
        readmit=lambda: weights.readmit() if weights else True,
        service_stats=ReplicaStats(app_name, config.tools.names),
    )
    try:
        counts = f"{config.rollout.num_actors} x {config.rollout.engine}, {len(learners)} x learner"
        say(f"starting {counts}, tools: {', '.join(config.tools.names)}")
        jobs = {tools_start: lambda: (join_tools if config.tools.app else start_tools)(config.tools, app_name), Future(): pool.start}
        _start(config, jobs, {Future(): learner_group.start} if learner_group else {})
        if learner_group:
            weights = WeightSync(config, pool, learners)
            weights.connect()
            if num_more := (config.rollout.max_actors or 0) - len(places):  # last: what is free now is free for them
                anywhere = {"num_cpus": config.rollout.num_cpus, "num_gpus": config.rollout.num_gpus}
                pool.expect(_rollout_actors(config, policy_dir, app_name, [anywhere] * num_more, len(places)))
    except BaseException:
        close()
        raise
    return Parts(pool, learner_group, weights, close)


def _close(rollout_actors: list[Any]) -> None:
    """Before they are killed; one that is starting or hangs is not waited for."""
    import ray

    ray.wait([actor.close.remote() for actor in rollout_actors], num_returns=len(rollout_actors), timeout=ACTORS_CLOSE_S)


def _own_app(run_dir: str | None, say: Callable[[str], None]) -> str:
    """A new name for the run's tools, noted in its folder. Tools that it left on the cluster when it was killed are removed: Serve's
    outlive whoever started them, and would hold what the run needs now."""
    from toolrl_ray.tools.serve_client import stop_tools
    from tools_service.serve_app import ServiceError

    name = f"toolrl-{uuid.uuid4().hex[:8]}"
    if run_dir and cluster_address():
        note = Path(run_dir) / TOOLS_NOTE
        if note.exists():
            say("removing the tools that the run had when it was interrupted, if they are still there")
            try:
                stop_tools(note.read_text().strip())
            except ServiceError as error:
                raise PlacementError(str(error)) from None
        write_whole(note, name + "\n")
    return name


def own_seed(config: RunConfig, index: int) -> RunConfig:
    """For the RolloutActor of that number. On GPUs engines of one seed could give two episodes of a group the same draws; on CPU every
    completion draws for itself, and the same in any engine."""
    return config.model_copy(update={"seed": config.seed + index * SEED_STRIDE}) if config.rollout.num_gpus else config


def _rollout_actors(config: RunConfig, policy_dir: str, app_name: str, wheres: list[dict[str, Any]], first: int = 0) -> list[Any]:
    """Number `first` and those after it, each with the options that say where."""
    import ray

    from toolrl_ray.rollout.actor import RolloutActor

    actor_class = ray.remote(RolloutActor)
    return [
        actor_class.options(**where, max_restarts=-1, max_concurrency=1000).remote(
            own_seed(config, first + i), policy_dir, select_backend(config), app_name
        )
        for i, where in enumerate(wheres)
    ]


def _learners(config: RunConfig, policy_dir: str, group: Any, bundles: list[int]) -> list[Any]:
    import ray

    from toolrl_ray.learner.actor import LearnerActor

    actor_class = ray.remote(LearnerActor)
    return [
        actor_class.options(**_where(group, bundle, config.learner)).remote(config, policy_dir, rank, len(bundles))
        for rank, bundle in enumerate(bundles)
    ]


def _where(group: Any, bundle: int, share: RolloutConfig | LearnerConfig) -> dict[str, Any]:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)
    return {"num_cpus": share.num_cpus, "num_gpus": share.num_gpus, "scheduling_strategy": strategy}


def _remove_tools(app_name: str, start: Future[Any], say: Callable[[str], None]) -> None:
    """Serve drains and removes them by itself. start: of the job that starts them."""
    from ray import serve

    from toolrl_ray.tools.serve_client import stop_tools

    def is_there() -> bool:
        return app_name in serve.status().applications

    if start.running():
        say("the tools are still starting; waiting to take them down again")
    if not _remove_deployed(start, is_there, lambda: stop_tools(app_name, wait=False), REMOVE_S):
        log.warning("the tools may yet start on the cluster; if so, end them with: toolrl tools stop --app %s", app_name)


def _remove_deployed(start: Future[Any], is_there: Callable[[], bool], remove: Callable[[], None], wait_s: float) -> bool:
    """Removes what the job `start` has deployed, or is about to deploy: that is waited for. False where it took longer than wait_s."""
    if start.cancel():  # it has not begun, and will not
        return True
    give_up = time.monotonic() + wait_s
    while True:
        is_over = start.done()  # asked first: what is not there afterwards never comes
        if is_there():
            remove()
            wait([start], timeout=END_S)  # for it to see that, before Ray is gone
            return True
        if is_over or time.monotonic() >= give_up:
            return is_over
        time.sleep(REMOVE_POLL_S)


def _within(seconds: float, job: Callable[[], Any]) -> None:
    """Runs the job, or raises TimeoutError and leaves it to itself."""
    done: Future[Any] = Future()
    _all_in_threads({done: job})
    done.result(timeout=seconds)


def _start(config: RunConfig, others: dict[Future[Any], Callable[[], Any]], learner: dict[Future[Any], Callable[[], Any]]) -> None:
    """All at once, but on a GPU that they share the engine first: vLLM measures its memory while it loads, which nobody may change then."""
    for jobs in [others, learner] if shares_gpu(config) else [others | learner]:
        _all_at_once(jobs)


def _all_at_once(jobs: dict[Future[Any], Callable[[], Any]]) -> None:
    """Run the jobs in threads; the first failure is raised at once. Each job has a deadline of its own; its future gets the outcome."""
    _all_in_threads(jobs)
    for future in wait(jobs, return_when=FIRST_EXCEPTION).done:
        future.result(timeout=0)


def _all_in_threads(jobs: dict[Future[Any], Callable[[], Any]]) -> None:
    """Daemons: after a failure or Ctrl-C one may wait for a cluster that is gone, and must not hold up the exit."""

    def run(job: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)

    for future, job in jobs.items():
        threading.Thread(target=run, args=(job, future), daemon=True).start()


def disconnect() -> None:
    import ray

    ray.shutdown()
