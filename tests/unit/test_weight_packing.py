"""A learner's weights in as many safetensors buffers as their size asks for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save

from toolrl_ray.errors import UserError
from toolrl_ray.weights import trainer, vllm_object_store

WEIGHTS = {"a": torch.zeros(10), "b": torch.ones(15), "c": torch.zeros(60), "d": torch.ones(5, 2), "e": torch.zeros(2)}  # 4 bytes each


def packed(rank: int = 0) -> dict | None:
    return trainer.pack(SimpleNamespace(named_weights=lambda: iter(WEIGHTS.items())), rank)


@pytest.mark.parametrize(
    ("limit", "names"),
    [(2**31, ["abcde"]), (99, ["a", "b", "c", "de"]), (100, ["ab", "c", "de"]), (1, ["a", "b", "c", "d", "e"])],
)
def test_no_buffer_is_larger_than_the_limit_but_for_a_single_tensor(limit: int, names: list[str], monkeypatch) -> None:
    monkeypatch.setattr(trainer, "PAYLOAD_BYTES", limit)
    buffers = [load(payload) for payload in packed()["payloads"]]
    assert [sorted(buffer) for buffer in buffers] == [sorted(some) for some in names]
    whole = {name: tensor for buffer in buffers for name, tensor in buffer.items()}
    assert all(torch.equal(whole[name], tensor) for name, tensor in WEIGHTS.items())
    assert packed(rank=1) is None


def test_a_tensor_that_is_too_large_for_a_message_is_named_in_one_line(monkeypatch) -> None:
    monkeypatch.setattr(vllm_object_store, "MESSAGE_BYTES", 1000)
    small, large = save({"small": torch.zeros(200)}), save({"model.embed": torch.zeros(250)})
    assert vllm_object_store.messages({"payloads": [small, small]}) == [{"payload": small}] * 2
    with pytest.raises(UserError, match=r"^model.embed: \d+ bytes of weights, and vLLM on CPU takes at most 1000 at once$"):
        vllm_object_store.messages({"payloads": [small, large]})
