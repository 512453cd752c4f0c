"""Takes every right but its own scratch folder and the interpreter's files from the calling process, for good.

Linux on x86-64, standard library and ctypes only: it runs in the fork server's children, before the code arrives.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from dataclasses import dataclass

from tools_service.sandbox import seccomp
from tools_service.sandbox.limits import Limits

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
PR_CAP_AMBIENT = 47
SYS_CAPSET, SYS_CLOSE_RANGE = 126, 436
READ_FILE, READ_DIR = 1 << 2, 1 << 3
# write, read, list, remove folder and file, make folder and regular file: no links, sockets, pipes or devices
SCRATCH_RIGHTS = (1 << 1) | READ_FILE | READ_DIR | (1 << 4) | (1 << 5) | (1 << 7) | (1 << 8)
REFER, TRUNCATE = 1 << 13, 1 << 14

libc = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock: nothing here takes long


def check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def fork() -> int:
    """The C library's fork, for a process with one thread. What the interpreter adds to it (locks and lists of other threads, hooks
    that reseed generators) touches so many pages that it takes longer than all else; children seed their generators themselves."""
    return check(libc.fork(), "fork")


def landlock_abi() -> int:
    """Version of Landlock that the kernel offers; 0 for none."""
    return max(libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1), 0)


@dataclass(frozen=True)
class Confinement:
    """What a child keeps.

    read_fds: (O_PATH descriptor, is a folder) of what it may read; device_fds: to read and write. programs: the system call filter
    with and without a supervisor; None for no filter at all. landlock: the version to use; 0 leaves files to the filter.
    """

    limits: Limits
    read_fds: tuple[tuple[int, bool], ...]
    device_fds: tuple[int, ...]
    landlock: int
    programs: tuple[bytes, bytes] | None


def drop_capabilities() -> None:
    """Of this process and of whatever it might become; harmless where it has none."""
    libc.prctl(PR_CAP_AMBIENT, 4, 0, 0, 0)
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header, data = struct.pack("<Ii", 0x20080522, 0), bytes(24)
    check(libc.syscall(SYS_CAPSET, header, data), "capset")


def die_with_parent(parent: int) -> None:
    check(libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def lowered(what: int, soft: int, hard: int) -> tuple[int, tuple[int, int]]:
    """The machine's own limit may be lower; it cannot be raised."""
    ceiling = resource.getrlimit(what)[1]
    if ceiling != resource.RLIM_INFINITY:
        hard = ceiling if hard == resource.RLIM_INFINITY else min(hard, ceiling)
        soft = min(soft, ceiling)
    return what, (soft, hard)


def own_rlimits(limits: Limits, session: bool) -> tuple[tuple[int, tuple[int, int]], ...]:
    """Those that a child sets itself, because its parent could not live under them.

    session: every run has the CPU limit to itself, so the owner counts: a hard limit could not be raised again, and a soft one can
    be ignored.
    """
    cpu_s = resource.RLIM_INFINITY if session else int(-(-limits.cpu_s // 1))
    cpu = lowered(resource.RLIMIT_CPU, cpu_s, resource.RLIM_INFINITY if session else cpu_s + 1)
    return cpu, lowered(resource.RLIMIT_NOFILE, limits.max_open_files, limits.max_open_files)


def restrict_server(limits: Limits, address_space_bytes: int) -> None:
    """What children inherit, so that none of them has to do it again. The calling process must have one thread."""
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl(PR_SET_DUMPABLE)")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    for what, most in (
        (resource.RLIMIT_AS, address_space_bytes),
        (resource.RLIMIT_FSIZE, limits.max_file_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 64),  # counted per user: a queue full of its own signals would be everyone's
    ):
        resource.setrlimit(*lowered(what, most, most))


def new_ruleset(attr: bytes) -> int:
    return check(libc.syscall(LANDLOCK_CREATE, attr, ctypes.c_size_t(len(attr)), 0), "landlock_create_ruleset")


def add_rule(ruleset: int, fd: int, rights: int) -> None:
    check(libc.syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("<Qi", rights, fd), 0), "landlock_add_rule")


def file_rules(confinement: Confinement, scratch: str | None) -> int:
    """A Landlock ruleset, as a descriptor, for one child: made by its parent, for whom it costs no page of memory."""
    abi = confinement.landlock
    handled = (1 << 13) - 1 | (REFER if abi >= 2 else 0) | (TRUNCATE if abi >= 3 else 0) | ((1 << 15) if abi >= 5 else 0)
    # TCP bind and connect from ABI 4; abstract sockets and signals to processes outside from ABI 6.
    attr = struct.pack("<QQQ", handled, 3, 3)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = new_ruleset(attr)
    try:
        for fd, is_folder in confinement.read_fds:
            add_rule(ruleset, fd, READ_FILE | READ_DIR if is_folder else READ_FILE)
        for fd in confinement.device_fds:
            add_rule(ruleset, fd, READ_FILE | 1 << 1)
        if scratch is not None:
            fd = os.open(scratch, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                add_rule(ruleset, fd, (SCRATCH_RIGHTS | REFER | TRUNCATE) & handled)
            finally:
                os.close(fd)
    except BaseException:
        os.close(ruleset)
        raise
    return ruleset


def lock_down(confinement: Confinement, ruleset: int, rlimits: tuple, hand_over) -> None:
    """The calling process, a child of one that `restrict_server` holds, keeps what `confinement` says and descriptors 0 to 3.

    ruleset: of `file_rules`; -1 for none. rlimits: of `own_rlimits`. hand_over(listener): called with the descriptor of the
    notification listener, or -1 where the kernel offers none; it may call sendmsg on descriptor max_open_files. Raises OSError where
    anything fails: the caller must not go on.
    """
    if ruleset >= 0:
        check(libc.syscall(LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    channel = confinement.limits.max_open_files
    check(libc.syscall(SYS_CLOSE_RANGE, 4, channel - 1, 0), "close_range")  # room for the listener under the limit below
    check(libc.syscall(SYS_CLOSE_RANGE, channel + 1, 0xFFFFFFFF, 0), "close_range")
    for what, limit in rlimits:
        resource.setrlimit(what, limit)
    if confinement.programs is None:  # the owner was told `unsafe_no_isolation`
        hand_over(-1)
        check(libc.syscall(SYS_CLOSE_RANGE, 4, 0xFFFFFFFF, 0), "close_range")
        return
    pid, programs = os.getpid(), confinement.programs
    try:
        listener = seccomp.install(seccomp.for_process(programs[0], pid), libc, listener=True)
    except OSError:  # another supervisor watches this process already, as some container runtimes do
        listener = -1
        seccomp.install(seccomp.for_process(programs[1], pid), libc)
    hand_over(listener)
    check(libc.syscall(SYS_CLOSE_RANGE, 4, 0xFFFFFFFF, 0), "close_range")
