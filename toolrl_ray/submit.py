"""`toolrl submit`: `toolrl train` as a Ray job on a cluster that is already up, where the package is installed."""

from __future__ import annotations

import os
import secrets
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from toolrl_ray.errors import UserError
from toolrl_ray.home import home

POLL_S = 1.0
LOOPBACK = "127.0.0.1,localhost,::1"
LOST_S = 60.0  # without an answer, after which a job that is waited for is given up
STOP_WAIT_S = 30  # that a job has to end in after SIGTERM


class Unreachable(UserError):
    """No answer came; one may come later."""


@contextmanager
def _told(address: str) -> Iterator[None]:
    """What a cluster may answer to a request, as one line."""
    from ray.exceptions import AuthenticationError, RayError

    try:
        yield
    except AuthenticationError:
        raise UserError(f"the cluster at {address} wants a token: export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN=...") from None
    except (OSError, RuntimeError, ValueError, RayError) as error:  # requests has a ConnectionError of its own, which is an OSError
        remedy = "start a cluster (ray start --head) or give --address"
        kind = Unreachable if isinstance(error, OSError) else UserError
        raise kind(f"no Ray job server at {address} ({_first_line(error)}); {remedy}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def job_client(address: str | None) -> tuple[Any, str]:
    """A client of the Ray jobs at `address`, by default RAY_ADDRESS or the dashboard of this machine, and that address.

    Raises UserError when no job server answers there.
    """
    from toolrl_ray.cluster import check_reachable, show_token
    from toolrl_ray.local_ray import cluster_address

    if (folder := home()) and (folder / ".ray" / "auth_token").is_file() and "RAY_AUTH_MODE" not in os.environ:
        show_token()  # `ray start` turns it on where a token lies, its client does not
    from ray.job_submission import JobSubmissionClient

    address = cluster_address(address) or "http://127.0.0.1:8265"
    check_reachable(address)
    _leave_loopback_unproxied()
    with _told(address):
        return JobSubmissionClient(address), address


def _leave_loopback_unproxied() -> None:
    """The environment's proxies are for the world outside; Ray's client would ask them for this machine, too."""
    there = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if LOOPBACK not in there:
        os.environ["no_proxy"] = f"{there},{LOOPBACK}".lstrip(",")


def new_job_id() -> str:
    return f"toolrl-{secrets.token_hex(8)}"


def submit_train(client: Any, address: str, arguments: list[str], job: str, *, cwd: str) -> None:
    """Submits `toolrl train ARGUMENTS` by an id of `new_job_id`; asked again after an answer that was lost, it makes no second job.
    cwd: where relative paths in them begin; a cluster that lacks that folder says so in the job's log, and the job starts in one of its
    own. Raises UserError when the cluster does not take it."""
    command = f"cd {shlex.quote(cwd)}; exec {shlex.join(['toolrl', 'train', *arguments])}"
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}  # else 3 s: too few to take the tools down
    with _told(address):
        try:
            client.submit_job(entrypoint=command, runtime_env={"env_vars": environment}, submission_id=job)
        except RuntimeError as error:
            if f"{job} already exists" not in str(error):
                raise


def cluster_nodes(address: str) -> list[dict[str, float]]:
    """Resources of every node that is alive. Raises UserError when the cluster does not tell."""
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        with _told(address):
            return [node.resources_total for node in list_nodes(address=address) if node.state == "ALIVE"]
    except RayStateApiException as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the cluster at {address} does not tell its nodes ({reason}); say how many runs at once: --jobs N") from None


def submit(address: str | None, arguments: list[str], *, wait: bool, say: Callable[[str], None]) -> int:
    """Returns the job's exit code: 0 when it succeeded (or was only submitted), 1 where it was killed or stopped."""
    client, address = job_client(address)
    submit_train(client, address, arguments, job := new_job_id(), cwd=os.getcwd())
    say(f"submitted {job} to {address}; logs: ray job logs {job} --address {address}")
    if not wait:
        return 0
    try:
        return _follow(client, address, job, say)
    except KeyboardInterrupt as error:
        error.add_note(f"{job} goes on; to end it: ray job stop {job} --address {address}")
        raise


def _follow(client: Any, address: str, job: str, say: Callable[[str], None]) -> int:
    shown, seen_at = 0, time.monotonic()
    while True:
        try:
            status, logs = client.get_job_status(job), client.get_job_logs(job)
        except (OSError, RuntimeError) as error:  # a request that is lost is not the job
            if time.monotonic() - seen_at > LOST_S:
                remedy = f"it may go on there: ray job logs {job} --address {address}"
                raise UserError(f"{job} is out of sight for {LOST_S:.0f} s ({_first_line(error)}); {remedy}") from None
            time.sleep(POLL_S)
            continue
        seen_at = time.monotonic()
        print(logs[shown:], end="", flush=True)
        shown = len(logs)
        if status.is_terminal():
            break
        time.sleep(POLL_S)
    if status.value == "SUCCEEDED":
        say(f"{job} succeeded")
        return 0
    try:
        info = client.get_job_info(job)
        code, reason = info.driver_exit_code or 0, f": {' '.join(info.message.split())[:200]}" if info.message else ""
    except (OSError, RuntimeError):
        code, reason = 0, ""
    say(f"{job} {status.value.lower()}{reason}")
    return code if code > 0 else 1
