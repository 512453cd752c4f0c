from __future__ import annotations

import asyncio
import gc

import pytest
import torch
from safetensors.torch import save
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BloomConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    OPTConfig,
)

from toolrl_ray.errors import UserError
from toolrl_ray.learner.engine import policy_tensors
from toolrl_ray.rollout.transformers_engine import TransformersEngine
from toolrl_ray.types import SamplingParams

VOCABULARY = "\0\1abcdefghij<>"  # id 0 is padding, id 1 is EOS
EOS = 1


def decode(ids: list[int]) -> str:
    return "".join(VOCABULARY[i] for i in ids)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def engine(model):
    return TransformersEngine(model, decode, [EOS], max_batch=4, seed=0, policy_version=5)


def generate(engine, *jobs):
    async def run():
        return await asyncio.gather(*(engine.generate(ids, params) for ids, params in jobs))

    return asyncio.run(run())


def reference(model, ids, temperature=1.0):
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].float() / temperature, dim=-1)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_those_of_the_distribution_sampled_from_whatever_shares_the_batch(model, engine, temperature):
    params = SamplingParams(temperature, 12, ("<>",))
    prompts = [[2, 3, 4], [5], [6, 7, 8, 9, 2, 3], [4, 4], [7, 7, 7]]  # more than one batch, lengths mixed
    for prompt, completion in zip(prompts, generate(engine, *((p, params) for p in prompts)), strict=True):
        wanted = reference(model, prompt + completion.token_ids, temperature)
        for i, (token, logprob) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
            assert logprob == pytest.approx(float(wanted[len(prompt) + i - 1, token]), abs=1e-5)
        assert completion.policy_versions == [5] * len(completion.token_ids)


def test_greedy_takes_the_likeliest_token(model, engine):
    [completion] = generate(engine, ([2, 3], SamplingParams(0.0, 6, ())))
    ids = [2, 3]
    for token in completion.token_ids:
        assert token == int(reference(model, ids)[-1].argmax())
        ids.append(token)


def test_sampling_follows_the_models_distribution(model, engine):
    prompt = [2, 3]
    params = SamplingParams(1.0, 1, ())
    tokens = [c.token_ids[0] for c in generate(engine, *[(prompt, params)] * 2000)]
    counts = torch.bincount(torch.tensor(tokens), minlength=len(VOCABULARY)) / 2000
    assert float((counts - reference(model, prompt)[-1].exp()).abs().max()) < 0.04


def test_a_row_ends_at_stop_string_eos_or_length_and_keeps_what_it_sampled(engine):
    params = SamplingParams(1.0, 20, ("a", "<>"))
    completions = generate(engine, *[([2 + i % 5], params) for i in range(60)])
    reasons = {"stop": 0, "length": 0}
    for completion in completions:
        text = decode(completion.token_ids)
        reasons[completion.finish_reason] += 1
        if completion.finish_reason == "length":
            assert len(completion.token_ids) == 20
            assert "a" not in text and "<>" not in text and EOS not in completion.token_ids
        else:
            assert text.endswith(("a", "<>", "\1"))
            assert not any(stop in text[:-1] for stop in params.stop)
    assert min(reasons.values()) > 0


def test_rows_of_one_batch_have_their_own_limits(engine):
    short, long = generate(engine, ([2], SamplingParams(1.0, 1, ())), ([2], SamplingParams(0.0, 7, ())))
    assert len(short.token_ids) == 1
    assert len(long.token_ids) in range(1, 8)


def test_a_row_that_has_reached_the_models_last_position_does_not_fail_those_that_go_on():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(VOCABULARY), n_positions=16, n_embd=16, n_layer=1, n_head=1))
    engine = TransformersEngine(model, decode, [], max_batch=4, seed=0, policy_version=0)
    full, short = generate(engine, ([2] * 14, SamplingParams(1.0, 2, ())), ([3], SamplingParams(1.0, 12, ())))
    assert (len(full.token_ids), len(short.token_ids)) == (2, 12)
    wanted = reference(model, [3, *short.token_ids])
    assert short.logprobs == pytest.approx([float(wanted[i, token]) for i, token in enumerate(short.token_ids)], abs=1e-5)


@pytest.fixture
def counted(model):
    """An engine, and a list that grows with every forward."""
    twin, forwards = LlamaForCausalLM(model.config), []
    twin.register_forward_hook(lambda *_: forwards.append(1))
    return TransformersEngine(twin, decode, [], max_batch=4, seed=0, policy_version=0), forwards


def test_a_row_that_has_ended_is_handed_back_while_the_others_go_on(counted):
    engine, forwards = counted

    async def run():
        long = asyncio.create_task(engine.generate([2], SamplingParams(1.0, 40, ())))
        short = await engine.generate([2], SamplingParams(1.0, 1, ()))
        return short, len(forwards), await long

    short, after, long = asyncio.run(run())
    assert len(short.token_ids) == 1 and after < 10 and len(long.token_ids) == 40


def test_nothing_is_sampled_for_callers_that_have_gone(counted):
    engine, forwards = counted

    async def run():
        gone = asyncio.create_task(engine.generate([2], SamplingParams(1.0, 60, ())))
        while len(forwards) < 3:
            await asyncio.sleep(0)
        gone.cancel()
        return await engine.generate([2], SamplingParams(1.0, 2, ()))

    assert len(asyncio.run(run()).token_ids) == 2 and len(forwards) < 10


def test_new_weights_are_sampled_from_and_stamped(model, engine):
    before = generate(engine, ([2, 3], SamplingParams(0.0, 3, ())))[0]
    changed = {
        name: p.detach() + 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for name, p in model.named_parameters()
    }
    twin = LlamaForCausalLM(model.config)
    own = TransformersEngine(twin, decode, [EOS], max_batch=4, seed=0, policy_version=0)
    own.load_weights(changed.items())
    asyncio.run(own.finish_weight_update(9))
    after = generate(own, ([2, 3], SamplingParams(0.0, 3, ())))[0]
    assert after.policy_versions[0] == 9
    assert float(reference(twin, [2, 3, *after.token_ids])[1, after.token_ids[0]]) == pytest.approx(after.logprobs[0], abs=1e-5)
    assert before.logprobs != after.logprobs


def test_what_the_learner_sends_of_a_model_with_a_persistent_buffer_is_all_loaded():
    def make(value: float) -> torch.nn.Module:
        model = torch.nn.Linear(2, 2)
        model.register_buffer("router_bias", torch.full((2,), value))
        return model

    trained, own = make(1.0), make(0.0)
    TransformersEngine(own, decode, [EOS], max_batch=4, seed=0, policy_version=0).load_weights(policy_tensors(trained))
    assert all(torch.equal(own.state_dict()[name], tensor) for name, tensor in trained.state_dict().items())


def test_a_failure_of_the_model_reaches_every_waiting_episode(engine):
    async def run():
        return await asyncio.gather(*(engine.generate([10**6], SamplingParams(1.0, 2, ())) for _ in range(3)), return_exceptions=True)

    assert all(isinstance(error, IndexError) for error in asyncio.run(run()))


def test_a_model_without_a_key_value_cache_is_refused_in_one_line_that_names_its_kind():
    model = MambaForCausalLM(MambaConfig(vocab_size=len(VOCABULARY), hidden_size=16, state_size=4, num_hidden_layers=1))
    engine = TransformersEngine(model, decode, [EOS], max_batch=4, seed=0, policy_version=0)
    with pytest.raises(UserError, match=r"^rollout.engine=transformers cannot sample .*'mamba'.*; rollout.engine=vllm may serve it$"):
        generate(engine, ([2, 3], SamplingParams(1.0, 4, ())))


def made_of(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)  # so that where a token stands shows
    return model.eval()


SIZES = {"vocab_size": len(VOCABULARY), "hidden_size": 16}
TWO_LENGTHS = ([2, 3], SamplingParams(1.0, 4, ())), ([2, 3, 4, 5, 6, 7], SamplingParams(1.0, 4, ()))


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(**SIZES, n_layer=2, n_head=2),
        MptConfig(vocab_size=len(VOCABULARY), d_model=16, n_layers=2, n_heads=2),
        OPTConfig(**SIZES, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=64),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_that_takes_positions_from_the_mask_is_sampled_as_it_is_without_padding(config):
    model = made_of(config)
    engine = TransformersEngine(model, decode, [], max_batch=4, seed=0, policy_version=0)
    for (prompt, _), completion in zip(TWO_LENGTHS, generate(engine, *TWO_LENGTHS), strict=True):
        wanted = reference(model, [*prompt, *completion.token_ids])[len(prompt) - 1 : -1]
        assert completion.logprobs == pytest.approx(wanted.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0].tolist(), abs=1e-4)


def test_a_model_that_counts_padding_as_positions_is_refused_in_one_line_that_names_its_kind():
    layers = {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "max_position_embeddings": 64}
    model = made_of(BartConfig(vocab_size=len(VOCABULARY), d_model=16, **layers))
    engine = TransformersEngine(model, decode, [], max_batch=4, seed=0, policy_version=0)
    with pytest.raises(UserError, match=r"^rollout.engine=transformers cannot sample .*'bart'.* counts padding .*$"):
        generate(engine, *TWO_LENGTHS)


def test_a_completions_seed_says_what_it_draws_whatever_shares_the_batch(model):
    def sampled(seed, own, company):
        engine = TransformersEngine(model, decode, [EOS], max_batch=4, seed=seed, policy_version=0)
        jobs = [([3, 4], SamplingParams(1.0, 9, (), seed=other)) for other in company]
        return generate(engine, *jobs, ([2, 3], SamplingParams(1.0, 9, (), seed=own)))[-1].token_ids

    alone = sampled(0, 7, [])
    assert sampled(0, 7, [1, 2]) == sampled(0, 7, range(10, 17)) == alone
    assert sampled(1, 7, []) != alone and sampled(0, 8, []) != alone


@pytest.mark.parametrize("recompute", [True, False])
def test_what_is_sampled_after_a_pause_is_of_the_new_weights_alone(model, recompute):
    before, after = LlamaForCausalLM(model.config), LlamaForCausalLM(model.config)
    steps = []
    before.register_forward_hook(lambda *_: steps.append(1))
    engine = TransformersEngine(before, decode, [], max_batch=4, seed=0, policy_version=5, recompute=recompute)

    async def run():
        completion = asyncio.create_task(engine.generate([2, 3], SamplingParams(1.0, 30, ())))
        while len(steps) < 10:
            await asyncio.sleep(0)
        await engine.pause()
        await engine.start_weight_update()
        await engine.update_weights({"payloads": [save({name: p.detach().clone()}) for name, p in after.named_parameters()]})
        for _ in range(10):  # the new weights are here, and their version is not told yet
            await asyncio.sleep(0)
        await engine.finish_weight_update(6)
        assert len(steps) == 10
        await engine.resume()
        return await completion

    completion = asyncio.run(run())
    assert completion.policy_versions == [5] * 10 + [6] * 20
    expected = reference(after, [2, 3, *completion.token_ids])
    off = [abs(float(expected[1 + i, token]) - completion.logprobs[i]) for i, token in enumerate(completion.token_ids)]
    assert (max(off[10:]) < 1e-5) is recompute  # what was cached of the old weights shows, where it is kept
    assert min(off[:10]) > 1e-5


def test_ctrl_c_that_strikes_while_it_samples_is_told_once(engine, monkeypatch, caplog):
    def interrupted(**inputs):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_model", interrupted)
    interrupted.device = "cpu"
    with pytest.raises(KeyboardInterrupt), asyncio.Runner() as runner:
        runner.run(engine.generate([2], SamplingParams(1.0, 4, ())))
    del runner, engine._worker
    gc.collect()
    assert caplog.messages == []
