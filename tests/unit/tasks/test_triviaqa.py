from __future__ import annotations

import json
import lzma
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import data_file
from toolrl_ray.bootstrap import triviaqa as bootstrap
from toolrl_ray.bootstrap.tokenizer import make_tokenizer
from toolrl_ray.config import TaskConfig
from toolrl_ray.errors import ConfigError
from toolrl_ray.tasks import facts, triviaqa
from toolrl_ray.tasks.triviaqa import load_tasks, normalise
from toolrl_ray.types import EpisodeRequest, Segment, SegmentKind, StopReason, Task, Trajectory

QUESTIONS = data_file("wiki", "questions.jsonl.xz")
CONFIG = TaskConfig(module="toolrl_ray.tasks.triviaqa", num_train=400, num_heldout=60)


def finished(text: str, reason: StopReason = StopReason.SUBMITTED) -> Trajectory:
    task = Task("1", "Who wrote Hamlet?", "William Shakespeare", "triviaqa", ("The Bard", "Shakespeare"))
    segments = [Segment(SegmentKind.POLICY, 0, 1, text)]
    return Trajectory(EpisodeRequest("1", "1", task), [1], [True], [0.0], [0], segments, [], reason, 1, 0.1)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("\nResult=william   shakespeare<submit>", 1.0),
        ("\nResult=It was Shakespeare.<submit>", 1.0),
        ("\nResult=bard<submit>", 1.0),
        ("\nResult=Shakespearean<submit>", 0.0),
        ("Shakespeare\nResult=Marlowe<submit>", 0.0),
        ("Result=Shakespeare<submit> Result=Marlowe<submit>", 0.0),
        ("Result=<submit>", 0.0),
        ("Shakespeare<submit>", 0.0),
        ("Result=<b>Shakespeare</b> (> Marlowe)", 1.0),
        ("Result=Shakespeare Result=Marlowe", 0.0),
    ],
)
def test_an_alias_in_the_submitted_answer_counts_and_nothing_else(text: str, reward: float) -> None:
    assert triviaqa.reward(finished(text)) == reward


@pytest.mark.parametrize("answer", [">500 Da", "a<b", "x -> y"])
def test_an_answer_with_signs_of_the_syntax_can_be_given(answer: str) -> None:
    trajectory = finished(f"\nResult={answer}<submit>")
    assert triviaqa.reward(replace(trajectory, request=EpisodeRequest("1", "1", Task("1", "?", answer, "triviaqa")))) == 1.0


def test_the_first_words_are_those_behind_a_thought() -> None:
    assert triviaqa.first_20_words(finished("<think>\nShakespeare?\n</think>\n\nMarlowe")) == 0.0
    assert triviaqa.first_20_words(finished("<think>\n" + "word " * 20 + "\n</think>\n\nShakespeare")) == 1.0


def test_text_that_was_not_submitted_earns_nothing_by_either_measure() -> None:
    for measure in (triviaqa.reward, triviaqa.first_20_words):
        assert measure(finished("Result=Shakespeare<submit>", StopReason.EOS)) == 0.0


def test_what_the_tool_wrote_earns_nothing_by_either_measure() -> None:
    trajectory = finished("\nResult=Marlowe<submit>")
    trajectory.segments.insert(0, Segment(SegmentKind.OBSERVATION, 0, 1, "Result=Shakespeare<submit><response>"))
    trajectory.segments.insert(0, Segment(SegmentKind.POLICY, 0, 1, "A: Shakespeare\nA2: <request><Wiki>Hamlet<call>"))
    assert triviaqa.reward(trajectory) == triviaqa.first_20_words(trajectory) == 0.0


def test_the_first_words_measure_takes_twenty_words_without_the_form() -> None:
    assert triviaqa.first_20_words(finished("it was Shakespeare<submit>")) == 1.0
    assert triviaqa.first_20_words(finished("word " * 19 + "Shakespeare<submit>")) == 1.0
    assert triviaqa.first_20_words(finished("word " * 20 + "Shakespeare<submit>")) == 0.0


@pytest.mark.parametrize(
    ("text", "normal"),
    [("The  Beatles!", "beatles"), ("rock_'n'_roll", "rock n roll"), ("An A-Team", "team"), ("U.S.", "u s"), ("…", "…"), ("", "")],
)
def test_answers_are_compared_as_triviaqa_does(text: str, normal: str) -> None:
    assert normalise(text) == normal


@given(st.text())
def test_what_is_normal_stays_as_it_is(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_an_answer_that_normalises_to_nothing_is_never_found() -> None:
    assert triviaqa.answered("the", Task("1", "?", "The", "triviaqa")) == 0.0


def test_the_world_is_the_same_for_a_seed_and_every_answer_stands_in_its_passage() -> None:
    people = facts.world(3)
    assert people == facts.world(3) and people != facts.world(4)
    assert len({person.name for person in people}) == facts.NUM_PEOPLE
    for person in people:
        assert person.name in person.passage
        assert all(fact in person.passage for fact in person.facts.values())


def test_generated_splits_share_no_person() -> None:
    train, heldout = load_tasks(CONFIG)
    assert (len(train), len(heldout)) == (400, 60)
    people = [{task.id.split("/")[-1].partition("-")[0] for task in tasks} for tasks in (train, heldout)]
    assert not people[0] & people[1]
    assert load_tasks(CONFIG) == (train, heldout)


def test_more_questions_than_there_are_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"task.num_heldout=5000, but the generated world has \d+; set it lower"):
        load_tasks(CONFIG.model_copy(update={"num_heldout": 5000}))


def test_a_file_without_a_training_question_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [{"question": "Which band?", "answers": ["The The"], "split": "train"}])
    with pytest.raises(ConfigError, match=r"q.jsonl has no training question with an answer that can be found"):
        load_tasks(TaskConfig(source="triviaqa", path=str(path), num_heldout=1))


def test_a_source_of_another_task_is_refused() -> None:
    with pytest.raises(ConfigError, match="sources: generated, triviaqa"):
        load_tasks(CONFIG.model_copy(update={"source": "gsm8k"}))


def test_a_file_beside_generated_questions_is_refused() -> None:
    with pytest.raises(ConfigError, match="task.path='/q.jsonl' contradicts task.source='generated'"):
        load_tasks(CONFIG.model_copy(update={"path": "/q.jsonl"}))


def write(path: Path, rows: list[object]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(lzma.compress(text.encode()) if path.suffix == ".xz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["dev", "val", "valid", "Validation", "test"])
def test_rows_of_a_held_out_split_are_not_trained_on_however_it_is_called(tmp_path: Path, name: str) -> None:
    rows = [{"question": f"q{i}", "answers": ["x"], "split": name if i % 2 else "train"} for i in range(40)]
    train, heldout = load_tasks(TaskConfig(source="triviaqa", path=str(write(tmp_path / "q.jsonl", rows)), num_heldout=20))
    assert {task.prompt for task in heldout} == {f"q{i}" for i in range(1, 40, 2)} and len(train) == 20


@pytest.mark.parametrize("name", ["questions.jsonl", "questions.jsonl.xz"])
def test_a_file_keeps_its_splits_and_shares_out_rows_without_one(tmp_path: Path, name: str) -> None:
    rows = [{"question": f"q{i}", "answers": ["x", "b"], "split": "train" if i < 5 else "dev"} for i in range(10)]
    path = write(tmp_path / name, [*rows, {"question": "The q1?", "answers": ["x"], "split": "dev"}])
    train, heldout = load_tasks(TaskConfig(source="triviaqa", path=str(path), num_heldout=5))
    assert {task.prompt for task in train} == {f"q{i}" for i in range(5)}
    assert {task.prompt for task in heldout} == {f"q{i}" for i in range(5, 10)}
    assert train[0].aliases == ("b",)
    write(path, [{"question": f"question {i}", "answers": ["x"]} for i in range(400)])
    train, heldout = load_tasks(TaskConfig(source="triviaqa", path=str(path), num_heldout=20))
    assert 20 == len(heldout) and len(train) > 300


def test_a_question_without_an_answer_that_can_be_found_is_left_out_and_half_characters_are_replaced(tmp_path: Path) -> None:
    answers = {"Which band?": ["The The"], "Which letter?": ["A", ""], "Which \ud800?": ["The", "Who"]}
    rows = [{"question": question, "answers": given, "split": "train"} for question, given in answers.items()]
    path = write(tmp_path / "q.jsonl", [*rows, {"question": "q", "answers": ["a1"], "split": "dev"}])
    train, _ = load_tasks(TaskConfig(source="triviaqa", path=str(path), num_heldout=1))
    assert [(task.prompt, task.aliases) for task in train] == [("Which \ufffd?", ("Who",))]


@pytest.mark.parametrize(
    ("text", "message"), [("", "q.jsonl' is empty; give a"), ("\n", "is empty"), ("[" * 100_000, r":1: not a JSON object")]
)
def test_a_file_without_rows_and_one_nested_too_deeply_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_tasks(TaskConfig(source="triviaqa", path=str(tmp_path / "q.jsonl"), num_heldout=1))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, r":1: not a JSON object with question and answers"),
        ({"question": "q", "answers": []}, r":1: not a JSON object with question and answers"),
        ([1], r":1: not a JSON object with question and answers"),
    ],
)
def test_a_wrong_row_is_named_by_line(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_tasks(TaskConfig(source="triviaqa", path=str(write(tmp_path / "q.jsonl", [row])), num_heldout=1))


def test_a_file_that_is_no_xz_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "q.xz").write_text("plain")
    with pytest.raises(ConfigError, match="is not an .xz file"):
        load_tasks(TaskConfig(source="triviaqa", path=str(tmp_path / "q.xz"), num_heldout=1))


@pytest.mark.skipif(QUESTIONS is None, reason="needs wiki/questions.jsonl.xz in TOOLRL_DATA")
def test_real_questions_load_by_their_splits() -> None:
    train, heldout = load_tasks(TaskConfig(source="triviaqa", path=str(QUESTIONS), num_train=100_000, num_heldout=500))
    assert len(train) > 5000 and len(heldout) == 500
    assert not {normalise(task.prompt) for task in train} & {normalise(task.prompt) for task in heldout}


def test_a_prompt_has_as_many_shots_as_asked_for() -> None:
    task = Task("1", "Who?", "me", "generated")
    assert triviaqa.render_prompt(task, 0) == "Q: Who?\n"
    text = triviaqa.render_prompt(task, 4)
    assert text.count("Q: ") == 5 and text.count("<submit>") == 4 and text.endswith("Q: Who?\n")


def test_the_answer_of_every_shot_is_in_what_was_found() -> None:
    for question, _, _, found, answer in triviaqa.SHOTS:
        assert triviaqa.answered(found, Task("1", question, answer, "shot")) == 1.0


def test_the_warm_start_shows_no_held_out_person_and_fits_the_tiny_context() -> None:
    tokenizer = make_tokenizer(256, bootstrap.PIECES)
    rows = bootstrap.Demonstrations(0, 0.4, 0, frozenset())
    used = 0
    for _ in range(300):
        for row in (rows.demonstration(), rows.exercise()):
            text = "".join(part.text for part in row)
            ids = [i for part in row for i in tokenizer(part.text)["input_ids"]]
            assert tokenizer.decode(ids) == text and len(ids) < 130
        name = text.partition("<Wiki>")[2].partition("<call>")[0]
        assert not triviaqa.held_out(name)
        used += "<request>" in "".join(part.text for part in rows.demonstration())
    assert 0.3 < used / 300 < 0.5


def test_the_exercises_train_the_call_and_the_answer_and_the_drills_hold_the_words_of_passages() -> None:
    rows = bootstrap.Demonstrations(0, 0.4, 0, frozenset())
    call, found, answer = rows.exercise()[-3:]
    name, kept = call.text.removeprefix("<Wiki>").removesuffix("<call>"), answer.text.removeprefix("\nResult=").removesuffix("<submit>")
    assert (call.trained, found.trained, answer.trained) == (True, False, True)
    assert name in found.text and kept in found.text
    drilled = "".join(part.text for _ in range(100) for part in rows.drill() if part.trained)
    assert all(word in drilled for word in (*facts.TRADES, *facts.INSTRUMENTS))
