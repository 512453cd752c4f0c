#!/usr/bin/env python3
"""Does rollout that runs ahead pay? Time to a held-out accuracy for K = 0, 1, 2 steps of staleness, with quick and with slow tools.

    .venv/bin/python scripts/bench/staleness.py [--recipe calculator] [--ks 0,1,2] [--latencies 0,0.3] [--seeds 0,1,2] [--goal 0.95]

Runs `toolrl train` again and again, with the same seeds and the same tiny policy, in an order in which every K follows every other, and
evaluates every `--every-steps` steps. The time is that of training alone: the number of steps up to the first evaluation that reaches the
goal, at the median pace of the steps that no evaluation rode along with. A slow tool is the recipe's own, which sleeps before it answers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from toolrl_ray.recipe import load

HEADER = """| tool latency | K | steps to goal | seconds to goal | against K = 0 | a step | rollout idle | learner idle |
|---|---|---|---|---|---|---|---|"""

SLOW_TOOL = """
import asyncio
from tools_service.executor import Executor
from tools_service.runner import builtin_tools

class Slow:
    name, description, idempotent, max_batch = {tool!r}, "The tool of that name, {latency_s} s later.", True, {max_batch}

    def __init__(self, **options):
        self._options = options

    async def start(self):  # where it runs: a process that makes it only to look at it would start a JVM for nothing
        self._executor = Executor(builtin_tools()[self.name](**self._options), 256)
        await self._executor.start()

    async def call_many(self, calls):
        await asyncio.sleep({latency_s})
        return await self._executor.run(calls)

    async def close(self):
        await self._executor.close()
"""


def overrides(recipe: str, latency_s: float, folder: Path) -> list[str]:
    """Settings that put the recipe's tool behind a pause."""
    if not latency_s:
        return []
    [tool] = load(recipe).tools.names
    max_batch = 1 if tool == "PythonInterpreter" else 64
    (folder / "slow.py").write_text(SLOW_TOOL.format(tool=tool, latency_s=latency_s, max_batch=max_batch))
    return [f"tools.custom={{{tool}: {folder / 'slow.py'}:Slow}}", "tools.max_in_flight=256"]


def train(recipe: str, seed: int, k: int, latency_s: float, options: argparse.Namespace) -> dict[str, float]:
    """Numbers of one run."""
    with tempfile.TemporaryDirectory() as name:
        run_dir = Path(name) / "run"
        settings = [
            *(f"seed={seed}", f"stream.max_staleness_steps={k}", f"train.num_steps={options.steps}"),
            *(f"eval.every_steps={options.every_steps}", "checkpoint.every_steps=0", "tracking.wandb=off", f"run_dir={run_dir}"),
            *overrides(recipe, latency_s, Path(name)),
        ]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [sys.executable, "-m", "toolrl_ray.cli", "train", recipe, *settings]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        evals = json.loads((run_dir / "eval.json").read_text()).values()
    reached = min((e["step"] for e in evals if e["accuracy"] >= options.goal), default=None)
    alone = [m for m in metrics if not m["rollout/eval_episodes"]]
    step_s = statistics.median(m["time/step_s"] for m in alone)
    return {
        "steps": reached or float("nan"),
        "seconds": reached * step_s if reached else float("nan"),
        "step_s": step_s,
        "rollout_idle": statistics.fmean(m["time/rollout_idle_share"] for m in alone),
        "learner_idle": statistics.fmean(m["time/learner_idle_share"] for m in alone),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="calculator")
    parser.add_argument("--ks", default="0,1,2")
    parser.add_argument("--latencies", default="0,0.3", help="of a tool call, in seconds")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every-steps", type=int, default=4)
    parser.add_argument("--goal", type=float, default=0.95)
    options = parser.parse_args()
    ks, latencies, seeds = (
        [kind(x) for x in text.split(",")]
        for kind, text in zip((int, float, int), (options.ks, options.latencies, options.seeds), strict=True)
    )
    runs: dict[tuple[float, int], list[dict[str, float]]] = {}
    for seed, latency_s, k in itertools.product(seeds, latencies, ks):
        numbers = train(options.recipe, seed, k, latency_s, options)
        runs.setdefault((latency_s, k), []).append(numbers)
        print(f"seed {seed}, tool {latency_s * 1e3:.0f} ms, K = {k}: " + ", ".join(f"{n} {v:.3g}" for n, v in numbers.items()), flush=True)
    print(f"\n{options.recipe}, medians of {len(seeds)} seeds\n")
    print(HEADER)
    for (latency_s, k), rows in sorted(runs.items()):
        median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        base = [row["seconds"] for row in runs[latency_s, ks[0]]]
        ratio = statistics.median(b / row["seconds"] for b, row in zip(base, rows, strict=True))
        print(
            f"| {latency_s * 1e3:.0f} ms | {k} | {median['steps']:.0f} | {median['seconds']:.1f} s | {ratio:.2f} times as fast "
            f"| {median['step_s']:.2f} s | {median['rollout_idle']:.0%} | {median['learner_idle']:.0%} |"
        )


if __name__ == "__main__":
    main()
