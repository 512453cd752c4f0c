"""The tools service seen from outside Ray: its HTTP face. For the command line; a training run calls through serve_client.py."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from toolrl_ray.errors import ToolRLError, UserError
from tools_service.adapters import valid_text
from tools_service.protocol import ToolCall, ToolResult, ToolStatus
from tools_service.runner import ToolInfo

if TYPE_CHECKING:
    import httpx

CONNECT_S = 5.0
ANSWER_S = 10.0  # for what is not a call, and beyond what a call may take
RECONNECT_S = 15.0  # in which a service that went away has to be back
BACKOFF_S, MAX_BACKOFF_S = 0.2, 2.0
MAX_REQUEST_BYTES = 4 * 2**20  # half of what the service takes
NOT_STARTED = (404, 408, 503)  # no such application (any more), the body was late, no replica takes the request


class ServiceGone(ToolRLError):
    """The service went away while it was in use, and did not come back in time."""


class HttpTools:
    """HttpTools(address), for one event loop; `close` last. `infos` first: it finds out whether there is a service at all."""

    def __init__(self, address: str):
        import httpx

        self._url = (address if "://" in address else f"http://{address}").rstrip("/")
        self.where = f"at {self._url}"
        try:
            self._client = httpx.AsyncClient(
                base_url=self._url,
                trust_env=False,  # the environment's proxies are for the world outside
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
                timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
            )
            base = self._client.base_url
            known = base.scheme in ("http", "https") and base.host and (base.port is None or 1 <= base.port <= 65535)
        except (httpx.InvalidURL, ValueError):
            known = False
        if not known:
            raise UserError(f"--address={address!r} is not a URL; give one as http://127.0.0.1:8000")

    async def infos(self) -> dict[str, ToolInfo]:
        """The tools, as far as the service tells. Raises UserError where there is none that answers."""
        import httpx

        try:
            answer = await self._client.get("/v1/tools")
        except httpx.TimeoutException:
            raise UserError(f"{self._url} does not answer within {ANSWER_S:g} s; is it a tools service?") from None
        except httpx.HTTPError:
            raise UserError(f"no tools service {self.where}; start one with: toolrl tools serve, or use --local") from None
        try:
            functions = [tool["function"] for tool in answer.raise_for_status().json()]
            # Each may keep state for all that is told: the service drops the session of a call to a tool that keeps none.
            tools = [ToolInfo(tool["name"], tool["description"], False, parameters=tool["parameters"], stateful=True) for tool in functions]
        except (httpx.HTTPStatusError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{self._url} answers, but no tools service runs there (GET /v1/tools: {answer.status_code}); "
                "name it with --address, or use --local"
            ) from None
        return {tool.name: tool for tool in tools}

    async def call(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """The results in the order of the calls, which travel in one request, or in several where they are long.

        A request that did not reach the service is sent again for RECONNECT_S; of one that was lost on its way it is not known
        whether the calls ran: they are answered UNAVAILABLE. Raises ServiceGone, and UserError for calls that the service refuses.
        """
        body = json.dumps({"calls": [_fields(call) for call in calls]}, ensure_ascii=False).encode()
        if len(body) > MAX_REQUEST_BYTES and len(calls) > 1:
            middle = len(calls) // 2
            return [*await self.call(calls[:middle]), *await self.call(calls[middle:])]
        give_up = time.monotonic() + RECONNECT_S
        pause_s = BACKOFF_S
        while isinstance(outcome := await self._send(calls, body), str):
            if time.monotonic() + pause_s > give_up:
                raise ServiceGone(f"the tools service {self.where} went away and was not back after {RECONNECT_S:g} s ({outcome})")
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(2 * pause_s, MAX_BACKOFF_S)
        return outcome

    async def _send(self, calls: Sequence[ToolCall], body: bytes) -> list[ToolResult] | str:
        """Results, or the reason why the request certainly did not reach the tools."""
        import httpx

        timeout = httpx.Timeout(max(call.deadline_s for call in calls) + ANSWER_S, connect=CONNECT_S, pool=None)
        try:
            answer = await self._client.post("/v1/call", content=body, headers={"content-type": "application/json"}, timeout=timeout)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return str(error) or type(error).__name__
        except httpx.HTTPError as error:
            return _all_unavailable(calls, f"the connection failed with {type(error).__name__}")
        if answer.status_code in NOT_STARTED:
            return f"HTTP status {answer.status_code}"
        if answer.status_code == 413 and len(calls) == 1:
            return [ToolResult(ToolStatus.BAD_ARGUMENTS, f"the call is too long: {_reason(answer)}")]
        if answer.is_client_error:
            raise UserError(f"{self._url} refuses the call: {_reason(answer)}")
        try:
            results = [_result(row) for row in answer.raise_for_status().json()["results"]]
        except (httpx.HTTPStatusError, ValueError, KeyError, TypeError):
            return _all_unavailable(calls, _reason(answer))
        return results if len(results) == len(calls) else _all_unavailable(calls, f"{len(results)} results for {len(calls)} calls")

    async def end_session(self, session: str) -> None:
        """Lets the tools forget it now; where the service cannot be told, they forget it in time."""
        import httpx

        with suppress(httpx.HTTPError):
            await self._client.delete(f"/v1/sessions/{quote(session, safe='')}")

    async def close(self) -> None:
        await self._client.aclose()


def _fields(call: ToolCall) -> dict[str, Any]:
    fields = {"tool": call.tool, "argument": valid_text(call.argument), "deadline_s": call.deadline_s}
    return fields | {key: value for key, value in (("session", call.session), ("seed", call.seed)) if value is not None}


def _result(row: dict[str, Any]) -> ToolResult:
    return ToolResult(ToolStatus(row["status"]), str(row["text"]), float(row["latency_s"]), bool(row["truncated"]))


def _all_unavailable(calls: Sequence[ToolCall], reason: str) -> list[ToolResult]:
    return [ToolResult(ToolStatus.UNAVAILABLE, f"tool unavailable: {reason}")] * len(calls)


def _reason(answer: httpx.Response) -> str:
    """What the service says is wrong with a request, on one line."""
    try:
        text = str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        text = answer.text
    return f"{' '.join(text.split())[:300] or 'no reason given'} (HTTP status {answer.status_code})"
