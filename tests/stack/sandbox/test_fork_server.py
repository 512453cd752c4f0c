"""The fork server and its owner: one that hangs, dies or cannot hand a child over costs what it must, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from stack.sandbox.core_helpers import ISOLATIONS, descendants, sandbox

from tools_service.sandbox import owner
from tools_service.sandbox.owner import IsolationUnavailable, Limits, Sandbox, SandboxStatus
from tools_service.sandbox.plan import Plan

pytestmark = pytest.mark.parametrize("isolation", ISOLATIONS)


async def test_fork_server_that_hangs_is_replaced_though_nobody_waits_long_enough_to_tell(
    isolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("owner", "supply"):
        monkeypatch.setattr(f"tools_service.sandbox.{module}.TAKE_S", 1.0)
    async with sandbox(isolation) as box:
        os.kill(box.zygote_pid, signal.SIGSTOP)
        outputs = []
        for _ in range(60):
            with contextlib.suppress(TimeoutError):
                outputs.append((await asyncio.wait_for(box.run("print(1)"), 0.3)).output)
            if "1\n" in outputs[-1:]:
                break
        assert outputs[-1:] == ["1\n"] and box.num_restarts == 1


async def test_an_event_loop_that_is_held_up_is_not_taken_for_a_server_that_hangs(isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr("tools_service.sandbox.supply.TAKE_S", 0.2)
    async with sandbox(isolation) as box:
        await asyncio.sleep(0.3)
        for _ in range(3):
            running = asyncio.create_task(box.run("print(1)"))
            await asyncio.sleep(0)  # a child has been asked for
            time.sleep(0.4)
            assert (await running).output == "1\n"
        assert box.num_restarts == 0


async def test_reports_that_nobody_reads_for_a_while_cost_no_child(isolation: str) -> None:
    """The kernel lets a process whose limit of open files is low send no descriptor while so many are on their way to others."""
    import time

    async with sandbox(isolation, Limits(max_open_files=16), num_ahead=1) as box:
        for _ in range(3):
            running = [asyncio.create_task(box.run("print(1)")) for _ in range(30)]
            await asyncio.sleep(0)  # children have been asked for
            time.sleep(0.4)
            assert [(await task).output for task in running] == ["1\n"] * 30
        assert box.num_restarts == 0


async def test_more_requests_at_once_than_the_channel_holds_are_all_answered(isolation: str) -> None:
    async def take() -> bool:
        child = await box.take(session=True)
        child.close()
        return True

    async with sandbox(isolation) as box:
        session = await box.open_session()
        await session.run("x = 41")
        os.kill(box.zygote_pid, signal.SIGSTOP)  # it reads none before all have come
        taking = [asyncio.create_task(take()) for _ in range(400)]
        await asyncio.sleep(0)
        os.kill(box.zygote_pid, signal.SIGCONT)
        assert all(await asyncio.gather(*taking))
        assert (await session.run("print(x)")).output == "41\n" and box.num_restarts == 0


@contextlib.contextmanager
def descriptors_left(number: int) -> Iterator[None]:
    """For a while this process can open so many descriptors and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = max(map(int, os.listdir("/proc/self/fd"))) + 1 + number  # where no number below is free
    resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))
    held = []
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(number):
            os.close(held.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)


@pytest.mark.parametrize("number", [0, 2])
async def test_running_out_of_descriptors_costs_the_calls_that_need_one_and_no_session(isolation: str, number: int) -> None:
    async with sandbox(isolation, Limits(wall_s=2.0), num_ahead=1) as box:
        sessions = [await box.open_session() for _ in range(3)]
        for session in sessions[:2]:
            await session.run("x = 41")
        with descriptors_left(number):
            refused = [await sessions[2].run("x = 41") for _ in range(3)]
            held = await sessions[0].run("print(x)")
        for outcome in refused:
            assert outcome.status is SandboxStatus.UNAVAILABLE and "file descriptors" in outcome.output and outcome.output.isprintable()
        assert held.output == "41\n" and box.num_restarts == 0
        assert (await box.run("print(1)")).output == "1\n"
        assert [(await session.run("print(x)")).output for session in sessions[:2]] == ["41\n"] * 2
        assert (await sessions[2].run("x = 1")).status is SandboxStatus.OK
        for _ in range(500):  # those that could not be handed over have ended: the sessions' are left, and the one kept ahead
            if len(descendants(box.zygote_pid)) == 4:
                break
            await asyncio.sleep(0.01)
        assert len(descendants(box.zygote_pid)) == 4 and box.num_restarts == 0


LOWER = "import os, resource, sys\nresource.setrlimit(resource.RLIMIT_NOFILE, ({0}, {0}))\nos.execv(sys.argv[1], sys.argv[1:])"


@pytest.mark.parametrize("number", [52, 53, 54])
async def test_a_fork_that_fails_costs_the_call_that_needs_it_and_no_session(
    isolation: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork server with so many descriptors, of which every session takes some."""
    real = owner.plan.plan

    def with_few_descriptors(*args: object) -> Plan:
        plan = real(*args)
        at = plan.command.index("-s") - 1  # where the server's own command begins
        lowered = (plan.command[at], "-I", "-S", "-c", LOWER.format(number))
        return replace(plan, command=(*plan.command[:at], *lowered, *plan.command[at:]))

    monkeypatch.setattr(owner.plan, "plan", with_few_descriptors)
    async with sandbox(isolation, Limits(max_open_files=16), num_ahead=1, preload=()) as box:
        sessions = [await box.open_session() for _ in range(20)]
        for session in sessions:
            outcome = await session.run("x = 41")
            if outcome.status is not SandboxStatus.OK:
                break
        num_held = sessions.index(session)
        assert num_held >= 2 and "no interpreter could be forked" in outcome.output and outcome.output.isprintable()
        for _ in range(5):  # a fork that failed leaves nothing behind that the next ones would lack
            assert (await session.run("x = 41")).status is SandboxStatus.UNAVAILABLE
        assert [(await held.run("print(x)")).output for held in sessions[:num_held]] == ["41\n"] * num_held
        for held in sessions[:2]:
            await held.close()
        for _ in range(100):  # until they are gone
            if (await session.run("x = 41")).status is SandboxStatus.OK:
                break
        assert (await session.run("print(x)")).output == "41\n"
        assert (await box.run("print(1)")).output == "1\n" and box.num_restarts == 0


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
async def test_close_after_the_fork_server_failed_leaves_no_file(
    isolation: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    async with sandbox(isolation) as box:
        session = await box.open_session()
        await session.run("import os\nopen('f', 'w').write('x' * 1000)\nos.mkdir('d')\nopen('d/f', 'w').close()")
        os.kill(box.zygote_pid, number)
    assert list(tmp_path.iterdir()) == []


async def test_folders_that_lie_in_each_other_are_removed_however_deep(
    isolation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = "import os\nfor _ in range(1500):\n    os.mkdir('d')\n    open('f', 'w').close()\n    os.chdir('d')\nprint('made')"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    async with sandbox(isolation, Limits(wall_s=20.0, max_files=3000)) as box:
        assert (await box.run(deep)).output == "made\n"
    left = list(tmp_path.iterdir())
    subprocess.run(["rm", "-rf", *left], check=True)  # pytest could not: shutil.rmtree calls itself too
    assert left == []


async def test_fork_server_that_dies_while_it_is_tried_leaves_no_file(
    isolation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def kill(box: Sandbox) -> list[str]:
        await owner.Session(box).run("open('f', 'w').write('x')")
        os.kill(box.zygote_pid, signal.SIGKILL)
        while box.zygote_pid:
            await asyncio.sleep(0.01)
        return ["nothing"]

    monkeypatch.setattr(owner, "breaches", kill)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(IsolationUnavailable, match="nothing"):
        await Sandbox(isolation=isolation).start()
    assert list(tmp_path.iterdir()) == []
