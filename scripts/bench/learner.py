"""The learner's update against a bare PyTorch loop: trained tokens per second, both sides in turn in one run.

    python scripts/bench/learner.py [--rows 128] [--rounds 7] [--engine deepspeed|torch] [--json FILE]

Both do the same work on the same model (the tiny policy's shape: 3 layers, width 128) and rows (30 to 120 tokens, about half of
them trained): old and reference logprobs, GAE, then epochs x minibatches of clipped policy and value loss, AdamW, clipping. The bare
loop is what one would write by hand for speed: rows of like length together, full logits, no accounting beyond the loss.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from toolrl_ray.config import RunConfig
from toolrl_ray.learner.update import Learner
from toolrl_ray.types import EpisodeRequest, StopReason, Task, Trajectory

VOCAB = 110


def make_model(folder: str) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=256, tie_word_embeddings=True, **shape)).save_pretrained(folder)


def make_rows(num_rows: int, rng: random.Random) -> list[Trajectory]:
    """Prompt, call, observation, answer."""
    rows = []
    for i in range(num_rows):
        length = rng.randint(30, 120)
        prompt, call, observation = (int(length * share) for share in (0.35, 0.35, 0.15))
        mask = [False] * prompt + [True] * call + [False] * observation
        mask += [True] * (length - len(mask))
        token_ids = [rng.randrange(VOCAB) for _ in range(length)]
        request = EpisodeRequest(str(i), str(i), Task(str(i), "", "", "bench"))
        logprobs = [-4.7 if m else 0.0 for m in mask]
        versions = [0 if m else -1 for m in mask]
        rows.append(
            Trajectory(request, token_ids, mask, logprobs, versions, [], [], StopReason.SUBMITTED, 2, 0.0, float(rng.random() < 0.5))
        )
    return rows


class BareLoop:
    """Masked PPO by hand, for this benchmark's configuration only."""

    def __init__(self, folder: str, config: RunConfig):
        self.config = config
        self.model, self.reference = (AutoModelForCausalLM.from_pretrained(folder).train() for _ in range(2))
        self.head = torch.nn.Linear(128, 1)
        torch.nn.init.zeros_(self.head.weight)
        self.parameters = [*self.model.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learner.lr, betas=config.learner.adam_betas, weight_decay=0.0)

    def forward(self, model, ids):
        """logprobs and values [b, l - 1] of the tokens after the first."""
        hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
        logp = model.lm_head(hidden).log_softmax(-1)
        return logp.gather(-1, ids[:, 1:, None]).squeeze(-1), self.head(hidden).squeeze(-1)

    def groups(self, rows):
        """Rows of like length, padded, within the token budget."""
        groups, budget = [], self.config.learner.max_microbatch_tokens
        for row in sorted(rows, key=lambda row: -len(row.token_ids)):
            if not groups or (len(groups[-1]) + 1) * len(groups[-1][0].token_ids) > budget:
                groups.append([])
            groups[-1].append(row)
        for group in groups:
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.token_ids) for row in group], batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.loss_mask) for row in group], batch_first=True)
            yield group, ids, mask[:, 1:]

    @torch.no_grad()
    def targets(self, rows):
        algo = self.config.algo
        old, ref, val, targets = {}, {}, {}, {}
        for group, ids, mask in self.groups(rows):
            logprobs, values = self.forward(self.model, ids)
            ref_logprobs, _ = self.forward(self.reference, ids)
            for i, row in enumerate(group):
                name, m = row.request.episode_id, mask[i]
                old[name], ref[name], val[name] = logprobs[i][m], ref_logprobs[i][m], values[i][m]
        for row in rows:
            name = row.request.episode_id
            rewards = -algo.kl_coef * (old[name] - ref[name])
            rewards[-1] += row.reward
            following = functional.pad(val[name][1:], (0, 1))
            deltas, carry, advantages = (rewards + algo.gamma * following - val[name]).tolist(), 0.0, []
            for delta in reversed(deltas):
                carry = delta + algo.gamma * algo.gae_lambda * carry
                advantages.append(carry)
            advantages = torch.tensor(advantages[::-1])
            targets[name] = old[name], val[name], advantages, advantages + val[name]
        everything = torch.cat([t[2] for t in targets.values()])
        mean, std = everything.mean(), everything.std()
        return {name: (a, b, (c - mean) / std, d) for name, (a, b, c, d) in targets.items()}

    def update(self, rows) -> None:
        algo, targets = self.config.algo, self.targets(rows)
        for _ in range(algo.num_epochs):
            order = random.sample(rows, len(rows))
            for part in range(algo.num_minibatches):
                minibatch = order[part :: algo.num_minibatches]
                num_tokens = sum(row.num_trained_tokens for row in minibatch)
                for group, ids, mask in self.groups(minibatch):
                    logprobs, values = self.forward(self.model, ids)
                    flat = (torch.cat(x) for x in zip(*(targets[row.request.episode_id] for row in group), strict=True))
                    old, old_values, advantages, returns = flat
                    ratio, values = (logprobs[mask] - old).exp(), values[mask]
                    clipped = ratio.clamp(1 - algo.clip_eps_low, 1 + algo.clip_eps_high)
                    policy = -torch.minimum(ratio * advantages, clipped * advantages).sum()
                    near = torch.clamp(values, old_values - algo.clip_value, old_values + algo.clip_value)
                    value = 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).sum()
                    ((policy + algo.vf_coef * value) / num_tokens).backward()
                torch.nn.utils.clip_grad_norm_(self.parameters, self.config.learner.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--engine", choices=("deepspeed", "torch"), default="deepspeed")
    parser.add_argument("--max-microbatch-tokens", type=int, default=8192)
    parser.add_argument("--target-kl", type=float, default=1e9, help="never reached: the look at KL is paid for, no update is skipped")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = RunConfig.model_validate(
        {
            "recipe": "bench",
            "algo": {"target_kl": args.target_kl, "kl_controller": "fixed"},
            "learner": {"lr": 1e-4, "max_microbatch_tokens": args.max_microbatch_tokens},
        }
    )
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder)
        learner = Learner(config, folder, in_process=args.engine == "torch")
        bare = BareLoop(folder, config)
    speeds: dict[str, list[float]] = {"learner": [], "bare": []}
    cpu_speeds: dict[str, list[float]] = {"learner": [], "bare": []}  # per second of this process on a core: fair on a busy machine
    for i in range(args.rounds + 1):
        rows = make_rows(args.rows, rng)
        for name, side in (("learner", learner), ("bare", bare)) if i % 2 else (("bare", bare), ("learner", learner)):
            start, cpu_start = time.perf_counter(), time.process_time()
            side.update(rows)
            if i:  # the first round warms up
                num_tokens = sum(row.num_trained_tokens for row in rows)
                speeds[name].append(num_tokens / (time.perf_counter() - start))
                cpu_speeds[name].append(num_tokens / (time.process_time() - cpu_start))
    result = {f"{name}_trained_tokens_per_s": statistics.median(values) for name, values in speeds.items()}
    for name, values in (("ratio", speeds), ("cpu_ratio", cpu_speeds)):
        result[name] = statistics.median(a / b for a, b in zip(values["learner"], values["bare"], strict=True))
    result |= {"engine": args.engine, "rows": args.rows, "rounds": args.rounds}
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
