"""Loads a person's own module: by its import name, or by the path of a .py file. Standard library only."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any


class LoadingError(Exception):
    """The module or the name in it is missing, or the module cannot be executed; the message is one line."""


def load_module(spec: str) -> ModuleType:
    """spec: "package.module" or "path/to/file.py". Raises LoadingError, whatever goes wrong in the module.

    A file's module has the same name in every process: objects of its classes unpickle wherever it has been loaded.
    """
    if not spec.endswith(".py"):
        try:
            return importlib.import_module(spec)
        except (Exception, SystemExit) as error:
            absent = isinstance(error, ModuleNotFoundError) and error.name and f"{spec}.".startswith(f"{error.name}.")
            if absent or (isinstance(error, (TypeError, ValueError)) and not _frames(error)):  # not there, or not even a name
                raise LoadingError(f"no module {spec!r} ({error}); give an importable name or the path of a .py file") from None
            raise LoadingError(failure(error)) from None
    path = Path(spec).absolute()
    if not path.is_file():
        raise LoadingError(f"no file {str(path)!r}")
    name = f"toolrl_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        module_spec = importlib.util.spec_from_file_location(name, path)
        assert module_spec is not None and module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[name] = module  # dataclasses and pickling look their module up there
        try:
            module_spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            if isinstance(error, (Exception, SystemExit)):
                raise LoadingError(failure(error, path)) from None
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


def failure(error: BaseException, path: Path | None = None) -> str:
    """`FILE, line N: CLASS: MESSAGE`: the last line reached in the person's file, not the one in a library that it called."""
    place, frames = str(path or ""), _frames(error)
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        place, text = f"{error.filename}, line {error.lineno}", error.msg
    else:
        text = str(error)
        if frames:
            place = f"{frames[0].filename}, line {[frame for frame in frames if frame.filename == frames[0].filename][-1].lineno}"
    return f"{place}: {type(error).__name__}: {' '.join(text.split())}".removeprefix(": ")


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Where it came from, without this file and the machinery of importing."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if frame.filename not in (__file__, importlib.__file__) and not frame.filename.startswith("<frozen")]
