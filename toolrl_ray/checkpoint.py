"""Checkpoints of a run on disk, RUN_DIR/checkpoints/step-000012: written aside, sealed by a manifest, then renamed.

Invariant: whenever the process is killed, every folder that was committed and not pruned is found whole by the next `newest`; what was
being written is not found at all. Pure files: what lies in a checkpoint is the business of those who write it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
PATTERN = re.compile(r"step-(\d{6,})")


def committed_steps(run_dir: Path) -> list[int]:
    """The steps of the committed checkpoints of a run, oldest first, by their names alone."""
    folder = run_dir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := PATTERN.fullmatch(name)))


class CheckpointStore:
    """The checkpoints of one run, written one at a time by the process that owns the run folder.

    keep_last: so many of the newest stay, and besides them the one with the best score. say: told of every checkpoint that is refused.
    """

    def __init__(self, run_dir: Path, keep_last: int, say: Callable[[str], None] = print):
        self._run_dir = run_dir
        self._folder = run_dir / "checkpoints"
        self._keep_last = keep_last
        self._say = say
        self._refused: set[int] = set()

    def begin(self, step: int) -> Path:
        """An empty folder for the checkpoint of `step`; whatever a killed run left half-done is removed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        _sync(self._run_dir)
        self._clear()
        partial = self._partial(step)
        partial.mkdir()
        return partial

    def commit(self, step: int, score: float | None) -> Path:
        """The folder that `begin` gave, complete and on the disk, under its final name. score: higher is better; None or NaN: unknown.

        It takes the place of an older checkpoint of that step. Those of later steps go: the run went back behind them.
        """
        partial, final = self._partial(step), self._final(step)
        _seal(partial, step, score)
        if os.path.lexists(final):
            os.replace(final, replaced := self._folder / f".{final.name}.replaced")
            os.replace(partial, final)
            _sync(self._folder)
            remove(replaced)
        else:
            os.replace(partial, final)
            _sync(self._folder)
        self._refused.discard(step)
        self._prune(step)
        return final

    def rescore(self, step: int, score: float) -> None:
        """The score of a checkpoint that was committed before it was known. Of a step that has none, or a damaged one, nothing."""
        final, aside = self._final(step), self._folder / f".step-{step:06d}.manifest"
        if (manifest := _manifest_in(final)) is None:
            return
        aside.write_text(_manifest_text(manifest | {"score": _known(score)}))
        _sync(aside)
        os.replace(aside, final / MANIFEST)
        _sync(final)

    def clear(self, step: int) -> None:
        """For a run that ends at this step: removes what a kill in its last `commit` left, and the former best where another one is now."""
        self._clear()
        self._prune(step)

    def newest(self) -> tuple[int, Path] | None:
        """The newest whole checkpoint, every byte of it compared with its manifest; None when there is none."""
        self._put_back()
        for step in reversed(committed_steps(self._run_dir)):
            fault = _fault(self._final(step), step)
            if fault is None:
                return step, self._final(step)
            self._refused.add(step)
            self._say(f"checkpoint {self._final(step)} is refused: {fault}")
        return None

    def _final(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"

    def _partial(self, step: int) -> Path:
        return self._folder / f".step-{step:06d}.partial"

    def _put_back(self) -> None:
        """A checkpoint that was about to be replaced when the run was killed keeps its name."""
        for replaced in self._folder.glob(".step-*.replaced"):
            final = self._folder / replaced.name.removeprefix(".").removesuffix(".replaced")
            if not os.path.lexists(final):
                os.replace(replaced, final)

    def _clear(self) -> None:
        self._put_back()
        for left in self._folder.glob(".step-*"):
            remove(left)

    def _prune(self, committed: int) -> None:
        steps = committed_steps(self._run_dir)
        sound = [step for step in steps if step <= committed and step not in self._refused]
        scores = {step: score for step in sound if (score := _score(self._final(step))) is not None}
        kept = {*sound[-self._keep_last :], *sorted(scores, key=lambda step: (scores[step], step))[-1:]}
        for step in steps:
            if step not in kept:
                os.replace(self._final(step), removed := self._folder / f".step-{step:06d}.removed")  # at once, whatever happens then
                remove(removed)


def _seal(folder: Path, step: int, score: float | None) -> None:
    """Writes the manifest, and waits until all of the folder is on the disk."""
    files = {}
    for name, path in _files(folder).items():
        files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
        _sync(path)
    (folder / MANIFEST).write_text(_manifest_text({"step": step, "score": _known(score), "files": files}))
    _sync(folder / MANIFEST)
    for inner in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _sync(inner)


def _known(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None


def _fault(folder: Path, step: int) -> str | None:
    """The first difference between a checkpoint and its manifest, or None."""
    try:
        text = (folder / MANIFEST).read_text()
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, UnicodeDecodeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if (manifest := _manifest(text)) is None:
        return f"{MANIFEST} was altered or cut off"
    if manifest["step"] != step:
        return f"{MANIFEST} is of step {manifest['step']}"
    try:
        return _first_difference(_files(folder), manifest["files"])
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"


def _first_difference(found: dict[str, Path], files: dict[str, Any]) -> str | None:
    if missing := sorted(files.keys() - found.keys()):
        return f"{missing[0]} is missing"
    if added := sorted(found.keys() - files.keys()):
        return f"{added[0]} is not in its manifest"
    for name, path in found.items():
        if (size := path.stat().st_size) != files[name]["size"]:
            return f"{name} has {size} bytes, not {files[name]['size']}"
    for name, path in found.items():
        if (digest := _sha256(path)) != files[name]["sha256"]:
            return f"{name} has the sha256 {digest[:12]}..., not {files[name]['sha256'][:12]}..."
    return None


def _manifest(text: str) -> dict[str, Any] | None:
    """Of the file's text; None where it is not as `_seal` or `rescore` wrote it."""
    try:
        manifest = json.loads(text)
        step, score, files = manifest["step"], manifest["score"], manifest["files"].values()
        is_ours = isinstance(step, int) and isinstance(score, float | int | None)
        is_ours &= all(isinstance(file["size"], int) and isinstance(file["sha256"], str) for file in files)
        return manifest if is_ours and text == _manifest_text(manifest) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _manifest_in(folder: Path) -> dict[str, Any] | None:
    try:
        return _manifest((folder / MANIFEST).read_text())
    except (OSError, UnicodeDecodeError):
        return None


def _manifest_text(manifest: dict[str, Any]) -> str:
    """One line per file, for people, and at the end a digest of the rest, so that the manifest vouches for itself too."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}, indent=1) + "\n"


def _score(folder: Path) -> float | None:
    manifest = _manifest_in(folder)
    return manifest and _known(manifest["score"])


def _files(folder: Path) -> dict[str, Path]:
    """Every file below the folder but its manifest, by its path in it."""
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir())
    return {name: path for path in paths if (name := path.relative_to(folder).as_posix()) != MANIFEST}


def remove(path: Path) -> None:
    """A file or folder, as far as it goes: on NFS a file that is still open somewhere stays, which must not end a run. The next `begin`,
    `clear` or resume tries again."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # reads in blocks


def _sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
