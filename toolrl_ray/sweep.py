"""A study: seeds of a recipe, and of each variant of it. What runs there are, what each is told, and how far each is.

A study's folder holds `study.json` (what was asked for) and for every run NAME its run folder NAME/ and its output NAME.log.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from toolrl_ray import recipe as recipes
from toolrl_ray.checkpoint import committed_steps
from toolrl_ray.config import RunConfig
from toolrl_ray.errors import ConfigError, UserError

MAX_TAG = 64  # characters, of W&B
MAX_NAME = 100  # of a folder


class State(StrEnum):
    """How far a run is, by what lies in the study's folder."""

    DONE = "done"  # its last evaluation is there
    RUNNING = "running"  # a process holds its log
    FAILED = "failed"  # begun and not done
    MISSING = "missing"


@dataclass(frozen=True)
class Study:
    """overrides: each key once, in the order in which they hold. grid: the values of each key that has several, as written on the
    command line. cwd: where relative paths in them begin. settings: what the recipe's file said when the study began; None is unknown."""

    recipe: str
    overrides: list[str]
    grid: dict[str, list[str]]
    seeds: list[int]
    cwd: str
    settings: dict[str, Any] | None = None


@dataclass(frozen=True)
class PlannedRun:
    """variant: what sets it apart from the study's other runs of the same seed. overrides: all that `toolrl train` is told."""

    index: int
    name: str
    variant: str
    seed: int
    overrides: list[str]
    config: RunConfig


def make_study(recipe: str, overrides: list[str], seeds: list[int]) -> Study:
    """overrides: key.path=value, or key.path=v1,v2 for a variant of each. Raises ConfigError for what no study can have."""
    values: dict[str, list[str]] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r} is not of the form key.path=value or key.path=v1,v2")
        if key in ("seed", "run_dir"):
            remedy = "--seeds gives the seeds of a study" if key == "seed" else "every run of a study has its own folder in --dir"
            raise ConfigError(f"{override}: {remedy}; take {key}=... away")
        values.pop(key, None)  # given again, it holds in its later place
        values[key] = split_values(text)
        if len(values[key]) > 1 and len(set(values[key])) < len(values[key]) or len(values[key]) > 1 and "" in values[key]:
            raise ConfigError(f"override {override!r} has an empty value, or one twice; give each once")
    path = str(Path(recipe).absolute()) if recipe.endswith((".yaml", ".yml")) else recipe
    told = [f"{key}={','.join(texts)}" for key, texts in values.items()]
    return Study(path, told, {key: texts for key, texts in values.items() if len(texts) > 1}, seeds, str(Path.cwd()), _settings(path))


def _settings(recipe: str) -> dict[str, Any]:
    return json.loads(json.dumps(recipes.read(recipe), default=str))  # as study.json will have them


def split_values(text: str) -> list[str]:
    """`text` at its commas, those inside of YAML's brackets, braces and quotes left alone."""
    values: list[str] = []
    pieces: list[str] = []
    for piece in text.split(","):
        pieces.append(piece)
        try:
            yaml.compose(",".join(pieces), yaml.SafeLoader)  # its form alone: what it says is the recipe's to judge
        except yaml.YAMLError:
            continue
        values.append(",".join(pieces))
        pieces = []
    return values + ([",".join(pieces)] if pieces else [])


def plan(study: Study, folder: Path) -> list[PlannedRun]:
    """The runs, all seeds of the first variant first. Raises ConfigError when the recipe refuses a variant."""
    runs: list[PlannedRun] = []
    names = _key_names(list(study.grid))
    variants = list(itertools.product(*([(key, text) for text in texts] for key, texts in study.grid.items())))
    for number, variant in enumerate(variants):
        texts = dict(override.split("=", 1) for override in study.overrides) | dict(variant)  # each value in its key's place
        overrides = [f"{key}={text}" for key, text in texts.items()]
        label = ", ".join(f"{names[key]}={text}" for key, text in variant)
        prefix = re.sub(r"[^A-Za-z0-9_.=+,-]+", "_", label.replace(", ", ","))
        if len(prefix) > MAX_NAME:
            prefix = f"variant-{number}"
        for seed in study.seeds:
            name = f"{prefix}-seed-{seed}" if prefix else f"seed-{seed}"
            if any(run.name == name for run in runs):
                name = f"variant-{number}-seed-{seed}"
            told = [*overrides, *_told(study, overrides, seed, folder), f"run_dir={_quoted(str(folder / name))}"]
            runs.append(PlannedRun(len(runs), name, label or Path(study.recipe).stem, seed, told, recipes.load(study.recipe, told)))
    return runs


def _told(study: Study, overrides: list[str], seed: int, folder: Path) -> Iterator[str]:
    """What depends on the seed and the study. The tiny policy is initialised and warm-started by the seed too, unless
    the recipe or the command sets bootstrap.seed."""
    config = recipes.load(study.recipe, overrides)
    yield f"seed={seed}"
    if config.policy.path == "tiny" and "seed" not in config.bootstrap.model_fields_set:
        yield f"bootstrap.seed={seed}"
    yield f"tracking.wandb_tags={_quoted([*config.tracking.wandb_tags, folder.name[:MAX_TAG]])}"


def _quoted(value: Any) -> str:
    """As YAML reads it: what is outside of the BMP as itself, since YAML takes JSON's pairs of escapes apart."""
    return json.dumps(value, ensure_ascii=False)


def _key_names(keys: list[str]) -> dict[str, str]:
    """The last part of each key, or the whole where two end alike."""
    count = Counter(key.rpartition(".")[2] for key in keys)
    return {key: last if count[last := key.rpartition(".")[2]] == 1 else key for key in keys}


def default_folder(recipe: str) -> Path:
    """Made here: of two studies that begin in one second, each has its own. Raises UserError where it cannot be made."""
    name = f"{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        Path("sweeps").mkdir(exist_ok=True)
        for n in itertools.count(1):
            folder = Path("sweeps", name if n == 1 else f"{name}-{n}")
            with suppress(FileExistsError):
                folder.mkdir()
                break
    except OSError as error:
        where = str(Path("sweeps").absolute())
        raise UserError(f"no folder for the study can be made in {where!r} ({error.strerror}); give another: --dir") from None
    return folder


def open_study(folder: Path) -> Study:
    """Of a folder that holds one. Raises UserError where it does not."""
    try:
        return Study(**json.loads((folder / "study.json").read_text()))
    except OSError as error:
        raise UserError(f"{str(folder)!r} is not the folder of a study: no study.json there ({error.strerror})") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{str(folder / 'study.json')!r} cannot be read as a study ({error}); start it anew in another folder") from None


def claim(study: Study, folder: Path) -> Study:
    """Make the study's folder, or go on in the one that it has. Raises UserError where another study or something else is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "study.json").exists() and any(folder.iterdir()):
            raise UserError(f"--dir={str(folder)!r} exists and holds no study; choose another folder")
        with (folder / "study.json").open("x") as file:
            file.write(json.dumps(asdict(study), indent=1) + "\n")
        return study
    except FileExistsError:
        pass
    except OSError as error:
        raise UserError(f"--dir={str(folder)!r} cannot be made ({error.strerror}); choose another folder") from None
    there = open_study(folder)
    for key in ("recipe", "grid", "seeds", "overrides"):
        if getattr(there, key) != getattr(study, key):
            raise UserError(
                f"--dir={str(folder)!r} is of another study: {key} {getattr(there, key)} there, {getattr(study, key)} here; "
                f"choose another folder, or go on with that study: toolrl sweep --resume {folder}"
            )
    return there


def check_recipe(study: Study, folder: Path) -> None:
    """Raises UserError when the recipe says something else than when the study began: its means would be of two configurations."""
    changed = [] if study.settings is None else list(recipes.differences(study.settings, _settings(study.recipe)))
    if changed:
        told = ", ".join(f"{key} was {before!r} and is {now!r}" for key, before, now in changed)
        raise UserError(
            f"the recipe {study.recipe!r} has changed since the study in {str(folder)!r} began: {told:.300}; undo that, or start another "
            "study in another folder"
        )


def state(folder: Path, run: PlannedRun) -> State:
    if "after" in evaluations(folder / run.name):
        return State.DONE
    log = folder / f"{run.name}.log"
    if is_held(log):
        return State.RUNNING
    return State.FAILED if log.exists() or (folder / run.name).exists() else State.MISSING


def evaluations(run_dir: Path) -> dict[str, Any]:
    """eval.json of a run folder; empty where it is missing, being written or damaged."""
    try:
        found = json.loads((run_dir / "eval.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and all(isinstance(result, dict) for result in found.values()) else {}


def is_held(log: Path) -> bool:
    """Whether a process runs whose output goes there: see `hold`."""
    try:
        with log.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # no log, or a file system without locks
    return False


def hold(file: Any) -> bool:
    """Lock a log for as long as it stays open here or in a child that writes to it; False where another has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def arguments(folder: Path, recipe: str, run: PlannedRun) -> list[str]:
    """What `toolrl train` is told. A run that left a checkpoint goes on from there; what another that did not finish has left gets
    another name: NAME.failed-1, NAME.failed-2, ... Raises UserError, and moves nothing, where a run lives in the folder."""
    if owner := _owner(folder / run.name):
        raise UserError(f"{str(folder / run.name)!r}: a run is under way there in {owner}; stop that first, or wait for its end")
    if committed_steps(folder / run.name):
        return ["--resume", str(folder / run.name)]
    if (folder / run.name).exists():
        free = next(n for n in itertools.count(1) if not (folder / f"{run.name}.failed-{n}").exists())
        (folder / run.name).rename(folder / f"{run.name}.failed-{free}")
    return [recipe, *run.overrides]


def _owner(run_dir: Path) -> str | None:
    """The process whose run lives in the folder: it holds the folder's lock, or is noted in it where there are no locks."""
    from toolrl_ray.run_dir import LOCK, _noted_owner  # which imports this module

    try:
        with (run_dir / LOCK).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another process"
            except OSError:
                return _noted_owner(run_dir, file)
    except OSError:
        pass  # no lock
    return None


def last_line(log: Path) -> str:
    """The last line that says something."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()[-50:]]
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line), "")[:300]
