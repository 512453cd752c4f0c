"""The `toolrl` command. Heavy imports stay inside the commands, so that `--help` and a wrong key answer at once."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from toolrl_ray import cli_output, eval_cli, sweep_cli, tools_cli
from toolrl_ray.cli_parser import EXIT_USER, Parser, Version
from toolrl_ray.errors import MissingDependency, PlacementError, ToolRLError, UserError

EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PIPE, EXIT_TERMINATED = 1, 130, 141, 143
GONE = {errno.EPIPE: EXIT_PIPE, errno.EIO: EXIT_TERMINATED}  # of a pipe that nobody reads, of a terminal that was closed
REFUSALS = (errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE)  # of a file: the machine is wrong, not this code


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP arrived: unwind as for Ctrl-C, so that nothing stays behind. Of its kind, so that no tool's call that it meets
    takes it for an error of the tool. Where it meets a wait of Ray's, Ray raises a plain KeyboardInterrupt: hence `arrived`."""

    arrived = False


def say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command. A reader of its output who has had enough ends it quietly, and a disk that is full or gone in one line."""
    try:
        try:
            code = _run(arguments)
        except SystemExit:  # of argparse, which may have printed help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # python itself does it too late to say in one line what goes wrong
        return code
    except OSError as error:
        if error.errno in GONE and cli_output.reader_has_gone():
            code = GONE[error.errno]
        elif error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno in REFUSALS and error.filename):
            code = _end(f"{error.strerror}{f': {error.filename!r}' if error.filename else ''}", EXIT_ERROR, error)
        else:
            raise
        cli_output.drop()
        return code


def _run(arguments: list[str] | None) -> int:
    options = _parse(arguments)
    try:
        os.getcwd()
    except OSError as error:
        return _end(f"the working folder cannot be used ({error.strerror}); change to another one", EXIT_USER, error)
    Terminated.arrived = False
    signal.signal(signal.SIGTERM, _on_sigterm)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # by nohup
        signal.signal(signal.SIGHUP, _on_sigterm)
    # To save a model, transformers imports DeepSpeed, which tells stdout where it finds no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        return options.run(options)
    except UserError as error:
        return _end(" ".join(str(error).splitlines()), EXIT_USER, error)
    except ModuleNotFoundError as error:
        from toolrl_ray import preflight

        package = (error.name or "").partition(".")[0]
        if package not in preflight.STACK:
            raise
        return _end(str(preflight.not_installed(package)), EXIT_USER, error)
    except ToolRLError as error:
        if options.verbose:
            raise
        return _end(f"{type(error).__name__}: {error}", EXIT_ERROR, error)
    except KeyboardInterrupt as error:
        return _end("terminated", EXIT_TERMINATED, error) if Terminated.arrived else _end("interrupted", EXIT_INTERRUPTED, error)


def _end(message: str, code: int, error: BaseException) -> int:
    """error: its notes come last, as they do in a traceback."""
    for line in [message, *getattr(error, "__notes__", [])]:
        print(f"toolrl: {line}", file=sys.stderr)
    return code


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)  # argparse itself gives up on overrides behind an option
    if getattr(options, "argument", "") is None:  # it also gives up on a tool's input like -3*4, and on one behind an option
        if (len(rest) == 1 and not rest[0].startswith("--")) or (len(rest) == 2 and rest[0] == "--"):
            options.argument, rest = rest[-1], []
    unknown = [text for text in rest if text.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides += rest
    return options


def _on_sigterm(signum: int, frame: Any) -> None:
    Terminated.arrived = True
    if signum == signal.SIGHUP:
        signal.signal(signum, signal.SIG_IGN)  # a terminal that closes sends it twice: the shell's, and the kernel's after that
    raise Terminated


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="toolrl", description="Teach language models to use tools by reinforcement learning.")
    parser.add_argument("--version", action=Version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def group(name: str, text: str) -> Any:
        return commands.add_parser(name, help=text, description=text).add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, *, recipe: bool = True, into: Any = commands) -> argparse.ArgumentParser:
        sub = into.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--verbose", action="store_true", help="show the logs of all processes, and tracebacks")
        if recipe:
            sub.add_argument("recipe", help="name of a recipe, or a path to a .yaml file")
            sub.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help="for example train.num_steps=10")
        return sub

    def training(name: str, run: Any, text: str, flags: str) -> argparse.ArgumentParser:
        sub = command(name, run, text, recipe=False)
        sub.usage = f"toolrl {name} {flags} [--verbose] (RECIPE | --resume RUN_DIR) [key.path=value ...]"
        words = "name of a recipe, or a path to a .yaml file; then overrides, for example train.num_steps=10"
        sub.add_argument("overrides", nargs="*", default=[], metavar="RECIPE", help=words)  # which comes first: see _take_recipe
        sub.add_argument("--resume", metavar="RUN_DIR", help="go on from the newest checkpoint of that run")
        return sub

    train = training("train", _train, "Train a policy by a recipe, or go on with a run that was interrupted.", "[--in-process]")
    train.add_argument("--in-process", action="store_true", help="no Ray, one process: for debugging")
    eval_cli.add_command(command)
    command("bootstrap", _bootstrap, "Make and warm-start the tiny policy of a recipe; prints its folder.")
    submit = training("submit", _submit, "Submit `toolrl train` as a Ray job.", "[--address URL] [--no-wait]")
    submit.add_argument("--address", help="of the Ray dashboard, default: RAY_ADDRESS or http://127.0.0.1:8265")
    submit.add_argument("--no-wait", action="store_true", help="do not follow the job's output")
    tools_cli.add_commands(partial(command, recipe=False), group)
    sweep_cli.add_commands(partial(command, recipe=False), say)
    command("doctor", _doctor, "Show what this machine can run, and how to close each gap.", recipe=False).set_defaults(recipe=None)
    return parser


def load(options: argparse.Namespace) -> Any:
    """The configuration of the recipe and overrides of the command line."""
    from toolrl_ray import recipe

    return recipe.load(options.recipe, options.overrides)


def _policy_dir(config: Any, say: Any = say) -> str:
    """The policy's folder or Hub name; makes the tiny policy when the recipe asks for it."""
    if config.policy.path != "tiny":
        from toolrl_ray.pretrained import load_config

        load_config(config.policy.path)
        return config.policy.path
    from toolrl_ray.bootstrap.build import ensure_tiny_policy

    return str(ensure_tiny_policy(config, say))


def with_parts(config: Any, options: argparse.Namespace, learner: bool, use: Any) -> Any:
    """Run `use(parts, policy_dir)` on Ray or in this process, and take everything down afterwards, whatever happens."""
    from toolrl_ray import generated_index, preflight

    preflight.check(config, in_process=options.in_process, learner=learner)
    config = generated_index.resolved(config, say)
    if options.in_process:
        from toolrl_ray.in_process import in_process_parts

        policy_dir = _policy_dir(config)
        parts = in_process_parts(config, policy_dir, learner=learner)
        try:
            return use(parts, policy_dir)
        finally:
            parts.close()
    from toolrl_ray import cluster

    try:
        cluster.connect(config, say, learner=learner, verbose=options.verbose)
        policy_dir = _policy_dir(config)
        parts = cluster.ray_parts(config, policy_dir, say, learner=learner)
        try:
            return use(parts, policy_dir)
        finally:
            parts.close()
    finally:
        cluster.disconnect()


def _train(options: argparse.Namespace) -> int:
    from toolrl_ray import run_dir as run_dirs

    config, run_dir = _run_folder(options)
    runs = []

    def use(parts: Any, policy_dir: str) -> dict[str, Any]:
        from toolrl_ray.driver import Run

        runs.append(Run(config, run_dir, policy_dir, say, resume=bool(options.resume)))
        return runs[0].train(parts)

    try:
        say(f"recipe {config.recipe}, seed {config.seed}, run folder {run_dir}")
        try:
            summary = with_parts(config, options, True, use)
        finally:
            for run in runs:
                run.close_tracker()  # after the parts: it may wait for a network
    except BaseException as error:
        if not options.resume:
            run_dirs.release(run_dir)
        refused = options.resume and isinstance(error, UserError) and not isinstance(error, (PlacementError, MissingDependency))
        if not refused and (how := _how_to_go_on(run_dir, options)):
            error.add_note(how)
        raise
    finally:
        run_dirs.unlock(run_dir)
    from toolrl_ray.tracking.summary import render

    print(f"\n{render(summary)}", flush=True)
    return 0


def _take_recipe(options: argparse.Namespace) -> None:
    """Sets options.recipe, which stands before the overrides, or not at all where a run goes on. Raises UserError."""
    if options.resume:
        if options.overrides and "=" not in options.overrides[0]:
            raise UserError(f"RECIPE={options.overrides[0]!r} contradicts --resume: a run goes on with its own recipe; give one of them")
    elif options.overrides:
        options.recipe, *options.overrides = options.overrides
    else:
        raise UserError(f"a recipe is missing, or --resume RUN_DIR; see toolrl {options.run.__name__.strip('_')} --help")


def _run_folder(options: argparse.Namespace) -> tuple[Any, Path]:
    """The configuration and the folder of a run, a new one or one that goes on."""
    from toolrl_ray import run_dir as run_dirs

    _take_recipe(options)
    if options.resume:
        config = run_dirs.reopen(Path(options.resume), options.overrides)
        return config, Path(config.run_dir)
    config = load(options)
    run_dir = run_dirs.claim(config)
    return config.model_copy(update={"run_dir": str(run_dir)}), run_dir


def _how_to_go_on(run_dir: Path, options: argparse.Namespace) -> str:
    """For a person whose run ended early; "" where there is nothing to go on from."""
    from toolrl_ray import run_dir as run_dirs
    from toolrl_ray.checkpoint import committed_steps

    steps = committed_steps(run_dir)
    if not steps or run_dirs.finished(run_dir):
        return ""
    in_process = "--in-process " if options.in_process else ""
    return f"to go on from step {steps[-1]}: toolrl train {in_process}--resume {shlex.quote(str(run_dir))}"


def _bootstrap(options: argparse.Namespace) -> int:
    config = load(options)
    if config.policy.path != "tiny":
        raise UserError(f"policy.path={config.policy.path!r} needs no bootstrap; only policy.path=tiny is made here")
    print(_policy_dir(config, partial(print, file=sys.stderr, flush=True)))  # stdout has the folder alone: for $(toolrl bootstrap ...)
    return 0


def _submit(options: argparse.Namespace) -> int:
    _take_recipe(options)
    if not options.resume:
        load(options)  # a wrong recipe or key fails here, not on the cluster; a run's folder may be there alone
    from toolrl_ray.submit import submit

    what = ["--resume", str(Path(options.resume).absolute())] if options.resume else [options.recipe]
    return submit(options.address, [*what, *options.overrides], wait=not options.no_wait, say=say)


def _doctor(options: argparse.Namespace) -> int:
    from toolrl_ray import doctor

    checks = doctor.report()
    print(doctor.render(checks))
    return doctor.exit_code(checks)


if __name__ == "__main__":
    sys.exit(main())
