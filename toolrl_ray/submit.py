"""`toolrl submit`: `toolrl train` as a Ray job on a cluster that is already up, where the package is installed."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path

from toolrl_ray.errors import UserError

POLL_S = 1.0


def submit(address: str | None, arguments: list[str], *, wait: bool, say: Callable[[str], None]) -> int:
    """Returns the job's exit code: 0 when it succeeded (or was only submitted), 1 when it failed or was stopped."""
    if (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # `ray start` turns it on where a token lies, its client does not
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobStatus, JobSubmissionClient

    address = address or os.environ.get("RAY_ADDRESS") or "http://127.0.0.1:8265"
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(entrypoint=shlex.join(["toolrl", "train", *arguments]))
    except AuthenticationError:
        raise UserError(f"the cluster at {address} wants a token: export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN=...") from None
    except (ConnectionError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"no Ray job server at {address} ({first}); start a cluster (ray start --head) or give --address") from None
    say(f"submitted {job} to {address}; logs: ray job logs {job} --address {address}")
    if not wait:
        return 0
    shown = 0
    while True:
        status = client.get_job_status(job)
        logs = client.get_job_logs(job)
        print(logs[shown:], end="", flush=True)
        shown = len(logs)
        if status.is_terminal():
            say(f"{job} {status.value.lower()}")
            return 0 if status == JobStatus.SUCCEEDED else 1
        time.sleep(POLL_S)
