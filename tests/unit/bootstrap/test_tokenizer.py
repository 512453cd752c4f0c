from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from toolrl_ray.bootstrap.calculator import PIECES
from toolrl_ray.bootstrap.tokenizer import SPECIALS, make_tokenizer, save_tokenizer

EPISODE = "What is 13.1-3?\n\n<request><SimpleCalculatorTool>13.1-3<call>10.1<response>\n\nResult=10.1<submit>"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """The tokenizer as AutoTokenizer gives it back, beside a model configuration that could make it pick another class."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = make_tokenizer(256, PIECES)
    save_tokenizer(tokenizer, folder)
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def stream_decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Text piece by piece, as vLLM detokenises."""
    stream = DecodeStream(ids=[], skip_special_tokens=False)
    return "".join(stream.step(tokenizer._tokenizer, token) or "" for token in ids)


@pytest.mark.parametrize(
    "text",
    [
        EPISODE,
        " leading, two  spaces, trailing ",
        "\n\n\n\t \n",
        "".join(chr(code) for code in range(32, 127)),
        "0123456789",
        "don 't , a .b ?",
        "<reques<submit>t> <0x41> <call",
        "é漢字 🙂 ́",
    ],
)
def test_text_comes_back_exactly_through_auto_tokenizer(loaded: PreTrainedTokenizerBase, text: str) -> None:
    ids = loaded(text)["input_ids"]
    assert ids == make_tokenizer(256, PIECES)(text)["input_ids"]
    assert loaded.decode(ids) == loaded.decode(ids, skip_special_tokens=True) == stream_decode(loaded, ids) == text


@settings(deadline=None)
@given(st.text(max_size=40).filter(lambda text: not any(special in text for special in SPECIALS)))
def test_any_text_comes_back_whole_and_piece_by_piece(loaded: PreTrainedTokenizerBase, text: str) -> None:
    ids = loaded(text)["input_ids"]
    assert loaded.decode(ids) == text
    assert stream_decode(loaded, ids) == text


def test_no_token_is_added_around_a_text(loaded: PreTrainedTokenizerBase) -> None:
    assert len(loaded("a")["input_ids"]) == 1
    assert loaded("")["input_ids"] == []


def test_each_marker_is_one_ordinary_token(loaded: PreTrainedTokenizerBase) -> None:
    for piece in PIECES:
        (token,) = loaded(piece)["input_ids"]
        assert token not in loaded.all_special_ids
    assert len(loaded(EPISODE)["input_ids"]) == 10 + 2 * (len("13.1-3") + len("10.1")) - 1


def test_it_is_saved_as_a_fast_tokenizer_with_eos_and_pad(loaded: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    save_tokenizer(make_tokenizer(256, PIECES), tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert loaded.is_fast
    assert (loaded.pad_token, loaded.eos_token, loaded.model_max_length) == ("<pad>", "<eos>", 256)
