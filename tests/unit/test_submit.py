"""Where a job that is submitted starts, and how it is waited for."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from ray.dashboard.modules.version import CURRENT_VERSION
from ray.job_submission import JobStatus

from toolrl_ray import submit, sweep, sweep_cli, sweep_runs
from toolrl_ray.errors import UserError


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the jobs said, each run as Ray does: in a shell, in a folder of the cluster. `toolrl` tells its folder and its arguments."""
    stub = tmp_path / "bin" / "toolrl"
    (tmp_path / "session").mkdir()
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\necho "$(pwd) $*"\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")
    said: list[str] = []

    def submit_job(entrypoint: str, runtime_env: dict[str, Any], submission_id: str) -> str:
        done = subprocess.run(entrypoint, shell=True, cwd=tmp_path / "session", capture_output=True, text=True, timeout=60)
        said.append(done.stdout.strip())
        return submission_id

    monkeypatch.setattr(submit, "job_client", lambda address: (SimpleNamespace(submit_job=submit_job), "http://head:8265"))
    return said


def test_a_job_starts_in_the_folder_of_the_command_or_in_its_own_where_the_cluster_lacks_that(
    jobs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    submit.submit(None, ["my.yaml", "task.module=my task.py"], wait=False, say=print)
    assert jobs == [f"{folder} train my.yaml task.module=my task.py"]
    submit.submit_train(submit.job_client(None)[0], "", ["calculator"], "job", cwd=str(tmp_path / "elsewhere"))
    assert jobs[1] == f"{tmp_path / 'session'} train calculator"


def test_a_run_of_a_study_starts_where_the_study_was_made(jobs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = sweep.make_study("calculator", [], [0])
    (tmp_path / "study").mkdir()
    runs = sweep.plan(study, tmp_path / "study")
    monkeypatch.chdir("/")
    start, _ = sweep_cli._cluster(SimpleNamespace(address=None, jobs=1), study, tmp_path / "study", runs)
    assert isinstance(running := start(runs[0], 0), sweep_runs.JobRun)
    running.kill()
    assert jobs[0].startswith(f"{tmp_path} train calculator ")


class Version(BaseHTTPRequestHandler):
    """All that a client asks a job server when it is made."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"version": CURRENT_VERSION, "ray_version": "2", "ray_commit": "x", "session_name": "s"}).encode())

    def log_message(self, *_: object) -> None:
        pass


def test_a_job_server_on_this_machine_is_not_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("127.0.0.1", 0), Version)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "intra.example")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    try:
        for _ in range(2):
            submit.job_client(f"http://127.0.0.1:{server.server_port}")
        assert os.environ["no_proxy"] == "intra.example,127.0.0.1,localhost,::1"
    finally:
        server.shutdown()
        server.server_close()


class Lossy:
    """A job server of which every `lost` of four requests get no answer."""

    def __init__(self, lost: int) -> None:
        self.lost, self.asked = lost, 0

    def submit_job(self, submission_id: str, **_) -> str:
        return submission_id

    def get_job_status(self, job: str) -> JobStatus:
        self.asked += 1
        if self.asked % 4 < self.lost:
            raise requests.ConnectionError("Connection aborted.\nmore")
        return JobStatus.SUCCEEDED if self.asked > 8 else JobStatus.RUNNING

    def get_job_logs(self, job: str) -> str:
        return "step 1\n"


@pytest.fixture
def lossy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(submit, "POLL_S", 0.01)
    monkeypatch.setattr(submit, "LOST_S", 0.2)
    monkeypatch.setattr(submit, "new_job_id", lambda: "job-1")
    return lambda client: monkeypatch.setattr(submit, "job_client", lambda address: (client, "http://head:8265"))


def test_requests_that_are_lost_do_not_end_the_wait_for_a_job(lossy, capsys) -> None:
    lossy(client := Lossy(lost=3))
    assert submit.submit(None, ["calculator"], wait=True, say=lambda _: None) == 0
    assert client.asked > 8 and capsys.readouterr().out == "step 1\n"


class Ended:
    """A job server whose one job ends at once, as told."""

    def __init__(self, status: JobStatus, code: int | None, message: str | None) -> None:
        self.status, self.info = status, SimpleNamespace(driver_exit_code=code, message=message)

    def submit_job(self, submission_id: str, **_) -> str:
        return submission_id

    def get_job_status(self, job: str) -> JobStatus:
        return self.status

    def get_job_logs(self, job: str) -> str:
        return ""

    def get_job_info(self, job: str) -> SimpleNamespace:
        return self.info


@pytest.mark.parametrize(
    ("status", "code", "message", "expected", "told"),
    [
        (JobStatus.SUCCEEDED, 0, "Job finished successfully.", 0, "job-1 succeeded"),
        (JobStatus.FAILED, 2, "the command failed with\nexit code 2", 2, "job-1 failed: the command failed with exit code 2"),
        (JobStatus.FAILED, -9, None, 1, "job-1 failed"),
        (JobStatus.STOPPED, None, None, 1, "job-1 stopped"),
    ],
)
def test_the_exit_code_is_the_jobs(lossy, status, code, message, expected, told) -> None:
    lossy(Ended(status, code, message))
    said = []
    assert submit.submit(None, ["calculator"], wait=True, say=said.append) == expected
    assert said[-1] == told


def test_a_job_that_is_left_goes_on_and_the_last_line_says_so(lossy, monkeypatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    lossy(Ended(JobStatus.RUNNING, None, None))
    monkeypatch.setattr(submit.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt) as left:
        submit.submit(None, ["calculator"], wait=True, say=lambda _: None)
    assert left.value.__notes__ == ["job-1 goes on; to end it: ray job stop job-1 --address http://head:8265"]


def test_a_job_that_is_out_of_sight_for_long_is_one_line_that_says_how_to_find_it(lossy) -> None:
    lossy(Lossy(lost=4))
    with pytest.raises(UserError, match=r"^job-1 is out of sight for 0 s \(Connection aborted.\); .*ray job logs job-1 --address"):
        submit.submit(None, ["calculator"], wait=True, say=lambda _: None)


@pytest.mark.parametrize(
    ("address", "message"),
    [("nonsense", r"no Ray job server at nonsense \(.+\); start a cluster"), ("127.0.0.1:9", "no Ray cluster answers at '127.0.0.1:9'")],
)
def test_an_address_where_nothing_answers_is_one_line_at_once(address: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        submit.job_client(address)
