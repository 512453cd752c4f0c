from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolrl_ray.errors import ConfigError, RolloutError
from toolrl_ray.rollout.assignment import Assignment, Outcome
from toolrl_ray.types import EpisodeRequest, StopReason, Task, Trajectory


def requests(count: int) -> list[EpisodeRequest]:
    return [EpisodeRequest(f"e{i}", f"g{i}", Task(f"t{i}", "q", "a", "test")) for i in range(count)]


def finished(request: EpisodeRequest) -> Outcome:
    return Outcome(request.episode_id, Trajectory(request, [1], [False], [0.0], [-1], [], [], StopReason.EOS, 1, 0.1))


def book(count: int, num_actors: int, max_tries: int = 3, absent: tuple[int, ...] = ()) -> Assignment:
    assignment = Assignment(num_actors, max_tries, absent)
    assignment.add(requests(count))
    return assignment


def test_work_is_spread_evenly_and_within_the_bound():
    large = book(10, num_actors=2)
    assert [len(large.next_for(0, 4)), len(large.next_for(1, 4))] == [4, 4]
    small = book(3, num_actors=2)
    assert [len(small.next_for(0, 8)), len(small.next_for(1, 8))] == [2, 1]


def test_a_death_costs_that_actors_episodes_and_nothing_else():
    assignment = book(6, num_actors=2)
    first, second = assignment.next_for(0, 3), assignment.next_for(1, 3)
    assignment.take(0, [finished(first[0])])
    assignment.lost(0, "killed", num_begun=3)
    assert assignment.next_for(0, 3) == []
    assignment.take(1, [finished(r) for r in second])
    again = assignment.next_for(1, 3)
    assert {r.episode_id for r in again} == {r.episode_id for r in first[1:]}
    assert assignment.num_rerun == 2
    assignment.take(1, [finished(r) for r in again])
    assert assignment.num_outstanding == 0


def test_the_episodes_of_a_dead_actor_run_again_first_and_in_their_order():
    assignment = book(8, num_actors=2)
    assignment.next_for(0, 4)
    assignment.lost(0, "killed", num_begun=4)
    assert [r.episode_id for r in assignment.next_for(1, 8)] == [f"e{i}" for i in range(8)]


def test_a_death_costs_no_try_of_the_episodes_that_only_queued_there():
    assignment = book(6, num_actors=1, max_tries=2)
    for _ in range(3):  # more often than an episode may be tried
        assignment.back(0)
        handed = assignment.next_for(0, 6)
        assignment.take(0, [finished(handed[0])])
        assignment.lost(0, "killed", num_begun=1)
    assert (assignment.num_rerun, assignment.num_outstanding) == (3, 3)


def test_an_episode_that_keeps_failing_is_named():
    assignment = book(1, num_actors=1, max_tries=2)
    assignment.next_for(0, 1)
    assignment.take(0, [Outcome("e0", None, "ValueError: bad")])
    assignment.next_for(0, 1)
    with pytest.raises(RolloutError, match=r"episode e0 of task t0 failed 2 times \(rollout.max_tries\); last: ValueError: bad"):
        assignment.take(0, [Outcome("e0", None, "ValueError: bad")])


def test_a_persons_mistake_ends_the_collection_at_the_first_try():
    assignment = book(1, num_actors=1, max_tries=3)
    assignment.next_for(0, 1)
    with pytest.raises(ConfigError, match="^a reward must be a number$"):
        assignment.take(0, [pickle.loads(pickle.dumps(Outcome("e0", None, mistake=ConfigError("a reward must be a number"))))])


def test_an_episode_that_was_called_off_is_not_handed_back():
    assignment = book(3, num_actors=1)
    running = assignment.next_for(0, 2)
    assert assignment.cancel(["e1", "e2"]) == {0: ["e1"]}
    assert assignment.take(0, [finished(r) for r in running]) == [finished(running[0]).trajectory]
    assert assignment.num_outstanding == 0 and assignment.next_for(0, 2) == []


def test_what_was_called_off_with_all_else_is_not_taken_for_the_same_episode_asked_for_again():
    assignment = book(2, num_actors=1)
    before = assignment.next_for(0, 2)
    assert assignment.cancel_all() == {0: ["e0", "e1"]} and assignment.num_outstanding == 0
    assignment.add(requests(2))
    assert assignment.next_for(0, 2) == before
    assert assignment.take(0, [finished(before[0]), Outcome("e1", None, "x")]) == []
    again = replace(finished(before[0]), era=assignment.era)
    assert assignment.take(0, [again]) == [again.trajectory]
    assert assignment.num_outstanding == 1


def test_an_actor_that_comes_later_gets_its_share_and_one_that_is_asked_for_twice_is_refused():
    assignment = book(4, num_actors=2, absent=(1,))
    assert assignment.present == [0] and assignment.next_for(1, 4) == []
    assert len(assignment.next_for(0, 2)) == 2
    assignment.back(1)
    assert len(assignment.next_for(1, 4)) == 2
    with pytest.raises(RolloutError, match="episode e0 is asked for twice at once"):
        assignment.add(requests(1))


@given(data=st.data())
def test_every_request_is_finished_exactly_once_whatever_dies(data):
    all_requests = requests(data.draw(st.integers(1, 12)))
    num_actors, bound = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    assignment = Assignment(num_actors, max_tries=1000)
    to_come = list(all_requests)
    running: list[list[EpisodeRequest]] = [[] for _ in range(num_actors)]
    trajectories = []
    for _ in range(data.draw(st.integers(0, 100))):
        actor = data.draw(st.integers(0, num_actors - 1))
        action = data.draw(st.sampled_from(["add", "finish", "finish", "fail", "die", "back"]))
        if action == "add" and to_come:
            assignment.add([to_come.pop()])
        elif action == "die":
            assignment.lost(actor, "killed", num_begun=bound)
            running[actor] = []
        elif action == "back":
            assignment.back(actor)
        elif running[actor]:
            request = running[actor].pop()
            trajectories += assignment.take(actor, [finished(request) if action == "finish" else Outcome(request.episode_id, None, "x")])
        for i in range(num_actors):
            running[i] += assignment.next_for(i, bound)
            assert len(running[i]) == assignment.num_running(i) <= bound
    assignment.add(to_come)
    while assignment.num_outstanding:  # once nothing dies any more, it ends
        for i in range(num_actors):
            assignment.back(i)
            running[i] += assignment.next_for(i, bound)
            trajectories += assignment.take(i, [finished(r) for r in running[i]])
            running[i] = []
    assert sorted(t.request.episode_id for t in trajectories) == sorted(r.episode_id for r in all_requests)
