"""Whatever a snippet does to the descriptors that it holds, nobody but itself feels it: the same fork server answers others as before."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stack.sandbox.core_helpers import ISOLATIONS

from tools_service.sandbox.owner import Limits, Sandbox, SandboxStatus, Session

# What the snippet is told to do, one after another; whatever fails is passed over.
PLAY = """
import fcntl, os, socket, termios, array
def play(moves):
    for fd, what, data in moves:
        try:
            if what == 'write': os.write(fd, data)
            elif what == 'writev': os.writev(fd, [data, data])
            elif what == 'send': socket.socket(fileno=os.dup(fd)).send(data)
            elif what == 'send_out_of_band': socket.socket(fileno=os.dup(fd)).send(data, socket.MSG_OOB)
            elif what == 'send_fds': socket.send_fds(socket.socket(fileno=os.dup(fd)), [data], [fd, 1])
            elif what == 'shutdown': socket.socket(fileno=os.dup(fd)).shutdown(len(data) % 3)
            elif what == 'read': os.set_blocking(fd, False), os.read(fd, 1 + len(data))
            elif what == 'peek': socket.socket(fileno=os.dup(fd)).recv(1 + len(data), socket.MSG_PEEK | socket.MSG_DONTWAIT)
            elif what == 'flags': fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND | (os.O_DIRECT if len(data) % 2 else 0))
            elif what == 'close': os.close(fd)
            elif what == 'copy': os.dup2(fd, len(data) % 8)
            elif what == 'pair': [os.dup2(end.detach(), len(data) % 8) for end in socket.socketpair()]
            elif what == 'size': os.ftruncate(fd, len(data))
            elif what == 'exit': os._exit(len(data) % 256)
        except BaseException: pass
"""
WHAT = (
    "write", "writev", "send", "send_out_of_band", "send_fds", "shutdown", "read", "peek", "flags", "close", "copy", "pair", "size", "exit",
)  # fmt: skip
# Messages of the control protocol and answers of a session, whole and cut, beside any bytes.
MESSAGES = [b"f", b"s", b"H", b"L", b"E", b"R" + bytes(5), b"X" + bytes(16), b"\0", b"\1", b"\x61", b"\0" * 70_000, bytes(13), b"\xff" * 13]
DATA = st.one_of(st.binary(max_size=40), st.sampled_from(MESSAGES))
MOVE = st.tuples(st.one_of(st.integers(0, 8), st.integers(0, 130)), st.sampled_from(WHAT), DATA)


@dataclass
class Rig:
    """One sandbox on a loop of its own, and a session in it that never does anything wrong."""

    runner: asyncio.Runner
    box: Sandbox
    bystander: Session


@pytest.fixture(scope="module", params=ISOLATIONS)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with asyncio.Runner() as runner:
        box = Sandbox(Limits(wall_s=2.0), isolation=request.param)

        async def begin() -> Session:
            await box.start()
            session = await box.open_session()
            await session.run("kept = 41")
            return session

        try:
            yield Rig(runner, box, runner.run(begin()))
        finally:
            runner.run(box.close())


def nobody_else_felt_it(rig: Rig, zygote_pid: int | None) -> None:
    async def look() -> None:
        alone, kept = await asyncio.gather(rig.box.run("print(6 * 7)"), rig.bystander.run("print(kept + 1)"))
        assert (alone.status, alone.output) == (SandboxStatus.OK, "42\n")
        assert (kept.status, kept.output) == (SandboxStatus.OK, "42\n")

    rig.runner.run(look())
    assert (rig.box.zygote_pid, rig.box.num_restarts) == (zygote_pid, 0)


CHECKS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@CHECKS
@given(moves=st.lists(MOVE, max_size=25))
def test_a_snippet_that_plays_with_every_descriptor_harms_only_itself(rig: Rig, moves: list) -> None:
    zygote_pid = rig.box.zygote_pid
    outcome = rig.runner.run(rig.box.run(f"{PLAY}\nplay({moves!r})", wall_s=0.5))
    assert outcome.status is not SandboxStatus.UNAVAILABLE
    nobody_else_felt_it(rig, zygote_pid)


@CHECKS
@given(turns=st.lists(st.lists(MOVE, max_size=12), min_size=1, max_size=4))
def test_a_session_that_plays_with_every_descriptor_harms_only_itself(rig: Rig, turns: list) -> None:
    zygote_pid = rig.box.zygote_pid

    async def play() -> None:
        session = await rig.box.open_session()
        try:
            for moves in turns:
                outcome = await session.run(f"{PLAY}\nplay({moves!r})", wall_s=0.3)
                assert outcome.status is not SandboxStatus.UNAVAILABLE, outcome
        finally:
            await session.close()

    rig.runner.run(play())
    nobody_else_felt_it(rig, zygote_pid)


CODE = st.one_of(st.text(max_size=200), st.binary(max_size=200).map(repr), st.binary(max_size=99).map(lambda data: data.decode("latin-1")))


@CHECKS
@given(code=CODE)
def test_any_text_as_code_ends_in_a_status(rig: Rig, code: str) -> None:
    zygote_pid = rig.box.zygote_pid
    outcome = rig.runner.run(rig.box.run(code, wall_s=0.5))
    assert outcome.status is not SandboxStatus.UNAVAILABLE
    outcome.output.encode()
    nobody_else_felt_it(rig, zygote_pid)
