"""The tiny policy of the calculator recipe, warm-started in full (taken from the cache where it has been made)."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from toolrl_ray import recipe
from toolrl_ray.bootstrap.build import ensure_tiny_policy
from toolrl_ray.bootstrap.calculator import REQUEST
from toolrl_ray.bootstrap.rows import Part, Row
from toolrl_ray.bootstrap.warm_start import make_batch
from toolrl_ray.config import RunConfig, TaskConfig
from toolrl_ray.tasks.calculator import load_tasks
from toolrl_ray.tasks.prompts import question, tool_answer, tool_call
from tools_service.calculator import calculate


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return recipe.load("calculator")


@pytest.fixture(scope="module")
def policy(config: RunConfig):
    folder = ensure_tiny_policy(config)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def forced(expression: str) -> Row:
    """An episode whose call is already begun: what the policy writes after it is to be predicted."""
    result = calculate(expression)
    call = tool_call(expression).removeprefix(REQUEST)
    return [
        Part(question(expression) + REQUEST, False),
        Part(call, True),
        Part(f"{result}<response>", False),
        Part(tool_answer(result), True),
    ]


@torch.no_grad()
def copied(policy, expressions: list[str]) -> float:
    """Share of episodes whose greedy policy tokens are all right. Greedy decoding follows exactly these, so it is
    the accuracy of the path through the tool."""
    model, tokenizer = policy
    right = 0
    for start in range(0, len(expressions), 250):
        batch = make_batch(tokenizer, [forced(expression) for expression in expressions[start : start + 250]])
        greedy = model(batch.token_ids[:, :-1]).logits.argmax(-1)
        wrong = (greedy != batch.token_ids[:, 1:]) & batch.trained[:, 1:]
        right += int((~wrong.any(1)).sum())
    return right / len(expressions)


def test_the_path_through_the_tool_is_nearly_always_right_on_held_out_expressions(policy, config: RunConfig) -> None:
    heldout = load_tasks(config.task)[1]
    share = copied(policy, [task.prompt for task in heldout])
    print(json.dumps({"tool_path_accuracy_generated": share}))
    assert share >= 0.98


def test_the_same_policy_copies_real_word_problem_expressions(policy, gsm8k_calculator: Path) -> None:
    heldout = load_tasks(TaskConfig(source="gsm8k", path=str(gsm8k_calculator), num_heldout=500))[1]
    share = copied(policy, [task.prompt for task in heldout])
    print(json.dumps({"tool_path_accuracy_gsm8k": share}))
    assert share >= 0.93


@torch.no_grad()
def test_before_reinforcement_learning_fewer_than_half_of_the_answers_begin_a_call(policy, config: RunConfig) -> None:
    model, tokenizer = policy
    heldout = load_tasks(config.task)[1]
    expressions = [task.prompt for task in random.Random(0).sample(heldout, 200)]
    batch = make_batch(tokenizer, [[Part(question(expression), False), Part(REQUEST, True)] for expression in expressions])
    probabilities = model(batch.token_ids[:, :-1]).logits.softmax(-1)[batch.trained[:, 1:]]
    share = probabilities[:, tokenizer.convert_tokens_to_ids(REQUEST)]
    print(json.dumps({"tool_use_sampled": share.mean().item(), "tool_use_greedy": (share > 0.5).float().mean().item()}))
    assert 0.25 < share.mean() < 0.5
    assert (share > 0.5).float().mean() < 0.3
