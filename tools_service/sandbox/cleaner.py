"""Removes what snippets leave in their scratch folders, in a process that can reach nothing else."""

from __future__ import annotations

import os
from dataclasses import replace

from tools_service.sandbox import lockdown

MAX_OPEN_FILES = 4096  # one for each folder that the one which it empties lies in


def fork_cleaner(confinement: lockdown.Confinement, folder: str) -> int:
    parent = os.getpid()
    limits = replace(confinement.limits, max_open_files=min(confinement.limits.max_files + 64, MAX_OPEN_FILES), cpu_s=60)
    ruleset = lockdown.file_rules(confinement, folder) if confinement.landlock else -1
    pid = lockdown.fork()
    if pid == 0:
        try:
            lockdown.die_with_parent(parent)
            rlimits = lockdown.own_rlimits(limits, session=False)
            lockdown.lock_down(replace(confinement, limits=limits), ruleset, rlimits, lambda listener: None)
            empty(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW))
        finally:
            os._exit(0)
    if ruleset >= 0:
        os.close(ruleset)
    return pid


def empty(fd: int) -> None:
    """Removes everything under an open folder, following no link."""
    for name in os.listdir(fd):
        try:
            os.unlink(name, dir_fd=fd)
        except OSError:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            empty(inner)
            os.close(inner)
            os.rmdir(name, dir_fd=fd)


def sweep(confinement: lockdown.Confinement, base: str) -> None:
    if os.listdir(base):
        os.waitpid(fork_cleaner(confinement, base), 0)
