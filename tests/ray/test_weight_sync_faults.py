"""A weight sync of which a part hangs, fails or dies: the real sync, client and sender over Ray, with engines that misbehave on demand."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import ray
import torch
from learner_synthetic import run_config
from raising import raise_what_does_not_unpickle
from ray import cloudpickle
from safetensors.numpy import load, save  # without torch, which takes its processes seconds to import

from toolrl_ray.errors import LearnerLost, NotLoaded, UserError, WeightSyncError
from toolrl_ray.learner.actor import LearnerActor
from toolrl_ray.weights import client
from toolrl_ray.weights import sync as module
from toolrl_ray.weights.sync import MAX_TRIES, WeightSync

TIMEOUT_S = 2.0
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a worker process cannot import what this file imports


def misbehave(fate: str) -> None:
    if fate == "hangs":
        time.sleep(600)
    if fate == "is slow":
        time.sleep(0.5)
    if fate == "dies":
        os._exit(1)
    if fate == "fails":
        raise RuntimeError("out of\nmemory")
    if fate == "is not loaded":
        raise NotLoaded("its engine is not loaded")
    if fate == "is refused":
        raise UserError("w is too large")
    if fate == "chokes":
        raise_what_does_not_unpickle()


@ray.remote(num_cpus=0, max_restarts=-1)
class Engine:
    """The surface of a RolloutActor that a sync sees. fate: what befalls its first process in which phase; "always": every process."""

    def __init__(self, phase: str = "", fate: str = "", always: bool = False):
        self.life = int(ray.get_runtime_context().was_current_actor_reconstructed)
        self.phase, self.fate = (phase, fate) if always or not self.life else ("", "")
        self.log: list[str] = []
        self.weight = 0.0

    def start(self) -> int:
        return self.life

    def seen(self) -> tuple[list[str], float]:
        return self.log, self.weight

    def _note(self, phase: str, version: int | str = "") -> None:
        self.log.append(f"{phase}{version}")
        if phase == self.phase:
            misbehave(self.fate)

    def pause(self) -> None:
        self._note("pause")

    def init_weight_transfer(self, init_info: dict) -> None:
        self._note("init_weight_transfer")

    def start_weight_update(self) -> None:
        self._note("start_weight_update")

    def update_weights(self, update_info: dict) -> None:
        self.weight = float(load(*update_info["payloads"])["w"])
        self._note("update_weights")

    def finish_weight_update(self, version: int) -> None:
        self._note("finish_weight_update", version)

    def resume(self) -> None:
        self._note("resume")


class Weight:
    """A learner of one number."""

    def __init__(self) -> None:
        self.value = 1.0

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "w", torch.tensor(self.value)


@ray.remote(num_cpus=0)
class Learner(LearnerActor):
    """Packs as the real one does. fate: what befalls it in `pack_weights`."""

    def begin(self, fate: str = "") -> None:
        self.weights, self.fate = Weight(), fate

    def set(self, value: float) -> None:
        self.weights.value = value

    def pack_weights(self) -> tuple[None, dict | None]:
        misbehave(self.fate)
        return super().pack_weights()


def answer(method):
    """What it returns, once its actor's process is there."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return ray.get(method(), timeout=60)
        except ray.exceptions.ActorUnavailableError:  # it is being started anew
            assert time.monotonic() < deadline
            time.sleep(0.2)


class Pool:
    """lives: an engine that was started anew is left out, as long as only 0 is in here. up: those that are known to be, or None for all."""

    def __init__(self, engines: list):
        self.engines, self.lives, self.up = engines, {0}, None

    def reachable(self) -> list:
        return [engine for engine in self.engines if answer(engine.start.remote) in self.lives]

    def holds(self, actors: list) -> bool:
        return {*actors} <= self.up if self.up is not None else True


@pytest.fixture
def make(cluster):
    """make(*engines, fate="", timeout_s=TIMEOUT_S) -> (WeightSync, its Pool, the learner), all of which are ended with the test."""
    actors = []

    def make(*engines, fate: str = "", timeout_s: float = TIMEOUT_S) -> tuple:
        config = run_config(weights={"timeout_s": timeout_s})
        learners = [Learner.remote(config, "", 0, 1)]
        actors.extend([*engines, *learners])
        ray.get([engine.start.remote() for engine in engines] + [learners[0].begin.remote(fate)], timeout=60)
        pool = Pool(list(engines))
        return WeightSync(config, pool, learners), pool, learners[0]

    yield make
    for actor in actors:
        ray.kill(actor)


def seen(engine) -> tuple[list[str], float]:
    return answer(engine.seen.remote)


@contextmanager
def held_elsewhere(lock) -> Iterator[None]:
    """By another thread."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait(timeout=60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(timeout=60)
        yield
    finally:
        done.set()
        thread.join(timeout=60)


def check_frozen_until_whole(log: list[str]) -> None:
    """Between a pause and the resume after it the last of the update's phases is its end: no engine goes on by half of an update."""
    update = [entry for entry in log if not entry.startswith("init")]
    for i, entry in enumerate(update):
        if entry == "resume":
            assert update[i - 1].startswith("finish_weight_update"), log
    assert update[-1] == "resume", log


@pytest.mark.parametrize(
    ("phase", "fate", "message"),
    [
        ("pause", "hangs", r"RolloutActor \[1\] did not answer phase pause within 2 s \(weights.timeout_s\)"),
        ("init_weight_transfer", "hangs", r"RolloutActor \[1\] did not answer phase init_weight_transfer within 2 s"),
        ("start_weight_update", "fails", "RolloutActor 1 failed in phase start_weight_update: RuntimeError: out of memory"),
        ("update_weights", "hangs", r"RolloutActor \[1\] did not answer phase update_weights within 2 s"),
        ("update_weights", "dies", r"RolloutActor 1 failed in phase update_weights: Actor(Died|Unavailable)Error"),
        ("update_weights", "chokes", "RolloutActor 1 failed in phase update_weights: .*OfTwo: no unpickling of this"),
        ("finish_weight_update", "fails", "RolloutActor 1 failed in phase finish_weight_update: RuntimeError: out of memory"),
        ("resume", "hangs", r"RolloutActor \[1\] did not answer phase resume within 2 s"),
    ],
)
def test_an_engine_that_misbehaves_is_named_and_the_others_get_their_weights(phase, fate, message, make, caplog) -> None:
    healthy, bad = Engine.remote(), Engine.remote(phase, fate)
    sync, _, _ = make(healthy, bad, timeout_s=60 if fate == "dies" else TIMEOUT_S)  # Ray may take longer to know of a death
    with caplog.at_level(logging.WARNING):
        metrics = sync.sync(3)
    assert metrics["weights/policy_version"] == 3
    warning, *after = caplog.messages
    assert all(re.search("RolloutActor 1 failed in phase .*Actor(Died|Unavailable)Error", line) for line in after)  # it is being replaced
    assert pytest.approx(1.0) == seen(healthy)[1]
    assert re.search(message, warning), warning
    assert "trying again (2 of 3)" in warning
    if fate == "chokes":
        assert answer(bad.start.remote) == 1, "it was not replaced"
    log, _ = seen(healthy)
    check_frozen_until_whole(log)
    assert "finish_weight_update3" in log


def test_an_engine_that_is_slower_than_another_fails_is_not_replaced(make, monkeypatch) -> None:
    monkeypatch.setattr(client, "AFTER_FAILURE_S", 0.0)  # that is for learners
    slow, bad = Engine.remote("update_weights", "is slow"), Engine.remote("update_weights", "fails")
    sync, _, _ = make(slow, bad)
    sync.sync(3)
    assert (answer(slow.start.remote), seen(slow)[1]) == (0, 1.0)


@pytest.mark.timeout(120)  # of the 500 s that a phase has here
@pytest.mark.parametrize("phase", ["init_weight_transfer", "update_weights"])
@pytest.mark.parametrize("fate", ["fails", "dies"])
def test_engines_in_one_collective_do_not_wait_until_the_deadline_for_one_that_failed(phase, fate, cluster, monkeypatch) -> None:
    monkeypatch.setattr(client, "AFTER_FAILURE_S", 1.0)
    engines = [Engine.remote(phase, "hangs"), Engine.remote(phase, fate)]
    try:
        ray.get([engine.start.remote() for engine in engines], timeout=60)
        why = "RuntimeError: out of memory" if fate == "fails" else "Actor(Died|Unavailable)Error: .*"
        message = rf"RolloutActor 1 failed in phase {phase}: {why}; and RolloutActor \[0\] did not come out of phase {phase} after that$"
        all_of_them = client.RayWeightClient(engines, 500.0)
        with pytest.raises(WeightSyncError, match=message):
            all_of_them.init_weight_transfer_engine({"rank_offset": 1})  # as with nccl
            all_of_them.update_weights({"payloads": [save({"w": np.ones(())})]})
        assert [answer(engine.start.remote) for engine in engines] == [1, 1], "they were not replaced"
    finally:
        for engine in engines:
            ray.kill(engine)


def test_an_engine_that_is_still_starting_is_not_replaced_for_it(make) -> None:
    healthy, starting = Engine.remote(), Engine.remote("pause", "is not loaded", always=True)
    sync, pool, _ = make(healthy, starting)
    reachable = iter([[healthy, starting], [healthy]])
    pool.reachable = lambda: next(reachable)
    sync.sync(3)
    assert (answer(starting.start.remote), seen(healthy)[1], seen(starting)[0]) == (0, 1.0, ["init_weight_transfer", "pause"])


def test_an_engine_that_is_known_to_start_again_does_not_hold_up_the_others(make) -> None:
    healthy, lost = Engine.remote(), Engine.remote()
    sync, pool, _ = make(healthy, lost)
    sync.sync(1)
    before = seen(lost)[0]
    pool.engines, pool.up = [healthy], {healthy}
    sync.sync(2)
    assert seen(healthy)[0][-2:] == ["finish_weight_update2", "resume"] and seen(lost)[0] == before


def test_after_all_attempts_the_error_of_the_last_is_raised(make, caplog) -> None:
    sync, _, _ = make(Engine.remote("update_weights", "fails", always=True))
    with pytest.raises(WeightSyncError, match="RolloutActor 0 failed in phase update_weights: RuntimeError: out of memory"):
        sync.sync(1)
    assert len(caplog.messages) == MAX_TRIES - 1


@pytest.mark.parametrize(
    ("fate", "message"),
    [("hangs", r"LearnerActor \[0\] did not answer phase pack within 2 s"), ("dies", "LearnerActor 0 failed in phase pack")],
)
def test_a_learner_that_is_lost_is_not_asked_again(fate, message, make, caplog) -> None:
    sync, _, _ = make(Engine.remote(), fate=fate)
    with pytest.raises(LearnerLost, match=message):
        sync.sync(1)
    assert caplog.messages == []


def test_a_users_error_in_a_sync_is_raised_as_it_is_and_at_once(make, caplog) -> None:
    sync, _, _ = make(Engine.remote("update_weights", "is refused", always=True))
    with pytest.raises(UserError, match="^w is too large$"):
        sync.sync(1)
    assert caplog.messages == []


def test_a_learner_whose_exception_does_not_unpickle_is_asked_again(make, caplog) -> None:
    sync, _, _ = make(Engine.remote(), fate="chokes")
    with pytest.raises(WeightSyncError, match="LearnerActor 0 failed in phase pack: .*OfTwo: no unpickling of this$"):
        sync.sync(1)
    assert len(caplog.messages) == MAX_TRIES - 1


@pytest.mark.timeout(120)  # of the 500 s that a phase has here
def test_a_rank_that_waits_for_one_that_failed_is_lost_without_waiting_for_the_deadline(cluster, monkeypatch) -> None:
    monkeypatch.setattr(client, "AFTER_FAILURE_S", 1.0)
    learners = [Learner.remote(run_config(), "", rank, 3) for rank in range(3)]
    try:
        fates = ["hangs", "fails", "is slow"]
        ray.get([learner.begin.remote(fate) for learner, fate in zip(learners, fates, strict=True)], timeout=60)
        message = r"LearnerActor 1 failed in phase pack: RuntimeError: out of memory; and LearnerActor \[0\] did not come out of phase pack"
        with pytest.raises(LearnerLost, match=message):
            client.wait_all("pack", [learner.pack_weights.remote() for learner in learners], 500.0, "LearnerActor")
    finally:
        for learner in learners:
            ray.kill(learner)


def test_ranks_that_all_come_out_of_a_failed_pack_are_asked_again(cluster) -> None:
    learners = [Learner.remote(run_config(), "", rank, 2) for rank in range(2)]
    try:
        ray.get([learner.begin.remote(fate) for learner, fate in zip(learners, ["fails", ""], strict=True)], timeout=60)
        with pytest.raises(WeightSyncError, match="LearnerActor 0 failed in phase pack: RuntimeError: out of memory$"):
            client.wait_all("pack", [learner.pack_weights.remote() for learner in learners], 500.0, "LearnerActor")
    finally:
        for learner in learners:
            ray.kill(learner)


def test_the_learner_may_go_on_once_its_weights_are_taken(make) -> None:
    engine = Engine.remote()
    sync, _, learner = make(engine)
    load = sync.take(3)
    ray.get(learner.set.remote(2.0), timeout=30)
    assert seen(engine) == ([], 0.0)
    assert load()["weights/policy_version"] == 3
    log, weight = seen(engine)
    assert weight == 1.0 and log[-2:] == ["finish_weight_update3", "resume"]


def test_weights_of_a_history_that_was_given_up_never_reach_an_engine(make) -> None:
    engine = Engine.remote()
    sync, _, learner = make(engine)
    late = sync.take(3)
    ray.get(learner.set.remote(2.0), timeout=30)
    sync.sync(2)  # as after a checkpoint was loaded
    late()
    log, weight = seen(engine)
    assert weight == 2.0 and "finish_weight_update3" not in log


def test_the_weights_that_were_taken_reach_engines_in_spite_of_failures(make, caplog) -> None:
    healthy, bad = Engine.remote(), Engine.remote("update_weights", "dies")
    sync, pool, learner = make(healthy, bad, timeout_s=60)
    load = sync.take(3)
    pool.lives = {0, 1}
    ray.get(learner.set.remote(2.0), timeout=30)
    load()
    assert (seen(healthy)[1], seen(bad)[1]) == (1.0, 1.0)
    assert len(caplog.messages) == 1


def test_an_engine_is_readmitted_after_the_load_that_is_under_way(make) -> None:
    slow = Engine.remote("update_weights", "is slow")
    sync, pool, _ = make(slow)
    thread = threading.Thread(target=sync.take(3))
    thread.start()
    deadline = time.monotonic() + 60
    while not sync._connected and time.monotonic() < deadline:  # its load has begun
        time.sleep(0.01)
    pool.engines.append(Engine.remote())
    try:
        assert sync.readmit() is True
        thread.join(timeout=60)
        log, weight = seen(pool.engines[1])
        assert (weight, log[-1]) == (1.0, "resume")
        log, _ = seen(slow)
        assert [entry for entry in log if entry.startswith("finish")] == ["finish_weight_update3"] * 2
        check_frozen_until_whole(log)
    finally:
        ray.kill(pool.engines[1])


def test_a_readmission_does_not_wait_for_a_load_that_hangs(make, monkeypatch) -> None:
    monkeypatch.setattr(module, "READMIT_S", 0.05)
    engine = Engine.remote()
    sync, _, _ = make(engine)
    with held_elsewhere(sync._loading):
        assert sync.readmit() is False and seen(engine) == ([], 0.0)
    assert sync.readmit() is True


def test_what_fails_as_the_run_is_taken_down_is_not_tried_again(make, caplog) -> None:
    sync, _, _ = make(Engine.remote("update_weights", "fails", always=True))
    sync.close()
    with pytest.raises(WeightSyncError, match="failed in phase update_weights"):
        sync.sync(1)
    assert caplog.messages == []


def test_an_engine_that_comes_back_gets_the_current_weights_and_not_while_they_change(make) -> None:
    healthy, bad = Engine.remote(), Engine.remote("pause", "dies")
    sync, pool, learner = make(healthy, bad)
    sync.sync(1)
    ray.get(learner.set.remote(2.0), timeout=30)
    sync.sync(2)
    assert seen(bad) == ([], 0.0)
    pool.lives = {0, 1}
    with held_elsewhere(sync.changing):
        assert sync.readmit() is False
        assert seen(bad) == ([], 0.0)
    assert sync.readmit() is True
    log, weight = seen(bad)
    assert weight == 2.0 and log[-2:] == ["finish_weight_update2", "resume"]
