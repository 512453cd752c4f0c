"""One child from the owner's side: its code, output, deadline and end."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import select
import signal
import socket
import time

from tools_service.sandbox.child import EXIT_ERROR, EXIT_MEMORY, EXIT_OK, HEADER
from tools_service.sandbox.limits import Limits
from tools_service.sandbox.outcome import Outcome, SandboxStatus, ZygoteDied

REPORT_GRACE_S = 1.0  # from the deadline to the server's report of a child that has ended; past it the server is taken to hang
DEATH_GRACE_S = 0.05  # from the kill to the end; past it the kernel takes long to free what the child held, and nobody waits for it
READ_BYTES = 65536
CPU_CHECK_S = 0.02  # of a session's CPU time, at the shortest


class NotBegun(Exception):
    """The child was gone before it had the whole code: another one may run it."""


def encode_job(code: str, seed: int | None, limits: Limits) -> bytes | None:
    """Header and code; None for what cannot be code."""
    try:
        data = code.encode()
    except (UnicodeEncodeError, AttributeError):
        return None
    if b"\0" in data or len(data) > limits.max_code_bytes:
        return None
    return HEADER.pack(len(data), seed is not None, (seed or 0) & (2**63 - 1)) + data


def refusal(limits: Limits) -> Outcome:
    reason = f"the code was not run: it must be valid text without NUL characters, of at most {limits.max_code_bytes} bytes"
    return Outcome(SandboxStatus.BAD_REQUEST, reason)


def lowered(wall_s: float | None, limits: Limits) -> float:
    """The caller's limit in seconds where it is the lower one."""
    return limits.wall_s if wall_s is None or math.isnan(wall_s) else min(max(wall_s, 0.0), limits.wall_s)


def as_text(data: bytes, max_bytes: int) -> str:
    """Valid UTF-8 of at most max_bytes: what stands for bytes that are no text is longer than they were."""
    text = data.decode(errors="replace")
    if len(text) * 3 <= max_bytes:
        return text
    return text.encode()[:max_bytes].decode(errors="ignore")


class Child:
    """Owns the descriptors. `exit` becomes (wait status, CPU seconds), or ZygoteDied."""

    def __init__(self, number: int, job_fd: int, output_fd: int, pidfd: int, limits: Limits):
        self.number, self.limits = number, limits
        self._loop = asyncio.get_running_loop()
        self._job = socket.socket(fileno=job_fd)
        self._job.setblocking(False)
        self._output_fd, self._pidfd = output_fd, pidfd
        os.set_blocking(output_fd, False)
        self.exit: asyncio.Future[tuple[int, float]] = self._loop.create_future()
        self.exit.add_done_callback(lambda future: future.cancelled() or future.exception())  # one that nobody awaits is no news
        self._output = bytearray()
        self._truncated = False
        self._killed_for: SandboxStatus | None = None
        self._cpu_timer: asyncio.TimerHandle | None = None
        self._closed = False

    def kill(self, reason: SandboxStatus | None = None) -> None:
        if self._killed_for is None:
            self._killed_for = reason
        if self._pidfd >= 0:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _stop(self, stopped: bool) -> None:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP if stopped else signal.SIGCONT)

    def close(self) -> None:
        """Kills it if it lives, and lets everything go. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.kill()  # a cancelled wait has cancelled `exit` as well: that it is done says nothing
        self.exit.cancel()
        self._loop.remove_reader(self._output_fd)
        os.close(self._output_fd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._job.close()

    def _read_output(self) -> None:
        try:
            data = os.read(self._output_fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._output_fd)
            return
        self._take_output(data)

    def _take_output(self, data: bytes) -> None:
        room = self.limits.max_output_bytes - len(self._output)
        self._output += data[:room]
        if len(data) > room:
            self._truncated = True
            self.kill(SandboxStatus.OUTPUT_LIMIT)

    def _drain(self) -> None:
        """What is in the pipe now. Bounded: a pipe holds 64 KiB, and only a session can still write."""
        with contextlib.suppress(OSError):
            for _ in range(8):
                data = os.read(self._output_fd, READ_BYTES)
                if not data:
                    return
                self._take_output(data)

    def _begin(self, wall_s: float) -> list[asyncio.TimerHandle]:
        self._output.clear()
        self._started = time.perf_counter()
        self._loop.add_reader(self._output_fd, self._read_output)
        kill = self._loop.call_later(wall_s, self.kill, SandboxStatus.TIMEOUT)
        return [kill, self._loop.call_later(wall_s + DEATH_GRACE_S, self._settle, self._loop.time() + wall_s + REPORT_GRACE_S)]

    def _settle(self, give_up: float) -> None:
        """Past the deadline and the kill: an end that is as good as reported, or a server that reports no ends."""
        if self.exit.done():
            return
        if not readable(self._pidfd):  # it will never run again, and is not quite gone
            self.exit.set_result((signal.SIGKILL, 0.0))
        elif self._loop.time() < give_up:
            self._loop.call_later(DEATH_GRACE_S, self._settle, give_up)
        else:
            self.exit.set_exception(ZygoteDied("the fork server does not report the end of a child that was killed"))

    def _watch_cpu(self, before_s: float | None) -> None:
        """Kills a session that has used its CPU time; looks again when it could have at the earliest."""
        used_s = self._cpu_s()
        if used_s is None or before_s is None:  # it has ended
            return
        left_s = self.limits.cpu_s - (used_s - before_s)
        if left_s <= 0:
            self.kill(SandboxStatus.CPU_LIMIT)
            return
        cores = min(len(os.sched_getaffinity(0)), self.limits.max_threads)
        self._cpu_timer = self._loop.call_later(max(CPU_CHECK_S, left_s / cores), self._watch_cpu, before_s)

    def _cpu_s(self) -> float | None:
        """CPU seconds that it has used so far; None where it has ended. A process id that nobody waits for yet stays its own."""
        try:
            with open(f"/proc/self/fdinfo/{self._pidfd}") as file:
                pid = next(int(line.split()[1]) for line in file if line.startswith("Pid:"))
            return time.clock_gettime((~pid << 3) | 2) if pid > 0 else None
        except OSError:
            return None

    def _outcome(self, status: SandboxStatus) -> Outcome:
        text = as_text(bytes(self._output), self.limits.max_output_bytes)
        return Outcome(status, text, self._truncated, time.perf_counter() - self._started)

    async def _send(self, job: bytes) -> None:
        try:
            await self._loop.sock_sendall(self._job, job)
        except OSError as error:
            if self._killed_for is None:  # else a limit came first
                raise NotBegun from error

    async def run_once(self, job: bytes, wall_s: float) -> Outcome:
        """Runs the code and ends with the child. Cancelling kills it. Raises NotBegun, or ZygoteDied where it may have begun."""
        timers = self._begin(wall_s)
        try:
            await self._send(job)
            return self._outcome_of_end(await self.exit)
        except ZygoteDied:
            if await self._never_read():
                raise NotBegun from None
            raise
        finally:
            for timer in timers:
                timer.cancel()
            self.close()

    async def _never_read(self) -> bool:
        """Whether the child ended before it had read the whole code: then, and only then, the kernel resets the channel."""
        self.kill()
        for _ in range(100):
            try:
                self._job.recv(1)
                return False
            except BlockingIOError:  # it is dying
                await asyncio.sleep(0.005)
            except ConnectionResetError:
                return True
            except OSError:
                return False
        return False

    def _judge(self, wait_status: int, cpu_s: float) -> SandboxStatus:
        """From what the kernel says of its end and from what the owner did to it. The exit code alone is the snippet's own word: with
        os._exit it can pass for one that ended well, raised or ran out of memory."""
        if self._truncated:
            return SandboxStatus.OUTPUT_LIMIT
        if os.WIFEXITED(wait_status):
            return status_of_exit(os.WEXITSTATUS(wait_status))
        if os.WTERMSIG(wait_status) == signal.SIGKILL and self._killed_for is not None:
            return self._killed_for
        # The kernel ends it by a clock of whole ticks, which on a busy machine runs ahead of the time that it reports.
        if os.WTERMSIG(wait_status) in (signal.SIGXCPU, signal.SIGKILL) and cpu_s >= 0.5 * self.limits.cpu_s:
            return SandboxStatus.CPU_LIMIT
        return SandboxStatus.CRASHED

    async def run_in_session(self, job: bytes, wall_s: float) -> tuple[Outcome, bool]:
        """Runs the code in a child that lives on, and whether it does. Between runs the child is stopped. Raises NotBegun and ZygoteDied
        as `run_once` does.

        The child itself says that a run has ended, by one byte; a snippet that sends one of its own ends its own run early and
        gains nothing else: anything that is not one known byte kills the session.
        """
        answer = self._loop.create_future()
        timers = self._begin(wall_s)
        alive = False
        try:
            self._refuse_stale_answer()
            self._watch_cpu(self._cpu_s())
            self._stop(False)
            await self._send(job)
            self._loop.add_reader(self._job.fileno(), self._read_answer, answer)
            await asyncio.wait((answer, self.exit), return_when=asyncio.FIRST_COMPLETED)
            # The channel breaks when the child dies; what it died of comes a moment later.
            said = answer.result() if answer.done() else b""
            if self.exit.done() or not said:
                unread = said is None or (not answer.done() and await self._never_read())
                if unread and self._killed_for is None:
                    raise NotBegun
                return self._outcome_of_end(await self.exit), False
            self._stop(True)
            self._drain()
            alive = len(said) == 1 and said[0] in (EXIT_OK, EXIT_ERROR, EXIT_MEMORY) and not self._truncated
            if not alive:
                return self._outcome(SandboxStatus.OUTPUT_LIMIT if self._truncated else SandboxStatus.CRASHED), False
            return self._outcome(status_of_exit(said[0])), True
        finally:
            for timer in (*timers, *([self._cpu_timer] if self._cpu_timer else [])):
                timer.cancel()
            self._loop.remove_reader(self._output_fd)
            self._loop.remove_reader(self._job.fileno())
            if not alive:
                self.close()

    def _read_answer(self, answer: asyncio.Future) -> None:
        """Removes itself: asyncio's own sock_recv, cancelled, would do so after the descriptor may have become another's."""
        try:
            said = self._job.recv(2)
        except BlockingIOError:
            return
        except OSError:  # reset: the child ended before it had read the whole code
            said = None
        self._loop.remove_reader(self._job.fileno())
        if not answer.done():
            answer.set_result(said)

    def _refuse_stale_answer(self) -> None:
        try:
            self._job.recv(1)
        except BlockingIOError:
            return
        except OSError:
            pass
        raise NotBegun("the session's channel holds what nobody asked for, or is closed")

    def _outcome_of_end(self, end: tuple[int, float]) -> Outcome:
        self._drain()
        return self._outcome(self._judge(*end))


def readable(fd: int) -> bool:
    """Of a pidfd: whether the process has ended."""
    poll = select.poll()  # select.select knows no descriptor above 1023
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def status_of_exit(code: int) -> SandboxStatus:
    if code == EXIT_OK:
        return SandboxStatus.OK
    return SandboxStatus.MEMORY_LIMIT if code == EXIT_MEMORY else SandboxStatus.ERROR
