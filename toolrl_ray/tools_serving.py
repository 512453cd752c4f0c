"""`toolrl tools serve` and `toolrl tools stop`: the tools service on a Ray of its own, or on a cluster that is up."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from toolrl_ray.errors import UserError
from toolrl_ray.tools_access import DEFAULT_ADDRESS, DEFAULT_APP, EXAMPLES, service_factories
from tools_service.config import HttpConfig, ServiceConfig
from tools_service.runner import Factory, ToolInfo

DESCRIBE_S = 30.0
LOCK = "toolrl-tools"  # on the cluster: who is at work there, and whose Serve it is
Say = Callable[[str], None]


def url(http: HttpConfig) -> str:
    """Where a client on the same machine finds it."""
    host = "127.0.0.1" if http.host in ("0.0.0.0", "::") else http.host
    return f"http://[{host}]:{http.port}" if ":" in host else f"http://{host}:{http.port}"


def serve_here(config: ServiceConfig, http: HttpConfig | None, say: Say, verbose: bool) -> None:
    """Starts a local Ray with the service and serves until Ctrl-C or SIGTERM. Raises UserError, with nothing left running."""
    factories = service_factories(config)
    if http:
        _check_free(http)
    with _ray(None, say, verbose):
        import ray

        _start(config, factories, http, say)
        _show(config, http, ray.get_runtime_context().gcs_address)
        say(f"serving{f' at {url(http)}' if http else ''}; Ctrl-C stops it")
        _until_signal(config, say)


def serve_on_cluster(config: ServiceConfig, http: HttpConfig | None, address: str, say: Say, verbose: bool) -> None:
    """Deploys the service to a cluster and leaves it there. Raises UserError, with nothing of it left on the cluster."""
    factories = service_factories(config)
    with _ray(address, say, verbose), _alone():
        from ray import serve

        from tools_service import serve_app

        stop_it = f"toolrl tools stop --address {address}" + ("" if config.app == DEFAULT_APP else f" --app {config.app}")
        if config.app in serve.status().applications:
            raise UserError(
                f"an application {config.app!r} runs on this cluster already; end it with: {stop_it}, "
                "or choose another name (app: in the file that --config names)"
            )
        found_serve = _find_serve(http, say)
        try:
            _start(config, factories, http, say)
            if not found_serve:
                _remember_serve()
            _show(config, http, address)
        except BaseException:
            serve_app.shutdown(config.app, wait=False)
            if not found_serve and not set(serve.status().applications) - {config.app}:
                serve.shutdown()
            raise
        print(f"  stop it:      {stop_it}", flush=True)
        say("it runs on the cluster" + (f", and serves HTTP at {url(http)} of the head node" if http else ""))


def stop(app: str, address: str, say: Say, verbose: bool) -> None:
    """Removes the application from the cluster, after the calls that it is running, and Serve itself where `tools serve` started it and
    nothing else runs on it. Raises UserError where the application is not there."""
    with _ray(address, say, verbose), _alone():
        from ray import serve

        from tools_service import serve_app

        there = serve.status().applications
        if app not in there:
            raise UserError(f"no application {app!r} on this cluster; applications: {', '.join(there) or 'none'}")
        say(f"stopping {app}")
        try:
            serve_app.shutdown(app)
        except serve_app.ServiceError as error:
            raise UserError(str(error)) from None
        if _serve_is_ours() and not serve.status().applications:
            serve.shutdown()
        say("stopped")


@contextmanager
def _ray(address: str | None, say: Say, verbose: bool) -> Iterator[None]:
    from toolrl_ray import cluster

    try:
        cluster.reach(address, say, verbose=verbose)
        yield
    finally:
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            cluster.disconnect()  # an own Ray ends here, however impatient somebody is
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextmanager
def _alone() -> Iterator[None]:
    """Of all that start or stop a service on this cluster only one runs at a time. Raises UserError for the others."""
    import ray

    class Lock:
        """Its name can be had once; it ends with this process."""

    try:
        lock = ray.remote(num_cpus=0)(Lock).options(name=LOCK, namespace=LOCK).remote()
    except ValueError:
        raise UserError("another `toolrl tools serve` or `stop` is at work on this cluster; try again when it is done") from None
    try:
        yield
    finally:
        ray.kill(lock)


def _check_free(http: HttpConfig) -> None:
    try:
        family = socket.getaddrinfo(http.host, http.port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((http.host, http.port), family=family).close()
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise UserError(f"{http.host}:{http.port} cannot be listened on ({reason}); choose another --port or --host") from None


def _start(config: ServiceConfig, factories: Mapping[str, Factory], http: HttpConfig | None, say: Say) -> None:
    from tools_service import serve_app

    say(f"starting {', '.join(config.names)}")
    pools = {name: config.pool(name) for name in config.names}
    try:
        serve_app.start(factories, app_name=config.app, pools=pools, http=http, start_timeout_s=config.start_timeout_s)
    except serve_app.ServiceError as error:
        raise UserError(str(error)) from None


def _serve_controller() -> str | None:
    """The id of Serve's controller, where Serve runs on the cluster."""
    from tools_service.serve_start import controller

    return None if (it := controller()) is None else it._actor_id.hex()


def _find_serve(http: HttpConfig | None, say: Say) -> bool:
    """Whether Serve runs, with HTTP as it is asked for. One that was started without, as a training run does, is ended where nothing
    runs on it. Raises UserError where something does, and where HTTP has another address."""
    from ray import serve

    if _serve_controller() is None:
        return False
    there = serve.status()
    if http is None:
        return True
    if there.proxies:
        at = serve.context._get_global_client().http_config
        if (at.host, at.port) != (http.host, http.port):
            where = f"Ray Serve has its HTTP at {at.host}:{at.port} on this cluster already"
            raise UserError(f"{where}; serve there with --host {at.host} --port {at.port}, or with --no-http")
        return True
    if there.applications:
        raise UserError(
            f"Ray Serve runs on this cluster without HTTP, for {', '.join(there.applications)} (a training run starts it so); "
            "serve to training runs alone with --no-http, or try again when that has ended"
        )
    say("restarting Ray Serve, which runs nothing and has no HTTP")
    serve.shutdown()
    return False


def _remember_serve() -> None:
    """Leaves word on the cluster that this Serve was started for a service."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(LOCK, _serve_controller() or "")


def _serve_is_ours() -> bool:
    from ray.experimental.internal_kv import _internal_kv_get

    controller = _serve_controller()
    return controller is not None and _internal_kv_get(LOCK) == controller.encode()


def _until_signal(config: ServiceConfig, say: Say) -> None:
    """Waits for Ctrl-C or SIGTERM, then for the calls that are running; a second one does not wait for them."""
    from tools_service import serve_app

    stop = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    while not stop.wait(1.0):
        pass
    say("stopping")
    try:
        serve_app.shutdown(config.app)
    except KeyboardInterrupt:
        say("stopping at once")


async def _descriptions(names: list[str], describe: Callable[[str], Awaitable[ToolInfo]]) -> list[ToolInfo]:
    """Raises UserError where a tool does not answer."""
    from tools_service.serve_handles import TransportError

    try:
        async with asyncio.timeout(DESCRIBE_S):
            return list(await asyncio.gather(*map(describe, names)))
    except (TransportError, TimeoutError) as error:
        reason = error.reason if isinstance(error, TransportError) else f"no answer within {DESCRIBE_S:g} s"
        raise UserError(f"the tools have started and do not answer ({reason}); try again, with --verbose for their logs") from None


def _show(config: ServiceConfig, http: HttpConfig | None, ray_address: str) -> None:
    """What is served, and one line to try for each way of calling it."""
    from toolrl_ray.tools.stats import isolations
    from tools_service.serve_handles import ReplicaStats, ToolHandles

    async def described() -> list[ToolInfo]:
        return await _descriptions(config.names, ToolHandles(config.app).describe)

    width = max(map(len, config.names))
    tiers = isolations(ReplicaStats(config.app, config.names)())
    print()
    for info in asyncio.run(described()):
        print(f"  {info.name:<{width}}  {info.description}")
        if tier := tiers.get(info.name):
            print(f"  {'':<{width}}  isolation, found by an attack on itself: {tier}")
    print()
    if http:
        tool = next((name for name in config.names if name in EXAMPLES), config.names[0])
        argument = EXAMPLES.get(tool, "...")
        body = json.dumps({"calls": [{"tool": tool, "argument": argument}]})
        address = "" if url(http) == DEFAULT_ADDRESS else f" --address {url(http)}"
        print(f"  try it:       toolrl tools call {tool} {shlex.quote(argument)}{address}")
        print(f"  over HTTP:    curl -s {url(http)}/v1/call -H 'content-type: application/json' -d {shlex.quote(body)}")
        if not (http.host in ("localhost", "::1") or http.host.startswith("127.")):
            print(f"  beware:       it listens on {http.host} and knows no passwords: whoever reaches it can call the tools")
    print(f"  in training:  RAY_ADDRESS={ray_address} toolrl train RECIPE tools.app={config.app}", flush=True)
