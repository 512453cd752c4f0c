"""What people give a `TextEnvironment`, read and checked: generation_kwargs, and what a reward function returns."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Set
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from toolrl_ray.errors import ConfigError

MAX_NEW_TOKENS = 64  # per turn, where generation_kwargs says nothing

# Settings of `generate` that bend or cut the distribution, with the values that leave it as it is, as None does. SAMPLING: those that
# greedy decoding does not look at.
SAMPLING = {"top_k": (0,), "top_p": (1,), "min_p": (0,), "typical_p": (1,)}
NEUTRAL: dict[str, tuple[int, ...]] = {
    **SAMPLING,
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "early_stopping": (0,),
    "length_penalty": (1,),
    "num_return_sequences": (1,),
    "min_length": (0, -1),
    "min_new_tokens": (0,),
}
READ = ("do_sample", "temperature", "max_new_tokens", "eos_token_id")
OF_NO_EFFECT = ("pad_token_id", "bos_token_id", "use_cache")  # rows are padded and cached without being asked


def read_generation_kwargs(kwargs: Mapping[str, Any]) -> tuple[float, int, list[int]]:
    """(temperature, 0 for greedy; max_new_tokens; more ids that end a turn). Raises ConfigError for what is not supported."""
    if not isinstance(kwargs, Mapping):
        raise ConfigError(f"generation_kwargs is a {type(kwargs).__name__}; give a dict with some of {', '.join(READ)}")
    kwargs = {name: value for name, value in kwargs.items() if value is not None}

    def wrong(name: str, what: str) -> ConfigError:
        return ConfigError(f"generation_kwargs[{name!r}]={in_short(kwargs[name])}{what}")

    samples = kwargs.get("do_sample", "temperature" in kwargs)
    if samples not in (True, False):
        raise wrong("do_sample", ": give True or False")
    for name, value in kwargs.items():
        if name not in (*NEUTRAL, *READ, *OF_NO_EFFECT):
            raise ConfigError(f"generation_kwargs has {name!r}, which is not supported; supported: {', '.join(READ)}")
        is_idle = name not in NEUTRAL or name in SAMPLING and not samples
        if not (is_idle or isinstance(value, Real) and value in NEUTRAL[name]):
            remedy = f"set it to {NEUTRAL[name][0]} or leave it out"
            raise wrong(name, f" changes the distribution, and importance ratios would be wrong; {remedy}")
    temperature = kwargs.get("temperature", 1.0) if samples else 0.0
    if not isinstance(temperature, Real) or samples and not 0 < temperature < math.inf:
        raise wrong("temperature", ": give a number above 0, or do_sample=False")
    max_new_tokens = kwargs.get("max_new_tokens", MAX_NEW_TOKENS)
    if not (isinstance(max_new_tokens, Integral) and max_new_tokens >= 1):
        raise wrong("max_new_tokens", ": give a whole number, 1 or more")
    try:
        eos_token_ids = [int(i) for i in as_list(kwargs.get("eos_token_id"))]
    except (TypeError, ValueError):
        raise wrong("eos_token_id", ": give a token's id, or a list of them") from None
    return float(temperature), int(max_new_tokens), [i for i in eos_token_ids if i >= 0]  # TRL's scripts say -1 for none


def read_rewards(returned: Any, num_tasks: int) -> list[Tensor]:
    """One float32 scalar per task. Raises ConfigError where reward_fn returned something else."""
    wanted = f"return one number for each of the {num_tasks} responses, in their order"
    try:
        if isinstance(returned, (Mapping, Set)):  # of which one could only count the keys, and in no order
            raise TypeError
        each = iter(returned)
    except TypeError:
        raise ConfigError(f"reward_fn returned {in_short(returned)}; {wanted}") from None
    rewards = list(each)
    if len(rewards) != num_tasks:
        raise ConfigError(f"reward_fn returned {len(rewards)} rewards for {num_tasks} responses; return one for each, in their order")
    read = []
    for i, reward in enumerate(rewards):
        try:
            read.append(torch.as_tensor(reward, dtype=torch.float32).detach().reshape(()))
        except (TypeError, ValueError, RuntimeError):
            raise ConfigError(f"reward_fn returned {in_short(reward)} for task {i}; {wanted}") from None
        if not read[-1].isfinite():
            raise ConfigError(f"reward_fn returned {in_short(reward)} for task {i}; return a finite number")
    return read


def parameter_names(function: Callable[..., Any]) -> Iterable[str]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # a builtin that tells nothing of them
        return ()


def as_list(eos_token_id: int | Iterable[int] | None) -> list[int]:
    return [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, Integral) else list(eos_token_id)


def in_short(value: Any) -> str:
    return " ".join(repr(value).split())[:100]
