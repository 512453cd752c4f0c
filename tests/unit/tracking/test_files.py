"""metrics.jsonl and trajectories.jsonl: whole lines, whatever the numbers, whenever the run was killed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolrl_ray.tracking import jsonl
from toolrl_ray.tracking.jsonl import JsonLines
from toolrl_ray.tracking.metrics import MetricsWriter, load_metrics
from toolrl_ray.tracking.trajectories import TrajectoryWriter, from_record, load_trajectories, to_record
from toolrl_ray.types import NO_VERSION, EpisodeRequest, Segment, SegmentKind, StopReason, Task, ToolCallRecord, Trajectory
from tools_service.protocol import ToolStatus


def trajectory(**changes: object) -> Trajectory:
    values: dict = {
        "request": EpisodeRequest("3:17:0", "3:17", Task("generated/train/17", "What is 2 + 3?", "5", "generated")),
        "token_ids": [5, 6, 7, 8, 9],
        "loss_mask": [False, True, True, False, True],
        "rollout_logprobs": [0.0, -0.25, -1.5, 0.0, -0.0078125],
        "policy_versions": [NO_VERSION, 3, 3, NO_VERSION, 4],
        "segments": [
            Segment(SegmentKind.PROMPT, 0, 1, "What is 2 + 3?\n"),
            Segment(SegmentKind.POLICY, 1, 3, "<request><SimpleCalculatorTool>2+3<call>", overhang="\n"),
            Segment(SegmentKind.OBSERVATION, 3, 4, "5<response>"),
            Segment(SegmentKind.POLICY, 4, 5, "Result=5<submit>"),
        ],
        "tool_calls": [ToolCallRecord(0, "SimpleCalculatorTool", "2+3", ToolStatus.OK, "5", 0.002, False)],
        "stop_reason": StopReason.SUBMITTED,
        "num_turns": 2,
        "duration_s": 0.125,
        "reward": 1.0,
    }
    return Trajectory(**(values | changes))


def test_each_step_is_on_disk_as_one_object_before_the_writer_is_closed(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(0, {"env/reward_mean": 0.5, "train/num_tokens": 12})
    writer.write(1, {"env/reward_mean": np.float32(0.75)})
    assert load_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 0, "env/reward_mean": 0.5, "train/num_tokens": 12},
        {"step": 1, "env/reward_mean": 0.75},
    ]
    writer.close()


def test_syncing_tells_how_many_bytes_are_on_the_device(tmp_path: Path) -> None:
    for num_steps in (1, 3):
        writer = MetricsWriter(tmp_path)
        for step in range(num_steps):
            writer.write(step, {"a": 1.0})
        assert writer.sync() == (tmp_path / "metrics.jsonl").stat().st_size > 0
        writer.close()


def test_nan_and_infinity_become_null_and_are_named(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(4, {"a": float("nan"), "b": 1.0, "c": np.float64("-inf")})
    writer.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 4, "a": None, "b": 1.0, "c": None, "nonfinite": ["a", "c"]}


def test_opening_again_appends_and_cuts_off_a_line_that_a_kill_left_unfinished(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":0}\n{"step":1,"env/rew')
    assert load_metrics(path) == [{"step": 0}]
    writer = MetricsWriter(tmp_path)
    writer.write(1, {})
    writer.close()
    assert path.read_text() == '{"step":0}\n{"step":1}\n'


@pytest.mark.parametrize("whole", [b"", b'{"a":1}\n', b'{"a":"' + b"x" * 200_000 + b'"}\n'])
@pytest.mark.parametrize("rest", [b"", b"{", b'{"b":"' + b"y" * 200_000])
def test_what_is_cut_off_is_exactly_the_unfinished_line(tmp_path: Path, whole: bytes, rest: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(whole + rest)
    jsonl.JsonLines(path).close()
    assert path.read_bytes() == whole


def test_trajectories_come_back_as_they_were(tmp_path: Path) -> None:
    writer = TrajectoryWriter(tmp_path)
    first, second = trajectory(), trajectory(reward=None, stop_reason=StopReason.CONTEXT, tool_calls=[], info={"tries": 2})
    writer.write(0, [first, second])
    writer.write(1, [first])
    writer.close()
    assert load_trajectories(tmp_path / "trajectories.jsonl") == [(0, first), (0, second), (1, first)]


def test_text_that_is_no_unicode_does_not_end_the_run(tmp_path: Path) -> None:
    task = Task("own/1", "\ud83d?", "5", "own")
    with JsonLines(tmp_path / "trajectories.jsonl") as file:
        file.append([to_record(3, trajectory(request=EpisodeRequest("3:1:0", "3:1", task), reward=float("nan")))])
    [record] = jsonl.read(tmp_path / "trajectories.jsonl")
    assert record["step"] == 3 and record["reward"] is None and "\ufffd?" in json.dumps(record, ensure_ascii=False)


def test_what_an_evaluation_asked_for_comes_back_and_files_from_before_that_was_written_are_read() -> None:
    task = Task("t", "q", "a", "trivia", aliases=("b", "c"))
    written = trajectory(request=EpisodeRequest("eval-x:t", "t", task, temperature=0.0, with_tools=False))
    record = json.loads(json.dumps(to_record(0, written)))
    assert from_record(record) == written
    del record["temperature"], record["with_tools"], record["task"]["aliases"]
    assert from_record(record).request == EpisodeRequest("eval-x:t", "t", Task("t", "q", "a", "trivia"))


def test_a_record_is_plain_json_that_holds_every_column_in_full_length() -> None:
    record = json.loads(json.dumps(to_record(7, trajectory())))
    assert record["step"] == 7
    assert record["loss_mask"] == [0, 1, 1, 0, 1]
    assert {len(record[name]) for name in ("token_ids", "loss_mask", "rollout_logprobs", "policy_versions")} == {5}
    assert record["segments"][1]["overhang"] == "\n"
    assert record["tool_calls"][0] | {"status": "ok", "latency_s": 0.002} == record["tool_calls"][0]
    assert record["stop_reason"] == "submitted"


@given(text=st.text(), logprob=st.floats(-50, 0, width=32))
def test_any_text_and_any_logprob_survive_one_line(text: str, logprob: float) -> None:
    text = text.encode("utf-8", "replace").decode()  # a decoder of token ids never yields lone surrogates
    written = trajectory(segments=[Segment(SegmentKind.PROMPT, 0, 5, text)], rollout_logprobs=[0.0, logprob, 0.0, 0.0, 0.0])
    line = json.dumps(to_record(0, written), ensure_ascii=False)
    assert "\n" not in line
    read = from_record(json.loads(line))
    assert read.segments == written.segments
    assert read.rollout_logprobs == pytest.approx(written.rollout_logprobs, abs=1e-7)
