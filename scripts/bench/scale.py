#!/usr/bin/env python3
"""A large run in one process: what the control plane costs, and whether it stays flat, when thousands of episodes are in flight.

    .venv/bin/python scripts/bench/scale.py [--trajectories 200000] [--in-flight 10000] [--profile] [--json FILE]

Real: the driver and what it writes, collector, stream, assignment, inboxes, turn loop, token ledger, tool client. Simulated
(simulated_engine.py tells how): engines, the tool behind its client, learner, weights, and Ray, of which nothing but pickling is left.
Two threads:

- control plane: the driver's, with what its writer of trajectories takes in a third thread. Its CPU time is measured from the first
  training episode to the last update, per trajectory. What Ray adds to it (a submit and two or three calls per message of an actor) is
  not in it.
- episode plane: the event loop of all actors. In a cluster each actor has a process of its own; here they share one core with the
  control plane, so that `loop lag` says how far the simulation falls behind its own times. It should stay below 0.1 s.

Idle: shares of the time with no episode in flight, and with neither update nor weight sync. Outside steps: the driver writes its files,
and no step's time holds it. Heavy tails make every (K + 1)th step wait for stragglers, so `--speed-up` has an upper end. On a machine with
other work to do, halve it until the loop lag is small. Exit code 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import math
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.bench.simulated_engine import MAX_TURN_TOKENS, TOOL_DEADLINE_S
from scripts.bench.simulated_parts import SimLearner, SimRollout, SimWeights
from toolrl_ray import driver
from toolrl_ray.config import RunConfig
from toolrl_ray.driver import Run
from toolrl_ray.parts import Parts
from toolrl_ray.tracking.metrics import load_metrics
from toolrl_ray.tracking.trajectories import TrajectoryWriter
from toolrl_ray.types import Trajectory

MAX_CONTROL_MS = 1.0
MAX_GROWTH_PERCENT = 5.0
MEMORY_SHARES = (0.10, 0.25, 0.50, 0.75, 1.0)
LAG_S = 0.2  # between two looks at the loop's lag
SWITCH_S = 5e-4  # after which a thread gives way to the other: ten times as often as Python's default, so that neither waits long


@dataclass
class Meter:
    """What is measured of the training itself, without the evaluations before and after it."""

    num_trajectories: int
    group_size: int
    trained: bytearray = field(init=False)  # how often, by the episode's number
    num_trained: int = 0
    num_tokens: int = 0
    writer_cpu_s: float = 0.0
    memory: list[tuple[int, float]] = field(default_factory=list)  # (trajectories, MiB), at the beginning of every update
    lags: list[float] = field(default_factory=list)
    rollout: SimRollout = field(init=False)
    begin: dict[str, float] = field(init=False)
    end: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.trained = bytearray(self.num_trajectories)

    def now(self) -> dict[str, float]:
        """Called in the control plane's thread."""
        idle_s, episode_s = self.rollout.flight.totals()
        return {
            "wall_s": time.monotonic(),
            "control_cpu_s": time.thread_time() + self.writer_cpu_s,
            "episode_cpu_s": self.rollout.on_loop(time.thread_time),
            "idle_s": idle_s,
            "episode_s": episode_s,
            "polls": self.rollout.num_polls,
            "messages": self.rollout.num_takes,
        }

    def measured(self, writer: type[TrajectoryWriter]) -> type[TrajectoryWriter]:
        """The driver's writer of trajectories, which works in a thread of its own."""

        class Measured(writer):
            def write(inner, step: int, trajectories: Iterable[Trajectory]) -> None:
                started = time.thread_time()
                super().write(step, trajectories)
                if step:  # the evaluation before the first step is no training
                    self.writer_cpu_s += time.thread_time() - started

        return Measured

    def began(self) -> None:
        self.begin = self.now()

    def ended(self) -> None:
        self.end = self.now()

    def updated(self, batch: list[Trajectory]) -> None:
        self.memory.append((self.num_trained, psutil.Process().memory_info().rss / 2**20))
        for trajectory in batch:
            number, _, member = trajectory.request.episode_id.partition(":")
            self.trained[int(number) * self.group_size + int(member)] += 1
        self.num_trained += len(batch)
        self.num_tokens += sum(len(t.token_ids) for t in batch)

    async def watch_lag(self) -> None:
        while True:
            started = time.monotonic()
            await asyncio.sleep(LAG_S)
            self.lags.append(time.monotonic() - started - LAG_S)

    def memory_at(self, share: float) -> float:
        return next((mib for count, mib in self.memory if count >= share * self.num_trained), self.memory[-1][1])

    def memory_growth(self) -> float:
        """By how much the highest of the last three quarters is above the highest before them: at its end, a run has less in flight."""
        early = [mib for count, mib in self.memory if count <= 0.25 * self.num_trained]
        return max(mib for _, mib in self.memory) / max(early) - 1


def make_config(options: argparse.Namespace) -> RunConfig:
    """Deadlines are simulated times too."""
    max_in_flight = math.ceil(options.in_flight / options.actors)
    return RunConfig.model_validate(
        {
            "recipe": "scale",
            "seed": options.seed,
            "policy": {"path": "simulated"},
            "task": {"num_heldout": 16, "few_shot": 1},
            "eval": {"num_tasks": 16},
            "episode": {
                "max_turn_tokens": MAX_TURN_TOKENS,
                "max_context_tokens": 8192,
                "tool_deadline_s": TOOL_DEADLINE_S / options.speed_up,
                "turn_deadline_s": 1800,
                "episode_deadline_s": 3600,
            },
            "rollout": {"num_actors": options.actors, "max_in_flight": max_in_flight},
            "stream": {"max_staleness_steps": options.staleness},
            "train": {"num_steps": num_steps(options), "tasks_per_step": options.tasks_per_step, "group_size": options.group_size},
            "tracking": {"wandb": "off"},
        }
    )


def num_steps(options: argparse.Namespace) -> int:
    return max(1, options.trajectories // (options.tasks_per_step * options.group_size))


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """One run, in a folder that is removed; the numbers that `show` prints."""
    config = make_config(options)
    meter = Meter(config.train.num_steps * config.train.tasks_per_step * config.train.group_size, config.train.group_size)
    meter.rollout = rollout = SimRollout(config, options.turn_tokens, options.speed_up, meter.began)
    rollout.on_loop(lambda: asyncio.ensure_future(meter.watch_lag()))
    learner = SimLearner(options.speed_up, meter.updated, meter.ended)
    driver.TrajectoryWriter = meter.measured(TrajectoryWriter)
    parts = Parts(rollout, learner, SimWeights(rollout, options.speed_up), rollout.close)
    profiler = cProfile.Profile(time.thread_time)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, Path(folder) / "run", "policy", say)
        try:
            profiler.runcall(run.train, parts) if options.profile else run.train(parts)
            meter.memory.append((meter.num_trained, psutil.Process().memory_info().rss / 2**20))
            left = rollout.num_outstanding + rollout.flight.now
        finally:
            driver.TrajectoryWriter = TrajectoryWriter
            parts.close()
            run.close_tracker()
        steps = load_metrics(Path(folder) / "run" / "metrics.jsonl")
        num_bytes = (Path(folder) / "run" / "trajectories.jsonl").stat().st_size
    if options.profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(10)
    return numbers(options, meter, steps) | {"left_running": left, "file_kib_per_trajectory": num_bytes / meter.num_trained / 1024}


def numbers(options: argparse.Namespace, meter: Meter, steps: list[dict[str, Any]]) -> dict[str, Any]:
    count = meter.num_trained
    spent = {key: meter.end[key] - meter.begin[key] for key in meter.begin}
    wall_s, step_s = spent["wall_s"], sum(s["time/step_s"] for s in steps)
    busy_s = sum((1 - s["time/learner_idle_share"]) * s["time/step_s"] for s in steps)
    memory = {f"{share:.0%}": meter.memory_at(share) for share in MEMORY_SHARES}
    return {
        "trajectories": count,
        "tokens_per_trajectory": meter.num_tokens / count,
        "trained_once": meter.trained.count(1),
        "steps": len(steps),
        "wall_s": wall_s,
        "step_s_median": statistics.median(s["time/step_s"] for s in steps),
        "control_ms": 1e3 * spent["control_cpu_s"] / count,
        "control_share": spent["control_cpu_s"] / wall_s,
        "outside_steps_share": 1 - step_s / wall_s,
        "polls": spent["polls"],
        "messages_per_trajectory": spent["messages"] / count,
        "control_ms_per_poll": 1e3 * spent["control_cpu_s"] / spent["polls"],
        "episode_ms": 1e3 * spent["episode_cpu_s"] / count,
        "loop_lag_s_mean": statistics.fmean(meter.lags),
        "loop_lag_s_max": max(meter.lags),
        "staleness_mean": statistics.fmean(s["stream/staleness_mean"] for s in steps),
        "staleness_max": max(s["stream/staleness_max"] for s in steps),
        "staleness_bound": options.staleness,
        "rollout_idle_share": spent["idle_s"] / wall_s,
        "learner_idle_share": 1 - busy_s / wall_s,
        "in_flight_mean": spent["episode_s"] / wall_s,
        "in_flight_peak": meter.rollout.flight.peak,
        "memory_mib": memory,
        "memory_growth_percent": 100 * meter.memory_growth(),
        "dropped_prompts": sum(value for key, value in steps[-1].items() if key.startswith("stream/dropped/")),
        "late_episodes": steps[-1]["stream/late_episodes"],
        "tool_calls": sum(s["tools/calls"] for s in steps),
        "tool_timeouts": sum(s["tools/status/timeout"] for s in steps),
    }


def missed(options: argparse.Namespace, found: dict[str, Any]) -> list[str]:
    """A line for every goal that is not reached."""
    goals = [
        ("trained_once", found["trained_once"] == found["trajectories"], f"all {found['trajectories']}"),
        ("left_running", found["left_running"] == 0, "0"),
        ("staleness_max", found["staleness_max"] <= options.staleness, f"at most {options.staleness}"),
        ("in_flight_peak", found["in_flight_peak"] >= options.in_flight, f"{options.in_flight} or more"),
        ("control_ms", found["control_ms"] <= MAX_CONTROL_MS, f"at most {MAX_CONTROL_MS:g}"),
        ("memory_growth_percent", found["memory_growth_percent"] < MAX_GROWTH_PERCENT, f"less than {MAX_GROWTH_PERCENT:g}"),
    ]
    return [f"missed: {name} is {found[name]:.4g}, the goal is {goal}" for name, reached, goal in goals if not reached]


def show(found: dict[str, Any]) -> str:
    memory = ", ".join(f"{share} {mib:,.0f}" for share, mib in found["memory_mib"].items())
    rows = {
        "trajectories": f"{found['trajectories']:,} in {found['steps']} steps, {found['tokens_per_trajectory']:.0f} tokens each, "
        f"{found['trained_once']:,} trained exactly once, {found['left_running']} left running",
        "time": f"{found['wall_s']:.0f} s, step median {found['step_s_median']:.1f} s, outside steps {found['outside_steps_share']:.1%}",
        "control plane": f"{found['control_ms']:.3f} ms CPU a trajectory, {found['control_share']:.1%} of the time; "
        f"{found['polls']:,.0f} polls of {found['control_ms_per_poll']:.2f} ms, {found['messages_per_trajectory']:.2f} messages and "
        f"{found['file_kib_per_trajectory']:.1f} KiB on disk a trajectory",
        "episode plane": f"{found['episode_ms']:.3f} ms CPU a trajectory; loop lag {found['loop_lag_s_mean']:.3f} s, "
        f"{found['loop_lag_s_max']:.2f} s at worst",
        "staleness": f"mean {found['staleness_mean']:.2f}, max {found['staleness_max']}, bound {found['staleness_bound']}",
        "idle": f"rollout {found['rollout_idle_share']:.1%}, learner {found['learner_idle_share']:.1%}",
        "in flight": f"mean {found['in_flight_mean']:,.0f}, peak {found['in_flight_peak']:,}",
        "memory": f"MiB at {memory}; growth over the last three quarters {found['memory_growth_percent']:+.1f} %",
        "lost": f"{found['dropped_prompts']} prompts dropped, {found['late_episodes']} late episodes; "
        f"{found['tool_timeouts']:,} of {found['tool_calls']:,} tool calls past their deadline",
    }
    return "\n".join(f"{name:<14} {text}" for name, text in rows.items())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=200_000)
    parser.add_argument("--actors", type=int, default=64)
    parser.add_argument("--in-flight", type=int, default=10_000, help="episodes that all engines sample at once")
    parser.add_argument("--staleness", type=int, default=2)
    parser.add_argument("--tasks-per-step", type=int, default=5000)
    parser.add_argument("--group-size", type=int, default=1)
    parser.add_argument("--turn-tokens", type=int, default=64, help="median of what a turn samples")
    parser.add_argument("--speed-up", type=float, default=1.5, help="divides all simulated times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="of the control plane; its CPU time then holds the profiler's own")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    admitted = (options.staleness + 1) * options.tasks_per_step * options.group_size
    if admitted < options.in_flight:
        parser.error(
            f"--in-flight {options.in_flight} is more than the stream admits, (--staleness {options.staleness} + 1) * --tasks-per-step "
            f"{options.tasks_per_step} * --group-size {options.group_size} = {admitted}; raise one of these"
        )
    return options


def main() -> int:
    options = parse()
    sys.setswitchinterval(SWITCH_S)
    found = measure(options, lambda line: print(line, flush=True))
    problems = missed(options, found)
    print("\n".join(["", show(found), *problems]))
    if options.json:
        options.json.write_text(json.dumps(found | {"missed": problems}) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
