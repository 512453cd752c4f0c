"""Reads a corpus in JSON lines, checking each line: `id`, `text` or `contents`, and `title` if there is one. No Java."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools_service.search.text import split_title, without_title

MAX_ID_BYTES = 32_766  # Lucene's limit on a term
MAX_CHARS = 20_000_000  # as Java counts them, in UTF-16: of a text in JSON, for Anserini's reader
JAVAS_BLANKS = "".join(map(chr, range(33)))  # Anserini leaves out a passage that has nothing else


class SearchError(ValueError):
    """A corpus, an index or an option is not what it has to be; the message is one line with the remedy."""


@dataclass(frozen=True)
class Passage:
    """line: its line in the corpus, from 1. end: bytes of the corpus up to and with that line."""

    line: int
    end: int
    docid: str
    title: str
    text: str

    @property
    def contents(self) -> str:
        """What is searched."""
        return f"{self.title}\n{self.text}" if self.title else self.text

    def raw(self) -> str:
        """The stored form: Pyserini's JSON, title and text in `contents`, and the title once more by itself."""
        return json.dumps({"id": self.docid, "title": self.title, "contents": self.contents}, ensure_ascii=False)


def read_corpus(corpus: Path) -> Iterator[Passage]:
    """The passages of the file in order; blank lines are skipped, other keys are left out. Raises SearchError at the first bad line."""
    try:
        yield from _passages(corpus)
    except OSError as error:
        raise SearchError(f"{str(corpus)!r} cannot be read ({error.strerror}); a corpus is a file of JSON lines on this machine") from None


def _passages(corpus: Path) -> Iterator[Passage]:
    if not corpus.is_file():
        raise SearchError(f"no file {str(corpus)!r}; a corpus is a file of JSON lines with id, text (or contents) and an optional title")
    end = 0
    with corpus.open("rb") as lines:
        for line, data in enumerate(lines, 1):
            end += len(data)
            if data.strip():
                try:
                    passage = Passage(line, end, *_fields(data))
                    if (size := len(passage.contents.encode("utf-16-le")) // 2) > MAX_CHARS:
                        raise SearchError(f"title and text have {size:,} characters; Anserini reads {MAX_CHARS:,} at most: split it")
                except SearchError as error:
                    raise SearchError(f"{corpus}, line {line}: {error}") from None
                yield passage


def _fields(data: bytes) -> tuple[str, str, str]:
    try:
        row = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SearchError(f"not UTF-8 at byte {error.start} of the line; save the file as UTF-8 text, not compressed") from None
    except (ValueError, RecursionError) as error:
        raise SearchError(f'not JSON ({error}); write one object a line: {{"id": "1", "title": "A title", "text": "A passage."}}') from None
    if not isinstance(row, dict):
        raise SearchError(f"a JSON {type(row).__name__}, not an object with id and text")
    docid = _text(row, "id")
    if (size := len(docid.encode())) > MAX_ID_BYTES:
        raise SearchError(f"id is {size:,} bytes long; Lucene takes {MAX_ID_BYTES:,} at most, so give the passage a shorter one")
    if "text" in row and "contents" in row and row["text"] != row["contents"]:
        raise SearchError("text and contents differ; keep one of them")
    key = "text" if "text" in row else "contents"
    body = _text(row, key)
    if row.get("title") is None:
        title, text = split_title(body) if key == "contents" else ("", body)
        return docid, " ".join(title.split()), text
    title = " ".join(_text(row, "title", may_be_empty=True).split())
    return docid, title, without_title(title, body)


def _text(row: dict, key: str, may_be_empty: bool = False) -> str:
    if key not in row:
        missing = "neither text nor contents" if key == "contents" else f"no {key}"
        raise SearchError(f"{missing}; the line has {', '.join(map(repr, row)) or 'no keys'}")
    value = row[key]
    if not isinstance(value, str):
        raise SearchError(f"{key} is {value!r:.80}, not text; write it in quotes")
    value = value.strip()
    if not value.strip(JAVAS_BLANKS) and not may_be_empty:
        raise SearchError(f"{key} is empty; fill it in or drop the line")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SearchError(f"{key} holds half a character ({value[error.start]!r}) at position {error.start}; repair the text") from None
    return value
