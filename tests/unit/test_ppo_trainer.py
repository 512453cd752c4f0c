"""PPOTrainer against the learner that it wraps, and against what TRL's trainer got wrong."""

from __future__ import annotations

import copy
import itertools
import math
import re

import numpy as np
import peft
import pytest
import torch
from learner_synthetic import count_checkpoints, random_trajectories, run_config
from torch import nn

from tests.unit.text_parts import PROMPT, tiny_lm, tokenizer
from toolrl_ray.errors import ConfigError, LearnerError
from toolrl_ray.learner.update import Learner
from toolrl_ray.text_environment import PPOConfig, PPOTrainer, TextEnvironment

TRL_STATISTICS = """
objective/kl objective/kl_dist objective/logprobs objective/ref_logprobs objective/kl_coef objective/entropy
ppo/mean_non_score_reward ppo/mean_scores ppo/std_scores ppo/loss/policy ppo/loss/value ppo/loss/total ppo/policy/entropy
ppo/policy/approxkl ppo/policy/clipfrac ppo/policy/advantages ppo/policy/advantages_mean ppo/returns/mean ppo/returns/var
ppo/val/error ppo/val/clipfrac ppo/val/mean ppo/val/var ppo/val/var_explained ppo/learning_rate tokens/queries_len_mean
tokens/queries_len_std tokens/queries_dist tokens/responses_len_mean tokens/responses_len_std tokens/responses_dist time/ppo/total
env/reward_mean env/reward_std env/reward_dist
""".split()

ROWS = random_trajectories(8)


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)


def tensors(trajectories):
    """(queries, responses, scores, masks): the query is what comes before the first trained token."""
    splits = [t.loss_mask.index(True) if any(t.loss_mask) else 2 for t in trajectories]
    pairs = list(zip(trajectories, splits, strict=True))
    return (
        [ids(*t.token_ids[:split]) for t, split in pairs],
        [ids(*t.token_ids[split:]) for t, split in pairs],
        [torch.tensor(t.reward) for t in trajectories],
        [ids(*map(int, t.loss_mask[split:])) for t, split in pairs],
    )


def trainer(lm=None, ref_model=None, **settings) -> PPOTrainer:
    settings = {"batch_size": 8, "mini_batch_size": 4, "learning_rate": 1e-3, "ppo_epochs": 2} | settings
    return PPOTrainer(PPOConfig(**settings), lm or tiny_lm(tokenizer()), ref_model)


def with_adapters(lm: nn.Module, **options) -> nn.Module:
    return peft.get_peft_model(lm, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options))


def weights(lm: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in lm.state_dict().items()}


def distance(a, b) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_model_whose_weights_are_not_float32_is_refused_in_one_line(dtype):
    with pytest.raises(ConfigError, match=rf"^the model's weights are {dtype}, .* give model\.float\(\)$"):
        trainer(tiny_lm(tokenizer()).to(getattr(torch, dtype)))


@pytest.mark.parametrize("kind", [peft.PrefixTuningConfig, peft.PromptTuningConfig, peft.PromptEncoderConfig])
def test_virtual_tokens_are_refused_in_one_line(kind):
    model = peft.get_peft_model(tiny_lm(made := tokenizer()), kind(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ConfigError, match=r"^model has virtual tokens \(peft's P\w+\), .*; give adapters such as LoRA's$"):
        trainer(model)
    with pytest.raises(ConfigError, match="^model has virtual tokens"):
        TextEnvironment(model, made, [], lambda responses: [0.0] * len(responses), PROMPT)


def test_a_step_checkpoints_activations_where_the_model_was_told_to():
    lm = tiny_lm(tokenizer())
    lm.gradient_checkpointing_enable()
    checkpointed = count_checkpoints(lm)
    trainer(lm).step(*tensors(ROWS))
    assert checkpointed


def test_a_step_trains_the_model_in_place_and_returns_the_familiar_statistics():
    x = trainer()
    before = weights(x.model)
    statistics = x.step(*tensors(ROWS))
    assert distance(before, weights(x.model)) > 1e-4
    assert not set(TRL_STATISTICS) - set(statistics)
    assert all(np.isfinite(value).all() for value in statistics.values())
    assert statistics["objective/kl"] == pytest.approx(0, abs=1e-5) and statistics["objective/kl_coef"] == 0.2
    later = x.step(*tensors(ROWS))
    assert later["objective/kl"] != 0 and later["objective/kl"] == pytest.approx(later["objective/kl_dist"].mean(), abs=1e-5)


def test_statistics_are_those_of_their_definitions():
    x = trainer(init_kl_coef=0.3, vf_coef=0.5)
    x.step(*tensors(ROWS))
    lm, kl_coef = copy.deepcopy(x.model), x._learner.kl_controller.value
    queries, responses, scores, masks = tensors(random_trajectories(8, seed=1))
    statistics = x.step(queries, responses, scores, masks)
    entropies, kls = [], []
    for query, response, mask in zip(queries, responses, masks, strict=True):
        whole, trained = torch.cat([query, response]), mask.bool()
        logprobs, ref = (
            m(whole[None]).logits[0, :-1].log_softmax(-1).gather(1, whole[1:, None])[len(query) - 1 :, 0].detach()[trained]
            for m in (lm, tiny_lm(tokenizer()))
        )
        entropies.append(-float(logprobs.sum()))
        kls.append((logprobs - ref).numpy())
    assert statistics["objective/entropy"] == pytest.approx(np.mean(entropies), rel=1e-4)
    assert statistics["objective/kl_dist"] == pytest.approx([kl.sum() for kl in kls], abs=1e-3)
    assert statistics["objective/kl_coef"] == kl_coef
    assert statistics["ppo/mean_non_score_reward"] == pytest.approx(-kl_coef * np.concatenate(kls).mean(), abs=1e-4)
    rewards = np.array([float(score) for score in scores])
    for name in ("env/reward", "ppo/{}_scores"):
        mean, std = (name.format("mean"), name.format("std")) if "{" in name else (f"{name}_mean", f"{name}_std")
        assert statistics[mean] == pytest.approx(rewards.mean()) and statistics[std] == pytest.approx(rewards.std(ddof=1))
    total = statistics["ppo/loss/policy"] + 0.5 * statistics["ppo/loss/value"]
    assert statistics["ppo/loss/total"] == pytest.approx(total)
    assert statistics["ppo/val/var_explained"] == pytest.approx(1 - statistics["ppo/val/error"] / statistics["ppo/returns/var"])
    assert statistics["tokens/responses_dist"].tolist() == [len(response) for response in responses]
    assert statistics["tokens/queries_len_mean"] == pytest.approx(np.mean([len(query) for query in queries]))


@pytest.mark.parametrize("kl_penalty", ["kl", "mse"])
def test_the_kl_of_a_row_is_the_sum_of_its_logprob_differences_and_the_penalty_that_of_kl_penalty(kl_penalty: str):
    lm = tiny_lm(tokenizer())
    other = copy.deepcopy(lm)
    nn.init.normal_(other.lm_head.weight, std=0.1)
    statistics = trainer(lm, other, kl_penalty=kl_penalty).step(*tensors(ROWS))
    difference = statistics["objective/logprobs"] - statistics["objective/ref_logprobs"]  # both are 0 where masked
    assert statistics["objective/kl_dist"] == pytest.approx(difference.sum(1), abs=1e-4)
    assert statistics["objective/kl"] == pytest.approx(statistics["objective/kl_dist"].mean(), abs=1e-4)
    penalty = (difference if kl_penalty == "kl" else difference**2 / 2).sum() / statistics["tokens/trained"]
    assert statistics["ppo/mean_non_score_reward"] == pytest.approx(-0.2 * penalty, abs=1e-5)


def test_a_step_is_the_learners_update_with_truncated_importance_weights_of_1(tmp_path):
    lm = tiny_lm(tokenizer())
    lm.save_pretrained(tmp_path)
    settings = {"num_epochs": 2, "num_minibatches": 2, "kl_coef": 0.2, "target_kl": None, "gae_lambda": 0.9, "vf_coef": 0.1}
    learner = Learner(run_config(algo=settings, learner={"adam_betas": (0.9, 0.999), "max_grad_norm": 0.5}), str(tmp_path), in_process=True)
    rows = random_trajectories(8)
    for row in rows:  # sampled from the policy itself
        row.rollout_logprobs = [lp if m else 0.0 for lp, m in zip([0.0, *learner.logprobs(row.token_ids)], row.loss_mask, strict=True)]
    learner.update(rows)
    x = trainer(lm, lam=0.9, max_grad_norm=0.5)
    x.step(*tensors(rows))
    assert distance(weights(lm), weights(learner.engine.module.lm)) < 1e-5


def test_gae_does_not_run_through_tool_tokens():
    def advantages(num_tool_tokens):
        responses = [ids(5, 6, *[9] * num_tool_tokens, 7, 8), ids(5, 6, 7)]
        masks = [ids(1, 1, *[0] * num_tool_tokens, 1, 1), ids(1, 1, 1)]
        x = trainer(batch_size=2, mini_batch_size=2, gamma=0.9, lam=0.8)
        return x.step([ids(1, 2), ids(3)], responses, [torch.tensor(1.0), torch.tensor(0.0)], masks)

    short, long = advantages(1), advantages(20)
    assert short["ppo/policy/advantages"].std() > 0.1
    assert short["ppo/policy/advantages"] == pytest.approx(long["ppo/policy/advantages"], abs=1e-6)
    # Undiscounted by the tool's tokens: the first return is 0.72^3, and no value is predicted yet.
    assert long["ppo/returns/mean"] == pytest.approx(sum(0.72**k for k in range(4)) / 7, abs=1e-5)


def test_gradient_clipping_holds_on_every_update():
    x = trainer(max_grad_norm=1e-3, ppo_epochs=3)
    optimizer, applied = x._learner.engine.optimizer, []

    def step(_step=optimizer.step):
        applied.append(float(nn.utils.get_total_norm([p.grad for p in x.model.parameters()])))
        _step()

    optimizer.step = step
    for _ in range(2):
        assert x.step(*tensors(ROWS))["ppo/grad_norm"] > 1e-2
    assert len(applied) == 12 and max(applied) <= 1.001e-3


def test_without_max_grad_norm_nothing_is_clipped():
    assert PPOConfig().run_config("cpu").learner.max_grad_norm == math.inf
    assert trainer(max_grad_norm=None).step(*tensors(ROWS))["ppo/num_updates"] == 4


def test_an_all_zero_mask_row_and_an_empty_response_are_legal():
    queries, responses, scores, masks = tensors(ROWS)
    masks[0] = torch.zeros_like(masks[0])
    responses[1], masks[1] = ids(), ids()
    statistics = trainer().step(queries, responses, scores, masks)
    assert all(np.isfinite(value).all() for value in statistics.values())
    assert statistics["tokens/trained"] == sum(int(mask.sum()) for mask in masks)
    assert statistics["env/reward_mean"] == pytest.approx(np.mean([float(score) for score in scores]))


def test_a_batch_without_any_trained_token_changes_nothing_and_has_the_same_statistics():
    x = trainer()
    before = weights(x.model)
    queries, responses, scores, masks = tensors(ROWS)
    statistics = x.step(queries, responses, scores, [torch.zeros_like(mask) for mask in masks])
    assert distance(before, weights(x.model)) == 0
    trained = x.step(queries, responses, scores, masks)
    assert set(statistics) == set(trained)
    assert all(np.isfinite(value).all() for value in statistics.values())
    assert {name: value.shape for name, value in statistics.items() if isinstance(value, np.ndarray)} == {
        **{name: (8,) for name, value in trained.items() if isinstance(value, np.ndarray)},
        **{"objective/logprobs": (8, 1), "objective/ref_logprobs": (8, 1), "ppo/policy/advantages": (0,)},
    }


def test_without_masks_the_whole_response_is_trained():
    queries, responses, scores, _ = tensors(ROWS)
    assert trainer().step(queries, responses, [float(s) for s in scores])["tokens/trained"] == sum(len(r) for r in responses)


def test_dropout_is_off_in_a_step_and_the_modes_are_afterwards_as_they_were():
    lm = tiny_lm(tokenizer(), attention_dropout=0.5)
    lm.train()
    seen = []
    lm.model.layers[0].self_attn.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    statistics = trainer(lm, ppo_epochs=1, mini_batch_size=8).step(*tensors(ROWS))
    assert statistics["ppo/policy/approxkl"] == pytest.approx(0, abs=1e-9)  # the one update starts from the old policy
    assert seen and not any(seen) and lm.training


def test_the_reference_is_the_model_as_it_was_unless_another_is_given():
    lm = tiny_lm(tokenizer())
    other = copy.deepcopy(lm)
    nn.init.normal_(other.lm_head.weight)
    assert trainer(lm).step(*tensors(ROWS))["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(trainer(lm, other).step(*tensors(ROWS))["objective/kl"]) > 0.1
    with pytest.raises(ConfigError, match="ref_model is the model itself"):
        trainer(lm, lm)


def test_a_reference_with_weights_that_the_model_trains_is_refused():
    base = tiny_lm(tokenizer())
    for lm, other in ((with_adapters(base), base), (tiny_lm(tokenizer()), tiny_lm(tokenizer()))):
        if other is not base:
            other.model.embed_tokens = lm.model.embed_tokens
        with pytest.raises(ConfigError, match="^ref_model is the model itself or has weights of it, which change; give a copy"):
            trainer(lm, other)
        assert any(p.requires_grad for p in lm.parameters())
    lm.model.embed_tokens.requires_grad_(False)
    assert trainer(lm, other).step(*tensors(ROWS))["ppo/num_updates"] == 4


def test_a_reference_that_was_given_comes_back_as_it_was_and_is_run_without_dropout():
    lm, other = tiny_lm(tokenizer()), tiny_lm(tokenizer(), attention_dropout=0.5)
    other.train()
    other.model.embed_tokens.requires_grad_(False)
    before = [(p.clone(), p.requires_grad) for p in other.parameters()]
    seen = []
    other.model.layers[0].self_attn.register_forward_pre_hook(lambda module, args: seen.append(module.training or torch.is_grad_enabled()))
    statistics = trainer(lm, other).step(*tensors(ROWS))
    assert statistics["objective/kl"] == pytest.approx(0, abs=1e-5) and seen and not any(seen)
    assert all(module.training for module in other.modules())
    for p, (value, requires_grad) in zip(other.parameters(), before, strict=True):
        assert torch.equal(p, value) and p.requires_grad == requires_grad and p.grad is None


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_the_reference_of_a_model_with_adapters_is_the_model_with_its_adapters_off(options):
    base = tiny_lm(tokenizer(), attention_bias=True)
    whole = copy.deepcopy(base)
    lm = with_adapters(base, **options)
    for name, p in lm.named_parameters():
        if p.requires_grad and "lora_A" not in name and "bias" not in name:
            nn.init.normal_(p, std=0.1)
    trained = {name for name, p in lm.named_parameters() if p.requires_grad}
    x = trainer(lm)
    steps = [x.step(*tensors(ROWS)) for _ in range(2)]
    wanted = trainer(whole).step(*tensors(ROWS))["objective/logprobs"]
    for statistics in steps:
        assert statistics["objective/ref_logprobs"] == pytest.approx(wanted, abs=1e-5)
        assert np.abs(statistics["objective/logprobs"] - wanted).max() > 0.01
    assert {name for name, p in lm.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("broke_off", [True, False])
def test_gradients_of_a_step_that_broke_off_or_of_ones_own_are_not_in_the_next(broke_off: bool):
    x, y = trainer(max_microbatch_tokens=20), trainer(max_microbatch_tokens=20)
    if broke_off:
        forwards = itertools.count(1)

        def interrupted(module, args):
            if torch.is_grad_enabled() and next(forwards) == 2:
                raise KeyboardInterrupt

        hook = x.model.model.register_forward_pre_hook(interrupted)
        with pytest.raises(KeyboardInterrupt):
            x.step(*tensors(random_trajectories(8, seed=1)))
        hook.remove()
    else:
        x.model(input_ids=ids(1, 2, 3)[None], labels=ids(1, 2, 3)[None]).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in x.model.parameters())
    assert x.step(*tensors(ROWS))["ppo/grad_norm"] == y.step(*tensors(ROWS))["ppo/grad_norm"]
    assert distance(weights(x.model), weights(y.model)) == 0


@pytest.mark.parametrize(
    "name, instead",
    [("dataset", "give step one batch's rows"), ("optimizer", "it is AdamW"), ("lr_scheduler", "it is AdamW"), ("num_shared_layers", "")],
)
def test_what_trls_trainer_took_and_this_one_does_not_is_refused_in_one_line_with_the_remedy(name, instead):
    with pytest.raises(ConfigError, match=f"^PPOTrainer has no {name}; {instead}") as refused:
        PPOTrainer(PPOConfig(), tiny_lm(tokenizer()), **{name: 1})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name, instead", [("log_stats", "log what step returns"), ("generate", "Text"), ("kl_ctl", "it has step")])
def test_what_trls_trainer_had_and_this_one_has_not_is_named_with_the_remedy(name, instead):
    x = trainer()
    with pytest.raises(AttributeError, match=f"^PPOTrainer has no {name}; {instead}"):
        getattr(x, name)
    assert not hasattr(x, name)


def test_a_wrapped_model_is_trained_and_saved(tmp_path):
    wrapper = nn.Module()
    wrapper.pretrained_model = tiny_lm(tokenizer())
    before = weights(wrapper.pretrained_model)
    x = PPOTrainer(PPOConfig(batch_size=8, mini_batch_size=8, learning_rate=1e-3), wrapper, tokenizer=tokenizer())
    x.step(*tensors(ROWS))
    assert distance(before, weights(wrapper.pretrained_model)) > 1e-4
    x.save_pretrained(tmp_path / "out")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


@pytest.mark.parametrize("early_stopping, num_updates", [(False, 8), (True, 1)])
def test_early_stopping_ends_the_updates_of_a_batch(early_stopping, num_updates):
    x = trainer(early_stopping=early_stopping, target_kl=1e-12, ppo_epochs=4)
    assert x.step(*tensors(ROWS))["ppo/num_updates"] == num_updates


def test_the_temperature_is_that_of_the_sampler():
    x = trainer(temperature=0.5)
    statistics = x.step(*tensors(ROWS))
    assert statistics["objective/entropy"] != pytest.approx(trainer().step(*tensors(ROWS))["objective/entropy"], rel=0.01)


def test_the_configuration_keeps_trls_names_and_defaults():
    config = PPOConfig(batch_size=64, mini_batch_size=8, gradient_accumulation_steps=2, cliprange=0.1, kl_penalty="mse", adap_kl_ctrl=False)
    run = config.run_config("cpu")
    algo = run.algo
    assert (algo.num_minibatches, algo.num_epochs, algo.kl_estimator, algo.kl_controller) == (4, 4, "k2", "fixed")
    assert (algo.clip_eps_low, algo.clip_eps_high, algo.clip_value, algo.gamma, algo.gae_lambda) == (0.1, 0.1, 0.2, 1.0, 0.95)
    assert (algo.kl_coef, algo.kl_target, algo.kl_horizon, algo.vf_coef, algo.target_kl) == (0.2, 6.0, 10000.0, 0.1, None)
    assert run.learner.lr == 1.41e-5 and run.seed == 0


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"log_with": "wandb"}, "PPOConfig has no 'log_with'; it has learning_rate"),
        ({"lam": 2.0}, "lam=2.0"),
        ({"cliprange": -1.0}, "cliprange=-1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"kl_penalty": "full"}, "kl_penalty='full'; allowed: kl, mse"),
        ({"batch_size": "8"}, "PPOConfig: batch_size='8': give a whole number"),
        ({"target_kl": None, "early_stopping": True}, "PPOConfig: target_kl=None: give a number"),
        ({"adap_kl_ctrl": "no"}, "PPOConfig: adap_kl_ctrl='no': give True or False"),
        ({"batch_size": 10, "mini_batch_size": 4}, "batch_size=10 is no multiple of mini_batch_size=4"),
    ],
)
def test_settings_that_are_not_there_or_make_no_sense_are_refused_in_one_line(settings, said):
    with pytest.raises(ConfigError) as refused:
        PPOConfig(**settings)
    assert str(refused.value).count("\n") == 0 and said in str(refused.value)


def test_rows_that_do_not_fit_together_are_refused_in_one_line():
    queries, responses, scores, masks = tensors(ROWS)
    x = trainer()
    with pytest.raises(ConfigError, match="batch_size=8, but got 7 queries, 8 responses"):
        x.step(queries[:7], responses, scores, masks)
    with pytest.raises(ConfigError, match="row 0: the mask has 1 entries"):
        x.step(queries, responses, scores, [ids(1), *masks[1:]])
    rows = {"query": queries, "response": responses, "mask": masks}
    for name, own in rows.items():
        for wrong, shape in ((own[1][None], [1, len(own[1])]), (torch.tensor(3), [])):
            others = rows | {name: [own[0], wrong, *own[2:]]}
            with pytest.raises(ConfigError, match=f"^row 1: the {name} has shape {re.escape(str(shape))}; give one dimension"):
                x.step(others["query"], others["response"], scores, others["mask"])
    for name, own in rows.items():
        others = rows | {name: [own[0], own[1].tolist(), *own[2:]]}
        with pytest.raises(ConfigError, match=f"^row 1: the {name} is a list; give a tensor$"):
            x.step(others["query"], others["response"], scores, others["mask"])
    for wrong in (None, ids(1, 2), "1.0.0"):
        with pytest.raises(ConfigError, match=f"^row 1: the score is {re.escape(repr(wrong))}; give one number$"):
            x.step(queries, responses, [scores[0], wrong, *scores[2:]], masks)
    with pytest.raises(LearnerError, match="reward=nan"):
        x.step(queries, responses, [math.nan] * 8, masks)


def test_environment_and_trainer_together_learn_a_bandit():
    """One character after one prompt; an upper-case letter pays 1."""
    made = tokenizer()
    lm = tiny_lm(made)
    sample = {"do_sample": True, "max_new_tokens": 1}
    env = TextEnvironment(lm, made, [], lambda texts: [float(t.isupper()) for t in texts], PROMPT, generation_kwargs=sample)
    x = PPOTrainer(PPOConfig(batch_size=64, mini_batch_size=32, learning_rate=3e-3, init_kl_coef=0.0), lm)
    means = []
    for _ in range(25):
        queries, responses, masks, rewards, _ = env.run(["a"] * 64)
        means.append(x.step(queries, responses, rewards, masks)["env/reward_mean"])
    assert means[0] < 0.3 and sum(means[-3:]) / 3 > 0.9
