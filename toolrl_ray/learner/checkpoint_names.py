"""The policy's weights by the names, and in the pieces, of its checkpoint. transformers renames and fuses some as it loads them, experts
for one; vLLM knows those of the checkpoint, and only some of the others.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from toolrl_ray.learner.engine import Engine, tensor_metadata


class CheckpointWeights:
    """What `Engine.named_weights` and `Engine.weights_metadata` offer, with every weight as `save_pretrained` would write it. Weights of
    which several make one of the checkpoint stay as they are, all of the model's: they could not be sent one by one."""

    def __init__(self, engine: Engine):
        self._engine = engine
        as_loaded = engine.weights_metadata()
        meta = {name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for name, shape, dtype in as_loaded}
        one_by_one = [tensor_metadata(*pair) for name, tensor in meta.items() for pair in self._saved({name: tensor})]
        together = [tensor_metadata(*pair) for pair in self._saved(meta)]
        self._changes = sorted(together) != sorted(as_loaded) and sorted(together) == sorted(one_by_one)
        self._metadata = one_by_one if self._changes else as_loaded

    def weights_metadata(self) -> list[tuple[str, tuple[int, ...], str]]:
        return self._metadata

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._engine.named_weights():
            yield from self._saved({name: tensor}) if self._changes else ((name, tensor),)

    def _saved(self, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        from transformers.core_model_loading import revert_weight_conversion

        return iter(revert_weight_conversion(self._engine.module.lm, weights).items())
