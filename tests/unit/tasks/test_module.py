from __future__ import annotations

from pathlib import Path

import pytest

from toolrl_ray.config import TaskConfig
from toolrl_ray.errors import ConfigError
from toolrl_ray.tasks.module import load_tasks, task_module
from toolrl_ray.types import Task

HEAD = "from toolrl_ray.types import Task\nONE, TWO = Task('1', 'q', 'a', 's'), Task('2', 'q', 'a', 's')\n"
REST = "def render_prompt(task, few_shot): return ''\ndef reward(trajectory): return 0.0\n"


def module(tmp_path: Path, returned: str) -> TaskConfig:
    path = tmp_path / "my_task.py"
    path.write_text(f"{HEAD}def load_tasks(config): return {returned}\n{REST}")
    return TaskConfig(module=str(path))


def test_the_tasks_of_a_persons_own_module_are_taken_as_they_are(tmp_path: Path) -> None:
    train, heldout = load_tasks(module(tmp_path, "[ONE, TWO], [ONE]"))
    assert [task.id for task in train] == ["1", "2"] and [task.id for task in heldout] == ["1"]


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("[], [ONE]", "no training task"),
        ("[ONE], []", "no held-out task"),
        ("None", "two lists, training and held-out tasks, not None"),
        ("[ONE]", "two lists"),
        ("[ONE], None", "two lists"),
        ("[ONE], ['What is 1+1?']", "'What is 1\\+1\\?' among the held-out tasks"),
        ("[ONE, ONE], [TWO]", "two training tasks of one id"),
    ],
)
def test_tasks_that_cannot_be_trained_on_are_one_line(tmp_path: Path, returned: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"my_task.py': load_tasks .*{expected}") as raised:
        load_tasks(module(tmp_path, returned))
    assert "\n" not in str(raised.value)


def test_a_module_that_cannot_be_executed_or_lacks_a_function_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("x = 1\nimport nothing_of_this_name\n")
    with pytest.raises(ConfigError, match=r"task.module='.*broken.py': .*broken.py, line 2: ModuleNotFoundError"):
        task_module(TaskConfig(module=str(path)))
    with pytest.raises(ConfigError, match="task.module='json' lacks load_tasks, render_prompt, reward$"):
        task_module(TaskConfig(module="json"))


def test_a_mistake_in_a_persons_function_is_told_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def load_tasks(config):\n    return {}['oops']\ndef render_prompt(task, few_shot):\n    return 1 / 0\n"
        "def reward(trajectory):\n    return int(\n        'x y')\ndef leave(trajectory):\n    raise SystemExit(3)\n"
    )
    config = TaskConfig(module=str(path))
    mine = task_module(config)
    for call, told in (
        (lambda: load_tasks(config), "load_tasks failed: .*mine.py, line 2: KeyError: 'oops'$"),
        (lambda: mine.render_prompt(None, 0), "render_prompt failed: .*mine.py, line 4: ZeroDivisionError: division by zero$"),
        (lambda: mine.reward(None), "reward failed: .*mine.py, line 6: ValueError: invalid literal"),
        (lambda: task_module(config.model_copy(update={"reward": "leave"})).reward(None), "leave failed: .*line 9: SystemExit: 3$"),
    ):
        with pytest.raises(ConfigError, match=told):
            call()


@pytest.mark.parametrize("value", ["None", "b'What?'", "''", "7"])
def test_a_prompt_that_is_no_text_is_refused_by_task_and_value(tmp_path: Path, value: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"def load_tasks(config): ...\ndef render_prompt(task, few_shot): return {value}\ndef reward(trajectory): ...\n")
    with pytest.raises(ConfigError) as raised:
        task_module(TaskConfig(module=str(path))).render_prompt(Task("s/1", "", "", "s"), 0)
    assert str(raised.value).endswith(f"mine.py': render_prompt returned {value} for task 's/1'; it must return a text")


def test_task_reward_names_the_function_that_scores(tmp_path: Path) -> None:
    config = module(tmp_path, "[ONE], [TWO]")
    with Path(config.module).open("a") as file:
        file.write("def half(trajectory): return 0.5\n")
    assert task_module(config).reward(None) == 0.0
    assert task_module(config.model_copy(update={"reward": "half"})).reward(None) == 0.5
    with pytest.raises(ConfigError, match="my_task.py' lacks quarter$"):
        task_module(config.model_copy(update={"reward": "quarter"}))


@pytest.mark.parametrize("path", ["q.jsonl", "q.jsonl.xz", "q.json", "gsm8k", "./gsm8k", "~/q.json"])
def test_data_is_named_absolutely_however_it_is_written(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TaskConfig(source="gsm8k", path=path).path == str(tmp_path / path.removeprefix("~/").removeprefix("./"))


@pytest.mark.parametrize(("module", "is_file"), [("my_task.py", True), ("tasks/my_task.py", True), ("my.pyramids", False), ("json", False)])
def test_a_module_in_a_file_is_named_absolutely_and_one_by_name_is_not(module: str, is_file: bool) -> None:
    assert TaskConfig(module=module).module == (str(Path(module).absolute()) if is_file else module)
