"""
Limits over two servers and their workers, with everything killed on the way.

``GEARMAN_LIMITS_JOBS`` says of how many jobs; a thousand take some minutes.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from django_gearman.models import FunctionLimit, JobRecord
from tests import harness

from .conftest import SITE, Trace
from .site import jobs, limited

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]

JOBS = int(os.environ.get("GEARMAN_LIMITS_JOBS", "60"))
SHORT_LEASE = 6.0
ENV = SITE | {"GEARMAN_TEST_LIMITS": "1"}
Pair = list[harness.GearmanServerProcess]


@pytest.fixture
def servers(transactional_db: None, settings: Any, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """With a lease that no stall outlasts, unless the test gives another."""
    env = ENV | {"GEARMAN_TEST_LEASE": str(getattr(request, "param", 30.0))}
    with harness.server(name="one", env=env) as one, harness.server(name="two", env=env) as two:
        settings.GEARMAN = {"default": {"SERVERS": [one.address, two.address]}}
        one.complaints_allowed = two.complaints_allowed = True
        yield [one, two]


def workers(servers: Pair, count: int) -> list[harness.WorkerProcess]:
    """Some for each server alone, and some for both."""
    whose: list[Any] = [servers, [servers[0]], [servers[1]]]
    made = [harness.WorkerProcess(whose[n % 3], processes=2, env=ENV) for n in range(count)]
    for each in made:
        each.complaints_allowed = True
        each.start()
    return made


def most_at_once(trace: Trace, killed: dict[int, float]) -> int:
    """
    How many ran at a moment, by the jobs' own word.

    Args:
        killed: {pid of a worker: when it was killed}; what it had begun ended then.
    """
    events: list[tuple[float, int]] = []
    open_of: dict[tuple[str, str], None] = {}
    for line in Path(trace.path).read_text().splitlines():
        what, name, pid, at = line.split()
        if what == "begin":
            events.append((float(at), 1))
            open_of[name, pid] = None
        else:
            events.append((float(at), -1))
            open_of.pop((name, pid))
    events += [(killed[int(pid)], -1) for _, pid in open_of]
    most = now = 0
    for _, change in sorted(events):
        now += change
        most = max(most, now)
    assert now == 0
    return most


def all_recorded() -> bool:
    return not JobRecord.objects.filter(status__in=JobRecord.LIVE).exists()


def runs(trace: Trace) -> Counter[str]:
    """{name: how often it began}."""
    lines = Path(trace.path).read_text().splitlines()
    return Counter(line.split()[1] for line in lines if line.startswith("begin"))


class TestConcurrency:
    @pytest.mark.parametrize("servers", [SHORT_LEASE], indirect=True)
    def test_never_a_third(self, servers: Pair, trace: Trace, tmp_path: Path) -> None:
        made = workers(servers, 4)
        killed: dict[int, float] = {}
        try:
            limited.two_at_once.enqueue_many(
                [((trace.path, f"job{n}", 0.0 if n < 2 else 0.01), {}) for n in range(JOBS)]
            )
            harness.wait_until(lambda: len(runs(trace)) >= 2, 60.0, "the first two")

            # Others are free for other functions meanwhile.
            began = time.monotonic()
            other = tmp_path / "other"
            other.touch()
            results = [jobs.leave_trace.enqueue(str(other), f"other{n}") for n in range(20)]
            for result in results:
                result.get(timeout=20)
            print(f"20 jobs of another function took {time.monotonic() - began:.2f} s")
            assert len(runs(trace)) == 2
            Path(f"{trace.path}.go").touch()
            harness.wait_until(lambda: len(runs(trace)) >= JOBS // 5, 60.0, "some jobs")

            for pid in made[1].children():
                killed[pid] = time.time()
                os.kill(pid, signal.SIGKILL)
            harness.wait_until(lambda: len(runs(trace)) >= JOBS * 2 // 5, 60.0, "more of them")
            servers[0].kill()
            servers[0].start()
            harness.wait_until(lambda: len(runs(trace)) >= JOBS * 3 // 5, 60.0, "most of them")
            servers[1].kill()  # and does not come back: its jobs are taken over
            began = time.monotonic()
            harness.wait_until(all_recorded, 120.0 + JOBS / 5, "the end of all jobs")
            print(f"the rest took {time.monotonic() - began:.1f} s")
        finally:
            for worker in made:
                worker.stop()
        assert len(runs(trace)) == JOBS
        assert set(JobRecord.objects.values_list("status", flat=True)) == {"SUCCESSFUL"}
        assert most_at_once(trace, killed) == 2

    def test_an_edit_is_honoured(self, servers: Pair, trace: Trace) -> None:
        made = workers(servers, 2)
        try:
            limited.two_at_once.enqueue_many([((trace.path, f"job{n}", 0.0), {}) for n in range(30)])
            harness.wait_until(lambda: len(runs(trace)) == 2, 60.0, "the first jobs")
            FunctionLimit.objects.filter(function=limited.two_at_once.name).update(concurrency=4)
            edited = time.time()
            harness.wait_until(lambda: len(runs(trace)) == 4, 60.0, "four at once")
            print(f"honoured after {time.time() - edited:.2f} s")
            Path(f"{trace.path}.go").touch()
            FunctionLimit.objects.filter(function=limited.two_at_once.name).update(enabled=False)
            harness.wait_until(all_recorded, what="the end of all jobs")
        finally:
            for worker in made:
                worker.stop()

    def test_each_key_has_its_own(self, servers: Pair, trace: Trace) -> None:
        made = workers(servers, 2)
        try:
            calls = [((trace.path, f"job{n}", f"account {n % 3}"), {}) for n in range(30)]
            limited.one_for_each.enqueue_many(calls)
            harness.wait_until(all_recorded, 60.0, "the end of all jobs")
        finally:
            for worker in made:
                worker.stop()
        assert most_at_once(trace, {}) in (2, 3)
        for account in range(3):
            lines = Path(trace.path).read_text().splitlines()
            own = [line for line in lines if int(line.split()[1][3:]) % 3 == account]
            assert [line.split()[0] for line in sorted(own, key=lambda line: float(line.split()[3]))] == [
                "begin",
                "end",
            ] * 10


class TestRate:
    def test_no_more_in_any_second(self, servers: Pair) -> None:
        """Counted by the moments at which the servers handed the jobs out, as the records have them."""
        made = workers(servers, 2)
        try:
            limited.fifty_a_second.enqueue_many([((n,), {}) for n in range(JOBS * 2)])
            harness.wait_until(all_recorded, 30.0 + JOBS / 5, "the end of all jobs")
        finally:
            for worker in made:
                worker.stop()
        starts = sorted(
            at.timestamp() for at in JobRecord.objects.values_list("last_attempted_at", flat=True) if at
        )
        assert len(starts) == JOBS * 2
        closest = min(later - earlier for earlier, later in zip(starts, starts[50:], strict=False))
        lasted = starts[-1] - starts[0]
        print(f"{len(starts)} starts in {lasted:.2f} s; 51 of them took {closest:.4f} s or more")
        assert closest >= 1.0
        # And nearly as many as are allowed, at one time at least.
        assert closest < 1.6
