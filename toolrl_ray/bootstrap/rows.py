"""What a warm start trains on: rows of text parts, of three kinds.

- a *demonstration* answers a question, with the tool or with a guess; it teaches when to call;
- an *exercise* is an episode with the tool, whose decision to call is not trained; it teaches what to write in a call
  and what to do with its answer, and leaves the share of calls as the demonstrations set it;
- a *drill* repeats a random string; it teaches to copy before the strings mean anything.

A task that the tiny policy can be made for has a module here with `PIECES` (what its tokenizer has one token for), `key(task)` (what two
tasks that may not meet in training and held-out set have in common), `BUILT_ON` (modules whose code shapes its rows) and
`Demonstrations`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from toolrl_ray.bootstrap.tokenizer import CHARACTERS

MAX_DRILL_CHARACTERS = 12


@dataclass(frozen=True)
class Part:
    text: str
    trained: bool


Row = list[Part]


class Demonstrations(Protocol):
    """Rows of each kind, without end and without repetition of their random draws; a pure function of the seed.

    Made as `Demonstrations(seed, tool_share, few_shot, heldout)`: the share of demonstrations that use the tool, and the keys of held-out
    tasks, which no row asks for.
    """

    def demonstration(self) -> Row: ...
    def exercise(self) -> Row: ...
    def drill(self) -> Row: ...


def drill(rng: random.Random, favourites: Sequence[str], markers: tuple[str, ...]) -> Row:
    """A random string three times, each behind a random marker. favourites: characters or words that
    40 % of the strings are made of."""
    characters = CHARACTERS if rng.random() < 0.6 else favourites
    text = "".join(rng.choice(characters) for _ in range(rng.randint(3, MAX_DRILL_CHARACTERS)))
    row = []
    for copy in range(3):
        row += [Part(rng.choice(markers), False), Part(text, copy > 0)]
    return row


def guess(rng: random.Random, result: str) -> str:
    """A number of the result's sign, length and decimals with random digits: plausible, and nearly always wrong."""
    guess = ""
    for character in result:
        if character.isdigit():
            character = str(rng.randint(0 if any(c.isdigit() for c in guess) else 1, 9))
        guess += character
    return guess
