"""`toolrl index build` and `toolrl index info`: a Lucene index made by Pyserini's indexer, with a table of titles beside it.

An index folder holds Lucene's own files (so Pyserini's `LuceneSearcher` opens it as well), `titles.sqlite` and `toolrl-index.json`.
It is built in `.NAME.partial` beside its place and renamed whole. An exception, Ctrl-C or `kill` removes that folder; `kill -9`
leaves it, and the next build of the same index removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import shutil
import signal
import sqlite3
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tools_service.search.corpus import SearchError, read_corpus
from tools_service.search.java import anserini_jar, is_java_error, java_class, java_reason, start_jvm
from tools_service.search.searcher import index_folder, open_reader
from tools_service.search.titles import FILE as TITLES_FILE
from tools_service.search.titles import TitleWriter

MANIFEST = "toolrl-index.json"
ANALYZER = "Lucene English: Porter stemmer, stop words dropped"
BATCH_PASSAGES = 1_000
BUFFER_MIB = 128  # of Lucene, before it writes a segment; its heap has to be several times as large
HEAP_MIB = 1024


def build(corpus: Path, out: Path, progress: bool = False) -> dict[str, Any]:
    """Indexes the corpus into the new folder `out` and returns `info(out)`. progress: show a bar on stderr.

    Raises SearchError (a bad line, an id twice, `out` exists, another build of `out` runs, no passages) and JavaUnavailable.
    """
    if os.path.lexists(out):
        raise SearchError(f"{str(out)!r} exists already; name another folder, or remove it first")
    first = next(read_corpus(corpus), None)  # a wrong file is refused before anything is made
    if first is None:
        raise SearchError(f"{corpus}: no passages in it; write one JSON object a line")
    start_jvm(HEAP_MIB)
    with _aside(out) as partial:
        num_passages = _write(corpus, partial, progress)
        versions = {"pyserini": importlib.metadata.version("pyserini"), "anserini": anserini_jar().name.split("-")[1]}
        versions["lucene"] = java_class("org.apache.lucene.util.Version").LATEST.toString()
        manifest = {"num_documents": num_passages, "analyzer": ANALYZER, "built_with": versions, "corpus": corpus.name}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        try:
            os.rename(partial, out)
        except OSError as error:
            raise SearchError(f"{str(out)!r} cannot take the finished index ({error.strerror}); name another folder") from None
    return info(str(out))


def info(name_or_path: str) -> dict[str, Any]:
    """What an index folder (or the name of a Pyserini prebuilt index) holds: path, num_documents, num_terms, size_bytes, fields,
    analyzer, built_with, titles (a table for `title_match` is there). Raises SearchError and JavaUnavailable."""
    folder = index_folder(name_or_path)
    with open_reader(folder) as reader:
        utils = java_class("io.anserini.index.IndexReaderUtils")
        stats = utils.getIndexStats(reader)
        fields = sorted(utils.getFieldInfoDescription(reader).keySet().toArray())
        segments = java_class("org.apache.lucene.index.SegmentInfos").readLatestCommit(
            java_class("org.apache.lucene.store.FSDirectory").open(java_class("java.io.File")(str(folder)).toPath())
        )
        lucene = segments.getCommitLuceneVersion().toString()
        num_documents, num_terms = reader.numDocs(), int(stats.get("total_terms"))
    result = {
        "path": str(folder),
        "num_documents": num_documents,
        "num_terms": num_terms,
        "size_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "fields": fields,
        "analyzer": "not recorded (made by another program); searched as " + ANALYZER,
        "built_with": {"lucene": lucene},
        "titles": (folder / TITLES_FILE).is_file(),
    }
    with contextlib.suppress(OSError, ValueError):
        manifest = json.loads((folder / MANIFEST).read_text())
        result |= {key: manifest[key] for key in ("analyzer", "built_with") if key in manifest}
    return result


def cli_build(corpus: str, out: str) -> str:
    """`toolrl index build CORPUS OUT`: returns what to print. `kill` cleans up like Ctrl-C."""
    previous = None
    if threading.current_thread() is threading.main_thread():
        previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _lines(build(Path(corpus), Path(out), progress=True))
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def cli_info(path: str) -> str:
    """`toolrl index info PATH`: returns what to print."""
    return _lines(info(path))


def _lines(found: dict[str, Any]) -> str:
    shown = dict(found, size_bytes=f"{found['size_bytes']:,} ({found['size_bytes'] / 2**20:.1f} MiB)", fields=", ".join(found["fields"]))
    shown["built_with"] = ", ".join(f"{key} {value}" for key, value in found["built_with"].items())
    shown["titles"] = "yes" if found["titles"] else "no: title_match looks among the best hits only"
    return "\n".join(f"{key:<14} {value:,}" if isinstance(value, int) else f"{key:<14} {value}" for key, value in shown.items())


def _terminate(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


def _write(corpus: Path, partial: Path, progress: bool) -> int:
    """Indexes every passage into `partial`; returns how many."""
    from tqdm import tqdm

    titles = TitleWriter(partial, corpus)
    threads = max(1, min(8, len(os.sched_getaffinity(0))))
    options = ["-collection", "JsonCollection", "-input", "", "-index", str(partial), "-storeRaw", "-quiet"]
    options += ["-threads", str(threads), "-memoryBuffer", str(BUFFER_MIB)]
    indexer = None
    num_passages = num_bytes = 0
    try:
        indexer = java_class("io.anserini.index.SimpleIndexer")(options)
        passages = read_corpus(corpus)
        with tqdm(total=corpus.stat().st_size, unit="B", unit_scale=True, desc="indexing", disable=not progress) as bar:
            while batch := list(islice(passages, BATCH_PASSAGES)):
                titles.add(batch)
                added = indexer.addRawDocuments([passage.raw() for passage in batch])
                if added != len(batch):
                    raise SearchError(
                        f"{corpus}, lines {batch[0].line} to {batch[-1].line}: Lucene took {added} of {len(batch)}; is the disk full?"
                    )
                num_passages += added
                bar.update(batch[-1].end - num_bytes)
                bar.set_postfix(passages=f"{num_passages:,}", refresh=False)
                num_bytes = batch[-1].end
        indexer.close()
        indexer = None
        titles.finish()
        with contextlib.suppress(FileNotFoundError):
            (partial / "write.lock").unlink()  # Lucene's, of no use in an index that is never written again
    except sqlite3.Error as error:
        raise SearchError(f"{partial}: {error}; is the disk full or the folder not writable?") from None
    except Exception as error:
        if is_java_error(error):
            raise SearchError(f"{partial}: {java_reason(error)}; is the disk full or the folder not writable?") from None
        raise
    finally:
        titles.close()
        if indexer is not None:
            with contextlib.suppress(Exception):  # on the way out with an error of its own; the folder is removed next
                indexer.close()
    return num_passages


@contextlib.contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, locked for this build and removed in the end unless it was renamed."""
    partial = out.absolute().with_name(f".{out.absolute().name}.partial")
    if not partial.parent.is_dir():
        raise SearchError(f"no folder {str(partial.parent)!r} to put the index in; make it first")
    try:
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise SearchError(f"{str(partial)!r} cannot be made ({error.strerror}); name a folder in a writable place") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = partial.exists() and os.path.samestat(os.fstat(lock), partial.stat())  # not renamed by another build just now
        except OSError:
            alone = False
        if not alone:
            raise SearchError(f"another build of {str(out)!r} is running; wait for it, or stop it first")
        for left in partial.iterdir():  # by a build that was killed
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)
