"""trajectories.jsonl: every episode that was trained on or is of an evaluation, whole: token columns, text segments, tool calls, reward.

One object per line. The four token columns have equal length, as in `Trajectory`; the mask is written as 0 and 1, and
logprobs are rounded to 1e-7, which is finer than float32 resolves a logprob of -1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from toolrl_ray.tracking import jsonl
from toolrl_ray.types import EpisodeRequest, Segment, SegmentKind, StopReason, Task, ToolCallRecord, Trajectory
from tools_service.protocol import ToolStatus


class TrajectoryWriter:
    """Appends trajectories to RUN_DIR/trajectories.jsonl."""

    def __init__(self, run_dir: Path):
        self.path = Path(run_dir) / "trajectories.jsonl"
        self._lines = jsonl.JsonLines(self.path)

    def write(self, step: int, trajectories: Iterable[Trajectory]) -> None:
        self._lines.append(to_record(step, trajectory) for trajectory in trajectories)

    def sync(self) -> int:
        """The bytes of the file, which are on the device then."""
        return self._lines.sync()

    def close(self) -> None:
        self._lines.close()


def to_record(step: int, trajectory: Trajectory) -> dict[str, Any]:
    request = trajectory.request
    return {
        "step": step,
        "episode_id": request.episode_id,
        "group_id": request.group_id,
        "task": asdict(request.task),
        "temperature": request.temperature,
        "with_tools": request.with_tools,
        "reward": trajectory.reward,
        "stop_reason": trajectory.stop_reason,
        "num_turns": trajectory.num_turns,
        "duration_s": round(trajectory.duration_s, 6),
        "segments": [vars(segment) for segment in trajectory.segments],
        "tool_calls": [vars(call) for call in trajectory.tool_calls],
        "token_ids": trajectory.token_ids,
        "loss_mask": list(bytes(trajectory.loss_mask)),
        "rollout_logprobs": np.round(trajectory.rollout_logprobs, 7).tolist(),
        "policy_versions": trajectory.policy_versions,
        "info": trajectory.info,
    }


def from_record(record: dict[str, Any]) -> Trajectory:
    return Trajectory(
        request=_request(record),
        token_ids=record["token_ids"],
        loss_mask=[bool(trained) for trained in record["loss_mask"]],
        rollout_logprobs=[float(logprob) for logprob in record["rollout_logprobs"]],
        policy_versions=record["policy_versions"],
        segments=[Segment(**{**segment, "kind": SegmentKind(segment["kind"])}) for segment in record["segments"]],
        tool_calls=[ToolCallRecord(**{**call, "status": ToolStatus(call["status"])}) for call in record["tool_calls"]],
        stop_reason=StopReason(record["stop_reason"]),
        num_turns=record["num_turns"],
        duration_s=record["duration_s"],
        reward=record["reward"],
        info=record["info"],
    )


def _request(record: dict[str, Any]) -> EpisodeRequest:
    """Files of earlier versions lack temperature and with_tools."""
    task = Task(**{**record["task"], "aliases": tuple(record["task"].get("aliases", ()))})
    own = {key: record[key] for key in ("temperature", "with_tools") if key in record}
    return EpisodeRequest(record["episode_id"], record["group_id"], task, **own)


def load_trajectories(path: Path) -> list[tuple[int, Trajectory]]:
    """(step, trajectory) of every line, in the order written."""
    return [(record["step"], from_record(record)) for record in jsonl.read(Path(path))]
