"""Parts of a run that do what they are told and note the order in which they are called. Every episode with tools is solved."""

from __future__ import annotations

from pathlib import Path

from toolrl_ray.driver import Parts
from toolrl_ray.types import EpisodeRequest, Segment, SegmentKind, StopReason, Trajectory


class ScriptedParts:
    """`calls` holds the order, `collections` what was asked for; a call whose name is in `raising` raises that error instead."""

    backend = "scripted"
    num_restarts = 0
    num_rerun = 0

    def __init__(self, raising: dict[str, BaseException] | None = None):
        self.calls: list[str] = []
        self.collections: list[list[EpisodeRequest]] = []
        self.raising = raising or {}

    def parts(self) -> Parts:
        return Parts(self, self, self, self.close)

    def note(self, call: str) -> None:
        self.calls.append(call)
        if call in self.raising:
            raise self.raising[call]

    def collect(self, requests: list[EpisodeRequest], *, temperature: float, max_in_flight: int | None = None) -> list[Trajectory]:
        self.note(f"collect {requests[0].episode_id.partition(':')[0]}")
        self.collections.append(requests)
        return [trajectory(request) for request in requests]

    def tool_stats(self) -> dict[str, float]:
        num_collections = sum(call.startswith("collect") for call in self.calls)
        return {"calls": 0, "T/calls": num_collections, "Python/service/isolation/landlock+seccomp": 1.0}

    def update(self, trajectories: list[Trajectory]) -> dict[str, float]:
        self.note("update")
        return {"tokens/trained": sum(t.num_trained_tokens for t in trajectories)}

    def sync(self, policy_version: int) -> dict[str, float]:
        self.note(f"sync {policy_version}")
        return {"weights/policy_version": policy_version}

    def save_policy(self, directory: str, tokenizer_dir: str) -> None:
        self.note("save_policy")
        Path(directory).mkdir(parents=True)

    def close(self) -> None:
        self.note("close")


def trajectory(request: EpisodeRequest) -> Trajectory:
    segments = [Segment(SegmentKind.PROMPT, 0, 1, "What is 1+1?"), Segment(SegmentKind.POLICY, 1, 3, "Result=2<submit>")]
    columns: tuple = ([7, 8, 9], [False, True, True], [0.0, -0.5, -0.5], [-1, 0, 0])
    return Trajectory(request, *columns, segments, [], StopReason.SUBMITTED, 1, 0.01, reward=float(request.with_tools))
