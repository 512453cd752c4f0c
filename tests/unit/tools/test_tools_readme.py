"""What tools_service/README.md says in numbers is what the code says."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

from tools_service.sandbox.limits import Limits
from tools_service.sandbox.plan import TIERS
from tools_service.sandbox.seccomp import rules

README = (Path(__file__).resolve().parents[3] / "tools_service" / "README.md").read_text()


def test_the_table_of_limits_has_every_limit_with_its_default() -> None:
    table = {name: float(default) for name, default in re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", README, re.MULTILINE)}
    assert table == asdict(Limits())


def test_the_table_of_isolations_has_every_isolation_best_first() -> None:
    named = re.findall(r"^\| `(\w+)` \| [^\d]", README, re.MULTILINE)
    assert named == [name for name in TIERS if name != "none"]


def test_the_number_of_system_calls_is_about_right() -> None:
    [number] = re.findall(r"about (\d+) system calls", README)
    refused = {435, 324, 89, 267}  # answered with another error than the rest
    assert abs(len(set(rules(True, True, 64)) - refused) - int(number)) <= 5
