"""Calculator calls per second, three ways, alternating in one run: medians and ratios.

    python scripts/bench/tools.py [--in-flight 512] [--rounds 5] [--seconds 1.5] [--json FILE]

service      ToolClient -> Serve, as a training run calls it: waiting calls share requests
uncoalesced  the same client and replica, one call per request
bare         a method of a bare Ray actor, called one by one
bare_flood   the same method with --in-flight calls at once, for comparison
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import ray

from toolrl_ray.config import ToolsConfig
from toolrl_ray.tools.dispatch import Dispatcher
from toolrl_ray.tools.serve_client import ServeTransport, ToolClient, start_tools
from tools_service.calculator import SimpleCalculatorTool
from tools_service.protocol import ToolCall, ToolStatus
from tools_service.runner import run_tool

APP = "bench-tools"
SIDES = ("service", "uncoalesced", "bare", "bare_flood")


class OneByOne(ServeTransport):
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
        single = Dispatcher(OneByOne(APP), config.names, max_in_flight=config.max_in_flight, max_queued=config.max_queued)

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-flight", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        start_tools(ToolsConfig(), APP)
        bare = ray.remote(num_cpus=0.1)(Bare).remote()
        caller = ray.remote(num_cpus=0.1)(Caller).remote(bare, options.in_flight)
        rates: dict[str, list[float]] = {side: [] for side in SIDES}
        for round_number in range(options.rounds + 1):
            for side in SIDES:
                rate = ray.get(caller.measure.remote(side, options.seconds), timeout=60 + 10 * options.seconds)
                if round_number:  # the first round warms up
                    rates[side].append(rate)
    finally:
        ray.shutdown()
    medians = {side: statistics.median(values) for side, values in rates.items()}
    for side in SIDES:
        spread = f"({min(rates[side]):,.0f} to {max(rates[side]):,.0f})"
        print(f"{side:12} {medians[side]:9,.0f} calls/s  {spread}  service is {medians['service'] / medians[side]:.1f} times")
    if options.json:
        options.json.write_text(json.dumps({"in_flight": options.in_flight, "calls_per_s": medians, "rounds": rates}, indent=1))


if __name__ == "__main__":
    main()
