"""What the sandbox counts: descriptors of its owner, threads of a snippet."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Iterator

import pytest

from tools_service.sandbox.descriptors import PER_CHILD, SPARE, make_room
from tools_service.sandbox.seccomp import CLONE, Supervisor
from tools_service.sandbox.tool import PythonTool


@pytest.fixture
def limits() -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_room_for_descriptors_is_made_where_it_is_needed_and_only_there(limits: tuple[int, int]) -> None:
    soft = len(os.listdir("/proc/self/fd")) + SPARE + PER_CHILD * 10
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limits[1]))
    make_room(8, "these need")
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, limits[1])
    make_room(12, "these need")
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limits[1], limits[1])


async def test_more_sessions_than_there_can_be_descriptors_are_refused_in_one_line() -> None:
    tool = PythonTool(stateful=True, max_sessions=10**9, max_concurrency=7)
    with pytest.raises(ValueError, match="^PythonInterpreter: max_sessions=1000000000 and max_concurrency=7 need .* ulimit -Hn[^\\n]*$"):
        await tool.start()
    await tool.close()


def test_threads_that_are_allowed_and_not_there_yet_count() -> None:
    """Asked by several threads at once, before any of the new ones can be seen."""
    alive = [int(name) for name in os.listdir("/proc/self/task")]
    supervisor = Supervisor(-1, os.getpid(), max_files=1, max_threads=len(alive) + 1)
    asker, other = alive[0], 1 << 22
    assert supervisor.judge(CLONE, asker) == 0
    assert supervisor.judge(CLONE, other) != 0
    assert supervisor.judge(CLONE, asker) == 0  # the one it asked for before has come, and gone
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        assert supervisor.judge(CLONE, other) != 0  # the one that asker was allowed lives
    finally:
        end.set()
        thread.join()
    while str(thread.native_id) in os.listdir("/proc/self/task"):  # the kernel's end of it comes a moment later
        time.sleep(0.001)
    assert supervisor.judge(CLONE, other) == 0  # it was seen: nothing is on its way any more
