"""Templated word problems, and the program that solves each: what the tiny python recipe asks. Pure and seeded."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

NAMES = ("Olivia", "Amir", "Bruno", "Chloe", "Dana", "Emeka", "Farah", "Goran", "Hana", "Ines", "Jonas", "Kavya", "Liam", "Mei", "Noor")
THINGS = ("bagels", "pens", "apples", "tickets", "books", "stamps", "lamps", "mugs", "socks", "plums", "kites", "cakes")
FIELDS = ("name", "thing", "a", "b", "c")


@dataclass(frozen=True)
class Template:
    """text and program over FIELDS. largest: of a, b and c; positive: the result is never below 0."""

    text: str
    program: str
    largest: tuple[int, int, int]


TEMPLATES = (
    Template(
        "{name} has ${a}. The shop sells {thing} for ${c} each, and {name} buys {b}. How much money is left?",
        "money = {a}\nspent = {b} * {c}\nreturn money - spent",
        (300, 9, 9),
    ),
    Template(
        "{name} had {a} {thing}, gave {b} away and lost {c}. How many {thing} are left?",
        "had = {a}\ngone = {b} + {c}\nreturn had - gone",
        (300, 60, 60),
    ),
    Template(
        "{name} packs {a} boxes with {b} {thing} each, and {c} more. How many {thing} is that?",
        "boxes = {a}\nin_box = {b}\nreturn boxes * in_box + {c}",
        (60, 40, 99),
    ),
    Template(
        "Each of {a} friends brings {b} {thing}. {name} takes {c} home. How many {thing} stay?",
        "brought = {a} * {b}\nreturn brought - {c}",
        (40, 30, 9),
    ),
    Template(
        "{name} earns ${a} an hour and works {b} hours on each of {c} days. How much does {name} earn?",
        "rate = {a}\nhours = {b} * {c}\nreturn rate * hours",
        (60, 9, 30),
    ),
    Template(
        "{name} reads {a} pages a day for {b} days of a book of {c} pages. How many pages are left?",
        "read = {a} * {b}\nreturn {c} - read",
        (30, 9, 999),
    ),
    Template(
        "{name} shares {a} {thing} and {b} more among {c} children. How many does each get?",
        "total = {a} + {b}\nreturn total // {c}",
        (300, 90, 9),
    ),
)


@dataclass(frozen=True)
class WordProblem:
    """program: of the form `def solution(): ...` `print(solution())`. answer: what it prints."""

    text: str
    program: str
    answer: str


def solution(program: str) -> str:
    """The lines as a function that a last line calls and prints."""
    body = "".join(f"    {line}\n" for line in program.splitlines())
    return f"def solution():\n{body}print(solution())"


def word_problem(rng: random.Random) -> WordProblem:
    """A random one; its result is a whole number that is not negative, and a division leaves no rest."""
    while True:
        template = rng.choice(TEMPLATES)
        a, b, c = (rng.randint(2, largest) for largest in template.largest)
        values = {"name": rng.choice(NAMES), "thing": rng.choice(THINGS), "a": a, "b": b, "c": c}
        if "//" in template.program and (a + b) % c:
            continue
        program = template.program.format(**values)
        answer = _run(program)
        if answer >= 0:
            return WordProblem(template.text.format(**values), solution(program), str(answer))


def _run(program: str) -> int:
    """The program's value. Its lines are our own, of the templates above: assignments of sums and products, and a return."""
    names: dict[str, int] = {}
    for line in program.splitlines():
        target, _, formula = line.partition(" = ") if " = " in line else ("", "", line.removeprefix("return "))
        value = _value(formula.split(" "), names)
        if not target:
            return value
        names[target] = value
    raise ValueError(f"no return in {program!r}")


def _value(words: list[str], names: dict[str, int]) -> int:
    """Of `x`, `x op y` or `x * y + z`, from left to right."""
    def number(word: str) -> int:
        return names[word] if word in names else int(word)

    value = number(words[0])
    for operator, word in zip(words[1::2], words[2::2], strict=True):
        right = number(word)
        value = {"+": value + right, "-": value - right, "*": value * right, "//": value // right if right else 0}[operator]
    return value


def pieces() -> tuple[str, ...]:
    """The stretches of the templates between their fields, and the names and things: what a tokenizer may have one token for."""
    found: dict[str, None] = {}
    for template in TEMPLATES:
        for text in (template.text, solution(template.program)):
            found |= dict.fromkeys(stretch for stretch in _stretches(text) if len(stretch) > 1)
    longest_first = sorted(found, key=len, reverse=True)
    return (*longest_first, *NAMES, *THINGS)


def _stretches(text: str) -> Iterator[str]:
    for name in FIELDS:
        text = text.replace(f"{{{name}}}", "\0")
    yield from text.split("\0")
