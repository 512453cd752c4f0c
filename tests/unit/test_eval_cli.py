"""The table of `toolrl eval`."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from toolrl_ray import cli
from toolrl_ray.eval_cli import render
from toolrl_ray.tracking import trajectories

MEASURED = {"reward_mean": 0.5, "truncated_rate": 0.0, "turns_mean": 2.0, "sampled_tokens_mean": 1234.5}
TOOLS = {"tool_use_rate": 0.75, "tool_error_rate": 0.125}
SPEED = {"episodes_per_s": 2.0, "tokens_per_s": 2469.0, "duration_s": 2.0}
GREEDY = {"num_tasks": 4, "accuracy": 0.5, "accuracy_low": 0.25, "accuracy_high": 0.75, **TOOLS, **MEASURED}
FULL = {
    **GREEDY,
    "sampled/num_samples": 2,
    **{f"sampled/pass@{k}{end}": value for k in (1, 2) for end, value in (("", k / 4), ("_low", 0.0), ("_high", 1.0))},
    **{f"sampled/{name}": value for name, value in (TOOLS | MEASURED).items()},
    **{f"without_tools/{name}": value for name, value in MEASURED.items()},
    **{"without_tools/accuracy": 0.0, "without_tools/accuracy_low": 0.0, "without_tools/accuracy_high": 0.5},
    **{"tool_gain": 0.5, "tool_gain_low": -0.1, "tool_gain_high": 0.9},
    **SPEED,
}


def test_the_table_has_a_line_per_measure_with_its_interval() -> None:
    assert render(FULL).splitlines() == [
        "                     greedy                   sampled, 2 of each    without tools",
        "accuracy             0.500 [0.250, 0.750]                           0.000 [0.000, 0.500]",
        "pass@1                                        0.250 [0.000, 1.000]",
        "pass@2                                        0.500 [0.000, 1.000]",
        "gained by the tools  +0.500 [-0.100, +0.900]",
        "reward               0.500                    0.500                 0.500",
        "tool-use rate        0.750                    0.750",
        "tool error rate      0.125                    0.125",
        "truncated            0.000                    0.000                 0.000",
        "turns                2.00                     2.00                  2.00",
        "sampled tokens       1,234.5                  1,234.5               1,234.5",
        "4 tasks, each interval at 95 %",
        "2.0 s: 2.0 episodes/s, 2,469 tokens/s",
    ]


def test_what_was_not_measured_is_not_in_the_table() -> None:
    lines = render(GREEDY | SPEED).splitlines()
    assert lines[0].split() == ["greedy"]
    assert [line.split("  ")[0] for line in lines[1:-2]] == [
        "accuracy", "reward", "tool-use rate", "tool error rate", "truncated", "turns", "sampled tokens",
    ]  # fmt: skip


def test_each_of_several_sources_has_lines_of_its_own() -> None:
    sources = {f"{name}/{source}": value for source in ("gsm8k", "nq/open") for name, value in GREEDY.items()}
    lines = render(GREEDY | sources | {"accuracy/nq/open": 0.625} | SPEED).splitlines()
    assert [line for line in lines if ", " in line.split("  ")[0]][:4] == [
        "accuracy, gsm8k         0.500 [0.250, 0.750]",
        "tool-use rate, gsm8k    0.750",
        "accuracy, nq/open       0.625 [0.250, 0.750]",
        "tool-use rate, nq/open  0.750",
    ]


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The command with both files, in a folder of its own; the evaluation itself is the one above."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "with_parts", lambda *_: (FULL, []))
    return ["eval", "calculator", "--json", "result.json", "--transcripts", "episodes"]


def test_a_file_that_cannot_be_written_costs_neither_the_table_nor_the_other_file(
    evaluated: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trajectories.TrajectoryWriter, "write", full_disk)
        assert cli.main(evaluated) == 2
    assert not (tmp_path / "episodes" / "trajectories.jsonl").exists()
    said = capsys.readouterr()
    assert "gained by the tools" in said.out
    assert said.err.startswith("toolrl: --transcripts='episodes' cannot be written (No space left on device); the evaluation is done")
    assert json.loads((tmp_path / "result.json").read_text())["accuracy"] == 0.5
    monkeypatch.setattr("toolrl_ray.eval_cli.os.replace", full_disk)
    assert cli.main(evaluated) == 2
    assert capsys.readouterr().err.startswith("toolrl: --json='result.json' cannot be written (No space left on device)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["episodes", "result.json"], "the first one's, and nothing half-written"
    assert (tmp_path / "episodes" / "trajectories.jsonl").exists()


def test_what_json_does_not_know_is_not_written_as_json(
    evaluated: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "with_parts", lambda *_: (FULL | {"reward_mean": float("nan")}, []))
    assert cli.main(evaluated) == 2
    said = capsys.readouterr()
    assert said.err.startswith("toolrl: --json='result.json' cannot be written (Out of range float values") and "Traceback" not in said.err
    assert not list(tmp_path.glob("result.json*"))


def test_a_link_is_followed(evaluated: list[str], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "result.json").symlink_to("elsewhere/target.json")
    for _ in range(2):  # the target is made, and replaced
        assert cli.main(evaluated[:4]) == 0
        assert (tmp_path / "result.json").is_symlink()
        assert json.loads((tmp_path / "elsewhere" / "target.json").read_text())["accuracy"] == 0.5
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["target.json"]


def test_a_pipe_is_written_to_wherever_it_stands(evaluated: list[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "result.json")
    reader = os.open("result.json", os.O_RDONLY | os.O_NONBLOCK)
    made_by_the_shell, writer = os.pipe()
    for path, end in (("result.json", reader), (f"/dev/fd/{writer}", made_by_the_shell)):
        assert cli.main(["eval", "calculator", "--json", path]) == 0
        assert json.loads(os.read(end, 65536))["accuracy"] == 0.5
    assert stat.S_ISFIFO(os.stat("result.json").st_mode)
    for descriptor in (reader, made_by_the_shell, writer):
        os.close(descriptor)


def test_stdout_has_the_result_behind_the_table_in_a_file_too(evaluated: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert stat.S_ISREG(os.fstat(1).st_mode), "as with > FILE"
    Path("stdout").symlink_to("/dev/fd/1")  # not that of /dev, which a failure here would replace
    assert cli.main(["eval", "calculator", "--json", "stdout"]) == 0
    table, brace, result = capfd.readouterr().out.partition("{")
    assert "gained by the tools" in table and json.loads(brace + result)["accuracy"] == 0.5


def test_what_is_no_file_and_cannot_be_written_is_told_before_the_evaluation(
    evaluated: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "with_parts", lambda *_: pytest.fail("begun"))
    monkeypatch.setattr("toolrl_ray.eval_cli.os.access", lambda path, mode: False)
    os.mkfifo("pipe")
    assert cli.main(["eval", "calculator", "--json", "pipe"]) == 2
    assert capsys.readouterr().err.startswith("toolrl: --json='pipe' cannot be written; name another")


@pytest.mark.parametrize("policy", ["runs/🚀/policy", "größe", "a\x85b\x7f", "a 'b' \"c\" \\", "null"])
def test_a_policy_may_have_any_name(policy: str, evaluated: list[str], tmp_path: Path) -> None:
    assert cli.main([*evaluated, "--policy", policy]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["policy"] == policy


@pytest.mark.parametrize("path, folder", [("out", "out"), ("out", "./out/"), ("made/trajectories.jsonl", "made")])
def test_two_outputs_on_one_path_are_refused_before_the_evaluation(
    path: str, folder: str, evaluated: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "with_parts", lambda *_: pytest.fail("begun"))
    Path("made").mkdir()
    assert cli.main(["eval", "calculator", "--json", path, "--transcripts", folder]) == 2
    assert capsys.readouterr().err.startswith(f"toolrl: --json={path!r} is in the way of --transcripts={folder!r}; name another file")


@pytest.mark.parametrize("option", ["--json", "--transcripts"])
def test_a_folder_that_cannot_be_written_is_told_before_the_evaluation(
    option: str, evaluated: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "with_parts", lambda *_: pytest.fail("begun"))
    monkeypatch.setattr("toolrl_ray.eval_cli.os.access", lambda path, mode: False)
    assert cli.main(["eval", "calculator", option, "x"]) == 2
    assert f"{option}='x': the folder " in capsys.readouterr().err
