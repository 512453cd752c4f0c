from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from toolrl_ray.bootstrap.build import demonstrations_of
from toolrl_ray.config import RunConfig
from toolrl_ray.config_task import TaskConfig, TaskPart
from toolrl_ray.errors import ConfigError
from toolrl_ray.tasks.mixed import shares
from toolrl_ray.tasks.module import load_tasks, task_module
from toolrl_ray.types import EpisodeRequest, Segment, SegmentKind, StopReason, Task, Trajectory

COLOURS = """
from toolrl_ray.types import Task

def load_tasks(config):
    make = lambda split, count: [Task(f"{split}/{i}", f"colour {i}", "red", "colours") for i in range(count)]
    return make("train", min(config.num_train, 30)), make("heldout", config.num_heldout)

def render_prompt(task, few_shot):
    return f"{few_shot} {task.prompt}"

def reward(trajectory):
    return float("red" in trajectory.final_text)
"""


@pytest.fixture
def colours(tmp_path: Path) -> str:
    (tmp_path / "colours.py").write_text(COLOURS)
    return str(tmp_path / "colours.py")


def mixed(colours: str, **more: object) -> TaskConfig:
    parts = {"sums": {"weight": 3}, "colours": {"module": colours, "few_shot": 2}}
    return TaskConfig(num_train=40, num_heldout=8, parts=parts, **more)


def finished(task: Task, text: str) -> Trajectory:
    request = EpisodeRequest("1", "1", task)
    segments = [Segment(SegmentKind.POLICY, 0, 1, text)]
    return Trajectory(request, [1], [True], [0.0], [0], segments, [], StopReason.SUBMITTED, 1, 0.1)


def test_tasks_come_by_weight_and_bear_the_name_of_their_part(colours: str) -> None:
    train, heldout = load_tasks(mixed(colours))
    assert Counter(task.source for task in train) == {"sums": 30, "colours": 10}
    assert Counter(task.source for task in heldout) == {"sums": 6, "colours": 2}
    assert {task.id.split("/")[0] for task in train} == {"sums", "colours"}


def test_whatever_number_of_held_out_tasks_comes_first_holds_every_part_in_its_share(colours: str) -> None:
    config = mixed(colours).model_copy(update={"num_heldout": 80})
    heldout = load_tasks(config)[1]
    for count in range(1, 81):
        assert abs(sum(task.source == "colours" for task in heldout[:count]) - count / 4) <= 1
    assert load_tasks(config)[1] == heldout


def test_prompt_and_reward_are_the_parts_own(colours: str) -> None:
    config = mixed(colours)
    module = task_module(config)
    by_name = {task.source: task for task in module.load_tasks(config)[0]}
    assert module.render_prompt(by_name["colours"], 0) == f"2 {by_name['colours'].prompt}"
    assert module.render_prompt(by_name["sums"], 0).startswith("What is ")
    assert module.reward(finished(by_name["colours"], "red")) == 1.0
    assert module.reward(finished(by_name["sums"], "red")) == 0.0
    assert module.reward(finished(by_name["sums"], f"Result={by_name['sums'].answer}<submit>")) == 1.0


OWN = """
from toolrl_ray.types import Task

SQUARES = {f"n{i}": str(i * i) for i in range(100)}

def load_tasks(config):
    tasks = [Task(id, id, "", "squares", aliases=("a",)) for id in SQUARES]
    return tasks[: config.num_train], tasks[50 : 50 + config.num_heldout]

def render_prompt(task, few_shot):
    return f"{task.source}: {task.id}"

def reward(trajectory):
    assert trajectory.request.task.source == "squares"
    return float(SQUARES[trajectory.request.task.id] in trajectory.final_text)
"""


def test_a_part_sees_its_tasks_as_its_module_made_them(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    config = TaskConfig(num_train=6, num_heldout=6, parts={"own": {"module": str(tmp_path / "own.py")}, "sums": {}})
    task = next(task for task in load_tasks(config)[0] if task.source == "own")
    assert (task.id, task.prompt, task.aliases) == ("own/n0", "n0", ("a",))
    task = pickle.loads(pickle.dumps(task))  # as it gets to the process that runs its episode, whose module has loaded none
    module = task_module(config)
    assert module.render_prompt(task, 0) == "squares: n0"
    trajectory = finished(task, "0")
    assert (module.reward(trajectory), module.reward(finished(task, "7"))) == (1.0, 0.0)
    assert trajectory.request.task is task, "in results it has the part's name"
    assert asdict(task) == {"id": "own/n0", "prompt": "n0", "answer": "", "source": "own", "aliases": ("a",)}


def test_a_part_with_fewer_tasks_than_its_share_is_named(colours: str) -> None:
    config = mixed(colours).model_copy(update={"num_train": 400})
    with pytest.raises(ConfigError, match=r"task.parts.colours has 30 tasks, and its share of task.num_train=400 is 100"):
        load_tasks(config)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"source": "gsm8k", "parts": {"a": {}}}, "task.source='gsm8k' contradicts task.parts"),
        ({"parts": {"a": {"num_train": 3}}}, "task.parts.a.num_train=3 contradicts task.num_train"),
        ({"parts": {"a": {"weight": 0}}}, "greater than 0"),
        ({"parts": {"a": {"weight": float("inf")}}}, "should be a finite number"),
        ({"parts": {"a": {"weight": 1e308}}}, "less than or equal to 1"),
        ({"seed": 5, "parts": {"a": {}}}, "task.seed=5 contradicts task.parts: set it in a part"),
    ],
)
def test_what_contradicts_parts_is_refused(tree: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TaskConfig(**tree)


def test_a_saved_configuration_with_parts_loads_again(colours: str) -> None:
    config = mixed(colours)
    assert TaskConfig(**config.model_dump(mode="json")) == config


@given(
    total=st.integers(3, 500),
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=3),
)
def test_shares_sum_up_and_are_near_the_weights(total: int, weights: list[float]) -> None:
    counts = shares(total, {str(i): TaskPart(weight=weight) for i, weight in enumerate(weights)})
    assert sum(counts.values()) == total
    assert min(counts.values()) >= 1
    for i, weight in enumerate(weights):
        exact = total * weight / sum(weights)
        assert abs(counts[str(i)] - exact) < len(weights) + 1


def test_hand_computed_shares_and_too_many_parts() -> None:
    parts = {"a": TaskPart(weight=1), "b": TaskPart(weight=1), "c": TaskPart(weight=1)}
    assert sorted(shares(10, parts).values()) == [3, 3, 4]
    assert shares(100, {"a": TaskPart(weight=3), "b": TaskPart(weight=1)}) == {"a": 75, "b": 25}
    with pytest.raises(ConfigError, match="2 tasks cannot be shared by 3 parts"):
        shares(2, parts)


def test_the_warm_start_of_a_mixture_shows_every_part_by_weight_and_no_held_out_task(colours: str) -> None:
    parts = {"sums": {}, "more": {"weight": 2, "seed": 1}}
    config = RunConfig(recipe="mixed", task={"num_train": 8, "num_heldout": 4, "parts": parts}, eval={"num_tasks": 4})
    shown = demonstrations_of(config)
    heldout = load_tasks(config.task)[1]
    keys = frozenset(map(shown.key, heldout))
    assert all(key.startswith(f"{task.source}/") for key, task in zip(map(shown.key, heldout), heldout, strict=True))
    rows = shown.Demonstrations(0, 0.4, 0, keys)
    again = shown.Demonstrations(0, 0.4, 0, keys)
    texts = ["".join(part.text for part in rows.exercise()) for _ in range(200)]
    assert texts == ["".join(part.text for part in again.exercise()) for _ in range(200)]
    asked = {text.removeprefix("What is ").partition("?")[0] for text in texts}
    assert not asked & {task.prompt for task in heldout}
