"""`toolrl tools serve --address` and Serve itself, on a cluster where training runs have started it before."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from toolrl_ray import cli

CALCULATOR = "SimpleCalculatorTool"
TIMEOUT_S = 120
TOKEN = secrets.token_hex(32)
RUN = """
import sys
from toolrl_ray import cluster
from toolrl_ray.config import ToolsConfig
from toolrl_ray.tools.serve_client import start_tools

cluster.reach(sys.argv[1], print)
start_tools(ToolsConfig(), "run")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """A person's, who has a token for Ray and says nothing of it."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("RAY_") and key != "TOOLRL_TOOLS"}
    return own | {"RAY_AUTH_TOKEN": TOKEN}


def ended(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment())


def toolrl(*arguments: object) -> subprocess.CompletedProcess[str]:
    return ended("-m", "toolrl_ray.cli", *arguments)


@pytest.fixture
def head() -> Iterator[str]:
    """The address of a Ray that nobody else uses, and that wants a token, as `ray start` does where one lies."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets have short names; of its own: another Ray here stays the current one
    address, log = f"127.0.0.1:{free_port()}", folder / "head.log"
    options = [f"--port={address.rpartition(':')[2]}", "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--include-dashboard=false", *options]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment() | {"RAY_AUTH_MODE": "token"})
    try:
        give_up = time.monotonic() + TIMEOUT_S
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < give_up, log.read_text()
            time.sleep(0.2)
        yield address
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for one in [*family, process]:
            with suppress(psutil.NoSuchProcess):
                one.kill()  # SIGTERM would have it wait for half a minute
        process.wait()
        psutil.wait_procs(family, timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def test_serve_without_http_is_restarted_where_nothing_runs_on_it_and_ends_with_the_service(head: str, tmp_path: Path, capsys) -> None:
    config, url = tmp_path / "calculator.yaml", f"http://127.0.0.1:{free_port()}"
    config.write_text(f"names: [{CALCULATOR}]\n")
    serve = ("tools", "serve", "--config", config, "--address", head, "--port", url.rpartition(":")[2])
    run = ended("-c", RUN, head)
    assert run.returncode == 0, run.stderr

    refused = toolrl(*serve)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1), refused.stderr
    assert "Ray Serve runs on this cluster without HTTP, for run (" in refused.stderr and "--no-http" in refused.stderr

    stopped = toolrl("tools", "stop", "--address", head, "--app", "run")  # which leaves Serve, as it is not the service's
    assert stopped.returncode == 0, stopped.stderr
    served = toolrl(*serve)
    assert served.returncode == 0, served.stderr
    assert "restarting Ray Serve" in served.stdout
    assert cli.main(["tools", "call", CALCULATOR, "13.1-3", "--address", url]) == 0
    assert capsys.readouterr().out == "10.1\n"

    stopped = toolrl("tools", "stop", "--address", head)
    assert stopped.returncode == 0, stopped.stderr
    assert cli.main(["tools", "list", "--address", url]) == 2
    assert f"no tools service at {url};" in capsys.readouterr().err, "Serve's proxy would still answer"
