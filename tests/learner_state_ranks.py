"""Real DeepSpeed ranks that save, load and go on; tests/stack/test_learner_state.py compares the folders that they leave."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from learner_synthetic import random_trajectories, run_config

from toolrl_ray.learner.update import Learner

KINDS = {"float32": {}, "bfloat16": {"dtype": "bfloat16"}, "lora": {"lora": {"rank": 4}}}
SAVED = [*(("float32", stage) for stage in range(4)), *((kind, stage) for kind in ("bfloat16", "lora") for stage in (2, 3))]  # two ranks
CROSS = {  # {number of ranks: (one of SAVED, or plain PyTorch; the ZeRO stage that goes on from it)}
    2: [("plain", 1), ("plain", 3), ("float32-2", 0), ("float32-2", 3), ("bfloat16-2", 3)],
    1: [("float32-2", 0), ("float32-3", 2), ("bfloat16-3", 2), ("lora-2", 3)],
}
BEFORE, AFTER = (0, 1), (2, 3)  # seeds of the updates


def state_config(kind: str, stage: int = 0):
    learner = {"lr": 1e-3, "critic_lr": 2e-3, "warmup_steps": 20, "zero_stage": stage, "max_microbatch_tokens": 60}
    return run_config(policy=KINDS[kind], learner=learner, algo={"target_kl": 1.0, "kl_horizon": 50})


def save(learner: Learner, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    learner.save_state(str(folder))
    learner.finish_save()


def update(learner: Learner, seeds: tuple[int, ...], folder: Path) -> None:
    """Updates, then a checkpoint in `folder`, with the metrics of each rank in it."""
    metrics = [learner.update(random_trajectories(13, seed)) for seed in seeds]
    save(learner, folder)
    metrics = [{key: value for key, value in m.items() if not key.startswith("time/")} for m in metrics]
    (folder / f"metrics-{learner.rank}.json").write_text(json.dumps(metrics))


def resume(learner: Learner, start: Path, out: Path) -> None:
    """Loads `start` and saves it anew in OUT/again, then goes on to OUT/resumed."""
    learner.load_state(str(start))
    save(learner, out / "again")
    update(learner, AFTER, out / "resumed")


def state_main(rank: int, world_size: int, address: str, model: str, out: str) -> None:
    """Two ranks: for each of SAVED OUT/KIND-STAGE/saved, OUT/.../after two more updates, and both by `resume`. Then CROSS."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for kind, stage in SAVED if world_size == 2 else ():
        folder = Path(out) / f"{kind}-{stage}"
        learner = Learner(state_config(kind, stage), model, rank, world_size, address)
        update(learner, BEFORE, folder / "saved")
        update(learner, AFTER, folder / "after")
        resume(Learner(state_config(kind, stage), model, rank, world_size, address), folder / "saved", folder)
    for source, stage in CROSS[world_size]:
        kind = "float32" if source == "plain" else source.partition("-")[0]
        learner = Learner(state_config(kind, stage), model, rank, world_size, address)
        resume(learner, Path(out) / source / "saved", Path(out) / source / f"stage{stage}-ranks{world_size}")
    torch.distributed.destroy_process_group()
