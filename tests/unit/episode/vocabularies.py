"""Vocabularies, as codecs, for property tests of the episode: real ones, and ones of the kinds that real models have."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.conftest import data_file
from toolrl_ray.bootstrap.calculator import PIECES
from toolrl_ray.bootstrap.tokenizer import make_tokenizer
from toolrl_ray.episode.codec import HFCodec

CORPUS = [
    "What is 13.1-3?\n\n<request><SimpleCalculatorTool>13.1-3<call>10.1<response>\n\nResult=10.1<submit>\n",
    "<call>><call>\n<submit>\n<submit><request><Tool>1<call>2<response>\n\n",
] * 20


class TekkenCodec:
    """Mistral's tekken through mistral-common, which vLLM brings along."""

    def __init__(self) -> None:
        import mistral_common
        from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        self._keep = SpecialTokenPolicy.KEEP
        self._tekken = Tekkenizer.from_file(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json")
        self.eos_token_ids = frozenset([self._tekken.eos_id])
        self.vocab_size = self._tekken.n_words

    def encode_prompt(self, text: str) -> list[int]:
        return [self._tekken.bos_id, *self.encode(text)]

    def encode(self, text: str) -> list[int]:
        return self._tekken.encode(text, bos=False, eos=False)

    encode_markup = encode

    def decode(self, token_ids: list[int]) -> str:
        return self._tekken.decode(token_ids, special_token_policy=self._keep)


def straddling() -> HFCodec:
    """A byte-level BPE trained so that tokens reach over the end of a marker, such as `>\\n` and `><`."""
    tokenizer = Tokenizer(models.BPE())
    # No split before merging: merges may cross every boundary between words and punctuation.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([line[i:] for line in CORPUS for i in range(0, len(line), 7)], trainer)
    return _hf(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"))


def sentencepiece(prepend: str = "normalizer") -> HFCodec:
    """As Llama 2 and Mistral 7B have it: `▁` for a space and one before every text, the rest in bytes. prepend: by what, the normalizer
    or a pre-tokenizer with that `prepend_scheme`."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    trained.train_from_iterator([line[i:] for line in CORPUS for i in range(0, len(line), 7)], trainers.BpeTrainer(show_progress=False))
    model = json.loads(trained.to_str())["model"]
    own = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*own, *model["vocab"]]))}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prepend == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1, right=0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in own[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return _hf(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"))


def _hf(tokenizer: PreTrainedTokenizerFast) -> HFCodec:
    codec = HFCodec(tokenizer)
    codec.vocab_size = len(tokenizer)
    return codec


def _from_files(name: str) -> HFCodec:
    path = data_file("tokenizers", name)
    if path is None:
        pytest.skip(f"no tokenizers/{name}; set TOOLRL_DATA to the folder that holds it")
    from transformers import AutoTokenizer, GPT2TokenizerFast

    return _hf(GPT2TokenizerFast.from_pretrained(path) if name == "gpt2" else AutoTokenizer.from_pretrained(path))


MAKERS = {
    "tekken": TekkenCodec,
    "gpt2": lambda: _from_files("gpt2"),
    "qwen2": lambda: _from_files("qwen2"),
    "straddling": straddling,
    "sentencepiece": sentencepiece,
    "tiny": lambda: _hf(make_tokenizer(256, PIECES)),
}


@functools.cache
def codec(name: str):
    return MAKERS[name]()
