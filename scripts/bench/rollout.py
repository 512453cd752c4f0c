#!/usr/bin/env python3
"""Rollout with the calculator against bare AsyncLLM: same engine, same prompts, same lengths, alternating in one run.

    .venv/bin/python scripts/bench/rollout.py [--policy DIR] [--episodes 512] [--rounds 12] [--in-flight 64]

The rollout side is the real path: RolloutPool, RolloutActor, episodes, stop strings, logprobs, Serve tools, trajectories back in
this process. The bare side runs, inside the same actor, every turn of those episodes as one plain request (no stop strings, no
logprobs, no tools, same number of tokens). Between the two: the engine with stop strings and logprobs, and the same beside a loop of the
lowest priority for every other core, which takes little but what cores share (clock, cache): about what a rollout that uses them can
reach. Also: weight syncs of the same policy, in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from toolrl_ray import cluster, recipe
from toolrl_ray.cli import say
from toolrl_ray.collector import collect
from toolrl_ray.rollout import actor as rollout_actor
from toolrl_ray.tasks.module import task_module
from toolrl_ray.types import EpisodeRequest, SamplingParams, SegmentKind, Trajectory


class BenchActor(rollout_actor.RolloutActor):
    async def bare(self, jobs: list[tuple[list[int], int]], in_flight: int) -> float:
        """Seconds for all (prompt, number of tokens) jobs on the engine alone."""
        from vllm import SamplingParams as VLLMSamplingParams
        from vllm.sampling_params import RequestOutputKind

        room = asyncio.Semaphore(in_flight)

        async def one(prompt: list[int], num_tokens: int) -> None:
            params = VLLMSamplingParams(
                temperature=1.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
            )
            async with room:
                async for _ in self._engine._llm.generate({"prompt_token_ids": prompt}, params, uuid.uuid4().hex):
                    pass

        await self._engine._llm.reset_prefix_cache()
        started = time.perf_counter()
        await asyncio.gather(*(one(*job) for job in jobs))
        return time.perf_counter() - started

    async def as_sampled(self, jobs: list[tuple[list[int], int]], in_flight: int) -> tuple[int, float]:
        """(tokens, seconds) of the same jobs with stop strings and logprobs, as the episodes need them, but without episodes."""
        room = asyncio.Semaphore(in_flight)

        async def one(prompt: list[int], num_tokens: int) -> int:
            async with room:
                return len((await self._engine.generate(prompt, SamplingParams(1.0, num_tokens, ("<never>", "<never more>")))).token_ids)

        await self.reset()
        started = time.perf_counter()
        counts = await asyncio.gather(*(one(*job) for job in jobs))
        return sum(counts), time.perf_counter() - started

    async def reset(self) -> None:
        await self._engine._llm.reset_prefix_cache()


def turns(trajectory: Trajectory) -> list[tuple[list[int], int]]:
    policy = [s for s in trajectory.segments if s.kind is SegmentKind.POLICY and s.end > s.start]
    return [(trajectory.token_ids[: s.start], s.end - s.start) for s in policy]


@contextmanager
def other_cores_busy() -> Iterator[None]:
    command = [sys.executable, "-c", "import os\nos.nice(19)\nwhile True: sum(range(1000))"]
    loops = [subprocess.Popen(command) for _ in range(len(os.sched_getaffinity(0)) - 1)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--policy", default="tiny")
    parser.add_argument("--episodes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--syncs", type=int, default=20)
    options = parser.parse_args()
    # The engine itself runs at most so many, on either side.
    limits = [f"rollout.max_in_flight={options.in_flight}", f"eval.max_in_flight={options.in_flight}"]
    config = recipe.load("calculator", [f"policy.path={options.policy}", *limits])
    rollout_actor.RolloutActor = BenchActor
    cluster.connect(config, say)
    try:
        from toolrl_ray.cli import _policy_dir

        parts = cluster.ray_parts(config, _policy_dir(config), say)
        try:
            measure(config, parts, options)
        finally:
            parts.close()
    finally:
        cluster.disconnect()


def measure(config, parts, options) -> None:
    tasks = task_module(config.task).load_tasks(config.task)[0][: options.episodes]
    [actor] = parts.rollout._actors
    print("tok/s of: rollout, bare AsyncLLM, the engine with stop strings and logprobs, that with the other cores busy")
    rows = []
    for i in range(options.rounds + 1):
        ray.get(actor.reset.remote(), timeout=60)
        started = time.perf_counter()
        requests = [EpisodeRequest(f"{i}-{row}:0", f"{i}-{row}", task) for row, task in enumerate(tasks)]
        trajectories = collect(parts.rollout, requests, timeout_s=600)
        rollout_s = time.perf_counter() - started
        jobs = [job for trajectory in trajectories for job in turns(trajectory)]
        bare_s = ray.get(actor.bare.remote(jobs, options.in_flight), timeout=600)
        sampled_tokens, sampled_s = ray.get(actor.as_sampled.remote(jobs, options.in_flight), timeout=600)
        with other_cores_busy():
            beside_tokens, beside_s = ray.get(actor.as_sampled.remote(jobs, options.in_flight), timeout=600)
        tokens = sum(n for _, n in jobs)
        calls = sum(len(t.tool_calls) for t in trajectories)
        if i:  # the first round warms all sides up
            rows.append((tokens / rollout_s, tokens / bare_s, sampled_tokens / sampled_s, beside_tokens / beside_s))
            speeds = ", ".join(f"{speed:,.0f}" for speed in rows[-1])
            print(f"round {i}: {tokens} tokens, {len(jobs)} turns, {calls} calls; tok/s: {speeds}", flush=True)
    rollout, engine, beside = (statistics.median(row[k] / row[1] for row in rows) for k in (0, 2, 3))
    print("medians, tok/s: " + ", ".join(f"{statistics.median(column):,.0f}" for column in zip(*rows, strict=True)))
    print(f"rollout to bare {rollout:.2f} (goal 0.85), of {len(rows)} rounds")
    print(f"engine with stop strings and logprobs to bare {engine:.2f}; with the other cores busy {beside:.2f}, a rollout's limit")
    syncs = sorted(parts.weights.sync(i + 1)["time/weight_sync_s"] * 1e3 for i in range(options.syncs))
    print(f"weight sync: median {statistics.median(syncs):.0f} ms, worst {syncs[-1]:.0f} ms of {len(syncs)} (goal 100 ms)")


if __name__ == "__main__":
    main()
