"""Several turns in one child: variables persist, and die with the episode."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from tools_service.sandbox.outcome import Outcome, SandboxStatus, ZygoteDied
from tools_service.sandbox.running import Child, NotBegun, encode_job, lowered, refusal

if TYPE_CHECKING:
    from tools_service.sandbox.owner import Sandbox

MAX_ATTEMPTS = 2
RESTARTED = "[a new interpreter was started: earlier variables are gone]\n"


class Session:
    """One run at a time. A limit, a crash or a cancelled run ends the child; the next run starts another and says so."""

    def __init__(self, sandbox: Sandbox):
        self._sandbox = sandbox
        self._child: Child | None = None
        self._lost = False
        self._closed = False
        self._lock = asyncio.Lock()

    async def run(self, code: str, *, seed: int | None = None, wall_s: float | None = None) -> Outcome:
        """As `Sandbox.run`. Without a seed the generators go on where the run before stopped."""
        job = encode_job(code, seed, self._sandbox.limits)
        if job is None:
            return refusal(self._sandbox.limits)
        async with self._lock:
            deadline = time.monotonic() + lowered(wall_s, self._sandbox.limits)
            try:
                for _ in range(MAX_ATTEMPTS):
                    try:
                        return await self._run(job, max(0.0, deadline - time.monotonic()))
                    except NotBegun:  # an earlier run spoilt the child: that is no failure of ours, and the code has not run
                        continue
                reason = "no child lived until it had the code"
            except ZygoteDied as error:
                reason = str(error)
            return Outcome(SandboxStatus.UNAVAILABLE, f"the sandbox failed: {reason}")

    async def _run(self, job: bytes, wall_s: float) -> Outcome:
        if self._closed:
            raise ZygoteDied("the session is closed")
        if self._child is not None and self._child.exit.done():  # ended between runs
            self._lose_child()
        restarted = self._child is None and self._lost
        if self._child is None:
            self._child = await self._sandbox.take(session=True)
        child, alive = self._child, False
        try:
            outcome, alive = await child.run_in_session(job, wall_s)
        finally:
            if not alive:
                self._lose_child()
        if restarted:
            outcome = replace(outcome, output=RESTARTED + outcome.output)
        return outcome

    def _lose_child(self) -> None:
        if self._child is not None:
            self._child.close()
        self._child, self._lost = None, True

    async def close(self) -> None:
        """Kills the child. Idempotent."""
        self._closed = True
        if self._child is not None:
            self._child.close()
            self._child = None
