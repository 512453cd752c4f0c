"""Pools on real Ray Serve: cancellation, sessions, deaths, health, autoscaling, drain, tools that do not start, shared services."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from functools import partial

import pytest
import ray
from ray import serve

from toolrl_ray.config import ToolsConfig
from toolrl_ray.errors import PlacementError
from toolrl_ray.tools.serve_client import join_tools
from tools_service import serve_app
from tools_service.config import PoolConfig, ServiceConfigError
from tools_service.protocol import ToolStatus

APP = "pools"
TIMEOUT_S = 60
NAMES = ["Appender", "Waiter", "Notebook", "Fragile"]
POOLS = {
    "Appender": PoolConfig(max_in_flight=256),
    "Waiter": PoolConfig(max_replicas=2, target_in_flight=2, upscale_delay_s=0.2, downscale_delay_s=0.5, max_in_flight=8),
    "Notebook": PoolConfig(min_replicas=2),
    "Fragile": PoolConfig(health_period_s=0.2, health_timeout_s=5),
}


def _tools():
    """Tools made here, so that they travel by value."""
    import asyncio
    import os
    import threading
    from pathlib import Path

    from tools_service.protocol import ToolResult, ToolStatus

    class Appender:
        """Adds a line with its argument "PATH WORD" to the file PATH.ran; answers once the file PATH is there."""

        name, description, idempotent = "Appender", "for tests", False

        def __call__(self, argument):
            if argument == "pid":
                return str(os.getpid())
            path, word = argument.split()
            with open(f"{path}.ran", "a") as file:
                file.write(f"{word}\n")
            while word != "quick" and not os.path.exists(path):
                threading.Event().wait(0.02)
            return word

    class Waiter:
        """Waits until the file PATH is there; PATH.cancelled tells that its task was cancelled, after PATH.begun."""

        name, description, idempotent = "Waiter", "for tests", True

        async def call(self, call):
            if call.argument != "pid":
                path = Path(call.argument)
                Path(f"{path}.begun").touch()
                try:
                    while not path.exists():
                        await asyncio.sleep(0.02)
                except asyncio.CancelledError:
                    Path(f"{path}.cancelled").touch()
                    raise
            return ToolResult(ToolStatus.OK, str(os.getpid()))

    class Notebook:
        """Counts the calls of a session: "PID COUNT SEED". With "PATH" it waits for the file PATH first, after PATH.begun; a session
        called with "end PATH" makes that file when it is ended."""

        name, description, idempotent = "Notebook", "for tests", True

        def __init__(self):
            self.counts, self.at_end = {}, {}

        async def call(self, call):
            if call.argument.startswith("end "):
                self.at_end[call.session] = Path(call.argument[4:])
            elif call.argument.startswith("/"):
                Path(f"{call.argument}.begun").touch()
                while not os.path.exists(call.argument):
                    await asyncio.sleep(0.02)
            self.counts[call.session] = self.counts.get(call.session, 0) + 1
            return ToolResult(ToolStatus.OK, f"{os.getpid()} {self.counts[call.session]} {call.seed}")

        async def end_session(self, session):
            self.counts.pop(session)
            if session in self.at_end:
                self.at_end[session].touch()

    class Fragile:
        name, description, idempotent, probe = "Fragile", "for tests", True, "probe"

        def __init__(self):
            self.broken = False

        def __call__(self, argument):
            self.broken = self.broken or argument == "break"
            if argument == "probe" and self.broken:
                raise RuntimeError("broken")
            return str(os.getpid())

    class Refuser(Fragile):
        name = "Refuser"

        async def start(self):
            raise RuntimeError("no isolation on this machine;\ninstall bubblewrap <or> ask root")

    return {tool.name: tool for tool in (Appender, Waiter, Notebook, Fragile, Refuser)}


def _caller():
    from toolrl_ray.tools.serve_client import ToolClient
    from tools_service.protocol import ToolCall

    class Caller:
        """`ask` runs calls (tool, argument, deadline_s, session, seed) together; `begin` starts them to be cancelled by `cancel`."""

        def __init__(self, app, names):
            self._client = ToolClient(app, ToolsConfig(names=names))
            self._begun = []

        async def connect(self):
            await self._client.infos()

        async def ask(self, calls):
            import asyncio

            return await asyncio.gather(*(self._client(ToolCall(*call)) for call in calls))

        async def begin(self, call):
            import asyncio

            self._begun.append(asyncio.ensure_future(self._client(ToolCall(*call))))

        async def cancel(self):
            self._begun.pop().cancel()

        async def end_session(self, session):
            self._client.end_session(session)

        async def stats(self):
            return self._client.stats()

    return ray.remote(num_cpus=0)(Caller)


@pytest.fixture(scope="module")
def service(cluster):
    tools = _tools()
    yield serve_app.start({name: tools[name] for name in NAMES}, app_name=APP, pools=POOLS, start_timeout_s=TIMEOUT_S)
    serve_app.shutdown(APP)


@pytest.fixture(scope="module")
def caller(service):
    caller = _caller().remote(APP, NAMES)
    ray.get(caller.connect.remote(), timeout=TIMEOUT_S)
    return caller


def ask(caller, *calls, deadline_s=30.0):
    return ray.get(caller.ask.remote([(tool, argument, deadline_s, *more) for tool, argument, *more in calls]), timeout=TIMEOUT_S)


def until(condition):
    """Waits for something that another process does and nothing announces."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_call_that_nobody_waits_for_is_cancelled_in_the_tool(caller, tmp_path):
    begun, cancelled = tmp_path / "go.begun", tmp_path / "go.cancelled"
    ray.get(caller.begin.remote(("Waiter", f"{tmp_path}/go", 50.0)), timeout=TIMEOUT_S)
    until(begun.exists)
    ray.get(caller.cancel.remote(), timeout=TIMEOUT_S)
    until(cancelled.exists)


def test_a_tool_that_stalls_for_ever_costs_its_call_its_deadline_and_is_cancelled_then(caller, tmp_path):
    stalled = caller.ask.remote([("Waiter", f"{tmp_path}/never", 1.0)])
    until((tmp_path / "never.begun").exists)
    assert [r.status for r in ask(caller, ("Waiter", "pid"), ("Fragile", "x"))] == [ToolStatus.OK] * 2
    [result] = ray.get(stalled, timeout=TIMEOUT_S)
    assert (result.status, result.text) == (ToolStatus.TIMEOUT, "no answer within 1 s")
    until((tmp_path / "never.cancelled").exists)


def test_the_pool_follows_the_calls_in_flight_up_and_down_again(caller, tmp_path):
    def replicas():
        application = serve.status().applications[APP]
        return application.deployments["Waiter"].replica_states.get("RUNNING", 0)

    assert replicas() == 1
    load = caller.ask.remote([("Waiter", f"{tmp_path}/go", 55.0)] * 8)
    until(lambda: replicas() == 2)
    (tmp_path / "go").touch()
    assert {r.status for r in ray.get(load, timeout=TIMEOUT_S)} == {ToolStatus.OK}
    until(lambda: replicas() == 1)


def test_calls_of_a_session_reach_the_replica_that_holds_it_and_sessions_end(caller, tmp_path):
    sessions = [f"episode-{n}" for n in range(12)]
    rounds = [ask(caller, *(("Notebook", "", s, 7) for s in sessions)) for _ in range(3)]
    pids = [[r.text.split()[0] for r in results] for results in rounds]
    assert pids[0] == pids[1] == pids[2] and len(set(pids[0])) == 2
    assert [[r.text.split(maxsplit=1)[1] for r in results] for results in rounds] == [[f"{n} 7"] * 12 for n in (1, 2, 3)]
    ask(caller, ("Notebook", f"end {tmp_path}/ended", sessions[0]))
    ray.get(caller.end_session.remote(sessions[0]), timeout=TIMEOUT_S)
    until((tmp_path / "ended").exists)
    [fresh] = ask(caller, ("Notebook", "", sessions[0]))
    assert fresh.text.split()[1] == "1"


def test_calls_of_one_session_run_one_after_another_in_order(caller):
    results = ask(caller, *(("Notebook", "", "busy") for _ in range(20)))
    assert [r.text.split()[1] for r in results] == [str(n + 1) for n in range(20)]


def test_callers_with_equal_session_names_share_nothing(caller):
    other = _caller().remote(APP, ["Notebook"])
    ask(caller, ("Notebook", "", "same"))
    assert ask(other, ("Notebook", "", "same"))[0].text.split()[1] == "1"


def test_a_session_whose_replica_died_is_unavailable_once_and_then_new(caller, tmp_path):
    [first] = ask(caller, ("Notebook", "", "idle"))
    victim = first.text.split()[0]
    sessions, homes = [], []
    while not {victim} < set(homes):  # at least one session in either replica
        assert len(sessions) < 100
        sessions.append(f"more-{len(sessions)}")
        homes += [r.text.split()[0] for r in ask(caller, ("Notebook", "", sessions[-1]))]
    kept = sessions[next(n for n, pid in enumerate(homes) if pid != victim)]
    running = caller.ask.remote([("Notebook", f"{tmp_path}/never", 50.0, "idle")])
    until((tmp_path / "never.begun").exists)
    os.kill(int(victim), signal.SIGKILL)
    [lost] = ray.get(running, timeout=TIMEOUT_S)
    assert lost.status is ToolStatus.UNAVAILABLE
    [new, other] = ask(caller, ("Notebook", "", "idle"), ("Notebook", "", kept))
    assert new.status is ToolStatus.OK and new.text.split()[1] == "1"
    assert other.text.split()[1] == "2"
    gone = sessions[homes.index(victim)]
    [lost] = ask(caller, ("Notebook", "", gone))
    assert lost.status is ToolStatus.UNAVAILABLE and "is gone" in lost.text
    assert ask(caller, ("Notebook", "", gone))[0].text.split()[1] == "1"


def test_killing_a_replica_with_200_calls_in_flight_loses_no_call_and_runs_none_twice(caller, tmp_path):
    [answer] = ask(caller, ("Appender", "pid"))
    ran = tmp_path / "go.ran"
    pending = caller.ask.remote([("Appender", f"{tmp_path}/go {n}", 50.0) for n in range(200)])
    until(lambda: ran.exists() and len(ran.read_text().split()) == 200)
    os.kill(int(answer.text), signal.SIGKILL)
    late = caller.ask.remote([("Appender", f"{tmp_path}/go quick", 50.0)] * 20)
    results = ray.get(pending, timeout=TIMEOUT_S)
    assert Counter(r.status for r in results) == {ToolStatus.UNAVAILABLE: 200}
    statuses = Counter(r.status for r in ray.get(late, timeout=TIMEOUT_S))
    assert set(statuses) <= {ToolStatus.OK, ToolStatus.UNAVAILABLE}  # sent before the death was known
    words = Counter(ran.read_text().split())
    assert words.pop("quick", 0) == statuses[ToolStatus.OK]
    assert words == {str(n): 1 for n in range(200)}
    assert ask(caller, ("Appender", "pid"))[0].text != answer.text


def test_a_replica_that_fails_its_probe_is_replaced(caller):
    [pid] = ask(caller, ("Fragile", "break"))
    until(lambda: (now := ask(caller, ("Fragile", "pid"))[0]).status is ToolStatus.OK and now.text != pid.text)


def test_calls_in_flight_end_before_a_service_goes(service, tmp_path):
    serve_app.start({"Appender": _tools()["Appender"]}, app_name="going", start_timeout_s=TIMEOUT_S)
    caller = _caller().remote("going", ["Appender"])
    pending = caller.ask.remote([("Appender", f"{tmp_path}/go x", 50.0)])
    until((tmp_path / "go.ran").exists)
    serve_app.shutdown("going", wait=False)
    until(lambda: serve_app._state("going")[0] == "DELETING")
    (tmp_path / "go").touch()
    assert [(r.status, r.text) for r in ray.get(pending, timeout=TIMEOUT_S)] == [(ToolStatus.OK, "x")]
    until(lambda: serve_app._state("going")[0] == "NOT_STARTED")


def test_a_tool_that_does_not_start_is_refused_with_its_own_reason_and_leaves_nothing(service):
    tools = {name: tool for name, tool in _tools().items() if name in ("Fragile", "Refuser")}
    with pytest.raises(serve_app.ServiceError) as refused:
        serve_app.start(tools, app_name="refused", start_timeout_s=TIMEOUT_S)
    assert str(refused.value) == "tool Refuser does not start: no isolation on this machine; install bubblewrap <or> ask root"
    assert serve_app._state("refused")[0] == "NOT_STARTED"


def test_a_run_joins_a_service_that_has_its_tools_and_no_other(service):
    join_tools(ToolsConfig(names=["Waiter", "Fragile"], app=APP), APP)
    served = "Appender, Fragile, Notebook, Waiter"
    with pytest.raises(PlacementError, match=rf"tools\.app='pools' does not serve Wiki of tools\.names; it serves {served}"):
        join_tools(ToolsConfig(names=["Waiter", "Wiki"], app=APP), APP)
    with pytest.raises(PlacementError, match="the tools application 'none' is not there on this cluster"):
        join_tools(ToolsConfig(app="none"), "none")
    with pytest.raises(serve_app.ServiceError, match="an application 'pools' runs on this cluster already"):
        serve_app.start({"Fragile": partial(_tools()["Fragile"])}, app_name=APP)


def test_what_a_serve_config_file_builds_answers_like_any_other(service):
    serve.run(serve_app.app({"names": ["SimpleCalculatorTool"]}), name="by-file", route_prefix=None)
    try:
        caller = _caller().remote("by-file", ["SimpleCalculatorTool"])
        assert [(r.status, r.text) for r in ask(caller, ("SimpleCalculatorTool", "13.1-3"))] == [(ToolStatus.OK, "10.1")]
    finally:
        serve_app.shutdown("by-file")
    with pytest.raises(ServiceConfigError, match="args: unknown key 'name'"):
        serve_app.app({"name": "SimpleCalculatorTool"})
