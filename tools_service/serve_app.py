"""The tools as a Ray Serve application: one deployment per tool, named as the tool. Needs ray[serve] and nothing of the training side.

Serve runs with RAY_SERVE_THROUGHPUT_OPTIMIZED=1. The flag is read once, when `ray.serve` is imported, in every process that
takes part: it is set here for this process and handed to the controller and to the replicas as their runtime environment.
Serve's HTTP proxy stays off: calls come through deployment handles.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from tools_service.executor import Executor
from tools_service.protocol import Tool, ToolResult
from tools_service.runner import ToolInfo

SERVE_ENV = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",  # the flag above would give the first deployment an HTTP server of its own
}
os.environ.update(SERVE_ENV)

DEFAULT_APP = "tools"
HEALTH_PERIOD_S = 10.0
HEALTH_TIMEOUT_S = 30.0
POLL_S = 0.1


class ServiceError(Exception):
    """The service could not be started; the message is one line that names what is missing."""


class ToolDeployment:
    """One replica of one tool."""

    def __init__(self, factory: Callable[[], Tool], max_threads: int, siblings: tuple[Any, ...] = ()):
        # siblings: handles that make Serve deploy the other tools as parts of the same application.
        self._executor = Executor(factory(), max_threads)

    async def describe(self) -> ToolInfo:
        return self._executor.info

    async def call_batch(self, calls: list[tuple[str, float]]) -> list[ToolResult | None]:
        """One entry per (argument, seconds left), in order; None where the call must be sent again alone (see Executor.run)."""
        return await self._executor.run(calls)

    async def check_health(self) -> None:
        await self._executor.check()

    async def inspect(self) -> dict[str, Any]:
        """This replica's process and how Serve runs in it, to see that the flag took effect."""
        from ray.serve._private import constants

        return {
            "pid": os.getpid(),
            "throughput_optimized": constants.RAY_SERVE_THROUGHPUT_OPTIMIZED,
            "user_code_in_separate_thread": constants.RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD,
            "direct_ingress": constants.RAY_SERVE_ENABLE_DIRECT_INGRESS,
        }


def start(
    tools: Mapping[str, Callable[[], Tool]],
    *,
    app_name: str = DEFAULT_APP,
    num_replicas: int = 1,
    num_cpus: float = 0.1,
    max_in_flight: int = 64,
    start_timeout_s: float = 120.0,
) -> dict[str, Any]:
    """Deploys one deployment per tool in the Ray cluster that this process is connected to and waits until all answer.

    num_cpus: per replica. max_in_flight: requests at once per replica. Returns a Serve handle per tool name.
    Raises ServiceError within start_timeout_s, with what is missing, after removing what was deployed; names that do not fit at all
    are refused at once.
    """
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its notices of every start and stop

    if not tools:
        raise ServiceError("no tool to serve")
    wanted = num_cpus * num_replicas * len(tools)
    total = ray.cluster_resources().get("CPU", 0.0)
    if wanted > total:
        raise ServiceError(f"{_plan(tools, num_replicas, num_cpus)}; the cluster has {total:g} in all")
    deadline = time.monotonic() + start_timeout_s
    serve.start(proxy_location="Disabled", controller_options={"runtime_env": {"env_vars": SERVE_ENV}})
    target = serve.api.RunTarget(_application(tools, num_replicas, num_cpus, max_in_flight), name=app_name, route_prefix=None)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    while (state := _state(app_name))[0] != "RUNNING":
        if state[0] == "DEPLOY_FAILED" or time.monotonic() > deadline:
            free = ray.available_resources().get("CPU", 0.0)
            shutdown(app_name)
            raise ServiceError(
                f"the tools application {app_name!r} is {state[0]} after {start_timeout_s:g} s; {_plan(tools, num_replicas, num_cpus)}, "
                f"{free:g} of {total:g} are free; {state[1]}"
            )
        time.sleep(POLL_S)  # Serve offers no event to wait for
    return {name: serve.get_deployment_handle(name, app_name) for name in tools}


def shutdown(app_name: str = DEFAULT_APP, *, wait: bool = True) -> None:
    """Removes this application and no other. Does nothing where it does not run. Without `wait` Serve drains it on its own."""
    from ray import serve

    if app_name in serve.status().applications:
        serve.delete(app_name, _blocking=wait)


def _application(tools: Mapping[str, Callable[[], Tool]], num_replicas: int, num_cpus: float, max_in_flight: int) -> Any:
    from ray import serve

    def bind(name: str, siblings: tuple[Any, ...] = ()) -> Any:
        deployment = serve.deployment(
            ToolDeployment,
            name=name,
            num_replicas=num_replicas,
            max_ongoing_requests=max_in_flight,
            ray_actor_options={"num_cpus": num_cpus, "runtime_env": {"env_vars": SERVE_ENV}},
            health_check_period_s=HEALTH_PERIOD_S,
            health_check_timeout_s=HEALTH_TIMEOUT_S,
            graceful_shutdown_wait_loop_s=0.2,  # how often a replica that drains looks whether it is idle
        )
        return deployment.bind(tools[name], max_in_flight, siblings)

    first, *others = tools
    return bind(first, tuple(bind(name) for name in others))


def _state(app_name: str) -> tuple[str, str]:
    """Status of the application and what Serve says about it, on one line."""
    from ray import serve

    application = serve.status().applications.get(app_name)
    if application is None:
        return "NOT_STARTED", "Serve has not taken the application up"
    messages = [f"{name}: {d.message}" for name, d in application.deployments.items() if d.message]
    return str(application.status.value), " ".join(" ".join([application.message, *messages]).split())[:500]


def _plan(tools: Mapping[str, Callable[[], Tool]], num_replicas: int, num_cpus: float) -> str:
    wanted = num_cpus * num_replicas * len(tools)
    return f"the tools need {wanted:g} CPUs ({len(tools)} tools, {num_replicas} replicas each, {num_cpus:g} CPUs a replica)"
