"""Ray Serve itself, as the tools need it.

Serve runs with RAY_SERVE_THROUGHPUT_OPTIMIZED=1. The flag is read once, when `ray.serve` is imported, in every process that
takes part: it is set here for this process and handed to the controller and to the replicas as their runtime environment.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools_service.config import HttpConfig

SERVE_ENV = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",  # the flag above would give the first deployment an HTTP server of its own
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),  # the answers of a batch pass 4 MiB, the default
    "grpc_proxy": "",  # calls stay in the cluster: gRPC would send them to the proxy for the world outside, http_proxy
}
os.environ.update(SERVE_ENV)

POLL_S = 0.1
PROXY_TIMEOUT_S = 30.0


class ServiceError(Exception):
    """The service could not be started, found or removed; the message is one line that names what is missing."""


def start_serve(http: HttpConfig | None, timeout_s: float) -> None:
    """Starts Serve on the cluster unless it runs. Raises ServiceError where that takes longer, and where it runs without the HTTP proxy
    that is asked for."""
    from ray import serve

    if http is None:
        _start_controller(timeout_s, proxy_location="Disabled")
        return
    asked = {"host": http.host, "port": http.port}
    _start_controller(timeout_s, proxy_location="HeadOnly", http_options=asked)
    there = serve.context._get_global_client().http_config  # what Serve on this cluster was started with first
    if not serve.status().proxies:
        raise ServiceError("Serve runs on this cluster without its HTTP proxy already; end it there (serve shutdown) or leave http out")
    if (there.host, there.port) != (http.host, http.port):
        raise ServiceError(f"Serve's HTTP proxy runs at {there.host}:{there.port} on this cluster already; ask for that address")
    deadline = time.monotonic() + PROXY_TIMEOUT_S
    while not any(str(status.value) == "HEALTHY" for status in serve.status().proxies.values()):
        if time.monotonic() > deadline:
            raise ServiceError(f"Serve's HTTP proxy does not come up at {http.host}:{http.port}; is the port taken? choose another")
        time.sleep(POLL_S)


def _start_controller(timeout_s: float, **options: Any) -> None:
    """In a thread, since Serve waits without end. A controller that does not come up is removed: whoever asks Serve for anything would
    wait for it, too."""
    import ray
    from ray import serve

    was_there, started = controller() is not None, Future[None]()

    def start() -> None:
        try:
            serve.start(controller_options={"runtime_env": {"env_vars": SERVE_ENV}}, **options)
            started.set_result(None)
        except BaseException as error:
            started.set_exception(error)

    threading.Thread(target=start, name="serve-start", daemon=True).start()
    try:
        started.result(timeout_s)
    except TimeoutError as error:  # or Serve's own, of its HTTP proxy
        if not was_there and (it := controller()) is not None:
            ray.kill(it)
        raise ServiceError(
            f"Ray Serve's controller does not start within {timeout_s:g} s{f': {error}' if str(error) else ''}; "
            "does the cluster start any worker process? see the logs of its nodes (/tmp/ray/session_latest/logs)"
        ) from None


def controller() -> Any:
    """Serve's, where it runs on the cluster or is about to; else None."""
    import ray

    try:
        return ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return None
