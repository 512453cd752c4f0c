"""Word problems solved by a program: templated ones, or GSM8K's.

Q: Olivia has $23. ...

<request><PythonInterpreter>def solution(): ...
print(solution())<call>8<response>

Result=8<submit>

After TRL's python-interpreter experiment; programs in the form of PAL (Gao et al. 2022, arXiv:2211.10435).
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
from toolrl_ray.tasks.files import hub_dataset, json_lines
from toolrl_ray.tasks.submission import submission
from toolrl_ray.tasks.word_problems import WordProblem, solution, word_problem
from toolrl_ray.types import Task, Trajectory
from tools_service.adapters import valid_text

TOOL = "PythonInterpreter"
WANTED = "question, answer (which ends in `#### NUMBER`)"
SPLITS = ("train", "test")
TOLERANCE = 0.01
HELDOUT_SHARE = 8  # one generated problem in so many is held out
DRAWS_PER_TASK = 20  # after which the generator has nothing new
DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|\.(?!\d))?"
NUMERALS = "¹²³⁰-₉¼-¾⅐-↉①-⓿"  # fractions, powers and the like, which are no words that a number counts
SCALES = {"k": 1e3, "thousand": 1e3, "million": 1e6, "billion": 1e9}
# A sign and a currency in either order, a number or a fraction, how many of it, and what it counts: no second number. A k is a thousand
# only directly behind the number: `5k`, not `5 k` or `5km`.
# Possessive (++, *+), so that what a policy writes at length is read in a time that grows no faster than it.
AMOUNT = re.compile(
    rf"(?P<sign>[-+−–]?+\s*+[$€£¥₹]?+\s*+[-+−–]?+)\s*+(?P<number>{DIGITS})(?P<exponent>[eE][-+]?\d++)?(?:\s*+/\s*+(?P<divisor>\d++))?"
    r"(?:(?P<scale>(?ai:k|\s*+(?:thousand|million|billion)s?))(?![^\W_]))?"
    rf"\s*+(?:[%$€£¥₹°]|[/°]?+\s*+(?![{NUMERALS}])[^\W\d_][^\d<>]*)?[.!]?"
)
RESULT = re.compile(r"Result=((?:(?!Result=)[^<>])*+)(?:<submit>|$)")
FINAL = re.compile(r"####\s*(.+?)\s*$")

SHOTS = (
    WordProblem(
        "Mira has $23. She buys 5 rolls for $3 each. How much money is left?",
        solution("money = 23\nspent = 5 * 3\nreturn money - spent"),
        "8",
    ),
    WordProblem(
        "A crate holds 24 bottles. Tom fills 6 crates and drops 9 bottles on the way. How many bottles arrive?",
        solution("bottles = 24 * 6\nreturn bottles - 9"),
        "135",
    ),
    WordProblem(
        "Ana walks 4 km on Monday and twice as far on each of the next 3 days. How many kilometres is that in all?",
        solution("monday = 4\nlater = 3 * 2 * monday\nreturn monday + later"),
        "28",
    ),
    WordProblem(
        "A jacket of $80 is sold for 15% less. What does it cost?",
        solution("price = 80\nreduction = price * 15 / 100\nreturn price - reduction"),
        "68.0",
    ),
)


def ask(problem: str) -> str:
    return f"Q: {problem}\n\n"


def tool_call(program: str) -> str:
    return f"<request><{TOOL}>{program}<call>"


def tool_answer(result: str) -> str:
    """What the policy writes after the program's output."""
    return f"\n\nResult={result}<submit>"


def render_prompt(task: Task, few_shot: int) -> str:
    """`few_shot` worked problems, then the question and an empty line."""
    shots = [f"{ask(s.text)}{tool_call(s.program)}{s.answer}<response>{tool_answer(s.answer)}\n\n" for s in SHOTS[:few_shot]]
    return "".join(shots) + ask(task.prompt)


def reward(trajectory: Trajectory) -> float:
    """1.0 when the policy submitted `Result=NUMBER<submit>` with a number within TOLERANCE of the answer, else 0.0.

    Only the submitting turn's own text counts, never what a tool wrote.
    """
    found = RESULT.findall(submission(trajectory) or "")
    submitted = amount(found[-1]) if found else None
    answer = amount(trajectory.request.task.answer)
    if submitted is None or answer is None:
        return 0.0
    return float(abs(submitted - answer) < TOLERANCE)


def amount(text: str) -> float | None:
    """The number in an answer as people write one: `1,200`, `$18`, `18 dollars/hour`, `-3.5`, `1/2`, `1.5 million`, `5k`, `1e3`. A percent
    sign is a unit: 50% is 50, as in GSM8K's own answers. None for what holds no finite number, or more than one."""
    match = AMOUNT.fullmatch(text.strip())
    if match is None or not any(character.isdigit() for character in match["number"]):
        return None
    signs = re.sub("[^-+−–]", "", match["sign"])
    value = float(match["number"].replace(",", "") + (match["exponent"] or ""))
    if match["divisor"] is not None:
        divisor = float(match["divisor"])  # int() refuses thousands of digits
        if divisor == 0:
            return None
        value /= divisor
    if match["scale"]:
        value *= SCALES[match["scale"].strip().lower().rstrip("s")]
    if len(signs) > 1 or not math.isfinite(value):
        return None
    return -value if signs in ("-", "−", "–") else value


def load_tasks(config: TaskConfig) -> tuple[list[Task], list[Task]]:
    """(train, held-out), which never share a problem; a pure function of the settings and the files.

    source generated: templated problems. gsm8k: with its published splits, from the Hub's openai/gsm8k or the folder task.path, which
    holds train.jsonl and test.jsonl; task.num_train of them at most, or all that there are. Raises ConfigError when there are fewer
    held-out or generated ones than asked for, or a line is not as it must be.
    """
    if config.source == "triviaqa":
        raise ConfigError("task.source='triviaqa' is none of this task's; sources: generated, gsm8k")
    if config.source == "generated" and config.path is not None:
        raise ConfigError(f"task.path={config.path!r} contradicts task.source='generated', which reads no file; set task.source=gsm8k")
    return _generated(config) if config.source == "generated" else _published(config)


def held_out(problem: str) -> bool:
    """Whether a generated problem belongs to the held-out split: by its own hash, whatever the sizes and seeds."""
    return hashlib.sha256(problem.encode()).digest()[0] % HELDOUT_SHARE == 0


def _generated(config: TaskConfig) -> tuple[list[Task], list[Task]]:
    rng = random.Random(f"gsm8k/{config.seed}")
    wanted = {False: config.num_train, True: config.num_heldout}  # by whether it is held out, as below
    found: dict[bool, dict[str, str]] = {False: {}, True: {}}
    for _ in range(DRAWS_PER_TASK * (config.num_train + HELDOUT_SHARE * config.num_heldout)):
        problem = word_problem(rng)
        split = held_out(problem.text)
        if len(found[split]) < wanted[split]:
            found[split].setdefault(problem.text, problem.answer)
            if all(len(found[split]) == wanted[split] for split in wanted):
                break
    else:
        raise ConfigError(
            f"task.num_train={config.num_train} and task.num_heldout={config.num_heldout} ask for more different problems than the "
            f"generator found ({len(found[False])} and {len(found[True])}); ask for fewer"
        )
    return tuple(  # type: ignore[return-value]
        [Task(f"generated/{name}/{i}", text, answer, "generated") for i, (text, answer) in enumerate(found[split].items())]
        for name, split in (("train", False), ("heldout", True))
    )


def _published(config: TaskConfig) -> tuple[list[Task], list[Task]]:
    splits: dict[str, dict[str, str]] = {"train": {}, "test": {}}
    for split, problem, answer in _rows_of_folder(Path(config.path)) if config.path else _rows_of_hub():
        splits[split].setdefault(problem, answer)
    heldout = [row for row in splits["test"].items() if row[0] not in splits["train"]]
    train = list(splits["train"].items())
    random.Random(f"gsm8k/{config.seed}/train").shuffle(train)
    random.Random(f"gsm8k/{config.seed}/heldout").shuffle(heldout)
    if len(heldout) < config.num_heldout or not train:
        raise ConfigError(
            f"task.num_heldout={config.num_heldout}, but {config.path or 'openai/gsm8k'} has {len(heldout)} held-out and "
            f"{len(train)} training problems; set task.num_heldout lower"
        )
    return tuple(  # type: ignore[return-value]
        [Task(f"gsm8k/{name}/{i}", text, answer, "gsm8k") for i, (text, answer) in enumerate(rows)]
        for name, rows in (("train", train[: config.num_train]), ("test", heldout[: config.num_heldout]))
    )


def _rows_of_folder(folder: Path) -> Iterator[tuple[str, str, str]]:
    if not folder.is_dir():
        raise ConfigError(f"task.path={str(folder)!r} is not a folder; give one that holds train.jsonl and test.jsonl")
    for split in SPLITS:
        path = folder / f"{split}.jsonl"
        for number, row in json_lines(path, WANTED):
            if not isinstance(row.get("question"), str) or not isinstance(row.get("answer"), str):
                raise ConfigError(f"{path}:{number}: not a JSON object with {WANTED}, but {row!r:.100}")
            yield split, valid_text(row["question"]), _final(row["answer"], f"{path}:{number}")


def _rows_of_hub() -> Iterator[tuple[str, str, str]]:
    dataset = hub_dataset("openai/gsm8k", "main", "gsm8k")
    for split in SPLITS:
        for number, row in enumerate(dataset[split]):
            yield split, row["question"], _final(row["answer"], f"openai/gsm8k {split} {number}")


def _final(answer: str, where: str) -> str:
    match = FINAL.search(answer)
    if match is None or amount(match[1]) is None:
        raise ConfigError(f"{where}: the answer does not end in `#### NUMBER`, but in {answer[-60:]!r}")
    return match[1]
