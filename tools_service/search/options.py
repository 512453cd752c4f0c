"""The options of the search tool. Light, so that a wrong one shows where nothing has been started."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY, dataclass

from tools_service.search.java import DEFAULT_HEAP_MIB, MIN_HEAP_MIB

MAX_K = 100


@dataclass(frozen=True)
class WikiOptions:
    """index: a folder or the name of a Pyserini prebuilt index.

    k: passages returned. k1, b: of BM25. passage: "first_paragraph" (up to the first line break) or "whole".
    title_match: the article whose title is the query comes first (case, accents, punctuation, a leading "the" and a
        disambiguation in parentheses count only where several titles fit).
    concise: of each passage only the 3 sentences that match the query best.
    show_title: "TITLE: " before each passage. max_chars, max_tokens: of the whole answer, titles included; a token is a word
        between white space, and a cut answer is marked as truncated.
    threads: searches at a time (default: the cores of this process, at most 4). heap_mib: bound of the JVM's heap; the first
        tool of a process that starts the JVM decides.

    Raises ValueError for a wrong one, with one line; whether the index is there is looked at when it is opened.
    """

    index: str | None = None
    _: KW_ONLY
    name: str = "Wiki"
    k: int = 1
    k1: float = 0.9
    b: float = 0.4
    passage: str = "first_paragraph"
    max_chars: int | None = None
    max_tokens: int | None = None
    show_title: bool = True
    title_match: bool = False
    concise: bool = False
    threads: int | None = None
    heap_mib: int = DEFAULT_HEAP_MIB

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"tool Wiki: name={self.name!r} must be a text")
        if not isinstance(self.index, (str, os.PathLike)) or not str(self.index).strip():
            raise ValueError(
                f"tool {self.name}: index={self.index!r} must be a folder made by `toolrl index build`, or the name of a Pyserini prebuilt "
                f"index; set options.{self.name}.index"
            )
        if self.passage not in ("first_paragraph", "whole"):
            raise ValueError(f"tool {self.name}: passage={self.passage!r} must be 'first_paragraph' or 'whole'")
        for option in ("show_title", "title_match", "concise"):
            if not isinstance(value := getattr(self, option), bool):
                raise ValueError(f"tool {self.name}: {option}={value!r} must be true or false")
        self._check_number("k", 1, MAX_K, int)
        self._check_number("heap_mib", MIN_HEAP_MIB, 1 << 20, int)
        for option, high in (("threads", 64), ("max_chars", None), ("max_tokens", None)):
            if getattr(self, option) is not None:
                self._check_number(option, 1, high, int)
        self._check_number("k1", 0, 1_000, (int, float))
        self._check_number("b", 0, 1, (int, float))

    def _check_number(self, option: str, low: float, high: float | None, kind: type | tuple[type, ...]) -> None:
        value = getattr(self, option)
        number = "a whole number" if kind is int else "a number"
        span = f"of {low} or more" if high is None else f"from {low} to {high}"
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value or (high is not None and value > high):
            raise ValueError(f"tool {self.name}: {option}={value!r} must be {number} {span}")
