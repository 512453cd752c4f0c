"""Real DeepSpeed ranks for tests: one spawn of gloo processes works through all cases and stages."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch
from learner_synthetic import random_trajectories, run_config

from toolrl_ray.errors import LearnerError
from toolrl_ray.learner.update import Learner

# name: (model, ZeRO stages, rows of each of three updates, configuration). 13 and 7 rows do not divide evenly; of 4 and more
# rows one has no trained token.
CASES = {
    "gae": ("tied", (0, 1, 2, 3), (13, 7, 13), {"learner": {"max_microbatch_tokens": 60}, "algo": {"target_kl": 1.0}}),
    "one microbatch": ("untied", (0, 1, 2, 3), (13, 7, 13), {"algo": {"target_kl": 1.0}}),
    "batch of one": ("tied", (0, 2, 3), (1, 1, 1), {}),
    "separate critic": (
        "untied",
        (1, 3),
        (6, 6, 6),
        {
            "policy": {"separate_critic": True},
            "learner": {"critic_lr": 3e-3, "max_grad_norm": 0.05, "warmup_steps": 5, "gradient_checkpointing": True},
        },
    ),
    "grpo": (
        "untied",
        (0, 3),
        (12, 6, 12),
        {"algo": {"advantage": "grpo", "kl_in": "loss", "kl_estimator": "k3", "ent_coef": 0.01}, "train": {"group_size": 3}},
    ),
    # All steps but the first of each batch are skipped: after a look at several microbatches, and after their own forward.
    "stopped": ("tied", (1, 2, 3), (13, 13, 13), {"learner": {"max_microbatch_tokens": 60}, "algo": {"target_kl": 1e-9}}),
    "stopped at once": ("tied", (0, 2, 3), (13, 13, 13), {"algo": {"target_kl": 1e-9}}),
}
RUNS = [(world_size, name, stage) for name in CASES for stage in CASES[name][1] for world_size in ((1, 2) if name == "gae" else (2,))]


def case_config(name: str, zero_stage: int = 0):
    sections = CASES[name][3]
    return run_config(**sections | {"learner": {"zero_stage": zero_stage, "lr": 1e-3} | sections.get("learner", {})})


def run_case(learner: Learner, name: str) -> list[dict[str, float]]:
    return [learner.update(random_trajectories(rows, seed, group_size=3)) for seed, rows in enumerate(CASES[name][2])]


LORA_STAGES = (0, 2, 3)


def lora_config(zero_stage: int = 0):
    learner = {"zero_stage": zero_stage, "lr": 1e-2, "max_microbatch_tokens": 60}
    return run_config(policy={"lora": {"rank": 4}}, learner=learner, algo={"target_kl": 1.0})


def run_lora(learner: Learner, folder: str) -> dict[str, Any]:
    """Three updates, then a saved policy in `folder`; the reference's logprobs before and after them."""
    ids = torch.tensor([[5, 4, 3, 2, 1]])
    selected = ids, torch.zeros(4, dtype=torch.int64), torch.arange(4)
    before = learner.reference(*selected)[0]
    metrics = [learner.update(random_trajectories(rows, seed)) for seed, rows in enumerate((13, 7, 13))]
    learner.save_policy(folder, learner.policy_dir)
    return {
        "weights": {key: tensor.cpu().clone() for key, tensor in learner.named_weights()},
        "metadata": learner.weights_metadata(),
        "metrics": metrics,
        "logprobs": learner.logprobs(ids[0].tolist()),
        "ref_logprobs": (before, learner.reference(*selected)[0]),
    }


def lora_results(rank: int, world_size: int, address: str, model: str, out: Path) -> dict[int, Any]:
    """{ZeRO stage: what `run_lora` gives}; policies are saved in `out`."""
    return {stage: run_lora(Learner(lora_config(stage), model, rank, world_size, address), f"{out}/lora-{stage}") for stage in LORA_STAGES}


def bfloat16_config(microbatch_tokens: int, zero_stage: int = 2, dtype: str = "bfloat16"):
    """One optimiser step an update, unclipped."""
    learner = {"zero_stage": zero_stage, "max_microbatch_tokens": microbatch_tokens, "max_grad_norm": 100.0}
    return run_config(policy={"dtype": dtype}, learner=learner, algo={"num_epochs": 1, "num_minibatches": 1})


def bfloat16_gradients(model: str, address: str) -> dict[tuple[int, int], torch.Tensor]:
    """{(ZeRO stage, tokens of a microbatch): `gradient`}, of one rank."""
    cases = ((2, 8192), (2, 1), (3, 1))
    return {case: gradient(Learner(bfloat16_config(case[1], case[0]), model, 0, 1, address)) for case in cases}


DIVERGED_STAGES = (0, 2, 3)


def diverged_main(rank: int, world_size: int, address: str, model: str, out: str) -> None:
    """An update in which the last rank alone has a gradient that is not finite. Every rank leaves {ZeRO stage: (the error or the metrics,
    whether all weights are as before)} in `out`."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    results = {}
    for stage in DIVERGED_STAGES:
        learner = Learner(bfloat16_config(60, stage, "float32"), model, rank, world_size, address)
        before = {key: tensor.clone() for key, tensor in learner.named_weights()}
        if rank == world_size - 1:
            learner.engine.module.lm.model.norm.weight.register_hook(lambda grad: torch.full_like(grad, torch.nan))
        try:
            outcome = learner.update(random_trajectories(8))
        except LearnerError as error:
            outcome = str(error)
        results[stage] = outcome, all(torch.equal(tensor, before[key]) for key, tensor in learner.named_weights())
    torch.save(results, f"{out}/diverged{rank}.pt")
    torch.distributed.destroy_process_group()


def gradient(learner: Learner) -> torch.Tensor:
    """All of it, in one vector, that an update on 128 rows steps by."""
    import deepspeed

    step, found = learner.engine.step, []

    def looked() -> float:
        for _, p in learner.engine.module.named_parameters():
            whole = p.grad if p.grad is not None else deepspeed.utils.safe_get_full_grad(p)
            found.append(whole.detach().float().flatten().clone())
        return step()

    learner.engine.step = looked
    learner.update(random_trajectories(128))
    return torch.cat(found)


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def case_results(rank: int, world_size: int, address: str, models: Path, out: Path) -> dict[tuple[str, int], Any]:
    """{(name, ZeRO stage): weights, metrics and logprobs} of RUNS; policies are saved in `out`."""
    results = {}
    for name, stage in [(name, stage) for size, name, stage in RUNS if size == world_size]:
        learner = Learner(case_config(name, stage), str(models / CASES[name][0]), rank, world_size, address)
        before = {key: tensor.cpu().clone() for key, tensor in learner.named_weights()}
        metrics = run_case(learner, name)
        learner.save_policy(f"{out}/{name}-{stage}", str(models))
        results[name, stage] = {
            "before": before,
            "weights": {key: tensor.cpu().clone() for key, tensor in learner.named_weights()},
            "metadata": learner.weights_metadata(),
            "metrics": metrics,
            "logprobs": learner.logprobs([5, 4, 3, 2, 1]),
            "version": learner.policy_version,
            "partitioned": any(p.numel() == 0 for p in learner.engine.module.lm.parameters()),
        }
    return results


def rank_main(rank: int, world_size: int, address: str, models: str, out: str) -> None:
    """All that a rank has to do, in one process, because importing DeepSpeed takes longer; its results are left in `out`."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    folder, where = Path(models), Path(out)
    results = {"cases": case_results(rank, world_size, address, folder, where)}
    if world_size == 2:
        results["lora"] = lora_results(rank, world_size, address, str(folder / "tied"), where)
    else:
        results["bfloat16"] = bfloat16_gradients(str(folder / "untied"), address)
    torch.save(results, where / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def unprobed_main(rank: int) -> None:
    """A rank starts; fails where DeepSpeed looks for what it could compile."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    from toolrl_ray.learner.deepspeed_engine import start

    def probe() -> None:
        raise AssertionError("DeepSpeed ran the compiler")

    deepspeed.ops._probe_compatible_ops = probe
    start(rank, 1, None, torch.device("cpu"), 60.0)
    assert deepspeed.comm.is_initialized()
