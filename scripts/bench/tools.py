"""The tools service: calculator calls per second, three ways, alternating in one run (medians and ratios); what overload, a tool
that stalls, and many mixed calls do to it.

    python scripts/bench/tools.py [--in-flight 512] [--rounds 5] [--seconds 1.5] [--mixed 100000] [--json FILE]

service      ToolClient -> Serve, as a training run calls it: waiting calls share requests
uncoalesced  the same client and replica, one call per request
bare         a method of a bare Ray actor, called one by one
bare_flood   the same method with --in-flight calls at once, for comparison
overload     10,000 calls at once on a bound of 4,096 that wait: peak memory, OVERLOADED, seconds until calls are answered again
stall        calculator calls per second while 32 calls of another tool stall for ever, against the rate without
mixed        --mixed calls, of the sandbox and of search too: good, wrong, unknown, stalled, cancelled; memory, descriptors, processes
             and files before and after
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import resource
import shutil
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import ray

from toolrl_ray.config import ToolsConfig
from toolrl_ray.tools.dispatch import Dispatcher
from toolrl_ray.tools.serve_client import ToolClient
from tools_service import serve_app
from tools_service.calculator import SimpleCalculatorTool
from tools_service.protocol import ToolCall, ToolResult, ToolStatus
from tools_service.runner import run_tool, tool_factories
from tools_service.search import index
from tools_service.serve_handles import ToolHandles

APP = "bench-tools"
NAMES = ["SimpleCalculatorTool", "Staller", "PythonInterpreter", "Wiki"]
SNIPPETS = ["print(1+1)", "1/0", "open('a', 'w').write('x' * 1000)", "print('y' * 10**6)", "import math\nprint(math.pi)", "x = [0] * 10**9"]
QUARTERS = 4  # of the mixed calls, after each of which is looked
SIDES = ("service", "uncoalesced", "bare", "bare_flood")


class OneByOne(ToolHandles):
    """The real transport to a tool that says that its calls never share a request."""

    async def describe(self, tool: str):
        return replace(await super().describe(tool), max_batch=1)


class Bare:
    def __init__(self) -> None:
        self._tool = SimpleCalculatorTool()

    def call(self, argument: str):
        return run_tool(self._tool, argument)


class Caller:
    def __init__(self, bare: ray.actor.ActorHandle, in_flight: int):
        config = ToolsConfig()
        client = ToolClient(APP, config)
        self._client = ToolClient(APP, ToolsConfig(names=NAMES))
        single = Dispatcher(OneByOne(APP), config.names, max_queued=config.max_queued)

        async def call_bare(call: ToolCall):
            return await bare.call.remote(call.argument)

        self._sides = {
            "service": (client, in_flight),
            "uncoalesced": (single, in_flight),
            "bare": (call_bare, 1),
            "bare_flood": (call_bare, in_flight),
        }

    async def measure(self, side: str, seconds: float) -> float:
        """Calls per second of `side`, every answer checked."""
        call_tool, in_flight = self._sides[side]
        numbers = itertools.count()
        start = time.perf_counter()
        done = 0

        async def worker() -> None:
            nonlocal done
            while time.perf_counter() - start < seconds:
                n = next(numbers)
                result = await call_tool(ToolCall("SimpleCalculatorTool", f"{n}*3+0.5"))
                if (result.status, result.text) != (ToolStatus.OK, f"{n * 3}.5"):
                    raise RuntimeError(f"{side}: {n}*3+0.5 gave {result}")
                done += 1

        await asyncio.gather(*(worker() for _ in range(in_flight)))
        return done / (time.perf_counter() - start)

    async def overload(self, num_calls: int) -> dict[str, float]:
        """`num_calls` at once; then calls one by one until one is answered OK."""
        before = peak_mib()
        start = time.perf_counter()
        results = await asyncio.gather(*(self._client(ToolCall("SimpleCalculatorTool", "1+1", 30.0)) for _ in range(num_calls)))
        took = time.perf_counter() - start
        statuses = Counter(str(result.status) for result in results)
        start = time.perf_counter()
        while (await self._client(ToolCall("SimpleCalculatorTool", "1+1"))).status is not ToolStatus.OK:
            await asyncio.sleep(0.001)
        recovery_s = time.perf_counter() - start
        return {"took_s": took, "recovery_s": recovery_s, "peak_growth_mib": peak_mib() - before, **statuses}

    async def stall(self, seconds: float) -> dict[str, float]:
        """The rate beside 32 calls that stall; each of those costs its own caller its deadline."""
        free = await self.measure("service", seconds)
        stalled = asyncio.gather(*(self._client(ToolCall("Staller", "stall", 2 * seconds)) for _ in range(32)))
        await asyncio.sleep(0.1)
        beside = await self.measure("service", seconds)
        statuses = Counter(str(result.status) for result in await stalled)
        return {"calls_per_s": free, "calls_per_s_beside_stalls": beside, "ratio": beside / free, **statuses}

    async def mixed(self, num_calls: int, in_flight: int) -> dict[str, int]:
        """A seeded mix; returns the statuses. Every 50th call is cancelled by its caller, every 500th stalls until its deadline."""
        draw = random.Random(0)
        statuses: Counter[str] = Counter()
        numbers = iter(range(num_calls))

        async def worker() -> None:
            for n in numbers:
                calls = [("SimpleCalculatorTool", f"{n}+1"), ("SimpleCalculatorTool", "1/0"), ("SimpleCalculatorTool", "?"), ("None", "x")]
                tool, argument = draw.choices(calls, (8, 1, 1, 1))[0]
                if n % 20 == 0:
                    tool, argument = "Staller", "stall" if n % 500 == 0 else "x"
                elif n % 20 == 7:
                    tool, argument = "PythonInterpreter", draw.choice(SNIPPETS)
                elif n % 20 == 13:
                    tool, argument = "Wiki", f"passage {n % 997}"
                call = asyncio.ensure_future(self._client(ToolCall(tool, argument, 0.5 if argument == "stall" else 30.0)))
                if n % 50 == 1:
                    await asyncio.sleep(0)
                    call.cancel()
                    statuses["cancelled"] += 1
                    await asyncio.wait([call])
                else:
                    statuses[str((await call).status)] += 1

        await asyncio.gather(*(worker() for _ in range(in_flight)))
        return dict(statuses)

    async def pids(self) -> list[int]:
        """Of this process and of the replicas."""
        from ray import serve

        handles = [serve.get_deployment_handle(name, APP) for name in NAMES]
        return [os.getpid(), *[(await handle.inspect.remote())["pid"] for handle in handles]]


class Staller:
    """Echoes; "stall" never ends by itself."""

    name, description, idempotent, probe = "Staller", "for this benchmark", True, "x"

    async def call(self, call: ToolCall) -> ToolResult:
        if call.argument == "stall":
            await asyncio.Event().wait()
        return ToolResult(ToolStatus.OK, call.argument)


def make_index(folder: str) -> str:
    corpus, out = Path(folder, "corpus.jsonl"), Path(folder, "index")
    rows = ({"id": str(n), "title": f"Passage {n}", "text": f"This is passage {n} of a thousand."} for n in range(1000))
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    index.build(corpus, out)
    return str(out)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def state_of(processes: list[psutil.Process]) -> dict[str, float]:
    """Memory and descriptors of the client and the replicas, processes below this one, and files in the folder of scratch files."""
    return {
        "memory_mib": round(sum(process.memory_info().rss for process in processes) / 2**20),
        "descriptors": sum(process.num_fds() for process in processes),
        "threads": sum(process.num_threads() for process in processes),
        "processes": len(psutil.Process().children(recursive=True)),
        "scratch_files": sum(1 for path in Path(tempfile.gettempdir()).iterdir() if not path.name.startswith("ray")),
    }


def mixed(caller: ray.actor.ActorHandle, num_calls: int, in_flight: int) -> dict[str, object]:
    processes = [psutil.Process(pid) for pid in ray.get(caller.pids.remote(), timeout=30)]
    ray.get(caller.mixed.remote(max(1, num_calls // 10), in_flight), timeout=600)  # warms up
    states, statuses, took = [state_of(processes)], Counter(), 0.0
    for _ in range(QUARTERS):
        start = time.perf_counter()
        statuses.update(ray.get(caller.mixed.remote(num_calls // QUARTERS, in_flight), timeout=3600))
        took += time.perf_counter() - start
        time.sleep(1)
        states.append(state_of(processes))
    return {"took_s": took, "statuses": dict(statuses), **{name: [state[name] for state in states] for name in states[0]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-flight", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--mixed", type=int, default=0, metavar="N")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    folder = tempfile.mkdtemp(prefix="bench-tools-")
    try:
        builtin = tool_factories([name for name in NAMES if name != "Staller"], {}, {"Wiki": {"index": make_index(folder)}})
        serve_app.start(builtin | {"Staller": Staller}, app_name=APP)
        bare = ray.remote(num_cpus=0.1)(Bare).remote()
        caller = ray.remote(num_cpus=0.1)(Caller).remote(bare, options.in_flight)
        rates: dict[str, list[float]] = {side: [] for side in SIDES}
        for round_number in range(options.rounds + 1):
            for side in SIDES:
                rate = ray.get(caller.measure.remote(side, options.seconds), timeout=60 + 10 * options.seconds)
                if round_number:  # the first round warms up
                    rates[side].append(rate)
        rows = {
            "overload": ray.get(caller.overload.remote(10_000), timeout=120),
            "stall": ray.get(caller.stall.remote(options.seconds), timeout=120),
        }
        if options.mixed:
            rows["mixed"] = mixed(caller, options.mixed, options.in_flight)
    finally:
        ray.shutdown()
        shutil.rmtree(folder)
    medians = {side: statistics.median(values) for side, values in rates.items()}
    for side in SIDES:
        spread = f"({min(rates[side]):,.0f} to {max(rates[side]):,.0f})"
        print(f"{side:12} {medians[side]:9,.0f} calls/s  {spread}  service is {medians['service'] / medians[side]:.1f} times")
    for name, row in rows.items():
        shown = [f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()]
        print(f"{name:12} {'  '.join(shown)}")
    if options.json:
        results = {"in_flight": options.in_flight, "calls_per_s": medians, "rounds": rates, **rows}
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
