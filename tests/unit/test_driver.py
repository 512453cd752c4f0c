"""The loop on scripted parts: the order of its calls, and what an error leaves in the run folder."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from tests.unit.scripted_parts import ScriptedParts
from toolrl_ray import driver, recipe
from toolrl_ray.errors import RolloutError
from toolrl_ray.tracking.metrics import load_metrics
from toolrl_ray.tracking.trajectories import load_trajectories

SMALL = ["task.num_train=8", "task.num_heldout=4", "eval.num_tasks=4", "train.tasks_per_step=3", "tracking.wandb=off"]
LATE_S = 0.1
TRAINED = ["collect eval-before", "collect 0", "update", "sync 1", "collect 3", "update", "sync 2", "save_policy"]


def start(tmp_path: Path, *overrides: str) -> driver.Run:
    config = recipe.load("calculator", [*SMALL, "train.num_steps=2", *overrides])
    return driver.Run(config, tmp_path / "run", "policy-dir", lambda line: None)


def test_a_run_evaluates_then_collects_updates_and_syncs_each_step_then_saves_then_evaluates(tmp_path: Path) -> None:
    scripted = ScriptedParts()
    summary = start(tmp_path).train(scripted.parts())
    assert scripted.calls == [*TRAINED, "collect eval-after"]
    run_dir = tmp_path / "run"
    files = {"checkpoints", "config.yaml", "eval", "eval.json", "metrics.jsonl", "policy", "trajectories.jsonl"}
    assert {path.name for path in run_dir.iterdir()} == files
    assert [m["step"] for m in load_metrics(run_dir / "metrics.jsonl")] == [1, 2]
    assert [step for step, _ in load_trajectories(run_dir / "trajectories.jsonl")] == [1, 1, 1, 2, 2, 2]
    assert set(json.loads((run_dir / "eval.json").read_text())) == {"before", "after"}
    assert len(load_trajectories(run_dir / "eval" / "after" / "trajectories.jsonl")) == 4
    assert (run_dir / "config.yaml").read_text().startswith("# Python runs untrusted code under landlock+seccomp\n")
    assert summary["after"] == {"accuracy": 1.0, "tool_use": 0.0} and summary["num_tasks"] == 4


def test_an_error_in_the_last_evaluation_leaves_the_trained_policy(tmp_path: Path) -> None:
    scripted = ScriptedParts({"collect eval-after": RolloutError("the engine is gone")})
    with pytest.raises(RolloutError, match="the engine is gone"):
        start(tmp_path).train(scripted.parts())
    assert (tmp_path / "run" / "policy").is_dir()
    assert [m["step"] for m in load_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert set(json.loads((tmp_path / "run" / "eval.json").read_text())) == {"before"}


def test_an_error_in_a_step_leaves_the_steps_before_it_whole(tmp_path: Path) -> None:
    with pytest.raises(RolloutError):
        start(tmp_path).train(ScriptedParts({"sync 2": RolloutError("x")}).parts())
    assert [m["step"] for m in load_metrics(tmp_path / "run" / "metrics.jsonl")] == [1]
    steps = [step for step, _ in load_trajectories(tmp_path / "run" / "trajectories.jsonl")]
    assert steps == [1] * 3 + [2] * 3  # the episodes of the step that failed are there too, whole
    assert not (tmp_path / "run" / "policy").exists()


def test_a_scheduled_evaluation_rides_along_with_the_next_collection_and_is_of_the_step_before(tmp_path: Path) -> None:
    scripted = ScriptedParts()
    start(tmp_path, "eval.every_steps=1").train(scripted.parts())
    along = TRAINED.index("sync 1") + 1
    assert scripted.calls == [*TRAINED[:along], "collect eval-step-1", *TRAINED[along:], "collect eval-after"]  # none at the last step
    _, first, evaluation, second, _ = scripted.collections
    assert [request.temperature for request in [*first, *second]] == [None] * 6
    assert [request.temperature for request in evaluation] == [0.0] * 4
    evals = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert [(label, result["step"]) for label, result in evals.items()] == [("before", 0), ("step-1", 1), ("after", 2)]
    assert [step for step, _ in load_trajectories(tmp_path / "run" / "eval" / "step-1" / "trajectories.jsonl")] == [1] * 4


def test_training_sees_the_same_episodes_and_counts_none_but_these_with_evaluations_along(tmp_path: Path) -> None:
    runs = {}
    for every_steps in (0, 1):
        run_dir = tmp_path / str(every_steps) / "run"
        start(run_dir.parent, f"eval.every_steps={every_steps}").train(ScriptedParts().parts())
        trained = [t.request for _, t in load_trajectories(run_dir / "trajectories.jsonl")]
        names = ("rollout/episodes", "rollout/sampled_tokens", "tokens/trained", "rollout/eval_episodes")
        runs[every_steps] = trained, [[m[name] for name in names] for m in load_metrics(run_dir / "metrics.jsonl")]
    assert runs[1][0] == runs[0][0]
    assert runs[0][1] == [[3, 6, 6, 0], [3, 6, 6, 0]]
    assert runs[1][1] == [[3, 6, 6, 0], [3, 6, 6, 4]]


def test_an_evaluation_that_rode_along_is_kept_when_the_update_after_it_fails(tmp_path: Path) -> None:
    scripted = ScriptedParts({"sync 2": RolloutError("x")})
    with pytest.raises(RolloutError):
        start(tmp_path, "eval.every_steps=1").train(scripted.parts())
    assert set(json.loads((tmp_path / "run" / "eval.json").read_text())) == {"before", "step-1"}


def test_the_tracker_gets_an_evaluation_under_its_step_before_the_next_steps_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = []
    monkeypatch.setattr(
        driver.WandbTracker, "log", lambda tracker, step, metrics, rows=(): logged.append((step, "eval/accuracy" in metrics))
    )
    start(tmp_path, "eval.every_steps=1").train(ScriptedParts().parts())
    assert logged == [(0, True), (1, False), (1, True), (2, False), (2, True)]


def test_the_evaluations_of_a_run_sample_only_when_asked_to(tmp_path: Path) -> None:
    scripted = ScriptedParts()
    start(tmp_path, "eval.num_samples=2", "eval.temperature=0.5").train(scripted.parts())
    assert [request.temperature for request in scripted.collections[0]] == [0.0, 0.5, 0.5] * 4
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["before"]["sampled/pass@2"] == 1.0


def test_a_steps_tool_calls_are_those_of_its_collections_and_not_of_the_first_evaluation(tmp_path: Path) -> None:
    start(tmp_path, "eval.every_steps=1").train(ScriptedParts().parts())  # one call a collection, an evaluation beside it too
    assert [m["tools/T/calls"] for m in load_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_episodes_of_groups_that_were_filtered_away_count_in_the_speed_and_in_a_reward_of_their_own(tmp_path: Path) -> None:
    """Of four prompts one is solved by one of its two episodes, and the others, in which there is nothing to learn, by both."""
    scripted = ScriptedParts()
    mixed = {f"{number}:1" for number in range(0, 100, 4)}
    scripted.reward = lambda request: float(request.episode_id not in mixed)
    start(tmp_path, "train.group_size=2", "stream.filter_zero_signal=true").train(scripted.parts())
    for m in load_metrics(tmp_path / "run" / "metrics.jsonl"):
        num_episodes = m["rollout/episodes"]
        assert m["env/reward_mean"] == 0.5 and num_episodes > 6
        assert m["env/reward_mean_with_dropped"] == pytest.approx(1 - 3 / num_episodes)
        assert m["rollout/sampled_tokens"] == 2 * num_episodes
        assert m["rollout/tokens_per_s"] * m["time/rollout_s"] == pytest.approx(2 * num_episodes)
    assert len(load_trajectories(tmp_path / "run" / "trajectories.jsonl")) == 12


def test_a_rollout_that_a_checkpoint_has_overlapped_is_timed_from_its_beginning(tmp_path: Path) -> None:
    class Early(ScriptedParts):
        """A step's episodes take LATE_S, and are there before the checkpoint of the step before is written."""

        concurrent = True
        have_ended = threading.Event()

        def poll(self, max_wait_s: float):
            if self.num_outstanding:
                time.sleep(LATE_S)
                self.have_ended.set()
            return super().poll(max_wait_s)

        def sync(self, policy_version: int):
            self.have_ended.clear()
            return super().sync(policy_version)

        def finish_save(self) -> None:
            assert self.version == 3 or self.have_ended.wait(30)
            super().finish_save()

    start(tmp_path, "train.num_steps=3", "checkpoint.every_steps=1", "stream.max_staleness_steps=0").train(Early().parts())
    assert all(m["time/rollout_s"] >= LATE_S for m in load_metrics(tmp_path / "run" / "metrics.jsonl"))


@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_learner_that_waits_for_a_load_is_idle(k: int, tmp_path: Path) -> None:
    """Its updates take next to nothing here, and each load a while."""

    class Loading(ScriptedParts):
        concurrent = True

        def take(self, policy_version: int):
            return lambda: threading.Event().wait(0.2) or self.sync(policy_version) | {"time/weight_sync_s": 0.2}

    start(tmp_path, f"stream.max_staleness_steps={k}", "train.num_steps=6").train(Loading().parts())
    steps = load_metrics(tmp_path / "run" / "metrics.jsonl")
    idle_s = sum(m["time/learner_idle_share"] * m["time/step_s"] for m in steps)
    assert idle_s > 0.5 * sum(m["time/step_s"] for m in steps) > 0.25


def test_the_tracker_ends_only_when_it_is_closed_and_then_has_every_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = []

    class Tracker(driver.WandbTracker):
        def finish(self, summary=None) -> None:
            finished.append(summary)

    monkeypatch.setattr(driver, "WandbTracker", Tracker)
    run = start(tmp_path)
    run.close_tracker()  # nothing to close yet
    run.train(ScriptedParts().parts())
    assert finished == []
    run.close_tracker()
    assert [summary["eval/after/accuracy"] for summary in finished] == [1.0]
    assert "eval/before/accuracy" in finished[0]
