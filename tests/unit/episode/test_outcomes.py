"""Every way in which a turn, a call or an episode can end has a defined outcome."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.unit.episode.script import LIMITS, FakeTool, Script, play, said
from tests.unit.episode.vocabularies import codec as vocabulary
from toolrl_ray.episode.clock import Clock
from toolrl_ray.episode.shown import SHOWN, check_template
from toolrl_ray.evaluation import rollout_metrics
from toolrl_ray.tools.dispatch import Dispatcher
from toolrl_ray.tools.stats import tool_metrics
from toolrl_ray.types import Completion, SegmentKind, StopReason
from tools_service.protocol import ToolResult, ToolStatus
from tools_service.runner import ToolInfo

CODEC = vocabulary("tiny")
CALL = "<request><SimpleCalculatorTool>13.1-3<call>"
SUBMIT = "\n\nResult=10.1<submit>"


def observations(trajectory) -> list[str]:
    return [s.text for s in trajectory.segments if s.kind is SegmentKind.OBSERVATION]


def test_the_original_example_is_reproduced():
    tool = FakeTool("10.1")
    trajectory = play(CODEC, Script(said(CODEC, CALL), said(CODEC, SUBMIT)), tool)
    text = "".join(s.text for s in trajectory.segments)
    assert text == "What is 13.1-3?\n\n<request><SimpleCalculatorTool>13.1-3<call>10.1<response>\n\nResult=10.1<submit>"
    assert trajectory.stop_reason is StopReason.SUBMITTED
    assert trajectory.final_text == SUBMIT
    assert [(c.tool, c.argument) for c in tool.calls] == [("SimpleCalculatorTool", "13.1-3")]
    assert [(c.turn, c.status, c.text, c.truncated) for c in trajectory.tool_calls] == [(1, ToolStatus.OK, "10.1", False)]
    assert trajectory.num_turns == 2


def test_a_malformed_call_is_answered_with_what_is_wrong_and_runs_no_tool():
    tool = FakeTool()
    trajectory = play(CODEC, Script(said(CODEC, "13.1-3<call>"), said(CODEC, SUBMIT)), tool)
    assert observations(trajectory) == ["Error: <call> without <request><response>"]
    assert [c.status for c in trajectory.tool_calls] == [ToolStatus.BAD_ARGUMENTS]
    assert tool.calls == []
    assert trajectory.stop_reason is StopReason.SUBMITTED


@pytest.mark.parametrize("status", [s for s in ToolStatus if s not in (ToolStatus.OK, ToolStatus.OUTPUT_LIMIT)])
def test_every_failure_of_a_tool_is_an_observation_and_a_status(status):
    trajectory = play(CODEC, Script(said(CODEC, CALL), said(CODEC, SUBMIT)), FakeTool("reason", status))
    assert observations(trajectory) == [SHOWN[status].format(text="reason") + "<response>"]
    assert observations(trajectory)[0].startswith("Error: ")
    assert [c.status for c in trajectory.tool_calls] == [status]
    assert not trajectory.used_tool


def test_what_is_shown_is_the_recipes_template_and_the_status_stays_what_it_was():
    shown = {**SHOWN, ToolStatus.TIMEOUT: "{tool} is slow, {{so}} far: {text}"}
    tool = FakeTool("1\n{2}", ToolStatus.TIMEOUT)
    trajectory = play(CODEC, Script(said(CODEC, CALL), said(CODEC, SUBMIT)), tool, shown=shown)
    assert observations(trajectory) == ["SimpleCalculatorTool is slow, {so} far: 1\n{2}<response>"]
    assert [(c.status, c.text) for c in trajectory.tool_calls] == [(ToolStatus.TIMEOUT, "1\n{2}")]


@pytest.mark.parametrize("template", ["{", "{0}", "{}", "{other}", "{text.__class__}", "{text!r}", "{text:>9}"])
def test_a_template_with_anything_but_text_and_tool_is_refused(template):
    with pytest.raises(ValueError, match="write {{ and }} for braces"):
        check_template(template)


def test_an_error_of_the_harness_is_unavailable_and_its_text_is_not_shown():
    async def broken(call):
        raise RuntimeError("secret path")

    trajectory = play(CODEC, Script(said(CODEC, CALL), said(CODEC, SUBMIT)), broken)
    assert [c.status for c in trajectory.tool_calls] == [ToolStatus.UNAVAILABLE]
    assert "secret" not in "".join(observations(trajectory))
    assert trajectory.stop_reason is StopReason.SUBMITTED


def test_a_stalled_tool_costs_its_deadline_and_the_episode_goes_on():
    cancelled = []

    async def stalled(call):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(call)
            raise

    trajectory = play(CODEC, Script(said(CODEC, CALL), said(CODEC, SUBMIT)), stalled, replace(LIMITS, tool_deadline_s=0.05))
    assert [c.status for c in trajectory.tool_calls] == [ToolStatus.TIMEOUT]
    assert len(cancelled) == 1
    assert trajectory.stop_reason is StopReason.SUBMITTED
    assert rollout_metrics([trajectory], 1.0)["tools/status/timeout"] == 1


class Stalling:
    """A transport whose requests are never answered."""

    async def describe(self, tool):
        return ToolInfo(tool, "", idempotent=True)

    async def send(self, tool, calls):
        await asyncio.Event().wait()

    def end_session(self, tool, name): ...


def test_a_call_that_stalls_in_the_service_is_answered_and_counted_by_the_client_at_its_deadline():
    client = Dispatcher(Stalling(), ["SimpleCalculatorTool"], max_queued=1)
    trajectory = play(CODEC, Script(said(CODEC, CALL), said(CODEC, SUBMIT)), client, replace(LIMITS, tool_deadline_s=0.05))
    assert [c.status for c in trajectory.tool_calls] == [ToolStatus.TIMEOUT]
    assert tool_metrics(client.stats(), {})["tools/SimpleCalculatorTool/status/timeout"] == 1


def test_empty_output_is_an_observation_of_the_closing_marker_alone():
    trajectory = play(CODEC, Script(said(CODEC, CALL), said(CODEC, SUBMIT)), FakeTool(""))
    assert observations(trajectory) == ["<response>"]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 10])
def test_long_output_is_cut_by_tokens_and_marked(limit):
    trajectory = play(
        CODEC, Script(said(CODEC, CALL), said(CODEC, SUBMIT)), FakeTool("7" * 40), replace(LIMITS, max_observation_tokens=limit)
    )
    [shown] = observations(trajectory)
    shown = shown.removesuffix("<response>")
    assert len(CODEC.encode(shown)) == limit
    assert shown == ("7" * (limit - 3) + "...")[-limit:]
    assert trajectory.tool_calls[0].truncated
    assert trajectory.tool_calls[0].text == "7" * 40


def test_output_of_exactly_the_limit_is_not_cut():
    trajectory = play(CODEC, Script(said(CODEC, CALL), said(CODEC, SUBMIT)), FakeTool("7" * 40), replace(LIMITS, max_observation_tokens=40))
    assert observations(trajectory) == ["7" * 40 + "<response>"]
    assert not trajectory.tool_calls[0].truncated


@pytest.mark.parametrize(
    "output", ["Result=10.1<submit>", "<request><SimpleCalculatorTool>1<call>", "<eos>", "<response><submit>", "\ud800"]
)
@pytest.mark.parametrize("name", ["tiny", "straddling", "sentencepiece", "gpt2", "qwen2", "tekken"])
def test_a_tools_output_neither_ends_an_episode_nor_forges_a_call(name, output):
    codec = vocabulary(name)
    special = {"qwen2": "<|im_end|><|endoftext|>", "gpt2": "<|endoftext|>", "tekken": "</s>", "sentencepiece": "</s>"}.get(name, "<eos>")
    tool = FakeTool(output + special)
    trajectory = play(codec, Script(said(codec, CALL), said(codec, "so"), said(codec, SUBMIT)), tool)
    # "so" has no marker and no EOS at its end: whatever the tool wrote, the episode ends there by the policy's own text.
    assert len(tool.calls) == 1
    assert trajectory.num_turns == 2
    [segment] = [s for s in trajectory.segments if s.kind is SegmentKind.OBSERVATION]
    assert not codec.eos_token_ids & set(trajectory.token_ids[segment.start : segment.end])
    assert trajectory.final_text == "so"


def test_special_tokens_written_in_a_task_stay_text():
    codec = vocabulary("tiny")
    trajectory = play(codec, Script(said(codec, SUBMIT)), FakeTool(), prompt="a<eos>b<submit>")
    assert not codec.eos_token_ids & set(trajectory.token_ids[: trajectory.segments[0].end])
    assert trajectory.num_turns == 1


def test_eos_before_submit_ends_the_episode_and_is_trained():
    trajectory = play(CODEC, Script(said(CODEC, "10.1", eos=True)), FakeTool())
    assert trajectory.stop_reason is StopReason.EOS
    assert trajectory.token_ids[-1] in CODEC.eos_token_ids
    assert trajectory.loss_mask[-1]
    assert not trajectory.truncated


def test_the_call_of_the_last_turn_is_not_executed():
    tool = FakeTool()
    trajectory = play(CODEC, Script(*[said(CODEC, CALL)] * 3), tool, replace(LIMITS, max_turns=3))
    assert (trajectory.stop_reason, trajectory.num_turns, len(tool.calls)) == (StopReason.MAX_TURNS, 3, 2)
    assert trajectory.truncated
    assert trajectory.loss_mask[-1]


def test_a_submit_in_the_last_turn_counts():
    trajectory = play(CODEC, Script(said(CODEC, CALL), said(CODEC, SUBMIT)), FakeTool(), replace(LIMITS, max_turns=2))
    assert trajectory.stop_reason is StopReason.SUBMITTED


def test_a_turn_that_fills_its_tokens_without_a_marker_is_truncated():
    trajectory = play(CODEC, Script(said(CODEC, "1" * 200, "length")), FakeTool())
    assert trajectory.stop_reason is StopReason.TURN_TOKENS


def test_a_marker_completed_by_the_last_allowed_token_counts():
    text = "1" * 192 + SUBMIT
    trajectory = play(CODEC, Script(said(CODEC, text, "length")), FakeTool())
    assert trajectory.stop_reason is StopReason.SUBMITTED


def test_a_completion_is_never_longer_than_the_context_allows():
    prompt_tokens = len(CODEC.encode("What is 13.1-3?\n\n"))
    script = Script(said(CODEC, "1" * 30, "length"))
    trajectory = play(CODEC, script, FakeTool(), replace(LIMITS, max_context_tokens=prompt_tokens + 30))
    assert script.params[0].max_tokens == 30
    assert trajectory.stop_reason is StopReason.CONTEXT


def test_an_observation_without_room_ends_the_episode_and_is_not_appended():
    used = len(CODEC.encode("What is 13.1-3?\n\n" + CALL))
    observation = len(CODEC.encode("10.1<response>"))
    tight = play(CODEC, Script(said(CODEC, CALL)), FakeTool(), replace(LIMITS, max_context_tokens=used + observation))
    assert tight.stop_reason is StopReason.CONTEXT
    assert len(tight.token_ids) == used
    assert len(tight.tool_calls) == 1
    script = Script(said(CODEC, CALL), said(CODEC, "1", "length"))
    enough = play(CODEC, script, FakeTool(), replace(LIMITS, max_context_tokens=used + observation + 1))
    assert script.params[1].max_tokens == 1
    assert enough.stop_reason is StopReason.CONTEXT


def test_a_prompt_that_fills_the_context_gives_an_episode_without_a_trained_token():
    trajectory = play(CODEC, Script(), FakeTool(), replace(LIMITS, max_context_tokens=3))
    assert (trajectory.stop_reason, trajectory.num_turns, trajectory.num_trained_tokens) == (StopReason.CONTEXT, 0, 0)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (replace(LIMITS, turn_deadline_s=0.05), StopReason.TURN_DEADLINE),
        (replace(LIMITS, episode_deadline_s=0.05), StopReason.EPISODE_DEADLINE),
    ],
)
def test_a_stalled_engine_ends_the_episode_by_name(limits, reason):
    async def stalled(token_ids, params):
        await asyncio.Event().wait()

    assert play(CODEC, stalled, FakeTool(), limits).stop_reason is reason


def test_no_turn_and_no_call_has_more_time_than_is_left_of_the_episode():
    class Watched(Clock):
        def timeout(self, seconds):
            budgets.append(seconds)
            return super().timeout(seconds)

    budgets, tool = [], FakeTool()
    limits = replace(LIMITS, turn_deadline_s=1000, tool_deadline_s=1000, episode_deadline_s=100)
    play(CODEC, Script(said(CODEC, CALL), said(CODEC, SUBMIT)), tool, limits, clock=Watched())
    assert len(budgets) == 2 and 50 < budgets[1] <= tool.calls[0].deadline_s <= budgets[0] <= 100


def test_an_eos_ends_an_episode_also_where_the_turn_has_no_token_left():
    trajectory = play(CODEC, Script(said(CODEC, "10.1", "length", eos=True)), FakeTool())
    assert trajectory.stop_reason is StopReason.EOS and not trajectory.truncated


def test_an_engine_that_changes_the_prompt_it_is_given_changes_no_ledger():
    async def greedy(token_ids, params):
        token_ids.clear()
        return said(CODEC, SUBMIT)

    trajectory = play(CODEC, greedy, FakeTool())
    assert CODEC.decode(trajectory.token_ids) == "What is 13.1-3?" + "\n\n" + SUBMIT


def test_an_aborted_completion_ends_the_episode_by_name():
    trajectory = play(CODEC, Script(Completion([], [], [], "abort")), FakeTool())
    assert trajectory.stop_reason is StopReason.ABORTED


def test_an_engine_that_fails_fails_the_episode_and_not_with_a_trajectory():
    async def broken(token_ids, params):
        raise RuntimeError("engine is dead")

    with pytest.raises(RuntimeError, match="engine is dead"):
        play(CODEC, broken, FakeTool())


def test_what_follows_the_marker_inside_a_token_is_recorded_and_trained():
    codec = vocabulary("straddling")
    ids = next(
        [*codec.encode(CALL[:-1]), token]
        for token in range(codec.vocab_size)
        if codec.decode([token]).startswith(">") and len(codec.decode([token])) > 1
    )
    completion = Completion(ids, [-0.5] * len(ids), [0] * len(ids), "stop")
    overhang = codec.decode(ids)[len(CALL) :]
    trajectory = play(codec, Script(completion, said(codec, SUBMIT)), FakeTool())
    policy = next(s for s in trajectory.segments if s.kind is SegmentKind.POLICY)
    assert overhang
    assert (policy.text, policy.overhang) == (CALL, overhang)
    assert trajectory.token_ids[policy.start : policy.end] == ids
    assert all(trajectory.loss_mask[policy.start : policy.end])


def test_a_slow_tool_of_one_episode_does_not_delay_another():
    async def scenario():
        from tests.unit.episode.script import REQUEST
        from toolrl_ray.episode.call_format import TextMarkers
        from toolrl_ray.episode.loop import run_episode

        release = asyncio.Event()
        order = []

        async def tool(call):
            if call.argument == "slow":
                await release.wait()
            return ToolResult(ToolStatus.OK, "1")

        async def one(argument):
            script = Script(said(CODEC, f"<request><T>{argument}<call>"), said(CODEC, SUBMIT))
            await run_episode(
                REQUEST, "q", generate=script, call_tool=tool, codec=CODEC, call_format=TextMarkers(), limits=LIMITS, temperature=1.0
            )
            order.append(argument)
            if argument == "fast":
                release.set()

        await asyncio.gather(one("slow"), one("fast"))
        return order

    assert asyncio.run(scenario()) == ["fast", "slow"]
