"""Numbers about finished trajectories: per-step metrics and evaluation results. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, pstdev

from toolrl_ray.types import StopReason, Trajectory
from tools_service.protocol import ToolStatus


def rollout_metrics(trajectories: Sequence[Trajectory], duration_s: float) -> dict[str, float]:
    """Metrics of one collection that took `duration_s`; shares are of episodes, stop reasons and statuses all named."""
    calls = [call for t in trajectories for call in t.tool_calls]
    stops = Counter(t.stop_reason for t in trajectories)
    statuses = Counter(call.status for call in calls)
    sampled = sum(t.num_trained_tokens for t in trajectories)
    rewards = [t.reward or 0.0 for t in trajectories]
    metrics = {
        "env/reward_mean": fmean(rewards),
        "env/reward_std": pstdev(rewards),
        "env/tool_use_rate": fmean(t.used_tool for t in trajectories),
        "env/truncated_rate": fmean(t.truncated for t in trajectories),
        "env/turns_mean": fmean(t.num_turns for t in trajectories),
        "env/sampled_tokens_mean": sampled / len(trajectories),
        "env/episode_s_mean": fmean(t.duration_s for t in trajectories),
        "tools/calls": len(calls),
        "tools/latency_s_mean": fmean(call.latency_s for call in calls) if calls else 0.0,
        "rollout/episodes": len(trajectories),
        "rollout/sampled_tokens": sampled,
        "rollout/episodes_per_s": len(trajectories) / duration_s,
        "rollout/tokens_per_s": sampled / duration_s,
        "time/rollout_s": duration_s,
    }
    metrics |= {f"env/stop/{reason}": stops[reason] / len(trajectories) for reason in StopReason}
    return metrics | {f"tools/status/{status}": statuses[status] for status in ToolStatus}


def eval_result(trajectories: Sequence[Trajectory], duration_s: float) -> dict[str, float]:
    """Result of an evaluation; accuracy is the share of episodes with the full reward of 1."""
    calls = [call for t in trajectories for call in t.tool_calls]
    return {
        "num_tasks": len(trajectories),
        "accuracy": fmean((t.reward or 0.0) >= 1.0 for t in trajectories),
        "reward_mean": fmean(t.reward or 0.0 for t in trajectories),
        "tool_use_rate": fmean(t.used_tool for t in trajectories),
        "tool_error_rate": fmean(call.status is not ToolStatus.OK for call in calls) if calls else 0.0,
        "truncated_rate": fmean(t.truncated for t in trajectories),
        "turns_mean": fmean(t.num_turns for t in trajectories),
        "sampled_tokens_mean": fmean(t.num_trained_tokens for t in trajectories),
        "episodes_per_s": len(trajectories) / duration_s,
        "tokens_per_s": sum(t.num_trained_tokens for t in trajectories) / duration_s,
        "duration_s": duration_s,
    }
