"""vLLM's receiving end for weights that travel through Ray's object store: the transfer back end of machines without a GPU.

vLLM loads this module in each of its processes through the `vllm.general_plugins` entry point. The bytes reach the worker
with the `update_weights` call itself, as a safetensors buffer, so that no second data path has to be set up or can hang. A large policy
comes in several such calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from toolrl_ray.errors import UserError

BACKEND = "object_store"
MESSAGE_BYTES = 2**32 - 1  # the largest that vLLM's messages to its engine-core process can hold


def register() -> None:
    """Entry point of `vllm.general_plugins`: called once in every vLLM process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, _engine_class())


def messages(update_info: dict[str, Any]) -> list[dict[str, Any]]:
    """One for each payload of `trainer.pack`, as the engine below takes them. Raises UserError where one is too large for a message, which
    is where a single tensor is."""
    for payload in update_info["payloads"]:
        if len(payload) > MESSAGE_BYTES:
            # safetensors: the header's length, the header, the tensors
            names = " and ".join(json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")]))
            raise UserError(f"{names}: {len(payload)} bytes of weights, and vLLM on CPU takes at most {MESSAGE_BYTES} at once")
    return [{"payload": payload} for payload in update_info["payloads"]]


def _engine_class() -> type:
    import torch
    from safetensors.torch import load
    from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        pass

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        payload: bytes  # safetensors: Hugging Face parameter names to full tensors

    class ObjectStoreEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
        init_info_cls = InitInfo
        update_info_cls = UpdateInfo

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            pass

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict) -> None:
            # The base class would call torch.accelerator.synchronize, which a CPU build does not have.
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: UpdateInfo) -> None:
            with torch.no_grad(), _experts_packed_again(self.model):
                self.model.load_weights(load(update_info.payload).items())

        def finish_weight_update(self) -> None:
            with _experts_packed_again(self.model):
                finalize_layerwise_reload(self.model, self.model_config)
            for module in self.model.modules():
                # vLLM on CPU packs linear weights at load. A tied lm_head is not reloaded as a layer of its own and would
                # keep its old packed copy, that is, sample from a stale head.
                weight = getattr(module, "weight", None)
                if hasattr(module, "cpu_linear") and weight is not None and weight.numel() > 0:
                    module.quant_method.process_weights_after_loading(module)

        def shutdown(self) -> None:
            pass

    return ObjectStoreEngine


@contextmanager
def _experts_packed_again(model: Any) -> Iterator[None]:
    """vLLM on CPU packs experts where it makes their kernel, and in a reload, where they have one, it takes the weights as they come, which
    is wrong without a word. Without a kernel it packs them, into the memory that the kernel from before goes on to read."""
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    kernels = [(method, kernel) for method in methods if (kernel := getattr(method, "moe_kernel", None)) is not None]
    for method, _ in kernels:
        method.moe_kernel = None
    try:
        yield
    finally:
        for method, kernel in kernels:
            method.moe_kernel = kernel
