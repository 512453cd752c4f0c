"""The learner's group on real Ray actors that die, hang and fail on demand."""

from __future__ import annotations

import os
import sys
import time

import pytest
import ray
from learner_synthetic import run_config
from raising import raise_what_does_not_unpickle
from ray import cloudpickle

from toolrl_ray.errors import LearnerError, LearnerLost
from toolrl_ray.learner.group import LearnerGroup

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a worker process cannot import what this file imports


@ray.remote(num_cpus=0)
class ScriptedLearner:
    """The surface of a LearnerActor. A `directory` says what befalls which rank in save_state, such as "0 fails 1 dies"."""

    def __init__(self, rank: int):
        self.rank, self.address = rank, ""

    def rendezvous(self) -> str:
        return f"tcp://{os.getpid()}"

    def start(self, address: str) -> None:
        self.address = address

    def save_policy(self, directory: str, tokenizer_dir: str) -> None:
        raise OSError("no\nroom")

    def save_state(self, directory: str) -> None:
        fate = dict(zip(*[iter(directory.split())] * 2, strict=True)).get(str(self.rank))
        if fate == "dies":
            time.sleep(1)  # the others' failure is known before
            os._exit(1)
        if fate == "hangs":
            time.sleep(600)
        if fate == "fails":
            raise RuntimeError("Connection closed by peer")
        if fate == "chokes":
            raise_what_does_not_unpickle()

    def load_state(self, directory: str) -> None:
        raise LearnerError(f"{directory} is of another model")

    def update(self, trajectories: list) -> dict[str, float]:
        return {"rank": self.rank, "address": self.address, "num": len(trajectories), "pid": os.getpid()}

    def finish_save(self) -> None:
        """Nothing was begun."""


@pytest.fixture
def group(cluster):
    config = run_config(learner={"num_ranks": 2, "update_timeout_s": 20})
    group = LearnerGroup(config, lambda: [ScriptedLearner.remote(rank) for rank in range(2)])
    group.start()
    yield group
    for actor in group.actors:
        ray.kill(actor)


@pytest.mark.parametrize(
    ("fates", "message"),
    [
        ("1 dies", "learner rank 1 died in save_state"),
        ("0 fails 1 dies", "learner rank 1 died in save_state"),  # the failure is a consequence
        ("1 hangs", r"learner ranks \[1\] did not finish save_state within 20 s"),
    ],
)
def test_a_lost_rank_is_told_from_a_failed_one_and_the_group_starts_again(group, fates, message):
    group.finish_save()
    actors = group.actors
    before = group.update([1, 2, 3])
    with pytest.raises(LearnerLost, match=message) as lost:
        group.save_state(fates)
    assert "\n" not in str(lost.value)
    group.restart()
    after = group.update([1, 2, 3])
    assert group.actors is actors
    assert (before["rank"], before["num"]) == (after["rank"], after["num"]) == (0, 3)
    assert before["pid"] != after["pid"] and after["address"] == f"tcp://{after['pid']}"


def test_an_exception_that_does_not_unpickle_is_no_death(group):
    with pytest.raises(LearnerError, match="learner rank 0 failed in save_state:\n(.|\n)*OfTwo: no unpickling of this") as failed:
        group.save_state("0 chokes")
    assert type(failed.value) is LearnerError


@pytest.mark.parametrize("method", ["save_policy", "save_state", "load_state"])
def test_a_rank_that_raises_is_not_lost(group, method):
    message, arguments = {
        "save_policy": ("learner rank [01] failed in save_policy:\n(.|\n)*no\nroom", ("a", "b")),
        "save_state": ("failed in save_state:\n(.|\n)*Connection closed by peer", ("0 fails",)),
        "load_state": ("^checkpoint is of another model$", ("checkpoint",)),
    }[method]
    with pytest.raises(LearnerError, match=message) as failed:
        getattr(group, method)(*arguments)
    assert type(failed.value) is LearnerError
