"""What is no recipe, no override or no YAML is one line that quotes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.complaints import complaint
from toolrl_ray import recipe as recipes
from toolrl_ray.config import ToolsConfig, TrainConfig


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.num_steps", "key.path=value"),
        ("=5", "key.path=value"),
        ("train.num_steps=[1", "not valid YAML"),
        ("run_dir=0x_", "not valid YAML; text that looks like something else needs quotes"),
        ("run_dir=!!timestamp x", "not valid YAML"),
        ("train.num_steps=" + "[" * 10_000, "not valid YAML"),
        ("train.num_steps.more=1", "'num_steps' is a value, not a section"),
    ],
)
def test_an_override_of_the_wrong_form_is_quoted(override: str, part: str) -> None:
    message = complaint("calculator", override)
    assert repr(override) in message
    assert part in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"train: [1", "not valid YAML"),
        (b"- a\n- b\n", "must hold a mapping"),
        (b"[]", "must hold a mapping of sections, not a list"),
        (b"# nothing\n", "is empty; a recipe that changes nothing holds {}"),
        (b"\xff\xfe\xfd", "not valid YAML"),
        (b"run_dir: 0x_", "not valid YAML: a value in it is none"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    message = complaint(str(path))
    assert str(path) in message
    assert part in message


def test_a_name_that_no_file_can_have_is_an_unknown_recipe() -> None:
    assert complaint("x" * 300).startswith("unknown recipe 'xxx")
    assert complaint("x" * 300 + ".yaml").startswith("unknown recipe 'xxx")


def test_dates_in_a_file_are_text_and_sections_without_a_line_can_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("run_dir: 2026-02-30\ntrain:\n")
    loaded = recipes.load(str(path), ["train.num_steps=7"])
    assert (loaded.run_dir, loaded.train.num_steps) == ("2026-02-30", 7)
    path.write_text("{}")
    assert recipes.load(str(path)).recipe == "r"


@pytest.mark.parametrize(("content", "key"), [("1: 2", "1"), ("null: 2", "null"), ("on: 2", "true")])
def test_a_key_that_is_no_name_is_named_with_its_file(tmp_path: Path, content: str, key: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content)
    message = complaint(str(path))
    assert f"{path} holds the key {key}, which YAML does not take for text; its keys: recipe, seed, " in message


def test_a_section_without_a_line_has_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("train:\ntools:\nseed: 3\npolicy: {lora: }\n")
    loaded = recipes.load(str(path))
    assert (loaded.seed, loaded.train, loaded.tools) == (3, TrainConfig(), ToolsConfig())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train=5", "train=5: a section is wanted, {} for its defaults; its keys: num_steps, "),
        ("train=", "train=None: a section is wanted, {} for its defaults; its keys: num_steps, "),
        ("policy.lora=true", "policy.lora=True: a section is wanted, {} for its defaults, null for none; its keys: rank, "),
        ("tools.pools.SimpleCalculatorTool=4", "tools.pools.SimpleCalculatorTool=4: a section is wanted, {} for its defaults; its keys: "),
    ],
)
def test_a_value_in_place_of_a_section_is_told_what_a_section_is(override: str, said: str) -> None:
    assert complaint("calculator", override).startswith(said)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("train:\n  num_steps: 1\n  num_steps: 2\n", "the key 'num_steps' is there twice, in lines 2 and 3; keep one of them"),
        ("train: {num_steps: 1}\nseed: 1\ntrain:\n  group_size: 2\n", "the key 'train' is there twice, in lines 1 and 3"),
        ("train: {num_steps: 1, num_steps: 2}", "'num_steps' is there twice, in lines 1 and 1"),
    ],
)
def test_a_key_that_is_there_twice_is_named_with_its_lines(tmp_path: Path, content: str, part: str) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(content)
    message = complaint(str(path))
    assert str(path) in message and part in message
    override = "train={num_steps: 1, num_steps: 2}"
    assert complaint("calculator", override).startswith(f"override {override!r}: the key 'num_steps' is there twice")


def test_a_key_may_stand_beside_a_merged_one(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text("rollout: {<<: &few {num_threads: 1, num_cpus: 1}, num_threads: 2}\nlearner: {<<: *few, num_threads: 3}\n")
    loaded = recipes.load(str(path))
    assert (loaded.rollout.num_threads, loaded.learner.num_threads, loaded.learner.num_cpus) == (2, 3, 1)
