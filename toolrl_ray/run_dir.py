"""The run folder: one process's alone, from its first moment on, and again when its run is resumed."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import mmap
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import msgspec
import psutil

from toolrl_ray.checkpoint import committed_steps, remove
from toolrl_ray.config import RunConfig
from toolrl_ray.errors import ConfigError, UserError
from toolrl_ray.recipe import differences, dump, load
from toolrl_ray.sweep import evaluations

log = logging.getLogger(__name__)
LOCK = ".lock"
FILES = ("metrics.jsonl", "trajectories.jsonl", "eval.json")
MAY_DIFFER = re.compile(  # in a resumed run: where and how fast it runs, how long, and what it tells, but not what it learns
    r"\w+\.(\w+_)?(timeout|deadline)_s"
    r"|learner\.(zero_stage|num_ranks|num_cpus|num_gpus|num_threads|max_microbatch_tokens|gradient_checkpointing)"
    r"|rollout\.(num_actors|max_actors|num_cpus|num_gpus|kv_cache_gib|gpu_memory_utilization|num_threads|max_tries)"
    r"|(rollout|eval|tools)\.max_in_flight"
    r"|tools\.(num_replicas|num_cpus|app|pools\..+)"
    r"|weights\.backend"
    r"|(checkpoint|tracking)\.\w+"
    r"|train\.(num_steps|max_learner_restarts)"
)
NO_CHECKPOINT = "the run has no checkpoint to go on from, and starting again there would lose its results; start a new run"

_held: dict[Path, IO[str]] = {}  # the locks of this process, which end with it at the latest


def claim(config: RunConfig) -> Path:
    """Make the folder run_dir (default runs/RECIPE-TIME) with its config.yaml. Of two runs that want the same one, one gets it.

    Raises UserError when it holds anything, or cannot be made.
    """
    run_dir = Path(config.run_dir or _free_name(f"runs/{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")).expanduser().absolute()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if any(run_dir.iterdir()):
            raise FileExistsError
        _lock(run_dir, "x+")  # exclusive: this is what claims it
        write_whole(run_dir / "config.yaml", dump(config))
    except FileExistsError:
        raise UserError(f"run_dir={str(run_dir)!r} exists and is not empty; choose another folder (run_dir=...) or remove it") from None
    except (OSError, ValueError) as error:  # the latter of a name with a NUL character, or one that is no text
        if run_dir in _held:
            unlock(run_dir)
            release(run_dir)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"run_dir={str(run_dir)!r} cannot be made ({reason}); choose another folder (run_dir=...)") from None
    return run_dir


def _free_name(name: str) -> str:
    """Itself, or with a number behind it: runs may begin in the same second."""
    return next(free for n in itertools.count(1) if not os.path.exists(free := name if n == 1 else f"{name}-{n}"))


def reopen(run_dir: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Take the folder of a run that was interrupted; its saved configuration with the overrides on top, and this folder as run_dir.

    Raises UserError when it is no run's folder, another process has it, the run is finished, or has results and no checkpoint where it
    must have one, or an override changes what it learns.
    """
    run_dir = run_dir.expanduser().absolute()
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"--resume {str(run_dir)!r}: no config.yaml there; give the folder of a run")
    for name, is_right in (*((name, Path.is_file) for name in FILES), ("checkpoints", Path.is_dir)):
        if (path := run_dir / name).exists() and not is_right(path):
            raise UserError(f"--resume {str(run_dir)!r}: {path} is {'no file' if name in FILES else 'no folder'}; move it away")
    try:
        owner = _lock(run_dir, "a+")
    except OSError as error:
        raise UserError(f"--resume {str(run_dir)!r}: the folder cannot be written ({error.strerror})") from None
    if owner is not None:
        raise UserError(f"--resume {str(run_dir)!r}: the run is under way in {owner}; stop that first")
    try:
        saved, config = _resumed(run_dir, overrides)
        if finished(run_dir) and config.train.num_steps <= (num_steps := evaluations(run_dir)["after"].get("step", 0)):
            remedy = f"to go on longer set train.num_steps above {num_steps}" if committed_steps(run_dir) else "start a new run"
            raise UserError(f"--resume {str(run_dir)!r}: the run is finished; {remedy}")
        if finished(run_dir) and has_trained(run_dir) and not committed_steps(run_dir):
            raise UserError(f"--resume {str(run_dir)!r}: {NO_CHECKPOINT}")
        if (newest := max(committed_steps(run_dir), default=0)) > (num_steps := config.train.num_steps):
            raise UserError(f"--resume {str(run_dir)!r}: train.num_steps={num_steps} is less than the {newest} of its newest checkpoint")
        if lost := lost_without_checkpoint(run_dir, saved):
            raise UserError(f"--resume {str(run_dir)!r}: {lost}")
    except BaseException:
        unlock(run_dir)
        raise
    return config


def has_checkpoint(config: RunConfig, step: int) -> bool:
    """Of a step that a run finishes: those that are evaluated have one too, so that the best of them can stay."""
    every, evaluated = config.checkpoint.every_steps, config.eval.every_steps
    return bool(every) and (step == config.train.num_steps or any(n and step % n == 0 for n in (every, evaluated)))


def lost_without_checkpoint(run_dir: Path, config: RunConfig) -> str:
    """Why a run must not begin again, where its rows show that it has come further than it would without any checkpoint: it takes none, or
    those that it had are gone. "" where it may. config: that by which the rows were written."""
    if not has_trained(run_dir) or committed_steps(run_dir):
        return ""
    if not config.checkpoint.every_steps:
        return NO_CHECKPOINT
    last = last_step(run_dir)
    if any(has_checkpoint(config, step) for step in range(1, last)):  # each is whole before the row of the step after it
        return f"the run got to step {last} and had checkpoints, which are gone; bring {run_dir / 'checkpoints'} back, or start a new run"
    return ""


def finished(run_dir: Path) -> bool:
    """Whether the run got to its end: its last act is the evaluation of the policy that it saved."""
    return (run_dir / "policy").is_dir() and "after" in evaluations(run_dir)


def release(run_dir: Path) -> None:
    """Remove the folder of a run that ended before its first step, so that the same command can be given again."""
    if not has_trained(run_dir) and not committed_steps(run_dir) and not (run_dir / "policy").exists():
        shutil.rmtree(run_dir, ignore_errors=True)


def has_trained(run_dir: Path) -> bool:
    """Whether a step was finished."""
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


def last_step(run_dir: Path) -> int:
    """Of the metrics; 0 without any. Raises UserError where its last whole row is damaged."""
    with (run_dir / "metrics.jsonl").open("rb") as file:
        return next((step for _, step in _rows_from_end(file)), 0)


def unlock(run_dir: Path) -> None:
    """Another may take the folder that `claim` or `reopen` took. Safe to call twice."""
    if file := _held.pop(run_dir, None):
        with suppress(OSError):
            file.truncate(0)  # where there are no locks, this is what gives the folder back
        file.close()


def truncate_to(run_dir: Path, step: int) -> None:
    """Forget what the run wrote after `step`, and an evaluation `after`. Whenever it is killed, calling it again completes it.

    Raises UserError, before anything has changed, when what goes is damaged elsewhere than in a last line that was never finished, or
    `eval.json` is.
    """
    ends = {path: _end_of(path, step) for name in ("metrics.jsonl", "trajectories.jsonl") if (path := run_dir / name).exists()}
    found = _evaluations(run_dir)
    if (replaced := run_dir / ".policy.replaced").exists() and not (run_dir / "policy").exists():
        replaced.rename(run_dir / "policy")  # as learner/export.py had it until then
    for left in (*run_dir.glob("*.writing"), replaced):
        remove(left)
    for path, end in ends.items():
        _cut(path, end)
    kept = {label: result for label, result in found.items() if result["step"] <= step and label != "after"}
    if kept != found:
        write_whole(run_dir / "eval.json", json.dumps(kept, indent=1) + "\n")
    for folder in (run_dir / "eval").glob("*"):
        if folder.name not in kept and folder.is_dir():
            shutil.rmtree(folder)


def lacking(run_dir: Path, num_bytes: Mapping[str, int]) -> Iterator[str]:
    """A line for each of these files that holds less than so many bytes."""
    for name, wanted in num_bytes.items():
        path = run_dir / name
        if (found := path.stat().st_size if path.exists() else 0) < wanted:
            yield f"{path} has {found} bytes of the {wanted} that it had at this step: the machine has lost rows of it"


def write_whole(path: Path, text: str) -> None:
    """Replace a file by another that is on the disk in full: whoever reads it, after a kill too, finds the old or the new one.
    Raises OSError, and leaves nothing behind then."""
    aside = path.with_name(f"{path.name}.writing")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _lock(run_dir: Path, mode: str) -> str | None:
    """Take the folder for as long as this process lives, or until `unlock`; None, or who has it."""
    file = (run_dir / LOCK).open(mode)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            return file.read().strip() or "another process"
    except OSError:  # a file system without locks
        if (owner := _noted_owner(run_dir, file)) is not None:
            file.close()
            return owner
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    _held[run_dir] = file
    return None


def _noted_owner(run_dir: Path, file: IO[str]) -> str | None:
    """The process of this machine that the lock's file names, while it lives. Of one elsewhere nothing can be known, which is said."""
    file.seek(0)
    match = re.fullmatch(r"process (\d+) on (.+)", note := file.read().strip())
    if match is None:
        return None
    if match[2] != platform.node():
        log.warning(
            "%s was last taken by %s; whether that still runs cannot be known here, since the file system has no locks", run_dir, note
        )
        return None
    pid = int(match[1])
    is_gone = not psutil.pid_exists(pid) or (pid == os.getpid() and run_dir not in _held)  # in a container numbers come again
    return None if is_gone else f"{note} (if that is another program, remove {run_dir / LOCK})"


def _resumed(run_dir: Path, overrides: Sequence[str]) -> tuple[RunConfig, RunConfig]:
    """The saved configuration, and that with the overrides."""
    source, here = str(run_dir / "config.yaml"), f"run_dir={json.dumps(str(run_dir), ensure_ascii=False)}"
    try:
        saved = load(source, [here])
    except ConfigError as error:
        raise ConfigError(f"{source} is damaged, or of another version: {error}") from None
    config = load(source, [here, *overrides])
    for key, before, now in differences(saved.model_dump(mode="json"), config.model_dump(mode="json")):
        if not MAY_DIFFER.fullmatch(key):
            raise ConfigError(f"{key}={now!r} contradicts the run in {str(run_dir)!r}, which has {before!r}; a new run can have it")
    return saved, config


class _Row(msgspec.Struct):
    step: int


def _cut(path: Path, end: int) -> None:
    """In place, so that it needs no room on the disk."""
    with path.open("rb+") as file:
        file.truncate(end)
        os.fsync(file.fileno())


def _end_of(path: Path, step: int) -> int:
    """Where the last whole row of a step up to `step` ends. Rows are in the order of their steps: only those that go are read."""
    with path.open("rb") as file:
        return next((end for end, found in _rows_from_end(file) if found <= step), 0)


def _rows_from_end(file: BufferedReader) -> Iterator[tuple[int, int]]:
    """(where it ends, its step) of every whole row, the last one first."""
    if not os.fstat(file.fileno()).st_size:
        return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as text:  # a private map, which every file system allows
        end = text.rfind(b"\n") + 1
        while end:
            start = text.rfind(b"\n", 0, end - 1) + 1
            try:
                step = msgspec.json.decode(text[start:end], type=_Row).step
            except msgspec.DecodeError:
                number = next(number for number, _ in enumerate(file, start=1) if file.tell() > start)
                raise UserError(f"{file.name}, line {number}, is damaged; take it out and give the command again") from None
            yield end, step
            end = start


def _evaluations(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "eval.json"
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
        if all(isinstance(result["step"], int) for result in found.values()):
            return found
        raise TypeError
    except (ValueError, AttributeError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; mend it, or remove it and with it the evaluations so far") from None
