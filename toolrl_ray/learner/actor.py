"""The Ray shell of one learner rank: `ray.remote(LearnerActor).options(...).remote(config, policy_dir, rank, world_size)`.

Order: rank 0 `rendezvous()`, then `start(address)` on every rank at once (a single rank needs no address), then the rest. Every
method from `start` on must be called on all ranks at once.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

from toolrl_ray.config import RunConfig
from toolrl_ray.types import Trajectory


class LearnerActor:
    def __init__(self, config: RunConfig, policy_dir: str, rank: int = 0, world_size: int = 1):
        os.environ["OMP_NUM_THREADS"] = str(config.learner.num_threads)  # read when torch is first imported
        self.config, self.policy_dir, self.rank, self.world_size = config, policy_dir, rank, world_size
        self.sender: Any = None

    def rendezvous(self) -> str:
        """An address of this node, "tcp://ip:port", for all ranks' `start`."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(self, init_method: str | None = None) -> None:
        import torch

        from toolrl_ray.learner.update import Learner
        from toolrl_ray.tasks.module import task_module

        task_module(self.config.task)  # trajectories hold tasks, and those of a class of its own unpickle only where it is loaded
        torch.set_num_threads(self.config.learner.num_threads)
        self.learner = Learner(self.config, self.policy_dir, self.rank, self.world_size, init_method)
        self.weights = self.learner.weights_to_send()

    def update(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        import torch

        from toolrl_ray.weights.sync import shares_gpu

        metrics = self.learner.update(trajectories)
        if shares_gpu(self.config):
            torch.cuda.empty_cache()  # the engine can use what PyTorch would only keep
        return metrics

    def save_policy(self, directory: str, tokenizer_dir: str) -> None:
        self.learner.save_policy(directory, tokenizer_dir)

    def save_state(self, directory: str) -> None:
        self.learner.save_state(directory)

    def finish_save(self) -> None:
        self.learner.finish_save()

    def load_state(self, directory: str) -> None:
        self.learner.load_state(directory)

    def pack_weights(self) -> tuple[None, dict[str, Any] | None]:
        """Two results: whoever waits for the first need not fetch the weights."""
        from toolrl_ray.weights.trainer import pack

        return None, pack(self.weights, self.rank)

    def connect_weights(self, backend: str, rollout_actors: list[Any]) -> None:
        import ray

        from toolrl_ray.weights.client import RayWeightClient
        from toolrl_ray.weights.trainer import VLLMSender

        self.client = RayWeightClient(rollout_actors, self.config.weights.timeout_s)
        if self.sender is not None:
            self.sender.close()
        address = ray.util.get_node_ip_address()
        self.sender = VLLMSender(backend, self.client, self.weights, self.rank, len(rollout_actors), address)

    def send_weights(self, policy_version: int) -> None:
        self.client.policy_version = policy_version
        self.sender.send()
