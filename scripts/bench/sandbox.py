"""The python sandbox against a bare interpreter and against one bubblewrap per call, all in one run and in turns: medians, ratios, goals.

    python scripts/bench/sandbox.py [--isolation bubblewrap,landlock] [--calls 300] [--rounds 5] [--seconds 2] [--heavy 30]
                                    [--timeouts 20] [--mixed 5000] [--json FILE]

single     `print(1+1)` one at a time: each side makes calls/rounds calls in turn, every answer checked; `bare` is
           `python -I -S -c`, `bwrap` the same in a bubblewrap of its own
pairs      executions a second, two at a time; the same of bare interpreters, in turns
heavy      a snippet that imports numpy and sympy and uses both: preloaded, and by a bare interpreter
overshoot  how long after its deadline of 0.1 s a snippet that never ends has come back: the worst of --timeouts
orphans    processes that are left 0.1 s after the owner was killed with -9 while snippets ran
mixed      --mixed snippets, good and bad, 8 at a time: restarts of the fork server, growth of descriptors and processes
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import psutil

from tools_service.sandbox.owner import Limits, Sandbox, SandboxStatus
from tools_service.sandbox.plan import TIERS

ROOT = Path(__file__).resolve().parents[2]
HELLO = "print(1+1)"
HEAVY = "import numpy, sympy\nprint(numpy.arange(10).sum(), sympy.sqrt(8))"
HEAVY_PRELOAD = ("math", "json", "random", "numpy", "numpy.random", "sympy")
DEADLINE_S = 0.1
KINDS = [
    *["print(sum(i * i for i in range(1000)))"] * 4, "1 / 0", "import json\nprint(json.dumps({'a': [1, 2]}))", "x = (",
    "while True: print('x' * 99)", "import os\nos._exit(3)", "import ctypes\nctypes.string_at(0)",
    "open('f', 'w').write('x' * 1000)", "import os\nos.makedirs('a/b')", "x = [bytearray(1 << 24) for _ in range(99)]",
    "import threading\n[threading.Thread(target=int).start() for _ in range(9)]",
]  # fmt: skip
OWNER = """
import asyncio, sys
from tools_service.sandbox.owner import Limits, Sandbox
async def main():
    box = Sandbox(Limits(wall_s=60, cpu_s=60), isolation=sys.argv[1], num_ahead=4)
    await box.start()
    session = await box.open_session()
    await session.run("x = 1")
    tasks = [asyncio.create_task(box.run("while True: pass")) for _ in range(4)]
    await asyncio.sleep(0.5)
    print("running", flush=True)
    await asyncio.gather(*tasks)
asyncio.run(main())
"""

PAIR_ROUNDS = 5


def bare(code: str, *flags: str) -> None:
    done = subprocess.run([sys.executable, *flags, "-c", code], stdin=subprocess.DEVNULL, capture_output=True)
    check(done.returncode == 0 and bool(done.stdout), done)


def bubblewrapped(code: str) -> None:
    """What a bubblewrap per call costs: all namespaces, only the interpreter's files."""
    python = os.path.realpath(sys.executable)
    prefix = os.path.dirname(os.path.dirname(python))
    binds = {"/usr", prefix, sysconfig.get_path("stdlib")}
    command = ["bwrap", "--unshare-all", "--die-with-parent", *(part for path in sorted(binds) for part in ("--ro-bind", path, path))]
    for link in ("/lib", "/lib64"):
        command += ["--symlink", os.readlink(link), link] if os.path.islink(link) else ["--ro-bind", link, link]
    command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--", python, "-I", "-S", "-c", code]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    check(done.returncode == 0 and done.stdout == b"2\n", done)


def check(right: bool, answer: Any) -> None:
    if not right:
        raise RuntimeError(f"a wrong answer: {answer}")


def quantile_ms(times_s: list[float], share: float) -> float:
    return 1000 * sorted(times_s)[min(len(times_s) - 1, int(share * len(times_s)))]


async def hello(box: Sandbox) -> None:
    outcome = await box.run(HELLO)
    check(outcome.output == "2\n", outcome)


async def single(box: Sandbox, num_calls: int, num_rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {"sandbox": [], "bare": [], "bwrap": []}
    for _ in range(num_rounds):
        for _ in range(num_calls // num_rounds):
            start = time.perf_counter()
            await hello(box)
            times["sandbox"].append(time.perf_counter() - start)
        for side, run in (("bare", lambda: bare(HELLO, "-I", "-S")), ("bwrap", lambda: bubblewrapped(HELLO))):
            if side == "bwrap" and shutil.which("bwrap") is None:
                continue
            for _ in range(max(1, num_calls // num_rounds // 4)):
                start = time.perf_counter()
                run()
                times[side].append(time.perf_counter() - start)
    found = {f"{side}_p50_ms": quantile_ms(taken, 0.5) for side, taken in times.items() if taken}
    found["sandbox_p99_ms"] = quantile_ms(times["sandbox"], 0.99)
    return found | {f"times_{side}": found[f"{side}_p50_ms"] / found["sandbox_p50_ms"] for side in ("bare", "bwrap") if times[side]}


async def pairs(box: Sandbox, seconds: float) -> dict[str, float]:
    sides = {"": lambda: hello(box), "bare_": lambda: asyncio.to_thread(bare, HELLO, "-I", "-S")}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(PAIR_ROUNDS):
        for side, run in sides.items():
            start, done = time.perf_counter(), 0

            async def worker() -> None:
                nonlocal done
                while time.perf_counter() < start + seconds / PAIR_ROUNDS:  # noqa: B023  awaited within the round
                    await run()  # noqa: B023
                    done += 1

            await asyncio.gather(worker(), worker())
            rates[side].append(done / (time.perf_counter() - start))
    times_bare = statistics.median(ours / bares for ours, bares in zip(rates[""], rates["bare_"], strict=True))
    return {f"{side}per_s": statistics.median(rates[side]) for side in sides} | {"times_bare": times_bare}


async def heavy(isolation: str, num_calls: int) -> dict[str, float]:
    """Preloaded and bare in turns; a bare interpreter gets a tenth of the calls."""
    box = Sandbox(Limits(), preload=HEAVY_PRELOAD, isolation=isolation)
    times: dict[str, list[float]] = {"preloaded": [], "bare": []}
    try:
        await box.start()
        for number in range(num_calls):
            start = time.perf_counter()
            outcome = await box.run(HEAVY)
            times["preloaded"].append(time.perf_counter() - start)
            check(outcome.output == "45 2*sqrt(2)\n", outcome)
            if number % 10 == 0:
                start = time.perf_counter()
                bare(HEAVY)
                times["bare"].append(time.perf_counter() - start)
    finally:
        await box.close()
    found = {f"{side}_p50_ms": quantile_ms(taken, 0.5) for side, taken in times.items()}
    return found | {"times_bare": found["bare_p50_ms"] / found["preloaded_p50_ms"]}


async def overshoot(box: Sandbox, num_calls: int) -> dict[str, float]:
    late = []
    for _ in range(num_calls):
        start = time.perf_counter()
        outcome = await box.run("while True: pass", wall_s=DEADLINE_S)
        late.append(time.perf_counter() - start - DEADLINE_S)
        check(outcome.status is SandboxStatus.TIMEOUT, outcome)
    return {"median_ms": 1000 * statistics.median(late), "worst_ms": 1000 * max(late)}


def orphans(isolation: str) -> dict[str, int]:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, isolation], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert owner.stdout is not None
        check(owner.stdout.readline() == b"running\n", "the owner did not start")
        below = psutil.Process(owner.pid).children(recursive=True)
    finally:
        owner.send_signal(signal.SIGKILL)
    time.sleep(0.1)
    left = [process for process in below if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    owner.wait(10)
    return {"processes_before": len(below), "processes_left": len(left)}


async def mixed(box: Sandbox, num_calls: int) -> dict[str, float]:
    """Counts before and after are taken at rest, after a first round of every kind."""

    async def worker(numbers: list[int]) -> None:
        for number in numbers:
            code = random.Random(number).choice(KINDS)
            outcome = await box.run("while True: pass", wall_s=0.02) if number % 100 == 99 else await box.run(code)
            check(outcome.status is not SandboxStatus.UNAVAILABLE, outcome)

    async def counts() -> tuple[int, int, int]:
        await asyncio.sleep(0.5)
        fds = [len(os.listdir(f"/proc/{pid}/fd")) for pid in ("self", box.zygote_pid)]
        return fds[0], fds[1], len(psutil.Process().children(recursive=True))

    await worker(list(range(100)))
    restarts, before = box.num_restarts, await counts()
    start = time.perf_counter()
    await asyncio.gather(*(worker(list(range(first, num_calls, 8))) for first in range(8)))
    taken_s = time.perf_counter() - start
    growth = [now - then for now, then in zip(await counts(), before, strict=True)]
    return {
        "per_s": num_calls / taken_s, "restarts": box.num_restarts - restarts,
        "descriptor_growth": growth[0] + growth[1], "process_growth": growth[2],
    }  # fmt: skip


async def measure(isolation: str, args: argparse.Namespace) -> dict[str, Any]:
    box = Sandbox(Limits(wall_s=5.0, memory_bytes=256 << 20), isolation=isolation, num_ahead=args.ahead)
    await box.start()
    try:
        for _ in range(20):
            await hello(box)
        found: dict[str, Any] = {"single": await single(box, args.calls, args.rounds), "pairs": await pairs(box, args.seconds)}
        found["overshoot"] = await overshoot(box, args.timeouts)
        found["mixed"] = await mixed(box, args.mixed)
    finally:
        await box.close()
    found["heavy"] = await heavy(isolation, args.heavy)
    found["orphans"] = orphans(isolation)
    return found


# what, where it lies, the goal as text, whether it is reached
GOALS = [
    ("print(1+1), one at a time, p50 ms", ("single", "sandbox_p50_ms"), "<= 3", lambda value: value <= 3),
    ("print(1+1), one at a time, p99 ms", ("single", "sandbox_p99_ms"), "<= 6", lambda value: value <= 6),
    ("times as fast as python -I -S -c", ("single", "times_bare"), ">= 3.5", lambda value: value >= 3.5),
    ("times as fast as bubblewrap per call", ("single", "times_bwrap"), ">= 5", lambda value: value >= 5),
    ("two at a time, executions/s", ("pairs", "per_s"), ">= 600", lambda value: value >= 600),
    ("numpy + sympy preloaded, p50 ms", ("heavy", "preloaded_p50_ms"), "<= 15", lambda value: value <= 15),
    ("timeout overshoot, worst ms", ("overshoot", "worst_ms"), "<= 10", lambda value: value <= 10),
    ("processes left by a killed owner", ("orphans", "processes_left"), "0", lambda value: value == 0),
    ("mixed snippets: restarts", ("mixed", "restarts"), "0", lambda value: value == 0),
    ("mixed snippets: descriptor growth", ("mixed", "descriptor_growth"), "0", lambda value: value <= 0),
    ("mixed snippets: process growth", ("mixed", "process_growth"), "0", lambda value: value <= 0),
]  # fmt: skip
BESIDE = [
    ("bare python -I -S -c, p50 ms", ("single", "bare_p50_ms")), ("bubblewrap per call, p50 ms", ("single", "bwrap_p50_ms")),
    ("bare python, two at a time, executions/s", ("pairs", "bare_per_s")),
    ("the sandbox two at a time, times that", ("pairs", "times_bare")),
    ("bare python, numpy + sympy, p50 ms", ("heavy", "bare_p50_ms")), ("mixed snippets, executions/s", ("mixed", "per_s")),
]  # fmt: skip


def table(results: dict[str, dict[str, Any]]) -> str:
    def cell(found: dict[str, Any], where: tuple[str, str]) -> float | None:
        return found[where[0]].get(where[1])

    lines = [f"| | goal | {' | '.join(results)} |", "|---|---|" + "---|" * len(results)]
    for what, where, goal, reached in GOALS:
        values = [cell(found, where) for found in results.values()]
        cells = ["-" if value is None else f"{value:.3g}" + ("" if reached(value) else " **missed**") for value in values]
        lines.append(f"| {what} | {goal} | {' | '.join(cells)} |")
    for what, where in BESIDE:
        values = [cell(found, where) for found in results.values()]
        lines.append(f"| {what} | | {' | '.join('-' if value is None else f'{value:.3g}' for value in values)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isolation", default="bubblewrap,landlock", help="which to measure, separated by commas")
    parser.add_argument("--calls", type=int, default=300, help="of the sandbox in `single`; the other sides make a quarter of them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of `pairs`")
    parser.add_argument("--heavy", type=int, default=30)
    parser.add_argument("--timeouts", type=int, default=20)
    parser.add_argument("--mixed", type=int, default=5000)
    parser.add_argument("--ahead", type=int, default=2, help="children kept ready")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names = args.isolation.split(",")
    if unknown := [name for name in names if name not in TIERS or name == "none"]:
        parser.error(f"--isolation {unknown[0]}: choose from {', '.join(name for name in TIERS if name != 'none')}")
    results = {name: asyncio.run(measure(name, args)) for name in names}
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
