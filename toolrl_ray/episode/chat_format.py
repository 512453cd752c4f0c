"""Tool calls as chat models are trained for them (Hermes, Qwen): `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

A turn ends with the model's end-of-turn token. One with calls is answered, in the order of the calls, by tool messages in the model's own
chat template; one without is the final answer, and counts as submitted. A turn that did not end by itself is neither. What stands in a
thought, `<think>...</think>`, is no call, and neither is a `<tool_call>` that prose mentions: one that does not close, or that is quoted
and holds no JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from toolrl_ray.episode.call_format import ParsedTurn, RequestedCall, Shown, TurnKind
from toolrl_ray.episode.chat_template import ChatTemplate, read_template
from toolrl_ray.episode.codec import HFCodec
from tools_service.adapters import argument_text, valid_text
from tools_service.protocol import ToolError, ToolResult, ToolStatus
from tools_service.runner import MAX_MESSAGE_CHARS, ToolInfo

OPEN, CLOSE = "<tool_call>", "</tool_call>"
THINK, THOUGHT = "<think>", "</think>"
MARK = re.compile(f"{OPEN}|{CLOSE}")
# What a call begins with: OPEN before JSON, or where nothing stands before it in its line but thoughts and other calls, or where it closes
# before another call begins or a thought ends. The last looks no further than the next of these marks, so a long text stays cheap.
CLOSES = rf"(?=(?:[^<]|<(?!/?tool_call>|/think>))*+{CLOSE})"
BEGIN = rf"{OPEN}(?=\s*\{{)|(?:^|(?<={CLOSE})|(?<={THOUGHT}))[ \t]*{OPEN}|(?<![`'\"]){OPEN}{CLOSES}"
NEXT = re.compile(rf"{THINK}|{THOUGHT}|{BEGIN}", re.MULTILINE)
CLOSED = re.compile(rf"\s*{CLOSE}")
SPACE = re.compile(r"\s*")


def hermes_format(codec: HFCodec, infos: Mapping[str, ToolInfo], system: str | None, policy: str) -> HermesFormat:
    """The format for these tools. system: text of a system message. policy: where the codec is from, for messages.

    Raises ConfigError for a model whose chat template cannot be followed, see `read_template`.
    """
    tools = [
        {"type": "function", "function": {"name": info.name, "description": info.description, "parameters": info.parameters}}
        for info in infos.values()
    ]
    return HermesFormat(read_template(codec, tools, system, policy), {name: info.parameters for name, info in infos.items()})


@dataclass(frozen=True)
class HermesFormat:
    """A `CallFormat`. parameters: the JSON schema of each tool's arguments, by its name."""

    template: ChatTemplate
    parameters: Mapping[str, Mapping[str, Any]]
    cut: str = "..."

    @property
    def stop(self) -> tuple[str, ...]:
        return self.template.stop

    def prompt(self, codec: HFCodec, text: str) -> tuple[list[int], str]:
        token_ids = codec.encode_filled([self.template.opening, self.template.closing], [self.template.edit_task(text)])
        return token_ids, codec.decode(token_ids)

    def parse(self, text: str, token_ids: Sequence[int]) -> ParsedTurn:
        if not token_ids or token_ids[-1] != self.template.end_id:
            return ParsedTurn(TurnKind.PLAIN, len(text))
        said = text.removesuffix(self.template.end)
        calls = tuple(self._calls(said))
        return ParsedTurn(TurnKind.CALL if calls else TurnKind.SUBMIT, len(said), calls)

    def shown(self, text: str) -> str:
        return self.template.edit_result(text)

    def observation(self, codec: HFCodec, shown: Sequence[Shown]) -> list[int]:
        """All but the end-of-turn token, which was sampled, of what the template writes from there to the next turn."""
        template = self.template
        markup = [template.head, *[template.between] * (len(shown) - 1), template.tail]
        return codec.encode_filled(markup, [one.token_ids if one.was_cut else one.text for one in shown])[1:]

    def _calls(self, text: str) -> list[RequestedCall]:
        """Those outside of thoughts; one that never closes holds all that follows."""
        calls: list[RequestedCall] = []
        at, has_thought = 0, False
        while (mark := NEXT.search(text, at)) is not None:
            at = mark.end()
            if mark[0] == THINK:
                if (end := text.find(THOUGHT, at)) < 0:
                    break
                at, has_thought = end + len(THOUGHT), True
            elif mark[0] == THOUGHT:
                if not has_thought:  # the template opened it, before the turn began
                    calls, has_thought = [], True
            else:
                call, at = self._call(text, SPACE.match(text, at).end())
                calls.append(call)
        return calls

    def _call(self, text: str, start: int) -> tuple[RequestedCall, int]:
        """The call whose JSON starts there, and where its block ends. A marker inside a JSON string belongs to the string."""
        at = start
        try:
            value, at = DECODER.raw_decode(text, start)
            if (closed := CLOSED.match(text, at)) is not None:
                return self._requested(value, text[start:at]), closed.end()
            problem = f"the JSON of a call is followed by something else than {CLOSE}"
        except (ValueError, RecursionError) as error:
            problem = f"the call is not JSON: {_reason(error, start)}"
        mark = MARK.search(text, at)
        if mark is not None and mark[0] == CLOSE:
            return _refused("", text[start : mark.start()], problem), mark.end()
        end = mark.start() if mark else len(text)
        if (thought := text.find(THOUGHT, at, end)) >= 0:
            end = thought
        return _refused("", text[start:end], f"{OPEN} without {CLOSE}"), end

    def _requested(self, value: Any, raw: str) -> RequestedCall:
        if not isinstance(value, dict):
            return _refused("", raw, "the call is not a JSON object with name and arguments")
        name, arguments = value.get("name"), value.get("arguments", {})
        if not isinstance(name, str) or not name:
            return _refused("", raw, 'the call has no "name", which must be the name of a tool')
        name = valid_text(name)
        if not isinstance(arguments, dict):
            return _refused(name, raw, '"arguments" must be a JSON object')
        if name not in self.parameters:
            return RequestedCall(name, raw)  # answered by the client of the tools, which knows their names
        try:
            return RequestedCall(name, argument_text(self.parameters[name], arguments))
        except ToolError as error:
            return _refused(name, raw, error.message)


def _refused(tool: str, raw: str, problem: str) -> RequestedCall:
    return RequestedCall(tool, valid_text(raw), ToolResult(ToolStatus.BAD_ARGUMENTS, valid_text(problem)[:MAX_MESSAGE_CHARS]))


def _reason(error: Exception, start: int) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at character {error.pos - start + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON value")


DECODER = json.JSONDecoder(parse_constant=_no_constant)
