"""What the end of a snippet's process is taken for, and what is done after it."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools_service.sandbox import zygote
from tools_service.sandbox.limits import Limits
from tools_service.sandbox.outcome import SandboxStatus
from tools_service.sandbox.running import Child


@pytest.mark.parametrize(
    ("number", "cpu_s", "status"),
    [
        (signal.SIGXCPU, 0.85, SandboxStatus.CPU_LIMIT),  # as seen at a limit of 1 s where cores are shared
        (signal.SIGKILL, 1.9, SandboxStatus.CPU_LIMIT),
        (signal.SIGXCPU, 0.1, SandboxStatus.CRASHED),  # by its own hand
        (signal.SIGSEGV, 1.0, SandboxStatus.CRASHED),
    ],
)
def test_the_signal_of_the_cpu_limit_is_told_from_one_that_a_snippet_sends_itself(number: int, cpu_s: float, status: SandboxStatus) -> None:
    child = SimpleNamespace(limits=Limits(cpu_s=1.0), _truncated=False, _killed_for=None)
    assert Child._judge(child, int(number), cpu_s) is status


def test_a_folder_that_no_cleaner_can_be_forked_for_is_removed_after_another_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fork_cleaner(confinement: object, path: str) -> int:
        tried.append(path)
        if len(tried) == 1:
            raise BlockingIOError(errno.EAGAIN, "fork: Resource temporarily unavailable")
        return started("rm", "-r", *Path(path).iterdir())

    def started(*command: object) -> int:
        processes.append(subprocess.Popen(command))  # kept: one that is let go of is reaped by the next Popen, before its server sees it
        return processes[-1].pid

    def ended(**its: int) -> None:
        child = server.adopt(started("true"), **its)
        while child.number in server.children:
            server.on_exit(child)

    tried: list[str] = []
    processes: list[subprocess.Popen] = []
    monkeypatch.setattr("tools_service.sandbox.cleaner.fork_cleaner", fork_cleaner)
    control, channel = socket.socketpair()
    confinement = SimpleNamespace(limits=Limits())
    server = zygote.Server(control, os.pidfd_open(os.getpid()), channel, {"scratch": str(tmp_path)}, confinement)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    ended(scratch=os.open(tmp_path / "folder", os.O_PATH))
    assert (len(tried), len(server.children), len(server.uncleaned)) == (1, 0, 1)
    ended()
    (helper,) = server.children.values()
    while helper.number in server.children:
        server.on_exit(helper)
    assert list(tmp_path.iterdir()) == [] and not server.uncleaned
