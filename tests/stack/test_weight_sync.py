"""vLLM samples from what it was sent: proof by logprobs after every sync, for a tied and an untied model."""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save
from transformers import LlamaConfig, LlamaForCausalLM

from toolrl_ray.bootstrap.calculator import PIECES
from toolrl_ray.bootstrap.tokenizer import make_tokenizer
from toolrl_ray.config import RunConfig
from toolrl_ray.rollout.vllm_engine import VLLMEngine
from toolrl_ray.types import SamplingParams
from toolrl_ray.weights import trainer
from toolrl_ray.weights.trainer import pack

NUM_SYNCS = 20
SEQUENCE = list(range(5, 60))


def make_policy(path, tied: bool, num_heads: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(256, PIECES)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=num_heads,
            intermediate_size=352,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def expected(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], dim=-1)
    return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


async def send(engine: VLLMEngine, model, version: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if version % 2:  # every tensor comes by itself, and so do the parts of one layer of vLLM's
            patch.setattr(trainer, "PAYLOAD_BYTES", 1)
        update_info = pack(SimpleNamespace(named_weights=model.named_parameters), 0)
    assert len(update_info["payloads"]) == (len(list(model.parameters())) if version % 2 else 1)
    await engine.pause()
    await engine.start_weight_update()
    await engine.update_weights(update_info)
    await engine.finish_weight_update(version)
    await engine.resume()


async def scenario(path: str, model) -> None:
    engine = VLLMEngine(RunConfig(recipe="test"), path, "object_store", 0)
    try:
        await engine.ready(0)
        await engine.init_weight_transfer({})
        for version in range(1, NUM_SYNCS + 1):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.02)
            await send(engine, model, version)
            assert torch.tensor(await engine.score(SEQUENCE)) == pytest.approx(expected(model, SEQUENCE), abs=1e-4)
            completion = await engine.generate(SEQUENCE[:10], SamplingParams(1.0, 8, ("<submit>",)))
            assert completion.policy_versions == [version] * len(completion.token_ids)
            sampled = expected(model, SEQUENCE[:10] + completion.token_ids)[9:]
            assert torch.tensor(completion.logprobs) == pytest.approx(sampled, abs=1e-4)
        await in_flight(engine, model)
        await broken_off(engine, model)
    finally:
        engine.shutdown()


async def in_flight(engine: VLLMEngine, model) -> None:
    """A request that is running when weights arrive goes on, and each token keeps the version that sampled it."""
    running = asyncio.create_task(engine.generate(SEQUENCE[:10], SamplingParams(1.0, 200, ())))
    others = [asyncio.create_task(engine.generate(SEQUENCE[:9], SamplingParams(1.0, 200, ()))) for _ in range(8)]
    await engine.generate(SEQUENCE[:8], SamplingParams(1.0, 20, ()))  # the others have sampled some tokens by now
    await send(engine, model, NUM_SYNCS + 1)
    completions = await asyncio.gather(running, *others)
    versions = {version for completion in completions for version in completion.policy_versions}
    assert versions == {NUM_SYNCS, NUM_SYNCS + 1}
    assert all(completion.policy_versions == sorted(completion.policy_versions) for completion in completions)


async def broken_off(engine: VLLMEngine, model) -> None:
    """Whatever became of an attempt, and connected anew or not, the next one brings the weights."""

    async def left_open() -> None:
        await engine.start_weight_update()

    async def failed() -> None:
        await engine.start_weight_update()
        with pytest.raises(Exception, match="collective_rpc method failed"):
            await engine.update_weights({"payloads": [b"no safetensors"]})

    async def failed_inside_a_layer() -> None:
        await engine.start_weight_update()
        part = "model.layers.1.self_attn.q_proj.weight"  # of a layer that has k_proj and v_proj too
        with pytest.raises(Exception, match="collective_rpc method failed"):
            await engine.update_weights({"payloads": [save({part: model.get_parameter(part).detach()}), b"no safetensors"]})

    attempts = itertools.product((left_open, failed, failed_inside_a_layer), (False, True))
    for version, (attempt, reconnects) in enumerate(attempts, NUM_SYNCS + 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        await engine.pause()
        await attempt()
        if reconnects:
            await engine.init_weight_transfer({})
        await send(engine, model, version)
        assert torch.tensor(await engine.score(SEQUENCE)) == pytest.approx(expected(model, SEQUENCE), abs=1e-4)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_engine_samples_from_what_it_was_sent_after_each_of_20_syncs(tmp_path, tied):
    model = make_policy(tmp_path, tied)
    asyncio.run(scenario(str(tmp_path), model))
