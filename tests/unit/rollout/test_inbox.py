from __future__ import annotations

import asyncio

from toolrl_ray.rollout.inbox import Inbox
from toolrl_ray.types import EpisodeRequest, StopReason, Task, Trajectory

REQUESTS = [EpisodeRequest(f"e{i}", f"g{i}", Task(f"t{i}", "q", "a", "test")) for i in range(10)]


class Runner:
    """Runs every episode until it is released; the third one fails."""

    def __init__(self):
        self.release = asyncio.Event()
        self.running = self.most = 0

    async def run(self, request, temperature):
        self.running += 1
        self.most = max(self.most, self.running)
        await self.release.wait()
        self.running -= 1
        if request.episode_id == "e2":
            raise ValueError("bad")
        return Trajectory(request, [1], [False], [0.0], [-1], [], [], StopReason.EOS, 1, temperature)


async def test_no_more_run_at_once_than_allowed_and_all_are_handed_over_once():
    runner = Runner()
    inbox = Inbox(runner)
    inbox.submit(REQUESTS[:6], 0.5, max_in_flight=4)
    inbox.submit(REQUESTS[6:], 0.5, max_in_flight=4)
    assert await inbox.take(0.01) == []
    assert runner.running == 4
    runner.release.set()
    outcomes = []
    while len(outcomes) < len(REQUESTS):
        outcomes += await inbox.take(5)
    assert runner.most == 4
    assert sorted(o.episode_id for o in outcomes) == [r.episode_id for r in REQUESTS]
    assert [o.failure for o in outcomes if o.trajectory is None] == ["ValueError: bad"]
    assert await inbox.take(0.01) == []
