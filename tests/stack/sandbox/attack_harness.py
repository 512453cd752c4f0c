"""Attacks on the sandbox, and the host that they must not harm.

`Host` runs in a process of its own, with a canary in its environment, a folder of canaries, listeners, and an innocent process:
as an unprivileged user wherever possible, so that the sandbox, its owner and all that it could harm belong to one user. `Harness`
is the tests' side: one line of JSON in, one line out. No row is ever run without a sandbox, and nothing leaves the loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import re
import resource
import secrets
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
ROWS: list[dict] = json.loads((Path(__file__).parent / "attacks.json").read_text())
WALL_S = 2.0
SETTLE_S = 3.0
ROW_S = 60.0
PR_SET_CHILD_SUBREAPER = 36
UNPRIVILEGED = 65534


def as_user(user: int | None) -> dict:
    return {"user": user, "group": user, "extra_groups": []} if user is not None else {}


def interpreters() -> list[tuple[str, int | None]]:
    """(python, user) to try, best first: an unprivileged user's where we are root and there is a python that others may run."""
    if os.geteuid() != 0:
        return [(sys.executable, None)]
    system = shutil.which(f"python{sys.version_info[0]}.{sys.version_info[1]}", path="/usr/local/bin:/usr/bin")
    return [*((python, UNPRIVILEGED) for python in (os.path.realpath(sys.executable), system) if python), (sys.executable, None)]


def usable(python: str, user: int | None) -> bool:
    try:
        command = [python, "-c", "import tools_service.sandbox.owner"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=30, **as_user(user))
    except OSError:
        return False
    return done.returncode == 0


class Harness:
    """The tests' side of one `Host`. Bound to one isolation; a host that no longer answers is replaced for the next row."""

    def __init__(self, isolation: str, interpreter: tuple[str, int | None] | None = None):
        self._isolation = isolation
        self._interpreter = interpreter or next(pair for pair in interpreters() if usable(*pair))
        self._process: subprocess.Popen | None = None
        self._folder: str | None = None
        self.uid: int | None = None  # of the host, once it runs

    def _start(self) -> None:
        python, user = self._interpreter
        self._folder = tempfile.mkdtemp(prefix="attack-host-")
        os.chmod(self._folder, 0o755)
        if user is not None:
            os.chown(self._folder, user, user)
        environment = {"CANARY_OF_THE_OWNER": f"CANARY-{secrets.token_hex(8)}", "TMPDIR": self._folder, "PATH": os.environ["PATH"]}
        command = [python, str(Path(__file__).resolve()), self._isolation]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, **as_user(user),
        )  # fmt: skip
        answer = self._read()
        if not isinstance(answer, int):
            self.close()
            raise RuntimeError(f"the host of the attacks does not start: {answer}")
        self.uid = answer

    def _read(self) -> object:
        assert self._process and self._process.stdout
        data, deadline = b"", time.monotonic() + ROW_S
        while not data.endswith(b"\n"):
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self.close()
                return [f"the owner of the sandbox did not answer within {ROW_S:.0f} s"]
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                self.close()
                return ["the owner of the sandbox died"]
            data += part
        return json.loads(data)

    def attack(self, row: dict) -> list[str]:
        """What got through or broke; nothing is right."""
        if self._process is None:
            self._start()
        assert self._process and self._process.stdin
        self._process.stdin.write(json.dumps(row).encode() + b"\n")
        answer = self._read()
        return answer if isinstance(answer, list) else [str(answer)]

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin and self._process.stdout
            self._process.stdin.close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)
            self._process.stdout.close()
            self._process = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def facts_of(path: str) -> tuple:
    """Everything about a file, folder or link that an attack could change."""
    found = os.lstat(path)
    facts = (found.st_mode, found.st_uid, found.st_gid, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_nlink)
    content: object = None
    if os.path.islink(path):
        content = os.readlink(path)
    elif os.path.isfile(path):
        content = Path(path).read_bytes()
    return (path, *facts, content, os.listxattr(path, follow_symlinks=False))


def descendants(pid: int) -> list[int]:
    """Every process below this one, the dead that nobody has asked after included."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        new = [child for child, its in parents.items() if its == parent]
        found += new
        todo += new
    return found


class Host:
    """What an attack could reach, read, change or stop."""

    def __init__(self, isolation: str):
        from tools_service.sandbox.owner import Limits, Sandbox

        self.sandbox = Sandbox(Limits(wall_s=WALL_S), isolation=isolation)
        # Whoever leaves the tree of processes comes back to us, so that nobody can hide.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.folder = tempfile.mkdtemp(prefix="canaries-")
        os.chmod(self.folder, 0o777)
        self.secret = os.path.join(self.folder, "secret")
        for name in ("secret", "other"):
            path = os.path.join(self.folder, name)
            Path(path).write_text(f"CANARY-{secrets.token_hex(8)}\n")
            os.chmod(path, 0o666)
        os.mkdir(os.path.join(self.folder, "inner"))
        os.symlink("secret", os.path.join(self.folder, "link"))
        self.sockets_folder = tempfile.mkdtemp(prefix="sockets-")
        os.chmod(self.sockets_folder, 0o777)
        self.listeners = self._listen()
        self.victim = subprocess.Popen(["sleep", "100000"], env={"CANARY_OF_THE_VICTIM": "CANARY-victim"}, cwd="/")

    def _listen(self) -> dict[str, socket.socket]:
        found = {}
        self.paths = {"@UNIX_STREAM@": f"{self.sockets_folder}/stream", "@UNIX_DGRAM@": f"{self.sockets_folder}/dgram"}
        abstract = f"attack-{secrets.token_hex(8)}"
        for name, family, kind, address in (
            ("@TCP_PORT@", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            ("@UDP_PORT@", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            ("@UNIX_STREAM@", socket.AF_UNIX, socket.SOCK_STREAM, self.paths["@UNIX_STREAM@"]),
            ("@UNIX_DGRAM@", socket.AF_UNIX, socket.SOCK_DGRAM, self.paths["@UNIX_DGRAM@"]),
            ("@ABSTRACT@", socket.AF_UNIX, socket.SOCK_STREAM, "\0" + abstract),
        ):
            listener = socket.socket(family, kind)
            listener.bind(address)
            listener.setblocking(False)
            if kind == socket.SOCK_STREAM:
                listener.listen()
            found[name] = listener
        for path in self.paths.values():
            os.chmod(path, 0o777)
        self.paths["@ABSTRACT@"] = abstract
        return found

    async def start(self) -> None:
        await self.sandbox.start()
        await self.sandbox.run("print('warm')")
        ports = {name: str(self.listeners[name].getsockname()[1]) for name in ("@TCP_PORT@", "@UDP_PORT@")}
        self.values = ports | self.paths | {
            "@SECRET_FILE@": self.secret, "@CANARY_DIR@": self.folder, "@VICTIM_PID@": str(self.victim.pid),
            "@PARENT_PID@": str(os.getpid()), "@HOSTNAME@": socket.gethostname(), "@BIG_SOURCE@": "x = 1\n" * 30_000,
        }  # fmt: skip
        await asyncio.sleep(0.5)
        self.before = self._state()
        self.usual = self._counts()

    def _state(self) -> dict[str, object]:
        """What must be the same after every snippet."""
        paths = [self.folder, *(os.path.join(self.folder, name) for name in sorted(os.listdir(self.folder)))]
        pid = self.victim.pid
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return {
            "canaries": [facts_of(path) for path in paths],
            "victim alive": self.victim.poll() is None and status[0] in "SR",
            "victim's niceness and affinity": (os.getpriority(os.PRIO_PROCESS, pid), os.sched_getaffinity(pid)),
            "victim's limits": [resource.prlimit(pid, what) for what in range(16)],
            "victim's oom score": Path(f"/proc/{pid}/oom_score_adj").read_text(),
            "the owner's limits": [resource.getrlimit(what) for what in range(16)],
            "fork server": (self.sandbox.zygote_pid, self.sandbox.num_restarts),
            "shared memory": [name for name in os.listdir("/dev/shm") if "pwn" in name],
            "reached listeners": [name for name, listener in self.listeners.items() if reached(listener)],
        }

    def _counts(self) -> dict[str, int]:
        """What must come back to its usual size."""
        scratch = [str(path) for path in Path(tempfile.gettempdir()).glob("tools-sandbox-*")]
        scratch += [f"/proc/{self.sandbox.zygote_pid}/root/scratch"]
        folders = 0
        for path in scratch:
            with contextlib.suppress(OSError):
                folders += len(os.listdir(path))
        descriptors = len(os.listdir("/proc/self/fd"))
        return {"processes": len(descendants(os.getpid())), "scratch folders": folders, "descriptors of the owner": descriptors}

    def fill(self, code: str) -> str:
        for name, value in {**self.values, "@ZYGOTE_PID@": str(self.sandbox.zygote_pid)}.items():
            code = code.replace(name, value)
        return code

    async def attack(self, row: dict) -> list[str]:
        """The code in a child of its own, and so what comes after it; or both in a session, each in another one."""
        if row.get("session"):
            sessions = [await self.sandbox.open_session() for _ in range(2)]
            await sessions[1].run("print('warm')")
            found = await self._attack(row, sessions[0].run, sessions[1].run)
            for session in sessions:
                await session.close()
        else:
            found = await self._attack(row, self.sandbox.run, self.sandbox.run)
        answer = await self.sandbox.run("print(6 * 7)")
        if (answer.status, answer.output) != ("ok", "42\n"):
            found.append(f"the next snippet: {answer.status} {answer.output[-300:]!r}")
        return found + await self._harm()

    async def _attack(self, row: dict, run: Callable, run_after: Callable) -> list[str]:
        expect = row["expect"]
        started = time.monotonic()
        outcome = await run(self.fill(row["code"]))
        wall_s = time.monotonic() - started
        found = judge(outcome.output, expect.get("must"), expect.get("must_not"))
        if outcome.status not in expect["status"]:
            found.append(f"status {outcome.status}, allowed {expect['status']}; output {outcome.output[-300:]!r}")
        if wall_s > expect.get("max_wall", float("inf")):
            found.append(f"took {wall_s:.2f} s, allowed {expect['max_wall']}")
        if (num_bytes := len(outcome.output.encode(errors="surrogatepass"))) > expect.get("max_out", float("inf")):
            found.append(f"{num_bytes} bytes of output, allowed {expect['max_out']}")
        if "then" in row:
            after = await run_after(self.fill(row["then"]))
            found += [f"then: {text}" for text in judge(after.output, expect.get("then_must"), expect.get("then_must_not"))]
        return found

    async def _harm(self) -> list[str]:
        deadline = time.monotonic() + SETTLE_S
        while (now := self._counts()) and (more := [name for name in now if now[name] > self.usual[name]]) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        found = [f"{name}: {now[name]}, before the attack {self.usual[name]}" for name in more]
        state = self._state()
        found += [f"changed: {name}: {self.before[name]} -> {state[name]}" for name in state if state[name] != self.before[name]]
        self.before = state
        self.usual = {name: max(number, self.usual[name]) for name, number in now.items()}
        return found

    async def close(self) -> None:
        await self.sandbox.close()
        self.victim.kill()
        self.victim.wait(10)
        for listener in self.listeners.values():
            listener.close()


def judge(output: str, must: str | None, must_not: str | None) -> list[str]:
    found = []
    if must is not None and not re.search(must, output):
        found.append(f"the output lacks {must!r}: {output[-300:]!r}")
    if must_not is not None and (hit := re.search(must_not, output)):
        found.append(f"the output has {must_not!r}: {output[max(0, hit.start() - 100) : hit.end() + 200]!r}")
    try:
        output.encode()
    except UnicodeEncodeError:
        found.append("the output is not valid text")
    return found


def reached(listener: socket.socket) -> bool:
    try:
        if listener.type == socket.SOCK_STREAM:
            listener.accept()[0].close()
        else:
            listener.recv(100)
    except BlockingIOError:
        return False
    return True


async def main(isolation: str) -> None:
    host = Host(isolation)
    try:
        try:
            await host.start()
        except Exception as error:
            print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)
            return
        print(json.dumps(os.geteuid()), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await host.attack(json.loads(line))), flush=True)
    finally:
        await host.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
