"""Rules of form that a reader relies on: small files, small functions, no wait without a deadline, recipes that load."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from toolrl_ray import recipe

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for package in ("toolrl_ray", "tools_service") for path in (ROOT / package).rglob("*.py"))
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60

# "path" or "path:function" -> why it is longer than the rule. Short, and empty at best.
LONGER: dict[str, str] = {}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_file_is_longer_than_the_rule() -> None:
    long = {relative(path): lines for path in FILES if (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES}
    assert not {name: lines for name, lines in long.items() if name not in LONGER}


def test_no_function_is_longer_than_the_rule() -> None:
    functions = (
        (f"{relative(path)}:{node.name}", node.end_lineno - node.lineno + 1)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno
    )
    assert not {name: lines for name, lines in functions if lines > MAX_FUNCTION_LINES and name not in LONGER}


def waits_without_deadline(tree: ast.AST) -> list[int]:
    """Lines that call ray.get, ray.wait or, in a file whose futures block (Ray's, concurrent.futures'), .result() without a timeout."""
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imports |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    futures_block = any(name.partition(".")[0] in ("ray", "concurrent") for name in imports)
    lines = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        has_timeout = any(keyword.arg and keyword.arg.startswith("timeout") for keyword in node.keywords)
        on_ray = isinstance(node.func.value, ast.Name) and node.func.value.id == "ray" and node.func.attr in ("get", "wait")
        on_future = futures_block and node.func.attr == "result" and not node.args
        if (on_ray or on_future) and not has_timeout:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("ray.get(x)", True),
        ("ray.wait([x])", True),
        ("import ray; handle.remote().result()", True),
        ("from concurrent.futures import wait; future.result()", True),
        ("import asyncio; done_task.result()", False),
        ("ray.get(x, timeout=3)", False),
        ("import ray; future.result(timeout_s=3)", False),
        ("import ray; future.result(3)", False),
        ("table.get(x)", False),
    ],
)
def test_the_search_for_waits_finds_what_it_should(code: str, found: bool) -> None:
    assert bool(waits_without_deadline(ast.parse(code))) is found


def test_nothing_waits_without_a_deadline() -> None:
    found = {relative(path): lines for path in FILES if (lines := waits_without_deadline(ast.parse(path.read_text())))}
    assert not found


def test_package_init_files_are_empty() -> None:
    assert not [relative(path) for path in FILES if path.name == "__init__.py" and path.read_text().strip()]


def test_every_package_folder_has_an_init_file() -> None:
    assert not [relative(folder) for folder in {path.parent for path in FILES} if not (folder / "__init__.py").exists()]


def test_there_is_a_recipe_named_calculator() -> None:
    assert "calculator" in recipe.recipe_names()


@pytest.mark.parametrize("name", recipe.recipe_names())
def test_every_recipe_loads_under_its_own_name(name: str) -> None:
    assert recipe.load(name).recipe == name
