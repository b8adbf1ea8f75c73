"""Several job servers on one database: what becomes of the jobs of one that dies, or sleeps."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from django_gearman.client.sync import Client
from django_gearman.models import JobRecord, ServerLease
from tests import harness
from tests.app.jobs import add, append_line

from .conftest import SITE

Status = JobRecord.Status
LEASE = 6.0

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]
Pair = tuple[harness.GearmanServerProcess, harness.GearmanServerProcess]


@pytest.fixture
def servers(transactional_db: None, settings: Any) -> Iterator[Pair]:
    env = SITE | {"GEARMAN_TEST_LEASE": str(LEASE)}
    with harness.server(name="one", env=env) as one, harness.server(name="two", env=env) as two:
        settings.GEARMAN = {"default": {"SERVERS": [one.address, two.address]}}
        yield one, two


def unfinished() -> int:
    return JobRecord.objects.filter(status__in=JobRecord.LIVE).count()


def owned_by(name: str) -> int:
    return JobRecord.objects.filter(status__in=JobRecord.LIVE, server__name=name).count()


def arguments(trace: str, number: int) -> bytes:
    """What ``append_line`` is called with, as any client would write it."""
    return json.dumps({"args": [trace, str(number)], "kwargs": {}}).encode()


class TestDeath:
    def test_jobs_of_both_doors_are_run_by_the_other(self, servers: Pair, tmp_path: Any):
        one, two = servers
        trace = str(tmp_path / "trace")
        with Client([one.address], timeout=30) as client:
            handles = {
                client.do_background(append_line.name, arguments(trace, number)) for number in range(100)
            }
        # Nobody works yet: the first server has them all, and some of the others.
        enqueued = [append_line.enqueue(trace, f"door {number}") for number in range(100)]
        harness.wait_until(lambda: owned_by("one") + owned_by("two") == 200)
        assert owned_by("one") >= 100
        one.kill()
        with harness.worker([one, two], processes=2, env=SITE) as worker:
            worker.complaints_allowed = True
            harness.wait_until(lambda: not unfinished(), what="the jobs of the dead server")
        with open(trace) as file:
            assert len(file.readlines()) == 200
        # A client knows its job by the handle that it was given.
        assert handles <= set(JobRecord.objects.values_list("handle", flat=True))
        for result in enqueued:
            result.refresh()
            assert result.status == Status.SUCCESSFUL
        assert "The job server one was not heard of for 6 s" in two.stderr
        two.complaints_allowed = True

    def test_clients_and_workers_go_on_with_the_other(self, servers: Pair):
        one, two = servers
        with harness.worker([one, two], processes=1, env=SITE) as worker:
            worker.complaints_allowed = True
            assert add.run(1) == 2
            one.kill()
            assert add.run(2) == 3
            assert add.enqueue(3).get(timeout=20) == 4
            one.start()
            # Its own jobs are its own again at once.
            assert add.enqueue(4).get(timeout=20) == 5
        two.complaints_allowed = True


class TestSleep:
    def test_server_that_slept_writes_nothing_and_stops(self, servers: Pair, tmp_path: Any):
        one, two = servers
        trace = str(tmp_path / "trace")
        with Client([one.address], timeout=30) as client:
            for number in range(50):
                client.do_background(append_line.name, arguments(trace, number))
        one.signal(signal.SIGSTOP)
        try:
            with harness.worker([two], processes=1, env=SITE):
                harness.wait_until(lambda: not unfinished(), what="the jobs of the sleeping server")
                records = list(JobRecord.objects.order_by("pk").values())
        finally:
            one.signal(signal.SIGCONT)
        assert one.wait() != 0
        assert "the job server 'one' was replaced" in one.stderr
        assert list(JobRecord.objects.order_by("pk").values()) == records
        assert {record["status"] for record in records} == {Status.SUCCESSFUL}
        assert {record["attempts"] for record in records} == {1}
        with open(trace) as file:
            assert len(file.readlines()) == 50
        assert ServerLease.objects.count() == 2
        one.forget()
        two.complaints_allowed = True
