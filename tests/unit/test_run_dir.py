"""The run folder: one process's alone, given back when nothing was trained, and taken again to go on."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolrl_ray import recipe
from toolrl_ray.checkpoint import CheckpointStore
from toolrl_ray.errors import UserError
from toolrl_ray.run_dir import claim, finished, release, reopen, truncate_to, unlock, write_whole
from toolrl_ray.tracking.metrics import MetricsWriter, load_metrics


def config(run_dir: Path | None):
    return recipe.load("calculator", [f"run_dir={run_dir}"] if run_dir else [])


def test_a_claimed_folder_holds_the_resolved_configuration(tmp_path: Path) -> None:
    run_dir = claim(config(tmp_path / "runs" / "a"))
    assert recipe.load(str(run_dir / "config.yaml")) == config(tmp_path / "runs" / "a")


def test_the_default_folder_is_named_after_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = claim(config(None))
    assert run_dir.parent == tmp_path / "runs" and run_dir.name.startswith("calculator-")


def test_of_runs_that_want_one_folder_at_once_exactly_one_gets_it(tmp_path: Path) -> None:
    together = threading.Barrier(8)
    wanted = config(tmp_path / "run")

    def attempt(_: int) -> str:
        together.wait(timeout=30)
        try:
            return str(claim(wanted))
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(attempt, range(8)))
    assert results.count(str(tmp_path / "run")) == 1
    assert sum("exists and is not empty" in result for result in results) == 7


def test_a_folder_with_anything_in_it_is_refused_and_an_empty_one_taken(tmp_path: Path) -> None:
    assert claim(config(tmp_path)) == tmp_path
    with pytest.raises(UserError, match="exists and is not empty; choose another folder"):
        claim(config(tmp_path))


def test_a_place_where_no_folder_can_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        claim(config(tmp_path / "file" / "run"))
    with pytest.raises(UserError, match="choose another folder"):
        claim(config(tmp_path / "file"))
    for name in ("a\0b", "\ud800"):
        with pytest.raises(UserError, match=r"cannot be made \(.+\); choose another folder"):
            claim(config(None).model_copy(update={"run_dir": str(tmp_path / name)}))


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("toolrl_ray.run_dir.time.strftime", lambda form: "now")
    assert [claim(config(None)).name for _ in range(3)] == ["calculator-now", "calculator-now-2", "calculator-now-3"]


def test_what_ended_before_its_first_step_gives_the_folder_back(tmp_path: Path) -> None:
    for content in (None, ""):
        run_dir = claim(config(tmp_path / "run"))
        if content is not None:
            (run_dir / "metrics.jsonl").write_text(content)
        release(run_dir)
        unlock(run_dir)
        assert not run_dir.exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "policy"])
def test_what_was_trained_stays(tmp_path: Path, name: str) -> None:
    run_dir = claim(config(tmp_path / "run"))
    (run_dir / name).write_text('{"step":1}\n')
    release(run_dir)
    assert (run_dir / name).exists() and (run_dir / "config.yaml").exists()


def test_what_has_a_checkpoint_stays_though_it_has_no_metrics(tmp_path: Path) -> None:
    run_dir = claim(config(tmp_path / "run"))
    store = CheckpointStore(run_dir, 1)
    store.begin(1)
    store.commit(1, None)
    release(run_dir)
    assert store.newest() is not None and (run_dir / "config.yaml").exists()


def interrupted(folder: Path, *overrides: str) -> Path:
    """The folder of a run whose process is gone."""
    run_dir = claim(recipe.load("calculator", [f"run_dir={folder}", *overrides]))
    unlock(run_dir)
    return run_dir


def refusal(run_dir: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        reopen(run_dir, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("take", ["claim(recipe.load('calculator', [f'run_dir={folder}']))", "reopen(Path(folder))"])
def test_a_folder_is_taken_for_as_long_as_the_process_lives_that_has_it_and_the_refusal_names_it(tmp_path: Path, take: str) -> None:
    folder = tmp_path / "run"
    if take.startswith("reopen"):
        interrupted(folder)
    code = f"from pathlib import Path; from toolrl_ray import recipe; from toolrl_ray.run_dir import *; folder = {str(folder)!r}\n{take}\n"
    with subprocess.Popen([sys.executable, "-c", code + "print(flush=True); input()"], stdin=-1, stdout=-1, text=True) as owner:
        try:
            assert owner.stdout.readline() == "\n"
            assert f"under way in process {owner.pid} on " in refusal(folder)
            with pytest.raises(UserError, match="exists and is not empty"):
                claim(config(folder))
        finally:
            owner.kill()  # no chance to unlock anything
    assert reopen(folder).run_dir == str(folder)
    assert f"under way in process {os.getpid()} on " in refusal(folder)
    unlock(folder)
    assert reopen(folder).run_dir == str(folder)


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_where_the_file_system_has_no_locks_the_process_that_the_folder_names_has_it_while_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch)
    folder = interrupted(tmp_path / "run")
    assert (folder / ".lock").read_text() == ""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1) as owner:
        (folder / ".lock").write_text(note := f"process {owner.pid} on {platform.node()}\n")
        assert f"under way in process {owner.pid} on " in refusal(folder) and f"remove {folder}/.lock" in refusal(folder)
        assert (folder / ".lock").read_text() == note
        owner.kill()
    assert reopen(folder)
    assert f"under way in process {os.getpid()} on " in refusal(folder)
    unlock(folder)
    (folder / ".lock").write_text(f"process {os.getpid()} on {platform.node()}\n")  # of a container that had the same number for it
    assert reopen(folder)


def test_where_the_file_system_has_no_locks_it_is_said_that_a_process_elsewhere_may_have_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_locks(monkeypatch)
    folder = interrupted(tmp_path / "run")
    assert reopen(folder) and not caplog.messages
    unlock(folder)
    (folder / ".lock").write_text("process 12 on node-a\n")
    assert reopen(folder)
    (told,) = caplog.messages
    assert "was last taken by process 12 on node-a" in told and "cannot be known" in told
    assert (folder / ".lock").read_text() == f"process {os.getpid()} on {platform.node()}\n"


def test_of_resumes_of_one_run_at_once_exactly_one_gets_it(tmp_path: Path) -> None:
    run_dir, together = interrupted(tmp_path / "run"), threading.Barrier(8)

    def attempt(_: int) -> bool:
        together.wait(timeout=30)
        try:
            return reopen(run_dir).run_dir == str(run_dir)
        except UserError as error:
            return "the run is under way in " not in str(error)

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(attempt, range(8))).count(True) == 1


def test_what_is_no_folder_of_a_run_is_refused_and_nothing_is_written_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        assert refusal(path) == f"--resume {str(path)!r}: no config.yaml there; give the folder of a run"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "trajectories.jsonl", "eval.json", "checkpoints"])
def test_a_folder_in_the_place_of_a_file_is_refused_before_the_run_goes_on(tmp_path: Path, name: str) -> None:
    path = interrupted(tmp_path) / name
    for right in tmp_path.glob(name):
        shutil.rmtree(right) if right.is_dir() else right.unlink()
    path.touch() if name == "checkpoints" else path.mkdir()
    assert f"{path} is no fi" in refusal(tmp_path) or f"{path} is no folder" in refusal(tmp_path)


def test_a_saved_configuration_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = interrupted(tmp_path) / "config.yaml"
    text = path.read_text()
    path.write_text(text[: text.index("episode_deadline_s:") + len("episode_deadline_s:")])
    assert refusal(tmp_path).startswith(f"{path} is damaged, or of another version: episode.episode_deadline_s=None: ")


def test_a_folder_that_was_moved_is_the_run_folder_where_it_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    assert reopen(Path("new")).run_dir == str(tmp_path / "new")


def test_a_folder_for_which_there_is_no_room_is_there_for_the_next_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="cannot be made .No space left on device."):
            claim(config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert claim(config(tmp_path / "run")).is_dir()


def test_a_folder_may_have_any_characters(tmp_path: Path) -> None:
    run_dir = interrupted(tmp_path / "run-🚀")
    assert reopen(run_dir).run_dir == str(run_dir)


def test_a_run_is_not_resumed_to_fewer_steps_than_it_has(tmp_path: Path) -> None:
    run_dir = interrupted(tmp_path / "run", "train.num_steps=20", "checkpoint.every_steps=4")
    (run_dir / "checkpoints" / "step-000008").mkdir(parents=True)
    assert "train.num_steps=7 is less than the 8 of its newest checkpoint" in refusal(run_dir, "train.num_steps=7")
    assert reopen(run_dir, ["train.num_steps=8"])  # to save and evaluate it


def test_a_finished_run_is_refused_unless_it_is_to_go_on_longer(tmp_path: Path) -> None:
    run_dir = interrupted(tmp_path / "run", "train.num_steps=6")
    (run_dir / "policy").mkdir()
    (run_dir / "eval.json").write_text(json.dumps({"before": {"step": 0}}))
    assert not finished(run_dir) and reopen(run_dir)  # killed between its policy and its last evaluation
    unlock(run_dir)
    (run_dir / "eval.json").write_text(json.dumps({"before": {"step": 0}, "after": {"step": 6}}))
    assert finished(run_dir)
    assert "the run is finished; start a new run" in refusal(run_dir)  # there is no checkpoint
    (run_dir / "checkpoints" / "step-000006").mkdir(parents=True)
    for overrides in ([], ["train.num_steps=6"], ["checkpoint.every_steps=1"]):
        assert "the run is finished; to go on longer set train.num_steps above 6" in refusal(run_dir, *overrides)
    assert reopen(run_dir, ["train.num_steps=7"]).train.num_steps == 7


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_without_a_checkpoint_does_not_lose_its_results_by_going_on(tmp_path: Path, is_finished: bool) -> None:
    run_dir = interrupted(tmp_path / "run", "train.num_steps=6", "checkpoint.every_steps=0")
    (run_dir / "metrics.jsonl").write_text('{"step": 6}\n')
    if is_finished:
        (run_dir / "policy").mkdir()
        (run_dir / "eval.json").write_text(json.dumps({"after": {"step": 6}}))
    for overrides in (["train.num_steps=9"], ["train.num_steps=9", "checkpoint.every_steps=5"]):
        assert "has no checkpoint to go on from, and starting again there would lose its results" in refusal(run_dir, *overrides)
    assert (run_dir / "metrics.jsonl").read_text() == '{"step": 6}\n'


@pytest.mark.parametrize(
    ("settings", "num_steps", "is_refused"),
    [
        (["checkpoint.every_steps=4"], 4, False),  # that of step 4 was under way
        (["checkpoint.every_steps=4"], 5, True),
        (["checkpoint.every_steps=9", "eval.every_steps=2"], 2, False),
        (["checkpoint.every_steps=9", "eval.every_steps=2"], 3, True),
        (["checkpoint.every_steps=9", "train.num_steps=3"], 3, False),
    ],
)
@pytest.mark.parametrize("remedy", ["checkpoints", "metrics.jsonl"])
def test_a_run_whose_checkpoints_are_gone_does_not_lose_its_results_by_going_on(
    tmp_path: Path, settings: list[str], num_steps: int, is_refused: bool, remedy: str
) -> None:
    run_dir = interrupted(tmp_path / "run", "train.num_steps=6", *settings)
    trained(run_dir, num_steps=num_steps)
    (run_dir / "checkpoints").mkdir()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')  # which was never finished
    if is_refused:
        told = f"the run got to step {num_steps} and had checkpoints, which are gone; bring {run_dir}/checkpoints back, or start a new run"
        assert refusal(run_dir, "train.num_steps=9", "checkpoint.every_steps=100") == f"--resume {str(run_dir)!r}: {told}"
        (run_dir / "metrics.jsonl").unlink() if remedy == "metrics.jsonl" else (run_dir / "checkpoints" / "step-000002").mkdir()
    assert reopen(run_dir, ["train.num_steps=9", "checkpoint.every_steps=1"])
    unlock(run_dir)


FREE = [
    "learner.zero_stage=2", "learner.num_ranks=2", "learner.num_cpus=2", "learner.num_threads=2", "learner.max_microbatch_tokens=99",
    "learner.update_timeout_s=9", "weights.timeout_s=9", "train.stall_timeout_s=9", "episode.tool_deadline_s=1", "rollout.num_actors=2",
    "rollout.max_actors=3", "rollout.num_cpus=2", "rollout.kv_cache_gib=2", "rollout.gpu_memory_utilization=0.5", "rollout.num_threads=2",
    "tools.num_replicas=3", "tools.num_cpus=0.5", "tools.start_timeout_s=9", "checkpoint.every_steps=3", "checkpoint.keep_last=5",
    "tracking.wandb=offline", "tracking.wandb_tags=[a]", "train.num_steps=999", "algo.gamma=1", "learner.lr=1e-3",
    "rollout.max_tries=9", "rollout.max_in_flight=9", "eval.max_in_flight=9", "train.max_learner_restarts=9", "tools.max_in_flight=9",
    "tools.pools={SimpleCalculatorTool: {max_replicas: 4, num_cpus: 1}}", "learner.gradient_checkpointing=true",
    "weights.backend=object_store",
]  # fmt: skip


def test_where_and_how_fast_a_resumed_run_runs_may_differ(tmp_path: Path) -> None:
    run_dir = interrupted(tmp_path / "run", "learner.lr=0.001", "algo.gamma=1.0")
    assert reopen(run_dir, FREE) == recipe.load("calculator", ["learner.lr=0.001", *FREE, f"run_dir={run_dir}"])
    unlock(run_dir)
    assert reopen(run_dir, ["tools.app=shared"]).tools.app == "shared"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("algo.gamma=0.5", "algo.gamma=0.5 contradicts the run in"),
        ("seed=3", "which has 0; a new run can have it"),
        ("run_dir=elsewhere", "run_dir='elsewhere' contradicts"),
        ("policy.lora={rank: 4}", "policy.lora={'rank': 4, "),
        ("train.tasks_per_step=3", "train.tasks_per_step=3 contradicts"),
        ("rollout.engine=transformers", "rollout.engine='transformers' contradicts"),
        ("tools.options={SimpleCalculatorTool: {timeout_s: 1}}", "tools.options.SimpleCalculatorTool={'timeout_s': 1}"),
        ("learner.nothing=3", "unknown key 'learner.nothing'"),
        ("train.num_steps", "is not of the form key.path=value"),
    ],
)
def test_what_a_resumed_run_learns_may_not_differ_and_a_refusal_gives_the_folder_back(tmp_path: Path, override: str, told: str) -> None:
    run_dir = interrupted(tmp_path / "run")
    assert told in refusal(run_dir, "checkpoint.every_steps=3", override)
    assert reopen(run_dir)


def test_a_resumed_run_has_the_pools_of_the_first_and_a_new_default_reaches_what_they_leave_open(tmp_path: Path) -> None:
    tools = ["tools.names=[SimpleCalculatorTool]", "tools.num_cpus=0.5", "tools.max_in_flight=7"]
    run_dir = interrupted(tmp_path / "run", *tools, "tools.pools={SimpleCalculatorTool: {min_replicas: 2}}")
    pool = reopen(run_dir).tools.pool("SimpleCalculatorTool")
    assert (pool.min_replicas, pool.num_cpus, pool.max_in_flight) == (2, 0.5, 7)
    unlock(run_dir)
    pool = reopen(run_dir, ["tools.num_replicas=5", "tools.num_cpus=0.25"]).tools.pool("SimpleCalculatorTool")
    assert (pool.min_replicas, pool.num_cpus, pool.max_in_flight) == (2, 0.25, 7)


def trained(run_dir: Path, *, num_steps: int) -> None:
    with (run_dir / "trajectories.jsonl").open("w") as file:
        file.writelines(f'{{"step":{step},"text":"\u2028 é"}}\n' for step in range(1, num_steps + 1) for _ in range(2))
    metrics = MetricsWriter(run_dir)
    for step in range(1, num_steps + 1):
        metrics.write(step, {"a": step})
    metrics.close()
    labels = {"before": 0, **{f"step-{step}": step for step in range(2, num_steps, 2)}, "after": num_steps}
    (run_dir / "eval.json").write_text(json.dumps({label: {"step": step} for label, step in labels.items()}))
    for label in [*labels, "step-99"]:  # the last one was not in eval.json yet when the run was killed
        (run_dir / "eval" / label).mkdir(parents=True)
        (run_dir / "eval" / label / "trajectories.jsonl").touch()


@pytest.mark.parametrize("step", [0, 3, 4, 6])
def test_what_came_after_a_step_is_forgotten_everywhere_and_writing_goes_on_behind_it(tmp_path: Path, step: int) -> None:
    trained(tmp_path, num_steps=6)
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step":1,"cut')
    (tmp_path / "trajectories.jsonl.writing").write_text("of a process that ended")
    (tmp_path / "eval" / ".DS_Store").write_text("of a file manager")
    for _ in range(2):  # the second time there is nothing to do
        truncate_to(tmp_path, step)
    metrics = MetricsWriter(tmp_path)
    metrics.write(step + 1, {"a": "again"})
    metrics.close()
    assert [m["a"] for m in load_metrics(tmp_path / "metrics.jsonl")] == [*range(1, step + 1), "again"]
    lines = [json.loads(line) for line in (tmp_path / "trajectories.jsonl").read_text().split("\n")[:-1]]
    assert lines == [{"step": n, "text": "\u2028 é"} for n in range(1, step + 1) for _ in range(2)]
    labels = ["before", *(f"step-{n}" for n in range(2, 6, 2) if n <= step)]
    assert list(json.loads((tmp_path / "eval.json").read_text())) == labels
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == sorted([".DS_Store", *labels])
    assert not list(tmp_path.glob("*.writing"))


@pytest.mark.parametrize(("policy", "kept"), [(None, "old"), ("new", "new")])
def test_of_a_policy_that_was_being_written_nothing_stays_and_of_the_one_that_it_replaces_one_that_is_whole(
    tmp_path: Path, policy: str | None, kept: str
) -> None:
    for name, content in ((".policy.writing", "half"), (".policy.replaced", "old"), ("policy", policy)):
        if content:
            (tmp_path / name).mkdir()
            (tmp_path / name / "model.safetensors").write_text(content)
    for _ in range(2):
        truncate_to(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    assert (tmp_path / "policy" / "model.safetensors").read_text() == kept


def test_a_run_without_files_yet_has_nothing_to_forget(tmp_path: Path) -> None:
    truncate_to(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


@given(steps=st.lists(st.integers(0, 9), max_size=8), step=st.integers(0, 9), cut=st.integers(0, 400))
def test_wherever_a_file_was_cut_off_only_whole_lines_up_to_the_step_stay(steps: list[int], step: int, cut: int) -> None:
    steps.sort()
    lines = [f'{{"step":{n},"x":{"1" * (n * 5 + 1)}}}\n' for n in steps]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        path.write_text("".join(lines)[:cut])
        num_whole = path.read_text().count("\n")
        truncate_to(Path(folder), step)
        assert path.read_text() == "".join(line for n, line in zip(steps[:num_whole], lines, strict=False) if n <= step)


@pytest.mark.parametrize(("name", "where"), [("metrics.jsonl", ", line 2,"), ("trajectories.jsonl", ", line 3,"), ("eval.json", "")])
@pytest.mark.parametrize("damage", ['"step:2', '"stop":2', '"step":"2"', '"step":2,"x":[1,2}'])
def test_a_file_that_is_damaged_in_what_goes_is_one_line_and_all_stay_as_is(tmp_path: Path, name: str, where: str, damage: str) -> None:
    trained(tmp_path, num_steps=3)
    content = (tmp_path / name).read_text().replace('"step":2', damage, 1).replace('"before":', '"before:', 1)
    (tmp_path / name).write_text(content)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"{name}{where} is damaged; "):
        truncate_to(tmp_path, 1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_forgetting_writes_nothing_so_that_it_needs_no_room_and_reads_only_what_goes(tmp_path: Path) -> None:
    """A disk may be full of these very files."""
    trained(tmp_path, num_steps=3)
    path = tmp_path / "trajectories.jsonl"
    content = path.read_text().replace('"step":1', '"step:1', 1)  # would be seen
    path.write_text(content)
    (tmp_path / "eval.json").unlink()
    written = os.stat(path).st_ino
    truncate_to(tmp_path, 2)
    assert os.stat(path).st_ino == written
    assert path.read_text() == content[: content.index('{"step":3')]


@pytest.mark.parametrize("content", ["null", "[]", '{"after": {}}', '{"after": null}', '{"after": {"step": "6"}}'])
def test_evaluations_of_another_shape_are_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(UserError, match="eval.json is damaged; mend it, or remove it"):
        truncate_to(tmp_path, 1)
    (tmp_path / "policy").mkdir()
    assert finished(tmp_path) in (True, False)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_that_is_replaced_is_the_old_or_the_new_one_whenever_the_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    write_whole(tmp_path / "file", "old")

    def end(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, call, end)
        with pytest.raises(KeyboardInterrupt):
            write_whole(tmp_path / "file", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]
    write_whole(tmp_path / "file", "newer")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "newer")]
