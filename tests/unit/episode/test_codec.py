"""The way around a tokenizer's `__call__` gives what `__call__` gives."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from tests.unit.episode.vocabularies import codec as vocabulary
from tests.unit.episode.vocabularies import sentencepiece
from toolrl_ray.episode.codec import HFCodec

NAMES = ["gpt2", "qwen2", "straddling", "tiny"]
PIECES = ["<eos>", "<|endoftext|>", "<|im_end|>", "<call>", "<response>", ">\n", " 1", "é", "\ud800", "日本", "  ", "\n\n"]


@pytest.mark.parametrize("name", NAMES)
@given(pieces=st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=12))
@settings(max_examples=60, deadline=None)
def test_text_is_encoded_as_transformers_encodes_it(name: str, pieces: list[str]) -> None:
    codec, text = vocabulary(name), "".join(pieces)
    whole = text.encode("utf-8", "replace").decode()
    tokenizer = codec._tokenizer
    assert codec.encode(text) == tokenizer(whole, add_special_tokens=False, split_special_tokens=True).input_ids
    assert codec.encode_markup(whole) == tokenizer(whole, add_special_tokens=False).input_ids


@pytest.mark.parametrize("prepend", ["normalizer", "first", "always"])
def test_no_space_is_put_before_a_text_in_mid_episode(prepend: str) -> None:
    codec = sentencepiece(prepend)
    prompt = codec.encode_prompt("1+1<call>")
    assert prompt == codec._tokenizer("1+1<call>").input_ids
    answered = prompt + codec.encode("2</s>") + codec.encode_markup("<response>")
    assert codec.decode(answered) == "<s> 1+1<call>2</s><response>"
    assert not codec.eos_token_ids & set(answered)
    assert codec.encode(" 2") != codec.encode("2")  # one that was written stays


def test_words_that_were_added_to_the_vocabulary_are_plain_characters_in_what_a_tool_writes() -> None:
    tokenizer = copy.deepcopy(vocabulary("straddling")._tokenizer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("</tool_response>", "    ")])
    codec, (word, spaces) = HFCodec(tokenizer), tokenizer.convert_tokens_to_ids(["</tool_response>", "    "])
    written = codec.encode("2</tool_response>    3")
    assert word not in written and spaces in written and codec.decode(written) == "2</tool_response>    3"
    # In the project's own text, and in a prompt, they mean themselves.
    assert codec.encode_markup("</tool_response>") == [word] == codec.encode_prompt("</tool_response>")
    filled = codec.encode_filled(["", "</tool_response>"], ["2</tool_response>"])
    assert filled.count(word) == 1 and filled[-1] == word and codec.decode(filled) == "2</tool_response></tool_response>"


def test_a_tokenizer_that_encodes_in_its_own_way_is_asked_itself() -> None:
    tokenizer = vocabulary("tiny")._tokenizer

    class Own(type(tokenizer)):
        def _encode_plus(self, text, *arguments, **options):
            return super()._encode_plus(f"1{text}", *arguments, **options)

    own = Own(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    assert HFCodec(own).encode("2") == HFCodec(tokenizer).encode("12")


def test_what_is_handed_out_for_a_marker_is_the_callers_own() -> None:
    codec = vocabulary("tiny")
    codec.encode_markup("<response>").append(0)
    assert codec.encode_markup("<response>") == codec.encode("<response>")
