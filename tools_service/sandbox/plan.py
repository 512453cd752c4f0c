"""How the fork server is to be executed in each isolation: its command line, and what its children may read."""

from __future__ import annotations

import glob
import importlib.util
import os
import random
import shutil
import sys
import sysconfig
import tempfile
from dataclasses import asdict, dataclass

from tools_service.sandbox.descriptors import check_open_files
from tools_service.sandbox.limits import MIB, Limits
from tools_service.sandbox.outcome import IsolationUnavailable

SCRATCH_TMPFS_BYTES = 1024 * MIB
TIERS = {"bubblewrap": "bubblewrap+landlock+seccomp", "landlock": "landlock+seccomp", "seccomp": "seccomp", "none": "none"}
PACKAGE_FOLDERS = ("site-packages", "dist-packages")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/usr/share/zoneinfo")
# One thread per BLAS call: a fork server must have no threads, and a snippet has one core's share anyway.
ENVIRONMENT = {
    "PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "2", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
}  # fmt: skip
DEFAULT_PRELOAD = (
    "math", "json", "re", "random", "itertools", "collections", "functools", "datetime", "decimal", "fractions", "statistics", "string",
)  # fmt: skip
# Where no file can be opened, what is not loaded beforehand cannot be imported.
STDLIB_PRELOAD = (
    "abc", "argparse", "array", "ast", "asyncio", "base64", "bisect", "bz2", "calendar", "cmath", "collections", "colorsys",
    "concurrent.futures.thread", "contextlib", "copy", "csv", "ctypes", "dataclasses", "datetime", "decimal", "difflib",
    "encodings.ascii", "encodings.idna", "encodings.latin_1", "enum", "fnmatch", "fractions", "functools", "glob", "graphlib", "gzip",
    "hashlib", "heapq", "html", "inspect", "io", "ipaddress", "itertools", "json", "locale", "logging", "lzma", "math", "numbers",
    "operator", "pathlib", "pickle", "platform", "pprint", "pydoc", "queue", "random", "re", "reprlib", "secrets", "selectors", "shlex",
    "shutil", "signal", "sqlite3", "statistics", "string", "struct", "tempfile", "textwrap", "threading", "time", "timeit", "traceback",
    "types", "typing", "unicodedata", "unittest", "urllib.parse", "uuid", "warnings", "weakref", "xml.etree.ElementTree", "zipfile",
    "zlib", "zoneinfo",
)  # fmt: skip


def site_paths(preload: tuple[str, ...]) -> list[str]:
    """Folders that hold the preloaded packages which are not the standard library's. Raises ValueError for one that is missing."""
    paths = []
    for name in preload:
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names:
            continue
        spec = importlib.util.find_spec(top)
        if spec is None or not (spec.submodule_search_locations or spec.origin):
            raise ValueError(f"sandbox preload={name!r} is not installed here; install it (pip install {top}) or leave it out")
        # A package without an __init__.py has no file of its own, and may lie in several folders.
        own = [os.path.dirname(os.path.realpath(spec.origin))] if spec.origin else None
        for folder in own or map(os.path.realpath, spec.submodule_search_locations):
            path = os.path.dirname(folder) if spec.submodule_search_locations else folder
            if path not in paths:
                paths.append(path)
    return paths


def package_folders(roots: list[str]) -> list[str]:
    """Where packages are installed that are none of the standard library's, below folders that are read."""
    patterns = [os.path.join(root, *inner, name) for root in roots for inner in ((), ("python*",)) for name in PACKAGE_FOLDERS]
    return sorted({os.path.realpath(path) for pattern in patterns for path in glob.glob(pattern)})


def private_uid() -> int | None:
    """A user id that nobody has, for a server that root starts; None where we are not root."""
    if os.geteuid() != 0:
        return None
    with open("/proc/self/uid_map") as file:
        first, _, count = map(int, file.readline().split())
    return random.SystemRandom().randrange(1 << 30, 1 << 31) if first == 0 and count > 1 << 31 else 65534


def open_to_all(path: str) -> bool:
    """Whether a user who owns nothing can reach this file or folder."""
    while True:
        mode = os.stat(path).st_mode
        if not mode & (0o001 if os.path.isdir(path) else 0o004):
            return False
        if path == "/":
            return True
        path = os.path.dirname(path)


@dataclass(frozen=True)
class Plan:
    """Everything that is needed to execute the server. scratch: a temporary folder of the host's, removed at its end."""

    command: tuple[str, ...]
    config: dict
    scratch: str | None


def plan(isolation: str, limits: Limits, preload: tuple[str, ...]) -> Plan:
    """Raises IsolationUnavailable where something is plainly missing, ValueError for a preload set or limits that cannot be."""
    check_open_files(limits)
    sites = site_paths(preload)
    stdlib = sysconfig.get_path("stdlib")
    source = os.path.dirname(os.path.abspath(__file__))
    python = os.path.realpath(sys.executable)
    uid = private_uid()
    needed = [python, source, os.path.realpath(stdlib), *sites]
    base = os.path.join(os.path.realpath(sys.base_prefix), "lib")
    hidden = package_folders([os.path.realpath(path) for path in (stdlib, base, *LIBRARIES)])
    if isolation == "landlock" and uid is not None and not all(map(open_to_all, needed)):
        uid = None  # uid 0 without any capability reads the interpreter; a stranger would not
    if isolation == "seccomp":
        preload = (*STDLIB_PRELOAD, *preload)
    scratch = "/scratch"
    server = (python, "-s", "-S", "-P", "-B", "-u", "-X", "utf8", os.path.join(source, "zygote.py"))
    host_scratch = None
    if isolation == "bubblewrap":
        empty = [path for path in hidden if not any(f"{need}/".startswith(f"{path}/") for need in needed)]
        hidden = [path for path in hidden if path not in empty]
        command = (*bubblewrap([*needed, base], empty), "--", *server)
    else:
        command, scratch = server, None
        if isolation != "seccomp":
            scratch = host_scratch = tempfile.mkdtemp(prefix="tools-sandbox-")
            if uid is not None:
                os.chown(scratch, uid, uid)
    config = {
        "limits": asdict(limits), "preload": preload, "site_paths": sites, "read_paths": rule_paths([stdlib, *LIBRARIES]),
        "hidden": hidden, "devices": DEVICES, "scratch": scratch, "landlock": isolation in ("bubblewrap", "landlock"),
        "seccomp": isolation != "none", "uid": uid,
    }  # fmt: skip
    return Plan(command, config, host_scratch)


def rule_paths(paths: list[str]) -> list[str]:
    """Without those that do not exist here or lie in another one: every rule costs every snippet some microseconds."""
    real = sorted({os.path.realpath(path) for path in paths if os.path.exists(path)})
    return [path for path in real if not any(path != other and path.startswith(other + "/") for other in real)]


def parents_of(path: str) -> list[str]:
    parts = path.strip("/").split("/")
    return ["/" + "/".join(parts[:depth]) for depth in range(1, len(parts))]


def bubblewrap(binds: list[str], empty: list[str]) -> list[str]:
    program = shutil.which("bwrap")
    if program is None:
        raise IsolationUnavailable("bubblewrap: no `bwrap` on PATH; install it (apt-get install bubblewrap)")
    args = [program, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try", "--as-pid-1"]
    args += ["--hostname", "sandbox", "--cap-drop", "ALL"]
    if os.geteuid() == 0:  # the server changes its user itself, then gives these up
        args += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        args += ["--unshare-user"]
    paths = dict.fromkeys([*LIBRARIES, *binds])
    parents = {parent for path in (*paths, "/dev/null") for parent in parents_of(path)}
    for path in sorted(parents):  # left to bubblewrap, they would be closed to the user that the server becomes
        args += ["--perms", "0755", "--dir", path]
    for path in paths:
        if os.path.islink(path):
            args += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            args += ["--ro-bind", path, path]
    for path in empty:
        args += ["--perms", "0555", "--tmpfs", path]
    for path in DEVICES:
        args += ["--dev-bind", path, path]
    args += ["--proc", "/proc", "--perms", "0777", "--size", str(SCRATCH_TMPFS_BYTES), "--tmpfs", "/scratch", "--chdir", "/scratch"]
    return args
