"""The table beside an index that answers "which passage's article has this title?": an SQLite file, never held in memory."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from tools_service.search.corpus import Passage, SearchError
from tools_service.search.text import title_distance, title_forms, title_key, title_keys

FILE = "titles.sqlite"


class TitleWriter:
    """Takes every passage of a corpus in order; refuses an id that came before."""

    def __init__(self, folder: Path, corpus: Path):
        self._corpus = corpus
        self._db = sqlite3.connect(folder / FILE, isolation_level=None)
        self._db.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN;"  # the folder is thrown away unless all goes well
            "CREATE TABLE passages (line INTEGER PRIMARY KEY, docid TEXT NOT NULL UNIQUE, title TEXT, bare TEXT, name TEXT);"
        )

    def add(self, passages: Iterable[Passage]) -> None:
        for passage in passages:
            title, bare = title_keys(passage.title)
            row = (passage.line, passage.docid, title or None, bare if bare != title else None, passage.title or None)
            try:
                self._db.execute("INSERT INTO passages VALUES (?, ?, ?, ?, ?)", row)
            except sqlite3.IntegrityError:
                [first] = self._db.execute("SELECT line FROM passages WHERE docid = ?", (passage.docid,)).fetchone()
                raise SearchError(
                    f"{self._corpus}, line {passage.line}: the id {passage.docid!r} is that of line {first} too; give each passage its own"
                ) from None

    def finish(self) -> None:
        for column in ("title", "bare"):
            self._db.execute(f"CREATE INDEX by_{column} ON passages ({column}, name, line) WHERE {column} IS NOT NULL")
        self._db.execute("COMMIT")
        self.close()

    def close(self) -> None:
        self._db.close()


class Titles:
    """Looks titles up, from any thread."""

    def __init__(self, folder: Path):
        uri = f"{(folder / FILE).absolute().as_uri()}?mode=ro&immutable=1"
        self._lock = threading.Lock()
        self._db = sqlite3.connect(uri, uri=True, check_same_thread=False)

    def find(self, query: str) -> str | None:
        """The docid of the first passage, in the order of the corpus, of an article whose title is the query.

        A title that is the query as it stands comes before one that is so without its disambiguation in parentheses. Of several
        titles with the query's key ("C#", "C++") the nearest counts.
        """
        if not (key := title_key(query)):
            return None
        with self._lock:
            for form, column in enumerate(("title", "bare")):
                rows = self._db.execute(
                    f"SELECT {self._name}, MIN(line), docid FROM passages WHERE {column} = ? AND {column} IS NOT NULL GROUP BY 1", (key,)
                ).fetchall()
                if rows:
                    return min(rows, key=lambda row: (title_distance(query, title_forms(row[0])[form]), row[1]))[2]
        return None

    @cached_property
    def _name(self) -> str:
        """The title as it is written, in SQL; tables of earlier versions have keys only."""
        columns = [row[1] for row in self._db.execute("PRAGMA table_info(passages)")]
        return "name" if "name" in columns else "''"

    def close(self) -> None:
        with self._lock:
            self._db.close()
