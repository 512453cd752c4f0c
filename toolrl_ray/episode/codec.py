"""Text to token ids and back, for the two places that need it: text that enters an episode (prompt, observations) is
encoded once, and sampled tokens are decoded to be read. Nothing is ever decoded and encoded again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Codec(Protocol):
    eos_token_ids: frozenset[int]

    def encode_prompt(self, text: str) -> list[int]:
        """The first tokens of an episode: the model's own prefix (BOS, where it has one), then the text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Foreign text in mid-episode: special tokens and other words that were added to the vocabulary become plain characters in it, and
        nothing is added, nor the space that some vocabularies put before a text."""
        ...

    def encode_markup(self, text: str) -> list[int]:
        """The project's own markers, in mid-episode: here a special token means itself."""
        ...

    def decode(self, token_ids: list[int]) -> str:
        """The text of sampled tokens, special tokens included."""
        ...


class HFCodec:
    """Codec of a Hugging Face tokenizer.

    eos_token_ids: the tokenizer's EOS and those that the model's generation config adds.
    special_token_ids: those whose text means a token in markup, and plain characters in foreign text.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: list[int] | None = None):
        self._tokenizer = tokenizer
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.eos_token_ids = frozenset(own + (eos_token_ids or []))
        added = tokenizer.added_tokens_decoder.items()
        self.special_token_ids = frozenset([token for token, one in added if one.special] + tokenizer.all_special_ids)
        self._added_words = self.special_token_ids.union(token for token, one in added if _is_word(one))
        prefix = list(tokenizer("").input_ids)
        while prefix and prefix[-1] in self.eos_token_ids and prefix[-1] != tokenizer.bos_token_id:
            prefix.pop()  # some tokenizers close every text with EOS
        self._prefix = prefix
        self._encode_whole, self._encode_marker = _encoders(tokenizer, foreign=False)
        self._encode_prompt, self._encode_foreign = _encoders(tokenizer, foreign=True)
        self._markup: dict[str, list[int]] = {}  # the few markers, encoded

    def encode_prompt(self, text: str) -> list[int]:
        return self._prefix + self._encode_prompt(_valid(text))

    def encode(self, text: str) -> list[int]:
        return self._encode_foreign(_valid(text))

    def encode_markup(self, text: str) -> list[int]:
        if text not in self._markup:
            self._markup[text] = self._encode_marker(text)
        return list(self._markup[text])

    def encode_filled(self, markup: Sequence[str], filling: Sequence[str | list[int]]) -> list[int]:
        """Markup with foreign text, or tokens of it, in its gaps: markup[0] filling[0] markup[1] ... markup[-1].

        Encoded as one text, so that tokens reach over the borders as they do in a rendered chat template. In pieces where the filling is
        tokens, or holds words that were added to the vocabulary, special or not, which are plain characters in it.
        """
        encoded = [self._encode_whole(markup[0]), *(self.encode_markup(text) for text in markup[1:])]
        if all(isinstance(text, str) for text in filling):
            whole = self._encode_whole("".join(_valid(part) for pair in zip(markup, [*filling, ""], strict=True) for part in pair))
            if self._added(whole) == [token for tokens in encoded for token in self._added(tokens)]:
                return whole
        token_ids = encoded[0]
        for part, tokens in zip(filling, encoded[1:], strict=True):
            token_ids += (self.encode(part) if isinstance(part, str) else part) + tokens
        return token_ids

    def _added(self, token_ids: list[int]) -> list[int]:
        return [token for token in token_ids if token in self._added_words]

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    def render_chat(self, messages: list[dict[str, str]], tools: list[dict[str, Any]]) -> str:
        """The text of the model's chat template, up to where its next turn begins. Raises whatever the template raises."""
        return self._tokenizer.apply_chat_template(messages, tools=tools or None, add_generation_prompt=True, tokenize=False)

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be tokenised


Encoder = Callable[[str], list[int]]


def _encoders(tokenizer: Any, foreign: bool) -> tuple[Encoder, Encoder]:
    """From text to ids without special tokens around it: of a text of its own, and of one that goes on with another.
    foreign: special tokens written out in it become plain characters.

    Where the tokenizer's class leaves encoding as transformers does it, a copy of the Rust tokenizer inside is asked directly: the way
    through `__call__` takes ten times as long as the encoding itself, and switches a flag that every user of the tokenizer shares.
    """
    from transformers import PreTrainedTokenizerFast as Fast

    kind, plain = type(tokenizer), ("__call__", "_encode_plus")
    if isinstance(tokenizer, Fast) and all(getattr(kind, name) is getattr(Fast, name) for name in plain):
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = foreign or tokenizer.split_special_tokens
        return _ids_of(backend), _ids_of(_going_on(backend, foreign))
    options = {"split_special_tokens": True} if foreign else {}

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, **options).input_ids)

    return encode, encode


def _ids_of(backend: Any) -> Encoder:
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def _going_on(backend: Any, foreign: bool) -> Any:
    """The same without the space that sentencepiece vocabularies put before every text, which in mid-episode nobody wrote. foreign: and
    with every added word as plain characters: models take some for control tokens that are not marked as special, such as
    `</tool_response>`."""
    from tokenizers import AddedToken, normalizers, pre_tokenizers

    parts = _parts(backend.normalizer, normalizers.Sequence)
    kept = [part for part in parts if not isinstance(part, normalizers.Prepend)]
    adding = [part for part in _parts(backend.pre_tokenizer, pre_tokenizers.Sequence) if _adds_space(part)]
    words = [one for one in backend.get_added_tokens_decoder().values() if foreign and not one.special and _is_word(one)]
    if len(kept) == len(parts) and not adding and not words:
        return backend
    going_on = copy.deepcopy(backend)
    going_on.encode_special_tokens = backend.encode_special_tokens  # which a copy loses
    going_on.add_special_tokens([AddedToken(one.content, normalized=one.normalized) for one in words])
    if len(kept) < len(parts):
        going_on.normalizer = normalizers.Sequence(kept)
    for part in _parts(going_on.pre_tokenizer, pre_tokenizers.Sequence):
        if isinstance(part, pre_tokenizers.Metaspace):
            part.prepend_scheme = "never"
        elif isinstance(part, pre_tokenizers.ByteLevel):
            part.add_prefix_space = False
    return going_on


def _is_word(added: Any) -> bool:
    return bool(added.content.strip())  # some vocabularies add runs of spaces, which mean no more than themselves


def _parts(whole: Any, sequence: type) -> list[Any]:
    return list(whole) if isinstance(whole, sequence) else [] if whole is None else [whole]


def _adds_space(pre_tokenizer: Any) -> bool:
    return getattr(pre_tokenizer, "add_prefix_space", False) or getattr(pre_tokenizer, "prepend_scheme", "never") != "never"
