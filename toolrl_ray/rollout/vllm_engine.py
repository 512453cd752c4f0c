"""A rollout engine on vLLM's AsyncLLM: many episodes in flight, stop strings kept in the output, sampled logprobs, prefix
caching, and weights taken up while it runs.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import itertools
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

from toolrl_ray.config import RunConfig
from toolrl_ray.errors import RolloutError, UserError
from toolrl_ray.rollout.engine_core import LastWords, own_folder, set_environment
from toolrl_ray.types import Completion, SamplingParams
from toolrl_ray.weights.vllm_object_store import messages

ANSWER_S = 30.0  # longer than any step of an engine
LOOK_S = 1.0  # between two looks at an engine that owes an answer
NO_UPDATE_IS_OPEN = "without a matching start_weight_update"  # in vLLM's error


def _check_platform(num_gpus: float, is_cpu_build: bool) -> None:
    """Ray hides no GPU from an actor that asks for none, and vLLM takes what its build is for."""
    if num_gpus == 0 and not is_cpu_build:
        raise UserError("rollout.num_gpus=0, but the vLLM installed here is not its CPU build: set rollout.num_gpus, or install '.[cpu]'")
    if num_gpus > 0 and is_cpu_build:
        raise UserError(
            f"rollout.num_gpus={num_gpus:g}, but the vLLM installed here is its CPU build: set rollout.num_gpus=0, or install '.[gpu]'"
        )


class VLLMEngine:
    """policy_dir: Hugging Face folder or Hub name. weight_backend: "object_store", "nccl" or "ipc".
    on_death: called, with what then is raised, when vLLM's engine-core process is found dead or hanging, which this object cannot mend.

    Raises RolloutError, with vLLM's reason, where the engine does not start."""

    def __init__(
        self,
        config: RunConfig,
        policy_dir: str,
        weight_backend: str,
        policy_version: int,
        on_death: Callable[[RolloutError], None] = lambda error: None,
    ):
        on_gpu = config.rollout.num_gpus > 0
        set_environment(config, on_gpu, weight_backend)
        from vllm import AsyncEngineArgs
        from vllm.config import WeightTransferConfig
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        _check_platform(config.rollout.num_gpus, current_platform.is_cpu())
        _leave_logprobs_undecoded()
        self._policy_dir, self._version = policy_dir, policy_version
        self._on_death = on_death
        self._update_may_be_open = False
        self._seed, self._draws_apart = config.seed, not on_gpu
        self._recompute = config.weights.kv_cache == "recompute"
        num_sequences = max(config.rollout.max_in_flight, config.eval.max_in_flight)
        # Of one step: at least one of each sequence, and on CPU, without chunks, a whole prompt. vLLM's own choice is 2,048.
        step_tokens = max(8192 if on_gpu else config.episode.max_context_tokens, 2048, num_sequences)
        args = AsyncEngineArgs(
            model=policy_dir,
            # Never Mistral's own format, which vLLM prefers where it is: weights come by the names of transformers.
            tokenizer_mode="hf",
            config_format="hf",
            dtype=config.policy.dtype,
            max_model_len=config.episode.max_context_tokens,
            max_num_seqs=num_sequences,
            max_num_batched_tokens=step_tokens,
            enable_prefix_caching=True,
            enforce_eager=not on_gpu,
            # Logprobs of the distribution that was sampled from, temperature included.
            logprobs_mode="processed_logprobs",
            generation_config="vllm",  # a model's own top-p or top-k must not slip in
            weight_transfer_config=WeightTransferConfig(backend=weight_backend),
            gpu_memory_utilization=config.rollout.gpu_memory_utilization,
            disable_log_stats=True,
            seed=config.seed,
            # On CPU a request that draws by a seed of its own and is prefilled in chunks kills the engine.
            enable_chunked_prefill=None if on_gpu else False,
        )
        self._last_words, self._folder = LastWords(), own_folder()
        try:
            self._llm = AsyncLLM.from_engine_args(args)
        except RuntimeError as error:
            self.close()
            if not (reason := self._last_words.read()):
                raise
            raise RolloutError(f"vLLM cannot start with {policy_dir}: {reason}") from error
        self._sampling = functools.lru_cache(maxsize=1024)(self._new_sampling)
        self._ids = itertools.count()

    async def ready(self, policy_version: int) -> None:
        """Raises RolloutError where vLLM has loaded the model and cannot run it, for want of a kernel, which a first request shows."""
        from vllm.v1.engine.exceptions import EngineDeadError

        await self._answer(self._llm.update_weight_version(str(policy_version)))
        try:
            await self.score([0, 0])
        except EngineDeadError as error:
            reason = self._last_words.read(self._llm)
            raise RolloutError(f"vLLM cannot run {self._policy_dir}: {reason}; rollout.engine=transformers may") from error

    async def check_alive(self) -> None:
        """Raises RolloutError, after `on_death`, where the engine-core process is dead or does not answer within ANSWER_S."""
        from vllm.v1.engine.exceptions import EngineDeadError

        what = "is dead"
        if not self._llm.errored:
            try:
                await asyncio.wait_for(self._llm.is_paused(), ANSWER_S)  # any question, which it answers between two steps
                return
            except EngineDeadError:
                pass
            except TimeoutError:
                what = f"does not answer within {ANSWER_S:g} s"
        reason = self._last_words.read(self._llm)
        error = RolloutError(f"vLLM's engine-core process {what}{reason and ': '}{reason}")
        self._on_death(error)
        raise error

    async def _answer(self, call: Awaitable[Any]) -> Any:
        """What vLLM answers. It never answers a call that its engine-core process does not outlive: that is looked for here."""
        asked = asyncio.ensure_future(call)
        try:
            while not self._llm.errored and not (await asyncio.wait({asked}, timeout=LOOK_S))[0]:
                pass
            if self._llm.errored:
                await self.check_alive()
            return await asked
        finally:
            asked.cancel()

    async def generate(self, token_ids: list[int], params: SamplingParams) -> Completion:
        final: Any = None
        try:
            # Marked as tokens, the prompt is not sent through vLLM's tokenizer threads.
            prompt = {"type": "token", "prompt_token_ids": token_ids}
            async for output in self._llm.generate(prompt, self._seeded(params), str(next(self._ids))):
                final = output
        except Exception:
            await self.check_alive()
            raise
        if final is None or not final.outputs:
            raise RolloutError("vLLM returned no output for a request")
        return _completion(final.outputs[0], self._version)

    def _seeded(self, params: SamplingParams) -> Any:
        """On CPU each completion draws for itself, whatever shares its batch, so that the same seed repeats a run. On a GPU that costs a
        kernel for every request and token: there all draw from the engine's generator, in an order that depends on timing."""
        sampling = self._sampling(params.temperature, params.max_tokens, params.stop)
        if params.seed is None or not self._draws_apart:
            return sampling
        own = copy.copy(sampling)
        own.seed = zlib.crc32(f"{self._seed}/{params.seed}".encode())
        return own

    def _new_sampling(self, temperature: float, max_tokens: int, stop: tuple[str, ...]) -> Any:
        """Kept for the next turn of the same kind, because vLLM checks every field of a new one.

        vLLM finds stop strings in the process that reads the engine's output, a step too late for the engine: the request is computed
        once more and then called off. A stop string that is one token is also given as a token, which the engine sees itself.
        """
        from vllm import SamplingParams as VLLMSamplingParams
        from vllm.sampling_params import RequestOutputKind

        encoded = [self._llm.get_tokenizer().encode(text, add_special_tokens=False) for text in stop]
        return VLLMSamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            stop=list(stop),
            stop_token_ids=[token_ids[0] for token_ids in encoded if len(token_ids) == 1],
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )

    async def score(self, token_ids: list[int]) -> list[float]:
        """Log-probabilities of tokens 1 .. L-1 given those before them, at temperature 1: a proof of which weights are loaded."""
        from vllm import SamplingParams as VLLMSamplingParams

        sampling = VLLMSamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        final: Any = None
        async for output in self._llm.generate({"prompt_token_ids": token_ids}, sampling, str(next(self._ids))):
            final = output
        return [entry[token].logprob for entry, token in zip(final.prompt_logprobs[1:], token_ids[1:], strict=True)]

    async def checksums(self) -> list[dict[str, str]]:
        return await self._answer(self._llm.compute_weight_checksums())

    # The weight-update protocol, in the order in which it is called.

    async def pause(self) -> None:
        """Freeze requests where they are. recompute: what is cached, of them and of prefixes, belongs to the weights that are about to go
        and is dropped; what frozen requests need of it is computed again by the new ones."""
        await self._answer(self._llm.pause_generation(mode="keep", clear_cache=self._recompute))

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """In the place of the connection before, if there was one: nothing else would ever free that."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._close_update()  # vLLM gives no connection up during an update
        await self._answer(self._llm.shutdown_weight_transfer_engine())
        await self._answer(self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info)))

    async def start_weight_update(self) -> None:
        await self._close_update()
        self._update_may_be_open = True
        await self._answer(self._llm.start_weight_update())

    async def _close_update(self) -> None:
        """One that a sync which broke off has left open: closing it puts back the weights that were not replaced.

        Where an update fails, vLLM takes it for closed, but layers of which only a part had come keep that part and would count it twice in
        the next one. An update of nothing ends them; the next one brings them whole."""
        if not self._update_may_be_open:
            return
        try:
            await self._answer(self._llm.finish_weight_update())
        except Exception as error:  # of no class of its own
            if NO_UPDATE_IS_OPEN not in str(error):  # it never began, or vLLM closed it when it failed
                raise
            await self._answer(self._llm.start_weight_update())
            await self._answer(self._llm.finish_weight_update())
        self._update_may_be_open = False

    async def update_weights(self, update_info: Any) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        for part in messages(update_info) if "payloads" in update_info else [update_info]:
            await self._answer(self._llm.update_weights(WeightTransferUpdateRequest(update_info=part)))

    async def finish_weight_update(self, policy_version: int) -> None:
        await self._answer(self._llm.finish_weight_update(weight_version=str(policy_version)))
        self._update_may_be_open = False
        self._version = policy_version

    async def resume(self) -> None:
        await self._answer(self._llm.resume_generation())

    def shutdown(self) -> None:
        self._llm.shutdown()
        self._last_words.close()
        self.close()

    def close(self) -> None:
        """Removes what it has in the file system. It may be running still, and is to be killed next."""
        self._folder.cleanup()


def _leave_logprobs_undecoded() -> None:
    """vLLM decodes every sampled token once more by itself, to name its logprob; nobody reads that here, and it is the
    largest single cost of this process. vLLM has no option for it while stop strings are on."""
    from vllm.v1.engine.logprobs import LogprobsProcessor

    if "toolrl" not in vars(LogprobsProcessor):
        make = LogprobsProcessor.from_new_request
        LogprobsProcessor.from_new_request = lambda tokenizer, request: make(None, request)
        LogprobsProcessor.toolrl = True


def _completion(output: Any, current_version: int) -> Completion:
    token_ids = list(output.token_ids)
    flat = output.logprobs
    if token_ids and flat.token_ids != token_ids:
        raise RolloutError(f"vLLM's logprobs are of other tokens than those it sampled: {flat.token_ids[:8]}... and {token_ids[:8]}...")
    return Completion(
        token_ids,
        list(flat.logprobs) if token_ids else [],
        _versions(output, len(token_ids), current_version),
        output.finish_reason or "abort",
    )


def _versions(output: Any, num_tokens: int, current_version: int) -> list[int]:
    """vLLM's version spans over output tokens, one entry per token."""
    versions = [current_version] * num_tokens
    for span in output.weight_versions or []:
        if span.version.isdigit():
            versions[span.start : span.end] = [int(span.version)] * (span.end - span.start)
    return versions
