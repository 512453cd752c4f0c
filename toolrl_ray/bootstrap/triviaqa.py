"""What the warm start shows the tiny policy of the search task: people of its own, whom no index knows."""

from __future__ import annotations

import random

from toolrl_ray.bootstrap.rows import Part, Row, drill
from toolrl_ray.tasks import facts, triviaqa
from toolrl_ray.tasks.triviaqa import guessed, tool_answer, tool_call
from toolrl_ray.types import Task

REQUEST = "A2: <request>"
MARKERS = (REQUEST, "<request>", "<Wiki>", "<call>", "<response>", "<submit>", "Result=", "Q: ", "A: ", "A2: ")
PIECES = (*facts.pieces(), *MARKERS)
BUILT_ON = (facts, triviaqa)
FAVOURITES = (*"abdefgiklmnoprstuvz", *facts.TRADES, *facts.INSTRUMENTS)  # to copy a word that is one token has to be learned apart
DRILL_MARKERS = ("Q: ", "\nResult=", "<response>", "<Wiki>", ", born in ")


def key(task: Task) -> str:
    return task.prompt


class Demonstrations:
    def __init__(self, seed: int, tool_share: float, few_shot: int, heldout: frozenset[str]):
        self._rng = random.Random(f"demonstrations/triviaqa/{seed}")
        self._tool_share, self._few_shot, self._heldout = tool_share, few_shot, heldout

    def demonstration(self) -> Row:
        person, kind = self._asked()
        guess = facts.DRAWS[kind](self._rng)
        question = Part(self._question(person, kind), False)
        if self._rng.random() < self._tool_share:
            return [question, Part(guessed(guess) + tool_call(person.name), True), *self._end(person, kind)]
        return [question, Part(guessed(guess) + tool_answer(guess).lstrip("\n"), True)]

    def exercise(self) -> Row:
        person, kind = self._asked()
        # The guess is chance and would drown out what there is to learn; that there is one, the demonstrations show.
        begun = guessed(facts.DRAWS[kind](self._rng)) + REQUEST
        call = tool_call(person.name).removeprefix(REQUEST)
        return [Part(self._question(person, kind), False), Part(begun, False), Part(call, True), *self._end(person, kind)]

    def drill(self) -> Row:
        return drill(self._rng, FAVOURITES, DRILL_MARKERS)

    def _question(self, person: facts.Person, kind: str) -> str:
        return triviaqa.render_prompt(Task("", facts.QUESTIONS[kind].format(name=person.name), person.facts[kind], ""), self._few_shot)

    @staticmethod
    def _end(person: facts.Person, kind: str) -> list[Part]:
        return [Part(f"{person.passage}<response>", False), Part(tool_answer(person.facts[kind]), True)]

    def _asked(self) -> tuple[facts.Person, str]:
        while True:
            person, kind = facts.person(self._rng), self._rng.choice(tuple(facts.QUESTIONS))
            if facts.QUESTIONS[kind].format(name=person.name) not in self._heldout and not triviaqa.held_out(person.name):
                return person, kind
