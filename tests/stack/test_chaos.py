"""Every part of a run is killed in turn, and the run reaches its reward all the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(1800)  # four restarts, and the warm start where it is not in the cache
def test_a_run_gets_over_the_death_of_each_of_its_parts_and_trains_every_prompt_exactly_once(tmp_path: Path) -> None:
    """kill -9 of a tool replica, a RolloutActor, an engine-core process, a learner, and the driver, in which the stream lives."""
    run_dir = tmp_path / "run"
    settings = ["stream.max_staleness_steps=1", "checkpoint.every_steps=5", "train.num_steps=40", "eval.num_tasks=100"]
    kinds = ["tool", "rollout", "engine", "learner", "driver"]
    command = [sys.executable, "scripts/chaos.py", "--kill", ",".join(kinds), "--every-steps", "4", "--run-dir", str(run_dir), *settings]
    chaos = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert chaos.returncode == 0, chaos.stdout + chaos.stderr
    assert [line.split()[1] for line in chaos.stdout.splitlines() if line.startswith("killed ")] == kinds
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(1, 41))
    assert max(m["stream/staleness_max"] for m in metrics) == 1
    assert max(m["rollout/actor_restarts"] for m in metrics) == 2  # for the RolloutActor's death and for that of its engine
    assert sum(m["env/reward_mean"] for m in metrics[-5:]) / 5 > 0.9
    assert "starting the learner again (1 of 3)" in (tmp_path / "chaos.log").read_text()
