"""The tools on real Ray Serve, called from an actor as a RolloutActor calls them. Slow, hung and dying tools are scripted."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import ray

from toolrl_ray.config import ToolsConfig
from toolrl_ray.errors import ConfigError, PlacementError
from toolrl_ray.tools.serve_client import start_tools, stop_tools
from tools_service import serve_app
from tools_service.protocol import ToolStatus

CALCULATOR = "SimpleCalculatorTool"
APP = "tools-test"
TIMEOUT_S = 60


def _scripted():
    """Tools made here, so that they travel by value: the calculator, and one that names its process when asked "pid". Both take
    "hang F", which adds a dot to the file F.ran and waits until the file F is there. "loud" has the calculator answer at length."""
    import os
    import threading
    from pathlib import Path

    from tools_service.calculator import SimpleCalculatorTool

    def hang(argument):
        path = Path(argument[5:])
        with open(f"{path}.ran", "a") as file:
            file.write(".")
        while not path.exists():
            threading.Event().wait(0.02)
        return argument

    class Calculator(SimpleCalculatorTool):
        def __call__(self, argument):
            if argument == "loud":
                return "y" * 100_000
            return hang(argument) if argument.startswith("hang ") else super().__call__(argument)

    class Scripted:
        name, description, idempotent, probe = "Scripted", "for tests", False, "pid"

        def __call__(self, argument):
            if argument == "pid":
                return str(os.getpid())
            return hang(argument) if argument.startswith("hang ") else argument

    return {CALCULATOR: Calculator, "Scripted": Scripted}


def _caller():
    from toolrl_ray.tools.serve_client import ToolClient
    from tools_service.protocol import ToolCall

    class Caller:
        """`ask` runs calls (tool, argument, deadline_s) together; the actor is asynchronous, so that several `ask` can be in flight."""

        def __init__(self, app, config):
            self._app, self._client = app, ToolClient(app, config)

        async def connect(self):
            await self._client.infos()

        async def ask(self, calls):
            import asyncio

            return await asyncio.gather(*(self._client(ToolCall(*call)) for call in calls))

        async def stats(self):
            return self._client.stats()

        async def inspect(self, tool):
            from ray import serve

            return await serve.get_deployment_handle(tool, self._app).inspect.remote()

    return ray.remote(num_cpus=0)(Caller)


def config(**options) -> ToolsConfig:
    return ToolsConfig(names=[CALCULATOR, "Scripted"], **options)


@pytest.fixture(scope="module")
def service(cluster):
    yield serve_app.start(_scripted(), app_name=APP, start_timeout_s=TIMEOUT_S)
    serve_app.shutdown(APP)


@pytest.fixture(scope="module")
def caller(service):
    caller = _caller().remote(APP, config())
    ray.get(caller.connect.remote(), timeout=TIMEOUT_S)
    return caller


def ask(caller, *calls, deadline_s=30.0):
    return ray.get(caller.ask.remote([(*call, deadline_s) for call in calls]), timeout=TIMEOUT_S)


def test_calls_are_answered_each_with_its_own_result(caller):
    results = ask(caller, (CALCULATOR, "13.1-3"), (CALCULATOR, "1/0"), (CALCULATOR, "?"), ("Wiki", "x"), ("Scripted", "echo"))
    assert [(r.status, r.text) for r in results] == [
        (ToolStatus.OK, "10.1"),
        (ToolStatus.TOOL_ERROR, "division by zero"),
        (ToolStatus.BAD_ARGUMENTS, "unexpected character '?'"),
        (ToolStatus.UNKNOWN_TOOL, f"no tool 'Wiki'; tools: {CALCULATOR}, Scripted"),
        (ToolStatus.OK, "echo"),
    ]


def test_waiting_calls_share_requests_and_keep_their_order(caller):
    before = ray.get(caller.stats.remote(), timeout=TIMEOUT_S)
    results = ask(caller, *((CALCULATOR, f"{n}+1") for n in range(500)))
    after = ray.get(caller.stats.remote(), timeout=TIMEOUT_S)
    assert [r.text for r in results] == [str(n + 1) for n in range(500)]
    assert after["requests"] - before["requests"] == 8  # of at most 64 calls
    assert after["coalesced_calls"] - before["coalesced_calls"] == 500


def test_the_long_answers_of_a_shared_request_arrive(caller):
    before = ray.get(caller.stats.remote(), timeout=TIMEOUT_S)
    results = ask(caller, *[(CALCULATOR, "loud")] * 64)
    after = ray.get(caller.stats.remote(), timeout=TIMEOUT_S)
    assert {(r.status, len(r.text)) for r in results} == {(ToolStatus.OK, 100_000)}
    assert (after["coalesced_calls"] - before["coalesced_calls"], after["retries"] - before["retries"]) == (64, 0)


def test_an_argument_that_is_too_long_is_refused_by_name(caller):
    refused, answered = ask(caller, ("Scripted", "#" * 5 * 2**20), ("Scripted", "echo"))
    assert (refused.status, answered.text) == (ToolStatus.BAD_ARGUMENTS, "echo")


def test_the_throughput_flag_is_set_in_the_replicas_and_the_controller(caller):
    for tool in (CALCULATOR, "Scripted"):
        state = ray.get(caller.inspect.remote(tool), timeout=TIMEOUT_S)
        assert state | {"pid": 0} == {
            "pid": 0,
            "throughput_optimized": True,
            "user_code_in_separate_thread": False,
            "direct_ingress": False,
        }
    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    environment = Path(f"/proc/{ray.get(controller.get_pid.remote(), timeout=TIMEOUT_S)}/environ").read_text()
    assert "RAY_SERVE_THROUGHPUT_OPTIMIZED=1" in environment.split("\0")


def test_calls_and_replicas_leave_a_proxy_of_the_environment_alone(service):
    dead = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")  # as gRPC reads it; for the world outside
    caller = _caller().options(runtime_env={"env_vars": dead}).remote(APP, config())
    assert [(r.status, r.text) for r in ask(caller, (CALCULATOR, "13.1-3"))] == [(ToolStatus.OK, "10.1")]
    replica = ray.get(caller.inspect.remote(CALCULATOR), timeout=TIMEOUT_S)["pid"]
    assert "grpc_proxy=" in Path(f"/proc/{replica}/environ").read_text().split("\0")  # the HTTP face is one, and calls the others


def test_a_hung_call_is_released_at_its_deadline_and_costs_other_calls_nothing(caller, tmp_path):
    hung = caller.ask.remote([("Scripted", f"hang {tmp_path}/go", 2.0)] * 3)
    assert [r.text for r in ask(caller, ("Scripted", "a"), (CALCULATOR, "1+1"))] == ["a", "2"]
    results = ray.get(hung, timeout=TIMEOUT_S)
    assert [(r.status, r.text) for r in results] == [(ToolStatus.TIMEOUT, "no answer within 2 s")] * 3
    (tmp_path / "go").touch()


def test_past_the_queue_bound_calls_are_overloaded_and_the_service_recovers(service):
    caller = _caller().remote(APP, config(max_queued=1000))
    ray.get(caller.connect.remote(), timeout=TIMEOUT_S)
    results = ask(caller, *((CALCULATOR, "1+1") for _ in range(10_000)))
    counts = Counter(r.status for r in results)
    assert set(counts) == {ToolStatus.OK, ToolStatus.OVERLOADED} and counts[ToolStatus.OK] >= 1000
    assert [r.status for r in ask(caller, (CALCULATOR, "1+1"))] == [ToolStatus.OK]


def until(condition):
    """Waits for something that another process does and nothing announces."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killing_the_replica_of_an_idempotent_tool_in_mid_call_leaves_every_call_answered(caller, tmp_path):
    pid = ray.get(caller.inspect.remote(CALCULATOR), timeout=TIMEOUT_S)["pid"]
    before = ray.get(caller.stats.remote(), timeout=TIMEOUT_S)
    hung = f"hang {tmp_path}/go"
    calls = [hung, *(f"{n}+1" for n in range(1000))]
    pending = caller.ask.remote([(CALCULATOR, call, 50.0) for call in calls])
    ran = tmp_path / "go.ran"
    until(lambda: ran.exists() and len(ran.read_text()) == 2)  # in its batch, and then alone
    os.kill(pid, signal.SIGKILL)
    more = caller.ask.remote([(CALCULATOR, "1+1", 50.0)] * 1000)
    (tmp_path / "go").touch()
    results = ray.get(pending, timeout=TIMEOUT_S)
    after = ray.get(caller.stats.remote(), timeout=TIMEOUT_S)
    assert [(r.status, r.text) for r in results] == [(ToolStatus.OK, t) for t in [hung, *(str(n + 1) for n in range(1000))]]
    assert {(r.status, r.text) for r in ray.get(more, timeout=TIMEOUT_S)} == {(ToolStatus.OK, "2")}
    assert after["retries"] > before["retries"]
    assert ray.get(caller.inspect.remote(CALCULATOR), timeout=TIMEOUT_S)["pid"] != pid


def test_killing_the_replica_of_another_tool_runs_no_call_twice(caller, tmp_path):
    [answer] = ask(caller, ("Scripted", "pid"))
    pending = caller.ask.remote([("Scripted", f"hang {tmp_path}/go", 50.0)])
    until((tmp_path / "go.ran").exists)
    os.kill(int(answer.text), signal.SIGKILL)
    [result] = ray.get(pending, timeout=TIMEOUT_S)
    assert result.status is ToolStatus.UNAVAILABLE and result.text.startswith("tool unavailable: Actor")
    [again] = ask(caller, ("Scripted", "pid"))
    assert again.status is ToolStatus.OK and again.text != answer.text
    assert (tmp_path / "go.ran").read_text() == "."


def test_a_second_application_comes_and_goes_without_touching_the_first(caller):
    start_tools(ToolsConfig(start_timeout_s=TIMEOUT_S), "other")
    other = _caller().remote("other", ToolsConfig())
    assert [r.text for r in ask(other, (CALCULATOR, "2*3"))] == ["6"]
    stop_tools("other")
    stop_tools("other")  # nothing there any more: nothing happens
    assert [r.text for r in ask(caller, (CALCULATOR, "2*3"))] == ["6"]
    [gone] = ask(other, (CALCULATOR, "2*3"), deadline_s=5.0)
    assert gone.status in (ToolStatus.UNAVAILABLE, ToolStatus.TIMEOUT)


def test_wrong_names_and_plans_that_do_not_fit_are_refused_with_what_is_missing(caller):
    with pytest.raises(ConfigError, match=r"unknown tool 'Wikipedia' in tools\.names; tools: SimpleCalculatorTool"):
        start_tools(ToolsConfig(names=["Wikipedia"]), "other")
    with pytest.raises(PlacementError, match=r"need 6 CPUs \(SimpleCalculatorTool 3 x 2\); the cluster has 4 in all"):
        start_tools(ToolsConfig(num_replicas=3, num_cpus=2), "other")
    with pytest.raises(PlacementError, match=r"after 3 s; the tools need 4 CPUs .* of 4 are free"):
        start_tools(ToolsConfig(num_replicas=2, num_cpus=2, start_timeout_s=3), "other")
    assert [r.text for r in ask(caller, (CALCULATOR, "2*3"))] == ["6"]
