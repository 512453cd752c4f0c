"""Modules that the fork server loads: what they are made of is found, and one that cannot be forked is refused at the start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from stack.sandbox.core_helpers import ISOLATIONS, sandbox

from tools_service.sandbox.owner import Sandbox, SandboxStatus


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


async def test_what_a_module_leaves_to_do_at_the_end_is_not_done_at_the_end_of_a_snippet(write: Callable) -> None:
    write("tidy_module.py", "import atexit\natexit.register(print, 'tidy')")
    async with sandbox("landlock", preload=("tidy_module", "logging")) as box:
        assert (await box.run("print(1)")).output == "1\n"


@pytest.mark.parametrize("isolation", ISOLATIONS)
async def test_a_package_without_a_file_of_its_own_can_be_preloaded(isolation: str, write: Callable) -> None:
    write("spaced_parts/inner.py", "number = 41\n")
    write("spaced_parts/other.py", "number = 42\n")
    async with sandbox(isolation, preload=("spaced_parts.inner",)) as box:
        outcome = await box.run("from spaced_parts import inner, other\nprint(inner.number, other.number)")
        assert (outcome.status, outcome.output) == (SandboxStatus.OK, "41 42\n")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()", "threads"),
        ("import mmap\nroom = mmap.mmap(-1, 4096)", "shared .*/dev/zero"),
        ("raise RuntimeError('no\\nluck')", "bad_module: RuntimeError: no luck; "),
        ("import sys\nsys.exit(3)", "bad_module: SystemExit: 3; "),
        ("import no_such_module", "No module named 'no_such_module'; "),
    ],
)
async def test_a_module_that_cannot_be_preloaded_is_refused_and_nothing_else_is_blamed(text: str, reason: str, write: Callable) -> None:
    write("bad_module.py", text)
    with pytest.raises(ValueError, match=rf"^sandbox preload=\('math', 'bad_module'\): [^\n]*{reason}[^\n]*leave it out$"):
        await Sandbox(preload=("math", "bad_module")).start()
