"""The README's examples run as they are written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from toolrl_ray import cli
from toolrl_ray.bootstrap.build import ensure_tiny_policy
from toolrl_ray.recipe import load
from toolrl_ray.tracking.trajectories import load_trajectories

pytestmark = pytest.mark.java  # one example searches

README = (Path(__file__).parents[2] / "README.md").read_text()
SMALL = "train.num_steps=1 train.tasks_per_step=4 task.num_train=8 task.num_heldout=4 eval.num_tasks=4 bootstrap.num_steps=2".split()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def command(containing: str) -> list[str]:
    [line] = [line for block in blocks("bash") for line in block.splitlines() if containing in line]
    return shlex.split(line)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOOLRL_CACHE", str(tmp_path / "cache"))
    for block in blocks("python"):
        assert len(block.splitlines()) < 20
        (tmp_path / re.match(r"# (\w+\.py)", block)[1]).write_text(block)


def run(arguments: list[str]) -> list:
    assert arguments[:2] == ["toolrl", "train"]
    assert cli.main([*arguments[1:], "--in-process", "run_dir=run", *SMALL]) == 0
    return [trajectory for _, trajectory in load_trajectories(Path("run/trajectories.jsonl"))]


def test_a_model_of_ones_own(tmp_path):
    policy = ensure_tiny_policy(load("calculator", SMALL), print)
    (tmp_path / "my-model").symlink_to(policy)
    arguments = [a for a in command("policy.path=my-model") if not a.startswith("episode.max_context_tokens")]  # this model is short
    trajectories = run(arguments)
    assert trajectories[0].segments[0].text.count("What is") == 3  # two worked examples and the question


def test_a_task_of_ones_own():
    trajectories = run(command("task.module=my_task.py"))
    assert {t.request.task.source for t in trajectories} == {"squares"}
    assert trajectories[0].segments[0].text.endswith(" squared?\n\n")


def test_a_tool_of_ones_own(tmp_path):
    from toolrl_ray.tools.local import tool_factories

    [example] = [block for block in blocks("python") if "my_tool.py" in block]
    assert len(example.splitlines()) < 15
    assert len(run(command("Weekday: my_tool.py:weekday"))) == 4
    tools = load("calculator", command("Weekday: my_tool.py:weekday")[3:]).tools
    assert tool_factories(tools)["Weekday"]()("2026-01-31") == "Saturday"


def test_a_script_from_trl(tmp_path, monkeypatch, capsys):
    policy = ensure_tiny_policy(load("calculator", SMALL), print)
    script = (tmp_path / "from_trl.py").read_text()
    assert script.count("range(20)") == 1
    monkeypatch.setattr("sys.argv", ["from_trl.py", str(policy)])
    capsys.readouterr()
    exec(compile(script.replace("range(20)", "range(1)"), "from_trl.py", "exec"), {"__name__": "__main__"})
    rewards, shown = capsys.readouterr().out.split("\n", 1)
    assert 0.0 <= float(rewards) <= 1.0
    assert "What is 1+11?" in shown


def test_a_recipe_with_search_over_an_index_of_ones_own(tmp_path):
    rows = ['{"id": "1", "title": "Mercury", "text": "Mercury is the planet nearest to the sun."}\n']
    (tmp_path / "corpus.jsonl").write_text("".join(rows))
    build, train = command("toolrl index build corpus"), command("Wiki: {index: my-index}")
    assert cli.main(build[1:]) == 0
    assert len(run(train)) == 4


def test_every_file_of_the_tree_exists():
    [tree] = re.findall(r"## The tree\n\n```\n(.*?)```", README, flags=re.DOTALL)
    root, folder = Path(__file__).parents[2], Path()
    for line in tree.splitlines():
        names = [name for name in re.split(r"  +", line.strip())[0].split() if "." in name or name.endswith("/")]
        if not line.startswith(" "):
            folder = root / names[0]
            assert folder.is_dir(), names[0]
            continue
        for name in names:
            assert (folder / name).exists(), f"{folder.name}/{name}"
