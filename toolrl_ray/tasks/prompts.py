"""The text of an episode, in the syntax of TRL's "Learning Tools" experiments.

What is 13.1-3?

<request><SimpleCalculatorTool>13.1-3<call>10.1<response>

Result=10.1<submit>
"""

from __future__ import annotations

TOOL = "SimpleCalculatorTool"
EXAMPLES = (("13.1-3", "10.1"), ("4*3", "12"), ("12.1+1", "13.1"), ("12.1-20", "-7.9"))


def question(expression: str, few_shot: int = 0) -> str:
    """The text that the policy continues: `few_shot` worked examples, then the question and an empty line."""
    examples = [f"{ask(e)}{tool_call(e)}{r}<response>{tool_answer(r)}\n\n" for e, r in EXAMPLES[:few_shot]]
    return "".join(examples) + ask(expression)


def ask(expression: str) -> str:
    return f"What is {expression}?\n\n"


def tool_call(expression: str) -> str:
    return f"<request><{TOOL}>{expression}<call>"


def tool_answer(result: str) -> str:
    """What the policy writes after the tool's answer."""
    return f"\n\nResult={result}<submit>"
