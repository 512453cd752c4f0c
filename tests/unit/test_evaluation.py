from __future__ import annotations

import pytest

from toolrl_ray.evaluation import eval_result, rollout_metrics
from toolrl_ray.types import EpisodeRequest, StopReason, Task, ToolCallRecord, Trajectory
from tools_service.protocol import ToolStatus


def test_stop_reasons_are_shares_of_the_episodes():
    request = EpisodeRequest("1:0:0", "1:0", Task("t", "q", "a", "test"))
    rows = [Trajectory(request, [1, 2], [False, True], [0.0, -1.0], [-1, 0], [], [], reason, 1, 0.5) for reason in StopReason]
    metrics = rollout_metrics(rows, 2.0)
    assert sum(metrics[f"env/stop/{reason}"] for reason in StopReason) == pytest.approx(1.0)
    assert metrics["rollout/tokens_per_s"] == len(rows) / 2


def test_an_evaluation_counts_full_rewards_and_successful_tool_use():
    request = EpisodeRequest("1:0:0", "1:0", Task("t", "q", "a", "test"))
    rows = [Trajectory(request, [1, 2], [False, True], [0.0, -1.0], [-1, 0], [], [], StopReason.SUBMITTED, 1, 0.5) for _ in range(4)]
    for row, reward in zip(rows, (1.0, 1.0, 1.0, 0.0), strict=True):
        row.reward = reward
    rows[0].tool_calls.append(ToolCallRecord(1, "T", "1", ToolStatus.OK, "1", 0.1, False))
    rows[1].tool_calls.append(ToolCallRecord(1, "T", "1/0", ToolStatus.TOOL_ERROR, "division by zero", 0.1, False))
    result = eval_result(rows, 2.0)
    assert (result["accuracy"], result["tool_use_rate"], result["tool_error_rate"]) == (0.75, 0.25, 0.5)
    assert result["episodes_per_s"] == 2.0
