"""`toolrl tools` and `toolrl index`: the tools service from a terminal. What is done is in tools_serving.py and tools/."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from toolrl_ray.errors import UserError
from toolrl_ray.tools_access import DEFAULT_ADDRESS, DEFAULT_APP, EXAMPLES, open_tools, service_config
from tools_service.protocol import ToolCall, ToolResult, ToolStatus
from tools_service.runner import ToolInfo

CONFIG_HELP = "a YAML file with names, custom, options, pools, http and app; default: the calculator and the python interpreter"


def add_commands(command: Callable[..., argparse.ArgumentParser], group: Callable[[str, str], Any]) -> None:
    """command(name, run, text, into=...) adds a subcommand to the group that group(name, text) made."""
    tools = group("tools", "The tools service: start it, list its tools, call them.")
    serve = command("serve", serve_tools, "Start the service: here, until Ctrl-C, or on a cluster.", into=tools)
    serve.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster to leave it on; default: RAY_ADDRESS, else a Ray here")
    serve.add_argument("--host", help="to listen on; default: the config's, else 127.0.0.1")
    serve.add_argument("--port", type=int, help="default: the config's, else 8000")
    serve.add_argument("--no-http", action="store_true", help="for training runs on the same cluster only")
    stop = command("stop", stop_tools, "End a service that was left on a cluster.", into=tools)
    stop.add_argument("--address", metavar="HOST:PORT", help="of the Ray cluster, default: RAY_ADDRESS")
    stop.add_argument("--app", default=DEFAULT_APP, help=f"the service's name, default {DEFAULT_APP}")
    listing = command("list", list_tools, "List the tools of a service that runs.", into=tools)
    listing.add_argument("--json", action="store_true", help="as function-calling schemas")
    call = command("call", call_tool, "Call a tool once, or for every line of a file.", into=tools)
    bench = command("bench", bench_tool, "Measure calls per second and latency of a tool.", into=tools)
    for sub in (call, bench):
        sub.add_argument("name", metavar="NAME", help="of the tool")
    call.add_argument("argument", metavar="ARGUMENT", nargs="?", help="the tool's input; - reads it from stdin")
    call.add_argument("--jsonl", metavar="IN", help='a file with an object with "argument" on every line')
    call.add_argument("--out", metavar="OUT", help="where the same objects go, with status, text, latency_s and truncated")
    bench.add_argument("argument", metavar="ARGUMENT", nargs="?", help="the tool's input; built-in tools have a default")
    bench.add_argument("--in-flight", type=_number(int, 1), default=64, metavar="N", help="calls at once, default 64")
    bench.add_argument("--batch", type=_number(int, 1), default=1, metavar="N", help="calls in a request, default 1")
    bench.add_argument("--seconds", type=_number(float, 0.1), default=5.0, metavar="S", help="default 5")
    mcp = command("mcp", serve_mcp, "Offer the tools to an MCP client over stdin and stdout.", into=tools)
    for sub in (call, bench):
        sub.add_argument("--deadline", type=_number(float, 0.001), default=10.0, metavar="S", help="seconds for each call, default 10")
    for sub in (listing, call, bench, mcp):
        sub.add_argument("--address", metavar="URL", help=f"of the service; default: TOOLRL_TOOLS, else {DEFAULT_ADDRESS}")
        sub.add_argument("--local", action="store_true", help="run the tools in this process, without a service and without Ray")
    for sub in (serve, listing, call, bench, mcp):
        sub.add_argument("--config", metavar="FILE", help=CONFIG_HELP + ("" if sub is serve else "; for --local"))
    index = group("index", "Indexes for the search tool.")
    build = command("build", build_index, "Index a corpus.", into=index)
    build.add_argument("corpus", metavar="CORPUS.jsonl", help='JSON lines with "id", "text" or "contents", and optionally "title"')
    build.add_argument("out", metavar="OUT", help="folder to make")
    info = command("info", index_info, "Show what an index holds.", into=index)
    info.add_argument("path", metavar="PATH", help="a folder, or the name of a Pyserini prebuilt index")


def _number(kind: type, least: float) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if not least <= (value := kind(text)) < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} must be {least:g} or more")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid float value" by it
    return parse


def serve_tools(options: argparse.Namespace) -> int:
    from toolrl_ray import tools_serving
    from toolrl_ray.cli import say
    from toolrl_ray.local_ray import cluster_address
    from tools_service.config import HttpConfig

    config = service_config(options.config)
    chosen = {key: value for key in ("host", "port") if (value := getattr(options, key)) is not None}
    if options.no_http and chosen:
        raise UserError(f"--no-http contradicts --{next(iter(chosen))}; take one of them away")
    if not 1 <= chosen.get("port", 1) <= 65535:
        raise UserError(f"--port={options.port} must be from 1 to 65535")
    http = None if options.no_http else (config.http or HttpConfig()).model_copy(update=chosen)
    if address := cluster_address(options.address):
        tools_serving.serve_on_cluster(config, http, address, say, options.verbose)
    else:
        tools_serving.serve_here(config, http, say, options.verbose)
    return 0


def stop_tools(options: argparse.Namespace) -> int:
    from toolrl_ray import tools_serving
    from toolrl_ray.cli import say
    from toolrl_ray.local_ray import cluster_address

    address = cluster_address(options.address)
    if not address:
        raise UserError("which cluster? name it with --address HOST:PORT; a service that was started here ends with Ctrl-C")
    tools_serving.stop(options.app, address, say, options.verbose)
    return 0


def list_tools(options: argparse.Namespace) -> int:
    async def ask() -> dict[str, ToolInfo]:
        async with open_tools(options) as tools:
            return await tools.infos()

    infos = asyncio.run(ask())
    if options.json:
        print(json.dumps([_schema(info) for info in infos.values()], indent=2, ensure_ascii=False))
        return 0
    for info in infos.values():
        print(f"{info.name}({_signature(info.parameters)})\n    {info.description}")
    return 0


def call_tool(options: argparse.Namespace) -> int:
    if (options.argument is None) == (options.jsonl is None):
        raise UserError("give the tool's ARGUMENT (- reads it from stdin), or --jsonl IN --out OUT for many")
    if (options.jsonl is None) != (options.out is None):
        raise UserError("--jsonl IN and --out OUT belong together")
    if options.jsonl is not None:
        return _call_file(options, Path(options.jsonl), Path(options.out))
    argument = _stdin() if options.argument == "-" else options.argument

    async def ask() -> ToolResult:
        async with open_tools(options, options.name) as tools:
            return (await tools.call([ToolCall(options.name, argument, options.deadline)]))[0]

    result = asyncio.run(ask())
    if result.status is ToolStatus.OK:
        print(_printable(result.text), flush=True)
        if result.truncated:
            print("toolrl: the tool has cut its output", file=sys.stderr)
        return 0
    print(f"{result.status}: {_printable(result.text)}", file=sys.stderr)
    return 1


def _call_file(options: argparse.Namespace, source: Path, out: Path) -> int:
    from tqdm import tqdm

    from toolrl_ray.tools.many_calls import call_file, count_rows

    target = Path(os.path.realpath(out))
    try:
        out.exists()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UserError(f"--out={str(out)!r} cannot be written: {error.strerror}") from None
    if out.is_dir() or not target.parent.is_dir():
        raise UserError(f"--out={str(out)!r} " + ("is a folder; name a file in it" if out.is_dir() else "is in no folder; make it first"))
    if target.is_symlink() or (out.exists() and not out.is_file()):
        raise UserError(f"--out={str(out)!r} is no file but a device, a pipe or the like, and would be replaced; name a file")
    num_rows = count_rows(source)
    if out.exists() and out.samefile(source):
        raise UserError(f"--out={str(out)!r} is the input itself; name another file")

    async def run() -> Counter[ToolStatus]:
        async with open_tools(options, options.name) as tools:
            quiet = not sys.stderr.isatty()  # a log gets a line in ten seconds
            with tqdm(total=num_rows, unit="calls", desc=options.name, mininterval=10 if quiet else 0.2, file=sys.stderr) as bar:
                return await call_file(tools.call, options.name, source, out, options.deadline, bar.update)

    start = time.perf_counter()
    counts = asyncio.run(run())
    print(f"{num_rows:,} calls in {time.perf_counter() - start:.1f} s ({_shown(counts)}), written to {out}")
    return 0


def bench_tool(options: argparse.Namespace) -> int:
    from toolrl_ray.tools.many_calls import Measured, measure

    argument = options.argument if options.argument is not None else EXAMPLES.get(options.name)
    if argument is None:
        raise UserError(f"what is {options.name} to be asked? give it as ARGUMENT")
    if options.in_flight % options.batch:
        raise UserError(f"--in-flight={options.in_flight} must be a multiple of --batch={options.batch}")
    asked = ToolCall(options.name, _stdin() if argument == "-" else argument, options.deadline)

    async def run() -> Measured:
        async with open_tools(options, options.name) as tools:
            await tools.call([asked])  # the first one pays for connections and caches
            batches = f", in batches of {options.batch}" if options.batch > 1 else ""
            print(f"{options.name} {tools.where}: {options.in_flight} calls in flight{batches} for {options.seconds:g} s", flush=True)
            return await measure(tools.call, asked, options.in_flight, options.batch, options.seconds)

    found = asyncio.run(run())
    print(f"  calls/s  {found.calls_per_s:,.1f}")
    print("  latency  " + ", ".join(f"p{percent} {1000 * found.latency_s(percent):,.1f} ms" for percent in (50, 95, 99)))
    print(f"  status   {_shown(found.counts)}")
    return 0


def serve_mcp(options: argparse.Namespace) -> int:
    received: list[int] = []

    async def run() -> None:
        from tools_service.mcp_server import own_stdout, serve_stdio

        loop, serving = asyncio.get_running_loop(), asyncio.current_task()
        assert serving is not None  # this is a coroutine

        def on_signal(number: int) -> None:
            received.append(number)
            loop.remove_signal_handler(number)  # a second one does not wait
            serving.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal, number)
        with own_stdout() as wire:
            async with open_tools(options) as tools:
                await serve_stdio(await tools.infos(), tools.call, tools.end_session, wire)

    with suppress(asyncio.CancelledError):  # by a signal
        asyncio.run(run())
    return 128 + received[0] if received else 0


def build_index(options: argparse.Namespace) -> int:
    from tools_service.search.index import cli_build

    return _search(lambda: cli_build(options.corpus, options.out))


def index_info(options: argparse.Namespace) -> int:
    from tools_service.search.index import cli_info

    return _search(lambda: cli_info(options.path))


def _search(work: Callable[[], str]) -> int:
    from tools_service.search.corpus import SearchError
    from tools_service.search.java import JavaUnavailable

    try:
        print(work())
    except (SearchError, JavaUnavailable) as error:
        raise UserError(str(error)) from None
    return 0


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not UTF-8 at byte {error.start}") from None


def _printable(text: str) -> str:
    """What the terminal's encoding can carry."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _schema(info: ToolInfo) -> dict[str, Any]:
    return {"type": "function", "function": {"name": info.name, "description": info.description, "parameters": info.parameters}}


def _signature(parameters: dict[str, Any]) -> str:
    """`a: integer, b: string = "x"`; one that may be left out has a question mark, or its default."""
    parts = []
    for name, schema in (parameters.get("properties") or {}).items():
        kind = schema.get("type", "any") if isinstance(schema, dict) else "any"
        default = f" = {json.dumps(schema['default'], ensure_ascii=False)}" if isinstance(schema, dict) and "default" in schema else ""
        optional = "" if default or name in parameters.get("required", ()) else "?"
        parts.append(f"{name}{optional}: {' or '.join(kind) if isinstance(kind, list) else kind}{default}")
    return ", ".join(parts)


def _shown(counts: Counter[ToolStatus]) -> str:
    return ", ".join(f"{status} {number:,}" for status, number in counts.most_common())
