"""The file descriptors of this process, and whether what is wanted fits into them."""

from __future__ import annotations

import os
import resource

from tools_service.sandbox.limits import Limits

PER_CHILD = 3  # its job channel, its output and its pidfd
SPARE = 64  # the fork server's, and whatever this process opens meanwhile


def check_open_files(limits: Limits) -> None:
    """The fork server holds a descriptor of that number. Raises ValueError."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and limits.max_open_files >= hard:
        raise ValueError(
            f"sandbox limit max_open_files={limits.max_open_files} must be below this machine's own limit on the open files of a "
            f"process, {hard}; lower it or raise that (ulimit -Hn)"
        )


def make_room(num_children: int, asked_for: str) -> None:
    """Raises this process's soft limit on open files where so many children at once need it; ValueError where the hard one is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + PER_CHILD * num_children + SPARE
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise ValueError(f"{asked_for} {needed} open files in one process, which has {hard} at most here; lower that or raise ulimit -Hn")
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
