"""A typed and documented function as a tool: its description from the docstring, its parameters from its types by pydantic."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from pydantic import TypeAdapter, with_config
from pydantic.fields import FieldInfo
from typing_extensions import TypedDict  # pydantic refuses typing's before 3.12

from tools_service.adapters import AsyncCallableTool, CallableTool, with_statements
from tools_service.loading import LoadingError


def function_tool(name: str, spec: str, function: Callable[..., Any]) -> CallableTool:
    """The function as the tool `name`. spec: what the messages call it. Raises LoadingError with one line."""

    def wrong(what: str) -> LoadingError:
        return LoadingError(f"tool {name}={spec!r}: {' '.join(what.split())}")

    description = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
    if not description:
        raise wrong("the function has no docstring; its first paragraph tells the model what the tool does")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise wrong("the function yields; return the whole answer")
    signature = inspect.signature(function)
    notes = {name: one.annotation for name, one in signature.parameters.items() if one.annotation is not one.empty}
    try:  # of the parameters alone: what stands behind the arrow may be anything
        hints = typing.get_type_hints(SimpleNamespace(__annotations__=notes, __wrapped__=function), include_extras=True)
    except Exception as error:  # a hint is an expression, and can raise anything
        raise wrong(f"its type hints cannot be read: {error}") from None
    fields: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            bare = parameter.replace(annotation=parameter.empty, default=parameter.empty)  # with its stars
            raise wrong(f"parameter {str(bare)!r} cannot be given by name; use plain named parameters")
        if parameter.name not in hints:
            raise wrong(f"parameter {parameter.name!r} has no type; write one, for example {parameter.name}: str")
        hint, default = hints[parameter.name], parameter.default
        is_optional = default is not parameter.empty
        if isinstance(default, FieldInfo):  # tells pydantic all, its own default too
            hint, is_optional = typing.Annotated[hint, default], not default.is_required()
        elif is_optional:
            defaults[parameter.name] = default
        fields[parameter.name] = typing.NotRequired[hint] if is_optional else hint
    try:
        # A TypedDict takes parameters of any name, a model does not.
        adapter = TypeAdapter(with_config({"extra": "forbid"})(TypedDict("Arguments", fields)))
        parameters = adapter.json_schema()
    except Exception as error:  # pydantic has one class for each of its reasons
        raise wrong(f"a parameter's type has no JSON form: {error}") from None
    for key, schema in parameters.setdefault("properties", {}).items():
        schema.pop("title", None)
        if isinstance(defaults.get(key), str | int | float | bool):
            schema["default"] = defaults[key]
        try:
            json.dumps(schema, allow_nan=False)
        except ValueError:  # an infinite default, or one of thousands of digits
            schema.pop("default", None)
    parameters = {key: value for key, value in parameters.items() if key != "title"}
    kind = AsyncCallableTool if inspect.iscoroutinefunction(function) else CallableTool
    return with_statements(kind(name, description, function, parameters, adapter.validate_python), function)
