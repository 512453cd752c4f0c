"""A Ray of one's own on this machine, and whether one is meant."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psutil

from toolrl_ray.errors import UserError
from toolrl_ray.home import home

TRIES = 3
END_S = 10.0


def cluster_address(given: str | None = None) -> str | None:
    """The cluster that is `given`, or else RAY_ADDRESS; None where that is a Ray of one's own: "local", as for Ray itself, or nothing."""
    address = given or os.environ.get("RAY_ADDRESS")
    return None if address in ("", "local") else address


def start_local(say: Callable[[str], None] = lambda _: None, **options: Any) -> None:
    """`ray.init(address="local", **options)`, tried again where Ray does not come up.

    Ray gives its processes a fixed 30 s, which a machine that is busy for a moment exceeds, and forgets those that it has started
    by then: they are ended before the next try. Raises UserError after the last one.
    """
    import ray

    _have_token()
    options = {"address": "local", "include_dashboard": False, **options}
    if (python := shlex.quote(sys.executable)) != sys.executable:  # a path with a space: Ray puts it into a shell's command line as it is
        options["runtime_env"] = {"py_executable": python}
    for left in reversed(range(TRIES)):
        before = set(_children())
        try:
            with own_sigterm(), _in_groups_of_their_own():
                ray.init(**options)
        except Exception as error:  # of no class of its own
            _end(set(_children()) - before)
            reason = " ".join(str(error).split())[:200]
            too_long = "AF_UNIX path length" in reason
            remedy = "; set TMPDIR or RAY_TMPDIR to a folder with a shorter name, such as /tmp" if too_long else ""
            if remedy or not left:
                raise UserError(f"a local Ray does not start: {reason}{remedy}") from None
            say(f"Ray did not start ({reason}): trying again")
        else:
            return


@contextlib.contextmanager
def _in_groups_of_their_own() -> Iterator[None]:
    """Each of Ray's processes that start meanwhile leads a process group. In this process's own, a signal to that group (of `timeout`,
    a shell's `kill %1`) would end them before this process can take them down, and a Ray that dies ends this process: status 1, from
    a thread of Ray's own, without a word. They die with this process nevertheless: Ray asks the kernel for that."""
    from ray._private import services

    popen = services.ConsolePopen
    services.ConsolePopen = partial(popen, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = popen


@contextlib.contextmanager
def own_sigterm() -> Iterator[None]:
    """SIGTERM is this process's own also while `ray.init` runs, which puts a handler there that exits without a word, with status 15. Its
    C++ part puts one there that aborts with a dump: that one is there until `ray.init` is over."""
    from ray._private import utils

    handler, set_handler = signal.getsignal(signal.SIGTERM), utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = set_handler
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _have_token() -> None:
    """Ray makes a token and keeps it in ~/.ray, without which it does not start: where nothing can be kept there, this process's own."""
    is_kept = False
    if own := home():
        folder = own / ".ray"
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
            is_kept = os.access(folder, os.W_OK)
    if not is_kept and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _end(processes: set[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=END_S)
