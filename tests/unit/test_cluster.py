"""Which cluster a run is for, and the tools of one that is interrupted while they start: none stays there, whatever their thread does."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

from toolrl_ray import cluster, preflight
from toolrl_ray.errors import MissingDependency
from toolrl_ray.recipe import load


def interrupted(job) -> Future:
    """The outcome of a job that goes on while another one fails."""

    def fails() -> None:
        raise RuntimeError("the engine does not start")

    start: Future = Future()
    with pytest.raises(RuntimeError, match="the engine does not start"):
        cluster._all_at_once({start: job, Future(): fails})
    return start


def test_tools_that_are_deployed_after_the_interrupt_are_removed_too() -> None:
    deployed, deploy, end = set(), threading.Event(), threading.Event()

    def job() -> None:
        deploy.wait(30)
        deployed.add("tools")
        end.wait(30)  # for the tools to answer, which they never do

    def is_there() -> bool:
        there = bool(deployed)
        deploy.set()
        return there

    start = interrupted(job)
    try:
        assert cluster._remove_deployed(start, is_there, deployed.clear, 30.0)
        assert deploy.is_set() and not deployed
    finally:
        end.set()


def test_a_start_that_has_failed_is_not_waited_for() -> None:
    start: Future = Future()
    start.set_running_or_notify_cancel()
    start.set_exception(ValueError("no such tool"))
    assert cluster._remove_deployed(start, lambda: False, pytest.fail, 1e9)


def test_a_start_that_has_not_begun_never_does() -> None:
    start: Future = Future()
    assert cluster._remove_deployed(start, lambda: False, pytest.fail, 1e9)
    assert not start.set_running_or_notify_cancel()


def test_a_start_that_takes_too_long_is_not_waited_for_any_more() -> None:
    end = threading.Event()
    start = interrupted(lambda: end.wait(30))
    try:
        assert not cluster._remove_deployed(start, lambda: False, pytest.fail, 0.0)
    finally:
        end.set()


SHARED = ["rollout.num_gpus=0.5", "learner.num_gpus=0.5", "rollout.gpu_memory_utilization=0.4"]


@pytest.mark.parametrize(
    ("overrides", "at_once"),
    [([], True), (["rollout.num_gpus=1", "learner.num_gpus=1"], True), (SHARED, False)],
    ids=["cpu", "a GPU each", "a shared GPU"],
)
def test_only_on_a_shared_gpu_the_learner_loads_after_the_engine(overrides: list[str], at_once: bool) -> None:
    learner_loads, seen = threading.Event(), []

    def engine() -> None:
        seen.append(learner_loads.wait(30 if at_once else 0.5))

    cluster._start(load("calculator", overrides), {Future(): engine}, {Future(): learner_loads.set})
    assert seen == [at_once] and learner_loads.is_set()


def test_a_learner_does_not_load_beside_an_engine_that_failed_to() -> None:
    def fails() -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        cluster._start(load("calculator", SHARED), {Future(): fails}, {Future(): pytest.fail})


def test_engines_on_gpus_have_seeds_of_their_own_and_those_on_cpu_the_runs() -> None:
    config = load("calculator", ["seed=3"])
    on_gpu = load("calculator", ["seed=3", "rollout.num_gpus=1", "learner.num_gpus=1"])
    assert [cluster.own_seed(config, index).seed for index in range(3)] == [3, 3, 3]
    seeds = [cluster.own_seed(on_gpu, index).seed for index in range(3)]
    assert seeds[0] == 3 and len(set(seeds)) == 3


def test_a_run_that_goes_on_removes_the_tools_that_it_left_on_a_shared_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []
    monkeypatch.setattr("toolrl_ray.tools.serve_client.stop_tools", stopped.append)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    first = cluster._own_app(str(tmp_path), print)
    assert stopped == []
    second = cluster._own_app(str(tmp_path), print)  # the driver was killed meanwhile
    assert stopped == [first] and second != first
    assert cluster._own_app(None, print) not in (first, second)  # an evaluation
    assert stopped == [first]
    monkeypatch.delenv("RAY_ADDRESS")
    cluster._own_app(str(tmp_path), print)  # a local Ray has died with its driver
    assert stopped == [first]


@pytest.mark.parametrize("address", ["", "local"])
def test_an_address_that_says_local_is_no_cluster(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[str] = []
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(cluster, "start_local", lambda *_, **__: started.append("a Ray of one's own"))
    monkeypatch.setattr(cluster, "check", lambda *_: None)
    monkeypatch.setattr("ray.cluster_resources", dict)
    monkeypatch.setattr("ray.nodes", list)
    cluster.connect(load("calculator"), print)
    assert started == ["a Ray of one's own"]
    cluster._own_app(str(tmp_path), print)
    assert not (tmp_path / cluster.TOOLS_NOTE).exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None if package == "vllm" else package)
    with pytest.raises(MissingDependency, match="^vllm is not installed"):
        preflight.check_packages(load("calculator"), in_process=False, learner=True)
