"""Real DeepSpeed ranks for tests: one spawn of gloo processes works through all cases and stages."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch
from learner_synthetic import random_trajectories, run_config

from toolrl_ray.learner.update import Learner

# name: (model, rows of each of three updates, configuration); 13 and 7 rows do not divide evenly, 4 and more hold an untrained row
CASES = {
    "gae": ("tied", (13, 7, 13), {"learner": {"max_microbatch_tokens": 60}, "algo": {"target_kl": 1.0}}),
    "one microbatch": ("untied", (13, 7, 13), {"algo": {"target_kl": 1.0}}),
    "batch of one": ("tied", (1, 1, 1), {}),
    "separate critic": ("untied", (6, 6, 6), {"policy": {"separate_critic": True}, "learner": {"max_grad_norm": 0.05, "warmup_steps": 5}}),
    "grpo": (
        "untied",
        (12, 6, 12),
        {"algo": {"advantage": "grpo", "kl_in": "loss", "kl_estimator": "k3", "ent_coef": 0.01}, "train": {"group_size": 3}},
    ),
    # Every update but the first of each batch is skipped, once after a look at several microbatches, once after its own forward.
    "stopped": ("tied", (13, 13, 13), {"learner": {"max_microbatch_tokens": 60}, "algo": {"target_kl": 1e-9}}),
    "stopped at once": ("tied", (13, 13, 13), {"algo": {"target_kl": 1e-9}}),
    "checkpointing": ("tied", (8, 8, 8), {"learner": {"gradient_checkpointing": True, "max_microbatch_tokens": 60}}),
}


ONE_RANK = ("gae", "one microbatch", "stopped")  # the cases that a single rank runs; two ranks run them all


def case_config(name: str, zero_stage: int = 0):
    sections = CASES[name][2]
    return run_config(**sections | {"learner": {"zero_stage": zero_stage, "lr": 1e-3} | sections.get("learner", {})})


def run_case(learner: Learner, name: str) -> list[dict[str, float]]:
    return [learner.update(random_trajectories(rows, seed, group_size=3)) for seed, rows in enumerate(CASES[name][1])]


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def rank_main(rank: int, world_size: int, address: str, models: str, out: str) -> None:
    """Runs every case at every stage; rank 0 leaves weights, metrics, logprobs and (stage 3) a saved policy in `out`."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    results = {}
    for name in CASES if world_size > 1 else ONE_RANK:
        model = CASES[name][0]
        for stage in range(4):
            learner = Learner(case_config(name, stage), str(Path(models) / model), rank, world_size, address)
            before = {key: tensor.cpu().clone() for key, tensor in learner.named_weights()}
            metrics = run_case(learner, name)
            weights = {key: tensor.cpu().clone() for key, tensor in learner.named_weights()}
            logprobs = learner.logprobs([5, 4, 3, 2, 1])
            learner.save_policy(f"{out}/{name}-{stage}", models)
            results[name, stage] = {
                "before": before,
                "weights": weights,
                "metadata": learner.weights_metadata(),
                "metrics": metrics,
                "logprobs": logprobs,
                "version": learner.policy_version,
                "partitioned": any(p.numel() == 0 for p in learner.engine.module.lm.parameters()),
            }
    torch.save(results, f"{out}/rank{rank}.pt")
    torch.distributed.destroy_process_group()
