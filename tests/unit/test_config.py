"""A mistake in a recipe or an override is one line: what is wrong, the value, what is allowed or what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from toolrl_ray import config
from toolrl_ray import recipe as recipes
from toolrl_ray.errors import ConfigError


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text("train: {num_steps: 3}\n")
    return str(path)


def complaint(recipe: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        recipes.load(recipe, overrides)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_a_recipe_is_its_file_over_the_defaults(recipe: str) -> None:
    loaded = recipes.load(recipe)
    assert loaded.recipe == "small"
    assert loaded.train.num_steps == 3
    assert loaded.train.tasks_per_step == config.TrainConfig().tasks_per_step


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train.num_steps=7", lambda c: c.train.num_steps, 7),
        ("learner.lr=1e-3", lambda c: c.learner.lr, 1e-3),
        ("learner.lr=3.5E-4", lambda c: c.learner.lr, 3.5e-4),
        ("algo.whiten_advantages=false", lambda c: c.algo.whiten_advantages, False),
        ("algo.target_kl=null", lambda c: c.algo.target_kl, None),
        ("learner.adam_betas=[0.8, 0.9]", lambda c: c.learner.adam_betas, (0.8, 0.9)),
        ("tools.names=[A, B]", lambda c: c.tools.names, ["A", "B"]),
        ("policy.path=org/name", lambda c: c.policy.path, "org/name"),
        ("run_dir=runs/a=b", lambda c: c.run_dir, "runs/a=b"),
    ],
)
def test_an_override_sets_its_key(recipe: str, override: str, read, value) -> None:
    assert read(recipes.load(recipe, [override])) == value


def test_the_last_override_of_a_key_holds(recipe: str) -> None:
    assert recipes.load(recipe, ["train.num_steps=1", "train.num_steps=2"]).train.num_steps == 2


def test_an_unknown_recipe_is_named_with_those_that_exist() -> None:
    message = complaint("calculater")
    assert "'calculater'" in message
    assert all(name in message for name in recipes.recipe_names())
    assert ".yaml" in message


def test_an_unknown_key_is_named_with_its_value_and_the_allowed_keys(recipe: str) -> None:
    message = complaint(recipe, "train.steps=5")
    assert "'train.steps'" in message
    assert "5" in message
    assert "num_steps, tasks_per_step, group_size" in message


def test_an_unknown_section_is_named_with_the_sections(recipe: str) -> None:
    message = complaint(recipe, "trainer.num_steps=5")
    assert "'trainer'" in message
    assert "train, eval, tracking" in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.num_steps=many", ["train.num_steps", "'many'", "integer"]),
        ("train.tasks_per_step=0", ["train.tasks_per_step", "0", "greater than or equal to 1"]),
        ("rollout.engine=sglang", ["rollout.engine", "'sglang'", "vllm", "transformers"]),
        ("learner.zero_stage=4", ["learner.zero_stage", "4", "0, 1, 2 or 3"]),
        ("algo.clip_eps_low=1.5", ["algo.clip_eps_low", "1.5", "less than 1"]),
        ("bootstrap.hidden_size=100", ["bootstrap.hidden_size", "100", "multiple of 32"]),
        ("train=5", ["train", "5"]),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(recipe: str, override: str, parts: list[str]) -> None:
    message = complaint(recipe, override)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["task.path=x.jsonl"], ["x.jsonl'", "task.source='generated'", "set task.source=gsm8k"]),
        (["algo.advantage=grpo", "algo.kl_coef=0"], ["algo.advantage=grpo", "train.group_size=1", "set train.group_size=2"]),
        (["algo.advantage=rloo", "train.group_size=4"], ["algo.advantage=rloo", "algo.kl_in=reward", "set algo.kl_in=loss"]),
        (["algo.kl_in=loss"], ["algo.kl_estimator=k1", "algo.kl_in=loss", "set algo.kl_estimator=k2 or k3"]),
        (["eval.num_tasks=900"], ["eval.num_tasks=900", "task.num_heldout=500", "set task.num_heldout higher"]),
        (["episode.max_context_tokens=4096"], ["episode.max_context_tokens=4096", "bootstrap.max_context_tokens=256"]),
    ],
)
def test_a_contradiction_is_named_with_both_values(recipe: str, overrides: list[str], parts: list[str]) -> None:
    message = complaint(recipe, *overrides)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.num_steps", "key.path=value"),
        ("=5", "key.path=value"),
        ("train.num_steps=[1", "not valid YAML"),
        ("train.num_steps.more=1", "'num_steps' is a value, not a section"),
    ],
)
def test_an_override_of_the_wrong_form_is_quoted(recipe: str, override: str, part: str) -> None:
    message = complaint(recipe, override)
    assert repr(override) in message
    assert part in message


@pytest.mark.parametrize(("text", "part"), [("train: [1", "not valid YAML"), ("- a\n- b\n", "must hold a mapping")])
def test_a_broken_file_is_named(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    message = complaint(str(path))
    assert str(path) in message
    assert part in message


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_the_saved_configuration_of_a_recipe_loads_as_the_same(name: str, tmp_path: Path) -> None:
    loaded = recipes.load(name)
    path = tmp_path / "config.yaml"
    path.write_text(recipes.dump(loaded))
    assert recipes.load(str(path)) == loaded


names = st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1)


@given(lr=st.floats(1e-9, 1.0), steps=st.integers(0, 10**6), path=names)
def test_any_configuration_survives_being_saved(lr: float, steps: int, path: str) -> None:
    original = config.RunConfig.model_validate(
        {"recipe": "r", "learner": {"lr": lr}, "train": {"num_steps": steps}, "policy": {"path": path}}
    )
    assert config.RunConfig.model_validate(yaml.safe_load(recipes.dump(original))) == original
