"""The token ledger: an append-only record of one episode.

Four columns, one entry per token: token id, loss mask, rollout logprob, policy version. What always holds:

1. The four columns have equal length.
2. Sampled ids are appended exactly as the engine returned them; nothing is decoded and encoded again.
3. The mask is True exactly on sampled tokens; prompt and observation tokens are False with rollout logprob 0.0.
4. The columns only grow, so the prompt of turn k is a prefix of the prompt of turn k + 1.
5. A finished ledger has exactly one `StopReason`, and nothing is appended after it.
6. A stop marker may end inside a token: the whole token stays and is trained; the text behind the marker is recorded.
"""

from __future__ import annotations

import math

from toolrl_ray.errors import LedgerError
from toolrl_ray.types import NO_VERSION, Completion, Segment, SegmentKind, StopReason


class Ledger:
    def __init__(self, prompt_token_ids: list[int], prompt_text: str = ""):
        self.token_ids: list[int] = []
        self.loss_mask: list[bool] = []
        self.rollout_logprobs: list[float] = []
        self.policy_versions: list[int] = []
        self.segments: list[Segment] = []
        self.stop_reason: StopReason | None = None
        self._append_unsampled(SegmentKind.PROMPT, prompt_token_ids, prompt_text)

    def __len__(self) -> int:
        return len(self.token_ids)

    def append_completion(self, completion: Completion, text: str, overhang: str = "") -> None:
        """Append sampled tokens as they are. `text` ends with the stop marker, `overhang` is what the last token held behind it.

        Raises LedgerError when the engine's columns disagree or a logprob is not a finite number at or below 0.
        """
        ids, logprobs, versions = completion.token_ids, completion.logprobs, completion.policy_versions
        if not len(ids) == len(logprobs) == len(versions):
            raise LedgerError(f"engine returned {len(ids)} ids, {len(logprobs)} logprobs and {len(versions)} policy versions")
        for i, logprob in enumerate(logprobs):
            if not math.isfinite(logprob) or logprob > 1e-3:  # rounding can leave a certain token a little above 0
                raise LedgerError(f"engine returned logprob {logprob} for sampled token {i} (id {ids[i]})")
        self._append(SegmentKind.POLICY, ids, True, logprobs, versions, text, overhang)

    def append_observation(self, token_ids: list[int], text: str) -> None:
        self._append_unsampled(SegmentKind.OBSERVATION, token_ids, text)

    def finish(self, reason: StopReason) -> None:
        if self.stop_reason is not None:
            raise LedgerError(f"episode already ended with {self.stop_reason}; cannot end it again with {reason}")
        self.stop_reason = reason

    def _append_unsampled(self, kind: SegmentKind, ids: list[int], text: str) -> None:
        self._append(kind, ids, False, [0.0] * len(ids), [NO_VERSION] * len(ids), text, "")

    def _append(
        self, kind: SegmentKind, ids: list[int], sampled: bool, logprobs: list[float], versions: list[int], text: str, overhang: str
    ) -> None:
        if self.stop_reason is not None:
            raise LedgerError(f"episode ended with {self.stop_reason}; {len(ids)} {kind} tokens came after its end")
        start = len(self.token_ids)
        self.token_ids.extend(ids)
        self.loss_mask.extend([sampled] * len(ids))
        self.rollout_logprobs.extend(logprobs)
        self.policy_versions.extend(versions)
        self.segments.append(Segment(kind, start, len(self.token_ids), text, overhang))
