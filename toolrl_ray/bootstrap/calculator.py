"""What the warm start shows the tiny policy of the calculator.

Half of the expressions are of the generated task, half have the shape of a word problem's working (GSM8K's annotations:
several operators, parentheses, prices, ".5", long round numbers). None is in the held-out set.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from toolrl_ray.bootstrap.rows import Part, Row, drill, guess
from toolrl_ray.tasks import expressions, prompts
from toolrl_ray.tasks.calculator import held_out
from toolrl_ray.tasks.expressions import generated_expression, normalise
from toolrl_ray.tasks.prompts import question, tool_answer, tool_call
from toolrl_ray.types import Task
from tools_service.calculator import calculate
from tools_service.protocol import ToolError

MAX_CHARACTERS = 32  # of an expression
LONG_CHARACTERS, LONG_SHARE = 14, 0.3  # what is longer is rare in GSM8K, and kept with this probability
MAX_DECIMALS, MESSY_SHARE = 3, 0.15  # of results; what has more decimals is kept with this probability
REQUEST, RESULT = "<request>", "\n\nResult="


PIECES = ("<request>", "<SimpleCalculatorTool>", "<call>", "<response>", "<submit>", "What is ", "Result=", "?\n\n", "\n\n")
BUILT_ON = (expressions, prompts)  # modules whose code shapes the rows: part of the cache key
DRILL_MARKERS = ("What is ", "<SimpleCalculatorTool>", "\n\nResult=", "<response>", "<call>")


def key(task: Task) -> str:
    return normalise(task.prompt)


class Demonstrations:
    def __init__(self, seed: int, tool_share: float, few_shot: int, heldout: frozenset[str]):
        """heldout: normalised expressions that no row asks for."""
        self._rng = random.Random(f"demonstrations/{seed}")
        self._tool_share = tool_share
        self._few_shot = few_shot
        self._heldout = heldout
        self._solved = self._solve()

    def demonstration(self) -> Row:
        expression, result = next(self._solved)
        prompt = Part(question(expression, self._few_shot), False)
        if self._rng.random() < self._tool_share:
            return [prompt, Part(tool_call(expression), True), Part(f"{result}<response>", False), Part(tool_answer(result), True)]
        return [prompt, Part(tool_answer(guess(self._rng, result)).lstrip("\n"), True)]

    def exercise(self) -> Row:
        expression, result = next(self._solved)
        prompt = Part(question(expression, self._few_shot) + REQUEST, False)
        call = Part(tool_call(expression).removeprefix(REQUEST), True)
        return [prompt, call, Part(f"{result}<response>", False), Part(tool_answer(result), True)]

    def drill(self) -> Row:
        return drill(self._rng, "0123456789.+-*/()", DRILL_MARKERS)

    def _solve(self) -> Iterator[tuple[str, str]]:
        while True:
            expression = generated_expression(self._rng) if self._rng.random() < 0.5 else word_problem_expression(self._rng)
            if len(expression) > MAX_CHARACTERS or normalise(expression) in self._heldout or held_out(expression):
                continue
            if len(expression) > LONG_CHARACTERS and self._rng.random() > LONG_SHARE:
                continue
            try:
                result = calculate(expression)
            except ToolError:
                continue  # 5/(3-3)
            # People's sums come out even: a random quotient with all its decimals is the exception.
            if len(result.partition(".")[2]) <= MAX_DECIMALS or self._rng.random() < MESSY_SHARE:
                yield expression, result


def word_problem_expression(rng: random.Random) -> str:
    """An expression as people write it between << and >>: mostly one operator, sometimes a chain or parentheses."""
    kind = rng.random()
    if kind < 0.55:
        return f"{_operand(rng)}{rng.choice('+-*/')}{_operand(rng)}"
    if kind < 0.75:
        return _operand(rng) + "".join(rng.choice("+-*/") + _operand(rng) for _ in range(rng.randint(2, 3)))
    if kind < 0.85:
        zeros, digits = "0" * rng.choice((0, 0, 0, 1, 2)), rng.randint(1, 3)
        return rng.choice("+++-").join(f"{rng.randint(1, 10**digits)}{zeros}" for _ in range(rng.randint(3, 8)))
    if kind < 0.97:
        inner = f"({_operand(rng)}{rng.choice('+-/*')}{_operand(rng)})"
        outer = rng.choice("*/+-")
        return f"{inner}{outer}{_operand(rng)}" if rng.random() < 0.5 else f"{_operand(rng)}{outer}{inner}"
    return rng.choice(("", "+", "-")) + _operand(rng)


def _operand(rng: random.Random) -> str:
    """Short integers, round numbers, long numbers, prices, shares (0.25, .5) and percentages."""
    kind = rng.random()
    if kind < 0.4:
        return str(rng.randint(1, 10 ** rng.randint(1, 3)))
    if kind < 0.6:
        return str(rng.randint(1, 99)) + "0" * rng.randint(1, 4)
    if kind < 0.7:
        return str(rng.randint(1, 10 ** rng.randint(4, 7)))
    if kind < 0.83:
        return f"{rng.randint(0, 10 ** rng.randint(1, 3))}.{rng.randint(0, 99):02d}"
    if kind < 0.98:
        return rng.choice(("0", "", "1")) + f".{rng.randint(1, 99)}"
    return f"{rng.randint(1, 100)}%"
