from __future__ import annotations

import subprocess
import sys

from toolrl_ray.tracking.memory import tree_gib


def test_memory_of_a_child_counts():
    before = tree_gib()
    code = "x = bytearray(2**28); x[::4096] = b'1' * len(x[::4096]); print('ready', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        assert 0.2 < tree_gib() - before < 0.4
    finally:
        child.communicate(b"\n")
