"""The learner's state in a folder: all that the next update depends on, besides the configuration and the initial policy.

    model.safetensors      float32 weights of everything trained, by their names in `PolicyWithValue`, and the persistent buffers
    optimizer.safetensors  AdamW's moments of the same, float32: NAME.exp_avg, NAME.exp_avg_sq
    learner.json           counters, and the KL controller's state
    rng-RANK.json          random number generators of that rank's process

Tensors are whole, so nothing of the number of ranks, the ZeRO stage or the engine shows in the first three; a rank that has no
rng file goes on with the generators that it has. What LoRA freezes comes from the initial policy and is not saved.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from toolrl_ray.errors import LearnerError
from toolrl_ray.learner.engine import MOMENTS, WEIGHT, tensor_metadata, trained_parameters
from toolrl_ray.pretrained import share_weights

if TYPE_CHECKING:
    from toolrl_ray.learner.update import Learner

MODEL, OPTIMIZER, LEARNER = "model.safetensors", "optimizer.safetensors", "learner.json"
COUNTS = ("policy_version", "num_updates", "num_steps", "adam_step")
Files = dict[str, str | dict[str, Tensor]]  # name: text, or the tensors of a safetensors file


def snapshot(learner: Learner) -> Files:
    """This rank's files, of copies in CPU memory: rank 0 has all but the other ranks' generators, three times the trained weights in
    float32. A collective."""
    engine = learner.engine
    tensors: dict[str, dict[str, Tensor]] = {MODEL: {}, OPTIMIZER: {}}
    for kind, name, tensor in engine.state():
        if learner.rank == 0:
            file, key = _place(kind, name)
            tensors[file][key] = _copy(tensor.float())
    files: Files = {f"rng-{learner.rank}.json": json.dumps(_rng_states(engine.device), default=np.ndarray.tolist)}
    if learner.rank == 0:
        tensors[MODEL] |= {name: _copy(buffer) for name, buffer in _buffers(engine.module).items()}
        counts = learner.policy_version, learner.num_updates, engine.num_steps, engine.adam_step()
        numbers = dict(zip(COUNTS, counts, strict=True)) | {"kl_controller": learner.kl_controller.state_dict()}
        files |= {**tensors, LEARNER: json.dumps(numbers, indent=1) + "\n"}
    return files


class StateWriter:
    """Writes one rank's snapshots, one after the other, in a thread of its own."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def start(self, directory: str, files: Files) -> None:
        self.finish()
        self._writing = self._thread.submit(_write, Path(directory), files)

    def finish(self) -> None:
        """Raises LearnerError, once, when what was started last could not be written, or is not within timeout_s."""
        writing, self._writing = self._writing, None
        if writing and not wait([writing], self._timeout_s).done:
            raise LearnerError(f"the learner's checkpoint was not written within {self._timeout_s:g} s (learner.update_timeout_s)")
        if writing:
            writing.result(timeout=0)


def restore(learner: Learner, directory: str) -> None:
    """The learner as it was at `snapshot`. A collective; raises LearnerError before anything has changed."""
    folder, engine = Path(directory), learner.engine
    with _reading(folder / LEARNER):
        numbers = json.loads((folder / LEARNER).read_text())
        counts = {key: int(numbers[key]) for key in COUNTS}
        kl_state = {key: float(value) for key, value in numbers["kl_controller"].items()}
    rng = folder / f"rng-{learner.rank}.json"
    with _reading(rng):
        rng_states = json.loads(rng.read_text()) if rng.exists() else None
    with ExitStack() as stack:
        files = {}
        for name in (MODEL, OPTIMIZER):
            with _reading(folder / name):
                files[name] = stack.enter_context(safe_open(folder / name, framework="pt"))
        for name, shapes in _shapes(engine.module).items():
            _check(folder / name, files[name], shapes)

        def read(kind: str, name: str) -> Tensor:
            file, key = _place(kind, name)
            return files[file].get_tensor(key)

        engine.load_state(read, counts["num_steps"], counts["adam_step"])
        for name, buffer in _buffers(engine.module).items():
            buffer.copy_(read(WEIGHT, name))
    learner.policy_version, learner.num_updates = counts["policy_version"], counts["num_updates"]
    learner.kl_controller.load_state_dict(kl_state)
    if rng_states:
        with _reading(rng):
            _set_rng_states(rng_states, engine.device)


def _place(kind: str, name: str) -> tuple[str, str]:
    return (MODEL, name) if kind == WEIGHT else (OPTIMIZER, f"{name}.{kind}")


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if not isinstance(tensor, nn.Parameter)}


def _shapes(module: nn.Module) -> dict[str, dict[str, tuple[int, ...]]]:
    """{file: {key: full shape}} of a checkpoint of this module."""
    trained = {name: tensor_metadata(name, p)[1] for name, p in trained_parameters(module)}
    buffers = {name: tuple(buffer.shape) for name, buffer in _buffers(module).items()}
    moments = {_place(kind, name)[1]: shape for name, shape in trained.items() for kind in MOMENTS}
    return {MODEL: trained | buffers, OPTIMIZER: moments}


def _check(path: Path, file: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    for key in [*shapes, *sorted(found.keys() - shapes.keys())]:
        if found.get(key) != shapes.get(key):
            there, here = (f"shape {list(where[key])}" if key in where else "none" for where in (found, shapes))
            raise LearnerError(
                f"{path} is of another model: {key} has {there} there and {here} in this one; "
                "go on with the policy and the settings (policy.*, algo.*) that the checkpoint was saved with"
            )


def _write(folder: Path, files: Files) -> None:
    for name, content in files.items():
        try:
            if isinstance(content, str):
                (folder / name).write_text(content)
            else:
                save_file(content, folder / name, metadata={"format": "pt"})
                share_weights(folder)
        except (OSError, SafetensorError) as error:
            raise LearnerError(
                f"{folder / name} could not be written ({type(error).__name__}: {error}); "
                "the run folder must be there for every learner rank, and have room"
            ) from None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LearnerError(f"{path} cannot be read ({type(error).__name__}: {reason}); go on from another checkpoint") from None


def _rng_states(device: torch.device) -> dict[str, Any]:
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes().hex()
    return states


def _set_rng_states(states: dict[str, Any], device: torch.device) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(states["numpy"])
    torch.set_rng_state(_bytes(states["torch"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(_bytes(states["cuda"]), device)


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
