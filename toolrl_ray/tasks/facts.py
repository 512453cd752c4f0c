"""An invented world: people, and one passage about each. What the tiny search recipe asks can be known from its passage alone.

Pure and seeded. The world depends on the seed only, so that its index serves every size of training and held-out set.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

NUM_PEOPLE = 1500
TRADES = ("baker", "sailor", "doctor", "painter", "farmer", "lawyer", "potter", "weaver", "teacher", "pilot", "miller", "singer")
INSTRUMENTS = ("flute", "violin", "harp", "piano", "drum", "guitar", "cello", "horn", "organ", "lute", "banjo", "oboe")
ONSETS = ("b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "gr", "kr", "st", "tr")
VOWELS, CODAS = ("a", "e", "i", "o", "u"), ("", "l", "n", "r", "s", "k", "m")
ENDINGS = ("holm", "by", "ford", "mere", "wick", "dale")

PASSAGES = (
    "{name}, born in {town} in {year}, is a {trade} and plays the {instrument}.",
    "{name} is a {trade}, was born in {year} in {town} and plays the {instrument}.",
    "{name} plays the {instrument}. Born in {town} in the year {year}, now a {trade}.",
    "A {trade} by trade, {name} was born in {year}. Home town: {town}. Instrument: {instrument}.",
)
QUESTIONS = {  # what is asked for, by the question
    "town": "In which town was {name} born?",
    "year": "In which year was {name} born?",
    "trade": "What is the trade of {name}?",
    "instrument": "Which instrument does {name} play?",
}


@dataclass(frozen=True)
class Person:
    """facts: by the names in QUESTIONS."""

    name: str
    passage: str
    facts: dict[str, str]


def person(rng: random.Random) -> Person:
    name = f"{_word(rng, 2)} {_word(rng, 2)}"
    facts = {kind: draw(rng) for kind, draw in DRAWS.items()}
    return Person(name, rng.choice(PASSAGES).format(name=name, **facts), facts)


def world(seed: int) -> list[Person]:
    """NUM_PEOPLE people, no two of one name."""
    rng = random.Random(f"facts/{seed}")
    found: dict[str, Person] = {}
    while len(found) < NUM_PEOPLE:
        one = person(rng)
        found.setdefault(one.name, one)
    return list(found.values())


def _word(rng: random.Random, num_syllables: int) -> str:
    syllables = (rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if last else "") for last in range(num_syllables))
    return "".join(syllables).capitalize()


def _town(rng: random.Random) -> str:
    return _word(rng, 1) + rng.choice(ENDINGS)


DRAWS: dict[str, Callable[[random.Random], str]] = {
    "town": _town,
    "year": lambda rng: str(rng.randint(1700, 1999)),
    "trade": lambda rng: rng.choice(TRADES),
    "instrument": lambda rng: rng.choice(INSTRUMENTS),
}


def pieces() -> tuple[str, ...]:
    """The stretches of passages and questions between their fields, and the words of the lists: for a tokenizer, longest first."""
    found: dict[str, None] = dict.fromkeys((*TRADES, *INSTRUMENTS))
    for text in (*PASSAGES, *QUESTIONS.values()):
        for kind in ("name", *QUESTIONS):
            text = text.replace(f"{{{kind}}}", "\0")
        found |= dict.fromkeys(stretch for stretch in text.split("\0") if len(stretch) > 1)
    return tuple(sorted(found, key=len, reverse=True))
