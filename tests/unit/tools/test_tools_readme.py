"""What tools_service/README.md says in numbers and names is what the code says."""

from __future__ import annotations

import inspect
import re
from dataclasses import asdict
from pathlib import Path

import yaml

from tools_service import serve_app
from tools_service.config import HttpConfig, PoolConfig, parse
from tools_service.gateway import HTTP_IN_FLIGHT
from tools_service.http_guard import BODY_S, MAX_BODY_BYTES
from tools_service.runner import MAX_ARGUMENT_CHARS, MAX_OUTPUT_CHARS
from tools_service.sandbox.limits import Limits
from tools_service.sandbox.plan import TIERS
from tools_service.sandbox.seccomp import rules
from tools_service.search.options import WikiOptions

README = (Path(__file__).resolve().parents[3] / "tools_service" / "README.md").read_text()


def section(title: str) -> str:
    text = README.replace("\n# tools.yaml\n", "\n")  # the first line of an example, not a heading
    [found] = re.findall(rf"^#+ {title}.*?\n(.*?)(?=^#+ |\Z)", text, re.DOTALL | re.MULTILINE)
    return found


def names_in_first_column(title: str) -> list[str]:
    return [name for cell in re.findall(r"^\| (`.+?) \|", section(title), re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)]


def test_the_table_of_limits_has_every_limit_with_its_default() -> None:
    table = {name: float(default) for name, default in re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", section("Limits"), re.MULTILINE)}
    assert table == asdict(Limits())


def test_the_table_of_isolations_has_every_isolation_best_first() -> None:
    assert names_in_first_column("Isolation") == [name for name in TIERS if name != "none"]


def test_the_number_of_system_calls_is_about_right() -> None:
    [number] = re.findall(r"about (\d+) system calls", README)
    refused = {435, 324, 89, 267}  # answered with another error than the rest
    assert abs(len(set(rules(True, True, 64)) - refused) - int(number)) <= 5


def test_the_tables_of_search_and_pools_have_every_option_and_field() -> None:
    recall = {"title_match", "concise"}  # stand in the table of recall once more
    options = set(inspect.signature(WikiOptions).parameters) - {"name"}
    assert sorted(names_in_first_column("Search")) == sorted([*options, *recall])
    assert sorted(names_in_first_column("Pools")) == sorted(PoolConfig.model_fields)


def test_the_defaults_of_the_pools_are_the_codes() -> None:
    defaults = {"upscale_delay_s": 5, "downscale_delay_s": 60, "max_in_flight": 64, "max_queued": 4096, "drain_s": 30}
    assert {name: getattr(PoolConfig(), name) for name in defaults} == defaults
    text = section("Pools")
    assert "| `upscale_delay_s`, `downscale_delay_s` | 5, 60 |" in text
    assert all(f"| `{name}` | {defaults[name]} |" in text for name in ("max_in_flight", "max_queued", "drain_s"))
    assert f"{HttpConfig().host}:{HttpConfig().port}" in section("HTTP and MCP")


def test_the_bounds_of_the_http_face_are_the_codes() -> None:
    text = " ".join(README.split())
    assert f"Of requests {HTTP_IN_FLIGHT} run at once and {serve_app.HTTP_QUEUED} wait" in text and f"those {HTTP_IN_FLIGHT} (" in text
    assert f"A body has {MAX_BODY_BYTES} bytes at most (413) and arrives within {BODY_S:g} s (408)" in text
    assert f"An argument has {MAX_ARGUMENT_CHARS} characters at most" in text and f"of a tool's answer {MAX_OUTPUT_CHARS} are kept" in text
    [length] = re.findall(r"RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH=(\d+)", README)
    assert serve_app.SERVE_ENV["RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"] == length


def test_the_example_of_a_services_file_is_one() -> None:
    [example] = re.findall(r"```yaml\n# tools.yaml\n(.*?)```", README, re.DOTALL)
    config = parse(yaml.safe_load(example), "tools.yaml")
    assert config.pool("PythonInterpreter").most_replicas == 8 and config.options["Wiki"]["index"] == "my-index"
