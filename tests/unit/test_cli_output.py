"""A command whose output nobody takes, or whose files the disk does not."""

from __future__ import annotations

import errno
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from toolrl_ray import cli

ROOT = Path(__file__).resolve().parents[2]


def told(command: str, stdout: int, **environment: str) -> tuple[int, str]:
    """Exit code and stderr of a command that writes there."""
    done = subprocess.run(
        [sys.executable, "-m", "toolrl_ray.cli", *shlex.split(command)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    return done.returncode, done.stderr


def test_a_run_whose_output_nobody_takes_leaves_no_folder(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert told(f"train calculator --in-process run_dir={tmp_path / 'run'}", writer) == (141, "")
    finally:
        os.close(writer)
    assert not (tmp_path / "run").exists()


def test_bootstrap_prints_the_folder_alone(tmp_path: Path) -> None:
    small = "bootstrap calculator bootstrap.num_steps=2 task.num_train=64 task.num_heldout=8 eval.num_tasks=8"
    reader, writer = os.pipe()
    code, progress = told(small, writer, TOOLRL_CACHE=str(tmp_path))
    os.close(writer)
    with open(reader) as file:
        [folder] = file.read().splitlines()
    assert code == 0 and Path(folder).is_dir() and "tiny policy" in progress


@pytest.mark.parametrize(
    ("command", "unbuffered"),
    [("tools list --local", ""), ("tools call SimpleCalculatorTool 1+1 --local", ""), ("tools list --local", "1"), ("tools --help", "")],
)
def test_a_reader_that_has_had_enough_ends_a_command_quietly(command: str, unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert told(command, writer, PYTHONUNBUFFERED=unbuffered) == (141, "")
    finally:
        os.close(writer)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_terminal_that_was_closed_ends_a_command_quietly(unbuffered: str) -> None:
    screen, terminal = pty.openpty()
    os.close(screen)
    try:
        assert told("tools list --local", terminal, PYTHONUNBUFFERED=unbuffered) == (143, "")
    finally:
        os.close(terminal)


@pytest.mark.parametrize(
    ("command", "unbuffered"),
    [("tools list --local", ""), ("tools call SimpleCalculatorTool 1+1 --local", ""), ("tools list --local", "1")],
)
def test_a_full_disk_is_one_line(command: str, unbuffered: str) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        assert told(command, full, PYTHONUNBUFFERED=unbuffered) == (1, "toolrl: No space left on device\n")
    finally:
        os.close(full)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE])
def test_a_file_that_the_system_refuses_is_one_line_that_names_it_and_what_names_no_file_keeps_its_traceback(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["runs/a"]

    def refused(options: object) -> int:
        raise OSError(number, os.strerror(number), *names)

    monkeypatch.setattr(cli, "_doctor", refused)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == f"toolrl: {os.strerror(number)}: 'runs/a'\n"
    names.clear()
    with pytest.raises(OSError, match=os.strerror(number)):
        cli.main(["doctor"])


def test_a_pipe_that_breaks_elsewhere_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(options: object) -> int:
        raise BrokenPipeError(32, "a defect")

    monkeypatch.setattr(cli, "_doctor", breaks)
    with pytest.raises(BrokenPipeError, match="a defect"):
        cli.main(["doctor"])
