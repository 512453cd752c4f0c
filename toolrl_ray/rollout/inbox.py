"""Runs episodes as coroutines and hands them over as they finish: what makes many of them fit one actor method."""

from __future__ import annotations

import asyncio
import logging

from toolrl_ray.rollout.assignment import Outcome
from toolrl_ray.rollout.runner import EpisodeRunner
from toolrl_ray.types import EpisodeRequest

log = logging.getLogger(__name__)


class Inbox:
    def __init__(self, runner: EpisodeRunner):
        self._runner = runner
        self._running: set[asyncio.Task[None]] = set()
        self._finished: list[Outcome] = []
        self._some = asyncio.Event()

    def submit(self, requests: list[EpisodeRequest], temperature: float) -> None:
        for request in requests:
            task = asyncio.create_task(self._run(request, temperature))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def take(self, max_wait_s: float) -> list[Outcome]:
        """Everything that has finished since the last call; waits for the first at most `max_wait_s`, then returns []."""
        try:
            await asyncio.wait_for(self._some.wait(), max_wait_s)
        except TimeoutError:
            return []
        finished, self._finished = self._finished, []
        self._some.clear()
        return finished

    async def _run(self, request: EpisodeRequest, temperature: float) -> None:
        try:
            outcome = Outcome(request.episode_id, await self._runner.run(request, temperature))
        except Exception as error:
            log.exception("episode %s failed in the harness", request.episode_id)
            outcome = Outcome(request.episode_id, None, f"{type(error).__name__}: {error}")
        self._finished.append(outcome)
        self._some.set()
