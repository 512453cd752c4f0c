"""What a VLLMEngine asks of vLLM when a weight sync breaks off, and which vLLM it refuses. test_weight_sync.py has vLLM itself do it."""

from __future__ import annotations

import asyncio
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.stack.test_weight_sync import make_policy
from toolrl_ray.config import RunConfig
from toolrl_ray.errors import RolloutError, UserError
from toolrl_ray.rollout import vllm_engine
from toolrl_ray.rollout.engine_core import LastWords, set_environment
from toolrl_ray.rollout.vllm_engine import VLLMEngine, _check_platform


@pytest.fixture(autouse=True)
def environment() -> None:
    """As an engine sets it before it imports vLLM: the engines of other tests in this process find vLLM imported."""
    set_environment(RunConfig(recipe="test"), False, "object_store")


class Worker:
    """AsyncLLM's calls with the rules of a vLLM worker.
    fails: calls that fail, each once; "started" after the effect of "start"."""

    errored = False

    def __init__(self, *fails: str):
        self.fails, self.active, self.calls = list(fails), False, []

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call in self.fails:
            self.fails.remove(call)
            raise RuntimeError(f"Call to collective_rpc method failed: {call}: out of memory")

    async def start_weight_update(self) -> None:
        if self.active:
            raise RuntimeError("start_weight_update called while a weight update is already active. Call finish_weight_update first.")
        self._note("start")
        self.active = True
        self._note("started")

    async def update_weights(self, request: object) -> None:
        if not self.active:
            raise RuntimeError("start_weight_update must be called before update_weights.")
        try:
            self._note("update")
        except RuntimeError:
            self.active = False
            raise

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        if not self.active:
            raise RuntimeError("finish_weight_update called without a matching start_weight_update.")
        self._note("finish")
        self.active = False

    async def shutdown_weight_transfer_engine(self) -> None:
        if self.active:
            raise RuntimeError("Cannot release a trainer connection during a weight update")
        self._note("shutdown")

    async def init_weight_transfer_engine(self, request: object) -> None:
        self._note("init")


def engine_on(worker: Worker) -> VLLMEngine:
    engine = object.__new__(VLLMEngine)  # as it is once vLLM is loaded
    engine._llm, engine._update_may_be_open, engine._version, engine._last_words = worker, False, 0, LastWords()
    return engine


async def sync(engine: VLLMEngine) -> None:
    await engine.start_weight_update()
    await engine.update_weights({"payloads": [b""]})
    await engine.finish_weight_update(1)


@pytest.mark.parametrize("fails", ["start", "started", "update", "finish"])
@pytest.mark.parametrize("reconnects", [True, False])
def test_after_a_failed_attempt_in_any_phase_the_next_one_goes_through(fails: str, reconnects: bool) -> None:
    worker = Worker(fails)
    engine = engine_on(worker)
    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(sync(engine))
    if reconnects:
        asyncio.run(engine.init_weight_transfer({}))
    asyncio.run(sync(engine))
    assert not worker.active and engine._version == 1


def test_an_update_that_cannot_be_closed_is_said_and_tried_again() -> None:
    worker = Worker("finish", "finish")
    engine = engine_on(worker)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="finish: out of memory"):
            asyncio.run(sync(engine))
    asyncio.run(sync(engine))
    assert not worker.active


def test_a_new_connection_ends_the_one_before() -> None:
    worker = Worker()
    engine = engine_on(worker)
    for _ in range(2):
        asyncio.run(engine.init_weight_transfer({}))
        asyncio.run(sync(engine))
    connection = ["shutdown", "init", "start", "started", "update", "finish"]
    assert worker.calls == 2 * connection


def test_a_vllm_of_the_other_kind_is_refused_in_one_line() -> None:
    from vllm.platforms import current_platform

    with pytest.raises(UserError, match=r"^rollout.num_gpus=0, but .* set rollout.num_gpus.*$"):
        _check_platform(0, is_cpu_build=False)
    with pytest.raises(UserError, match=r"^rollout.num_gpus=0.5, but .* set rollout.num_gpus=0.*$"):
        _check_platform(0.5, is_cpu_build=True)
    if current_platform.is_cpu():
        with pytest.raises(UserError, match="^rollout.num_gpus=1, but the vLLM installed here is its CPU build"):
            VLLMEngine(RunConfig(recipe="test", rollout={"num_gpus": 1}, learner={"num_gpus": 1}), "nowhere", "object_store", 0)
    _check_platform(0, is_cpu_build=True)
    _check_platform(0.5, is_cpu_build=False)


@pytest.mark.parametrize("state", ["well", "dead", "dies", "hangs"])
def test_an_engine_that_is_dead_or_hangs_is_told_from_one_that_answers(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    async def is_paused() -> bool:
        if state == "dies":
            raise EngineDeadError
        if state == "hangs":
            await asyncio.sleep(60)
        return False

    monkeypatch.setattr(vllm_engine, "ANSWER_S", 0.05)
    deaths: list[RolloutError] = []
    engine = engine_on(SimpleNamespace(errored=state == "dead", is_paused=is_paused))
    engine._on_death = deaths.append
    what = "does not answer within 0.05 s" if state == "hangs" else "is dead"
    with nullcontext() if state == "well" else pytest.raises(RolloutError, match=f"^vLLM's engine-core process {what}$") as raised:
        asyncio.run(engine.check_alive())
    assert deaths == ([] if state == "well" else [raised.value])


@pytest.mark.parametrize("call", ["start_weight_update", "update_weights", "finish_weight_update", "resume", "pause", "ready"])
@pytest.mark.parametrize("dies", ["before", "meanwhile"])
def test_a_call_that_the_engine_core_process_does_not_outlive_is_its_death_and_no_wait_for_the_deadline(
    call: str, dies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    async def never(*arguments: object, **options: object) -> None:
        if dies == "before":
            llm.errored = True
            raise EngineDeadError
        asyncio.get_running_loop().call_later(0.05, setattr, llm, "errored", True)
        await asyncio.Event().wait()

    monkeypatch.setattr(vllm_engine, "LOOK_S", 0.01)
    updates = ["start_weight_update", "update_weights", "finish_weight_update", "update_weight_version"]
    llm = SimpleNamespace(errored=False, **dict.fromkeys([*updates, "pause_generation", "resume_generation"], never))
    deaths: list[RolloutError] = []
    engine = engine_on(llm)
    engine._recompute, engine._on_death = True, deaths.append
    arguments = {"update_weights": [{}], "finish_weight_update": [1], "ready": [1]}.get(call, [])
    with pytest.raises(RolloutError, match="process is dead") as raised:
        asyncio.run(asyncio.wait_for(getattr(engine, call)(*arguments), 30))
    assert deaths == [raised.value]


def test_an_engine_core_that_dies_or_does_not_start_says_why(tmp_path: Path) -> None:
    """Real vLLM, with heads that its attention on CPU has no kernel for, which shows at the first request, and then with a file of weights
    that are not those of config.json."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("a GPU has a kernel for heads of 16: runs where vLLM's CPU build is installed")
    make_policy(tmp_path, tied=True, num_heads=8)

    why = "RuntimeError: Unsupported CPU attention .*head_dim=16"

    async def first_request() -> None:
        engine = VLLMEngine(RunConfig(recipe="test"), str(tmp_path), "object_store", 0)
        try:
            with pytest.raises(RolloutError, match=f"^vLLM cannot run {tmp_path}: {why}.*; rollout.engine=transformers may$"):
                await asyncio.wait_for(engine.ready(0), 60)
            with pytest.raises(RolloutError, match=f"^vLLM's engine-core process is dead: {why}"):
                await engine.check_alive()
        finally:
            engine.shutdown()

    asyncio.run(first_request())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 512}))
    with pytest.raises(RolloutError, match=f"^vLLM cannot start with {tmp_path}: "):
        VLLMEngine(RunConfig(recipe="test"), str(tmp_path), "object_store", 0)
