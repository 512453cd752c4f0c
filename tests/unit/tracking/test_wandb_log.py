"""W&B with the real package, offline: files in the run folder, and never a prompt or a crash."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import socket
import sys
import time
from pathlib import Path

import pytest
import wandb

from toolrl_ray.config import RunConfig
from toolrl_ray.tracking import wandb_log
from toolrl_ray.tracking.wandb_log import WandbTracker, logged_in, resolve_mode, transcript_row
from toolrl_ray.types import EpisodeRequest, Segment, SegmentKind, StopReason, Task, ToolCallRecord, Trajectory
from tools_service.protocol import ToolStatus

KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_SILENT", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home" / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "home" / "cache"))


def config(mode: str) -> RunConfig:
    return RunConfig.model_validate({"recipe": "test", "tracking": {"wandb": mode, "num_transcripts": 1}})


def trajectory() -> Trajectory:
    return Trajectory(
        request=EpisodeRequest("0:0:0", "0:0", Task("generated/train/0", "What is 2 + 3?", "5", "generated")),
        token_ids=[1, 2, 3],
        loss_mask=[False, True, False],
        rollout_logprobs=[0.0, -0.5, 0.0],
        policy_versions=[-1, 0, -1],
        segments=[
            Segment(SegmentKind.PROMPT, 0, 1, "What is 2 + 3?\n"),
            Segment(SegmentKind.POLICY, 1, 2, "<request>"),
            Segment(SegmentKind.OBSERVATION, 2, 3, "5<response>"),
        ],
        tool_calls=[ToolCallRecord(0, "SimpleCalculatorTool", "2+3", ToolStatus.OK, "5", 0.001, False)],
        stop_reason=StopReason.MAX_TURNS,
        num_turns=1,
        duration_s=0.1,
        reward=0.0,
    )


def test_an_offline_run_leaves_its_files_in_the_run_folder_and_says_so_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = WandbTracker(config("auto"), tmp_path)
    assert tracker.mode == "offline"
    tracker.log(0, {"env/reward_mean": 0.5}, [trajectory(), trajectory()])
    tracker.log(1, {"env/reward_mean": 0.75})
    tracker.finish({"accuracy_after": 0.9})
    tracker.finish()
    (run_file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert run_file.stat().st_size > 0
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/transcripts*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == wandb_log.COLUMNS
    assert content["data"] == [transcript_row(0, trajectory())]
    assert "\n" not in tracker.note
    assert str(run_file.parent) in tracker.note
    assert "wandb login" in tracker.note
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_run_that_is_resumed_goes_on_in_the_same_wandb_run_and_names_all_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **given: asked.append((given["id"], given["resume"], given["mode"])) or init(**given))
    ids = []
    for step in (1, 2):
        tracker = WandbTracker(config("offline"), tmp_path)
        ids.append(tracker._run.id)
        tracker.log(step, {"a": 1.0}, [trajectory()])
        tracker.finish()
        time.sleep(1.1)  # wandb names its folders by the second
    assert ids == [(tmp_path / "wandb_id").read_text()] * 2
    assert asked == [(ids[0], "allow", "offline")] * 2
    folders = sorted(tmp_path.glob(f"wandb/offline-run-*-{ids[0]}"))
    assert len(folders) == 2 and tracker.note.endswith(f"wandb sync {folders[0]} {folders[1]}")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_runs_of_different_folders_are_different_wandb_runs(tmp_path: Path) -> None:
    ids = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        ids |= {wandb_log.run_id(tmp_path / name), wandb_log.run_id(tmp_path / name)}
    assert len(ids) == 2 and all(len(id) == 8 for id in ids)


def test_a_step_that_is_done_again_is_left_out_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = WandbTracker(config("offline"), tmp_path)
    for step in (1, 2, 3, 2, 3, 4):
        tracker.log(step, {"a": float(step)}, [trajectory()])
    assert (tracker.mode, tracker._run.step) == ("offline", 4)
    tracker.finish()
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/table/transcripts*.table.json"))) == 5
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_transcript_row_shows_the_episode_as_it_went() -> None:
    row = dict(zip(wandb_log.COLUMNS, transcript_row(3, trajectory()), strict=True))
    assert row["step"] == 3
    assert row["transcript"] == "<request>5<response>"
    assert row["tool_calls"] == "SimpleCalculatorTool(2+3) -> ok: 5"
    assert row["stop_reason"] == "max_turns"


def test_a_long_text_is_cut_in_its_middle_and_floods_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    long = trajectory()
    long.tool_calls[0] = dataclasses.replace(long.tool_calls[0], text="a" * 150_000 + "z" * 50_000)
    cell = dict(zip(wandb_log.COLUMNS, transcript_row(3, long), strict=True))["tool_calls"]
    assert len(cell) < wandb_log.MAX_CELL + 100
    assert cell.startswith("SimpleCalculatorTool(2+3) -> ok: aaa") and cell.endswith("zzz")
    assert "\n[... 192,033 characters are left out here ...]\n" in cell
    tracker = WandbTracker(config("offline"), tmp_path)
    tracker.log(0, {}, [long])
    tracker.finish()
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_off_touches_nothing(tmp_path: Path) -> None:
    tracker = WandbTracker(config("off"), tmp_path)
    tracker.log(0, {"a": 1.0}, [trajectory()])
    tracker.finish({"b": 1})
    assert tracker.mode == "off"
    assert list(tmp_path.iterdir()) == []


def test_a_missing_wandb_turns_tracking_off_and_names_the_install_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tracker = WandbTracker(config("online"), tmp_path)
    assert tracker.mode == "off"
    assert "pip install wandb" in tracker.note


def test_a_wandb_that_cannot_be_imported_turns_tracking_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # its import raises
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    tracker = WandbTracker(config("offline"), tmp_path)
    assert tracker.mode == "off"
    assert "wandb failed to start: import of wandb halted" in tracker.note
    tracker.log(1, {})
    tracker.finish()


def test_a_wandb_that_fails_to_start_is_told_by_the_note_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**given: object) -> None:
        raise wandb.errors.UsageError("no such\nthing")

    monkeypatch.setattr(wandb, "init", fail)
    tracker = WandbTracker(config("offline"), tmp_path)
    assert (tracker.mode, tracker.note) == ("off", "W&B: off; wandb failed to start: no such thing")
    captured = capfd.readouterr()
    assert captured.out + captured.err == "" and not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_online_without_a_login_is_offline(tmp_path: Path) -> None:
    assert resolve_mode("online") == ("offline", "not logged in (wandb login)")
    assert resolve_mode("auto") == ("offline", "not logged in (wandb login)")


def test_online_without_a_server_goes_on_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as listener:  # a port that nobody answers on
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb_log, "INIT_TIMEOUT_S", 3.0)
    tracker = WandbTracker(config("online"), tmp_path)
    tracker.log(0, {"env/reward_mean": 0.5})
    tracker.finish()
    assert tracker.note.startswith("W&B: offline")
    assert "could not be reached" in tracker.note
    assert list(tmp_path.glob(f"wandb/offline-run-*-{wandb_log.run_id(tmp_path)}"))


def test_a_login_is_found_in_the_environment_and_in_netrc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not logged_in()
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    (home / ".netrc").chmod(0o600)
    assert logged_in()
    assert resolve_mode("auto") == ("online", "")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not logged_in()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert logged_in()


@pytest.mark.parametrize(("environment", "mode"), [("offline", "offline"), ("disabled", "off")])
def test_auto_follows_the_environment(monkeypatch: pytest.MonkeyPatch, environment: str, mode: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", environment)
    assert resolve_mode("auto") == (mode, "")


def test_a_failure_of_wandb_in_mid_run_ends_tracking_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = WandbTracker(config("offline"), tmp_path)
    run = tracker._run
    tracker.log(0, {"a": object()})
    tracker.log(1, {"a": 1.0})
    run.finish()
    tracker.log(2, {"a": 1.0})
    assert tracker.mode == "off"
    assert "no more is sent" in caplog.text
    tracker.finish()


def test_a_tools_library_that_is_loaded_brings_no_advertisement(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import mcp  # noqa: F401  one of those at which wandb has something to say

    WandbTracker(config("offline"), tmp_path).finish()
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
