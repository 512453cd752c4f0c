"""`toolrl tools` as a person uses it: a service of its own until Ctrl-C, a service left on a cluster, and the commands that call them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray

from tests.conftest import HEARS_CTRL_C
from toolrl_ray import cli, tools_serving
from tools_service import serve_app
from tools_service.runner import tool_factories

CALCULATOR = "SimpleCalculatorTool"
TIMEOUT_S = 120
OWN_TOOLS = '''
class Refuses:
    name, description, idempotent = "Refuses", "Does not start.", True

    def start(self):
        raise RuntimeError("no licence\\nfor it")

    def __call__(self, argument):
        return argument


def shout(text: str) -> str:
    """Says it louder."""
    return text.upper()
'''


def toolrl(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "toolrl_ray.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    """A person's: not what this process' own Ray has put there."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "TOOLRL_"))} | {"PYTHONUNBUFFERED": "1"}


def ended(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(toolrl(*arguments), capture_output=True, text=True, timeout=TIMEOUT_S, env=environment())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    (folder / "own.py").write_text(OWN_TOOLS)
    (folder / "calculator.yaml").write_text(f"names: [{CALCULATOR}]\n")
    (folder / "refuses.yaml").write_text(f"names: [Refuses]\ncustom: {{Refuses: '{folder}/own.py:Refuses'}}\napp: refused\n")
    return folder


@dataclass
class Service:
    process: subprocess.Popen[str]
    url: str
    lines: list[str]
    family: list[psutil.Process]  # all that the command started

    @property
    def port(self) -> str:
        return self.url.rpartition(":")[2]


def start(*arguments: object) -> Service:
    """Returns when the service says that it serves."""
    process = subprocess.Popen(
        [*HEARS_CTRL_C, *toolrl("tools", "serve", *arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,  # its own process group, as in a terminal of its own
    )
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines.append(line)
            if "Ctrl-C stops it" in line:
                break
        assert process.poll() is None, "".join(lines)
        url = lines[-1].partition("serving at ")[2].partition(";")[0]
        return Service(process, url, lines, psutil.Process(process.pid).children(recursive=True))
    except BaseException:
        process.kill()
        raise


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    service = start("--config", folder / "calculator.yaml", "--port", free_port())
    yield service
    if service.process.poll() is None:
        service.process.terminate()
        service.process.wait(timeout=TIMEOUT_S)


def test_the_service_says_what_it_serves_and_how_to_call_it(service: Service):
    text = "".join(service.lines)
    assert f"  {CALCULATOR}  Evaluates" in text and "isolation" not in text
    assert f"toolrl tools call {CALCULATOR} 13.1-3 --address {service.url}\n" in text
    assert f"curl -s {service.url}/v1/call " in text
    assert " toolrl train RECIPE tools.app=tools\n" in text
    [curl] = [line for line in service.lines if "curl" in line]
    done = subprocess.run(curl.partition("over HTTP:")[2].strip(), shell=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert json.loads(done.stdout)["results"][0]["text"] == "10.1"


def test_a_service_that_runs_is_listed_called_and_measured(service: Service, capsys, monkeypatch):
    monkeypatch.setenv("TOOLRL_TOOLS", service.url)
    assert cli.main(["tools", "list"]) == 0
    assert capsys.readouterr().out.startswith(f"{CALCULATOR}(argument: string)\n    Evaluates")
    assert cli.main(["tools", "call", CALCULATOR, "13.1-3"]) == 0
    assert capsys.readouterr() == ("10.1\n", "")
    assert cli.main(["tools", "call", CALCULATOR, "1/0"]) == 1
    assert capsys.readouterr() == ("", "tool_error: division by zero\n")
    assert cli.main(["tools", "call", "Hammer", "1"]) == 2
    assert capsys.readouterr().err == f"toolrl: no tool 'Hammer' at {service.url}; tools: {CALCULATOR}\n"
    assert cli.main(["tools", "call", CALCULATOR, "1", "--deadline", "9999"]) == 2
    assert capsys.readouterr().err.startswith(f"toolrl: {service.url} refuses the call: calls.0.deadline_s")
    assert cli.main(["tools", "bench", CALCULATOR, "--seconds", "0.5", "--in-flight", "8", "--batch", "4"]) == 0
    assert "status   ok " in capsys.readouterr().out


def test_a_file_of_calls_comes_back_in_order(service: Service, tmp_path: Path, capsys):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"id": n, "argument": f"{n}+1" if n % 10 else "1/0"}) + "\n" for n in range(2000)))
    arguments = ["tools", "call", CALCULATOR, "--jsonl", str(source), "--out", str(out), "--address", service.url]
    assert cli.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = [(n, "ok", str(n + 1)) if n % 10 else (n, "tool_error", "division by zero") for n in range(2000)]
    assert [(row["id"], row["status"], row["text"]) for row in rows] == wanted
    assert "(ok 1,800, tool_error 200), written to" in capsys.readouterr().out


def test_an_mcp_client_reaches_the_service_over_stdin_and_stdout(service: Service):
    request = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    messages = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": request},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": CALCULATOR, "arguments": {"argument": "13.1-3"}}},
    ]
    process = subprocess.Popen(
        toolrl("tools", "mcp", "--address", service.url), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        process.stdin.write("".join(json.dumps(message) + "\n" for message in messages))
        process.stdin.flush()
        answers = [json.loads(process.stdout.readline()) for _ in range(2)]
        assert [answer["id"] for answer in answers] == [1, 2]
        assert answers[1]["result"]["content"][0]["text"] == "10.1"
        process.terminate()  # stdin stays open, and it ends all the same
        assert process.wait(timeout=TIMEOUT_S) == 143
    finally:
        process.kill()
        process.communicate()


def test_a_run_joins_the_service_by_the_line_that_it_shows(service: Service, tmp_path: Path):
    [line] = [line for line in service.lines if "in training:" in line]
    address, joined = line.partition("RAY_ADDRESS=")[2].strip().split(" toolrl train RECIPE ")
    small = ["rollout.engine=transformers", "bootstrap.num_steps=1", "eval.num_tasks=2", "eval.num_samples=0", "episode.max_turn_tokens=4"]
    done = subprocess.run(
        toolrl("eval", "calculator", "--no-baseline", joined, *small),
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT_S,
        env=environment() | {"RAY_ADDRESS": address, "TOOLRL_CACHE": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"connecting to the Ray cluster at {address}" in done.stdout and "2 tasks" in done.stdout


def test_a_port_that_is_taken_is_one_line_and_exit_code_2(service: Service, folder: Path):
    done = ended("tools", "serve", "--config", folder / "calculator.yaml", "--port", service.port)
    assert done.returncode == 2 and done.stdout == ""
    wanted = f"toolrl: 127.0.0.1:{service.port} cannot be listened on (Address already in use); choose another --port or --host\n"
    assert done.stderr == wanted


def test_a_tool_that_does_not_start_is_one_line_and_leaves_nothing(folder: Path, monkeypatch):
    monkeypatch.setenv("STARTED_BY", str(folder))  # which all that the command starts inherit
    done = ended("tools", "serve", "--config", folder / "refuses.yaml", "--port", free_port())
    assert (done.returncode, done.stderr) == (2, "toolrl: tool Refuses does not start: no licence for it\n")
    assert psutil.wait_procs(started_by(folder), timeout=30)[1] == []


def test_sigterm_in_mid_start_leaves_nothing(folder: Path, monkeypatch):
    monkeypatch.setenv("STARTED_BY", str(folder))
    command = toolrl("tools", "serve", "--config", folder / "calculator.yaml", "--port", free_port())
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    try:
        assert any(f"starting {CALCULATOR}" in line for line in process.stdout)
        assert len(started_by(folder)) > 2
        process.terminate()
        assert process.communicate(timeout=TIMEOUT_S)[0].endswith("toolrl: terminated\n")
        assert process.returncode == 143
    finally:
        process.kill()
    assert psutil.wait_procs(started_by(folder), timeout=30)[1] == []


def started_by(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("STARTED_BY") == str(folder):
                found.append(process)
        except psutil.Error:  # gone, or another's
            continue
    return found


def test_ctrl_c_ends_the_service_and_leaves_no_process(service: Service, capsys):
    assert service.family
    os.killpg(service.process.pid, signal.SIGINT)
    rest, _ = service.process.communicate(timeout=TIMEOUT_S)
    assert service.process.returncode == 0 and rest.rstrip().endswith("stopping"), rest
    assert psutil.wait_procs(service.family, timeout=30)[1] == []
    assert cli.main(["tools", "list", "--address", service.url]) == 2
    assert capsys.readouterr().err == f"toolrl: no tools service at {service.url}; start one with: toolrl tools serve, or use --local\n"


def test_a_service_is_left_on_a_cluster_until_it_is_stopped(cluster, folder: Path, capsys):
    address = ray.get_runtime_context().gcs_address
    config, url = folder / "shared.yaml", f"http://{cluster.host}:{cluster.port}"
    config.write_text(f"names: [Shout]\ncustom: {{Shout: '{folder}/own.py:shout'}}\napp: shared\nhttp: {{port: {cluster.port}}}\n")
    stop = f"toolrl tools stop --address {address} --app shared"
    done = ended("tools", "serve", "--config", config, "--address", address)
    assert done.returncode == 0, done.stderr
    try:
        assert f"  stop it:      {stop}\n" in done.stdout and f"RAY_ADDRESS={address} toolrl train RECIPE tools.app=shared\n" in done.stdout
        assert cli.main(["tools", "call", "Shout", "hi", "--address", url]) == 0
        assert capsys.readouterr().out == "HI\n"
        again = ended("tools", "serve", "--config", config, "--address", address)
        assert again.returncode == 2 and len(again.stderr.splitlines()) == 1
        assert f"an application 'shared' runs on this cluster already; end it with: {stop}, or" in again.stderr
        elsewhere = ended("tools", "serve", "--config", folder / "calculator.yaml", "--address", address, "--port", free_port())
        assert elsewhere.returncode == 2 and len(elsewhere.stderr.splitlines()) == 1
        assert f"; serve there with --host {cluster.host} --port {cluster.port}, or with --no-http" in elsewhere.stderr
        assert serve_app.running("shared") == ["Shout"]
    finally:
        stopped = ended(*stop.split()[1:])
    assert stopped.returncode == 0, stopped.stderr
    with pytest.raises(serve_app.ServiceError, match="is not there"):
        serve_app.running("shared")
    gone = ended(*stop.split()[1:])
    assert gone.returncode == 2 and gone.stderr.startswith("toolrl: no application 'shared' on this cluster; applications: ")


def test_of_two_that_start_a_service_at_once_one_is_refused_and_leaves_that_of_the_other(cluster, folder: Path):
    address, app = ray.get_runtime_context().gcs_address, "both"
    config = folder / "both.yaml"
    config.write_text(f"names: [{CALCULATOR}]\napp: {app}\n")
    refusal = "another `toolrl tools serve` or `stop` is at work on this cluster; try again when it is done"
    with tools_serving._alone():
        serve_app.start(tool_factories([CALCULATOR], {}, {}), app_name=app)
        try:
            for command in (["serve", "--no-http", "--config", config], ["stop", "--app", app]):
                done = ended("tools", *command, "--address", address)
                assert done.returncode == 2, done.stderr
                assert done.stderr == f"toolrl: {refusal}\n"
            assert serve_app.running(app) == [CALCULATOR]
        finally:
            serve_app.shutdown(app)


def test_a_tool_that_does_not_start_on_a_cluster_is_taken_away_again(cluster, folder: Path):
    done = ended("tools", "serve", "--no-http", "--config", folder / "refuses.yaml", "--address", ray.get_runtime_context().gcs_address)
    assert (done.returncode, done.stderr) == (2, "toolrl: tool Refuses does not start: no licence for it\n")
    with pytest.raises(serve_app.ServiceError, match="'refused' is (not there|DELETING)"):
        serve_app.running("refused")
