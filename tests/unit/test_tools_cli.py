"""`toolrl tools` and `toolrl index` with the tools in this process: what is printed where, exit codes, and mistakes in one line."""

from __future__ import annotations

import gc
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.unit.tools_in_process import InProcess, Notebook, over_http
from toolrl_ray import cli, tools_access
from tools_service.http_app import make_app

ROOT = Path(__file__).resolve().parents[2]
PYTHON_TOOL = '''
import asyncio
import os
import signal
import time

from tools_service.protocol import ToolResult, ToolStatus


def weekday(date: str, short: bool = False) -> str:
    """Names the weekday of a date.

    More that no model needs.
    """
    return "Mon" if short else f"Monday, says {date}"


def fails(x: str) -> str:
    """Fails."""
    raise ValueError("a secret")


class Killed:
    name, description, idempotent = "Killed", "The signal that it is called with arrives in its call.", True

    async def call(self, call):
        os.kill(os.getpid(), signal.Signals[call.argument])
        if signal.getsignal(signal.Signals[call.argument]) is signal.SIG_IGN:
            return ToolResult(ToolStatus.OK, "ignored")
        await asyncio.sleep(60)


class Slow:
    name, description, idempotent = "Slow", "Starts in a minute.", True

    async def start(self):
        await asyncio.sleep(60)

    def __call__(self, argument):
        return argument


class Blocks(Slow):
    name = "Blocks"

    def start(self):
        time.sleep(0.2)
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "TOOLRL_TOOLS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "own.py").write_text(PYTHON_TOOL)
    (tmp_path / "own.yaml").write_text(
        "names: [Weekday, Fails]\ncustom: {Weekday: 'own.py:weekday', Fails: 'own.py:fails'}\npools: {Fails: {max_in_flight: 2}}\n"
    )
    for name in ("Slow", "Blocks", "Killed"):
        (tmp_path / f"{name}.yaml").write_text(f"names: [{name}]\ncustom: {{{name}: 'own.py:{name}'}}\nstart_timeout_s: 0.1\n")
    (tmp_path / "bad.yaml").write_text("names: [1")
    (tmp_path / "odd.yaml").write_text("start_timeout_s: 0x_")
    (tmp_path / "key.yaml").write_text("nams: [SimpleCalculatorTool]")
    (tmp_path / "hammer.yaml").write_text("names: [Hammer]")
    (tmp_path / "limit.yaml").write_text("names: [PythonInterpreter]\noptions: {PythonInterpreter: {wall_s: -1}}")
    (tmp_path / "isolation.yaml").write_text("names: [PythonInterpreter]\noptions: {PythonInterpreter: {isolation: bubblewrap}}")
    (tmp_path / "in.jsonl").write_text('{"argument": "1+1", "id": "a"}\n{"argument": "1/0", "id": "b"}\n{"argument": "2*3", "id": "c"}\n')
    (tmp_path / "bad.jsonl").write_text('{"argument": "1+1"}\n{"argument": 2}\n')
    (tmp_path / "corpus.jsonl").write_text('{"id": "1", "text": "a"}\n{"id": "1"}\n')
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_pipe").symlink_to("pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "to_nowhere").symlink_to("nowhere/x")
    return tmp_path


def run(command: str) -> int:
    try:
        return cli.main(shlex.split(command))
    except SystemExit as exit:  # argparse
        return exit.code


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("tools", ["COMMAND", "toolrl tools --help"]),
        ("tools call", ["NAME", "toolrl tools call --help"]),
        ("tools call SimpleCalculatorTool", ["ARGUMENT", "--jsonl IN --out OUT"]),
        ("tools call SimpleCalculatorTool 1 --jsonl in.jsonl --out x", ["ARGUMENT", "--jsonl IN --out OUT"]),
        ("tools call SimpleCalculatorTool --jsonl in.jsonl", ["--jsonl IN and --out OUT"]),
        ("tools call SimpleCalculatorTool --jsonl none.jsonl --out x --local", ["none.jsonl cannot be read", "No such file"]),
        ("tools call SimpleCalculatorTool --jsonl folder --out x --local", ["folder is not a file"]),
        ("tools call SimpleCalculatorTool --jsonl bad.jsonl --out x --local", ["bad.jsonl:2:", "argument=2"]),
        ("tools call SimpleCalculatorTool --jsonl in.jsonl --out none/x --local", ["--out='none/x'", "make it first"]),
        ("tools call SimpleCalculatorTool --jsonl in.jsonl --out folder --local", ["--out='folder'", "is a folder"]),
        ("tools call SimpleCalculatorTool --jsonl in.jsonl --out in.jsonl --local", ["--out='in.jsonl'", "the input itself"]),
        ("tools call SimpleCalculatorTool --jsonl in.jsonl --out pipe --local", ["--out='pipe'", "a device, a pipe"]),
        ("tools call SimpleCalculatorTool --jsonl in.jsonl --out to_pipe --local", ["--out='to_pipe'", "a device, a pipe"]),
        ("tools call SimpleCalculatorTool --jsonl in.jsonl --out loop --local", ["--out='loop'", "a device, a pipe"]),
        ("tools call SimpleCalculatorTool --jsonl in.jsonl --out to_nowhere --local", ["--out='to_nowhere'", "make it first"]),
        (f"tools call SimpleCalculatorTool --jsonl in.jsonl --out {'n' * 256} --local", ["cannot be written: File name too long"]),
        ("tools call SimpleCalculatorTool 1 --local --address x", ["--local contradicts --address"]),
        ("tools call SimpleCalculatorTool 1 --config own.yaml", ["--config='own.yaml'", "--local", "--address"]),
        ("tools call SimpleCalculatorTool 1 --address ftp://x", ["--address='ftp://x'", "http://127.0.0.1:8000"]),
        ("tools call SimpleCalculatorTool 1 --address 127.0.0.1:9", ["no tools service at http://127.0.0.1:9;", "tools serve", "--local"]),
        ("tools call SimpleCalculatorTool 1 --address 127.0.0.1:99999", ["--address='127.0.0.1:99999'", "http://127.0.0.1:8000"]),
        ("tools mcp --address 127.0.0.1:99999", ["--address='127.0.0.1:99999'", "http://127.0.0.1:8000"]),
        ("tools call SimpleCalculatorTool 1 --deadline 0", ["--deadline", "0.001 or more"]),
        ("tools call SimpleCalculatorTool 1 --deadline nan", ["--deadline", "0.001 or more"]),
        ("tools call SimpleCalculatorTool 1 2 --local", ["unrecognized arguments: 2"]),
        ("tools call SimpleCalculatorTool --locl", ["unrecognized arguments: --locl"]),
        ("tools call Hammer 1 --local", ["'Hammer'", "SimpleCalculatorTool, PythonInterpreter"]),
        ("tools call Weekday 1 --local --config none.yaml", ["none.yaml cannot be read"]),
        ("tools list --local --config bad.yaml", ["bad.yaml is not valid YAML"]),
        ("tools list --local --config odd.yaml", ["odd.yaml is not valid YAML"]),
        ("tools list --local --config key.yaml", ["key.yaml", "unknown key 'nams'", "allowed there: names, custom"]),
        ("tools list --local --config hammer.yaml", ["unknown tool 'Hammer' in names;", "SimpleCalculatorTool", "your own in custom"]),
        ("tools list --local --config limit.yaml", [" options.PythonInterpreter={'wall_s': -1}: ", "wall_s=-1"]),
        ("tools list --local --config Slow.yaml", ["tool Slow does not start: start_timeout_s=0.1 is over"]),
        ("tools list --local --config Blocks.yaml", ["tool Blocks does not start: start_timeout_s=0.1 is over"]),
        ("tools serve --config none.yaml", ["none.yaml cannot be read"]),
        ("tools serve --config bad.yaml", ["bad.yaml is not valid YAML"]),
        ("tools serve --config key.yaml", ["key.yaml", "unknown key 'nams'", "allowed there: names, custom"]),
        ("tools serve --config hammer.yaml", ["unknown tool 'Hammer' in names;", "SimpleCalculatorTool", "your own in custom"]),
        ("tools serve --config limit.yaml", [" options.PythonInterpreter={'wall_s': -1}: ", "wall_s=-1"]),
        ("tools serve --port 70000", ["--port=70000", "65535"]),
        ("tools serve --port x", ["--port", "'x'"]),
        ("tools serve --no-http --port 8000", ["--no-http contradicts --port"]),
        ("tools serve --host no.such.host.invalid", ["no.such.host.invalid:8000", "--host"]),
        ("tools stop", ["--address HOST:PORT", "Ctrl-C"]),
        ("tools bench Weekday --local --config own.yaml", ["Weekday", "ARGUMENT"]),
        ("tools bench SimpleCalculatorTool --in-flight 0", ["--in-flight", "1 or more"]),
        ("tools mcp --address 127.0.0.1:9", ["no tools service at http://127.0.0.1:9"]),
        ("index build corpus.jsonl folder", ["'folder' exists already", "remove it first"]),
        ("index build none.jsonl new", ["no file 'none.jsonl'"]),
        ("index build /proc/self/mem new", ["'/proc/self/mem' cannot be read (Input/output error)"]),
        ("index info folder", ["folder", "index"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(command: str, parts: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    assert run(command) == 2
    written = capsys.readouterr()
    assert len(written.err.strip().splitlines()) == 1 and written.err.startswith("toolrl: ") and not written.out
    assert [part for part in parts if part not in written.err] == []
    assert sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts) == before, "nothing may stay behind"


def test_a_port_that_is_taken_is_refused_before_ray_starts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "toolrl_ray.cluster", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(f"tools serve --port {port}") == 2
    expected = f"toolrl: 127.0.0.1:{port} cannot be listened on (Address already in use); choose another --port or --host\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(("given", "environment"), [("", "local"), ("", ""), (" --address local", "127.0.0.1:9")])
def test_an_address_that_says_local_is_no_cluster(given: str, environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", environment)
    served: list[str] = []
    monkeypatch.setattr("toolrl_ray.tools_serving.serve_here", lambda *_: served.append("here"))
    assert run(f"tools serve{given}") == 0 and served == ["here"]
    assert run(f"tools stop{given}") == 2


def test_a_cluster_that_does_not_answer_is_named_at_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    for command in ("tools serve", "tools stop"):
        assert run(command) == 2
        assert capsys.readouterr().err == "toolrl: no Ray cluster answers at '127.0.0.1:9': Connection refused\n"


@pytest.mark.parametrize("place", ["-3*4 --local", "--local -3*4", "--local -- -3*4", "-- -3*4", "--deadline 5 -3*4", "'(2-14)' --local"])
def test_the_text_of_a_call_is_printed_and_nothing_else(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"tools call {'' if '--local' in place else '--local '}SimpleCalculatorTool {place}") == 0
    written = capsys.readouterr()
    assert (written.out, written.err) == ("-12\n", "")


def test_a_call_that_fails_says_its_status_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tools call SimpleCalculatorTool 1/0 --local") == 1
    written = capsys.readouterr()
    assert (written.out, written.err) == ("", "tool_error: division by zero\n")


@pytest.fixture
def sighup() -> Iterator[None]:
    """At the start of a command it is what the test makes it, as a shell or nohup does."""
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGHUP"])
def test_a_signal_in_the_midst_of_a_call_ends_the_command(
    sent: str, sighup: None, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    signal.signal(signal.SIGHUP, lambda *_: pytest.fail("not taken up"))
    assert run(f"tools call Killed {sent} --local --config Killed.yaml") == 143
    gc.collect()  # a task of which nobody has seen the end logs it then
    assert (capsys.readouterr().err, caplog.text) == ("toolrl: terminated\n", "")


def test_sighup_in_the_midst_of_a_file_leaves_nothing_beside_the_old_output(folder: Path, sighup: None) -> None:
    signal.signal(signal.SIGHUP, lambda *_: pytest.fail("not taken up"))
    (folder / "hup.jsonl").write_text('{"argument": "SIGHUP"}\n')
    assert run("tools call Killed --jsonl hup.jsonl --out folder/out --local --config Killed.yaml") == 143
    assert list((folder / "folder").iterdir()) == []


def test_a_command_under_nohup_does_not_end_with_its_terminal(sighup: None, capsys: pytest.CaptureFixture[str]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert run("tools call Killed SIGHUP --local --config Killed.yaml") == 0
    assert capsys.readouterr().out == "ignored\n"


def test_the_argument_may_come_from_stdin(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"(1+\n2)*3\n")))
    assert run("tools call SimpleCalculatorTool - --local") == 0
    assert capsys.readouterr().out == "9\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\xff")))
    assert run("tools call SimpleCalculatorTool - --local") == 2
    assert capsys.readouterr().err == "toolrl: stdin is not UTF-8 at byte 0\n"


def test_the_python_tool_runs_in_its_sandbox_or_says_why_not(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code = 'import os; print(os.environ.get("HOME"), 6*7)'
    assert run(f"tools call PythonInterpreter {shlex.quote(code)} --local") == 0
    assert capsys.readouterr().out == "None 42\n"
    monkeypatch.setenv("PATH", "/nonexistent")
    assert run("tools call PythonInterpreter 'print(1)' --local --config isolation.yaml") == 2
    error = capsys.readouterr().err
    assert error.startswith("toolrl: tool PythonInterpreter does not start: ") and "no `bwrap` on PATH" in error and error.count("\n") == 1


def test_tools_are_listed_with_what_they_take(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tools list --local --config own.yaml") == 0
    assert capsys.readouterr().out == (
        "Weekday(date: string, short: boolean = false)\n    Names the weekday of a date.\nFails(x: string)\n    Fails.\n"
    )
    assert run("tools list --local --config own.yaml --json") == 0
    weekday, fails = json.loads(capsys.readouterr().out)
    assert weekday["type"] == "function" and fails["function"]["name"] == "Fails"
    assert weekday["function"]["parameters"]["required"] == ["date"]


def test_ones_own_tool_is_called_by_its_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("""tools call Weekday '{"date": "today"}' --local --config own.yaml""") == 0
    assert capsys.readouterr().out == "Monday, says today\n"
    assert run("tools call Fails x --local --config own.yaml") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "tool_error: the tool failed with ValueError"


def test_a_file_of_calls_comes_back_in_order_with_their_results(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out.jsonl").write_text("old")
    assert run("tools call SimpleCalculatorTool --jsonl in.jsonl --out out.jsonl --local") == 0
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [(row["id"], row["argument"], row["status"], row["text"], row["truncated"]) for row in rows] == [
        ("a", "1+1", "ok", "2", False),
        ("b", "1/0", "tool_error", "division by zero", False),
        ("c", "2*3", "ok", "6", False),
    ]
    assert all(0 < row["latency_s"] < 10 for row in rows)
    written = capsys.readouterr()
    assert written.out.startswith("3 calls in ") and written.out.endswith(" s (ok 2, tool_error 1), written to out.jsonl\n")
    assert "3/3" in written.err


@pytest.mark.parametrize("there", [True, False])
def test_results_are_written_through_a_link(there: bool, folder: Path) -> None:
    if there:
        (folder / "folder" / "out.jsonl").write_text("old")
    (folder / "link").symlink_to("folder/out.jsonl")
    assert run("tools call SimpleCalculatorTool --jsonl in.jsonl --out link --local") == 0
    assert (folder / "link").is_symlink()
    assert len((folder / "folder" / "out.jsonl").read_text().splitlines()) == 3
    assert [path.name for path in (folder / "folder").iterdir()] == ["out.jsonl"]


def test_a_bench_counts_its_calls(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tools bench SimpleCalculatorTool 1/0 --local --in-flight 3 --seconds 0.2") == 0
    first, rate, latency, status = capsys.readouterr().out.splitlines()
    assert first == "SimpleCalculatorTool in this process: 3 calls in flight for 0.2 s"
    assert float(rate.split()[1].replace(",", "")) > 0
    assert [word for word in latency.split() if word.startswith("p")] == ["p50", "p95", "p99"]
    assert status.split()[:2] == ["status", "tool_error"] and int(status.split()[2].replace(",", "")) >= 3


@pytest.mark.parametrize(("end", "code"), [("stdin", 0), ("SIGTERM", 143)])
def test_the_session_of_an_mcp_client_ends_with_its_command(end: str, code: int) -> None:
    notebook = Notebook()
    tools = InProcess(notebook)
    client = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    messages = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": client},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "Notebook", "arguments": {"argument": "a"}}},
    ]
    with over_http(make_app(tools.infos, tools.gateway.call, tools.gateway.end_session)) as port:
        command = [sys.executable, "-m", "toolrl_ray.cli", "tools", "mcp", "--address", f"http://127.0.0.1:{port}"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            try:
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write("".join(json.dumps(message) + "\n" for message in messages))
                process.stdin.flush()
                assert [json.loads(process.stdout.readline())["id"] for _ in range(2)] == [1, 2]
                assert list(notebook.pages.values()) == [["a"]]
                process.terminate() if end == "SIGTERM" else process.stdin.close()
                assert process.wait(timeout=30) == code
            finally:
                process.kill()
        assert ended(lambda: not notebook.pages)


LOUD_TOOL = '''
import os

print("as a module", flush=True)
os.system("echo of its own process")


def loud(x: str) -> str:
    """Says what it does."""
    print("in a call", flush=True)
    return x
'''


def test_what_a_tool_prints_reaches_no_mcp_client(folder: Path) -> None:
    (folder / "loud.py").write_text(LOUD_TOOL)
    (folder / "loud.yaml").write_text("names: [Loud]\ncustom: {Loud: 'loud.py:loud'}\n")
    client = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    messages = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": client},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "Loud", "arguments": {"x": "a"}}},
    ]
    command = [sys.executable, "-m", "toolrl_ray.cli", "tools", "mcp", "--local", "--config", "loud.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment
    ) as process:
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("".join(json.dumps(message) + "\n" for message in messages))
            process.stdin.flush()
            lines = [process.stdout.readline() for _ in range(2)]
            out, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert [json.loads(line)["id"] for line in lines] == [1, 2] and (out, process.returncode) == ("", 0)
    assert errors.splitlines() == ["as a module", "of its own process", "in a call"]


def ended(condition: Callable[[], bool]) -> bool:
    """Whether what goes on in the background comes about."""
    give_up = time.monotonic() + 10
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.01)
    return condition()


def test_the_examples_that_are_shown_are_of_tools_that_exist() -> None:
    from tools_service.runner import builtin_tools

    assert set(tools_access.EXAMPLES) == set(builtin_tools()) >= set(tools_access.DEFAULT_NAMES)
