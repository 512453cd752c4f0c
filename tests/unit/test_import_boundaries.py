"""Heavy packages are imported only where this table says, and light modules stay light."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for package in ("toolrl_ray", "tools_service") for path in (ROOT / package).rglob("*.py"))

ALLOWED = {
    "ray": {
        "toolrl_ray/placement.py",
        "toolrl_ray/cluster.py",
        "toolrl_ray/local_ray.py",
        "toolrl_ray/submit.py",
        "toolrl_ray/tools_serving.py",
        "toolrl_ray/rollout/actor.py",
        "toolrl_ray/rollout/pool.py",
        "toolrl_ray/rollout/process.py",
        "toolrl_ray/learner/actor.py",
        "toolrl_ray/learner/group.py",
        "toolrl_ray/weights/client.py",
        "tools_service/serve_app.py",
        "tools_service/serve_start.py",
        "tools_service/serve_handles.py",
        "tools_service/serve_replica.py",
        "tools_service/serve_router.py",
    },
    "vllm": {
        "toolrl_ray/rollout/vllm_engine.py",
        "toolrl_ray/weights/vllm_object_store.py",
        "toolrl_ray/weights/trainer.py",
    },
    "deepspeed": {"toolrl_ray/learner/deepspeed_engine.py"},
    "peft": {"toolrl_ray/learner/lora.py"},
    "pyserini": {"tools_service/search/searcher.py"},
}


def imported_packages(tree: ast.AST) -> set[str]:
    """Top-level names of every import in a file, those inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def importers(package: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in SOURCES if package in imported_packages(ast.parse(path.read_text()))}


@pytest.mark.parametrize("package", ALLOWED)
def test_heavy_packages_are_imported_only_by_the_files_in_the_table(package: str) -> None:
    assert importers(package) <= ALLOWED[package]


@pytest.mark.parametrize("package", ALLOWED)
def test_the_table_names_no_file_that_stopped_importing_the_package(package: str) -> None:
    assert ALLOWED[package] <= importers(package)


def test_rollout_and_learner_never_import_each_other() -> None:
    def modules(folder: str) -> set[str]:
        trees = [ast.parse(path.read_text()) for path in (ROOT / "toolrl_ray" / folder).rglob("*.py")]
        found = {node.module or "" for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        return found | {alias.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}

    assert not [name for name in modules("rollout") if name.startswith("toolrl_ray.learner")]
    assert not [name for name in modules("learner") if name.startswith("toolrl_ray.rollout")]


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport sys\nprint(' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def import_all(package: str) -> str:
    files = (ROOT / package.replace(".", "/")).rglob("*.py")
    names = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files)
    return "import " + ", ".join(name for name in names if not name.endswith(("serve_app", "serve_router")))


HEAVY = {"ray", "vllm", "deepspeed", "pyserini", "wandb", "transformers"}


def test_algos_load_torch_and_nothing_heavier() -> None:
    modules = loaded_by(import_all("toolrl_ray.algos"))
    assert "torch" in modules
    assert not modules & HEAVY


def test_episode_loads_no_torch() -> None:
    assert not loaded_by(import_all("toolrl_ray.episode")) & (HEAVY | {"torch"})


def test_tools_service_loads_nothing_of_the_trainer() -> None:
    assert not loaded_by(import_all("tools_service")) & (HEAVY | {"torch", "toolrl_ray"})


def test_config_and_types_load_nothing_heavy() -> None:
    assert not loaded_by("import toolrl_ray.config, toolrl_ray.types") & (HEAVY | {"torch", "numpy"})


def test_the_command_starts_without_heavy_imports() -> None:
    assert importlib.util.find_spec("toolrl_ray.cli") is not None
    assert not loaded_by("import toolrl_ray.cli") & (HEAVY | {"torch"})
