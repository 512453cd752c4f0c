"""The end of a command whose output nobody takes any more."""

from __future__ import annotations

import os
import select
import sys


def reader_has_gone() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads any more, or a terminal that was closed."""
    poll = select.poll()
    try:
        for stream in (sys.stdout, sys.stderr):
            poll.register(stream.fileno(), 0)  # errors are reported unasked
        return bool(poll.poll(0))
    except (OSError, ValueError):  # a test has put something else in their place
        return False


def drop() -> None:
    """What stdout cannot take python would try again as it ends, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
