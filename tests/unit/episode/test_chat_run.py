"""A chat model in a run: what is refused before it starts, and episodes with a real engine and a real tool."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.unit.episode.chatml import CHATML, call, tokenizer_with
from tests.unit.episode.script import REQUEST, Script, said
from toolrl_ray import preflight, recipe
from toolrl_ray.collector import collect
from toolrl_ray.config import RunConfig
from toolrl_ray.errors import ConfigError
from toolrl_ray.in_process import InProcessRollout
from toolrl_ray.rollout.load import load_call_format, load_codec, make_call_format
from toolrl_ray.rollout.runner import EpisodeRunner
from toolrl_ray.tools.local import LocalTools
from toolrl_ray.types import StopReason
from tools_service.protocol import ToolStatus

SYSTEM = "Use the tool, then answer Result=NUMBER<submit>."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model that has learnt nothing."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = tokenizer_with("made", CHATML)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def chat_config(model: Path, *overrides: str) -> RunConfig:
    settings = ("episode.call_format=hermes", f"episode.system='{SYSTEM}'", "episode.max_context_tokens=1024", "eval.num_tasks=4")
    return recipe.load("calculator", [f"policy.path={model}", *settings, *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["episode.call_format=hermes"], "episode.call_format=hermes contradicts policy.path=tiny, which has no chat template"),
        (["episode.system=x"], "episode.system='x' contradicts episode.call_format=text, which has no system message"),
        (
            ["episode.call_format=hermes", "policy.path=some/model", "task.few_shot=2"],
            "episode.call_format=hermes contradicts task.few_shot=2: the worked examples are written in text markers",
        ),
        (
            ["episode.call_format=hermes", "policy.path=some/model", "task.parts={a: {}, b: {few_shot: 2}}"],
            "episode.call_format=hermes contradicts task.parts.b.few_shot=2: .* text markers; set task.parts.b.few_shot=0",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe.load("calculator", overrides)


def test_a_template_that_cannot_be_followed_is_refused_before_the_run_starts(model: Path, tmp_path: Path) -> None:
    preflight.check(chat_config(model), in_process=True, learner=True)
    thoughts_gone = CHATML.replace("{{ message.content }}<|im_end|>", "{{ message.content.split('</think>')[-1] }}<|im_end|>")
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer_with("made", thoughts_gone).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"the chat template of policy.path='{tmp_path}' does not keep its own prefix"):
        preflight.check(chat_config(tmp_path), in_process=True, learner=True)


def test_the_room_that_a_prompt_leaves_is_that_of_the_template_around_it(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"episode.max_context_tokens=64 leaves no room after the prompt"):
        preflight.check(chat_config(model, "episode.max_context_tokens=64"), in_process=True, learner=True)


def test_text_markers_do_not_wait_for_the_tools_to_describe_themselves(model: Path) -> None:
    async def never() -> dict:
        raise AssertionError("asked")

    assert asyncio.run(load_call_format(recipe.load("calculator"), load_codec(str(model)), never)).stop == ("<call>", "<submit>")


def test_a_chat_model_calls_the_calculator_and_its_answer_is_rewarded(model: Path) -> None:
    config, codec = chat_config(model), load_codec(str(model))
    turns = [call("SimpleCalculatorTool", f'{{"argument": "{expression}"}}') for expression in ("13.1-3", "13.1-")]
    script = Script(said(codec, "\n".join(turns), eos=True), said(codec, "Result=10.1<submit>", eos=True))

    async def run():
        tools = LocalTools(config.tools)
        await tools.start()
        runner = EpisodeRunner(config, script, tools, codec, make_call_format(config, codec, tools.infos()))
        try:
            return await runner.run(REQUEST)
        finally:
            await tools.close()

    trajectory = asyncio.run(run())
    assert [(c.argument, c.status) for c in trajectory.tool_calls] == [("13.1-3", ToolStatus.OK), ("13.1-", ToolStatus.BAD_ARGUMENTS)]
    assert "<tool_response>\n10.1\n</tool_response>\n<tool_response>\nError: " in trajectory.segments[2].text
    assert (trajectory.stop_reason, trajectory.reward) == (StopReason.SUBMITTED, 1.0)
    assert SYSTEM in trajectory.segments[0].text


def test_an_engine_samples_turns_of_a_chat(model: Path) -> None:
    rollout = InProcessRollout(chat_config(model, "episode.max_turn_tokens=150"), str(model))
    try:
        trajectories = collect(rollout, [replace(REQUEST, episode_id=f"{i}:0") for i in range(16)], timeout_s=300)
    finally:
        rollout.close()
    [end] = load_codec(str(model)).eos_token_ids
    reasons = set()
    for trajectory in trajectories:
        first = trajectory.segments[1]
        ended = trajectory.token_ids[first.end - 1] == end
        assert trajectory.stop_reason is (StopReason.SUBMITTED if ended else StopReason.TURN_TOKENS)
        assert first.overhang == ("<|im_end|>" if ended else "")
        reasons.add(trajectory.stop_reason)
    assert reasons == {StopReason.SUBMITTED, StopReason.TURN_TOKENS}
