"""The engine and the tool of a simulated run: they only take their time, on a model of it.

An engine takes a prompt up TTFT_S + PREFILL_S_PER_TOKEN * (its tokens) after it comes (a prefix cache is left out), runs as many sequences
at once as it may, and in one step gives each of its n sequences one token. A step takes STEP_S + STEP_S_PER_SEQUENCE * n, as vLLM's does
while it reads the weights (the constant part) and the caches of all sequences (the other one): with 157 sequences 77 ms, which is
13 tokens/s for each of them and 2,000 tokens/s in all, as of a model of some 70 B parameters. A weight sync stops the steps, and sequences
go on after it with the new version. Turns are lognormal in tokens, and CALL_SHARE of them ask for a tool, whose time is lognormal too;
STALL_SHARE of the calls never end by themselves. What is drawn depends on the seed, the episode and the turn alone.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import random
from collections import deque
from dataclasses import dataclass

from toolrl_ray.tasks.prompts import tool_answer, tool_call
from toolrl_ray.types import Completion, SamplingParams
from tools_service.protocol import ToolCall, ToolResult, ToolStatus
from tools_service.runner import ToolInfo

TTFT_S, PREFILL_S_PER_TOKEN = 0.1, 1e-4
STEP_S, STEP_S_PER_SEQUENCE = 0.03, 3e-4
TURN_SIGMA, MAX_TURN_TOKENS = 0.7, 1024
CALL_SHARE = 0.6  # with at most 4 turns, 2.2 on average
TOOL_S, TOOL_SIGMA, STALL_SHARE, TOOL_DEADLINE_S = 3.0, 0.8, 0.005, 30.0

CHARACTER, WORD = 100_000, 120_000  # ids above 256, like those of a real vocabulary, are objects of their own
WORDS = {WORD + i: f"w{i:02d} " for i in range(100)}  # four characters, the average of a token of English
TEXT = {CHARACTER + i: chr(i) for i in range(256)} | WORDS
RNG = random.Random(0)
LOGPROBS = [-RNG.expovariate(2.0) for _ in range(4 * MAX_TURN_TOKENS)]


class WordCodec:
    """A `Codec` with a token per character, and words of which the simulated policy's turns are made."""

    eos_token_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        return [CHARACTER + byte for byte in text.encode("latin-1", "replace")]

    encode_prompt = encode_markup = encode

    def decode(self, token_ids: list[int]) -> str:
        return "".join(map(TEXT.__getitem__, token_ids))


FILLER = list(WORDS) * 100
CALL, ANSWER = WordCodec().encode(tool_call("1+1")), WordCodec().encode(tool_answer("2"))


@dataclass(eq=False)
class Sequence:
    num_tokens: int
    done: asyncio.Future[None]
    begin: float = 0.0  # on the clock of its engine, which counts steps


class SimEngine:
    """See the module's docstring. Belongs to one event loop."""

    def __init__(self, max_running: int, median_turn_tokens: int, speed_up: float, seed: int):
        self._max_running, self._median_tokens, self._speed_up, self._seed = max_running, median_turn_tokens, speed_up, seed
        self._waiting: deque[Sequence] = deque()
        self._running: list[tuple[float, int, Sequence]] = []  # a heap by the step at which they end
        self._numbers = itertools.count()
        self._steps = self._at = 0.0
        self._step_s = 1.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_paused = False
        self._version = 0
        self._changes: list[tuple[float, int]] = []  # (step, version until then)

    async def generate(self, token_ids: list[int], params: SamplingParams) -> Completion:
        assert params.seed is not None
        rng = random.Random(params.seed ^ self._seed)
        end = CALL if rng.random() < CALL_SHARE else ANSWER
        num_words = math.ceil(rng.lognormvariate(math.log(self._median_tokens), TURN_SIGMA))
        sampled = (FILLER[: max(0, min(num_words, params.max_tokens - len(end)))] + end)[: params.max_tokens]
        await asyncio.sleep((TTFT_S + PREFILL_S_PER_TOKEN * len(token_ids)) / self._speed_up)
        begin = await self._decode(len(sampled))
        first = rng.randrange(len(LOGPROBS) - MAX_TURN_TOKENS)
        logprobs = LOGPROBS[first : first + len(sampled)]
        return Completion(sampled, logprobs, self._versions(begin, len(sampled)), "stop" if sampled[-1:] == end[-1:] else "length")

    async def _decode(self, num_tokens: int) -> float:
        sequence = Sequence(num_tokens, asyncio.get_running_loop().create_future())
        self._waiting.append(sequence)
        self._advance()
        try:
            await sequence.done
        except asyncio.CancelledError:
            self._waiting = deque(other for other in self._waiting if other is not sequence)
            self._running = [entry for entry in self._running if entry[2] is not sequence]
            heapq.heapify(self._running)
            raise
        return sequence.begin

    def _advance(self) -> None:
        """Brings the engine up to now; called whenever something comes, ends or changes."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        if not self._is_paused:
            self._steps += (now - self._at) / self._step_s
        self._at = now
        while self._running and self._running[0][0] <= self._steps + 1e-6:
            _, _, sequence = heapq.heappop(self._running)
            if not sequence.done.done():
                sequence.done.set_result(None)
        while self._waiting and len(self._running) < self._max_running:
            sequence = self._waiting.popleft()
            sequence.begin = self._steps
            heapq.heappush(self._running, (self._steps + sequence.num_tokens, next(self._numbers), sequence))
        self._step_s = (STEP_S + STEP_S_PER_SEQUENCE * len(self._running)) / self._speed_up
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running and not self._is_paused:
            self._timer = loop.call_at(now + (self._running[0][0] - self._steps) * self._step_s, self._advance)

    def _versions(self, begin: float, num_tokens: int) -> list[int]:
        versions = [self._version] * num_tokens
        for step, version in reversed(self._changes):
            num_before = min(num_tokens, math.floor(step - begin + 1e-6))
            if num_before <= 0:
                break
            versions[:num_before] = [version] * num_before
        return versions

    def pause(self) -> None:
        self._advance()
        self._is_paused = True

    def resume(self, policy_version: int) -> None:
        self._advance()
        self._changes.append((self._steps, self._version))
        self._version = policy_version
        self._is_paused = False
        self._advance()


class SimService:
    """A `Transport` to a tool that answers after a while."""

    def __init__(self, speed_up: float, seed: int):
        self._speed_up, self._seed = speed_up, seed

    async def describe(self, tool: str) -> ToolInfo:
        return ToolInfo(tool, "takes its time", idempotent=True, max_in_flight=64, max_replicas=16)

    async def send(self, tool: str, calls: list[ToolCall]) -> list[ToolResult | None]:
        [call] = calls
        assert call.seed is not None
        rng = random.Random(call.seed ^ self._seed)
        stalls = rng.random() < STALL_SHARE
        await asyncio.sleep(10 * TOOL_DEADLINE_S if stalls else rng.lognormvariate(math.log(TOOL_S), TOOL_SIGMA) / self._speed_up)
        return [ToolResult(ToolStatus.OK, "2")]

    def end_session(self, tool: str, name: str) -> None:
        """There is nothing to forget."""
