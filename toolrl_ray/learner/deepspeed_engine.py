"""The DeepSpeed engine: ZeRO 0 to 3 on any number of ranks, gloo on CPU and nccl on GPU, with the surface of `engine.Engine`.

Two habits of DeepSpeed are switched off: it divides the loss by a fixed number of accumulation steps (ours varies, so the
boundary is set by hand), and it averages gradients over ranks (the loss is a sum, so it is multiplied by their number).
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from toolrl_ray.config import LearnerConfig
from toolrl_ray.device import torch_device
from toolrl_ray.learner.engine import (
    MOMENTS,
    WEIGHT,
    Forward,
    adam_state,
    diverged,
    get_adam_step,
    make_optimizer,
    optimized,
    policy_tensors,
    set_adam_step,
    set_lr,
    tensor_metadata,
    trained_parameters,
    warmed_up_lr,
    whole_copies,
    whole_state,
)
from toolrl_ray.learner.lora import adapter_tensors, merged
from toolrl_ray.learner.model import PolicyWithValue

BUCKET_BYTES = 256 * 2**20  # gathered at once under ZeRO-3
WHOLE_BELOW = 5000  # elements; under ZeRO-3 parameters smaller than this (norms, biases) stay whole on every rank


def start(rank: int, world_size: int, init_method: str | None, device: torch.device, timeout_s: float) -> Any:
    """Imports DeepSpeed for this device and joins the process group; a group of one needs no address. Returns the module."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # else it looks for devices, and says so
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # ZeRO's optimisers decorate with torch.compile: 15 s of imports, and nothing is compiled
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
    # Else it runs the compiler, on a GPU too, to see what it could compile; on CPU it then compiles, and gloo does the same work.
    deepspeed.ops.__compatible_ops__ = {}
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
        self.device = torch_device("learner", config.num_gpus)
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.deepspeed = start(rank, world_size, init_method, self.device, config.update_timeout_s)
        self._settings = _settings(config, dtype)
        self._adam = make_optimizer(module, config)  # stays the one that steps, on what DeepSpeed makes of the parameters
        self.engine, *_ = self.deepspeed.initialize(model=module, optimizer=self._adam, config=self._settings, dist_init_required=False)
        self.module = module
        self.lr = warmed_up_lr(config, 0)
        self.num_steps = 0

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self) -> float:
        norm = None
        if self.config.zero_stage == 0:  # in float32 it clips without telling the norm, and steps by any; it is that of every rank
            norm = float(nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None]))
            if not math.isfinite(norm):
                raise diverged(norm, self.num_steps)
        self.lr = set_lr(self.engine.optimizer, self.config, self.num_steps)
        self.num_steps += 1
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

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        if self.config.zero_stage == 0:
            yield from whole_state(self._adam, self.module)
            return
        self._ready_moments()
        utils = self.deepspeed.utils
        for name, p in trained_parameters(self.module):
            yield WEIGHT, name, utils.safe_get_full_fp32_param(p)
            for kind in MOMENTS:
                yield kind, name, utils.safe_get_full_optimizer_state(p, kind)

    def load_state(self, read: Callable[[str, str], Tensor], num_steps: int, adam_step: int) -> None:
        (self._load_whole, self._load_zero_1_2, self._load_zero_1_2, self._load_zero_3)[self.config.zero_stage](read)
        set_adam_step(self._adam, adam_step)
        self.num_steps, self.lr = num_steps, warmed_up_lr(self.config, max(num_steps - 1, 0))

    def adam_step(self) -> int:
        return get_adam_step(self._adam)

    def _load_whole(self, read: Callable[[str, str], Tensor]) -> None:
        for kind, name, tensor in self.state():
            tensor.copy_(read(kind, name))
        for (_, p), master in zip(trained_parameters(self.module), optimized(self._adam), strict=True):
            p.data.copy_(master.data)

    def _load_zero_1_2(self, read: Callable[[str, str], Tensor]) -> None:
        self._ready_moments()
        utils = self.deepspeed.utils
        for name, p in trained_parameters(self.module):
            utils.safe_set_full_fp32_param(p, read(WEIGHT, name))
            for kind in MOMENTS:
                utils.safe_set_full_optimizer_state(p, read(kind, name), kind)
        self.engine.optimizer.update_lp_params()

    def _load_zero_3(self, read: Callable[[str, str], Tensor]) -> None:
        self._ready_moments()
        utils = self.deepspeed.utils

        def own(p: nn.Parameter, whole: Tensor) -> Tensor:  # DeepSpeed's own cut fails where the ranks' shares are padded
            padded = nn.functional.pad(whole.flatten(), (0, p.ds_tensor.numel() * self.world_size - p.ds_numel))
            return padded.view(self.world_size, -1)[self.rank]

        for name, p in trained_parameters(self.module):
            weight = read(WEIGHT, name)
            utils.safe_set_local_fp32_param(p, own(p, weight))
            for kind in MOMENTS:
                utils.safe_set_local_optimizer_state(p, own(p, read(kind, name)), kind)
            with self.deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                p.data.copy_(weight)

    def _ready_moments(self) -> None:
        """Under ZeRO 1 to 3 the moments and DeepSpeed's way to them exist only after the first step."""
        zero = self.engine.optimizer
        if self.config.zero_stage == 3:
            for flat in zero.fp32_partitioned_groups_flat:
                adam_state(self._adam, flat)
            return
        for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            adam_state(self._adam, flat)
            self.deepspeed.utils.lazy_init_hp_params_optimizer_state(parameters, flat, self._adam.state)

    def all_sum(self, x: Tensor) -> Tensor:
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x


def _settings(config: LearnerConfig, dtype: str) -> dict[str, Any]:
    half = dtype == "bfloat16"
    return {
        "train_micro_batch_size_per_gpu": 1,  # asked for, used only for its own throughput figures
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": half},
        # In bfloat16 the sum over 256 microbatches was off by 3 %. Stages 0 and 1 do not offer it (contradictions.py).
        **({"data_types": {"grad_accum_dtype": "fp32"}} if half else {}),
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
