"""Text to token ids and back, for the two places that need it: text that enters an episode (prompt, observations) is
encoded once, and sampled tokens are decoded to be read. Nothing is ever decoded and encoded again.
"""

from __future__ import annotations

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
    """

    def __init__(self, tokenizer: Any, eos_token_ids: list[int] | None = None):
        self._tokenizer = tokenizer
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.eos_token_ids = frozenset(own + (eos_token_ids or []))
        prefix = list(tokenizer("").input_ids)
        while prefix and prefix[-1] in self.eos_token_ids and prefix[-1] != tokenizer.bos_token_id:
            prefix.pop()  # some tokenizers close every text with EOS
        self._prefix = prefix

    def encode_prompt(self, text: str) -> list[int]:
        return self._prefix + self.encode(text)

    def encode(self, text: str) -> list[int]:
        whole = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be tokenised
        return list(self._tokenizer(whole, add_special_tokens=False, split_special_tokens=True).input_ids)

    def encode_markup(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
