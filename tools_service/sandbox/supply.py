"""Children on their way from the fork server to those who wait for one."""

from __future__ import annotations

import asyncio
import collections
import os
import struct
from collections.abc import Callable

from tools_service.sandbox.limits import Limits
from tools_service.sandbox.outcome import ForkFailed, ZygoteDied
from tools_service.sandbox.process import Zygote
from tools_service.sandbox.running import Child

TAKE_S = 5.0  # without a word of a fork server that owes a child; past it the server is replaced
MAX_ASKED = 64  # forks that are asked for and not answered: the channel to the server has room for a few hundred at most
PAUSE_S = 0.1  # after a fork that failed
REQUESTS = {False: b"f", True: b"s"}
NO_DESCRIPTORS = "this process has no file descriptors left for another interpreter (ulimit -n); allow it more, or fewer sessions"


class Supply:
    """By kind (for a session or not): who waits, and when each fork was asked for that is not answered yet.

    server: the fork server of now, if there is one. replace: ends it, for the reason given, and has another one started.
    """

    def __init__(self, limits: Limits, num_ahead: int, server: Callable[[], Zygote | None], replace: Callable[[str], None]):
        self._limits, self._num_ahead, self._server, self._replace = limits, num_ahead, server, replace
        self.ready: collections.deque[Child] = collections.deque()
        self.children: dict[int, Child] = {}  # every child that has been announced and not reported dead
        self._unheld: set[int] = set()  # announced, but without its descriptors: its channel is closed, and it ends
        self._waiters: dict[bool, collections.deque[asyncio.Future]] = {False: collections.deque(), True: collections.deque()}
        self._asked_at: dict[bool, collections.deque[float]] = {False: collections.deque(), True: collections.deque()}
        self.num_forked = {False: 0, True: 0}
        self._held_back = False  # more are wanted than are asked for
        self._heard_at = 0.0  # when the server last said anything
        self._timer: asyncio.TimerHandle | None = None
        self._pause: asyncio.TimerHandle | None = None

    def next_child(self, session: bool) -> asyncio.Future[Child]:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters[session].append(waiter)
        self.fill()
        return waiter

    def fill(self) -> None:
        """Asks for as many children as are wanted and not on their way; for some later, where that are many."""
        server = self._server()
        if server is None or self._pause is not None:
            return
        waiting = {session: sum(not waiter.done() for waiter in waiters) for session, waiters in self._waiters.items()}
        wanted = {False: self._num_ahead - len(self.ready) + waiting[False], True: waiting[True]}
        while True:
            short = [session for session, times in self._asked_at.items() if len(times) < wanted[session]]
            self._held_back = bool(short)
            if not short or sum(map(len, self._asked_at.values())) >= MAX_ASKED:
                break
            session = min(short, key=lambda kind: len(self._asked_at[kind]))  # so that neither kind waits for all of the other
            try:
                server.send(REQUESTS[session])
            except OSError:  # it has enough to do, which an answer will show, or it is dead, and that will be noticed
                break
            self._asked_at[session].append(asyncio.get_running_loop().time())
        self._watch()

    def _overdue_at(self) -> float:
        """A server that is slow, but says something all the time, does not hang."""
        oldest = min((times[0] for times in self._asked_at.values() if times), default=float("inf"))
        return TAKE_S + max(oldest, self._heard_at)

    def silent_s(self) -> float:
        """Seconds since the server last said anything."""
        return asyncio.get_running_loop().time() - self._heard_at

    def _watch(self) -> None:
        """A server that hangs is noticed whether or not anybody waits long enough for it."""
        if self._timer is None and self._overdue_at() < float("inf"):
            self._timer = asyncio.get_running_loop().call_at(self._overdue_at(), self._look)

    def _look(self) -> None:
        self._timer = None
        server = self._server()
        if server is None:
            return
        server.read()  # it may be this event loop that was held up
        if self._overdue_at() > asyncio.get_running_loop().time() + 0.001:
            self._watch()
        elif self._server() is server:
            self._replace(f"the fork server did not fork within {TAKE_S:g} s")

    def on_message(self, message: bytes, fds: list[int]) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        kind = message[:1]
        if kind == b"R":
            self._on_child(*struct.unpack("<I?", message[1:]), fds)
        elif kind == b"X":
            self._on_exit(*struct.unpack("<IiQ", message[1:]))
        elif kind == b"F":
            self._asked_at[message[1:2] == b"\1"].popleft()
            self._refuse(message[1:2] == b"\1", f"no interpreter could be forked: {message[2:].decode(errors='replace')}")
        else:
            said = message[1:].decode(errors="replace") if kind == b"E" else ""
            self._replace(said or "the fork server sent what it never sends")

    def _on_child(self, number: int, session: bool, fds: list[int]) -> None:
        self._asked_at[session].popleft()
        self.num_forked[session] += 1
        if len(fds) < 3:  # the kernel gave what there was room for
            for fd in fds:
                os.close(fd)
            self._unheld.add(number)
            self._refuse(session, NO_DESCRIPTORS)
            return
        waiter = self._next_waiter(session)
        child = self.children[number] = Child(number, *fds, self._limits)
        if waiter:
            waiter.set_result(child)
        elif session:
            child.close()
        else:
            self.ready.append(child)
        if self._held_back:
            self.fill()

    def _refuse(self, session: bool, reason: str) -> None:
        """The oldest who waits for one goes without; what is in short supply is not asked for at once again."""
        if waiter := self._next_waiter(session):
            waiter.set_exception(ForkFailed(reason))
        if self._pause is None:
            self._pause = asyncio.get_running_loop().call_later(PAUSE_S, self._go_on)

    def _go_on(self) -> None:
        self._pause = None
        self.fill()

    def _next_waiter(self, session: bool) -> asyncio.Future | None:
        waiters = self._waiters[session]
        while waiters:
            if not (waiter := waiters.popleft()).done():
                return waiter
        return None

    def _on_exit(self, number: int, wait_status: int, cpu_us: int) -> None:
        if number in self._unheld:
            self._unheld.remove(number)
            return
        child = self.children.pop(number, None)
        if child is None:
            self._replace("the fork server reports the end of a child that it never announced")
            return
        if not child.exit.done():
            child.exit.set_result((wait_status, cpu_us / 1e6))
        if child in self.ready:
            self.ready.remove(child)
            child.close()
            self.fill()

    def forget(self, reason: str) -> None:
        """The server has ended, and with it every child. Those who wait go on waiting: for one of the next server."""
        for timer in (self._timer, self._pause):
            if timer is not None:
                timer.cancel()
        self._timer = self._pause = None
        self._heard_at = asyncio.get_running_loop().time()
        for child in list(self.children.values()):
            if not child.exit.done():
                child.kill()
                child.exit.set_exception(ZygoteDied(reason))
        for child in self.ready:
            child.close()
        for group in (self.ready, self.children, self._unheld, *self._asked_at.values()):
            group.clear()

    def fail_waiters(self, reason: str) -> None:
        for waiters in self._waiters.values():
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(ZygoteDied(reason))
            waiters.clear()
