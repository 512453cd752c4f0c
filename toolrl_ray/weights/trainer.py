"""The learner's end of a weight transfer, which every rank calls.

Three back ends, one handshake with the engines (vLLM's: init, start, update, finish):
- object_store: rank 0 packs the weights into safetensors buffers; the driver hands them out through Ray's object store. CPU.
- nccl: vLLM's own; broadcast between GPUs. `VLLMSender.send` pushes the whole policy to every engine.
- ipc: the same, where learner and engine share a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from safetensors.torch import save

PAYLOAD_BYTES = 2 * 2**30  # of one safetensors buffer, or a single tensor that is larger; vLLM takes less than 4 GiB at once
IPC_BUFFER_BYTES = 256 * 2**20  # of GPU memory, through which ipc sends; more where a single tensor is larger


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


def pack(weights: NamedWeights, rank: int) -> dict[str, Any] | None:
    """What the engines' `update_weights` takes, on rank 0; None on the others."""
    payloads: list[bytes] = []
    tensors: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights.named_weights():
        if rank == 0:
            if tensors and size + tensor.nbytes > PAYLOAD_BYTES:
                payloads.append(save(tensors))
                tensors, size = {}, 0
            tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
            size += tensor.nbytes
    return {"payloads": [*payloads, save(tensors)]} if rank == 0 else None


class _PatientClient:
    """Keeps the first failure of an update, calls `on_failure`, and leaves the later phases out. The send goes on to its end: other ranks
    wait for this one in the gathers of ZeRO-3, and the thread that sends may wait in NCCL for engines that are gone."""

    def __init__(self, client: WeightClient, on_failure: Callable[[], None]):
        self._client, self._on_failure = client, on_failure
        self.failure: Exception | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._client.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self._try(self._client.start_weight_update)

    def update_weights(self, update_info: Any) -> None:
        self._try(self._client.update_weights, update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._try(self._client.finish_weight_update, weight_version)

    def _try(self, call: Callable[..., None], *args: Any) -> None:
        if self.failure is None:
            try:
                call(*args)
            except Exception as error:
                self.failure = error
                self._on_failure()


class VLLMSender:
    """nccl and ipc, by vLLM's trainer engines. After a failed `send` it is of no use any more but to be closed.

    address: of this node, where an NCCL group meets.
    """

    def __init__(self, backend: str, client: WeightClient, weights: NamedWeights, rank: int, num_engines: int, address: str):
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        if backend == "ipc":
            # Without the buffer all tensors of an update would be there at once: of merged or gathered weights, a second model.
            size = max([IPC_BUFFER_BYTES, *_sizes(weights)])
            init_info: Any = IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=size)
        else:
            init_info = NCCLTrainerInitInfo(address, _free_port(), num_engines + 1, rank=rank)
        self._engine: Any = None
        self._client = _PatientClient(client, self._abort)
        self._engine = WeightTransferTrainerFactory.trainer_init(init_info, client=self._client, source=_source(weights))

    def send(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # vLLM reads the weights on streams of its own, which wait for no update that is under way here
        try:
            self._engine.send_weights()
        except Exception:
            if self._client.failure is None:
                raise
        if self._client.failure is not None:  # the cause of whatever else failed
            raise self._client.failure

    def _abort(self) -> None:
        """Bring the thread that sends out of NCCL. Not by the engine's own `shutdown`, which takes the group away under that thread."""
        if (group := getattr(self._engine, "model_update_group", None)) is not None:
            group.broadcast = lambda *args, **kwargs: None  # it goes on to the end of the weights, and must not touch what is freed here
            group.destroy()

    def close(self) -> None:
        self._engine.shutdown()


def _source(weights: NamedWeights) -> Any:
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource

    class LearnerSource(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, getattr(torch, dtype), shape) for name, shape, dtype in weights.weights_metadata()]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(weights.named_weights())

    return LearnerSource()


def _sizes(weights: NamedWeights) -> list[int]:
    """Bytes of each tensor."""
    return [math.prod(shape) * getattr(torch, dtype).itemsize for _, shape, dtype in weights.weights_metadata()]


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
