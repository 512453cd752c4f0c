"""`ray job submit` and `toolrl submit` on a head that is already up."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

BIN = Path(sys.executable).parent
SMALL = "task.num_train=64 task.num_heldout=8 eval.num_tasks=8 bootstrap.num_steps=2 train.tasks_per_step=8 train.num_steps=1".split()

AGAIN = """
import pathlib, sys
from toolrl_ray import submit
client, address = submit.job_client(sys.argv[1])
before = client.list_jobs()
submit.submit_train(client, address, ["calculator"], pathlib.Path(sys.argv[2]).read_text(), cwd="/")  # its answer was lost, say
assert len(before) >= 2 and len(client.list_jobs()) == len(before)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def started_head(folder: Path, environment: dict[str, str]) -> tuple[subprocess.Popen, str] | None:
    """The process and the dashboard's address; None, with nothing left, where a port was taken between its choice and its use."""
    dashboard = free_port()
    ports = {"port": free_port(), "dashboard-port": dashboard, "dashboard-agent-listen-port": free_port()}
    command = [
        BIN / "ray",
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        f"--temp-dir={folder}",
    ]
    with (folder / "head.log").open("a") as log:
        process = subprocess.Popen(
            [*command, *(f"--{name}={port}" for name, port in ports.items())], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{address}/api/jobs/", timeout=5).read()
            return process, address
        except urllib.error.HTTPError:
            return process, address  # it answers, and wants Ray's token, which its own clients find
        except OSError:
            time.sleep(0.5)
    end(process)
    return None


def end(process: subprocess.Popen) -> None:
    """Ends the head and all that it started."""
    started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=10)
    for left in psutil.wait_procs(started, timeout=20)[1]:
        left.kill()


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A Ray head with two CPUs and its dashboard, on loopback; yields (dashboard address, environment)."""
    environment = dict(
        os.environ, PATH=f"{BIN}:{os.environ['PATH']}", TOOLRL_CACHE=str(tmp_path_factory.mktemp("cache")), PYTHONUNBUFFERED="1"
    )
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment.pop("RAY_ADDRESS", None)
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets have short names; of its own: another Ray here stays the current one
    try:
        head = started_head(folder, environment) or started_head(folder, environment)
        assert head is not None, f"the Ray head did not come up: {(folder / 'head.log').read_text()[-2000:]}"
        process, address = head
        try:
            yield address, environment
        finally:
            end(process)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_ray_job_submit_trains_on_a_cluster_that_is_up(head, tmp_path):
    address, environment = head
    run_dir = tmp_path / "run"
    command = [BIN / "ray", "job", "submit", "--address", address, "--", "toolrl", "train", "calculator", f"run_dir={run_dir}", *SMALL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "connecting to the Ray cluster at" in done.stdout
    assert "held-out accuracy" in done.stdout
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 1
    assert {"before", "after"} <= set(json.loads((run_dir / "eval.json").read_text()))
    assert (run_dir / "policy" / "model.safetensors").is_file()


def test_toolrl_submit_says_within_seconds_what_the_cluster_lacks(head, tmp_path):
    address, environment = head
    command = [BIN / "toolrl", "submit", "calculator", "--address", address, f"run_dir={tmp_path / 'run'}", *SMALL, "rollout.num_actors=5"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "this cluster cannot hold the plan: 5.6 CPUs are needed (rollout 5, learner 0.5, tools 0.1) and 2 are there" in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_study_runs_as_ray_jobs_one_after_another_where_the_cluster_holds_one(head, tmp_path):
    address, environment = head
    folder = tmp_path / "study"
    command = [BIN / "toolrl", "sweep", "calculator", "--seeds", "2", "--dir", folder, "--address", address, *SMALL, "bootstrap.seed=0"]
    command += ["rollout.engine=transformers"]  # which starts sooner
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert f"1 at once, as Ray jobs of {address}" in done.stdout
    assert "| calculator | 2 of 2 |" in done.stdout
    assert "held-out accuracy" in (folder / "seed-1.log").read_text()
    assert (folder / "plot.png").is_file()
    again = subprocess.run([sys.executable, "-c", AGAIN, address, folder / "seed-1.job"], env=environment, capture_output=True, timeout=60)
    assert again.returncode == 0, again.stderr
