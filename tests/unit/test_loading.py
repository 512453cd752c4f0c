"""A person's own module is loaded, or what is wrong with it is one line: file, line, class and message."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tools_service.loading import LoadingError, load_module, load_name


def complaint(spec: str) -> str:
    with pytest.raises(LoadingError) as raised:
        load_module(spec)
    message = str(raised.value)
    assert "\n" not in message
    return message


BROKEN = [
    ("x = 1\ndef f(:\n    pass\n", "line 2: SyntaxError: "),
    ("x = 1\n  y = 2\n", "line 2: IndentationError: "),
    ("import math\nimport package_that_is_not_there\n", "line 2: ModuleNotFoundError: No module named 'package_that_is_not_there'"),
    ("from math import cosinus\n", "line 1: ImportError: cannot import name 'cosinus'"),
    ("\n\nprint(undefined_name)\n", "line 3: NameError: name 'undefined_name' is not defined"),
    ("def f():\n    return 1 / 0\n\nx = f()\n", "line 2: ZeroDivisionError: "),
    ("import json\nx = json.loads('{')\n", "line 2: JSONDecodeError: "),  # raised in the library, caused here
    ("raise ValueError('two\\nlines')\n", "line 1: ValueError: two lines"),
    ("import sys\nsys.exit(3)\n", "line 2: SystemExit: 3"),
    ("class Tool:\n    name = missing\n", "line 2: NameError: "),
]


@pytest.mark.parametrize(("text", "expected"), BROKEN)
def test_what_a_file_raises_is_one_line_with_its_place(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    before = set(sys.modules)
    message = complaint(str(path))
    assert message.startswith(f"{path}, {expected}")
    assert not [name for name in set(sys.modules) - before if name.startswith("toolrl_user_mine")], "half a module must not stay"


@pytest.mark.parametrize(("text", "expected"), BROKEN)
def test_what_an_importable_module_raises_is_the_same_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    path = tmp_path / "mine_by_name.py"
    path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert complaint("mine_by_name").startswith(f"{path}, {expected}")
    assert "mine_by_name" not in sys.modules


def test_a_file_that_is_mended_loads(tmp_path: Path) -> None:
    path = tmp_path / "mended.py"
    path.write_text("x = y\n")
    assert "NameError" in complaint(str(path))
    path.write_text("value = 12345\n")
    assert load_module(str(path)).value == 12345
    assert load_name(f"{path}:value") == 12345


def test_objects_of_a_files_classes_unpickle_in_every_process_that_has_loaded_it(tmp_path: Path) -> None:
    path = tmp_path / "classes.py"
    path.write_text("class Mine:\n    value = 7\n")
    (tmp_path / "mine.pickle").write_bytes(pickle.dumps(load_module(str(path)).Mine()))
    code = f"from tools_service.loading import load_module; load_module({str(path)!r})\n"
    code += f"import pickle; print(pickle.load(open({str(tmp_path / 'mine.pickle')!r}, 'rb')).value)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "7\n", done.stderr


@pytest.mark.parametrize("spec", ["package_that_is_not_there", "json.not_there", "", ".relative"])
def test_a_module_that_is_not_there_is_named_with_the_remedy(spec: str) -> None:
    message = complaint(spec)
    assert repr(spec) in message and "path of a .py file" in message


def test_a_missing_file_or_name_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none.py") in complaint(str(tmp_path / "none.py"))
    with pytest.raises(LoadingError, match="json has no 'Nothing'"):
        load_name("json:Nothing")
    with pytest.raises(LoadingError, match="'json' is not of the form module:Name"):
        load_name("json")


def test_ctrl_c_while_a_module_loads_stays_ctrl_c(tmp_path: Path) -> None:
    path = tmp_path / "slow.py"
    path.write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_module(str(path))
