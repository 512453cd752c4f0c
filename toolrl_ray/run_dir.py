"""The run folder: one run's alone, from its first moment."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from toolrl_ray.config import RunConfig
from toolrl_ray.errors import UserError
from toolrl_ray.recipe import dump


def claim(config: RunConfig) -> Path:
    """Make the folder run_dir (default runs/RECIPE-TIME) with its config.yaml. Of two runs that want the same one, one gets it.

    Raises UserError when it holds anything, or cannot be made.
    """
    run_dir = Path(config.run_dir or f"runs/{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}").expanduser().absolute()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if any(run_dir.iterdir()):
            raise FileExistsError
        with (run_dir / "config.yaml").open("x") as file:  # exclusive: this is what claims it
            file.write(dump(config))
    except FileExistsError:
        raise UserError(f"run_dir={str(run_dir)!r} exists and is not empty; choose another folder (run_dir=...) or remove it") from None
    except OSError as error:
        raise UserError(f"run_dir={str(run_dir)!r} cannot be made ({error.strerror}); choose another folder (run_dir=...)") from None
    return run_dir


def release(run_dir: Path) -> None:
    """Remove the folder of a run that ended before its first step, so that the same command can be given again."""
    metrics = run_dir / "metrics.jsonl"
    trained = metrics.exists() and metrics.stat().st_size > 0
    if not trained and not (run_dir / "policy").exists():
        shutil.rmtree(run_dir, ignore_errors=True)
