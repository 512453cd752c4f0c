"""What the HTTP face refuses before a route sees it, and how: with one line, {"error": ...}.

The service knows no passwords. Where it listens on loopback, a web page in a browser on the same machine could have its own host name
point there (DNS rebinding): requests that arrive at a loopback address must name a loopback host, and no other origin.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tools_service.adapters import valid_text
from tools_service.gateway import ARRIVED

MAX_BODY_BYTES = 8 * 2**20
BODY_S = 10.0  # in which a body has to arrive: until then it holds a place that other requests wait for


class _StrictRequest(Request):
    async def json(self) -> Any:
        """Unlike the standard library's: no NaN, no Infinity, no half a character, no depth or length that cannot be handled."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(422, f"the body is not valid JSON: {error}") from None


class _StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strictly


def guard(app: FastAPI) -> None:
    """Makes the app refuse so, whatever it refuses."""

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _refuse(422, _first_problem(error))

    async def other(request: Request, error: HTTPException) -> Response:
        detail = "there is nothing at this path; see /openapi.json" if error.status_code == 404 else error.detail
        return _refuse(error.status_code, detail, error.headers)

    app.router.route_class = _StrictRoute
    app.add_middleware(_Guard)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, other)


class _Guard:
    """Refuses what no route should see: bodies beyond MAX_BODY_BYTES or BODY_S, and what a web page of elsewhere may have sent."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        ARRIVED.set(time.perf_counter())
        headers = Headers(scope=scope)
        if (refusal := _foreign(scope, headers)) is not None:
            return await refusal(scope, receive, send)
        too_large = _refuse(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send less at once")
        length = headers.get("content-length", "")
        if length.isdecimal() and len(length) < 20 and int(length) > MAX_BODY_BYTES:
            return await too_large(scope, receive, send)
        try:
            async with asyncio.timeout(BODY_S):
                body = await _body(receive)
        except TimeoutError:
            late = _refuse(408, f"the body did not arrive within {BODY_S:g} s", {"Connection": "close"})
            return await late(scope, receive, send)
        if body is None:
            return
        if len(body) > MAX_BODY_BYTES:
            return await too_large(scope, receive, send)
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, send)


async def _body(receive: Receive) -> bytearray | None:
    """As far as the message that takes it beyond MAX_BODY_BYTES. None: the client has gone."""
    body, more = bytearray(), True
    while more and len(body) <= MAX_BODY_BYTES:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _foreign(scope: Scope, headers: Headers) -> JSONResponse | None:
    if not _is_loopback((scope.get("server") or ("",))[0]):
        return None
    if not _is_loopback(_host(f"//{headers.get('host', '')}")):
        return _refuse(
            421, f"this service is at a loopback address, not at {headers.get('host', '')[:100]!r}; ask for 127.0.0.1 or localhost"
        )
    if "origin" in headers and not _is_loopback(_host(headers["origin"])):
        return _refuse(403, f"web pages of {headers['origin'][:100]!r} may not use this service")
    return None


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host in ("localhost", socket.gethostname().lower())  # the second often stands for 127.0.1.1
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _refuse(code: int, error: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": valid_text(" ".join(error.split()))}, code, dict(headers or {}))


def _first_problem(error: RequestValidationError) -> str:
    """`WHERE: WHAT (VALUE)` of the first thing that is wrong."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    if not where and first["type"] != "value_error":
        return "the body must be a JSON object, with the header Content-Type: application/json"
    if first["type"] == "extra_forbidden":
        return f"unknown key {where[:200]!r}"
    value = f" ({repr(first['input'])[:60]})" if isinstance(first["input"], str | int | float) else ""
    return f"{where[:200]}: {first['msg'].removeprefix('Value error, ')}{value}".removeprefix(": ")
