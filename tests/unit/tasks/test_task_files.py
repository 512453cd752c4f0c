"""JSON-lines files as editors, spreadsheets and other systems write them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from toolrl_ray.config import TaskConfig
from toolrl_ray.errors import ConfigError
from toolrl_ray.tasks import calculator, gsm8k, triviaqa

ROW = {  # of each task that reads files: one of a split, told apart by its number
    calculator: lambda split, n: {"expr": f"{n}+1", "result": str(n + 1), "split": split},
    triviaqa: lambda split, n: {"question": f"q{n}", "answers": ["x"], "split": split},
}


def config(module: ModuleType, path: Path) -> TaskConfig:
    return TaskConfig(module=module.__name__, source="triviaqa" if module is triviaqa else "gsm8k", path=str(path), num_heldout=1)


@pytest.mark.parametrize("module", ROW)
@pytest.mark.parametrize(("begin", "end"), [("", "\n"), ("\ufeff", "\n"), ("", "\r\n"), ("\ufeff\r\n", "\r\n\r\n"), ("\n \n", "\n\t\n")])
def test_a_byte_order_mark_blank_lines_and_carriage_returns_are_no_rows(module: ModuleType, begin: str, end: str, tmp_path: Path) -> None:
    rows = [ROW[module]("train", 1), ROW[module]("test", 2)]
    (tmp_path / "tasks.jsonl").write_bytes((begin + "".join(json.dumps(row) + end for row in rows)).encode())
    train, heldout = module.load_tasks(config(module, tmp_path / "tasks.jsonl"))
    assert [[task.prompt for task in tasks] for tasks in (train, heldout)] == [[row.get("expr", row.get("question"))] for row in rows]


@pytest.mark.parametrize("module", ROW)
def test_a_split_is_known_in_whatever_case_it_is_written(module: ModuleType, tmp_path: Path) -> None:
    rows = [ROW[module](split, n) for n, split in enumerate(["Train", "TRAIN", "TEST", "Test"])]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, heldout = module.load_tasks(config(module, tmp_path / "tasks.jsonl").model_copy(update={"num_heldout": 2}))
    named = {row.get("expr", row.get("question")): row["split"].lower() for row in rows}
    assert [{named[task.prompt] for task in tasks} for tasks in (train, heldout)] == [{"train"}, {"test"}]
    assert (len(train), len(heldout)) == (2, 2)


def test_the_files_of_a_folder_are_read_in_the_same_way(tmp_path: Path) -> None:
    for name, question in (("train", "How many?"), ("test", "And now?")):
        text = "\ufeff" + json.dumps({"question": question, "answer": "#### 2"}) + "\r\n\r\n"
        (tmp_path / f"{name}.jsonl").write_bytes(text.encode())
    assert [[task.prompt for task in tasks] for tasks in gsm8k.load_tasks(config(gsm8k, tmp_path))] == [["How many?"], ["And now?"]]


@pytest.mark.parametrize("module", ROW)
def test_a_bad_line_has_its_number_in_the_file_blank_lines_counted(module: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text("\n" + json.dumps(ROW[module]("train", 1)) + "\n\n\n{\n")
    with pytest.raises(ConfigError, match=r"tasks.jsonl:5: not a JSON object"):
        module.load_tasks(config(module, tmp_path / "tasks.jsonl"))


@pytest.mark.parametrize("text", ["\ufeff", "\ufeff\r\n", " \n\t\r\n"])
def test_a_file_of_blank_lines_alone_is_empty(text: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_bytes(text.encode())
    with pytest.raises(ConfigError, match="tasks.jsonl' is empty"):
        calculator.load_tasks(config(calculator, tmp_path / "tasks.jsonl"))
