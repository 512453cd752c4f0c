"""A Ray of one's own, as a process of its own starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TIMEOUT_S = 120
ASK = """
import os, sys, ray
from toolrl_ray.local_ray import start_local

start_local(num_cpus=1, log_to_driver=False)
try:
    ask = ray.remote(lambda: [sys.executable, os.environ["SAID"]]).options(runtime_env={"env_vars": {"SAID": "yes"}})
    print(ray.get(ask.remote(), timeout=60))
finally:
    ray.shutdown()
"""


def test_a_worker_with_an_environment_of_its_own_starts_where_the_path_of_python_has_a_space(tmp_path: Path) -> None:
    (tmp_path / "with space").symlink_to(sys.prefix)
    python = str(tmp_path / "with space" / Path(sys.executable).relative_to(sys.prefix))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([python, "-c", ASK], capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
    assert done.stdout == f"{[python, 'yes']}\n", done.stderr
