"""On one NVIDIA GPU: learner and engine share it, and weights travel by CUDA IPC. NCCL wants two and is not covered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine

import pytest
import torch

from toolrl_ray import cli
from toolrl_ray.bootstrap.build import ensure_tiny_policy
from toolrl_ray.config import RunConfig
from toolrl_ray.learner.update import Learner
from toolrl_ray.recipe import load
from toolrl_ray.rollout.vllm_engine import VLLMEngine
from toolrl_ray.weights.trainer import VLLMSender

SMALL = "task.num_train=64 task.num_heldout=8 eval.num_tasks=8 bootstrap.num_steps=20 train.tasks_per_step=16 train.num_steps=3".split()
SHARED = ["rollout.num_gpus=0.5", "learner.num_gpus=0.5", "rollout.gpu_memory_utilization=0.4"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_on_a_shared_gpu_keeps_sampler_and_learner_together(tmp_path, dtype):
    settings = [f"run_dir={tmp_path / 'run'}", f"policy.dtype={dtype}", "learner.zero_stage=2", *SMALL, *SHARED]
    assert cli.main(["train", "calculator", *settings]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["weights/backend"] for m in metrics] == ["ipc"] * 3
    assert [m["weights/policy_version"] for m in metrics] == [1, 2, 3]
    assert all(m["mismatch/mean_abs_logprob_diff"] < (1e-2 if dtype == "float32" else 1e-1) for m in metrics)


class Client:
    """An engine of this process, for a sender in another thread."""

    def __init__(self, engine: VLLMEngine):
        self._engine, self._loop = engine, asyncio.get_running_loop()

    def _wait(self, call: Coroutine) -> None:
        asyncio.run_coroutine_threadsafe(call, self._loop).result(timeout=120)

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self._wait(self._engine.init_weight_transfer(init_info))

    def start_weight_update(self) -> None:
        self._wait(self._engine.start_weight_update())

    def update_weights(self, update_info: dict) -> None:
        self._wait(self._engine.update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._wait(self._engine.finish_weight_update(1))


async def checksums(config: RunConfig, policy: str, backend: str, learner: Learner | None = None) -> list[dict[str, str]]:
    """Of an engine that has loaded `policy`, and again after the learner, if there is one, has sent it its weights."""
    engine = VLLMEngine(config, policy, backend, 0)
    try:
        [loaded] = await engine.checksums()
        if learner is None:
            return [loaded]
        sender = await asyncio.to_thread(VLLMSender, backend, Client(engine), learner.weights_to_send(), 0, 1, "127.0.0.1")
        await engine.pause()
        await asyncio.to_thread(sender.send)
        await engine.resume()
        return [loaded, *await engine.checksums()]
    finally:
        engine.shutdown()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_after_a_sync_the_engine_holds_the_weights_that_the_learner_saves(tmp_path, tied):
    config = load("calculator", [*SMALL, *SHARED, f"bootstrap.tie_embeddings={str(tied).lower()}"])
    policy = str(ensure_tiny_policy(config, print))
    learner = Learner(config, policy, in_process=True)
    with torch.no_grad():
        for parameter in learner.engine.module.lm.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    learner.save_policy(str(tmp_path / "saved"), policy)
    before, synced = asyncio.run(checksums(config, policy, "ipc", learner))
    [fresh] = asyncio.run(checksums(config, str(tmp_path / "saved"), "ipc"))
    assert synced == fresh
    assert [name for name in before if before[name] == synced[name]] == []
