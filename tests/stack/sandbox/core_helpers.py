"""What the sandbox's tests share: the isolations that can be tried here, and looks into the process table."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tools_service.sandbox.owner import Limits, Sandbox


def namespaces_work() -> bool:
    if shutil.which("bwrap") is None:
        return False
    command = ["bwrap", "--unshare-pid", "--unshare-net", "--ro-bind", "/", "/", "true"]
    return subprocess.run(command, capture_output=True, timeout=10).returncode == 0


ISOLATIONS = [
    pytest.param("bubblewrap", marks=pytest.mark.skipif(not namespaces_work(), reason="needs bwrap on PATH and user namespaces")),
    "landlock",
]


@asynccontextmanager
async def sandbox(isolation: str, limits: Limits | None = None, **options) -> AsyncIterator[Sandbox]:
    box = Sandbox(limits, isolation=isolation, **options)
    await box.start()
    try:
        yield box
    finally:
        await box.close()


def descendants(pid: int) -> set[int]:
    """Every process below this one."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found: set[int] = set()
    todo = [pid]
    while todo:
        parent = todo.pop()
        new = {child for child, its in parents.items() if its == parent} - found
        found |= new
        todo += new
    return found


def alive(pids: set[int]) -> set[int]:
    """Those that run; a zombie does not."""
    found = set()
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] != "Z":
                    found.add(pid)
        except OSError:
            continue
    return found


async def gone(pids: set[int], within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while alive(pids) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    return not alive(pids)


def scratch_folders(prefix: str = "tools-sandbox-") -> set[str]:
    import tempfile

    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith(prefix)}
