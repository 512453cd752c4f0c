"""How a snippet ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class SandboxStatus(StrEnum):
    OK = "ok"  # it ran to its end, or left with exit code 0
    ERROR = "error"  # it raised, or left with any other exit code
    TIMEOUT = "timeout"
    CPU_LIMIT = "cpu_limit"
    OUTPUT_LIMIT = "output_limit"
    MEMORY_LIMIT = "memory_limit"  # an uncaught MemoryError
    CRASHED = "crashed"  # a signal ended it
    BAD_REQUEST = "bad_request"  # not run: not text that can be code, or too much of it
    UNAVAILABLE = "unavailable"  # the sandbox failed, not the snippet: never a reward


@dataclass(frozen=True)
class Outcome:
    """output: stdout and stderr in the order in which they were written, any bytes turned into valid text; the traceback on ERROR.
    truncated: more was written than the limit. wall_s: seconds from handing the code over."""

    status: SandboxStatus
    output: str
    truncated: bool = False
    wall_s: float = 0.0


class IsolationUnavailable(Exception):
    """One line: what is missing and how to get it."""


class ZygoteDied(Exception):
    """The fork server ended under a call that may have begun."""


class ForkFailed(ZygoteDied):
    """One child could not be had; the fork server and all others under it live."""
