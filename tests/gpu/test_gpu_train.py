"""On one NVIDIA GPU: learner and engine share it, and weights travel by CUDA IPC."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch

from toolrl_ray import cli
from toolrl_ray.bootstrap.build import ensure_tiny_policy
from toolrl_ray.recipe import load

SMALL = "task.num_train=64 task.num_heldout=8 eval.num_tasks=8 bootstrap.num_steps=20 train.tasks_per_step=16 train.num_steps=3".split()
SHARED = ["rollout.num_gpus=0.5", "learner.num_gpus=0.5", "rollout.gpu_memory_utilization=0.4"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_on_a_shared_gpu_keeps_sampler_and_learner_together(tmp_path, dtype):
    assert cli.main(["train", "calculator", f"run_dir={tmp_path / 'run'}", f"policy.dtype={dtype}", *SMALL, *SHARED]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["weights/backend"] for m in metrics] == ["ipc"] * 3
    assert [m["weights/policy_version"] for m in metrics] == [1, 2, 3]
    assert all(m["mismatch/mean_abs_logprob_diff"] < (1e-2 if dtype == "float32" else 1e-1) for m in metrics)


def test_checksums_of_the_engine_follow_its_weights():
    from toolrl_ray.rollout.vllm_engine import VLLMEngine

    config = load("calculator", [*SMALL, *SHARED])
    policy = str(ensure_tiny_policy(config, print))

    async def checksums() -> list:
        engine = VLLMEngine(config, policy, "ipc", 0)
        try:
            return await engine.checksums()
        finally:
            engine.shutdown()

    first, again = asyncio.run(checksums()), asyncio.run(checksums())
    assert first == again
    assert len(set(first[0].values())) > 1
    assert torch.cuda.is_available()
