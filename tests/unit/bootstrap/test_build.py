from __future__ import annotations

import errno
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from toolrl_ray.bootstrap import build, calculator
from toolrl_ray.bootstrap.build import ensure_tiny_policy
from toolrl_ray.config import RunConfig
from toolrl_ray.errors import ConfigError
from toolrl_ray.pretrained import check_weights

SMALL = RunConfig.model_validate(
    {
        "recipe": "test",
        "bootstrap": {"num_layers": 1, "hidden_size": 32, "num_heads": 1, "num_steps": 2, "batch_size": 4},
        "task": {"num_train": 20, "num_heldout": 10},
        "eval": {"num_tasks": 10},
    }
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOOLRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def quiet(line: str) -> None:
    pass


def test_a_policy_is_made_once_and_loads_with_transformers(cache: Path) -> None:
    lines: list[str] = []
    folder = ensure_tiny_policy(SMALL, lines.append)
    assert folder.parent == cache and lines
    made = os.stat(folder / "model.safetensors").st_mtime_ns
    lines.clear()
    assert ensure_tiny_policy(SMALL, lines.append) == folder
    assert os.stat(folder / "model.safetensors").st_mtime_ns == made and lines == []
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("a  b")["input_ids"]) == "a  b"


def test_whom_the_umask_lets_read_a_policy_can_read_all_of_it() -> None:
    before = os.umask(0o027)
    try:
        folder = ensure_tiny_policy(SMALL, quiet)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(os.listdir(folder), 0o640)


def test_what_shapes_the_policy_shapes_its_name_and_nothing_else_does() -> None:
    key = ensure_tiny_policy(SMALL, quiet)

    def other(section: str, **values: object) -> Path:
        tree = SMALL.model_dump()
        tree[section] |= values
        return ensure_tiny_policy(RunConfig.model_validate(tree), quiet)

    assert len({key, other("bootstrap", seed=1), other("task", seed=1), other("task", few_shot=1)}) == 4
    assert other("learner", lr=0.5) == key and other("task", num_train=30) == key


def test_a_changed_source_file_makes_a_new_policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = ensure_tiny_policy(SMALL, quiet)
    (tmp_path / "more.py").write_text("# more")
    monkeypatch.setattr(calculator, "BUILT_ON", (*calculator.BUILT_ON, SimpleNamespace(__file__=str(tmp_path / "more.py"))))
    assert ensure_tiny_policy(SMALL, quiet) != before


def test_a_warm_start_that_dies_leaves_no_folder_that_could_be_taken(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = build._make

    def half_made(config, heldout, folder, log) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_make", half_made)
    with pytest.raises(KeyboardInterrupt):
        ensure_tiny_policy(SMALL, quiet)
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(build, "_make", real)
    assert (ensure_tiny_policy(SMALL, quiet) / "model.safetensors").is_file()


def test_two_that_make_the_same_policy_at_once_end_with_one_whole_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both_made = threading.Barrier(2)
    real = build._make

    def make_then_wait(*args) -> None:
        real(*args)
        both_made.wait(timeout=120)

    monkeypatch.setattr(build, "_make", make_then_wait)
    with ThreadPoolExecutor(2) as threads:
        folders = {future.result(timeout=240) for future in [threads.submit(ensure_tiny_policy, SMALL, quiet) for _ in range(2)]}
    (folder,) = folders
    assert list(cache.iterdir()) == [folder]
    AutoModelForCausalLM.from_pretrained(folder)


def test_the_loser_of_a_race_takes_the_winners_folder(tmp_path: Path) -> None:
    winner, loser = tmp_path / "tiny-1", tmp_path / "tiny-1.making-x"
    for folder in (winner, loser):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
        build._write_digests(folder)
    build._rename(loser, winner)
    assert (winner / "config.json").read_text() == "tiny-1"


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "a weight missing":
        tensors = load_file(weights)
        tensors.popitem()
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        shutil.rmtree(folder)
        folder.mkdir() if how == "empty" else folder.write_text("")


@pytest.mark.parametrize("how", ["cut off", "a weight missing", "no tokenizer", "empty", "a file"])
def test_a_damaged_policy_is_not_taken_from_the_cache_but_made_again(cache: Path, how: str) -> None:
    folder = ensure_tiny_policy(SMALL, quiet)
    names = sorted(path.name for path in folder.iterdir())
    damage(folder, how)
    lines: list[str] = []
    assert ensure_tiny_policy(SMALL, lines.append) == folder
    assert lines[0].startswith(f"the tiny policy in {folder} is damaged") and "\n" not in lines[0]
    assert sorted(path.name for path in folder.iterdir()) == names and list(cache.iterdir()) == [folder]
    check_weights(str(folder))
    lines.clear()
    assert ensure_tiny_policy(SMALL, lines.append) == folder and lines == []


def test_two_that_make_a_damaged_policy_again_at_once_end_with_one_whole_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(ensure_tiny_policy(SMALL, quiet), "cut off")
    test_two_that_make_the_same_policy_at_once_end_with_one_whole_folder(cache, monkeypatch)


def test_a_disk_that_fills_up_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "_make", full)
    with pytest.raises(ConfigError, match="No space left on device.*TOOLRL_CACHE"):
        ensure_tiny_policy(SMALL, quiet)
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOOLRL_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="TOOLRL_CACHE"):
        ensure_tiny_policy(SMALL, quiet)
