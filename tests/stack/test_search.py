"""Search with the real Pyserini index and a real JVM, one for the whole module: small corpora made here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.conftest import HEARS_CTRL_C
from tools_service.protocol import ToolCall, ToolResult, ToolStatus
from tools_service.search import index, searcher
from tools_service.search.corpus import MAX_ID_BYTES, SearchError
from tools_service.search.java import java_class, start_jvm
from tools_service.search.titles import Titles
from tools_service.search.tool import WikiTool

pytestmark = pytest.mark.java
ROOT = Path(__file__).resolve().parents[2]
PASSAGES = [
    {
        "id": "d1",
        "title": "Patrick Poivey",
        "text": "Bruce Willis, Bruce Willis, Bruce Willis: Patrick Poivey is the French voice of Bruce Willis.",
    },
    {
        "id": "d2",
        "title": "Bruce Willis",
        "text": "Walter Willis is an American actor born in 1955. He sang too. His films made money.\nHe starred in Die Hard with Bruce.",
    },
    {"id": "d3", "title": "Bruce Willis", "text": "A second passage of the article, on awards won by Willis."},
    {"id": "d4", "title": "Mercury (planet)", "text": "Mercury is the smallest planet."},
    {"id": "d5", "title": "Mercury (element)", "text": "Mercury is a liquid metal. Mercury, mercury, mercury."},
    {"id": "d6", "title": "The Beatles", "text": "An English band from Liverpool 😀 with “quotes”."},
    {"id": "d7", "text": "Some notes without a title about 1,000 zebras."},
    {"id": "t3", "text": "Identical twins text."},
    {"id": "t1", "text": "Identical twins text."},
    {"id": "t2", "text": "Identical twins text."},
]


def corpus_file(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("search")
    index.build(corpus_file(place / "corpus.jsonl", PASSAGES), place / "wiki")
    return place / "wiki"


@pytest.fixture(scope="module")
def pyserini_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Pyserini's own indexer makes it, from `contents` whose first line is the title; no table of titles."""
    start_jvm()
    place = tmp_path_factory.mktemp("pyserini") / "index"
    options = ["-collection", "JsonCollection", "-input", "", "-index", str(place), "-storeRaw"]
    indexer = java_class("io.anserini.index.SimpleIndexer")(options)
    for row in PASSAGES:
        contents = f"{row['title']}\n{row['text']}" if "title" in row else row["text"]
        indexer.addRawDocument(json.dumps({"id": row["id"], "contents": contents}))
    indexer.close()
    return place


@pytest.fixture(params=["ours", "pyserini"])
def either(request: pytest.FixtureRequest, folder: Path, pyserini_folder: Path) -> str:
    return str(folder if request.param == "ours" else pyserini_folder)


async def ask(tool: WikiTool, *queries: str) -> list[ToolResult]:
    try:
        return await tool.call_many([ToolCall(tool.name, query) for query in queries])
    finally:
        await tool.close()


async def text_for(query: str, where: Path | str, **options: object) -> str:
    [result] = await ask(WikiTool(str(where), **options), query)
    assert result.status is ToolStatus.OK
    return result.text


def test_an_index_says_what_it_holds(folder: Path) -> None:
    found = index.info(str(folder))
    assert found["num_documents"] == len(PASSAGES)
    assert found["titles"] and found["fields"] == ["contents", "id", "raw"]
    assert found["built_with"].keys() == {"pyserini", "anserini", "lucene"}
    assert found["size_bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert f"num_documents  {len(PASSAGES)}" in index.cli_info(str(folder))


def test_pyserinis_own_index_is_read_too(pyserini_folder: Path) -> None:
    found = index.info(str(pyserini_folder))
    assert (found["num_documents"], found["titles"]) == (len(PASSAGES), False)
    assert found["analyzer"].startswith("not recorded") and found["built_with"].keys() == {"lucene"}


def test_pyserinis_searcher_opens_our_index_and_finds_the_same(folder: Path) -> None:
    os.environ.setdefault("OPENAI_API_KEY", "not used")
    start_jvm()
    from pyserini.search.lucene import LuceneSearcher

    theirs = LuceneSearcher(str(folder))
    theirs.set_bm25(0.9, 0.4)
    ours = searcher.open_index(str(folder))
    for query in ("Bruce Willis", "mercury", "identical twins", "english band"):
        [hits] = ours.search([query], 5, 1)
        assert [(hit.docid, hit.score) for hit in hits] == [(hit.docid, hit.score) for hit in theirs.search(query, k=5)]
    ours.close()


async def test_title_and_text_come_back_whole(either: str) -> None:
    assert await text_for("liverpool band", either) == "The Beatles: An English band from Liverpool 😀 with “quotes”."
    assert await text_for("liverpool band", either, show_title=False) == "An English band from Liverpool 😀 with “quotes”."
    assert await text_for("zebras", either) == "Some notes without a title about 1,000 zebras."


async def test_the_first_paragraph_or_the_whole_passage(either: str) -> None:
    first = "Walter Willis is an American actor born in 1955. He sang too. His films made money."
    assert await text_for("american actor", either, show_title=False) == first
    assert await text_for("american actor", either, show_title=False, passage="whole") == f"{first}\nHe starred in Die Hard with Bruce."


async def test_title_match_prefers_the_article_that_the_query_names(either: str) -> None:
    assert (await text_for("Bruce Willis", either)).startswith("Patrick Poivey:")
    assert (await text_for("bruce  willis?", either, title_match=True)).startswith("Bruce Willis: ")
    assert (await text_for("beatles", either, title_match=True)).startswith("The Beatles:")
    assert (await text_for("french voice", either, title_match=True)).startswith("Patrick Poivey:")


async def test_of_an_article_with_several_passages_title_match_takes_the_first(folder: Path) -> None:
    assert (await text_for("Bruce Willis", folder, title_match=True)).startswith("Bruce Willis: Walter")


async def test_title_match_knows_a_disambiguation(folder: Path) -> None:
    assert (await text_for("Mercury (element)", folder, title_match=True)).startswith("Mercury (element)")
    assert (await text_for("mercury", folder, title_match=True)).startswith("Mercury (planet)")  # the first in the corpus
    assert (await text_for("mercury", folder)).startswith("Mercury (element)")


@pytest.fixture(scope="module")
def near_titles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of titles that differ in what title_match passes over; one of them has two passages."""
    titles = ["C++", "C#", "Who", "The Who", "YES!", "Yes", "yes", "Mercury! (band)", "Mercury (planet)", "Résumé", "Resume", "Resume"]
    titles += ["!!!", "÷ (album)"]
    place = tmp_path_factory.mktemp("near_titles")
    rows = ({"id": str(number), "title": title, "text": f"{title} is passage {number}."} for number, title in enumerate(titles))
    index.build(corpus_file(place / "corpus.jsonl", rows), place / "index")
    return place / "index"


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize(
    ("query", "title"),
    [
        ("C++", "C++"),
        ("C#", "C#"),
        ("c#", "C#"),
        ("Who", "Who"),
        ("The Who", "The Who"),
        ("the who", "The Who"),
        ("YES!", "YES!"),
        ("Yes", "Yes"),
        ("yes", "yes"),
        ("Mercury", "Mercury (planet)"),
        ("Résumé", "Résumé"),
        ("resume", "Resume"),
    ],
)
async def test_of_several_titles_that_fit_title_match_takes_the_nearest(
    near_titles: Path, tmp_path: Path, table: bool, query: str, title: str
) -> None:
    if not table:  # the title is looked for among the best hits
        shutil.copytree(near_titles, tmp_path / "index", ignore=shutil.ignore_patterns("titles.sqlite"))
        near_titles = tmp_path / "index"
    assert (await text_for(query, near_titles, title_match=True)).startswith(f"{title}: ")


async def test_title_match_finds_a_title_without_letters(near_titles: Path) -> None:
    assert await text_for("!!!", near_titles, title_match=True) == "!!!: !!! is passage 12."
    assert (await text_for("÷", near_titles, title_match=True)).startswith("÷ (album): ")


def test_of_the_nearest_article_title_match_takes_the_first_passage(near_titles: Path) -> None:
    titles = Titles(near_titles)
    assert [titles.find(query) for query in ("Resume", "resume", "ResuMÉ", "C", "nothing")] == ["10", "10", "9", "0", None]
    titles.close()


async def test_a_table_of_titles_without_the_titles_as_written_is_still_read(near_titles: Path, tmp_path: Path) -> None:
    shutil.copytree(near_titles, tmp_path / "index")
    with contextlib.closing(sqlite3.connect(tmp_path / "index" / "titles.sqlite")) as table:
        table.executescript(
            "DROP INDEX by_title; DROP INDEX by_bare; ALTER TABLE passages DROP COLUMN name;"
            "CREATE INDEX by_title ON passages (title, line) WHERE title IS NOT NULL;"
            "CREATE INDEX by_bare ON passages (bare, line) WHERE bare IS NOT NULL;"
        )
    assert (await text_for("yes", tmp_path / "index", title_match=True)).startswith("YES!: ")
    assert (await text_for("Mercury", tmp_path / "index", title_match=True)).startswith("Mercury! (band): ")


async def test_title_match_puts_the_article_first_and_the_best_hits_after_it_without_repeating_any(either: str) -> None:
    passages = (await text_for("Bruce Willis", either, title_match=True, k=3)).split("\n\n")
    assert passages[0].startswith("Bruce Willis: ") and passages[1].startswith("Patrick Poivey:")
    assert len(set(passages)) == 3


async def test_concise_keeps_the_sentences_that_match(folder: Path) -> None:
    long = {"id": "x", "title": "X", "text": "Alpha one. Beta two. Gamma three. Delta four. The treasure lies here. Zeta six."}
    place = folder.parent / "long"
    index.build(corpus_file(folder.parent / "long.jsonl", [long]), place)
    assert await text_for("treasure in delta", place, concise=True) == "X: Alpha one. Delta four. The treasure lies here."


async def test_equal_scores_are_ordered_by_id_every_time(either: str) -> None:
    opened = searcher.open_index(either)
    for _ in range(5):
        assert [[hit.docid for hit in hits] for hits in opened.search(["identical twins"] * 3, 3, 2)] == [["t1", "t2", "t3"]] * 3
        assert [hit.docid for hit in opened.search(["identical twins"], 2, 1)[0]] == ["t1", "t2"]
    opened.close()


async def test_a_batch_answers_every_call_in_order_as_if_alone(folder: Path) -> None:
    queries = ["liverpool", "", "zebras", "xyzzy", "liverpool", "planet"] * 10
    tool = WikiTool(str(folder))
    alone = [(await tool.call(ToolCall("Wiki", query))) for query in queries[:6]]
    batch = await ask(tool, *queries)
    assert [(r.status, r.text) for r in batch] == [(r.status, r.text) for r in alone] * 10
    assert all(result.latency_s > 0 for result in batch)


async def test_empty_queries_and_queries_without_a_hit_are_answered_in_words(folder: Path) -> None:
    results = await ask(WikiTool(str(folder)), "", " \n ", "xyzzy", "?!", "the of")
    assert [result.status for result in results] == [ToolStatus.BAD_ARGUMENTS] * 2 + [ToolStatus.OK] * 3
    assert results[0].text == "The query is empty: write the words to search for."
    assert [result.text for result in results[2:]] == ["No results for 'xyzzy'.", "No results for '?!'.", "No results for 'the of'."]


@pytest.mark.parametrize("title_match", [False, True])
async def test_no_character_and_no_length_of_a_query_is_an_error(folder: Path, title_match: bool) -> None:
    queries = [
        "zebras AND OR NOT (",
        'zebras "',
        "zebras* ~2 ^3 contents:x [a TO b]",
        "\x00zebras\x1b",
        "\ud800 zebras",
        "🦓 zebras \\",
        "zebras' OR 1=1 --",
    ]
    queries += ["zebras " + " ".join(f"w{n}" for n in range(5_000)), "zebras " + "漢" * 5_000, "z" * 100_000]
    results = await ask(WikiTool(str(folder), title_match=title_match), *queries)
    assert {result.status for result in results} == {ToolStatus.OK}
    assert [result.text for result in results[:-1]] == ["Some notes without a title about 1,000 zebras."] * (len(queries) - 1)
    assert results[-1].text.startswith("No results for 'zzz") and len(results[-1].text) < 300


async def test_limits_cut_the_answer_between_words_and_say_so(folder: Path) -> None:
    [words] = await ask(WikiTool(str(folder), max_tokens=4, k=2), "mercury")
    assert (words.text, words.truncated) == ("Mercury (element): Mercury is", True)
    [chars] = await ask(WikiTool(str(folder), max_chars=20), "mercury")
    assert (chars.text, chars.truncated) == ("Mercury (element):", True)
    [fits] = await ask(WikiTool(str(folder), max_chars=10_000, max_tokens=10_000), "mercury")
    assert not fits.truncated


async def test_k_b_and_k1_reach_the_ranking(folder: Path) -> None:
    assert len((await text_for("identical twins", folder, k=3)).split("\n\n")) == 3
    plain, other = searcher.open_index(str(folder)), searcher.open_index(str(folder), k1=2.0, b=1.0)
    assert plain.search(["mercury"], 1, 1)[0][0].score != other.search(["mercury"], 1, 1)[0][0].score
    plain.close()
    other.close()


async def test_several_indexes_are_several_tools_of_one_process(folder: Path, tmp_path: Path) -> None:
    index.build(corpus_file(tmp_path / "c.jsonl", [{"id": "1", "text": "Zebras of the second index."}]), tmp_path / "two")
    first, second = WikiTool(str(folder)), WikiTool(str(tmp_path / "two"), name="Notes")
    assert (first.name, second.name) == ("Wiki", "Notes")
    [one], [two] = await asyncio.gather(ask(first, "zebras"), ask(second, "zebras"))
    assert one.text.startswith("Some notes") and two.text == "Zebras of the second index."


async def test_the_event_loop_stays_free_and_a_late_answer_is_a_timeout(folder: Path) -> None:
    tool = WikiTool(str(folder), threads=1)
    release = threading.Event()
    tool._pool.submit(release.wait, 30)  # the only thread is taken, as by a search that takes long
    call = asyncio.create_task(tool.call_many([ToolCall("Wiki", "zebras", deadline_s=0.2), ToolCall("Wiki", "zebras", deadline_s=0.1)]))
    ticks = 0
    while not call.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert [result.status for result in await call] == [ToolStatus.TIMEOUT] * 2
    assert ticks >= 5
    release.set()
    assert (await ask(tool, "zebras"))[0].status is ToolStatus.OK


async def test_a_cancelled_call_ends_at_once_and_the_next_is_answered(folder: Path) -> None:
    tool = WikiTool(str(folder), threads=1)
    release = threading.Event()
    tool._pool.submit(release.wait, 30)
    call = asyncio.create_task(tool.call(ToolCall("Wiki", "zebras", deadline_s=60)))
    await asyncio.sleep(0.05)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(call, 5)
    release.set()
    assert (await ask(tool, "zebras"))[0].status is ToolStatus.OK


async def test_a_failure_of_java_is_unavailable_not_the_policys_fault(folder: Path) -> None:
    tool = WikiTool(str(folder))
    tool._searcher.close()
    [result] = await ask(tool, "zebras")
    assert result.status is ToolStatus.UNAVAILABLE
    assert "\n" not in result.text and tool.stats()["num_failed"] == 1


async def test_the_probe_is_answered_and_the_tool_describes_itself(folder: Path) -> None:
    tool = WikiTool(str(folder))
    assert tool.idempotent and tool.cacheable and tool.max_batch > 1
    assert list(tool.parameters["properties"]) == ["query"]
    assert (await ask(tool, tool.probe))[0].status is ToolStatus.OK


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"index": None}, "index=None must be a folder made by `toolrl index build`"),
        ({"k": 0}, "k=0 must be a whole number from 1 to 100"),
        ({"k": True}, "k=True"),
        ({"b": 1.5}, "b=1.5 must be a number from 0 to 1"),
        ({"k1": float("nan")}, "k1=nan"),
        ({"passage": "half"}, "passage='half' must be 'first_paragraph' or 'whole'"),
        ({"concise": "yes"}, "concise='yes' must be true or false"),
        ({"max_chars": 0}, "max_chars=0 must be a whole number of 1 or more"),
        ({"max_tokens": 2.5}, "max_tokens=2.5"),
        ({"heap_mib": 8}, "heap_mib=8 must be a whole number from 64"),
        ({"threads": 0}, "threads=0"),
        ({"name": ""}, "name=''"),
        ({"index": "/nowhere/at/all"}, "no folder '/nowhere/at/all'; make an index with: toolrl index build"),
        ({"index": "wikipedia-kilt-dok"}, "did you mean wikipedia-kilt-doc"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(folder: Path, options: dict, complaint: str) -> None:
    with pytest.raises(ValueError) as raised:
        WikiTool(**({"index": str(folder)} | options))
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)


def test_folders_that_are_no_index_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="holds no Lucene index"):
        searcher.open_index(str(tmp_path))
    (tmp_path / "segments_1").write_text("rubbish")
    with pytest.raises(SearchError, match="cannot be opened as a Lucene index"):
        searcher.open_index(str(tmp_path))
    with pytest.raises(SearchError, match="is a file, not an index"):
        searcher.open_index(str(tmp_path / "segments_1"))


def test_an_index_that_stores_no_text_is_refused(tmp_path: Path) -> None:
    start_jvm()
    indexer = java_class("io.anserini.index.SimpleIndexer")(str(tmp_path / "index"), False, 1)
    indexer.addRawDocument(json.dumps({"id": "1", "contents": "text"}))
    indexer.close()
    with pytest.raises(SearchError, match="stores no text.*-storeRaw"):
        searcher.open_index(str(tmp_path / "index"))


@pytest.fixture
def kept_prebuilt(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a prebuilt index that lies where pyserini keeps it."""
    start_jvm()
    from pyserini.prebuilt_index_info import TF_INDEX_INFO

    entry = TF_INDEX_INFO["wikipedia-kilt-doc"]
    kept = tmp_path / "indexes" / f"{entry['filename'].removesuffix('.tar.gz')}.{entry['md5']}"
    kept.parent.mkdir()
    kept.symlink_to(folder)
    monkeypatch.setenv("PYSERINI_CACHE", str(tmp_path))
    return "wikipedia-kilt-doc"


def test_a_prebuilt_index_is_found_where_pyserini_keeps_it(kept_prebuilt: str) -> None:
    opened = searcher.open_index(kept_prebuilt)
    assert opened.num_documents == len(PASSAGES)
    opened.close()


def test_a_prebuilt_index_bounds_the_heap_of_a_fresh_process_too(kept_prebuilt: str) -> None:
    code = (
        "import sys\n"
        "from tools_service.search import java, searcher\n"
        "searcher.open_index(sys.argv[1], heap_mib=100)\n"
        "assert java.java_class('java.lang.Runtime').getRuntime().maxMemory() <= 100 * 2**20\n"
    )
    done = subprocess.run([sys.executable, "-c", code, kept_prebuilt], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_prebuilt_index_that_cannot_be_downloaded_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSERINI_CACHE", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(SearchError, match=r"'wikipedia-kilt-doc' \(10.2 GiB\) cannot be downloaded") as raised:
        searcher.open_index("wikipedia-kilt-doc")
    assert "\n" not in str(raised.value) and "PYSERINI_CACHE" in str(raised.value)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".jsonl")


def test_build_refuses_to_overwrite(folder: Path, tmp_path: Path) -> None:
    before = sorted(file.name for file in folder.iterdir())
    with pytest.raises(SearchError, match="exists already"):
        index.build(corpus_file(tmp_path / "c.jsonl", PASSAGES), folder)
    assert sorted(file.name for file in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], "no passages"),
        ([{"id": "a", "text": "x"}, {"id": "b"}], "line 2: neither text nor contents"),
        ([{"id": "a", "text": "x"}, {"id": "b", "text": "y"}, {"id": "a", "text": "z"}], "line 3: the id 'a' is that of line 1 too"),
    ],
)
def test_a_corpus_with_a_mistake_leaves_nothing_behind(tmp_path: Path, rows: list[dict], complaint: str) -> None:
    with pytest.raises(SearchError, match=complaint):
        index.build(corpus_file(tmp_path / "c.jsonl", rows), tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_an_id_that_repeats_far_apart_is_found(tmp_path: Path) -> None:
    rows = [{"id": str(number % 2_500), "text": "x"} for number in range(2_501)]
    with pytest.raises(SearchError, match="line 2501: the id '0' is that of line 1 too"):
        index.build(corpus_file(tmp_path / "c.jsonl", rows), tmp_path / "out")


def test_the_longest_id_that_a_corpus_may_have_is_indexed(tmp_path: Path) -> None:
    rows = [{"id": "i" * MAX_ID_BYTES, "text": "Zebras."}]
    assert index.build(corpus_file(tmp_path / "c.jsonl", rows), tmp_path / "out")["num_documents"] == 1


def test_build_needs_a_folder_to_write_in(tmp_path: Path) -> None:
    corpus = corpus_file(tmp_path / "c.jsonl", PASSAGES)
    with pytest.raises(SearchError, match="no folder"):
        index.build(corpus, tmp_path / "none" / "out")


@pytest.fixture
def building(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A build of tmp_path/out in a process of its own, just begun, with seconds of work before it."""
    rows = ({"id": str(number), "title": f"T {number}", "text": f"words {number} " * 10} for number in range(200_000))
    corpus = corpus_file(tmp_path / "big.jsonl", rows)
    code = "import sys; from tools_service.search.index import cli_build; cli_build(*sys.argv[1:])"
    command = [*HEARS_CTRL_C, sys.executable, "-c", code, str(corpus), str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / ".out.partial" / "titles.sqlite").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_kill_leave_nothing_half_written(building: subprocess.Popen, tmp_path: Path, number: int) -> None:
    building.send_signal(number)
    assert building.wait(60) != 0
    assert leftovers(tmp_path) == []


def test_what_kill_9_leaves_is_not_an_index_and_goes_at_the_next_build(building: subprocess.Popen, tmp_path: Path) -> None:
    corpus = corpus_file(tmp_path / "real.jsonl", PASSAGES)
    start_jvm()
    with pytest.raises(SearchError, match="another build of .* is running"):
        index.build(corpus, tmp_path / "out")
    building.kill()
    building.wait(30)
    assert leftovers(tmp_path) == [".out.partial"]
    assert index.build(corpus, tmp_path / "out")["num_documents"] == len(PASSAGES)
    assert leftovers(tmp_path) == ["out"]


def test_a_fresh_process_bounds_its_heap_says_nothing_and_loads_no_torch(folder: Path) -> None:
    code = (
        "import asyncio, sys\n"
        "from tools_service.protocol import ToolCall\n"
        "from tools_service.search.tool import WikiTool\n"
        "async def main():\n"
        "    tool = WikiTool(sys.argv[1], heap_mib=100)\n"
        "    print((await tool.call(ToolCall('Wiki', 'zebras'))).text)\n"
        "    from tools_service.search.java import java_class\n"
        "    assert java_class('java.lang.Runtime').getRuntime().maxMemory() <= 100 * 2**20\n"
        "    assert 'torch' not in sys.modules and 'pyserini.search' not in sys.modules\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Some notes without a title about 1,000 zebras.\n", "")


def test_a_heap_that_the_machine_cannot_give_is_one_line_and_not_the_end_of_the_process(folder: Path) -> None:
    code = (
        "import resource, sys\n"
        "from tools_service.search.java import JavaUnavailable\n"
        "from tools_service.search.tool import WikiTool\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "try:\n"
        "    WikiTool(sys.argv[1], heap_mib=8192)\n"
        "except JavaUnavailable as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "does not start with -Xmx8192m" in done.stdout and "remedy: a smaller heap_mib" in done.stdout
    assert done.stdout.count("\n") == 1


async def test_searches_are_counted(folder: Path) -> None:
    tool = WikiTool(str(folder))
    await ask(tool, "zebras", "zebras", "xyzzy", "")
    assert tool.stats() == {"num_searches": 2, "num_without_hit": 1, "num_failed": 0}  # the same query twice is one search
