from __future__ import annotations

import pytest

from toolrl_ray.config import EvalConfig
from toolrl_ray.evaluation import eval_requests, eval_result, rollout_metrics, speed
from toolrl_ray.intervals import wilson_interval
from toolrl_ray.types import EpisodeRequest, StopReason, Task, ToolCallRecord, Trajectory
from tools_service.protocol import ToolStatus

TASKS = [Task(f"t{i}", "q", "a", "test") for i in range(4)]
OK, FAILED = ToolStatus.OK, ToolStatus.TOOL_ERROR


def episode(request: EpisodeRequest, reward: float = 0.0, *statuses: ToolStatus, stop: StopReason = StopReason.SUBMITTED) -> Trajectory:
    calls = [ToolCallRecord(1, "T", "1", status, "", 0.1, False) for status in statuses]
    return Trajectory(request, [1, 2], [False, True], [0.0, -1.0], [-1, 0], [], calls, stop, 1, 0.5, reward)


def greedy(rewards: list[float], tasks: list[Task] = TASKS, *, with_tools: bool = True) -> list[Trajectory]:
    return [episode(EpisodeRequest("", task.id, task, 0.0, with_tools), reward) for task, reward in zip(tasks, rewards, strict=True)]


def sampled(*rewards: list[float]) -> list[Trajectory]:
    """A list of rewards for each task."""
    return [episode(EpisodeRequest("", t.id, t, 1.0), reward) for t, of_task in zip(TASKS, rewards, strict=False) for reward in of_task]


def test_stop_reasons_are_shares_of_the_episodes():
    rows = [episode(EpisodeRequest("1:0:0", "1:0", TASKS[0]), stop=reason) for reason in StopReason]
    metrics = rollout_metrics(rows, 2.0)
    assert sum(metrics[f"env/stop/{reason}"] for reason in StopReason) == pytest.approx(1.0)
    assert metrics["rollout/tokens_per_s"] == len(rows) / 2


def test_the_numbers_of_a_step_computed_by_hand():
    rows = [episode(EpisodeRequest("1:0:0", "1:0", TASKS[0]), 1.0, OK, FAILED), episode(EpisodeRequest("2:0:0", "2:0", TASKS[1]), 0.2)]
    rows[0].token_ids[:], rows[0].loss_mask[:] = [1, 2, 3, 4], [False, True, True, True]
    numbers = rollout_metrics(rows, 4.0, [(0.5, 10), (0.5, 6)])
    assert {name: value for name, value in numbers.items() if value} == pytest.approx(
        {
            "env/reward_mean": 0.6,
            "env/reward_mean_with_dropped": 0.55,
            "env/reward_std": 0.4,
            "env/tool_use_rate": 0.5,
            "env/turns_mean": 1.0,
            "env/sampled_tokens_mean": 2.0,
            "env/episode_s_mean": 0.5,
            "tools/calls": 2,
            "tools/latency_s_mean": 0.1,
            "tools/status/ok": 1,
            "tools/status/tool_error": 1,
            "rollout/episodes": 4,
            "rollout/sampled_tokens": 20,
            "rollout/episodes_per_s": 1.0,
            "rollout/tokens_per_s": 5.0,
            "time/rollout_s": 4.0,
            "env/stop/submitted": 1.0,
        }
    )


def test_a_step_with_tasks_of_two_sources_tells_reward_and_tool_use_of_each():
    a, b = (EpisodeRequest("", source, Task(source, "q", "a", source)) for source in "ab")
    rows = [episode(a, 1.0, OK), episode(a, 0.5), episode(b, 0.0)]
    metrics = rollout_metrics(rows, 1.0)
    assert (metrics["env/reward_mean"], metrics["env/reward_mean/a"], metrics["env/reward_mean/b"]) == (0.5, 0.75, 0.0)
    assert (metrics["env/tool_use_rate/a"], metrics["env/tool_use_rate/b"]) == (0.5, 0.0)
    assert not [name for name in rollout_metrics(rows[:2], 1.0) if name.startswith("env/reward_mean/")]


def test_an_evaluation_counts_full_rewards_and_successful_tool_use():
    request = EpisodeRequest("1:0:0", "1:0", TASKS[0], 0.0)
    rows = [episode(request, 1.0, OK), episode(request, 1.0, FAILED), episode(request, 1.0), episode(request, 0.9)]
    result = eval_result(rows)
    assert (result["accuracy"], result["tool_use_rate"], result["tool_error_rate"]) == (0.75, 0.25, 0.5)
    assert (result["accuracy_low"], result["accuracy_high"]) == wilson_interval(3, 4)
    assert speed(rows, 2.0) == {"episodes_per_s": 2.0, "tokens_per_s": 2.0, "duration_s": 2.0}


def test_an_evaluation_takes_each_task_greedily_sampled_and_without_tools():
    config = EvalConfig(num_tasks=2, temperature=0.7)
    requests = eval_requests(config, TASKS, "x", num_samples=2, without_tools=True)
    one = [(0.0, True), (0.7, True), (0.7, True), (0.0, False)]
    assert [(r.task.id, r.temperature, r.with_tools) for r in requests] == [(id, *how) for id in ("t0", "t1") for how in one]
    assert len({r.episode_id for r in requests}) == len(requests)
    assert [r.temperature for r in eval_requests(config, TASKS, "x", num_samples=0)] == [0.0, 0.0]


def test_pass_at_k_is_the_mean_over_tasks_and_greedy_episodes_have_no_part_in_it():
    result = eval_result(greedy([0, 0], TASKS[:2]) + sampled([1, 1, 0, 0], [0, 0, 0, 1]))
    assert result["sampled/num_samples"] == 4
    assert [result[f"sampled/pass@{k}"] for k in (1, 2, 4)] == pytest.approx([(1 / 2 + 1 / 4) / 2, (5 / 6 + 1 / 2) / 2, 1.0])
    assert 0 <= result["sampled/pass@1_low"] < 0.25 and 0.5 < result["sampled/pass@1_high"] <= 1  # two tasks say little
    assert 0 <= result["sampled/pass@4_low"] < result["sampled/pass@4_high"] == 1
    assert result["accuracy"] == 0 and "sampled/pass@3" not in result
    assert "sampled/pass@3" in eval_result(greedy([0], TASKS[:1]) + sampled([1, 0, 0]))


def test_the_gain_by_tools_is_a_paired_difference():
    pairs = greedy([1, 1, 1, 0]) + greedy([0, 0, 1, 0], TASKS, with_tools=False)
    result = eval_result(pairs)
    assert (result["accuracy"], result["without_tools/accuracy"], result["tool_gain"]) == (0.75, 0.25, 0.5)
    assert -1 <= result["tool_gain_low"] < 0.5 < result["tool_gain_high"] <= 1
    always = eval_result(greedy([1, 1, 1, 1]) + greedy([0, 0, 0, 0], TASKS, with_tools=False))
    assert always["tool_gain_low"] < always["tool_gain"] == always["tool_gain_high"] == 1
    # The same shares, in pairs that never differ: no gain, and less doubt about it than where they do.
    many = [Task(f"t{i}", "q", "a", "s") for i in range(100)]
    same = eval_result(greedy([1, 0] * 50, many) + greedy([1, 0] * 50, many, with_tools=False))
    other = eval_result(greedy([1, 0] * 50, many) + greedy([0, 1] * 50, many, with_tools=False))
    assert (same["tool_gain"], other["tool_gain"]) == (0, 0)
    assert -0.05 < same["tool_gain_low"] < 0 < same["tool_gain_high"] < 0.05 < other["tool_gain_high"]


def test_every_number_is_told_for_each_source_where_there_are_two():
    tasks = [Task("t0", "q", "a", "gsm8k"), Task("t1", "q", "a", "gsm8k"), Task("t2", "q", "a", "trivia")]
    result = eval_result(greedy([1, 0, 1], tasks) + greedy([0, 0, 1], tasks, with_tools=False))
    assert (result["accuracy/gsm8k"], result["accuracy/trivia"], result["num_tasks/gsm8k"]) == (0.5, 1.0, 2)
    assert (result["tool_gain/gsm8k"], result["tool_gain/trivia"]) == (0.5, 0.0)
    assert (result["accuracy_low/gsm8k"], result["accuracy_high/gsm8k"]) == wilson_interval(1, 2)
    assert not [name for name in eval_result(greedy([1, 0, 1, 0])) if "/" in name]
