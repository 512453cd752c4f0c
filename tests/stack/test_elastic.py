"""A RolloutActor joins a run when a node comes, and is let go when the node goes; the run itself goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.conftest import ray_cluster, ray_node
from toolrl_ray import cluster, recipe
from toolrl_ray.bootstrap.build import ensure_tiny_policy
from toolrl_ray.driver import Run
from toolrl_ray.tracking.trajectories import load_trajectories

SETTINGS = [
    *("task.num_train=256", "task.num_heldout=8", "eval.num_tasks=8", "bootstrap.num_steps=20", "train.tasks_per_step=16"),
    *("train.num_steps=12", "rollout.engine=transformers", "rollout.num_actors=1", "rollout.max_actors=2", "learner.num_cpus=0.25"),
    *("stream.max_staleness_steps=1", "checkpoint.every_steps=0", "tracking.wandb=off"),
]
WAIT_S = 120.0


class Nodes:
    """Adds a node after step 3, removes it after step 8, and notes how many episodes the second actor held at most in between."""

    def __init__(self, two_nodes: Cluster, pool):
        self.cluster, self.pool = two_nodes, pool
        self.node = None
        self.most_held = 0
        self.early: list = []  # finished while this waited for the node

    def __getattr__(self, name):
        return getattr(self.pool, name)

    def poll(self, max_wait_s):
        self.most_held = max(self.most_held, self.pool._book.num_running(1))
        early, self.early = self.early, []
        return early + self.pool.poll(max_wait_s)

    def after(self, line: str) -> None:
        if line.startswith("step  3/"):
            assert self.pool._book.present == [0]
            self.node = ray_node(self.cluster, num_cpus=1)
        elif line.startswith("step  5/"):
            self.wait_for([0, 1])
        elif line.startswith("step  8/"):
            self.cluster.remove_node(self.node)

    def wait_for(self, present: list[int]) -> None:
        until = time.monotonic() + WAIT_S
        while self.pool._book.present != present and time.monotonic() < until:
            self.early += self.pool.poll(0.2)
        assert self.pool._book.present == present


def test_a_rollout_actor_is_taken_in_with_its_node_and_let_go_with_it(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOOLRL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    settings = recipe.load("calculator", SETTINGS)
    policy_dir = str(ensure_tiny_policy(settings, print))
    two_nodes = ray_cluster(num_cpus=2)
    monkeypatch.setenv("RAY_ADDRESS", two_nodes.address)
    try:
        cluster.connect(settings, print)
        parts = cluster.ray_parts(settings, policy_dir, print)
        nodes = parts.rollout = Nodes(two_nodes, parts.rollout)
        try:
            Run(settings, tmp_path / "run", policy_dir, nodes.after).train(parts)
        finally:
            parts.close()
    finally:
        cluster.disconnect()
        two_nodes.shutdown()
    assert nodes.most_held > 0
    assert nodes.pool._book.present == [0]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(1, 13))
    episodes = [t.request.episode_id for _, t in load_trajectories(tmp_path / "run" / "trajectories.jsonl")]
    assert len(set(episodes)) == len(episodes) == 12 * 16
