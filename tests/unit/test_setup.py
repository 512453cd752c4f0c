"""scripts/setup and an environment that it did not make."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


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
