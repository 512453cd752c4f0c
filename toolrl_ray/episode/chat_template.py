"""What a model's chat template writes around the texts of an episode, read off by rendering it with placeholders.

    opening TASK closing | turn end | head RESULT (between RESULT)* tail | turn end | ...
    prompt                 sampled    observation                         sampled

So the tokens of an episode are those of the template's rendering, and no sampled token is ever rendered again. Many templates trim what
they are given. Of a task or a result that is done here, too; a turn stays as it was sampled, with the whitespace around it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from toolrl_ray.episode.codec import HFCodec
from toolrl_ray.errors import ConfigError

TASK = "placeholder of a task"
RESULTS = tuple(f'placeholder "{i}" of a <result> & more\nin two lines' for i in range(3))  # shows escaping, too
EDITS = (str, str.strip, str.lstrip, str.rstrip)  # what a template may do to a task or a result
AROUND = (" \n{} \n", "\n {}\n ")  # shows which
# Turns as they are sampled; models that think have templates that take the thought out of earlier turns.
TURNS = (
    "A plain turn.",
    "<think>\nA thought.\n</think>\n\nA turn.",
    'A call.\n<tool_call>\n{"name": "a", "arguments": {"b": "c"}}\n</tool_call>',
)

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class ChatTemplate:
    """The parts in the picture above. end_id: the token that ends a sampled turn; `head` begins with its text, `end`.
    stop: what the engine has to look for in the text, where it does not stop at that token by itself.
    edit_task, edit_result: what the template makes of a task's and of a result's text."""

    opening: str
    closing: str
    end_id: int
    end: str
    head: str
    between: str
    tail: str
    stop: tuple[str, ...]
    edit_task: Callable[[str], str]
    edit_result: Callable[[str], str]


def read_template(codec: HFCodec, tools: Sequence[dict[str, Any]], system: str | None, policy: str) -> ChatTemplate:
    """tools: JSON schemas, as chat templates take them. system: None leaves it to the template. policy: where the codec is from.

    Raises ConfigError where the template cannot be followed token by token: where it rewrites earlier turns or what tools say, does
    not describe the tools, or ends a turn with no token of its own.
    """
    probe = _Probe(codec, list(tools), policy)
    _check_special_tokens(codec, tools, system)
    messages: Messages = [{"role": "user", "content": TASK}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    start = probe.render(messages)
    opening, closing = probe.split(start, [TASK], "the user's message")

    def asked(texts: Sequence[str]) -> str:
        return probe.render([*messages[:-1], {"role": "user", "content": texts[0]}])

    edit_task = probe.edit(asked, [opening, closing], [TASK], "the user's message")
    for tool in tools:
        if tool["function"]["name"] not in start:
            raise probe.refused(f"does not describe the tools to the model: {tool['function']['name']} is not in its text")
    head, between, tail, edit_result = probe.observation(messages, start)
    end_id = codec.encode_markup(head)[0]
    end = codec.decode([end_id])
    if end_id not in codec.special_token_ids or not head.startswith(end):
        raise probe.refused(f"ends a turn with {head[:20]!r}, which does not begin with a special token of the tokenizer")
    stop = () if end_id in codec.eos_token_ids else (end,)
    return ChatTemplate(opening, closing, end_id, end, head, between, tail, stop, edit_task, edit_result)


def _check_special_tokens(codec: HFCodec, tools: Sequence[dict[str, Any]], system: str | None) -> None:
    """What recipe and tools say is encoded together with the template, where a special token means itself."""
    texts = {f"tool {tool['function']['name']}'s description": json.dumps(tool, ensure_ascii=False) for tool in tools}
    for what, text in {"episode.system": system or "", **texts}.items():
        if special := [token for token in codec.encode_markup(text) if token in codec.special_token_ids]:
            raise ConfigError(f"{what} holds the model's special token {codec.decode(special[:1])!r}; take it out")


class _Probe:
    def __init__(self, codec: HFCodec, tools: list[dict[str, Any]], policy: str):
        self._codec, self._tools, self._policy = codec, tools, policy

    def refused(self, what: str) -> ConfigError:
        remedy = "set episode.call_format=text, or another template in the policy's folder"
        return ConfigError(f"episode.call_format=hermes: the chat template of policy.path={self._policy!r} {what}; {remedy}")

    def render(self, messages: Messages) -> str:
        if not self._codec.has_chat_template:
            raise self.refused("is missing: this is no chat model")
        try:
            return self._codec.render_chat(messages, self._tools)
        except Exception as error:  # a template is a program of the model's author, which may raise anything
            raise self.refused(f"fails with {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error

    def split(self, text: str, placeholders: Sequence[str], what: str) -> list[str]:
        """The text between the placeholders, each of which stands in it once and in this order."""
        parts, rest = [], text
        for placeholder in placeholders:
            part, found, rest = rest.partition(placeholder)
            parts.append(part)
            if not found or text.count(placeholder) > 1:
                raise self.refused(f"does not show {what} once and as it is")
        return [*parts, rest]

    def edit(
        self, render: Callable[[Sequence[str]], str], markup: Sequence[str], texts: Sequence[str], what: str
    ) -> Callable[[str], str]:
        """What is done to each text, with whitespace around it, before it comes to stand in this markup. render: what to look at."""

        def is_done(edit: Callable[[str], str], around: str) -> bool:
            given = [around.format(text) for text in texts]
            wanted = zip(markup, [*map(edit, given), ""], strict=True)
            return render(given) == "".join(part for pair in wanted for part in pair)

        for edit in EDITS:
            if all(is_done(edit, around) for around in AROUND):
                return edit
        raise self.refused(f"shows {what} neither as it is nor without the whitespace around it")

    def observation(self, messages: Messages, start: str) -> tuple[str, str, str, Callable[[str], str]]:
        """head, between and tail, which are the same after every turn, and the edit of a result."""
        added = []
        for turn in TURNS:
            one, grown, after = self._grow(messages, start, turn, RESULTS[:1])
            added += [after, self._grow(one, grown, turn, RESULTS[:1])[2]]
        head, tail = self.split(added[0], RESULTS[:1], "what a tool says")
        for other in added:
            if other != added[0]:
                raise self.refused(f"does not write the same after every turn: {_difference(added[0], other)}")
        parts = self.split(self._grow(messages, start, TURNS[0], RESULTS)[2], RESULTS, "what several tools say")
        if parts != [head, parts[1], parts[1], tail]:
            raise self.refused("writes something else around the results of several calls than around one")

        def observed(results: Sequence[str]) -> str:
            return self._grow(messages, start, TURNS[0], results)[2]

        edit = self.edit(observed, [head, tail], RESULTS[:1], "what a tool says")
        if self.edit(observed, parts, RESULTS, "what several tools say") is not edit:
            raise self.refused("trims the results of several calls otherwise than that of one")
        return head, parts[1], tail, edit

    def _grow(self, messages: Messages, rendered: str, turn: str, results: Sequence[str]) -> tuple[Messages, str, str]:
        """With one more turn and its results: the messages, their rendering, and what that adds after the turn's text."""
        answers = [{"role": "tool", "content": result} for result in results]
        grown_messages = [*messages, {"role": "assistant", "content": turn}, *answers]
        grown, kept = self.render(grown_messages), rendered + turn
        if not grown.startswith(kept):
            raise self.refused(f"does not keep its own prefix: {_difference(kept, grown)} once a turn and a result follow")
        return grown_messages, grown, grown[len(kept) :]


def _difference(before: str, after: str) -> str:
    """Where two texts part, in one line."""
    at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
    return f"{before[at : at + 40]!r} becomes {after[at : at + 40]!r}"
