"""The command: every mistake is one line and exit code 2, before anything starts; and parts close before tracking does."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import traceback
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.unit.scripted_parts import ScriptedParts
from toolrl_ray import cli, driver, recipe
from toolrl_ray.errors import RolloutError, UserError
from toolrl_ray.tracking.metrics import load_metrics
from toolrl_ray.tracking.trajectories import load_trajectories
from toolrl_ray.types import EpisodeRequest

SMALL = ["task.num_train=8", "task.num_heldout=4", "eval.num_tasks=4", "train.tasks_per_step=3", "train.num_steps=1", "tracking.wandb=off"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("TOOLRL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    (tmp_path / "evaluated").mkdir()
    (tmp_path / "evaluated" / "trajectories.jsonl").write_text("")
    (tmp_path / "broken.py").write_text("x = 1\nimport nothing_of_this_name\n")
    (tmp_path / "bad.yaml").write_text("train: [1")
    functions = "def load_tasks(config): return [], []\ndef render_prompt(task, few_shot): return ''\ndef reward(trajectory): return 0.0\n"
    (tmp_path / "no_tasks.py").write_text(functions)
    return tmp_path


def run(arguments: list[str]) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as exit:  # argparse
        return exit.code


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("", ["COMMAND", "toolrl --help"]),
        ("frobnicate", ["'frobnicate'", "train", "doctor"]),
        ("train", ["recipe", "toolrl train --help"]),
        ("submit", ["recipe", "toolrl submit --help"]),
        ("train calculator --quickly", ["--quickly"]),
        ("train train.num_steps=3", ["'train.num_steps=3'", "calculator"]),
        ("train --resume nowhere", ["/nowhere'", "no config.yaml there", "give the folder of a run"]),
        ("train --resume used train.num_steps=3", ["/used'", "no config.yaml there"]),
        ("train calculator --resume used", ["'calculator'", "--resume", "give one of them"]),
        ("train --resume used calculator train.num_steps=3", ["'calculator'", "--resume", "give one of them"]),
        ("train --resume", ["--resume", "expected one argument", "toolrl train --help"]),
        ("train nope", ["'nope'", *recipe.recipe_names()]),
        ("train nowhere.yaml", ["'nowhere.yaml'", "calculator"]),
        ("train bad.yaml", ["bad.yaml", "not valid YAML"]),
        ("train calculator train.num_steps", ["'train.num_steps'", "key.path=value"]),
        ("train calculator train.steps=1", ["'train.steps'", "num_steps, tasks_per_step"]),
        ("train calculator --in-process train.num_steps=x", ["train.num_steps='x'", "integer"]),
        ("train calculator train.num_steps=-1", ["train.num_steps=-1", "greater than or equal to 0"]),
        ("train calculator rollout.engine=sglang", ["rollout.engine='sglang'", "'vllm' or 'transformers'"]),
        ("train calculator algo.advantage=grpo algo.kl_coef=0", ["train.group_size=1", "set train.group_size=2"]),
        ("train calculator weights.backend=nccl", ["weights.backend=nccl", "rollout.num_gpus=0"]),
        ("train calculator run_dir=used", ["used'", "not empty", "choose another folder"]),
        ("train calculator run_dir=used/file/run", ["used/file/run'", "cannot be made"]),
        ("train calculator --in-process learner.num_ranks=2", ["learner.num_ranks=2", "--in-process", "set learner.num_ranks=1"]),
        ("train calculator --in-process rollout.num_actors=3", ["rollout.num_actors=3", "--in-process", "set rollout.num_actors=1"]),
        ("eval calculator --in-process rollout.num_actors=2", ["rollout.num_actors=2", "--in-process", "take --in-process away"]),
        ("train calculator --in-process policy.path=./nowhere", ["'./nowhere'", "no such folder", "Hub name"]),
        ("train calculator --in-process policy.path=/no/where", ["'/no/where'", "no such folder"]),
        ("train calculator --in-process policy.path=a/b/c", ["'a/b/c'", "no such folder"]),
        ("train calculator --in-process policy.path=empty", ["empty'", "no config.json"]),
        ("train calculator --in-process policy.path=\"''\"", ["policy.path=''", "at least 1 character"]),
        ("train calculator --in-process tools.names=[Hammer]", ["'Hammer'", "SimpleCalculatorTool"]),
        ("train calculator --in-process tools.names=[A] 'tools.custom={A: broken.py:A}'", ["broken.py, line 2", "ModuleNotFoundError"]),
        ("train calculator --in-process task.module=broken.py", ["task.module=", "broken.py, line 2", "nothing_of_this_name"]),
        ("train calculator --in-process task.module=no_such_module", ["task.module='no_such_module'", ".py file"]),
        ("train calculator --in-process task.module=no_tasks.py", ["no_tasks.py", "no training task"]),
        ("train calculator --in-process task.source=gsm8k task.path=none.jsonl", ["none.jsonl'", "cannot be read"]),
        ("eval calculator --policy ./nowhere --in-process", ["'./nowhere'", "no such folder"]),
        ("eval calculator --policy empty --in-process", ["empty'", "no config.json"]),
        ("eval calculator --json none/result.json", ["'none/result.json'", "/none'", "make it first"]),
        ("eval calculator --json empty", ["'empty'", "is a folder"]),
        ("eval calculator --transcripts none/here", ["'none/here'", "/none'", "make it first"]),
        ("eval calculator --transcripts used/file", ["'used/file'", "is a file"]),
        ("eval calculator --transcripts evaluated", ["'evaluated'", "trajectories.jsonl already", "another folder"]),
        ("eval calculator --policy ''", ["--policy", "'' is empty", "toolrl eval --help"]),
        ("eval calculator --json ''", ["--json", "'' is empty"]),
        ("eval calculator --transcripts ' '", ["--transcripts", "' ' is empty"]),
        ("eval calculator --policy empty policy.path=other", ["--policy='empty'", "'policy.path=other'", "take one of them away"]),
        ("train calculator --resume ''", ["--resume", "'' is empty"]),
        ("submit calculator --address=", ["--address", "'' is empty"]),
        ("sweep calculator --seeds 1 --dir ''", ["--dir", "'' is empty"]),
        ("eval calculator eval.temperature=0", ["eval.temperature=0", "greater than or equal to 0.01"]),
        ("bootstrap calculator policy.path=org/name", ["policy.path='org/name'", "policy.path=tiny"]),
        ("submit calculator train.num_steps=x", ["train.num_steps='x'"]),
        ("submit calculator --resume runs/one", ["RECIPE='calculator'", "--resume"]),
        ("submit", ["a recipe is missing", "--resume RUN_DIR"]),
        ("train", ["a recipe is missing", "--resume RUN_DIR"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(command: str, parts: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    assert run(shlex.split(command)) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and error.startswith("toolrl: ")
    assert [part for part in parts if part not in error] == []
    left = sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts and path != folder / "runs")
    assert left == before, "nothing may stay behind"


def test_a_working_folder_that_was_removed_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "gone").mkdir()
    monkeypatch.chdir(folder / "gone")
    (folder / "gone").rmdir()
    try:
        assert run(["doctor"]) == 2
    finally:
        monkeypatch.chdir(folder)
    assert capsys.readouterr().err == "toolrl: the working folder cannot be used (No such file or directory); change to another one\n"


@pytest.mark.parametrize("package", ["ray", "vllm", "deepspeed"])
def test_a_package_that_is_not_installed_is_one_line_with_the_install_line(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert run(["train", "calculator"]) == 2
    error = capsys.readouterr().err
    assert error == f"toolrl: {package} is not installed; pip install -e '.[cpu]', or with GPUs pip install -e '.[gpu]'\n"


def test_submit_hands_the_recipe_or_the_run_to_go_on_with_to_train(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    submitted = []
    monkeypatch.setattr("toolrl_ray.submit.submit", lambda address, arguments, wait, say: submitted.append(arguments) or 0)
    assert run(["submit", "calculator", "train.num_steps=3"]) == 0
    assert run(["submit", "--resume", "runs/one", "train.num_steps=9", "--no-wait"]) == 0
    assert submitted == [["calculator", "train.num_steps=3"], ["--resume", str(folder / "runs/one"), "train.num_steps=9"]]


def test_a_package_that_only_submit_needs_is_told_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ray.job_submission", raising=False)
    assert run(["submit", "calculator"]) == 2
    assert capsys.readouterr().err.startswith("toolrl: ray is not installed; pip install")


def test_a_missing_module_of_our_own_is_a_defect_and_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "toolrl_ray.submit", None)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["submit", "calculator"])


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> ScriptedParts:
    """Stands for the parts of an --in-process run; the end of tracking is noted among their calls."""
    scripted = ScriptedParts()
    module = SimpleNamespace(in_process_parts=lambda config, policy_dir, learner: scripted.parts())
    monkeypatch.setitem(sys.modules, "toolrl_ray.in_process", module)
    monkeypatch.setattr(cli, "_policy_dir", lambda config: "policy-dir")
    monkeypatch.setattr(driver.WandbTracker, "finish", lambda tracker, summary=None: scripted.note("finish"))
    return scripted


def test_a_run_closes_its_parts_and_then_its_tracking(scripted: ScriptedParts, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "calculator", "--in-process", "run_dir=run", *SMALL]) == 0
    assert scripted.calls[-4:] == ["save_policy", "collect eval-after", "close", "finish"]
    assert "held-out accuracy (4 tasks)" in capsys.readouterr().out
    assert (folder / "run" / "policy").is_dir()


@pytest.mark.parametrize(
    ("at", "error", "code", "stays"),
    [
        ("update", KeyboardInterrupt(), 130, False),
        ("collect eval-before", RolloutError("the engine is gone"), 1, False),
        ("collect eval-after", RolloutError("the engine is gone"), 1, True),
        ("collect eval-after", KeyboardInterrupt(), 130, True),
    ],
)
def test_a_run_that_ends_early_closes_in_the_same_order_and_keeps_its_folder_if_it_trained(
    scripted: ScriptedParts, folder: Path, at: str, error: BaseException, code: int, stays: bool
) -> None:
    scripted.raising[at] = error
    arguments = ["train", "calculator", "--in-process", "run_dir=run", *SMALL]
    assert run(arguments) == code
    assert scripted.calls[-2:] == ["close", "finish"]
    assert (folder / "run" / "metrics.jsonl").exists() == (folder / "run").exists() == stays
    scripted.raising.clear()
    assert run(arguments) == (2 if stays else 0)  # the same command again


def start(*overrides: str) -> int:
    return run(
        ["train", "calculator", "--in-process", "run_dir=run dir", *SMALL, "train.num_steps=4", "checkpoint.every_steps=1", *overrides]
    )


def resume(*overrides: str) -> int:
    return run(["train", "--resume", "run dir", *overrides, "--in-process"])


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RolloutError("the engine is gone"), 1, "RolloutError: the engine is gone"),
        (UserError("no room"), 2, "no room"),
    ],
)
def test_a_run_that_ends_early_says_last_how_to_go_on_and_goes_on_by_that_command(
    scripted: ScriptedParts, folder: Path, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, word: str
) -> None:
    scripted.raising["sync 3"] = error
    assert start() == code
    run_dir = folder / "run dir"
    command = f"toolrl train --in-process --resume '{run_dir}'"
    assert capsys.readouterr().err.splitlines() == [f"toolrl: {word}", f"toolrl: to go on from step 1: {command}"]
    del scripted.raising["sync 3"]
    scripted.calls.clear()
    assert run(shlex.split(command)[1:]) == 0
    assert scripted.calls[-5:] == ["sync 4", "save_policy", "collect eval-after", "close", "finish"]
    assert [m["step"] for m in load_metrics(run_dir / "metrics.jsonl")] == [1, 2, 3, 4]
    assert scripted.weights == [str(number) for number in range(12)]  # every prompt once
    assert resume() == 2
    assert "the run is finished; to go on longer set train.num_steps above 4" in capsys.readouterr().err


def test_any_other_error_keeps_its_traceback_with_how_to_go_on_at_its_end(scripted: ScriptedParts) -> None:
    scripted.raising["sync 3"] = ValueError("a defect")
    with pytest.raises(ValueError, match="a defect") as caught:
        start()
    assert traceback.format_exception(caught.value)[-1].startswith("to go on from step 1: toolrl train")


def test_without_a_checkpoint_or_after_the_end_there_is_nothing_to_go_on_from(
    scripted: ScriptedParts, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.raising["sync 1"] = KeyboardInterrupt()
    assert start() == 130 and not (folder / "run dir").exists()
    scripted.raising = {"finish": KeyboardInterrupt()}
    assert start() == 130
    assert capsys.readouterr().err == "toolrl: interrupted\n" * 2


def test_a_resumed_run_keeps_its_folder_whatever_stops_it_and_can_be_resumed_again(
    scripted: ScriptedParts, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.raising["sync 3"] = KeyboardInterrupt()
    assert start("checkpoint.every_steps=9") == 130
    assert resume("learner.lr=1") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("toolrl: learner.lr=1.0 contradicts the run in")
    scripted.raising = {"sync 0": KeyboardInterrupt()}  # goes on from the beginning, and not even that
    assert resume("checkpoint.every_steps=1") == 130
    scripted.raising = {}
    scripted.weights.clear()
    assert resume("train.num_steps=5") == 0
    assert [m["step"] for m in load_metrics(folder / "run dir" / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_finished_run_goes_on_longer(scripted: ScriptedParts, folder: Path) -> None:
    assert start() == 0
    assert resume("train.num_steps=6") == 0
    assert [m["step"] for m in load_metrics(folder / "run dir" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert json.loads((folder / "run dir" / "eval.json").read_text())["after"]["step"] == 6


def test_a_run_that_is_under_way_is_not_resumed(scripted: ScriptedParts, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = []
    scripted.reward = lambda request: float(codes.append(resume()) or 1.0)
    assert start() == 0
    assert set(codes) == {2}
    assert f"the run is under way in process {os.getpid()} on " in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"toolrl {metadata.version('toolrl-ray')}\n"


@pytest.mark.parametrize("where", ["in Python", "in a wait of Ray's"])
def test_sigterm_ends_a_run_as_ctrl_c_does_and_says_how_to_go_on(
    scripted: ScriptedParts, folder: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    def reward(request: EpisodeRequest) -> float:
        if request.group_id == "9":
            try:
                signal.raise_signal(signal.SIGTERM)
            except KeyboardInterrupt:
                if where == "in Python":
                    raise
                raise KeyboardInterrupt from None  # Ray's wait keeps no other
        return 1.0

    scripted.reward = reward
    assert start() == 143
    assert scripted.calls[-2:] == ["close", "finish"]
    terminated, how = capsys.readouterr().err.splitlines()
    assert terminated == "toolrl: terminated" and how.startswith("toolrl: to go on from step 2: toolrl train")


@pytest.mark.parametrize("words", ["--in-process {} run_dir=run", "{} run_dir=run --in-process", "--in-process --verbose {} run_dir=run"])
def test_options_may_stand_before_between_and_behind_recipe_and_overrides(scripted: ScriptedParts, folder: Path, words: str) -> None:
    assert run(["train", *words.format("calculator").split(), *SMALL]) == 0
    assert (folder / "run" / "policy").is_dir()


EVAL = ["eval", "calculator", "--in-process", *SMALL]


def test_an_evaluation_is_one_collection_that_is_printed_and_written_for_machines(
    scripted: ScriptedParts, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*EVAL, "--json", "empty/result.json"]) == 0
    assert scripted.calls == ["collect eval-eval", "close"]
    result = json.loads((folder / "empty" / "result.json").read_text())
    assert {"recipe", "policy", "seed", "num_tasks", "tool_use_rate", "tool_error_rate", "turns_mean", "tokens_per_s"} <= set(result)
    names = ("accuracy", "sampled/num_samples", "sampled/temperature", "sampled/pass@4", "without_tools/accuracy", "tool_gain")
    assert [result[name] for name in names] == [1.0, 4, 1.0, 1.0, 0.0, 1.0]
    out = capsys.readouterr().out
    assert "gained by the tools  +1.000 [+0.000, +1.000]" in out and "pass@4" in out  # four tasks say little


def test_an_evaluation_leaves_out_what_is_not_wanted(scripted: ScriptedParts, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*EVAL, "--no-baseline", "eval.num_samples=0", "--json", "empty/result.json"]) == 0
    assert len(scripted.collections[0]) == 4  # each task once
    assert not [name for name in json.loads((folder / "empty" / "result.json").read_text()) if "/" in name or name.startswith("tool_gain")]
    out = capsys.readouterr().out
    assert "accuracy" in out and not [word for word in ("sampled, ", "pass@", "without", "gained") if word in out]


def test_an_evaluation_saves_its_episodes_once(scripted: ScriptedParts, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*EVAL, "eval.num_samples=1", "eval.temperature=0.5", "--transcripts", "episodes"]
    assert run(arguments) == 0
    saved = [t.request for _, t in load_trajectories(folder / "episodes" / "trajectories.jsonl")]
    assert saved == scripted.collections[0]
    assert {(r.temperature, r.with_tools) for r in saved} == {(0.0, True), (0.5, True), (0.0, False)}
    assert run(arguments) == 2
    assert "'episodes' has a trajectories.jsonl already" in capsys.readouterr().err
