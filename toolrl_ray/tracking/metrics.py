"""metrics.jsonl: one JSON object per step, named `stage/quantity[/reduction]`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolrl_ray.tracking import jsonl


class MetricsWriter:
    """Appends one object per step to RUN_DIR/metrics.jsonl and flushes it."""

    def __init__(self, run_dir: Path):
        self.path = Path(run_dir) / "metrics.jsonl"
        self._lines = jsonl.JsonLines(self.path)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """metrics: numbers (Python's, numpy's or one-element tensors), strings, booleans or None.

        JSON has no NaN and no infinity: such a value is written as null, and its key is listed under "nonfinite".
        """
        record: dict[str, Any] = {"step": step}
        nonfinite = []
        for key, value in metrics.items():
            plain = value.item() if hasattr(value, "item") else value
            if isinstance(plain, float) and not math.isfinite(plain):
                nonfinite.append(key)
                plain = None
            record[key] = plain
        if nonfinite:
            record["nonfinite"] = nonfinite
        self._lines.append([record])

    def sync(self) -> int:
        """The bytes of the file, which are on the device then."""
        return self._lines.sync()

    def close(self) -> None:
        self._lines.close()


def load_metrics(path: Path) -> list[dict[str, Any]]:
    return list(jsonl.read(Path(path)))
