"""Search: time to index, searches a second against Pyserini's own batch_search, and how often the answer is in what comes back.

    python scripts/bench/search.py [--index-only | --speed-only | --recall-only] [--through-service]
                                   [--rounds 5] [--queries 2000] [--questions 2000] [--seed 0] [--json FILE]

Data: wiki/passages.jsonl.xz and wiki/questions.jsonl.xz in TOOLRL_DATA (default ../shared/data beside the checkout).

index    the 42,149 passages with `toolrl index build`'s function: seconds and passages a second
speed    both sides answer the same questions in turns, in one process: `pyserini` is LuceneSearcher.batch_search with the stored
         text read of every first hit; `hits_only` is the same without reading any text; `tool` is WikiTool.call_many;
         `service` (--through-service) the tool behind Ray Serve, called one query at a time by a client with 256 in flight
recall   share of questions whose answer (as TriviaQA normalises) is in the returned text, and its mean length in words
"""

from __future__ import annotations

import argparse
import asyncio
import json
import lzma
import os
import random
import re
import statistics
import string
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolrl_ray.config import ToolsConfig
from toolrl_ray.tools.serve_client import ToolClient, start_tools
from tools_service.protocol import ToolCall, ToolStatus
from tools_service.search import index
from tools_service.search.corpus import read_corpus
from tools_service.search.java import java_class
from tools_service.search.tool import WikiTool

VARIANTS = {
    "plain": {},
    "title_match": {"title_match": True},
    "concise": {"concise": True},
    "title_match + concise": {"title_match": True, "concise": True},
    "plain, cut": {},  # for comparison with concise: the first CUT_TOKENS words for each of the k
}
CUT_TOKENS = 80
BATCH = 64
THREADS = 2
IN_FLIGHT = 256
WARM_UP = 40_000  # searches before anything is measured, of either JVM: its compiler takes a fifth of the machine until then
APP = "bench-search"


def data_dir() -> Path:
    folder = Path(os.environ.get("TOOLRL_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data") / "wiki"
    if not (folder / "passages.jsonl.xz").is_file():
        raise SystemExit(f"no passages.jsonl.xz in {folder}; set TOOLRL_DATA to the folder that holds wiki/")
    return folder


def unpack(name: str, folder: Path) -> Path:
    target = folder / name
    with lzma.open(data_dir() / f"{name}.xz") as source:
        target.write_bytes(source.read())
    return target


def measure_index(corpus: Path, out: Path) -> dict[str, Any]:
    index.start_jvm(index.HEAP_MIB)
    start = time.perf_counter()
    found = index.build(corpus, out)
    taken_s = time.perf_counter() - start
    num = found["num_documents"]
    return {"num_passages": num, "seconds": taken_s, "passages_per_s": num / taken_s, "mib": found["size_bytes"] / 2**20}


def pyserini_searcher(folder: Path) -> Any:
    """Pyserini's LuceneSearcher on the JVM that runs already."""
    os.environ.setdefault("OPENAI_API_KEY", "not used")  # its import makes an OpenAI client, which wants one
    from pyserini.search.lucene import LuceneSearcher

    searcher = LuceneSearcher(str(folder))
    searcher.set_bm25(0.9, 0.4)
    return searcher


class Caller:
    """Calls the served tool as a training run does, one call a query, at most IN_FLIGHT at a time."""

    def __init__(self, config: ToolsConfig):
        self._client = ToolClient(APP, config)

    async def ask(self, queries: list[str]) -> dict[str, int]:
        """How many calls ended how."""
        waiting, statuses = iter(queries), Counter[str]()

        async def worker() -> None:
            for query in waiting:
                result = await self._client(ToolCall("Wiki", query, 60.0))
                statuses[str(result.status) if result.status is ToolStatus.OK else f"{result.status}: {result.text}"] += 1

        await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
        return dict(statuses)


def start_service(folder: Path) -> Any:
    """The tool behind Serve on the Ray that runs; returns the caller."""
    import ray

    config = ToolsConfig(names=["Wiki"], options={"Wiki": {"index": str(folder), "threads": THREADS}})
    start_tools(config, APP)
    return ray.remote(num_cpus=0)(Caller).remote(config)


async def through_service(caller: Any, queries: list[str]) -> None:
    """The side of `speed` that calls the tool through its Serve deployment, in the same rounds as the others."""
    statuses = await caller.ask.remote(queries)
    if statuses != {"ok": len(queries)}:
        raise RuntimeError(f"the service answered {statuses}")


async def measure_speed(folder: Path, queries: list[str], rounds: int, with_service: bool) -> dict[str, Any]:
    """Median searches a second of each side, and each side's ratio to `pyserini`: the median of the ratios within each round."""
    tool, searcher = WikiTool(str(folder), threads=THREADS), pyserini_searcher(folder)
    batches = [queries[start : start + BATCH] for start in range(0, len(queries), BATCH)]

    async def hits_only() -> None:
        for batch in batches:
            searcher.batch_search(batch, [str(number) for number in range(len(batch))], k=1, threads=THREADS)

    async def pyserini() -> None:
        for batch in batches:
            found = searcher.batch_search(batch, [str(number) for number in range(len(batch))], k=1, threads=THREADS)
            for hits in found.values():
                json.loads(hits[0].lucene_document.get("raw")) if hits else None

    async def call_tool() -> None:
        for batch in batches:
            results = await tool.call_many([ToolCall("Wiki", query) for query in batch])
            if wrong := [result for result in results if result.status is not ToolStatus.OK]:
                raise RuntimeError(f"the tool answered {wrong[0]}")

    sides: dict[str, Callable] = {"pyserini": pyserini, "hits_only": hits_only, "tool": call_tool}
    if with_service:
        caller = start_service(folder)
        sides["service"] = lambda: through_service(caller, queries)
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(-(-WARM_UP // len(queries))):
        for side in ("pyserini", "service"):
            if side in sides:
                await sides[side]()
    for number in range(rounds + 1):
        for side, run in sides.items():
            start = time.perf_counter()
            await run()
            if number:
                rates[side].append(len(queries) / (time.perf_counter() - start))
    await tool.close()
    medians = {side: statistics.median(values) for side, values in rates.items()}
    to = {
        base: {side: [a / b for a, b in zip(rates[side], rates[base], strict=True)] for side in rates} for base in ("pyserini", "hits_only")
    }
    ratios = {base: {side: statistics.median(values) for side, values in sides.items()} for base, sides in to.items()}
    return {"queries": len(queries), "per_s": medians, "ratio_to_pyserini": ratios["pyserini"], "ratio_to_hits_only": ratios["hits_only"]}


def normalise(text: str) -> str:
    """As TriviaQA's evaluation does: lower case, punctuation and underscores to spaces, no articles, single spaces."""
    text = text.replace("_", " ").lower()
    text = "".join(" " if char in string.punctuation + "‘’´`" else char for char in text)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def holds_answer(text: str, answers: list[str]) -> bool:
    padded = f" {normalise(text)} "
    return any(f" {key} " in padded for answer in answers if (key := normalise(answer)))


async def recall(folder: Path, questions: list[dict], queries: list[str], **options: Any) -> tuple[float, float]:
    """(share of questions whose answer came back, mean words that came back)."""
    tool = WikiTool(str(folder), threads=THREADS, **options)
    texts: list[str] = []
    for start in range(0, len(queries), BATCH):
        calls = [ToolCall("Wiki", query, deadline_s=60.0) for query in queries[start : start + BATCH]]
        texts += [result.text for result in await tool.call_many(calls)]
    await tool.close()
    found = statistics.mean(holds_answer(text, question["answers"]) for text, question in zip(texts, questions, strict=True))
    return found, statistics.mean(len(text.split()) for text in texts)


async def measure_recall(folder: Path, corpus: Path, questions: list[dict]) -> list[dict[str, Any]]:
    """One row per variant, k and kind of query. `title`: the query is the title of the passage that the data names for the question."""
    titles = {passage.docid: passage.title.replace("_", " ") for passage in read_corpus(corpus)}
    kinds = {
        "question": [question["question"] for question in questions],
        "title": [titles[question.get("gold_doc") or question["bm25_doc"]] for question in questions],
    }
    rows = []
    for kind, queries in kinds.items():
        for k in (1, 3):
            for variant, options in VARIANTS.items():
                if variant == "plain, cut":
                    options = {"max_tokens": CUT_TOKENS * k}
                share, words = await recall(folder, questions, queries, k=k, **options)
                rows.append({"query": kind, "k": k, "variant": variant, "recall": share, "words": words})
    return rows


def recall_table(rows: list[dict[str, Any]]) -> str:
    columns = [("question", 1), ("question", 3), ("title", 1), ("title", 3)]
    lines = ["| options | " + " | ".join(f"query = {kind}, k={k}" for kind, k in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for variant in VARIANTS:
        cells = {
            (row["query"], row["k"]): f"{100 * row['recall']:.1f}% in {row['words']:.0f} words" for row in rows if row["variant"] == variant
        }
        lines.append(f"| {variant} | " + " | ".join(cells[column] for column in columns) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in ("index", "speed", "recall"):
        parser.add_argument(f"--{part}-only", action="store_const", const=part, dest="only")
    parser.add_argument("--through-service", action="store_true")
    for name, default in (("rounds", 5), ("queries", 2000), ("questions", 2000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {}
    if args.through_service:  # before the JVM starts: Ray would take a signal away from it that it lives by
        import ray

        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, out = unpack("passages.jsonl", folder), folder / "index"
        report["index"] = measure_index(corpus, out)
        print("index:", json.dumps(report["index"]))
        questions = [json.loads(line) for line in unpack("questions.jsonl", folder).open()]
        random.Random(args.seed).shuffle(questions)
        if args.only in (None, "speed"):
            queries = [question["question"] for question in questions[: args.queries]]
            report["speed"] = asyncio.run(measure_speed(out, queries, args.rounds, args.through_service))
            print("speed:", json.dumps(report["speed"]))
        if args.only in (None, "recall"):
            report["recall"] = asyncio.run(measure_recall(out, corpus, questions[: args.questions]))
            print(recall_table(report["recall"]))
    if args.through_service:
        ray.shutdown()
    report["heap_mib"] = java_class("java.lang.Runtime").getRuntime().maxMemory() / 2**20
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
