"""Stands for `toolrl train` in a study: takes its arguments and leaves its files, with numbers that follow from the seed.

A file FAIL-SEED in the working directory makes that seed fail after one step; WAIT-SEED makes it wait for ever, with a child process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

WAITING = "import time; time.sleep(600)"


def main(arguments: list[str]) -> int:
    given = dict(argument.split("=", 1) for argument in arguments[1:])
    seed, run_dir = int(given["seed"]), Path(json.loads(given["run_dir"]))
    run_dir.mkdir()
    print("recipe", arguments[0], "seed", seed, flush=True)
    write(run_dir / "metrics.jsonl", metrics(1, seed))
    if Path(f"WAIT-{seed}").exists():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        child = subprocess.Popen([sys.executable, "-c", WAITING])
        Path(f"WAITING-{seed}").write_text(f"{os.getpid()} {child.pid}")
        child.wait()
    if Path(f"FAIL-{seed}").exists():
        print("toolrl: RolloutError: the engine is gone", file=sys.stderr)
        return 1
    write(run_dir / "metrics.jsonl", metrics(1, seed), metrics(2, seed))
    evaluation = {"accuracy": 0.0, "tool_use_rate": 0.0, "duration_s": 1.0}
    (run_dir / "eval.json").write_text(json.dumps({"before": evaluation, "after": {**evaluation, "accuracy": 1 - seed / 10}}))
    return 0


def metrics(step: int, seed: int) -> dict[str, float]:
    return {"step": step, "env/reward_mean": step / 2 - seed / 10, "objective/kl": 0.1 * step, "time/step_s": 29.5}


def write(path: Path, *rows: dict[str, float]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
