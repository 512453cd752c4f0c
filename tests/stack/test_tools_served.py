"""The real tools behind Ray Serve: what is cancelled, killed or stateful reaches the sandbox's processes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid

import psutil
import pytest
import ray

from toolrl_ray.config import ToolsConfig
from toolrl_ray.local_ray import start_local
from toolrl_ray.tools.serve_client import ToolClient, start_tools, stop_tools
from tools_service.protocol import ToolCall, ToolStatus
from tools_service.serve_handles import ReplicaStats

APP = "served"
TIMEOUT_S = 60
PYTHON = "PythonInterpreter"
BUSY = "print('begun')\nwhile True: pass"


class Caller:
    """A RolloutActor's client; `begin` starts a call to be cancelled by `cancel`."""

    def __init__(self, config):
        self._client = ToolClient(APP, config)
        self._begun = []

    async def ask(self, calls):
        return await asyncio.gather(*(self._client(call) for call in calls))

    async def begin(self, call):
        self._begun.append(asyncio.ensure_future(self._client(call)))

    async def cancel(self):
        self._begun.pop().cancel()

    async def end_session(self, session):
        self._client.end_session(session)


@pytest.fixture(scope="module")
def caller():
    config = ToolsConfig(names=[PYTHON], options={PYTHON: {"stateful": True, "wall_s": 30, "cpu_s": 30}}, num_replicas=2)
    start_local(num_cpus=4, namespace=f"served-{uuid.uuid4().hex}", log_to_driver=False)
    try:
        start_tools(config, APP)
        yield ray.remote(num_cpus=0)(Caller).remote(config)
        stop_tools(APP)
    finally:
        ray.shutdown()


def ask(caller, *calls: ToolCall):
    return ray.get(caller.ask.remote(list(calls)), timeout=TIMEOUT_S)


def replicas() -> list[psutil.Process]:
    """The processes that own a sandbox: the parents of the fork servers."""
    servers = [p for p in psutil.Process().children(recursive=True) if is_server(p)]
    return list({owner_of(server).pid: owner_of(server) for server in servers}.values())


def is_server(process: psutil.Process) -> bool:
    try:
        return any(part.endswith("zygote.py") for part in process.cmdline())
    except psutil.Error:
        return False


def owner_of(process: psutil.Process) -> psutil.Process:
    while is_server(process):
        process = process.parent()
    return process


def busy() -> list[psutil.Process]:
    """Snippets that have used half a second of CPU."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if is_server(process) and is_server(process.parent()) and process.cpu_times().user > 0.5:
                found.append(process)
        except psutil.Error:
            continue
    return found


def until(condition):
    """Waits for something that another process does and nothing announces."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def test_a_cancelled_call_ends_its_process_in_the_sandbox(caller):
    assert busy() == []
    ray.get(caller.begin.remote(ToolCall(PYTHON, BUSY, 25.0)), timeout=TIMEOUT_S)
    [process] = until(busy)
    ray.get(caller.cancel.remote(), timeout=TIMEOUT_S)
    until(lambda: not process.is_running())
    assert [result.text for result in ask(caller, ToolCall(PYTHON, "print(6 * 7)"))] == ["42"]


def test_variables_last_for_an_episode_and_its_process_ends_with_it(caller):
    set_up = "import os\nx = 41\nn = 0\nfor i in range(20_000_000): n += i"
    assert [r.status for r in ask(caller, ToolCall(PYTHON, set_up, 25.0, "episode"))] == [ToolStatus.OK]
    assert [r.text for r in ask(caller, ToolCall(PYTHON, "print(x + 1)", 10.0, "episode"))] == ["42"]
    [other] = ask(caller, ToolCall(PYTHON, "print(x + 1)", 10.0, "another"))
    assert other.status is ToolStatus.TOOL_ERROR and "NameError" in other.text
    [process] = busy()
    ray.get(caller.end_session.remote("episode"), timeout=TIMEOUT_S)
    until(lambda: not process.is_running())


def test_numbers_of_all_replicas_are_added_up_and_name_what_holds_untrusted_code(caller):
    ask(caller, *(ToolCall(PYTHON, "print(1)") for _ in range(20)))
    read = ReplicaStats(APP, [PYTHON])
    stats = until(lambda: (found := read()) and found[f"{PYTHON}/service/replicas"] == 2 and found)
    assert stats[f"{PYTHON}/service/num_ok"] >= 20
    [tier] = [key for key in stats if key.startswith(f"{PYTHON}/service/isolation/")]
    assert "seccomp" in tier and stats[tier] == 2


def test_a_killed_replica_takes_its_snippets_with_it_and_costs_one_answer_each(caller):
    pending = caller.ask.remote([ToolCall(PYTHON, BUSY, 25.0, f"held-{n}") for n in range(2)])
    snippets = until(busy)
    victim = owner_of(snippets[0])
    its = [snippet for snippet in snippets if owner_of(snippet) == victim]
    os.kill(victim.pid, signal.SIGKILL)
    psutil.wait_procs(its, timeout=TIMEOUT_S)
    assert [snippet for snippet in its if snippet.is_running()] == []
    statuses = [result.status for result in ray.get(pending, timeout=TIMEOUT_S)]
    assert statuses.count(ToolStatus.UNAVAILABLE) >= 1
    assert set(statuses) <= {ToolStatus.UNAVAILABLE, ToolStatus.TIMEOUT}
    until(lambda: len(replicas()) == 2)
    assert [result.text for result in ask(caller, *(ToolCall(PYTHON, "print(6 * 7)") for _ in range(8)))] == ["42"] * 8
