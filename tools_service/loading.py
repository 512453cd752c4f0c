"""Loads a person's own module: by its import name, or by the path of a .py file. Standard library only."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class LoadingError(Exception):
    """The module or the name in it is missing; the message is one line."""


def load_module(spec: str) -> ModuleType:
    """spec: "package.module" or "path/to/file.py"."""
    if not spec.endswith(".py"):
        try:
            return importlib.import_module(spec)
        except ModuleNotFoundError as error:
            raise LoadingError(f"no module {spec!r} ({error}); give an importable name or the path of a .py file") from None
    path = Path(spec).absolute()
    if not path.is_file():
        raise LoadingError(f"no file {str(path)!r}")
    name = f"toolrl_user_{path.stem}_{abs(hash(str(path))):x}"
    if name not in sys.modules:
        module_spec = importlib.util.spec_from_file_location(name, path)
        assert module_spec is not None and module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[name] = module  # dataclasses and pickling look their module up there
        try:
            module_spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def load_name(spec: str) -> Any:
    """spec: "package.module:Name" or "path/to/file.py:Name"."""
    module, separator, name = spec.rpartition(":")
    if not separator:
        raise LoadingError(f"{spec!r} is not of the form module:Name or file.py:Name")
    loaded = load_module(module)
    if not hasattr(loaded, name):
        raise LoadingError(f"{module} has no {name!r}")
    return getattr(loaded, name)
