"""`toolrl eval`: a policy on a recipe's held-out tasks, as a table for people and JSON for machines."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

from toolrl_ray.errors import UserError
from toolrl_ray.types import Trajectory

STDOUT = "/dev/fd/1"
DEFAULT_SAMPLES = 4  # per task, where eval.num_samples is null

Numbers = Mapping[str, float]
COLUMNS = {"": "greedy", "sampled/": "sampled", "without_tools/": "without tools"}  # by what the names in a result begin with
MEASURES = {  # names in a result, without what they begin with -> words of the table, and the form of a number
    "accuracy": ("accuracy", ".3f"),
    "pass@": ("pass@", ".3f"),
    "tool_gain": ("gained by the tools", "+.3f"),
    "reward_mean": ("reward", ".3f"),
    "tool_use_rate": ("tool-use rate", ".3f"),
    "tool_error_rate": ("tool error rate", ".3f"),
    "truncated_rate": ("truncated", ".3f"),
    "turns_mean": ("turns", ".2f"),
    "sampled_tokens_mean": ("sampled tokens", ",.1f"),
}
OF_A_SOURCE = ("accuracy", "tool_use_rate")  # the JSON has all of them


def add_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    """command(name, run, text) adds a subcommand that takes a recipe and overrides."""
    evaluate = command("eval", evaluate_policy, "Evaluate a policy on a recipe's held-out tasks.")
    evaluate.add_argument("--policy", metavar="DIR_OR_HUB_NAME", help="default: the recipe's own policy")
    evaluate.add_argument("--json", metavar="FILE", help="write the result there too")
    evaluate.add_argument("--transcripts", metavar="DIR", help="save every episode there, in trajectories.jsonl")
    evaluate.add_argument("--no-baseline", action="store_true", help="leave out the episodes without tools")
    evaluate.add_argument("--in-process", action="store_true", help="no Ray, one process")


def evaluate_policy(options: argparse.Namespace) -> int:
    from toolrl_ray.cli import load, with_parts

    if options.policy is not None:
        if others := [override for override in options.overrides if override.startswith("policy.path=")]:
            raise UserError(f"--policy={options.policy!r} contradicts {others[-1]!r}: each names a policy; take one of them away")
        quoted = yaml.safe_dump(options.policy, default_style='"', width=math.inf).strip()  # JSON's surrogate pairs are no YAML
        options.overrides.append(f"policy.path={quoted}")
    config = load(options)
    num_samples = DEFAULT_SAMPLES if config.eval.num_samples is None else config.eval.num_samples
    _check_outputs(options)

    def use(parts: Any, policy_dir: str) -> Any:
        from toolrl_ray.collector import evaluate
        from toolrl_ray.tasks.module import load_tasks

        heldout = load_tasks(config.task)[1]
        return evaluate(config, parts.rollout, heldout, "eval", num_samples=num_samples, without_tools=not options.no_baseline)

    result, trajectories = with_parts(config, options, False, use)
    print(f"\n{render(result)}", flush=True)  # first: a file that cannot be written costs no more than itself
    about = {"recipe": config.recipe, "policy": config.policy.path, "seed": config.seed}
    if num_samples:
        about["sampled/temperature"] = config.eval.temperature
    _save(options, about | result, trajectories)
    return 0


def _save(options: argparse.Namespace, result: dict[str, Any], trajectories: list[Trajectory]) -> None:
    """Writes what can be written. Raises UserError for what cannot."""

    def write_json(path: str) -> None:
        from toolrl_ray.run_dir import write_whole

        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        if _is_stream(path):
            with open(path, "a", encoding="utf-8") as file:
                file.write(text)
        else:
            write_whole(Path(os.path.realpath(path)), text)

    def write_transcripts(path: str) -> None:
        from toolrl_ray.tracking.trajectories import TrajectoryWriter

        try:
            with closing(TrajectoryWriter(Path(path))) as writer:
                writer.write(0, trajectories)
        except OSError:
            (Path(path) / "trajectories.jsonl").unlink(missing_ok=True)  # there was none before
            raise

    failed = []
    for option, path, write in (("--json", options.json, write_json), ("--transcripts", options.transcripts, write_transcripts)):
        try:
            if path is not None:
                write(path)
        except (OSError, ValueError) as error:  # the latter of a NaN, which JSON lacks
            failed.append(f"{option}={path!r} cannot be written ({getattr(error, 'strerror', error)})")
    if failed:
        raise UserError(f"{'; '.join(failed)}; the evaluation is done, its table stands above")


def _is_stream(path: str) -> bool:
    """Whether it is written to, not replaced: a device, a pipe, or where the table goes too."""
    if not os.path.exists(path) or os.path.isdir(path):
        return False
    return not os.path.isfile(path) or os.path.realpath(path) == os.path.realpath(STDOUT)


def _check_outputs(options: argparse.Namespace) -> None:
    """Before anything starts. Raises UserError."""
    for option, path in (("--json", options.json), ("--transcripts", options.transcripts)):
        if path is None:
            continue
        if option == "--json" and _is_stream(path):
            if not os.access(path, os.W_OK):
                raise UserError(f"--json={path!r} cannot be written; name another")
            continue
        parent = Path(os.path.realpath(path)).parent
        if not parent.is_dir():
            raise UserError(f"{option}={path!r}: no folder {str(parent)!r}; make it first")
        folder = Path(path) if option == "--transcripts" and Path(path).is_dir() else parent
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{option}={path!r}: the folder {str(folder)!r} cannot be written; name another")
    if options.json is not None and Path(options.json).is_dir():
        raise UserError(f"--json={options.json!r} is a folder; name a file in it")
    if options.transcripts is not None:
        folder = Path(options.transcripts)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--transcripts={options.transcripts!r} is a file; name a folder")
        if (folder / "trajectories.jsonl").exists():
            raise UserError(f"--transcripts={options.transcripts!r} has a trajectories.jsonl already; name another folder")
        taken = [os.path.realpath(path) for path in (folder, folder / "trajectories.jsonl")]
        if options.json is not None and os.path.realpath(options.json) in taken:
            raise UserError(f"--json={options.json!r} is in the way of --transcripts={options.transcripts!r}; name another file")


def render(result: Numbers) -> str:
    """The table: a line per measure, numbers with their 95 % intervals, and lines of each source where there are several."""
    columns = {start: title for start, title in COLUMNS.items() if f"{start}turns_mean" in result}
    if samples := result.get("sampled/num_samples"):
        columns["sampled/"] = f"sampled, {samples} of each"
    rows = [["", *columns.values()]]
    for name, (words, form) in _measures(result).items():
        if any(cells := [_cell(result, start, name, form) for start in columns]):
            rows.append([words, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [
            *lines,
            f"{result['num_tasks']} tasks, each interval at 95 %",
            f"{result['duration_s']:,.1f} s: {result['episodes_per_s']:,.1f} episodes/s, {result['tokens_per_s']:,.0f} tokens/s",
        ]
    )


def _measures(result: Numbers) -> dict[str, tuple[str, str]]:
    """The lines' names in the result, with their words and forms, in order; those of each source at the end."""
    ks = sorted(int(name.removeprefix("sampled/pass@")) for name in result if name.removeprefix("sampled/pass@").isdecimal())
    lines = {}
    for name, (words, form) in MEASURES.items():
        for k in ks if name == "pass@" else [""]:
            lines[f"{name}{k}"] = (f"{words}{k}", form)
    for source in [name.removeprefix("accuracy/") for name in result if name.startswith("accuracy/")]:
        for name in OF_A_SOURCE:
            lines[f"{name}/{source}"] = (f"{MEASURES[name][0]}, {source}", MEASURES[name][1])
    return lines


def _cell(result: Numbers, start: str, name: str, form: str) -> str:
    measure, slash, source = name.partition("/")
    value, low, high = (result.get(f"{start}{measure}{end}{slash}{source}") for end in ("", "_low", "_high"))
    if value is None:
        return ""
    return format(value, form) + (f" [{low:{form}}, {high:{form}}]" if low is not None else "")
