"""The fork server: executed by the owner with an empty environment, it loads modules once and forks children ahead of time.

Standard input is the control channel (a SOCK_SEQPACKET socket). It reads one JSON configuration, answers `H` (ready) or `E` and
a reason, and then serves requests: `f` fork a child for one snippet, `s` fork one for a session. It reports `R`, number, whether it
is for a session and three descriptors (job channel, output, pidfd) when a child is locked down, and `X`, number, wait status and CPU
microseconds when it has ended. When the channel closes or the owner's process ends, everything ends. No child ever holds the control
channel.
"""

from __future__ import annotations

import _sitebuiltins
import builtins
import contextlib
import errno
import gc
import importlib
import json
import os
import platform
import resource
import select
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass

sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from tools_service.sandbox import child as child_side
from tools_service.sandbox import cleaner, lockdown, reach
from tools_service.sandbox.seccomp import Supervisor

sys.path.pop()
MAX_MESSAGE_BYTES = 1 << 17


@dataclass
class Child:
    number: int
    pid: int
    pidfd: int
    scratch: int | None  # the folder's descriptor: its name is in no memory that a later child gets a copy of
    session: bool = False
    hand_over: socket.socket | None = None
    fds_of_owner: tuple[int, ...] = ()
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
        self.num_forked = 0
        self.rlimits = {session: lockdown.own_rlimits(self.limits, session) for session in (False, True)}
        self.channel = channel
        self.watch(control.fileno(), self.on_request)
        # A process that the owner forked may hold the channel open; and a death signal would follow the owner's thread.
        self.watch(owner_pidfd, self.shut_down)

    def watch(self, fd: int, handler) -> None:
        self.handlers[fd] = handler
        self.poll.register(fd, select.EPOLLIN)

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
        self.fork_child(session=message == b"s")

    def fork_child(self, session: bool) -> None:
        """What can be made before the fork is: a child pays a page of memory for almost every object that it touches."""
        self.num_forked += 1
        base = self.config["scratch"]
        # A name that nobody can guess: what can be named can be asked for its size and times, which no rule for files forbids.
        scratch = f"{base}/{os.urandom(16).hex()}" if base else None
        folder = None
        if scratch:
            os.mkdir(scratch, 0o700)
            os.chdir(scratch)
            folder = os.open(scratch, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        job, job_of_child = socket.socketpair()
        output, output_of_child = os.pipe2(os.O_CLOEXEC)
        hand_over, hand_over_of_child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        devnull = os.open(os.devnull, os.O_RDONLY)  # its own: flags and position belong to what was opened, not to who holds it
        ruleset = lockdown.file_rules(self.confinement, scratch) if self.confinement.landlock else -1
        fds = (hand_over_of_child.fileno(), devnull, output_of_child, output_of_child, job_of_child.fileno())
        targets = tuple(zip(fds, (self.channel.fileno(), 0, 1, 2, 3), strict=True))  # 3 last: it may be a source
        rlimits = self.rlimits[session]
        parent = os.getpid()
        pid = lockdown.fork()
        if pid == 0:
            self.be_child(parent, targets, ruleset, rlimits, session)
        job_of_child.close()
        hand_over_of_child.close()
        for fd in (output_of_child, devnull, ruleset):
            if fd >= 0:
                os.close(fd)
        child = Child(self.num_forked, pid, os.pidfd_open(pid), folder, session, hand_over, (job.detach(), output))
        self.children[child.number] = child
        self.watch(child.pidfd, lambda: self.on_exit(child))
        self.watch(hand_over.fileno(), lambda: self.on_locked_down(child))

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
                socket.send_fds(self.channel, [b"L"], [] if listener < 0 else [listener])
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
        if message == b"L":
            if fds:
                child.supervisor = Supervisor(fds[0], child.pid, self.limits.max_files, self.limits.max_threads)
                self.watch(fds[0], child.supervisor.answer)
            self.report(b"R" + struct.pack("<I?", child.number, child.session), (*child.fds_of_owner, child.pidfd))
        elif message:
            self.report(message)
        for fd in child.fds_of_owner:
            os.close(fd)
        child.fds_of_owner = ()
        child.hand_over.close()

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
        if not child.cleaner:
            cpu_us = int((usage.ru_utime + usage.ru_stime) * 1e6)
            self.report(b"X" + struct.pack("<IiQ", child.number, status, cpu_us))
        if child.scratch is not None:
            self.clean(child)

    def clean(self, child: Child) -> None:
        """Removes the scratch folder; what is in it, only by a process that can reach nothing else."""
        path = os.readlink(f"/proc/self/fd/{child.scratch}")
        try:
            os.rmdir(path)
        except OSError:
            if not child.cleaner:
                self.num_forked += 1
                pid = cleaner.fork_cleaner(self.confinement, path)
                helper = Child(self.num_forked, pid, os.pidfd_open(pid), child.scratch, cleaner=True)
                self.children[helper.number] = helper
                self.watch(helper.pidfd, lambda: self.on_exit(helper))
                return
        os.close(child.scratch)

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


def reserve_channel(number: int) -> socket.socket:
    """Holds the number that a child's way back has. To be called before anything else may get it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    placeholder, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return socket.socket(fileno=os.dup2(placeholder.fileno(), number, inheritable=False))


def drop_privileges(uid: int | None) -> None:
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    lockdown.drop_capabilities()


def load(config: dict) -> None:
    sys.path += config["site_paths"]
    hide_host_name()  # first: modules keep what they were told
    for name in config["preload"]:
        importlib.import_module(name)
    if "numpy" in sys.modules:
        importlib.import_module("numpy.random")  # numpy loads it at its first use: too late for a seed
    os.environ.clear()
    for name in ("exit", "quit"):  # `site`, which is left out, makes these
        setattr(builtins, name, _sitebuiltins.Quitter(name, ""))
    builtins.help = _sitebuiltins._Helper()
    child_side.hide_frames_of(sys.path)
    sys.path[:] = [path for path in sys.path if path not in config["site_paths"]]  # what else lies there cannot be read
    child_side.warm_up()
    importlib.invalidate_caches()


def hide_host_name() -> None:
    """uname, which tells the host's name, is refused to snippets. What modules ask of it is answered from here."""
    real = os.uname()
    hidden = os.uname_result((real.sysname, "sandbox", real.release, real.version, real.machine))
    os.uname = sys.modules["posix"].uname = lambda: hidden
    socket.gethostname = sys.modules["_socket"].gethostname = lambda: hidden.nodename
    platform._uname_cache = None
    platform.uname()


def main() -> None:
    control = socket.socket(fileno=os.dup(0))
    control.set_inheritable(False)
    os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
    try:
        os.umask(0o077)
        message, (owner_pidfd,), _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, 1)
        config = json.loads(message)
        channel = reserve_channel(config["limits"]["max_open_files"])
        load(config)
        parts = reach.parts_of_modules(config["site_paths"])
        drop_privileges(config["uid"])
        confinement = reach.open_confinement(config, parts)
        with open("/proc/self/statm") as file:
            mapped_bytes = int(file.read().split()[0]) * resource.getpagesize()
        lockdown.restrict_server(confinement.limits, mapped_bytes + confinement.limits.memory_bytes)
        reach.hide(config, parts, confinement.landlock)
        if config["scratch"]:
            cleaner.sweep(confinement, config["scratch"])
        if len(os.listdir("/proc/self/task")) != 1:
            raise RuntimeError(f"preload={config['preload']} starts threads, and a process with threads cannot be forked")
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
