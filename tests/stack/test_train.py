"""`toolrl train` on real Ray, Serve, vLLM and DeepSpeed: the run folder, and what a death in mid-collection costs."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from toolrl_ray import cli, cluster, recipe
from toolrl_ray.bootstrap.build import ensure_tiny_policy
from toolrl_ray.driver import Run
from toolrl_ray.tracking.trajectories import load_trajectories

SMALL = ["task.num_train=256", "task.num_heldout=32", "eval.num_tasks=32", "bootstrap.num_steps=20", "train.tasks_per_step=16"]


@pytest.fixture(autouse=True)
def own_cluster(monkeypatch, tmp_path_factory):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("TOOLRL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_run_folder(run_dir: Path, num_steps: int, num_rows: int) -> None:
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["num_steps"] == num_steps
    metrics = lines(run_dir / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, num_steps + 1))
    assert all(m["weights/policy_version"] == m["step"] for m in metrics)
    assert all(0 <= m["mismatch/kl"] < 1e-3 and m["mismatch/mean_abs_logprob_diff"] < 1e-3 for m in metrics)
    trajectories = load_trajectories(run_dir / "trajectories.jsonl")
    assert len(trajectories) == num_steps * num_rows
    for step, trajectory in trajectories:
        assert {v for v, trained in zip(trajectory.policy_versions, trajectory.loss_mask, strict=True) if trained} == {step - 1}
    assert {"before", "after"} <= set(json.loads((run_dir / "eval.json").read_text()))


def check_policy_loads(run_dir: Path) -> None:
    """The final policy gives the logprobs that the last rollouts were close to, with nothing but transformers."""
    model = AutoModelForCausalLM.from_pretrained(run_dir / "policy")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "policy")
    _, trajectory = load_trajectories(run_dir / "eval" / "after" / "trajectories.jsonl")[0]
    assert tokenizer.decode(trajectory.token_ids) == "".join(s.text + s.overhang for s in trajectory.segments)
    logits = model(torch.tensor([trajectory.token_ids])).logits[0]
    sampled = [i for i, trained in enumerate(trajectory.loss_mask) if trained]
    assert [int(logits[i - 1].argmax()) for i in sampled] == [trajectory.token_ids[i] for i in sampled]  # eval was greedy


def check_isolation_is_told(run_dir: Path) -> None:
    first = (run_dir / "config.yaml").read_text().splitlines()[0]
    assert first.startswith("# PythonInterpreter runs untrusted code under ") and "seccomp" in first
    for metrics in lines(run_dir / "metrics.jsonl"):
        assert metrics[f"tools/PythonInterpreter/service/isolation/{first.rpartition(' ')[2]}"] == 1


def test_train_leaves_a_complete_run_folder_and_two_ranks_work_with_zero_2(tmp_path, capsys):
    run_dir = tmp_path / "run"
    code = cli.main(
        [
            "train",
            "calculator",
            f"run_dir={run_dir}",
            *SMALL,
            "train.num_steps=2",
            "learner.num_ranks=2",
            "learner.zero_stage=2",
            "learner.num_cpus=0.25",
            "tools.names=[SimpleCalculatorTool, PythonInterpreter]",
        ]  # fmt: skip
    )
    assert code == 0
    check_run_folder(run_dir, 2, 16)
    check_policy_loads(run_dir)
    check_isolation_is_told(run_dir)
    out = capsys.readouterr().out
    assert "held-out accuracy" in out and str(run_dir) in out


class Killer:
    """Stands in front of a RolloutPool and kills its RolloutActor: in mid-collection of step 2, and without work before the weight sync
    of step 3."""

    def __init__(self, pool, tasks_per_step):
        self.pool, self.tasks_per_step = pool, tasks_per_step
        self.num_trained = 0
        self.done: list[int] = []

    def __getattr__(self, name):
        return getattr(self.pool, name)

    def poll(self, max_wait_s):
        trajectories = self.pool.poll(max_wait_s)
        trained = [t for t in trajectories if not t.request.episode_id.startswith("eval-")]
        self.num_trained += len(trained)
        step = -(-self.num_trained // self.tasks_per_step)
        is_over = self.num_trained % self.tasks_per_step == 0
        if trained and step in (2, 3) and step not in self.done and is_over == (step == 3):
            psutil.Process(self.pool.pids[0]).kill()
            self.done.append(step)
        return trajectories


def test_a_death_on_the_rollout_side_costs_its_episodes_and_nothing_else(tmp_path):
    """kill -9 of a RolloutActor in mid-collection, and of one without work. (With vLLM and its engine-core process: test_chaos.py.)"""
    overrides = [*SMALL, "train.num_steps=3", "train.tasks_per_step=48", "rollout.max_in_flight=8", "eval.num_tasks=4"]
    settings = recipe.load("calculator", [*overrides, "rollout.engine=transformers"])
    before = psutil.Process().children(recursive=True)
    cluster.connect(settings, print)
    try:
        policy_dir = str(ensure_tiny_policy(settings, print))
        parts = cluster.ray_parts(settings, policy_dir, print)
        parts.rollout = Killer(parts.rollout, 48)
        try:
            run = Run(settings, tmp_path / "run", policy_dir, print)
            run.train(parts)
            processes = [p for p in psutil.Process().children(recursive=True) if p not in before and p.name() != "wandb-core"]
        finally:
            parts.close()
    finally:
        cluster.disconnect()
    run.close_tracker()
    assert parts.rollout.done == [2, 3]
    check_run_folder(tmp_path / "run", 3, 48)
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [m["rollout/actor_restarts"] for m in metrics] == [0, 1, 2]
    rerun = [m["rollout/episodes_rerun"] for m in metrics]
    assert rerun[0] == 0
    assert 1 <= rerun[1] <= 16 and rerun[2] == rerun[1]  # those that the actor held, no more
    episodes = [t.request.episode_id for _, t in load_trajectories(tmp_path / "run" / "trajectories.jsonl")]
    assert len(set(episodes)) == len(episodes) == 3 * 48
    _, left = psutil.wait_procs(processes, timeout=20)
    assert left == []


def test_a_plan_that_does_not_fit_is_refused_by_name(tmp_path, capsys):
    code = cli.main(["train", "calculator", f"run_dir={tmp_path / 'run'}", "rollout.num_actors=64", "learner.num_gpus=1"])
    assert code == 2
    error = capsys.readouterr().err
    assert "64" in error and "GPUs are needed (learner 1) and 0 are there" in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
