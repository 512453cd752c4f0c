"""Loads what an engine needs from a policy folder or Hub name: tokenizer, codec, and the engine itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from toolrl_ray.config import RunConfig
from toolrl_ray.episode.codec import HFCodec
from toolrl_ray.errors import UserError
from toolrl_ray.rollout.runner import RolloutEngine


def load_codec(policy_dir: str) -> HFCodec:
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(policy_dir)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer in policy.path={policy_dir!r}: {str(error).splitlines()[0]}") from None
    try:
        eos = GenerationConfig.from_pretrained(policy_dir).eos_token_id
    except OSError:
        eos = None
    return HFCodec(tokenizer, [eos] if isinstance(eos, int) else eos)


def load_engine(config: RunConfig, policy_dir: str, codec: HFCodec, weight_backend: str, on_death: Callable[[], None]) -> RolloutEngine:
    if config.rollout.engine == "vllm":
        from toolrl_ray.rollout.vllm_engine import VLLMEngine

        return VLLMEngine(config, policy_dir, weight_backend, 0, on_death)
    return load_transformers_engine(config, policy_dir, codec)


def load_transformers_engine(config: RunConfig, policy_dir: str, codec: HFCodec) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from toolrl_ray.rollout.transformers_engine import TransformersEngine

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=getattr(torch, config.policy.dtype))
    if config.rollout.num_gpus > 0:
        model = model.cuda()
    max_batch = max(config.rollout.max_in_flight, config.eval.max_in_flight)
    return TransformersEngine(model, codec.decode, codec.eos_token_ids, max_batch=max_batch, seed=config.seed, policy_version=0)
