"""One contract for every ``JobStore``, then what only the database can promise."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

import pytest
from django.db import OperationalError, connection, connections, transaction
from django.db.models import F
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from django_gearman import GroupResult, group
from django_gearman.encoding import describe_exception
from django_gearman.exceptions import LeaseLost, StoreError
from django_gearman.management.console import close_connections
from django_gearman.models import (
    Cancellation,
    FunctionLimit,
    JobGroup,
    JobRecord,
    LimitUse,
    ServerLease,
    unique_key_of,
)
from django_gearman.permits import Granted, Limit, Request
from django_gearman.server.entries import (
    Crowd,
    JobDue,
    JobFinished,
    JobKept,
    JobProgress,
    JobQueued,
    JobRequeued,
    JobStarted,
    JobUnclaimed,
    Joined,
    Outcome,
    Question,
    Standing,
    StoredJob,
    Topic,
    Waiting,
)
from django_gearman.server.job_store import MemoryStore
from django_gearman.server.submissions import LATEST
from django_gearman.store import DatabaseStore
from django_gearman.store.columns import bytes_of_unique, text_of, text_of_unique
from django_gearman.store.door import Door
from django_gearman.store.lease import LEASE, RENEWALS, Lease
from django_gearman.store.set_operations import BadRow, array

from . import harness, needs
from .app.jobs import shout
from .simulation.store import Database, Row, SimulatedStore

Status = JobRecord.Status
AT = 1_700_000_000.25
"""A moment that every clock of the tests agrees on."""


def queued(number: int = 1, **changes: Any) -> JobQueued:
    entry = JobQueued(
        handle=b"H:one:1.%d" % number,
        function=b"reverse",
        unique=b"",
        workload=b"abc",
        priority=0,
        background=True,
        client=b"127.0.0.1",
        at=AT,
    )
    return entry._replace(**changes)


def started(number: int = 1, attempts: int = 1, at: float = AT + 1) -> JobStarted:
    return JobStarted(b"H:one:1.%d" % number, b"worker.7", attempts, at)


def finished(
    number: int = 1, outcome: Outcome = Outcome.SUCCESSFUL, data: bytes = b"cba", reason: str = ""
) -> JobFinished:
    return JobFinished(b"H:one:1.%d" % number, outcome, data, reason, AT + 2)


def requeued(attempt: int = 1, **fields: Any) -> JobRequeued:
    made = JobRequeued(queued().handle, b"worker.7", attempt, AT + 1, AT + 2, "The worker was lost")
    return made._replace(**fields)


class MemoryHouse:
    """``MemoryStore``, and what lies at its door."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self._rows = 0

    def put(self, function: bytes = b"reverse", **columns: Any) -> None:
        self._rows += 1
        job = StoredJob(b"H:one:r%d" % self._rows, function, b"", b"abc", 0, 0, None)
        self.store.unclaimed.append(job._replace(**columns))

    def restart(self) -> MemoryStore:
        return self.store


RENEWAL = "UPDATE " + connection.ops.quote_name(ServerLease._meta.db_table)


class DatabaseHouse:
    """``DatabaseStore``, and what lies at its door."""

    def __init__(self, name: str = "one") -> None:
        self._name = name
        self.store = self.restart()

    def put(self, function: bytes = b"reverse", **columns: Any) -> JobRecord:
        if "unique" in columns:
            columns["unique"] = text_of_unique(columns["unique"])
            workload = columns.get("workload", b"abc")
            columns["unique_key"] = unique_key_of(function.decode(), columns["unique"], workload)
        return JobRecord.objects.create(function=function.decode(), **{"workload": b"abc", **columns})

    def restart(self) -> DatabaseStore:
        self.store = DatabaseStore("default", self._name)
        self.store.take_lease("127.0.0.1:4730")
        return self.store


class SimulatedHouse:
    """The simulation's store: what is found with it must be true of a store that keeps the contract."""

    def __init__(self) -> None:
        self._database = Database()
        self.store = self.restart()

    def put(self, function: bytes = b"reverse", **columns: Any) -> None:
        fields = {"unique": b"", "workload": b"abc", "priority": 0, **columns}
        self._database.insert(Row(function, **fields))

    def restart(self) -> SimulatedStore:
        self.store = SimulatedStore(self._database, "one", clock=monotonic, wall=time.time)
        self.store.take_lease()
        return self.store


House = MemoryHouse | DatabaseHouse | SimulatedHouse
HOUSES = {"memory": MemoryHouse, "simulated": SimulatedHouse, "database": DatabaseHouse}


@pytest.fixture(
    params=["memory", "simulated", pytest.param("database", marks=pytest.mark.django_db(transaction=True))]
)
def house(request: pytest.FixtureRequest) -> House:
    return HOUSES[request.param]()


@pytest.fixture
def database(transactional_db: None) -> DatabaseHouse:
    return DatabaseHouse()


def write(
    store: MemoryStore | DatabaseStore | SimulatedStore, *entries: Any, again: bool = False
) -> dict[int, str]:
    return store.write(entries, again=again)


def replayed(house: House) -> list[StoredJob]:
    """What an earlier run left to be done, as the next one takes it over."""
    store = house.restart()
    return [*store.resume(), *store.claim(1000, {}).jobs]


def row(number: int = 1) -> JobRecord:
    return JobRecord.objects.get(handle=f"H:one:1.{number}")


class TestReplay:
    def test_unfinished_background_jobs_come_back_whole(self, house: House) -> None:
        job = queued(unique=b"key", workload=b"w", priority=50)
        assert write(house.store, job) == {}
        assert replayed(house) == [
            StoredJob(job.handle, job.function, job.unique, job.workload, job.priority, 0, None)
        ]

    def test_a_reducer_and_a_time_come_back(self, house: House) -> None:
        write(house.store, queued(reducer=b"sum", run_after=AT + 3600.25))
        (job,) = replayed(house)
        assert (job.reducer, job.run_after) == (b"sum", AT + 3600.25)

    def test_the_latest_time_that_the_core_lets_through_comes_back(self, house: House) -> None:
        write(house.store, queued(run_after=float(LATEST)))
        house.restart().resume()
        replies = house.store.ask([Question(Topic.TAKE, 1, 0.0, handle=queued().handle)])
        assert replies[1].run_after == LATEST

    def test_a_started_job_comes_back_with_its_attempts(self, house: House) -> None:
        write(house.store, queued(), started())
        write(house.store, requeued(), started(attempts=2))
        assert [job.attempts for job in replayed(house)] == [2]

    @pytest.mark.parametrize("outcome", Outcome)
    def test_an_ended_job_does_not_come_back(self, house: House, outcome: Outcome) -> None:
        write(house.store, queued(), started())
        write(house.store, finished(outcome=outcome))
        assert replayed(house) == []

    def test_a_job_that_came_and_ended_in_one_batch_does_not_come_back(self, house: House) -> None:
        write(house.store, queued(), started(), finished())
        assert replayed(house) == []

    def test_a_foreground_job_does_not_come_back(self, house: House) -> None:
        write(house.store, queued(background=False))
        write(house.store, queued(2, background=False), started(2))
        assert replayed(house) == []

    def test_a_foreground_job_that_was_kept_comes_back(self, house: House) -> None:
        write(house.store, queued(background=False))
        write(house.store, JobKept(queued().handle))
        assert [job.handle for job in replayed(house)] == [queued().handle]

    def test_a_foreground_job_kept_in_its_own_batch_comes_back(self, house: House) -> None:
        write(house.store, queued(background=False), started(), JobKept(queued().handle))
        assert [job.attempts for job in replayed(house)] == [1]

    def test_most_urgent_first_then_in_order(self, house: House) -> None:
        for number, priority in enumerate((0, 50, -50, 0, 50)):
            write(house.store, queued(number, priority=priority))
        handles = [job.handle[-1:] for job in replayed(house)]
        assert handles == [b"1", b"4", b"0", b"3", b"2"]

    def test_claimed_jobs_come_back(self, house: House) -> None:
        house.put()
        (claimed,) = house.store.claim(10, {}).jobs
        assert replayed(house) == [claimed]


class TestClaim:
    def test_nothing(self, house: House) -> None:
        assert house.store.claim(10, {}).jobs == []

    def test_a_job_is_claimed_once(self, house: House) -> None:
        house.put(b"reverse", workload=b"w")
        (job,) = house.store.claim(10, {}).jobs
        assert (job.function, job.workload, job.attempts, job.max_attempts) == (b"reverse", b"w", 0, None)
        assert house.store.claim(10, {}).jobs == []

    def test_no_more_than_the_limit(self, house: House) -> None:
        for _ in range(5):
            house.put()
        assert [len(house.store.claim(2, {}).jobs) for _ in range(4)] == [2, 2, 1, 0]

    def test_in_order(self, house: House) -> None:
        for number in range(5):
            house.put(workload=b"%d" % number)
        assert [job.workload for job in house.store.claim(10, {}).jobs] == [b"0", b"1", b"2", b"3", b"4"]

    def test_most_urgent_first(self, house: House) -> None:
        for priority in (0, 50, -50):
            house.put(priority=priority)
        assert [job.priority for _ in range(3) for job in house.store.claim(1, {}).jobs] == [50, 0, -50]

    def test_a_full_function_stays(self, house: House) -> None:
        house.put(b"full")
        house.put(b"other")
        house.put(b"too full")
        assert [job.function for job in house.store.claim(10, {b"full": 100, b"too full": 100}).jobs] == [
            b"other"
        ]
        assert [job.function for job in house.store.claim(10, {b"too full": 100}).jobs] == [b"full"]

    def test_a_full_function_leaves_its_share_to_others(self, house: House) -> None:
        for _ in range(6):
            house.put(b"a full one")
            house.put(b"other")
        claimed = house.store.claim(6, {b"a full one": 100})
        assert [job.function for job in claimed.jobs] == [b"other"] * 6

    def test_every_handle_is_another(self, house: House) -> None:
        for _ in range(3):
            house.put()
        handles = {job.handle for job in house.store.claim(2, {}).jobs + house.store.claim(2, {}).jobs}
        assert len(handles) == 3

    def test_a_claimed_job_can_be_finished(self, house: House) -> None:
        house.put()
        (job,) = house.store.claim(10, {}).jobs
        write(house.store, JobStarted(job.handle, b"w", 1, AT))
        write(house.store, JobFinished(job.handle, Outcome.SUCCESSFUL, b"cba", "", AT))
        assert replayed(house) == []


def later(number: int, run_after: float, **changes: Any) -> JobQueued:
    return queued(number, run_after=run_after, unclaimed=True, **changes)


class TestDoor:
    """What no server has, and what is known of it."""

    def test_a_submission_that_is_laid_there_is_claimed(self, house: House) -> None:
        assert write(house.store, queued(1, unclaimed=True), queued(2, unclaimed=True)) == {}
        assert [job.handle for job in house.store.claim(10, {}).jobs] == [queued(1).handle, queued(2).handle]
        write(house.store, started(1), finished(1))
        assert [job.handle for job in replayed(house)] == [queued(2).handle]

    def test_it_is_there_once_when_it_is_written_again(self, house: House) -> None:
        for again in (False, True):
            assert write(house.store, queued(1, unclaimed=True), again=again) == {}
        assert len(house.store.claim(10, {}).jobs) == 1
        # Also when it was claimed in between.
        assert write(house.store, queued(1, unclaimed=True), again=True) == {}
        assert house.store.claim(10, {}).jobs == []

    def test_what_was_refused_after_all_is_undone(self, house: House) -> None:
        write(house.store, queued(1, unclaimed=True))
        write(house.store, finished(1, Outcome.CANCELLED))
        assert house.store.claim(10, {}).jobs == []

    def test_what_was_refused_may_be_somebody_elses(self, house: House) -> None:
        write(house.store, queued(1))
        write(house.store, JobUnclaimed(queued(1).handle), JobUnclaimed(queued(2).handle))
        assert [job.handle for job in house.store.claim(10, {}).jobs] == [queued(1).handle]
        assert house.store.claim(10, {}).jobs == []

    def test_a_job_between_two_attempts_lies_there(self, house: House) -> None:
        write(house.store, queued(), started())
        write(house.store, requeued(run_after=AT + 5, unclaimed=True))
        (job,) = house.store.claim(10, {}).jobs
        assert (job.handle, job.attempts, job.run_after) == (queued().handle, 1, AT + 5)

    def test_also_one_of_which_all_is_written_at_once(self, house: House) -> None:
        write(
            house.store,
            queued(background=False),
            JobKept(queued().handle),
            started(),
            requeued(run_after=AT + 5, unclaimed=True),
        )
        (job,) = house.store.claim(10, {}).jobs
        assert (job.handle, job.attempts) == (queued().handle, 1)

    def test_due_jobs_come_in_the_order_of_their_times(self, house: House) -> None:
        for number, run_after in enumerate((AT + 3, AT + 1, AT + 2, AT + 1)):
            write(house.store, later(number, run_after))
        order = [int(job.handle[-1:]) for _ in range(4) for job in house.store.claim(1, {}).jobs]
        assert order == [1, 3, 2, 0]

    def test_none_is_early_and_the_next_time_is_told(self, house: House) -> None:
        in_an_hour = time.time() + 3600
        write(house.store, later(1, in_an_hour + 7200), later(2, in_an_hour))
        claimed = house.store.claim(10, {})
        assert claimed.jobs == []
        # A look is taken once in a second all the same.
        assert 0 < claimed.due_in <= 3600

    def test_less_urgent_ones_of_a_full_function_stay(self, house: House) -> None:
        for number, priority in enumerate((0, 50, -50)):
            write(house.store, queued(number, priority=priority, unclaimed=True))
        write(house.store, later(3, AT + 1, priority=50), later(4, AT + 1, priority=0))
        claimed = house.store.claim(10, {b"reverse": 0})
        assert sorted(job.handle[-1:] for job in claimed.jobs) == [b"1", b"3"]
        assert b"reverse" not in claimed.emptied

    def test_what_is_left_is_counted(self, house: House) -> None:
        in_an_hour = time.time() + 3600
        for number in range(5):
            write(house.store, queued(number, unclaimed=True))
        write(house.store, queued(5, priority=-50, unclaimed=True), later(6, in_an_hour))
        claimed = house.store.claim(2, {})
        assert len(claimed.jobs) == 2
        assert claimed.more
        left = claimed.left
        assert left is not None
        assert left[b"reverse", 0].ready == 3
        assert left[b"reverse", -50].ready == 1
        assert sum(waiting.later for waiting in left.values()) == 1

    def test_nothing_left_is_known_without_counting(self, house: House) -> None:
        write(house.store, queued(1, unclaimed=True))
        claimed = house.store.claim(10, {})
        assert (len(claimed.jobs), claimed.more, claimed.left) == (1, False, {})

    def test_every_function_gets_its_share(self, house: House) -> None:
        for number in range(20):
            write(house.store, queued(number, function=b"many", unclaimed=True))
        write(house.store, queued(30, function=b"one", unclaimed=True))
        functions = [job.function for job in house.store.claim(10, {}).jobs]
        if isinstance(house, DatabaseHouse):
            assert b"one" in functions
        assert len(functions) <= 10

    def test_how_its_jobs_stand(self, house: House) -> None:
        write(house.store, queued(1, unclaimed=True), queued(2, unique=b"u"), started(2))
        write(house.store, JobProgress(queued(2).handle, b"1", b"4"), queued(3), started(3), finished(3))
        handles = [queued(number).handle for number in (1, 2, 3)]
        questions = [Question(Topic.STATUS, n, 0.0, handle=handle) for n, handle in enumerate(handles)]
        questions += [
            Question(Topic.UNIQUE, 7, 0.0, unique=b"u"),
            Question(Topic.UNIQUE, 8, 0.0, unique=b"v"),
        ]
        replies = house.store.ask(questions)
        assert replies[0] == Standing(running=False)
        assert replies[1] == Standing(True, b"1", b"4")
        assert replies[2] is None
        assert isinstance(replies[7], Standing)
        assert replies[8] is None

    def test_one_is_taken_by_its_unique(self, house: House) -> None:
        write(house.store, queued(1, unclaimed=True), queued(2, unique=b"u", unclaimed=True))
        question = Question(Topic.TAKE, 1, 0.0, function=b"reverse", unique=b"u")
        taken = house.store.ask([question])[1]
        assert isinstance(taken, StoredJob)
        assert taken.handle == queued(2).handle
        assert house.store.ask([question])[1] is None
        assert [job.handle for job in house.store.claim(10, {}).jobs] == [queued(1).handle]

    def test_one_is_cancelled(self, house: House) -> None:
        write(house.store, queued(1, unclaimed=True), queued(2))
        asked = [Question(Topic.CANCEL, n, 0.0, handle=queued(n).handle) for n in (1, 2, 3)]
        assert house.store.ask(asked) == {1: True, 2: None, 3: None}
        assert house.store.claim(10, {}).jobs == []
        # Its unique is free again.
        assert write(house.store, queued(4, unique=b"u", unclaimed=True)) == {}
        house.store.ask([Question(Topic.CANCEL, 1, 0.0, handle=queued(4).handle)])
        assert write(house.store, queued(5, unique=b"u")) == {}


class TestDoorOfTheDatabase:
    def test_large_workloads_are_read_a_few_at_a_time(
        self, database: DatabaseHouse, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("django_gearman.store.door.CLAIM_BYTES", 100_000)
        workloads = [bytes([number]) * 60_000 for number in range(5)]
        for number, workload in enumerate(workloads):
            write(database.store, queued(number, workload=workload, unclaimed=True))
        parts = []
        while jobs := database.store.claim(10, {}).jobs:
            parts.append([job.workload for job in jobs])
        assert [len(part) for part in parts] == [2, 2, 1]
        assert [workload for part in parts for workload in part] == workloads

    def test_more_functions_than_are_looked_at_at_once(
        self, database: DatabaseHouse, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("django_gearman.store.door.FUNCTIONS_AT_ONCE", 3)
        monkeypatch.setattr("django_gearman.store.statements.FUNCTIONS_AT_ONCE", 3)
        database.restart()
        names = {b"f%d" % number for number in range(8)}
        for number, name in enumerate(sorted(names)):
            write(database.store, queued(number, function=name, unclaimed=True))
            if number % 2:
                write(database.store, later(100 + number, AT + 1, function=name))
        found = [job.function for _ in range(8) for job in database.store.claim(100, {}).jobs]
        assert set(found) == names
        assert len(found) == 12

    def test_what_is_to_do_is_counted(self, database: DatabaseHouse) -> None:
        database.put()
        in_an_hour = time.time() + 3600
        write(
            database.store, queued(1), queued(2), started(2), queued(3, unclaimed=True), later(4, in_an_hour)
        )
        write(database.store, queued(5), started(5), finished(5), queued(6, background=False))
        DatabaseHouse("two").store.write([queued(7, handle=b"H:two:1.7")], again=False)
        store = database.restart()
        store.resume()
        assert store.count_unfinished() == 5

    def test_what_is_claimed_is_told_of_when_the_rest_cannot_be_counted(
        self, database: DatabaseHouse, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is ours by then, and nobody looks for it again."""

        def count(door: Door) -> None:
            raise OperationalError("the connection is gone")

        database.put()
        write(database.store, later(2, time.time() + 3600))
        with monkeypatch.context() as patch:
            patch.setattr(Door, "count", count)
            claimed = database.store.claim(10, {})
        assert len(claimed.jobs) == 1
        assert claimed.left is None
        database.store._door.count_at = 0.0
        assert database.store.claim(10, {}).left == {(b"reverse", 0): Waiting(0, 1)}

    def test_orderly_stop_lays_there_what_waits(self, database: DatabaseHouse) -> None:
        write(database.store, queued(1), queued(2), started(2), queued(3, background=False))
        database.store.close()
        assert [row(number).server is None for number in (1, 2, 3)] == [True, False, False]
        other = DatabaseHouse("two")
        assert [job.handle for job in other.store.claim(10, {}).jobs] == [queued(1).handle]

    def test_stop_of_a_server_that_was_replaced_lays_nothing(self, database: DatabaseHouse) -> None:
        old = database.store
        write(old, queued(1))
        database.restart()
        old.close()
        assert row(1).server is not None


class TestCancellations:
    """What somebody without a line to the servers wants to end."""

    @pytest.fixture(autouse=True)
    def look_each_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("django_gearman.store.CANCEL_INTERVAL", 0.0)

    def wish(self, *records: JobRecord) -> None:
        Cancellation.objects.bulk_create([Cancellation(job_id=record.pk) for record in records])

    def wished(self) -> set[int]:
        return set(Cancellation.objects.values_list("pk", flat=True))

    def test_each_server_is_told_of_its_own(self, database: DatabaseHouse) -> None:
        other = DatabaseHouse("two").store
        mine = database.put()
        assert len(database.store.claim(10, {}).jobs) == 1
        others = database.put()
        assert len(other.claim(10, {}).jobs) == 1
        spared = database.put()
        assert len(database.store.claim(10, {}).jobs) == 1
        self.wish(mine, others)
        assert database.store.claim(10, {}).cancelled == [f"H:one:r{mine.pk}".encode()]
        assert other.claim(10, {}).cancelled == [f"H:two:r{others.pk}".encode()]
        # It stands until it is done, and then it is forgotten.
        assert database.store.claim(10, {}).cancelled == [f"H:one:r{mine.pk}".encode()]
        end = finished(outcome=Outcome.CANCELLED)
        write(database.store, end._replace(handle=f"H:one:r{mine.pk}".encode()))
        assert database.store.claim(10, {}).cancelled == []
        assert self.wished() == {others.pk}
        spared.refresh_from_db()
        assert spared.status == Status.READY

    def test_at_the_door(self, database: DatabaseHouse) -> None:
        """It came back there meanwhile, with or without a time for which it waits."""
        later = timezone.now() + timedelta(hours=1)
        records = [database.put(unique=b"u"), database.put(status=Status.RETRYING, run_after=later)]
        self.wish(*records)
        assert database.store.claim(10, {}).jobs == []
        for record in records:
            record.refresh_from_db()
            assert (record.status, record.unique_key) == (Status.CANCELLED, None)
            assert record.finished_at is not None
        database.store.claim(10, {})
        assert not self.wished()

    def test_of_a_server_that_is_gone(self, database: DatabaseHouse) -> None:
        other = DatabaseStore("default", "two", lease=0.2)
        other.take_lease("")
        record = database.put()
        assert len(database.store.claim(10, {}).jobs) == 1
        self.wish(record)
        assert other.claim(10, {}).cancelled == []
        assert self.wished() == {record.pk}

        def is_cancelled() -> bool:
            assert other.claim(10, {}).jobs == []  # not even for a moment
            record.refresh_from_db()
            return record.status == Status.CANCELLED

        harness.wait_until(is_cancelled)

    def test_of_jobs_that_have_ended_or_are_gone(self, database: DatabaseHouse) -> None:
        ended = database.put(status=Status.SUCCESSFUL, finished_at=timezone.now())
        gone = database.put(status=Status.SUCCESSFUL, finished_at=timezone.now())
        self.wish(ended, gone)
        JobRecord.objects.filter(pk=gone.pk).delete()
        assert database.store.claim(10, {}).cancelled == []
        assert not self.wished()
        ended.refresh_from_db()
        assert ended.status == Status.SUCCESSFUL

    def test_thousands(self, database: DatabaseHouse) -> None:
        records = [database.put() for _ in range(1203)]
        self.wish(*records)
        assert database.store.claim(10, {}).jobs == []
        assert JobRecord.objects.filter(status=Status.CANCELLED).count() == 1203
        database.store.claim(10, {})
        assert not self.wished()


class TestUnique:
    """One live job for each unique of a function, whichever door it came by."""

    def test_submission_joins_what_waits_at_the_door(self, house: House) -> None:
        house.put(unique=b"u")
        refused = write(house.store, queued(1, unique=b"u"), queued(2, unique=b"other"))
        assert list(refused) == [0]
        (job,) = house.store.claim(10, {}).jobs
        assert refused[0] == Joined(job.handle)
        assert {job.handle for job in replayed(house)} == {job.handle, queued(2).handle}

    def test_other_functions_and_empty_uniques_are_others(self, house: House) -> None:
        house.put(b"else", unique=b"u")
        house.put(unique=b"")
        assert write(house.store, queued(1, unique=b"u"), queued(2), queued(3)) == {}

    def test_workload_is_the_unique_where_that_is_a_dash(self, house: House) -> None:
        house.put(unique=b"-", workload=b"same")
        refused = write(
            house.store,
            queued(1, unique=b"-", workload=b"same"),
            queued(2, unique=b"-", workload=b"else"),
            queued(3, unique=b"-", workload=b""),
            queued(4, unique=b"-", workload=b""),
        )
        assert list(refused) == [0]

    def test_unique_of_a_job_that_ended_is_free(self, house: House) -> None:
        write(house.store, queued(1, unique=b"u"), started())
        assert write(house.store, finished(), queued(2, unique=b"u")) == {}
        assert write(house.store, queued(3, unique=b"u"), finished(2)) == {}
        assert [job.handle for job in replayed(house)] == [queued(3).handle]

    def test_batch_written_again_does_not_join_itself(self, house: House) -> None:
        batch = [queued(1, unique=b"u"), queued(2)]
        write(house.store, *batch)
        assert write(house.store, *batch, again=True) == {}

    def test_foreground_jobs_have_none(self, house: House) -> None:
        write(house.store, queued(1, unique=b"u", background=False))
        assert write(house.store, queued(2, unique=b"u")) == {}

    def test_neighbours_of_a_bad_row_join_all_the_same(self, database: DatabaseHouse) -> None:
        database.put(unique=b"u")
        refused = write(database.store, queued(1, unique=b"u"), queued(2, priority=101), queued(3))
        assert isinstance(refused[0], Joined)
        assert isinstance(refused[1], str)
        assert set(refused) == {0, 1}

    def test_kept_job_has_its_key_unless_another_has(self, database: DatabaseHouse) -> None:
        write(
            database.store,
            queued(1, unique=b"free", background=False),
            queued(2, unique=b"taken", background=False),
        )
        database.put(unique=b"taken")
        kept = JobKept(queued(1).handle, AT, b"reverse", b"free")
        assert write(database.store, kept, kept._replace(handle=queued(2).handle, unique=b"taken")) == {}
        assert row(1).unique_key == unique_key_of("reverse", "free")
        assert row(2).unique_key is None
        assert row(1).background
        assert row(2).background

    def test_ended_rows_have_no_key(self, database: DatabaseHouse) -> None:
        write(database.store, queued(unique=b"u"))
        assert row().unique_key == unique_key_of("reverse", "u")
        write(database.store, finished())
        assert row().unique_key is None


class TestTakeOver:
    """Several servers on one database: who is not heard of loses its jobs, and can write nothing more."""

    @pytest.fixture
    def other(self, database: DatabaseHouse) -> DatabaseStore:
        return DatabaseHouse("other").store

    def silence(self, other: DatabaseStore, seconds: float = 16.0) -> None:
        """The first server was not heard of for so long, and it is time for the other to look."""
        other._lease._looked_for_dead -= 5.0
        lease = ServerLease.objects.get(name="one")
        assert lease.renewed_at is not None
        ServerLease.objects.filter(pk=lease.pk).update(
            renewed_at=lease.renewed_at - timedelta(seconds=seconds)
        )

    def test_jobs_of_a_server_that_is_silent_go_to_another(
        self, database: DatabaseHouse, other: DatabaseStore
    ) -> None:
        database.put(b"claimed")
        (claimed,) = database.store.claim(10, {}).jobs
        write(database.store, queued(1, priority=50), queued(2), started(2), queued(3, run_after=AT + 1e9))
        self.silence(other)
        taken = other.claim(10, {}).jobs
        assert [(job.handle, job.attempts, job.interruptions) for job in taken] == [
            (queued(1).handle, 0, 0),
            (queued(2).handle, 1, 1),
            (claimed.handle, 0, 0),
        ]
        assert JobRecord.objects.get(handle="H:one:1.3").server is None
        (attempt,) = row(2).past_attempts.all()
        assert attempt.message == "The job server ended before the job did"
        with pytest.raises(LeaseLost):
            write(database.store, finished(2))
        assert row(2).status == Status.READY
        write(other, started(2)._replace(attempts=2), finished(2))
        assert row(2).status == Status.SUCCESSFUL

    def test_server_that_is_heard_of_keeps_its_jobs(
        self, database: DatabaseHouse, other: DatabaseStore
    ) -> None:
        write(database.store, queued())
        self.silence(other, seconds=14.0)
        assert other.claim(10, {}).jobs == []
        write(database.store, started())

    def test_silent_server_without_jobs_is_left_alone(
        self, database: DatabaseHouse, other: DatabaseStore
    ) -> None:
        self.silence(other, seconds=3600)
        assert other.claim(10, {}).jobs == []
        write(database.store, queued())

    def test_foreground_jobs_end_with_their_server(
        self, database: DatabaseHouse, other: DatabaseStore
    ) -> None:
        write(database.store, queued(1, background=False), queued(2, background=False), started(2))
        self.silence(other)
        assert other.claim(10, {}).jobs == []
        assert (row(1).status, row(2).status) == (Status.CANCELLED, Status.DEAD)

    def test_many_are_freed_in_parts(
        self, database: DatabaseHouse, other: DatabaseStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("django_gearman.store.lease.ADOPTED_AT_ONCE", 3)
        write(database.store, *(queued(number) for number in range(1, 8)))
        self.silence(other)
        taken = [job.handle for _ in range(3) for job in other.claim(10, {}).jobs]
        assert taken == [queued(number).handle for number in range(1, 8)]

    def test_server_of_its_name_that_comes_back_has_what_nobody_claimed(
        self, database: DatabaseHouse, other: DatabaseStore
    ) -> None:
        write(database.store, queued(1), queued(2))
        self.silence(other)
        assert [job.handle for job in other.claim(1, {}).jobs] == [queued(1).handle]
        again = database.restart()
        again.resume()
        assert [job.handle for job in again.claim(10, {}).jobs] == [queued(2).handle]

    def test_clocks_that_go_forward_take_no_jobs(
        self, database: DatabaseHouse, other: DatabaseStore, settings: Any
    ) -> None:
        """Of a project without time zones, whose leases are written in local time."""
        try:
            settings.USE_TZ = False
            settings.TIME_ZONE = "Etc/GMT+1"
            stores = [DatabaseHouse("one").store, DatabaseHouse("other").store]
            write(stores[0], queued(), started())
            settings.TIME_ZONE = "Etc/GMT"
            for _ in range(2):
                for store in reversed(stores):
                    store._lease._looked_for_dead -= 5.0
                    store._lease.renewed -= LEASE / 2
                    assert store.claim(10, {}).jobs == []
                    with store._lease.transaction():
                        leases, _ = store._lease.those_of([each.lease_id for each in stores])
                    assert not any(lease.is_silent for lease in leases.values())
                # All have renewed since: now they judge again.
                for store in stores:
                    store._lease._judges_from = 0.0
            write(stores[0], finished())
            assert row().status == Status.SUCCESSFUL
        finally:
            connection.close()

    def test_servers_that_are_gone_for_good_cost_nothing(
        self, database: DatabaseHouse, other: DatabaseStore
    ) -> None:
        """Where each deployment has a name of its own their rows are many."""
        past = timezone.now() - timedelta(days=1)
        ServerLease.objects.bulk_create(
            [ServerLease(name=f"gone {number}", epoch=1, renewed_at=past) for number in range(30)]
        )
        with CaptureQueriesContext(connection) as queries:
            other._lease.free_jobs_of_the_dead()
        assert len(queries) < 10
        with other._lease.transaction():
            assert set(other._lease.those_of([])[0]) == {other.lease_id}
        # Among them one that has jobs is found.
        write(database.store, queued())
        self.silence(other)
        assert len(other.claim(10, {}).jobs) == 1

    def set_clock(self, *stores: DatabaseStore, seconds: float) -> None:
        """The database's clock was set forward by so much, or back, since they read it last."""
        leases = ServerLease.objects
        leases.update(renewed_at=F("renewed_at") - timedelta(seconds=seconds))
        for store in stores:
            assert store._lease._ahead is not None
            store._lease._ahead -= seconds

    def watch(self, *stores: DatabaseStore) -> None:
        """They look at the others, and have done so for longer than a lease."""
        for store in stores:
            store._lease._watches_since -= 60.0
            store._lease._looked_for_dead -= 5.0
            store.claim(10, {})

    @pytest.mark.parametrize("seconds", [3600.0, -3600.0, 20.0])
    def test_clock_of_the_database_that_is_set_takes_no_jobs(
        self, database: DatabaseHouse, other: DatabaseStore, seconds: float
    ) -> None:
        """It goes forward, too, where a machine slept that has both the database and the servers."""
        stores = [database.store, other]
        for store, number in zip(stores, (1, 2), strict=True):
            write(store, queued(number), started(number))
        self.watch(*stores)
        self.set_clock(*stores, seconds=seconds)
        for store in reversed(stores):
            store._lease._looked_for_dead -= 5.0
            assert store.claim(10, {}).jobs == []
            with store._lease.transaction():
                leases, _ = store._lease.those_of(each._lease.id for each in stores)
            assert not any(lease.is_silent for lease in leases.values())
        for store, number in zip(stores, (1, 2), strict=True):
            write(store, finished(number))
            assert row(number).status == Status.SUCCESSFUL

    @pytest.mark.parametrize("seconds", [3600.0, -3600.0])
    def test_server_that_died_before_the_clock_was_set_loses_its_jobs(
        self,
        database: DatabaseHouse,
        other: DatabaseStore,
        monkeypatch: pytest.MonkeyPatch,
        seconds: float,
    ) -> None:
        """A lease later, and not when the clock has come as far as it was."""
        write(database.store, queued())
        self.watch(other)
        self.set_clock(other, seconds=seconds)
        ahead = 0.0
        monkeypatch.setattr("django_gearman.store.lease.monotonic", lambda: monotonic() + ahead)
        taken: list[StoredJob] = []
        while not taken and ahead < 60.0:
            other._lease._looked_for_dead -= 5.0
            assert other._lease._ahead is not None
            taken = other.claim(10, {}).jobs
            ahead += 1.0
            other._lease._ahead -= 1.0
        assert [job.handle for job in taken] == [queued().handle]
        assert 15.0 <= ahead <= 30.0

    def outage(self, *stores: DatabaseStore, seconds: float) -> None:
        """The database was out of reach for so long, and is back."""
        for store in stores:
            store._lease.renewed -= seconds
            store._lease._looked_for_dead -= seconds
            store._lease._judges_from -= seconds
        ServerLease.objects.update(renewed_at=F("renewed_at") - timedelta(seconds=seconds))

    def test_first_that_is_back_after_an_outage_leaves_the_others_their_jobs(
        self, database: DatabaseHouse, other: DatabaseStore
    ) -> None:
        stores = [database.store, other, DatabaseHouse("third").store]
        for store, number in zip(stores, (1, 2, 3), strict=True):
            write(store, queued(number), started(number))
        for _ in range(2):
            self.outage(*stores, seconds=70.0)
            first, *others = stores
            for _ in range(3):
                assert first.claim(10, {}).jobs == []
            for store in others:
                assert store.claim(10, {}).jobs == []
            stores = [*others, first]
        for store, number in zip((database.store, other, stores[0]), (1, 2, 3), strict=True):
            write(store, finished(number))
            assert row(number).status == Status.SUCCESSFUL

    def test_outage_while_one_looks_at_the_others_leaves_them_their_jobs(
        self, database: DatabaseHouse, other: DatabaseStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(database.store, queued(), started())
        other._lease._looked_for_dead -= 70.0
        wants_a_look = Lease.wants_a_look_at_others.fget
        assert wants_a_look is not None
        looks: list[Lease] = []

        def wants_a_look_and_hangs(lease: Lease) -> bool:
            if not wants_a_look(lease):
                return False
            looks.append(lease)
            self.outage(database.store, other, seconds=70.0)
            return True

        monkeypatch.setattr(Lease, "wants_a_look_at_others", property(wants_a_look_and_hangs))
        for _ in range(3):
            assert other.claim(10, {}).jobs == []
        assert looks == [other._lease]
        write(database.store, finished())
        assert row().status == Status.SUCCESSFUL

    def test_who_does_not_come_back_after_an_outage_loses_its_jobs(
        self, database: DatabaseHouse, other: DatabaseStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A whole lease later: long enough for the others, and within the half minute that was promised."""
        write(database.store, queued())
        self.outage(database.store, other, seconds=70.0)
        now = began = monotonic()
        monkeypatch.setattr("django_gearman.store.lease.monotonic", lambda: now)
        taken: list[StoredJob] = []
        while not taken and now - began < 60.0:
            taken = other.claim(10, {}).jobs
            now += 1.0
            # That the database's clock does not follow is no news.
            other._lease._ahead = None
        assert [job.handle for job in taken] == [queued().handle]
        assert 15.0 <= now - began <= 30.0

    @pytest.mark.parametrize("lease", [0.5, 1.0, 3.0, 15.0])
    def test_idle_server_looks_for_the_dead_however_short_leases_are(
        self, database: DatabaseHouse, lease: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It looks at the door once a second, or a little later."""
        write(database.store, queued())
        ServerLease.objects.update(renewed_at=timezone.now() - timedelta(seconds=3600))
        now = began = monotonic()
        monkeypatch.setattr("django_gearman.store.lease.monotonic", lambda: now)
        other = DatabaseStore("default", "other", lease=lease)
        other.take_lease("")
        # That the database's clock does not follow is no news.
        other._lease._ahead = None
        taken: list[StoredJob] = []
        while not taken and now - began < 60.0:
            now += 1.1
            taken = other.claim(10, {}).jobs
        assert [job.handle for job in taken] == [queued().handle]
        assert now - began <= lease / 3 + 2.5

    def test_proof_of_the_lease_is_dated_from_before_it(self, database: DatabaseHouse) -> None:
        database.store._lease.renewed -= LEASE / 2
        before = monotonic()
        write(database.store, queued())
        assert before <= database.store.renewed <= monotonic()

    def test_lease_is_written_now_and_then_where_a_look_proves_it(self, database: DatabaseHouse) -> None:
        store = database.store
        shown = store.renewed
        with CaptureQueriesContext(connection) as queries:
            write(store, queued())
        renewals = [each for each in queries.captured_queries if RENEWAL in each["sql"]]
        if connection.vendor != "sqlite":
            # Nothing else keeps another server from raising the epoch meanwhile.
            assert len(renewals) == 1
            return
        assert not renewals
        # Others see what was written alone.
        assert store.renewed == shown
        store._lease.renewed -= LEASE / RENEWALS
        with CaptureQueriesContext(connection) as queries:
            write(store, queued(2))
        assert [each for each in queries.captured_queries if RENEWAL in each["sql"]]
        assert store.renewed > shown

    def test_replaced_server_is_found_out_by_a_look(self, database: DatabaseHouse) -> None:
        store = database.store
        write(store, queued())
        database.restart()
        with pytest.raises(LeaseLost):
            write(store, queued(2))
        assert JobRecord.objects.filter(handle=queued(2).handle.decode()).count() == 0

    def test_what_an_earlier_run_had_comes_before_what_came_since(
        self, database: DatabaseHouse, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("django_gearman.store.lease.ADOPTED_AT_ONCE", 2)
        write(database.store, *(queued(number) for number in range(1, 6)))
        write(database.store, queued(6, unclaimed=True))
        again = database.restart()
        again.resume()
        taken = [job.handle for _ in range(4) for job in again.claim(10, {}).jobs]
        assert taken == [queued(number).handle for number in range(1, 7)]


class TestAgain:
    """A batch whose outcome is unknown is written once more."""

    BATCHES = (
        pytest.param([queued()], id="queued"),
        pytest.param([queued(), started()], id="started"),
        pytest.param([queued(), started(), requeued()], id="requeued"),
        pytest.param([queued(), started(), finished(), queued(2)], id="finished"),
        pytest.param([queued(background=False), JobKept(queued().handle)], id="kept"),
        pytest.param(
            [queued(), JobFinished(queued().handle, Outcome.CANCELLED, b"", "late", AT)], id="undone"
        ),
    )

    @pytest.mark.parametrize("batch", BATCHES)
    @pytest.mark.parametrize("was_written", [True, False])
    def test_nothing_is_there_twice(self, house: House, batch: list[Any], was_written: bool) -> None:
        if was_written:
            assert house.store.write(batch, again=False) == {}
        assert house.store.write(batch, again=True) == {}
        first = [(job.handle, job.attempts) for job in replayed(house)]
        other = MemoryHouse()
        other.store.write(batch, again=False)
        assert first == [(job.handle, job.attempts) for job in replayed(other)]

    def test_a_submission_that_was_refused_meanwhile_is_undone(self, house: House) -> None:
        """The journal writes CANCELLED alone for a submission that its client was told is lost."""
        end = JobFinished(queued().handle, Outcome.CANCELLED, b"", "The store is out of reach", AT)
        write(house.store, queued())
        assert write(house.store, end, again=True) == {}
        assert replayed(house) == []

    def test_the_end_of_a_job_that_is_not_there_is_no_error(self, house: House) -> None:
        assert write(house.store, finished(9, Outcome.CANCELLED), again=True) == {}


HOSTILE = {
    "empty": b"",
    "nul": b"\0",
    "nuls": b"a\0b\0\0c",
    "not UTF-8": bytes(range(256)),
    "surrogate": "\ud800".encode(errors="surrogatepass"),
    "SQL": b"'; DROP TABLE django_gearman_jobrecord; --%s%%",
    "10 MB": bytes(10 * 1024 * 1024),
}


class TestBytes:
    @pytest.mark.parametrize("workload", HOSTILE.values(), ids=HOSTILE)
    def test_a_workload_comes_back_as_it_was(self, house: House, workload: bytes) -> None:
        assert write(house.store, queued(workload=workload)) == {}
        assert replayed(house)[0].workload == workload

    @pytest.mark.parametrize(
        "unique",
        [
            b"",
            b"-",
            b"key",
            "schl\u00fcssel".encode(),
            b"\xff\xfe",
            b"\x01",
            b"\x01\xff",
            b"x\0y",
            b"u" * 255,
            b"\xff" * 255,
        ],
    )
    def test_a_unique_comes_back_as_it_was(self, house: House, unique: bytes) -> None:
        assert write(house.store, queued(unique=unique)) == {}
        assert replayed(house)[0].unique == unique
        assert bytes_of_unique(text_of_unique(unique)) == unique

    def test_two_uniques_never_share_a_text(self) -> None:
        uniques = [
            b"",
            b"\xff",
            "\u00ff".encode(),
            b"\x01\xc3\xbf",
            b"\x01\xff",
            b"\x01",
            b"\x01\x01",
            b"\0",
            b"\x01\0",
        ]
        assert len({text_of_unique(unique) for unique in uniques}) == len(uniques)

    @pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
    @pytest.mark.parametrize("outcome", [Outcome.SUCCESSFUL, Outcome.FAILED])
    def test_any_outcome_can_be_kept(self, house: House, data: bytes, outcome: Outcome) -> None:
        write(house.store, queued())
        assert write(house.store, finished(outcome=outcome, data=data)) == {}
        assert replayed(house) == []

    @pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
    def test_a_result_comes_back_as_it_was(self, database: DatabaseHouse, data: bytes) -> None:
        write(database.store, queued())
        assert write(database.store, finished(data=data)) == {}
        assert bytes(row().result or b"") == data

    @pytest.mark.parametrize(
        "text",
        [
            "NULL",
            '"',
            "\\",
            '\\"',
            "{a,b}",
            "it's",
            " \n\t",
            "\\x00",
            "%s",
            "?",
            "gr\u00fc\u00df",
            "\U0001f600",
        ],
    )
    def test_a_message_comes_back_as_it_was(self, database: DatabaseHouse, text: str) -> None:
        write(database.store, queued(), queued(2))
        ends = [finished(number, Outcome.FAILED, text.encode()) for number in (1, 2)]
        assert write(database.store, started()._replace(worker=text.encode()), *ends) == {}
        assert (row(1).message, row(2).message, row(1).worker) == (text, text, text)

    def test_names_from_the_wire_can_be_anything(self, database: DatabaseHouse) -> None:
        name = b"\0\xff" + "\u00fc".encode() * 200
        write(database.store, queued(client=name), started()._replace(worker=name))
        assert len(row().client) == len(row().worker) == 128
        assert row().client.startswith("\\0\\xff\u00fc")

    def test_text_has_no_nul(self) -> None:
        assert text_of(b"a\0\xffb") == "a\\0\\xffb"


class TestRows:
    """What each entry leaves in the row."""

    def test_queued(self, transactional_db: None) -> None:
        store = DatabaseStore("default", "one", queue_of=lambda function: f"queue of {function}")
        epoch = store.take_lease("127.0.0.1:4730")
        write(store, queued(unique=b"key", priority=50))
        record = row()
        assert (record.function, record.queue_name, record.unique) == ("reverse", "queue of reverse", "key")
        assert (record.status, record.priority, record.background) == (Status.READY, 50, True)
        assert (bytes(record.workload), record.client) == (b"abc", "127.0.0.1")
        assert (record.server_id, record.server_epoch) == (ServerLease.objects.get().pk, epoch)
        assert record.enqueued_at == datetime.fromtimestamp(AT, UTC)
        assert record.result is None

    def test_for_later_and_due(self, database: DatabaseHouse) -> None:
        write(database.store, queued(run_after=AT + 60))
        assert (row().status, row().run_after) == (
            Status.SCHEDULED,
            row().enqueued_at + timedelta(seconds=60),
        )
        write(database.store, JobDue(queued().handle))
        assert row().status == Status.READY

    def test_started(self, database: DatabaseHouse) -> None:
        write(database.store, queued(), started())
        record = row()
        assert (record.status, record.worker, record.attempts) == (Status.RUNNING, "worker.7", 1)
        assert record.started_at == record.last_attempted_at == datetime.fromtimestamp(AT + 1, UTC)

    def test_the_second_attempt_keeps_the_first_start(self, database: DatabaseHouse) -> None:
        write(database.store, queued(), started())
        write(database.store, requeued(), started(attempts=2, at=AT + 60))
        record = row()
        assert record.started_at == datetime.fromtimestamp(AT + 1, UTC)
        assert record.last_attempted_at == datetime.fromtimestamp(AT + 60, UTC)

    @pytest.mark.parametrize(
        ("numerator", "denominator", "expected"),
        [
            (b"1", b"3", (1, 3)),
            (b"0.5", b"1", (0, 1)),
            (b"", b"x", (None, None)),
            (b"nan", b"inf", (None, None)),
            (b"9" * 40, b"-" + b"9" * 30, (2**63 - 1, 1 - 2**63)),
            (b"\xff\0", b"1_0", (None, 10)),
        ],
    )
    def test_progress(
        self, database: DatabaseHouse, numerator: bytes, denominator: bytes, expected: tuple[Any, Any]
    ) -> None:
        write(database.store, queued(), started())
        assert write(database.store, JobProgress(queued().handle, numerator, denominator)) == {}
        assert (row().numerator, row().denominator) == expected

    def test_a_requeued_job_has_no_progress(self, database: DatabaseHouse) -> None:
        write(database.store, queued(), started(), JobProgress(queued().handle, b"1", b"2"))
        write(database.store, requeued())
        assert (row().status, row().numerator, row().denominator) == (Status.READY, None, None)

    def test_an_attempt_that_came_to_nothing_is_kept(self, database: DatabaseHouse) -> None:
        write(database.store, queued(), started(), requeued())
        told = describe_exception(ValueError("no\0way"))
        write(database.store, started(attempts=2), requeued(2, reason="", data=told, run_after=AT + 100.5))
        record = row()
        assert (record.status, record.run_after) == (
            Status.RETRYING,
            datetime.fromtimestamp(AT + 100.5, UTC),
        )
        first, second = record.past_attempts.order_by("number")
        assert (first.number, first.worker, first.message) == (1, "worker.7", "The worker was lost")
        assert first.started_at == datetime.fromtimestamp(AT + 1, UTC)
        assert first.finished_at == datetime.fromtimestamp(AT + 2, UTC)
        assert (second.exception, second.message) == ("builtins.ValueError", "no\\0way")
        assert "ValueError" in second.traceback
        (job,) = replayed(database)
        assert (job.attempts, job.run_after) == (2, AT + 100.5)
        write(database.store, JobDue(queued().handle))
        assert row().status == Status.READY

    def test_an_attempt_that_the_server_did_not_outlive_is_kept_once(self, database: DatabaseHouse) -> None:
        write(database.store, queued(), started())
        for _ in range(2):
            replayed(database)
        (attempt,) = row().past_attempts.all()
        assert (attempt.number, attempt.worker) == (1, "worker.7")
        assert attempt.message == "The job server ended before the job did"
        assert attempt.started_at == datetime.fromtimestamp(AT + 1, UTC)

    def test_a_batch_written_again_keeps_its_attempts_once(self, database: DatabaseHouse) -> None:
        batch = [queued(), started(), requeued(), started(attempts=2), requeued(2)]
        write(database.store, *batch)
        write(database.store, *batch, again=True)
        assert [each.number for each in row().past_attempts.order_by("number")] == [1, 2]

    def test_successful(self, database: DatabaseHouse) -> None:
        write(database.store, queued(), started())
        write(database.store, finished(data=b"\0\xff"))
        record = row()
        assert (record.status, bytes(record.result or b"")) == (Status.SUCCESSFUL, b"\0\xff")
        assert record.finished_at == datetime.fromtimestamp(AT + 2, UTC)

    def test_an_empty_result_is_a_result(self, database: DatabaseHouse) -> None:
        write(database.store, queued(), finished(data=b""))
        assert row().result is not None

    def test_a_failure_without_a_word(self, database: DatabaseHouse) -> None:
        write(
            database.store, queued(), finished(outcome=Outcome.DEAD, data=b"", reason="the worker was lost")
        )
        record = row()
        assert (record.status, record.message) == (Status.DEAD, "the worker was lost")
        assert (record.exception, record.traceback, record.result) == ("", "", None)

    def test_kept(self, database: DatabaseHouse) -> None:
        write(database.store, queued(background=False))
        assert row().background is False
        write(database.store, JobKept(queued().handle))
        assert row().background is True

    def test_only_rows_of_this_server_are_changed(self, database: DatabaseHouse) -> None:
        write(database.store, queued())
        other = DatabaseHouse("two")
        write(other.store, finished())
        assert row().status == Status.READY

    def test_replay_says_how_foreground_jobs_ended(self, database: DatabaseHouse) -> None:
        write(database.store, queued(1, background=False), queued(2, background=False), started(2))
        replayed(database)
        assert (row(1).status, row(2).status) == (Status.CANCELLED, Status.DEAD)
        assert row(1).finished_at is not None
        assert "server ended" in row(1).message

    def test_replayed_jobs_wait_again(self, database: DatabaseHouse) -> None:
        write(database.store, queued(), started(), JobProgress(queued().handle, b"1", b"2"))
        database.restart().resume()
        # It is this run's at once: its worker may come back with it.
        assert (row().status, row().numerator, row().server_epoch) == (Status.READY, None, 2)
        # That the server ended is not the job's fault.
        assert (row().attempts, row().interruptions) == (1, 1)


def failure(data: bytes) -> tuple[str, str, str]:
    write(DatabaseHouse().store, queued(), finished(outcome=Outcome.FAILED, data=data, reason="reason"))
    record = row()
    assert record.status == Status.FAILED
    return record.exception, record.message, record.traceback


@pytest.mark.django_db(transaction=True)
class TestFailureData:
    """What a worker sends with WORK_EXCEPTION, however odd, ends up readable in the row."""

    def test_a_worker_of_ours(self) -> None:
        told = {"exception": "builtins.ValueError", "message": "no", "traceback": "Traceback ..."}
        assert failure(json.dumps(told).encode()) == ("builtins.ValueError", "no", "Traceback ...")

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"it broke", "it broke"),
            (b"[1, 2]", "[1, 2]"),
            (b"null", "null"),
            (b'{"exception": 1}', '{"exception": 1}'),
            (b"\xff\0", "\\xff\\0"),
            (b"9" * 5000, "9" * 5000),
        ],
    )
    def test_a_worker_of_another_language(self, data: bytes, message: str) -> None:
        assert failure(data) == ("", message, "")

    def test_keys_may_be_missing(self) -> None:
        assert failure(b'{"message": "no"}') == ("", "no", "")

    def test_nuls_in_json(self) -> None:
        assert failure(b'{"exception": "A\\u0000B", "message": "\\u0000", "traceback": "\\u0000t"}') == (
            "A\\0B",
            "\\0",
            "\\0t",
        )

    def test_a_long_name_is_cut(self) -> None:
        assert len(failure(json.dumps({"exception": "x" * 5000}).encode())[0]) == 512

    def test_lone_surrogates(self) -> None:
        """``str(error)`` has them for file names that are no UTF-8."""
        told = {"exception": "a.B\udc80", "message": "no file \udcff", "traceback": "\ud800"}
        assert failure(json.dumps(told).encode()) == ("a.B\\udc80", "no file \\udcff", "\\ud800")

    def test_deeply_nested_json(self) -> None:
        data = b"[" * 200_000
        assert failure(data) == ("", data.decode(), "")


class TestBadRows:
    """A row that the database refuses does not take its neighbours with it."""

    def bad(self, number: int) -> JobQueued:
        return queued(number, priority=101)  # outside of the table's constraint

    def test_neighbours_are_kept(self, database: DatabaseHouse) -> None:
        refused = write(database.store, queued(1), self.bad(2), queued(3), started(1), finished(1))
        assert list(refused) == [1]
        assert row(1).status == Status.SUCCESSFUL
        assert row(3).status == Status.READY
        assert not JobRecord.objects.filter(handle="H:one:1.2").exists()

    def test_all_bad(self, database: DatabaseHouse) -> None:
        assert list(write(database.store, self.bad(1), self.bad(2))) == [0, 1]
        assert write(database.store, queued(3)) == {}

    def test_what_follows_a_bad_submission_changes_nothing(self, database: DatabaseHouse) -> None:
        assert list(write(database.store, self.bad(1), started(1), finished(1))) == [0]
        assert not JobRecord.objects.exists()

    def test_a_handle_that_is_taken(self, database: DatabaseHouse) -> None:
        write(database.store, queued(1))
        assert list(write(database.store, queued(1), queued(2))) == [0]
        assert JobRecord.objects.count() == 2

    def test_one_of_many_costs_few_statements(self, database: DatabaseHouse) -> None:
        batch = [queued(number) for number in range(512)]
        batch[300] = self.bad(300)
        with CaptureQueriesContext(connection) as queries:
            assert list(database.store.write(batch, again=False)) == [300]
        assert JobRecord.objects.count() == 511
        assert len(queries) < 100
        syncs = [query for query in queries if query["sql"].startswith("COMMIT")]
        assert len(syncs) <= 2

    def test_several_of_many(self, database: DatabaseHouse) -> None:
        bad = {0, 1, 77, 198, 199}
        batch = [self.bad(number) if number in bad else queued(number) for number in range(200)]
        assert set(database.store.write(batch, again=False)) == bad
        assert JobRecord.objects.count() == 195

    def test_a_result_that_cannot_be_stored_ends_its_job_all_the_same(
        self, database: DatabaseHouse, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Running it again would be worse, and so would a row that says RUNNING for ever."""
        write(database.store, queued(1), started(1), queued(2), started(2))
        change = database.store._set_operations.update

        def refuse(names: Any, changes: list[tuple[bytes, Any]]) -> None:
            # As each database does with what is larger than it takes, of one size or another.
            if any(len(change.get("result") or b"") > 100 for _, change in changes):
                raise BadRow("too large")
            change(names, changes)

        monkeypatch.setattr(database.store._set_operations, "update", refuse)
        refused = write(database.store, finished(1, data=bytes(101)), finished(2))
        assert refused == {0: "too large"}
        assert (row(1).status, row(2).status) == (Status.FAILED, Status.SUCCESSFUL)
        assert row(1).message == "What the worker sent could not be stored: too large"
        assert replayed(database) == []

    def test_nothing_of_the_row_is_told(self, database: DatabaseHouse) -> None:
        """What is told ends in the log: PostgreSQL would add the whole row."""
        secret = b"s3cr3t"
        (told,) = write(database.store, queued(1, priority=101, workload=secret, unique=secret)).values()
        assert "job_priority_range" in told
        assert secret.decode() not in told
        assert secret.hex() not in told

    def test_tried_again(self, database: DatabaseHouse) -> None:
        write(database.store, queued(1))
        assert list(write(database.store, queued(1), self.bad(2), queued(3), again=True)) == [1]
        assert JobRecord.objects.count() == 2


class TestUnknownCommits:
    """The answer to COMMIT was lost: what it did is looked up."""

    @pytest.fixture
    def commit_is_lost(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
        def arm() -> None:
            real = connections["default"]
            commit = real._commit

            def lose() -> None:
                monkeypatch.setattr(real, "_commit", commit)
                commit()
                raise OperationalError("server closed the connection unexpectedly")

            monkeypatch.setattr(real, "_commit", lose)

        return arm

    def test_claimed_rows_are_not_left_behind(
        self, database: DatabaseHouse, commit_is_lost: Callable[[], None]
    ) -> None:
        database.put(workload=b"1", priority=-1)
        database.put(workload=b"2")
        commit_is_lost()
        with pytest.raises(StoreError):
            database.store.claim(10, {})
        assert JobRecord.objects.filter(server=None).count() == 0
        database.put(workload=b"3")
        assert [job.workload for job in database.store.claim(10, {}).jobs] == [b"2", b"1", b"3"]
        assert database.store.claim(10, {}).jobs == []

    def test_what_was_ended_meanwhile_is_not_found_again(
        self, database: DatabaseHouse, commit_is_lost: Callable[[], None]
    ) -> None:
        # A submission that was refused while it lay at the door, and claimed from there.
        write(database.store, queued(unclaimed=True))
        commit_is_lost()
        with pytest.raises(StoreError):
            database.store.claim(10, {})
        write(database.store, finished(outcome=Outcome.CANCELLED))
        assert database.store.claim(10, {}).jobs == []

    @pytest.mark.parametrize("asked_again", [True, False])
    def test_a_row_that_was_asked_for_is_not_left_behind(
        self, database: DatabaseHouse, commit_is_lost: Callable[[], None], asked_again: bool
    ) -> None:
        write(database.store, queued(unclaimed=True))
        question = Question(Topic.TAKE, 1, 0.0, handle=queued().handle)
        commit_is_lost()
        with pytest.raises(StoreError):
            database.store.ask([question])
        if asked_again:
            reply = database.store.ask([question])[1]
            assert isinstance(reply, StoredJob)
            assert database.store.claim(10, {}).jobs == []
        else:
            assert [job.handle for job in database.store.claim(10, {}).jobs] == [queued().handle]

    def test_a_row_that_was_taken_before_the_store_was_lost_is_not_left_behind(
        self, database: DatabaseHouse, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(database.store, queued(unclaimed=True))

        def fail(self: Any, question: Question) -> None:
            raise StoreError("down")

        with monkeypatch.context() as patch:
            patch.setattr(Door, "cancel", fail)
            with pytest.raises(StoreError):
                database.store.ask(
                    [Question(Topic.TAKE, 1, 0.0, handle=queued().handle), Question(Topic.CANCEL, 2, 0.0)]
                )
        assert [job.handle for job in database.store.claim(10, {}).jobs] == [queued().handle]

    def test_rows_that_were_taken_before_a_count_failed_are_not_left_behind(
        self, database: DatabaseHouse, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As of a deep queue on PostgreSQL, where the role has a ``statement_timeout``."""
        for number in range(3):
            database.put(workload=b"%d" % number)
        tried: list[str] = []

        def time_out(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
            if sql.startswith("SELECT") and "COUNT(*)" in sql and "GROUP BY" in sql:
                tried.append(sql)
                raise OperationalError("canceling statement due to statement timeout")
            return execute(sql, params, many, context)

        with connection.execute_wrapper(time_out):
            claimed = database.store.claim(2, {})
            assert [job.workload for job in claimed.jobs] == [b"0", b"1"]
            assert claimed.left is None
            assert "could not be counted: canceling statement" in caplog.text
            # Nor is it tried with every claim.
            assert [job.workload for job in database.store.claim(2, {}).jobs] == [b"2"]
            assert len(tried) == 1

    def test_rows_that_were_not_taken_are_claimed_again(
        self, database: DatabaseHouse, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        database.put()
        connection.ensure_connection()

        def fail(self: Any, rows: Any) -> None:
            raise OperationalError("down")

        with monkeypatch.context() as patch:
            patch.setattr(Lease, "_prove", lambda self: fail(self, None))
            with pytest.raises(StoreError):
                database.store.claim(10, {})
        assert len(database.store.claim(10, {}).jobs) == 1

    def test_submissions_are_found(self, database: DatabaseHouse, commit_is_lost: Callable[[], None]) -> None:
        commit_is_lost()
        with pytest.raises(StoreError):
            write(database.store, queued(1))
        assert write(database.store, queued(1), queued(2), again=True) == {}
        assert JobRecord.objects.count() == 2

    def test_only_our_own_rows_are_found(self, database: DatabaseHouse) -> None:
        other = DatabaseHouse("two")
        write(other.store, queued(1))
        assert list(write(database.store, queued(1), queued(2), again=True)) == [0]
        assert JobRecord.objects.get(handle="H:one:1.1").server_id == other.store.lease_id


class TestLargePackets:
    """MySQL takes no statement above max_allowed_packet, and ends the connection of who sends one."""

    @pytest.fixture(autouse=True)
    def small(self, database: DatabaseHouse) -> Iterator[None]:
        if connection.vendor != "mysql":
            pytest.skip("MySQL's own")
        with connection.cursor() as cursor:
            cursor.execute("SELECT @@max_allowed_packet")
            (before,) = cursor.fetchone()
            cursor.execute("SET GLOBAL max_allowed_packet = 1048576")
        connection.close()
        yield
        with connection.cursor() as cursor:
            cursor.execute("SET GLOBAL max_allowed_packet = %s", [before])
        connection.close()

    @pytest.mark.parametrize("workload", [bytes(600_000), b"x" * 1_048_576])
    def test_a_workload_is_refused_alone(self, database: DatabaseHouse, workload: bytes) -> None:
        batch = [queued(1), queued(2, workload=workload), queued(3)]
        assert list(write(database.store, *batch)) == [1]
        assert JobRecord.objects.count() == 2

    def test_what_fits_is_kept(self, database: DatabaseHouse) -> None:
        workloads = [b"x" * 1_000_000, bytes(500_000), b"x" * 900_000]
        batch = [queued(number, workload=workload) for number, workload in enumerate(workloads)]
        assert write(database.store, *batch) == {}
        assert [job.workload for job in replayed(database)] == workloads

    def test_a_result_is_refused_and_its_job_ends(self, database: DatabaseHouse) -> None:
        write(database.store, queued(1), queued(2), queued(3))
        refused = write(
            database.store, finished(1), finished(2, data=bytes(600_000)), finished(3, data=b"x" * 1_000_000)
        )
        assert list(refused) == [1]
        assert [row(number).status for number in (1, 2, 3)] == ["SUCCESSFUL", "FAILED", "SUCCESSFUL"]


class TestNames:
    """Names are bytes to Gearman: case, accents and spaces at the end tell them apart."""

    def test_functions(self, database: DatabaseHouse) -> None:
        names = [b"f", b"F", "f\u00e9".encode(), b"fe", b"f "]
        for name in names:
            database.put(name)
        claimed = database.store.claim(10, {b"f": 100}).jobs
        assert sorted(job.function for job in claimed) == sorted(names[1:])

    def test_servers(self, database: DatabaseHouse) -> None:
        assert DatabaseHouse("ONE").store.epoch == 1
        assert ServerLease.objects.count() == 2

    def test_uniques(self, database: DatabaseHouse) -> None:
        for number, unique in enumerate((b"key", b"KEY", b"key ")):
            write(database.store, queued(number, unique=unique))
        assert JobRecord.objects.filter(unique="key").count() == 1


class TestLease:
    def test_the_epoch_grows(self, database: DatabaseHouse) -> None:
        epochs = [database.store.epoch, database.restart().epoch, database.restart().epoch]
        assert epochs == [1, 2, 3]
        assert DatabaseHouse("two").store.epoch == 1

    @pytest.mark.parametrize(
        ("wrong", "said"), [(300, "300 s ahead of that"), (-300, "300 s behind that"), (4, ""), (-4, "")]
    )
    def test_a_clock_that_is_wrong(
        self,
        database: DatabaseHouse,
        wrong: int,
        said: str,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        database.restart()
        assert not caplog.messages
        began = time.time()
        monkeypatch.setattr("django_gearman.store.lease.time", lambda: began + wrong)
        database.restart()
        assert bool(caplog.messages) == bool(said)
        assert said in caplog.text

    def test_a_server_that_was_replaced_writes_nothing(self, database: DatabaseHouse) -> None:
        old = database.store
        write(old, queued(1))
        database.put()
        database.restart()
        with pytest.raises(LeaseLost, match="'one'"):
            write(old, queued(2), finished(1))
        with pytest.raises(LeaseLost):
            old.claim(10, {})
        with pytest.raises(LeaseLost):
            old.resume()
        assert row(1).status == Status.READY
        assert JobRecord.objects.count() == 2
        assert JobRecord.objects.filter(server=None).count() == 1

    def test_a_bad_row_is_no_way_around_it(self, database: DatabaseHouse) -> None:
        old = database.store
        database.restart()
        with pytest.raises(LeaseLost):
            write(old, queued(1, priority=101), queued(2))
        assert not JobRecord.objects.exists()

    def test_an_idle_server_says_that_it_is_alive(
        self, database: DatabaseHouse, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = monotonic() + 1000.0
        monkeypatch.setattr("django_gearman.store.lease.monotonic", lambda: now)
        database.store.claim(10, {})
        ServerLease.objects.update(renewed_at=None)
        now += 4
        database.store.claim(10, {})
        assert ServerLease.objects.get().renewed_at is None
        now += 2
        database.store.claim(10, {})
        assert ServerLease.objects.get().renewed_at is not None

    def test_an_idle_server_that_was_replaced_finds_out(
        self, database: DatabaseHouse, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = database.store
        database.restart()
        later = monotonic() + 5.0
        monkeypatch.setattr("django_gearman.store.lease.monotonic", lambda: later)
        with pytest.raises(LeaseLost):
            old.claim(10, {})

    @pytest.mark.parametrize("use_tz", [True, False])
    def test_the_moment_of_renewal(self, database: DatabaseHouse, settings: Any, use_tz: bool) -> None:
        settings.TIME_ZONE = "Asia/Tokyo"
        settings.USE_TZ = use_tz
        connection.close()
        before = timezone.now() - timedelta(seconds=1)
        database.store._lease.renewed -= LEASE / 2
        write(database.store, queued())
        renewed = ServerLease.objects.get().renewed_at
        assert renewed is not None
        assert before <= renewed <= timezone.now() + timedelta(seconds=1)
        connection.close()


class TestDatabaseDoor:
    def test_priority_then_age(self, database: DatabaseHouse) -> None:
        for number, priority in enumerate((0, 10, -100, 0, 100, 10)):
            database.put(priority=priority, workload=b"%d" % number)
        claimed = [job for _ in range(3) for job in database.store.claim(2, {}).jobs]
        assert [job.workload for job in claimed] == [b"4", b"1", b"5", b"0", b"3", b"2"]

    def test_what_is_claimed(self, database: DatabaseHouse) -> None:
        record = database.put(unique=b"\xff", priority=7, max_attempts=3, attempts=1)
        (job,) = database.store.claim(10, {}).jobs
        assert job == StoredJob(b"H:one:r%d" % record.pk, b"reverse", b"\xff", b"abc", 7, 1, 3)
        record.refresh_from_db()
        assert record.handle == job.handle.decode()
        assert (record.server, record.server_epoch) == (ServerLease.objects.get(), database.store.epoch)

    def test_not_before_it_is_due(self, database: DatabaseHouse) -> None:
        now = timezone.now()
        database.put(b"later", status=Status.SCHEDULED, run_after=now + timedelta(hours=1))
        database.put(b"due", status=Status.SCHEDULED, run_after=now - timedelta(seconds=1))
        database.put(b"retry", status=Status.RETRYING, run_after=now - timedelta(seconds=1))
        assert [job.function for job in database.store.claim(10, {}).jobs] == [b"due", b"retry"]
        assert JobRecord.objects.get(function="later").status == Status.SCHEDULED
        assert JobRecord.objects.get(function="due").status == Status.READY

    @pytest.mark.parametrize("status", [Status.CANCELLED, Status.FAILED, Status.DEAD, Status.SUCCESSFUL])
    def test_what_has_ended_stays(self, database: DatabaseHouse, status: Status) -> None:
        database.put(status=status)
        assert database.store.claim(10, {}).jobs == []

    def test_a_full_function_becomes_ready_and_stays(self, database: DatabaseHouse) -> None:
        database.put(b"full", status=Status.SCHEDULED, run_after=timezone.now() - timedelta(seconds=1))
        assert database.store.claim(10, {b"full": 100}).jobs == []
        assert [job.function for job in database.store.claim(10, {}).jobs] == [b"full"]

    def test_two_servers_share_without_overlap(self, database: DatabaseHouse) -> None:
        other = DatabaseHouse("two")
        for _ in range(4):
            database.put()
        jobs = database.store.claim(3, {}).jobs + other.store.claim(3, {}).jobs
        assert len({job.handle for job in jobs}) == 4
        assert [job.handle[:6] for job in jobs] == [b"H:one:"] * 3 + [b"H:two:"]

    def test_many_servers_at_once(self, database: DatabaseHouse) -> None:
        """Whatever the database's locks, each row has one owner, and every row has one."""
        for _ in range(200):
            database.put()
        claimed: dict[str, list[bytes]] = {}
        begin = threading.Barrier(4)

        def serve(name: str) -> None:
            try:
                store = DatabaseHouse(name).store
                handles = claimed[name] = []
                begin.wait(30)
                while True:
                    jobs = store.claim(7, {}).jobs
                    if not jobs:
                        return
                    handles += [job.handle for job in jobs]
            finally:
                connections.close_all()

        threads = [threading.Thread(target=serve, args=(f"server{number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        handles = [handle for jobs in claimed.values() for handle in jobs]
        assert len(handles) == len(set(handles)) == 200
        for name, jobs in claimed.items():
            assert JobRecord.objects.filter(server__name=name).count() == len(jobs)

    @pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Tokyo"])
    def test_without_time_zones(self, database: DatabaseHouse, settings: Any, zone: str) -> None:
        settings.USE_TZ = False
        settings.TIME_ZONE = zone
        connection.close()
        now = timezone.now()
        database.put(b"later", status=Status.SCHEDULED, run_after=now + timedelta(minutes=5))
        database.put(b"due", status=Status.SCHEDULED, run_after=now - timedelta(seconds=1))
        assert [job.function for job in database.store.claim(10, {}).jobs] == [b"due"]
        write(database.store, queued(at=now.timestamp()), finished()._replace(at=now.timestamp() + 2))
        record = row()
        assert abs(record.enqueued_at - now) < timedelta(milliseconds=1)
        assert record.finished_at is not None
        assert abs(record.finished_at - now - timedelta(seconds=2)) < timedelta(milliseconds=1)
        connection.close()

    def test_a_database_with_a_time_zone_of_its_own(
        self, database: DatabaseHouse, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        connection.close()
        monkeypatch.setitem(connection.settings_dict, "TIME_ZONE", "Asia/Tokyo")
        # What it remembers.
        known = vars(connections["default"])
        for name in ("timezone", "timezone_name"):
            known.pop(name, None)
        try:
            now = timezone.now()
            database.put(b"later", status=Status.SCHEDULED, run_after=now + timedelta(minutes=5))
            due = database.put(b"due", status=Status.SCHEDULED, run_after=now - timedelta(minutes=5))
            (job,) = database.store.claim(10, {}).jobs
            assert job.function == b"due"
            at = now.timestamp()
            later = queued(at=at, run_after=at + 60, unclaimed=True)
            write(database.store, later)
            replies = database.store.ask([Question(Topic.TAKE, 1, 0.0, handle=later.handle)])
            assert replies[1].run_after == pytest.approx(at + 60, abs=0.001)
            due.refresh_from_db()
            assert due.run_after == now - timedelta(minutes=5)
        finally:
            connection.close()
            for name in ("timezone", "timezone_name"):
                known.pop(name, None)

    @pytest.mark.parametrize("size", [3, 20_000])
    def test_a_workload_that_was_written_as_text(self, database: DatabaseHouse, size: int) -> None:
        if connection.vendor != "sqlite":
            pytest.skip("other databases refuse it, or make bytes of it")
        record = database.put()
        with connection.cursor() as cursor:
            table = connection.ops.quote_name(JobRecord._meta.db_table)
            cursor.execute(f"UPDATE {table} SET workload = %s WHERE id = %s", ["x" * size, record.pk])
        assert [job.workload for job in database.store.claim(10, {}).jobs] == [b"x" * size]

    @pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York"])
    def test_the_first_and_the_last_time_without_time_zones(
        self, transactional_db: None, settings: Any, zone: str
    ) -> None:
        """As one says for at once, and for never."""
        settings.USE_TZ = False
        settings.TIME_ZONE = zone
        try:
            database = DatabaseHouse()
            database.put(b"never", status=Status.SCHEDULED, run_after=datetime.max)
            database.put(b"at once", run_after=datetime.min)
            database.put(b"due", status=Status.SCHEDULED, run_after=datetime.min)
            claimed = {job.function for job in database.store.claim(10, {}).jobs}
            assert claimed == {b"at once", b"due"}
        finally:
            connection.close()

    def test_a_time_that_never_comes(self, database: DatabaseHouse) -> None:
        if connection.vendor != "postgresql":
            pytest.skip("PostgreSQL alone has an infinity")
        record = database.put(b"never", status=Status.SCHEDULED, run_after=timezone.now())
        with connection.cursor() as cursor:
            table = connection.ops.quote_name(JobRecord._meta.db_table)
            cursor.execute(f"UPDATE {table} SET run_after = 'infinity' WHERE id = %s", [record.pk])
        database.put(b"due", status=Status.SCHEDULED, run_after=timezone.now())
        assert [job.function for job in database.store.claim(10, {}).jobs] == [b"due"]


class TestSlowTransactions:
    """What a view has changed and not committed yet holds up nobody else."""

    def test_a_job_that_is_being_cancelled(self, database: DatabaseHouse) -> None:
        cancelled = [database.put(workload=b"cancelled") for _ in range(4)]
        due = database.put(b"due", status=Status.SCHEDULED, run_after=timezone.now())
        held = [record.pk for record in (*cancelled, due)]
        database.put(workload=b"other")
        database.put(b"unrelated")
        rows = JobRecord.objects.filter(pk__in=held, server=None)
        with harness.held_elsewhere(lambda: rows.update(status=Status.CANCELLED)):
            claims = [database.store.claim(3, {}) for _ in range(3)]
            # It is not looked again and again for what nobody can have.
            assert not claims[-1].more
            jobs = [job for claimed in claims for job in claimed.jobs]
            assert sorted((job.function, job.workload) for job in jobs) == [
                (b"reverse", b"other"),
                (b"unrelated", b"abc"),
            ]
            assert not any(left.ready for claimed in claims for left in (claimed.left or {}).values())
        assert database.store.claim(10, {}).jobs == []

    def test_a_job_that_stays_after_all(self, database: DatabaseHouse) -> None:
        record = database.put()

        def cancel() -> None:
            JobRecord.objects.filter(pk=record.pk).update(status=Status.CANCELLED)
            transaction.set_rollback(True)

        with harness.held_elsewhere(cancel):
            assert database.store.claim(10, {}).jobs == []
        assert len(database.store.claim(10, {}).jobs) == 1

    def test_a_job_that_several_cancel(self, database: DatabaseHouse) -> None:
        records = [database.put(), database.put()]
        rows = JobRecord.objects.filter(pk=records[0].pk)
        Cancellation.objects.bulk_create([Cancellation(job_id=record.pk) for record in records])
        with harness.held_elsewhere(lambda: rows.update(status=Status.CANCELLED)):
            assert database.store.claim(10, {}).jobs == []
        assert set(JobRecord.objects.values_list("status", flat=True)) == {Status.CANCELLED}

    def test_a_unique_that_is_being_enqueued(self, database: DatabaseHouse) -> None:
        with harness.held_elsewhere(lambda: database.put(unique=b"same")):
            for number in (1, 3):
                told = write(
                    database.store,
                    queued(number, unique=b"same"),
                    queued(number + 1, unique=b"other %d" % number),
                    queued(number + 10),
                )
                assert list(told) == [0]
        told = write(database.store, queued(5, unique=b"same"))
        assert isinstance(told[0], Joined)

    def test_a_unique_whose_job_is_being_cancelled(self, database: DatabaseHouse) -> None:
        record = database.put(unique=b"same")
        rows = JobRecord.objects.filter(pk=record.pk)
        with harness.held_elsewhere(lambda: rows.update(status=Status.CANCELLED, unique_key=None)):
            assert list(write(database.store, queued(1, unique=b"same"), queued(2))) == [0]
        assert write(database.store, queued(3, unique=b"same")) == {}

    def test_what_is_ours_is_tried_again(self, database: DatabaseHouse) -> None:
        write(database.store, queued(1), started(1))
        rows = JobRecord.objects.filter(handle="H:one:1.1")
        with harness.held_elsewhere(lambda: rows.update(client="")), pytest.raises(StoreError):
            write(database.store, finished(1), queued(2))
        assert write(database.store, finished(1), queued(2), again=True) == {}
        assert row().status == Status.SUCCESSFUL

    def test_a_group_that_is_being_cancelled(self, database: DatabaseHouse) -> None:
        plan = {"stages": [{"size": 3, "many": True, "takes": "-"}], "on_success": "-", "delays": {}}
        made = JobGroup.objects.create(total=3, left=3, plan=plan)
        for place in range(3):
            database.put(group=made, group_index=place)
        first, second, third = (job.handle for job in database.store.claim(10, {}).jobs)

        def end(handle: bytes) -> JobFinished:
            return finished()._replace(handle=handle)

        groups = JobGroup.objects.filter(pk=made.pk)
        with harness.held_elsewhere(lambda: groups.update(name="held")):
            for number, handle in enumerate((first, second)):
                assert write(database.store, end(handle), queued(number)) == {}
            assert JobRecord.objects.filter(status=Status.SUCCESSFUL).count() == 2
            database.store.claim(10, {})
            made.refresh_from_db()
            assert made.finished == 0
        database.store._members._recount_at = 0.0
        database.store.claim(10, {})
        made.refresh_from_db()
        assert (made.left, made.successful, made.is_finished) == (1, 2, False)
        write(database.store, end(third))
        made.refresh_from_db()
        assert (made.left, made.successful, made.is_finished) == (0, 3, True)

    def test_members_that_run_while_their_group_is_being_cancelled(self, database: DatabaseHouse) -> None:
        made = group(shout.si(b"%d" % number) for number in range(20)).enqueue()
        first, second, *_ = (job.handle for job in database.store.claim(10, {}).jobs)
        write(database.store, *(started()._replace(handle=handle) for handle in (first, second)))
        with harness.held_elsewhere(lambda: GroupResult.find(made.id).cancel()):
            write(database.store, *(finished()._replace(handle=handle) for handle in (first, second)))
        assert JobRecord.objects.filter(status=Status.SUCCESSFUL).count() == 2
        assert JobRecord.objects.filter(status=Status.CANCELLED).count() == 10

    def test_a_server_that_hangs_in_a_transaction(self, database: DatabaseHouse) -> None:
        write(database.store, queued())
        other = DatabaseHouse("two")
        ServerLease.objects.filter(name="one").update(renewed_at=timezone.now() - timedelta(hours=1))
        other.store._lease._looked_for_dead -= LEASE
        with harness.held_elsewhere(lambda: ServerLease.objects.filter(name="one").update(address="")):
            assert other.store.claim(10, {}).jobs == []
        other.store._lease._looked_for_dead -= LEASE
        assert len(other.store.claim(10, {}).jobs) == 1


class TestOutOfReach:
    def test_a_database_without_tables(self, transactional_db: None, monkeypatch: pytest.MonkeyPatch) -> None:
        for field in ServerLease._meta.concrete_fields:
            _ = field.cached_col  # which Django keeps, whatever it says then
        monkeypatch.setattr(ServerLease._meta, "db_table", "no_such_table")
        with pytest.raises(StoreError, match="no_such_table"):
            DatabaseStore("default", "one").take_lease("")

    def test_the_next_attempt_gets_a_new_connection(self, database: DatabaseHouse) -> None:
        connection.ensure_connection()
        # As when the database was restarted: what Django holds is of no use any more.
        connection.connection.close()
        with pytest.raises(StoreError):
            write(database.store, queued())
        assert write(database.store, queued(), again=True) == {}
        assert row().status == Status.READY

    def test_a_connection_that_the_database_ends(self, database: DatabaseHouse) -> None:
        if connection.vendor != "postgresql":
            pytest.skip("PostgreSQL's way to lose a connection")
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            (pid,) = cursor.fetchone()
        other = connection.copy()
        try:
            with other.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(%s)", [pid])
        finally:
            other.close()
        with pytest.raises(StoreError):
            write(database.store, queued())
        assert write(database.store, queued(), again=True) == {}
        connection.connection.close()
        with pytest.raises(StoreError):
            database.store.claim(10, {})
        assert database.store.claim(10, {}).jobs == []

    @pytest.mark.parametrize("of_role", [False, True])
    def test_the_writer_does_without_an_isolation(self, database: DatabaseHouse, of_role: bool) -> None:
        """Of views: what others do beside them would end its transactions, such as to renew their leases."""
        option: dict[str, Any] = {"isolation_level": "repeatable read"}
        match connection.vendor:
            case "postgresql":
                from django.db.backends.postgresql.psycopg_any import IsolationLevel

                option = {"isolation_level": IsolationLevel.REPEATABLE_READ}
                if of_role:
                    # As ALTER ROLE ... SET does.
                    option = {"options": r"-c default_transaction_isolation=repeatable\ read"}
            case "sqlite":
                pytest.skip("SQLite has one isolation")
            case "mysql" if of_role:
                pytest.skip("Django tells MySQL which one it wants")

        def put() -> None:
            try:
                database.put()
            finally:
                connection.close()

        connection.close()
        before = connection.settings_dict
        connection.settings_dict = {**before, "OPTIONS": {**before["OPTIONS"], **option}}
        try:
            # As the command that starts a server does before.
            assert not JobRecord.objects.exists()
            with database.store._lease.transaction():
                assert not JobRecord.objects.exists()
                other = threading.Thread(target=put)
                other.start()
                other.join(60)
                assert JobRecord.objects.exists()
        finally:
            connection.close()
            connection.settings_dict = before

    @pytest.fixture
    def pool(self, database: DatabaseHouse) -> Iterator[None]:
        """The database with Django's pool."""
        if connection.vendor != "postgresql":
            pytest.skip("Django has a pool for PostgreSQL alone")
        needs.module("psycopg_pool")
        connection.close()
        before = connection.settings_dict
        pooled = {**before, "OPTIONS": {**before["OPTIONS"], "pool": True}}
        connection.settings_dict = pooled
        try:
            yield
        finally:
            connection.close()
            connection.settings_dict = pooled
            connection.close_pool()
            connection.settings_dict = before

    @pytest.mark.usefixtures("pool")
    def test_the_writer_does_without_a_pool(self, database: DatabaseHouse) -> None:
        """Which comes back from an outage long after the database does."""
        write(database.store, queued())
        assert connection.pool is None
        assert not hasattr(connection.connection, "_pool")
        connection.connection.close()
        with pytest.raises(StoreError):
            write(database.store, started())
        write(database.store, started())
        assert not hasattr(connection.connection, "_pool")
        assert row().status == Status.RUNNING

    @pytest.mark.usefixtures("pool")
    def test_nothing_of_a_pool_is_left_to_share_with_a_child(self) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            ours = cursor.fetchone()
        assert connection.pool is not None
        with connection.connection._pool.connection() as idle:
            also = idle.execute("SELECT pg_backend_pid()").fetchone()
        close_connections()
        left = "SELECT count(*) FROM pg_stat_activity WHERE pid IN (%s, %s)"

        def is_gone() -> bool:
            with connection.cursor() as cursor:
                cursor.execute(left, [*ours, *also])
                return bool(cursor.fetchone() == (0,))

        harness.wait_until(is_gone)

    def test_close_lets_the_connection_go(self, database: DatabaseHouse) -> None:
        write(database.store, queued())
        database.store.close()
        assert connection.connection is None

    def test_sqlite_is_synced(self, database: DatabaseHouse) -> None:
        if connection.vendor != "sqlite":
            pytest.skip("SQLite's own")
        connection.close()
        write(database.store, queued())
        with connection.cursor() as cursor:
            cursor.execute("PRAGMA journal_mode")
            assert cursor.fetchone() == ("wal",)
            cursor.execute("PRAGMA synchronous")
            assert cursor.fetchone() == (2,)
        connection.close()

    @pytest.mark.parametrize("replaced", [False, True])
    def test_what_sqlite_does_not_sync(self, database: DatabaseHouse, replaced: bool) -> None:
        """A claim that a power failure takes back leaves its rows where they were; nothing else may go."""
        if connection.vendor != "sqlite":
            pytest.skip("SQLite's own")
        store = database.store
        told: list[str] = []

        def note(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
            told.append(sql.partition("(")[0].split(" SET ")[0].strip())
            return execute(sql, params, many, context)

        write(store, queued(1))
        database.put()
        # Which are read once in a second, behind the claim.
        store._look_for_limits_at = float("inf")
        if replaced:
            database.restart()
        with connection.execute_wrapper(note):
            if replaced:
                with pytest.raises(LeaseLost):
                    store.claim(10, {})
            else:
                assert len(store.claim(10, {}).jobs) == 1
        # Only the claim's own transaction stands between the two.
        told = told[told.index("PRAGMA synchronous=NORMAL") :]
        assert told[-1] == "PRAGMA synchronous=FULL"
        changes = [each for each in told if each.startswith(("INSERT", "UPDATE", "DELETE"))]
        assert changes == ['UPDATE "django_gearman_jobrecord"'][: 1 - replaced]
        told.clear()
        with connection.execute_wrapper(note), suppress(LeaseLost):
            write(store, finished(1))
        assert not [each for each in told if "synchronous" in each]
        with connection.cursor() as cursor:
            cursor.execute("PRAGMA synchronous")
            assert cursor.fetchone() == (2,)


def statements(store: DatabaseStore, entries: list[Any], *, again: bool = False) -> int:
    with CaptureQueriesContext(connection) as queries:
        assert store.write(entries, again=again) == {}
    return len(queries)


OF_TIME = 3
"""Statements that come with the time, not with the rows: the lease is written twice a second."""


class TestCost:
    """A batch is a handful of statements, however much is in it."""

    def batch(self, first: int, size: int) -> list[Any]:
        entries: list[Any] = []
        for number in range(first, first + size):
            entries += [queued(number), started(number)]
            if number % 2:
                entries.append(finished(number))
        return entries

    @pytest.mark.parametrize("again", [False, True])
    def test_submissions(self, database: DatabaseHouse, again: bool) -> None:
        few = statements(database.store, self.batch(0, 3), again=again)
        assert abs(statements(database.store, self.batch(1000, 500), again=again) - few) <= OF_TIME

    def test_changes(self, database: DatabaseHouse) -> None:
        write(database.store, *(queued(number) for number in range(600)))
        few = statements(database.store, [started(1), finished(2), finished(3, Outcome.FAILED)])
        many = [started(number) for number in range(10, 200)]
        many += [finished(number) for number in range(200, 400)]
        many += [finished(number, Outcome.FAILED) for number in range(400, 600)]
        # SQLite's are for hundreds of rows, and then for the rest.
        assert statements(database.store, many) <= few + 3

    def test_every_row_of_a_large_batch_is_written(self, database: DatabaseHouse) -> None:
        write(database.store, *(queued(number, workload=b"%d" % number) for number in range(323)))
        assert JobRecord.objects.count() == 323
        write(database.store, *(finished(number, data=b"%d" % number) for number in range(3, 323)))
        for record in JobRecord.objects.exclude(handle__in=["H:one:1.0", "H:one:1.1", "H:one:1.2"]):
            assert bytes(record.result or b"") == bytes(record.workload) == str(record.handle)[8:].encode()
        assert JobRecord.objects.filter(status=Status.READY, result=None).count() == 3

    def test_claims(self, database: DatabaseHouse, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("django_gearman.store.door.DUE_INTERVAL", 600.0)
        monkeypatch.setattr("django_gearman.store.CANCEL_INTERVAL", 600.0)
        database.store.claim(1, {})
        # Which are read once in a second, and other servers' leases every five.
        database.store._look_for_limits_at = database.store._lease._looked_for_dead = float("inf")
        counts = []
        for size in (5, 300):
            for _ in range(size):
                database.put()
            with CaptureQueriesContext(connection) as queries:
                assert len(database.store.claim(1000, {}).jobs) == size
            counts.append(len(queries))
        assert abs(counts[0] - counts[1]) <= OF_TIME

    def test_an_empty_look_writes_nothing(self, database: DatabaseHouse) -> None:
        database.store.claim(10, {})
        with CaptureQueriesContext(connection) as queries:
            database.store.claim(10, {})
        assert queries
        assert all(query["sql"].startswith(("SELECT", "WITH RECURSIVE")) for query in queries)


class TestPlans:
    """The statements that run all day must not look at the history."""

    @pytest.fixture(autouse=True)
    def history(self, database: DatabaseHouse) -> None:
        lease = ServerLease.objects.get()
        rows = [JobRecord(function="f", status=Status.SUCCESSFUL, server=lease) for _ in range(2000)]
        rows += [JobRecord(function="f", status=Status.FAILED) for _ in range(1000)]
        rows += [JobRecord(function="f", status=Status.READY) for _ in range(500)]
        JobRecord.objects.bulk_create(rows)
        with connection.cursor() as cursor:
            if connection.vendor != "sqlite":
                cursor.execute(
                    {
                        "postgresql": "ANALYZE django_gearman_jobrecord",
                        "mysql": "ANALYZE TABLE django_gearman_jobrecord",
                    }[connection.vendor]
                )

    def plans(self, work: Callable[[], object]) -> dict[str, str]:
        """{statement on our table: how the database carries it out}."""
        plans: dict[str, str] = {}
        explain = {
            "sqlite": "EXPLAIN QUERY PLAN ",
            "postgresql": "EXPLAIN ",
            "mysql": "EXPLAIN FORMAT=JSON ",
        }[connection.vendor]

        def record(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
            # Before it is carried out: what comes after may be done another way.
            if "django_gearman_jobrecord" in sql and not sql.startswith(("INSERT", "EXPLAIN")):
                with connection.cursor() as cursor:
                    cursor.execute(explain + sql, params[0] if many else params)
                    plans[sql] = "; ".join(str(line[-1]) for line in cursor.fetchall())
            return execute(sql, params, many, context)

        with connection.execute_wrapper(record):
            work()
        assert plans
        return plans

    def rows_examined(self, work: Callable[[], object]) -> int:
        """How many rows MariaDB looked at."""
        with connection.cursor() as cursor:
            cursor.execute("FLUSH STATUS")
            work()
            cursor.execute("SHOW STATUS LIKE 'Handler_read_%%'")
            return sum(int(count) for _, count in cursor.fetchall())

    def test_no_look_at_the_history(self, database: DatabaseHouse) -> None:
        database.put()
        for work in (lambda: database.store.claim(10, {b"g": 0}), database.store.resume):
            for sql, plan in self.plans(work).items():
                match connection.vendor:
                    case "sqlite":
                        # Of the table only; the list of functions is made on the way.
                        for step in plan.split("; "):
                            if "jobrecord" in step:
                                assert re.search(r"USING (INDEX|INTEGER PRIMARY KEY|COVERING INDEX)", step), (
                                    sql,
                                    plan,
                                )
                                assert not step.startswith("SCAN") or re.search("job_(claim|due)", step), plan
                    case "postgresql":
                        assert "Seq Scan on django_gearman_jobrecord" not in plan, (sql, plan)
                    case _:
                        table = r'"table_name": "django_gearman_jobrecord",\s*"access_type": "ALL"'
                        assert not re.search(table, plan), (sql, plan)

    def test_postgresql_needs_no_statistics(self, database: DatabaseHouse) -> None:
        """A queue may grow and shrink between two looks of autovacuum: it knows of an empty table."""
        if connection.vendor != "postgresql":
            pytest.skip("PostgreSQL alone chooses the index by itself")
        JobRecord.objects.all().delete()
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE django_gearman_jobrecord")
        rows = [JobRecord(function="f", status=Status.READY) for _ in range(5000)]
        JobRecord.objects.bulk_create(rows)
        claimed: list[StoredJob] = []
        plans = self.plans(lambda: claimed.extend(database.store.claim(1000, {b"g": 0}).jobs))
        handles = [job.handle for job in claimed]
        assert len(handles) == 1000
        plans |= self.plans(
            lambda: write(database.store, *(finished()._replace(handle=handle) for handle in handles))
        )
        updates = {sql: plan for sql, plan in plans.items() if sql.startswith("UPDATE")}
        assert len(updates) >= 2
        for sql, plan in updates.items():
            assert "Seq Scan on django_gearman_jobrecord" not in plan, (sql, plan)
            assert "job_status" not in plan, (sql, plan)

    def test_postgresql_compiles_nothing(self, database: DatabaseHouse) -> None:
        """What can only be read whole would be thought dear enough for it, and take five times as long."""
        if connection.vendor != "postgresql":
            pytest.skip("PostgreSQL alone has a compiler")
        lease = database.store._lease
        with connection.cursor() as cursor:
            cursor.execute("SET jit = on")
            try:
                with lease.transaction():
                    assert set(lease.those_of([])[0]) == {lease.id}
                    cursor.execute("SHOW jit")
                    assert cursor.fetchone() == ("off",)
                cursor.execute("SHOW jit")
                assert cursor.fetchone() == ("on",)
            finally:
                cursor.execute("RESET jit")

    @pytest.mark.parametrize(
        ("kind", "values"),
        [
            ("varchar", []),
            ("varchar", ["a", "b"]),
            ("varchar", ["same", "same"]),
            ("varchar", ["", "NULL", "null", "{a,b}", " a ", "é", "a,b"]),
            ("varchar", ['"', "a"]),
            ("varchar", ["\\", "a"]),
            ("varchar", ['","', '\\"', "\\\\", "\n"]),
            ("varchar", [None, None]),
            ("varchar", [None, "NULL", ""]),
            ("bytea", [b"", b"\x00\xff", b"\\x41"]),
            ("bytea", [b"x", b"x"]),
            ("bytea", [None, b"x"]),
            ("bigint", [1, 1]),
            ("bigint", [-1, 2**63 - 1, None]),
            ("boolean", [True, False]),
            ("timestamptz", [timezone.now(), timezone.now() - timedelta(days=1)]),
            ("timestamptz", [timezone.now(), None]),
        ],
    )
    def test_an_array_is_read_as_it_was(self, kind: str, values: list[Any]) -> None:
        if connection.vendor != "postgresql":
            pytest.skip("PostgreSQL alone takes arrays")
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT * FROM unnest(%s::{kind}[])", [array(values)])
            assert [value for (value,) in cursor.fetchall()] == values

    def test_mysql_reads_no_history(self, database: DatabaseHouse) -> None:
        if connection.vendor != "mysql":
            pytest.skip("counts the rows that MariaDB reads")
        database.store._door.count_at = monotonic() + 600.0
        assert self.rows_examined(lambda: database.store.claim(10, {}).jobs) < 100
        assert self.rows_examined(lambda: database.store.claim(10, {b"g": 100}).jobs) < 100
        write(database.store, queued())
        assert self.rows_examined(lambda: write(database.store, started(), finished())) < 50
        assert self.rows_examined(database.store.resume) < 300

    def test_a_claim_reads_no_more_than_it_takes(self, database: DatabaseHouse) -> None:
        database.put(priority=50)
        for full in ({}, {b"f": 0, b"g": 0}):
            plans = self.plans(lambda full=full: database.store.claim(10, full))
            looks = [plan for sql, plan in plans.items() if "priority" in sql and "LIMIT" in sql]
            # Whether there is but one, too, where nothing is full.
            assert len(looks) == 1 + (not full)
            for plan in looks:
                assert "job_claim" in plan
                assert not re.search("TEMP B-TREE|Sort|filesort", plan), plan

    def test_due_rows_are_found_by_their_time(self, database: DatabaseHouse) -> None:
        database.put(status=Status.SCHEDULED, run_after=timezone.now() - timedelta(seconds=1))
        plans = self.plans(lambda: database.store.claim(10, {}))
        expected = "job_due (function=? AND run_after<?)" if connection.vendor == "sqlite" else "job_due"
        due = [plan for sql, plan in plans.items() if re.search('run_after["`] <=', sql)]
        assert due
        for plan in due:
            assert expected in plan
            assert not re.search("TEMP B-TREE|Sort|filesort", plan), plan

    def test_counts_read_an_index_alone(self, database: DatabaseHouse) -> None:
        plans = self.plans(database.store._door.count)
        assert len(plans) >= 2
        if connection.vendor == "sqlite":
            assert all("COVERING INDEX job_" in plan and "TEMP" not in plan for plan in plans.values()), plans

    def test_what_an_earlier_run_had_is_found_by_what_is_owned(self, database: DatabaseHouse) -> None:
        write(database.store, queued(), started())
        for plan in self.plans(database.store.resume).values():
            # Few run, so that their status finds them too.
            assert re.search("job_(owned|status|claim)|PRIMARY|_pkey", plan), plan

    def test_what_a_server_has_is_found_by_what_is_owned(self, database: DatabaseHouse) -> None:
        """At the start how much that is, and in looks for those that are silent whether there is any."""
        lease = DatabaseHouse("other").store._lease
        write(database.store, queued())
        with connection.cursor() as cursor:
            if connection.vendor == "postgresql":
                # It would rather read a small table.
                cursor.execute("SET enable_seqscan = off")
            try:
                plans = self.plans(lease.free_jobs_of_the_dead) | self.plans(database.store.count_unfinished)
            finally:
                if connection.vendor == "postgresql":
                    cursor.execute("RESET enable_seqscan")
        found = [plan for sql, plan in plans.items() if re.search(r"LIMIT 1\) IS NOT NULL|SELECT COUNT", sql)]
        assert len(found) == 2
        for plan in found:
            assert ("job_claim" if connection.vendor == "mysql" else "job_owned") in plan, plan

    def test_a_unique_is_found_by_its_index(self, database: DatabaseHouse) -> None:
        database.put(unique=b"u")
        question = Question(Topic.UNIQUE, 1, 0.0, unique=b"u")
        replies: list[Any] = []
        plans = self.plans(lambda: replies.append(database.store.ask([question])))
        assert replies[0][1] is not None
        (plan,) = plans.values()
        assert "job_unique" in plan
        assert not re.search("TEMP B-TREE|filesort", plan), plan

    def test_changes_find_their_row_by_its_handle(self, database: DatabaseHouse) -> None:
        # On SQLite there is another statement for a hundred.
        numbers = range(101 if connection.vendor == "sqlite" else 1)
        write(database.store, *(queued(number) for number in numbers))
        ends = [finished(number) for number in numbers]
        plans = list(self.plans(lambda: write(database.store, *ends)).values())
        match connection.vendor:
            case "sqlite":
                assert len(plans) == 2
                assert all("(handle=?)" in plan for plan in plans)
            case "postgresql":
                (plan,) = plans
                assert "Index Scan using job_handle_unique" in plan
            case _:
                find, change = plans
                assert "job_handle_unique" in find
                assert '"key": "PRIMARY"' in change


class TestPermits:
    """Limits over all servers: what is given is exact, whoever dies or asks twice."""

    def limit(self, house: House, **columns: Any) -> None:
        """Limit the function ``f``."""
        limit = Limit(**columns)
        if isinstance(house, DatabaseHouse):
            rate = f"{limit.rate}/{limit.period:.0f}s" if limit.rate else ""
            FunctionLimit.objects.update_or_create(
                function="f", defaults={"rate": rate, "concurrency": limit.concurrency}
            )
            house.store.read_limits()
        elif isinstance(house, MemoryHouse):
            house.store.book.limits = {b"f": limit}
        else:
            house._database.limits = {b"f": limit}

    def ask(
        self,
        store: Any,
        wanted: int,
        *,
        held: int = 0,
        unused: int = 0,
        started: tuple[tuple[int, float], ...] = (),
        key: bytes = b"",
    ) -> int:
        request = Request(key, held, unused, wanted, started)
        question = Question(Topic.PERMITS, -1, 0.0, function=b"f", request=request)
        (granted,) = store.ask([question]).values()
        assert isinstance(granted, Granted)
        return granted.permits

    def test_claims_tell_the_limits(self, house: House) -> None:
        self.limit(house, concurrency=2)
        if isinstance(house, DatabaseHouse):
            house.store._look_for_limits_at = 0.0
        assert house.store.claim(10, {}).limits == {b"f": Limit(concurrency=2)}

    def test_no_more_than_there_are(self, house: House) -> None:
        self.limit(house, concurrency=2)
        assert self.ask(house.store, 5) == 2
        assert self.ask(house.store, 5, held=2) == 0
        assert self.ask(house.store, 5, held=1) == 1

    def test_asked_again_nothing_is_counted_twice(self, house: House) -> None:
        self.limit(house, concurrency=2, rate=5, period=60.0)
        now = monotonic()
        started = ((1, now - 1), (2, now - 1))
        for _ in range(3):
            assert self.ask(house.store, 9, held=1, started=started) == 1
        assert self.ask(house.store, 9) == 2

    def test_no_more_in_a_period(self, house: House) -> None:
        self.limit(house, rate=3, period=60.0)
        now = monotonic()
        assert self.ask(house.store, 9, started=((1, now - 59.0), (2, now - 61.0))) == 2
        assert self.ask(house.store, 9, held=2, unused=2) == 0
        assert self.ask(house.store, 9, started=((3, now), (4, now))) == 0

    def test_each_key_has_its_own(self, house: House) -> None:
        self.limit(house, concurrency=1)
        assert [self.ask(house.store, 1, key=key) for key in (b"a", b"b")] == [1, 1]
        assert self.ask(house.store, 1, held=1, key=b"a") == 0

    def test_what_is_no_limit_gives_all(self, house: House) -> None:
        assert self.ask(house.store, 7) == 7

    def test_two_servers_share(self, database: DatabaseHouse) -> None:
        self.limit(database, concurrency=2)
        other = DatabaseHouse("two")
        other.store.read_limits()
        assert [self.ask(database.store, 1), self.ask(other.store, 2)] == [1, 1]
        assert self.ask(database.store, 1, held=1) == 0
        assert self.ask(database.store, 0) == 0
        assert self.ask(other.store, 1, held=1) == 1

    def test_a_server_that_is_silent_loses_its_own(self, database: DatabaseHouse) -> None:
        self.limit(database, concurrency=1)
        other = DatabaseHouse("two")
        other.store.read_limits()
        assert self.ask(other.store, 1) == 1
        assert self.ask(database.store, 1) == 0
        ServerLease.objects.filter(name="two").update(renewed_at=timezone.now() - timedelta(seconds=16))
        assert self.ask(database.store, 1) == 1
        with pytest.raises(LeaseLost):
            self.ask(other.store, 0, held=1)

    def test_first_that_is_back_after_an_outage_leaves_the_others_theirs(
        self, database: DatabaseHouse
    ) -> None:
        self.limit(database, concurrency=1)
        other = DatabaseHouse("two")
        other.store.read_limits()
        assert self.ask(other.store, 1) == 1
        ServerLease.objects.update(renewed_at=timezone.now() - timedelta(seconds=70))
        database.store._lease.renewed -= 70.0
        assert [self.ask(database.store, 1) for _ in range(2)] == [0, 0]
        assert self.ask(other.store, 0) == 0
        # Who has not come back a lease later has lost them.
        ServerLease.objects.filter(name="two").update(renewed_at=timezone.now() - timedelta(seconds=86))
        database.store._lease._judges_from -= 15.0
        assert self.ask(database.store, 1) == 1

    def test_of_a_server_that_starts_again_they_stay_for_a_moment(self, database: DatabaseHouse) -> None:
        self.limit(database, concurrency=1)
        other = DatabaseHouse("two")
        other.store.read_limits()
        assert self.ask(other.store, 1) == 1
        other.restart().read_limits()
        assert [self.ask(database.store, 1), self.ask(other.store, 1)] == [0, 0]
        ServerLease.objects.filter(name="two").update(started_at=timezone.now() - timedelta(seconds=11))
        assert self.ask(database.store, 1) == 1

    def test_uses_that_are_over_are_forgotten(self, database: DatabaseHouse) -> None:
        self.limit(database, concurrency=2)
        for key in (b"a", b"b"):
            self.ask(database.store, 1, key=key)
        self.ask(database.store, 0, key=b"a")
        LimitUse.objects.update(touched=F("touched") - 100)
        database.store._look_for_limits_at = database.store._sweep_at = 0.0
        database.store.claim(10, {})
        assert [use.key for use in LimitUse.objects.all()] == ["b"]

    def test_an_edit_is_read_with_a_claim(self, database: DatabaseHouse) -> None:
        self.limit(database, concurrency=1)
        FunctionLimit.objects.update(concurrency=3)
        database.store._look_for_limits_at = 0.0
        database.store.claim(10, {})
        assert self.ask(database.store, 9) == 3

    @pytest.mark.parametrize("change", [{"enabled": False}, {"withdrawn": True}, {"rate": "many"}])
    def test_one_that_rests_is_none(self, database: DatabaseHouse, change: dict[str, Any]) -> None:
        self.limit(database, concurrency=1)
        FunctionLimit.objects.update(**change)
        assert database.store.read_limits() == {}

    def test_many_at_once_never_take_too_many(self, transactional_db: None) -> None:
        """Four servers, each in a thread of its own, tell what they have and ask for more."""
        FunctionLimit.objects.create(function="f", concurrency=3)
        lock, held, most, errors = threading.Lock(), [0], [0], []

        def serve(name: str) -> None:
            try:
                store = DatabaseStore("default", name)
                store.take_lease("127.0.0.1:4730")
                store.read_limits()
                for _ in range(25):
                    try:
                        got = self.ask(store, 2)
                        with lock:
                            held[0] += got
                            most[0] = max(most[0], held[0])
                        time.sleep(0.001)
                        with lock:
                            held[0] -= got
                        self.ask(store, 0)
                    except StoreError:
                        pass  # it is locked, or a deadlock: nothing was given
            except Exception as error:
                errors.append(error)
            finally:
                connections["default"].close()

        threads = [threading.Thread(target=serve, args=(f"s{number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert 1 <= most[0] <= 3

    def test_a_key_stays_with_its_record(self, house: House) -> None:
        write(house.store, queued(limit_key=b"7", unclaimed=True))
        (job,) = house.store.claim(10, {}).jobs
        assert job.limit_key == b"7"

    def test_crowded_keys_stay_at_the_door(self, house: House) -> None:
        for number, key in enumerate((b"a", b"b", None, b"a", b"c")):
            house.put(b"f", workload=b"%d" % number, limit_key=text_or_bytes(house, key))
        jobs = house.store.claim(10, {}, {b"f": Crowd(frozenset([b"a", b"b"]), 0)}).jobs
        assert sorted(job.workload for job in jobs) == [b"2", b"4"]
        crowded = {b"f": Crowd(frozenset([b"a", b""]), 0)}
        assert [job.workload for job in house.store.claim(10, {}, crowded).jobs] == [b"1"]
        # More urgent ones are wanted all the same.
        crowded = {b"f": Crowd(frozenset([b"a"]), -50)}
        assert len(house.store.claim(10, {}, crowded).jobs) == 2

    def test_also_those_whose_time_has_come(self, house: House) -> None:
        for number, key in enumerate((b"a", b"b")):
            write(house.store, later(number, AT + 1, limit_key=key))
        jobs = house.store.claim(10, {}, {b"reverse": Crowd(frozenset([b"a"]), 0)}).jobs
        assert [job.limit_key for job in jobs] == [b"b"]


def text_or_bytes(house: House, key: bytes | None) -> Any:
    return key.decode() if isinstance(house, DatabaseHouse) and key is not None else key
