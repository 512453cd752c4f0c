"""What can be wrong with a run before anything is started: packages, tools, tasks, the policy's folder, and what fits into it."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from toolrl_ray.config import RunConfig
from toolrl_ray.device import torch_device
from toolrl_ray.episode.codec import HFCodec
from toolrl_ray.errors import ConfigError, MissingDependency
from toolrl_ray.local_ray import cluster_address
from toolrl_ray.pretrained import check_weights, load_config
from toolrl_ray.types import Task
from tools_service.runner import ToolInfo, is_search

STACK = frozenset(
    {"torch", "transformers", "tokenizers", "safetensors", "ray", "vllm", "deepspeed", "numpy", "psutil", "httpx", "fastapi", "mcp", "peft"}
)
NUM_PROMPTS = 4  # of each split and source, that are looked at


def check(config: RunConfig, *, in_process: bool, learner: bool) -> None:
    """Raises UserError: the first thing that is wrong."""
    from toolrl_ray.tasks.module import load_tasks
    from toolrl_ray.tasks.stream import digest
    from toolrl_ray.tools.local import tool_factories

    check_packages(config, in_process=in_process, learner=learner)
    if in_process:
        check_counts(config, learner=learner)
        check_devices(config, learner=learner)
    tool_factories(config.tools)
    check_index(config, in_process=in_process)
    train, heldout = load_tasks(config.task)
    first = [*_first_of_each(train), *_first_of_each(heldout)]
    if learner:
        digest(first)  # raises for a class of tasks that no checkpoint can tell from others
    if config.policy.path != "tiny":
        check_context(config)
        if os.path.isdir(config.policy.path):
            check_weights(config.policy.path)
    check_prompts(config, first)


def check_counts(config: RunConfig, *, learner: bool) -> None:
    """One process has one of each."""
    counts = {"rollout.num_actors": config.rollout.num_actors} | ({"learner.num_ranks": config.learner.num_ranks} if learner else {})
    for key, count in counts.items():
        if count > 1:
            raise ConfigError(f"{key}={count} contradicts --in-process, which has but one; set {key}=1 or take --in-process away")


def check_packages(config: RunConfig, *, in_process: bool, learner: bool) -> None:
    """On a cluster that is up (RAY_ADDRESS), its nodes have the engines; only a local Ray needs them here."""
    needed = ["torch", "transformers"]
    if not in_process:
        needed.append("ray")
        if not cluster_address():
            needed += ["vllm"] * (config.rollout.engine == "vllm") + ["deepspeed"] * learner
    if learner and config.policy.lora and (in_process or not cluster_address()):
        needed.append("peft")
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise not_installed(package)


def not_installed(package: str) -> MissingDependency:
    return MissingDependency(f"{package} is not installed; pip install -e '.[cpu]', or with GPUs pip install -e '.[gpu]'")


def check_devices(config: RunConfig, *, learner: bool) -> None:
    """This process sees the GPUs that the recipe asks for. On Ray its placement looks for them."""
    torch_device("rollout", config.rollout.num_gpus)
    if learner:
        torch_device("learner", config.learner.num_gpus)


def check_index(config: RunConfig, *, in_process: bool) -> None:
    """The folder of each search tool's index is one. On a cluster that is up (RAY_ADDRESS), its nodes have it; a name without a folder,
    `generated` among them, is looked up when the tool starts."""
    from tools_service.search.corpus import SearchError
    from tools_service.search.searcher import local_folder

    tools = config.tools
    if tools.app is not None or (cluster_address() and not in_process):
        return
    for name in (name for name in tools.names if is_search(name, tools.custom.get(name))):
        try:
            local_folder(str(tools.options[name]["index"]))
        except SearchError as error:
            raise ConfigError(f"tools.options.{name}.index: {error}") from None


def check_context(config: RunConfig) -> None:
    """The policy can read episodes of the length that the recipe allows."""
    longest = max_positions(load_config(config.policy.path))
    if longest is not None and config.episode.max_context_tokens > longest:
        raise ConfigError(
            f"episode.max_context_tokens={config.episode.max_context_tokens} is more than the {longest} positions "
            f"(max_position_embeddings) of policy.path={config.policy.path!r}; set episode.max_context_tokens={longest} or less"
        )


def max_positions(hf_config: Any) -> int | None:
    """Tokens that a model can read, its scaled rotary positions included; None where its configuration does not tell."""
    text = hf_config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if longest and rope.get("rope_type", rope.get("type")) in ("linear", "dynamic", "yarn"):  # the others say it in the number itself
        longest = max(longest, int((rope.get("original_max_position_embeddings") or longest) * rope.get("factor", 1)))
    return longest


def _first_of_each(tasks: list[Task]) -> list[Task]:
    found: dict[str, list[Task]] = {}
    for task in tasks:
        if len(own := found.setdefault(task.source, [])) < NUM_PROMPTS:
            own.append(task)
    return [task for own in found.values() for task in own]


def check_prompts(config: RunConfig, tasks: list[Task]) -> None:
    """The first prompts leave room for an answer, and a chat template can be followed; the tools' own descriptions are not known yet.

    For the tiny policy and one in a folder: a Hub name's tokenizer would be a download, which only a chat template is worth.
    """
    if config.policy.path != "tiny" and not os.path.isdir(config.policy.path) and config.episode.call_format == "text":
        return
    from toolrl_ray.rollout.load import make_call_format
    from toolrl_ray.tasks.module import task_module

    codec, render_prompt = _codec(config), task_module(config.task).render_prompt
    call_format = make_call_format(config, codec, {name: ToolInfo(name, "", True) for name in config.tools.names})
    vocab_size = None if config.policy.path == "tiny" else load_config(config.policy.path).get_text_config().vocab_size
    for task in tasks:
        prompt = call_format.prompt(codec, render_prompt(task, config.task.few_shot))[0]
        if vocab_size and max(prompt) >= vocab_size:
            raise ConfigError(
                f"policy.path={config.policy.path!r}: its tokenizer gives token {max(prompt)} for the prompt of task {task.id!r}, and the "
                f"model has embeddings for {vocab_size}; take the tokenizer that it was made with, or resize its embeddings"
            )
        num_tokens = len(prompt)
        if num_tokens >= config.episode.max_context_tokens:
            part = config.task.parts.get(task.source)
            few_shot = f"task.parts.{task.source}.few_shot={part.few_shot}" if part else f"task.few_shot={config.task.few_shot}"
            raise ConfigError(
                f"episode.max_context_tokens={config.episode.max_context_tokens} leaves no room after the prompt of task {task.id!r} "
                f"({num_tokens} tokens, {few_shot}); set episode.max_context_tokens higher"
            )


def _codec(config: RunConfig) -> HFCodec:
    """The policy's, or the one that the tiny policy will have."""
    if config.policy.path != "tiny":
        from toolrl_ray.rollout.load import load_codec

        return load_codec(config.policy.path)
    from toolrl_ray.bootstrap.build import demonstrations_of
    from toolrl_ray.bootstrap.tokenizer import make_tokenizer

    return HFCodec(make_tokenizer(config.bootstrap.max_context_tokens, demonstrations_of(config).PIECES))
