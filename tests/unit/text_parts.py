"""A model that says what a script tells it, token by token, and what the tests of the TRL-style classes build with it."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from toolrl_ray.bootstrap.tokenizer import make_tokenizer
from toolrl_ray.text_environment import TextEnvironment

MARKERS = ("<request>", "<call>", "<response>", "<submit>")
PROMPT = "Use the tool.\n"


def tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A token per character and per marker. bos: every text that is tokenised begins with BOS, as for Llama."""
    made = make_tokenizer(512, MARKERS)
    if bos:
        start = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", made.bos_token_id)])
        made.backend_tokenizer.post_processor = start
    return made


class ScriptedLM(nn.Module):
    """script: task -> the text of each of its turns; "z" without end after that, so only a limit or the engine ends a turn.

    prompts: the token ids of every turn's prompt. modes: whether it was in training mode, at every forward.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, script: dict[str, list[str]]):
        super().__init__()
        self.config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512)
        self.device = torch.device("cpu")
        self.inner = nn.Dropout()
        self.tokenizer, self.script = tokenizer, script
        self.turns: Counter[str] = Counter()
        self.prompts: list[list[int]] = []
        self.modes: list[bool] = []

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past_key_values: Any, use_cache: bool) -> Any:
        self.modes.append(self.training or self.inner.training)
        if past_key_values is None:
            rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
            self.prompts += rows
            past_key_values = [iter(self._turn(self.tokenizer.decode(row))) for row in rows]
        logits = torch.zeros(len(input_ids), 1, len(self.tokenizer))
        for row, tokens in enumerate(past_key_values):
            logits[row, 0, next(tokens, self.tokenizer.convert_tokens_to_ids("z"))] = 50.0
        return SimpleNamespace(logits=logits, past_key_values=past_key_values)

    def _turn(self, text: str) -> list[int]:
        task = next(task for task in self.script if text.split(PROMPT)[1].startswith(task))
        self.turns[task] += 1
        return self.tokenizer(self.script[task][self.turns[task] - 1], add_special_tokens=False).input_ids


def no_reward(responses: list[str]) -> list[float]:
    return [0.0] * len(responses)


def environment(
    script: dict[str, list[str]], tools: Any = (), reward_fn: Any = no_reward, bos: bool = False, **options: Any
) -> TextEnvironment:
    made = tokenizer(bos)
    return TextEnvironment(ScriptedLM(made, script), made, tools, reward_fn, PROMPT, **options)


def call(tool: str, argument: str) -> str:
    return f"<request><{tool}>{argument}<call>"


def tiny_lm(tokenizer: PreTrainedTokenizerFast, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256}
    config = {"vocab_size": len(tokenizer), "initializer_range": 0.1, "eos_token_id": tokenizer.eos_token_id, **sizes, **options}
    return LlamaForCausalLM(LlamaConfig(**config))
