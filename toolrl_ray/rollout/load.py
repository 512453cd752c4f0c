"""Loads what an engine needs from a policy folder or Hub name: tokenizer, codec, and the engine itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from toolrl_ray.config import RunConfig
from toolrl_ray.device import torch_device
from toolrl_ray.episode.call_format import CallFormat, TextMarkers
from toolrl_ray.episode.chat_format import hermes_format
from toolrl_ray.episode.codec import HFCodec
from toolrl_ray.errors import RolloutError, UserError
from toolrl_ray.pretrained import load_model, one_line
from toolrl_ray.rollout.runner import RolloutEngine
from tools_service.runner import ToolInfo

TEKKEN = "tekken.json"


def load_codec(policy_dir: str) -> HFCodec:
    """Raises UserError with one line."""
    from transformers import AutoTokenizer

    if not _has_file(policy_dir, "tokenizer.json") and _has_file(policy_dir, TEKKEN):  # in the order of what a Hub is asked least for
        raise UserError(f"policy.path={policy_dir!r} has Mistral's {TEKKEN} alone; put the same model's tokenizer.json beside it")
    try:
        # Mistral's own format has a tokenizer class of its own, which neither writes special tokens out nor takes a chat template.
        codec = HFCodec(AutoTokenizer.from_pretrained(policy_dir, mistral_format=False), _generation_eos(policy_dir))
        if not codec.encode("What is 1+1?"):  # what some classes make of a folder without their files
            raise UserError(f"no tokenizer in policy.path={policy_dir!r}: put the tokenizer's files beside the weights")
        return codec
    except UserError:
        raise
    except Exception as error:  # of tokenizers some are of no class of their own
        what = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"no tokenizer in policy.path={policy_dir!r} that transformers can load ({what})") from None


def _has_file(policy_dir: str, name: str) -> bool:
    from transformers.utils import cached_file

    try:
        return cached_file(policy_dir, name) is not None
    except OSError:
        return False


def _generation_eos(policy_dir: str) -> list[int]:
    """The EOS ids of the model's generation config; none where it has no such file. Raises UserError for a damaged one."""
    from transformers import GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    if not _has_file(policy_dir, GENERATION_CONFIG_NAME):
        return []
    where = f"policy.path={policy_dir!r}: {GENERATION_CONFIG_NAME}"
    try:
        eos = GenerationConfig.from_pretrained(policy_dir).eos_token_id
    except Exception as error:  # whatever its reader trips over
        raise UserError(f"{where} is damaged ({one_line(error)}); bring it back as it was: it tells where the model ends a text") from None
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int for token in ids):
        raise UserError(f"{where} has eos_token_id={eos!r}; it must be a token's id or a list of them")
    return ids


def make_call_format(config: RunConfig, codec: HFCodec, infos: Mapping[str, ToolInfo]) -> CallFormat:
    """How the policy writes calls. infos: of every tool. Raises ConfigError where the policy cannot be talked to in that way."""
    if config.episode.call_format == "text":
        return TextMarkers()
    return hermes_format(codec, infos, config.episode.system, config.policy.path)


async def load_call_format(config: RunConfig, codec: HFCodec, ask: Callable[[], Awaitable[Mapping[str, ToolInfo]]]) -> CallFormat:
    """The same; only a format that describes the tools to the policy asks for them. Raises RolloutError after tools.start_timeout_s."""
    if config.episode.call_format == "text":
        return make_call_format(config, codec, {})
    try:
        async with asyncio.timeout(config.tools.start_timeout_s):
            infos = await ask()
    except TimeoutError:
        raise RolloutError(f"the tools did not answer within {config.tools.start_timeout_s:g} s (tools.start_timeout_s)") from None
    return make_call_format(config, codec, infos)


def load_engine(
    config: RunConfig, policy_dir: str, codec: HFCodec, weight_backend: str, on_death: Callable[[RolloutError], None]
) -> RolloutEngine:
    if config.rollout.engine == "vllm":
        from toolrl_ray.rollout.vllm_engine import VLLMEngine

        return VLLMEngine(config, policy_dir, weight_backend, 0, on_death)
    return load_transformers_engine(config, policy_dir, codec)


def load_transformers_engine(config: RunConfig, policy_dir: str, codec: HFCodec) -> Any:
    from transformers import AutoModelForCausalLM

    from toolrl_ray.rollout.transformers_engine import TransformersEngine

    device = torch_device("rollout", config.rollout.num_gpus)
    model = load_model(AutoModelForCausalLM, policy_dir, config.policy.dtype).to(device)
    max_batch = max(config.rollout.max_in_flight, config.eval.max_in_flight)
    return TransformersEngine(
        model,
        codec.decode,
        codec.eos_token_ids,
        max_batch=max_batch,
        seed=config.seed,
        policy_version=0,
        recompute=config.weights.kv_cache == "recompute",
    )
