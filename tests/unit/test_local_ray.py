"""A Ray that does not come up in its fixed time: what it had started is ended, and it is tried again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray
from ray._private import utils

from toolrl_ray import local_ray
from toolrl_ray.errors import UserError


class SlowRay:
    """Fails `failures` times, and leaves a process behind each time, as Ray does."""

    def __init__(self, failures: int) -> None:
        self.failures, self.left, self.options = failures, [], []

    def init(self, **options) -> None:
        self.options.append(options)
        if len(self.options) <= self.failures:
            self.left.append(subprocess.Popen(["sleep", "60"]))
            raise Exception("The current node timed out\nduring startup.")


@pytest.fixture
def bystander():
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_a_start_that_times_out_is_tried_again_and_what_it_left_is_ended(monkeypatch, bystander) -> None:
    slow, said = SlowRay(failures=2), []
    monkeypatch.setattr(ray, "init", slow.init)
    local_ray.start_local(said.append, num_cpus=2)
    assert len(slow.options) == 3 and all(options == slow.options[0] for options in slow.options)
    assert slow.options[0]["address"] == "local" and slow.options[0]["num_cpus"] == 2
    assert said == ["Ray did not start (The current node timed out during startup.): trying again"] * 2
    assert len(slow.left) == 2 and not any(psutil.pid_exists(process.pid) for process in slow.left)
    assert bystander.poll() is None, "a process that was there before is not Ray's"


def test_a_ray_that_never_starts_is_one_line(monkeypatch) -> None:
    slow = SlowRay(failures=99)
    monkeypatch.setattr(ray, "init", slow.init)
    with pytest.raises(UserError, match="^a local Ray does not start: The current node timed out during startup.$"):
        local_ray.start_local()
    assert len(slow.left) == len(slow.options) == local_ray.TRIES
    for process in slow.left:
        process.wait(5)


def test_a_temporary_folder_with_too_long_a_name_is_one_line_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (long := tmp_path / ("x" * 100)).mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    said: list[str] = []
    with pytest.raises(UserError, match="set TMPDIR or RAY_TMPDIR to a folder with a shorter name, such as /tmp"):
        local_ray.start_local(said.append, num_cpus=1, logging_level=40)
    assert said == []


def test_sigterm_is_this_processes_own_also_while_ray_starts(monkeypatch) -> None:
    def arrived(*_: object) -> None:
        raise KeyboardInterrupt

    def init(**_: object) -> None:  # as Ray does: a handler of Python's first, then one of C++
        utils.set_sigterm_handler(lambda *_: sys.exit(15))
        handlers.append(signal.getsignal(signal.SIGTERM))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    handlers, before = [], signal.signal(signal.SIGTERM, arrived)
    monkeypatch.setattr(ray, "init", init)
    try:
        local_ray.start_local()
        assert handlers == [arrived] and signal.getsignal(signal.SIGTERM) is arrived
    finally:
        signal.signal(signal.SIGTERM, before)


def test_where_no_token_can_be_kept_the_process_has_its_own(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    local_ray.start_local()
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    local_ray.start_local()
    assert len(os.environ["RAY_AUTH_TOKEN"]) >= 32
