"""Where a job that is submitted starts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from toolrl_ray import submit, sweep, sweep_cli, sweep_runs


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

    def submit_job(entrypoint: str, runtime_env: dict[str, Any]) -> str:
        done = subprocess.run(entrypoint, shell=True, cwd=tmp_path / "session", capture_output=True, text=True, timeout=60)
        said.append(done.stdout.strip())
        return f"job-{len(said)}"

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
    submit.submit_train(submit.job_client(None)[0], "", ["calculator"], cwd=str(tmp_path / "elsewhere"))
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
