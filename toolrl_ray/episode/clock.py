"""The time that deadlines of turns and episodes are measured in: it stands still while the engine is paused for new weights, which no
episode can help, however long it takes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Clock:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._stopped_at: float | None = None
        self._lost_s = 0.0
        self._running: dict[asyncio.Timeout, float] = {}  # what is waited for -> its deadline on this clock

    def now(self) -> float:
        """Seconds, of which only differences mean anything."""
        return (time.monotonic() if self._stopped_at is None else self._stopped_at) - self._lost_s

    def stop(self) -> None:
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
            self._reschedule()

    def go(self) -> None:
        if self._stopped_at is not None:
            self._lost_s += time.monotonic() - self._stopped_at
            self._stopped_at = None
            self._reschedule()

    @asynccontextmanager
    async def timeout(self, seconds: float) -> AsyncIterator[None]:
        """Like asyncio.timeout: TimeoutError once so much of this clock's time has passed."""
        deadline = self.now() + seconds
        async with asyncio.timeout_at(self._when(deadline)) as timeout:
            self._running[timeout] = deadline
            try:
                yield
            finally:
                del self._running[timeout]

    def _reschedule(self) -> None:
        for timeout, deadline in self._running.items():
            if not timeout.expired():
                timeout.reschedule(self._when(deadline))

    def _when(self, deadline: float) -> float | None:
        """On the event loop's clock; None, which is never, while this one stands still."""
        return None if self._stopped_at is not None else asyncio.get_running_loop().time() + deadline - self.now()
