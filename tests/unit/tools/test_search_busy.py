"""Health of the search tool under load. The searcher is the named seam: a script in the place of Java."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tools_service.executor import Executor, UnhealthyTool
from tools_service.protocol import ToolCall, ToolStatus
from tools_service.search import tool as module


class Searcher:
    """A search begins, and ends when the test lets it."""

    def __init__(self):
        self.begun = {word: threading.Event() for word in ("first", "second")}
        self.may_end = {word: threading.Event() for word in ("first", "second")}

    def search(self, queries, k, threads):
        for query in queries:
            self.begun[query].set()
            assert self.may_end[query].wait(60)
        return [[] for _ in queries]

    def close(self):
        return


async def test_a_search_that_has_ended_for_nobody_says_that_the_tool_is_busy_and_not_that_it_hangs(monkeypatch):
    searcher = Searcher()
    monkeypatch.setattr(module, "open_index", lambda *options: searcher)
    executor = Executor(module.WikiTool("index", threads=1), 64, probe_timeout_s=0.05)
    [late] = await executor.run([ToolCall("Wiki", "first", 0.02)])
    assert late.status is ToolStatus.TIMEOUT
    second = asyncio.ensure_future(executor.run([ToolCall("Wiki", "second", 60.0)]))
    await asyncio.sleep(0)
    searcher.may_end["first"].set()
    assert await asyncio.to_thread(searcher.begun["second"].wait, 30)
    await executor.check()  # the probe waits behind the second search
    with pytest.raises(UnhealthyTool, match="the probe 'health check' ended in timeout"):
        await executor.check()  # which does not end
    searcher.may_end["second"].set()
    [result] = await second
    assert result.status is ToolStatus.OK
    await executor.close()
