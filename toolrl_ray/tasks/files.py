"""Rows of a data set: from a local JSON-lines file, or from the Hub. Mistakes are one line."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolrl_ray.errors import ConfigError, MissingDependency


def json_lines(path: Path, wanted: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line of task.path that is not blank; a name that ends in .xz is unpacked on the way. wanted: what a
    line has to hold, for the messages of the ConfigErrors that it raises."""
    remedy = f"give a JSON-lines file with {wanted}"
    try:
        data = path.read_bytes()
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8-sig")  # some editors put a byte-order mark first
    except OSError as error:
        raise ConfigError(f"task.path={str(path)!r} cannot be read ({error.strerror}); {remedy}") from None
    except lzma.LZMAError as error:
        raise ConfigError(f"task.path={str(path)!r} is not an .xz file ({error}); {remedy}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"task.path={str(path)!r} is not UTF-8 text; {remedy}") from None
    if not text.strip():
        raise ConfigError(f"task.path={str(path)!r} is empty; {remedy}")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}:{number}: not a JSON object with {wanted} ({error})") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{path}:{number}: not a JSON object with {wanted}, but {line!r:.100}")
        yield number, row


def hub_dataset(name: str, subset: str, source: str) -> Any:
    """The data set of that name, by split. Raises MissingDependency or ConfigError."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingDependency(
            f"task.source={source} without task.path reads the Hub: pip install 'toolrl-ray[hub]', or set task.path"
        ) from None
    try:
        return load_dataset(name, subset)
    except (OSError, ValueError, RuntimeError) as error:
        first = " ".join(str(error).split())[:160]
        raise ConfigError(f"{name} cannot be loaded from the Hub ({first}); set task.path to a local file") from None
