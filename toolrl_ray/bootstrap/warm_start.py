"""Supervised warm start of the tiny policy: next-token cross-entropy on the tokens that a policy would sample.

Letters: B rows, L tokens of the longest row, N trained tokens of the batch, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from toolrl_ray.bootstrap.muon import Muon
from toolrl_ray.bootstrap.rows import Demonstrations, Row
from toolrl_ray.config import BootstrapConfig

DRILL_PHASE = 0.15  # of the steps, during which most rows are drills: copying emerges there
DRILL_SHARE = 0.8
EXERCISE_SHARE = 0.75  # of the rows that are not drills
WARMUP_STEPS = 50
MAX_GRAD_NORM = 1.0
REPORT_EVERY_S = 5.0


@dataclass(frozen=True)
class Batch:
    """token_ids [B, L], padded on the right. trained [B, L]: True where the token is a target."""

    token_ids: torch.Tensor
    trained: torch.Tensor


def warm_start(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Demonstrations, config: BootstrapConfig, log: Callable[[str], None]
) -> None:
    """Train `model` in place for config.num_steps steps; `log` gets a line every few seconds."""
    matrices, others = _split(model)
    # Muon on the matrices needs fewer steps than AdamW alone until copying works.
    optimisers = [
        Muon(matrices, lr=4 * config.lr),
        torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _lr_factor(step, config.num_steps)) for o in optimisers]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second thread gains little on tensors this small, and spins for its turn where cores are shared
    model.train()
    started = reported = time.monotonic()
    for step in range(config.num_steps):
        loss = batch_loss(model, make_batch(tokenizer, _rows(rows, step, config)))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        for part in (*optimisers, *schedules):
            part.step()
        now = time.monotonic()
        if now - reported >= REPORT_EVERY_S:
            reported = now
            log(f"warm start: step {step + 1}/{config.num_steps}, loss {loss.item():.3f}, {now - started:.0f} s")
    model.eval()
    torch.set_num_threads(threads)


def batch_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the N trained tokens (scalar); logits [N, V] exist for those alone."""
    hidden = model.model(input_ids=batch.token_ids[:, :-1], use_cache=False).last_hidden_state
    trained = batch.trained[:, 1:]
    return F.cross_entropy(model.lm_head(hidden[trained]), batch.token_ids[:, 1:][trained])


def make_batch(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> Batch:
    """Rows as tensors. Each part is tokenised on its own, as in an episode."""
    token_ids_of = iter(tokenizer([part.text for row in rows for part in row])["input_ids"])
    encoded = []
    for row in rows:
        parts = [(next(token_ids_of), part.trained) for part in row]
        encoded.append(([i for ids, _ in parts for i in ids], [trained for ids, trained in parts for _ in ids]))
    length = max(len(ids) for ids, _ in encoded)
    token_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    trained = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, (ids, mask) in enumerate(encoded):
        token_ids[i, : len(ids)] = torch.tensor(ids)
        trained[i, : len(ids)] = torch.tensor(mask)
    return Batch(token_ids, trained)


def _rows(rows: Demonstrations, step: int, config: BootstrapConfig) -> list[Row]:
    num_drills = int(config.batch_size * DRILL_SHARE) if step < DRILL_PHASE * config.num_steps else 0
    num_exercises = int((config.batch_size - num_drills) * EXERCISE_SHARE)
    num_demonstrations = config.batch_size - num_drills - num_exercises
    return (
        [rows.drill() for _ in range(num_drills)]
        + [rows.exercise() for _ in range(num_exercises)]
        + [rows.demonstration() for _ in range(num_demonstrations)]
    )


def _lr_factor(step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine down to 2 %."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / num_steps)))


def _split(model: LlamaForCausalLM) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """(matrices of the layers, all else: embeddings, head and norms)."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in model.parameters() if id(p) not in chosen]
