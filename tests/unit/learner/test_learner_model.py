from __future__ import annotations

import pytest
import torch
from learner_synthetic import VOCAB, count_checkpoints, random_trajectories, save_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from toolrl_ray.errors import LearnerError, UserError
from toolrl_ray.learner.batch import make_batch
from toolrl_ray.learner.model import PolicyWithValue, leave_nothing_to_chance, load_policy, load_trunk

KINDS = ("tied", "untied", "gpt2")


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    return save_model(tmp_path / request.param, request.param)


def whole_batch(batch):
    return batch.select(range(len(batch.counts)))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_entropy_and_values_equal_a_full_logits_computation_row_by_row(folder, temperature):
    trajectories = random_trajectories(7)
    model = PolicyWithValue(load_policy(folder, "float32"), temperature=temperature)
    torch.nn.init.normal_(model.value_head.weight, std=0.1)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logprobs, entropies, values = model(*whole_batch(make_batch(trajectories)))
        expected = []
        for t in trajectories:
            output = plain(torch.tensor([t.token_ids]), output_hidden_states=True)
            logp = (output.logits[0].double() / temperature).log_softmax(-1)
            value = output.hidden_states[-1][0].double() @ model.value_head.weight[0].double() + model.value_head.bias.double()
            for i, (token, trained) in enumerate(zip(t.token_ids, t.loss_mask, strict=True)):
                if trained:
                    expected.append((logp[i - 1, token], -(logp[i - 1].exp() * logp[i - 1]).sum(), value[i - 1]))
    expected = torch.tensor(expected).T
    assert len(logprobs) == sum(t.num_trained_tokens for t in trajectories) > 20
    for got, want in zip((logprobs, entropies, values), expected, strict=True):
        assert (got - want).abs().max() < 2e-6  # float32 logprobs of size 5 are 5e-7 apart


def test_the_output_embedding_sees_only_the_selected_positions(folder):
    model = PolicyWithValue(load_policy(folder, "float32"))
    shapes = []
    model.lm.get_output_embeddings().register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    batch = make_batch(random_trajectories(5))
    model(*whole_batch(batch))
    assert shapes == [(1, batch.num_trained, VOCAB)]


def test_generation_with_the_wrapped_model_is_untouched(folder):
    model = PolicyWithValue(load_policy(folder, "float32"))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    model(ids, torch.tensor([0]), torch.tensor([2]))
    assert torch.equal(model.lm(ids).logits, plain(ids).logits)


def test_no_mask_reaches_the_attention_so_that_the_causal_kernel_is_taken(tmp_path):
    model = PolicyWithValue(load_policy(save_model(tmp_path / "m"), "float32"))
    masks = []
    attention = model.lm.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    model(*whole_batch(make_batch(random_trajectories(5))))
    assert masks == [None]
    assert model.lm.config._attn_implementation == "sdpa" and attention.is_causal


def test_a_models_own_scaling_of_its_logits_is_kept(tmp_path):
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    CohereForCausalLM(
        CohereConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, logit_scale=0.5)
    ).save_pretrained(tmp_path / "m")
    model = PolicyWithValue(load_policy(str(tmp_path / "m"), "float32"))
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    logprobs, _, _ = model(ids, torch.tensor([0]), torch.tensor([2]))
    assert logprobs.item() == pytest.approx(model.lm(ids).logits[0, 2].log_softmax(-1)[1].item(), abs=1e-6)
    assert model.lm.config.logit_scale == 0.5


def test_nothing_selected_gives_empty_results_and_zero_gradients_everywhere(folder):
    model = PolicyWithValue(load_policy(folder, "float32"), entropy_grad=True)
    logprobs, entropies, values = model(*make_batch(random_trajectories(2)).select([]))
    assert logprobs.shape == entropies.shape == values.shape == (0,)
    (logprobs.sum() + entropies.sum() + values.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def mixtral(path) -> str:
    """Its routers jitter in training mode."""
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, router_jitter_noise=0.5, initializer_range=0.1,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [lambda path: save_model(path, "gpt2"), mixtral], ids=["dropout", "router jitter"])
def test_two_forwards_of_the_same_weights_agree(tmp_path, make, checkpointing):
    lm = load_policy(make(tmp_path / "m"), "float32")
    if checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = leave_nothing_to_chance(PolicyWithValue(lm))
    inputs = whole_batch(make_batch(random_trajectories(3)))
    assert torch.equal(model(*inputs)[0], model(*inputs)[0])


def test_gradient_checkpointing_changes_no_gradient(folder):
    inputs, grads = whole_batch(make_batch(random_trajectories(4))), []
    for checkpointing in (False, True):
        lm = load_policy(folder, "float32")
        if checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = leave_nothing_to_chance(PolicyWithValue(lm))
        checkpointed = count_checkpoints(lm)
        logprobs, _, values = model(*inputs)
        assert bool(checkpointed) == checkpointing
        (logprobs.sum() + values.sum()).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(*grads, strict=True))


def test_a_separate_critic_shares_no_weight_with_the_policy(folder):
    model = PolicyWithValue(load_policy(folder, "float32"), "separate", load_trunk(folder, "float32"))
    torch.nn.init.ones_(model.value_head.weight)
    _, _, values = model(*whole_batch(make_batch(random_trajectories(3))))
    values.sum().backward()
    assert all(p.grad is None for p in model.lm.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.critic_trunk.parameters())


def test_a_new_value_head_says_zero(folder):
    model = PolicyWithValue(load_policy(folder, "float32"))
    assert not model(*whole_batch(make_batch(random_trajectories(3))))[2].any()


def broken_folders(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    garbage = tmp_path / "garbage"
    save_model(garbage)
    (garbage / "model.safetensors").write_bytes(b"not weights")
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "no-such-model"}')
    incomplete = tmp_path / "incomplete"
    save_model(incomplete, "untied")
    from safetensors.torch import load_file, save_file

    weights = load_file(incomplete / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, incomplete / "model.safetensors", metadata={"format": "pt"})
    return {tmp_path / "missing": "no such folder", empty: "config.json", garbage: "", unknown: "", incomplete: "lm_head.weight"}


def test_a_folder_without_a_model_is_refused_in_one_line_that_names_it(tmp_path):
    for folder, word in broken_folders(tmp_path).items():
        with pytest.raises(UserError) as caught:
            load_policy(str(folder), "float32")
        message = str(caught.value)
        assert str(folder) in message and word in message and "\n" not in message and len(message) < 400


def test_positions_point_at_the_token_before_each_trained_one():
    trajectories = random_trajectories(9)
    batch = make_batch(trajectories)
    input_ids, rows, positions = whole_batch(batch)
    trained = [(i, t) for i, x in enumerate(trajectories) for t, m in enumerate(x.loss_mask) if m]
    assert list(zip(rows.tolist(), (positions + 1).tolist(), strict=True)) == trained
    assert input_ids[rows, positions + 1].tolist() == [trajectories[i].token_ids[t] for i, t in trained]
    assert batch.rollout_logprobs[batch.mask].tolist() == pytest.approx([trajectories[i].rollout_logprobs[t] for i, t in trained])
    assert batch.counts == [t.num_trained_tokens for t in trajectories] and batch.counts[-1] == 0
    assert not batch.rollout_logprobs[~batch.mask].any()


def test_observations_after_the_last_trained_token_are_not_read():
    trajectories = random_trajectories(3)
    before = make_batch(trajectories)
    for t in trajectories:
        t.token_ids += [7] * 50
        t.loss_mask += [False] * 50
        t.rollout_logprobs += [0.0] * 50
        t.policy_versions += [-1] * 50
    after = make_batch(trajectories)
    assert after.lengths == before.lengths
    assert after.select([0, 1, 2])[0].shape == before.select([0, 1, 2])[0].shape


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t.loss_mask.pop(), "differ in length"),
        (lambda t: t.loss_mask.__setitem__(0, True), "first token"),
        (lambda t: setattr(t, "reward", None), "reward=None"),
        (lambda t: setattr(t, "reward", float("nan")), "reward=nan"),
        (lambda t: t.rollout_logprobs.__setitem__(t.loss_mask.index(True), float("-inf")), "-inf"),
    ],
)
def test_an_impossible_trajectory_is_refused_by_name(change, word):
    trajectories = random_trajectories(3)
    change(trajectories[1])
    with pytest.raises(LearnerError, match=r"trajectory '1'") as caught:
        make_batch(trajectories)
    assert word in str(caught.value)


def test_an_empty_batch_is_refused():
    with pytest.raises(LearnerError, match="empty"):
        make_batch([])
