"""The bounded hand-over between rollout and learner: a state machine with no Ray, no thread and no clock of its own.

Prompts are numbered as `TaskStream` numbers them; the episodes of one prompt are a group, and whole groups are handed over. A prompt is
pending (its number not reached, or to be run again), in flight, buffered, trained or dropped, and never in two of these.

The bound on staleness. s = batches handed over, so update s + 1 is the next and starts from weights of version s; l <= s = version that
the engines have loaded; B = groups of a batch; K = max_staleness_steps. A group admitted at l is due at update l + K + 1: none of its
tokens is of a version below l, so up to that update none is older than K updates. At all times, for every d > s,

    (I)  the groups in flight or buffered that are due at or before d are at most (d - s) B.

- `admit` starts a group only while all there are, with it, are at most (l + K + 1 - s) B. No group is due later than that, so (I) holds.
- `next_batch` takes finished groups, those due first before others, and only when what stays behind keeps (I) at s + 1. Taking the
  earliest due leaves the fewest behind for every d at once, so if any choice of B finished groups keeps (I), this one does. Up to a d
  by which B finished groups are due, (I) at s + 1 follows from (I) at s; before that, only those in flight stay behind.
- (I) at d = s + 1 says that all groups due at the next update fit into it, and `next_batch` leaves none of them behind.

So every group is trained on at or before its due update, whatever its episodes' lengths: the bound is kept for every token, no trajectory
is thrown away for its age, and a late episode holds up a batch only when it is due itself. K = 0: (B groups) in, all of them out.

At the start (K + 1) B groups begin together. Were the first batch made of those that end soonest, it would hold one kind alone (episodes
that call no tool, say), and the next ones too, from which there is nothing to learn. So the first batch, of a run and after a resume, is
the B groups admitted first. While it is waited for, the others come forward, and from then on quick and slow ones finish as they begin.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice, takewhile
from typing import Any

from toolrl_ray.config import StreamConfig
from toolrl_ray.errors import StreamError, UserError
from toolrl_ray.tasks.stream import TaskStream
from toolrl_ray.types import NO_VERSION, EpisodeRequest, Trajectory


class DropReason(StrEnum):
    """Why the group of a prompt is not trained on."""

    ZERO_SIGNAL = "zero_signal"  # all its episodes have the same reward
    GROUP_DEADLINE = "group_deadline"  # fewer than the quorum had finished


@dataclass
class Group:
    """The episodes of one prompt. due: the last update that may train on it."""

    number: int
    due: int
    waiting: set[str]
    finished: list[Trajectory] = field(default_factory=list)


class Stream:
    """num_batches: of the whole run; no more is admitted than they need. Deadlines of groups are measured on `clock`, in seconds."""

    def __init__(
        self,
        config: StreamConfig,
        tasks: TaskStream,
        *,
        groups_per_batch: int,
        group_size: int,
        num_batches: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._config = config
        self._tasks = tasks
        self._batch = groups_per_batch
        self._size = group_size
        self._num_batches = num_batches
        self._clock = clock
        self.num_handed = 0  # s
        self._num_handed_before = 0  # when this began, or was resumed
        self.loaded_version = 0  # l
        self.num_completed = 0  # groups whose episodes, or a quorum of them, came in, kept or filtered
        self._next = 0
        self._again: deque[int] = deque()  # numbers below `_next` that are pending: in flight or buffered when a checkpoint was written
        self._groups: dict[int, Group] = {}  # in the order of admission
        self._begun: dict[int, float] = {}  # groups of which some episodes have finished: when the first did, in that order
        self._in_flight: Counter[int] = Counter()  # of the groups, by the update at which they are due
        self._buffered: Counter[int] = Counter()
        self._dropped: dict[int, DropReason] = {}
        self._num_filtered = 0  # since the last batch
        self.dropped_episodes: list[tuple[float, int]] = []  # reward and sampled tokens, of groups dropped between the last two batches
        self._dropped_since: list[tuple[float, int]] = []  # and since the last batch
        self.staleness: list[int] = []  # of the trajectories of the last batch, in updates
        self.num_late = 0  # trajectories that came after their group had left

    def admit(self) -> list[EpisodeRequest]:
        """All episodes that may start now."""
        due = self.loaded_version + self._config.max_staleness_steps + 1
        room = (min(due, self._num_batches) - self.num_handed) * self._batch - len(self._groups)
        requests = []
        for _ in range(room):
            number = self._again.popleft() if self._again else self._next
            self._next = max(self._next, number + 1)
            task = self._tasks.task(number)
            members = [EpisodeRequest(f"{number}:{member}", str(number), task) for member in range(self._size)]
            self._groups[number] = Group(number, due, {request.episode_id for request in members})
            self._in_flight[due] += 1
            requests += members
        return requests

    def add(self, trajectories: Iterable[Trajectory]) -> None:
        """Finished episodes, in any order."""
        for trajectory in trajectories:
            group = self._groups.get(int(trajectory.request.group_id))
            if group is None or trajectory.request.episode_id not in group.waiting:
                self.num_late += 1
                continue
            group.waiting.remove(trajectory.request.episode_id)
            group.finished.append(trajectory)
            if group.waiting:
                self._begun.setdefault(group.number, self._clock())
            else:
                self._completed(group)

    def _completed(self, group: Group) -> None:
        """Nothing is learned from a group of equal rewards: its place goes to another prompt, so that a batch is full of signal.
        Yu et al. 2025 (DAPO, arXiv 2503.14476), dynamic sampling."""
        self._left(group)
        self.num_completed += 1
        rewards = {trajectory.reward for trajectory in group.finished}
        if self._config.filter_zero_signal and len(rewards) == 1 and self._num_filtered < self._config.max_filtered:
            self._num_filtered += 1
            self._drop(group, DropReason.ZERO_SIGNAL)
        else:
            self._buffered[group.due] += 1

    def _left(self, group: Group) -> None:
        """It is no longer in flight."""
        self._begun.pop(group.number, None)
        self._in_flight -= Counter((group.due,))  # which keeps no zeros

    def _drop(self, group: Group, reason: DropReason) -> None:
        del self._groups[group.number]
        self._dropped[group.number] = reason
        self._dropped_since += [(t.reward or 0.0, t.num_trained_tokens) for t in group.finished]

    def expire(self) -> list[str]:
        """Lets late groups go: with the episodes that have finished, if these are a quorum. Returns the episodes to call off.

        A group's time runs from its first finished episode: before they begin, at about the same time, all of them may have waited long for
        a place. The first one ends in any case, since an episode has deadlines of its own.
        """
        if self._config.group_deadline_s is None:
            return []
        limit = self._clock() - self._config.group_deadline_s
        called_off: list[str] = []
        for number in [number for number, _ in takewhile(lambda one: one[1] < limit, self._begun.items())]:
            group = self._groups[number]
            called_off += sorted(group.waiting)
            group.waiting.clear()
            if len(group.finished) >= self._config.group_quorum:
                self._completed(group)
            else:
                self._left(group)
                self._drop(group, DropReason.GROUP_DEADLINE)
        return called_off

    def next_batch(self) -> list[Trajectory] | None:
        """The trajectories of the next update, in the order in which prompts were admitted; None while they are not there."""
        update = self.num_handed + 1
        if not self._is_ready(update):
            return None
        finished = sorted((g for g in self._groups.values() if not g.waiting), key=lambda g: (g.due, g.number))
        chosen = finished[: self._batch]
        self._buffered -= Counter(g.due for g in chosen)
        for group in chosen:
            del self._groups[group.number]
        self.num_handed = update
        self._num_filtered = 0
        self.dropped_episodes, self._dropped_since = self._dropped_since, []
        batch = [t for g in sorted(chosen, key=lambda g: g.number) for t in sorted(g.finished, key=_member)]
        self._check_bound(batch)
        return batch

    def _is_ready(self, update: int) -> bool:
        """Whether there is a batch, and (I) holds behind it. Asked at every poll, so it counts, and looks at no group after the first B."""
        if self._buffered.total() < self._batch or update > self._num_batches:
            return False
        if self.num_handed == self._num_handed_before and any(g.waiting for g in islice(self._groups.values(), self._batch)):
            return False
        num_in_flight = 0
        for due in sorted(self._in_flight):
            num_in_flight += self._in_flight[due]
            if num_in_flight > (due - update) * self._batch:
                return False
        return True

    def _check_bound(self, batch: list[Trajectory]) -> None:
        self.staleness = [staleness_steps(trajectory, self.num_handed) for trajectory in batch]
        for trajectory, staleness in zip(batch, self.staleness, strict=True):
            if staleness > self._config.max_staleness_steps:
                raise StreamError(
                    f"episode {trajectory.request.episode_id} holds a token that is {staleness} updates old, more than "
                    f"stream.max_staleness_steps={self._config.max_staleness_steps}: an engine sampled with weights older than it said"
                )

    def loaded(self, policy_version: int) -> None:
        """Every engine that gets work now has weights of this version: slots are released."""
        self.loaded_version = policy_version

    def counts(self) -> dict[str, int]:
        return {
            "pending": len(self._again),
            "in_flight": self._in_flight.total(),
            "buffered": self._buffered.total(),
            "trained": self._next - len(self._again) - len(self._groups) - len(self._dropped),
            "dropped": len(self._dropped),
        }

    def metrics(self) -> dict[str, float]:
        reasons = Counter(self._dropped.values())
        metrics: dict[str, float] = {f"stream/{state}_prompts": count for state, count in self.counts().items()}
        metrics |= {f"stream/dropped/{reason}": reasons[reason] for reason in DropReason}
        return metrics | {"stream/late_episodes": self.num_late}

    def describe(self) -> str:
        """For a person who asks why nothing moves."""
        counts = ", ".join(f"{count} {state}" for state, count in self.counts().items())
        late = [g for g in self._groups.values() if g.waiting and g.due == self.num_handed + 1]
        ages = f"; {len(late)} of those in flight are due at the next update" if late else ""
        return f"stream: {self.num_handed} batches handed over, engines at version {self.loaded_version}; prompts: {counts}{ages}"

    def state_dict(self) -> dict[str, Any]:
        """The prompt ledger. What is in flight or buffered will be run again, by the weights that go with this state."""
        return {
            "tasks": self._tasks.digest,
            "num_handed": self.num_handed,
            "next": self._next,
            "again": sorted([*self._again, *self._groups]),
            "dropped": {str(number): reason for number, reason in self._dropped.items()},
            "num_filtered": self._num_filtered,
            "dropped_since": list(self._dropped_since),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError where the tasks are others than those that the state was saved with."""
        if state.get("tasks", digest := self._tasks.digest) != digest:
            raise UserError(
                "the training tasks are not those that the checkpoint was saved with (task.*), so prompts would be skipped or trained on "
                "twice; bring the files of the tasks back as they were, or start a new run"
            )
        self.num_handed = self._num_handed_before = self.loaded_version = state["num_handed"]
        self._next = state["next"]
        self._again = deque(state["again"])
        self._groups, self._begun = {}, {}
        self._in_flight, self._buffered = Counter(), Counter()
        self._dropped = {int(number): DropReason(reason) for number, reason in state["dropped"].items()}
        self._num_filtered = state.get("num_filtered", 0)  # states of earlier versions lack both
        self._dropped_since = [(reward, num_tokens) for reward, num_tokens in state.get("dropped_since", [])]


def staleness_steps(trajectory: Trajectory, update: int) -> int:
    """How many updates older its oldest sampled token is than the weights that this update (1, 2, ...) starts from."""
    return update - 1 - min(set(trajectory.policy_versions) - {NO_VERSION}, default=update - 1)


def _member(trajectory: Trajectory) -> int:
    return int(trajectory.request.episode_id.rpartition(":")[2])
