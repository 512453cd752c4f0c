"""Tiny random models and made-up trajectories for the learner's tests."""

from __future__ import annotations

import random

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from toolrl_ray.config import RunConfig
from toolrl_ray.types import NO_VERSION, EpisodeRequest, StopReason, Task, Trajectory

VOCAB = 101


def save_model(path, kind: str = "tied", seed: int = 0) -> str:
    """A random float32 model of 2 layers in `path`: "tied" and "untied" Llama, or "gpt2" with tied weights and dropout 0.1."""
    torch.manual_seed(seed)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=256))
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB, hidden_size=48, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=kind == "tied", initializer_range=0.1,
            )
        )  # fmt: skip
    model.save_pretrained(path)
    return str(path)


def count_checkpoints(model) -> list[int]:
    """Grows with every forward of a layer that checkpoints its activations."""
    counted: list[int] = []
    for layer in model.modules():
        if run := getattr(layer, "_gradient_checkpointing_func", None):
            layer._gradient_checkpointing_func = lambda *args, run=run, **kwargs: counted.append(1) or run(*args, **kwargs)
    return counted


def trajectory(
    turns: list[tuple[list[int], bool]], reward: float = 0.0, name: str = "0", group: str = "g", logprob: float = -4.0
) -> Trajectory:
    """turns: (token ids, sampled by the policy) in order."""
    token_ids = [token for tokens, _ in turns for token in tokens]
    mask = [sampled for tokens, sampled in turns for _ in tokens]
    return Trajectory(
        request=EpisodeRequest(name, group, Task(name, "", "", "test")),
        token_ids=token_ids,
        loss_mask=mask,
        rollout_logprobs=[logprob if sampled else 0.0 for sampled in mask],
        policy_versions=[0 if sampled else NO_VERSION for sampled in mask],
        segments=[],
        tool_calls=[],
        stop_reason=StopReason.SUBMITTED,
        num_turns=sum(sampled for _, sampled in turns),
        duration_s=0.0,
        reward=reward,
    )


def random_trajectories(num_rows: int, seed: int = 0, group_size: int = 1) -> list[Trajectory]:
    """Prompt, policy, observation, policy; lengths differ; the last row of four or more has nothing trained."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(rng.randint(low, high))]

    rows = []
    for i in range(num_rows):
        trained = not (num_rows >= 4 and i == num_rows - 1)
        turns = [(tokens(2, 8), False), (tokens(1, 9), trained), (tokens(1, 12), False), (tokens(1, 4), trained)]
        rows.append(trajectory(turns, rng.choice([0.0, 1.0]), str(i), f"g{i // group_size}", -rng.uniform(3.5, 5.5)))
    return rows


def run_config(**sections) -> RunConfig:
    """run_config(algo={...}, learner={...}): the defaults of the project with one thread, and these changes."""
    return RunConfig.model_validate({"recipe": "test"} | sections)


class NoiseWatch:
    """Finds the weights that AdamW, in its first steps, moves by rounding noise.

    AdamW moves a weight by lr * m / (sqrt(v) + 1e-8). Where every gradient so far is as small as the rounding error of a
    float32 sum (1e-9 to 5e-8 here), that quotient is arbitrary between -1 and 1, and two correct computations that add in
    different orders part by up to lr. Such weights are a handful in 50,000; everywhere else results must agree.
    """

    def __init__(self, learner, below: float = 1e-6):
        self.noisy = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in learner.engine.module.named_parameters()}
        optimizer, step = learner.engine.optimizer, learner.engine.optimizer.step
        beta2 = optimizer.defaults["betas"][1]

        def watched() -> None:
            step()
            for name, p in learner.engine.module.named_parameters():
                state = optimizer.state[p]
                size = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt()
                self.noisy[name] |= (size > 0) & (size < below)

        optimizer.step = watched

    def distance(self, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        """Largest difference outside the noise. Names of `a` and `b` are those of named_parameters, or without their "lm."."""
        noisy = self.noisy | {name.removeprefix("lm."): mask for name, mask in self.noisy.items()}
        return max(float(torch.where(noisy[name], 0.0, (a[name] - b[name]).abs()).max()) for name in a if name in noisy)

    def share(self, prefix: str = "") -> float:
        """Of the weights whose name starts with prefix."""
        masks = [mask for name, mask in self.noisy.items() if name.startswith(prefix)]
        return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
