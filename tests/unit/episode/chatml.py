"""Chat models for tests: a ChatML template with tools, on a tokenizer made here and on Qwen2's."""

from __future__ import annotations

import copy
import functools
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.unit.episode.vocabularies import codec as vocabulary
from toolrl_ray.episode.chat_format import HermesFormat, hermes_format
from toolrl_ray.episode.codec import HFCodec
from tools_service.runner import ToolInfo

NAMES = ["made", "qwen2"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# As chat models of the Qwen family have it: results that follow each other share one user message. Jinja drops a newline after %}.
ASSISTANT = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
CHATML = (
    "{%- set given = messages[0].role == 'system' -%}"
    "<|im_start|>system\n{{ messages[0].content if given else 'Answer in few words.' }}"
    "{% if tools %}{{ '\n\nTools:\n' }}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'A call: <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>{% endif %}<|im_end|>\n'
    "{% for message in messages %}{% if message.role == 'tool' %}"
    "{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' }}{{ message.content }}\n</tool_response>"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% elif not (loop.first and given) %}" + ASSISTANT + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Every result a message of its own.
SEPARATE = (
    "<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% for message in messages %}" + ASSISTANT + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# As newer ones have it.
TRIMMING = CHATML.replace("message.content }}", "message.content | trim }}")

INFOS = {
    info.name: info
    for info in (
        ToolInfo("Echo", "Says it again.", True),
        ToolInfo(
            "Add",
            "Adds.",
            True,
            parameters={
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a"],
                "additionalProperties": False,
            },
        ),
    )
}
TOOLS = [
    {"type": "function", "function": {"name": i.name, "description": i.description, "parameters": i.parameters}} for i in INFOS.values()
]


@functools.cache
def made_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens of ChatML, some tokens of which hold several newlines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["\n\n\nuser\n<tool_response>\n12\n</tool_response>\n\nassistant\n\nIt is 3.\n\n"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=SPECIAL)


def tokenizer_with(name: str, template: str | None) -> Any:
    # Deep: a shallow copy shares its special tokens with the original, and with every later test of the process.
    tokenizer = copy.deepcopy(made_tokenizer() if name == "made" else vocabulary("qwen2")._tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def chat_codec(name: str, template: str | None = CHATML) -> HFCodec:
    codec = copy.copy(_plain_codec(name))  # what it encodes with takes seconds to make, and knows no template
    codec._tokenizer = tokenizer_with(name, template)
    codec.vocab_size = len(codec._tokenizer)
    return codec


@functools.cache
def _plain_codec(name: str) -> HFCodec:
    return HFCodec(made_tokenizer()) if name == "made" else vocabulary(name)


@functools.cache
def chat_format(name: str, template: str = CHATML, system: str | None = None) -> HermesFormat:
    return hermes_format(chat_codec(name, template), INFOS, system, "my-model")


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
