"""Writes a policy as a Hugging Face folder that `transformers` and `vllm serve` load as it is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor, nn

from toolrl_ray.errors import LearnerError
from toolrl_ray.learner.lora import write_adapter
from toolrl_ray.pretrained import load_config, share_weights

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model", "sentencepiece.*",
    "tekken.json", "*.tiktoken", "chat_template*", "additional_chat_templates",
)  # fmt: skip


def write_policy(
    lm: nn.Module, weights: dict[str, Tensor], adapter: dict[str, Tensor], directory: str, policy_dir: str, tokenizer_dir: str
) -> None:
    """Written beside `directory` and renamed, so that a folder of that name is always complete; one that is there is replaced.

    lm: gives the format; its own tensors are not read (under ZeRO-3 they are empty). weights: named as by `named_weights`.
    adapter: named as by `adapter_weights`; if there is one, it is written besides, into the folder `adapter`.
    policy_dir: where lm was loaded from; its configuration is kept, dropout rates included.
    Raises LearnerError when it cannot be written; nothing of it is left then.
    """
    target = Path(directory)
    aside = target.with_name(f".{target.name}.writing")
    try:
        _write(lm, weights, adapter, aside, policy_dir, tokenizer_dir)
        replaced = target.with_name(f".{target.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            os.rename(target, replaced)
        os.rename(aside, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise LearnerError(
            f"the policy {target} could not be written ({type(error).__name__}: {' '.join(str(error).split())}); "
            "its folder must be there for the learner, and have room"
        ) from None
    shutil.rmtree(replaced, ignore_errors=True)


def _write(
    lm: nn.Module, weights: dict[str, Tensor], adapter: dict[str, Tensor], aside: Path, policy_dir: str, tokenizer_dir: str
) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    lm.save_pretrained(aside, state_dict=weights)
    share_weights(aside)
    if adapter:
        write_adapter(lm, adapter, aside / "adapter")
    config = load_config(policy_dir)
    config.architectures = [type(lm).__name__]
    config.dtype = next(iter(weights.values())).dtype
    config.save_pretrained(aside)
    for pattern in TOKENIZER_FILES:
        for path in Path(tokenizer_dir).glob(pattern):
            if path.is_dir():
                shutil.copytree(path, aside / path.name)
            else:
                shutil.copy2(path, aside / path.name)
