"""What in one run's configuration cannot hold together, across its sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolrl_ray.config import RunConfig

MAX_SHARED_GPU_MEMORY = 0.6  # of a GPU, for an engine that shares it with a learner


def contradictions(config: RunConfig) -> Iterator[str]:
    """One line for every two settings that cannot hold together: both values and the remedy."""
    yield from _gpu_contradictions(config)
    yield from _format_contradictions(config)
    yield from _stream_contradictions(config)
    advantage, longest, readable = config.algo.advantage, config.episode.max_context_tokens, config.bootstrap.max_context_tokens
    if advantage in ("grpo", "rloo") and config.train.group_size < 2:
        yield (
            f"algo.advantage={advantage} contradicts train.group_size={config.train.group_size}: "
            "it compares the episodes of a group; set train.group_size=2 or more"
        )
    if advantage != "gae" and config.policy.separate_critic:
        yield f"algo.advantage={advantage} contradicts policy.separate_critic=true: only gae has a critic; set policy.separate_critic=false"
    if config.policy.lora and config.policy.separate_critic:
        yield (
            f"policy.lora.rank={config.policy.lora.rank} contradicts policy.separate_critic=true: its trunk would be a second copy of the "
            "model, trained whole; set policy.separate_critic=false or policy.lora=null"
        )
    if config.policy.dtype == "bfloat16" and config.learner.zero_stage < 2:
        yield (
            f"policy.dtype=bfloat16 contradicts learner.zero_stage={config.learner.zero_stage}: DeepSpeed would add up the gradients of "
            "microbatches in bfloat16; set learner.zero_stage=2 or 3, which also run on one rank"
        )
    if config.policy.path == "tiny" and longest > readable:
        yield (
            f"episode.max_context_tokens={longest} contradicts bootstrap.max_context_tokens={readable}, the longest text that the "
            f"tiny policy can read; set bootstrap.max_context_tokens={longest} or episode.max_context_tokens={readable}"
        )
    heads, width = config.bootstrap.num_heads, config.bootstrap.hidden_size
    if config.policy.path == "tiny" and width % heads:
        yield (
            f"bootstrap.num_heads={heads} contradicts bootstrap.hidden_size={width}: it must divide it; "
            f"set bootstrap.num_heads={1 if width % 32 else width // 32} or another divisor"
        )
    if config.eval.num_tasks > config.task.num_heldout:
        yield (
            f"eval.num_tasks={config.eval.num_tasks} contradicts task.num_heldout={config.task.num_heldout}; "
            "set task.num_heldout higher or eval.num_tasks lower"
        )


def _format_contradictions(config: RunConfig) -> Iterator[str]:
    """The same for how the policy is asked and writes its calls."""
    episode, task = config.episode, config.task
    if episode.call_format == "text" and episode.system is not None:
        yield (
            f"episode.system={episode.system!r} contradicts episode.call_format=text, which has no system message; "
            "set episode.call_format=hermes or take episode.system away"
        )
    if episode.call_format == "hermes" and config.policy.path == "tiny":
        yield (
            "episode.call_format=hermes contradicts policy.path=tiny, which has no chat template; "
            "set policy.path to a chat model or episode.call_format=text"
        )
    for key, one in {"task": task, **{f"task.parts.{name}": part for name, part in task.parts.items()}}.items():
        if episode.call_format == "hermes" and one.few_shot > 0 and one.module.startswith("toolrl_ray."):
            yield (
                f"episode.call_format=hermes contradicts {key}.few_shot={one.few_shot}: the worked examples are written in text markers; "
                f"set {key}.few_shot=0"
            )


def _stream_contradictions(config: RunConfig) -> Iterator[str]:
    """The same for groups on their way from rollout to learner, and who comes and goes."""
    stream, rollout, group_size = config.stream, config.rollout, f"train.group_size={config.train.group_size}"
    if stream.filter_zero_signal and config.train.group_size < 2:
        yield (
            f"stream.filter_zero_signal=true contradicts {group_size}: rewards can differ only between the episodes of a group; "
            "set train.group_size=2 or more or stream.filter_zero_signal=false"
        )
    if stream.group_deadline_s is not None and stream.group_quorum > config.train.group_size:
        yield (
            f"stream.group_quorum={stream.group_quorum} contradicts {group_size}: no group ever has so many; "
            f"set stream.group_quorum={config.train.group_size} or less"
        )
    if rollout.max_actors is not None and rollout.max_actors < rollout.num_actors:
        yield (
            f"rollout.max_actors={rollout.max_actors} contradicts rollout.num_actors={rollout.num_actors}, with which the run begins; "
            f"set rollout.max_actors={rollout.num_actors} or more, or null"
        )


def _gpu_contradictions(config: RunConfig) -> Iterator[str]:
    """The same for who uses which GPU, and how the weights get there."""
    rollout, learner, backend = config.rollout, config.learner, config.weights.backend
    on_gpus = backend in ("nccl", "ipc")
    actors, ranks = f"rollout.num_actors={rollout.num_actors}", f"learner.num_ranks={learner.num_ranks}"
    for section, gpus, count in (("rollout", rollout.num_gpus, actors), ("learner", learner.num_gpus, ranks)):
        if gpus > 1:
            yield f"{section}.num_gpus={gpus:g} contradicts {count}: each uses one GPU; set {section}.num_gpus=1 and raise the count"
        if getattr(config, section).num_cpus == 0 and gpus == 0:
            yield (
                f"{section}.num_cpus=0 contradicts {section}.num_gpus=0: Ray places nobody who asks for nothing; "
                f"set {section}.num_cpus=0.1 or more"
            )
        if gpus == 0 and on_gpus:
            yield (
                f"weights.backend={backend} contradicts {section}.num_gpus=0: it carries weights between GPUs; "
                f"give {section}.num_gpus a GPU or set weights.backend=auto"
            )
    if learner.num_ranks > 1 and 0 < learner.num_gpus < 1:
        yield f"learner.num_gpus={learner.num_gpus:g} contradicts {ranks}: ranks cannot share a GPU; set learner.num_gpus=1 or 0"
    if rollout.engine == "transformers" and on_gpus:
        yield f"rollout.engine=transformers contradicts weights.backend={backend}, which vLLM alone has; set weights.backend=auto"
    most_actors = max(rollout.num_actors, rollout.max_actors or 1)
    if learner.num_gpus == 0 and rollout.engine == "vllm" and 0 < rollout.num_gpus < 1 < most_actors:
        several = actors if rollout.num_actors > 1 else f"rollout.max_actors={rollout.max_actors}"
        yield f"rollout.num_gpus={rollout.num_gpus:g} contradicts {several}: vLLM engines cannot share a GPU; set rollout.num_gpus=1 or 0"
    if rollout.num_gpus == 0 or learner.num_gpus == 0:
        return
    gpus = f"rollout.num_gpus={rollout.num_gpus:g} and learner.num_gpus={learner.num_gpus:g}"
    one_gpu = rollout.num_gpus + learner.num_gpus <= 1
    one_pair = one_gpu and most_actors == 1 and learner.num_ranks == 1
    if backend == "ipc" and not one_pair:
        yield (
            f"weights.backend=ipc contradicts {gpus} with {actors} and {ranks}: it serves one RolloutActor and one rank that share "
            "one GPU; set one of each with rollout.num_gpus=0.5 and learner.num_gpus=0.5, or weights.backend=auto"
        )
    uses_nccl = backend == "nccl" or (backend == "auto" and rollout.engine == "vllm" and not one_pair)
    if uses_nccl and not rollout.num_gpus == learner.num_gpus == 1:
        remedy = " or weights.backend=ipc" if one_pair else ""
        yield (
            f"weights.backend={backend} contradicts {gpus} with {actors} and {ranks}: between them nccl carries the weights, and needs "
            f"a whole GPU on either side; set rollout.num_gpus=1 and learner.num_gpus=1{remedy}"
        )
    if one_gpu and rollout.engine == "vllm" and rollout.gpu_memory_utilization > MAX_SHARED_GPU_MEMORY:
        yield (
            f"rollout.gpu_memory_utilization={rollout.gpu_memory_utilization:g} contradicts {gpus}, which share a GPU: too little is "
            f"left for the learner; set rollout.gpu_memory_utilization={MAX_SHARED_GPU_MEMORY} or less"
        )
