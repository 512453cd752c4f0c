"""LoRA in the learner: what is trained, what the reference is, and what leaves the learner."""

from __future__ import annotations

import asyncio
import gc
import os

import pytest
import torch
from learner_synthetic import VOCAB, random_trajectories, run_config, save_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from toolrl_ray.errors import UserError
from toolrl_ray.in_process import InProcessWeights
from toolrl_ray.learner.batch import make_batch
from toolrl_ray.learner.targets import score
from toolrl_ray.learner.update import Learner
from toolrl_ray.rollout.transformers_engine import TransformersEngine
from toolrl_ray.weights.trainer import pack

IDS = torch.tensor([[5, 4, 3, 2, 1, 17, 60]])
KINDS = ("tied", "untied", "gpt2")


def lora_learner(folder: str, lora=None, **sections) -> Learner:
    config = run_config(policy={"lora": {"rank": 4} | (lora or {})}, **{"learner": {"lr": 1e-2}} | sections)
    return Learner(config, folder, in_process=True)


def trained(folder: str, lora=None, num_updates: int = 3, **sections) -> Learner:
    x = lora_learner(folder, lora, **sections)
    for seed in range(num_updates):
        x.update(random_trajectories(9, seed, group_size=3))
    return x


@torch.no_grad()
def logits(lm) -> torch.Tensor:
    return lm(IDS).logits


def base_logits(folder: str) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    return save_model(tmp_path / request.param, request.param)


@pytest.fixture
def tied(tmp_path):
    return save_model(tmp_path / "tied")


def test_adapters_and_value_head_alone_get_gradients_and_change(folder):
    x = lora_learner(folder)
    before = {name: p.clone() for name, p in x.engine.module.named_parameters()}
    is_trained = {name for name in before if ".lora_" in name or name.startswith("value_head.")}
    with_gradient = set()

    def step(_step=x.engine.optimizer.step):
        with_gradient.update(name for name, p in x.engine.module.named_parameters() if p.grad is not None)
        _step()

    x.engine.optimizer.step = step
    for seed in range(2):
        x.update(random_trajectories(9, seed))
    changed = {name for name, p in x.engine.module.named_parameters() if not torch.equal(p, before[name])}
    assert with_gradient == changed == is_trained
    assert {name for name, p in x.engine.module.named_parameters() if p.requires_grad} == is_trained


def test_all_linear_adapts_every_linear_layer_but_the_output_embedding(tied):
    adapted = {name.partition(".lora_")[0] for name in lora_learner(tied).engine.adapter_weights()}
    linear = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    assert adapted == {f"model.layers.{i}.{name}" for i in range(2) for name in linear}


@pytest.mark.parametrize("target_modules", [["q_proj", "layers.1.mlp.up_proj"], "q_proj"])
def test_targets_are_ends_of_module_names(tied, target_modules):
    adapted = {name.partition(".lora_")[0] for name in lora_learner(tied, {"target_modules": target_modules}).engine.adapter_weights()}
    both = {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}
    assert adapted == both | ({"model.layers.1.mlp.up_proj"} if isinstance(target_modules, list) else set())


def test_the_first_policy_is_the_base_and_the_seed_decides_the_first_adapter(tied):
    x, same = lora_learner(tied), lora_learner(tied)
    assert torch.equal(logits(x.engine.module.lm), base_logits(tied))
    a, b = x.engine.adapter_weights(), same.engine.adapter_weights()
    other = lora_learner(tied, seed=1).engine.adapter_weights()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(not torch.equal(a[name], other[name]) for name in a if "lora_A" in name)


def test_ref_logprobs_are_those_of_the_base_before_and_after_updates(folder):
    batch = make_batch(random_trajectories(6, seed=9))
    rows = [[0, 1, 2], [3, 4]]
    plain = Learner(run_config(), folder, in_process=True)
    want, _ = score(plain.engine, plain.engine, batch, rows)
    x = lora_learner(folder)
    for num_updates in range(3):
        got, _ = score(x.reference, x.engine, batch, rows)
        assert far(got, want) < 1e-6
        policy, _ = score(x.engine, x.engine, batch, rows)
        assert far(policy, want) < 1e-6 if num_updates == 0 else far(policy, want) > 1e-3  # its adapters are on again
        x.update(random_trajectories(9, num_updates))
    assert x.update(random_trajectories(9))["objective/kl"] != 0


def test_the_base_is_in_memory_once(tied):
    def models() -> int:
        gc.collect()
        return sum(type(x) is LlamaForCausalLM for x in gc.get_objects())

    def embeddings() -> int:  # of any module, named or not
        return sum(issubclass(type(x), torch.Tensor) and x.shape == (VOCAB, 48) for x in gc.get_objects())

    num_models, num_embeddings = models(), embeddings()
    x = trained(tied, num_updates=1)
    assert x.reference is not None
    assert (models() - num_models, embeddings() - num_embeddings) == (1, 1)
    y = Learner(run_config(), tied, in_process=True)
    assert y.reference is not None
    assert models() - num_models == 3


@pytest.mark.parametrize(("kind", "lora"), [*((kind, {}) for kind in KINDS), ("untied", {"target_modules": ["embed_tokens", "lm_head"]})])
def test_merged_weights_have_the_logits_of_the_adapted_model_and_the_names_of_the_base(tmp_path, kind, lora):
    folder = save_model(tmp_path / kind, kind)
    x = trained(folder, lora)
    before = {name: tensor.clone() for name, tensor in x.engine.module.state_dict().items()}
    merged = {name: tensor.clone() for name, tensor in x.named_weights()}
    assert [(name, tuple(t.shape), "float32") for name, t in merged.items()] == x.weights_metadata()
    assert x.weights_metadata() == Learner(run_config(), folder, in_process=True).weights_metadata()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not model.load_state_dict(merged, strict=False).unexpected_keys
    assert far(logits(model), logits(x.engine.module.lm)) < 1e-5
    assert far(logits(model), base_logits(folder)) > 1e-2
    assert all(torch.equal(tensor, before[name]) for name, tensor in x.engine.module.state_dict().items())


def test_a_saved_policy_is_the_merged_model_and_its_adapter_gives_the_same_on_the_base(folder, tmp_path):
    from peft import PeftModel

    x = trained(folder)
    out = tmp_path / "out"
    x.save_policy(str(out), folder)
    want = logits(x.engine.module.lm)
    assert far(logits(AutoModelForCausalLM.from_pretrained(out)), want) < 1e-5
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), out / "adapter")
    assert far(logits(adapted), want) < 1e-5
    assert adapted.peft_config["default"].base_model_name_or_path == folder
    assert {path.name for path in (out / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_whom_the_umask_lets_read_a_saved_policy_can_read_all_of_it(folder, tmp_path):
    x, before = trained(folder), os.umask(0o027)
    try:
        x.save_policy(str(tmp_path / "out"), folder)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {path.name: 0o640 for path in files}


def test_without_lora_no_adapter_is_saved(tied, tmp_path):
    Learner(run_config(), tied, in_process=True).save_policy(str(tmp_path / "out"), tied)
    assert not (tmp_path / "out" / "adapter").exists()


class Rollout:
    """Holds a real engine, as InProcessRollout does."""

    def __init__(self, folder: str):
        model = AutoModelForCausalLM.from_pretrained(folder)
        self.engine = TransformersEngine(model, str, [], max_batch=4, seed=0, policy_version=0)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_after_each_weight_sync_in_process_the_engine_scores_as_the_learner_does(tmp_path, kind):
    folder = save_model(tmp_path / kind, kind)
    x, rollout = lora_learner(folder), Rollout(folder)
    ids = IDS[0].tolist()
    seen = [asyncio.run(rollout.engine.score(ids))]
    for version in (1, 2, 3):
        x.update(random_trajectories(9, version))
        InProcessWeights(rollout, x).sync(x.policy_version)
        seen.append(asyncio.run(rollout.engine.score(ids)))
        assert seen[-1] == pytest.approx(x.logprobs(ids), abs=1e-5)
        assert max(abs(a - b) for a, b in zip(seen[-1], seen[-2], strict=True)) > 1e-4


def test_a_weight_sync_as_between_actors_sends_the_base_names_and_merged_weights(tied):
    x, rollout = trained(tied), Rollout(tied)

    async def hand_out(update_info):
        await rollout.engine.init_weight_transfer({})
        await rollout.engine.start_weight_update()
        await rollout.engine.update_weights(update_info)
        await rollout.engine.finish_weight_update(x.policy_version)

    assert pack(x, 1) is None
    asyncio.run(hand_out(pack(x, 0)))
    ids = IDS[0].tolist()
    assert asyncio.run(rollout.engine.score(ids)) == pytest.approx(x.logprobs(ids), abs=1e-5)


def test_gradient_checkpointing_and_bfloat16_train_the_adapters_too(tied):
    plain = trained(tied, num_updates=1).engine.adapter_weights()
    checkpointed = trained(tied, num_updates=1, learner={"lr": 1e-2, "gradient_checkpointing": True}).engine.adapter_weights()
    assert max(far(plain[name], checkpointed[name]) for name in plain) < 1e-4
    half = Learner(run_config(policy={"lora": {"rank": 4}, "dtype": "bfloat16"}, learner={"zero_stage": 2}), tied, in_process=True)
    first = half.engine.adapter_weights()
    half.update(random_trajectories(9))
    assert all(not torch.equal(tensor, first[name]) for name, tensor in half.engine.adapter_weights().items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("target_modules", "reason"),
    [
        (["q_proj", "c_attn"], "the policy has no module 'c_attn'"),
        ("all_linear", "the policy has no module 'all_linear'; give all-linear"),
        (["input_layernorm"], "not supported"),
        (["lm_head"], "lm_head has its weight in common"),
        (["embed_tokens"], "model.embed_tokens has its weight in common"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_refused_in_one_line_that_names_it(tied, target_modules, reason):
    with pytest.raises(UserError) as caught:
        lora_learner(tied, {"target_modules": target_modules})
    message = str(caught.value)
    assert message.startswith(f"policy.lora.target_modules={target_modules!r}: ") and reason in message
    assert "\n" not in message and len(message) < 400


def test_experts_in_one_block_cannot_be_adapted_and_other_modules_of_the_model_can(tmp_path):
    Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(UserError, match=r"model.layers.0.mlp.experts \(Qwen3MoeExperts\) .* q_proj, v_proj") as caught:
        lora_learner(str(tmp_path))
    message = str(caught.value)
    assert message.startswith("policy.lora.target_modules='all-linear': ") and "\n" not in message
    adapted = lora_learner(str(tmp_path), {"target_modules": ["q_proj", "v_proj"]}).engine.adapter_weights()
    assert {name.partition(".lora_")[0].rpartition(".")[2] for name in adapted} == {"q_proj", "v_proj"}
