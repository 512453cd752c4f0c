"""The tools service seen from a training run: start it, stop it, call it. The Ray side of dispatch.py and call_queue.py."""

from __future__ import annotations

import asyncio
from typing import Any

from toolrl_ray.config import ToolsConfig
from toolrl_ray.errors import PlacementError
from toolrl_ray.tools.call_queue import TransportError
from toolrl_ray.tools.dispatch import Dispatcher
from toolrl_ray.tools.local import tool_factories
from tools_service.protocol import ToolCall, ToolResult
from tools_service.runner import ToolInfo


def start_tools(config: ToolsConfig, app_name: str) -> None:
    """Deploys the recipe's tools in the connected cluster and waits until they answer.

    Raises ConfigError for an unknown tool and PlacementError, within start_timeout_s, where they cannot be placed or do not start.
    """
    from tools_service import serve_app

    factories = tool_factories(config)
    try:
        serve_app.start(
            factories,
            app_name=app_name,
            num_replicas=config.num_replicas,
            num_cpus=config.num_cpus,
            max_in_flight=config.max_in_flight,
            start_timeout_s=config.start_timeout_s,
        )
    except serve_app.ServiceError as error:
        raise PlacementError(f"{error}; lower tools.num_replicas or tools.num_cpus, or raise tools.start_timeout_s") from None


def stop_tools(app_name: str, *, wait: bool = True) -> None:
    """Removes the run's tools application and no other. Without `wait` Serve drains it on its own."""
    from tools_service import serve_app

    serve_app.shutdown(app_name, wait=wait)


class ToolClient:
    """A `CallToolFn` over the application `app_name`, for one event loop (a RolloutActor's). Construction does no I/O."""

    def __init__(self, app_name: str, config: ToolsConfig):
        max_in_flight = config.max_in_flight * config.num_replicas
        self._dispatcher = Dispatcher(ServeTransport(app_name), config.names, max_in_flight=max_in_flight, max_queued=config.max_queued)

    async def __call__(self, call: ToolCall) -> ToolResult:
        return await self._dispatcher(call)

    async def connect(self) -> None:
        """Optional, before the first call: reaches every tool once, which takes a second or two the first time."""
        await self._dispatcher.connect()

    def stats(self) -> dict[str, int]:
        return self._dispatcher.stats()

    async def close(self) -> None:
        await self._dispatcher.close()


class ServeTransport:
    """Requests through Serve's deployment handles; every failure of Ray or Serve becomes a TransportError that names its class."""

    def __init__(self, app_name: str):
        import tools_service.serve_app  # noqa: F401  sets the Serve flags of this process before ray.serve is imported

        self._app_name = app_name
        self._handles: dict[str, Any] = {}

    async def describe(self, tool: str) -> ToolInfo:
        return await self._request(tool, "describe")

    async def send(self, tool: str, calls: list[tuple[str, float]]) -> list[ToolResult | None]:
        return await self._request(tool, "call_batch", calls)

    async def _request(self, tool: str, method: str, *arguments: Any) -> Any:
        from ray.exceptions import RayError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

        try:
            handle = await self._handle(tool)
        except (RayError, RayServeException) as error:
            raise TransportError(type(error).__name__, not_started=True) from error
        try:
            return await getattr(handle, method).remote(*arguments)
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise TransportError(type(error).__name__, not_started=True) from error
        except (RayError, RayServeException) as error:
            raise TransportError(type(error).__name__) from error

    async def _handle(self, tool: str) -> Any:
        from ray import serve

        if tool not in self._handles:  # asks the controller, which would block the event loop
            self._handles[tool] = await asyncio.to_thread(serve.get_deployment_handle, tool, self._app_name)
        return self._handles[tool]
