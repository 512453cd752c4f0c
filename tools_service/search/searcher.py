"""Opens an index and searches it: a thin face of Anserini's SimpleSearcher, the Java class behind Pyserini's LuceneSearcher."""

from __future__ import annotations

import contextlib
import difflib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tools_service.search.corpus import SearchError
from tools_service.search.java import DEFAULT_HEAP_MIB, is_java_error, java_class, java_reason, start_jvm
from tools_service.search.text import read_raw, title_distance, title_forms, title_key, title_keys
from tools_service.search.titles import FILE as TITLES_FILE
from tools_service.search.titles import Titles

DOWNLOAD_TIMEOUT_S = 30.0  # without a byte from the server
TITLE_CANDIDATES = 50  # hits among which the title is looked for where the index has no table of titles


class Found(NamedTuple):
    docid: str
    score: float


@dataclass(frozen=True)
class Hit:
    """found: Java's own record, or the like of it: asking it costs a call into Java each time, so what few need is asked when needed."""

    found: Any
    title: str
    text: str

    @property
    def docid(self) -> str:
        return self.found.docid

    @property
    def score(self) -> float:
        return self.found.score


class Searcher:
    """BM25 over one index. Equal scores are ordered by docid, so the same query always has the same hits. Any thread may search."""

    def __init__(self, folder: Path, k1: float = 0.9, b: float = 0.4):
        try:
            self._java = java_class("io.anserini.search.SimpleSearcher")(str(folder))
            self._java.set_bm25(k1, b)
            self.num_documents = int(self._java.get_total_num_docs())
            sample = self._java.doc(0) if self.num_documents else None
        except Exception as error:
            raise _not_an_index(folder, error) from None
        if sample is not None and sample.get("raw") is None and sample.get("contents") is None:
            self._java.close()
            raise SearchError(f"{str(folder)!r} stores no text; index it again with `toolrl index build` or Pyserini's -storeRaw")
        self._lists = java_class("java.util.ArrayList")
        # "0", "1" ... for as many queries as ever came at once; searches read it while it grows.
        self._ids = java_class("java.util.concurrent.CopyOnWriteArrayList")()
        self._numbering = threading.Lock()
        self._titles = Titles(folder) if (folder / TITLES_FILE).is_file() else None

    def search(self, queries: list[str], k: int, threads: int) -> list[list[Hit]]:
        """At most `k` hits a query, best first; several queries run in `threads` Java threads."""
        return [[_hit(found) for found in hits] for hits in self._search(queries, k, threads)]

    def search_by_title(self, queries: list[str], k: int, threads: int) -> list[list[Hit]]:
        """As `search`, but the article whose title is the query comes first, if there is one."""
        if self._titles is None:
            return [
                _title_first(query, hits)[:k]
                for query, hits in zip(queries, self.search(queries, max(k, TITLE_CANDIDATES), threads), strict=True)
            ]
        first = {query: hit for query in set(queries) if (hit := self._article(query))}
        searched = queries if k > 1 else [query for query in queries if query not in first]
        hits = iter(self.search(searched, k, threads))
        results = []
        for query in queries:
            best = [first[query]] if query in first else []
            rest = next(hits) if k > 1 or not best else []
            results.append((best + [hit for hit in rest if not best or hit.docid != best[0].docid])[:k])
        return results

    def close(self) -> None:
        self._java.close()
        if self._titles is not None:
            self._titles.close()

    def _search(self, queries: list[str], k: int, threads: int) -> list[Any]:
        if len(queries) < 2:
            return [self._java.search(query, k) for query in queries]
        texts = self._lists()
        for query in queries:
            texts.add(query)
        with self._numbering:
            for index in range(self._ids.size(), len(queries)):
                self._ids.add(str(index))
        found = self._java.batch_search(texts, self._ids, k, threads)
        return [found.get(str(index)) or [] for index in range(len(queries))]

    def _article(self, query: str) -> Hit | None:
        docid = self._titles.find(query) if self._titles else None
        raw = self._java.doc_raw(docid) if docid else None
        return Hit(Found(docid, 0.0), *read_raw(raw)) if docid and raw is not None else None


def open_index(name_or_path: str, k1: float = 0.9, b: float = 0.4, heap_mib: int = DEFAULT_HEAP_MIB) -> Searcher:
    """A searcher over a folder or a Pyserini prebuilt index, which is downloaded if need be. Raises SearchError, JavaUnavailable."""
    return Searcher(index_folder(name_or_path, heap_mib), k1, b)


def index_folder(name_or_path: str, heap_mib: int = DEFAULT_HEAP_MIB) -> Path:
    """The folder of that path, or of the Pyserini prebuilt index of that name, downloaded on its first use.

    The JVM runs afterwards: Pyserini's list of names would start one of its own. Raises SearchError, JavaUnavailable.
    """
    folder = local_folder(name_or_path)
    start_jvm(heap_mib)
    return folder or _prebuilt(name_or_path)


def local_folder(name_or_path: str) -> Path | None:
    """The folder of that path; None for what can only be the name of a prebuilt index. Raises SearchError."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not any(path.glob("segments_*")):
            raise SearchError(
                f"{name_or_path!r} holds no Lucene index; make one with: toolrl index build CORPUS.jsonl {name_or_path}-index"
            )
        return path.absolute()
    if path.exists():
        raise SearchError(f"{name_or_path!r} is a file, not an index; make one with: toolrl index build {name_or_path} OUT")
    if os.sep in name_or_path:
        raise SearchError(f"no folder {name_or_path!r}; make an index with: toolrl index build CORPUS.jsonl {name_or_path}")
    return None


@contextlib.contextmanager
def open_reader(folder: Path) -> Iterator[Any]:
    """Lucene's IndexReader of the folder, closed at the end. The JVM must run."""
    try:
        reader = java_class("io.anserini.index.IndexReaderUtils").getReader(str(folder))
    except Exception as error:
        raise _not_an_index(folder, error) from None
    try:
        yield reader
    finally:
        reader.close()


def _prebuilt(name: str) -> Path:
    from pyserini.prebuilt_index_info import TF_INDEX_INFO
    from pyserini.util import download_prebuilt_index, get_cache_home

    if name not in TF_INDEX_INFO:
        near = difflib.get_close_matches(name, TF_INDEX_INFO, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise SearchError(
            f"no folder and no Pyserini prebuilt index is named {name!r}; {hint}make one with: toolrl index build CORPUS.jsonl {name}"
        )
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return Path(download_prebuilt_index(name, verbose=False))
    except Exception as error:
        size = TF_INDEX_INFO[name].get("size compressed (bytes)", 0) / 2**30
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SearchError(
            f"the prebuilt index {name!r} ({size:.1f} GiB) cannot be downloaded to {get_cache_home()} ({reason}); remedy: connect, or "
            "unpack it elsewhere and give its folder, or set PYSERINI_CACHE to a folder that has it"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def _not_an_index(folder: Path, error: Exception) -> Exception:
    if not is_java_error(error):
        return error
    return SearchError(
        f"{str(folder)!r} cannot be opened as a Lucene index ({java_reason(error)}); build it again with: toolrl index build"
    )


def _hit(found: Any) -> Hit:
    document = found.lucene_document
    raw = document.get("raw")
    return Hit(found, *read_raw(raw if raw is not None else document.get("contents")))


def _title_first(query: str, hits: list[Hit]) -> list[Hit]:
    """The hit whose title is the query, or comes nearest, then the rest; a title that is so as it stands comes before a bare one."""
    key = title_key(query)
    for which in (0, 1):
        same = [index for index, hit in enumerate(hits) if key and title_keys(hit.title)[which] == key]
        if same:
            index = min(same, key=lambda index: title_distance(query, title_forms(hits[index].title)[which]))
            return [hits[index], *hits[:index], *hits[index + 1 :]]
    return hits
