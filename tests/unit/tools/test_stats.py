from __future__ import annotations

from collections import Counter

import pytest

from toolrl_ray.tools.stats import BUCKET_FACTOR, ClientCounts, count_call, isolations, tool_metrics
from tools_service.protocol import ToolStatus


def counted(*latencies_s: float, tool: str = "T") -> Counter[str]:
    counts: Counter[str] = Counter()
    for latency_s in latencies_s:
        count_call(counts, tool, ToolStatus.OK, latency_s)
    return counts


@pytest.mark.parametrize("latency_s", [0.0001, 0.003, 0.7, 30.0])
def test_a_percentile_is_right_within_its_bucket(latency_s):
    metrics = tool_metrics(counted(*[latency_s] * 10), {})
    assert latency_s <= metrics["tools/T/latency_s_p50"] * 1.0001 <= latency_s * BUCKET_FACTOR * 1.001


def test_percentiles_of_many_clients_come_from_their_sums():
    metrics = tool_metrics(counted(*[0.01] * 60) + counted(*[0.01] * 30, *[1.0] * 10), {})
    assert metrics["tools/T/latency_s_p50"] < 0.0111
    assert metrics["tools/T/latency_s_p95"] > 0.99


def test_a_tools_metrics_and_those_of_all_tools_are_of_the_step():
    before = counted(0.1, 0.1) + Counter({"T/cache_hits": 5, "T/cache_misses": 5, "T/retries": 1, "retries": 1, "requests": 2})
    after = before + counted(0.1, 0.1, 0.1) + Counter({"T/cache_hits": 3, "T/cache_misses": 1, "requests": 3})
    metrics = {key: value for key, value in tool_metrics(after, before).items() if "latency" not in key}
    assert metrics == {
        "tools/client/calls": 3,
        "tools/client/status/ok": 3,
        "tools/client/requests": 3,
        "tools/client/retries": 0,
        "tools/T/calls": 3,
        "tools/T/status/ok": 3,
        "tools/T/retries": 0,
        "tools/T/cache_hit_rate": 0.75,
    }


def test_a_step_in_which_a_process_dies_is_silent_or_joins_counts_its_own_calls_alone():
    counts = ClientCounts()

    def calls_of_step(*answers: tuple[int, int, int]) -> float:
        """answers: (actor, process, calls since its start)."""
        before = counts.total()
        for actor, pid, num_calls in answers:
            counts.answered(actor, pid, counted(*[0.1] * num_calls))
        return tool_metrics(counts.total(), before)["tools/T/calls"]

    assert calls_of_step((0, 10, 50), (1, 11, 40)) == 90
    assert calls_of_step((0, 10, 56)) == 6  # the other is silent
    assert calls_of_step((0, 10, 57), (1, 11, 45)) == 6
    assert calls_of_step((0, 10, 60), (1, 12, 48)) == 51  # it was replaced, and its process has done more than the one before
    assert calls_of_step((0, 10, 60), (1, 12, 49), (2, 10, 3)) == 4  # a third one has joined
    assert calls_of_step() == 0


def test_a_step_without_calls_has_no_percentiles_and_no_hit_rate():
    same = counted(0.1)
    assert set(tool_metrics(same, same)) == {"tools/client/calls", "tools/client/status/ok", "tools/T/calls", "tools/T/status/ok"}


def test_what_an_earlier_process_counted_is_0_until_this_one_counts_it_too():
    before = dict.fromkeys([*counted(0.1), "T/status/timeout", "status/timeout", "T/service/overdue"], 0) | Counter({"calls": 2})
    metrics = tool_metrics(Counter({"calls": 5, "T/calls": 3}), before)
    assert metrics == {
        **{"tools/client/calls": 3, "tools/client/status/ok": 0, "tools/client/status/timeout": 0},
        **{"tools/T/calls": 3, "tools/T/status/ok": 0, "tools/T/status/timeout": 0},
    }


def test_the_services_own_numbers_pass_through_and_tell_what_holds_untrusted_code():
    own = {"Python/service/num_restarts": 2.0, "Python/service/isolation/landlock+seccomp": 3.0, "T/service/overdue": 0.0}
    assert tool_metrics(own, {}) == {f"tools/{key}": value for key, value in own.items()}
    assert isolations(own) == {"Python": "landlock+seccomp"}
