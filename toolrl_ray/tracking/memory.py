"""Memory of this process and all that it started, on this machine."""

from __future__ import annotations

from pathlib import Path

import psutil


def tree_gib() -> float:
    """Proportional set size in GiB, shared pages counted once; resident size where the kernel does not tell."""
    own = psutil.Process()
    return sum(_bytes(process) for process in [own, *own.children(recursive=True)]) / 2**30


def _bytes(process: psutil.Process) -> int:
    try:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # gone, not ours to read, or no such file on this system
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0
