"""What turns losses into weights: the plain PyTorch engine, and what it shares with the DeepSpeed engine.

Both have the same small surface, `Engine`. Losses that go to `backward` are already divided by the number of trained tokens of
the whole minibatch, over all ranks and microbatches, so an engine adds gradients up and never averages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from toolrl_ray.config import LearnerConfig
from toolrl_ray.device import torch_device
from toolrl_ray.errors import LearnerError
from toolrl_ray.learner.lora import adapter_tensors, merged
from toolrl_ray.learner.model import PolicyWithValue

Forward = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]  # called as PolicyWithValue.forward
WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")  # the kinds of tensor that training a parameter changes


class Engine(Protocol):
    """One rank's share of the optimisation. Under ZeRO-3 every method but `lr` and `weights_metadata` is a collective."""

    module: PolicyWithValue
    device: torch.device
    lr: float  # the policy's, of the last step, or of the first one to come
    num_steps: int  # optimiser steps taken

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]: ...

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Adds one microbatch's gradients; `is_last` marks the last microbatch before `step`."""

    def step(self) -> float:
        """Clips, updates, clears the gradients. Returns the global gradient norm before clipping. Takes no step where that is not finite:
        raises LearnerError, or (DeepSpeed from ZeRO 1 on) drops the gradients and returns inf."""

    def frozen(self, module: PolicyWithValue) -> Forward:
        """A forward of a model that is never trained (the reference), placed as this engine places models."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor) of the policy, tied weights once and adapters merged into what they adapt. A tensor is valid
        until the next is asked for."""

    def adapter_weights(self) -> dict[str, Tensor]:
        """CPU copies of the full tensors that `lora.adapter_tensors` names; none without LoRA."""

    def weights_metadata(self) -> list[tuple[str, tuple[int, ...], str]]:
        """(name, full shape, dtype name such as "float32") in the order of `named_weights`."""

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        """(kind, name in `module`, full float32 tensor) of everything trained, each name with WEIGHT and both MOMENTS. A tensor is valid
        until the next is asked for."""

    def load_state(self, read: Callable[[str, str], Tensor], num_steps: int, adam_step: int) -> None:
        """Takes `state` back, at any number of ranks and ZeRO stage. read(kind, name): the full tensor, on CPU."""

    def adam_step(self) -> int:
        """AdamW's own count of its steps, for its bias correction. (Not num_steps: with bfloat16 and ZeRO 0 DeepSpeed takes one ahead.)"""

    def all_sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, as a new tensor."""


def make_optimizer(module: PolicyWithValue, config: LearnerConfig) -> torch.optim.AdamW:
    """Its first group is the policy, its second the critic, where there is one."""
    critic = [p for part in (module.critic_trunk, module.value_head) if part is not None for p in part.parameters()]
    groups = [[p for p in parameters if p.requires_grad] for parameters in (module.lm.parameters(), critic)]
    return torch.optim.AdamW(
        [{"params": group} for group in groups if group], lr=config.lr, betas=config.adam_betas, weight_decay=config.weight_decay
    )


def warmed_up_lr(config: LearnerConfig, step: int) -> float:
    """The policy's learning rate at optimiser step 0, 1, ...: linear up to config.lr, which step warmup_steps - 1 is the first to have."""
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup_steps))


def set_lr(optimizer: Any, config: LearnerConfig, step: int) -> float:
    """For optimiser step 0, 1, ... of what `make_optimizer` made. Returns the policy's; the critic's rises beside it."""
    lr = warmed_up_lr(config, step)
    for group, ratio in zip(optimizer.param_groups, (1.0, (config.critic_lr or config.lr) / config.lr), strict=False):
        group["lr"] = lr * ratio
    return lr


def diverged(norm: float, step: int) -> LearnerError:
    """For optimiser step 0, 1, ..., which would make every weight NaN."""
    return LearnerError(f"the gradient norm is {norm} at optimiser step {step}: training has diverged")


def trained_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """In the order in which `make_optimizer` takes them."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def optimized(adam: torch.optim.AdamW) -> list[Tensor]:
    """What adam updates, in that order: the parameters, or float32 copies of them."""
    return [p for group in adam.param_groups for p in group["params"]]


def adam_state(adam: torch.optim.AdamW, p: Tensor) -> dict[str, Tensor]:
    """AdamW's live state of p: MOMENTS and "step". Before its first step, where it has none yet, what it would begin with."""
    state = adam.state[p]
    if not state:
        state.update({"step": torch.zeros(()), **{kind: torch.zeros_like(p) for kind in MOMENTS}})
    return state


def get_adam_step(adam: torch.optim.AdamW) -> int:
    return max((int(state["step"]) for state in adam.state.values()), default=0)


def set_adam_step(adam: torch.optim.AdamW, step: int) -> None:
    for state in adam.state.values():
        state["step"].fill_(step)


def whole_state(adam: torch.optim.AdamW, module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """`Engine.state` where nothing is partitioned: the live tensors."""
    for (name, _), master in zip(trained_parameters(module), optimized(adam), strict=True):
        yield WEIGHT, name, master.detach()
        for kind in MOMENTS:
            yield kind, name, adam_state(adam, master)[kind]


def policy_tensors(lm: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and persistent buffers under their state-dict names; a tied weight appears under its first name only. Adapters are left
    out, and what they adapt has the name that it has without them."""
    adapters = adapter_tensors(lm)
    first_name: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in lm.state_dict(keep_vars=True).items():
        if name not in adapters:
            first_name.setdefault(id(tensor), (name.replace(".base_layer.", "."), tensor))
    return list(first_name.values())


def whole_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def tensor_metadata(name: str, tensor: Tensor) -> tuple[str, tuple[int, ...], str]:
    shape = getattr(tensor, "ds_shape", tensor.shape)  # under ZeRO-3 the parameter itself is empty
    return name, tuple(shape), str(tensor.dtype).removeprefix("torch.")


class TorchEngine:
    """One process, no DeepSpeed: for `--in-process`. Weights stay float32; with dtype bfloat16 the forward is autocast."""

    def __init__(self, module: PolicyWithValue, config: LearnerConfig, dtype: str = "float32"):
        self.device = torch_device("learner", config.num_gpus)
        self.module = module.to(self.device)
        self.config = config
        self.optimizer = make_optimizer(module, config)
        self.lr = warmed_up_lr(config, 0)
        self.num_steps = 0
        self._autocast = dtype == "bfloat16"

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self._forward(self.module, *args, **kwargs)

    def _forward(self, module: PolicyWithValue, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return module(*args, **kwargs)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        loss.backward()

    def step(self) -> float:
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self.config.max_grad_norm))
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise diverged(norm, self.num_steps)
        self.lr = set_lr(self.optimizer, self.config, self.num_steps)
        self.num_steps += 1
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def frozen(self, module: PolicyWithValue) -> Forward:
        module = module.requires_grad_(False).to(self.device)
        return lambda *args, **kwargs: self._forward(module, *args, **kwargs)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        return merged(self.module.lm, policy_tensors(self.module.lm))

    def adapter_weights(self) -> dict[str, Tensor]:
        return whole_copies(adapter_tensors(self.module.lm))

    def weights_metadata(self) -> list[tuple[str, tuple[int, ...], str]]:
        return [tensor_metadata(name, tensor) for name, tensor in policy_tensors(self.module.lm)]

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        return whole_state(self.optimizer, self.module)

    def load_state(self, read: Callable[[str, str], Tensor], num_steps: int, adam_step: int) -> None:
        for kind, name, tensor in self.state():
            tensor.copy_(read(kind, name))
        set_adam_step(self.optimizer, adam_step)
        self.num_steps, self.lr = num_steps, warmed_up_lr(self.config, max(num_steps - 1, 0))

    def adam_step(self) -> int:
        return get_adam_step(self.optimizer)

    def all_sum(self, x: Tensor) -> Tensor:
        return x.clone()
