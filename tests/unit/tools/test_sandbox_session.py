"""What a session's turn may take, where its first child was gone before it had the code."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from tools_service.sandbox.limits import Limits
from tools_service.sandbox.outcome import Outcome, SandboxStatus
from tools_service.sandbox.running import NotBegun
from tools_service.sandbox.session import RESTARTED, Session


async def test_a_second_attempt_has_what_the_first_left_of_the_wall_time() -> None:
    walls = []

    async def run_in_session(job: bytes, wall_s: float) -> tuple[Outcome, bool]:
        walls.append(wall_s)
        if len(walls) == 1:
            await asyncio.sleep(0.2)
            raise NotBegun
        return Outcome(SandboxStatus.OK, "1\n"), True

    async def take(session: bool) -> SimpleNamespace:
        return SimpleNamespace(exit=asyncio.get_running_loop().create_future(), run_in_session=run_in_session, close=lambda: None)

    outcome = await Session(SimpleNamespace(limits=Limits(), take=take)).run("print(1)", wall_s=2.0)
    assert (outcome.status, outcome.output) == (SandboxStatus.OK, f"{RESTARTED}1\n")
    assert walls[0] <= 2.0 and walls[1] <= walls[0] - 0.2
