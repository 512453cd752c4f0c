"""The tools as a Ray Serve application: one deployment per tool, named as the tool. Needs ray[serve] and nothing of the training side.

Serve's HTTP proxy stays off unless HTTP is asked for: calls come through deployment handles.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tools_service.gateway import HTTP_IN_FLIGHT
from tools_service.runner import GATEWAY, Factory, tool_factories
from tools_service.serve_replica import END_OF_REASON, START_FAILED, HttpDeployment, ToolDeployment
from tools_service.serve_start import SERVE_ENV, ServiceError, start_serve

if TYPE_CHECKING:
    from tools_service.config import HttpConfig, PoolConfig

DEFAULT_APP = "tools"
HTTP_QUEUED = 4096  # more of them, in the proxy: what comes at once passes through here too. As many as wait for a pool; the rest is 503
HTTP_RETRY_AFTER_S = 1
POLL_S = 0.1
DRAIN_POLL_S = 0.2  # how often a replica that drains looks whether it is idle
LOOK_BACK_S = 3.0  # over which requests in flight are averaged
REMOVE_S = 60.0  # in which Serve has to remove an application that has drained


class ToolStartError(ServiceError):
    """A replica's tool refused to start; the message names the tool and gives its reason."""


def start(
    tools: Mapping[str, Factory],
    *,
    app_name: str = DEFAULT_APP,
    pools: Mapping[str, PoolConfig] | None = None,
    http: HttpConfig | None = None,
    start_timeout_s: float = 120.0,
) -> dict[str, Any]:
    """Deploys one deployment per tool in the Ray cluster that this process is connected to and waits until all answer.

    pools: by tool; PoolConfig() for those it leaves out. http: also serves them there, at /. Returns a Serve handle per tool name.
    Raises ServiceError within start_timeout_s, with what is missing, after removing what was deployed; plans that do not fit at all
    are refused at once, and so is an application that runs already.
    """
    import ray
    from ray import serve

    from tools_service.config import PoolConfig

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its notices of every start and stop

    if not tools:
        raise ServiceError("no tool to serve")
    plan = {name: (pools or {}).get(name, PoolConfig()) for name in tools}
    total = ray.cluster_resources().get("CPU", 0.0)
    if sum(pool.min_replicas * pool.num_cpus for pool in plan.values()) > total:
        raise ServiceError(f"{_wanted(plan)}; the cluster has {total:g} in all")
    deadline = time.monotonic() + start_timeout_s
    start_serve(http, start_timeout_s)
    _check_connected()
    if _state(app_name)[0] not in ("NOT_STARTED", "DEPLOY_FAILED"):
        raise ServiceError(f"an application {app_name!r} runs on this cluster already; stop it or choose another name")
    application = _application(tools, plan, http is not None)
    target = serve.api.RunTarget(application, name=app_name, route_prefix="/" if http else None)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    while (state := _state(app_name))[0] != "RUNNING":
        if state[0] == "DELETING":
            raise ServiceError(f"the tools application {app_name!r} was removed while it started")
        failure = _start_failure(app_name)
        if failure or state[0] == "DEPLOY_FAILED" or time.monotonic() > deadline:
            free = ray.available_resources().get("CPU", 0.0)
            with suppress(ServiceError):  # why it did not start is what matters; Serve goes on removing it
                shutdown(app_name, timeout_s=REMOVE_S)
            if failure:
                raise ToolStartError(failure)
            raise ServiceError(
                f"the tools application {app_name!r} is {state[0]} after {start_timeout_s:g} s; {_wanted(plan)}, "
                f"{free:g} of {total:g} are free; {state[1][-500:]}"
            )
        time.sleep(POLL_S)  # Serve offers no event to wait for
        _check_connected()
    return {name: serve.get_deployment_handle(name, app_name) for name in tools}


def _check_connected() -> None:
    """Serve's functions start a Ray where there is none: also where this one's was ended meanwhile, by another thread."""
    import ray

    if not ray.is_initialized():
        raise ServiceError("Ray was ended while the tools started")


def shutdown(app_name: str = DEFAULT_APP, *, wait: bool = True, timeout_s: float | None = None) -> None:
    """Removes this application and no other. Does nothing where it does not run. Without `wait` Serve drains it on its own.

    Raises ServiceError where it is still there after timeout_s (default: the longest drain_s of its pools and REMOVE_S).
    """
    from ray import serve

    if app_name not in serve.status().applications:
        return
    drain_s = _drain_s(app_name) if wait else {}  # Serve tells it no more once it removes the application
    if timeout_s is None:
        timeout_s = max(drain_s.values(), default=0.0) + REMOVE_S
    serve.delete(app_name, _blocking=False)
    deadline = time.monotonic() + timeout_s
    while wait and app_name in serve.status().applications:
        if time.monotonic() > deadline:
            longest_first = sorted(drain_s.items(), key=lambda item: -item[1])
            tools = ", ".join(f"{name} {seconds:g} s" for name, seconds in longest_first) or "it was being removed already"
            raise ServiceError(
                f"the tools application {app_name!r} is not gone after {timeout_s:g} s; calls may go on for the drain_s of their pools "
                f"({tools}), then Serve removes it; wait for that, or give the pools a lower drain_s"
            )
        time.sleep(POLL_S)


def running(app_name: str = DEFAULT_APP) -> list[str]:
    """The tools that the application serves. Raises ServiceError where it does not run."""
    from ray import serve

    application = serve.status().applications.get(app_name)
    if application is None or application.status.value != "RUNNING":
        state = "not there" if application is None else str(application.status.value)
        others = ", ".join(serve.status().applications) or "none"
        raise ServiceError(f"the tools application {app_name!r} is {state} on this cluster (applications: {others}); start it first")
    return sorted(name for name in application.deployments if name != GATEWAY)


def app(args: dict[str, Any]) -> Any:
    """The application for a Serve config file (`import_path: tools_service.serve_app:app`); args: a ServiceConfig with `http`."""
    from tools_service.config import parse

    config = parse(args, "args")
    tools = tool_factories(config.names, config.custom, config.options)
    return _application(tools, {name: config.pool(name) for name in config.names}, config.http is not None)


def _application(tools: Mapping[str, Factory], plan: Mapping[str, PoolConfig], with_http: bool) -> Any:
    from ray import serve
    from ray.serve.config import BackpressureConfig

    def bind(name: str, siblings: tuple[Any, ...] = ()) -> Any:
        pool = plan[name]
        deployment = serve.deployment(ToolDeployment, name=name, **_options(pool))
        return deployment.bind(tools[name], pool.max_in_flight, pool.most_replicas, pool.health_timeout_s, siblings)

    if with_http:
        gateway = serve.deployment(
            serve.ingress()(HttpDeployment),
            name=GATEWAY,
            max_ongoing_requests=HTTP_IN_FLIGHT,
            max_queued_requests=HTTP_QUEUED,
            backpressure_config=BackpressureConfig(retry_after_s=HTTP_RETRY_AFTER_S),
            ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": SERVE_ENV}},
        )
        return gateway.bind(list(tools), tuple(bind(name) for name in tools))
    first, *others = tools
    return bind(first, tuple(bind(name) for name in others))


def _options(pool: PoolConfig) -> dict[str, Any]:
    """A pool in Serve's words."""
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    actor: dict[str, Any] = {"num_cpus": pool.num_cpus, "resources": pool.resources, "runtime_env": {"env_vars": SERVE_ENV}}
    if pool.memory_bytes is not None:
        actor["memory"] = pool.memory_bytes
    options: dict[str, Any] = {
        "ray_actor_options": actor,
        "max_ongoing_requests": pool.max_in_flight,
        "max_queued_requests": pool.max_queued,
        "health_check_period_s": pool.health_period_s,
        "health_check_timeout_s": pool.health_timeout_s,
        "graceful_shutdown_timeout_s": pool.drain_s,
        "graceful_shutdown_wait_loop_s": DRAIN_POLL_S,
    }
    if pool.most_replicas > 1:
        options["request_router_config"] = RequestRouterConfig(request_router_class="tools_service.serve_router.SessionRouter")
    if pool.most_replicas == pool.min_replicas:
        return options | {"num_replicas": pool.min_replicas}
    options["autoscaling_config"] = AutoscalingConfig(
        min_replicas=pool.min_replicas,
        max_replicas=pool.most_replicas,
        target_ongoing_requests=pool.target_in_flight or pool.max_in_flight / 2,
        upscale_delay_s=pool.upscale_delay_s,
        downscale_delay_s=pool.downscale_delay_s,
        look_back_period_s=LOOK_BACK_S,
        metrics_interval_s=1.0,  # pools follow the load within seconds
    )
    return options


def _state(app_name: str) -> tuple[str, str]:
    """Status of the application and what Serve says about it, on one line."""
    from ray import serve

    application = serve.status().applications.get(app_name)
    if application is None:
        return "NOT_STARTED", "Serve has not taken the application up"
    messages = [f"{name}: {d.message}" for name, d in application.deployments.items() if d.message]
    return str(application.status.value), " ".join(" ".join([application.message, *messages]).split())


def _drain_s(app_name: str) -> dict[str, float]:
    """Seconds by tool; nothing for an application that is being removed."""
    from ray import serve

    there = serve.context._get_global_client().get_serve_details()["applications"].get(app_name, {}).get("deployments", {})
    return {name: of["deployment_config"]["graceful_shutdown_timeout_s"] for name, of in there.items() if name != GATEWAY}


def _start_failure(app_name: str) -> str | None:
    """`tool NAME does not start: ITS REASON`, as soon as one replica's tool has refused."""
    from ray import serve

    application = serve.status().applications.get(app_name)
    for name, deployment in application.deployments.items() if application else ():
        if found := re.search(f"{START_FAILED}(.*?){re.escape(END_OF_REASON)}", " ".join(deployment.message.split())):
            return f"tool {name} does not start: {found[1]}"
    return None


def _wanted(plan: Mapping[str, PoolConfig]) -> str:
    parts = ", ".join(f"{name} {pool.min_replicas} x {pool.num_cpus:g}" for name, pool in plan.items())
    return f"the tools need {sum(pool.min_replicas * pool.num_cpus for pool in plan.values()):g} CPUs ({parts})"
