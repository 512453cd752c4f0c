"""How a policy writes a tool call. A format turns the text of one policy turn into a `ParsedTurn`; it is never shown
anything but text that the policy sampled, so that a tool's output can neither end an episode nor forge a call.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from toolrl_ray.episode.codec import Codec
from tools_service.protocol import ToolResult


class TurnKind(StrEnum):
    CALL = "call"
    SUBMIT = "submit"
    MALFORMED = "malformed"  # it meant to call a tool, but the call cannot be understood
    PLAIN = "plain"  # neither a call nor a submit


@dataclass(frozen=True)
class RequestedCall:
    """refused: what the call is answered with instead of being run, where it cannot be understood."""

    tool: str
    argument: str
    refused: ToolResult | None = None


@dataclass(frozen=True)
class ParsedTurn:
    """kind: what the turn is. calls: in the order written, for CALL. problem: what is wrong, for MALFORMED.
    end: number of characters that are the turn's text, a stop marker included; what follows is overhang."""

    kind: TurnKind
    end: int
    calls: tuple[RequestedCall, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Shown:
    """What the policy is shown for one call: the whole text, and its tokens, cut to what an observation may hold."""

    text: str
    token_ids: list[int]
    was_cut: bool


class CallFormat(Protocol):
    """What the turn loop needs of a format. stop: strings at which the engine ends a turn. cut: stands at the end of an observation
    that was cut."""

    @property
    def stop(self) -> tuple[str, ...]: ...
    @property
    def cut(self) -> str: ...

    def prompt(self, codec: Any, text: str) -> tuple[list[int], str]:
        """Tokens and text of an episode's beginning. text: what the task says."""
        ...

    def parse(self, text: str, token_ids: Sequence[int]) -> ParsedTurn:
        """token_ids: those sampled, of which `text` is the text."""
        ...

    def shown(self, text: str) -> str:
        """What the policy is shown of a call's text, before that is cut."""
        ...

    def observation(self, codec: Any, shown: Sequence[Shown]) -> list[int]:
        """The tokens after a turn whose calls, in order, had these results, up to where the next turn begins."""
        ...


@dataclass(frozen=True)
class TextMarkers:
    """The text markers of TRL's TextEnvironment: `<request><Tool>argument<call>output<response>` and `<submit>`.

    A turn ends at its first `<call>` or `<submit>`, and holds at most one call. The argument is everything between the
    tool's `>` and `<call>`, further `<` and `>` included.
    """

    request: str = "<request>"
    call: str = "<call>"
    response: str = "<response>"
    submit: str = "<submit>"
    cut: str = "..."

    @property
    def stop(self) -> tuple[str, ...]:
        return (self.call, self.submit)

    @property
    def observation_end(self) -> str:
        return self.response

    def prompt(self, codec: Codec, text: str) -> tuple[list[int], str]:
        return codec.encode_prompt(text), text

    def shown(self, text: str) -> str:
        return text

    def observation(self, codec: Codec, shown: Sequence[Shown]) -> list[int]:
        return [token for one in shown for token in (*one.token_ids, *codec.encode_markup(self.observation_end))]

    def parse(self, text: str, token_ids: Sequence[int] = ()) -> ParsedTurn:
        found = sorted((at, marker) for marker in self.stop if (at := text.find(marker)) >= 0)
        if not found:
            return ParsedTurn(TurnKind.PLAIN, len(text))
        at, marker = found[0]
        end = at + len(marker)
        if marker == self.submit:
            return ParsedTurn(TurnKind.SUBMIT, end)
        before, *requests = text[:at].split(self.request)
        if not requests:
            return ParsedTurn(TurnKind.MALFORMED, end, problem=f"{self.call} without {self.request}")
        if len(requests) > 1:
            return ParsedTurn(TurnKind.MALFORMED, end, problem=f"{len(requests)} requests before one {self.call}")
        match = re.match(r"\s*<([^<>]+)>", requests[0])
        if match is None:
            return ParsedTurn(TurnKind.MALFORMED, end, problem=f"no <tool name> after {self.request}")
        return ParsedTurn(TurnKind.CALL, end, (RequestedCall(match[1].strip(), requests[0][match.end() :]),))
