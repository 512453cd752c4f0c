"""The tools service seen from a training run: start it or join one that runs, stop it, call it. The Ray side of dispatch.py."""

from __future__ import annotations

from toolrl_ray.config import ToolsConfig
from toolrl_ray.errors import PlacementError
from toolrl_ray.tools.dispatch import Dispatcher
from toolrl_ray.tools.local import tool_factories
from tools_service.protocol import ToolCall, ToolResult
from tools_service.runner import ToolInfo
from tools_service.serve_handles import ToolHandles


def start_tools(config: ToolsConfig, app_name: str) -> None:
    """Deploys the recipe's tools in the connected cluster and waits until they answer.

    Raises ConfigError for an unknown tool and PlacementError, within start_timeout_s, where they cannot be placed or do not start.
    """
    from tools_service import serve_app

    factories = tool_factories(config)
    pools = {name: config.pool(name) for name in factories}
    try:
        serve_app.start(factories, app_name=app_name, pools=pools, start_timeout_s=config.start_timeout_s)
    except serve_app.ToolStartError as error:
        raise PlacementError(str(error)) from None
    except serve_app.ServiceError as error:
        raise PlacementError(
            f"{error}; lower tools.num_replicas, tools.num_cpus or tools.pools, or raise tools.start_timeout_s"
        ) from None


def join_tools(config: ToolsConfig, app_name: str) -> None:
    """Looks whether the service that the recipe names runs and has its tools. Raises PlacementError where it does not."""
    from tools_service import serve_app

    try:
        there = serve_app.running(app_name)
    except serve_app.ServiceError as error:
        raise PlacementError(f"tools.app={app_name!r}: {error}") from None
    if lacking := [name for name in config.names if name not in there]:
        raise PlacementError(f"tools.app={app_name!r} does not serve {', '.join(lacking)} of tools.names; it serves {', '.join(there)}")


def stop_tools(app_name: str, *, wait: bool = True) -> None:
    """Removes the run's tools application and no other. Without `wait` Serve drains it on its own."""
    from tools_service import serve_app

    serve_app.shutdown(app_name, wait=wait)


class ToolClient:
    """A `CallToolFn` over the application `app_name`, for one event loop (a RolloutActor's). Construction does no I/O."""

    def __init__(self, app_name: str, config: ToolsConfig):
        self._handles = ToolHandles(app_name)
        self._dispatcher = Dispatcher(self._handles, config.names, max_queued=config.max_queued, cache_size=config.cache_size)

    async def __call__(self, call: ToolCall) -> ToolResult:
        return await self._dispatcher(call)

    def end_session(self, session: str) -> None:
        """The calls of this session are over; returns at once."""
        self._dispatcher.end_session(session)

    async def infos(self) -> dict[str, ToolInfo]:
        """What every tool says of itself; waits for those that are starting, so the caller sets the deadline."""
        return await self._dispatcher.infos()

    def stats(self) -> dict[str, int]:
        return self._dispatcher.stats()

    async def close(self) -> None:
        await self._dispatcher.close()
        await self._handles.close()
