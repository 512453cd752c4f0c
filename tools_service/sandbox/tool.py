"""The python interpreter as a tool: untrusted code in the sandbox, and what it prints."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import fields

from tools_service.protocol import ToolCall, ToolResult, ToolStatus
from tools_service.runner import MAX_OUTPUT_CHARS
from tools_service.sandbox.descriptors import make_room
from tools_service.sandbox.limits import MIB, Limits
from tools_service.sandbox.outcome import IsolationUnavailable, Outcome, SandboxStatus
from tools_service.sandbox.owner import Sandbox
from tools_service.sandbox.plan import DEFAULT_PRELOAD
from tools_service.sandbox.running import refusal
from tools_service.sandbox.session import RESTARTED, Session
from tools_service.sandbox.text import code_of, ending

MAX_NAMES_REMEMBERED = 4096  # of sessions that were closed to make room
ROOM_CHARS = 1000  # for what stands around code; an indentation of the whole may make it twice as long
RETURN_MARGIN_S = 0.02  # for killing a snippet and handing its output over before the caller stops waiting

STATUS = {
    SandboxStatus.OK: ToolStatus.OK,
    SandboxStatus.ERROR: ToolStatus.TOOL_ERROR,
    SandboxStatus.CRASHED: ToolStatus.TOOL_ERROR,
    SandboxStatus.TIMEOUT: ToolStatus.TIMEOUT,
    SandboxStatus.CPU_LIMIT: ToolStatus.TIMEOUT,
    SandboxStatus.OUTPUT_LIMIT: ToolStatus.OUTPUT_LIMIT,
    SandboxStatus.MEMORY_LIMIT: ToolStatus.MEMORY_LIMIT,
    SandboxStatus.BAD_REQUEST: ToolStatus.BAD_ARGUMENTS,
    SandboxStatus.UNAVAILABLE: ToolStatus.UNAVAILABLE,
}


def limits_of(options: dict[str, object]) -> Limits:
    """Limits by their names; sizes also in MiB (`memory_mib` for `memory_bytes`). Raises ValueError with one line."""
    names = [field.name for field in fields(Limits)]
    known = names + [name.removesuffix("bytes") + "mib" for name in names if name.endswith("_bytes")]
    chosen: dict[str, object] = {}
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"PythonInterpreter: unknown option {option}={value!r}; limits: {', '.join(known)}")
        name = option
        if option.endswith("_mib"):
            name = option.removesuffix("mib") + "bytes"
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"PythonInterpreter: {option}={value!r} must be a positive number of MiB")
            value = int(value * MIB)
        if name in chosen:
            raise ValueError(f"PythonInterpreter: {name} and its size in MiB are both given; keep one")
        chosen[name] = value
    return Limits(**chosen)  # type: ignore[arg-type]


class _Kept:
    """One live session. `users`: calls that run in it or wait for their turn."""

    def __init__(self, session: Session):
        self.session = session
        self.users = 0
        self.turn = asyncio.Lock()
        self.run: asyncio.Task[Outcome] | None = None

    async def close(self) -> None:
        """Ends the run that is under way, whose caller learns of it, and the process."""
        if self.run is not None and not self.run.done():
            self.run.cancel()
            await asyncio.wait([self.run])
        await self.session.close()


class PythonTool:
    """Runs code in the sandbox; the answer is what it prints, and the end of the traceback where it raises.

    stateful: variables persist over the calls of one `ToolCall.session`, in a process of its own; a call without a session still
        runs alone. max_sessions: live at once; past it the one that has been idle longest is closed, and its next call says so.
    max_concurrency: snippets that run at once; more wait for their turn, within their deadline. Default: the cores of this process.
    preload, isolation, unsafe_no_isolation: see `Sandbox`. limits: the fields of `Limits`, sizes also as `..._mib`.
    Options that do not fit raise ValueError with one line.
    """

    name = "PythonInterpreter"
    description = "Runs Python code and returns what it prints. Print the results you need."
    probe = "print(1+1)"
    cacheable = False  # a snippet may draw random numbers or read the clock

    def __init__(
        self,
        *,
        stateful: bool = False,
        max_sessions: int = 64,
        max_concurrency: int | None = None,
        preload: Sequence[str] = DEFAULT_PRELOAD,
        isolation: str = "auto",
        unsafe_no_isolation: bool = False,
        **limits: float,
    ):
        cores = len(os.sched_getaffinity(0))
        max_concurrency = cores if max_concurrency is None else max_concurrency
        for option, value in (("max_sessions", max_sessions), ("max_concurrency", max_concurrency)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"PythonInterpreter: {option}={value!r} must be an integer of 1 or more")
        for option, value in (("stateful", stateful), ("unsafe_no_isolation", unsafe_no_isolation)):
            if not isinstance(value, bool):
                raise ValueError(f"PythonInterpreter: {option}={value!r} must be true or false")
        self.stateful = stateful
        self.idempotent = not stateful
        self._limits = limits_of(limits)
        self._sandbox = Sandbox(
            self._limits,
            preload if isinstance(preload, str) else tuple(preload),  # type: ignore[arg-type]  # a bare string is refused there
            isolation,  # type: ignore[arg-type]
            unsafe_no_isolation,
            num_ahead=max(2, min(max_concurrency, 2 * cores)),
        )
        self._turns = asyncio.Semaphore(max_concurrency)
        self._max_concurrency, self._max_sessions = max_concurrency, max_sessions
        self._sessions: OrderedDict[str, _Kept] = OrderedDict()  # the least recently used first
        self._closed_for_room: OrderedDict[str, None] = OrderedDict()
        self._num_results: Counter[ToolStatus] = Counter()
        self._refusal = ""

    async def start(self) -> None:
        """Starts the sandbox, which the first call does otherwise. Raises IsolationUnavailable, or ValueError for options that
        cannot be met here: a replica must not take work then."""
        sessions = self._max_sessions if self.stateful else 0
        asked_for = f"max_sessions={sessions} and max_concurrency" if sessions else "max_concurrency"
        num_children = sessions + self._max_concurrency + self._sandbox.num_ahead
        make_room(num_children, f"PythonInterpreter: {asked_for}={self._max_concurrency} need")
        await self._sandbox.start()

    async def call(self, call: ToolCall) -> ToolResult:
        started = time.monotonic()
        try:
            result = await self._call(call, started + call.deadline_s)
        except IsolationUnavailable as error:
            result = ToolResult(ToolStatus.UNAVAILABLE, f"the python tool does not start: {error}")
        self._num_results[result.status] += 1
        return ToolResult(result.status, result.text, time.monotonic() - started, result.truncated)

    async def _call(self, call: ToolCall, deadline: float) -> ToolResult:
        if len(call.argument) > 2 * self._limits.max_code_bytes + ROOM_CHARS:  # before anything looks for the code in it
            return self._result(refusal(self._limits), 0.0)
        code = code_of(call.argument)
        if not self._sandbox.tier:
            await self._start_once(deadline)
        if self.stateful and call.session is not None:
            return await self._call_in_session(call.session, code, call, deadline)
        async with self._turn(deadline) as wall_s:
            if wall_s is None:
                return _no_turn(call)
            return self._result(await self._sandbox.run(code, seed=call.seed, wall_s=wall_s), wall_s)

    async def _start_once(self, deadline: float) -> None:
        """What cannot start will not start at the next call either: the attack on itself is not repeated."""
        if self._refusal:
            raise IsolationUnavailable(self._refusal)
        try:
            await asyncio.wait_for(asyncio.shield(self.start()), max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise IsolationUnavailable("the sandbox was not ready within the call's deadline") from None
        except (IsolationUnavailable, ValueError) as error:
            self._refusal = str(error)
            raise IsolationUnavailable(self._refusal) from error

    @contextlib.asynccontextmanager
    async def _turn(self, deadline: float, *locks: asyncio.Lock) -> AsyncIterator[float | None]:
        """Waits for the locks and a turn; gives the seconds that the snippet may take, or None where the deadline came first."""
        async with contextlib.AsyncExitStack() as held:
            try:
                async with asyncio.timeout_at(deadline):  # the event loop's clock is time.monotonic
                    for lock in (*locks, self._turns):
                        await held.enter_async_context(lock)
            except TimeoutError:
                yield None
                return
            left_s = deadline - time.monotonic()
            yield None if left_s <= 0 else min(self._limits.wall_s, max(left_s - RETURN_MARGIN_S, 0.5 * left_s))

    async def _call_in_session(self, name: str, code: str, call: ToolCall, deadline: float) -> ToolResult:
        kept = await self._kept(name)
        if kept is None:
            return ToolResult(ToolStatus.OVERLOADED, f"all {self._max_sessions} sessions of the interpreter are in use")
        kept.users += 1
        try:
            async with self._turn(deadline, kept.turn) as wall_s:
                if wall_s is None:
                    return _no_turn(call)
                kept.run = asyncio.create_task(kept.session.run(code, seed=call.seed, wall_s=wall_s))
                outcome = await kept.run
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return ToolResult(ToolStatus.UNAVAILABLE, "the session was ended while this call ran")
        finally:
            kept.users -= 1
        note = RESTARTED if self._closed_for_room.pop(name, "") is None and not outcome.output.startswith(RESTARTED) else ""
        return self._result(outcome, wall_s, note)

    async def _kept(self, name: str) -> _Kept | None:
        """The session, opened if it is new; None where there is no room and none is idle."""
        if name not in self._sessions:
            if len(self._sessions) >= self._max_sessions and not await self._make_room():
                return None
            if name not in self._sessions:  # another call may have opened it meanwhile
                self._sessions[name] = _Kept(await self._sandbox.open_session())
        self._sessions.move_to_end(name)
        return self._sessions[name]

    async def _make_room(self) -> bool:
        for name, kept in self._sessions.items():
            if kept.users == 0:
                del self._sessions[name]
                self._closed_for_room[name] = None
                while len(self._closed_for_room) > MAX_NAMES_REMEMBERED:
                    self._closed_for_room.popitem(last=False)
                await kept.close()
                return True
        return False

    async def end_session(self, session: str) -> None:
        """Kills the session's process. Does nothing for a session that is not live."""
        self._closed_for_room.pop(session, None)
        if (kept := self._sessions.pop(session, None)) is not None:
            await kept.close()

    def _result(self, outcome: Outcome, wall_s: float, note: str = "") -> ToolResult:
        text = whole = note + outcome.output
        if outcome.status in (SandboxStatus.ERROR, SandboxStatus.CRASHED):
            text = ending(text)
        if reason := self._reason(outcome.status, wall_s):
            text = text[: MAX_OUTPUT_CHARS - len(reason) - 1]  # the text of any tool is cut there, and would lose its last line
        truncated = outcome.truncated or text != whole
        if reason:
            text = text + ("\n" if text and not text.endswith("\n") else "") + reason
        return ToolResult(STATUS[outcome.status], text.removesuffix("\n"), truncated=truncated)

    def _reason(self, status: SandboxStatus, wall_s: float) -> str:
        """What ended a snippet that did not end by itself, as a last line after what it printed."""
        limits = self._limits
        return {
            SandboxStatus.TIMEOUT: f"[stopped: it ran longer than {wall_s:.3g} s]",
            SandboxStatus.CPU_LIMIT: f"[stopped: it used more than {limits.cpu_s:g} s of CPU time]",
            SandboxStatus.OUTPUT_LIMIT: f"[stopped: it printed more than {limits.max_output_bytes} bytes]",
            SandboxStatus.MEMORY_LIMIT: f"[stopped: it needed more than {limits.memory_bytes // MIB} MiB of memory]",
            SandboxStatus.CRASHED: "[the interpreter crashed]",
        }.get(status, "")

    def stats(self) -> dict[str, float]:
        """Results by status, restarts of the fork server, live sessions, and the isolation in use as `isolation/NAME` = 1."""
        counts = {f"num_{status}": float(number) for status, number in self._num_results.items()}
        tier = {f"isolation/{self._sandbox.tier}": 1.0} if self._sandbox.tier else {}
        own = {"num_restarts": float(self._sandbox.num_restarts), "num_sessions": float(len(self._sessions))}
        return {**counts, **own, **tier}

    @property
    def isolation(self) -> str:
        """The tier in use; empty before the start."""
        return self._sandbox.tier

    async def close(self) -> None:
        for name in list(self._sessions):
            await self.end_session(name)
        await self._sandbox.close()


def _no_turn(call: ToolCall) -> ToolResult:
    return ToolResult(ToolStatus.OVERLOADED, f"the interpreter had no turn for this call within {call.deadline_s:.3g} s")
