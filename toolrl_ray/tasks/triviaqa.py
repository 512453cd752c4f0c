"""Questions whose answers stand in a passage that a search finds: about an invented world, or TriviaQA's.

Q: In which town was Belsan Torvik born?
A: Krumby
A2: <request><Wiki>Belsan Torvik<call>Belsan Torvik, born in Dalmere in 1817, ...<response>
Result=Dalmere<submit>

After TRL's TriviaQA experiment: the policy guesses, looks it up, and submits.
"""

from __future__ import annotations

import hashlib
import random
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolrl_ray.config import TaskConfig
from toolrl_ray.errors import ConfigError
from toolrl_ray.tasks import facts
from toolrl_ray.tasks.files import hub_dataset, json_lines
from toolrl_ray.tasks.submission import submission
from toolrl_ray.types import Task, Trajectory
from tools_service.adapters import valid_text

TOOL = "Wiki"
WANTED = "question and answers (a list of texts)"
HELDOUT_SHARE = 8  # one person, or one question of a file without published splits, in so many is held out
TRAIN_SPLITS, HELDOUT_SPLITS = ("train",), ("validation", "valid", "val", "dev", "test")
RESULT = re.compile(r"Result=((?:(?!Result=|<submit>).)*)(?:<submit>|$)", re.DOTALL)
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = string.punctuation + "‘’´"

SHOTS = (  # question, guess, what to look up, what is found, answer
    (
        "Which river runs through Paris?", "Loire", "Paris",
        "Paris is the capital of France. It lies on the river Seine in the north of the country.", "Seine",
    ),
    (
        "Who wrote the play Hamlet?", "Marlowe", "Hamlet",
        "Hamlet is a tragedy by William Shakespeare, set in Denmark and written around 1600.", "William Shakespeare",
    ),
    (
        "What is the chemical symbol of gold?", "Ag", "gold",
        "Gold is a chemical element. Its symbol is Au, from the Latin aurum, and its atomic number is 79.", "Au",
    ),
    (
        "On which continent is Kenya?", "Africa", "Kenya",
        "Kenya is a country in East Africa. Its capital and largest city is Nairobi.", "Africa",
    ),
)  # fmt: skip


def ask(question: str) -> str:
    return f"Q: {question}\n"


def guessed(guess: str) -> str:
    return f"A: {guess}\n"


def tool_call(entity: str) -> str:
    return f"A2: <request><{TOOL}>{entity}<call>"


def tool_answer(answer: str) -> str:
    """What the policy writes in the end."""
    return f"\nResult={answer}<submit>"


def render_prompt(task: Task, few_shot: int) -> str:
    """`few_shot` worked questions, then the question on a line of its own."""
    shots = [
        f"{ask(question)}{guessed(guess)}{tool_call(entity)}{found}<response>{tool_answer(answer)}\n\n"
        for question, guess, entity, found, answer in SHOTS[:few_shot]
    ]
    return "".join(shots) + ask(task.prompt)


def reward(trajectory: Trajectory) -> float:
    """1.0 when one of the task's answers stands, word for word, in what the policy submitted behind `Result=`, else 0.0.

    Both normalised as TriviaQA does. Only the submitting turn's own text counts, never what a tool wrote.
    """
    found = RESULT.findall(submission(trajectory) or "")
    return answered(found[-1], trajectory.request.task) if found else 0.0


def first_20_words(trajectory: Trajectory) -> float:
    """For `task.reward=first_20_words`, ToolFormer's measure (Schick et al. 2023, arXiv:2302.04761, section 4.2.3): one of the answers
    stands in the first 20 words of what the policy submitted, with `Result=` before it or not. What was not submitted earns nothing."""
    words = (submission(trajectory) or "").partition("<submit>")[0].rpartition("Result=")[2].split()
    return answered(" ".join(words[:20]), trajectory.request.task)


def answered(text: str, task: Task) -> float:
    given = f" {normalise(text)} "
    return float(any((wanted := normalise(answer)) and f" {wanted} " in given for answer in (task.answer, *task.aliases)))


def normalise(text: str) -> str:
    """As TriviaQA's evaluation does: lower case, punctuation and underscores to spaces, no articles, single spaces."""
    text = "".join(" " if character in PUNCTUATION else character for character in text.lower())
    return " ".join(ARTICLES.sub(" ", text).split())


def load_tasks(config: TaskConfig) -> tuple[list[Task], list[Task]]:
    """(train, held-out), which never share a question; a pure function of the settings and the file.

    source generated: about the people of facts.world(seed); a person is in one of the two. triviaqa: from the Hub's
    mandarjoshi/trivia_qa with its published splits, or the JSON-lines file task.path (.xz or not), whose rows may name their split:
    train, or validation (valid, val), dev or test. Those that name none of these are shared out by the question's hash, one in
    HELDOUT_SHARE held out. Questions without an answer that could be found are left out. Training tasks are task.num_train at most, or
    all that there are. Raises ConfigError when there are fewer held-out tasks than asked for, or a line of the file is not as it must be.
    """
    if config.source == "gsm8k":
        raise ConfigError("task.source='gsm8k' is none of this task's; sources: generated, triviaqa")
    if config.source == "generated" and config.path:
        raise ConfigError(f"task.path={config.path!r} contradicts task.source='generated', which reads no file; set task.source=triviaqa")
    train: dict[str, Task] = {}
    heldout: dict[str, Task] = {}
    for task, is_heldout in _generated(config.seed) if config.source == "generated" else _published(config):
        (heldout if is_heldout else train).setdefault(normalise(task.prompt), task)
    kept = {False: list(train.values()), True: [task for question, task in heldout.items() if question not in train]}
    for is_heldout, tasks in kept.items():
        random.Random(f"triviaqa/{config.seed}/{is_heldout}").shuffle(tasks)
    where = config.path or ("the generated world" if config.source == "generated" else "mandarjoshi/trivia_qa")
    if not kept[False]:
        raise ConfigError(f"{where} has no training question with an answer that can be found; give some")
    if len(kept[True]) < config.num_heldout:
        raise ConfigError(f"task.num_heldout={config.num_heldout}, but {where} has {len(kept[True])}; set it lower")
    return kept[False][: config.num_train], kept[True][: config.num_heldout]


def held_out(name: str) -> bool:
    """Whether a person, or a question without a split, is held out: by its own hash, whatever the sizes and seeds."""
    return hashlib.sha256(name.encode()).digest()[0] % HELDOUT_SHARE == 0


def _generated(seed: int) -> Iterator[tuple[Task, bool]]:
    for number, person in enumerate(facts.world(seed)):
        is_heldout = held_out(person.name)
        for kind, question in facts.QUESTIONS.items():
            id = f"generated/{'heldout' if is_heldout else 'train'}/{number}-{kind}"
            yield Task(id, question.format(name=person.name), person.facts[kind], "generated"), is_heldout


def _published(config: TaskConfig) -> Iterator[tuple[Task, bool]]:
    for where, split, question, answers in _rows_of_file(Path(config.path)) if config.path else _rows_of_hub():
        if split in TRAIN_SPLITS or split in HELDOUT_SPLITS:
            is_heldout = split in HELDOUT_SPLITS
        else:
            is_heldout = held_out(normalise(question))
        if any(map(normalise, answers)):  # else, as for the answer "A", nothing is left to find
            yield Task(f"triviaqa/{where}", question, answers[0], "triviaqa", tuple(answers[1:])), is_heldout


def _rows_of_file(path: Path) -> Iterator[tuple[str, str, str, list[str]]]:
    for number, row in json_lines(path, WANTED):
        question, answers = row.get("question"), row.get("answers")
        if not isinstance(question, str) or not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
            raise ConfigError(f"{path}:{number}: not a JSON object with {WANTED}, but {row!r:.100}")
        yield str(number), str(row.get("split", "")).lower(), valid_text(question), list(map(valid_text, answers))


def _rows_of_hub() -> Iterator[tuple[str, str, str, list[str]]]:
    dataset = hub_dataset("mandarjoshi/trivia_qa", "unfiltered.nocontext", "triviaqa")
    for split in ("train", "validation"):
        for row in dataset[split]:
            answer: dict[str, Any] = row["answer"]
            yield row["question_id"], split, row["question"], list(dict.fromkeys([answer["value"], *answer["aliases"]]))
