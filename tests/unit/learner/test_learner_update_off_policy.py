"""The whole update on tokens of several policy versions: loss and gradients against a float64 reference, and what is told apart."""

from __future__ import annotations

import math

import pytest
import torch
from learner_synthetic import random_trajectories, run_config, save_model, trajectory
from transformers import AutoModelForCausalLM

from toolrl_ray.errors import ConfigError, LearnerError
from toolrl_ray.learner.update import Learner
from toolrl_ray.recipe import load
from toolrl_ray.tracking.summary import step_line
from toolrl_ray.types import NO_VERSION

TURNS = [([1, 2], False), ([3, 4, 5], True), ([6, 7], False), ([8], True)]
STALENESS = (2, 2, 1, 0)  # of the four trained tokens of TURNS
RATIOS = (4.0, 0.8, 1.25, 1.5)  # the learner's probability over the sampler's, of the same tokens
KL = {ratio: ratio - 1 - math.log(ratio) for ratio in RATIOS}
ONE_STEP = {"num_epochs": 1, "num_minibatches": 1, "kl_coef": 0, "advantage": "rloo"}


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model")


def learner(folder, **algo) -> Learner:
    """One that has made two updates, which had nothing to train on and changed nothing."""
    x = Learner(run_config(algo=ONE_STEP | algo, train={"group_size": 2}, learner={"max_grad_norm": 1e9}), folder, in_process=True)
    for _ in range(2):
        x.update([trajectory([([1, 2], False)])])
    assert x.num_updates == 2
    return x


def sampled(x: Learner, row, ratios, staleness):
    """The row as a sampler would have made it whose trained tokens have these ratios and staleness."""
    ratios, staleness = iter(ratios), iter(staleness)
    columns = list(zip([0.0, *x.logprobs(row.token_ids)], row.loss_mask, strict=True))
    row.rollout_logprobs = [logprob - math.log(next(ratios)) if trained else 0.0 for logprob, trained in columns]
    row.policy_versions = [x.num_updates - next(staleness) if trained else NO_VERSION for trained in row.loss_mask]
    return row


def mixed(x: Learner, ratios=RATIOS, staleness=STALENESS):
    """One group: a row of several versions with reward 1, and the same tokens with reward 0 and one token less: advantages 1 and -1."""
    short = [*TURNS[:1], ([3, 4], True), *TURNS[2:]]
    rows = [trajectory(TURNS, 1.0, "a"), trajectory(short, 0.0, "b")]
    keep = [0, 1, 3]
    return [sampled(x, rows[0], ratios, staleness), sampled(x, rows[1], [ratios[i] for i in keep], [staleness[i] for i in keep])]


def expected_weights(level, band):
    """Of the two rows of `mixed`, with tis_clip 2."""
    rows = []
    for ratios in (RATIOS, (4.0, 0.8, 1.5)):
        whole = math.prod(ratios)  # 6 and 4.8
        rows.append([0.0 if band and not band[0] <= r <= band[1] else min(whole if level == "sequence" else r, 2.0) for r in ratios])
    return rows


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("band", [None, (0.9, 3.0)])
def test_loss_and_gradient_of_an_update_on_mixed_versions_are_those_of_decoupled_ppo(folder, level, band):
    x = learner(folder, tis_level=level, ratio_band=band)
    rows, gradients = mixed(x), {}

    def step(_step=x.engine.optimizer.step):
        gradients.update({name: p.grad.clone() for name, p in x.engine.module.lm.named_parameters()})
        _step()

    x.engine.optimizer.step = step
    reference = AutoModelForCausalLM.from_pretrained(folder).double()
    loss = torch.zeros((), dtype=torch.float64)
    for row, weights, advantage in zip(rows, expected_weights(level, band), (1.0, -1.0), strict=True):
        ids = torch.tensor(row.token_ids)
        logprobs = reference(ids[None]).logits[0, :-1].log_softmax(1).gather(1, ids[1:, None])[:, 0]
        trained = logprobs[torch.tensor(row.loss_mask[1:])]
        ratio = (trained - trained.detach()).exp()  # the first step starts from the proximal policy
        loss = loss - (torch.tensor(weights).double() * ratio * advantage).sum() / 7
    loss.backward()
    metrics = x.update(rows)
    assert metrics["ppo/policy_loss"] == pytest.approx(loss.item(), abs=1e-5) and metrics["tokens/trained"] == 7
    largest = max(float(p.grad.abs().max()) for p in reference.parameters())
    for name, p in reference.named_parameters():
        assert (gradients[name] - p.grad).abs().max() < 1e-4 * largest, name
    assert x.policy_version == 1 and x.num_updates == 3


def test_a_sampler_that_agrees_has_no_mismatch_and_one_that_does_not_is_corrected_and_reported(folder):
    x = learner(folder)
    rows = [sampled(x, row, [1.0] * 99, [0] * 99) for row in random_trajectories(8, group_size=2)]
    metrics = x.update(rows)
    assert metrics["mismatch/kl"] < 1e-9 and metrics["mismatch/mean_abs_logprob_diff"] < 1e-6
    assert metrics["off_policy/tis_mean"] == pytest.approx(1, abs=1e-5) and metrics["off_policy/tis_clipped_share"] == 0
    assert metrics["off_policy/stale_share"] == metrics["off_policy/staleness_mean"] == metrics["off_policy/staleness_max"] == 0
    assert "off_policy/kl" not in metrics
    metrics = x.update([sampled(x, row, [4.0] * 99, [0] * 99) for row in rows])
    assert metrics["mismatch/mean_abs_logprob_diff"] == pytest.approx(math.log(4), abs=1e-5)
    assert metrics["mismatch/kl"] == pytest.approx(KL[4.0], rel=1e-4)
    assert metrics["off_policy/tis_mean"] == pytest.approx(2) and metrics["off_policy/tis_clipped_share"] == 1


def test_mismatch_is_of_tokens_of_the_current_version_and_off_policy_kl_of_older_ones(folder):
    x = learner(folder)
    metrics = x.update(mixed(x))
    assert metrics["mismatch/kl"] == pytest.approx(KL[1.5], abs=1e-5)
    assert metrics["mismatch/mean_abs_logprob_diff"] == pytest.approx(math.log(1.5), abs=1e-5)
    assert metrics["off_policy/kl"] == pytest.approx((2 * KL[4.0] + 2 * KL[0.8] + KL[1.25]) / 5, abs=1e-5)
    assert metrics["off_policy/stale_share"] == pytest.approx(5 / 7) and metrics["off_policy/staleness_max"] == 2
    assert metrics["off_policy/staleness_mean"] == pytest.approx((2 * 4 + 1) / 7)
    assert metrics["off_policy/tis_mean"] == pytest.approx((2 * 2 + 2 * 0.8 + 1.25 + 2 * 1.5) / 7, abs=1e-5)
    assert metrics["off_policy/tis_clipped_share"] == pytest.approx(2 / 7) and metrics["off_policy/masked_share"] == 0


def test_what_a_band_masks_is_reported_apart_from_what_is_cut(folder):
    x = learner(folder, ratio_band=(0.9, 3.0), tis_clip=1.4)
    metrics = x.update(mixed(x))
    assert metrics["off_policy/masked_share"] == pytest.approx(4 / 7)  # 4.0 and 0.8, in both rows
    assert metrics["off_policy/tis_clipped_share"] == pytest.approx(2 / 7)  # 1.5
    assert metrics["off_policy/tis_mean"] == pytest.approx((1.25 + 2 * 1.4) / 7, abs=1e-5)


def test_a_batch_of_old_tokens_alone_has_no_mismatch_and_its_line_shows_a_dash(folder):
    x = learner(folder)
    metrics = x.update(mixed(x, staleness=(2, 2, 1, 1)))
    assert not [name for name in metrics if name.startswith("mismatch/")]
    assert metrics["off_policy/stale_share"] == 1 and metrics["off_policy/kl"] > 0
    assert "mismatch kl -  " in step_line(3, 9, metrics)


def test_a_batch_wholly_outside_the_band_moves_nothing_and_still_counts_its_tokens(folder):
    x = learner(folder, ratio_band=(0.99, 1.01))
    before = {name: tensor.clone() for name, tensor in x.engine.module.state_dict().items()}
    metrics = x.update(mixed(x))
    assert metrics["off_policy/masked_share"] == 1 and metrics["tokens/trained"] == 7
    assert metrics["ppo/policy_loss"] == metrics["ppo/grad_norm"] == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in x.engine.module.state_dict().items())


def test_tokens_outside_the_band_stay_in_the_value_loss(folder):
    losses = []
    for band in (None, (0.99, 1.01)):
        x = learner(folder, advantage="gae", ratio_band=band)
        metrics = x.update(mixed(x))
        losses.append(metrics["ppo/value_loss"])
        assert (metrics["ppo/policy_loss"] == 0) == (band is not None) and metrics["ppo/grad_norm"] > 0
    assert losses[0] == losses[1] > 0


def test_a_token_from_the_future_is_refused_before_anything_changes(folder):
    x = learner(folder)
    with pytest.raises(LearnerError, match=r"trajectory 'a': token 7 .* version 3, but the learner has made 2 updates"):
        x.update(mixed(x, staleness=(0, 0, 0, -1)))
    assert x.num_updates == 2 and x.policy_version == 0


@pytest.mark.parametrize("band", ["[0.5, 0.9]", "[-0.1, 2]", "[1, 2]", "[2, 0.5]"])
def test_a_band_that_is_not_around_one_is_refused_in_one_line(band):
    with pytest.raises(ConfigError, match=r"^algo.ratio_band=\[.*\] must be \[low, high\] with 0 <= low < 1 < high, such as"):
        load("calculator", [f"algo.ratio_band={band}"])


def test_a_band_is_read_and_can_be_switched_off():
    assert load("calculator", ["algo.ratio_band=[0, 5]"]).algo.ratio_band == (0, 5)
    assert load("calculator", ["algo.ratio_band=null"]).algo.ratio_band is None
