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
        """Foreign text: special tokens written out in it become plain characters, and nothing is added."""
        ...

    def encode_markup(self, text: str) -> list[int]:
        """The project's own markers: here a special token means itself."""
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
        prefix = list(tokenizer("").input_ids)
        while prefix and prefix[-1] in self.eos_token_ids and prefix[-1] != tokenizer.bos_token_id:
            prefix.pop()  # some tokenizers close every text with EOS
        self._prefix = prefix
        self._encoders = {foreign: _encoder(tokenizer, foreign) for foreign in (False, True)}
        self._markup: dict[str, list[int]] = {}  # the few markers, encoded

    def encode_prompt(self, text: str) -> list[int]:
        return self._prefix + self.encode(text)

    def encode(self, text: str) -> list[int]:
        return self._encoders[True](_valid(text))

    def encode_markup(self, text: str) -> list[int]:
        if text not in self._markup:
            self._markup[text] = self._encoders[False](text)
        return list(self._markup[text])

    def encode_filled(self, markup: Sequence[str], filling: Sequence[str | list[int]]) -> list[int]:
        """Markup with foreign text, or tokens of it, in its gaps: markup[0] filling[0] markup[1] ... markup[-1].

        Encoded as one text, so that tokens reach over the borders as they do in a rendered chat template. In pieces where the filling is
        tokens, or holds special tokens, which are plain characters in it.
        """
        encoded = [self.encode_markup(text) for text in markup]
        if all(isinstance(text, str) for text in filling):
            whole = self._encoders[False]("".join(_valid(part) for pair in zip(markup, [*filling, ""], strict=True) for part in pair))
            if self._special(whole) == [token for tokens in encoded for token in self._special(tokens)]:
                return whole
        token_ids = encoded[0]
        for part, tokens in zip(filling, encoded[1:], strict=True):
            token_ids += (self.encode(part) if isinstance(part, str) else part) + tokens
        return token_ids

    def _special(self, token_ids: list[int]) -> list[int]:
        return [token for token in token_ids if token in self.special_token_ids]

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


def _encoder(tokenizer: Any, foreign: bool) -> Callable[[str], list[int]]:
    """From text to ids without special tokens around it. foreign: special tokens written out in it become plain characters.

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
        return lambda text: backend.encode(text, add_special_tokens=False).ids
    options = {"split_special_tokens": True} if foreign else {}
    return lambda text: list(tokenizer(text, add_special_tokens=False, **options).input_ids)
