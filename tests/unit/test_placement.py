from __future__ import annotations

import pytest

from toolrl_ray.config import RunConfig
from toolrl_ray.errors import PlacementError
from toolrl_ray.placement import Share, bundles, check, missing, plan
from toolrl_ray.weights.sync import select_backend


def config(**sections) -> RunConfig:
    return RunConfig.model_validate({"recipe": "test", **sections})


def test_the_default_plan_fits_two_cores():
    check(plan(config()), {"CPU": 2.0}, [{"CPU": 2.0}])


def test_what_is_missing_is_said_with_who_asks_for_it():
    shares = [Share("rollout", 4, 1, 1), Share("learner", 2, 1, 1), Share("tools", 8, 0.5)]
    assert missing(shares, {"CPU": 8.0, "GPU": 4.0}) == [
        "10 CPUs are needed (rollout 4, learner 2, tools 4) and 8 are there",
        "6 GPUs are needed (rollout 4, learner 2) and 4 are there",
    ]
    assert missing(shares, {"CPU": 10.0, "GPU": 6.0}) == []


def test_an_actor_that_no_node_can_hold_is_refused():
    shares = [Share("rollout", 1, 8, 0)]
    with pytest.raises(PlacementError, match=r"no node holds one of rollout \(8 CPUs, 0 GPUs\)"):
        check(shares, {"CPU": 16.0}, [{"CPU": 4.0}] * 4)


def test_a_shared_gpu_is_one_bundle():
    shared = config(rollout={"num_gpus": 0.5, "gpu_memory_utilization": 0.5}, learner={"num_gpus": 0.5})
    assert bundles(shared) == ([{"CPU": 1.5, "GPU": 1.0}], [0], [0])
    apart = config(rollout={"num_gpus": 1, "num_actors": 2}, learner={"num_gpus": 1})
    assert bundles(apart)[1:] == ([0, 1], [2])
    assert bundles(config(), learner=False) == ([{"CPU": 1.0}], [0], [])


@pytest.mark.parametrize(
    ("sections", "backend"),
    [
        ({}, "object_store"),
        ({"rollout": {"num_gpus": 1}, "learner": {"num_gpus": 1}}, "nccl"),
        ({"rollout": {"num_gpus": 0.5, "gpu_memory_utilization": 0.5}, "learner": {"num_gpus": 0.5}}, "ipc"),
        ({"rollout": {"num_gpus": 1, "engine": "transformers"}, "learner": {"num_gpus": 1}}, "object_store"),
        ({"rollout": {"num_gpus": 1}, "learner": {"num_gpus": 1}, "weights": {"backend": "object_store"}}, "object_store"),
    ],
)
def test_the_weight_backend_follows_the_gpus(sections, backend):
    assert select_backend(config(**sections)) == backend
