"""A rollout engine on transformers alone: for `--in-process` and for models that vLLM lacks.

Requests that wait at the same time are sampled as one left-padded batch with a KV cache. Plain and slow next to vLLM, and
free of processes and threads, so that a breakpoint works anywhere.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load

from toolrl_ray.errors import UserError
from toolrl_ray.types import Completion, SamplingParams


@dataclass
class _Row:
    prompt: list[int]
    params: SamplingParams
    done: asyncio.Future[Completion]
    rng: random.Random
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reason: str | None = None


def _take_error(worker: asyncio.Task[None]) -> None:
    """Ctrl-C or SIGTERM, the only one it can have, has gone to whoever runs the loop: asyncio need not tell of it when it ends."""
    if not worker.cancelled():
        worker.exception()


class TransformersEngine:
    """model: a causal LM in eval mode, which the engine keeps for itself; one without a cache of keys and values (Mamba, RWKV), or one that
    counts padding as positions (BART's decoder), raises UserError when it is sampled from. decode: text of sampled ids, for stop strings.
    seed: with a completion's own seed it says what that draws, whatever else is under way. recompute: new weights compute again what those
    before have cached of a completion (weights.kv_cache)."""

    def __init__(
        self,
        model: Any,
        decode: Callable[[list[int]], str],
        eos_token_ids: Iterable[int],
        *,
        max_batch: int,
        seed: int,
        policy_version: int,
        recompute: bool = True,
    ):
        self._model = model.eval()
        self._decode = decode
        self._eos = frozenset(eos_token_ids)
        self._max_batch = max_batch
        self._seed = seed
        self._unseeded = itertools.count()
        self._version = policy_version
        self._recompute = recompute
        self._has_positions = "position_ids" in inspect.signature(model.forward).parameters  # else, that padding does not shift them
        self._samples = asyncio.Event()  # unless paused
        self._samples.set()
        self._waiting: list[_Row] = []
        self._worker: asyncio.Task[None] | None = None

    async def ready(self, policy_version: int) -> None:
        self._version = policy_version

    async def check_alive(self) -> None:
        pass

    async def generate(self, token_ids: list[int], params: SamplingParams) -> Completion:
        # Each completion draws for itself: which others share its batch depends on how fast the tools answer.
        own = f"number {next(self._unseeded)}" if params.seed is None else params.seed
        row = _Row(token_ids, params, asyncio.get_running_loop().create_future(), random.Random(f"{self._seed}/{own}"))
        self._waiting.append(row)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
            self._worker.add_done_callback(_take_error)
        return await row.done

    async def _work(self) -> None:
        while self._waiting:
            await asyncio.sleep(0)  # let every episode that is ready to go on join the batch
            batch = [row for row in self._waiting[: self._max_batch] if not row.done.cancelled()]
            del self._waiting[: self._max_batch]
            if not batch:
                continue
            try:
                await self._sample(batch)
            except Exception as error:
                for row in batch:
                    if not row.done.done():
                        row.done.set_exception(error)

    async def _sample(self, batch: list[_Row]) -> None:
        device = self._model.device
        width = max(len(row.prompt) for row in batch)
        input_ids = torch.zeros(len(batch), width, dtype=torch.long, device=device)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(batch):
            input_ids[i, width - len(row.prompt) :] = torch.tensor(row.prompt, device=device)
            attention_mask[i, width - len(row.prompt) :] = 1
        temperature = torch.tensor([row.params.temperature or 1.0 for row in batch], device=device)[:, None]
        greedy = torch.tensor([row.params.temperature == 0 for row in batch], device=device)
        cache, cached_by = None, self._version
        while True:
            await asyncio.sleep(0)  # tools, deadlines and the actor's other calls get their turn between tokens
            await self._samples.wait()
            if self._recompute and cached_by != self._version:
                cache, cached_by = None, self._version
            start = 0 if cache is None else input_ids.shape[1] - 1
            position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
            with torch.no_grad():
                out = self._model(
                    input_ids=input_ids[:, start:],
                    attention_mask=attention_mask,
                    position_ids=position_ids[:, start:],
                    past_key_values=cache,
                    use_cache=True,
                )
            if not hasattr(out, "past_key_values"):
                kind = self._model.config.model_type
                raise UserError(
                    f"rollout.engine=transformers cannot sample from a model of the kind {kind!r}, which has no cache of keys and values "
                    "(past_key_values); rollout.engine=vllm may serve it"
                )
            if not self._has_positions:
                self._check_positions(batch, out.logits[:, -1])
            cache = out.past_key_values
            logprobs = torch.log_softmax(out.logits[:, -1].float() / temperature, dim=-1)  # [B, V]
            below = logprobs.double().exp().cumsum(-1)  # [B, V]
            drawn = torch.tensor([[row.rng.random()] for row in batch], dtype=torch.float64, device=device) * below[:, -1:]
            sampled = torch.searchsorted(below, drawn, right=True)[:, 0]  # the first token above; never one of probability 0
            tokens = torch.where(greedy, logprobs.argmax(-1), sampled)
            self._append(batch, tokens.tolist(), logprobs.gather(1, tokens[:, None])[:, 0].tolist())
            if all(row.finish_reason for row in batch):
                return
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
            # Rows that have ended stay where they are: a position beyond the model's last one would be an error.
            goes_on = attention_mask.new_tensor([[row.finish_reason is None] for row in batch])
            attention_mask = torch.cat([attention_mask, goes_on], dim=1)

    @torch.no_grad()
    def _check_positions(self, batch: list[_Row], logits: torch.Tensor) -> None:
        """logits: [B, V], of the tokens after the prompts. Raises UserError where those of the shortest prompt are others without padding;
        a batch without padding tells nothing."""
        lengths = [len(row.prompt) for row in batch]
        i = lengths.index(min(lengths))
        if lengths[i] == max(lengths):
            return
        padded = logits[i].float()
        alone = self._model(input_ids=torch.tensor([batch[i].prompt], device=logits.device)).logits[0, -1].float()
        if (alone - padded).std() > torch.finfo(logits.dtype).eps ** 0.5 * alone.std():
            kind = self._model.config.model_type
            raise UserError(
                f"rollout.engine=transformers cannot sample from a model of the kind {kind!r}, which counts padding as positions, so that "
                "logprobs would be wrong; rollout.engine=vllm may serve it"
            )
        self._has_positions = True

    def _append(self, batch: list[_Row], tokens: list[int], logprobs: list[float]) -> None:
        for row, token, logprob in zip(batch, tokens, logprobs, strict=True):
            if row.finish_reason:
                continue
            if row.done.cancelled():  # its caller has gone
                row.finish_reason = "abort"
                continue
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.versions.append(self._version)  # new weights may come between two tokens
            text = self._decode(row.token_ids)
            if token in self._eos or any(stop in text for stop in row.params.stop):
                row.finish_reason = "stop"
            elif len(row.token_ids) >= row.params.max_tokens:
                row.finish_reason = "length"
            if row.finish_reason:  # its episode does not wait for the others
                row.done.set_result(Completion(row.token_ids, row.logprobs, row.versions, row.finish_reason))

    @torch.no_grad()
    async def score(self, token_ids: list[int]) -> list[float]:
        """Log-probabilities of tokens 1 .. L-1 given those before them, at temperature 1."""
        ids = torch.tensor(token_ids, device=self._model.device)
        logprobs = torch.log_softmax(self._model(input_ids=ids[None]).logits[0, :-1].float(), dim=-1)
        return logprobs.gather(1, ids[1:, None])[:, 0].tolist()

    # The weight-update protocol, in the order in which it is called.

    async def pause(self) -> None:
        self._samples.clear()

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        pass

    async def start_weight_update(self) -> None:
        pass

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        for payload in update_info["payloads"]:
            self.load_weights(load(payload).items())

    async def finish_weight_update(self, policy_version: int) -> None:
        self._version = policy_version

    async def resume(self) -> None:
        self._samples.set()

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = self._model.state_dict(keep_vars=True)  # persistent buffers are weights too, such as the bias of a router
        for name, tensor in weights:
            own[name].copy_(tensor)

    def close(self) -> None:
        """It has nothing in the file system."""

    def shutdown(self) -> None:
        """Ends what is being sampled for callers that have gone."""
        if self._worker is not None:
            self._worker.cancel()
