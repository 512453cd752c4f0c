"""From a recipe (a YAML file) and `key.path=value` overrides to a `RunConfig`, with mistakes told in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from toolrl_ray.config import RunConfig
from toolrl_ray.errors import ConfigError
from tools_service.config import allowed_keys
from tools_service.strict_yaml import Repeated, read_yaml

RECIPES = Path(__file__).parent / "recipes"
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(recipe: str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """The resolved configuration of a recipe (a name, or a path that ends in .yaml) with `key.path=value` overrides.

    Raises ConfigError with one line that names what is wrong, the value and what is allowed.
    """
    tree = read(recipe)
    for override in overrides:
        _apply(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_first_line(error)) from None


def read(recipe: str) -> dict[str, Any]:
    """What the file of a recipe says. Raises ConfigError."""
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPES / f"{recipe}.yaml"
    if not os.path.isfile(path):
        raise ConfigError(f"unknown recipe {recipe!r}; recipes: {', '.join(recipe_names())}; or give a path to a .yaml file")
    try:
        tree = read_yaml(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        raise ConfigError(f"{path} is empty; a recipe that changes nothing holds {{}}")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not a {type(tree).__name__}")
    for key in tree:
        if not isinstance(key, str):
            shown = "null" if key is None else str(key).lower()
            allowed = ", ".join(RunConfig.model_fields)
            raise ConfigError(f"{path} holds the key {shown}, which YAML does not take for text; its keys: {allowed}")
    tree = {key: value for key, value in tree.items() if value is not None or not allowed_keys(RunConfig, (key,))}  # empty: the defaults
    tree.setdefault("recipe", path.stem)
    return tree


def dump(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key.path, value before, value now) wherever two trees differ; None is the value of a key that one of them lacks."""
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form key.path=value")
    try:
        value = read_yaml(text)
    except Repeated as error:
        raise ConfigError(f"override {override!r}: {error}") from None
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML; text that looks like something else needs quotes") from None
    if isinstance(value, str) and EXPONENT.fullmatch(text):
        value = float(text)  # YAML 1.1 reads 1e-3 as text
    *parents, last = key.split(".")
    for name in parents:
        if tree.get(name) is None:  # missing, or a section without a line
            tree[name] = {}
        tree = tree[name]
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {name!r} is a value, not a section")
    tree[last] = value


def _first_line(error: ValidationError) -> str:
    """pydantic's first complaint as one line: key, value, what is allowed."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        allowed = ", ".join(allowed_keys(RunConfig, first["loc"][:-1]))
        return f"unknown key {key!r} (value {first['input']!r}); allowed there: {allowed}"
    if first["type"] == "model_type":
        none = ", null for none" if key == "policy.lora" else ""
        keys = ", ".join(allowed_keys(RunConfig, first["loc"]))
        return f"{key}={first['input']!r}: a section is wanted, {{}} for its defaults{none}; its keys: {keys}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and not isinstance(first["input"], (str, int, float)):
        return message
    return f"{key}={first['input']!r}: {message[0].lower() + message[1:]}"
