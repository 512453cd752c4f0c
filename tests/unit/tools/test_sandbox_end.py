"""What the end of a snippet's process is taken for."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest

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
