from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolrl_ray.config import TaskConfig
from toolrl_ray.errors import ConfigError, MissingDependency
from toolrl_ray.tasks import calculator
from toolrl_ray.tasks.calculator import load_tasks, render_prompt, reward
from toolrl_ray.tasks.expressions import normalise
from toolrl_ray.types import EpisodeRequest, Segment, SegmentKind, StopReason, Task, Trajectory
from tools_service.calculator import calculate


def trajectory(answer: str, *segments: tuple[SegmentKind, str], stop_reason: StopReason = StopReason.SUBMITTED) -> Trajectory:
    task = Task("t/0", "1+1", answer, "t")
    made = [Segment(kind, 0, 0, text) for kind, text in segments]
    return Trajectory(EpisodeRequest("0", "0", task), [], [], [], [], made, [], stop_reason, 1, 0.0)


def policy_said(text: str, answer: str) -> float:
    return reward(trajectory(answer, (SegmentKind.POLICY, text)))


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("\n\nResult=10.1<submit>", "10.1", 1.0),
        ("Result=10.105<submit>", "10.1", 1.0),
        ("Result=10.12<submit>", "10.1", 0.0),
        ("Result=-7.9<submit>", "-7.9", 1.0),
        ("Result=7.9<submit>", "-7.9", 0.0),
        ("Result=+24<submit>", "24", 1.0),
        ("Result=1,234,567.5<submit>", "1234567.5", 1.0),
        ("Result=1,23<submit>", "123", 0.0),
        ("Result=.5<submit>", "0.5", 1.0),
        ("Result=5.<submit>", "5", 1.0),
        ("Result=1.2e3<submit>", "1200", 1.0),
        ("Result=12.00<submit>", "12", 1.0),
        ("Result=nan<submit>", "12", 0.0),
        ("Result=inf<submit>", "12", 0.0),
        ("Result=1e999<submit>", "12", 0.0),
        ("Result=<submit>", "0", 0.0),
        ("Result=-<submit>", "0", 0.0),
        ("Result=12 apples<submit>", "12", 0.0),
        ("Result=12 Result=13<submit>", "12", 0.0),
        ("Result=13 Result=12<submit>", "12", 1.0),
        ("12<submit>", "12", 0.0),
    ],
)
def test_a_reward_needs_the_right_number_directly_before_the_submit_marker(text: str, answer: str, expected: float) -> None:
    assert policy_said(text, answer) == expected


@pytest.mark.parametrize("stop_reason", [r for r in StopReason if r is not StopReason.SUBMITTED])
def test_an_episode_that_was_not_submitted_earns_nothing(stop_reason: StopReason) -> None:
    assert reward(trajectory("12", (SegmentKind.POLICY, "Result=12<submit>"), stop_reason=stop_reason)) == 0.0


def test_what_a_tool_or_an_earlier_turn_wrote_earns_nothing() -> None:
    assert reward(trajectory("12", (SegmentKind.POLICY, "<request>"), (SegmentKind.OBSERVATION, "Result=12<submit>"))) == 0.0
    assert reward(trajectory("12", (SegmentKind.POLICY, "Result=12<submit>"), (SegmentKind.POLICY, "<submit>"))) == 0.0
    assert reward(trajectory("12", (SegmentKind.PROMPT, "Result=12<submit>"))) == 0.0


@settings(deadline=None)
@given(st.decimals(min_value=-(10**9), max_value=10**9, places=3), st.booleans())
def test_a_number_is_read_with_and_without_thousands_commas(number, commas: bool) -> None:
    text = f"{number:,f}" if commas else f"{number:f}"
    assert policy_said(f"Result={text}<submit>", f"{number:f}") == 1.0


@settings(deadline=None)
@given(st.text(max_size=30))
def test_no_text_whatever_breaks_the_reward(text: str) -> None:
    assert policy_said(f"Result={text}<submit>", "0.123456") in (0.0, 1.0)


def test_the_prompt_is_that_of_the_original() -> None:
    task = Task("t/0", "5*7", "35", "t")
    assert render_prompt(task, 0) == "What is 5*7?\n\n"
    assert render_prompt(task, 2) == (
        "What is 13.1-3?\n\n<request><SimpleCalculatorTool>13.1-3<call>10.1<response>\n\nResult=10.1<submit>\n\n"
        "What is 4*3?\n\n<request><SimpleCalculatorTool>4*3<call>12<response>\n\nResult=12<submit>\n\n"
        "What is 5*7?\n\n"
    )


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_generated_splits_share_no_expression_and_hold_no_duplicate(seed: int) -> None:
    train, heldout = load_tasks(TaskConfig(num_train=80, num_heldout=40, seed=seed))
    expressions = [normalise(task.prompt) for task in train + heldout]
    assert (len(train), len(heldout)) == (80, 40)
    assert len(set(expressions)) == len(expressions)
    assert len({task.id for task in train + heldout}) == 120
    assert all(task.answer == calculate(task.prompt) for task in train + heldout)


def test_generated_tasks_depend_on_the_seed_alone() -> None:
    config = TaskConfig(num_train=50, num_heldout=20)
    assert load_tasks(config) == load_tasks(config)
    assert load_tasks(config.model_copy(update={"num_train": 60}))[1] == load_tasks(config)[1], "more training tasks hold out the same ones"
    assert load_tasks(config.model_copy(update={"num_heldout": 30}))[1][:20] == load_tasks(config)[1], "a larger held-out set begins alike"
    assert load_tasks(config.model_copy(update={"seed": 1})) != load_tasks(config)


def expressions(tasks: list[Task]) -> set[str]:
    return {normalise(task.prompt) for task in tasks}


@settings(deadline=None, max_examples=30)
@given(st.tuples(*[st.integers(0, 10**6)] * 2), st.tuples(*[st.integers(1, 300)] * 4))
def test_no_held_out_set_of_any_size_and_seed_meets_any_training_set(seeds: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    one, other = (TaskConfig(num_train=sizes[2 * i], num_heldout=sizes[2 * i + 1], seed=seeds[i]) for i in range(2))
    assert not expressions(load_tasks(one)[0]) & expressions(load_tasks(other)[1])
    assert not expressions(load_tasks(other)[0]) & expressions(load_tasks(one)[1])


def test_a_larger_held_out_set_takes_nothing_of_what_the_default_run_trains_on() -> None:
    trained, few = load_tasks(TaskConfig())
    _, many = load_tasks(TaskConfig(num_heldout=2000))
    assert len(trained) == 4096 and len(expressions(many)) == 2000
    assert not expressions(trained) & expressions(many)
    assert many[:500] == few


def test_spaces_and_thousands_commas_do_not_move_an_expression_to_the_other_split() -> None:
    train, heldout = load_tasks(TaskConfig(num_train=50, num_heldout=50))
    for task in train + heldout:
        assert calculator.held_out(task.prompt) == calculator.held_out(" ".join(task.prompt)) == (task in heldout)


def test_asking_for_more_tasks_than_exist_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calculator, "generated_expression", lambda rng: f"{rng.randint(1, 3)}+1")
    with pytest.raises(ConfigError, match=r"task.num_train=10 and task.num_heldout=5 ask for more .* \([0-3] and [0-3]\); ask for fewer"):
        load_tasks(TaskConfig(num_train=10, num_heldout=5))


def annotations(tmp_path: Path, *lines: str) -> TaskConfig:
    path = tmp_path / "calculator.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return TaskConfig(source="gsm8k", path=str(path), num_heldout=1)


def line(expr: str, result: str, split: str) -> str:
    return json.dumps({"expr": expr, "result": result, "split": split})


def test_a_test_expression_that_training_has_is_not_held_out(tmp_path: Path) -> None:
    config = annotations(
        tmp_path,
        line("48/2", "24", "train"),
        line("48 / 2", "24", "train"),
        line("48 /2", "24", "test"),
        line("1,000*2", "2000", "test"),
        line("1000*2", "2000", "test"),
        line("2+2", "5", "test"),
    )
    train, heldout = load_tasks(config)
    assert [task.prompt for task in train] == ["48/2"]
    assert [(task.prompt, task.answer) for task in heldout] == [("1,000*2", "2000")]


@pytest.mark.parametrize("bad", ["not json", '["a list"]', '{"expr": "1+1", "split": "train"}', line("1+1", "2", "dev")])
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, bad: str) -> None:
    config = annotations(tmp_path, line("1+1", "2", "train"), bad)
    with pytest.raises(ConfigError, match=r"calculator.jsonl:2: .*expr.*result.*split"):
        load_tasks(config)


def test_a_file_that_is_missing_or_not_text_is_one_line(tmp_path: Path) -> None:
    config = annotations(tmp_path, line("1+1", "2", "train"))
    with pytest.raises(ConfigError, match=r"nowhere.jsonl.*cannot be read"):
        load_tasks(config.model_copy(update={"path": str(tmp_path / "nowhere.jsonl")}))
    Path(config.path).write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"calculator.jsonl.*not UTF-8"):
        load_tasks(config)


def test_too_few_held_out_expressions_is_one_line(tmp_path: Path) -> None:
    config = annotations(tmp_path, line("1+1", "2", "train"), line("1+2", "3", "test")).model_copy(update={"num_heldout": 2})
    with pytest.raises(ConfigError, match=r"task.num_heldout=2, but .* has 1 held-out"):
        load_tasks(config)


def test_the_hub_source_reads_annotations_out_of_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"train": [{"answer": "She has 48/2=<<48/2=24>>24 and <<3*4=12>>12."}], "test": [{"answer": "<<5-1=4>>4\n#### 4"}]}
    monkeypatch.setitem(sys.modules, "datasets", type("datasets", (), {"load_dataset": staticmethod(lambda *names: rows)}))
    train, heldout = load_tasks(TaskConfig(source="gsm8k", num_heldout=1))
    assert {(task.prompt, task.answer) for task in train} == {("48/2", "24"), ("3*4", "12")}
    assert [(task.prompt, task.answer) for task in heldout] == [("5-1", "4")]


def test_without_the_hub_library_the_install_line_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependency, match=r"pip install 'toolrl-ray\[hub\]'"):
        load_tasks(TaskConfig(source="gsm8k"))


def test_gsm8k_splits_share_no_expression_and_every_answer_can_be_reached(gsm8k_calculator: Path) -> None:
    config = TaskConfig(source="gsm8k", path=str(gsm8k_calculator), num_train=100_000, num_heldout=500)
    train, heldout = load_tasks(config)
    assert len(train) > 10_000 and len(heldout) == 500
    assert not {normalise(task.prompt) for task in train} & {normalise(task.prompt) for task in heldout}
    assert len({normalise(task.prompt) for task in train}) == len(train)
    unreachable = [t.prompt for t in train + heldout if policy_said(f"Result={calculate(t.prompt)}<submit>", t.answer) != 1.0]
    assert unreachable == []
    assert load_tasks(config) == (train, heldout)


@pytest.mark.parametrize(("expression", "result"), [("108/200", "54%"), (".95*.3", "57/200")])
def test_the_answer_of_every_annotation_is_a_number_that_the_reward_reads(tmp_path: Path, expression: str, result: str) -> None:
    _, [task] = load_tasks(annotations(tmp_path, line("1+1", "2", "train"), line(expression, result, "test")))
    assert policy_said(f"Result={calculate(expression)}<submit>", task.answer) == 1.0


def test_a_source_of_another_task_is_refused() -> None:
    with pytest.raises(ConfigError, match="sources: generated, gsm8k"):
        load_tasks(TaskConfig(source="triviaqa"))
