"""scripts/setup and an environment that it did not make."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
UV = """#!/bin/sh
# makes environments, and installs nothing
case "$*" in *--help*) echo --clear ;; venv*) "$4" -m venv --without-pip "$5" ;; esac
"""


def test_a_checkout_that_was_moved_gets_an_environment_for_its_new_place(tmp_path: Path) -> None:
    """The programs of an environment name the place that it was made in."""
    before, after = tmp_path / "before", tmp_path / "after"
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, before / name)
    shutil.copy(ROOT / "pyproject.toml", before)
    (before / "scripts" / "setup").write_text((ROOT / "scripts" / "setup").read_text().replace("NEEDED_GB=6", "NEEDED_GB=0"))
    (before / "scripts" / "libnuma.py").write_text("")
    (before / ".uv" / "bin").mkdir(parents=True)
    (before / ".uv" / "bin" / "uv").write_text(UV)
    (before / ".uv" / "bin" / "uv").chmod(0o755)

    def setup(checkout: Path) -> str:
        command, environment = [checkout / "scripts" / "setup"], os.environ | {"PYTHON": sys.executable}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stderr

    def made_in(checkout: Path) -> bool:
        return str(checkout / ".venv") in (checkout / ".venv" / "bin" / "activate").read_text()

    assert "done: .venv is ready" in setup(before) and made_in(before)
    assert setup(before) == ""
    before.rename(after)
    assert not made_in(after)
    assert "setup: the checkout was moved; making .venv afresh\n" in setup(after) and made_in(after)
    assert setup(after) == ""


def test_an_environment_with_the_gpu_stack_is_left_as_it_is(tmp_path: Path) -> None:
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=tmp_path, check=True, timeout=60)
    [packages] = tmp_path.glob(".venv/lib/python3*/site-packages")
    (packages / "vllm-0.32.0.dist-info").mkdir()
    (packages / "vllm-0.32.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run([tmp_path / "scripts" / "setup"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "setup: .venv holds the GPU stack: left as it is\n")
    assert sorted(tmp_path.rglob("*")) == before
