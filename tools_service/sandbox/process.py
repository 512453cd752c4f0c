"""Starts the fork server and talks to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable
from dataclasses import replace

from tools_service.sandbox.outcome import IsolationUnavailable
from tools_service.sandbox.plan import ENVIRONMENT, Plan

START_S = 30.0  # a preload set such as sympy takes seconds on a busy machine
CLEAN_S = 10.0  # for removing what a fork server that was killed left behind


class Zygote:
    """The running server, from the owner's side; bound to the event loop that started it."""

    def __init__(self, on_message: Callable[[bytes, list[int]], None], on_death: Callable[[str], None]):
        self._on_message, self._on_death = on_message, on_death
        self.pid: int | None = None
        self._pidfd = -1
        self._process: subprocess.Popen | None = None
        self._control: socket.socket | None = None
        self._complaints = -1

    async def start(self, plan: Plan) -> None:
        """Raises IsolationUnavailable with what the server, or what wraps it, said; ValueError for a module that cannot be loaded."""
        self._loop = asyncio.get_running_loop()
        self._spawn(plan)
        ready = self._loop.create_future()
        self._started = ready
        self._loop.add_reader(self._control.fileno(), self.read)
        try:
            message = await asyncio.wait_for(ready, START_S)
        except TimeoutError:
            message = b"Ethe fork server did not answer within %d s" % START_S
        except BaseException:
            self.close()
            raise
        if message[:1] != b"H":
            reason = " ".join((message[1:].decode(errors="replace") or self._said() or "the fork server ended at once").split())
            self.close()
            if reason.startswith("CannotPreload: "):
                raise ValueError(f"sandbox preload={plan.config['preload']}: {reason.removeprefix('CannotPreload: ')}")
            raise IsolationUnavailable(reason)

    def _spawn(self, plan: Plan) -> None:
        wraps = "--as-pid-1" in plan.command
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        self._complaints = os.memfd_create("sandbox-stderr", os.MFD_CLOEXEC)
        info, info_of_child = os.pipe2(os.O_CLOEXEC)
        command = [plan.command[0], "--info-fd", str(info_of_child), *plan.command[1:]] if wraps else plan.command
        own_pidfd = os.pidfd_open(os.getpid())
        try:
            self._process = subprocess.Popen(
                command, stdin=theirs, stdout=subprocess.DEVNULL, stderr=self._complaints, env=ENVIRONMENT, cwd="/",
                pass_fds=[info_of_child] if wraps else [], start_new_session=True,
            )  # fmt: skip
            os.close(info_of_child)
            info_of_child = -1
            self.pid = self._inner_pid(info) if wraps else self._process.pid
            self._pidfd = os.pidfd_open(self.pid)
            socket.send_fds(self._control, [json.dumps(plan.config).encode()], [own_pidfd])
        except (OSError, ValueError, KeyError) as error:
            reason = self._said() or str(error)
            self.close()
            raise IsolationUnavailable(" ".join(reason.split())) from error
        finally:
            for fd in (own_pidfd, info, info_of_child):
                if fd >= 0:
                    os.close(fd)
            theirs.close()

    def _inner_pid(self, info: int) -> int:
        """bubblewrap tells it once the namespaces are made. Blocks for a few milliseconds."""
        text = b""
        poll = select.poll()
        poll.register(info, select.POLLIN)
        while b"}" not in text:
            if not poll.poll(5000):
                raise OSError("bubblewrap did not say which process it started")
            part = os.read(info, 4096)
            if not part:
                self._process.wait(5)
                raise OSError("bubblewrap ended before it started anything")
            text += part
        return json.loads(text)["child-pid"]

    def _said(self) -> str:
        text = os.pread(self._complaints, 4000, 0).decode(errors="replace").strip() if self._complaints >= 0 else ""
        return text.splitlines()[-1] if text else ""

    def read(self) -> None:
        """Hands on what the server has said by now."""
        while self._control is not None:
            try:
                message, fds, _, _ = socket.recv_fds(self._control, 4096, 4)
            except BlockingIOError:
                return
            except OSError:
                message, fds = b"", []
            if not self._started.done():
                self._started.set_result(message)
                if message[:1] != b"H":
                    return
            elif not message:
                said = self._said()
                self.close()
                self._on_death(said)
                return
            else:
                self._on_message(message, fds)

    def send(self, message: bytes) -> None:
        """A request. Raises OSError where there is no room for it now, or no server any more."""
        if self._control is None:
            raise BrokenPipeError("the fork server has ended")
        self._control.send(message)

    def hang_up(self) -> None:
        """Asks the server to end everything and itself."""
        if self._control is not None:
            self._loop.remove_reader(self._control.fileno())
            self._control.close()
            self._control = None

    def close(self) -> None:
        """Ends it now. Waits for no more than the moment in which the kernel kills."""
        self.hang_up()
        if self._pidfd >= 0:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
            self._pidfd = -1
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
            self._process = None
        if self._complaints >= 0:
            os.close(self._complaints)
            self._complaints = -1
        self.pid = None

    async def leave(self, patience_s: float = 1.0) -> None:
        """Lets the server clean up after itself, then makes sure of its end."""
        self.hang_up()
        deadline = self._loop.time() + patience_s
        while self._process is not None and self._process.poll() is None and self._loop.time() < deadline:
            await asyncio.sleep(0.005)
        self.close()


async def remove_scratch(plan: Plan) -> None:
    """The server removes its scratch folder. What one that was killed has left in it only another one may look at: with no module to
    load, it does nothing but remove it."""
    if plan.scratch is None:
        return
    for helped in (False, True):
        try:
            os.rmdir(plan.scratch)
            return
        except FileNotFoundError:
            return
        except OSError:
            if helped:
                return
        helper = Zygote(lambda message, fds: None, lambda reason: None)
        with contextlib.suppress(IsolationUnavailable, ValueError, OSError):
            await helper.start(replace(plan, config=plan.config | {"preload": (), "site_paths": []}))
            await helper.leave(CLEAN_S)
