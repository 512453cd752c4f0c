"""The learner's end of a weight transfer: `Sender.send` pushes the whole policy to every engine, and every rank calls it.

Three back ends, one handshake (vLLM's: init, start, update, finish):
- object_store: rank 0 packs the weights into one safetensors buffer and puts it into Ray's object store. CPU.
- nccl: vLLM's own; broadcast between GPUs.
- ipc: vLLM's own; learner and engine share a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from safetensors.torch import save


class WeightClient(Protocol):
    """Control plane towards all engines at once; each call blocks until all have answered or a deadline passes."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...
    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: Any) -> None: ...
    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class NamedWeights(Protocol):
    """What a learner engine offers: names and full tensors; iteration is a collective under ZeRO-3."""

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]: ...
    def weights_metadata(self) -> list[tuple[str, tuple[int, ...], str]]: ...


def make_sender(
    backend: str, client: WeightClient, weights: NamedWeights, rank: int, num_engines: int, address: str
) -> ObjectStoreSender | VLLMSender:
    """address: of this node, where an NCCL group meets."""
    if backend == "object_store":
        return ObjectStoreSender(client, weights, rank)
    return VLLMSender(backend, client, weights, rank, num_engines, address)


class ObjectStoreSender:
    def __init__(self, client: WeightClient, weights: NamedWeights, rank: int):
        self._client, self._weights, self._rank = client, weights, rank
        if rank == 0:
            client.init_weight_transfer_engine({})

    def send(self) -> None:
        tensors = {}
        for name, tensor in self._weights.named_weights():
            if self._rank == 0:
                tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
        if self._rank == 0:
            self._client.start_weight_update()
            self._client.update_weights({"payload": save(tensors)})
            self._client.finish_weight_update()


class VLLMSender:
    """nccl and ipc, by vLLM's trainer engines."""

    def __init__(self, backend: str, client: WeightClient, weights: NamedWeights, rank: int, num_engines: int, address: str):
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        if backend == "ipc":
            init_info: Any = IPCTrainerInitInfo(rank=rank)
        else:
            init_info = NCCLTrainerInitInfo(address, _free_port(), num_engines + 1, rank=rank)
        self._engine = WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=_source(weights))

    def send(self) -> None:
        self._engine.send_weights()


def _source(weights: NamedWeights) -> Any:
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource

    class LearnerSource(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, getattr(torch, dtype), shape) for name, shape, dtype in weights.weights_metadata()]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(weights.named_weights())

    return LearnerSource()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
