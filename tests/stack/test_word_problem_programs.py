"""The worked problems of the gsm8k prompt, and problems of every template, in the real sandbox."""

from __future__ import annotations

import asyncio
import random

from stack.sandbox.test_python_tool import call, python_tool

from toolrl_ray.tasks.gsm8k import SHOTS
from toolrl_ray.tasks.word_problems import TEMPLATES, word_problem
from tools_service.protocol import ToolStatus


def test_the_program_of_every_worked_problem_and_template_prints_its_answer_in_the_sandbox() -> None:
    rng = random.Random(0)
    problems = [*SHOTS, *(word_problem(rng) for _ in range(10 * len(TEMPLATES)))]

    async def outputs() -> list[tuple[ToolStatus, str]]:
        async with python_tool() as tool:
            results = [await tool.call(call(problem.program)) for problem in problems]
        return [(result.status, result.text) for result in results]

    assert asyncio.run(outputs()) == [(ToolStatus.OK, problem.answer) for problem in problems]
