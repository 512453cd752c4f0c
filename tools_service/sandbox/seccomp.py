"""The system calls of a snippet: a seccomp allow-list for x86-64, and the counter that bounds its files and threads.

Whatever the list does not name is answered with EPERM. Every creation of a file, folder, shared mapping or thread is handed to a
supervisor (user notification): the kernel has no limit of its own on them that holds for every user.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import time

ARCH_X86_64 = 0xC000003E
ARG, ARG_HIGH = [16 + 8 * i for i in range(6)], [20 + 8 * i for i in range(6)]
RET_KILL, RET_ERRNO, RET_NOTIFY, RET_ALLOW = 0x80000000, 0x00050000, 0x7FC00000, 0x7FFF0000
SYS_SECCOMP, SET_MODE_FILTER, FLAG_NEW_LISTENER = 317, 1, 8
NOTIFY_RECV, NOTIFY_SEND, NOTIFY_CONTINUE = 0xC0502100, 0xC0182101, 1

O_CREAT, O_TRUNC, O_ACCMODE, O_PATH, O_TMPFILE = 0o100, 0o1000, 0o3, 0o10000000, 0o20000000
MMAP, CLONE, MKDIR, MKDIRAT, OPENAT, RENAMEAT2 = 9, 56, 83, 258, 257, 316
MAP_SHARED, MAP_HUGETLB = 0x1, 0x40000  # MAP_SHARED_VALIDATE has the first bit too
OWN_PID = 0x5EC0_A11D  # no process id, no flag and no offset of the filter
SIGCONT, MSG_OOB = 18, 0x1
COMING_S = 1.0  # in which a thread that was allowed is there, or has come and gone
# Flags of pthread_create; every one of them, and no namespace, parent or trace flag beside them.
THREAD_FLAGS = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000 | 0x80000 | 0x100000 | 0x200000

# Memory, time, signals to itself, waiting, and file descriptors that it holds already.
PLAIN = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mprotect": 10, "munmap": 11, "brk": 12,
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20,
    "select": 23, "sched_yield": 24, "mremap": 25, "msync": 26, "dup": 32, "dup2": 33, "pause": 34, "nanosleep": 35, "getitimer": 36,
    "alarm": 37, "setitimer": 38, "getpid": 39, "shutdown": 48, "getsockname": 51, "getpeername": 52,
    "exit": 60, "wait4": 61, "fsync": 74, "fdatasync": 75, "ftruncate": 77, "getcwd": 79, "fchdir": 81, "gettimeofday": 96,
    "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110,
    "getpgrp": 111, "getgroups": 115, "getresuid": 118, "getresgid": 120, "rt_sigpending": 127, "rt_sigtimedwait": 128,
    "rt_sigsuspend": 130, "sigaltstack": 131, "gettid": 186, "time": 201, "epoll_create": 213, "getdents64": 217,
    "set_tid_address": 218, "restart_syscall": 219, "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "waitid": 247,
    "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "epoll_pwait": 281, "eventfd2": 290, "epoll_create1": 291,
    "dup3": 292, "getcpu": 309, "getrandom": 318, "rseq": 334, "epoll_pwait2": 441,
}  # fmt: skip
# Path look-ups that Landlock judges, or that change nothing and tell at most whether a path exists.
PATHS = {
    "stat": 4, "lstat": 6, "access": 21, "chdir": 80, "rename": 82, "mkdir": MKDIR, "rmdir": 84, "unlink": 87, "newfstatat": 262,
    "mkdirat": MKDIRAT, "unlinkat": 263, "renameat": 264, "faccessat": 269, "statx": 332, "faccessat2": 439,
}  # fmt: skip


def insn(code: int, jt: int, jf: int, k: int) -> bytes:
    return struct.pack("<HBBI", code, jt, jf, k & 0xFFFFFFFF)


def load(offset: int) -> bytes:
    return insn(0x20, 0, 0, offset)


def ret(value: int) -> bytes:
    return insn(0x06, 0, 0, value)


def deny(code: int = errno.EPERM) -> bytes:
    return ret(RET_ERRNO | code)


def one_of(arg: int, values: list[int], mask: int = 0xFFFFFFFF) -> list[bytes]:
    """Goes on when (argument & mask) is among the values, else denies. Low 32 bits, which is all an int argument has."""
    tests = [insn(0x15, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [load(ARG[arg]), insn(0x54, 0, 0, mask), *tests, deny()]


def is_not(arg: int, value: int, mask: int) -> list[bytes]:
    return [load(ARG[arg]), insn(0x54, 0, 0, mask), insn(0x15, 0, 1, value), deny()]


def at_most(arg: int, value: int) -> list[bytes]:
    """Unsigned, so that a negative number is refused."""
    return [load(ARG[arg]), insn(0x25, 0, 1, value), deny()]


def null(arg: int) -> list[bytes]:
    return [load(ARG[arg]), insn(0x15, 1, 0, 0), deny(), load(ARG_HIGH[arg]), insn(0x15, 1, 0, 0), deny()]


def checked(channel_fd: int) -> dict[int, list[bytes]]:
    """System calls that are allowed with some arguments only. OWN_PID stands for the process itself."""
    return {
        16: one_of(1, [0x5401, 0x5421, 0x541B, 0x5413, 0x5450, 0x5451]),  # ioctl TCGETS FIONBIO FIONREAD TIOCGWINSZ FIO(N)CLEX
        44: null(4) + is_not(3, MSG_OOB, MSG_OOB),  # sendto, on a connected socket only
        45: is_not(3, MSG_OOB, MSG_OOB),  # recvfrom
        28: one_of(2, [0, 1, 2, 3, 4, 8, 14, 15, 102, 103]),  # madvise: what allocators say; no merging with others' pages
        46: one_of(0, [channel_fd]),  # sendmsg: a descriptor that nothing can have once the limit on open files holds
        53: one_of(0, [1]) + one_of(1, [1], 0xF) + one_of(2, [0]),  # socketpair AF_UNIX SOCK_STREAM
        55: one_of(1, [1]) + one_of(2, [3, 4, 7, 8, 30, 38, 39]),  # getsockopt: kind, error, sizes; nothing of the other end
        62: one_of(0, [OWN_PID]) + is_not(1, SIGCONT, 0xFFFFFFFF),  # kill; SIGCONT undoes the stop of a session between its turns
        # fcntl: dup, flags, locks of the process; no owner, signal, lease, nor a lock that outlives the process
        72: one_of(1, [0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032]),
        97: [],  # getrlimit
        157: one_of(0, [15, 16]),  # prctl: the thread's name
        202: one_of(1, [0, 1, 3, 4, 5, 9, 10], ~0x180),  # futex: wait and wake; no priority inheritance, which python never uses
        204: one_of(0, [0, OWN_PID]),  # sched_getaffinity
        # clock_gettime, clock_getres, clock_nanosleep: the negative ones are CPU clocks of any process
        228: at_most(0, 15), 229: at_most(0, 15), 230: at_most(0, 15),
        234: one_of(0, [OWN_PID]) + is_not(2, SIGCONT, 0xFFFFFFFF),  # tgkill
        293: one_of(1, [0], ~0o2004000),  # pipe2 O_CLOEXEC O_NONBLOCK
        302: one_of(0, [0, OWN_PID]) + null(2),  # prlimit64, to read
        436: one_of(2, [0, 4]),  # close_range: a table of descriptors for each thread would be a limit for each
    }  # fmt: skip


def rules(paths: bool, supervised: bool, channel_fd: int) -> dict[int, list[bytes]]:
    """What becomes of each system call that is not plainly refused. Every body returns on every way through."""
    create = ret(RET_NOTIFY) if supervised else deny()
    table = {number: [ret(RET_ALLOW)] for number in (*PLAIN.values(), *PATHS.values())}
    table |= {number: [*body, ret(RET_ALLOW)] for number, body in checked(channel_fd).items()}
    # A folder that its owner may not enter could not be removed afterwards.
    table |= {number: [*one_of(mode, [0o700], 0o700), create] for number, mode in ((MKDIR, 1), (MKDIRAT, 2))}
    # Shared memory is a file without a name: tens of thousands of them take the kernel seconds to free.
    table[MMAP] = [*one_of(3, [0], MAP_HUGETLB), load(ARG[3]), insn(0x45, 0, 1, MAP_SHARED), create, ret(RET_ALLOW)]
    table[CLONE] = [*one_of(0, [THREAD_FLAGS], ~0x00400000), create]  # the bit is CLONE_DETACHED, which the kernel ignores
    # O_PATH is not judged by Landlock, nor is access mode 3 (a descriptor for ioctl alone), truncation through a read-only open
    # only by newer ones.
    opened = one_of(2, [0], O_PATH) + is_not(2, O_ACCMODE, O_ACCMODE) + is_not(2, O_TRUNC, O_TRUNC | O_ACCMODE)
    table[OPENAT] = [*opened, load(ARG[2]), insn(0x45, 0, 1, O_CREAT | O_TMPFILE), create, ret(RET_ALLOW)]
    table[RENAMEAT2] = [*one_of(4, [0]), ret(RET_ALLOW)]
    if not paths:
        table |= {number: [deny(errno.EACCES)] for number in (*PATHS.values(), OPENAT, RENAMEAT2)}
    # clone3, membarrier: the C library falls back; readlink: "not a link"
    return table | {435: [deny(errno.ENOSYS)], 324: [deny(errno.ENOSYS)], 89: [deny(errno.EINVAL)], 267: [deny(errno.EINVAL)]}


def allow_list(paths: bool, supervised: bool, channel_fd: int) -> bytes:
    """The filter, with OWN_PID where `for_process` puts the process's id.

    paths: False refuses every path look-up, where Landlock cannot judge it. supervised: False refuses every creation, where
    nobody can count it. The numbers are grouped so that a look-up skips most of them: the kernel tries each one at installation.
    """
    program = [load(4), insn(0x15, 1, 0, ARCH_X86_64), ret(RET_KILL), load(0)]
    table = sorted(rules(paths, supervised, channel_fd).items())
    for start in range(0, len(table), 12):
        group = table[start : start + 12]
        body = b"".join(insn(0x15, 0, len(rule), number) + b"".join(rule) for number, rule in group) + deny()
        program += [insn(0x25, 0, 1, group[-1][0]), insn(0x05, 0, 0, len(body) // 8), body]
    return b"".join([*program, deny()])


def for_process(program: bytes, pid: int) -> bytes:
    return program.replace(struct.pack("<I", OWN_PID), struct.pack("<I", pid))


def install(program: bytes, libc: ctypes.CDLL, listener: bool = False) -> int:
    """Installs a filter on this thread; needs no_new_privs. Returns the listener's descriptor, or 0. Raises OSError."""
    fprog = struct.pack("<HxxxxxxQ", len(program) // 8, ctypes.cast(program, ctypes.c_void_p).value)
    result = libc.syscall(SYS_SECCOMP, SET_MODE_FILTER, FLAG_NEW_LISTENER if listener else 0, fprog)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"seccomp: {os.strerror(code)}")
    return result


class Supervisor:
    """Answers one child's notifications: so many files in all, so many threads at a time."""

    def __init__(self, listener: int, pid: int, max_files: int, max_threads: int):
        self.listener, self.pid = listener, pid
        self.files_left, self.max_threads = max_files, max_threads
        self.seen: set[str] = set()  # threads, by their ids
        self.coming: dict[int, float] = {}  # thread that was allowed another one which is not seen yet: until when that counts

    def answer(self) -> None:
        """Handles one waiting notification; one whose thread has died meanwhile is nothing to answer."""
        request = bytearray(80)
        try:
            fcntl.ioctl(self.listener, NOTIFY_RECV, request)
            ident, thread, number = struct.unpack_from("<QI4xi", request)
            code = self.judge(number, thread)
            fcntl.ioctl(self.listener, NOTIFY_SEND, struct.pack("<QqiI", ident, 0, -code, 0 if code else NOTIFY_CONTINUE))
        except OSError:
            return

    def judge(self, number: int, thread: int) -> int:
        """0, or the error with which the system call of that thread fails."""
        if number == CLONE:
            try:
                return self.judge_clone(thread, set(os.listdir(f"/proc/{self.pid}/task")), time.monotonic())
            except OSError:
                return errno.EAGAIN
        self.files_left -= 1
        return 0 if self.files_left >= 0 else errno.EDQUOT

    def judge_clone(self, thread: int, alive: set[str], now: float) -> int:
        """Threads are counted when they are seen, and from the moment they are allowed: several may ask before the first is there."""
        self.coming.pop(thread, None)  # it asks again: what it asked for before is done
        self.coming = {asker: until for asker, until in self.coming.items() if until > now}
        for _ in range(min(len(alive - self.seen), len(self.coming))):
            del self.coming[next(iter(self.coming))]
        self.seen = alive
        if len(alive) + len(self.coming) >= self.max_threads:
            return errno.EAGAIN
        self.coming[thread] = now + COMING_S
        return 0
