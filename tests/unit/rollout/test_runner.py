"""What an EpisodeRequest asks for: its own temperature, and no tools. And what a deadline is a failure of."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.episode.script import REQUEST, FakeTool, Script, said
from tests.unit.episode.vocabularies import codec
from toolrl_ray import recipe
from toolrl_ray.episode.call_format import TextMarkers
from toolrl_ray.episode.shown import SHOWN
from toolrl_ray.errors import ConfigError, RolloutError
from toolrl_ray.rollout.runner import EpisodeRunner
from toolrl_ray.types import Completion, SamplingParams, Trajectory
from tools_service.protocol import ToolStatus

TINY = codec("tiny")


def run(tool: FakeTool, **asked) -> tuple[Trajectory, list[float]]:
    """An episode that calls the tool and submits 10.1; the temperatures of its turns."""
    script = Script(said(TINY, "<request><SimpleCalculatorTool>13.1-3<call>"), said(TINY, "Result=10.1<submit>"))
    runner = EpisodeRunner(recipe.load("calculator", ["rollout.temperature=0.75"]), script, tool, TINY, TextMarkers())
    trajectory = asyncio.run(runner.run(replace(REQUEST, **asked)))
    return trajectory, [params.temperature for params in script.params]


@pytest.mark.parametrize(("own", "used"), [(None, 0.75), (0.0, 0.0), (0.5, 0.5)])
def test_a_requests_own_temperature_goes_before_that_of_the_run(own: float | None, used: float) -> None:
    _, temperatures = run(FakeTool(), temperature=own)
    assert temperatures == [used, used]


def test_without_tools_no_call_is_executed_and_the_policy_is_shown_that_there_is_none() -> None:
    tool = FakeTool()
    trajectory, _ = run(tool, with_tools=False)
    assert tool.calls == []
    assert [call.status for call in trajectory.tool_calls] == [ToolStatus.UNAVAILABLE]
    assert SHOWN[ToolStatus.UNAVAILABLE] in trajectory.segments[2].text
    assert (trajectory.num_turns, trajectory.reward, trajectory.used_tool) == (2, 1.0, False)


def test_with_tools_the_call_is_executed() -> None:
    tool = FakeTool()
    trajectory, _ = run(tool)
    assert [call.argument for call in tool.calls] == ["13.1-3"]
    assert trajectory.used_tool


MODULE = "from toolrl_ray.tasks.calculator import load_tasks, render_prompt\nimport numpy, torch\ndef scored(trajectory): return {}\n"


def rewarded(tmp_path: Path, value: str, parts: bool = False) -> float | None:
    (tmp_path / "mine.py").write_text(MODULE.format(value))
    module = f"{{module: {tmp_path / 'mine.py'}, reward: scored}}"
    own = f"task.parts={{own: {module}}}" if parts else f"task={module}"
    config = recipe.load("calculator", [own, "task.num_train=1000", "task.num_heldout=500"])
    runner = EpisodeRunner(config, Script(said(TINY, "Result=1<submit>")), FakeTool(), TINY, TextMarkers())
    task = replace(REQUEST.task, id="own/t0", source="own") if parts else REQUEST.task
    return asyncio.run(runner.run(replace(REQUEST, task=task))).reward


@pytest.mark.parametrize("value", ["0.5", "True", "2", "numpy.float32(0.5)", "torch.tensor(0.5)"])
def test_a_reward_is_any_finite_number(tmp_path: Path, value: str) -> None:
    reward = rewarded(tmp_path, value)
    assert type(reward) is float and reward == float(eval(value, {"numpy": np, "torch": torch}))


@pytest.mark.parametrize("value", ["float('nan')", "-float('inf')", "None", "'1.0'", "[1.0]", "1j", "10**400", "torch.ones(2)"])
def test_what_is_no_finite_number_is_refused_with_the_task_and_the_function_that_gave_it(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"^task.module='.*mine.py': scored returned .* for task 'test/0'; it must return a finite"):
        rewarded(tmp_path, value)
    with pytest.raises(ConfigError, match=r"^task.parts.own.module='.*mine.py': scored returned .* for task 'own/t0'; it must"):
        rewarded(tmp_path, value, parts=True)


def test_episodes_go_on_while_a_persons_reward_takes_its_time_and_one_that_never_ends_is_named(tmp_path: Path) -> None:
    waits = "from toolrl_ray.tasks.calculator import load_tasks, render_prompt\nimport threading\nboth = threading.Barrier(2)\n"
    (tmp_path / "judge.py").write_text(waits + "def reward(trajectory): return float(both.wait(60) >= 0)\n")
    config = recipe.load("calculator", [f"task.module={tmp_path / 'judge.py'}", "episode.episode_deadline_s=30"])

    async def run(config, count: int) -> list[Trajectory]:
        runners = [EpisodeRunner(config, Script(said(TINY, "Result=1<submit>")), FakeTool(), TINY, TextMarkers()) for _ in range(count)]
        return await asyncio.gather(*(runner.run(REQUEST) for runner in runners))

    assert [trajectory.reward for trajectory in asyncio.run(run(config, 2))] == [1.0, 1.0]  # each waits for the other
    hasty = config.model_copy(update={"episode": config.episode.model_copy(update={"episode_deadline_s": 0.05})})
    (tmp_path / "judge.py").write_text(waits.replace("2)", "2, timeout=1)") + "def reward(trajectory): return both.wait()\n")
    with pytest.raises(ConfigError, match=r"^task.module='.*judge.py': reward took longer than episode.episode_deadline_s=0.05 for task "):
        asyncio.run(run(hasty, 1))


@pytest.mark.parametrize("deadline", ["turn", "episode"])
def test_an_episode_whose_engine_hangs_is_no_failure_of_the_policy(deadline: str) -> None:
    async def generate(token_ids: list[int], params: SamplingParams) -> Completion:
        await asyncio.sleep(60)
        raise AssertionError

    async def lives() -> None: ...

    async def hangs() -> None:
        raise RolloutError("it does not answer")

    config = recipe.load("calculator", [f"episode.{deadline}_deadline_s=0.05"])
    runners = [EpisodeRunner(config, generate, FakeTool(), TINY, TextMarkers(), check) for check in (lives, hangs)]
    assert asyncio.run(runners[0].run(REQUEST)).stop_reason == f"{deadline}_deadline"
    with pytest.raises(RolloutError, match="it does not answer"):
        asyncio.run(runners[1].run(REQUEST))
