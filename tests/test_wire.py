"""``ENQUEUE = "wire"``: jobs that go to any Gearman server once their transaction has committed."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Protocol

import pytest
from asgiref.sync import async_to_sync
from django.db import transaction
from django.utils import timezone

from django_gearman.attempts import perform_assigned
from django_gearman.encoding import describe_exception
from django_gearman.exceptions import ConnectionFailed, InvalidCall, ResultNotKept, TooLarge
from django_gearman.models import JobRecord
from django_gearman.results import WireJobResult
from django_gearman.submission import client_for
from django_gearman.worker.loop import AssignedJob
from tests import harness, needs

from .app import jobs


class Server(Protocol):
    port: int


class Gearmand:
    """The C job server, which keeps nothing, on a free port."""

    def __init__(self, program: str) -> None:
        self._program = program
        self.port = harness.free_port()
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [self._program, "-L", "127.0.0.1", "-p", str(self.port), "-l", "none"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        harness.wait_until(self.answers, what="gearmand")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def answers(self) -> bool:
        try:
            return harness.ask(self.port, "version").startswith("OK")
        except OSError:
            return False

    def ignored(self) -> list[bool]:
        """Of each job, whether it was cancelled; it stays until a worker comes for it."""
        rows = [line.split("\t") for line in harness.ask(self.port, "show jobs").splitlines() if "\t" in line]
        return [row[2] != "0" for row in rows]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def c_server() -> Gearmand:
    program = shutil.which("gearmand", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
    if program is None:
        needs.missing("gearmand is not installed (Debian: gearman-job-server)")
    return Gearmand(program)


@pytest.fixture(params=["ours", "gearmand"])
def server(request: pytest.FixtureRequest, settings: Any) -> Iterator[Server]:
    """A job server that has no part in the database."""
    if request.param == "ours":
        with harness.server(store="memory") as process:
            settings.GEARMAN = {"default": {"SERVERS": [process.address], "ENQUEUE": "wire"}}
            yield process
            settings.GEARMAN = {}
        return
    gearmand = c_server()
    try:
        settings.GEARMAN = {"default": {"SERVERS": [gearmand.address], "ENQUEUE": "wire"}}
        yield gearmand
        settings.GEARMAN = {}
    finally:
        gearmand.stop()


def waiting(server: Server) -> dict[str, int]:
    rows = [line.split("\t") for line in harness.ask(server.port, "status").splitlines() if "\t" in line]
    return {row[0]: int(row[1]) - int(row[2]) for row in rows if int(row[1])}


class Worker:
    """Runs jobs of the test's app in a thread, and keeps what they returned."""

    def __init__(self, *functions: Any) -> None:
        self.results: list[bytes] = []
        self.functions = {each.name: self._function(each) for each in functions}

    def _function(self, job: Any) -> Any:
        def perform(assigned: AssignedJob) -> bytes:
            self.results.append(result := perform_assigned(job, assigned))
            return result

        return perform


@pytest.mark.django_db(transaction=True)
class TestEnqueue:
    def test_nothing_is_submitted_before_the_commit(self, server: Server):
        with transaction.atomic():
            result = jobs.add.enqueue(1, right=2)
            assert waiting(server) == {}
            assert result.handle == ""
            result.refresh()
            assert result.status == "READY"
        assert waiting(server) == {jobs.add.name: 1}
        assert isinstance(result, WireJobResult)
        assert result.handle.startswith("H:")
        assert not JobRecord.objects.exists()

    def test_rollback_leaves_no_job(self, server: Server):
        with transaction.atomic():
            jobs.add.enqueue(1)
            transaction.set_rollback(True)
        with transaction.atomic():
            with transaction.atomic():
                jobs.add.enqueue(2)
                transaction.set_rollback(True)
            jobs.shout.enqueue(b"kept")
        assert waiting(server) == {"shout": 1}

    def test_worker_runs_them_by_priority(self, server: Server):
        for priority in (0, -1, 7):
            jobs.add.using(priority=priority).enqueue(priority, 0)
        worker = Worker(jobs.add)
        with harness.worker_thread(worker.functions, server.port, describe=describe_exception):
            harness.wait_until(lambda: len(worker.results) == 3)
        assert worker.results == [b"7", b"0", b"-1"]

    def test_equal_jobs_are_two(self, server: Server):
        first, second = jobs.shout.enqueue(b"same"), jobs.shout.enqueue(b"same")
        assert first.id != second.id
        assert waiting(server) == {"shout": 2}

    def test_later_is_not_before(self, server: Server):
        moment = timezone.now() + timedelta(seconds=1)
        ran: dict[bytes, float] = {}

        def perform(assigned: AssignedJob) -> bytes:
            ran[assigned.workload] = time.time()
            return b""

        result = jobs.shout.using(run_after=moment).enqueue(b"later")
        assert result.status == "SCHEDULED"
        with harness.worker_thread({"shout": perform}, server.port):
            jobs.shout.enqueue(b"now")
            harness.wait_until(lambda: b"now" in ran and time.time() > moment.timestamp() + 1)
            # gearmand wakes nobody when a job is due: its workers find it when they come for another.
            jobs.shout.enqueue(b"another")
            harness.wait_until(lambda: len(ran) == 3)
        assert moment.timestamp() <= ran[b"later"]

    def test_many_of_which_one_cannot_be_sent(self, server: Server, settings: Any):
        """What was made ready before it does not go along with the next call of this thread."""
        settings.GEARMAN = {"default": {**settings.GEARMAN["default"], "MAX_PACKET": 70_000}}
        # Small enough for a workload, and too large beside the name of its function.
        with pytest.raises(TooLarge):
            jobs.shout.enqueue_many([((b"left",), {}), ((b"x" * 69_999,), {})])
        assert client_for().run_tasks() == []
        assert waiting(server) == {}

    def test_later_with_a_priority_is_not_possible(self, server: Server):
        later = jobs.add.using(run_after=timedelta(hours=1), priority=5)
        with pytest.raises(ValueError, match=r"add cannot be for later and of priority 5 .*leave out"):
            later.enqueue(1)
        assert waiting(server) == {}

    def test_standing_while_it_is_there_and_a_clear_error_when_it_is_gone(self, server: Server):
        result = jobs.report.enqueue(1)
        result.refresh()
        assert result.status == "READY"
        (found, running) = (jobs.report.get_result(result.id), [])

        def perform(assigned: AssignedJob) -> bytes:
            assigned.send_status(1, 4)
            harness.wait_until(lambda: (result.refresh(), result.progress == (1, 4))[1])
            running.append(result.status)
            return b"null"

        with harness.worker_thread({jobs.report.name: perform}, server.port):
            harness.wait_until(lambda: running)
            harness.wait_until(lambda: not waiting(server))
        assert running == ["RUNNING"]
        assert found.status == "READY"
        version = harness.ask(server.port, "version").split()[1]
        no_value, no_errors = (lambda: result.return_value), (lambda: result.errors)
        for ask in (result.get, result.refresh, found.refresh, no_value, no_errors):
            with pytest.raises(ResultNotKept, match="forgets a job at its end") as caught:
                ask()
            assert caught.value.version == version
            assert version in str(caught.value)
        with pytest.raises(ResultNotKept):
            jobs.report.get_result("never")

    def test_cancelled_by_who_enqueued_it_alone(self, server: Server):
        with transaction.atomic():
            result = jobs.shout.enqueue(b"a")
            assert result.cancel() is False
            assert async_to_sync(result.acancel)() is False
        found = jobs.shout.get_result(result.id)
        with pytest.raises(InvalidCall, match=r"shout\) has no handle here, .*; keep the result of"):
            found.cancel()
        assert async_to_sync(result.acancel)() is True
        if not isinstance(server, Gearmand):
            # gearmand counts what was cancelled until a worker comes for it.
            harness.wait_until(lambda: not waiting(server))
            with pytest.raises(ResultNotKept):
                found.cancel()

    def test_equal_uniques_of_one_function_are_one_job(self, server: Server):
        keyed = jobs.shout.using(unique="order-7")
        assert [each.enqueue(b"x").id for each in (keyed, keyed)] == ["order-7"] * 2
        long = jobs.shout.using(unique="order " + "7" * 60)
        first, second = long.enqueue_many([((b"x",), {}), ((b"x",), {})])
        assert first.id == second.id
        other = jobs.shout.using(unique="order " + "7" * 61).enqueue(b"x")
        assert other.id != first.id
        same = [jobs.shout.using(unique="-").enqueue(workload) for workload in (b"w", b"w", b"v")]
        assert same[0].handle == same[1].handle != same[2].handle
        assert waiting(server) == {"shout": 5}
        for result in (first, other, *same):
            result.refresh()
            assert result.status == "READY"
            assert jobs.shout.get_result(result.id) == result

    def test_unique_made_of_arguments_names_the_function(self, server: Server):
        first, second = jobs.append_once.enqueue("a", "x"), jobs.append_once.enqueue("a", "y")
        assert first.handle == second.handle
        assert first.id == f'{jobs.append_once.name}:["a"]'
        # Another function's of the same unique is no answer for it.
        with pytest.raises(ResultNotKept):
            jobs.append_once.get_result('["a"]')


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("server", ["gearmand"], indirect=True)
class TestHandlesThatAreGivenTwice:
    """gearmand counts its handles from 1 at each start, and names its host in them alone."""

    def test_of_two_servers_on_one_host(self, server: Gearmand, settings: Any):
        other = c_server()
        try:
            mine = jobs.shout.enqueue(b"first")
            settings.GEARMAN = {"default": {"SERVERS": [other.address], "ENQUEUE": "wire"}}
            theirs = jobs.shout.enqueue(b"second")
            settings.GEARMAN = {
                "default": {"SERVERS": [server.address, other.address], "ENQUEUE": "wire"},
            }
            assert mine.handle == theirs.handle
            assert theirs.cancel() is True
            assert (server.ignored(), other.ignored()) == ([False], [True])
            mine.refresh()
            other.stop()
            with pytest.raises(ConnectionFailed):
                theirs.refresh()
            assert mine.cancel() is True
            assert server.ignored() == [True]
        finally:
            other.stop()

    def test_of_a_server_that_was_started_again(self, server: Gearmand):
        lost = [jobs.shout.enqueue(b"lost"), jobs.append_once.enqueue("a", "x")]
        server.stop()
        server.start()
        there = [jobs.shout.enqueue(b"there"), jobs.shout.using(unique='["a"]').enqueue(b"there, too")]
        assert [each.handle for each in there] == [each.handle for each in lost]
        for result in lost:
            assert result.cancel() is False
            with pytest.raises(ResultNotKept):
                result.refresh()
        for result in there:
            result.refresh()
        assert not any(server.ignored())
        assert there[0].cancel() is True

    def test_of_a_unique_that_has_another_one_by_now(self, server: Gearmand):
        keyed = jobs.shout.using(unique="order-7")
        jobs.shout.enqueue(b"before it")
        lost = keyed.enqueue(b"x")
        server.stop()
        server.start()
        again = keyed.enqueue(b"x")
        assert (again.id, again.handle == lost.handle) == (lost.id, False)
        lost.refresh()
        assert lost.status == "READY"
        with pytest.raises(InvalidCall, match="has no handle here"):
            lost.cancel()
        assert server.ignored() == [False]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("server", ["gearmand"], indirect=True)
def test_gearmand_without_the_setting(server: Server, settings: Any, caplog: pytest.LogCaptureFixture):
    """Rows that nobody would ever look at; who enqueues them is told, and gearmand does not fill up."""
    settings.GEARMAN = {"default": {"SERVERS": [f"127.0.0.1:{server.port}"]}}
    for number in range(5):
        jobs.add.enqueue(number)
        assert client_for().echo(b"x") == b"x"
    assert waiting(server) == {"gearman:claim": 1}
    version = harness.ask(server.port, "version").split()[1]
    assert caplog.text.count(f"of version {version}, does not look into the database") == 1


@pytest.mark.django_db(transaction=True)
class TestNoServer:
    def test_who_commits_gets_the_error_and_the_commit_stays(self, settings: Any):
        settings.GEARMAN = {"default": {"SERVERS": [f"127.0.0.1:{harness.free_port()}"], "ENQUEUE": "wire"}}

        def view() -> None:
            with transaction.atomic():
                JobRecord.objects.create(function="of the view", workload=b"")
                jobs.add.enqueue(1)

        with pytest.raises(ConnectionFailed):
            view()
        assert JobRecord.objects.get().function == "of the view"
