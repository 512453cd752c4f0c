"""`TextEnvironment` as people who come from TRL know it, over this project's episodes: the same ledger, the same parser, the same tools.

    env = TextEnvironment(model, tokenizer, tools, reward_fn, prompt, generation_kwargs={"do_sample": True, "max_new_tokens": 32})
    queries, responses, masks, rewards, histories = env.run(tasks, **reward_kwargs)
    statistics = PPOTrainer(PPOConfig(batch_size=len(tasks)), model, tokenizer=tokenizer).step(queries, responses, rewards, masks)

Letters: B = tasks, Q = tokens of one query, R = tokens of one response (everything after the query, observations included).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from toolrl_ray.episode.call_format import TextMarkers
from toolrl_ray.episode.codec import HFCodec
from toolrl_ray.episode.loop import Limits, run_episode
from toolrl_ray.errors import ConfigError
from toolrl_ray.learner.model import eval_mode
from toolrl_ray.ppo_trainer import PPOConfig, PPOTrainer, causal_lm
from toolrl_ray.preflight import max_positions
from toolrl_ray.rollout.transformers_engine import TransformersEngine
from toolrl_ray.text_history import TextHistory
from toolrl_ray.text_settings import as_list, in_short, parameter_names, read_generation_kwargs, read_rewards
from toolrl_ray.text_tools import SHOWN, TextTools
from toolrl_ray.types import EpisodeRequest, Task, Trajectory

__all__ = ["PPOConfig", "PPOTrainer", "TextEnvironment", "TextHistory"]

MAX_BATCH = 32  # episodes that are sampled together
NO_DEADLINE_S = 1e9  # of a turn and of an episode: most of a large run waits in line, and the engine is in this process
NO_LIMIT = 2**31  # tokens of an episode, where neither max_length nor the model says how many


class TextEnvironment:
    """Runs tasks as episodes in which the model may call tools, and scores them.

    model: a causal LM, or anything that holds one as `pretrained_model`. tokenizer: of Hugging Face; it is not changed.
    tools: see text_tools.py. prompt: goes before every task.
    reward_fn: called once per run with the text of each episode's last model turn, up to its marker, and with the keyword arguments of
        `run`; where it has a parameter named `histories` it gets those too. Returns a number per task.
    max_turns: completions per episode. max_tool_response: characters that the model is shown of a call.
    max_length: tokens of an episode, query included (at most, and by default: as many as the model can read).
    generation_kwargs: do_sample (default: greedy, or sampling where there is a temperature), temperature, max_new_tokens per turn,
        eos_token_id (ids that end a turn besides the tokenizer's and the model's own). Everything else must be neutral; None always is.
    tool_timeout_s: after which a call is answered without its tool. max_tool_reponse: TRL's spelling.
    Sampling is seeded by torch's global generator. Raises ConfigError, in one line, for settings that make no sense.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        tools: Mapping[str, Any] | Iterable[Any],
        reward_fn: Callable[..., Iterable[Any]],
        prompt: str,
        max_turns: int = 4,
        max_tool_response: int = 100,
        max_length: int | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
        *,
        tool_timeout_s: float = 10.0,
        max_tool_reponse: int | None = None,
    ):
        self.model, self.tokenizer, self.reward_fn, self.prompt = model, tokenizer, reward_fn, prompt
        self.max_turns, self.max_length, self.tool_timeout_s = max_turns, max_length, tool_timeout_s
        self.max_tool_response = max_tool_response if max_tool_reponse is None else max_tool_reponse
        self.generation_kwargs = generation_kwargs
        self._policy = causal_lm(model)
        own_eos = getattr(getattr(self._policy, "generation_config", None), "eos_token_id", None)
        self._codec = _Codec(tokenizer, as_list(own_eos))
        self._eos_token_ids = self._codec.eos_token_ids
        self._settings()
        if not callable(reward_fn):
            raise ConfigError(f"reward_fn={reward_fn!r} cannot be called; give a function of the list of responses")
        self._tools = TextTools(tools)
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)  # leaves the thread's own loop alone
        self._is_closed = False
        try:
            _wait_for(self._runner, self._tools.start())
        except BaseException:
            self.close()
            raise

    @property
    def tools(self) -> Mapping[str, Any]:
        """Those of the construction, by name."""
        return MappingProxyType(self._tools.named)

    def run(
        self, tasks: Iterable[str] | None = None, /, **reward_kwargs: Any
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[TextHistory]]:
        """One episode for every task; also where an event loop runs already, as in a notebook. The tasks may be given as `queries`, too.

        Returns queries (int64 [Q]), responses (int64 [R], R may be 0), masks (int64 [R], 1 on what the model sampled), rewards
        (float32 scalars) and histories, each a list of B. Raises what the model or reward_fn raises; what a tool does never raises.
        """
        if tasks is None:
            tasks = reward_kwargs.pop("queries", None)
        if tasks is None or isinstance(tasks, str):
            raise ConfigError(f"tasks={tasks!r}: give a list of texts")
        queries = []
        for i, task in enumerate(tasks):
            if not isinstance(task, str):
                raise ConfigError(f"task {i} is {in_short(task)}; give a text")
            queries.append((self.prompt + task).encode("utf-8", "replace").decode())  # half a character cannot be shown
        if not queries:
            return [], [], [], [], []
        if "" in queries and not self._codec.encode_prompt(""):
            raise ConfigError(f"task {queries.index('')} is empty, as is the prompt; the model needs something to go on")
        limits, temperature = self._settings()
        with eval_mode(self._policy):
            trajectories = _wait_for(self._runner, self._episodes(queries, limits, temperature))
        histories = [TextHistory.of(trajectory, self._policy.device) for trajectory in trajectories]
        self._score(histories, reward_kwargs)
        parts = [history.split_query_response_tokens() for history in histories]
        token_ids, responses, masks = (list(column) for column in zip(*parts, strict=True))
        return token_ids, responses, masks, [history.reward for history in histories], histories

    async def _episodes(self, queries: list[str], limits: Limits, temperature: float) -> list[Trajectory]:
        seed = int(torch.randint(2**31, ()))
        engine = TransformersEngine(
            self._policy, self._codec.decode, self._codec.eos_token_ids, max_batch=MAX_BATCH, seed=seed, policy_version=0
        )

        async def one(i: int, query: str) -> Trajectory:
            task = Task(str(i), query, "", "text_environment")
            return await run_episode(
                EpisodeRequest(f"{seed}:{i}:0", f"{seed}:{i}", task),
                query,
                generate=engine.generate,
                call_tool=self._tools,
                codec=self._codec,
                call_format=TextMarkers(),
                limits=limits,
                temperature=temperature,
                shown=SHOWN,
            )

        episodes = [asyncio.create_task(one(i, query)) for i, query in enumerate(queries)]
        try:
            return list(await asyncio.gather(*episodes))
        finally:  # nothing of a run that fails or is interrupted goes on in the next
            engine.shutdown()
            for episode in episodes:
                episode.cancel()
            await asyncio.gather(*episodes, return_exceptions=True)

    def _settings(self) -> tuple[Limits, float]:
        """What the attributes say now. Raises ConfigError."""
        for name, least in (("max_turns", 1), ("max_tool_response", 4), ("max_length", 1)):
            value = getattr(self, name)
            if not (isinstance(value, Integral) and value >= least or name == "max_length" and value is None):
                raise ConfigError(f"{name}={value!r}: give a whole number, {least} or more")
        if not (isinstance(self.tool_timeout_s, Real) and self.tool_timeout_s > 0):
            raise ConfigError(f"tool_timeout_s={self.tool_timeout_s!r}: give seconds, more than 0")
        temperature, max_new_tokens, eos_token_ids = read_generation_kwargs(self.generation_kwargs or {})
        self._codec.eos_token_ids = self._eos_token_ids.union(eos_token_ids)
        limits = Limits(
            max_turns=self.max_turns,
            max_turn_tokens=max_new_tokens,
            max_observation_tokens=NO_LIMIT,
            max_observation_chars=self.max_tool_response,
            max_context_tokens=min(self.max_length or NO_LIMIT, max_positions(self._policy.config) or NO_LIMIT),
            tool_deadline_s=self.tool_timeout_s,
            turn_deadline_s=NO_DEADLINE_S,
            episode_deadline_s=NO_DEADLINE_S,
        )
        return limits, temperature

    def _score(self, histories: list[TextHistory], reward_kwargs: dict[str, Any]) -> None:
        if "histories" not in reward_kwargs and "histories" in parameter_names(self.reward_fn):
            reward_kwargs = {**reward_kwargs, "histories": histories}
        returned = self.reward_fn([history.trajectory.final_text for history in histories], **reward_kwargs)
        for history, reward in zip(histories, read_rewards(returned, len(histories)), strict=True):
            history.reward = reward
            history.trajectory.reward = float(reward)

    def close(self) -> None:
        """Ends what the tools hold. Optional: what is left ends with the process."""
        if self._is_closed:
            return
        self._is_closed = True
        _wait_for(self._runner, self._tools.close())
        self._runner.close()


class _Codec(HFCodec):
    """Special tokens that stand in prompt or task mean themselves, as in TRL, so that chat templates work; in a tool's output they are
    plain characters, as everywhere in this project."""

    def encode_prompt(self, text: str) -> list[int]:
        return self._prefix + self._encode_whole(text)


def _wait_for(runner: asyncio.Runner, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What the coroutine returns. Where this thread runs an event loop already, the runner's works in a thread of its own meanwhile."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return runner.run(coroutine)
    loop = runner.get_loop()
    task = loop.create_task(coroutine)
    outcome: list[Any] = []
    ended = threading.Event()  # after a join that was interrupted another one returns at once, though the thread works on

    def work() -> None:
        try:
            outcome.extend((loop.run_until_complete(task), None))
        except BaseException as error:
            outcome.extend((None, error))
        finally:
            ended.set()

    thread = threading.Thread(target=work, name="text-environment")
    try:
        thread.start()
        ended.wait()
    except BaseException:  # a notebook's interrupt
        loop.call_soon_threadsafe(task.cancel)
        if thread.ident is not None:  # it has been started
            ended.wait()
        raise
    result, error = outcome
    if error is not None:
        raise error
    return result
