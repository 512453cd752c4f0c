"""The learner's end of a transfer by NCCL, also when engines fail: vLLM's own trainer engine, with stubs where it would call CUDA. And what
ipc asks of it.

Not covered, for want of a GPU: that ncclCommAbort, which the real group's `destroy` calls, brings a stream out of a broadcast.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from toolrl_ray.errors import WeightSyncError
from toolrl_ray.weights import trainer
from toolrl_ray.weights.trainer import VLLMSender

NAMES = ["a", "b", "c"]


class Group:
    """PyNcclCommunicator. absent: whoever broadcasts is held, as by peers that are gone, until the group is destroyed."""

    def __init__(self) -> None:
        self.absent, self.held, self.gone = False, threading.Event(), threading.Event()
        self.num_sent = 0

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        assert not self.gone.is_set(), "NCCL is called with a communicator that was freed"
        self.num_sent += 1
        if self.absent:
            self.held.set()
            assert self.gone.wait(30), "nobody ends the broadcast"

    def destroy(self) -> None:
        self.gone.set()


class Weights:
    """Counts whole iterations: the collectives that other ranks take part in."""

    num_gathers = 0

    def weights_metadata(self) -> list[tuple[str, tuple[int, ...], str]]:
        return [(name, (2,), "float32") for name in NAMES]

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in NAMES:
            yield name, torch.zeros(2)
        self.num_gathers += 1


class Client:
    """fails: the phase in which the engines do; in update_weights once the sender is in NCCL."""

    def __init__(self, group: Group, fails: str = ""):
        self.group, self.fails, self.calls = group, fails, []
        group.absent = fails == "update_weights"

    def _note(self, phase: str) -> None:
        self.calls.append(phase)
        if phase == self.fails:
            if self.group.absent:
                assert self.group.held.wait(30)
            raise WeightSyncError(f"weight sync: RolloutActor 1 failed in phase {phase}")

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self._note("init_weight_transfer_engine")

    def start_weight_update(self) -> None:
        self._note("start_weight_update")

    def update_weights(self, update_info: dict) -> None:
        assert update_info["names"] == NAMES
        self._note("update_weights")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._note("finish_weight_update")


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    from vllm.distributed.weight_transfer import nccl_engine

    def producer(iterator: Iterator, group: Group, src: int, post_iter_func, **buffers: int) -> None:
        for item in iterator:
            group.broadcast(post_iter_func(item), src=src)

    group = Group()
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda init_info: group)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", producer)
    return group


PHASES = ["init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"]


@pytest.mark.parametrize("phase", PHASES[1:])
def test_engines_that_fail_end_the_broadcast_and_rank_0_stays_in_the_gathers_of_all_ranks(group: Group, phase: str) -> None:
    client, weights = Client(group, phase), Weights()
    sender = VLLMSender("nccl", client, weights, 0, 2, "127.0.0.1")
    with pytest.raises(WeightSyncError, match=f"RolloutActor 1 failed in phase {phase}$"):
        sender.send()
    assert weights.num_gathers == 1
    assert client.calls == PHASES[: PHASES.index(phase) + 1]
    assert group.gone.is_set()
    assert group.num_sent == {"start_weight_update": 0, "update_weights": 1, "finish_weight_update": len(NAMES)}[phase]
    sender.close()


def test_a_connection_serves_many_updates_and_is_freed_when_it_is_closed(group: Group) -> None:
    client, weights = Client(group), Weights()
    sender = VLLMSender("nccl", client, weights, 0, 2, "127.0.0.1")
    for _ in range(2):
        sender.send()
    assert client.calls == PHASES + PHASES[1:]
    assert group.num_sent == 2 * len(NAMES) and not group.gone.is_set()
    sender.close()
    assert group.gone.is_set()
    sender.close()


def test_no_weight_is_read_before_the_update_that_makes_it_has_ended(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    num_sent: list[int] = []
    sender = VLLMSender("nccl", Client(group), Weights(), 0, 2, "127.0.0.1")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: num_sent.append(group.num_sent))
    sender.send()
    assert num_sent == [0]


def test_a_rank_that_only_gathers_has_nothing_to_close(group: Group) -> None:
    client, weights = Client(group), Weights()
    sender = VLLMSender("nccl", client, weights, 1, 2, "127.0.0.1")
    sender.send()
    sender.close()
    assert weights.num_gathers == 1 and client.calls == []


def test_a_failure_of_the_learner_itself_is_raised_as_it_is(group: Group) -> None:
    class Broken(Weights):
        def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
            yield NAMES[0], torch.zeros(2)
            raise RuntimeError("the gather failed")

    sender = VLLMSender("nccl", Client(group), Broken(), 0, 2, "127.0.0.1")
    with pytest.raises(RuntimeError, match="the gather failed"):
        sender.send()


@pytest.mark.parametrize(("numel", "size"), [(2, 1000), (250, 1000), (300, 1200)])
def test_ipc_sends_through_one_buffer_that_holds_the_largest_tensor(numel: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    class Mixed(Weights):
        def weights_metadata(self) -> list[tuple[str, tuple[int, ...], str]]:
            return [("a", (2, numel // 2), "float32"), ("b", (numel,), "bfloat16"), ("c", (), "float32")]

    monkeypatch.setattr(trainer, "IPC_BUFFER_BYTES", 1000)
    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", lambda init_info, client, source: init_info)
    init_info = VLLMSender("ipc", Client(Group()), Mixed(), 0, 1, "127.0.0.1")._engine
    assert (init_info.packed, init_info.packed_buffer_size_bytes, init_info.rank) == (True, size, 0)
