"""Logprobs and entropy from logits, KL estimators: exact expectations on small categoricals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolrl_ray.algos import losses
from toolrl_ray.algos.losses import (
    entropy_from_logits,
    kl_estimate,
    logprobs_from_logits,
)

logit_rows = st.lists(st.floats(-8, 8), min_size=4, max_size=4)


def logits_and_ids(num_rows=7, num_ids=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_rows, num_ids, generator=generator, dtype=torch.float64).mul(3).to(dtype)
    return logits, torch.randint(num_ids, (num_rows,), generator=generator)


def test_logprobs_and_entropy_of_hand_computed_numbers():
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log().repeat(3, 1)  # probabilities 1/8, 2/8, 5/8
    torch.testing.assert_close(logprobs_from_logits(logits, torch.tensor([0, 1, 2])), torch.tensor([0.125, 0.25, 0.625]).log())
    expected = math.log(8) / 8 + math.log(4) / 4 - 0.625 * math.log(0.625)
    torch.testing.assert_close(entropy_from_logits(logits), torch.full((3,), expected))


def test_logprobs_gradient_is_onehot_minus_softmax():
    logits, ids = logits_and_ids()
    logits.requires_grad_()
    logprobs_from_logits(logits, ids).sum().backward()
    expected = torch.nn.functional.one_hot(ids, 5) - logits.detach().softmax(1)
    torch.testing.assert_close(logits.grad, expected)


def test_entropy_gradient_is_minus_p_times_log_p_plus_entropy():
    logits, _ = logits_and_ids()
    logits.requires_grad_()
    entropy_from_logits(logits).sum().backward()
    logp = logits.detach().log_softmax(1)
    entropy = -(logp.exp() * logp).sum(1, keepdim=True)
    torch.testing.assert_close(logits.grad, -logp.exp() * (logp + entropy))


def test_entropy_lets_logits_of_minus_infinity_be():
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    entropy = entropy_from_logits(logits)
    entropy.sum().backward()
    assert entropy.item() == pytest.approx(math.log(2))
    torch.testing.assert_close(logits.grad, torch.zeros(1, 3))


@pytest.mark.parametrize("chunk_elements", [1, 10, 15])
def test_chunks_of_rows_change_neither_values_nor_gradients(monkeypatch, chunk_elements):
    def run():
        logits, ids = logits_and_ids()
        logits.requires_grad_()
        logprobs, entropy = logprobs_from_logits(logits, ids), entropy_from_logits(logits)
        (logprobs * torch.arange(7) + entropy).sum().backward()
        return logprobs.detach(), entropy.detach(), logits.grad

    whole = run()
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk_elements)
    for a, b in zip(whole, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_a_temperature_divides_the_logits_of_logprobs_and_entropy_and_of_their_gradients():
    def run(temperature, divided_before):
        logits, ids = logits_and_ids()
        logits.requires_grad_()
        given, left = (logits / temperature, 1.0) if divided_before else (logits, temperature)
        logprobs, entropy = logprobs_from_logits(given, ids, left), entropy_from_logits(given, left)
        (logprobs + 2 * entropy).sum().backward()
        return logprobs.detach(), entropy.detach(), logits.grad

    for got, want in zip(run(0.5, False), run(0.5, True), strict=True):
        torch.testing.assert_close(got, want)
    assert not torch.allclose(run(0.5, False)[0], run(1.0, False)[0])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_chunks_keep_no_copy_of_the_logits_for_the_backward_pass(monkeypatch, temperature):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 32 * 100)
    logits = torch.randn(256, 100, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    saved: list[torch.Tensor] = []

    def pack(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ids = torch.zeros(256, dtype=torch.long)
        total = logprobs_from_logits(logits, ids, temperature).sum() + entropy_from_logits(logits, temperature).sum()
    own = logits.untyped_storage().data_ptr()
    assert sum(x.nbytes for x in saved if x.untyped_storage().data_ptr() != own) < logits.nbytes / 4
    total.backward()
    assert logits.grad.dtype == torch.bfloat16 and logits.grad.abs().sum() > 0


def test_bfloat16_logits_are_worked_on_in_float32():
    logits, ids = logits_and_ids(dtype=torch.bfloat16)
    logprobs, entropy = logprobs_from_logits(logits, ids), entropy_from_logits(logits)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, logprobs_from_logits(logits.double(), ids).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy, entropy_from_logits(logits.double()).float(), rtol=1e-5, atol=1e-6)


def test_no_rows_give_no_numbers():
    assert logprobs_from_logits(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)).shape == (0,)
    assert entropy_from_logits(torch.zeros(0, 5)).shape == (0,)


def test_kl_estimates_of_hand_computed_numbers():
    logprobs, ref = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])  # x = log 0.5
    assert kl_estimate(logprobs, ref, "k1").item() == pytest.approx(math.log(2))
    assert kl_estimate(logprobs, ref, "k2").item() == pytest.approx(0.5 * math.log(2) ** 2)
    assert kl_estimate(logprobs, ref, "k3").item() == pytest.approx(0.5 - 1 + math.log(2))
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate(logprobs, ref, "k4")


def categoricals(policy, reference):
    return (torch.tensor(x, dtype=torch.float64).log_softmax(0) for x in (policy, reference))


@given(logit_rows, logit_rows)
def test_k1_and_k3_are_unbiased_and_k2_and_k3_never_negative(policy, reference):
    p, q = categoricals(policy, reference)
    kl = (p.exp() * (p - q)).sum().item()
    for estimator in ("k1", "k3"):
        assert (p.exp() * kl_estimate(p, q, estimator)).sum().item() == pytest.approx(kl, rel=1e-6, abs=1e-9)
    assert kl_estimate(p, q, "k2").min() >= 0 and kl_estimate(p, q, "k3").min() >= 0


def expected_gradient(policy, q, estimator):
    """E over tokens sampled from the policy of d estimate / d policy logits, exactly: the sampling weights are held fixed."""
    logits = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    p = logits.log_softmax(0)
    (p.detach().exp() * kl_estimate(p, q, estimator)).sum().backward()
    return logits.grad


@given(logit_rows, logit_rows)
def test_expected_gradients_of_the_estimators_are_those_that_the_docstring_names(policy, reference):
    _, q = categoricals(policy, reference)

    def gradient(divergence):
        logits = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
        divergence(logits.log_softmax(0)).backward()
        return logits.grad

    forward = gradient(lambda p: (p.exp() * (p - q)).sum())
    reverse = gradient(lambda p: (q.exp() * (q - p)).sum())
    torch.testing.assert_close(expected_gradient(policy, q, "k1"), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(expected_gradient(policy, q, "k2"), forward, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(expected_gradient(policy, q, "k3"), reverse, rtol=1e-6, atol=1e-9)


def test_k3_keeps_its_digits_for_small_differences_and_stays_finite_for_huge_ones():
    x = torch.tensor([1e-4])
    assert kl_estimate(torch.zeros(1), x, "k3").item() == pytest.approx(0.5e-8, rel=1e-2)
    huge = torch.tensor([200.0, -200.0], requires_grad=True)
    k3 = kl_estimate(torch.zeros(2), huge, "k3")
    k3.sum().backward()
    assert torch.isfinite(k3).all() and torch.equal(huge.grad, torch.zeros(2))
