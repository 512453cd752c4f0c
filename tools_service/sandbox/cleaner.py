"""Removes what snippets leave in their scratch folders, in a process that can reach nothing else."""

from __future__ import annotations

import os
from dataclasses import replace

from tools_service.sandbox import lockdown


def fork_cleaner(confinement: lockdown.Confinement, folder: str) -> int:
    parent = os.getpid()
    limits = replace(confinement.limits, cpu_s=60)
    ruleset = lockdown.file_rules(confinement, folder) if confinement.landlock else -1
    try:
        pid = lockdown.fork()
        if pid == 0:
            try:
                lockdown.die_with_parent(parent)
                rlimits = lockdown.own_rlimits(limits, session=False)
                lockdown.lock_down(replace(confinement, limits=limits), ruleset, rlimits, lambda listener: None)
                empty(folder)
            finally:
                os._exit(0)
        return pid
    finally:
        if ruleset >= 0:
            os.close(ruleset)


def enter(folder: str) -> None:
    """Follows no link."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    os.fchdir(fd)
    os.close(fd)


def empty(folder: str) -> None:
    """Removes everything in it, by going into folders and out of them again: they may lie in each other as deep as they like."""
    enter(folder)
    path, todo = [], [os.listdir()]  # the folders from there to here by name, and what is left to remove in each of them
    while todo:
        if todo[-1]:
            name = todo[-1].pop()
            try:
                os.unlink(name)
            except OSError:
                enter(name)
                path.append(name)
                todo.append(os.listdir())
        else:
            todo.pop()
            if path:
                os.chdir("..")
                os.rmdir(path.pop())


def sweep(confinement: lockdown.Confinement, base: str) -> None:
    if os.listdir(base):
        os.waitpid(fork_cleaner(confinement, base), 0)
