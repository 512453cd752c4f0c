"""What a run began from that no checkpoint holds: the initial policy, which is also the reference of the KL, the tasks that it is measured
by, and a person's own task modules. Digests show a resumed run that they are others now. (Those of the training tasks are the stream's.)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from toolrl_ray.config import RunConfig
from toolrl_ray.errors import UserError
from toolrl_ray.tasks.stream import digest
from toolrl_ray.types import Task
from tools_service.loading import load_module

WEIGHTS = (".safetensors", ".bin")
POLICY, HELDOUT = "policy.path", "heldout"
PART_BYTES = 2**20  # of a file of weights, from its beginning, middle and end: all of a large model would take minutes


def of_policy(policy_dir: str) -> dict[str, str]:
    """By its key, of the folder or Hub name that is loaded; {} where there are no weights here, as where only other nodes have them."""
    folder = Path(policy_dir) if os.path.isdir(policy_dir) else _hub_snapshot(policy_dir)
    paths = sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS and path.is_file()) if folder else []
    if not paths:
        return {}
    whole = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        whole.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in (0, (size - PART_BYTES) // 2, size - PART_BYTES):
                file.seek(max(0, start))
                whole.update(file.read(PART_BYTES))
    return {POLICY: whole.hexdigest()}


def _hub_snapshot(name: str) -> Path | None:
    """Where the files of a Hub name that were loaded last lie, by the local cache alone."""
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(name, "config.json")
    except ValueError:  # it is none, but a folder that has gone
        return None
    return Path(path).parent if isinstance(path, str) else None


def of_task_modules(config: RunConfig) -> dict[str, str]:
    """By their keys; without those that come with the project, which a new version of it may change."""
    sources = {"task": config.task} | {f"task.parts.{name}": part for name, part in config.task.parts.items()}
    own = {key: source.module for key, source in sources.items() if not source.module.startswith("toolrl_ray.")}
    files = {f"{key}.module": load_module(module).__file__ for key, module in own.items()}
    return {key: hashlib.sha256(Path(file).read_bytes()).hexdigest() for key, file in files.items() if file}


def of_heldout(tasks: Iterable[Task]) -> dict[str, str]:
    """By its key."""
    return {HELDOUT: digest(tasks)}


def check(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises UserError for what both know and is not the same."""
    for key, known in before.items():
        if now.get(key, known) == known:
            continue
        if key == HELDOUT:
            raise UserError(
                "the held-out tasks are not those that the run began with (task.*), so its evaluations would not be of the same problems; "
                "bring the files of the tasks back as they were, or start a new run"
            )
        raise UserError(
            f"the files of {key} are not those that the run began with, so it would learn something else from here on; bring them back "
            "as they were, or start a new run"
        )
