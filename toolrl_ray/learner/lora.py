"""Low-rank adapters by peft: put into the policy, left out for the reference, merged into the base on the way out.

An adapted module computes W x + alpha / rank * B (A x): W is the base's and stays as it is, A and B are trained. B starts at
zero, so that the first policy is the base itself. (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".)
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolrl_ray.config import LoraConfig
from toolrl_ray.errors import UserError
from toolrl_ray.pretrained import share_weights

ADAPTER = "default"  # peft's name for an only adapter


def add_adapters(lm: nn.Module, config: LoraConfig, seed: int) -> None:
    """Adapts the modules of lm that the configuration names and freezes everything else. The same seed gives the same A.

    Raises UserError with one line for a target that lm lacks, that cannot be adapted, or whose weight another module shares.
    """
    import peft

    targets = config.target_modules
    if targets != "all-linear":
        targets = [targets] if isinstance(targets, str) else targets
        names = [f".{name}" for name, _ in lm.named_modules()]
        for target in targets:
            if not any(name.endswith(f".{target}") for name in names):
                raise _unfit(config, f"the policy has no module {target!r}; give all-linear, or a list of names such as q_proj")
    wanted = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore", UserWarning)  # of transposed layers, which it handles, and of shared weights, refused below
        try:
            peft.inject_adapter_in_model(wanted, lm, ADAPTER)
        except ValueError as error:
            raise _unfit(config, " ".join(str(error).split())[:200]) from None
    uses = Counter(id(tensor) for tensor in lm.state_dict(keep_vars=True).values())
    for name, layer in adapted_layers(lm).items():
        base = layer.get_base_layer()
        if not hasattr(base, "weight"):  # all experts of a layer in one block, which a merge would have to take apart
            raise _unfit(config, f"{name} ({type(base).__name__}) holds several weights in one block; name modules such as q_proj, v_proj")
        if uses[id(base.weight)] > 1:
            raise _unfit(config, f"{name} has its weight in common with another module, which a merge would change too; leave it out")
    wanted.base_model_name_or_path = lm.name_or_path


def _unfit(config: LoraConfig, reason: str) -> UserError:
    return UserError(f"policy.lora.target_modules={config.target_modules!r}: {reason}")


def adapted_layers(lm: nn.Module) -> dict[str, Any]:
    """peft's layers under the names of the modules that they stand for; none without LoRA."""
    return {name: module for name, module in lm.named_modules() if hasattr(module, "get_delta_weight")}


def adapter_tensors(lm: nn.Module) -> dict[str, Tensor]:
    """Every A and B under its state-dict name."""
    return {
        f"{name}.{key}": tensor
        for name, layer in adapted_layers(lm).items()
        for key, tensor in layer.state_dict(keep_vars=True).items()
        if not key.startswith("base_layer.")
    }


@contextmanager
def adapters_off(lm: nn.Module) -> Iterator[None]:
    """Within it lm is the base model, also where peft trains whole modules in the place of its own (modules_to_save), and no adapter
    requires a gradient. For forwards without gradients."""
    layers = [module for module in lm.modules() if getattr(module, "disable_adapters", None) is False]
    flags = [(p, p.requires_grad) for p in lm.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)  # which takes every parameter of theirs for trained
        for p, requires_grad in flags:
            p.requires_grad_(requires_grad)


def merged(lm: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """tensors: of the base, under the base's names. Those of adapted modules come out as new tensors with the adapter added, one
    at a time; lm keeps its own. Under ZeRO-3 both sides must be gathered."""
    layers = {f"{name}.weight": layer for name, layer in adapted_layers(lm).items()}
    for name, tensor in tensors:
        tensor = tensor.detach()
        if name in layers:
            with torch.no_grad():
                tensor = tensor + layers[name].get_delta_weight(ADAPTER)
        yield name, tensor


def write_adapter(lm: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """The adapter alone, as `peft.PeftModel.from_pretrained` reads it. tensors: whole, named as by `adapter_tensors`."""
    import peft
    from safetensors.torch import save_file

    lm.peft_config[ADAPTER].save_pretrained(str(folder))
    named = peft.get_peft_model_state_dict(lm, tensors, ADAPTER, save_embedding_layers=False)
    prefixed = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in named.items()}
    save_file(prefixed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    share_weights(folder)
