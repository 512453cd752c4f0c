"""Modules that the fork server loads: what they are made of is found, and one that cannot be forked is refused at the start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from stack.sandbox.core_helpers import ISOLATIONS, sandbox

from tools_service.sandbox.owner import SandboxStatus


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Makes a file of a module that can be imported."""

    def write_one(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        for part in (tmp_path, path.parent):
            part.chmod(0o755)  # the fork server may be another user
        monkeypatch.syspath_prepend(tmp_path)

    return write_one


LAZY = """
import sys, types
class Lazy(types.ModuleType):
    def __getattr__(self, name):
        raise ModuleNotFoundError(f"No module named 'absent', which {name} needs")
class NoModule:
    __slots__ = ()
sys.modules["lazy_parts.inner"] = Lazy("lazy_parts.inner")
sys.modules["lazy_parts.odd"] = types.ModuleType("lazy_parts.odd")
sys.modules["lazy_parts.odd"].__path__ = sys.modules["lazy_parts.odd"].__file__ = 3
sys.modules["lazy_parts.slots"], sys.modules["lazy_parts.none"] = NoModule(), None
"""


@pytest.mark.parametrize("isolation", ISOLATIONS)
async def test_a_module_that_loads_its_parts_when_they_are_asked_for_is_not_asked(isolation: str, write: Callable) -> None:
    write("lazy_parts.py", LAZY)
    async with sandbox(isolation, preload=("lazy_parts",)) as box:
        assert (await box.run("import lazy_parts\nprint(lazy_parts.__name__)")).output == "lazy_parts\n"


@pytest.mark.parametrize("isolation", ISOLATIONS)
async def test_a_package_without_a_file_of_its_own_can_be_preloaded(isolation: str, write: Callable) -> None:
    write("spaced_parts/inner.py", "number = 41\n")
    write("spaced_parts/other.py", "number = 42\n")
    async with sandbox(isolation, preload=("spaced_parts.inner",)) as box:
        outcome = await box.run("from spaced_parts import inner, other\nprint(inner.number, other.number)")
        assert (outcome.status, outcome.output) == (SandboxStatus.OK, "41 42\n")
