"""`toolrl sweep` with a stub in the place of `toolrl train`: processes, failures, Ctrl-C, resuming; and Ray jobs, with a fake client."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.conftest import HEARS_CTRL_C
from toolrl_ray import cli, sweep, sweep_runs
from toolrl_ray.placement import Share

ROOT = Path(__file__).resolve().parents[2]
STUB = [sys.executable, str(Path(__file__).parent / "study_stub.py")]


@pytest.fixture(autouse=True)
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sweep_runs, "TRAIN", STUB)
    monkeypatch.setattr(sweep_runs, "POLL_S", 0.02)


def test_a_failed_seed_is_named_at_once_the_others_go_on_and_a_resumed_study_runs_it_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("FAIL-0").touch()
    assert cli.main(["sweep", "calculator", "--seeds", "3", "--dir", "study", "learner.lr=1e-4"]) == 1
    out = capsys.readouterr().out
    assert "seed-0: FAILED after 0.0 min with exit code 1: toolrl: RolloutError: the engine is gone (log: " in out
    assert out.index("seed-0: FAILED") < out.index("seed-1: started")
    assert "seed-1: done after 0.0 min, accuracy 0.000 -> 0.900" in out
    assert "**1 of 3 runs are not done and in no mean: calculator seed 0 (failed).**" in out
    assert "| calculator | 2 of 3 | 0.8500 | 0.8000 to 0.9000 | 0.8000 |" in out

    Path("FAIL-0").unlink()
    assert cli.main(["sweep", "--resume", "study"]) == 0
    out = capsys.readouterr().out
    assert "2 of 3 runs need nothing" in out and "seed-1: started" not in out
    assert "| calculator | 3 of 3 | 0.9000 |" in out and "not done" not in out
    names = {path.name for path in (tmp_path / "study").iterdir()}
    runs = {name for seed in range(3) for name in (f"seed-{seed}", f"seed-{seed}.log")}
    assert names == {"study.json", "plot.png", "plot.svg", "table.md", "table.csv", "seed-0.failed-1", *runs}

    assert cli.main(["sweep", "calculator", "--seeds", "3", "--dir", "study", "learner.lr=1e-4"]) == 0  # the same command: nothing to do
    assert "3 of 3 runs need nothing" in capsys.readouterr().out
    assert cli.main(["sweep", "calculator", "--seeds", "4", "--dir", "study", "learner.lr=1e-4"]) == 2


MAIN = "import sys; from toolrl_ray import cli, sweep_runs; sweep_runs.TRAIN = {stub!r}; sys.exit(cli.main(sys.argv[1:]))"


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*HEARS_CTRL_C, sys.executable, "-c", MAIN.format(stub=STUB), "sweep", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.05)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_study_that_is_ended_takes_its_runs_along_and_can_be_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sent: signal.Signals, code: int
) -> None:
    Path("WAIT-1").touch()
    process = start("calculator", "--seeds", "2", "--dir", "study", "--jobs", "2")
    wait_for(tmp_path / "WAITING-1")
    train, its_child = (psutil.Process(int(pid)) for pid in (tmp_path / "WAITING-1").read_text().split())
    (run,) = [run for run in sweep.plan(sweep.open_study(tmp_path / "study"), tmp_path / "study") if run.seed == 1]
    assert sweep.state(tmp_path / "study", run) is sweep.State.RUNNING
    os.killpg(process.pid, sent)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert (sent is signal.SIGKILL) or "to go on: toolrl sweep --resume" in out and "Traceback" not in out
    if sent is signal.SIGKILL:  # no time for its grandchildren, but its runs are told to end
        assert psutil.wait_procs([train], timeout=30)[1] == []
        its_child.kill()
    assert psutil.wait_procs([train, its_child], timeout=30)[1] == []

    Path("WAIT-1").unlink()
    assert cli.main(["sweep", "--resume", "study"]) == 0
    assert "| calculator | 2 of 2 |" in capsys.readouterr().out


def test_a_run_that_another_process_works_on_is_left_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("study").mkdir()
    sweep.claim(sweep.make_study("calculator", [], [0, 1]), Path("study"))
    with Path("study/seed-0.log").open("a") as log:
        assert sweep.hold(log)
        assert cli.main(["sweep", "--resume", "study"]) == 1
    out = capsys.readouterr().out
    assert "seed-0: another process runs it; left to that" in out and "calculator seed 0 (running)" in out
    assert "seed-1: done" in out


def test_an_array_script_has_the_runs_that_are_missing_and_each_of_its_tasks_runs_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sweep", "calculator", "--seeds", "3", "--dir", "study", "rollout.num_gpus=1", "learner.num_gpus=1", "rollout.num_cpus=2"]
    assert cli.main([*arguments, "--slurm"]) == 0
    assert cli.main(["sweep", "--run-one", "study", "1"]) == 0
    assert cli.main(["sweep", "--run-one", "study", "1"]) == 0  # again: done before
    capsys.readouterr()
    assert cli.main(["sweep", "--resume", "study", "--slurm"]) == 0
    script = (tmp_path / "study" / "sweep.sbatch").read_text()
    assert "#SBATCH --array=0,2\n" in script and "#SBATCH --gpus=2\n" in script and "#SBATCH --cpus-per-task=3\n" in script
    assert f'--run-one {tmp_path / "study"} "$SLURM_ARRAY_TASK_ID"\n' in script
    assert subprocess.run(["bash", "-n", "study/sweep.sbatch"], timeout=10).returncode == 0
    assert "sbatch " in capsys.readouterr().out
    assert cli.main(["sweep", "--run-one", "study", "3"]) == 2
    assert cli.main(["sweep", "--plot", "study"]) == 1
    assert "2 of 3 runs are not done" in capsys.readouterr().out


def test_an_array_script_of_a_folder_with_blanks_and_percent_signs_says_what_was_meant(tmp_path: Path) -> None:
    assert cli.main(["sweep", "calculator", "--seeds", "1", "--dir", "100 % mine/my study", "--slurm"]) == 0
    folder = tmp_path / "100 % mine" / "my study"
    lines = (folder / "sweep.sbatch").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH --job-name=") or "--output=" in line]
    assert [shlex.split(option) for option in options] == [
        ["--job-name=my_study"],
        [f"--output={tmp_path}/100 %% mine/my study/slurm-%a.out"],  # Slurm reads %% as %
    ]


def test_runs_at_once_on_one_machine_have_gpus_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    seen = []
    monkeypatch.setattr(sweep_runs, "LocalRun", lambda arguments, cwd, log, environment: seen.append(environment))
    nodes, gpus = sweep_runs.this_machine()
    start_one = sweep_runs.local_start(tmp_path, "calculator", str(tmp_path), gpus, 2)
    for place, run in enumerate(sweep.plan(sweep.make_study("calculator", [], [0, 1]), tmp_path)):
        start_one(run, place)
    assert nodes[0]["GPU"] == 4
    assert seen == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]


@pytest.mark.parametrize(
    ("nodes", "count"),
    [
        ([{"CPU": 2}], 1),
        ([{"CPU": 8}], 5),  # 1.6 CPUs each
        ([{"CPU": 1}], 1),  # the run itself says what is missing
        ([{"CPU": 4}, {"CPU": 3}], 3),
        ([{"CPU": 1}, {"CPU": 1}], 1),
        ([{"CPU": 1}] * 4, 2),  # no node holds one: spread
    ],
)
def test_as_many_runs_at_once_as_the_nodes_hold(nodes: list[dict[str, float]], count: int) -> None:
    assert sweep_runs.how_many([Share("rollout", 1, 1.0), Share("learner", 1, 0.5), Share("tools", 1, 0.1)], nodes) == count


def test_gpus_count_as_cpus_do() -> None:
    assert sweep_runs.how_many([Share("rollout", 1, 1.0, 1.0), Share("learner", 1, 1.0, 1.0)], [{"CPU": 64, "GPU": 8}]) == 4


class Jobs:
    """A Ray job server as its client shows it: runs the stub's main at once, and then says that it runs twice before it is over."""

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}
        self.failing: list[str] = []
        self.stopped: list[str] = []
        self.endless = False

    def submit(self, arguments: list[str], job: str) -> None:
        self.asked[job] = 0
        if subprocess.run([*STUB, *arguments], capture_output=True, timeout=60).returncode:
            self.failing.append(job)

    def get_job_status(self, job: str) -> SimpleNamespace:
        self.asked[job] += 1
        if self.asked[job] == 2:
            raise ConnectionError("a network that comes back")
        over = self.asked[job] > 2 and not self.endless or job in self.stopped
        value = "FAILED" if job in self.failing else "SUCCEEDED"
        return SimpleNamespace(is_terminal=lambda: over, value=value if over else "RUNNING")

    def get_job_logs(self, job: str) -> str:
        return "what the job said\n"

    def stop_job(self, job: str) -> None:
        self.stopped.append(job)


@pytest.fixture
def jobs(tmp_path: Path) -> SimpleNamespace:
    server, said = Jobs(), []
    runs = sweep.plan(sweep.make_study("calculator", [], [0, 1, 2]), tmp_path)

    def run() -> None:
        starter = sweep_runs.job_start(tmp_path, "calculator", server, server.submit)
        sweep_runs.run_all(sweep_runs.todo(tmp_path, runs, said.append), starter, 2, said.append, tmp_path)

    return SimpleNamespace(server=server, said=said, run=run, states=lambda: [sweep.state(tmp_path, run).value for run in runs])


def test_ray_jobs_are_followed_to_their_end_and_a_failed_one_is_named(jobs: SimpleNamespace) -> None:
    Path("FAIL-1").touch()
    jobs.run()
    assert jobs.states() == ["done", "failed", "done"]
    (failure,) = [line for line in jobs.said if "FAILED" in line]
    assert failure.startswith("seed-1: FAILED after 0.0 min with exit code 1: what the job said")


def test_a_job_of_a_study_that_was_killed_is_taken_up_and_not_run_twice(jobs: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "seed-0.job").write_text("job-0")
    jobs.server.asked["job-0"] = 0
    (tmp_path / "seed-0.log").touch()
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "seed-0" / "metrics.jsonl").write_text("")
    jobs.run()
    assert len(jobs.server.asked) == 3  # two were submitted
    assert (tmp_path / "seed-0").exists() and not (tmp_path / "seed-0.failed-1").exists()


def test_ctrl_c_stops_the_jobs(jobs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.server.endless = True
    naps = iter([None, None, KeyboardInterrupt()])

    def sleep(seconds: float) -> None:
        if error := next(naps, None):
            raise error

    monkeypatch.setattr(sweep_runs, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    with pytest.raises(KeyboardInterrupt):
        jobs.run()
    assert jobs.server.stopped == list(jobs.server.asked) and len(jobs.server.asked) == 2


def test_what_contradicts_itself_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep.claim(sweep.make_study("calculator", [], [0]), tmp_path / "study")
    for arguments, part in [
        ([], "give a RECIPE and --seeds N"),
        (["calculator"], "Give --seeds N"),
        (["calculator", "--resume", "study"], "give a RECIPE"),
        (["--resume", "study", "--seeds", "3"], "take --seeds and --dir away"),
        (["--resume", "none"], "no study.json"),
        (["--from-wandb", "a/b"], "--tag TAG"),
        (["--resume", "study", "--slurm", "--address", "http://head:8265"], "--slurm contradicts --address='http://head:8265'"),
        (["nope", "--seeds", "2"], "unknown recipe 'nope'"),
        (["calculator", "--seeds", "2", "learner.lr=1e-3,x"], "learner.lr='x'"),
    ]:
        assert cli.main(["sweep", *arguments]) == 2
        error = capsys.readouterr().err
        assert part in error and len(error.splitlines()) == 1
    for seeds in ("0", "x", "1,1", "-2"):
        with pytest.raises(SystemExit):
            cli.main(["sweep", "calculator", f"--seeds={seeds}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study"]
    assert json.loads((tmp_path / "study" / "study.json").read_text())["seeds"] == [0]


def test_a_metric_that_no_run_has_leaves_the_picture_as_it_is_and_names_those_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "study"
    assert cli.main(["sweep", "calculator", "--seeds", "2", "--dir", "study"]) == 0
    with (study / "seed-1" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "kept/by_one": 0.5, "weights/backend": "nccl"}) + "\n")
    before = {path.name: path.read_bytes() for path in study.iterdir() if path.is_file()}
    capsys.readouterr()
    for name in ("objective/lk", "weights/backend"):
        assert cli.main(["sweep", "--plot", "study", "--metric", "env/reward_mean", "--metric", name]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--metric={name!r} is measured in none of the runs; choose one of " in line
        assert all(known in line for known in ("env/reward_mean", "objective/kl", "time/step_s", "kept/by_one"))
    assert {path.name: path.read_bytes() for path in study.iterdir() if path.is_file()} == before
    assert cli.main(["sweep", "--plot", "study", "--metric", "kept/by_one"]) == 0
    assert (study / "plot.png").read_bytes() != before["plot.png"]
    sweep.claim(sweep.make_study("calculator", [], [0]), tmp_path / "young")  # nothing is known of its runs yet
    assert cli.main(["sweep", "--plot", "young", "--metric", "objective/lk"]) == 1
