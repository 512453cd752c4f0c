"""Whom the fork server's words are for, and when its silence is taken for a hang."""

from __future__ import annotations

import asyncio
import struct

import pytest

from tools_service.sandbox.limits import Limits
from tools_service.sandbox.outcome import ForkFailed
from tools_service.sandbox.supply import Supply


class SlowServer:
    """Has one answer whenever it is read, until it has no more: a child without its descriptors, as where this process has none left."""

    def __init__(self) -> None:
        self.supply: Supply | None = None
        self.num_answers = 5

    def send(self, message: bytes) -> None:
        pass

    def read(self) -> None:
        if self.num_answers:
            self.num_answers -= 1
            self.supply.on_message(b"R" + struct.pack("<I?", self.num_answers, False), [])


async def test_a_server_that_answers_one_by_one_is_slow_and_one_that_says_nothing_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools_service.sandbox.supply.TAKE_S", 0.05)
    server, replaced = SlowServer(), []
    supply = server.supply = Supply(Limits(), 0, lambda: None if replaced else server, replaced.append)
    waiters = [supply.next_child(False) for _ in range(6)]
    answered = await asyncio.wait_for(asyncio.gather(*waiters[:5], return_exceptions=True), 10)
    assert all(isinstance(error, ForkFailed) for error in answered) and replaced == []
    for _ in range(1000):
        if replaced:
            break
        await asyncio.sleep(0.01)
    assert len(replaced) == 1 and "did not fork within" in replaced[0] and not waiters[5].done()
