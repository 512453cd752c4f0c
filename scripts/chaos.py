#!/usr/bin/env python3
"""Kills parts of a training run, one after another, and shows that the run gets over it.

    .venv/bin/python scripts/chaos.py [--kills 20 | --kill tool,driver] [--every-steps 4] [--run-dir DIR] [key.path=value ...]

Starts `toolrl train calculator` on this machine, waits for so many steps, sends SIGKILL to one process of the kind in turn, or of a random
kind, waits until the run has trained further than before, and so on; a killed driver (and the stream, which lives in it) is resumed with
`toolrl train --resume`. Then the run goes on to its end. Prints a table, and checks the run folder: every prompt trained exactly once,
no token older than the bound. Exit code 1 when something does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

# kind -> what the title of its process begins with; an engine is a child of a RolloutActor
KINDS = {"tool": "ray::ServeReplica", "rollout": "ray::RolloutActor", "engine": "", "learner": "ray::LearnerActor", "driver": ""}
STEP_TIMEOUT_S = 600.0
FIND_TIMEOUT_S = 60.0


class Failed(Exception):
    """What should hold does not."""


class TrainingRun:
    """`toolrl train` in a process group of its own, with its output in a file."""

    def __init__(self, run_dir: Path, overrides: list[str], log: Path):
        self.run_dir, self.overrides, self.log = run_dir, overrides, log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-m", "toolrl_ray.cli", "train", *arguments]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)

    def steps(self) -> list[int]:
        try:
            lines = (self.run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [json.loads(line)["step"] for line in lines if line.endswith(b"\n")]

    def wait_for_step(self, step: int) -> None:
        """Until this step is trained, or the run is over. Raises Failed when it ends badly or stands still."""
        deadline = time.monotonic() + STEP_TIMEOUT_S
        while max(self.steps(), default=0) < step and self.process.poll() is None:
            if time.monotonic() > deadline:
                raise Failed(f"step {step} was not reached within {STEP_TIMEOUT_S:.0f} s")
            time.sleep(0.2)
        if self.process.poll() not in (None, 0):
            raise Failed(f"the run ended with code {self.process.returncode} before step {step}")

    def kill(self, kind: str) -> None:
        """SIGKILL to one process of this kind, as soon as one is there. Raises Failed where none comes."""
        if kind == "driver":
            self.process.kill()  # a local Ray and all that runs on it end with it
            self.process.wait()
            return
        deadline = time.monotonic() + FIND_TIMEOUT_S
        while not (found := _of_kind(kind, children := psutil.Process(self.process.pid).children(recursive=True))):
            if time.monotonic() > deadline:
                raise Failed(f"no process to kill for {kind!r}; there were: {sorted(map(_title, children))}")
            time.sleep(0.1)
        random.choice(found).kill()

    def end(self) -> None:
        if self.process and self.process.poll() is None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.process.kill()
            psutil.wait_procs(family, timeout=30)


def _of_kind(kind: str, processes: list[psutil.Process]) -> list[psutil.Process]:
    if kind != "engine":
        return [process for process in processes if _title(process).startswith(KINDS[kind])]
    with suppress(psutil.Error):  # the actor has just died
        return [child for actor in _of_kind("rollout", processes) for child in actor.children() if "resource_tracker" not in _title(child)]
    return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def chaos(run: TrainingRun, kinds: list[str], every_steps: int) -> list[tuple[str, int, float]]:
    """(kind, step at which it was killed, seconds until the run had trained one step more) for every kill."""
    rows = []
    run.start("calculator", f"run_dir={run.run_dir}", *run.overrides)
    for kind in kinds:
        reached = max(run.steps(), default=0)
        run.wait_for_step(reached + every_steps)
        if run.process.poll() is not None:
            print(f"the run is over before {kind} could be killed: ask for more steps (train.num_steps)", flush=True)
            break
        at = max(run.steps())
        run.kill(kind)
        started = time.monotonic()
        print(f"killed {kind} after step {at}", flush=True)
        if kind == "driver":
            run.start("--resume", str(run.run_dir))
        run.wait_for_step(at + 1)
        rows.append((kind, at, time.monotonic() - started))
    run.wait_for_step(10**9)
    return rows


def check(run_dir: Path) -> str:
    """One line about the whole run. Raises Failed."""
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [m["step"] for m in metrics]
    if steps != list(range(1, len(steps) + 1)):
        raise Failed(f"metrics.jsonl has the steps {steps}")
    trained: Counter[str] = Counter()
    with (run_dir / "trajectories.jsonl").open() as file:
        for line in file:
            trained[json.loads(line)["episode_id"]] += 1
    twice = [episode for episode, count in trained.items() if count > 1]
    prompts = {int(episode.partition(":")[0]) for episode in trained}
    left_out = set(range(max(prompts) + 1)) - prompts
    if twice or left_out:
        raise Failed(f"{len(twice)} episodes were trained on twice, {len(left_out)} prompts not at all")
    accuracy = json.loads((run_dir / "eval.json").read_text())["after"]["accuracy"]
    oldest = max(m["stream/staleness_max"] for m in metrics)
    return f"{len(steps)} steps, {len(prompts)} prompts trained exactly once, staleness at most {oldest}, held-out accuracy {accuracy:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10, help="so many, of random kinds")
    parser.add_argument("--kill", help="these kinds in turn instead, comma-separated: " + ", ".join(KINDS))
    parser.add_argument("--every-steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run ends with this
    random.seed(options.seed)
    kinds = options.kill.split(",") if options.kill else random.choices(list(KINDS), k=options.kills)
    run_dir = options.run_dir or Path(tempfile.mkdtemp(prefix="toolrl-chaos-")) / "run"
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    run = TrainingRun(run_dir.absolute(), options.overrides, run_dir.parent / "chaos.log")
    try:
        rows = chaos(run, kinds, options.every_steps)
        summary = check(run_dir)
    except Failed as failure:
        print(f"FAILED: {failure}\nrun folder {run_dir}, output {run.log}; its end:\n{run.log.read_text()[-3000:]}")
        return 1
    finally:
        run.end()
    print("\n| killed | after step | seconds to the next new step |\n|---|---|---|")
    for kind, at, seconds in rows:
        print(f"| {kind} | {at} | {seconds:.1f} |")
    print(f"\n{summary}\nrun folder {run_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
