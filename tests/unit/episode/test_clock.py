"""Deadlines of turns and episodes are of the time in which the engine samples: a pause for new weights costs no episode anything."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.unit.episode.script import LIMITS, FakeTool, play, said
from tests.unit.episode.vocabularies import codec as vocabulary
from toolrl_ray.episode.clock import Clock
from toolrl_ray.types import StopReason

CODEC = vocabulary("tiny")


@pytest.mark.parametrize("limits", [replace(LIMITS, turn_deadline_s=0.1), replace(LIMITS, episode_deadline_s=0.1)])
@pytest.mark.parametrize("answers", [True, False])
def test_a_pause_longer_than_the_deadline_does_not_end_an_episode_and_a_stalled_engine_after_it_does(limits, answers):
    async def paused(token_ids, params):
        clock.stop()
        clock.stop()  # a second attempt of a weight sync
        await asyncio.sleep(0.3)
        clock.go()
        if not answers:
            await asyncio.Event().wait()
        return said(CODEC, "Result=10.1<submit>")

    clock = Clock()
    reason = play(CODEC, paused, FakeTool(), limits, clock=clock).stop_reason
    if answers:
        assert reason is StopReason.SUBMITTED
    else:
        assert reason in (StopReason.TURN_DEADLINE, StopReason.EPISODE_DEADLINE)


def test_a_completion_that_begins_in_a_pause_has_all_its_time_after_it():
    async def run():
        clock = Clock()
        clock.stop()
        before = clock.now()
        asyncio.get_running_loop().call_later(0.2, clock.go)
        async with clock.timeout(0.1):
            await asyncio.sleep(0.25)  # of which the clock counts 0.05
        return clock.now() - before

    assert asyncio.run(run()) < 0.2


def test_a_deadline_that_has_struck_is_not_put_off():
    async def run():
        clock = Clock()
        with pytest.raises(TimeoutError):
            async with clock.timeout(0.01):
                try:
                    await asyncio.sleep(10)
                finally:
                    clock.stop()
                    clock.go()

    asyncio.run(run())
