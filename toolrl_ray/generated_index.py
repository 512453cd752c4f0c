"""The index of the tiny search recipe's invented world: made on this machine at the first run, then cached, as the tiny policy is.

`tools.options.Wiki.index=generated` stands for it. On several machines TOOLRL_CACHE has to be a folder that all of them see.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from toolrl_ray.bootstrap.build import cache_dir
from toolrl_ray.config import RunConfig
from toolrl_ray.errors import ConfigError, UserError
from toolrl_ray.tasks import facts, triviaqa

GENERATED = "generated"
BUILD_TIMEOUT_S = 300.0


def resolved(config: RunConfig, log: Callable[[str], None]) -> RunConfig:
    """The configuration with the folder of the index in place of `generated`; the index is made when it is not in the cache.

    Raises ConfigError where no task asks about an invented world, or several ask about different ones, UserError where the index cannot
    be made.
    """
    options = config.tools.options.get(triviaqa.TOOL, {})
    if options.get("index") != GENERATED:
        return config
    asked = [config.task] if not config.task.parts else list(config.task.parts.values())
    seeds = sorted({task.seed for task in asked if task.module == triviaqa.__name__ and task.source == "generated"})
    if not seeds:
        raise ConfigError(
            f"tools.options.{triviaqa.TOOL}.index={GENERATED!r} contradicts the task, which asks about no generated world; give the folder "
            "of an index, or set task.source=generated"
        )
    if len(seeds) > 1:
        raise ConfigError(
            f"the seeds {', '.join(map(str, seeds))} of task.parts contradict tools.options.{triviaqa.TOOL}.index={GENERATED!r}, which is "
            "of one generated world; give the parts that search one seed"
        )
    own = {**options, "index": str(_ensure(seeds[0], log))}
    tools = config.tools.model_copy(update={"options": {**config.tools.options, triviaqa.TOOL: own}})
    return config.model_copy(update={"tools": tools})


def _ensure(seed: int, log: Callable[[str], None]) -> Path:
    lines = "".join(json.dumps({"id": f"person-{i}", "text": person.passage}) + "\n" for i, person in enumerate(facts.world(seed)))
    folder = cache_dir() / f"facts-{hashlib.sha256(lines.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    log(f"indexing {facts.NUM_PEOPLE} passages of the generated world: {folder}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.making-", dir=folder.parent) as aside:
            _build(lines, Path(aside))
            try:
                (Path(aside) / "index").rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process made it meanwhile
                    raise
    except OSError as error:
        raise ConfigError(
            f"cache folder {str(folder.parent)!r} cannot be written ({error.strerror}); set TOOLRL_CACHE to one that can"
        ) from None
    return folder


def _build(lines: str, aside: Path) -> None:
    """Into aside/index, in a process of its own: a JVM that starts in this one takes the signal handlers that Ray needs after it."""
    corpus = aside / "facts.jsonl"
    corpus.write_text(lines)
    command = [sys.executable, "-m", "toolrl_ray.cli", "index", "build", str(corpus), str(aside / "index")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"the generated world was not indexed within {BUILD_TIMEOUT_S:g} s; run the command again") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"the generated world cannot be indexed: {said[-1].removeprefix('toolrl: ')}")
