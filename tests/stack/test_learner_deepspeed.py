"""The DeepSpeed learner, ZeRO 0 to 3 on one and on two gloo ranks, against the plain PyTorch one."""

from __future__ import annotations

import math

import pytest
import torch
from learner_ranks import (
    CASES,
    DIVERGED_STAGES,
    LORA_STAGES,
    RUNS,
    bfloat16_config,
    case_config,
    diverged_main,
    free_address,
    gradient,
    lora_config,
    rank_main,
    run_case,
    run_lora,
    unprobed_main,
)
from learner_synthetic import NoiseWatch, save_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from toolrl_ray.learner.update import Learner

WORLDS = (1, 2)
STAGES = range(4)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in ("tied", "untied"):
        save_model(folder / kind, kind)
    return folder


@pytest.fixture(scope="module")
def ranks(models, tmp_path_factory):
    """{number of ranks: (folder, [results of each rank])}."""
    results = {}
    for world_size in WORLDS:
        out = tmp_path_factory.mktemp(f"world{world_size}")
        torch.multiprocessing.spawn(rank_main, (world_size, free_address(), str(models), str(out)), nprocs=world_size)
        results[world_size] = out, [torch.load(out / f"rank{rank}.pt") for rank in range(world_size)]
    return results


@pytest.fixture(scope="module")
def plain(models):
    """{case: (learner on plain PyTorch after its updates, their metrics, where rounding noise moved its weights)}."""
    torch.set_num_threads(1)
    results = {}
    for name, (model, *_) in CASES.items():
        learner = Learner(case_config(name), str(models / model), in_process=True)
        watch = NoiseWatch(learner)
        results[name] = learner, run_case(learner, name), watch
    return results


@pytest.mark.parametrize(("world_size", "name", "stage"), RUNS)
def test_three_updates_give_the_weights_of_plain_pytorch(world_size, name, stage, ranks, plain):
    learner, metrics, watch = plain[name]
    got = ranks[world_size][1][0]["cases"][name, stage]
    want = {key: tensor.clone() for key, tensor in learner.named_weights()}
    whole = max(float((got["weights"][key] - want[key]).abs().max()) for key in want)
    assert max(float((want[key] - got["before"][key]).abs().max()) for key in want) > 1e-4  # it did learn
    assert watch.distance(want, got["weights"]) < 1e-5, f"{whole:.1e} with the noise, which is {watch.share():.1e} of the weights"
    assert got["logprobs"] == pytest.approx(learner.logprobs([5, 4, 3, 2, 1]), abs=1e-4)
    assert got["version"] == 3
    for a, b in zip(got["metrics"], metrics, strict=True):
        assert a == pytest.approx(b | {"time/learner_update_s": a["time/learner_update_s"]}, abs=1e-4, rel=1e-4)


def test_the_cases_are_what_they_claim_to_be(plain, ranks):
    for name, num_updates in {"stopped": 1, "stopped at once": 1, "gae": 4}.items():
        assert [(m["ppo/num_updates"], m["ppo/num_skipped_updates"]) for m in plain[name][1]] == [(num_updates, 4 - num_updates)] * 3
    assert all(m["ppo/grad_norm"] > 0.05 for m in plain["separate critic"][1])
    assert [ranks[2][1][0]["cases"]["gae", stage]["partitioned"] for stage in STAGES] == [False, False, False, True]
    assert max(watch.share("lm.") for name, (_, _, watch) in plain.items() if name != "batch of one") < 0.05


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for world_size, name, stage in RUNS if world_size == 2])
def test_all_ranks_report_the_same_metrics_and_hold_the_same_weights(name, stage, ranks):
    a, b = (results["cases"][name, stage] for results in ranks[2][1])
    for x, y in zip(a["metrics"], b["metrics"], strict=True):
        assert {k: v for k, v in x.items() if not k.startswith("time/")} == {k: v for k, v in y.items() if not k.startswith("time/")}
    assert a["weights"].keys() == b["weights"].keys() and all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"])
    assert a["logprobs"] == b["logprobs"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["gae", "one microbatch"])  # tied and untied
def test_named_weights_are_complete_under_their_checkpoint_names(name, stage, ranks, models):
    got = ranks[2][1][0]["cases"][name, stage]
    stored = load_file(models / CASES[name][0] / "model.safetensors")
    assert set(got["before"]) == set(stored) and ("lm_head.weight" in stored) == (name == "one microbatch")
    assert all(torch.equal(got["before"][key], stored[key]) for key in stored)
    assert got["metadata"] == [(key, tuple(t.shape), "float32") for key, t in got["before"].items()]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["gae", "one microbatch"])
def test_a_saved_policy_has_the_logits_of_the_trained_one(name, stage, ranks, models):
    out, results = ranks[2]
    loaded = AutoModelForCausalLM.from_pretrained(out / f"{name}-{stage}")
    trained = AutoModelForCausalLM.from_pretrained(models / CASES[name][0])
    got = results[0]["cases"][name, stage]
    missing = trained.load_state_dict(got["weights"], strict=False).missing_keys
    assert missing == (["lm_head.weight"] if name == "gae" else [])
    ids = torch.tensor([[5, 4, 3, 2, 1]])
    assert torch.equal(loaded(ids).logits, trained(ids).logits)
    logprobs = loaded(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert logprobs.tolist() == pytest.approx(got["logprobs"], abs=1e-5)


@pytest.fixture(scope="module")
def lora(ranks, models, tmp_path_factory):
    """(folder, [results of each of two ranks], those of plain PyTorch)."""
    plain = run_lora(Learner(lora_config(), str(models / "tied"), in_process=True), str(tmp_path_factory.mktemp("lora")))
    out, results = ranks[2]
    return out, [of_rank["lora"] for of_rank in results], plain


@pytest.mark.parametrize("stage", LORA_STAGES)
def test_lora_trains_as_on_plain_pytorch_and_its_merged_weights_leave_every_rank_alike(stage, lora, models):
    _, ranks, want = lora
    a, b = (results[stage] for results in ranks)
    base = load_file(models / "tied" / "model.safetensors")
    assert a["metadata"] == b["metadata"] == want["metadata"] == [(key, tuple(t.shape), "float32") for key, t in a["weights"].items()]
    assert set(a["weights"]) == set(base)
    assert all(torch.equal(a["weights"][key], b["weights"][key]) for key in base)
    moved = {key: float((a["weights"][key] - base[key]).abs().max()) for key in base}
    assert {key for key, by in moved.items() if by > 1e-2} == {key for key in base if key.endswith("proj.weight")}
    assert {by for key, by in moved.items() if not key.endswith("proj.weight")} == {0.0}
    assert max(float((a["weights"][key] - want["weights"][key]).abs().max()) for key in base) < 1e-4
    assert a["logprobs"] == b["logprobs"] == pytest.approx(want["logprobs"], abs=1e-4)
    for x, y in zip(a["metrics"], want["metrics"], strict=True):
        assert x == pytest.approx(y | {"time/learner_update_s": x["time/learner_update_s"]}, abs=1e-4, rel=1e-3)


@pytest.mark.parametrize("stage", LORA_STAGES)
def test_the_reference_of_lora_stays_the_base(stage, lora):
    _, ranks, want = lora
    for logprobs in ranks[0][stage]["ref_logprobs"]:
        assert (logprobs - want["ref_logprobs"][0]).abs().max() < 1e-6


@pytest.mark.parametrize("stage", LORA_STAGES)
def test_a_policy_saved_with_lora_has_the_logits_of_the_trained_one_merged_or_adapted(stage, lora, models):
    from peft import PeftModel

    out, ranks, _ = lora
    ids = torch.tensor([[5, 4, 3, 2, 1]])
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models / "tied"), out / f"lora-{stage}/adapter")
    for model in (AutoModelForCausalLM.from_pretrained(out / f"lora-{stage}"), adapted):
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert logprobs.tolist() == pytest.approx(ranks[0][stage]["logprobs"], abs=1e-5)


def test_in_bfloat16_gradients_of_microbatches_add_up_in_float32(models, ranks):
    """Added up in bfloat16, the gradient of 127 microbatches of one row each is a third farther from that of float32 as in one."""
    want = gradient(Learner(bfloat16_config(8192, dtype="float32"), str(models / "untied"), in_process=True))
    error = {case: float((got - want).norm() / want.norm()) for case, got in ranks[1][1][0]["bfloat16"].items()}
    assert 0.001 < error[2, 8192] < 0.05
    assert error[2, 1] < 1.1 * error[2, 8192] and error[3, 1] < 1.1 * error[2, 8192], error


def test_a_gradient_that_is_not_finite_on_one_rank_moves_no_weight_of_any(models, tmp_path):
    torch.multiprocessing.spawn(diverged_main, (2, free_address(), str(models / "untied"), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"diverged{rank}.pt") for rank in range(2)]
    for stage in DIVERGED_STAGES:
        (first, kept), (second, also_kept) = (rank[stage] for rank in ranks)
        assert kept and also_kept, stage
        if stage == 0:
            assert first == second == "the gradient norm is nan at optimiser step 0: training has diverged"
        else:
            assert first["ppo/grad_norm"] == second["ppo/grad_norm"] == math.inf


def test_a_rank_starts_without_a_look_at_what_deepspeed_could_compile() -> None:
    torch.multiprocessing.spawn(unprobed_main, nprocs=1)
