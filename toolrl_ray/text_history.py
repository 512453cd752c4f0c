"""One finished episode as people who come from TRL know it: a text, tokens and a mask that can be looked at in colour."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toolrl_ray.types import SegmentKind, Trajectory

PLAIN = "(not in colour: rich is missing; install it with: pip install rich)"


class TextHistory:
    """Segments in order, the first of which is the prompt.

    text: all of it; text_spans, token_spans: (start, end) of each segment in text and tokens; system_spans: True for those that
    the policy did not write. tokens: int64 [L]; token_masks: int64 [L], 1 exactly on tokens that the policy sampled.
    truncated: turns, tokens or time ran out. reward: a scalar tensor once the reward function has been asked.
    trajectory: the episode's own record with its stop_reason and tool_calls; None for a history that was put together by hand.
    """

    def __init__(self, text: str, tokens: Tensor, system: bool = True):
        self.text = ""
        self.tokens = tokens.new_zeros(0)
        self.token_masks = tokens.new_zeros(0)
        self.text_spans: list[tuple[int, int]] = []
        self.token_spans: list[tuple[int, int]] = []
        self.system_spans: list[bool] = []
        self.completed = False
        self.truncated = False
        self.reward: Tensor | float = 0.0
        self.trajectory: Trajectory | None = None
        self.prompt_color = "black on grey85"
        self.system_color = "black on cyan3"
        self.model_color = "black on deep_sky_blue1"
        self.reward_color = "black on plum1"
        self.append_segment(text, tokens, system=system)

    @classmethod
    def of(cls, trajectory: Trajectory, device: torch.device | str = "cpu") -> TextHistory:
        """The history of a finished episode. A policy segment's text holds what its tokens do, so also what followed its marker."""
        token_ids = torch.tensor(trajectory.token_ids, dtype=torch.long, device=device)
        prompt, *others = trajectory.segments
        history = cls(prompt.text, token_ids[: prompt.end])
        for segment in others:
            system = segment.kind is not SegmentKind.POLICY
            history.append_segment(segment.text + segment.overhang, token_ids[segment.start : segment.end], system=system)
        history.complete(truncated=trajectory.truncated)
        history.trajectory = trajectory
        return history

    def append_segment(self, text: str, tokens: Tensor, system: bool = True) -> None:
        """Raises ValueError for a segment without tokens."""
        if len(tokens) == 0:
            raise ValueError(f"the segment {text!r} has no tokens")
        self.text_spans.append((len(self.text), len(self.text) + len(text)))
        self.token_spans.append((len(self.tokens), len(self.tokens) + len(tokens)))
        self.system_spans.append(system)
        self.text += text
        self.tokens = torch.cat([self.tokens, tokens])
        self.token_masks = torch.cat([self.token_masks, torch.full_like(tokens, 0 if system else 1)])

    def complete(self, truncated: bool = False) -> None:
        self.completed, self.truncated = True, truncated

    @property
    def last_text_segment(self) -> str:
        start, end = self.text_spans[-1]
        return self.text[start:end]

    def split_query_response_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """(query [Q], response [L - Q], mask of the response [L - Q])."""
        split = self.token_spans[0][1]
        return self.tokens[:split], self.tokens[split:], self.token_masks[split:]

    def show_text(self, show_legend: bool = False) -> None:
        """Prints the text, each segment in the colour of who wrote it, and the reward."""
        spans = zip(self._names(), self.text_spans, strict=True)
        self._show([(self.text[start:end], name) for name, (start, end) in spans], show_legend)

    def show_tokens(self, tokenizer: Any, show_legend: bool = False) -> None:
        """Prints the tokens, a space after each, in the same colours, and the reward."""
        spans = zip(self._names(), self.token_spans, strict=True)
        pieces = [(tokenizer.convert_ids_to_tokens(self.tokens[start:end].tolist()), name) for name, (start, end) in spans]
        self._show([("".join(f"{token} " for token in tokens), name) for tokens, name in pieces], show_legend)

    def show_colour_legend(self) -> None:
        """Prints which colour stands for whom."""
        parts = [part for name in ("prompt", "system", "model", "reward") for part in ((name.capitalize(), name), ("|", ""))]
        self._print([("(Colour Legend: ", ""), *parts[:-1], (")", "")])

    def _names(self) -> list[str]:
        """Who wrote each segment."""
        return ["prompt", *("system" if system else "model" for system in self.system_spans[1:])]

    def _show(self, parts: list[tuple[str, str]], show_legend: bool) -> None:
        self._print([*parts, ("\n\n", ""), (f"Reward: {float(self.reward):g}", "reward")])
        if show_legend:
            self.show_colour_legend()

    def _print(self, parts: list[tuple[str, str]]) -> None:
        """parts: (text, who wrote it, "" for nobody in particular). rich knows terminals, notebooks and files apart."""
        try:
            import rich
            from rich.text import Text
        except ImportError:
            print("".join(f"[{name}]{text}" if name else text for text, name in parts))
            print(PLAIN)
            return
        shown = Text()
        for text, name in parts:
            shown.append(text, style=getattr(self, f"{name}_color") if name else "")
        rich.get_console().print(shown, soft_wrap=True)
