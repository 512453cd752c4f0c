"""The learner's node goes when it has packed its weights, and no engine has them yet."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import ray
from learner_synthetic import run_config
from ray import cloudpickle

from tests.conftest import ray_cluster, ray_node
from toolrl_ray.errors import LearnerLost
from toolrl_ray.weights.sync import WeightSync

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@ray.remote(num_cpus=0, resources={"learner": 0.1})
class Learner:
    def pack_weights(self) -> tuple[None, dict]:
        return None, {"payloads": [bytes(1 << 20)]}  # more than would travel without the object store


@ray.remote(num_cpus=0, resources={"engine": 0.1})
class Engine:
    def __init__(self) -> None:
        self.log: list[str] = []

    def seen(self) -> list[str]:
        return self.log

    def pause(self) -> None:
        self.log.append("pause")

    def init_weight_transfer(self, init_info: dict) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict) -> None:
        self.log.append("update_weights")

    def finish_weight_update(self, version: int) -> None: ...

    def resume(self) -> None:
        self.log.append("resume")


def test_weights_that_went_with_their_node_are_a_lost_learner_and_cost_no_engine() -> None:
    cluster = ray_cluster(num_cpus=1, resources={"engine": 1})
    try:
        node = ray_node(cluster, num_cpus=1, resources={"learner": 1})
        ray.init(address=cluster.address, log_to_driver=False)
        engines = [Engine.remote(), Engine.remote()]
        sync = WeightSync(run_config(), SimpleNamespace(reachable=lambda: engines, holds=lambda actors: True), [Learner.remote()])
        sync.sync(1)
        load = sync.take(2)
        cluster.remove_node(node)
        with pytest.raises(LearnerLost, match="packed weights were gone, with their node, when RolloutActor 0 came to load them"):
            load()
        assert ray.get([engine.seen.remote() for engine in engines], timeout=60) == [["pause", "update_weights", "resume", "pause"]] * 2
    finally:
        ray.shutdown()
        cluster.shutdown()
