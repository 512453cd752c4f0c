"""What `toolrl tools serve` says where the service does not do as it should, with a transport that is told what to do."""

from __future__ import annotations

import asyncio

import pytest

from toolrl_ray import tools_serving
from toolrl_ray.errors import UserError
from tools_service.runner import ToolInfo
from tools_service.serve_handles import TransportError


async def gone(tool: str) -> ToolInfo:
    raise TransportError("DeploymentUnavailableError", not_started=True)


async def stalls(tool: str) -> ToolInfo:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize(("describe", "reason"), [(gone, "DeploymentUnavailableError"), (stalls, "no answer within 0.05 s")])
def test_tools_that_start_and_do_not_answer_are_one_line(describe, reason, monkeypatch) -> None:
    monkeypatch.setattr(tools_serving, "DESCRIBE_S", 0.05)
    with pytest.raises(UserError) as raised:
        asyncio.run(tools_serving._descriptions(["A", "B"], describe))
    assert str(raised.value).startswith(f"the tools have started and do not answer ({reason});") and "\n" not in str(raised.value)


def test_the_tools_are_described_in_their_order() -> None:
    async def describe(tool: str) -> ToolInfo:
        return ToolInfo(tool, f"is {tool}", idempotent=True)

    infos = asyncio.run(tools_serving._descriptions(["B", "A"], describe))
    assert [(info.name, info.description) for info in infos] == [("B", "is B"), ("A", "is A")]
