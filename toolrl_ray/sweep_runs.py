"""Runs a study's runs, so many at once: as processes of this machine, or as Ray jobs of a cluster.

One loop starts, watches and counts. A run that fails costs itself alone. Whatever ends the loop (Ctrl-C, SIGTERM, an error), every run
that is under way is told to end, waited for, and killed when it does not: nothing stays behind.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from toolrl_ray import sweep
from toolrl_ray.errors import UserError
from toolrl_ray.placement import Share
from toolrl_ray.submit import Unreachable, new_job_id
from toolrl_ray.sweep import PlannedRun, State

TRAIN = [sys.executable, "-m", "toolrl_ray.cli", "train"]
POLL_S = 0.5
STOP_S = 60.0  # for a run to take its parts down
UNREACHABLE_S = 300.0  # after which a job whose cluster does not answer counts as failed
PR_SET_PDEATHSIG = 1


class Running(Protocol):
    """A run that was started. stop: ask it to end; kill: end it and whatever it started, if anything is left."""

    def poll(self) -> int | None: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...


Submit = Callable[[list[str], str], None]  # with the arguments of `toolrl train` and the id of its job
Start = Callable[[PlannedRun, int], Running | None]  # with the number of its place, 0 to jobs - 1; None: others run it, or have


def run_all(todo: list[PlannedRun], start: Start, jobs: int, say: Callable[[str], None], folder: Path) -> None:
    """Runs `todo`, `jobs` at once. How each ended is said here and lies in its folder."""
    waiting, running = deque(todo), dict[int, tuple[PlannedRun, Running, float]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.popleft()
                place = min(set(range(jobs)) - set(running))
                try:
                    started = start(run, place)
                except Exception as error:  # whatever it is, it costs this run alone
                    say(f"{run.name}: FAILED to start: {error if isinstance(error, UserError) else repr(error)}")
                    continue
                if started is not None:
                    running[place] = (run, started, time.monotonic())
                    say(f"{run.name}: started ({len(todo) - len(waiting)} of {len(todo)})")
                else:
                    is_done = sweep.state(folder, run) is State.DONE
                    say(f"{run.name}: " + ("done by another process" if is_done else "another process runs it; left to that"))
            time.sleep(POLL_S)
            for place, (run, process, since) in list(running.items()):
                if (code := process.poll()) is not None:
                    process.kill()  # what it may have left
                    del running[place]
                    say(ended(folder, run, code, time.monotonic() - since))
    finally:
        stop_all([process for _, process, _ in running.values()])


def stop_all(running: list[Running]) -> None:
    """A second Ctrl-C kills at once."""
    try:
        for process in running:
            process.stop()
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline and any(process.poll() is None for process in running):
            time.sleep(POLL_S)
    finally:
        for process in running:
            process.kill()


def ended(folder: Path, run: PlannedRun, code: int, seconds: float) -> str:
    """One line on how a run ended."""
    results = sweep.evaluations(folder / run.name)
    minutes = f"{seconds / 60:.1f} min"
    log = folder / f"{run.name}.log"
    if "after" in results:
        accuracies = [results.get(label, {}).get("accuracy") for label in ("before", "after")]
        change = "accuracy " + " -> ".join("-" if accuracy is None else f"{accuracy:.3f}" for accuracy in accuracies)
        return f"{run.name}: done after {minutes}, {change}" + (f" (exit code {code} afterwards, see {log})" if code else "")
    return f"{run.name}: FAILED after {minutes} with exit code {code}: {sweep.last_line(log) or 'no output'} (log: {log})"


def todo(folder: Path, runs: list[PlannedRun], say: Callable[[str], None]) -> list[PlannedRun]:
    """The runs that are missing or have failed."""
    states = {run.name: sweep.state(folder, run) for run in runs}
    for run in runs:
        if states[run.name] is State.RUNNING:
            say(f"{run.name}: another process runs it; left to that")
    return [run for run in runs if states[run.name] in (State.MISSING, State.FAILED)]


def how_many(shares: list[Share], nodes: list[dict[str, float]]) -> int:
    """How many plans the nodes hold at once, each on a node of its own where one holds it; at least 1."""
    need = {"CPU": sum(s.count * s.num_cpus for s in shares), "GPU": sum(s.count * s.num_gpus for s in shares)}

    def held(resources: dict[str, float]) -> int:
        counts = [math.floor(resources.get(key, 0.0) / amount + 1e-6) for key, amount in need.items() if amount]
        return min(counts, default=1)

    total = {key: sum(node.get(key, 0.0) for node in nodes) for key in need}
    return max(1, sum(map(held, nodes)) or held(total))


def this_machine() -> tuple[list[dict[str, float]], list[str]]:
    """Its resources as the one node, and the names of its GPUs as CUDA_VISIBLE_DEVICES has them."""
    from toolrl_ray.doctor import gpu_names

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(i) for i in range(len(gpu_names()))] if visible is None else [name for name in visible.split(",") if name.strip()]
    return [{"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(len(gpus))}], gpus


class LocalRun:
    """`toolrl train` as a process with a session of its own: Ctrl-C reaches the study alone, which then ends its runs."""

    def __init__(self, arguments: list[str], cwd: str, log: Any, environment: dict[str, str]):
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None

        def die_with_parent() -> None:
            if libc is not None:
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # also when the study is killed with no time to tell its runs

        self._process = subprocess.Popen(
            [*TRAIN, *arguments],
            cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait(timeout=10)


class JobRun:
    """`toolrl train` as a Ray job. Its id lies in NAME.job, so that a study that was killed finds its jobs again."""

    def __init__(self, client: Any, job: str, log: Any):
        self._client, self._job, self._log = client, job, log
        self._answered = time.monotonic()
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            try:
                status = self._client.get_job_status(self._job)
                self._answered = time.monotonic()
                if status.is_terminal():
                    self._code = 0 if status.value == "SUCCEEDED" else 1
                    self._log.write(self._said())
            except (RuntimeError, OSError) as error:  # a network that comes back
                if time.monotonic() - self._answered > UNREACHABLE_S:
                    self._log.write(f"{self._job}: the cluster did not answer for {UNREACHABLE_S:.0f} s: {error}\n")
                    self._code = 1
            self._log.flush()
        return self._code

    def _said(self) -> str:
        """A node that is gone takes the logs along, but not how the job ended."""
        try:
            return self._client.get_job_logs(self._job)
        except (RuntimeError, OSError) as error:
            return f"the logs of {self._job} cannot be had: {' '.join(str(error).split())}\n"

    def stop(self) -> None:
        try:
            self._client.stop_job(self._job)
        except (RuntimeError, OSError) as error:
            self._log.write(f"{self._job} could not be stopped: {error}\n")

    def kill(self) -> None:
        self._log.close()  # Ray kills a job that does not stop


def local_start(folder: Path, recipe: str, cwd: str, gpus: list[str], gpus_per_run: int) -> Start:
    """Each place has GPUs of its own, since every run's Ray would take the first ones."""

    def start(run: PlannedRun, place: int) -> Running | None:
        mine = gpus[place * gpus_per_run : (place + 1) * gpus_per_run]
        with (folder / f"{run.name}.log").open("a") as log:  # the process keeps it, and the lock, open
            if not sweep.hold(log) or sweep.state(folder, run) is State.DONE:
                return None
            if (note := folder / f"{run.name}.job").exists():
                job = note.read_text().strip()
                raise UserError(f"it is the Ray job {job}: give --address again; or, if that job is over for good, remove {note}")
            arguments = sweep.arguments(folder, recipe, run)
            return LocalRun(arguments, cwd, log, {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {})

    return start


def _is_over(client: Any, job: str) -> bool:
    """Also of a cluster that is gone. Where no answer comes the job may run on, which whoever follows it finds out."""
    try:
        return client.get_job_status(job).is_terminal()
    except OSError:
        return False
    except RuntimeError as error:  # what Ray raises for every answer that is no status
        return f"{job} does not exist" in str(error)


def _patient(submit: Submit) -> Submit:
    """Submits again where no answer came, until none has come for UNREACHABLE_S: nor could the other jobs be asked meanwhile."""
    silent_since: float | None = None

    def patiently(arguments: list[str], job: str) -> None:
        nonlocal silent_since
        while True:
            try:
                submit(arguments, job)
                silent_since = None
                return
            except Unreachable:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > UNREACHABLE_S:
                    raise
                time.sleep(POLL_S)

    return patiently


def job_start(folder: Path, recipe: str, client: Any, submit: Submit) -> Start:
    """A job of an earlier call that still runs is taken up again."""
    submit = _patient(submit)

    def start(run: PlannedRun, place: int) -> Running | None:
        log, note = (folder / f"{run.name}.log").open("a"), folder / f"{run.name}.job"
        try:
            if not sweep.hold(log) or sweep.state(folder, run) is State.DONE:
                log.close()
                return None
            job = note.read_text() if note.exists() else ""
            if not job or _is_over(client, job):
                arguments = sweep.arguments(folder, recipe, run)
                note.write_text(job := new_job_id())  # first: whatever ends this process, the job is not lost
                try:
                    submit(arguments, job)
                except Unreachable:
                    raise
                except Exception:
                    note.unlink()
                    raise
            return JobRun(client, job, log)
        except BaseException:
            log.close()  # and let go of the run
            raise

    return start
