"""How a run of a study is started, or not: whose folder it is, what a cluster does not answer, and where the study began."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.unit.test_sweep_runs import stub  # noqa: F401  of every test here too
from toolrl_ray import cli, placement, submit, sweep, sweep_cli, sweep_runs
from toolrl_ray.errors import UserError
from toolrl_ray.placement import Share

LIVES = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("process 4711 on elsewhere", file=file, flush=True)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Of two seeds."""
    sweep.claim(sweep.make_study("calculator", [], [0, 1]), tmp_path / "study")
    return tmp_path / "study"


@pytest.fixture
def live(study: Path) -> Iterator[Path]:
    """The folder of seed 0, with a run of another process in it."""
    (study / "seed-0").mkdir()
    (study / "seed-0" / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    command = [sys.executable, "-c", LIVES, str(study / "seed-0" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"locked\n"
        yield study / "seed-0"
        process.communicate(timeout=30)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_folder_of_a_run_that_lives_stays_and_its_seed_alone_fails_to_start(
    live: Path, capsys: pytest.CaptureFixture[str], checkpoints: bool
) -> None:
    if checkpoints:
        (live / "checkpoints" / "step-000010").mkdir(parents=True)
    assert cli.main(["sweep", "--resume", "study", "--jobs", "1"]) == 1
    out = capsys.readouterr().out
    assert f"seed-0: FAILED to start: {str(live)!r}: a run is under way there in process 4711 on elsewhere; stop that first" in out
    assert "seed-0: started" not in out and "seed-1: done" in out
    assert (live / "metrics.jsonl").exists() and not (live.parent / "seed-0.failed-1").exists()


def test_a_run_that_is_a_ray_job_is_not_begun_on_this_machine(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (study / "seed-0.job").write_text("raysubmit_1")
    (study / "seed-0").mkdir()
    assert cli.main(["sweep", "--resume", "study", "--jobs", "1"]) == 1
    out = capsys.readouterr().out
    assert "seed-0: FAILED to start: it is the Ray job raysubmit_1: give --address again; " in out and "seed-1: done" in out
    assert (study / "seed-0").is_dir() and not (study / "seed-0.failed-1").exists()


def test_the_hint_of_a_study_that_was_stopped_has_its_address_and_metrics(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(run: sweep.PlannedRun, place: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_cli, "_cluster", lambda *_: (start, 1))
    assert cli.main(["sweep", "--resume", "study", "--address", "http://head:8265", "--metric", "env/x", "--metric", "env/y"]) == 130
    hint = f"to go on: toolrl sweep --resume {study} --address http://head:8265 --metric=env/x --metric=env/y\n"
    assert hint in "".join(capsys.readouterr())


class Client:
    """Of a job server where every job has `value` in the end; `failures`: what its next answers are instead."""

    def __init__(self, *failures: Exception, value: str = "SUCCEEDED"):
        self.failures, self.value, self.submitted = list(failures), value, list[str]()

    def get_job_status(self, job: str) -> SimpleNamespace:
        if self.failures:
            raise self.failures.pop(0)
        return SimpleNamespace(is_terminal=lambda: self.value != "RUNNING", value=self.value)

    def get_job_logs(self, job: str) -> str:
        return "what the job said\n"

    def stop_job(self, job: str) -> None:
        pass

    def submit(self, arguments: list[str], job: str) -> None:
        self.submitted.append(job)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ConnectionError("Connection reset by peer"), False),
        (RuntimeError("Request failed with status code 502: Bad Gateway."), False),
        (RuntimeError("Request failed with status code 404: Job raysubmit_1 does not exist."), True),
    ],
)
def test_only_a_job_that_its_cluster_does_not_know_is_submitted_again(study: Path, error: Exception, again: bool) -> None:
    run = sweep.plan(sweep.open_study(study), study)[0]
    (study / "seed-0").mkdir()
    (study / "seed-0.job").write_text("raysubmit_1")
    client = Client(error, value="RUNNING")
    running = sweep_runs.job_start(study, "calculator", client, client.submit)(run, 0)
    assert running is not None and running.poll() is None
    running.kill()
    assert (study / "seed-0.job").read_text() == (client.submitted[0] if again else "raysubmit_1")
    assert (study / "seed-0").exists() != again


@pytest.mark.parametrize(("value", "code"), [("SUCCEEDED", 0), ("FAILED", 1)])
def test_a_job_whose_logs_cannot_be_had_ends_all_the_same(study: Path, value: str, code: int) -> None:
    def no_logs(job: str) -> str:
        raise RuntimeError("Request failed with status code 500:\nits node is gone")

    (client := Client(value=value)).get_job_logs = no_logs  # type: ignore[method-assign]
    run = sweep.plan(sweep.open_study(study), study)[0]
    running = sweep_runs.job_start(study, "calculator", client, client.submit)(run, 0)
    assert running is not None and running.poll() == code
    running.kill()
    said = f"the logs of {client.submitted[0]} cannot be had: Request failed with status code 500: its node is gone"
    assert sweep.last_line(study / "seed-0.log") == said


@pytest.fixture
def run_jobs(study: Path):
    """Runs the study's seeds as jobs of a client, one at a time; returns what was said."""

    def run(client: Client, submit_job) -> list[str]:
        said: list[str] = []
        server = SimpleNamespace(submit_job=submit_job)
        starter = sweep_runs.job_start(study, "calculator", client, partial(submit.submit_train, server, "http://head:8265", cwd="/"))
        sweep_runs.run_all(sweep.plan(sweep.open_study(study), study), starter, 2, said.append, study)
        return said

    return run


def test_a_submit_whose_answer_is_lost_is_tried_again_and_makes_one_job(run_jobs, study: Path) -> None:
    made: list[str] = []

    def submit_job(submission_id: str, **_) -> str:
        if submission_id in made:  # as Ray answers
            raise RuntimeError(f"Request failed with status code 500: Job with submission_id {submission_id} already exists. Please use")
        made.append(submission_id)
        raise ConnectionError("Connection reset by peer")

    said = run_jobs(Client(), submit_job)
    assert said[:2] == ["seed-0: started (1 of 2)", "seed-1: started (2 of 2)"]
    assert made == [(study / f"seed-{seed}.job").read_text() for seed in (0, 1)]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConnectionError("refused"), "no Ray job server at http://head:8265 (refused); "),
        (RuntimeError("no room"), "no Ray job server at http://head:8265 (no room); "),
        (LookupError("a defect"), "LookupError('a defect')"),
    ],
)
def test_a_run_that_cannot_be_submitted_costs_itself_alone(run_jobs, study: Path, monkeypatch, error: Exception, line: str) -> None:
    monkeypatch.setattr(sweep_runs, "UNREACHABLE_S", 0.1)
    client = Client()
    client.stop_job = pytest.fail  # type: ignore[method-assign]

    def submit_job(entrypoint: str, **_) -> str:
        if "seed=1" in entrypoint:
            raise error
        return "job-1"

    said = run_jobs(client, submit_job)
    assert said[0] == "seed-0: started (1 of 2)" and said[1].startswith(f"seed-1: FAILED to start: {line}")
    assert said[2].startswith("seed-0: FAILED after 0.0 min with exit code 0: what the job said")
    assert not sweep.is_held(study / "seed-1.log")
    # Where no answer came the job may be there all the same: a later call asks for it by its id.
    assert (study / "seed-1.job").exists() == isinstance(error, OSError)


def test_an_evaluation_that_is_not_there_is_a_dash(study: Path) -> None:
    run = sweep.plan(sweep.open_study(study), study)[0]
    (study / "seed-0").mkdir()
    (study / "seed-0" / "eval.json").write_text(json.dumps({"after": {"accuracy": 1.0}}))
    assert sweep_runs.ended(study, run, 0, 60.0) == "seed-0: done after 1.0 min, accuracy - -> 1.000"


@pytest.mark.parametrize("as_job", [False, True])
def test_a_seed_that_another_process_has_done_meanwhile_is_not_run_again(study: Path, as_job: bool) -> None:
    runs, said, client = sweep.plan(sweep.open_study(study), study), [], Client()
    todo = sweep_runs.todo(study, runs, said.append)
    (study / "seed-0").mkdir()
    (study / "seed-0" / "eval.json").write_text(json.dumps({"after": {"accuracy": 1.0}}))
    local = sweep_runs.local_start(study, "calculator", str(study), [], 0)
    job = sweep_runs.job_start(study, "calculator", client, client.submit)
    sweep_runs.run_all(todo[:1], job if as_job else local, 1, said.append, study)
    assert said == ["seed-0: done by another process"] and not client.submitted
    assert not list(study.glob("*.failed-1")) and not sweep.is_held(study / "seed-0.log")


def test_a_study_whose_project_has_another_name_by_now_is_one_line_before_anything_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    sweep.claim(sweep.make_study("calculator", [], [0]), tmp_path / "project" / "s")
    renamed = (tmp_path / "project").rename(tmp_path / "renamed")
    monkeypatch.chdir(renamed)
    for command in (["--resume", "s"], ["--resume", "s", "--slurm"], ["--run-one", "s", "0"]):
        assert cli.main(["sweep", *command]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "which is gone" in line]
        assert f"{str(tmp_path / 'project')!r}, which is gone: bring it back, or put " in line
    assert [path.name for path in (renamed / "s").iterdir()] == ["study.json"]
    study = json.loads((renamed / "s" / "study.json").read_text())
    (renamed / "s" / "study.json").write_text(json.dumps({**study, "cwd": str(renamed)}))
    assert cli.main(["sweep", "--resume", "s"]) == 0


@pytest.mark.parametrize(("gpus", "share", "jobs"), [(1, 0.4, 1), (3, 0.4, 3), (4, 1.5, 2), (1, 0.0, 16)])
def test_by_default_no_more_runs_at_once_than_have_whole_gpus(
    study: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, share: float, jobs: int
) -> None:
    shares = [Share("rollout", 1, 1.0, share)]
    monkeypatch.setattr(placement, "plan", lambda _: shares)
    monkeypatch.setattr(sweep_runs, "this_machine", lambda: ([{"CPU": 16.0, "GPU": float(gpus)}], [str(i) for i in range(gpus)]))
    origin = sweep.open_study(study)
    assert sweep_cli._machine(SimpleNamespace(jobs=None), origin, study, sweep.plan(origin, study))[1] == jobs


@pytest.mark.parametrize("name", ["größe", "日本", "🚀"])
def test_a_study_may_lie_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    (run,) = sweep.plan(sweep.make_study("calculator", [], [0]), tmp_path / name)
    assert run.config.run_dir == str(tmp_path / name / "seed-0") and run.config.tracking.wandb_tags == [name]


def test_studies_that_begin_in_one_second_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "time", SimpleNamespace(strftime=lambda _: "now"))
    for lr in ("1e-4", "3e-4"):
        assert cli.main(["sweep", "calculator", "--seeds", "1", f"learner.lr={lr}"]) == 0
    assert cli.main(["sweep", "calculator", "--seeds", "1", "learner.lr=-1"]) == 2  # no folder for that
    assert sorted(path.name for path in (tmp_path / "sweeps").iterdir()) == ["calculator-now", "calculator-now-2"]
    assert sweep.default_folder("calculator") != sweep.default_folder("calculator"), "before either is claimed"


def test_a_folder_for_a_study_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "sweeps").touch()
    with pytest.raises(UserError, match=r"no folder for the study can be made in '.*/sweeps' \(File exists\); give another: --dir"):
        sweep.default_folder("calculator")


def test_an_array_for_a_study_whose_last_run_is_under_way_says_which(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sweep", "--run-one", "study", "1"]) == 0
    with (study / "seed-0.log").open("a") as log:
        assert sweep.hold(log)
        assert cli.main(["sweep", "--resume", "study", "--slurm"]) == 0
    assert "nothing to submit: under way seed-0; every other run is done\n" in (out := capsys.readouterr().out)
    assert "every run is done" not in out
    assert cli.main(["sweep", "--run-one", "study", "0"]) == 0
    assert cli.main(["sweep", "--resume", "study", "--slurm"]) == 0
    assert "every run is done: nothing to submit" in capsys.readouterr().out
