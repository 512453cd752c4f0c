"""Checkpoints: killed anywhere, a whole one remains; one that differs from its manifest in anything is never used."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolrl_ray import checkpoint
from toolrl_ray.checkpoint import CheckpointStore, committed_steps

FILES = ("manifest.json", "ranks/rank-0/optimizer.bin", "run.json", "weights.bin")


class Killed(BaseException):
    pass


def write(store: CheckpointStore, step: int, score: float | None = None, mark: str = "first") -> Path:
    folder = store.begin(step)
    assert list(folder.iterdir()) == []
    (folder / "ranks" / "rank-0").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(f"{step} {mark} ".encode() * 50)
    (folder / "ranks" / "rank-0" / "optimizer.bin").write_bytes(bytes([step % 256]) * 64)
    (folder / "run.json").write_text("{}")
    return store.commit(step, score)


def mark(folder: Path) -> tuple[int, str]:
    """What was written into a checkpoint: its step, and in which of several attempts."""
    step, word, *_ = (folder / "weights.bin").read_text().split()
    return int(step), word


def newest_step(run_dir: Path, said: list[str] | None = None) -> int | None:
    found = CheckpointStore(run_dir, 2, (said if said is not None else []).append).newest()
    return found and found[0]


def test_the_newest_is_the_last_that_was_committed_and_none_is_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    assert store.newest() is None and committed_steps(tmp_path) == []
    folder = write(store, 10, 0.5)
    assert (folder, store.newest()) == (tmp_path / "checkpoints" / "step-000010", (10, folder))
    write(store, 1_000_000)
    assert newest_step(tmp_path) == 1_000_000 and committed_steps(tmp_path) == [10, 1_000_000]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["score"], sorted(manifest["files"])) == (10, 0.5, sorted(FILES[1:]))
    assert manifest["files"]["weights.bin"]["size"] == (folder / "weights.bin").stat().st_size


def test_what_is_being_written_is_no_checkpoint_and_the_next_begin_removes_it(tmp_path: Path) -> None:
    write(CheckpointStore(tmp_path, 2), 1)
    for step in (2, 3):
        (CheckpointStore(tmp_path, 2).begin(step) / "half").write_text("x")
    assert newest_step(tmp_path) == 1
    assert list(CheckpointStore(tmp_path, 2).begin(3).iterdir()) == []
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [".step-000003.partial", "step-000001"]


def signed(folder: Path, **manifest: object) -> None:
    """A manifest whose own digest is right."""
    (folder / "manifest.json").write_text(checkpoint._manifest_text(manifest))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda folder: os.truncate(folder / "weights.bin", 7), "weights.bin has 7 bytes, not "),
    "longer": (lambda folder: (folder / "run.json").write_text("{}\n"), "run.json has 3 bytes, not 2"),
    "altered": (lambda folder: (folder / "run.json").write_text("[]"), "run.json has the sha256 4f53cda18c2b..., not 44136fa355b3..."),
    "missing": (lambda folder: (folder / "ranks/rank-0/optimizer.bin").unlink(), "ranks/rank-0/optimizer.bin is missing"),
    "added": (lambda folder: (folder / "ranks" / "rank-1.bin").touch(), "ranks/rank-1.bin is not in its manifest"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (lambda folder: os.truncate(folder / "manifest.json", 100), "manifest.json was altered or cut off"),
    "empty manifest": (lambda folder: os.truncate(folder / "manifest.json", 0), "manifest.json was altered or cut off"),
    "no object": (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json was altered or cut off"),
    "no text": (lambda folder: (folder / "manifest.json").write_bytes(b"\xff"), "manifest.json cannot be read"),
    "of another step": (lambda folder: shutil.copytree(folder.parent / "step-000001", folder, dirs_exist_ok=True), "is of step 1"),
    "too deep": (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "manifest.json was altered or cut off"),
    "a signed one without a step": (lambda folder: signed(folder, score=None, files={}), "manifest.json was altered or cut off"),
    "a signed one without files": (lambda folder: signed(folder, step=2, score=None), "manifest.json was altered or cut off"),
    "a signed one of no files": (lambda folder: signed(folder, step=2, score=None, files=None), "manifest.json was altered or cut off"),
    "a signed one of files of no size": (
        lambda folder: signed(folder, step=2, score=None, files={"run.json": 2}),
        "manifest.json was altered or cut off",
    ),
    "a signed one with a word as score": (
        lambda folder: signed(folder, step=2, score="best", files={}),
        "manifest.json was altered or cut off",
    ),
    "a file in its place": (lambda folder: (shutil.rmtree(folder), folder.write_text("x")), "manifest.json cannot be read"),
    "a link in its place": (lambda folder: (shutil.rmtree(folder), folder.symlink_to("no")), "manifest.json is missing"),
    "a link to nowhere": (
        lambda folder: ((folder / "run.json").unlink(), (folder / "run.json").symlink_to("no")),
        "run.json cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_that_differs_from_its_manifest_is_refused_by_name_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    spoil, told = DAMAGES[damage]
    store = CheckpointStore(tmp_path, 2)
    write(store, 1)
    folder = write(store, 2)
    spoil(folder)
    said: list[str] = []
    assert newest_step(tmp_path, said) == 1
    assert len(said) == 1 and said[0].startswith(f"checkpoint {folder} is refused: ") and told in said[0]
    store.rescore(2, 0.5)
    assert mark(write(store, 2, mark="again")) == (2, "again")  # the run comes to that step once more
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000001", "step-000002"] and newest_step(tmp_path) == 2


def test_a_link_to_a_checkpoint_is_one_and_goes_when_the_step_is_done_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    write(store, 1).rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoints" / "step-000001").symlink_to(tmp_path / "elsewhere")
    assert newest_step(tmp_path) == 1
    write(store, 1, mark="again")
    assert os.listdir(tmp_path / "checkpoints") == ["step-000001"] and mark(tmp_path / "elsewhere") == (1, "first")


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(FILES), at=st.integers(0), change=st.integers(1, 255))
def test_any_single_byte_that_differs_is_noticed(name: str, at: int, change: int) -> None:
    with tempfile.TemporaryDirectory() as run_dir:
        path = write(CheckpointStore(Path(run_dir), 1), 3, 0.25) / name
        content = bytearray(path.read_bytes())
        content[at % len(content)] ^= change
        path.write_bytes(content)
        said: list[str] = []
        assert newest_step(Path(run_dir), said) is None and name in said[0]


def test_the_newest_few_stay_and_the_best_besides(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    stays = []
    for step, score in enumerate([0.1, 0.9, None, 0.3, float("nan"), 0.9, 0.2, 0.4], start=1):
        write(store, step, score)
        stays.append(committed_steps(tmp_path))
    assert stays == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7], [6, 7, 8]]
    assert not [name for name in os.listdir(tmp_path / "checkpoints") if name.startswith(".")]


def test_a_score_that_is_known_later_counts_and_whenever_the_process_ends_the_checkpoint_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, 1)
    write(store, 1, 0.5)
    write(store, 2)

    def end(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", end)
        with pytest.raises(Killed):
            store.rescore(2, 0.9)
    assert newest_step(tmp_path) == 2
    store.rescore(2, 0.9)
    store.rescore(7, 0.99)
    assert newest_step(tmp_path) == 2
    write(store, 3)
    assert committed_steps(tmp_path) == [2, 3]  # the best, and the newest
    assert not list((tmp_path / "checkpoints").glob(".step*"))


def test_without_scores_only_the_newest_stay(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(CheckpointStore(tmp_path, 1), step)
    assert committed_steps(tmp_path) == [15]


def test_a_refused_one_takes_no_place_among_those_that_stay_however_good_it_was(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2, lambda line: None)
    write(store, 10, 0.1)
    os.truncate(write(store, 20, 0.9) / "weights.bin", 0)
    assert store.newest() == (10, tmp_path / "checkpoints" / "step-000010")
    write(store, 25, 0.2)
    assert committed_steps(tmp_path) == [10, 25]


def test_a_refused_one_that_is_done_again_stays(tmp_path: Path) -> None:
    for step in (1, 2):
        write(CheckpointStore(tmp_path, 2), step)
    (tmp_path / "checkpoints" / "step-000002" / "run.json").write_text("{ }")
    store = CheckpointStore(tmp_path, 1)
    assert store.newest() == (1, tmp_path / "checkpoints" / "step-000001")
    write(store, 2, mark="second")
    assert committed_steps(tmp_path) == [2] and newest_step(tmp_path) == 2


def test_a_checkpoint_that_a_kill_left_aside_is_back_before_another_is_begun(tmp_path: Path) -> None:
    folder = write(CheckpointStore(tmp_path, 2), 4)
    folder.rename(folder.with_name(".step-000004.replaced"))
    CheckpointStore(tmp_path, 2).begin(5)
    assert committed_steps(tmp_path) == [4] and newest_step(tmp_path) == 4


def test_a_run_that_went_back_forgets_what_came_later_once_it_has_a_new_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1, lambda line: None)
    write(store, 20, 0.9)
    (tmp_path / "checkpoints" / "step-000020" / "manifest.json").unlink()
    store = CheckpointStore(tmp_path, 1, lambda line: None)
    store.begin(15)
    assert committed_steps(tmp_path) == [20]
    write(store, 15)
    assert committed_steps(tmp_path) == [15]


def test_what_a_kill_left_goes_without_another_commit_too(tmp_path: Path) -> None:
    for step, score in enumerate([0.9, 0.1, 0.2, 0.3], start=1):
        write(CheckpointStore(tmp_path, 9), step, score)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-000004", folder / ".step-000004.partial")
    (folder / "step-000002").rename(folder / ".step-000002.removed")
    (folder / "step-000004").rename(folder / ".step-000004.replaced")
    for _ in range(2):
        CheckpointStore(tmp_path, 1).clear(4)
        assert sorted(os.listdir(folder)) == ["step-000001", "step-000004"]
    CheckpointStore(tmp_path / "none", 1).clear(4)
    assert not (tmp_path / "none").exists()


def test_a_step_that_is_done_again_replaces_the_checkpoint_of_that_step(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    write(store, 4, 0.5)
    folder = write(store, 4, 0.25, "second")
    assert mark(folder) == (4, "second") and store.newest() == (4, folder)
    assert os.listdir(tmp_path / "checkpoints") == ["step-000004"]


class KilledAt:
    """Ends the process, so to speak, at the n-th of the calls that change what lies on the disk: before it, after it, or in the middle of
    removing a folder."""

    def __init__(self, patch: pytest.MonkeyPatch, countdown: int, done: bool):
        self.countdown, self.done = countdown, done
        for module, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree")):
            patch.setattr(module, name, self.call(name, getattr(module, name)))

    def call(self, name: str, real: Callable) -> Callable:
        def called(*arguments: object, **keywords: object) -> None:
            self.countdown -= 1
            if self.countdown:
                real(*arguments, **keywords)
                return
            if self.done:
                real(*arguments, **keywords)
            elif name == "rmtree":
                next(path for path in Path(arguments[0]).rglob("*") if path.is_file()).unlink()
            raise Killed

        return called


@pytest.mark.parametrize("done", [False, True], ids=["before-the-call", "after-the-call"])
@pytest.mark.parametrize("keep_last", [1, 2])
@pytest.mark.parametrize("step", [2, 3], ids=["same-step-again", "next-step"])
def test_killed_at_any_call_of_a_commit_the_old_or_the_new_checkpoint_is_whole_and_the_run_goes_on(
    tmp_path: Path, step: int, keep_last: int, done: bool
) -> None:
    for at in range(1, 100):
        run_dir = tmp_path / str(at)
        store = CheckpointStore(run_dir, keep_last)
        run_dir.mkdir()
        write(store, 1, 0.1)
        write(store, 2, 0.2)
        with pytest.MonkeyPatch.context() as patch:
            kill = KilledAt(patch, at, done)
            try:
                write(store, step, 0.3, "second")
            except Killed:
                pass
            else:
                break
        assert kill.countdown == 0
        said: list[str] = []
        after = CheckpointStore(run_dir, keep_last, said.append)
        found, folder = after.newest()
        for committed in committed_steps(run_dir):
            assert all((run_dir / "checkpoints" / f"step-{committed:06d}" / name).exists() for name in FILES)
        assert mark(folder) in {(2, "first"), (step, "second")} and found == mark(folder)[0] and said == []
        assert mark(write(after, found + 1, 0.4, "third")) == (found + 1, "third")
        assert committed_steps(run_dir)[-keep_last:] == list(range(found + 2 - keep_last, found + 2))
        assert not [name for name in os.listdir(run_dir / "checkpoints") if name.startswith(".")]
    assert at > 10  # files, folders, names and what is pruned
