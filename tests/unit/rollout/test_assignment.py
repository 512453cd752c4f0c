from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolrl_ray.errors import RolloutError
from toolrl_ray.rollout.assignment import Assignment, Outcome
from toolrl_ray.types import EpisodeRequest, StopReason, Task, Trajectory


def requests(count: int) -> list[EpisodeRequest]:
    return [EpisodeRequest(f"e{i}", f"g{i}", Task(f"t{i}", "q", "a", "test")) for i in range(count)]


def finished(request: EpisodeRequest) -> Outcome:
    return Outcome(request.episode_id, Trajectory(request, [1], [False], [0.0], [-1], [], [], StopReason.EOS, 1, 0.1))


def test_work_is_spread_evenly_and_within_the_bound():
    book = Assignment(requests(10), num_actors=2, max_in_flight=4, max_tries=3)
    assert [len(book.next_for(0)), len(book.next_for(1))] == [4, 4]
    small = Assignment(requests(3), num_actors=2, max_in_flight=8, max_tries=3)
    assert [len(small.next_for(0)), len(small.next_for(1))] == [2, 1]


def test_a_death_costs_that_actors_episodes_and_nothing_else():
    all_requests = requests(6)
    book = Assignment(all_requests, num_actors=2, max_in_flight=3, max_tries=3)
    first, second = book.next_for(0), book.next_for(1)
    book.take(0, [finished(first[0])])
    book.lost(0, "killed")
    assert book.next_for(0) == []
    book.take(1, [finished(r) for r in second])
    again = book.next_for(1)
    assert {r.episode_id for r in again} == {r.episode_id for r in first[1:]}
    assert book.num_rerun == 2
    book.take(1, [finished(r) for r in again])
    assert book.done
    assert [t.request for t in book.trajectories()] == all_requests


def test_an_episode_that_keeps_failing_is_named():
    book = Assignment(requests(1), num_actors=1, max_in_flight=1, max_tries=2)
    book.next_for(0)
    book.take(0, [Outcome("e0", None, "ValueError: bad")])
    book.next_for(0)
    with pytest.raises(RolloutError, match=r"episode e0 of task t0 failed 2 times \(rollout.max_tries\); last: ValueError: bad"):
        book.take(0, [Outcome("e0", None, "ValueError: bad")])


def test_outcomes_of_an_abandoned_collection_are_ignored():
    book = Assignment(requests(1), num_actors=1, max_in_flight=1, max_tries=2)
    book.next_for(0)
    assert book.take(0, [finished(EpisodeRequest("old", "g", Task("t", "q", "a", "test")))]) == []
    assert not book.done


@settings(deadline=None)
@given(data=st.data())
def test_every_request_is_finished_exactly_once_whatever_dies(data):
    all_requests = requests(data.draw(st.integers(1, 12)))
    num_actors = data.draw(st.integers(1, 3))
    book = Assignment(all_requests, num_actors, data.draw(st.integers(1, 5)), max_tries=1000)
    running: list[list[EpisodeRequest]] = [[] for _ in range(num_actors)]
    trajectories = []
    for _ in range(400):
        if book.done:
            break
        actor = data.draw(st.integers(0, num_actors - 1))
        action = data.draw(st.sampled_from(["finish", "finish", "fail", "die", "back"]))
        if action == "die":
            book.lost(actor, "killed")
            running[actor] = []
        elif action == "back":
            book.back(actor)
        elif running[actor]:
            request = running[actor].pop()
            trajectories += book.take(actor, [finished(request) if action == "finish" else Outcome(request.episode_id, None, "x")])
        for i in range(num_actors):
            running[i] += book.next_for(i)
            assert len(running[i]) == book.num_running(i)
    while not book.done:  # once nothing dies any more, it ends
        for i in range(num_actors):
            book.back(i)
            running[i] += book.next_for(i)
            trajectories += book.take(i, [finished(r) for r in running[i]])
            running[i] = []
    assert sorted(t.request.episode_id for t in trajectories) == sorted(r.episode_id for r in all_requests)
    assert [t.request for t in book.trajectories()] == all_requests
