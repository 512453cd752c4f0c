"""`ensure_tiny_policy`: the tiny policy's folder, made when it is not in the cache.

The cache key covers everything that shapes the result: the bootstrap settings, the few-shot prompt, the held-out tasks
that the warm start must not see, and the code itself. A folder is written aside and renamed whole, so that a folder under
its final name is complete; of two processes that make the same one, the first to finish wins. It holds the digests of its
files: one that has been damaged since is made again, and replaced only by a whole one.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from toolrl_ray.bootstrap.mixed import Mixed
from toolrl_ray.config import RunConfig
from toolrl_ray.config_task import TaskSource
from toolrl_ray.errors import ConfigError
from toolrl_ray.home import home
from toolrl_ray.pretrained import share_weights
from toolrl_ray.tasks.module import task_module

STALE_S = 6 * 3600
DIGESTS = "digests.json"
PACKAGE = Path(__file__).resolve().parents[1]
SHARED = ("build", "mixed", "model", "muon", "rows", "tokenizer", "warm_start")
# Task module -> the module of its demonstrations. A task of one's own is taken to be like the calculator's.
DEMONSTRATIONS = {f"toolrl_ray.tasks.{name}": f"toolrl_ray.bootstrap.{name}" for name in ("calculator", "triviaqa", "gsm8k")}
DEFAULT_DEMONSTRATIONS = "toolrl_ray.bootstrap.calculator"


def cache_dir() -> Path:
    """$TOOLRL_CACHE, or ~/.cache/toolrl. Raises ConfigError where there is neither."""
    if named := os.environ.get("TOOLRL_CACHE"):
        return Path(named).expanduser()
    if folder := home():
        return folder / ".cache" / "toolrl"
    raise ConfigError("there is no home folder for the cache; set HOME, or TOOLRL_CACHE to a folder")


def ensure_tiny_policy(config: RunConfig, log: Callable[[str], None] = print) -> Path:
    """Folder of the warm-started policy (Hugging Face layout); `log` gets progress lines while it is made.

    Raises ConfigError when the cache folder cannot be written.
    """
    shown = demonstrations_of(config)
    heldout = frozenset(shown.key(task) for task in task_module(config.task).load_tasks(config.task)[1])
    folder = cache_dir() / f"tiny-{_key(config, heldout)}"
    if _is_whole(folder):
        return folder
    if os.path.lexists(folder):
        log(f"the tiny policy in {folder} is damaged (not the files that were made); it is made again")
    log(f"making the tiny policy ({config.bootstrap.num_steps} steps of warm start): {folder}")
    started = time.monotonic()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.making-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        _make(config, heldout, aside, log)
        _write_digests(aside)
        aside.chmod(0o755)
        _rename(aside, folder)
    except OSError as error:
        raise _unwritable(folder, error) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # nothing is left there once it is renamed
    log(f"tiny policy ready after {time.monotonic() - started:.0f} s")
    return folder


def demonstrations_of(config: RunConfig) -> Any:
    """The module that warm-starts the tiny policy for the run's task; see rows.py for what it offers."""
    def module_of(task: TaskSource) -> ModuleType:
        return importlib.import_module(DEMONSTRATIONS.get(task.module, DEFAULT_DEMONSTRATIONS))

    if config.task.parts:
        return Mixed(config.task.parts, {name: module_of(part) for name, part in config.task.parts.items()})
    return module_of(config.task)


def _remove_stale(folder: Path) -> None:
    """What a process that was killed in mid-making left; one that still works there is younger."""
    for aside in folder.parent.glob(f"{folder.name}.making-*"):
        if time.time() - aside.stat().st_mtime > STALE_S:
            shutil.rmtree(aside, ignore_errors=True)


def _rename(aside: Path, folder: Path) -> None:
    """A damaged folder gives way. Renaming onto a whole one fails: another process has made the same policy meanwhile, which then
    serves. (Two that replace a damaged one in the same instant may both do so, each by a whole one.)"""
    if os.path.lexists(folder) and not _is_whole(folder):
        damaged = Path(tempfile.mkdtemp(prefix=f"{folder.name}.making-", dir=folder.parent))
        with suppress(FileNotFoundError):  # another process has just moved it away
            folder.rename(damaged / folder.name)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        aside.rename(folder)
    except OSError:
        if not _is_whole(folder):
            raise


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cache folder {str(folder.parent)!r} cannot be written ({error.strerror}); set TOOLRL_CACHE to one that can")


def _write_digests(folder: Path) -> None:
    digests = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    (folder / DIGESTS).write_text(json.dumps(digests, indent=1) + "\n")


def _is_whole(folder: Path) -> bool:
    """Every file is there and as it was made."""
    try:
        digests = json.loads((folder / DIGESTS).read_text())
        return all(_digest(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _make(config: RunConfig, heldout: frozenset[str], folder: Path, log: Callable[[str], None]) -> None:
    from transformers.utils.logging import disable_progress_bar

    from toolrl_ray.bootstrap.model import make_model
    from toolrl_ray.bootstrap.tokenizer import make_tokenizer, save_tokenizer
    from toolrl_ray.bootstrap.warm_start import warm_start

    disable_progress_bar()  # of the one file that is written
    settings = config.bootstrap
    shown = demonstrations_of(config)
    tokenizer = make_tokenizer(settings.max_context_tokens, shown.PIECES)
    model = make_model(settings, tokenizer)
    rows = shown.Demonstrations(settings.seed, settings.tool_share, config.task.few_shot, heldout)
    warm_start(model, tokenizer, rows, settings, log)
    model.save_pretrained(folder)
    share_weights(folder)
    save_tokenizer(tokenizer, folder)


def _key(config: RunConfig, heldout: frozenset[str]) -> str:
    digest = hashlib.sha256()
    parts = {name: [part.weight, part.few_shot] for name, part in config.task.parts.items()}
    settings = [config.bootstrap.model_dump(), config.task.few_shot, sorted(heldout)] + ([parts] if parts else [])
    digest.update(json.dumps(settings, sort_keys=True).encode())
    shown = demonstrations_of(config)
    modules = shown.BUILT_ON if isinstance(shown, Mixed) else (shown, *shown.BUILT_ON)
    sources = [*(PACKAGE / "bootstrap" / f"{name}.py" for name in SHARED), *(Path(module.__file__) for module in modules)]
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
