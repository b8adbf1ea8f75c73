"""Rows that are due become jobs, once each; edits survive; the code's schedules come and go."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.db import (
    IntegrityError,
    InterfaceError,
    OperationalError,
    ProgrammingError,
    connection,
    connections,
    transaction,
)
from django.test.utils import CaptureQueriesContext

from django_gearman import cron, every, scheduler, schedules
from django_gearman.exceptions import InvalidJob, InvalidSchedule, LeaseLost, MissingCronsim, StoreError
from django_gearman.job_declarations import declared_schedules, scheduled_record
from django_gearman.jobs import Job, job
from django_gearman.models import JobRecord, Schedule
from django_gearman.registry import registry
from django_gearman.scheduler import Scheduler, is_edited, reset, synchronise
from django_gearman.store import DatabaseStore

from . import harness
from .app import jobs

NOON = int(datetime(2026, 6, 1, 12, tzinfo=UTC).timestamp())
MINUTE = timedelta(minutes=1)

pytestmark = pytest.mark.django_db(transaction=True)


class Clock:
    """The wall clock of everything that asks for the time here."""

    def __init__(self) -> None:
        self.now = NOON

    def time(self) -> float:
        return float(self.now)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("django_gearman.models.time.time", made.time)
    return made


def store(name: str = "one") -> DatabaseStore:
    made = DatabaseStore("default", name, scheduler=Scheduler("default", scheduled_record))
    made.take_lease("127.0.0.1:4730")
    return made


def make(**columns: Any) -> Schedule:
    defaults: dict[str, Any] = {"name": "minutely", "function": jobs.add.name, "args": [1]}
    if "cron" not in columns:
        defaults["interval"] = MINUTE
    return Schedule.objects.create(**{**defaults, **columns})


def work(now: int) -> list[JobRecord]:
    """The jobs that a server makes at a moment."""
    last = JobRecord.objects.order_by("pk").last()
    with transaction.atomic():
        Scheduler("default", scheduled_record).work(now)
    return list(JobRecord.objects.filter(pk__gt=last.pk if last else 0).order_by("pk"))


def times(records: list[JobRecord]) -> list[int]:
    """Seconds from NOON of the times that jobs were made for."""
    return [int(record.run_after.timestamp()) - NOON for record in records if record.run_after]


class TestFiring:
    def test_nothing_before_its_time(self):
        schedule = make()
        assert schedule.next_at == NOON + 60
        assert work(NOON + 59) == []

    def test_the_job_is_what_enqueue_would_make(self):
        schedule = make(kwargs={"right": 5})
        (record,) = work(NOON + 61)
        other = jobs.add.enqueue(1, right=5)
        enqueued = JobRecord.objects.get(pk=int(other.id))
        for name in ("function", "queue_name", "priority", "status", "max_attempts", "timeout", "server"):
            assert getattr(record, name) == getattr(enqueued, name)
        assert json.loads(bytes(record.workload)) == json.loads(bytes(enqueued.workload))
        assert (record.client, times([record])) == ("schedule minutely", [60])
        schedule.refresh_from_db()
        assert (schedule.last_at, schedule.next_at) == (NOON + 60, NOON + 120)
        assert schedule.last_job == record.pk

    def test_queue_and_priority_are_the_jobs_own_unless_the_schedule_has_others(self):
        make(function=jobs.add_later.name, args=[1, 2])
        make(name="urgent", function=jobs.add_later.name, args=[1, 2], queue_name="fast", priority=-7)
        own, other = work(NOON + 60)
        assert (own.queue_name, own.priority) == ("default", 10)
        assert (other.queue_name, other.priority) == ("fast", -7)

    def test_none_while_the_last_of_a_unique_is_to_do(self):
        schedule = make(function=jobs.append_once.name, args=["path", "line"], catch_up="all")
        (first,) = work(NOON + 60)
        assert work(NOON + 240) == []
        schedule.refresh_from_db()
        assert (schedule.next_at, schedule.last_job, schedule.error) == (NOON + 300, first.pk, "")
        JobRecord.objects.filter(pk=first.pk).update(status="SUCCESSFUL", unique_key=None)
        assert times(work(NOON + 300)) == [300]

    def test_a_function_of_somebody_else(self):
        make(function="resize", kwargs={"size": 3})
        (record,) = work(NOON + 60)
        assert record.function == "resize"
        assert json.loads(bytes(record.workload)) == {"args": [1], "kwargs": {"size": 3}}

    @pytest.mark.parametrize(("args", "workload"), [([], b""), (["schön"], "schön".encode())])
    def test_a_raw_job_takes_text(self, args: list[str], workload: bytes):
        make(function="shout", args=args)
        (record,) = work(NOON + 60)
        assert bytes(record.workload) == workload

    @pytest.mark.parametrize("off", ["enabled", "withdrawn"])
    def test_one_that_rests(self, off: str):
        schedule = make(**{off: off != "enabled"})
        assert schedule.next_at is None
        assert work(NOON + 3600) == []

    @pytest.mark.parametrize(("catch_up", "expected"), [("none", []), ("one", [7200]), ("all", [3600, 7200])])
    def test_missed_times(self, catch_up: str, expected: list[int]):
        make(cron="0 * * * *", catch_up=catch_up)
        assert times(work(NOON + 7300)) == expected
        assert times(work(NOON + 10_800)) == [10_800]

    def test_many_missed_ones_are_made_up_for_little_by_little(self):
        make(catch_up="all")
        now = NOON + 250 * 60
        batches = [len(work(now)) for _ in range(4)]
        assert batches == [100, 100, 50, 0]

    def test_no_look_takes_long(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(scheduler, "SLICE", -1.0)
        for number in range(3):
            make(name=str(number))
        assert [len(work(NOON + 60 + second)) for second in range(4)] == [1, 1, 1, 0]

    @pytest.mark.parametrize("next_at", [None, NOON])
    def test_neighbours_of_one_whose_times_no_date_can_have(self, next_at: int | None):
        far = make(name="far")
        plan = "every 3000000 days, 0:00:00" if next_at else ""
        rows = Schedule.objects.filter(pk=far.pk)
        rows.update(interval=timedelta(days=3_000_000), plan=plan, next_at=next_at)
        make()
        assert times(work(NOON + 60)) == [60]
        far.refresh_from_db()
        assert far.next_at is None
        assert "36500 days or less" in far.error

    def test_neighbours_of_one_that_cannot_be_fired(self, caplog: pytest.LogCaptureFixture):
        bad = make(name="a", args=["x", "y", "z"])
        make(name="b")
        assert len(work(NOON + 60)) == 1
        bad.refresh_from_db()
        assert "too many positional arguments" in bad.error
        assert bad.next_at is None
        assert "Schedule a makes no jobs until it is mended" in caplog.text
        caplog.clear()
        assert len(work(NOON + 120)) == 1
        assert not caplog.text

    @pytest.mark.parametrize("option", ["unique", "limit_key"])
    @pytest.mark.parametrize(
        ("fault", "said"),
        [
            (KeyError("id"), "KeyError: 'id'"),
            (JobRecord.DoesNotExist("no such"), "DoesNotExist: no such"),
            (ProgrammingError("no such table"), "ProgrammingError: no such table"),
            (ValueError("bad \0 \ud800"), "ValueError: bad \ufffd ?"),
        ],
    )
    def test_neighbours_of_one_whose_unique_raises(
        self, option: str, fault: Exception, said: str, monkeypatch: pytest.MonkeyPatch
    ):
        def make_text(left: int, right: int) -> str:
            raise fault

        made = jobs.add_later
        monkeypatch.setattr(made, option, make_text)
        bad = make(name="a", function=made.name, args=[1, 2])
        make(name="b")
        server = store()
        Schedule.objects.update(next_at=1)
        assert [each.function for each in server.claim(10, {}).jobs] == [jobs.add.name.encode()]
        bad.refresh_from_db()
        assert bad.error == f"the {option} of {made.name} raised {said}"
        # Who enqueues gets the error itself.
        with pytest.raises(type(fault)) as raised:
            made.enqueue(1, 2)
        assert raised.value is fault

    @pytest.mark.parametrize("option", ["unique", "limit_key"])
    @pytest.mark.parametrize("fault", [OperationalError, InterfaceError])
    def test_neighbours_of_one_that_asks_a_database_that_is_away(
        self,
        option: str,
        fault: type[Exception],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ):
        away = True

        def make_text(left: int, right: int) -> str:
            if away:
                raise fault("the server closed the connection")
            return "x"

        monkeypatch.setattr(jobs.add_later, option, make_text)
        bad = make(name="a", function=jobs.add_later.name, args=[1, 2])
        make(name="b")
        server = store()
        Schedule.objects.update(next_at=1)
        assert [each.function for each in server.claim(10, {}).jobs] == [jobs.add.name.encode()]
        bad.refresh_from_db()
        reason = (
            f"the {option} of {jobs.add_later.name} raised {fault.__name__}: the server closed the connection"
        )
        assert (bad.error, bad.next_at) == (reason, 1)
        assert f"Schedule a makes no jobs for now, and is tried again: {reason}" in caplog.text
        # Not at once; and one that has seen nothing of it yet says nothing new.
        now = scheduler.current_time()
        assert not server._scheduler.has_work(now)
        caplog.clear()
        restarted = Scheduler("default", scheduled_record)
        assert restarted.has_work(now)
        with transaction.atomic():
            restarted.work(now)
        assert not caplog.text
        away = False
        monkeypatch.setattr(scheduler, "monotonic", lambda: time.monotonic() + scheduler.TRY_AGAIN)
        assert restarted.has_work(now)
        with transaction.atomic():
            restarted.work(now)
        assert JobRecord.objects.filter(client="schedule a").count() == 1
        bad.refresh_from_db()
        assert bad.error == ""

    @pytest.mark.parametrize("fault", ["missing", "swallowed"])
    def test_neighbours_of_one_whose_unique_spoils_the_transaction(
        self, fault: str, monkeypatch: pytest.MonkeyPatch
    ):
        def make_text(left: int, right: int) -> str:
            if fault == "missing":
                with connection.cursor() as cursor:
                    cursor.execute("SELECT 1 FROM not_migrated_yet")
            try:
                Schedule(name="a", function="f", interval=MINUTE).save(force_insert=True)
            except IntegrityError:
                pass
            return "x"

        monkeypatch.setattr(jobs.add_later, "unique", make_text)
        bad = make(name="a", function=jobs.add_later.name, args=[1, 2])
        make(name="b")
        server = store()
        Schedule.objects.update(next_at=1)
        assert [each.function for each in server.claim(10, {}).jobs] == [jobs.add.name.encode()]
        bad.refresh_from_db()
        # Only SQLite says of a missing table that it could not tell.
        is_put_off = fault == "swallowed" or connection.vendor == "sqlite"
        assert bad.error
        assert bad.next_at == (1 if is_put_off else None)

    def test_one_whose_unique_loses_the_connection_of_the_server(self, monkeypatch: pytest.MonkeyPatch):
        def make_text(left: int, right: int) -> str:
            connection.connection.close()
            connection.cursor().execute("SELECT 1")
            return "x"

        monkeypatch.setattr(jobs.add_later, "unique", make_text)
        bad = make(function=jobs.add_later.name, args=[1, 2])
        server = store()
        Schedule.objects.update(next_at=1)
        with pytest.raises(StoreError):
            server.claim(10, {})
        bad.refresh_from_db()
        assert (bad.error, bad.next_at) == ("", 1)

    def test_a_record_that_the_database_refuses(self):
        def record_of(schedule: Schedule) -> JobRecord:
            record = scheduled_record(schedule)
            record.priority = 500 if schedule.name == "a" else 0
            return record

        make(name="a", catch_up="all")
        make(name="b")
        with transaction.atomic():
            Scheduler("default", record_of).work(NOON + 120)
        assert [record.client for record in JobRecord.objects.all()] == ["schedule b"]
        assert "job_priority_range" in Schedule.objects.get(name="a").error

    def test_it_fires_again_when_it_is_mended(self, clock: Clock):
        bad = make(args=["x", "y", "z"])
        work(NOON + 60)
        bad.refresh_from_db()
        clock.now = NOON + 90
        bad.args = [1]
        bad.save()
        assert bad.error == ""
        assert times(work(NOON + 150)) == [150]

    def test_a_new_version_of_the_code_may_mend_it(self):
        bad = make(args=["x", "y", "z"])
        work(NOON + 60)
        Schedule.objects.update(args=[1])
        restarted = Scheduler("default", scheduled_record)
        assert restarted.has_work(NOON + 70)
        with transaction.atomic():
            restarted.work(NOON + 70)
        assert not restarted.has_work(NOON + 80)
        bad.refresh_from_db()
        assert (bad.error, bad.next_at) == ("", NOON + 130)

    def test_without_time_zones(self, settings: Any):
        settings.USE_TZ = False
        settings.TIME_ZONE = "Europe/Paris"
        connection.close()
        make()
        (record,) = work(NOON + 60)
        assert record.run_after == datetime.fromtimestamp(NOON + 60)
        connection.close()

    def test_in_the_hour_that_comes_twice_without_time_zones(self, settings: Any, clock: Clock):
        """A naive column would show both hours alike, and fire at each look."""
        settings.USE_TZ = False
        settings.TIME_ZONE = "Europe/Paris"
        connection.close()
        start = clock.now = int(
            datetime(2026, 10, 25, 0, 30, tzinfo=UTC).timestamp()
        )  # 02:30 for the first time
        make(cron="*/10 * * * *")
        made = [now - start for now in range(start, start + 7200, 30) for _ in work(now)]
        assert made == list(range(600, 7200, 600))
        connection.close()


class TestOnce:
    def test_the_second_server_makes_none(self):
        make()
        first, second = store("one"), store("two")
        Schedule.objects.update(next_at=NOON)
        assert len(first.claim(10, {}).jobs) == 1
        assert second.claim(10, {}).jobs == []
        assert JobRecord.objects.count() == 1

    def test_one_that_read_before_the_other_wrote_makes_none(self):
        schedule = make()
        late = Scheduler("default", scheduled_record)
        stale = Schedule.objects.get()
        assert len(work(NOON + 60)) == 1
        late._fire(stale, NOON + 60)
        assert JobRecord.objects.count() == 1
        schedule.refresh_from_db()
        assert schedule.next_at == NOON + 120

    def test_one_that_read_before_an_edit_makes_none(self, clock: Clock):
        schedule = make()
        stale = Schedule.objects.get()
        clock.now = NOON + 59
        schedule.enabled = False
        schedule.save()
        Scheduler("default", scheduled_record)._fire(stale, NOON + 60)
        assert not JobRecord.objects.exists()

    def test_one_that_read_before_an_edit_to_the_same_time_leaves_it_alone(self):
        schedule = make()
        stale = Schedule.objects.get()
        schedule.interval, schedule.cron = None, "1 12 * * *"
        schedule.save()
        assert schedule.next_at == stale.next_at
        Scheduler("default", scheduled_record)._fire(stale, NOON + 60)
        assert not JobRecord.objects.exists()
        assert len(work(NOON + 60)) == 1
        assert Schedule.objects.get().next_at == NOON + 86_460

    def test_many_servers_at_once(self):
        """Whatever the database's locks, every time is one job."""
        count, servers = 5, 4
        begin = threading.Barrier(servers)
        errors: list[BaseException] = []
        start = int(time.time()) - 3600
        for number in range(count):
            made = make(name=f"s{number}", interval=timedelta(seconds=300), catch_up="all")
            Schedule.objects.filter(pk=made.pk).update(next_at=start)

        def serve(name: str) -> None:
            try:
                mine = store(name)
                begin.wait(30)
                deadline = time.monotonic() + 60
                # What another has locked is passed over, and may be left by it for the next look.
                while Schedule.objects.filter(next_at__lte=time.time()).exists():
                    assert time.monotonic() < deadline
                    mine.claim(1000, {})
            except BaseException as error:
                errors.append(error)
            finally:
                connections.close_all()

        threads = [threading.Thread(target=serve, args=(f"server{number}",)) for number in range(servers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors
        for number in range(count):
            records = JobRecord.objects.filter(client=f"schedule s{number}").order_by("pk")
            made_for = [int(record.run_after.timestamp()) for record in records if record.run_after]
            assert made_for == [start + 300 * each for each in range(len(made_for))]
            assert len(made_for) == 13
        assert not JobRecord.objects.filter(server=None).exists()

    def test_one_that_is_being_edited_waits_alone(self):
        made = make()
        make(name="other")
        rows = Schedule.objects.filter(pk=made.pk)
        with harness.held_elsewhere(lambda: rows.update(args=[2])):
            assert [record.client for record in work(NOON + 60)] == ["schedule other"]
        assert [record.client for record in work(NOON + 60)] == ["schedule minutely"]

    def test_one_whose_unique_is_being_enqueued_is_tried_again(self):
        make(function=jobs.append_once.name, args=["path", "line"])
        make(name="other")
        Schedule.objects.update(next_at=NOON)
        mine = store()
        with harness.held_elsewhere(lambda: jobs.append_once.enqueue("path", "line")):
            claimed = [*mine.claim(10, {}).jobs, *mine.claim(10, {}).jobs]
        assert [job.function for job in claimed] == [jobs.add.name.encode()]
        assert "lock" in Schedule.objects.get(name="minutely").error.lower()
        assert mine._scheduler is not None
        mine._scheduler._waiting.clear()
        Schedule.objects.filter(name="minutely").update(next_at=NOON)
        mine.claim(10, {})
        schedule = Schedule.objects.get(name="minutely")
        assert (schedule.error, schedule.next_at) == ("", NOON + 60)

    def test_a_server_that_was_replaced_makes_none(self):
        make()
        old = store("one")
        store("one")
        Schedule.objects.update(next_at=NOON)
        with pytest.raises(LeaseLost):
            old.claim(10, {})
        assert not JobRecord.objects.exists()
        assert Schedule.objects.get().next_at == NOON

    def test_the_server_that_fires_claims_at_once(self):
        make()
        Schedule.objects.update(next_at=int(time.time()))
        (claimed,) = store().claim(10, {}).jobs
        assert claimed.function == jobs.add.name.encode()
        assert claimed.run_after <= time.time()

    def test_an_empty_look_writes_nothing(self):
        make()
        Schedule.objects.update(next_at=int(time.time()) + 3600)
        mine = store()
        mine.claim(10, {})
        with CaptureQueriesContext(connection) as queries:
            mine.claim(10, {})
        assert queries
        assert all(query["sql"].startswith(("SELECT", "WITH RECURSIVE")) for query in queries)


class TestEdits:
    def test_a_new_time_is_never_one_that_has_passed(self, clock: Clock):
        schedule = make(cron="0 * * * *")
        clock.now = NOON + 7300
        schedule.cron = "*/30 * * * *"
        schedule.save()
        assert work(NOON + 7300) == []
        assert times(work(NOON + 9000)) == [9000]

    def test_an_earlier_time_is_honoured_at_the_next_look(self, clock: Clock):
        schedule = make(cron="0 0 1 1 *")
        schedule.cron = "5 12 * * *"
        schedule.save()
        assert times(work(NOON + 301)) == [300]

    def test_enabling_begins_anew(self, clock: Clock):
        schedule = make()
        schedule.enabled = False
        schedule.save()
        assert Schedule.objects.get().next_at is None
        clock.now = NOON + 86_400
        schedule.enabled = True
        schedule.save()
        assert work(NOON + 86_400) == []
        assert times(work(NOON + 86_460)) == [86_460]

    def test_other_fields_leave_the_time_alone(self, clock: Clock):
        schedule = make()
        clock.now = NOON + 30
        schedule.args = [7]
        schedule.catch_up = "all"
        schedule.save()
        (record,) = work(NOON + 60)
        assert json.loads(bytes(record.workload))["args"] == [7]

    def test_saving_what_was_read_before_it_fired_does_not_fire_again(self):
        make()
        stale = Schedule.objects.get()
        assert len(work(NOON + 60)) == 1
        stale.args = [2]
        stale.save()
        assert work(NOON + 60) == []
        assert Schedule.objects.get().args == [2]

    def test_saving_single_fields(self, clock: Clock):
        schedule = make()
        clock.now = NOON + 30
        schedule.interval = timedelta(minutes=5)
        schedule.save(update_fields=["interval"])
        assert Schedule.objects.get().next_at == NOON + 330

    def test_rows_changed_without_save(self):
        make()
        Schedule.objects.update(interval=timedelta(hours=1))
        assert work(NOON + 60) == []
        assert Schedule.objects.get().next_at == NOON + 3660

    def test_rows_changed_without_save_between_two_reviews(self):
        make()
        mine = Scheduler("default", scheduled_record)
        assert not mine.has_work(NOON + 55)
        Schedule.objects.update(interval=timedelta(hours=1))
        with transaction.atomic():
            mine.work(NOON + 60)
        assert not JobRecord.objects.exists()
        assert Schedule.objects.get().next_at == NOON + 3660

    def test_rows_changed_without_save_are_noticed_soon(self):
        make(cron="0 0 1 1 *")
        mine = Scheduler("default", scheduled_record)
        assert not mine.has_work(NOON)
        Schedule.objects.update(cron="1 12 * * *")
        assert not mine.has_work(NOON + 1)
        assert mine.has_work(NOON + scheduler.REVIEW_INTERVAL)
        with transaction.atomic():
            mine.work(NOON + scheduler.REVIEW_INTERVAL)
        assert Schedule.objects.get().next_at == NOON + 60

    def test_another_time_zone_of_the_site(self, settings: Any):
        make(cron="0 9 * * *")
        settings.TIME_ZONE = "Asia/Tokyo"
        work(NOON)
        assert Schedule.objects.get().next_at == NOON + 12 * 3600


class TestClocks:
    def test_put_back_nothing_comes_twice(self):
        make()
        made = [each for now in (60, 120, 30, 60, 120, 179, 180) for each in times(work(NOON + now))]
        assert made == [60, 120, 180]

    def test_a_clock_that_was_years_ahead(self):
        """The schedule would rest until then."""
        make(cron="0 * * * *")
        years = 5 * 366 * 86_400
        assert len(work(NOON + years)) == 1
        work(NOON + 30)
        row = Schedule.objects.get()
        assert (row.next_at, row.last_at) == (NOON + 3600, None)
        assert times(work(NOON + 3600)) == [3600]

    def test_one_that_was_made_by_such_a_clock(self, clock: Clock):
        clock.now += 5 * 366 * 86_400
        make(interval=timedelta(days=3))
        work(NOON)
        assert NOON < (Schedule.objects.get().next_at or 0) <= NOON + 3 * 86_400

    @pytest.mark.parametrize("columns", [{"cron": "0 0 1 1 *"}, {"interval": timedelta(days=400)}])
    def test_long_waits_are_no_mistake(self, columns: dict[str, Any]):
        made = make(**columns)
        work(NOON + 3600)
        assert Schedule.objects.get().next_at == made.next_at

    def test_put_back_by_some_hours_the_schedule_waits(self):
        make(cron="0 * * * *")
        assert len(work(NOON + 10 * 3600)) == 1
        assert work(NOON + 60) == []
        assert Schedule.objects.get().next_at == NOON + 11 * 3600


class TestRows:
    @pytest.mark.parametrize(
        ("columns", "field"),
        [
            ({"cron": "x"}, "cron"),
            ({"tz": "Nowhere"}, "tz"),
            ({"interval": timedelta(seconds=-1)}, "interval"),
            ({"cron": "* * * * *", "interval": MINUTE}, "cron"),
            ({"args": {"a": 1}}, "args"),
            ({"kwargs": [1]}, "kwargs"),
        ],
    )
    def test_what_a_form_refuses(self, columns: dict[str, Any], field: str):
        row = Schedule(
            **{"name": "n", "function": "f", "interval": None if "cron" in columns else MINUTE, **columns}
        )
        with pytest.raises(ValidationError) as caught:
            row.full_clean()
        assert field in caught.value.message_dict

    def test_what_the_table_refuses(self):
        make()
        with pytest.raises(IntegrityError):
            Schedule.objects.update(interval=None)

    def test_times_that_make_no_sense_cannot_be_saved(self):
        with pytest.raises(InvalidSchedule, match="five fields"):
            make(cron="* * *")

    def test_the_next_times(self):
        row = make(cron="30 2 * * *", tz="Europe/Paris")
        Schedule.objects.update(next_at=int(datetime(2026, 3, 28, 1, 30, tzinfo=UTC).timestamp()))
        row.refresh_from_db()
        shown = [f"{each:%d %H:%M %z}" for each in row.next_times(3)]
        assert shown == ["28 02:30 +0100", "29 03:00 +0200", "30 02:30 +0200"]
        assert Schedule().next_times(5) == []
        assert str(row) == "minutely"


@pytest.fixture
def declared() -> dict[str, Any]:
    """What the code says: {name of the row: (function, declaration)}."""
    said = {"a.b": ("a.b", cron("0 3 * * *", tz="Europe/Paris", args=[1]))}
    synchronise("default", said)
    return said


def row(name: str = "a.b") -> Schedule:
    return Schedule.objects.get(name=name)


class TestSynchronise:
    def test_new_ones_are_made(self, declared: dict[str, Any]):
        made = row()
        assert (made.function, made.cron, made.tz, made.args) == ("a.b", "0 3 * * *", "Europe/Paris", [1])
        assert made.enabled
        assert made.next_at == int(datetime(2026, 6, 2, 1, tzinfo=UTC).timestamp())
        assert not is_edited(made)

    def test_again_changes_nothing(self, declared: dict[str, Any], clock: Clock):
        declared["c"] = ("c", every(timedelta(hours=1)))
        synchronise("default", declared)
        before = list(Schedule.objects.order_by("pk").values())
        clock.now += 1800
        synchronise("default", declared)
        assert list(Schedule.objects.order_by("pk").values()) == before

    def test_edits_survive(self, declared: dict[str, Any]):
        edited = row()
        edited.cron, edited.enabled, edited.args, edited.priority = "0 5 * * *", False, [2], 3
        edited.save()
        before = Schedule.objects.values().get()
        synchronise("default", declared)
        assert Schedule.objects.values().get() == before
        assert is_edited(row())

    def test_the_code_may_change_what_nobody_edited(self, declared: dict[str, Any]):
        edited = row()
        edited.args = [2]
        edited.enabled = False
        edited.save()
        synchronise("default", {"a.b": ("a.b", every(timedelta(hours=2), args=[1]))})
        now = row()
        assert (now.cron, now.interval, now.tz) == ("", timedelta(hours=2), "")
        assert (now.args, now.enabled, now.next_at) == ([2], False, None)

    def test_an_edit_stays_when_the_code_changes_the_same(
        self, declared: dict[str, Any], caplog: pytest.LogCaptureFixture
    ):
        edited = row()
        edited.cron = "0 5 * * *"
        edited.save()
        synchronise("default", {"a.b": ("a.b", cron("0 4 * * *", tz="Europe/Paris", args=[9]))})
        assert (row().cron, row().args) == ("0 5 * * *", [9])
        assert (
            "Schedule a.b was edited: what the code says now of cron, interval, tz is not taken"
            in caplog.text
        )
        caplog.clear()
        synchronise("default", {"a.b": ("a.b", cron("0 4 * * *", tz="Europe/Paris", args=[9]))})
        assert not [each for each in caplog.records if each.levelno >= logging.WARNING]
        back = row()
        reset(back)
        back.save()
        assert row().cron == "0 4 * * *"
        assert not is_edited(row())

    def test_new_times_begin_now(self, declared: dict[str, Any], clock: Clock):
        clock.now = NOON + 10 * 86_400
        synchronise("default", {"a.b": ("a.b", cron("0 4 * * *", tz="Europe/Paris"))})
        assert work(clock.now) == []
        assert row().next_at is not None
        assert row().next_at > clock.now

    def test_what_the_code_declares_no_more_rests_and_comes_back(
        self, declared: dict[str, Any], clock: Clock
    ):
        edited = row()
        edited.cron = "0 5 * * *"
        edited.save()
        synchronise("default", {})
        assert row().withdrawn
        assert row().next_at is None
        clock.now += 5 * 86_400
        synchronise("default", declared)
        back = row()
        assert (back.withdrawn, back.cron, back.enabled) == (False, "0 5 * * *", True)
        assert back.next_at is not None
        assert back.next_at > clock.now

    def test_where_not_all_was_read_nothing_is_missing(self, declared: dict[str, Any]):
        synchronise("default", {}, complete=False)
        assert not row().withdrawn

    def test_those_of_operators_are_left_alone(self, declared: dict[str, Any]):
        make()
        synchronise("default", {})
        assert not row("minutely").withdrawn

    def test_one_that_was_made_by_hand_before(self, declared: dict[str, Any]):
        make(name="c", function="c")
        synchronise("default", {**declared, "c": ("c", cron("0 3 * * *"))})
        assert (row("c").interval, row("c").cron) == (MINUTE, "")
        assert is_edited(row("c"))

    def test_a_declaration_that_names_no_times(self, declared: dict[str, Any]):
        with pytest.raises(InvalidSchedule):
            synchronise("default", {"x": ("x", cron("x"))})

    def test_two_servers_that_start_together(self, transactional_db: None):
        said = {f"f{number}": (f"f{number}", every(MINUTE)) for number in range(10)}
        begin = threading.Barrier(2)
        errors: list[BaseException] = []

        def start() -> None:
            try:
                begin.wait(30)
                synchronise("default", said)
            except BaseException as error:
                errors.append(error)
            finally:
                connections.close_all()

        threads = [threading.Thread(target=start) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not errors
        assert Schedule.objects.count() == 10


class TestWithoutCronsim:
    @pytest.fixture(autouse=True)
    def no_cronsim(self, monkeypatch: pytest.MonkeyPatch) -> None:
        make(name="cron", cron="* * * * *")
        make()
        monkeypatch.setattr(schedules, "has_cronsim", lambda: False)

    def test_intervals_fire_and_crons_are_left_to_others(self):
        assert [record.client for record in work(NOON + 60)] == ["schedule minutely"]
        assert Schedule.objects.get(name="cron").error == ""
        assert Schedule.objects.get(name="cron").next_at == NOON + 60

    def test_the_start_says_so(self):
        with pytest.raises(MissingCronsim, match="pip install cronsim"):
            scheduler.refuse_unreadable("default")
        Schedule.objects.filter(name="cron").delete()
        scheduler.refuse_unreadable("default")


class TestDecorator:
    @pytest.fixture(autouse=True)
    def restore(self) -> Iterator[None]:
        before = dict(registry)
        yield
        registry.clear()
        registry.update(before)

    def test_schedules_of_a_job(self):
        nightly, often = cron("0 3 * * *"), every(MINUTE, name="often")

        sweep = job(schedule=[nightly, often], name="swept")(jobs.fail.function)
        assert sweep.schedules == (nightly, often)
        assert declared_schedules() == {"swept": ("swept", nightly), "swept:often": ("swept", often)}

    def test_without_there_are_none(self):
        assert jobs.add.schedules == ()
        assert declared_schedules() == {}

    def test_what_is_none(self):
        with pytest.raises(InvalidJob, match=r"@job of fail: schedule must be cron\(...\) or every\(...\)"):
            job(schedule="* * * * *")(jobs.fail.function)

    def test_options_for_one_submission_keep_them(self):
        made: Job[Any, Any] = job(schedule=every(MINUTE))(jobs.fail.function)
        assert made.using(priority=5).schedules == made.schedules
