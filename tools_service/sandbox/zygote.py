"""The fork server: executed by the owner with an empty environment, it loads modules once and forks children ahead of time.

Standard input is the control channel (a SOCK_SEQPACKET socket). It reads one JSON configuration, answers `H` (ready) or `E` and
a reason, and then serves requests: `f` fork a child for one snippet, `s` fork one for a session. It reports `R`, number, whether it
is for a session and three descriptors (job channel, output, pidfd) when a child is locked down, and `X`, number, wait status and CPU
microseconds when that has ended; or, instead, `F`, whether it was for a session and the reason where there can be no child now: a
machine that is short of processes, descriptors or room is so for a while. When the channel closes or the owner's process ends,
everything ends. No child ever holds the control channel.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass

sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from tools_service.sandbox import child as child_side
from tools_service.sandbox import cleaner, lockdown, preparation, reach
from tools_service.sandbox.seccomp import Supervisor

sys.path.pop()
MAX_MESSAGE_BYTES = 1 << 17


HAND_OVER = (socket.AF_UNIX, socket.SOCK_SEQPACKET)


@dataclass
class Child:
    number: int
    pid: int
    pidfd: int
    scratch: int | None = None  # the folder's descriptor: its name is in no memory that a later child gets a copy of
    session: bool = False
    hand_over: socket.socket | None = None
    fds_of_owner: tuple[int, ...] = ()
    announced: bool = False
    supervisor: Supervisor | None = None
    cleaner: bool = False


class Server:
    def __init__(
        self, control: socket.socket, owner_pidfd: int, channel: socket.socket, config: dict, confinement: lockdown.Confinement
    ):  # fmt: skip
        self.control, self.config, self.confinement = control, config, confinement
        self.limits = confinement.limits
        self.poll = select.epoll()
        self.handlers = {}
        self.children: dict[int, Child] = {}
        self.uncleaned: collections.deque[int] = collections.deque()  # scratch folders for which no cleaner could be forked
        self.num_forked = 0
        self.rlimits = {session: lockdown.own_rlimits(self.limits, session) for session in (False, True)}
        self.channel = channel
        self.watch(control.fileno(), self.on_request)
        # A process that the owner forked may hold the channel open; and a death signal would follow the owner's thread.
        self.watch(owner_pidfd, self.shut_down)

    def watch(self, fd: int, handler) -> None:
        self.poll.register(fd, select.EPOLLIN)
        self.handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        if self.handlers.pop(fd, None):
            self.poll.unregister(fd)

    def serve(self) -> None:
        while True:
            for fd, _ in self.poll.poll():
                handler = self.handlers.get(fd)
                if handler is not None:  # else an earlier event of this round ended it
                    handler()

    def on_request(self) -> None:
        try:
            message = self.control.recv(64)
        except OSError:  # the owner went with reports unread
            message = b""
        if not message:
            self.shut_down()
        session = message == b"s"
        try:
            self.fork_child(session)
        except OSError as error:
            self.report_failure(session, error.strerror or str(error))

    def fork_child(self, session: bool) -> None:
        """Raises OSError, and leaves nothing, where something is lacking. What can be made before the fork is: a child pays a page of
        memory for almost every object that it touches, as does this process for what it gives up afterwards: here numbers, not sockets."""
        ends: list[int] = []  # of pairs: this process's own, the child's, and so on
        passed_on: list[int] = []
        folder = None
        # A name that nobody can guess: what can be named can be asked for its size and times, which no rule for files forbids.
        scratch = f"{base}/{os.urandom(16).hex()}" if (base := self.config["scratch"]) else None
        if scratch:
            os.mkdir(scratch, 0o700)
        try:
            if scratch:
                os.chdir(scratch)
                folder = os.open(scratch, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            ends += (end.detach() for end in socket.socketpair(*HAND_OVER))
            ends += (end.detach() for end in socket.socketpair())
            ends += os.pipe2(os.O_CLOEXEC)
            hand_over, hand_over_of_child, job, job_of_child, output, output_of_child = ends
            self.watch(hand_over, lambda: self.on_locked_down(child))
            passed_on.append(devnull := os.open(os.devnull, os.O_RDONLY))  # its own: its flags and position are of what was opened
            ruleset = -1
            if self.confinement.landlock:
                passed_on.append(ruleset := lockdown.file_rules(self.confinement, scratch))
            fds = (hand_over_of_child, devnull, output_of_child, output_of_child, job_of_child)
            targets = tuple(zip(fds, (self.channel.fileno(), 0, 1, 2, 3), strict=True))  # 3 last: it may be a source
            rlimits = self.rlimits[session]
            parent = os.getpid()
            pid = lockdown.fork()
            if pid == 0:
                self.be_child(parent, targets, ruleset, rlimits, session)
            child = self.adopt(pid, scratch=folder, session=session, fds_of_owner=(job, output))
        except OSError:
            for fd in ends[::2]:
                self.unwatch(fd)
                os.close(fd)
            if folder is not None:
                os.close(folder)
            if scratch:
                os.rmdir(scratch)
            raise
        finally:
            for fd in ends[1::2] + passed_on:
                os.close(fd)
        child.hand_over = socket.socket(*HAND_OVER, fileno=hand_over)

    def adopt(self, pid: int, **its) -> Child:
        """Takes note of a process that was forked. One that cannot be watched is ended; raises OSError then."""
        pidfd = -1
        try:
            pidfd = os.pidfd_open(pid)
            self.watch(pidfd, lambda: self.on_exit(child))
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            if pidfd >= 0:
                os.close(pidfd)
            raise
        self.num_forked += 1
        child = self.children[self.num_forked] = Child(self.num_forked, pid, pidfd, **its)
        return child

    def be_child(self, parent: int, targets: tuple, ruleset: int, rlimits: tuple, session: bool) -> None:
        """Never returns."""
        try:
            lockdown.die_with_parent(parent)
            for fd, target in targets:
                os.dup2(fd, target)
            lockdown.lock_down(self.confinement, ruleset, rlimits, self.hand_over)
            child_side.serve_session() if session else child_side.serve_once()
        except BaseException as error:
            with contextlib.suppress(BaseException):
                self.channel.send(f"E{error}".encode()[:2000])
        finally:
            os._exit(child_side.EXIT_ERROR)

    def hand_over(self, listener: int) -> None:
        """The kernel counts the descriptors that are on their way, those of reports which the owner has yet to read included, against the
        sender's limit of open files: a child's is low."""
        while True:
            try:
                socket.send_fds(self.channel, *(([b"N"], []) if listener < 0 else ([b"L"], [listener])))
                return
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:
                    raise
            time.sleep(0.002)

    def on_locked_down(self, child: Child) -> None:
        try:
            message, fds, _, _ = socket.recv_fds(child.hand_over, 4096, 1)
        except OSError:
            message, fds = b"", []
        self.unwatch(child.hand_over.fileno())
        if message[:1] == b"E":
            self.report(message)
        else:
            self.announce(child, message, fds)
        for fd in child.fds_of_owner:
            os.close(fd)
        child.fds_of_owner = ()
        child.hand_over.close()

    def announce(self, child: Child, message: bytes, fds: list[int]) -> None:
        child.announced = message == b"N" or (message == b"L" and bool(fds))  # the kernel hands over what there is room for
        if not child.announced:
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
            self.report_failure(child.session, "it ended, or had to be ended, before it was locked down")
            return
        if fds:
            child.supervisor = Supervisor(fds[0], child.pid, self.limits.max_files, self.limits.max_threads)
            self.watch(fds[0], child.supervisor.answer)
        self.report(b"R" + struct.pack("<I?", child.number, child.session), (*child.fds_of_owner, child.pidfd))

    def report_failure(self, session: bool, reason: str) -> None:
        self.report(b"F" + struct.pack("<?", session) + reason.encode()[:2000])

    def report(self, message: bytes, fds: tuple[int, ...] = ()) -> None:
        try:
            socket.send_fds(self.control, [message], fds)
        except OSError:  # the owner has gone
            self.shut_down()

    def on_exit(self, child: Child) -> None:
        if child.fds_of_owner:  # its hand-over waits in the same round of events
            self.on_locked_down(child)
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if not pid:
            return
        self.unwatch(child.pidfd)
        os.close(child.pidfd)
        if child.supervisor:
            self.unwatch(child.supervisor.listener)
            os.close(child.supervisor.listener)
        del self.children[child.number]
        if child.announced:
            cpu_us = int((usage.ru_utime + usage.ru_stime) * 1e6)
            self.report(b"X" + struct.pack("<IiQ", child.number, status, cpu_us))
        if self.uncleaned:  # with the child something has ended that was in short supply
            self.clean(self.uncleaned.popleft())
        if child.scratch is not None:
            self.clean(child.scratch, cleaned=child.cleaner)

    def clean(self, folder: int, cleaned: bool = False) -> None:
        """Removes a scratch folder; what is in it, only by a process that can reach nothing else."""
        path = os.readlink(f"/proc/self/fd/{folder}")
        try:
            os.rmdir(path)
        except OSError:
            if not cleaned:
                try:
                    self.adopt(cleaner.fork_cleaner(self.confinement, path), scratch=folder, cleaner=True)
                except OSError:
                    self.uncleaned.append(folder)
                return
        os.close(folder)

    def shut_down(self) -> None:
        for child in self.children.values():
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
        for child in self.children.values():
            with contextlib.suppress(OSError):
                os.waitpid(child.pid, 0)
        if self.config["scratch"]:
            cleaner.sweep(self.confinement, self.config["scratch"])
            with contextlib.suppress(OSError):
                os.rmdir(self.config["scratch"])
        os._exit(0)


def main() -> None:
    control = socket.socket(fileno=os.dup(0))
    control.set_inheritable(False)
    os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
    try:
        os.umask(0o077)
        message, (owner_pidfd,), _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, 1)
        config = json.loads(message)
        channel = preparation.reserve_channel(config["limits"]["max_open_files"])
        preparation.load(config)
        parts = reach.parts_of_modules(config["site_paths"])
        preparation.drop_privileges(config["uid"])
        confinement = reach.open_confinement(config, parts)
        lockdown.restrict_server(confinement.limits, preparation.mapped_bytes() + confinement.limits.memory_bytes)
        reach.hide(config, parts, confinement.landlock)
        if config["scratch"]:
            cleaner.sweep(confinement, config["scratch"])
        server = Server(control, owner_pidfd, channel, config, confinement)
        child_side.open_outputs()
        gc.collect()
        gc.freeze()
    except BaseException as error:
        control.send(f"E{type(error).__name__}: {error}".encode()[:4000])
        raise
    control.send(b"H")
    server.serve()


if __name__ == "__main__":
    main()
