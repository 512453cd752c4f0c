"""The search tool: BM25 over an index of passages, with Pyserini. One JVM per process; searches run in threads of their own.

What a call is answered: the passages of the `k` best hits, best first, a blank line between them; without a hit
`No results for 'QUERY'.` with status OK (the search ran); an empty query BAD_ARGUMENTS, in words; UNAVAILABLE where Java or
the index fails. A query is words, never syntax: no character of it can be wrong. Beyond text.MAX_QUERY_CHARS it is cut.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tools_service.protocol import ToolCall, ToolResult, ToolStatus
from tools_service.search.java import detach, is_java_error, java_reason
from tools_service.search.options import WikiOptions
from tools_service.search.searcher import Hit, open_index
from tools_service.search.text import clean_query, concise, cut_chars, cut_words, first_paragraph

logger = logging.getLogger(__name__)

MAX_BATCH = 64
EMPTY_QUERY = "The query is empty: write the words to search for."
MAX_ECHO_CHARS = 200  # of the query in the answer that there is no result
DETACH_TIMEOUT_S = 5.0


class WikiTool:
    """WikiTool(index=FOLDER or the name of a Pyserini prebuilt index, ...), with options as in WikiOptions.

    Raises ValueError (an option or the index is wrong) and JavaUnavailable, with one line each.
    """

    idempotent = True
    cacheable = True
    max_batch = MAX_BATCH
    probe = "health check"

    def __init__(self, index: str | None = None, **options: Any):
        self._options = own = WikiOptions(index, **options)
        self.name = own.name
        what = "passage" if own.k == 1 else f"{own.k} passages"
        self.description = f"Searches the collection {os.path.basename(str(index).rstrip('/'))!r}; returns the best {what} for a few words."
        self.parameters = {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "the words to search for"}},
            "required": ["query"],
        }
        self._threads = min(4, len(os.sched_getaffinity(0))) if own.threads is None else own.threads
        self._searcher = open_index(str(index), float(own.k1), float(own.b), own.heap_mib)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix=f"search-{self.name}")
        self.last_done = 0.0  # see AsyncTool: searches wait for each other, and the probe behind them
        self._counting = threading.Lock()
        self._counts = {"num_searches": 0.0, "num_without_hit": 0.0, "num_failed": 0.0}

    async def call(self, call: ToolCall) -> ToolResult:
        return (await self.call_many([call]))[0]

    async def call_many(self, calls: list[ToolCall]) -> list[ToolResult]:
        """Answers every call, by the latest of their deadlines: they share one search. A search that takes longer is left to end
        by itself. The event loop stays free."""
        start = time.perf_counter()
        queries = [clean_query(call.argument) for call in calls]
        wanted = list(dict.fromkeys(query for query in queries if query))
        answers: dict[str, ToolResult] = {"": ToolResult(ToolStatus.BAD_ARGUMENTS, EMPTY_QUERY)}
        try:
            if wanted:
                async with asyncio.timeout(max(call.deadline_s for call in calls)):
                    answers |= await asyncio.get_running_loop().run_in_executor(self._pool, self._answer, wanted)
        except TimeoutError:
            pass  # the calls that have no answer say so below
        taken_s = time.perf_counter() - start
        return [self._result(call, answers.get(query), taken_s) for call, query in zip(calls, queries, strict=True)]

    def stats(self) -> dict[str, float]:
        return dict(self._counts)

    async def close(self) -> None:
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        together = threading.Barrier(self._threads)

        def leave_java() -> None:
            detach()
            try:
                together.wait(DETACH_TIMEOUT_S)  # so that every thread of the pool has one of these
            except threading.BrokenBarrierError:
                return  # a search still runs; its thread stays attached

        for _ in range(self._threads):
            self._pool.submit(leave_java)
        self._pool.shutdown()
        self._searcher.close()

    @staticmethod
    def _result(call: ToolCall, answer: ToolResult | None, taken_s: float) -> ToolResult:
        if answer is None or taken_s > call.deadline_s:
            return ToolResult(ToolStatus.TIMEOUT, f"no answer within {call.deadline_s:.3g} s", taken_s)
        return ToolResult(answer.status, answer.text, taken_s, answer.truncated)

    def _answer(self, queries: list[str]) -> dict[str, ToolResult]:
        """In a thread of the pool: the results of all queries, each query once. Never raises but for defects."""
        search = self._searcher.search_by_title if self._options.title_match else self._searcher.search
        try:
            found = search(queries, self._options.k, self._threads)
        except Exception as error:
            self._count(num_failed=len(queries))
            logger.warning("tool %s failed on %d queries", self.name, len(queries), exc_info=True)
            reason = java_reason(error) if is_java_error(error) else type(error).__name__
            return dict.fromkeys(queries, ToolResult(ToolStatus.UNAVAILABLE, f"the search failed: {reason}"))
        self.last_done = time.monotonic()
        self._count(num_searches=len(queries), num_without_hit=sum(not hits for hits in found))
        return {query: self._show(query, hits) for query, hits in zip(queries, found, strict=True)}

    def _count(self, **more: int) -> None:
        with self._counting:
            for name, number in more.items():
                self._counts[name] += number

    def _show(self, query: str, hits: list[Hit]) -> ToolResult:
        if not hits:
            return ToolResult(ToolStatus.OK, f"No results for '{cut_chars(query, MAX_ECHO_CHARS)}'.")
        text = whole = "\n\n".join(self._shown_passage(query, hit) for hit in hits)
        if self._options.max_tokens is not None:
            text = cut_words(text, self._options.max_tokens)
        if self._options.max_chars is not None:
            text = cut_chars(text, self._options.max_chars)
        return ToolResult(ToolStatus.OK, text, truncated=text != whole)

    def _shown_passage(self, query: str, hit: Hit) -> str:
        text = first_paragraph(hit.text) if self._options.passage == "first_paragraph" else hit.text
        if self._options.concise:
            text = concise(text, query)
        return f"{hit.title}: {text}" if self._options.show_title and hit.title else text
