"""What does not fit is told before anything is started."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, GPT2Config, LlamaConfig, LlamaForCausalLM

from toolrl_ray import cli, preflight, recipe
from toolrl_ray.bootstrap.calculator import PIECES
from toolrl_ray.bootstrap.tokenizer import make_tokenizer, save_tokenizer
from toolrl_ray.errors import ConfigError, MissingDependency, PlacementError, UserError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=128
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(make_tokenizer(128, PIECES), folder)
    return folder


def check(*overrides: str) -> None:
    preflight.check(recipe.load("calculator", overrides), in_process=True, learner=True)


def test_a_run_that_fits_passes(model: Path) -> None:
    check(f"policy.path={model}", "episode.max_context_tokens=128")
    check()  # the tiny policy: there is no folder to look at yet


def test_episodes_longer_than_the_model_can_read_are_refused_with_both_numbers(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_context_tokens=129 is more than the 128 positions .*; set episode.max_context_tokens=128"):
        check(f"policy.path={model}", "episode.max_context_tokens=129")


def test_a_prompt_that_leaves_no_room_is_refused_with_its_length(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_context_tokens=64 leaves no room .*'generated/train/0' \(\d+ tokens, task.few_shot=4\)"):
        check(f"policy.path={model}", "episode.max_context_tokens=64", "task.few_shot=4")


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused(model: Path) -> None:
    LlamaForCausalLM(AutoConfig.from_pretrained(model, vocab_size=20)).save_pretrained(model)
    with pytest.raises(ConfigError, match=r"tokenizer gives token \d+ for the prompt of task 'gen.*, and the model has .* 20;"):
        check(f"policy.path={model}", "episode.max_context_tokens=128")


@pytest.mark.parametrize(
    ("name", "overrides", "source"),
    [
        ("gsm8k", ["task.few_shot=3"], r"'generated/train/\d+' \(\d+ tokens, task.few_shot=3\)"),
        ("triviaqa", ["task.few_shot=2"], r"'generated/train/[\w-]+' \(\d+ tokens, task.few_shot=2\)"),
        ("mixed", ["task.parts.gsm8k.few_shot=4"], r"'gsm8k/generated/train/\d+' \(\d+ tokens, task.parts.gsm8k.few_shot=4\)"),
    ],
)
def test_a_prompt_that_the_tiny_policy_cannot_read_is_refused_before_it_is_made(name: str, overrides: list[str], source: str) -> None:
    with pytest.raises(ConfigError, match=rf"episode.max_context_tokens=256 leaves no room after the prompt of task {source}; set"):
        preflight.check(recipe.load(name, overrides), in_process=True, learner=True)


@pytest.mark.parametrize("name", ["calculator", "triviaqa", "gsm8k", "mixed"])
def test_the_recipes_of_the_tiny_policy_pass(name: str) -> None:
    preflight.check(recipe.load(name), in_process=True, learner=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{}", r"tools.options.Wiki={}: tool Wiki: index=None must be a folder .*; set options.Wiki.index"),
        ("{Wiki: {index: my-index, kk: 3}}", "tools.options.Wiki=.* unexpected keyword argument 'kk'"),
        ("{Wiki: {index: my-index, k: 0}}", "tools.options.Wiki=.* k=0 must be a whole number from 1 to 100"),
        ("{Wiki: {index: my-index, name: Search}}", "tools.options.Wiki=.* it calls itself 'Search'"),
        ("{Wiki: {index: /no/where}}", "tools.options.Wiki.index: no folder '/no/where'; make an index with: toolrl index build"),
        ("{Wiki: {index: /}}", "tools.options.Wiki.index: '/' holds no Lucene index"),
    ],
)
def test_a_wrong_option_of_the_search_tool_is_told_before_anything_is_made(options: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        preflight.check(recipe.load("triviaqa", [f"tools.options={options}"]), in_process=True, learner=True)


def test_an_index_that_is_elsewhere_or_has_only_a_name_is_left_to_the_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_index(index: str, in_process: bool = False) -> None:
        preflight.check_index(recipe.load("triviaqa", [f"tools.options.Wiki.index={index}"]), in_process=in_process)

    check_index("wikipedia-kilt-doc")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    check_index("/no/where")
    with pytest.raises(ConfigError, match="no folder '/no/where'"):
        check_index("/no/where", in_process=True)


def test_the_index_of_a_search_tool_of_ones_own_name_is_looked_at_too() -> None:
    tools = ["tools.names=[Papers]", "tools.custom.Papers=tools_service.search.tool:WikiTool"]
    with pytest.raises(ConfigError, match="^tools.options.Papers.index: no folder '/no/where'"):
        check(*tools, "tools.options.Papers={name: Papers, index: /no/where}")


def test_a_folder_without_a_tokenizer_is_one_line(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="no tokenizer in policy.path"):
        check(f"policy.path={model}", "episode.max_context_tokens=128")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=512), 512),
        (GPT2Config(n_positions=256), 256),
        (LlamaConfig(max_position_embeddings=512, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}), 2048),
        (
            LlamaConfig(
                max_position_embeddings=2048,
                rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4},
            ),
            2048,
        ),
        (AutoConfig.for_model("mamba"), None),
    ],
)
def test_the_positions_of_a_model_are_read_with_their_scaling(config, expected: int | None) -> None:
    assert preflight.max_positions(config) == expected


@pytest.mark.parametrize(
    ("package", "needed"),
    [("torch", (True, True)), ("ray", (False, True)), ("vllm", (False, True)), ("deepspeed", (False, True))],
)
def test_a_missing_package_is_told_with_its_install_line_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, package: str, needed: tuple[bool, bool]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    for in_process, is_needed in zip((True, False), needed, strict=True):
        if not is_needed:
            preflight.check_packages(recipe.load("calculator"), in_process=in_process, learner=True)
            continue
        with pytest.raises(MissingDependency, match=rf"^{package} is not installed; pip install -e '.\[cpu\]'.*'.\[gpu\]'"):
            preflight.check_packages(recipe.load("calculator"), in_process=in_process, learner=True)


def test_the_machine_that_only_drives_a_cluster_needs_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    for package in ("vllm", "deepspeed"):
        monkeypatch.setitem(sys.modules, package, None)
    preflight.check_packages(recipe.load("calculator"), in_process=False, learner=True)


def test_adapters_need_peft_where_the_learner_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    config = recipe.load("calculator", ["policy.lora.rank=4"])
    preflight.check_packages(recipe.load("calculator"), in_process=True, learner=True)
    preflight.check_packages(config, in_process=True, learner=False)
    for in_process in (True, False):
        with pytest.raises(MissingDependency, match=r"^peft is not installed; pip install -e '.\[cpu\]'"):
            preflight.check_packages(config, in_process=in_process, learner=True)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    preflight.check_packages(config, in_process=False, learner=True)


def test_a_model_folder_whose_configuration_is_broken_is_one_line(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(UserError) as raised:
        check(f"policy.path={model}")
    assert "\n" not in str(raised.value)


def test_weights_that_are_cut_off_or_gone_are_told_before_anything_is_started(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        check(f"policy.path={model}", "episode.max_context_tokens=128")
    weights.unlink()
    with pytest.raises(UserError, match="the folder has no weights"):
        check(f"policy.path={model}", "episode.max_context_tokens=128")


def test_in_this_process_a_gpu_that_pytorch_does_not_see_is_told_before_the_tiny_policy_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cli, "_policy_dir", lambda config: pytest.fail("begun"))
    for section in ("rollout", "learner"):
        with pytest.raises(PlacementError, match=f"^{section}.num_gpus=1, but PyTorch sees no GPU here; set {section}.num_gpus=0"):
            check(f"{section}.num_gpus=1")
    preflight.check(recipe.load("calculator", ["learner.num_gpus=1"]), in_process=True, learner=False)  # an evaluation has no learner
    assert cli.main(["eval", "calculator", "--in-process", "rollout.num_gpus=1"]) == 2
    assert capsys.readouterr().err.startswith("toolrl: rollout.num_gpus=1, but PyTorch sees no GPU here")


OWN_TASK = """
from dataclasses import dataclass
from toolrl_ray.types import Task

@dataclass(frozen=True)
class Own(Task):
    value: object = object()

def load_tasks(config):
    tasks = [Own(f"own/{n}", "1+1", "2", "own") for n in range(2)]
    return tasks, tasks

def render_prompt(task, few_shot):
    return task.prompt

def reward(trajectory):
    return 1.0
"""


def test_a_class_of_tasks_that_cannot_be_written_as_text_is_told_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_TASK)
    with pytest.raises(ConfigError, match=r"task 'own/0' has a value that cannot be written as JSON \(.*object is unsupported\)"):
        check("policy.path=tiny", f"task.module={tmp_path}/own.py")
