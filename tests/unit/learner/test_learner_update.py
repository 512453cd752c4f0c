from __future__ import annotations

import math
import resource

import pytest
import torch
from learner_synthetic import VOCAB, NoiseWatch, random_trajectories, run_config, save_model, trajectory
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from toolrl_ray.algos import losses
from toolrl_ray.errors import LearnerError
from toolrl_ray.learner.batch import make_batch
from toolrl_ray.learner.targets import make_targets, score
from toolrl_ray.learner.update import Learner

ADVANTAGES = {
    "gae": {},
    "grpo": {"algo": {"kl_in": "loss", "kl_estimator": "k3"}, "train": {"group_size": 3}},
    "rloo": {"algo": {"kl_in": "loss", "kl_estimator": "k2"}, "train": {"group_size": 3}},
    "reinforce_pp": {},
}


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model")


def learner(folder, algo=None, **sections) -> Learner:
    return Learner(run_config(algo=algo or {}, **sections), folder, in_process=True)


def weights(x: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in x.engine.module.state_dict().items()}


def distance(a, b) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_every_choice_of_advantage_updates_the_policy_and_reports_finite_metrics(folder, advantage):
    sections = ADVANTAGES[advantage]
    x = learner(folder, {"advantage": advantage, **sections.get("algo", {})}, **{k: v for k, v in sections.items() if k != "algo"})
    before = weights(x)
    metrics = x.update(random_trajectories(12, group_size=3))
    assert distance(before, weights(x)) > 1e-5
    assert all(math.isfinite(value) for value in metrics.values())
    assert x.policy_version == 1 and metrics["ppo/num_updates"] + metrics["ppo/num_skipped_updates"] == 4
    assert metrics["objective/kl"] == pytest.approx(0, abs=1e-5)  # the policy is still the reference
    assert ("ppo/explained_variance" in metrics) == (advantage == "gae")


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_targets_do_not_depend_on_how_long_an_observation_is(advantage):
    def rows(extra: int):
        return [
            trajectory([([1, 2], False), ([3, 4, 5], True), ([6] * (1 + extra * i), False), ([7, 8], True)], float(i % 2), str(i))
            for i in range(6)
        ]

    generator = torch.Generator().manual_seed(0)
    algo = run_config(
        algo={"advantage": advantage, "gamma": 0.9, **ADVANTAGES[advantage].get("algo", {})}, train={"group_size": 6}
    ).algo
    old, ref, values = (torch.randn(6, 5, generator=generator) for _ in range(3))
    short, long = (make_targets(make_batch(rows(extra)), algo, 0.1, old, values, ref) for extra in (0, 9))
    assert short.advantages.abs().max() > 0.1
    assert torch.equal(short.advantages, long.advantages) and torch.equal(short.weights, long.weights)
    assert short.returns is None or torch.equal(short.returns, long.returns)


def test_old_logprobs_and_values_do_not_depend_on_how_rows_are_grouped_and_padded(folder):
    x = learner(folder)
    torch.nn.init.normal_(x.engine.module.value_head.weight, std=0.1)
    batch = make_batch(random_trajectories(9))
    one_by_one = score(x.engine, x.engine, batch, [[row] for row in range(9)])
    for groups in ([list(range(9))], [[8, 0, 3], [5, 1], [2, 7, 4, 6], []]):
        for got, want in zip(score(x.engine, x.engine, batch, groups), one_by_one, strict=True):
            assert (got - want).abs().max() < 2e-6
    assert not one_by_one[0][~batch.mask].any()


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("num_rows", [1, 13])
def test_the_microbatch_budget_does_not_change_the_result(folder, advantage, num_rows):
    sections = ADVANTAGES[advantage]
    results = []
    for budget in (1, 60, 100000):
        x = learner(
            folder,
            {"advantage": advantage, "ent_coef": 0.01, "target_kl": 0.5, **sections.get("algo", {})},
            learner={"max_microbatch_tokens": budget},
            train=sections.get("train", {}),
        )
        watch = NoiseWatch(x)
        metrics = [x.update(random_trajectories(num_rows, seed, group_size=3)) for seed in range(3)]
        results.append((weights(x), metrics))
    for got, metrics in results[1:]:
        if num_rows == 1:
            assert distance(got, results[0][0]) < 1e-5
        else:
            assert watch.distance(got, results[0][0]) < 1e-5 and watch.share() < 1e-3
        for a, b in zip(metrics, results[0][1], strict=True):
            assert a == pytest.approx(b | {"time/learner_update_s": a["time/learner_update_s"]}, abs=1e-4)


def test_a_row_without_trained_tokens_changes_nothing_but_the_reward_statistics(folder):
    rows = random_trajectories(5)
    assert rows[-1].num_trained_tokens == 0
    single = {"num_minibatches": 1, "num_epochs": 1, "kl_coef": 0}
    with_row, without = learner(folder, single), learner(folder, single)
    metrics = with_row.update(rows)
    without.update(rows[:-1])
    assert distance(weights(with_row), weights(without)) < 1e-6
    assert metrics["env/reward_mean"] == pytest.approx(sum(t.reward for t in rows) / 5)


def test_a_batch_without_any_trained_token_changes_nothing_and_says_so(folder):
    x = learner(folder)
    before, kl_coef = weights(x), x.kl_controller.value
    metrics = x.update([trajectory([([1, 2, 3], False)], 1.0)] * 3)
    assert metrics["tokens/trained"] == metrics["ppo/num_updates"] == 0 and metrics["env/reward_mean"] == 1
    assert not any(math.isnan(value) for value in metrics.values())
    assert distance(before, weights(x)) == 0 and x.policy_version == 0 and x.kl_controller.value == kl_coef


def test_an_empty_batch_is_an_error(folder):
    with pytest.raises(LearnerError, match="empty"):
        learner(folder).update([])


def test_diverged_weights_are_named_before_they_are_trained_on(folder):
    x = learner(folder)
    with torch.no_grad():
        x.engine.module.lm.model.norm.weight.fill_(math.nan)
    with pytest.raises(LearnerError, match="not finite"):
        x.update(random_trajectories(3))


@pytest.mark.parametrize("max_grad_norm", [1.0, math.inf])
@pytest.mark.parametrize("gradient", [math.nan, math.inf])
def test_no_step_is_taken_by_a_gradient_that_is_not_finite(folder, gradient, max_grad_norm):
    x = learner(folder, learner={"max_grad_norm": max_grad_norm})
    hook = x.engine.module.lm.model.norm.weight.register_hook(lambda grad: torch.full_like(grad, gradient))
    before = weights(x)
    with pytest.raises(LearnerError, match=f"the gradient norm is {gradient} at optimiser step 0: training has diverged"):
        x.update(random_trajectories(4))
    assert distance(before, weights(x)) == 0
    hook.remove()
    assert x.update(random_trajectories(4))["ppo/grad_norm"] < math.inf  # nothing of it is left over


@pytest.mark.parametrize("budget", [1, 100000])  # several microbatches look first; a single one looks at its own forward
def test_the_update_stops_before_the_step_that_would_break_target_kl(folder, budget):
    algo = {"num_minibatches": 3, "num_epochs": 2, "kl_coef": 0}
    sections = {"learner": {"max_microbatch_tokens": budget, "lr": 3e-3}}
    free = learner(folder, {**algo, "target_kl": None}, **sections)
    seen = []

    def step(*args, _step=free._step):
        before = weights(free)
        norm, sums = _step(*args)
        seen.append((before, float(sums[3]) / args[3]))
        return norm, sums

    free._step = step
    free.update(random_trajectories(12))
    kls = [kl for _, kl in seen]
    assert kls[0] == pytest.approx(0, abs=1e-9) and len(kls) == 6
    limit = (max(kls[:3]) + kls[3]) / 2 if kls[3] > max(kls[:3]) else max(kls[1:]) * 0.999
    first = next(i for i, kl in enumerate(kls) if kl > limit)
    assert 1 <= first < 6
    stopped = learner(folder, {**algo, "target_kl": limit}, **sections)
    metrics = stopped.update(random_trajectories(12))
    assert metrics["ppo/num_updates"] == first and metrics["ppo/num_skipped_updates"] == 6 - first
    assert metrics["ppo/approx_kl_last"] == pytest.approx(kls[first], rel=1e-3) and metrics["ppo/approx_kl_last"] > limit
    assert distance(weights(stopped), seen[first][0]) < 1e-6  # the weights from before that step
    assert stopped.update(random_trajectories(12, seed=1))["ppo/num_updates"] >= 1  # nothing of the skipped one is left over


def test_every_step_is_clipped_and_reports_the_norm_before_clipping(folder):
    x = learner(folder, {"kl_coef": 0, "target_kl": None}, learner={"max_grad_norm": 1e-3, "max_microbatch_tokens": 50})
    applied = []

    def step(_step=x.engine.optimizer.step):
        applied.append(float(torch.nn.utils.get_total_norm([p.grad for p in x.engine.module.parameters()])))
        _step()

    x.engine.optimizer.step = step
    metrics = x.update(random_trajectories(8))
    assert applied == pytest.approx([1e-3] * 4, rel=1e-3)
    assert metrics["ppo/grad_norm"] > 0.01


def test_the_learning_rate_warms_up_linearly(folder):
    x = learner(folder, {"num_minibatches": 1, "num_epochs": 1}, learner={"lr": 1e-3, "warmup_steps": 4})
    seen = [x.update(random_trajectories(3))["ppo/lr"] for _ in range(6)]
    assert seen == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


def test_the_critic_learns_at_a_rate_of_its_own(folder):
    """AdamW's first step moves a parameter by the learning rate, whatever its gradient's size."""
    x = learner(folder, {"num_minibatches": 1, "num_epochs": 1}, learner={"lr": 1e-3, "critic_lr": 4e-3, "warmup_steps": 2})
    weight = x.engine.module.lm.get_output_embeddings().weight.detach()
    before = weight.clone()
    assert x.update(random_trajectories(3))["ppo/lr"] == pytest.approx(5e-4)
    assert float((weight - before).abs().max()) == pytest.approx(5e-4, rel=1e-2)
    assert float(x.engine.module.value_head.bias.detach().abs()) == pytest.approx(2e-3, rel=1e-2)  # from zero


def test_objective_kl_is_the_mean_over_episodes_of_old_minus_reference_and_drives_the_controller(folder, tmp_path):
    x = learner(folder, {"kl_target": 1e-4, "kl_horizon": 100})
    x.update(random_trajectories(10))
    reference = AutoModelForCausalLM.from_pretrained(folder)
    rows = random_trajectories(10, seed=1)
    expected = 0.0
    for t in rows:
        ref = losses.logprobs_from_logits(reference(torch.tensor([t.token_ids])).logits[0, :-1], torch.tensor(t.token_ids[1:]))
        expected += sum(a - b for a, b, m in zip(x.logprobs(t.token_ids), ref.tolist(), t.loss_mask[1:], strict=True) if m) / len(rows)
    kl_coef = x.kl_controller.value
    metrics = x.update(rows)
    assert abs(expected) > 1e-3
    assert metrics["objective/kl"] == pytest.approx(expected, abs=1e-4) and metrics["objective/kl_coef"] == kl_coef
    assert x.kl_controller.value == pytest.approx(kl_coef * (1 + math.copysign(0.2, expected) * 10 / 100))


def test_the_kl_coefficient_that_is_told_is_that_of_the_update_in_the_loss_too(folder):
    algo = {"kl_in": "loss", "kl_estimator": "k2", "kl_coef": 0.5, "kl_target": 1e-4, "kl_horizon": 10}
    adaptive, fixed = (learner(folder, algo | {"kl_controller": kind}) for kind in ("adaptive", "fixed"))
    for x in (adaptive, fixed):
        x.update(random_trajectories(10))
    assert abs(adaptive.kl_controller.value - 0.5) > 0.01
    adaptive.kl_controller.value = 0.5
    told = [x.update(random_trajectories(10, seed=1))["objective/kl_coef"] for x in (adaptive, fixed)]
    assert told == [0.5, 0.5] and distance(weights(adaptive), weights(fixed)) == 0


def test_without_a_kl_penalty_there_is_no_reference(folder):
    x = learner(folder, {"kl_coef": 0})
    assert x.reference is None and "objective/kl" not in x.update(random_trajectories(3))


def test_temperature_is_that_of_the_sampler(folder):
    x = learner(folder, rollout={"temperature": 0.5})
    ids = [5, 6, 7]
    logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0]
    expected = [(logits[t] / 0.5).log_softmax(-1)[ids[t + 1]].item() for t in range(2)]
    assert x.logprobs(ids) == pytest.approx(expected, abs=1e-5)


def test_bfloat16_computes_in_half_precision_and_keeps_float32_weights_and_values(folder):
    x = learner(folder, policy={"dtype": "bfloat16"}, learner={"zero_stage": 2})
    full = learner(folder)
    got, want = x.logprobs([5, 4, 3, 2, 1]), full.logprobs([5, 4, 3, 2, 1])
    assert got != want and got == pytest.approx(want, abs=0.1)
    assert all(math.isfinite(value) for value in x.update(random_trajectories(6)).values())
    assert {p.dtype for p in x.engine.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("separate_critic", [False, True])
def test_a_bandit_is_learned(tmp_path, separate_critic):
    """One token after one prompt; 20 of the 101 tokens pay 1. A uniform policy gets 0.2."""
    folder = save_model(tmp_path / "m")
    x = learner(folder, {"kl_coef": 0}, policy={"separate_critic": separate_critic}, learner={"lr": 3e-3})
    generator = torch.Generator().manual_seed(0)
    rewards = []
    for step in range(20):
        with torch.no_grad():
            logp = x.engine.module.lm(torch.tensor([[1, 2, 3]])).logits[0, -1].log_softmax(-1)
        tokens = torch.multinomial(logp.exp(), 64, replacement=True, generator=generator).tolist()
        rows = [
            trajectory([([1, 2, 3], False), ([token], True)], float(token % 5 == 0), f"{step}:{i}", logprob=float(logp[token]))
            for i, token in enumerate(tokens)
        ]
        for row in rows:
            row.policy_versions[-1] = step
        metrics = x.update(rows)
        assert metrics["mismatch/mean_abs_logprob_diff"] < 1e-5
        rewards.append(metrics["env/reward_mean"])
    assert rewards[0] < 0.4 and sum(rewards[-3:]) / 3 > 0.9


@pytest.mark.parametrize("kind", ["tied", "untied", "gpt2"])
def test_named_weights_are_those_of_the_checkpoint_with_tied_ones_once(tmp_path, kind):
    from safetensors.torch import load_file

    folder = save_model(tmp_path / "m", kind)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    x = learner(folder)
    named = dict(x.named_weights())
    if kind == "gpt2":
        named = {name.removeprefix("transformer."): tensor for name, tensor in named.items()} if "wte.weight" in stored else named
    assert set(named) == set(stored) and all(torch.equal(named[name], stored[name]) for name in stored)
    assert [(name, tuple(t.shape), "float32") for name, t in x.named_weights()] == x.weights_metadata()


@pytest.mark.parametrize("kind", ["tied", "untied", "gpt2"])
def test_a_saved_policy_loads_with_the_same_logits_and_its_tokenizer(tmp_path, kind):
    from tokenizers import Tokenizer, models

    folder = save_model(tmp_path / "m", kind)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, "0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "tok")
    x = learner(folder)
    x.update(random_trajectories(4))
    for _ in range(2):  # the second replaces the first
        x.save_policy(str(tmp_path / "out" / "final"), str(tmp_path / "tok"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["final"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final")
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(loaded(ids).logits, x.engine.module.lm(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "final").vocab_size == VOCAB
    assert loaded.config.architectures == AutoModelForCausalLM.from_pretrained(folder).config.architectures
    if kind == "gpt2":
        assert loaded.config.attn_pdrop == 0.1  # dropout is off in the learner only


@pytest.mark.parametrize("error", ["SafetensorError", "NotADirectoryError"])
def test_a_policy_that_cannot_be_written_is_one_line_and_leaves_the_one_before_and_nothing_else(tmp_path, error):
    folder = save_model(tmp_path / "m", "tied")
    x = learner(folder)
    target = tmp_path / "out" / "policy"
    x.save_policy(str(target), folder)
    written = (target / "model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if error == "SafetensorError":
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(written) - 1, limits[1]))  # as on a disk that is full: the weights do not fit
    else:
        target = tmp_path / "out" / "policy" / "config.json" / "policy"
    try:
        with pytest.raises(LearnerError, match=rf"^the policy {target} could not be written \({error}: .+\); .* have room$") as caught:
            x.save_policy(str(target), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["policy"]
    assert (tmp_path / "out" / "policy" / "model.safetensors").read_bytes() == written
