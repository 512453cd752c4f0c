"""Arithmetic expressions: the random ones of the generated task, and the form in which two of them are compared."""

from __future__ import annotations

import random
from decimal import Decimal

OPERATORS = "+-*/"


def normalise(expression: str) -> str:
    """The form in which expressions are compared: no spaces, no thousands commas, "+" signs and outer zeros of numbers kept."""
    return "".join(expression.split()).replace(",", "")


def generated_expression(rng: random.Random) -> str:
    """`a op b` on integers and one-decimal numbers; a division is chosen by its quotient, so that every result is short.

    a and b are below 1000 (integers) or 100 (one decimal), factors and divisors below 100.
    """
    operator = rng.choice(OPERATORS)
    if operator in "+-":
        return f"{_number(rng, 999)}{operator}{_number(rng, 999)}"
    if operator == "*":
        return f"{_number(rng, 99)}*{_number(rng, 99)}"
    divisor = Decimal(rng.randint(2, 99))
    quotient = Decimal(_number(rng, 99))
    return f"{_plain(divisor * quotient)}/{divisor}"


def _number(rng: random.Random, largest: int) -> str:
    """An integer in [1, largest], or half of the time a number with one decimal in [0.1, 99.9]."""
    if rng.random() < 0.5:
        return str(rng.randint(1, largest))
    return _plain(Decimal(rng.randint(1, 999)) / 10)


def _plain(number: Decimal) -> str:
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
