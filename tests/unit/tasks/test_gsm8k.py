from __future__ import annotations

import contextlib
import io
import json
import random
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import data_file
from toolrl_ray.bootstrap import gsm8k as bootstrap
from toolrl_ray.bootstrap.tokenizer import make_tokenizer
from toolrl_ray.config import TaskConfig
from toolrl_ray.errors import ConfigError
from toolrl_ray.tasks import calculator, gsm8k, triviaqa, word_problems
from toolrl_ray.tasks.gsm8k import amount, load_tasks
from toolrl_ray.types import EpisodeRequest, Segment, SegmentKind, StopReason, Task, Trajectory

GSM8K = data_file("gsm8k")
CONFIG = TaskConfig(module="toolrl_ray.tasks.gsm8k", num_train=400, num_heldout=60)


def finished(answer: str, text: str, reason: StopReason = StopReason.SUBMITTED) -> Trajectory:
    request = EpisodeRequest("1", "1", Task("1", "How many?", answer, "generated"))
    segments = [Segment(SegmentKind.POLICY, 0, 1, text)]
    return Trajectory(request, [1], [True], [0.0], [0], segments, [], reason, 1, 0.1)


def printed(program: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(program, {})
    return out.getvalue().strip()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,200", 1200.0),
        ("$18", 18.0),
        ("-$5", -5.0),
        ("18 dollars", 18.0),
        ("18 dollars.", 18.0),
        ("3.50€", 3.5),
        ("50%", 50.0),
        ("1/2", 0.5),
        ("3 / 4 cup", 0.75),
        (" 8\n", 8.0),
        ("8.", 8.0),
        ("−7", -7.0),
        ("$-5", -5.0),
        ("- $ 5", -5.0),
        ("-$-5", None),
        ("--5", None),
        ("₹500", 500.0),
        ("500 ₹", 500.0),
        ("5 thousand", 5e3),
        ("2 Million dollars", 2e6),
        ("$1.5 million", 1.5e6),
        ("3 billion.", 3e9),
        ("1/2 million", 5e5),
        ("5 thousandths", 5.0),
        ("5k", 5e3),
        ("$1.5K", 1.5e3),
        ("5k dollars", 5e3),
        ("5 k", 5.0),
        ("5 kg", 5.0),
        ("5kg", 5.0),
        ("5km/h", 5.0),
        ("5 m", 5.0),
        ("5m", 5.0),
        ("5 thousandſ", 5.0),
        ("5 mıllion", 5.0),
        ("5k2", None),
        ("5 million 2", None),
        ("1e3", 1e3),
        ("1.5e-3", 1.5e-3),
        ("2E+2 pages", 200.0),
        ("e3", None),
        (".e3", None),
        ("1e", 1.0),
        ("1e999", None),
        ("9" * 400, None),
        ("18/hour", 18.0),
        ("$18/hour", 18.0),
        ("18 dollars/hour", 18.0),
        ("18 / hour", 18.0),
        ("18/", None),
        ("18/hour/2", None),
        ("5 °C", 5.0),
        ("90°", 90.0),
        ("5 m²", 5.0),
        ("2½", None),
        ("3 ¼ cups", None),
        ("10³", None),
        ("–5", -5.0),
        ("1/0", None),
        ("1/" + "9" * 5000, 0.0),
        ("", None),
        ("-", None),
        (".", None),
        ("eight", None),
        ("1,20", None),
        ("3 and 4", None),
        ("3 apples 4 pears", None),
        ("nan", None),
    ],
)
def test_an_amount_is_read_as_people_write_it_and_two_numbers_are_none(text: str, value: float | None) -> None:
    assert amount(text) == value


@given(st.one_of(st.text(), st.from_regex(r"-?[$]?[0-9,./]+ ?[a-z%]*")))
def test_any_submitted_text_has_a_reward(text: str) -> None:
    assert gsm8k.reward(finished("8", f"Result={text}<submit>")) in (0.0, 1.0)


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "{} dollars", "{}%", "{}.00"]))
def test_every_whole_number_is_read_in_every_form(number: int, form: str) -> None:
    assert amount(form.format(number)) == number


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("\n\nResult=1,200<submit>", 1.0),
        ("Result=$1200 in all<submit>", 1.0),
        ("Result=3<submit> no: Result=1200<submit>", 1.0),
        ("Result=1201<submit>", 0.0),
        ("1200<submit>", 0.0),
        ("Result=1200", 1.0),  # a chat model submits without the marker
    ],
)
def test_reward_is_for_the_submitted_number(text: str, reward: float) -> None:
    assert gsm8k.reward(finished("1,200", text)) == reward


@pytest.mark.parametrize("module", [calculator, gsm8k, triviaqa])
@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>\nResult=7? No.\n</think>\n\nResult=8", 1.0),
        ("<think>\nResult=8? No.\n</think>\n\nResult=7", 0.0),
        ("<think>\nResult=8\n</think>\n\nI do not know.", 0.0),
        ("Result=8<submit>?\n</think>\n\nI do not know.", 0.0),
        ("<think>maybe Result=8<submit>", 0.0),  # it never ends
        ("<think>a</think>b<think>Result=8", 0.0),
    ],
)
def test_what_a_thought_says_earns_nothing(module: ModuleType, text: str, reward: float) -> None:
    assert module.reward(finished("8", text)) == reward


@pytest.mark.timeout(60)
@pytest.mark.parametrize("module", [calculator, gsm8k, triviaqa])
@pytest.mark.parametrize("text", ["Result=" + " " * 50_000 + "x", "Result=$" * 9_000 + "<", "Result=-" + " " * 20_000 + "$" + " " * 20_000])
def test_a_long_answer_is_read_at_once(module: ModuleType, text: str) -> None:
    """These took minutes to hours, in which the process that runs the episodes stood still."""
    assert module.reward(finished("8", text)) == 0.0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", ["8/" + " " * 50_000 + "1 2", "8" + " " * 50_000 + "million" * 9_000 + "2", "8e" + "1" * 50_000 + "k2"])
def test_a_long_amount_is_read_at_once(text: str) -> None:
    assert amount(text) is None


def test_what_was_not_submitted_earns_nothing() -> None:
    assert gsm8k.reward(finished("8", "Result=8<submit>", StopReason.MAX_TURNS)) == 0.0


def test_every_template_and_every_shot_computes_its_answer() -> None:
    rng = random.Random(0)
    for problem in [*(word_problems.word_problem(rng) for _ in range(400)), *gsm8k.SHOTS]:
        assert printed(problem.program) == problem.answer
        assert problem.program.startswith("def solution():\n") and problem.program.endswith("\nprint(solution())")


def test_generated_splits_share_no_problem_and_repeat_by_seed() -> None:
    train, heldout = load_tasks(CONFIG)
    assert (len(train), len(heldout)) == (400, 60)
    assert not {task.prompt for task in train} & {task.prompt for task in heldout}
    assert load_tasks(CONFIG)[0] == train
    assert load_tasks(CONFIG.model_copy(update={"seed": 1}))[0] != train
    bigger = load_tasks(CONFIG.model_copy(update={"num_train": 2000, "seed": 5}))[0]
    assert not {task.prompt for task in bigger} & {task.prompt for task in heldout}


def test_more_problems_than_there_are_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gsm8k, "word_problem", lambda rng: gsm8k.SHOTS[0])
    with pytest.raises(ConfigError, match=r"task.num_train=400 and task.num_heldout=60 ask for more different problems"):
        load_tasks(CONFIG)


def write_split(folder: Path, split: str, rows: list[dict]) -> None:
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_published_splits_are_kept_and_a_problem_of_both_is_trained_only(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "It is <<1+1=2>>2.\n#### 2"}
    write_split(tmp_path, "train", [row])
    write_split(tmp_path, "test", [row, {"question": "And now?", "answer": "#### 1,000"}])
    train, heldout = load_tasks(TaskConfig(source="gsm8k", path=str(tmp_path), num_heldout=1))
    assert [(task.prompt, task.answer) for task in train] == [("How many?", "2")]
    assert [(task.prompt, task.answer) for task in heldout] == [("And now?", "1,000")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "How many?"}], r"train.jsonl:1: not a JSON object with question, answer"),
        ([{"question": "How many?", "answer": "two"}], r"train.jsonl:1: the answer does not end in `#### NUMBER`"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(tmp_path: Path, rows: list[dict], message: str) -> None:
    write_split(tmp_path, "train", rows)
    with pytest.raises(ConfigError, match=message):
        load_tasks(TaskConfig(source="gsm8k", path=str(tmp_path), num_heldout=1))


def test_a_path_for_generated_problems_contradicts_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="contradicts task.source='generated', which reads no file; set task.source=gsm8k"):
        load_tasks(CONFIG.model_copy(update={"path": str(tmp_path)}))


def test_a_path_that_is_no_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder; give one that holds train.jsonl and test.jsonl"):
        load_tasks(TaskConfig(source="gsm8k", path=str(tmp_path / "none"), num_heldout=1))


@pytest.mark.skipif(GSM8K is None, reason="needs gsm8k/ in TOOLRL_DATA")
def test_all_of_gsm8k_loads_and_every_answer_is_a_number() -> None:
    train, heldout = load_tasks(TaskConfig(source="gsm8k", path=str(GSM8K), num_train=10_000, num_heldout=1300))
    assert (len(train), len(heldout)) == (7473, 1300)
    assert all(amount(task.answer) is not None for task in train + heldout)


def test_a_prompt_has_as_many_shots_as_asked_for() -> None:
    task = Task("1", "How many?", "2", "generated")
    assert gsm8k.render_prompt(task, 0) == "Q: How many?\n\n"
    text = gsm8k.render_prompt(task, 2)
    assert text.count("Q: ") == 3 and text.count("<submit>") == 2 and text.endswith("Q: How many?\n\n")


def test_the_warm_start_shows_no_held_out_problem_and_fits_the_tiny_context() -> None:
    tokenizer = make_tokenizer(256, bootstrap.PIECES)
    rows = bootstrap.Demonstrations(0, 0.4, 0, frozenset())
    used = 0
    for _ in range(300):
        for row in (rows.demonstration(), rows.exercise()):
            text = "".join(part.text for part in row)
            assert not gsm8k.held_out(text.removeprefix("Q: ").partition("\n\n")[0])
            ids = [i for part in row for i in tokenizer(part.text)["input_ids"]]
            assert tokenizer.decode(ids) == text and len(ids) < 120
        used += "<request>" in "".join(part.text for part in rows.demonstration())
    assert 0.3 < used / 300 < 0.5
