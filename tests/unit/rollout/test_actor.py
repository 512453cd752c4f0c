"""What the shell around an engine does besides passing calls on."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from toolrl_ray.episode.call_format import TextMarkers
from toolrl_ray.errors import NotLoaded, RolloutError
from toolrl_ray.recipe import load
from toolrl_ray.rollout import actor as module
from toolrl_ray.rollout.actor import RolloutActor
from toolrl_ray.rollout.load import load_call_format


def actor(*overrides: str) -> RolloutActor:
    return RolloutActor(load("calculator", list(overrides)), "policy-dir", "object_store", "app")


async def test_tools_that_never_say_what_they_are_are_not_waited_for_without_end() -> None:
    config = load("calculator", ["tools.start_timeout_s=0.05", "episode.call_format=hermes", "policy.path=a-chat-model"])
    with pytest.raises(RolloutError, match=r"the tools did not answer within 0.05 s \(tools.start_timeout_s\)"):
        await asyncio.wait_for(load_call_format(config, None, asyncio.Event().wait), timeout=5)


def test_the_task_module_is_there_before_the_first_request_and_one_that_is_broken_is_left_to_start(tmp_path: Path) -> None:
    (tmp_path / "whole.py").write_text("def load_tasks(config): ...\ndef render_prompt(task, few_shot): ...\ndef reward(trajectory): ...\n")
    (tmp_path / "broken.py").write_text("x = y\n")
    actor(f"task.module={tmp_path}/whole.py")
    assert [name for name in sys.modules if name.startswith("toolrl_user_whole_")]
    actor(f"task.module={tmp_path}/broken.py")


@pytest.fixture
def engines(monkeypatch) -> list:
    """The engines that actors load, in order; what else a start needs is there."""
    engines: list[ScriptedEngine] = []

    class ScriptedEngine:
        def __init__(self, config: object, policy_dir: str, codec: object, backend: str, on_death: Callable[[RolloutError], None]):
            engines.append(self)
            self.num_checks, self.on_death, self.error, self.is_closed = 0, on_death, None, False

        async def ready(self, policy_version: int) -> None: ...
        async def generate(self, token_ids: list, params: object) -> None: ...
        def close(self) -> None:
            self.is_closed = True

        async def check_alive(self) -> None:
            self.num_checks += 1
            if self.error:
                self.on_death(self.error)
                raise self.error

    async def load_call_format(*args: object) -> TextMarkers:
        return TextMarkers()

    monkeypatch.setattr(module, "load_codec", lambda policy_dir: None)
    monkeypatch.setattr(module, "load_engine", ScriptedEngine)
    monkeypatch.setattr(module, "load_call_format", load_call_format)
    monkeypatch.setattr(module, "ToolClient", lambda *args: SimpleNamespace(infos=None))
    monkeypatch.setattr(module, "gc", SimpleNamespace(collect=lambda: 0, freeze=lambda: None))
    return engines


async def test_a_start_that_fails_after_the_engine_is_loaded_loads_no_second_one_when_it_is_tried_again(engines, monkeypatch) -> None:
    answers = [ConnectionError("no tools"), ConnectionError("no tools"), TextMarkers()]

    async def load_call_format(*args: object) -> TextMarkers:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(module, "load_call_format", load_call_format)
    starting = actor()
    for _ in range(2):
        with pytest.raises(ConnectionError):
            await starting.start()
    assert await starting.start() == await starting.start() == os.getpid()
    assert len(engines) == 1 and engines[0].num_checks == 3


async def test_what_an_engine_has_in_the_file_system_is_removed_at_the_end_where_one_is_loaded(engines) -> None:
    await actor().close()
    loaded = actor()
    await loaded.start()
    await loaded.close()
    assert [engine.is_closed for engine in engines] == [True]


async def test_a_process_that_has_lost_its_engine_tells_why_and_ends_and_is_not_started_once_more(engines, monkeypatch) -> None:
    ended = asyncio.Event()
    monkeypatch.setattr(module, "TELL_S", 0.01)
    monkeypatch.setattr(module.os, "_exit", lambda code: ended.set())
    lost = actor()
    await lost.start()
    taking = asyncio.create_task(lost.take(60))
    engines[0].error = RolloutError("vLLM's engine-core process is dead: out of memory")
    again = asyncio.create_task(lost.start())
    with pytest.raises(RolloutError, match="dead: out of memory"):
        await asyncio.wait_for(taking, 5)
    await asyncio.wait_for(ended.wait(), 5)
    assert not again.done() and len(engines) == 1
    again.cancel()


@pytest.mark.parametrize("call", ["alive", "pause", "submit"])
async def test_one_that_was_started_again_and_is_not_loaded_yet_says_so(call: str) -> None:
    with pytest.raises(NotLoaded, match="its engine is not loaded"):
        await getattr(actor(), call)(*([[], 1, 0] if call == "submit" else []))


async def test_one_that_was_started_again_and_is_not_loaded_yet_has_nothing_to_call_off() -> None:
    await actor().cancel(["0:0"], 1)
