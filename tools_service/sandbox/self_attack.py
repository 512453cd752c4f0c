"""The sandbox attacks itself before it takes work: what is configured does not count, what a snippet can do does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import tempfile
from typing import TYPE_CHECKING

from tools_service.sandbox.limits import Limits
from tools_service.sandbox.outcome import IsolationUnavailable, SandboxStatus
from tools_service.sandbox.running import encode_job

if TYPE_CHECKING:
    from tools_service.sandbox.owner import Sandbox

ATTACK = """
import os, socket, signal, ctypes
def attempt(name, do):
    try:
        do()
    except (OSError, MemoryError, AttributeError):
        return
    print('BREACH', name)
def connect():
    s = socket.socket()
    s.settimeout(1)
    s.connect(('127.0.0.1', {port}))
def fork():
    if os.fork() == 0:
        os._exit(0)
def write():
    with open({folder!r} + '/written', 'w') as f:
        f.write('x')
attempt('read a file of the host', lambda: open({canary!r}).read())
attempt('list a folder of the host', lambda: os.listdir({folder!r}))
attempt('change the mode of a file of the host', lambda: os.chmod({canary!r}, 0o600))
attempt('write outside its folder', write)
attempt('connect to the loopback', connect)
attempt('fork', fork)
attempt('execute', lambda: os.execv('/bin/true', ['true']))
attempt('signal its owner', lambda: os.kill({owner}, 0))
attempt('signal its parent', lambda: os.kill(os.getppid(), 0))
attempt('open the memory of its parent', lambda: open('/proc/%d/mem' % os.getppid(), 'rb').close())
attempt('use more memory than the limit', lambda: bytearray({memory}))
libc = ctypes.CDLL(None, use_errno=True)
for number, name in ((425, 'io_uring'), (101, 'ptrace'), (272, 'unshare'), (319, 'memfd'), (321, 'bpf'), (323, 'userfaultfd')):
    if libc.syscall(number, 0, 0, 0, 0, 0) >= 0:
        print('BREACH', name)
"""
ATTACK_S = 3.0


async def breaches(sandbox: Sandbox) -> list[str]:
    """What a snippet could do that none may. Raises IsolationUnavailable where the attack itself could not be carried out."""
    folder = tempfile.mkdtemp(prefix="tools-sandbox-canary-")
    canary = os.path.join(folder, "canary")
    secret = secrets.token_hex(8)
    with open(canary, "w") as file:
        file.write(secret)
    os.chmod(canary, 0o644)
    os.chmod(folder, 0o777)  # the isolation must hold where permissions would not
    reached = []
    server = await asyncio.start_server(lambda reader, writer: (reached.append(1), writer.close()), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        code = ATTACK.format(
            port=port, canary=canary, folder=folder, owner=os.getpid(), memory=sandbox.limits.memory_bytes + (1 << 20)
        )
        outcome = await sandbox.run_job(encode_job(code, None, Limits()), ATTACK_S)
        with open(canary) as file:
            changed = file.read() != secret
        if outcome.status not in (SandboxStatus.OK, SandboxStatus.OUTPUT_LIMIT):  # it prints only where it got through
            said = " ".join(outcome.output.split())[-200:]
            raise IsolationUnavailable(f"a snippet cannot run within {sandbox.limits}: {outcome.status}: {said or 'it said nothing'}")
        found = [line.removeprefix("BREACH ") for line in outcome.output.splitlines()]
        if changed or os.listdir(folder) != ["canary"]:
            found.append("the canary's folder changed")
        return found + ["a listener was reached"] * bool(reached)
    finally:
        server.close()
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
