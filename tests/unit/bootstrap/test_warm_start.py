from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolrl_ray.bootstrap.calculator import MAX_CHARACTERS, PIECES, Demonstrations
from toolrl_ray.bootstrap.model import make_model
from toolrl_ray.bootstrap.muon import Muon, orthogonalised
from toolrl_ray.bootstrap.rows import Row
from toolrl_ray.bootstrap.tokenizer import make_tokenizer
from toolrl_ray.bootstrap.warm_start import batch_loss, make_batch, warm_start
from toolrl_ray.config import BootstrapConfig
from toolrl_ray.tasks.expressions import normalise
from tools_service.calculator import calculate

SMALL = BootstrapConfig(num_layers=1, hidden_size=32, num_heads=1, num_steps=12, batch_size=8)


def text_of(row: Row) -> str:
    return "".join(part.text for part in row)


def expression_of(row: Row) -> str:
    return text_of(row).removeprefix("What is ").partition("?\n\n")[0]


def test_a_demonstration_with_the_tool_is_the_original_syntax_and_trains_no_tool_output() -> None:
    rows = Demonstrations(0, 0.49, 0, frozenset())
    row = next(row for _ in range(100) if len(row := rows.demonstration()) == 4)
    expression = expression_of(row)
    result = calculate(expression)
    assert [part.text for part in row] == [
        f"What is {expression}?\n\n",
        f"<request><SimpleCalculatorTool>{expression}<call>",
        f"{result}<response>",
        f"\n\nResult={result}<submit>",
    ]
    assert [part.trained for part in row] == [False, True, False, True]


def test_the_share_of_demonstrations_with_the_tool_is_as_configured_and_guesses_are_nearly_always_wrong() -> None:
    rows = Demonstrations(0, 0.4, 0, frozenset())
    drawn = [rows.demonstration() for _ in range(1000)]
    with_tool = [row for row in drawn if "<request>" in text_of(row)]
    assert 0.36 < len(with_tool) / len(drawn) < 0.44
    guesses = [row for row in drawn if "<request>" not in text_of(row)]
    assert all(row[1].text.startswith("Result=") and row[1].trained for row in guesses)
    right = [row for row in guesses if row[1].text == f"Result={calculate(expression_of(row))}<submit>"]
    assert len(right) < 0.1 * len(guesses)


def test_an_exercise_trains_everything_but_the_decision_to_call() -> None:
    row = Demonstrations(0, 0.4, 0, frozenset()).exercise()
    assert row[0].text.endswith("?\n\n<request>") and not row[0].trained
    assert row[1].text == f"<SimpleCalculatorTool>{expression_of(row)}<call>" and row[1].trained


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_held_out_expressions_are_never_shown(seed: int) -> None:
    free = Demonstrations(seed, 0.4, 0, frozenset())
    seen = [expression_of(free.demonstration()) for _ in range(10)]
    rows = Demonstrations(seed, 0.4, 0, frozenset(map(normalise, seen)))
    shown = {normalise(expression_of(row)) for row in (make() for make in (rows.demonstration, rows.exercise) for _ in range(20))}
    assert not shown & set(map(normalise, seen))


def test_expressions_cover_both_sources_and_stay_short() -> None:
    rows = Demonstrations(0, 0.4, 0, frozenset())
    expressions = [expression_of(rows.exercise()) for _ in range(2000)]
    assert max(map(len, expressions)) <= MAX_CHARACTERS
    for shape in ("(", "%", ".5", "000"):
        assert any(shape in expression for expression in expressions), shape


def test_few_shot_examples_stand_before_the_question_and_are_not_trained() -> None:
    row = Demonstrations(0, 0.4, 2, frozenset()).demonstration()
    assert row[0].text.startswith("What is 13.1-3?\n\n<request>") and row[0].text.count("What is ") == 3
    assert not row[0].trained


def test_the_loss_is_the_mean_over_trained_tokens_whatever_stands_in_padding_or_prompt() -> None:
    tokenizer = make_tokenizer(256, PIECES)
    model = make_model(SMALL, tokenizer)
    rows = Demonstrations(1, 0.4, 0, frozenset())
    picked = [rows.demonstration() for _ in range(4)]
    batch = make_batch(tokenizer, picked)
    alone = [make_batch(tokenizer, [row]) for row in picked]
    counts = torch.tensor([float(b.trained.sum()) for b in alone])
    with torch.no_grad():
        each = torch.stack([batch_loss(model, b) for b in alone])
        torch.testing.assert_close(batch_loss(model, batch), (each * counts).sum() / counts.sum())
    for row, ids, mask in zip(picked, batch.token_ids, batch.trained, strict=True):
        assert tokenizer.decode(ids[mask]) == "".join(part.text for part in row if part.trained)


def test_the_network_depends_on_its_seed_alone_and_leaves_the_global_generator_alone() -> None:
    tokenizer = make_tokenizer(256, PIECES)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = make_model(SMALL, tokenizer).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two = make_model(SMALL, tokenizer).state_dict()
    other = make_model(SMALL.model_copy(update={"seed": 1}), tokenizer).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("tie", [True, False])
def test_head_and_embedding_are_tied_as_configured(tie: bool) -> None:
    model = make_model(SMALL.model_copy(update={"tie_embeddings": tie}), make_tokenizer(256, PIECES))
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is tie


def test_a_warm_start_is_reproducible_and_lowers_the_loss() -> None:
    tokenizer = make_tokenizer(256, PIECES)
    config = SMALL.model_copy(update={"num_steps": 60})
    check = make_batch(tokenizer, list(islice(iter(Demonstrations(7, 0.4, 0, frozenset()).demonstration, None), 32)))
    states, losses = [], []
    for _ in range(2):
        model = make_model(config, tokenizer)
        with torch.no_grad():
            losses.append(batch_loss(model, check).item())
        warm_start(model, tokenizer, Demonstrations(0, 0.4, 0, frozenset()), config, lambda line: None)
        with torch.no_grad():
            losses.append(batch_loss(model, check).item())
        states.append(model.state_dict())
    assert losses[1] < 0.9 * losses[0]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 5, 8), (1, 6, 6)])
def test_orthogonalised_keeps_the_singular_vectors_and_moves_their_values_to_about_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 1e3])[: shape[0], None, None]
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    values = u.mT @ orthogonalised(matrices) @ vh.mT
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-3
    assert diagonal.min() > 0.6 and diagonal.max() < 1.3


def test_muon_takes_the_steps_of_torchs_to_the_precision_of_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((8, 4), (4, 8), (8, 4))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimisers = [Muon(ours, lr=0.1), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0)]
    for _ in range(4):
        for parameters in zip(ours, theirs, strict=True):
            parameters[0].grad = torch.randn(parameters[0].shape, generator=generator)
            parameters[1].grad = parameters[0].grad.clone()
        for optimiser in optimisers:
            optimiser.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(a - before, b - before, rtol=0, atol=0.01)
        assert (a - before).abs().max() > 0.1


def test_muon_leaves_a_parameter_without_a_gradient_as_it_is() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    Muon([parameter], lr=0.1).step()
    assert torch.equal(parameter, torch.ones(2, 2))
