"""What the warm start shows the tiny policy of the word problems: programs that solve them, and guesses."""

from __future__ import annotations

import random

from toolrl_ray.bootstrap.rows import Part, Row, drill, guess
from toolrl_ray.tasks import gsm8k, word_problems
from toolrl_ray.tasks.gsm8k import tool_answer, tool_call
from toolrl_ray.tasks.word_problems import WordProblem, word_problem
from toolrl_ray.types import Task

MARKERS = ("<request>", "<PythonInterpreter>", "<call>", "<response>", "<submit>", "Result=", "Q: ", "\n\n")
PIECES = (*word_problems.pieces(), *MARKERS)
BUILT_ON = (word_problems, gsm8k)
DRILL_MARKERS = (" = ", "Q: ", "\n\nResult=", "<response>", "<PythonInterpreter>")
REQUEST = "<request>"


def key(task: Task) -> str:
    return task.prompt


class Demonstrations:
    def __init__(self, seed: int, tool_share: float, few_shot: int, heldout: frozenset[str]):
        self._rng = random.Random(f"demonstrations/gsm8k/{seed}")
        self._tool_share, self._few_shot, self._heldout = tool_share, few_shot, heldout

    def demonstration(self) -> Row:
        problem = self._problem()
        if self._rng.random() < self._tool_share:
            return [Part(self._question(problem), False), Part(tool_call(problem.program), True), *self._end(problem)]
        return [Part(self._question(problem), False), Part(tool_answer(guess(self._rng, problem.answer)).lstrip("\n"), True)]

    def exercise(self) -> Row:
        problem = self._problem()
        call = tool_call(problem.program).removeprefix(REQUEST)
        return [Part(self._question(problem) + REQUEST, False), Part(call, True), *self._end(problem)]

    def drill(self) -> Row:
        return drill(self._rng, "0123456789", DRILL_MARKERS)

    def _question(self, problem: WordProblem) -> str:
        return gsm8k.render_prompt(Task("", problem.text, problem.answer, ""), self._few_shot)

    @staticmethod
    def _end(problem: WordProblem) -> list[Part]:
        return [Part(f"{problem.answer}<response>", False), Part(tool_answer(problem.answer), True)]

    def _problem(self) -> WordProblem:
        while (problem := word_problem(self._rng)).text in self._heldout or gsm8k.held_out(problem.text):
            pass
        return problem
