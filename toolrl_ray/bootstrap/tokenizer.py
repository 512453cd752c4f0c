"""The tiny policy's tokenizer: one token per character, and one per marker of the call syntax so that episodes are short.

The markers are ordinary vocabulary entries, not special tokens: skipping special tokens never removes them. Text outside
the vocabulary falls back to its UTF-8 bytes, so that every text encodes and comes back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<bos>", "<eos>")
CHARACTERS = ("\t", "\n", *(chr(code) for code in range(32, 127)))
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def make_tokenizer(max_context_tokens: int, pieces: Sequence[str]) -> PreTrainedTokenizerFast:
    """A character-level tokenizer that adds no token of its own (no BOS) and changes no space. pieces: strings that are one token;
    where several begin at one place, the first in the list."""
    vocabulary = {token: i for i, token in enumerate((*SPECIALS, *pieces, *CHARACTERS, *BYTES))}
    # ignore_merges: a pre-token that is in the vocabulary is taken whole; the rest splits into characters, then bytes.
    model = models.BPE(vocab=vocabulary, merges=[], ignore_merges=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    pattern = "|".join(re.escape(piece) for piece in pieces) + r"|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=max_context_tokens,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save under the class name that every release of transformers knows (release 5 would write its new name for it)."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")
