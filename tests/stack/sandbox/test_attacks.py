"""Every attack of attacks.json in every isolation: nothing gets through, nothing of the host changes, the next snippet answers.

One host of attacks per variant, all at once and each through its rows one by one: most of the time goes into rows that wait for
their deadline.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from stack.sandbox.attack_harness import ROWS, Harness, interpreters, usable
from stack.sandbox.core_helpers import namespaces_work

AS_ROOT = "landlock as root"  # where nobody else can run the interpreter, a server that root starts stays uid 0
VARIANTS = ("bubblewrap", "landlock", "seccomp", AS_ROOT)
FEATURES = {"bubblewrap": {"scratch"}, "landlock": {"scratch"}, "seccomp": set(), AS_ROOT: {"scratch"}}
NO_FILES = {"devnull"}  # rows that open a file, and say no more of what they need
NOT_OF_THE_USER = {"benign", "cpu_time", "memory", "output", "introspection"}  # categories that the user id has no part in
STATUSES = {"ok", "error", "timeout", "cpu_limit", "output_limit", "memory_limit", "crashed", "bad_request"}
WAIT_S = 500.0


def why_not(variant: str, row: dict) -> str | None:
    """Why a row is not run in a variant here."""
    if variant == "bubblewrap" and not namespaces_work():
        return "needs bwrap on PATH and user namespaces"
    if variant == AS_ROOT and os.geteuid() != 0:
        return "needs root"
    needs = row.get("needs") or ("scratch" if row["name"] in NO_FILES else None)
    return f"needs {needs}, which this isolation does not give" if needs and needs not in FEATURES[variant] else None


def cases() -> Iterator[pytest.param]:
    for variant in VARIANTS:
        for row in ROWS:
            if variant == AS_ROOT and row["category"] in NOT_OF_THE_USER:
                continue
            reason = why_not(variant, row)
            yield pytest.param(variant, row, id=f"{variant}-{row['name']}", marks=pytest.mark.skip(reason=reason) if reason else ())


def harness(variant: str) -> Harness:
    return Harness("landlock", interpreters()[-1]) if variant == AS_ROOT else Harness(variant)


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], Future]]:
    """What got through, by variant and name, of every row that was selected."""
    items = [item for item in request.session.items if item.module is request.module and "row" in getattr(item, "fixturenames", ())]
    wanted = [item.callspec.params for item in items if item.get_closest_marker("skip") is None]
    hosts = {variant: harness(variant) for variant in {params["variant"] for params in wanted}}
    workers = {variant: ThreadPoolExecutor(1) for variant in hosts}
    try:
        yield {(p["variant"], p["row"]["name"]): workers[p["variant"]].submit(hosts[p["variant"]].attack, p["row"]) for p in wanted}
    finally:
        for variant, worker in workers.items():
            worker.shutdown(cancel_futures=True)
            hosts[variant].close()


@pytest.mark.parametrize(("variant", "row"), cases())
def test_the_attack_is_held(variant: str, row: dict, found: dict[tuple[str, str], Future]) -> None:
    assert found[variant, row["name"]].result(timeout=WAIT_S) == []


def test_the_attacks_run_as_a_user_without_privileges() -> None:
    """The worst case: the sandbox, its owner and what it could harm belong to one user, and no permission is root's to give."""
    python, user = next(pair for pair in interpreters() if usable(*pair))
    if user is None and os.geteuid() == 0:
        pytest.skip(f"every attack ran as root: the folders of {python} are closed to others, and no other python of its version is here")
    host = Harness("landlock", (python, user))
    try:
        expect = {"status": ["ok"], "must": f"uid {user or os.getuid()}\n"}
        assert host.attack({"name": "id", "code": "import os\nprint('uid', os.getuid())", "expect": expect}) == []
        assert host.uid == (user or os.getuid()) != 0
    finally:
        host.close()


def test_the_harness_notices_what_it_is_there_for() -> None:
    host = Harness("landlock")
    try:
        expect = {"status": ["ok"], "must": "zz", "must_not": "b", "max_wall": 0.0, "max_out": 1}
        texts = host.attack({"name": "wrong", "code": "print('bc')\n1/0", "then": "print('x')", "expect": {**expect, "then_must": "y"}})
        assert len(texts) == 6, texts
    finally:
        host.close()


def test_rows_are_well_formed_and_their_names_differ() -> None:
    assert [name for name, count in Counter(row["name"] for row in ROWS).items() if count > 1] == []
    for row in ROWS:
        assert set(row) <= {"name", "category", "code", "then", "needs", "session", "expect"}, row["name"]
        assert row["expect"]["status"] and set(row["expect"]["status"]) <= STATUSES, row["name"]
        assert {"must", "must_not", "then_must", "then_must_not"} & set(row["expect"]) or row["expect"]["max_wall"], row["name"]
