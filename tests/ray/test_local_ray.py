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

NO_WORKER = """
import ray
from toolrl_ray.local_ray import start_local
from tools_service import serve_app, serve_start
from tools_service.calculator import SimpleCalculatorTool

start_local(num_cpus=1, log_to_driver=False, runtime_env={"py_executable": "sleep 30;"})
try:
    serve_app.start({"SimpleCalculatorTool": SimpleCalculatorTool}, start_timeout_s=2)
except serve_app.ServiceError as error:
    print(error)
    print(serve_start.controller())
    serve_app.shutdown(wait=False)
finally:
    ray.shutdown()
"""


def ran(python: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)


def test_a_worker_with_an_environment_of_its_own_starts_where_the_path_of_python_has_a_space(tmp_path: Path) -> None:
    (tmp_path / "with space").symlink_to(sys.prefix)
    python = str(tmp_path / "with space" / Path(sys.executable).relative_to(sys.prefix))
    done = ran(python, ASK)
    assert done.stdout == f"{[python, 'yes']}\n", done.stderr


def test_a_serve_whose_controller_never_starts_is_one_line_and_stays_nowhere() -> None:
    done = ran(sys.executable, NO_WORKER)
    said, controller = done.stdout.splitlines()
    assert said.startswith("Ray Serve's controller does not start within 2 s; does the cluster start any worker process?")
    assert controller == "None" and done.returncode == 0
