from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from toolrl_ray import recipe
from toolrl_ray.errors import UserError
from toolrl_ray.run_dir import claim, release


def config(run_dir: Path | None):
    return recipe.load("calculator", [f"run_dir={run_dir}"] if run_dir else [])


def test_a_claimed_folder_holds_the_resolved_configuration(tmp_path: Path) -> None:
    run_dir = claim(config(tmp_path / "runs" / "a"))
    assert recipe.load(str(run_dir / "config.yaml")) == config(tmp_path / "runs" / "a")


def test_the_default_folder_is_named_after_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = claim(config(None))
    assert run_dir.parent == tmp_path / "runs" and run_dir.name.startswith("calculator-")


def test_of_runs_that_want_one_folder_at_once_exactly_one_gets_it(tmp_path: Path) -> None:
    together = threading.Barrier(8)
    wanted = config(tmp_path / "run")

    def attempt(_: int) -> str:
        together.wait(timeout=30)
        try:
            return str(claim(wanted))
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(attempt, range(8)))
    assert results.count(str(tmp_path / "run")) == 1
    assert sum("exists and is not empty" in result for result in results) == 7


def test_a_folder_with_anything_in_it_is_refused_and_an_empty_one_taken(tmp_path: Path) -> None:
    assert claim(config(tmp_path)) == tmp_path
    with pytest.raises(UserError, match="exists and is not empty; choose another folder"):
        claim(config(tmp_path))


def test_a_place_where_no_folder_can_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        claim(config(tmp_path / "file" / "run"))
    with pytest.raises(UserError, match="choose another folder"):
        claim(config(tmp_path / "file"))


def test_what_ended_before_its_first_step_gives_the_folder_back(tmp_path: Path) -> None:
    for content in (None, ""):
        run_dir = claim(config(tmp_path / "run"))
        if content is not None:
            (run_dir / "metrics.jsonl").write_text(content)
        release(run_dir)
        assert not run_dir.exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "policy"])
def test_what_was_trained_stays(tmp_path: Path, name: str) -> None:
    run_dir = claim(config(tmp_path / "run"))
    (run_dir / name).write_text('{"step":1}\n')
    release(run_dir)
    assert (run_dir / name).exists() and (run_dir / "config.yaml").exists()
