"""A worker's processes: stopped, killed, replaced; and the jobs that they had in hand."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from django.db import connection

from django_gearman import JobResult
from django_gearman.models import JobRecord
from tests import harness
from tests.app.jobs import add, kill_worker, shout, wait_for_file

from .conftest import SITE
from .site.jobs import ask_database, die_once

pytestmark = pytest.mark.acceptance

Server = harness.GearmanServerProcess
Status = JobRecord.Status


class Held:
    """A job that runs until the test lets it go."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "go-on"
        self._pid = folder / "go-on.pid"
        self.result: JobResult[int] = wait_for_file.enqueue(str(self._path))

    def wait_started(self, other_than: Collection[int] = ()) -> int:
        """The process that runs it, once it is none of those."""

        def pid() -> int:
            found = int(self._pid.read_text() or 0) if self._pid.exists() else 0
            return 0 if found in other_than else found

        return harness.wait_until(pid, what="the job's start")

    def let_go(self) -> None:
        self._path.touch()

    def wait_end(self) -> JobRecord:
        records = JobRecord.objects.filter(pk=self.result.id).exclude(status__in=JobRecord.LIVE)
        return harness.wait_until(records.first, what="the job's end")


@pytest.fixture
def held(site_server: Server, tmp_path: Path) -> Held:
    return Held(tmp_path)


class TestTerm:
    def test_finishes_the_job_in_hand_and_takes_no_other(self, site_server: Server, held: Held):
        with harness.worker(site_server, processes=1, env=SITE) as worker:
            pid = held.wait_started()
            next_in_line = add.enqueue(1, right=2)
            worker.signal(signal.SIGTERM)
            harness.wait_until(lambda: "Stopping" in worker.stderr, what="the worker's word")
            assert worker.is_running
            held.let_go()
            assert worker.wait() == 0
            assert worker.stdout.endswith("gearman_worker stopped.\n")
        record = held.wait_end()
        assert (record.status, record.attempts) == (Status.SUCCESSFUL, 1)
        assert int(record.result or b"0") == pid
        next_in_line.refresh()
        assert next_in_line.status == Status.READY
        assert next_in_line.attempts == 0

    def test_to_the_whole_group(self, site_server: Server, held: Held):
        with harness.worker(site_server, processes=2, env=SITE) as worker:
            held.wait_started()
            worker.signal_group(signal.SIGTERM)
            harness.wait_until(lambda: "Stopping" in worker.stderr, what="the worker's word")
            # The idle process leaves, the other stays for its job.
            harness.wait_until(lambda: len(worker.children()) == 1, what="the end of the idle process")
            held.let_go()
            assert worker.wait() == 0
        record = held.wait_end()
        assert (record.status, record.attempts) == (Status.SUCCESSFUL, 1)

    def test_grace_ends(self, site_server: Server, held: Held):
        with harness.worker(site_server, processes=1, options=["--grace", "0.3"], env=SITE) as worker:
            pid = held.wait_started()
            worker.stop()
            assert "1 jobs went back to the queue" in worker.stdout
            assert not harness.is_running(pid)
        with harness.worker(site_server, processes=1, env=SITE):
            held.let_go()
            record = held.wait_end()
        assert (record.status, record.attempts) == (Status.SUCCESSFUL, 1)

    @pytest.mark.parametrize(
        "signals", [[signal.SIGQUIT], [signal.SIGTERM, signal.SIGTERM], [signal.SIGINT, signal.SIGINT]]
    )
    def test_at_once(self, site_server: Server, held: Held, signals: list[signal.Signals]):
        with harness.worker(site_server, processes=1, env=SITE) as worker:
            pid = held.wait_started()
            worker.signal(signals[0])
            for number in signals[1:]:
                harness.wait_until(lambda: "Stopping" in worker.stderr, what="the worker's word")
                worker.signal(number)
            assert worker.wait(20.0) == 0
            assert not harness.is_running(pid)
        harness.wait_until(lambda: site_server.status()[wait_for_file.name] == (1, 0, 0))
        held.let_go()


class TestKill:
    def test_child_is_replaced_and_its_job_runs_again(self, site_server: Server, held: Held):
        with harness.worker(site_server, processes=2, env=SITE) as worker:
            first = held.wait_started()
            children = worker.children()
            assert first in children
            os.kill(first, signal.SIGKILL)
            second = held.wait_started(other_than=[first])
            assert second != first
            harness.wait_until(lambda: len(worker.children()) == 2, what="a new process")
            assert first not in worker.children()
            held.let_go()
            record = held.wait_end()
        assert (record.status, record.attempts) == (Status.SUCCESSFUL, 2)
        assert int(record.result or b"0") == second
        assert record.started_at is not None
        assert record.last_attempted_at is not None
        assert record.started_at < record.last_attempted_at

    def test_all_children_are_replaced(self, site_server: Server, tmp_path: Path):
        with harness.worker(site_server, processes=3, env=SITE) as worker:
            worker.wait_connected()
            before = worker.children()
            for pid in before:
                os.kill(pid, signal.SIGKILL)
            harness.wait_until(
                lambda: len(worker.children()) == 3 and not set(worker.children()) & set(before),
                what="three new processes",
            )
            assert add.enqueue(1, right=2).get(timeout=30) == 3

    def test_job_that_kills_its_worker_once(self, site_server: Server, tmp_path: Path):
        with harness.worker(site_server, processes=1, env=SITE):
            result = die_once.enqueue(str(tmp_path / "died"))
            assert result.get(timeout=20.0) == "second"
        assert result.attempts == 2

    def test_job_that_kills_every_worker_is_given_up(self, transactional_db: None, settings: Any):
        with harness.server(options=["--job-retries", "3"], env=SITE) as server:
            settings.GEARMAN = server.setting
            with harness.worker(server, processes=2, env=SITE):
                killer = kill_worker.enqueue()
                others = [add.enqueue(number) for number in range(30)]
                harness.wait_until(
                    lambda: not JobRecord.objects.filter(status__in=JobRecord.LIVE).exists(), what="the ends"
                )
        killer.refresh()
        assert (killer.status, killer.attempts) == (Status.DEAD, 3)
        *_, error = killer.errors
        assert error.message == "The worker was lost: killed by SIGKILL at the last of 3 attempts"
        for number, other in enumerate(others):
            other.refresh()
            assert other.return_value == number + 1

    def test_parent_takes_its_children_along(self, site_server: Server, held: Held):
        worker = harness.WorkerProcess(site_server, processes=2, env=SITE)
        with worker, harness.worker(site_server, processes=1, functions=["shout"], env=SITE):
            held.wait_started()
            children = worker.children()
            assert len(children) == 2
            worker.signal(signal.SIGKILL)
            harness.wait_until(
                lambda: not any(harness.is_running(pid) for pid in children), 60.0, "the children's end"
            )
            assert worker.wait() == -signal.SIGKILL
            worker.forget()
            with harness.worker(site_server, processes=1, env=SITE) as elsewhere:
                second = held.wait_started(other_than=children)
                assert second in elsewhere.children()
                held.let_go()
                record = held.wait_end()
        assert record.status == Status.SUCCESSFUL
        # The other child may have had it for a moment, before its own end.
        assert record.attempts in (2, 3)


class TestRecords:
    def test_end_of_a_foreground_job_is_recorded_though_nothing_else_happens(self, site_server: Server):
        """Its entries wait for company, and are written when none comes."""
        successful = JobRecord.objects.filter(background=False, status=Status.SUCCESSFUL)
        with harness.worker(site_server, processes=1, env=SITE):
            for number in range(1, 21):
                assert shout.run(b"quiet") == b"QUIET"
                harness.wait_until(lambda number=number: successful.count() == number, what="the record")


class TestDatabaseConnections:
    @pytest.fixture(autouse=True)
    def _postgresql(self, db: None) -> None:
        if connection.vendor != "postgresql":
            pytest.skip("connections are cut with PostgreSQL's own means")

    def test_closed_after_each_job(self, site_server: Server):
        with harness.worker(site_server, processes=1, env=SITE):
            numbers = [ask_database.enqueue().get(timeout=30) for _ in range(3)]
            assert len(set(numbers)) == 3
            harness.wait_until(lambda: not any(map(has_connection, numbers)), what="closed connections")

    def test_cut_between_two_jobs(self, site_server: Server):
        with harness.worker(site_server, processes=1, env=SITE | {"GEARMAN_TEST_CONN_MAX_AGE": "600"}):
            first = ask_database.enqueue().get(timeout=30)
            assert ask_database.enqueue().get(timeout=30) == first
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(%s)", [first])
            harness.wait_until(lambda: not has_connection(first), what="the connection's end")
            result = ask_database.enqueue()
            assert result.get(timeout=30) != first
            assert result.attempts == 1

    def test_server_goes_on_when_its_connection_is_cut(self, site_server: Server):
        """The writer's connection, in the middle of everything."""
        with harness.worker(site_server, processes=2, env=SITE):
            results = []
            for number in range(200):
                results.append(add.enqueue(number))
                if number % 50 == 25:
                    cut_others()
            values = [result.get(timeout=60.0) for result in results]
        assert values == [number + 1 for number in range(200)]
        assert not JobRecord.objects.exclude(status=Status.SUCCESSFUL).exists()


def has_connection(number: int) -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", [number])
        return bool(cursor.fetchone()[0])


def cut_others() -> None:
    """Cut every other connection to the database of the test: the job server's and the workers'."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
