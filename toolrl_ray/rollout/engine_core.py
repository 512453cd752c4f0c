"""vLLM's engine-core process, which samples: it ends with the process that started it, and leaves word of why it died.

vLLM loads this module in each of its processes through the `vllm.general_plugins` entry point. A dying engine core sends its owner
nothing but the fact, and an engine that does not start says no more than that; the reason is in its log alone.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import tempfile
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolrl_ray.config import RunConfig

OWNER = "TOOLRL_ENGINE_OWNER"  # process id of the process that starts engine cores
LAST_WORDS = "TOOLRL_ENGINE_LAST_WORDS"  # where they write why they die
FOLDER = "VLLM_RPC_BASE_PATH"  # vLLM's own, for its sockets
PR_SET_PDEATHSIG = 1
MAX_CHARS = 300


def register() -> None:
    """Entry point of `vllm.general_plugins`: called once in every vLLM process."""
    if os.environ.get(OWNER, str(os.getpid())) == str(os.getpid()):
        return
    # kill -9 of a RolloutActor must not leave its engine-core process behind.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    logging.getLogger("vllm.v1.engine.core").addHandler(_Writer(os.environ[LAST_WORDS]))
    tempfile.tempdir = os.environ.get(FOLDER)
    from tqdm.std import TqdmDefaultWriteLock

    TqdmDefaultWriteLock.mp_lock = None  # a semaphore in /dev/shm, which a process that is killed would leave there


def own_folder() -> tempfile.TemporaryDirectory[str]:
    """For the sockets and temporary files of the engine cores that this process starts from now on: they are killed, and leave them."""
    folder = tempfile.TemporaryDirectory(prefix="vllm-", ignore_cleanup_errors=True)
    os.environ[FOLDER] = folder.name
    return folder


def set_environment(config: RunConfig, on_gpu: bool, weight_backend: str) -> None:
    """vLLM reads these when it is imported and hands them to its child processes."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if weight_backend == "ipc":
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # GPU memory handles travel pickled, between our own processes
    if not on_gpu:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(config.rollout.kv_cache_gib)))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # cores are shared with learner and tools
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker runs inside the engine-core process
        # vLLM decorates helpers with torch.compile: on CPU that costs 10 s at the first request and wants a C++ compiler.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        os.environ["OMP_NUM_THREADS"] = str(config.rollout.num_threads)


class _Writer(logging.Handler):
    """Keeps the exception by which an engine core ends; calls that fail without ending it are logged there too."""

    def __init__(self, path: str):
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("EngineCore") and record.exc_info and (error := record.exc_info[1]):
            with suppress(OSError), open(self._path, "w") as file:
                file.write(f"{type(error).__name__}: {' '.join(str(error).split())[:MAX_CHARS]}")


class LastWords:
    """Of the engine cores that this process starts from now on. Nothing of it lies in the file system."""

    def __init__(self) -> None:
        self._file = os.memfd_create("last-words")
        os.environ[OWNER] = str(os.getpid())
        os.environ[LAST_WORDS] = f"/proc/{os.getpid()}/fd/{self._file}"

    def read(self, llm: Any = None) -> str:
        """Why the engine core of that AsyncLLM died, or one that did not start; "" where it is not known."""
        words = os.pread(self._file, 4 * MAX_CHARS, 0).decode(errors="replace")
        return words or _killed_by(llm)

    def close(self) -> None:
        os.close(self._file)


def _killed_by(llm: Any) -> str:
    manager = getattr(getattr(getattr(llm, "engine_core", None), "resources", None), "engine_manager", None)
    codes = [process.exitcode or 0 for process in getattr(manager, "processes", [])]
    names = [signal.Signals(-code).name for code in codes if code < 0]
    return f"killed by {names[0]}" if names else ""
