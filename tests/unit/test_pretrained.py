"""A damaged model folder is one line for rollout and learner alike, and none of them takes weights that the other refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mistral_common
import pytest
from learner_synthetic import save_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from toolrl_ray import recipe
from toolrl_ray.bootstrap.tokenizer import make_tokenizer, save_tokenizer
from toolrl_ray.errors import UserError
from toolrl_ray.learner.model import load_policy
from toolrl_ray.pretrained import check_weights
from toolrl_ray.rollout.load import load_codec, load_transformers_engine

Damage = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(save_model(tmp_path / "model", "untied"))


def set_key(path: Path, key: str, value: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def cut_off(folder: Path, name: str = "model.safetensors") -> None:
    weights = folder / name
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGE: list[tuple[Damage, str]] = [
    (cut_off, "SafetensorError"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b""), "SafetensorError"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pytorch_model.bin|UnpicklingError"),
    (without_a_weight, "1 weights are missing, model.layers.1.mlp.down_proj.weight among them"),
    (lambda folder: set_key(folder / "config.json", "intermediate_size", 64), r"6 weights contradict config.json, .*\[48, 128\].*48, 64"),
    (lambda folder: set_key(folder / "config.json", "hidden_size", "x"), "hidden_size"),
    (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_rollout_and_learner_refuse_a_damaged_model_with_the_same_line(folder: Path, damage: Damage, message: str) -> None:
    save_tokenizer(make_tokenizer(256, ["<call>"]), folder.with_name("tokenizer"))
    codec = load_codec(str(folder.with_name("tokenizer")))
    damage(folder)
    said = []
    for load in (
        lambda: load_policy(str(folder), "float32"),
        lambda: load_transformers_engine(recipe.load("calculator"), str(folder), codec),
    ):
        with pytest.raises(UserError, match=message) as raised:
            load()
        said.append(str(raised.value))
    assert said[0] == said[1] and "\n" not in said[0] and f"policy.path={str(folder)!r}" in said[0] and len(said[0]) < 600


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, r"model.safetensors is damaged or cannot be read \(Error while deserializing header"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors is empty"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"the folder has no weights \(model.safetensors, or shards"),
        (without_a_weight, "1 weights are missing, model.layers.1.mlp.down_proj.weight among them"),
        (lambda folder: set_key(folder / "config.json", "intermediate_size", 64), "6 weights contradict config.json"),
    ],
)
def test_what_names_and_headers_tell_is_told_without_loading(folder: Path, damage: Damage, message: str) -> None:
    check_weights(str(folder))
    damage(folder)
    with pytest.raises(UserError, match=f"^policy.path='{folder}': {message}"):
        check_weights(str(folder))


def test_names_of_a_quantised_model_are_left_to_whoever_loads_it(folder: Path) -> None:
    without_a_weight(folder)
    set_key(folder / "config.json", "quantization_config", {"quant_method": "of-another-package"})
    check_weights(str(folder))


def test_every_shard_of_an_index_is_looked_at(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}))
    check_weights(str(folder))  # that index is of weights that were left out of the download: transformers takes the other
    cut_off(folder, shards[-1].name)
    with pytest.raises(UserError, match=f"{shards[-1].name} is damaged"):
        check_weights(str(folder))
    shards[-1].unlink()
    with pytest.raises(UserError, match=f"{shards[-1].name}, which its index names, is missing"):
        check_weights(str(folder))
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="model.safetensors.index.json is damaged"):
        check_weights(str(folder))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    save_tokenizer(make_tokenizer(128, ["<call>"]), tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", ['{"x": 1}', '{"x": 1', "[]", ""])
def test_a_damaged_tokenizer_is_one_line(tokenizer: Path, text: str) -> None:
    (tokenizer / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="^no tokenizer in policy.path=") as raised:
        load_codec(str(tokenizer))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", [Qwen2Config, GPT2Config])
def test_a_policy_without_a_tokenizer_is_refused_also_where_transformers_makes_an_empty_one(tmp_path: Path, kind: type) -> None:
    kind().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^no tokenizer in policy.path='.*': put the tokenizer's files beside the weights$"):
        load_codec(str(tmp_path))


def test_mistrals_own_format_is_passed_by_and_refused_where_it_is_alone(tokenizer: Path) -> None:
    own = load_codec(str(tokenizer)).encode_prompt("1<call>")
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json", tokenizer / "tekken.json")
    assert load_codec(str(tokenizer)).encode_prompt("1<call>") == own
    (tokenizer / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"^policy.path='.*' has Mistral's tekken.json alone; put .* tokenizer.json beside it$"):
        load_codec(str(tokenizer))


@pytest.mark.parametrize(("eos", "ids"), [(None, set()), (7, {7}), ([7, 9], {7, 9})])
def test_a_generation_config_adds_its_eos_ids(tokenizer: Path, eos: object, ids: set[int]) -> None:
    own = load_codec(str(tokenizer)).eos_token_ids  # there is no such file
    (tokenizer / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert load_codec(str(tokenizer)).eos_token_ids == own | ids


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"eos_token_id": [2, 7', "is damaged .*; bring it back"),
        ("[]", "is damaged"),
        ('{"eos_token_id": "x"}', "has eos_token_id='x'; it must be a token's id or a list of them"),
        ('{"eos_token_id": [2, null]}', r"has eos_token_id=\[2, None\]"),
    ],
)
def test_a_damaged_generation_config_does_not_lose_the_eos_ids_without_a_word(tokenizer: Path, text: str, message: str) -> None:
    (tokenizer / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=f"^policy.path='{tokenizer}': generation_config.json {message}"):
        load_codec(str(tokenizer))
