"""Runs episodes as coroutines and hands them over as they finish: what makes many of them fit one actor method."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable

from toolrl_ray.errors import UserError
from toolrl_ray.rollout.assignment import Outcome
from toolrl_ray.types import Completion, EpisodeRequest, GenerateFn, SamplingParams, Trajectory

log = logging.getLogger(__name__)

LINGER_S = 0.1  # finished episodes are handed over together with those that finish so soon after: a message costs both sides


def num_places(max_in_flight: int) -> int:
    """Episodes that sample at once: an eighth more than the engine runs."""
    return max_in_flight + max_in_flight // 8


class Inbox:
    """Episodes start, with no round trip, as long as fewer than `max_in_flight`, and an eighth more, sample: one that waits for a tool
    leaves its place to another, so that slow tools leave the engine no less to do. So up to all that was submitted may be under way.
    The engine runs `max_in_flight` at once; the others wait in its own queue and take a free place at the very next step.

    run: runs one episode to its end, sampling only through `sampling(generate)`.
    """

    def __init__(self) -> None:
        self.run: Callable[[EpisodeRequest], Awaitable[Trajectory]]
        self._waiting: deque[tuple[EpisodeRequest, int]] = deque()  # with their eras
        self._places = 1
        self._running: dict[asyncio.Task[None], tuple[str, int]] = {}  # episode and era
        self._away: set[asyncio.Task[None]] = set()  # those between two completions
        self._finished: list[Outcome] = []
        self._some = asyncio.Event()
        self._broken: Exception | None = None

    def submit(self, requests: list[EpisodeRequest], max_in_flight: int, era: int = 0) -> None:
        """era: handed back with the outcomes of these requests."""
        self._places = num_places(max_in_flight)
        self._waiting.extend((request, era) for request in requests)
        self._start()

    def cancel(self, episode_ids: list[str], era: int = 0) -> None:
        """Nothing of these is handed over any more. What they wait for, a completion or a tool, is called off with them.

        era: of these requests. Ray may let a later `submit` of the same episodes overtake this call.
        """
        gone = {(episode_id, era) for episode_id in episode_ids}
        self._waiting = deque((request, of) for request, of in self._waiting if (request.episode_id, of) not in gone)
        self._finished = [outcome for outcome in self._finished if (outcome.episode_id, outcome.era) not in gone]
        for task, episode in self._running.items():
            if episode in gone:
                task.cancel()

    def break_off(self, error: Exception) -> None:
        """Nothing is handed over any more: the engine is lost, and whoever asks is told why."""
        self._broken = error
        self._some.set()

    def sampling(self, generate: GenerateFn) -> GenerateFn:
        async def in_place(token_ids: list[int], params: SamplingParams) -> Completion:
            task = asyncio.current_task()
            assert task is not None
            self._away.discard(task)
            try:
                return await generate(token_ids, params)
            finally:
                self._away.add(task)
                asyncio.get_running_loop().call_soon(self._start)  # after this episode has sent its calls

        return in_place

    def _start(self) -> None:
        while self._waiting and len(self._running) - len(self._away) < self._places:
            request, era = self._waiting.popleft()
            task = asyncio.create_task(self._run(request, era))
            self._running[task] = request.episode_id, era
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._away.discard(task)
        if not task.cancelled():
            task.exception()  # Ctrl-C or SIGTERM, which have gone to whoever runs the loop: asyncio need not tell of them too
        self._start()

    async def take(self, max_wait_s: float) -> list[Outcome]:
        """Everything that has finished since the last call; waits for the first at most `max_wait_s`, then returns []. Raises what
        `break_off` was given."""
        try:
            await asyncio.wait_for(self._some.wait(), max_wait_s)
        except TimeoutError:
            return []
        if self._running and not self._broken:
            await asyncio.sleep(LINGER_S)
        if self._broken:
            raise self._broken
        finished, self._finished = self._finished, []
        self._some.clear()
        return finished

    async def _run(self, request: EpisodeRequest, era: int) -> None:
        try:
            outcome = Outcome(request.episode_id, await self.run(request), era=era)
        except UserError as error:
            outcome = Outcome(request.episode_id, None, mistake=error, era=era)
        except Exception as error:
            log.exception("episode %s failed in the harness", request.episode_id)
            outcome = Outcome(request.episode_id, None, f"{type(error).__name__}: {error}", era=era)
        self._finished.append(outcome)
        self._some.set()
