"""A tool of one's own: makes a `Tool` or an `AsyncTool` of a class, an object, a plain function, a transformers-style tool or an MCP
server, and turns a call's JSON arguments into its one text and back.

The convention: a tool whose only parameter is a required string gets that string as it is. Every other tool gets the text of a JSON
object; where it has one parameter alone, that one's JSON value will do, unless that is an object itself.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from tools_service.loading import LoadingError, load_name
from tools_service.protocol import AsyncTool, Tool, ToolCall, ToolError, ToolResult, ToolStatus

MCP_PREFIX = "mcp:"
# What a function or a transformers-style tool may state of itself, as attributes: see `Tool`.
STATEMENTS = ("idempotent", "probe", "max_batch", "cacheable")
# What stands for each JSON type. A bool is no number, and True would pass for an int.
JSON_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool) or isinstance(value, float) and value.is_integer(),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "null": lambda value: value is None,
}


def text_parameter(parameters: Mapping[str, Any]) -> str | None:
    """The name of the only parameter, where that is a required string: the tool then takes plain text."""
    properties = parameters.get("properties") or {}
    if len(properties) != 1:
        return None
    [(name, schema)] = properties.items()
    required = name in (parameters.get("required") or ())
    return name if required and isinstance(schema, Mapping) and schema.get("type") == "string" else None


def argument_text(parameters: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    """The text that a tool with these parameters (a JSON schema) gets for these arguments.

    Raises ToolError(BAD_ARGUMENTS) where they do not fit the schema; see check_arguments for what is looked at.
    """
    try:
        check_arguments(parameters, arguments)
        name = text_parameter(parameters)
        return valid_text(arguments[name] if name is not None else json.dumps(dict(arguments), ensure_ascii=False, allow_nan=False))
    except RecursionError:
        raise _bad("the arguments are nested too deeply") from None
    except ValueError:  # infinite, or an integer of thousands of digits
        raise _bad("the arguments hold a number that JSON cannot carry") from None


def arguments_of(parameters: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The inverse of argument_text, unchecked. Blank text stands for no arguments, and a JSON value that is no object for the only
    parameter's. Raises ToolError(BAD_ARGUMENTS)."""
    if (name := text_parameter(parameters)) is not None:
        return {name: text}
    try:
        arguments = json.loads(text, parse_constant=_finite, parse_float=_finite) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        names = ", ".join(parameters.get("properties") or {})
        raise _bad(f"the call is not a JSON object with {names or 'no keys'} ({type(error).__name__}: {error})") from None
    if isinstance(arguments, dict):
        return arguments
    if len(names := list(parameters.get("properties") or ())) != 1:
        raise _bad(f"the call is a JSON {type(arguments).__name__}, not an object")
    return {names[0]: arguments}


def check_arguments(parameters: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Required names, names that are not allowed, and the JSON type of each value; what goes deeper is the tool's to judge."""
    properties = parameters.get("properties") or {}
    for name in parameters.get("required") or ():
        if name not in arguments:
            raise _bad(f"argument {name!r} is missing; required: {', '.join(parameters['required'])}")
    for name, value in arguments.items():
        if name not in properties:
            if parameters.get("additionalProperties") is False or text_parameter(parameters) is not None:
                raise _bad(f"unknown argument {name!r}; arguments: {', '.join(properties) or 'none'}")
            continue
        wanted = properties[name].get("type") if isinstance(properties[name], Mapping) else None
        kinds = [wanted] if isinstance(wanted, str) else list(wanted or ())
        if kinds and not any(JSON_TYPES.get(kind, lambda _: True)(value) for kind in kinds):
            raise _bad(f"argument {name!r} must be {' or '.join(kinds)}, not {json.dumps(value)[:60]}")


def valid_text(text: str) -> str:
    """Text that UTF-8 can carry: pairs of surrogates are joined, lone ones replaced."""
    if text.isascii():
        return str(text)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def result_fields(result: ToolResult) -> dict[str, Any]:
    """What the HTTP and the MCP face show of a result."""
    text = valid_text(result.text)
    return {"status": str(result.status), "text": text, "latency_s": result.latency_s, "truncated": result.truncated}


def load_tool(name: str, spec: str, options: Mapping[str, Any]) -> Tool | AsyncTool:
    """The tool that is served as `name`. spec: "file.py:Thing", "module:Thing", "mcp:COMMAND ARGS" or "mcp:http://...".

    A Thing is a class (made with **options), an object with name, description and a call, a typed and documented function, or a
    transformers-style tool. Raises LoadingError with one line.
    """
    if spec.startswith(MCP_PREFIX):
        from tools_service.mcp_client import MCPTool

        return _made(name, spec, partial(MCPTool, name, spec.removeprefix(MCP_PREFIX)), options)
    return adapt(name, spec, load_name(spec), options)


def adapt(name: str, spec: str, thing: Any, options: Mapping[str, Any]) -> Tool | AsyncTool:
    """The same of a Thing that is at hand. spec: what the messages call it."""
    if not inspect.isclass(thing) and options:
        raise LoadingError(f"tool {name}={spec!r} takes no options (only a class does), but has {', '.join(options)}")
    cached = inspect.isfunction(inspect.unwrap(thing)) and not hasattr(thing, "description")  # by functools, or the like
    if inspect.isfunction(thing) or inspect.ismethod(thing) or cached:
        from tools_service.functions import function_tool

        return function_tool(name, spec, thing)
    tool = _made(name, spec, thing, options) if inspect.isclass(thing) else thing
    if isinstance(getattr(tool, "inputs", None), Mapping):
        return _transformers_tool(name, spec, tool)
    missing = [attribute for attribute in ("name", "description", "idempotent") if not hasattr(tool, attribute)]
    if missing or not (hasattr(tool, "call") or hasattr(tool, "call_many") or callable(tool)):
        lack = ", ".join(missing) or "__call__"
        raise LoadingError(f"tool {name}={spec!r}: {type(tool).__name__} lacks {lack}; a tool has name, description, idempotent, __call__")
    if tool.name != name:
        raise LoadingError(f"tool {name}={spec!r} calls itself {tool.name!r}; use one name")
    return tool


class CallableTool:
    """A python function of named arguments as a Tool. `check` turns JSON values into what the function takes."""

    def __init__(self, name: str, description: str, function: Callable[..., Any], parameters: dict[str, Any], check: Callable[[Any], dict]):
        self.name, self.description, self.parameters = name, description, parameters
        self.idempotent = False
        self._function, self._check = function, check
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()

    def arguments(self, text: str) -> dict[str, Any]:
        from pydantic import ValidationError

        try:
            return self._check(arguments_of(self.parameters, text))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            raise _bad(f"argument {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None

    def apply(self, argument: str) -> Any:
        """What the function returns."""
        return self._function(**self.arguments(argument))

    def __call__(self, argument: str) -> str:
        return output_text(awaited(self.apply(argument), self._loop))


class AsyncCallableTool(CallableTool):
    """The same for an `async def`. What it raises, and its deadline, are the Executor's to handle."""

    async def call(self, call: ToolCall) -> ToolResult:
        return ToolResult(ToolStatus.OK, output_text(await self._function(**self.arguments(call.argument))))


def awaited(output: Any, loop: asyncio.AbstractEventLoop | None) -> Any:
    """In a tool's thread: the output of a function, awaited on `loop` where a plain function returned what has to be (a lambda around an
    `async def`, a decorated one). All calls share the loop, as what they hold between them, a client or a lock, is of one loop."""
    if not inspect.isawaitable(output):
        return output
    thread = threading.current_thread()

    async def wait() -> Any:
        thread.task = asyncio.current_task()  # for the Executor, which cancels it when nobody waits for the call any more
        return await output

    if loop is None:
        return asyncio.run(wait())
    future = asyncio.run_coroutine_threadsafe(wait(), loop)
    try:
        return future.result()
    except Exception:
        if future.cancelled():
            raise ToolError("the call was cancelled") from None
        raise


def output_text(output: Any) -> str:
    """Text as it is, JSON for what JSON spells otherwise than python, str() for the rest, and for what JSON cannot say. Raises ToolError
    for a generator, whose str() says nothing."""
    if inspect.isgenerator(output) or inspect.isasyncgen(output):
        raise ToolError(f"the tool returned {type(output).__name__} instead of text")
    if isinstance(output, dict | list | tuple | bool | None):
        try:
            return json.dumps(output, ensure_ascii=False, default=str)
        except (TypeError, ValueError):  # keys that are no text, a list that holds itself
            return str(output)
    return str(output)


def _transformers_tool(name: str, spec: str, tool: Any) -> CallableTool:
    """inputs: {name: {"type": "string" | "integer" | ..., "description": ..., "nullable": bool}}; the call goes by keyword."""
    function = tool if callable(tool) else getattr(tool, "forward", None)
    if function is None:
        raise LoadingError(f"tool {name}={spec!r} has inputs but neither __call__ nor forward")
    properties: dict[str, Any] = {}
    required = []
    for key, given in tool.inputs.items():
        kind = given.get("type") if isinstance(given, Mapping) else None
        kinds = [kind] if isinstance(kind, str) else kind
        if not kinds or not isinstance(kinds, list | tuple) or any(kind not in (*JSON_TYPES, "any") for kind in kinds):
            raise LoadingError(f"tool {name}={spec!r}: input {key!r} has type {kind!r}; a tool here takes {', '.join(JSON_TYPES)}, any")
        kinds = [*kinds, "null"] if given.get("nullable") and "null" not in kinds else list(kinds)
        kind_schema = {} if "any" in kinds else {"type": kinds[0] if len(kinds) == 1 else kinds}
        properties[key] = kind_schema | {"description": str(given.get("description", ""))}
        if not given.get("nullable"):
            required.append(key)
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    description = " ".join(str(getattr(tool, "description", "")).split())
    if not description:
        raise LoadingError(f"tool {name}={spec!r} has no description; the model reads it")

    def check(arguments: dict[str, Any]) -> dict[str, Any]:
        check_arguments(parameters, arguments)
        return arguments

    return with_statements(CallableTool(name, description, function, parameters, check), tool)


def with_statements(tool: CallableTool, source: Any) -> CallableTool:
    """The tool, with what `source` states of itself."""
    for attribute in STATEMENTS:
        if hasattr(source, attribute):
            setattr(tool, attribute, getattr(source, attribute))
    return tool


def _made(name: str, spec: str, thing: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    try:
        return thing(**options)
    except Exception as error:  # of a person's own constructor: anything
        message = " ".join(str(error).split())
        given = f" with options {', '.join(options)}" if options else ""  # names alone: a value may be a secret
        raise LoadingError(f"tool {name}={spec!r} cannot be made{given}: {type(error).__name__}: {message}") from error


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not finite")
    return value


def _bad(message: str) -> ToolError:
    return ToolError(" ".join(message.split()), ToolStatus.BAD_ARGUMENTS)
