"""The sandbox: runs untrusted python in children of a fork server, each for one snippet or one session.

It keeps what a snippet could want to change: the deadline, the output cap, the verdict on how it ended.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
from typing import Literal

from tools_service.sandbox import plan, process
from tools_service.sandbox.limits import Limits
from tools_service.sandbox.outcome import ForkFailed, IsolationUnavailable, Outcome, SandboxStatus, ZygoteDied
from tools_service.sandbox.running import REPORT_GRACE_S, Child, NotBegun, encode_job, lowered, refusal
from tools_service.sandbox.self_attack import breaches
from tools_service.sandbox.session import Session
from tools_service.sandbox.supply import TAKE_S, Supply

__all__ = ["IsolationUnavailable", "Limits", "Outcome", "Sandbox", "SandboxStatus", "Session"]

MAX_ATTEMPTS = 3
MAX_FAILED_STARTS = 3
CANDIDATES = {"auto": ("bubblewrap", "landlock", "seccomp")} | {name: (name,) for name in ("bubblewrap", "landlock", "seccomp")}


class Sandbox:
    """Bound to the event loop that starts it. Concurrent calls are fine; how many run at a time is the caller's business.

    preload: modules that the fork server loads, so that a snippet's import of them costs nothing.
    isolation: "auto" takes the best that holds here; the others are for those who want one and no other.
    unsafe_no_isolation: where nothing holds, run without any isolation but limits, instead of raising.
    num_ahead: children kept ready.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        preload: tuple[str, ...] = plan.DEFAULT_PRELOAD,
        isolation: Literal["auto", "bubblewrap", "landlock", "seccomp"] = "auto",
        unsafe_no_isolation: bool = False,
        num_ahead: int = 2,
    ):
        if isolation not in CANDIDATES:
            raise ValueError(f"sandbox isolation={isolation!r} must be one of {', '.join(CANDIDATES)}")
        if not isinstance(num_ahead, int) or num_ahead < 1:
            raise ValueError(f"sandbox num_ahead={num_ahead!r} must be an integer of 1 or more")
        if isinstance(preload, str) or not all(isinstance(name, str) and name for name in preload):
            raise ValueError(f"sandbox preload={preload!r} must be a list of module names")
        self.limits = limits or Limits()
        self.preload, self.isolation, self.num_ahead = tuple(preload), isolation, num_ahead
        self.unsafe_no_isolation = unsafe_no_isolation
        self.tier = ""
        self.num_restarts = 0
        self._zygote: process.Zygote | None = None
        self._plan: plan.Plan | None = None
        self._start_lock = asyncio.Lock()
        self._restarting: asyncio.Task | None = None
        self._closed = False
        self._broken = ""
        self._supply = Supply(self.limits, num_ahead, lambda: self._zygote, self._replace)
        self._num_outcomes: collections.Counter[str] = collections.Counter()

    @property
    def zygote_pid(self) -> int | None:
        """The fork server's process id as this machine sees it."""
        return self._zygote.pid if self._zygote else None

    async def start(self) -> None:
        """Starts the best isolation that withstands an attack on itself. Idempotent.

        Raises IsolationUnavailable where none does, ValueError for a preload set that cannot be loaded.
        """
        async with self._start_lock:
            if self._closed:
                raise RuntimeError("the sandbox is closed")
            if self._zygote is not None or self._restarting is not None:
                return
            reasons = []
            for isolation in CANDIDATES[self.isolation]:
                try:
                    await self._try_isolation(isolation)
                    return
                except IsolationUnavailable as error:
                    reasons.append(f"{isolation}: {error}")
            if not self.unsafe_no_isolation:
                raise IsolationUnavailable(
                    f"no isolation for untrusted code holds here: {'; '.join(reasons)}. It needs Linux on x86-64 with seccomp, and "
                    "Landlock (kernel 5.13 or later with landlock in its lsm= list) or user namespaces and bubblewrap"
                )
            await self._launch("none")
            self.tier = plan.TIERS["none"]

    async def _try_isolation(self, isolation: str) -> None:
        await self._launch(isolation)
        try:
            if found := await breaches(self):
                raise IsolationUnavailable(f"a snippet got through: {', '.join(found)}")
        except BaseException:
            await self._end_zygote()
            raise
        self.tier = plan.TIERS[isolation]

    async def _launch(self, isolation: str) -> None:
        if isolation != "none" and os.uname().machine != "x86_64":
            raise IsolationUnavailable(f"this machine is {os.uname().machine}; the system call filter knows x86-64 only")
        self._broken = ""
        self._plan = plan.plan(isolation, self.limits, self.preload)
        try:
            self._zygote = await self._start_zygote()
        except BaseException:
            await process.remove_scratch(self._plan)
            raise
        self._supply.fill()

    async def _start_zygote(self) -> process.Zygote:
        zygote = process.Zygote(self._supply.on_message, self._on_death)
        await zygote.start(self._plan)
        return zygote

    def _replace(self, reason: str) -> None:
        if self._zygote is not None:
            self._zygote.close()
            self._on_death(reason)

    def _on_death(self, reason: str) -> None:
        """Everything that ran under it died with it; what waits is served by the next one."""
        self._zygote = None
        self._broken = reason or "the fork server died"
        self._supply.forget(self._broken)
        if self._restarting is None:
            if self.tier and not self._closed:
                self._restarting = asyncio.get_running_loop().create_task(self._restart())
            else:  # it died while it was being tried
                self._supply.fail_waiters(self._broken)

    async def _restart(self) -> None:
        try:
            for attempt in range(MAX_FAILED_STARTS):
                with contextlib.suppress(IsolationUnavailable, ValueError, OSError):
                    self._zygote = await self._start_zygote()
                    self.num_restarts += 1
                    self._supply.fill()
                    return
                await asyncio.sleep(0.1 * 2**attempt)
            self._supply.fail_waiters(self._broken)
        finally:
            self._restarting = None

    async def take(self, session: bool = False) -> Child:
        """A child that is locked down and has no code yet. Raises ForkFailed where none is forked, for this call or those before it,
        within 2 * TAKE_S, and ZygoteDied where there is no fork server and none can be started."""
        if not session and self._supply.ready:
            child = self._supply.ready.popleft()
            self._supply.fill()
            return child
        self._revive()
        waiter, num_idle = self._supply.next_child(session), 0
        try:
            while num_idle < 2:
                num_forked = self._supply.num_forked[session]
                await asyncio.wait((waiter,), timeout=TAKE_S + (process.START_S if self._restarting else 0))
                if waiter.done():
                    return waiter.result()
                num_idle = num_idle + 1 if self._supply.num_forked[session] == num_forked else 0
                self._revive()
        except asyncio.CancelledError:
            if waiter.done() and not waiter.exception():
                waiter.result().close()
            raise
        finally:
            waiter.cancel()
        # Whether the server is to blame, the supply judges: it may have more to do than it can.
        raise ForkFailed(f"no interpreter was forked within {2 * TAKE_S:g} s")

    def _revive(self) -> None:
        """Starts a fork server where there is none and none is being started."""
        if self._closed or (self._zygote is None and not self.tier):
            raise ZygoteDied(self._broken or "the sandbox is closed")
        if self._zygote is None and self._restarting is None:
            self._restarting = asyncio.get_running_loop().create_task(self._restart())

    async def run(self, code: str, *, seed: int | None = None, wall_s: float | None = None) -> Outcome:
        """Runs one snippet in a child of its own. Never raises but IsolationUnavailable or ValueError at the first call.

        wall_s: seconds, to lower the limit. Cancelling the task kills the snippet.
        """
        if not self.tier:
            await self.start()
        job = encode_job(code, seed, self.limits)
        outcome = refusal(self.limits) if job is None else await self.run_job(job, lowered(wall_s, self.limits))
        self._num_outcomes[outcome.status] += 1
        return outcome

    async def run_job(self, job: bytes, wall_s: float) -> Outcome:
        reason = ""
        for _ in range(MAX_ATTEMPTS):
            try:
                child = await self.take()
                return await child.run_once(job, wall_s)
            except NotBegun:
                reason = "no child lived until it had the code"
            except ForkFailed as error:
                reason = str(error)
                break
            except ZygoteDied as error:
                if self._zygote is not None and self._supply.silent_s() >= REPORT_GRACE_S:  # it hangs: it reports no ends
                    self._replace(str(error))
                reason = str(error)
                break
        return Outcome(SandboxStatus.UNAVAILABLE, f"the sandbox failed: {reason}")

    async def open_session(self) -> Session:
        """A child of its own for the turns of one episode; it is forked at the first run."""
        if not self.tier:
            await self.start()
        return Session(self)

    def stats(self) -> dict[str, float]:
        counts = {f"num_{status}": float(self._num_outcomes[status]) for status in SandboxStatus}
        running = sum(not child.exit.done() for child in self._supply.children.values()) - len(self._supply.ready)
        return {**counts, "num_restarts": float(self.num_restarts), "num_running": float(running)}

    async def _end_zygote(self) -> None:
        zygote, self._zygote = self._zygote, None
        self._supply.forget(self._broken)
        if zygote is not None:
            await zygote.leave()
        if self._plan is not None:
            await process.remove_scratch(self._plan)

    async def close(self) -> None:
        """Ends every snippet and the fork server. Calls in flight end as UNAVAILABLE. Idempotent."""
        self._closed = True
        if self._restarting is not None:
            self._restarting.cancel()
            with contextlib.suppress(BaseException):
                await self._restarting
        self._broken = "the sandbox was closed"
        self._supply.fail_waiters(self._broken)
        await self._end_zygote()
