"""What a service runs and how large: pydantic models, and the YAML file of `toolrl tools serve --config`.

    names: [SimpleCalculatorTool, Weekday]
    custom: {Weekday: weekday.py:Weekday}
    options: {}
    pools: {Weekday: {min_replicas: 1, max_replicas: 4}}
    http: {port: 8000}
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from tools_service.runner import GATEWAY
from tools_service.strict_yaml import read_yaml

LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
# What Ray does not take under `resources`, and what to do instead.
RAYS_OWN = {"CPU": "set num_cpus", "memory": "set memory_bytes", "GPU": "leave it out", "object_store_memory": "leave it out"}


class ServiceConfigError(ValueError):
    """The configuration is wrong; the message is one line."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses what pydantic takes for one: true for 1, and the text 010 for 10, which YAML 1.1 takes for 8."""
        kinds = set(_kinds(cls.model_fields[info.field_name or ""].annotation))
        if kinds & {int, float} and bool not in kinds:
            for one in _leaves(value):
                if isinstance(one, bool):
                    message = f"{str(one).lower()} is no number; YAML reads yes and on as true, no and off as false"
                    raise PydanticCustomError("number", message)
                if isinstance(one, str) and str not in kinds and LEADING_ZERO.fullmatch(one):
                    raise PydanticCustomError("number", f"{one!r} has a 0 before its digits, which YAML takes for octal; leave it out")
        return value


class PoolConfig(Section):
    """The replicas of one tool. With max_replicas above min_replicas their number follows the requests in flight.

    max_queued: requests that may wait in one caller's process for a free replica; beyond it they are answered OVERLOADED.
    target_in_flight: requests per replica that the pool is sized for (default: half of max_in_flight). A request of coalesced
        calls counts once.
    drain_s: a replica that is taken away ends its calls first, for at most so long.
    """

    min_replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)  # default: min_replicas
    num_cpus: float = Field(0.1, gt=0)  # per replica, as are the next three
    memory_bytes: int | None = Field(None, ge=1)
    resources: dict[str, Annotated[float, Field(gt=0)]] = {}  # of one's own naming
    max_in_flight: int = Field(64, ge=1)
    max_queued: int = Field(4096, ge=1)
    target_in_flight: float | None = Field(None, gt=0)
    upscale_delay_s: float = Field(5, ge=0)
    downscale_delay_s: float = Field(60, ge=0)
    health_period_s: float = Field(10, gt=0)
    health_timeout_s: float = Field(30, gt=0)
    drain_s: float = Field(30, ge=0)

    @field_validator("resources")
    @classmethod
    def _own(cls, value: dict[str, float]) -> dict[str, float]:
        for key, remedy in RAYS_OWN.items():
            if key in value:
                raise ValueError(f"{key} is Ray's own; {remedy}")
        return value

    @property
    def most_replicas(self) -> int:
        return self.max_replicas or self.min_replicas

    def contradictions(self) -> Iterator[str]:
        """One line for every two settings that cannot hold together."""
        if self.most_replicas < self.min_replicas:
            yield f"max_replicas={self.max_replicas} contradicts min_replicas={self.min_replicas}; raise max_replicas"
        if self.target_in_flight is not None and self.most_replicas == self.min_replicas:
            yield (
                f"target_in_flight={self.target_in_flight:g} contradicts max_replicas={self.most_replicas}, which is min_replicas; "
                "raise max_replicas or leave target_in_flight out"
            )
        if (self.target_in_flight or 0) > self.max_in_flight:
            yield (
                f"target_in_flight={self.target_in_flight:g} contradicts max_in_flight={self.max_in_flight}, which a replica never "
                "exceeds; lower target_in_flight"
            )


class HttpConfig(Section):
    """Serve's HTTP proxy. Loopback unless asked otherwise: the service knows no passwords."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)


class ToolSet(Section):
    """Which tools, made how, in which pools: what a service and a recipe have in common."""

    prefix: ClassVar[str] = ""  # of its keys in messages

    names: list[str] = Field(["SimpleCalculatorTool"], min_length=1)
    custom: dict[str, str] = {}  # name -> "module:Thing", "file.py:Thing" or "mcp:COMMAND or URL", tools of one's own
    options: dict[str, dict[str, Any]] = {}  # name -> keyword arguments of the tool's class
    pools: dict[str, PoolConfig] = {}
    start_timeout_s: float = Field(120, gt=0)

    @field_validator("custom")
    @classmethod
    def _absolute(cls, value: dict[str, str]) -> dict[str, str]:
        return {name: absolute_spec(spec) for name, spec in value.items()}

    @field_validator("options")
    @classmethod
    def _absolute_index(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """An index in a folder; any other name is that of a prebuilt one."""
        return {name: {key: _absolute_folder(key, option) for key, option in options.items()} for name, options in value.items()}

    @model_validator(mode="after")
    def _known_names(self) -> ToolSet:
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"{self.prefix}names={self.names} holds a name twice")
        for name in self.names:
            if (why := _unfit(name)) is not None:
                raise ValueError(f"{self.prefix}names={self.names} holds {name!r}, but {why}; give the tool another name")
        for section in ("custom", "options", "pools"):
            for name in getattr(self, section):
                if name not in self.names:
                    names = f"{self.prefix}names={self.names}"
                    raise ValueError(f"{self.prefix}{section}.{name} contradicts {names}: no such tool; add it there or take it away")
        for name in self.names:
            for problem in self.pool(name).contradictions():
                raise ValueError(f"{self.prefix}pools.{name}: {problem}")
        return self

    def pool(self, name: str) -> PoolConfig:
        return self.pools.get(name, PoolConfig())


class ServiceConfig(ToolSet):
    """A service that stands on its own. app: its name on the cluster, which a recipe gives as tools.app."""

    app: str = Field("tools", min_length=1)
    http: HttpConfig | None = None

    @field_validator("app")
    @classmethod
    def _fit(cls, value: str) -> str:
        if (why := _unfit_for_ray(value)) is not None:
            raise ValueError(f"{why}; choose another name")
        return value


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of, the values of a Literal among them by their types."""
    if get_origin(annotation) is Literal:
        yield from map(type, get_args(annotation))
    elif parts := get_args(annotation):
        for part in parts:
            yield from _kinds(part)
    else:
        yield annotation


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def _unfit(name: str) -> str | None:
    """Why no tool can be called so."""
    if name == GATEWAY:
        return "that is the service's HTTP face"
    if "/" in name:
        return "names stand in addresses, where / parts them"
    if not name or name != name.strip() or "<" in name or ">" in name:
        return "the policy has to write it as <NAME>"
    return _unfit_for_ray(name)


def _unfit_for_ray(name: str) -> str | None:
    if "#" in name:
        return "Ray Serve has a use of its own for #"
    if not name.isascii():
        return "Ray's metrics, which name it, take ASCII alone"
    return None


def _absolute_folder(key: str, option: Any) -> Any:
    if key == "index" and isinstance(option, str) and os.path.isdir(folder := os.path.expanduser(option)):
        return str(Path(folder).absolute())
    return option


def absolute_spec(spec: str) -> str:
    """`file.py:Thing` with the file named absolutely: the processes that read it have folders of their own."""
    path, separator, name = spec.rpartition(":")
    if spec.startswith("mcp:") or not path.endswith(".py"):
        return spec
    return f"{Path(os.path.expanduser(path)).absolute()}{separator}{name}"


def allowed_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at `location` in a tree of `model`; [] where there is none."""
    section: Any = model
    rest = list(location)
    while rest:
        field = section.model_fields.get(rest.pop(0))
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()  # a section may be null, or one of several by name
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if section is None:
            return []
        if get_origin(field.annotation) is dict:
            rest = rest[1:]
    return list(section.model_fields)


def load(path: str | Path) -> ServiceConfig:
    """The service that a YAML file describes. Raises ServiceConfigError with one line."""
    try:
        tree = read_yaml(Path(path).read_text())
    except OSError as error:
        raise ServiceConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ServiceConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ServiceConfigError(f"{path} must hold a mapping with names, custom, options, pools ..., not {type(tree).__name__}")
    return parse(tree, str(path))


def parse(tree: dict[str, Any], source: str) -> ServiceConfig:
    """Raises ServiceConfigError with one line that opens with `source`."""
    try:
        return ServiceConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            allowed = ", ".join(allowed_keys(ServiceConfig, first["loc"][:-1]))
            raise ServiceConfigError(f"{source}: unknown key {key!r} (value {first['input']!r}); allowed there: {allowed}") from None
        message = first["msg"].removeprefix("Value error, ")
        value = f"={first['input']!r}" if isinstance(first["input"], str | int | float) else ""
        raise ServiceConfigError(f"{source}: {key}{value}: {message}" if key else f"{source}: {message}") from None
