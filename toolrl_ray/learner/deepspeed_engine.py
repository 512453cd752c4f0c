"""The DeepSpeed engine: ZeRO 0 to 3 on any number of ranks, gloo on CPU and nccl on GPU, with the surface of `engine.Engine`.

Two habits of DeepSpeed are switched off: it divides the loss by a fixed number of accumulation steps (ours varies, so the
boundary is set by hand), and it averages gradients over ranks (the loss is a sum, so it is multiplied by their number).
"""

from __future__ import annotations

import itertools
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from toolrl_ray.config import LearnerConfig
from toolrl_ray.learner.engine import (
    Forward,
    learner_device,
    make_optimizer,
    policy_tensors,
    tensor_metadata,
    warmed_up_lr,
    whole_copies,
)
from toolrl_ray.learner.lora import adapter_tensors, merged
from toolrl_ray.learner.model import PolicyWithValue

BUCKET_BYTES = 256 * 2**20  # gathered at once under ZeRO-3
WHOLE_BELOW = 5000  # elements; under ZeRO-3 parameters smaller than this (norms, biases) stay whole on every rank


def start(rank: int, world_size: int, init_method: str | None, device: torch.device, timeout_s: float) -> Any:
    """Imports DeepSpeed for this device and joins the process group; a group of one needs no address. Returns the module."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # else it looks for devices, and says so
    os.environ.setdefault("LOCAL_RANK", "0")  # Ray shows each rank its own GPU only
    backend = "gloo" if device.type == "cpu" else "nccl"
    if not torch.distributed.is_initialized():
        where = {"init_method": init_method} if init_method else {"store": torch.distributed.HashStore()}
        torch.distributed.init_process_group(
            backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s), **where
        )
    import deepspeed

    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)  # DeepSpeed's calls
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its first use would compile C++; gloo does the same work
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed


class DeepSpeedEngine:
    """See `engine.Engine`. bfloat16 keeps float32 master weights in the optimiser."""

    def __init__(
        self,
        module: PolicyWithValue,
        config: LearnerConfig,
        dtype: str = "float32",
        rank: int = 0,
        world_size: int = 1,
        init_method: str | None = None,
    ):
        self.device = learner_device(config)
        self.config = config
        self.world_size = world_size
        self.deepspeed = start(rank, world_size, init_method, self.device, config.update_timeout_s)
        self._settings = _settings(config, dtype)
        optimizer = make_optimizer(module, config)
        self.engine, *_ = self.deepspeed.initialize(model=module, optimizer=optimizer, config=self._settings, dist_init_required=False)
        self.module = module
        self.lr = warmed_up_lr(config, 0)
        self._step = itertools.count()

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self) -> float:
        self.lr = warmed_up_lr(self.config, next(self._step))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.lr
        norm = None
        if self.config.zero_stage == 0:  # in float32 it clips without telling the norm
            norm = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        self.engine.step()
        told = self.engine.get_global_grad_norm()
        return float(norm if told is None else told)

    def frozen(self, module: PolicyWithValue) -> Forward:
        module.requires_grad_(False)
        if self.config.zero_stage < 3:
            return module.to(self.device)
        engine, *_ = self.deepspeed.initialize(model=module, config=self._settings, dist_init_required=False)
        return engine

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        lm = self.module.lm
        with self._gathered(adapter_tensors(lm).values()):  # small next to what they adapt
            for bucket in _buckets(policy_tensors(lm)):
                with self._gathered(tensor for _, tensor in bucket):
                    yield from merged(lm, bucket)

    def adapter_weights(self) -> dict[str, Tensor]:
        adapters = adapter_tensors(self.module.lm)
        with self._gathered(adapters.values()):
            return whole_copies(adapters)

    def _gathered(self, tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
        """Within it those that ZeRO-3 has partitioned are whole; a collective."""
        partitioned = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
        return self.deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned))

    def weights_metadata(self) -> list[tuple[str, tuple[int, ...], str]]:
        return [tensor_metadata(name, tensor) for name, tensor in policy_tensors(self.module.lm)]

    def all_sum(self, x: Tensor) -> Tensor:
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x


def _settings(config: LearnerConfig, dtype: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # asked for, used only for its own throughput figures
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": config.zero_stage, "stage3_param_persistence_threshold": WHOLE_BELOW},
    }


def _buckets(tensors: list[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        num_bytes = getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size()
        if bucket and size + num_bytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += num_bytes
    if bucket:
        yield bucket
