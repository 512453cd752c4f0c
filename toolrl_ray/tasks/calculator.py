"""The calculator task: `What is 13.1-3?`, from generated expressions or from those annotated in GSM8K.

A task module offers three functions: `load_tasks(config) -> (train, held-out)`, `render_prompt(task, few_shot)`, and
`reward(trajectory)`.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path

from toolrl_ray.config import TaskConfig
from toolrl_ray.errors import ConfigError
from toolrl_ray.tasks.expressions import generated_expression, normalise
from toolrl_ray.tasks.files import hub_dataset, json_lines
from toolrl_ray.tasks.prompts import question
from toolrl_ray.tasks.submission import submission
from toolrl_ray.types import Task, Trajectory
from tools_service.calculator import calculate
from tools_service.protocol import ToolError

WANTED = "expr, result, split"
TOLERANCE = 0.01
HELDOUT_SHARE = 8  # one generated expression in so many is held out
DRAWS_PER_TASK = 20  # after which the generator has nothing new
NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:[eE][-+]?\d+)?"
RESULT = re.compile(rf"Result=\s*+({NUMBER})\s*+(?:<submit>|$)")
ANNOTATION = re.compile(r"<<([^<>=]+)=([^<>]+)>>")


def render_prompt(task: Task, few_shot: int) -> str:
    """task.prompt is the expression."""
    return question(task.prompt, few_shot)


def reward(trajectory: Trajectory) -> float:
    """1.0 when the policy submitted `Result=NUMBER<submit>` with a number within TOLERANCE of the answer, else 0.0.

    Only the submitting turn's own text counts, never what a tool wrote.
    """
    matches = list(RESULT.finditer(submission(trajectory) or ""))
    submitted = _number(matches[-1][1]) if matches else None
    answer = _number(trajectory.request.task.answer)
    if submitted is None or answer is None:
        return 0.0
    return float(abs(submitted - answer) < TOLERANCE)


def _number(text: str) -> float | None:
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def load_tasks(config: TaskConfig) -> tuple[list[Task], list[Task]]:
    """(train, held-out), which never share an expression; a pure function of the settings and the file.

    Annotated expressions: task.num_train of them at most, or all that there are. Raises ConfigError when there are fewer held-out or
    generated ones than asked for, or a line of the file is not as it must be.
    """
    if config.source == "triviaqa":
        raise ConfigError("task.source='triviaqa' is none of this task's; sources: generated, gsm8k")
    if config.source == "generated":
        return _generated(config)
    rows = _rows_of_file(Path(config.path)) if config.path else _rows_of_hub()
    return _annotated(config, rows)


def held_out(expression: str) -> bool:
    """Whether a generated expression belongs to the held-out split: by its own hash, so that no held-out set, of whatever size
    and seed, meets any training set."""
    return hashlib.sha256(normalise(expression).encode()).digest()[0] % HELDOUT_SHARE == 0


def _generated(config: TaskConfig) -> tuple[list[Task], list[Task]]:
    rng = random.Random(f"calculator/{config.seed}")
    wanted = {False: config.num_train, True: config.num_heldout}  # by whether it is held out, as below
    found: dict[bool, dict[str, str]] = {False: {}, True: {}}
    for _ in range(DRAWS_PER_TASK * (config.num_train + HELDOUT_SHARE * config.num_heldout)):
        expression = generated_expression(rng)
        split = held_out(expression)
        if len(found[split]) < wanted[split]:
            found[split].setdefault(normalise(expression), expression)
            if all(len(found[split]) == wanted[split] for split in wanted):
                break
    else:
        raise ConfigError(
            f"task.num_train={config.num_train} and task.num_heldout={config.num_heldout} ask for more different expressions than the "
            f"generator found ({len(found[False])} and {len(found[True])}); ask for fewer"
        )
    train, heldout = ([(expression, calculate(expression)) for expression in found[split].values()] for split in (False, True))
    return _tasks("generated/train", train), _tasks("generated/heldout", heldout)


def _annotated(config: TaskConfig, rows: Iterator[tuple[str, str, str]]) -> tuple[list[Task], list[Task]]:
    splits: dict[str, dict[str, tuple[str, str]]] = {"train": {}, "test": {}}
    for split, expression, result in rows:
        try:
            # A few annotations are wrong or abbreviated: only those whose result the expression has can be asked.
            value = calculate(result)
            if abs(float(calculate(expression)) - float(value)) >= TOLERANCE:
                continue
        except ToolError:
            continue
        answer = value if _number(result) is None else result  # 54% and 57/200 are no numbers that a reward reads
        splits[split].setdefault(normalise(expression), (expression, answer))
    heldout = [row for key, row in splits["test"].items() if key not in splits["train"]]
    train = list(splits["train"].values())
    random.Random(f"gsm8k/{config.seed}/train").shuffle(train)
    random.Random(f"gsm8k/{config.seed}/heldout").shuffle(heldout)
    if len(heldout) < config.num_heldout or not train:
        raise ConfigError(
            f"task.num_heldout={config.num_heldout}, but {config.path or 'openai/gsm8k'} has {len(heldout)} held-out and "
            f"{len(train)} training expressions; set task.num_heldout lower"
        )
    return _tasks("gsm8k/train", train[: config.num_train]), _tasks("gsm8k/test", heldout[: config.num_heldout])


def _tasks(name: str, rows: list[tuple[str, str]]) -> list[Task]:
    source = name.split("/")[0]
    return [Task(f"{name}/{i}", expression, answer, source) for i, (expression, answer) in enumerate(rows)]


def _rows_of_file(path: Path) -> Iterator[tuple[str, str, str]]:
    for number, row in json_lines(path, WANTED):
        missing = [key for key in ("split", "expr", "result") if key not in row]
        if missing:
            raise ConfigError(f"{path}:{number}: not a JSON object with {WANTED} ({missing[0]} is missing)")
        split, expression, result = str(row["split"]).lower(), row["expr"], row["result"]
        if split not in ("train", "test") or not isinstance(expression, str) or not isinstance(result, str):
            raise ConfigError(f"{path}:{number}: expr and result must be text and split train or test, not {row!r}"[:300])
        yield split, expression, result


def _rows_of_hub() -> Iterator[tuple[str, str, str]]:
    dataset = hub_dataset("openai/gsm8k", "main", "gsm8k")
    for split in ("train", "test"):
        for row in dataset[split]:
            for expression, result in ANNOTATION.findall(row["answer"]):
                yield split, expression, result
