"""What is sent is what `save_pretrained` writes, whatever transformers makes of it in memory."""

from __future__ import annotations

import pytest
import torch
import transformers
from learner_synthetic import VOCAB, run_config
from safetensors.torch import load_file

from toolrl_ray.learner.update import Learner

SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "Mixtral": {"num_local_experts": 4, "num_key_value_heads": 2},  # renamed, and experts fused
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},  # experts fused
    "GPTNeoX": {},  # one name differs
    "Llama": {"num_key_value_heads": 1},  # none does
}


@pytest.mark.parametrize("kind", MODELS)
def test_weights_are_sent_as_they_are_saved(tmp_path, kind: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPE, **MODELS[kind])
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path)
    weights = Learner(run_config(), str(tmp_path), in_process=True).weights_to_send()
    sent, saved = dict(weights.named_weights()), load_file(tmp_path / "model.safetensors")
    assert sent.keys() == saved.keys() and all(torch.equal(sent[name], saved[name]) for name in saved)
    assert [(name, tuple(tensor.shape), "float32") for name, tensor in sent.items()] == weights.weights_metadata()


def test_the_engine_of_transformers_gets_the_names_of_the_model(tmp_path) -> None:
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**SHAPE, **MODELS["Mixtral"])).save_pretrained(tmp_path)
    learner = Learner(run_config(rollout={"engine": "transformers"}), str(tmp_path), in_process=True)
    assert dict(learner.weights_to_send().named_weights()).keys() == learner.engine.module.lm.state_dict().keys()
