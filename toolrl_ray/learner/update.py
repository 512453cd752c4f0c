"""The learner: masked PPO and its relatives on whole batches of trajectories.

Contract of one update: every rank is given the same whole list. Which rows form a minibatch depends on config.seed and the
update's number alone; which of them a rank works on, and in which microbatches, depends on their lengths alone. So ranks agree on the plan
without asking, and the result is the same for any number of ranks, up to the order in which floats are added.

Letters: N = trained tokens of one microbatch on one rank.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from toolrl_ray.algos import losses, packing
from toolrl_ray.algos.kl_control import AdaptiveKLController, FixedKLController
from toolrl_ray.config import RunConfig
from toolrl_ray.errors import LearnerError
from toolrl_ray.learner.batch import Batch, make_batch
from toolrl_ray.learner.checkpoint_names import CheckpointWeights
from toolrl_ray.learner.engine import Engine, Forward, TorchEngine
from toolrl_ray.learner.export import write_policy
from toolrl_ray.learner.lora import adapters_off, add_adapters
from toolrl_ray.learner.model import PolicyWithValue, leave_nothing_to_chance, load_policy, load_trunk
from toolrl_ray.learner.state import StateWriter, restore, snapshot
from toolrl_ray.learner.targets import Targets, make_targets, score, target_metrics
from toolrl_ray.types import Trajectory

# Sums over tokens, in this order in one tensor per microbatch.
STATS = ("ppo/policy_loss", "ppo/value_loss", "ppo/entropy", "ppo/approx_kl", "ppo/pg_clipfrac", "ppo/vf_clipfrac")
APPROX_KL = STATS.index("ppo/approx_kl")


class Learner:
    """One rank of the learner.

    policy_dir: Hugging Face folder (or Hub name) of the initial policy, which is also the reference. With policy.lora it is in memory
        once: the reference is the policy with its adapters off.
    init_method: "tcp://host:port" that rank 0 listens on; None for a single rank.
    in_process: plain PyTorch instead of DeepSpeed, one rank, config.learner.zero_stage ignored.
    policy_version: 0, then one more for every update that changed the weights.
    num_updates: calls of `update`, those that changed nothing included: the version of the weights in `Trajectory.policy_versions`.
    Raises UserError for a folder that holds no model.
    """

    def __init__(
        self,
        config: RunConfig,
        policy_dir: str,
        rank: int = 0,
        world_size: int = 1,
        init_method: str | None = None,
        in_process: bool = False,
    ):
        self.config = config
        self.policy_dir = policy_dir
        self.rank = rank
        self.world_size = world_size
        self.policy_version = 0
        self.num_updates = 0
        self._writer = StateWriter(config.learner.update_timeout_s)
        algo = config.algo
        if algo.kl_controller == "adaptive":
            self.kl_controller: FixedKLController = AdaptiveKLController(algo.kl_coef, algo.kl_target, algo.kl_horizon)
        else:
            self.kl_controller = FixedKLController(algo.kl_coef)
        dtype = "float32" if in_process else config.policy.dtype  # the plain engine casts in the forward
        module = self._load_module(dtype)
        if in_process:
            self.engine: Engine = TorchEngine(module, config.learner, config.policy.dtype)
        else:
            from toolrl_ray.learner.deepspeed_engine import DeepSpeedEngine

            self.engine = DeepSpeedEngine(module, config.learner, config.policy.dtype, rank, world_size, init_method)
        self.reference: Forward | None = None
        if algo.kl_coef > 0 and config.policy.lora:
            self.reference = self._without_adapters
        elif algo.kl_coef > 0:
            lm = load_policy(policy_dir, dtype)
            self.reference = self.engine.frozen(PolicyWithValue(lm, critic="none", temperature=config.rollout.temperature))

    def _load_module(self, dtype: str) -> PolicyWithValue:
        policy, algo = self.config.policy, self.config.algo
        critic = "none" if algo.advantage != "gae" else "separate" if policy.separate_critic else "shared"
        lm = load_policy(self.policy_dir, dtype)
        if policy.lora:
            add_adapters(lm, policy.lora, self.config.seed)
        trunk = load_trunk(self.policy_dir, dtype) if critic == "separate" else None
        if self.config.learner.gradient_checkpointing:
            for model in filter(None, (lm, trunk)):
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        module = PolicyWithValue(lm, critic, trunk, self.config.rollout.temperature, entropy_grad=algo.ent_coef > 0)
        return leave_nothing_to_chance(module)

    @torch.no_grad()
    def _without_adapters(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with adapters_off(self.engine.module.lm):
            return self.engine(*args, **kwargs)

    def update(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """One PPO update on one batch; a collective. Returns metrics; a batch without a trained token changes nothing.

        ppo/policy_loss to ppo/vf_clipfrac are means over the tokens of the minibatches that were applied; ppo/approx_kl_last is
        that of the last minibatch looked at, the one that stopped the update included.
        Raises LearnerError for an empty or impossible batch, and when the policy's logprobs or a gradient are not finite.
        """
        start = time.perf_counter()
        batch = make_batch(trajectories, self.num_updates, self.engine.device)
        metrics = {
            "env/reward_mean": float(batch.scores.mean()),
            "objective/kl_coef": self.kl_controller.value,
            "tokens/trained": float(batch.num_trained),
        }
        if batch.num_trained:
            targets = self._targets(batch)
            metrics |= target_metrics(batch, targets, self.config.algo)
            metrics |= self._train(batch, targets)
            if "objective/kl" in metrics:  # from the next update on
                self.kl_controller.update(metrics["objective/kl"], len(trajectories))
            self.policy_version += 1
        else:
            metrics |= {"ppo/num_updates": 0.0, "ppo/num_skipped_updates": 0.0, "ppo/lr": self.engine.lr}
        self.num_updates += 1
        return metrics | {"time/learner_update_s": time.perf_counter() - start}

    def _microbatches(self, batch: Batch, rows: Sequence[int]) -> list[list[int]]:
        """This rank's microbatches; rows without a trained token cost nothing."""
        rows = [row for row in rows if batch.counts[row]]
        return packing.plan(rows, batch.lengths, self.world_size, self.config.learner.max_microbatch_tokens)[self.rank]

    def _targets(self, batch: Batch) -> Targets:
        microbatches = self._microbatches(batch, range(len(batch.counts)))
        old_logprobs, old_values = score(self.engine, self.engine, batch, microbatches)
        if not bool(torch.isfinite(old_logprobs).all()):
            raise LearnerError(f"the policy's logprobs are not finite at policy version {self.policy_version}: training has diverged")
        ref_logprobs = score(self.reference, self.engine, batch, microbatches)[0] if self.reference else None
        values = old_values if self.config.algo.advantage == "gae" else None
        return make_targets(batch, self.config.algo, self.kl_controller.value, old_logprobs, values, ref_logprobs)

    def _train(self, batch: Batch, targets: Targets) -> dict[str, float]:
        algo = self.config.algo
        seeds = (f"{self.config.seed}/{self.num_updates}/{epoch}" for epoch in range(algo.num_epochs))
        minibatches = [rows for seed in seeds for rows in packing.minibatch_rows(len(batch.counts), algo.num_minibatches, seed)]
        minibatches = [rows for rows in minibatches if any(batch.counts[row] for row in rows)]
        total = torch.zeros(len(STATS), dtype=torch.float64)
        num_tokens, norms, approx_kl = 0, [], 0.0
        for i, rows in enumerate(minibatches):
            count = sum(batch.counts[row] for row in rows)
            # Before the first step the policy is the old one, and its KL is 0.
            norm, sums = self._step(batch, targets, rows, count, algo.target_kl if i else None)
            approx_kl = float(sums[APPROX_KL]) / count
            if norm is None:
                break
            norms.append(norm)
            total += sums
            num_tokens += count
        metrics = {name: float(x) / num_tokens for name, x in zip(STATS, total, strict=True)}
        return metrics | {
            "ppo/approx_kl_last": approx_kl,
            "ppo/grad_norm": sum(norms) / len(norms),
            "ppo/num_updates": float(len(norms)),
            "ppo/num_skipped_updates": float(len(minibatches) - len(norms)),
            "ppo/lr": self.engine.lr,
        }

    def _step(
        self, batch: Batch, targets: Targets, rows: list[int], num_tokens: int, max_kl: float | None
    ) -> tuple[float | None, Tensor]:
        """One optimiser step. Returns (gradient norm, STATS summed over all ranks); no step is taken, and the norm is None,
        where approx_kl is above max_kl already."""
        first, *others = self._microbatches(batch, rows)
        looked: list[Tensor] = []
        if max_kl is not None:
            with torch.no_grad():  # the first one's own forward shows its KL, so a minibatch of one microbatch costs nothing more
                looked = [self._loss(batch, targets, microbatch, num_tokens)[1] for microbatch in others]
        loss, stats = self._loss(batch, targets, first, num_tokens)
        if max_kl is not None:
            sums = self._global(sum(looked, stats))
            if not sums[APPROX_KL] / num_tokens <= max_kl:
                return None, sums
        self.engine.backward(loss, is_last=not others)
        seen = [stats]
        for i, microbatch in enumerate(others):
            loss, stats = self._loss(batch, targets, microbatch, num_tokens)
            self.engine.backward(loss, is_last=i == len(others) - 1)
            seen.append(stats)
        return self.engine.step(), self._global(sum(seen))

    def _global(self, sums: Tensor) -> Tensor:
        return self.engine.all_sum(sums).cpu()

    def _loss(self, batch: Batch, targets: Targets, rows: list[int], num_tokens: int) -> tuple[Tensor, Tensor]:
        """(this microbatch's share of the minibatch's loss, its STATS as float64 sums over its tokens). Without gradients, as for a
        look at approx_kl, the entropy is left out."""
        algo = self.config.algo
        logprobs, entropies, values = self.engine(*batch.select(rows), entropy=torch.is_grad_enabled())
        mask = torch.ones_like(logprobs, dtype=torch.bool)

        def flat(x: Tensor) -> Tensor:
            return x[rows][batch.mask[rows]] if rows else x.new_zeros(0)

        loss, policy = losses.policy_loss(
            logprobs, flat(targets.old_logprobs), flat(targets.advantages), mask, num_tokens,
            algo.clip_eps_low, algo.clip_eps_high, flat(targets.weights),
        )  # fmt: skip
        sums = [loss.detach() * num_tokens, 0.0, 0.0, policy["approx_kl"], policy["pg_clipfrac"], 0.0]
        if entropies is not None:
            sums[2] = entropies.detach().sum()
            loss = loss - algo.ent_coef * entropies.sum() / num_tokens
        if targets.returns is not None:
            value_loss, value = losses.value_loss(
                values, flat(targets.old_values), flat(targets.returns), mask, num_tokens, algo.clip_value
            )
            loss = loss + algo.vf_coef * value_loss
            sums[1], sums[5] = value_loss.detach() * num_tokens, value["vf_clipfrac"]
        if targets.ref_logprobs is not None and algo.kl_in == "loss":
            kl = losses.kl_estimate(logprobs, flat(targets.ref_logprobs), algo.kl_estimator)
            loss = loss + self.kl_controller.value * kl.sum() / num_tokens
        return loss, torch.stack([torch.as_tensor(x, dtype=torch.float64, device=self.engine.device) for x in sums])

    @torch.no_grad()
    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """The current policy's logprob of token_ids[1], token_ids[2], ..., each given those before it; a collective."""
        positions = torch.arange(len(token_ids) - 1, device=self.engine.device)
        ids = torch.tensor([list(token_ids)], device=self.engine.device)
        logprobs, _, _ = self.engine(ids, torch.zeros_like(positions), positions, entropy=False)
        return logprobs.tolist()

    def named_weights(self):
        """See `Engine.named_weights`."""
        return self.engine.named_weights()

    def weights_metadata(self) -> list[tuple[str, tuple[int, ...], str]]:
        """See `Engine.weights_metadata`."""
        return self.engine.weights_metadata()

    def weights_to_send(self) -> Engine | CheckpointWeights:
        """The policy's named weights, and their metadata, as the rollout engine takes them: transformers' has the names of the model."""
        return CheckpointWeights(self.engine) if self.config.rollout.engine == "vllm" else self.engine

    def save_policy(self, directory: str, tokenizer_dir: str) -> None:
        """Writes the policy and tokenizer_dir's tokenizer as a Hugging Face folder, whole or not at all; a collective. With LoRA the
        weights there are merged ones, and the folder `adapter` in it holds the adapter alone."""
        weights = {}
        for name, tensor in self.engine.named_weights():
            if self.rank == 0:
                weights[name] = tensor.cpu().clone()
        adapter = self.engine.adapter_weights()
        if self.rank == 0:
            write_policy(self.engine.module.lm, weights, adapter, directory, self.policy_dir, tokenizer_dir)

    def save_state(self, directory: str) -> None:
        """Everything that the next update depends on, into a folder that is there and that every rank can write to; a collective. The
        snapshot is taken here, and written beside what follows. See learner/state.py."""
        self._writer.start(directory, snapshot(self))

    def finish_save(self) -> None:
        """Waits until this rank's files are written. Raises LearnerError saying what could not be."""
        self._writer.finish()

    def load_state(self, directory: str) -> None:
        """Takes back what `save_state` wrote, with any engine, ZeRO stage and number of ranks; a collective.

        Raises LearnerError in one line, before it has changed anything, for a folder that is incomplete or of another model."""
        restore(self, directory)
