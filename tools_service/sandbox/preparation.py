"""What the fork server does to itself before it forks."""

from __future__ import annotations

import _sitebuiltins
import builtins
import importlib
import os
import platform
import resource
import shutil
import socket
import sys

from tools_service.sandbox import child as child_side
from tools_service.sandbox import lockdown, tracebacks


class CannotPreload(Exception):
    """A module of the preload set is at fault, not what isolates."""


def reserve_channel(number: int) -> socket.socket:
    """Holds the number that a child's way back has. To be called before anything else may get it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    placeholder, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return socket.socket(fileno=os.dup2(placeholder.fileno(), number, inheritable=False))


def drop_privileges(uid: int | None) -> None:
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    lockdown.drop_capabilities()


def load(config: dict) -> None:
    sys.path += config["site_paths"]
    hide_host_name()  # first: modules keep what they were told
    fit_defaults(config["limits"]["max_threads"])
    sys.argv, sys.orig_argv = [""], [""]
    for name in config["preload"]:
        try:
            importlib.import_module(name)
        except BaseException as error:
            reason = f"{name}: {type(error).__name__}: {error}"
            raise CannotPreload(f"{reason}; correct the name, install what it lacks or leave it out") from error
    if "numpy" in sys.modules:
        importlib.import_module("numpy.random")  # numpy loads it at its first use: too late for a seed
    os.environ.clear()
    for name in ("exit", "quit"):  # `site`, which is left out, makes these
        setattr(builtins, name, _sitebuiltins.Quitter(name, ""))
    builtins.help = _sitebuiltins._Helper()
    tracebacks.hide_frames_of(sys.path)
    sys.path[:] = [path for path in sys.path if path not in config["site_paths"]]  # what else lies there cannot be read
    child_side.warm_up()
    child_side.set_limits(config["limits"])
    importlib.invalidate_caches()
    refuse_what_cannot_be_forked()


def refuse_what_cannot_be_forked() -> None:
    if len(os.listdir("/proc/self/task")) != 1:
        raise CannotPreload("one of these starts threads, and a process with threads cannot be forked; leave it out")
    with open("/proc/self/maps") as file:
        parts = [line.split(maxsplit=5) for line in file]
    if shared := [part[-1].strip() for part in parts if part[1].startswith("rw-s")]:
        raise CannotPreload(f"one of these holds memory that would be shared by all snippets ({shared[0]}); leave it out")


def hide_host_name() -> None:
    """uname, which tells the host's name, is refused to snippets. What modules ask of it is answered from here."""
    real = os.uname()
    hidden = os.uname_result((real.sysname, "sandbox", real.release, real.version, real.machine))
    os.uname = sys.modules["posix"].uname = lambda: hidden
    socket.gethostname = sys.modules["_socket"].gethostname = lambda: hidden.nodename
    platform._uname_cache = None
    platform.uname()


def fit_defaults(max_threads: int) -> None:
    """What would fail within the limits and the filter without having been asked for by name."""
    num_cores = max(1, min(os.cpu_count() or 1, max_threads - 5))  # a ThreadPoolExecutor has four threads more, beside the main one
    os.cpu_count = lambda: num_cores
    # Modes and times cannot be changed: copies have the contents alone.
    shutil.copymode = shutil.copystat = lambda src, dst, *, follow_symlinks=True: None


def mapped_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
