"""Parts of a run that do what they are told and note the order in which they are called. Every episode with tools is solved."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from toolrl_ray.parts import Parts
from toolrl_ray.types import EpisodeRequest, Segment, SegmentKind, StopReason, Trajectory


class ScriptedParts:
    """`calls` holds the order, `collections` what was asked for. A call whose name is in `raising` raises that error instead, each time or,
    if it is a list, its errors in turn. reward: of an episode, by default 1 with tools and 0 without.

    The learner's weights are the numbers of the prompts that it has been trained on, in order.
    """

    backend = "scripted"
    concurrent = False
    num_restarts = 0
    num_rerun = 0

    def __init__(self, raising: dict[str, BaseException | list[BaseException]] | None = None):
        self.calls: list[str] = []
        self.collections: list[list[EpisodeRequest]] = []
        self.raising = raising or {}
        self.reward: Callable[[EpisodeRequest], float] = lambda request: float(request.with_tools)
        self.changing = nullcontext()
        self.weights: list[str] = []
        self.version = 0
        self._running: list[EpisodeRequest] = []
        self._saved = ""

    def parts(self) -> Parts:
        return Parts(self, self, self, self.close)

    def note(self, call: str) -> None:
        self.calls.append(call)
        error = self.raising.get(call)
        if isinstance(error, list):
            error = error.pop(0) if error else None
        if error is not None:
            raise error

    @property
    def num_outstanding(self) -> int:
        return len(self._running)

    def submit(self, requests: list[EpisodeRequest], *, max_in_flight: int | None = None) -> None:
        self.note(f"collect {requests[0].episode_id.partition(':')[0]}")
        self.collections.append(requests)
        self._running += requests

    def poll(self, max_wait_s: float) -> list[Trajectory]:
        finished, self._running = self._running, []
        return [trajectory(request, self.version, self.reward(request)) for request in finished]

    def cancel(self, episode_ids: Collection[str]) -> None:
        self._running = [request for request in self._running if request.episode_id not in set(episode_ids)]

    def cancel_all(self) -> None:
        self._running = []

    def describe(self) -> str:
        return f"rollout: {self.num_outstanding} under way"

    def tool_stats(self) -> dict[str, float]:
        num_collections = sum(call.startswith("collect") for call in self.calls)
        return {"calls": 0, "T/calls": num_collections, "Python/service/isolation/landlock+seccomp": 1.0}

    def update(self, trajectories: list[Trajectory]) -> dict[str, float]:
        self.note("update")
        self.weights += sorted({t.request.group_id for t in trajectories}, key=int)
        return {"tokens/trained": sum(t.num_trained_tokens for t in trajectories)}

    def take(self, policy_version: int) -> Callable[[], dict[str, float]]:
        return partial(self.sync, policy_version)

    def sync(self, policy_version: int) -> dict[str, float]:
        self.note(f"sync {policy_version}")
        self.version = policy_version
        return {"weights/policy_version": policy_version}

    def reconnect(self) -> None:
        self.note("reconnect")

    def save_state(self, directory: str) -> None:
        self._saved = directory, list(self.weights)

    def finish_save(self) -> None:
        directory, weights = self._saved
        (Path(directory) / "weights.json").write_text(json.dumps(weights))

    def load_state(self, directory: str) -> None:
        self.weights = json.loads((Path(directory) / "weights.json").read_text())

    def restart(self) -> None:
        self.note("restart")
        self.weights = []

    def save_policy(self, directory: str, tokenizer_dir: str) -> None:
        self.note("save_policy")
        Path(directory).mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        self.note("close")


def trajectory(request: EpisodeRequest, version: int = 0, reward: float = 1.0) -> Trajectory:
    segments = [Segment(SegmentKind.PROMPT, 0, 1, "What is 1+1?"), Segment(SegmentKind.POLICY, 1, 3, "Result=2<submit>")]
    columns: tuple = ([7, 8, 9], [False, True, True], [0.0, -0.5, -0.5], [-1, version, version])
    return Trajectory(request, *columns, segments, [], StopReason.SUBMITTED, 1, 0.01, reward=reward)
