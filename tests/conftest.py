"""What every test shares: no network, no usage reports, and where real data lie (`TOOLRL_DATA`, or ../shared/data)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import hypothesis
import pytest

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

T = TypeVar("T")

hypothesis.settings.register_profile("toolrl", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("toolrl")

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(name, value)

# What a command begins with that is to hear Ctrl-C: a shell's background job starts with it ignored, and passes that on. No preexec_fn, for
# which a process with a JVM and the threads of gRPC would fork: the child may abort.
HEARS_CTRL_C = ("env", "--default-signal=INT")
NO_GPU = "no NVIDIA GPU here that .venv's torch can use; runs where torch.cuda.is_available()"


def ray_cluster(**head: Any) -> Cluster:
    """Ray's Cluster with a head node."""
    from ray.cluster_utils import Cluster

    return _tried_again(lambda: Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **head}))


def ray_node(cluster: Cluster, **node: Any) -> Any:
    """One more node of it."""
    return _tried_again(lambda: cluster.add_node(**node))


def _tried_again(start: Callable[[], T]) -> T:
    """Ray forks with a preexec_fn, and where this process has threads in gRPC by then the child may abort before it is Ray's; `ray.init`
    has toolrl_ray.local_ray for that."""
    for left in (2, 1, 0):
        try:
            return start()
        except Exception:  # of no class of its own
            if not left:
                raise
    raise AssertionError("the last try returns or raises")


def data_dir() -> Path | None:
    """The folder with real data (gsm8k/, tokenizers/), or None where there is none: tests pass without it."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TOOLRL_DATA") or default)
    return folder if folder.is_dir() else None


def data_file(*parts: str) -> Path | None:
    """A file of the real data, or None where it is missing."""
    folder = data_dir()
    path = folder.joinpath(*parts) if folder else None
    return path if path and path.exists() else None


@pytest.fixture(scope="session")
def gsm8k_calculator() -> Path:
    """JSON lines with `expr`, `result`, `split`: the expressions annotated in GSM8K."""
    path = data_file("gsm8k", "calculator.jsonl")
    if path is None:
        pytest.skip("no gsm8k/calculator.jsonl; set TOOLRL_DATA to the folder that holds it")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("java") is not None)
    for_gpus = [item for item in items if item.path.is_relative_to(Path(__file__).parent / "gpu")]
    if not for_gpus:
        return
    import torch

    for item in for_gpus:
        item.add_marker(pytest.mark.gpu)
        item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU))
