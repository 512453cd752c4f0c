"""The index of the tiny search recipe, built as at its first run: whoever is asked about is found by name."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from toolrl_ray import generated_index, recipe
from toolrl_ray.tasks import facts
from tools_service.protocol import ToolCall, ToolStatus
from tools_service.search.tool import WikiTool

pytestmark = pytest.mark.java


def test_a_persons_name_finds_the_passage_about_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLRL_CACHE", str(tmp_path))
    config = generated_index.resolved(recipe.load("triviaqa"), print)
    people = facts.world(config.task.seed)

    async def search() -> list[str]:
        tool = WikiTool(**config.tools.options["Wiki"])
        results = await tool.call_many([ToolCall("Wiki", person.name, 60) for person in people])
        await tool.close()
        assert {result.status for result in results} == {ToolStatus.OK}
        return [result.text for result in results]

    found = asyncio.run(search())
    assert sum(text == person.passage for text, person in zip(found, people, strict=True)) >= 0.99 * len(people)
