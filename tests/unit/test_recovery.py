"""A run that ends anywhere goes on from its last checkpoint as if nothing had been; so does one that loses its learner."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest

from tests.unit.scripted_parts import ScriptedParts
from toolrl_ray import checkpoint, driver, origin, recipe
from toolrl_ray.checkpoint import committed_steps
from toolrl_ray.driver import Run
from toolrl_ray.errors import LearnerLost, RolloutError, UserError
from toolrl_ray.run_dir import finished, write_whole
from toolrl_ray.stream.buffer import Stream
from toolrl_ray.tracking.metrics import load_metrics
from toolrl_ray.tracking.summary import render
from toolrl_ray.tracking.trajectories import load_trajectories

SETTINGS = [
    *("task.num_train=8", "task.num_heldout=4", "eval.num_tasks=4", "train.tasks_per_step=3", "train.num_steps=5"),
    *("checkpoint.every_steps=2", "eval.every_steps=2", "tracking.wandb=off"),
]


def run(run_dir: Path, scripted: ScriptedParts, *overrides: str, resume: bool = False, tiny: Path | None = None) -> list[str]:
    """Lines that a person sees, the summary last. tiny: the folder of policy.path=tiny."""
    said: list[str] = []
    config = recipe.load("calculator", [*SETTINGS, *overrides])
    policy_dir = str(tiny or "policy-dir") if config.policy.path == "tiny" else config.policy.path
    summary = Run(config, run_dir, policy_dir, said.append, resume=resume).train(scripted.parts())
    return [*said, render(summary)]


def outcome(run_dir: Path) -> dict:
    """What must not depend on where a run was interrupted."""
    steps = [
        (m["step"], m["env/reward_mean"], m["tokens/trained"], m["stream/trained_prompts"]) for m in load_metrics(run_dir / "metrics.jsonl")
    ]
    trained = [
        (step, t.request.episode_id, t.request.task.id, t.policy_versions) for step, t in load_trajectories(run_dir / "trajectories.jsonl")
    ]
    evals = json.loads((run_dir / "eval.json").read_text())
    return {"steps": steps, "trained": trained, "evals": {label: (e["step"], e["accuracy"]) for label, e in evals.items()}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[str]]:
    """A run that was not interrupted, and its weights."""
    scripted, run_dir = ScriptedParts(), tmp_path_factory.mktemp("whole") / "run"
    run(run_dir, scripted)
    return outcome(run_dir), scripted.weights


POINTS = [f"sync {step}" for step in (1, 2, 3, 4, 5)] + ["collect eval-step-2", "collect 9", "save_policy", "collect eval-after"]


@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_was_killed_goes_on_and_trains_every_prompt_once_with_the_same_numbers(point: str, tmp_path: Path, whole) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(RolloutError):
        run(run_dir, ScriptedParts({point: RolloutError("killed")}))
    scripted = ScriptedParts()
    said = run(run_dir, scripted, resume=True)
    assert (outcome(run_dir), scripted.weights) == whole
    saved = {"sync 1": 0, "sync 2": 0, "sync 3": 0, "collect eval-step-2": 0, "collect 9": 2, "sync 4": 2, "sync 5": 2}.get(point, 5)
    assert (f"going on after step {saved}" if saved else "no checkpoint yet: starting from the beginning") in said


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_lost_learner_is_started_anew_and_the_run_goes_on_from_its_checkpoint(step: int, tmp_path: Path, whole) -> None:
    scripted = ScriptedParts({f"sync {step}": [LearnerLost("learner rank 0 died in update")]})
    said = run(tmp_path / "run", scripted)
    assert (outcome(tmp_path / "run"), scripted.weights) == whole
    assert scripted.calls.count("restart") == scripted.calls.count("reconnect") == 1
    assert "learner rank 0 died in update; starting the learner again (1 of 3)" in said


def test_a_learner_that_is_lost_while_it_writes_the_policy_is_started_anew_too(tmp_path: Path, whole) -> None:
    scripted = ScriptedParts({"save_policy": [LearnerLost("learner rank 0 died in save_policy")]})
    note = scripted.note

    def begun(call: str) -> None:
        if call == "save_policy":
            (tmp_path / "run" / ".policy.writing").mkdir(exist_ok=True)  # as learner/export.py has it
        note(call)

    scripted.note = begun
    run(tmp_path / "run", scripted)
    assert (outcome(tmp_path / "run"), scripted.weights) == whole
    assert scripted.calls.count("restart") == 1


def test_a_learner_that_is_lost_again_and_again_ends_the_run(tmp_path: Path) -> None:
    scripted = ScriptedParts({"sync 1": LearnerLost("learner rank 0 died in update")})
    with pytest.raises(LearnerLost):
        run(tmp_path / "run", scripted, "train.max_learner_restarts=2")
    assert scripted.calls.count("restart") == 2


def test_without_checkpoints_a_lost_learner_does_not_throw_away_the_steps_that_were_finished(tmp_path: Path) -> None:
    def losing(step: int) -> ScriptedParts:
        return ScriptedParts({f"sync {step}": [LearnerLost("learner rank 0 died in update")]})

    first = losing(1)
    run(tmp_path / "first", first, "checkpoint.every_steps=0")  # there is none yet
    assert first.calls.count("restart") == 1
    with pytest.raises(LearnerLost):
        run(tmp_path / "third", losing(3), "checkpoint.every_steps=0")
    assert [m["step"] for m in load_metrics(tmp_path / "third" / "metrics.jsonl")] == [1, 2]


def test_a_lost_learner_does_not_throw_away_steps_whose_checkpoints_are_gone(tmp_path: Path) -> None:
    scripted = ScriptedParts({"sync 4": [LearnerLost("learner rank 0 died in update")]})
    note = scripted.note

    def gone(call: str) -> None:
        if call == "sync 4":
            shutil.rmtree(tmp_path / "run" / "checkpoints")
        note(call)

    scripted.note = gone
    with pytest.raises(LearnerLost):
        run(tmp_path / "run", scripted)
    assert [m["step"] for m in load_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


def test_a_learner_that_is_lost_where_a_run_begins_again_with_more_checkpoints_is_started_anew(tmp_path: Path, whole) -> None:
    with pytest.raises(RolloutError):
        run(tmp_path / "run", ScriptedParts({"sync 4": RolloutError("killed")}), "checkpoint.every_steps=9", "eval.every_steps=0")
    scripted = ScriptedParts({"sync 0": [LearnerLost("learner rank 0 died in a weight sync")]})
    run(tmp_path / "run", scripted, resume=True)  # of whose settings steps 1 to 3 were not
    assert (outcome(tmp_path / "run"), scripted.weights) == whole


def test_learners_lost_with_a_checkpoint_in_between_are_counted_apart(tmp_path: Path) -> None:
    def losing() -> ScriptedParts:
        return ScriptedParts({f"sync {step}": [LearnerLost("x")] for step in (2, 4)})

    run(tmp_path / "run", losing(), "train.max_learner_restarts=1", "checkpoint.every_steps=1")
    with pytest.raises(LearnerLost):
        run(tmp_path / "other", losing(), "train.max_learner_restarts=1", "checkpoint.every_steps=9", "eval.every_steps=0")


def test_each_checkpoint_has_the_score_of_the_evaluation_at_its_step_the_last_one_too(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run(run_dir, ScriptedParts())
    scores = {path.parent.name: json.loads(path.read_text())["score"] for path in run_dir.glob("checkpoints/*/manifest.json")}
    accuracy = {e["step"]: e["accuracy"] for e in json.loads((run_dir / "eval.json").read_text()).values()}
    assert scores == {f"step-{step:06d}": accuracy[step] for step in (4, 5)}


def test_a_run_that_was_killed_once_it_was_finished_has_the_score_of_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not gone on with to have it then."""
    run_dir = tmp_path / "run"

    def killed(path: Path, text: str) -> None:
        write_whole(path, text)
        if '"after"' in text:
            raise KeyboardInterrupt

    monkeypatch.setattr(driver.files, "write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        run(run_dir, ScriptedParts())
    assert finished(run_dir)
    assert json.loads((run_dir / "checkpoints" / "step-000005" / "manifest.json").read_text())["score"] == 1


def test_nothing_of_a_checkpoint_that_was_being_removed_at_the_last_commit_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, settings = tmp_path / "run" / "checkpoints", ["eval.every_steps=0", "checkpoint.keep_last=1"]

    def killed(path: Path) -> None:
        if (folder / "step-000005").exists():
            raise KeyboardInterrupt
        remove(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        remove = checkpoint.remove
        patch.setattr(checkpoint, "remove", killed)
        run(tmp_path / "run", ScriptedParts(), *settings)
    assert "going on after step 5" in run(tmp_path / "run", ScriptedParts(), *settings, resume=True)
    assert os.listdir(folder) == ["step-000005"]


def test_the_best_by_evaluation_stays_though_no_checkpoint_was_due_at_its_step(tmp_path: Path) -> None:
    scripted = ScriptedParts()
    scripted.reward = lambda request: float(request.episode_id.startswith("eval-step-3"))
    settings = ["train.num_steps=7", "eval.every_steps=3", "checkpoint.every_steps=2", "checkpoint.keep_last=1"]
    run(tmp_path / "run", scripted, *settings)
    assert committed_steps(tmp_path / "run") == [3, 7]
    run(tmp_path / "none", ScriptedParts(), *settings, "checkpoint.every_steps=0")
    assert committed_steps(tmp_path / "none") == []
    run(tmp_path / "last", ScriptedParts(), "checkpoint.keep_last=1")
    assert committed_steps(tmp_path / "last") == [5]  # the best, too, which no commit could know


def test_a_run_goes_on_for_longer_than_was_planned_at_first(tmp_path: Path, whole) -> None:
    with pytest.raises(RolloutError):
        run(tmp_path / "run", ScriptedParts({"sync 3": RolloutError("killed")}), "train.num_steps=3", "checkpoint.every_steps=1")
    scripted = ScriptedParts()
    run(tmp_path / "run", scripted, resume=True)
    assert scripted.weights == whole[1]


def test_where_every_checkpoint_is_damaged_nothing_is_thrown_away(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(RolloutError):
        run(run_dir, ScriptedParts({"sync 5": RolloutError("killed")}), "checkpoint.every_steps=1")
    for weights in run_dir.glob("checkpoints/*/weights.json"):
        weights.write_text("[]")
    before = outcome(run_dir)
    with pytest.raises(UserError, match="none of the checkpoints in .* is whole; to begin again remove that folder and metrics"):
        run(run_dir, ScriptedParts(), resume=True)
    assert outcome(run_dir) == before and len(before["steps"]) == 4


def test_an_evaluation_before_training_is_of_a_run_that_begins_and_of_none_that_goes_on(tmp_path: Path) -> None:
    with pytest.raises(RolloutError):
        run(tmp_path / "run", ScriptedParts({"sync 5": RolloutError("killed")}))
    (tmp_path / "run" / "eval.json").unlink()  # as a person is told to where it is damaged
    scripted = ScriptedParts()
    said = run(tmp_path / "run", scripted, resume=True)
    assert "collect eval-before" not in scripted.calls
    assert set(json.loads((tmp_path / "run" / "eval.json").read_text())) == {"step-2", "step-4", "after"}
    assert ["held-out", "accuracy", "(4", "tasks)", "-", "1.000"] in [line.split() for line in said[-1].splitlines()]


def killed_after_step_2(run_dir: Path, *overrides: str, tiny: Path | None = None) -> Path:
    """The folder of a run that was killed in step 5, with a checkpoint of step 2."""
    with pytest.raises(RolloutError):
        run(run_dir, ScriptedParts({"sync 5": RolloutError("killed")}), *overrides, tiny=tiny)
    return run_dir


def without(run_dir: Path, key: str) -> None:
    """Makes of the checkpoint of step 2 one of an earlier version, that did not hold this."""
    folder = run_dir / "checkpoints" / "step-000002"
    state = json.loads((folder / "run.json").read_text())
    del state[key]
    (folder / "run.json").write_text(json.dumps(state))
    checkpoint._seal(folder, 2, None)


@pytest.mark.parametrize("name", ["metrics.jsonl", "trajectories.jsonl"])
def test_rows_that_a_power_cut_took_though_a_checkpoint_vouches_for_them_are_told_of(tmp_path: Path, name: str) -> None:
    path = killed_after_step_2(tmp_path / "run") / name
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    assert not [line for line in run(tmp_path / "whole", ScriptedParts(), resume=True) if "has lost" in line]
    lines = path.read_text().splitlines(keepends=True)
    num_bytes = sum(len(line) for line in lines if json.loads(line)["step"] <= 2)
    path.write_text(lines[0])
    told = f"{path} has {len(lines[0])} bytes of the {num_bytes} that it had at this step: the machine has lost rows of it"
    assert told in run(tmp_path / "run", ScriptedParts(), resume=True)


def test_a_checkpoint_that_does_not_tell_how_many_rows_there_were_is_gone_on_from(tmp_path: Path, whole) -> None:
    without(killed_after_step_2(tmp_path / "run"), "num_bytes")
    run(tmp_path / "run", ScriptedParts(), resume=True)
    assert outcome(tmp_path / "run") == whole[0]


def test_the_rows_up_to_a_checkpoint_are_on_the_device_before_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(Path(f"/proc/self/fd/{number}").readlink().name))
    run(tmp_path / "run", ScriptedParts())
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        assert synced.index(name) < synced.index("manifest.json")
        assert synced.count(name) == synced.count("run.json") == 3


OWN_TASK = """
from toolrl_ray.types import Task

def load_tasks(config):
    tasks = [Task(f"t/{n}", str(n), str(n), "t") for n in range(12)]
    return tasks[4:], tasks[:4]

def render_prompt(task, few_shot):
    return task.prompt

def reward(trajectory):
    return 1.0
"""


def contents(run_dir: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def folder_of_weights(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model-1.safetensors").write_bytes(bytes(5 * 2**20))
    (folder / "model-2.safetensors").write_bytes(b"12")
    return folder


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda folder: (folder / "policy" / "model-2.safetensors").write_bytes(b"21"), "policy.path"),
        (lambda folder: (folder / "policy" / "model-1.safetensors").write_bytes(bytes(4 * 2**20) + b"1" * 2**20), "policy.path"),
        (lambda folder: (folder / "policy" / "model-2.safetensors").unlink(), "policy.path"),
        (lambda folder: (folder / "own.py").write_text(OWN_TASK.replace("1.0", "0.5")), "task.module"),
        (lambda folder: (folder / "part.py").write_text(OWN_TASK.replace("1.0", "0.5")), "task.parts.b.module"),
    ],
)
def test_a_run_whose_policy_or_task_module_is_another_now_is_not_gone_on_with(tmp_path: Path, change, key: str) -> None:
    settings = [f"policy.path={folder_of_weights(tmp_path / 'policy')}"]
    for name in ("own", "part"):
        (tmp_path / f"{name}.py").write_text(OWN_TASK)
    parts = f"task.parts={{a: {{module: toolrl_ray.tasks.calculator}}, b: {{module: {tmp_path}/part.py}}}}"
    settings += [parts] if "parts" in key else [f"task.module={tmp_path}/own.py"]
    run_dir = killed_after_step_2(tmp_path / "run", *settings)
    before = contents(run_dir)
    unload(tmp_path)
    change(tmp_path)
    scripted = ScriptedParts()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=f"the files of {key} are not those that the run began with"):
        patch.setattr(driver, "WandbTracker", lambda *_: pytest.fail("begun"))  # it has files in the folder, and a page
        run(run_dir, scripted, *settings, "train.num_steps=50", "checkpoint.keep_last=1", resume=True)
    assert contents(run_dir) == before and scripted.calls == []


def test_a_run_whose_heldout_tasks_are_others_now_is_not_gone_on_with(tmp_path: Path) -> None:
    """In files of data: nothing of the task module shows it."""
    settings = ["task.source=gsm8k", f"task.path={tmp_path}/data.jsonl"]
    rows = [{"expr": f"{n}+1", "result": str(n + 1), "split": "test" if n < 4 else "train"} for n in range(12)]

    def have(rows: list[dict[str, str]]) -> None:
        (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    have(rows)
    run_dir = killed_after_step_2(tmp_path / "run", *settings)
    before = contents(run_dir)
    have([{"expr": "50+1", "result": "51", "split": "test"}, *rows[1:]])
    with pytest.raises(UserError, match=r"^the held-out tasks are not those that the run began with \(task\.\*\), .*; bring .* back"):
        run(run_dir, scripted := ScriptedParts(), *settings, "train.num_steps=50", resume=True)
    assert contents(run_dir) == before and scripted.calls == []
    have(rows)
    assert "going on after step 2" in run(run_dir, ScriptedParts(), *settings, resume=True)


def test_a_run_that_begins_again_evaluates_again_before_it(tmp_path: Path) -> None:
    """Nothing tells whether the policy and the held-out tasks are those of the evaluation that there is."""
    with pytest.raises(RolloutError):
        run(tmp_path / "run", ScriptedParts({"sync 1": RolloutError("killed")}))
    scripted = ScriptedParts({"sync 1": [LearnerLost("x")]})
    scripted.reward = lambda request: 0.5
    run(tmp_path / "run", scripted, resume=True)
    assert scripted.calls.count("collect eval-before") == 1  # a learner that is lost changes neither
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["before"]["accuracy"] == 0
    transcripts = load_trajectories(tmp_path / "run" / "eval" / "before" / "trajectories.jsonl")
    assert [(step, t.reward) for step, t in transcripts] == [(0, 0.5)] * 4


OTHER_POLICY = "the files of policy.path are not those that the run began with"


def test_a_run_whose_tiny_policy_was_made_anew_as_another_is_not_gone_on_with(tmp_path: Path) -> None:
    made, other = (folder_of_weights(tmp_path / name) for name in ("tiny-1", "tiny-2"))
    run_dir = killed_after_step_2(tmp_path / "run", tiny=made)
    (other / "model-2.safetensors").write_bytes(b"21")
    before = contents(run_dir)
    scripted = ScriptedParts()
    with pytest.raises(UserError, match=OTHER_POLICY):
        run(run_dir, scripted, resume=True, tiny=other)
    assert contents(run_dir) == before and scripted.calls == []
    shutil.copytree(made, tmp_path / "moved")  # as in another cache
    assert "going on after step 2" in run(run_dir, scripted, resume=True, tiny=tmp_path / "moved")


@pytest.mark.parametrize("name", ["gone", "org/name"])
def test_of_a_policy_that_is_not_here_nothing_is_known(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert origin.of_policy(str(tmp_path / name)) == origin.of_policy(name) == {}


def test_a_run_whose_policy_has_new_weights_on_the_hub_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--name"

    def loaded(commit: str, weights: bytes | None) -> None:
        (snapshot := repository / "snapshots" / commit).mkdir(parents=True)
        (snapshot / "config.json").touch()
        if weights:
            (snapshot / "model.safetensors").write_bytes(weights)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)

    loaded("1" * 40, b"12")
    run_dir = killed_after_step_2(tmp_path / "run", "policy.path=org/name")
    loaded("2" * 40, b"21")
    with pytest.raises(UserError, match=OTHER_POLICY):
        run(run_dir, ScriptedParts(), "policy.path=org/name", resume=True)
    for commit, weights in ("3" * 40, b"12"), ("4" * 40, None):  # its README changed; only other nodes have the weights
        shutil.copytree(run_dir, tmp_path / commit)
        loaded(commit, weights)
        assert "going on after step 2" in run(tmp_path / commit, ScriptedParts(), "policy.path=org/name", resume=True)


def test_a_checkpoint_that_does_not_tell_what_the_run_began_from_is_gone_on_from(tmp_path: Path) -> None:
    settings = [f"policy.path={folder_of_weights(tmp_path / 'policy')}"]
    without(killed_after_step_2(tmp_path / "run", *settings), "origin")
    (tmp_path / "policy" / "model-2.safetensors").unlink()
    assert "going on after step 2" in run(tmp_path / "run", ScriptedParts(), *settings, resume=True)


def test_a_policy_and_a_task_module_that_are_as_they_were_are_gone_on_with_also_by_a_learner_that_was_lost(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_TASK)
    settings = [f"policy.path={folder_of_weights(tmp_path / 'policy')}", f"task.module={tmp_path}/own.py"]
    run_dir = killed_after_step_2(tmp_path / "run", *settings)
    scripted = ScriptedParts({"sync 4": [LearnerLost("x")]})
    note = scripted.note

    def edited(call: str) -> None:
        if call == "update":
            (tmp_path / "own.py").write_text("edited while the run goes on by what it has loaded")
        note(call)

    scripted.note = edited
    run(run_dir, scripted, *settings, resume=True)
    assert scripted.calls.count("restart") == 1


def unload(folder: Path) -> None:
    """What a new process would read again."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(folder)):
            del sys.modules[name]


def test_with_staleness_the_prompts_under_way_at_a_kill_are_run_again_and_each_is_trained_once(tmp_path: Path) -> None:
    ahead = "stream.max_staleness_steps=2"
    with pytest.raises(RolloutError):
        run(tmp_path / "run", ScriptedParts({"sync 4": RolloutError("killed")}), ahead, "checkpoint.every_steps=1")
    scripted = ScriptedParts()
    run(tmp_path / "run", scripted, ahead, resume=True)
    assert sorted(scripted.weights, key=int) == [str(number) for number in range(15)]
    assert [m["step"] for m in load_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    ids = [t.request.episode_id for _, t in load_trajectories(tmp_path / "run" / "trajectories.jsonl")]
    assert len(ids) == len(set(ids)) == 15


def test_the_prompt_ledger_of_a_checkpoint_is_taken_by_the_thread_that_admits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another thread a prompt could be admitted between two of its lines, and be trained twice after a kill."""
    threads = []
    state_dict = Stream.state_dict
    monkeypatch.setattr(Stream, "state_dict", lambda stream: threads.append(threading.current_thread()) or state_dict(stream))
    scripted = ScriptedParts()
    scripted.concurrent = True
    run(tmp_path / "run", scripted, "checkpoint.every_steps=1", "stream.max_staleness_steps=1")
    assert threads == [threading.main_thread()] * 5
