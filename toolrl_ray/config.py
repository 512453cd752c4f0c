"""One configuration tree for a run. Unknown keys raise, contradictions raise with both values, and the resolved tree is
saved with the run. A recipe is a YAML file of this shape; recipe.py loads it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from toolrl_ray.config_task import TaskConfig
from toolrl_ray.contradictions import contradictions
from toolrl_ray.episode.shown import SHOWN, check_template
from tools_service.config import PoolConfig, Section, ToolSet
from tools_service.protocol import ToolStatus

MIN_TEMPERATURE = 0.01  # vLLM takes a lower one for this, without a word, and the learner would divide by another than the sampler
MAX_SEED = 2**31  # NumPy's is below 2**32, and each engine adds its own stride
Beta = Annotated[float, Field(ge=0, lt=1)]


class LoraConfig(Section):
    """Adapters that are trained in place of the weights, each alpha / rank * B A, without dropout. target_modules: names of modules or
    their ends, such as q_proj; "all-linear" is every linear layer but the output embedding."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    target_modules: str | list[str] = Field("all-linear", min_length=1)


class PolicyConfig(Section):
    """Where the policy comes from: `path` (a folder or a Hub name), or "tiny", made and warm-started on this machine. lora: null trains
    all of it."""

    path: str = Field("tiny", min_length=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    separate_critic: bool = False
    lora: LoraConfig | None = None

    @field_validator("path")
    @classmethod
    def _absolute(cls, value: str) -> str:
        """A folder that is there; anything else may be a Hub name, and is looked at before the run starts (preflight.py)."""
        folder = os.path.expanduser(value)
        return str(Path(folder).absolute()) if value != "tiny" and os.path.isdir(folder) else value


class BootstrapConfig(Section):
    """The tiny policy and its supervised warm start. Everything here is part of its cache key."""

    num_layers: int = Field(3, ge=1)
    hidden_size: int = Field(128, ge=32, multiple_of=32)
    num_heads: int = Field(4, ge=1)
    max_context_tokens: int = Field(256, ge=64)
    tie_embeddings: bool = True
    num_steps: int = Field(1000, ge=1)
    batch_size: int = Field(32, ge=1)
    lr: float = Field(2e-3, gt=0)
    tool_share: float = Field(0.4, ge=0, lt=0.5)  # demonstrations that use the tool; the others guess
    seed: int = Field(0, ge=0, lt=MAX_SEED)


class ToolsConfig(ToolSet):
    """The tools of the run, over names, custom, options and pools of ToolSet. num_replicas, num_cpus, max_in_flight: of every tool whose
    pool does not say otherwise. app: a service that runs already (`toolrl tools serve`) and others may share; null starts one's own."""

    prefix: ClassVar[str] = "tools."

    app: str | None = Field(None, min_length=1)
    num_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(0.1, gt=0)  # per replica
    max_in_flight: int = Field(64, ge=1)  # requests at once per replica
    max_queued: int = Field(4096, ge=1)  # calls of a tool that may wait in a client before OVERLOADED
    cache_size: int = Field(0, ge=0)  # results of tools that always answer alike that a client keeps; 0: none

    @field_serializer("pools")
    def _as_set(self, pools: dict[str, PoolConfig]) -> dict[str, Any]:
        """What a pool does not say stays unsaid in the saved configuration, so that it is what the keys above say there too."""
        return {name: pool.model_dump(exclude_unset=True) for name, pool in pools.items()}

    def pool(self, name: str) -> PoolConfig:
        shared = {"min_replicas": self.num_replicas, "num_cpus": self.num_cpus, "max_in_flight": self.max_in_flight}
        own = self.pools[name].model_dump(exclude_unset=True) if name in self.pools else {}
        return PoolConfig(**shared | own)

    @model_validator(mode="after")
    def _keys_that_count(self) -> ToolsConfig:
        for key in ("custom", "options", "pools", "num_replicas", "num_cpus", "max_in_flight", "start_timeout_s"):
            default = type(self).model_fields[key].default
            if self.app is not None and getattr(self, key) != default:
                value = self.model_dump(exclude_unset=True)[key]
                remedy = f"the running service has its own; set tools.{key}={default} or tools.app=null"
                raise ValueError(f"tools.app={self.app!r} contradicts tools.{key}={value}: {remedy}")
        return self


class EpisodeConfig(Section):
    """call_format: how the policy writes calls. `text`: the markers `<request><Tool>...<call>` and `<submit>`. `hermes`: JSON in
    `<tool_call>`, for chat models; tools, task and results go through the model's chat template, and a turn without a call submits."""

    call_format: Literal["text", "hermes"] = "text"
    system: str | None = Field(None, min_length=1)  # the system message of a chat; null leaves it to the model's template
    max_turns: int = Field(4, ge=1)  # completions per episode
    max_turn_tokens: int = Field(64, ge=1)
    max_observation_tokens: int = Field(32, ge=1)  # of a tool's output, without the markers around it
    max_context_tokens: int = Field(256, ge=8)  # prompt and everything after it
    tool_deadline_s: float = Field(10, gt=0)
    turn_deadline_s: float = Field(120, gt=0)
    episode_deadline_s: float = Field(300, gt=0)
    shown: dict[ToolStatus, str] = {}  # what the policy sees of a call, by its status: templates with {text} and {tool}

    @field_validator("shown")
    @classmethod
    def _templates(cls, value: dict[ToolStatus, str]) -> dict[ToolStatus, str]:
        """Those that are not given are the default's, so that the saved configuration holds every one."""
        for status, template in value.items():
            try:
                check_template(template)
            except ValueError as error:
                raise ValueError(f"episode.shown.{status}={error}") from None
        return {**SHOWN, **value}


class RolloutConfig(Section):
    """num_actors: that the run begins with. max_actors: so many as the cluster comes to have room for join it later; null: no more."""

    engine: Literal["vllm", "transformers"] = "vllm"
    num_actors: int = Field(1, ge=1)
    max_actors: int | None = Field(None, ge=1)
    num_cpus: float = Field(1, ge=0)  # per RolloutActor
    num_gpus: float = Field(0, ge=0)
    temperature: float = Field(1.0, ge=MIN_TEMPERATURE)
    max_in_flight: int = Field(64, ge=1)  # episodes per actor; one that waits for its tool leaves its place to another
    num_threads: int = Field(1, ge=1)  # of the engine on CPU
    kv_cache_gib: float = Field(1, gt=0)  # on CPU
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    start_timeout_s: float = Field(600, gt=0)
    collect_timeout_s: float = Field(1800, gt=0)  # of an evaluation on its own
    max_tries: int = Field(3, ge=1)  # per episode, when actors die under it


class AlgoConfig(Section):
    """Masked PPO and its relatives. Names as in the papers; see toolrl_ray/algos for the formulas."""

    advantage: Literal["gae", "grpo", "rloo", "reinforce_pp"] = "gae"
    gamma: float = Field(1.0, gt=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    whiten_advantages: bool = True  # of gae: reinforce_pp always does it, grpo and rloo never
    clip_eps_low: float = Field(0.2, gt=0, lt=1)
    clip_eps_high: float = Field(0.2, gt=0)
    clip_value: float = Field(0.2, gt=0)
    vf_coef: float = Field(0.1, ge=0)
    ent_coef: float = Field(0.0, ge=0)
    kl_coef: float = Field(0.05, ge=0)
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_in: Literal["reward", "loss"] = "reward"
    kl_controller: Literal["fixed", "adaptive"] = "adaptive"
    kl_target: float = Field(6.0, gt=0)  # nats per episode, adaptive controller
    kl_horizon: float = Field(10000, gt=0)  # episodes, adaptive controller
    target_kl: float | None = Field(0.1, gt=0)  # approx_kl above which the remaining updates of a batch are skipped
    tis_clip: float = Field(2.0, gt=0)  # cap of the truncated importance weight old/rollout
    tis_level: Literal["token", "sequence"] = "token"  # sequence: one weight per episode, its tokens' product; for short episodes
    ratio_band: tuple[float, float] | None = None  # tokens with old/rollout outside take no part in the policy loss
    num_epochs: int = Field(2, ge=1)
    num_minibatches: int = Field(2, ge=1)

    @field_validator("ratio_band")
    @classmethod
    def _around_one(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 <= value[0] < 1 < value[1]:
            raise ValueError(f"algo.ratio_band={list(value)} must be [low, high] with 0 <= low < 1 < high, such as [0.5, 5], or null")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> AlgoConfig:
        if self.advantage in ("grpo", "rloo") and self.kl_coef > 0 and self.kl_in == "reward":
            raise ValueError(
                f"algo.advantage={self.advantage} contradicts algo.kl_in=reward: it has one reward per episode; set algo.kl_in=loss"
            )
        if self.kl_in == "loss" and self.kl_coef > 0 and self.kl_estimator == "k1":
            raise ValueError(
                "algo.kl_estimator=k1 contradicts algo.kl_in=loss: the gradient of k1 is 0 in expectation; set algo.kl_estimator=k2 or k3"
            )
        return self


class LearnerConfig(Section):
    num_ranks: int = Field(1, ge=1)
    num_cpus: float = Field(0.5, ge=0)  # per LearnerActor
    num_gpus: float = Field(0, ge=0)
    zero_stage: Literal[0, 1, 2, 3] = 0
    lr: float = Field(1e-3, gt=0)
    critic_lr: float | None = Field(None, gt=0)  # of the value head and of a separate critic; null: lr
    weight_decay: float = Field(0.0, ge=0)
    adam_betas: tuple[Beta, Beta] = (0.9, 0.95)
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=True)  # .inf clips nothing
    warmup_steps: int = Field(0, ge=0)  # of the learning rate, in optimiser steps
    max_microbatch_tokens: int = Field(8192, ge=1)
    gradient_checkpointing: bool = False
    num_threads: int = Field(1, ge=1)  # per rank, on CPU
    start_timeout_s: float = Field(600, gt=0)
    update_timeout_s: float = Field(1800, gt=0)


class WeightsConfig(Section):
    """kv_cache: of episodes that are under way when new weights come. recompute: by the new weights. keep: what the old ones computed
    stays, of their prompts too: cheaper, and a little off the policy that the tokens are then said to be of."""

    backend: Literal["auto", "object_store", "nccl", "ipc"] = "auto"
    kv_cache: Literal["recompute", "keep"] = "recompute"
    timeout_s: float = Field(300, gt=0)  # per phase


class StreamConfig(Section):
    """Between rollout and learner, see stream/. max_staleness_steps: how many updates older than the weights that a batch updates its
    oldest token may be; 0 collects, updates and syncs in turn, more lets rollout run ahead."""

    max_staleness_steps: int = Field(0, ge=0)
    filter_zero_signal: bool = False  # a group whose episodes all have the same reward is replaced by another task's
    max_filtered: int = Field(256, ge=1)  # groups per step; those above it are trained on as they are
    group_deadline_s: float | None = Field(None, gt=0)  # from its first finished episode; then it goes without the late ones, or not at all
    group_quorum: int = Field(2, ge=1)  # finished episodes with which it goes


class CheckpointConfig(Section):
    """Whole checkpoints in the run folder, from which `toolrl train --resume` and a lost learner go on."""

    every_steps: int = Field(10, ge=0)  # and at the steps of eval.every_steps; 0: none
    keep_last: int = Field(2, ge=1)  # besides the best by evaluation


class TrainConfig(Section):
    num_steps: int = Field(40, ge=0)
    tasks_per_step: int = Field(64, ge=1)
    group_size: int = Field(1, ge=1)  # episodes per task
    stall_timeout_s: float = Field(3600, gt=0)  # no group complete, no job done: the run ends and says who waits for whom
    max_learner_restarts: int = Field(3, ge=0)  # with no checkpoint written in between


class EvalConfig(Section):
    """Every task once, greedily; and `num_samples` times at `temperature`, for pass@k."""

    num_tasks: int = Field(500, ge=1)
    num_samples: int | None = Field(None, ge=0)  # per task; null: 4 in `toolrl eval`, none in the evaluations of a training run
    temperature: float = Field(1.0, ge=MIN_TEMPERATURE)  # of those samples
    every_steps: int = Field(0, ge=0)  # so often, the tasks ride along with the next step's collection; 0: only before and after
    max_in_flight: int = Field(128, ge=1)  # episodes per actor, of an evaluation on its own


class TrackingConfig(Section):
    wandb: Literal["auto", "offline", "online", "off"] = "auto"
    wandb_project: str = Field("toolrl", min_length=1, max_length=128)
    wandb_tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = []  # a study adds the name of its folder
    num_transcripts: int = Field(8, ge=0)  # per step, in the W&B table

    @field_validator("wandb", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML 1.1 reads off as false

    @field_validator("wandb_project")
    @classmethod
    def _without_signs(cls, value: str) -> str:
        """Else wandb refuses it when the run begins, and the run goes on without."""
        if any(sign in value for sign in "/\\#?%:"):
            raise ValueError("the name of a W&B project holds none of / \\ # ? % :; give an entity in WANDB_ENTITY")
        return value


class RunConfig(Section):
    recipe: str = Field(pattern=r"^[^/.][^/]*$")  # a part of the default run_dir
    seed: int = Field(0, ge=0, lt=MAX_SEED)
    run_dir: str | None = None  # default: runs/RECIPE-TIME
    policy: PolicyConfig = PolicyConfig()
    bootstrap: BootstrapConfig = BootstrapConfig()
    task: TaskConfig = TaskConfig()
    tools: ToolsConfig = ToolsConfig()
    episode: EpisodeConfig = EpisodeConfig()
    rollout: RolloutConfig = RolloutConfig()
    algo: AlgoConfig = AlgoConfig()
    learner: LearnerConfig = LearnerConfig()
    weights: WeightsConfig = WeightsConfig()
    stream: StreamConfig = StreamConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        for message in contradictions(self):
            raise ValueError(message)
        return self
