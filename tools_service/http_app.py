"""The HTTP face of the tools: JSON over HTTP under /v1, described at /openapi.json, and MCP (streamable HTTP) at /mcp.

A call is answered 200 however the tool ended; `status` says how. An unknown tool in the path is 404 and OVERLOADED is 503 with
Retry-After, both in the same shape, so that ordinary clients and load balancers understand them; in a batch they are statuses only.
A request that cannot be understood is refused with one line: {"error": ...} (http_guard.py).

A session belongs to whoever knows its name: two clients that choose the same name share its state. Choose names nobody can guess.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.convertors import Convertor, register_url_convertor
from starlette.routing import Route

from tools_service.adapters import argument_text, result_fields
from tools_service.http_guard import BODY_S, MAX_BODY_BYTES, guard
from tools_service.mcp_server import HttpFace
from tools_service.protocol import ToolCall, ToolError, ToolResult, ToolStatus
from tools_service.runner import MAX_ARGUMENT_CHARS, ToolInfo

Call = Callable[[list[ToolCall]], Awaitable[list[ToolResult]]]

MAX_CALLS = 4096  # of one batch
MAX_DEADLINE_S = 600.0
MAX_SESSION_CHARS = 256
MAX_SEED = 2**53 - 1  # what a JSON number is sure to carry
RETRY_AFTER_S = 1


class _AnyText(Convertor[str]):
    regex = r"[\s\S]*"  # the built-in "path" has no line breaks

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("text", _AnyText())


def _integer(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # 7.0 is an integer in JSON


class Arguments(BaseModel):
    """What a call carries besides the tool's name."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        json_schema_extra={"oneOf": [{"required": ["argument"]}, {"required": ["arguments"]}]},
    )

    argument: str = Field(
        default_factory=str,
        description="The tool's input as text; of a tool with several parameters a JSON object. Beyond "
        f"{MAX_ARGUMENT_CHARS} characters the answer is `bad_arguments`.",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="The tool's input by the names of its `parameters`; as text it is bounded as `argument` is."
    )
    deadline_s: float = Field(10.0, gt=0, le=MAX_DEADLINE_S, description="Seconds after which the answer is `timeout`.")
    session: str | None = Field(
        None, min_length=1, max_length=MAX_SESSION_CHARS, description="Calls with the same session find what the ones before left."
    )
    seed: Annotated[int | None, BeforeValidator(_integer)] = Field(
        None, ge=0, le=MAX_SEED, description="Of whatever the tool draws at random."
    )

    @model_validator(mode="after")
    def _one_input(self) -> Arguments:
        if ("argument" in self.model_fields_set) == ("arguments" in self.model_fields_set):
            raise ValueError('give either "argument" (text) or "arguments" (an object)')
        return self

    def call(self, tool: str, infos: Mapping[str, ToolInfo]) -> ToolCall:
        """Raises ToolError where the arguments do not fit the tool's schema."""
        text = self.argument
        if "arguments" in self.model_fields_set and tool in infos:
            text = argument_text(infos[tool].parameters, self.arguments)
        return ToolCall(tool, text, self.deadline_s, self.session, self.seed)


class BatchCall(Arguments):
    tool: str


class Batch(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    calls: list[BatchCall] = Field(min_length=1, max_length=MAX_CALLS)


class Result(BaseModel):
    """How a call ended. text: the tool's output where status is ok, otherwise a short reason. latency_s: of this call, in a batch too."""

    model_config = ConfigDict(extra="forbid")

    status: ToolStatus
    text: str
    latency_s: float = Field(ge=0)
    truncated: bool


class Results(BaseModel):
    """In the order of the calls."""

    model_config = ConfigDict(extra="forbid")

    results: list[Result]


class Function(BaseModel):
    name: str
    description: str
    parameters: dict[str, Any]


class FunctionTool(BaseModel):
    """A tool as clients of function-calling models take it."""

    type: Literal["function"]
    function: Function


class Health(BaseModel):
    status: Literal["ok"]
    tools: list[str]


class Refusal(BaseModel):
    """A request that was not understood, in one line."""

    model_config = ConfigDict(extra="forbid")

    error: str


def _refusals(reasons: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": Refusal, "description": reason} for code, reason in reasons.items()}


EVERYWHERE = _refusals({403: "A web page of another origin asks", 421: "Another host is meant"})
WITH_BODY = _refusals(
    {
        408: f"The body did not arrive within {BODY_S:g} s",
        413: f"The body is larger than {MAX_BODY_BYTES} bytes",
        422: "The body is not what is described here",
    }
)
RETRY_AFTER = {"Retry-After": {"description": "Seconds", "schema": {"type": "string"}}}
OF_ONE_CALL: dict[int | str, dict[str, Any]] = {
    404: {"model": Result, "description": "No tool has this name; `text` lists those that there are"},
    503: {"model": Result, "description": "Too many calls wait already", "headers": RETRY_AFTER},
}


def make_app(infos: Mapping[str, ToolInfo], call: Call, end_session: Callable[[str], None] | None = None) -> FastAPI:
    """The web application; its lifespan must run for /mcp.

    call: answers each call, in order, whatever happens; those of tools that it does not know with UNKNOWN_TOOL. end_session: lets every
    tool forget a session, in the background.
    """
    mcp = HttpFace(infos, call, MAX_BODY_BYTES)
    app = FastAPI(
        title="Tools",
        version="1",
        description="Calls of the tools of this service. MCP clients find the same tools at /mcp (streamable HTTP).",
        lifespan=lambda app: mcp.run(),
        responses=EVERYWHERE,
        docs_url=None,  # the pages load scripts from elsewhere
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    guard(app)
    app.router.routes.append(Route("/mcp", mcp, methods=["POST"]))
    _add_information(app, infos)
    _add_calls(app, infos, call)
    if end_session is not None:
        _add_sessions(app, end_session)
    return app


def _add_information(app: FastAPI, infos: Mapping[str, ToolInfo]) -> None:
    @app.get("/v1/tools", response_model=list[FunctionTool])
    async def list_tools() -> Any:
        """Every tool with the JSON schema of its parameters, as `tools` of a function-calling client."""
        functions = [{"name": info.name, "description": info.description, "parameters": info.parameters} for info in infos.values()]
        return [{"type": "function", "function": function} for function in functions]

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", response_model=Health)
    async def health() -> Any:
        return {"status": "ok", "tools": list(infos)}


def _add_calls(app: FastAPI, infos: Mapping[str, ToolInfo], call: Call) -> None:
    async def answer(asked: list[tuple[str, Arguments]]) -> list[ToolResult]:
        results: dict[int, ToolResult] = {}
        calls: dict[int, ToolCall] = {}
        for index, (tool, arguments) in enumerate(asked):
            try:
                calls[index] = arguments.call(tool, infos)
            except ToolError as error:
                results[index] = ToolResult(error.status, error.message)
        if calls:
            results |= zip(calls, await call(list(calls.values())), strict=True)
        return [results[index] for index in range(len(asked))]

    known = Path(description="The tool's.", json_schema_extra={"enum": list(infos)})

    @app.post("/v1/tools/{name:text}/call", response_model=Result, responses=OF_ONE_CALL | WITH_BODY)
    async def call_tool(body: Arguments, name: str = known) -> Response:
        """Calls one tool once."""
        [result] = await answer([(name, body)])
        code, headers = 200, None
        if result.status is ToolStatus.UNKNOWN_TOOL:
            code = 404
        elif result.status is ToolStatus.OVERLOADED:
            code, headers = 503, {"Retry-After": str(RETRY_AFTER_S)}
        return JSONResponse(result_fields(result), code, headers)

    @app.post("/v1/call", response_model=Results, responses=WITH_BODY)
    async def call_tools(body: Batch) -> Response:
        """Calls of any tools, all at once."""
        results = await answer([(row.tool, row) for row in body.calls])
        return JSONResponse({"results": [result_fields(result) for result in results]})


def _add_sessions(app: FastAPI, end_session: Callable[[str], None]) -> None:
    name = Path(min_length=1, max_length=MAX_SESSION_CHARS)

    @app.delete("/v1/sessions/{session:text}", status_code=204, responses=_refusals({422: "No session has such a name"}))
    async def forget_session(session: str = name) -> None:
        """Lets every tool forget what it keeps for the session; those that nobody uses are forgotten in time anyway."""
        end_session(session)
