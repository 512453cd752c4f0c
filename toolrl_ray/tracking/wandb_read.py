"""The runs of a study from W&B, by their tag."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from toolrl_ray.errors import MissingDependency, UserError
from toolrl_ray.sweep import State
from toolrl_ray.tracking.results import REWARD, RunResult, curve, is_number

TIMEOUT_S = 60
OF_A_RUN = ("seed.", "bootstrap.seed.", "run_dir.", "isolation.", "tracking.")  # what tells apart seeds and machines, not variants


def wandb_api() -> Any:
    try:
        import wandb
    except ImportError:
        raise MissingDependency("wandb is not installed (pip install wandb)") from None
    return wandb.Api(timeout=TIMEOUT_S)


def runs_by_tag(project: str, tag: str, metrics: Sequence[str]) -> list[RunResult]:
    """project: ENTITY/PROJECT. Of two runs of one variant and seed the one that is done counts, else the later one.

    Raises UserError when W&B cannot be read, or has no such run.
    """
    found: dict[tuple[str, int], tuple[dict[str, Any], RunResult]] = {}
    try:
        for run in wandb_api().runs(project, filters={"tags": {"$in": [tag]}}, order="+created_at"):
            variant = {key: value for key, value in _flat(run.config).items() if not f"{key}.".startswith(OF_A_RUN)}
            result = _read(run, [REWARD, *metrics])
            key = (json.dumps(variant, sort_keys=True), result.seed)
            if key not in found or found[key][1].state is not State.DONE or result.state is State.DONE:
                found[key] = (variant, result)
    except UserError:
        raise
    except Exception as error:  # whatever wandb raises: no login, no network, no such project
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--from-wandb={project!r}: W&B cannot be read ({reason}); give ENTITY/PROJECT, and log in (wandb login)") from None
    if not found:
        raise UserError(f"--from-wandb={project!r} has no run tagged {tag!r}; the tag of a study is the name of its folder")
    return _named(list(found.values()))


def _read(run: Any, metrics: Sequence[str]) -> RunResult:
    # Key by key: a scan of several keys leaves out the steps at which one of them has no value.
    curves = {metric: sorted(curve(list(run.scan_history(keys=["_step", metric])), metric, "_step")) for metric in dict.fromkeys(metrics)}
    summary = {name: run.summary.get(f"eval/{name}") for name in ("before/accuracy", "after/accuracy", "after/tool_use_rate")}
    done = run.state == "finished" and summary["after/accuracy"] is not None
    return RunResult(
        "",
        int(run.config.get("seed", 0)),
        State.DONE if done else State.RUNNING if run.state in ("running", "pending") else State.FAILED,
        curves,
        *summary.values(),
        time_s=run.summary.get("_runtime"),
        known=frozenset(name for name in run.summary.keys() if name[:1] != "_" and is_number(run.summary.get(name))),
    )


def _named(found: list[tuple[dict[str, Any], RunResult]]) -> list[RunResult]:
    """Each variant named by the settings in which the variants differ, or by the recipe where there is but one."""
    keys = sorted({key for variant, _ in found for key in variant})
    differing = [key for key in keys if len({json.dumps(variant.get(key), sort_keys=True) for variant, _ in found}) > 1]
    results = []
    for variant, result in found:
        label = ", ".join(f"{key.rpartition('.')[2]}={variant.get(key)}" for key in differing) or str(variant.get("recipe", "runs"))
        results.append(RunResult(**{**vars(result), "variant": label}))
    return sorted(results, key=lambda result: (result.variant, result.seed))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat
