from __future__ import annotations

import asyncio
import gc

import pytest

from toolrl_ray.errors import ConfigError, RolloutError
from toolrl_ray.rollout.assignment import Outcome
from toolrl_ray.rollout.inbox import Inbox
from toolrl_ray.types import Completion, EpisodeRequest, SamplingParams, StopReason, Task, Trajectory

REQUESTS = [EpisodeRequest(f"e{i}", f"g{i}", Task(f"t{i}", "q", "a", "test")) for i in range(10)]


class Episodes:
    """Samples until it is released, calls a tool until that is, samples once more; the third one fails."""

    def __init__(self, inbox):
        self.sampled, self.called = asyncio.Event(), asyncio.Event()
        self.sampling = self.most = self.under_way = 0
        self.generate = inbox.sampling(self._generate)
        inbox.run = self.run

    async def _generate(self, token_ids, params):
        self.sampling += 1
        self.most = max(self.most, self.sampling)
        await self.sampled.wait()
        self.sampling -= 1
        return Completion([], [], [], "stop")

    async def run(self, request):
        self.under_way += 1
        for wait_for_tool in (True, False):
            await self.generate([], SamplingParams(1.0, 1, ()))
            if wait_for_tool:
                await self.called.wait()
        self.under_way -= 1
        if request.episode_id == "e2":
            raise ValueError("bad")
        return Trajectory(request, [1], [False], [0.0], [-1], [], [], StopReason.EOS, 1, 0.5)


async def settle():
    for _ in range(100):
        await asyncio.sleep(0)


async def test_a_lost_engine_is_what_whoever_asks_is_told_also_one_who_waits_already():
    inbox, lost = Inbox(), RolloutError("vLLM's engine-core process is dead: out of memory")
    waiting = asyncio.create_task(inbox.take(60))
    await settle()
    inbox.break_off(lost)
    for asked in (waiting, inbox.take(60)):
        with pytest.raises(RolloutError, match="dead: out of memory"):
            await asyncio.wait_for(asked, 5)


async def test_a_persons_mistake_is_handed_over_as_what_it_is_and_without_a_traceback(caplog):
    inbox, mistake = Inbox(), ConfigError("a reward must be a number")

    async def run(request):
        raise mistake

    inbox.run = run
    inbox.submit(REQUESTS[:1], max_in_flight=4)
    assert await inbox.take(5) == [Outcome("e0", None, mistake=mistake)]
    assert caplog.records == []


async def test_no_more_sample_at_once_than_allowed_and_all_are_handed_over_once():
    inbox = Inbox()
    episodes = Episodes(inbox)
    episodes.called.set()
    inbox.submit(REQUESTS[:6], max_in_flight=4)
    inbox.submit(REQUESTS[6:], max_in_flight=4)
    assert await inbox.take(0.01) == []
    assert episodes.sampling == episodes.under_way == 4
    episodes.sampled.set()
    outcomes = []
    while len(outcomes) < len(REQUESTS):
        outcomes += await inbox.take(5)
    assert sorted(o.episode_id for o in outcomes) == [r.episode_id for r in REQUESTS]
    assert [o.failure for o in outcomes if o.trajectory is None] == ["ValueError: bad"]
    assert await inbox.take(0.01) == []


async def test_an_episode_that_waits_for_its_tool_leaves_its_place_to_another():
    inbox = Inbox()
    episodes = Episodes(inbox)
    inbox.submit(REQUESTS, max_in_flight=4)
    await settle()
    episodes.sampled.set()
    await settle()
    assert (episodes.under_way, episodes.sampling) == (10, 0)  # all of them in their tool call
    assert episodes.most == 4
    episodes.called.set()
    outcomes = []
    while len(outcomes) < len(REQUESTS):
        outcomes += await inbox.take(5)


async def test_a_failed_episode_that_was_between_two_completions_leaves_no_place_behind():
    inbox = Inbox()
    episodes = Episodes(inbox)
    episodes.sampled.set()
    episodes.called.set()
    inbox.submit(REQUESTS[2:3], max_in_flight=1)
    assert [o.failure for o in await inbox.take(5)] == ["ValueError: bad"]
    episodes.sampled.clear()
    inbox.submit(REQUESTS[3:], max_in_flight=1)
    await settle()
    assert episodes.under_way == 1
    episodes.sampled.set()
    outcomes = []
    while len(outcomes) < len(REQUESTS[3:]):
        outcomes += await inbox.take(5)


async def test_the_engine_is_asked_for_an_eighth_more_than_it_runs_at_once():
    inbox = Inbox()
    episodes = Episodes(inbox)
    inbox.submit(REQUESTS, max_in_flight=8)
    await settle()
    assert episodes.sampling == 9
    inbox.cancel([r.episode_id for r in REQUESTS])  # else those that wait begin while the loop is closed, and are never ended
    await settle()


async def test_an_episode_that_is_called_off_ends_and_is_not_handed_over_whether_it_waits_runs_or_has_finished():
    inbox = Inbox()
    episodes = Episodes(inbox)
    episodes.called.set()
    inbox.submit(REQUESTS[3:6], max_in_flight=2)
    await settle()
    inbox.cancel(["e3", "e5"])  # one that samples, and one that has not begun
    await settle()
    assert episodes.under_way == 2  # the cancelled one has not passed its end
    episodes.sampled.set()
    await settle()
    inbox.submit(REQUESTS[6:8], max_in_flight=2)
    await settle()
    inbox.cancel(["e6"])  # that has finished
    assert sorted(o.episode_id for o in await inbox.take(5)) == ["e4", "e7"]


async def test_every_outcome_bears_the_era_of_its_request():
    inbox = Inbox()
    episodes = Episodes(inbox)
    episodes.called.set()
    inbox.submit(REQUESTS[:3], 1, era=1)
    inbox.submit(REQUESTS[3:4], 1, era=2)
    episodes.sampled.set()
    outcomes = []
    while len(outcomes) < 4:
        outcomes += await inbox.take(5)
    assert {o.episode_id: o.era for o in outcomes} == {"e0": 1, "e1": 1, "e2": 1, "e3": 2}


async def test_what_is_called_off_late_leaves_the_same_episodes_of_a_later_era_alone():
    inbox = Inbox()
    episodes = Episodes(inbox)
    episodes.called.set()
    for era in (1, 2):
        inbox.submit(REQUESTS[3:8], 2, era=era)
    await settle()
    inbox.cancel([r.episode_id for r in REQUESTS], era=1)
    episodes.sampled.set()
    outcomes = []
    while len(outcomes) < 5:
        outcomes += await inbox.take(5)
    assert sorted((o.episode_id, o.era) for o in outcomes) == [(f"e{i}", 2) for i in range(3, 8)]


def test_ctrl_c_that_strikes_an_episode_is_told_once(caplog):
    inbox = Inbox()

    async def run(request):
        raise KeyboardInterrupt

    async def collect():
        inbox.submit(REQUESTS[:1], max_in_flight=1)
        await inbox.take(5)

    inbox.run = run
    with pytest.raises(KeyboardInterrupt), asyncio.Runner() as runner:
        runner.run(collect())
    gc.collect()
    assert caplog.messages == []
