"""Ctrl-C and SIGTERM end `toolrl train` soon, whatever it is doing, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import HEARS_CTRL_C

SMALL = ["task.num_train=256", "task.num_heldout=8", "eval.num_tasks=8", "bootstrap.num_steps=20", "train.tasks_per_step=16"]


@pytest.mark.parametrize(
    ("engine", "awaited", "sent", "to_group", "code", "word", "keeps_folder"),
    [
        ("vllm", "starting 1 x vllm", signal.SIGINT, True, 130, "interrupted", False),  # engine, learner and Serve are in mid-start
        ("vllm", "step   2/", signal.SIGTERM, False, 143, "terminated", True),
        ("transformers", "step   2/", signal.SIGTERM, True, 143, "terminated", True),
    ],
    ids=["ctrl-c-at-start", "sigterm-in-training", "sigterm-to-the-group"],
)
def test_an_interrupted_run_ends_soon_and_leaves_no_process(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, engine, awaited, sent, to_group, code, word, keeps_folder
) -> None:
    run_dir = tmp_path / "run"
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    temporary = tempfile.TemporaryDirectory(prefix="toolrl-")  # short: sockets have short names
    environment = {**os.environ, "TOOLRL_CACHE": cache, "PYTHONUNBUFFERED": "1", "TMPDIR": temporary.name}
    environment.pop("RAY_ADDRESS", None)
    overrides = [f"run_dir={run_dir}", *SMALL, "train.num_steps=100", f"rollout.engine={engine}"]
    process = subprocess.Popen(
        [*HEARS_CTRL_C, sys.executable, "-m", "toolrl_ray.cli", "train", "calculator", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,  # its own process group, as in a terminal of its own
    )
    try:
        seen = []
        for line in process.stdout:
            seen.append(line)
            if awaited in line:
                break
        assert awaited in seen[-1], "".join(seen)
        time.sleep(1)
        family = psutil.Process(process.pid).children(recursive=True)
        rays = [p for p in family if p.name() in ("gcs_server", "raylet")]
        assert len(rays) == 2 and all(os.getpgid(p.pid) != process.pid for p in rays), "a signal to the group is the driver's alone"
        os.killpg(process.pid, sent) if to_group else process.send_signal(sent)
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, rest
    assert f"toolrl: {word}" in rest and "Traceback" not in rest
    _, left = psutil.wait_procs(family, timeout=30)
    assert [p for p in left if p.name() != "wandb-core"] == []
    assert run_dir.exists() == keeps_folder
    if keeps_folder:  # an engine that is in mid-start is killed as it is
        assert [name for name in os.listdir(temporary.name) if not name.startswith(("ray", "torchinductor_"))] == []
    temporary.cleanup()
