"""`toolrl sweep`: a study of many seeds and of variants. Planned in sweep.py, run in sweep_runs.py, told and drawn in tracking/."""

from __future__ import annotations

import argparse
import difflib
import math
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from toolrl_ray.errors import UserError

METRICS = ("env/reward_mean", "objective/kl")
MAX_SEEDS = 10_000
NOTHING = "give a RECIPE and --seeds N, or a study to go on with: --resume DIR, to draw: --plot DIR, or --from-wandb and --tag"
DONE = "every run is done: nothing to submit"
Say = Callable[[str], None]


def add_commands(command: Callable[..., argparse.ArgumentParser], say: Say) -> None:
    """command(name, run, text) adds a subcommand."""
    sub = command("sweep", partial(run_sweep, say=say), "Run a study: seeds of a recipe and of its variants, with plot and table.")
    sub.add_argument("recipe", nargs="?", metavar="RECIPE", help="name of a recipe, or a path to a .yaml file")
    sub.add_argument("overrides", nargs="*", default=[], metavar="key.path=v1,v2", help="for every run; several values: a variant each")
    sub.add_argument("--seeds", type=_seeds, metavar="N", help="the seeds 0 to N-1, or these: 3,5,8")
    sub.add_argument("--dir", metavar="DIR", help="of the study, default sweeps/RECIPE-TIME; the same command again runs what is missing")
    sub.add_argument("--resume", metavar="DIR", help="run what is missing or has failed in that study")
    sub.add_argument("--jobs", type=_positive, metavar="N", help="runs at once; default: as many as fit in this machine or cluster")
    sub.add_argument("--address", help="of a Ray dashboard: run as Ray jobs there; DIR must be at the same path on this machine and there")
    sub.add_argument("--slurm", action="store_true", help="write an array script, DIR/sweep.sbatch, and run nothing")
    sub.add_argument("--run-one", nargs=2, metavar=("DIR", "INDEX"), help="run one run of a study: a task of that array")
    sub.add_argument("--plot", metavar="DIR", help="draw the study as far as it is")
    sub.add_argument("--metric", action="append", metavar="NAME", help=f"to draw, may be repeated; default: {' and '.join(METRICS)}")
    sub.add_argument("--from-wandb", metavar="ENTITY/PROJECT", help="draw runs of W&B, those with --tag, into --dir")
    sub.add_argument("--tag", metavar="TAG", help="of the runs on W&B; a study tags its runs with its folder's name")


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a list such as 3,5,8") from None
    if "," not in text and seeds:
        if seeds[0] > MAX_SEEDS:
            raise argparse.ArgumentTypeError(f"{text!r} is more than {MAX_SEEDS} seeds")
        seeds = list(range(seeds[0]))
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} must name at least one seed, none negative and none twice")
    return seeds


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def run_sweep(options: argparse.Namespace, say: Say) -> int:
    from toolrl_ray import sweep

    metrics = options.metric or list(METRICS)
    if options.from_wandb or options.tag:
        return _draw_wandb(options, metrics)
    begun = [value for value in (options.resume, options.plot, options.run_one and options.run_one[0]) if value]
    if len(begun) + bool(options.recipe) != 1:
        raise UserError(NOTHING)
    if begun and (options.seeds or options.dir):
        raise UserError(f"{begun[0]} has its seeds and its folder: take --seeds and --dir away, or start another study with a RECIPE")
    if options.slurm and options.address:
        raise UserError(f"--slurm contradicts --address={options.address!r}: the array's tasks start a Ray each; take one of them away")
    if options.recipe:
        if not options.seeds:
            raise UserError(f"how many seeds of {options.recipe!r}? Give --seeds N")
        study = sweep.make_study(options.recipe, options.overrides, options.seeds)
        folder = Path(options.dir or "sweeps").expanduser().absolute()
        sweep.plan(study, folder)  # what the recipe refuses fails here, with no folder made
        folder = folder if options.dir else sweep.default_folder(options.recipe).absolute()
        study = sweep.claim(study, folder)
    else:
        folder = Path(begun[0]).expanduser().absolute()
        study = sweep.open_study(folder)
    runs = sweep.plan(study, folder)
    if options.plot:
        return _report(folder, runs, metrics)
    sweep.check_recipe(study, folder)
    if options.run_one:
        return _run_one(options.run_one[1], study, folder, runs, say)
    say(f"study {folder}: {len(runs)} runs, seeds {', '.join(map(str, study.seeds))}" + _grid(study))
    if options.slurm:
        return _write_slurm(folder, study, runs, say)
    return _run(options, study, folder, runs, metrics, say)


def _grid(study: Any) -> str:
    return "".join(f", {key}={','.join(texts)}" for key, texts in study.grid.items())


def _run(options: argparse.Namespace, study: Any, folder: Path, runs: list[Any], metrics: list[str], say: Say) -> int:
    from toolrl_ray import sweep_runs

    todo = sweep_runs.todo(folder, runs, say)
    if len(todo) < len(runs):
        say(f"{len(runs) - len(todo)} of {len(runs)} runs need nothing")
    if todo:
        start, jobs = _cluster(options, study, folder, runs) if options.address else _machine(options, study, folder, runs)
        where = f"as Ray jobs of {options.address}" if options.address else "each a process of this machine"
        say(f"{min(jobs, len(todo))} at once, {where}")
        try:
            sweep_runs.run_all(todo, start, jobs, say, folder)
        except BaseException:
            given = [*(["--address", options.address] if options.address else []), *(f"--metric={name}" for name in options.metric or [])]
            say(f"stopped; to go on: {shlex.join(['toolrl', 'sweep', '--resume', str(folder), *given])}")
            raise
    return _report(folder, runs, metrics)


def _check_cwd(study: Any, folder: Path) -> None:
    """Raises UserError where the runs have no folder to begin in."""
    if not Path(study.cwd).is_dir():
        remedy = f'bring it back, or put the folder that took its place as "cwd" into {folder / "study.json"}'
        raise UserError(f"the study in {str(folder)!r} began in the folder {study.cwd!r}, which is gone: {remedy}")


def _machine(options: argparse.Namespace, study: Any, folder: Path, runs: list[Any]) -> tuple[Any, int]:
    """How a run is started here, and how many at once. With RAY_ADDRESS set, the runs work on that cluster."""
    from toolrl_ray import sweep_runs
    from toolrl_ray.local_ray import cluster_address
    from toolrl_ray.placement import plan

    _check_cwd(study, folder)
    config = _largest(runs)
    if address := cluster_address():
        from toolrl_ray.submit import cluster_nodes

        nodes, gpus = (cluster_nodes(address) if options.jobs is None else []), []
    else:
        nodes, gpus = sweep_runs.this_machine()
    gpus_per_run = math.ceil(sum(share.count * share.num_gpus for share in plan(config)))
    jobs = options.jobs or sweep_runs.how_many(plan(config), nodes)
    if not options.jobs and gpus and gpus_per_run:
        jobs = max(1, min(jobs, len(gpus) // gpus_per_run))  # each run has whole GPUs, also where it needs a part of one
    if gpus and jobs * gpus_per_run > len(gpus):
        raise UserError(f"--jobs={jobs} with {gpus_per_run} GPUs a run needs more than the {len(gpus)} of this machine; give fewer --jobs")
    return sweep_runs.local_start(folder, study.recipe, study.cwd, gpus if jobs > 1 else [], gpus_per_run), jobs


def _cluster(options: argparse.Namespace, study: Any, folder: Path, runs: list[Any]) -> tuple[Any, int]:
    from toolrl_ray import sweep_runs
    from toolrl_ray.placement import plan
    from toolrl_ray.submit import cluster_nodes, job_client, submit_train

    client, address = job_client(options.address)
    jobs = options.jobs or sweep_runs.how_many(plan(_largest(runs)), cluster_nodes(address))
    return sweep_runs.job_start(folder, study.recipe, client, partial(submit_train, client, address, cwd=study.cwd)), jobs


def _largest(runs: list[Any]) -> Any:
    """The configuration of the run that needs most, GPUs first."""
    from toolrl_ray.placement import plan

    def need(run: Any) -> tuple[float, float]:
        shares = plan(run.config)
        return sum(s.count * s.num_gpus for s in shares), sum(s.count * s.num_cpus for s in shares)

    return max(runs, key=need).config


def _run_one(index: str, study: Any, folder: Path, runs: list[Any], say: Say) -> int:
    from toolrl_ray import sweep, sweep_runs

    if not index.isdigit() or int(index) >= len(runs):
        raise UserError(f"--run-one: INDEX {index!r} is not one of the study's runs, 0 to {len(runs) - 1}")
    run = runs[int(index)]
    if sweep.state(folder, run) is sweep.State.DONE:
        say(f"{run.name}: done before")
        return 0
    _check_cwd(study, folder)
    start = sweep_runs.local_start(folder, study.recipe, study.cwd, [], 0)
    sweep_runs.run_all([run], start, 1, say, folder)
    return int(sweep.state(folder, run) is not sweep.State.DONE)


def _write_slurm(folder: Path, study: Any, runs: list[Any], say: Say) -> int:
    from toolrl_ray import sweep, sweep_runs
    from toolrl_ray.placement import plan

    todo = sweep_runs.todo(folder, runs, say)
    if not todo:
        under_way = [run.name for run in runs if sweep.state(folder, run) is sweep.State.RUNNING]
        say(f"nothing to submit: under way {', '.join(under_way)}; every other run is done" if under_way else DONE)
        return 0
    _check_cwd(study, folder)
    shares = plan(_largest(todo))
    num_gpus = math.ceil(sum(share.count * share.num_gpus for share in shares))
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={shlex.quote('_'.join(folder.name.split()))}",
        f"#SBATCH --array={','.join(str(run.index) for run in todo)}",
        "#SBATCH --nodes=1 --ntasks=1",
        f"#SBATCH --cpus-per-task={math.ceil(sum(share.count * share.num_cpus for share in shares))}",
        *([f"#SBATCH --gpus={num_gpus}"] if num_gpus else []),
        f"#SBATCH --output={shlex.quote(str(folder).replace('%', '%%') + '/slurm-%a.out')}",  # a lone % stands for a number of the job
        "#SBATCH --signal=B:TERM@90",  # before the time limit: time to take the run's parts down
        "# Partition, account and time limit of your cluster: add them above, or give them to sbatch.",
        "unset RAY_ADDRESS  # every task starts a Ray of its own",
        f"cd {shlex.quote(study.cwd)} || exit 1",
        f'exec {shlex.join([sys.executable, "-m", "toolrl_ray.cli", "sweep", "--run-one", str(folder)])} "$SLURM_ARRAY_TASK_ID"',
    ]
    script = folder / "sweep.sbatch"
    script.write_text("\n".join(lines) + "\n")
    say(f"{len(todo)} runs; submit: sbatch {shlex.quote(str(script))}; then draw: toolrl sweep --plot {shlex.quote(str(folder))}")
    return 0


def _draw_wandb(options: argparse.Namespace, metrics: list[str]) -> int:
    if not (options.from_wandb and options.tag) or options.recipe or options.resume or options.plot or options.run_one:
        raise UserError("--from-wandb ENTITY/PROJECT goes with --tag TAG, and with --dir and --metric alone")
    from toolrl_ray.tracking.wandb_read import runs_by_tag

    results = runs_by_tag(options.from_wandb, options.tag, metrics)
    folder = Path(options.dir or f"sweeps/{options.tag}").expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--dir={str(folder)!r} cannot be made ({error.strerror}); choose another folder") from None
    return _write(results, folder, metrics)


def _report(folder: Path, runs: list[Any], metrics: list[str]) -> int:
    from toolrl_ray.tracking.results import read_run

    return _write([read_run(folder, run, metrics) for run in runs], folder, metrics)


def _write(results: list[Any], folder: Path, metrics: list[str]) -> int:
    """Draws and prints; 1 where a run is not done."""
    from toolrl_ray.sweep import State
    from toolrl_ray.tracking.plots import draw
    from toolrl_ray.tracking.results import markdown, table_csv

    _check_metrics(results, metrics)
    text = markdown(results)
    (folder / "table.md").write_text(text)
    (folder / "table.csv").write_text(table_csv(results))
    paths = draw(results, metrics, folder.name, folder)
    print(f"\n{text}\n" + "  ".join(str(path) for path in [*paths, folder / "table.md", folder / "table.csv"]), flush=True)
    return int(any(result.state is not State.DONE for result in results))


def _check_metrics(results: list[Any], metrics: list[str]) -> None:
    """Raises UserError for one that no run has, whose empty panel would replace a good picture. Those drawn by default may be missing."""
    known = sorted(set().union(*(result.known for result in results)))
    for metric in metrics if metrics != list(METRICS) else []:
        if known and not any(result.curves.get(metric) for result in results):
            near = difflib.get_close_matches(metric, known, n=8, cutoff=0)
            more = f" and {len(known) - len(near)} more" if len(known) > len(near) else ""
            raise UserError(f"--metric={metric!r} is measured in none of the runs; choose one of {', '.join(near)}{more}")
