"""vLLM on CPU draws each completion by its own seed: the same one whatever shares the batch, through cancelled requests and pauses."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from tests.stack.test_weight_sync import make_policy
from toolrl_ray.config import RunConfig
from toolrl_ray.rollout.vllm_engine import VLLMEngine
from toolrl_ray.types import SamplingParams

NUM_SEEDS, NUM_ROUNDS, NUM_REQUESTS = 40, 2, 150


async def outcomes(path: str) -> dict[int, set[tuple[int, ...]]]:
    """By seed, what was sampled. Prompts of one round are longer than one step's token budget, which would be prefilled in chunks.
    More sequences than the tokens of a step that vLLM would take by itself must start too."""
    engine = VLLMEngine(RunConfig(recipe="test", rollout={"max_in_flight": 2100}), path, "object_store", 0)
    rng = random.Random(0)
    prompts = [[rng.randrange(20, 100) for _ in range(rng.randrange(5, 200))] for _ in range(20)]
    found: dict[int, set[tuple[int, ...]]] = {}

    async def one(seed: int, cancelled_after_s: float | None) -> None:
        request = asyncio.create_task(engine.generate(prompts[seed % 20], SamplingParams(1.0, 40, (), seed)))
        if cancelled_after_s is not None:
            await asyncio.sleep(cancelled_after_s)
            request.cancel()
        try:
            found.setdefault(seed, set()).add(tuple((await request).token_ids))
        except asyncio.CancelledError:
            return

    try:
        await engine.ready(0)
        for _ in range(NUM_ROUNDS):
            requests = [one(rng.randrange(NUM_SEEDS), rng.random() * 0.5 if rng.random() < 0.3 else None) for _ in range(NUM_REQUESTS)]
            round_ = asyncio.gather(*requests)
            await asyncio.sleep(0.2)
            await engine.pause()
            await engine.resume()
            await asyncio.wait_for(round_, 120)
        await engine.check_alive()
        return found
    finally:
        engine.shutdown()


def test_a_completions_seed_says_what_vllm_draws_and_no_batch_kills_the_engine(tmp_path: Path) -> None:
    make_policy(tmp_path, tied=True)
    found = asyncio.run(outcomes(str(tmp_path)))
    assert len(found) == NUM_SEEDS
    assert [seed for seed, sampled in found.items() if len(sampled) > 1] == []
    assert len(set().union(*found.values())) == NUM_SEEDS, "different seeds differ"
