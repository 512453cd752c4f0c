"""What of the machine's files can be read: the standard library and what the loaded modules are made of, not what lies beside them.

A child's own Landlock rules are few and name whole folders, because every rule costs every snippet. Where such a folder holds other
packages too, as the standard library's does, the fork server takes the right to read those from itself once, and so from its children.
Their names can still be listed there: a folder that may not be listed is one that nothing can be imported from.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterable

from tools_service.sandbox import lockdown
from tools_service.sandbox.limits import Limits
from tools_service.sandbox.seccomp import allow_list


def parts_of_modules(sites: list[str]) -> list[str]:
    """Files and folders right under these folders that hold what is loaded, and the shared libraries of wheels beside it."""
    with open("/proc/self/maps") as file:
        used = {line[line.index("/") :].rstrip("\n") for line in file if "/" in line}
    for module in list(sys.modules.values()):
        its = getattr(module, "__dict__", {})  # to ask the module itself may load what is not installed
        paths = its.get("__path__")
        used |= {path for path in (its.get("__file__"), *(paths if isinstance(paths, Iterable) else ())) if isinstance(path, str)}
    found = set()
    for site in sites:
        tops = {path[len(site) + 1 :].partition("/")[0] for path in used if path.startswith(site + "/")}
        found |= {os.path.join(site, name) for top in tops for name in (top, f"{top}.libs")}
    return sorted(path for path in found if os.path.exists(path))


def without(path: str, hidden: list[str]) -> list[str]:
    """What together is this folder but for the hidden ones in it. A link needs no rule: what it leads to has one, or shall not be read."""
    if path in hidden:
        return []
    if not any(other.startswith(path + "/") for other in hidden):
        return [path]
    inner = [os.path.join(path, name) for name in sorted(os.listdir(path))]
    return [part for entry in inner if not os.path.islink(entry) for part in without(entry, hidden)]


def open_confinement(config: dict, parts: list[str]) -> lockdown.Confinement:
    """Opens what children may read, once: a rule binds to the file, not to its name."""

    def opened(path: str) -> int:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)

    paths = [*config["read_paths"], *(part for part in parts if not part.startswith(tuple(f"{path}/" for path in config["read_paths"])))]
    read = tuple((opened(path), os.path.isdir(path)) for path in paths if os.path.exists(path))
    devices = tuple(opened(path) for path in config["devices"] if os.path.exists(path))
    limits = Limits(**config["limits"])
    programs = None
    if config["seccomp"]:
        programs = tuple(allow_list(config["landlock"], supervised, limits.max_open_files) for supervised in (True, False))
    return lockdown.Confinement(limits, read, devices, lockdown.landlock_abi() if config["landlock"] else 0, programs)


def hide(config: dict, parts: list[str], abi: int) -> None:
    """Takes the right to read in config["hidden"], but for these parts, from the calling process, which must have no_new_privs."""
    if not abi or not config["hidden"]:
        return
    refer = lockdown.REFER if abi >= 2 else 0  # handled by every ruleset, whether it says so or not
    ruleset = lockdown.new_ruleset(struct.pack("<Q", lockdown.READ_FILE | refer))
    read = [part for path in config["read_paths"] if os.path.isdir(path) for part in without(path, config["hidden"])]
    files = [path for path in config["read_paths"] if os.path.isfile(path)]
    for path in (*read, *files, *parts, *config["devices"], "/proc", config["scratch"]):
        if path and os.path.exists(path):
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            lockdown.add_rule(ruleset, fd, lockdown.READ_FILE | (refer if path == config["scratch"] else 0))
            os.close(fd)
    lockdown.check(lockdown.libc.syscall(lockdown.LANDLOCK_RESTRICT, ruleset, ctypes.c_size_t(0)), "landlock_restrict_self")
    os.close(ruleset)
