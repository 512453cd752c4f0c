"""`PPOTrainer` as people who come from TRL know it, over this project's learner: `step(queries, responses, rewards, masks)`.

It trains the model in place, so that the `TextEnvironment` that holds the same model samples from what was learned.

Letters: B = rows, Q = tokens of one query, R = tokens of one response, A = trained tokens of the longest row.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from toolrl_ray.config import RunConfig
from toolrl_ray.errors import ConfigError
from toolrl_ray.learner.batch import Batch
from toolrl_ray.learner.lora import adapters_off
from toolrl_ray.learner.model import PolicyWithValue, eval_mode, leave_nothing_to_chance
from toolrl_ray.learner.targets import Targets
from toolrl_ray.learner.update import Learner
from toolrl_ray.ppo_statistics import row_statistics, update_statistics
from toolrl_ray.pretrained import share_weights
from toolrl_ray.text_settings import in_short
from toolrl_ray.types import NO_VERSION, EpisodeRequest, StopReason, Task, Trajectory

KL_PENALTIES = {"kl": "k1", "mse": "k2"}
# Where a setting of PPOConfig goes in the configuration tree, for those that go there as they are.
PLACES = {
    "learning_rate": ("learner", "lr"),
    "ppo_epochs": ("algo", "num_epochs"),
    "init_kl_coef": ("algo", "kl_coef"),
    "target": ("algo", "kl_target"),
    "horizon": ("algo", "kl_horizon"),
    "gamma": ("algo", "gamma"),
    "lam": ("algo", "gae_lambda"),
    "cliprange": ("algo", "clip_eps_low"),
    "cliprange_value": ("algo", "clip_value"),
    "vf_coef": ("algo", "vf_coef"),
    "max_microbatch_tokens": ("learner", "max_microbatch_tokens"),
    "temperature": ("rollout", "temperature"),
    "seed": ("", "seed"),
}
# What stands for what TRL's trainer takes or has.
INSTEAD = {
    **dict.fromkeys(("dataset", "data_collator", "dataloader"), "give step one batch's rows"),
    **dict.fromkeys(("optimizer", "lr_scheduler"), "it is AdamW at PPOConfig's learning_rate"),
    "log_stats": "log what step returns",
    "generate": "TextEnvironment.run samples, as does the model's own generate",
}
# Those that go nowhere as they are, and what each is.
OWN: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("batch_size", "mini_batch_size", "gradient_accumulation_steps"), (Integral, "a whole number")),
    **dict.fromkeys(("adap_kl_ctrl", "early_stopping"), (bool, "True or False")),
    "target_kl": (Real, "a number"),
}


@dataclass(init=False)
class PPOConfig:
    """TRL's names and defaults. An optimiser step is taken on mini_batch_size * gradient_accumulation_steps rows.

    max_grad_norm: None clips nothing. early_stopping: no further step on a batch whose approximate KL from the policy that sampled it
    is above 1.5 * target_kl. kl_penalty: "kl" or "mse".
    Two are not TRL's: temperature, that of generation_kwargs, and max_microbatch_tokens, which bounds the memory of one forward pass.
    """

    learning_rate: float = 1.41e-5
    batch_size: int = 128
    mini_batch_size: int = 128
    gradient_accumulation_steps: int = 1
    ppo_epochs: int = 4
    adap_kl_ctrl: bool = True
    init_kl_coef: float = 0.2
    kl_penalty: str = "kl"
    target: float = 6.0
    horizon: float = 10000.0
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    max_grad_norm: float | None = None
    early_stopping: bool = False
    target_kl: float = 1.0
    seed: int = 0
    temperature: float = 1.0
    max_microbatch_tokens: int = 8192

    def __init__(self, **settings: Any):
        """Raises ConfigError, in one line, for a setting that is not there or has an impossible value."""
        defaults = {field.name: field.default for field in fields(type(self))}
        if unknown := [name for name in settings if name not in defaults]:
            raise ConfigError(f"PPOConfig has no {unknown[0]!r}; it has {', '.join(defaults)}; what step() returns is yours to log")
        for name, value in (defaults | settings).items():
            setattr(self, name, value)
        self.run_config("cpu")

    def run_config(self, device_type: str) -> RunConfig:
        """The same in this project's names. Raises ConfigError."""
        for name, (kind, what) in OWN.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and (name != "target_kl" or self.early_stopping):
                raise ConfigError(f"PPOConfig: {name}={value!r}: give {what}")
        rows = self.mini_batch_size * self.gradient_accumulation_steps
        if not (rows >= 1 and self.batch_size >= 1 and self.batch_size % rows == 0):
            step = f"mini_batch_size={self.mini_batch_size} * gradient_accumulation_steps={self.gradient_accumulation_steps}"
            raise ConfigError(f"batch_size={self.batch_size} is no multiple of {step}")
        if self.kl_penalty not in KL_PENALTIES:
            raise ConfigError(f"kl_penalty={self.kl_penalty!r}; allowed: {', '.join(KL_PENALTIES)}")
        tree: dict[str, Any] = {
            "recipe": "ppo",
            "learner": {
                "num_gpus": float(device_type != "cpu"),
                "adam_betas": (0.9, 0.999),
                "max_grad_norm": math.inf if self.max_grad_norm is None else self.max_grad_norm,
            },
            "rollout": {},
            "algo": {
                "num_minibatches": self.batch_size // rows,
                "clip_eps_high": self.cliprange,
                "kl_controller": "adaptive" if self.adap_kl_ctrl else "fixed",
                "kl_estimator": KL_PENALTIES[self.kl_penalty],
                "target_kl": 1.5 * self.target_kl if self.early_stopping else None,
            },
        }
        for name, (section, key) in PLACES.items():
            (tree[section] if section else tree)[key] = getattr(self, name)
        try:
            return RunConfig.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            key = first["loc"][-1]
            name = next((name for name, (_, place) in PLACES.items() if place == key), key)
            raise ConfigError(f"PPOConfig: {name}={first['input']!r}: {first['msg']}") from None


class PPOTrainer:
    """config: a PPOConfig. model: a causal LM, or anything that holds one as `pretrained_model`; it is trained in place, together with a
    value head that the trainer makes. ref_model: what the KL penalty is measured against (default: the model as it is now, with its
    adapters off; it is a copy unless adapters alone are trained).
    tokenizer: saved with the model, needed for nothing else. Seeds torch's global generator with config.seed, as TRL does.

    Raises ConfigError for a model that cannot be trained here.
    """

    def __init__(self, config: PPOConfig, model: Any, ref_model: Any = None, tokenizer: Any = None, **others: Any):
        for name in others:
            raise ConfigError(_has_no(name))
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self._lm = causal_lm(model)
        reference = _as_it_is_now(self._lm) if ref_model is None else causal_lm(ref_model)
        self._models = nn.ModuleList([self._lm] if reference is None else [self._lm, reference])
        trained = {id(p) for p in self._lm.parameters() if p.requires_grad}
        if reference is not None and any(id(p) in trained for p in reference.parameters()):
            raise ConfigError("ref_model is the model itself or has weights of it, which change; give a copy of it, or leave ref_model out")
        if kinds := {p.dtype for p in self._lm.parameters() if p.requires_grad and p.dtype != torch.float32}:
            kind = str(kinds.pop()).removeprefix("torch.")
            raise ConfigError(f"the model's weights are {kind}, in which most steps of an optimiser are lost; give model.float()")
        device = self._lm.device
        if device.type not in ("cpu", "cuda") or device.index:
            raise ConfigError(f"the model is on {device}; the trainer works on cpu or cuda:0, move the model there")
        torch.manual_seed(config.seed)
        self._learner = _Learner(config.run_config(device.type), self._lm, reference)
        self._num_steps = 0

    def step(
        self,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        scores: Sequence[Tensor | float],
        response_masks: Sequence[Tensor] | None = None,
    ) -> dict[str, Any]:
        """One PPO update on batch_size rows. response_masks: 1 on tokens to train (default: all of a response); a row may have none.

        Returns the statistics under TRL's names, see ppo_statistics.py. The reply to a batch
        without a trained token has the same names and changes nothing. Raises ConfigError for rows that do not fit together.
        """
        rows = self._trajectories(queries, responses, scores, response_masks)
        self._num_steps += 1
        with eval_mode(self._models):
            leave_nothing_to_chance(self._lm)
            metrics = self._learner.update(rows)
        statistics = update_statistics(metrics, self._learner.config, len(rows), self._learner.seen)
        return statistics | row_statistics(queries, responses, [row.reward for row in rows])

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_has_no(name))

    def save_pretrained(self, directory: str) -> None:
        """The model and, where there is one, its tokenizer as a Hugging Face folder."""
        self._lm.save_pretrained(directory)
        share_weights(Path(directory))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)

    def _trajectories(self, queries: Any, responses: Any, scores: Any, masks: Any) -> list[Trajectory]:
        for name, tensors in (("query", queries), ("response", responses), ("mask", () if masks is None else masks)):
            for i, tensor in enumerate(tensors):
                if not hasattr(tensor, "ndim"):
                    raise ConfigError(f"row {i}: the {name} is a {type(tensor).__name__}; give a tensor")
                if tensor.ndim != 1:
                    raise ConfigError(f"row {i}: the {name} has shape {list(tensor.shape)}; give one dimension, a row's tokens alone")
        masks = [torch.ones(len(response)) for response in responses] if masks is None else masks
        counts = {"queries": len(queries), "responses": len(responses), "scores": len(scores), "response_masks": len(masks)}
        if set(counts.values()) != {self.config.batch_size}:
            raise ConfigError(f"batch_size={self.config.batch_size}, but got {', '.join(f'{n} {name}' for name, n in counts.items())}")
        rows = []
        for i, (query, response, score, mask) in enumerate(zip(queries, responses, scores, masks, strict=True)):
            if len(mask) != len(response):
                raise ConfigError(f"row {i}: the mask has {len(mask)} entries for a response of {len(response)} tokens")
            try:
                reward = float(score)
            except (TypeError, ValueError, RuntimeError):
                raise ConfigError(f"row {i}: the score is {in_short(score)}; give one number") from None
            name = f"{self._num_steps}:{i}"
            is_trained = [False] * len(query) + [bool(x) for x in mask.tolist()]
            rows.append(
                Trajectory(
                    request=EpisodeRequest(name, name, Task(name, "", "", "ppo_trainer")),
                    token_ids=[*query.tolist(), *response.tolist()],
                    loss_mask=is_trained,
                    rollout_logprobs=[0.0] * len(is_trained),  # unknown here, see _Learner
                    policy_versions=[self._learner.num_updates if trained else NO_VERSION for trained in is_trained],
                    segments=[],
                    tool_calls=[],
                    stop_reason=StopReason.SUBMITTED,
                    num_turns=1,
                    duration_s=0.0,
                    reward=reward,
                )
            )
        return rows


class _Learner(Learner):
    """The learner over models in memory, of rows whose sampler's logprobs nobody knows: they are taken for the learner's own, so that
    every truncated importance weight is 1. reference: None for lm with its adapters off. seen: batch and targets of the last update, None
    where nothing was trained."""

    def __init__(self, config: RunConfig, lm: nn.Module, reference: nn.Module | None):
        self._lm = lm
        self.seen: tuple[Batch, Targets] | None = None
        # Where the penalty is 0 no reference is loaded from a folder: this one is in memory.
        algo = config.algo.model_copy(update={"kl_coef": 0.0})
        super().__init__(config.model_copy(update={"algo": algo}), "", in_process=True)
        self.config = config
        self.kl_controller.value = config.algo.kl_coef
        self.reference = self._without_adapters
        if reference is not None:  # not `frozen`: it is the user's
            self.reference = PolicyWithValue(reference, critic="none", temperature=config.rollout.temperature).to(self.engine.device)

    def _load_module(self, dtype: str) -> PolicyWithValue:
        return PolicyWithValue(self._lm, temperature=self.config.rollout.temperature)

    def update(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        self.seen = None
        self.engine.module.zero_grad()  # of an update that broke off, or the user's own
        return super().update(trajectories)

    def _targets(self, batch: Batch) -> Targets:
        targets = super()._targets(batch)
        targets = replace(targets, weights=torch.ones_like(targets.weights))
        self.seen = batch, targets
        return targets


def _has_no(name: str) -> str:
    return f"PPOTrainer has no {name}; {INSTEAD.get(name, 'it has step and save_pretrained')}"


def causal_lm(model: Any) -> Any:
    """The causal LM that the model is, or holds as `pretrained_model`. Raises ConfigError."""
    lm = getattr(model, "pretrained_model", model)
    config = getattr(lm, "config", None)
    if not isinstance(lm, nn.Module) or config is None:
        raise ConfigError(f"model is a {type(model).__name__}; give a transformers causal LM, or what holds one as pretrained_model")
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"model is a {type(lm).__name__}, an encoder-decoder; give a causal LM")
    if getattr(getattr(lm, "active_peft_config", None), "is_prompt_learning", False):
        kind = lm.active_peft_config.peft_type.value
        raise ConfigError(f"model has virtual tokens (peft's {kind}), with which logprobs would be wrong; give adapters such as LoRA's")
    return lm


def _as_it_is_now(lm: nn.Module) -> nn.Module | None:
    """A copy of lm with its adapters off; None where nothing but adapters is trained, since lm itself then is one whenever they are off."""
    with adapters_off(lm):
        return copy.deepcopy(lm) if any(p.requires_grad for p in lm.parameters()) else None
