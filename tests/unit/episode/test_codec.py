"""The way around a tokenizer's `__call__` gives what `__call__` gives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.episode.vocabularies import codec as vocabulary
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
