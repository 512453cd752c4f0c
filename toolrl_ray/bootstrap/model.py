"""The tiny policy's network: a Llama of about 0.7 M parameters, random from a seed."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from toolrl_ray.config import BootstrapConfig

HEAD_DIM = 32  # the smallest that vLLM serves on CPU


def make_model(config: BootstrapConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The network with random weights, the same for the same `config.seed`; leaves torch's global generator as it was."""
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.hidden_size * 3,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=config.max_context_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=config.tie_embeddings,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LlamaForCausalLM(llama).float()
