"""Runs an MCP server's command and sees to it that nothing of it outlives its owner: python mcp_child.py OWNER_PID COMMAND ARGS.

Standard library only, started by path in isolated mode. `npx`, `uvx` and shell scripts start the real server as a grandchild, which a
signal to the child alone would miss. So this process adopts whatever is orphaned below it, ends when the command ends or when its own
parent dies, and kills all that is left. Linux; elsewhere it only starts the command.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
ENDS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def main(owner_pid: int, command: list[str]) -> int:
    if sys.platform != "linux":
        os.execvp(command[0], command)
    signals = ENDS | {signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != owner_pid:  # it died before the line above
        return 1
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # python ignores it, and exec would hand that on
        try:
            os.execvp(command[0], command)
        except OSError as error:
            print(f"cannot start {command[0]!r}: {error.strerror}", file=sys.stderr, flush=True)
            os._exit(127)
    nothing = os.open(os.devnull, os.O_RDWR)  # the server alone holds the pipes, so that their end is seen
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    status = None
    while status is None:
        if signal.sigwait(signals) in ENDS:
            break
        status = _reap(child)
    _kill_all()
    return 1 if status is None else os.waitstatus_to_exitcode(status) & 0xFF


def _reap(child: int) -> int | None:
    """Collects whoever has ended; the child's wait status once it is among them."""
    status = None
    while True:
        try:
            pid, ended = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == child:
            status = ended


def _kill_all() -> None:
    """Kills the children until none is left: those of a killed one become ours."""
    while True:
        with open("/proc/thread-self/children") as file:
            for pid in file.read().split():
                os.kill(int(pid), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
