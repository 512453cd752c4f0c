"""Sees to it that .venv can load libnuma.so.1, which vLLM's CPU kernels link against and a bare Debian or Ubuntu lacks.

When the system has none, the Debian package is downloaded (no root needed), unpacked inside .venv, and loaded at the start
of every interpreter of .venv by a .pth file: the dynamic linker then finds it by name in all of vLLM's processes.
Exit code 1 when that is not possible either.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PACKAGE = "libnuma1"


def loads() -> bool:
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return False
    return True


def download(folder: Path) -> Path | None:
    """The package file, from the lists of apt that are here or, in a container without any, from fresh ones in `folder`."""
    lists, cache = folder / "lists", folder / "cache"
    own = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}", "-o", "Debug::NoLocking=1"]
    attempts = [[["download", PACKAGE]], [[*own, "update"], [*own, "download", PACKAGE]]]
    (lists / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    for attempt in attempts:
        for arguments in attempt:
            subprocess.run(["apt-get", "-qq", *arguments], cwd=folder, capture_output=True, timeout=300)
        if found := next(folder.glob("*.deb"), None):
            return found
    return None


def install() -> bool:
    site = Path(sysconfig.get_path("purelib"))
    target = Path(sys.prefix) / "lib" / PACKAGE
    with tempfile.TemporaryDirectory() as name:
        try:
            package = download(Path(name))
            if package is None:
                return False
            subprocess.run(["dpkg-deb", "-x", str(package), str(target)], check=True, capture_output=True, timeout=60)
        except (OSError, subprocess.SubprocessError):
            return False
    library = next(target.rglob("libnuma.so.1"), None)
    if library is None:
        return False
    (site / "toolrl_libnuma.pth").write_text(f"import ctypes; ctypes.CDLL({str(library)!r}, mode=ctypes.RTLD_GLOBAL)\n")
    check = [sys.executable, "-c", "import ctypes; ctypes.CDLL('libnuma.so.1')"]
    return subprocess.run(check, capture_output=True, timeout=60).returncode == 0


if __name__ == "__main__":
    if not loads():
        print(f"setup: getting {PACKAGE} into .venv (this system has none)", file=sys.stderr)
        if not install():
            sys.exit(1)
