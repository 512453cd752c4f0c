"""What the learner sends of models that transformers and vLLM each hold in their own way, vLLM samples from: proof by logprobs."""

from __future__ import annotations

import asyncio

import pytest
import torch
import transformers

from toolrl_ray.bootstrap.calculator import PIECES
from toolrl_ray.bootstrap.tokenizer import make_tokenizer
from toolrl_ray.config import RunConfig
from toolrl_ray.learner.update import Learner
from toolrl_ray.rollout.vllm_engine import VLLMEngine
from toolrl_ray.weights.trainer import pack

SEQUENCE = list(range(5, 45))
EXPERTS = {"num_experts_per_tok": 2, "num_key_value_heads": 2}
MODELS = {
    # Experts, which vLLM packs on CPU, and which transformers fuses and (Mixtral) renames.
    "Qwen3Moe": EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 32},
    "Mixtral": EXPERTS | {"num_local_experts": 4},
    "GPT2": {},
}


def make_policy(path: str, kind: str) -> None:
    tokenizer = make_tokenizer(256, PIECES)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **MODELS[kind],
    )
    torch.manual_seed(0)
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
    change(model, 0.15)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def change(model: torch.nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * by)


async def scenario(path: str) -> None:
    config = RunConfig(recipe="test", policy={"path": path}, algo={"kl_coef": 0.0})
    learner = Learner(config, path, in_process=True)
    weights = learner.weights_to_send()
    engine = VLLMEngine(config, path, "object_store", 0)
    try:
        await engine.ready(0)
        await engine.init_weight_transfer({})
        for version in (1, 2):
            assert await engine.score(SEQUENCE) == pytest.approx(learner.logprobs(SEQUENCE), abs=1e-4)
            change(learner.engine.module.lm, 0.05)
            await engine.pause()
            await engine.start_weight_update()
            await engine.update_weights(pack(weights, 0))
            await engine.finish_weight_update(version)
            await engine.resume()
        assert await engine.score(SEQUENCE) == pytest.approx(learner.logprobs(SEQUENCE), abs=1e-4)
    finally:
        engine.shutdown()


@pytest.mark.parametrize("kind", MODELS)
def test_the_engine_samples_from_what_it_was_sent(tmp_path, kind):
    make_policy(str(tmp_path), kind)
    asyncio.run(scenario(str(tmp_path)))
