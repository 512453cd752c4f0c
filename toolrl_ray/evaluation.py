"""Numbers about finished trajectories: per-step metrics and evaluation results; and which episodes an evaluation takes. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, pstdev

from toolrl_ray.config import EvalConfig
from toolrl_ray.intervals import bootstrap_interval, pass_at_k, wilson_interval
from toolrl_ray.types import EpisodeRequest, StopReason, Task, Trajectory
from tools_service.protocol import ToolStatus

Numbers = dict[str, float]


def rollout_metrics(trajectories: Sequence[Trajectory], duration_s: float, dropped: Sequence[tuple[float, int]] = ()) -> Numbers:
    """Metrics of one collection that took `duration_s`; shares are of episodes, stop reasons and statuses all named.

    dropped: (reward, sampled tokens) of the episodes that finished too and are not trained on. They count in `rollout/*`, and in
    `env/reward_mean_with_dropped`: where groups are filtered by their rewards, `env/reward_mean` is that of the others alone.
    Of tasks of several sources, reward and tool use are given for each, as `env/reward_mean/SOURCE`.
    """
    calls = [call for t in trajectories for call in t.tool_calls]
    stops = Counter(t.stop_reason for t in trajectories)
    statuses = Counter(call.status for call in calls)
    sampled = sum(t.num_trained_tokens for t in trajectories)
    num_episodes = len(trajectories) + len(dropped)
    num_tokens = sampled + sum(tokens for _, tokens in dropped)
    metrics = {
        "env/reward_mean": _reward_mean(trajectories),
        "env/reward_mean_with_dropped": fmean([*(t.reward or 0.0 for t in trajectories), *(reward for reward, _ in dropped)]),
        "env/reward_std": pstdev(t.reward or 0.0 for t in trajectories),
        "env/tool_use_rate": _tool_use_rate(trajectories),
        "env/truncated_rate": fmean(t.truncated for t in trajectories),
        "env/turns_mean": fmean(t.num_turns for t in trajectories),
        "env/sampled_tokens_mean": sampled / len(trajectories),
        "env/episode_s_mean": fmean(t.duration_s for t in trajectories),
        "tools/calls": len(calls),
        "tools/latency_s_mean": fmean(call.latency_s for call in calls) if calls else 0.0,
        "rollout/episodes": num_episodes,
        "rollout/sampled_tokens": num_tokens,
        "rollout/episodes_per_s": num_episodes / duration_s,
        "rollout/tokens_per_s": num_tokens / duration_s,
        "time/rollout_s": duration_s,
    }
    for source, own in by_source(trajectories).items():
        metrics |= {f"env/reward_mean/{source}": _reward_mean(own), f"env/tool_use_rate/{source}": _tool_use_rate(own)}
    metrics |= {f"env/stop/{reason}": stops[reason] / len(trajectories) for reason in StopReason}
    return metrics | {f"tools/status/{status}": statuses[status] for status in ToolStatus}


def by_source(trajectories: Sequence[Trajectory]) -> dict[str, list[Trajectory]]:
    """The trajectories of each `Task.source`, by its name; {} when there is but one."""
    sources = sorted({t.request.task.source for t in trajectories})
    return {s: [t for t in trajectories if t.request.task.source == s] for s in sources} if len(sources) > 1 else {}


def eval_requests(
    config: EvalConfig, tasks: Sequence[Task], label: str, *, num_samples: int, without_tools: bool = False
) -> list[EpisodeRequest]:
    """The first `config.num_tasks` tasks: each once greedily, `num_samples` times at `config.temperature`, and, if asked for, once
    greedily without tools."""
    requests = []
    for task in tasks[: config.num_tasks]:
        episode_id = f"eval-{label}:{task.id}"
        requests.append(EpisodeRequest(episode_id, task.id, task, 0.0))
        requests += [EpisodeRequest(f"{episode_id}:sample-{i}", task.id, task, config.temperature) for i in range(num_samples)]
        if without_tools:
            requests.append(EpisodeRequest(f"{episode_id}:without-tools", task.id, task, 0.0, with_tools=False))
    return requests


def eval_result(trajectories: Sequence[Trajectory]) -> Numbers:
    """Numbers of the episodes of `eval_requests`. A task is solved by an episode with the full reward of 1.

    accuracy, with its 95 % interval accuracy_low to accuracy_high, and the others without a prefix: of the greedy episodes.
    sampled/*: of the sampled ones, with pass@k for k = 1, 2, 4, ... up to their number.
    without_tools/*: of those without tools; tool_gain: by how much accuracy is higher with tools than without.
    NAME/SOURCE: every number for each source, where there are several.
    """
    result = _eval_numbers(trajectories)
    for source, own in by_source(trajectories).items():
        result |= {f"{name}/{source}": value for name, value in _eval_numbers(own).items()}
    return result


def speed(trajectories: Sequence[Trajectory], duration_s: float) -> Numbers:
    """Of all episodes of an evaluation that had the engines for itself."""
    num_tokens = sum(t.num_trained_tokens for t in trajectories)
    return {"episodes_per_s": len(trajectories) / duration_s, "tokens_per_s": num_tokens / duration_s, "duration_s": duration_s}


def ks(num_samples: int) -> list[int]:
    """The k of pass@k that are told: powers of two, and the number of samples."""
    return sorted({2**i for i in range(num_samples.bit_length())} | {num_samples})


def _eval_numbers(trajectories: Sequence[Trajectory]) -> Numbers:
    sampled = [t for t in trajectories if t.request.temperature]
    greedy = [t for t in trajectories if not t.request.temperature and t.request.with_tools]
    without = [t for t in trajectories if not t.request.with_tools]
    result: Numbers = {"num_tasks": len(greedy)} | _accuracy(greedy) | _tool_numbers(greedy) | _numbers(greedy)
    if sampled:
        result |= {f"sampled/{k}": v for k, v in (_pass_at(sampled) | _tool_numbers(sampled) | _numbers(sampled)).items()}
    if without:
        result |= {f"without_tools/{name}": value for name, value in (_accuracy(without) | _numbers(without)).items()}
        solved = {t.request.group_id: _solved(t) for t in without}
        gains = [float(_solved(t) - solved[t.request.group_id]) for t in greedy]
        result |= _with_interval("tool_gain", fmean(gains), bootstrap_interval(gains, bounds=(-1.0, 1.0)))
    return result


def _accuracy(trajectories: Sequence[Trajectory]) -> Numbers:
    num_solved = sum(map(_solved, trajectories))
    return _with_interval("accuracy", num_solved / len(trajectories), wilson_interval(num_solved, len(trajectories)))


def _pass_at(trajectories: Sequence[Trajectory]) -> Numbers:
    """pass@k with its interval; every task has as many samples."""
    num_solved: Counter[str] = Counter()
    for t in trajectories:
        num_solved[t.request.group_id] += _solved(t)
    num_samples = len(trajectories) // len(num_solved)
    numbers: Numbers = {"num_samples": num_samples}
    for k in ks(num_samples):
        values = [pass_at_k(num_samples, solved, k) for solved in num_solved.values()]
        numbers |= _with_interval(f"pass@{k}", fmean(values), bootstrap_interval(values, bounds=(0.0, 1.0)))
    return numbers


def _tool_numbers(trajectories: Sequence[Trajectory]) -> Numbers:
    calls = [call for t in trajectories for call in t.tool_calls]
    error_rate = fmean(call.status is not ToolStatus.OK for call in calls) if calls else 0.0
    return {"tool_use_rate": _tool_use_rate(trajectories), "tool_error_rate": error_rate}


def _numbers(trajectories: Sequence[Trajectory]) -> Numbers:
    return {
        "reward_mean": _reward_mean(trajectories),
        "truncated_rate": fmean(t.truncated for t in trajectories),
        "turns_mean": fmean(t.num_turns for t in trajectories),
        "sampled_tokens_mean": fmean(t.num_trained_tokens for t in trajectories),
    }


def _with_interval(name: str, value: float, interval: tuple[float, float]) -> Numbers:
    return {name: value, f"{name}_low": interval[0], f"{name}_high": interval[1]}


def _solved(trajectory: Trajectory) -> bool:
    return (trajectory.reward or 0.0) >= 1.0


def _reward_mean(trajectories: Sequence[Trajectory]) -> float:
    return fmean(t.reward or 0.0 for t in trajectories)


def _tool_use_rate(trajectories: Sequence[Trajectory]) -> float:
    return fmean(t.used_tool for t in trajectories)
