"""``@job``: what may be declared, what ``enqueue`` leaves in the database, and how values travel."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import decimal
import enum
import functools
import importlib
import json
import pathlib
import pickle
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
from asgiref.sync import SyncToAsync, sync_to_async
from django.contrib.auth.models import User
from django.core.exceptions import SynchronousOnlyOperation
from django.db import DatabaseError, IntegrityError, OperationalError, connection, connections, transaction
from django.utils import timezone
from django.utils.translation import gettext_lazy

from django_gearman import JobContext, JobResult, attempts, group, job, rows, signals
from django_gearman.attempts import aperform_assigned, pause_before_retry, perform_assigned
from django_gearman.conf import settings_for
from django_gearman.encoding import describe_exception
from django_gearman.exceptions import (
    Discard,
    InvalidJob,
    JobFailed,
    JobNotFinished,
    JobResultDoesNotExist,
    JobResultMismatch,
    JobTimedOut,
    ResponseTimeout,
    Retry,
    TooLarge,
    WaitInTransaction,
)
from django_gearman.job_declarations import declared_limits
from django_gearman.jobs import Job
from django_gearman.management.commands import gearman_server
from django_gearman.models import JobRecord
from django_gearman.protocol.packets import CLAIM, PacketType
from django_gearman.registry import queue_of
from django_gearman.registry import registry as of_the_process
from django_gearman.server.core import LONGEST_RETRY
from django_gearman.server.entries import StoredJob
from django_gearman.submission import client_for

from .app import jobs
from .client.fake_server import Peer, fake_server
from .docs import block_of
from .harness import ROOT

Status = JobRecord.Status
HOUR = datetime.timedelta(hours=1)


@pytest.fixture
def registry() -> Iterator[dict[str, Job[Any, Any]]]:
    """An empty registry for this test alone, in which functions of the test may be declared."""
    before = dict(of_the_process)
    of_the_process.clear()
    yield of_the_process
    of_the_process.clear()
    of_the_process.update(before)


def plain(left: int, right: int = 1) -> int:
    return left + right


def with_context(context: JobContext, left: int) -> int:
    return left


def name_of(context: JobContext) -> str:
    return context.function


async def aname_of(context: JobContext) -> str:
    return context.function


def without_context(left: int, context: JobContext) -> int:
    return left


def anything(*args: Any, **kwargs: Any) -> Any:
    return [list(args), kwargs]


def as_text(workload: bytes) -> Any:
    return workload.decode()


class Reports:
    """Stands for an assigned job: remembers what it was told."""

    handle = b"H:one:1.1"
    unique = b"key"
    workload = b'{"args": [1], "kwargs": {}}'
    attempt = 1
    max_attempts: int | None = None
    takes_log = True
    cancelled = False
    may_return = True
    hears_interrupts = False
    decision: tuple[float | None] | None = None

    def __init__(self, workload: bytes = workload) -> None:
        self.workload = workload
        self.told: list[tuple[Any, ...]] = []

    def end_copy(self, failure: BaseException | None = None) -> None:
        pass

    def as_told(self, error: BaseException) -> BaseException:
        return error

    def send_log(self, text: bytes) -> None:
        self.told.append(("log", text))

    def send_status(self, numerator: int, denominator: int) -> None:
        self.told.append(("status", numerator, denominator))

    def send_data(self, data: bytes) -> None:
        self.told.append(("data", data))

    def send_warning(self, data: bytes) -> None:
        self.told.append(("warning", data))


class Methods:
    def of_instance(self) -> None: ...

    @staticmethod
    def of_nobody(selfish: int) -> int:
        return selfish


class TestDeclaration:
    def test_bare(self, registry: dict[str, Any]) -> None:
        made = job(plain)
        assert registry == {"tests.test_jobs.plain": made}
        assert (made.queue_name, made.priority, made.raw, made.takes_context) == ("default", 0, False, False)
        assert made.__name__ == "plain"
        assert repr(made) == "<Job tests.test_jobs.plain>"

    def test_with_options(self, registry: dict[str, Any]) -> None:
        made = job(name="add", queue_name="sums", priority=-5)(plain)
        assert registry == {"add": made}
        assert (made.queue_name, made.priority) == ("sums", -5)
        assert queue_of("add") == "sums"

    def test_the_queue_of_a_stranger(self) -> None:
        assert queue_of("unheard of") == "default"

    @pytest.mark.parametrize(
        ("own", "of_all", "limit"), [(60, None, 60), (5, None, 10), (None, 30, 30), (None, None, None)]
    )
    def test_the_time_limit_of_what_was_made_with_another(
        self, own: int | None, of_all: int | None, limit: int | None, settings: Any, registry: dict[str, Any]
    ) -> None:
        settings.GEARMAN = {"default": {"JOB_TIMEOUT": of_all}}
        job(name="add", timeout=own)(plain)
        given = vars(gearman_server.Command().create_parser("manage.py", "gearman_server").parse_args([]))
        core, _ = gearman_server._core(None, "one", "127.0.0.1:4730", given, settings_for())
        core.adopt([StoredJob(name, name, b"", b"", 0, 0, None, timeout=10) for name in (b"add", b"gone")])
        assert [core.jobs[name].timeout for name in (b"add", b"gone")] == [limit, 10]

    def test_declared_twice_by_a_reload(self, registry: dict[str, Any]) -> None:
        job(plain)
        again = job(plain)
        assert registry == {again.name: again}

    def test_two_functions_of_one_name(self, registry: dict[str, Any]) -> None:
        job(name="add")(plain)
        with pytest.raises(
            InvalidJob, match=r"'add': tests\.test_jobs\.plain and tests\.test_jobs\.anything; give"
        ):
            job(name="add")(anything)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"priority": 101}, "priority of .*plain must be a whole number from -100 to 100, not 101"),
            ({"priority": -101}, "not -101"),
            ({"priority": 3.5}, "not 3.5"),
            ({"queue_name": ""}, "must be 1 to 100 characters, not ''"),
            ({"queue_name": "q" * 101}, "1 to 100 characters"),
            ({"queue_name": None}, "not None"),
            ({"name": "a\tb"}, "is no name for a job"),
            ({"name": "a\0b"}, "is no name for a job"),
            ({"name": "\ud800"}, "is no name for a job"),
            ({"name": "\u00fc" * 257}, "at most 512 bytes"),
            ({"name": 5}, "is no name for a job"),
            ({"takes_context": True}, "its first argument must be `context`"),
            ({"retries": 3}, "has no option 'retries'; use max_attempts"),
            ({"expires": 60}, "@job of plain has no option 'expires'; use an argument .* raise Discard"),
        ],
    )
    def test_refused_options(self, registry: dict[str, Any], options: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidJob, match=message):
            job(**options)(plain)
        assert registry == {}

    def test_context_must_come_first(self, registry: dict[str, Any]) -> None:
        with pytest.raises(InvalidJob, match="first argument must be `context`"):
            job(takes_context=True)(without_context)
        with pytest.raises(InvalidJob, match="first argument must be `context`"):
            job(takes_context=True)(pathlib.Path.cwd)

    @pytest.mark.parametrize(
        "thing",
        [
            pytest.param(lambda: 1, id="lambda"),
            pytest.param(functools.partial(plain, 1), id="partial"),
            pytest.param("name", id="string"),
            pytest.param(Reports, id="class"),
            pytest.param(None, id="None"),
        ],
    )
    def test_refused_things(self, registry: dict[str, Any], thing: Any) -> None:
        with pytest.raises(InvalidJob):
            job()(thing)
        assert registry == {}

    def test_refused_inside_of_a_function(self, registry: dict[str, Any]) -> None:
        def inner() -> None: ...

        with pytest.raises(InvalidJob, match="must be defined at the module's level"):
            job(inner)

    def test_methods(self, registry: dict[str, Any]) -> None:
        with pytest.raises(
            InvalidJob, match=r"Methods\.of_instance is a method, .* no `self`.* @staticmethod"
        ):
            job(Methods.of_instance)
        assert job(Methods.of_nobody).call(1) == 1

    def test_a_job_cannot_be_made_a_job(self, registry: dict[str, Any]) -> None:
        with pytest.raises(InvalidJob):
            job(job(plain))


class TestCall:
    """In this process, as before it was decorated."""

    def test_plain(self) -> None:
        assert jobs.add(1, right=2) == jobs.add.call(1, 2) == 3

    def test_async(self) -> None:
        assert jobs.add_later(1, 2) == 3

    def test_async_where_an_event_loop_runs(self) -> None:
        async def view(call: Any) -> None:
            await call(1, 2)

        for call in (jobs.add_later, jobs.add_later.call):
            with pytest.raises(SynchronousOnlyOperation, match=r"add_later is .* await its acall\(\.\.\.\)"):
                asyncio.run(view(call))
        assert asyncio.run(jobs.add_later.acall(1, 2)) == 3

    def test_raw(self) -> None:
        assert jobs.shout(b"a") == b"A"

    def test_context(self) -> None:
        assert jobs.report(2) == [""]

    def test_the_context_knows_the_function(self, registry: dict[str, Any]) -> None:
        assert job(takes_context=True, name="named")(name_of).call() == "named"
        assert asyncio.run(job(takes_context=True, name="anamed")(aname_of).acall()) == "anamed"

    def test_exceptions_pass(self) -> None:
        with pytest.raises(ValueError, match=r"^no$"):
            jobs.fail("no")


class TestUsing:
    def test_the_job_itself_stays_as_it_was(self) -> None:
        other = jobs.add.using(priority=5)
        assert (jobs.add.priority, other.priority, other.name) == (0, 5, jobs.add.name)
        assert other(1) == 2

    def test_one_after_the_other(self) -> None:
        moment = timezone.now() + HOUR
        other = jobs.add.using(run_after=moment).using(priority=5)
        assert (other.run_after, other.priority) == (moment, 5)
        other = jobs.add.using(priority=5).using(run_after=HOUR)
        assert (other.run_after, other.priority) == (HOUR, 5)

    def test_zero_is_a_priority(self) -> None:
        assert jobs.add_later.using(priority=0).priority == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"priority": 101}, "priority"),
            ({"run_after": datetime.datetime(2030, 1, 1)}, "aware datetime"),
            ({"run_after": 60}, "run_after of .* must be a datetime or a timedelta, not 60"),
            ({"run_after": datetime.date(2030, 1, 1)}, "must be a datetime or a timedelta"),
            (
                {"countdown": 60},
                r"using\(\) of .*add has no option 'countdown'; use using\(run_after=\.\.\.\)",
            ),
            (
                {"expires": 60},
                "has no option 'expires'; use an argument that says until when, and raise Discard",
            ),
            (
                {"queue": "slow"},
                r"has no option 'queue'; use @job\(queue_name=\.\.\.\), which is for all calls",
            ),
            ({"timeout": 60}, r"use @job\(timeout=\.\.\.\)"),
            ({"prioritty": 5}, "use priority"),
            ({"link": None}, "it has priority, resubmit, run_after, run_timeout, unique"),
        ],
    )
    def test_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidJob, match=message):
            jobs.add.using(**options)

    def test_without_time_zones(self, settings: Any) -> None:
        settings.USE_TZ = False
        jobs.add.using(run_after=datetime.datetime(2030, 1, 1))
        with pytest.raises(InvalidJob, match="naive"):
            jobs.add.using(run_after=datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC))


class Point:
    pass


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Line:
    text: str


REFUSED: list[tuple[Any, str]] = [
    (datetime.datetime(2030, 1, 1), "is a datetime, which JSON cannot carry; pass its isoformat()"),
    (datetime.date(2030, 1, 1), "is a date, .*isoformat"),
    (datetime.time(1), "is a time, .*isoformat"),
    (HOUR, r"is a timedelta, .*total_seconds\(\)"),
    (uuid.UUID(int=1), r"is a UUID, .*str\(\)"),
    (decimal.Decimal(1), r"is a Decimal, .*str\(\)"),
    ({1}, "is a set, .*a list of it"),
    (frozenset({1}), "is a frozenset, .*a list of it"),
    (b"x", "is a bytes, .*base64"),
    (gettext_lazy("x"), r"is a __proxy__, .*str\(\)"),
    (Colour.RED, "is a Colour, .*its value"),
    (Line("x"), r"is a Line, .*dataclasses\.asdict\(\)"),
    (bytearray(b"x"), "is a bytearray, .*base64"),
    (pathlib.PurePosixPath("/"), r"is a PurePosixPath, .*str\(\)"),
    (pathlib.Path("/"), r"is a PosixPath, .*str\(\)"),
    (User(pk=1), r"is a User, .*primary key \(\.pk\), and fetch it in the job"),
    (Point(), "is a Point, .*what JSON has: None, bool, int, float, str, list, dict"),
    (float("nan"), "is nan, which JSON cannot carry; pass None or a string"),
    (float("inf"), "is inf"),
    (1j, "is a complex"),
    (object(), "is an object, which JSON cannot carry"),
    ({1: 2}, "has the key 1, which JSON would make a string"),
    ({None: 2}, "has the key None"),
    ([1, [2, {3}]], "item 1, item 1 is a set"),
    ((1, HOUR), "item 1 is a timedelta"),
    ({"a": {"b": b"x"}}, "key 'a', key 'b' is a bytes"),
]


class TestArguments:
    @pytest.mark.parametrize(("value", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
    def test_what_json_cannot_carry_is_named(self, value: Any, message: str) -> None:
        with pytest.raises(TypeError, match=rf"argument 'left' of tests\.app\.jobs\.add.* {message}"):
            jobs.add.enqueue(value)
        with pytest.raises(TypeError, match=f"argument 'right' of .* {message}"):
            jobs.add.enqueue(1, right=value)

    def test_query_sets(self) -> None:
        with pytest.raises(TypeError, match=r"is a QuerySet, .*a list of primary keys"):
            jobs.add.enqueue(User.objects.all())

    def test_any_arguments_are_named_too(self, registry: dict[str, Any]) -> None:
        made = job(anything)
        with pytest.raises(TypeError, match=r"argument 'args' of .*anything, item 1 is a set"):
            made.enqueue(1, {2})
        with pytest.raises(TypeError, match=r"argument 'kwargs' of .*anything, key 'x' is a set"):
            made.enqueue(x={2})

    def test_a_list_inside_of_itself(self) -> None:
        endless: list[Any] = []
        endless.append(endless)
        with pytest.raises((TypeError, ValueError, RecursionError)):
            jobs.add.enqueue(endless)

    @pytest.mark.parametrize(
        ("args", "kwargs", "message"),
        [
            ((), {}, r"tests\.app\.jobs\.add\(\) missing a required argument: 'left'"),
            ((1, 2, 3), {}, "too many positional arguments"),
            ((1,), {"x": 1}, "got an unexpected keyword argument 'x'"),
        ],
    )
    def test_what_does_not_fit_the_function(self, args: Any, kwargs: Any, message: str) -> None:
        with pytest.raises(TypeError, match=message):
            jobs.add.enqueue(*args, **kwargs)

    def test_the_context_is_not_an_argument(self) -> None:
        with pytest.raises(TypeError, match="missing a required argument: 'steps'"):
            jobs.report.enqueue()
        with pytest.raises(TypeError, match="unexpected keyword argument 'context'"):
            jobs.report.enqueue(1, context=None)

    @pytest.mark.parametrize(
        ("args", "kwargs"), [((), {}), (("text",), {}), ((b"a", b"b"), {}), ((), {"workload": b""})]
    )
    def test_raw_jobs_take_one_bytes_object(self, args: Any, kwargs: Any) -> None:
        with pytest.raises(TypeError, match="raw job shout takes one bytes object, its workload"):
            jobs.shout.enqueue(*args, **kwargs)

    def test_too_large(self, settings: Any) -> None:
        settings.GEARMAN = {"default": {"MAX_PACKET": 1000}}
        for submit in (jobs.shout.enqueue, jobs.shout.run):
            with pytest.raises(
                ValueError, match="shout has 1001 bytes, more than MAX_PACKET=1000; pass a reference"
            ):
                submit(bytes(1001))

    def test_too_large_beside_its_names(self, settings: Any) -> None:
        """A row has columns for these; a packet has not."""
        settings.GEARMAN = {"default": {"MAX_PACKET": 1000}}
        sentence = "shout has 1000 bytes, which with the names in its packet are more than MAX_PACKET=1000;"
        for run in (jobs.shout.run, lambda workload: group(jobs.shout.s(workload)).run()):
            with pytest.raises(TooLarge, match=sentence):
                run(bytes(1000))
        settings.GEARMAN = {"default": {"MAX_PACKET": 1000, "ENQUEUE": "wire"}}
        for enqueue in (jobs.shout.enqueue, lambda workload: jobs.shout.enqueue_many([((workload,), {})])):
            with pytest.raises(TooLarge, match=sentence):
                enqueue(bytes(1000))


@pytest.mark.django_db
@pytest.mark.usefixtures("nudges")
class TestEnqueue:
    def test_a_record_is_as_the_model_makes_it(self) -> None:
        values = {"function": "f", "workload": b"w", "priority": 3, "enqueued_at": timezone.now()}
        made, ours = JobRecord(**values), rows.new(**values)
        for field in JobRecord._meta.concrete_fields:
            mine, its = getattr(ours, field.attname), getattr(made, field.attname)
            assert (type(mine), mine) == (type(its), its), field
        assert (ours._state.adding, ours._state.db, ours.server) == (True, None, None)
        assert ours._state is not rows.new(**values)._state
        ours.save()
        assert JobRecord.objects.get(pk=ours.pk).priority == 3

    def test_the_row(self) -> None:
        before = timezone.now()
        result = jobs.report.enqueue(steps=3)
        record = JobRecord.objects.get()
        assert record.function == "tests.app.jobs.report"
        assert json.loads(bytes(record.workload)) == {"args": [], "kwargs": {"steps": 3}}
        assert (record.queue_name, record.priority, record.status) == ("slow", 0, Status.READY)
        assert (record.background, record.unique, record.run_after) == (True, "", None)
        assert (record.handle, record.server, record.attempts) == (None, None, 0)
        assert before <= record.enqueued_at <= timezone.now()
        assert ":" in record.client
        assert (result.id, result.status, result.handle) == (str(record.pk), "READY", "")
        assert result.enqueued_at == record.enqueued_at
        assert repr(result) == f"<JobResult {record.pk} tests.app.jobs.report READY>"

    def test_the_envelope_keeps_what_was_given(self) -> None:
        jobs.add.enqueue(1, right=2)
        assert bytes(JobRecord.objects.get().workload) == b'{"args":[1],"kwargs":{"right":2}}'

    @pytest.mark.parametrize("text", ["\u00fc\U0001f600", "\0", "\ud800", "a" * 100_000])
    def test_any_text_travels(self, registry: dict[str, Any], text: str) -> None:
        made = job(anything)
        made.enqueue(text)
        assert json.loads(made.perform(bytes(JobRecord.objects.get().workload), JobContext())) == [[text], {}]

    def test_raw(self) -> None:
        jobs.shout.enqueue(b"\0\xff")
        assert bytes(JobRecord.objects.get().workload) == b"\0\xff"

    def test_options(self) -> None:
        moment = timezone.now() + HOUR
        jobs.add.using(priority=-7, run_after=moment).enqueue(1)
        record = JobRecord.objects.get()
        assert (record.priority, record.run_after, record.status) == (-7, moment, Status.SCHEDULED)

    def test_a_while_from_now(self) -> None:
        jobs.add.using(run_after=HOUR).enqueue(1)
        record = JobRecord.objects.get()
        assert record.run_after == record.enqueued_at + HOUR

    @pytest.mark.parametrize(
        "run_after", [datetime.timedelta(0), -HOUR, datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)]
    )
    def test_what_is_due_is_ready(self, run_after: Any) -> None:
        jobs.add.using(run_after=run_after).enqueue(1)
        assert JobRecord.objects.get().status == Status.READY

    def test_a_moment_in_another_zone(self) -> None:
        zone = datetime.timezone(datetime.timedelta(hours=9))
        jobs.add.using(run_after=timezone.now().astimezone(zone) + HOUR).enqueue(1)
        record = JobRecord.objects.get()
        assert record.status == Status.SCHEDULED
        assert record.run_after is not None
        assert HOUR - datetime.timedelta(minutes=1) < record.run_after - timezone.now() <= HOUR


@pytest.mark.django_db(transaction=True)
class TestTransactions:
    """The job exists exactly if the transaction commits, and one nudge tells of it."""

    def test_commit(self, nudges: list[None]) -> None:
        with transaction.atomic():
            jobs.add.enqueue(1)
            assert nudges == []
        assert JobRecord.objects.count() == 1
        assert len(nudges) == 1

    def test_no_transaction(self, nudges: list[None]) -> None:
        jobs.add.enqueue(1)
        assert len(nudges) == 1

    def test_rollback(self, nudges: list[None]) -> None:
        with transaction.atomic():
            jobs.add.enqueue(1)
            transaction.set_rollback(True)
        assert not JobRecord.objects.exists()
        assert nudges == []

    def test_one_for_many_rows(self, nudges: list[None]) -> None:
        with transaction.atomic():
            for number in range(100):
                jobs.add.enqueue(number)
        assert JobRecord.objects.count() == 100
        assert len(nudges) == 1

    def test_one_that_is_managed_by_hand(self, nudges: list[None]) -> None:
        """Of its commit nobody is told: a server finds the rows by itself."""
        transaction.set_autocommit(False)
        try:
            jobs.add.enqueue(1)
            transaction.rollback()
            jobs.add.enqueue(2)
            jobs.add.enqueue_many([((3,), {}), ((4,), {})])
            jobs.add.using(unique="u").enqueue(5).cancel()
            group(jobs.add.s(6), jobs.add.s(7)).enqueue()
            assert nudges == []
            transaction.commit()
        finally:
            transaction.rollback()
            transaction.set_autocommit(True)
        assert JobRecord.objects.filter(status=Status.READY).count() == 5

    def test_each_transaction_has_its_own(self, nudges: list[None]) -> None:
        for _ in range(2):
            with transaction.atomic():
                jobs.add.enqueue(1)
        assert len(nudges) == 2

    def savepoint(self, *, fails: bool) -> None:
        try:
            with transaction.atomic():
                jobs.add.enqueue(1)
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass

    @pytest.mark.parametrize("before", [False, True])
    @pytest.mark.parametrize("inside", ["nothing", "commits", "fails"])
    @pytest.mark.parametrize("after", [False, True])
    def test_savepoints(self, nudges: list[None], before: bool, inside: str, after: bool) -> None:
        with transaction.atomic():
            if before:
                jobs.add.enqueue(1)
            if inside != "nothing":
                self.savepoint(fails=inside == "fails")
            if after:
                jobs.add.enqueue(1)
        rows = before + (inside == "commits") + after
        assert JobRecord.objects.count() == rows
        assert len(nudges) == bool(rows)

    def test_savepoints_in_savepoints(self, nudges: list[None]) -> None:
        with transaction.atomic():
            with transaction.atomic():
                self.savepoint(fails=True)
                self.savepoint(fails=False)
                self.savepoint(fails=True)
            self.savepoint(fails=True)
        assert JobRecord.objects.count() == 1
        assert len(nudges) == 1

    def test_the_outer_savepoint_fails(self, nudges: list[None]) -> None:
        with transaction.atomic():
            try:
                with transaction.atomic():
                    self.savepoint(fails=False)
                    jobs.add.enqueue(1)
                    raise ZeroDivisionError
            except ZeroDivisionError:
                pass
            self.savepoint(fails=False)
        assert JobRecord.objects.count() == 1
        assert len(nudges) == 1

    def test_what_a_server_hears(self, settings: Any) -> None:
        heard: list[bytes] = []

        def listen(peer: Peer) -> None:
            while True:
                function, _, _ = peer.expect(PacketType.SUBMIT_JOB_BG)
                heard.append(function)
                peer.send(PacketType.JOB_CREATED, b"H:1")

        with fake_server(listen) as port:
            settings.GEARMAN = {"default": {"SERVERS": [f"127.0.0.1:{port}"]}}
            with transaction.atomic():
                for number in range(10):
                    jobs.add.enqueue(number)
                self.savepoint(fails=True)
                self.savepoint(fails=False)
                assert heard == []
            client_for().do_background("marker")
            client_for().close()
        assert heard == [CLAIM, b"marker"]

    def test_other_hooks_between_do_no_harm(self, nudges: list[None]) -> None:
        told: list[int] = []
        with transaction.atomic():
            jobs.add.enqueue(1)
            transaction.on_commit(lambda: told.append(1))
            jobs.add.enqueue(1)
        assert told == [1]
        assert 1 <= len(nudges) <= 2

    def test_nobody_listens(self) -> None:
        jobs.add.enqueue(1)
        assert JobRecord.objects.get().status == Status.READY

    def test_a_broken_client_does_not_reach_the_caller(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("django_gearman.submission.client_for", lambda: 1 / 0)
        with transaction.atomic():
            jobs.add.enqueue(1)
        assert JobRecord.objects.count() == 1


def end(record_id: str, status: Status = Status.SUCCESSFUL, **columns: Any) -> None:
    JobRecord.objects.filter(pk=record_id).update(status=status, finished_at=timezone.now(), **columns)


@pytest.mark.django_db
@pytest.mark.usefixtures("nudges")
class TestResult:
    def test_not_finished(self) -> None:
        result = jobs.add.enqueue(1)
        assert not result.is_finished
        assert (result.errors, result.attempts, result.progress) == ([], 0, None)
        assert (result.started_at, result.last_attempted_at, result.finished_at) == (None, None, None)
        with pytest.raises(JobNotFinished, match=r"has not finished yet \(it is READY\)"):
            _ = result.return_value

    def test_refresh(self) -> None:
        result = jobs.add.enqueue(1)
        now = timezone.now()
        JobRecord.objects.update(
            status=Status.RUNNING, handle="H:1", attempts=2, numerator=1, denominator=3, started_at=now
        )
        assert result.status == "READY"
        result.refresh()
        assert (result.status, result.handle, result.attempts) == ("RUNNING", "H:1", 2)
        assert (result.progress, result.started_at) == ((1, 3), now)

    def test_pickled(self) -> None:
        one = jobs.add.enqueue(1)
        two, three = jobs.add.enqueue_many([((2,), {}), ((3,), {})])
        assert three.status == "READY"  # its record was made, and that of ``two`` was not
        for result in (one, two, three):
            again: JobResult[int] = pickle.loads(pickle.dumps(result))
            assert (again.id, again.function, again.status) == (result.id, "tests.app.jobs.add", "READY")
            end(again.id, result=again.id.encode())
            again.refresh()
            assert again.return_value == int(result.id)

    def test_refresh_of_nothing(self) -> None:
        result = jobs.add.enqueue(1)
        JobRecord.objects.all().delete()
        with pytest.raises(JobResultDoesNotExist, match="pruned, or its transaction was rolled back"):
            result.refresh()

    @pytest.mark.parametrize(("data", "value"), [(b"3", 3), (b"null", None), (b'{"a":[1]}', {"a": [1]})])
    def test_value(self, data: bytes, value: Any) -> None:
        result = jobs.add.enqueue(1)
        end(result.id, result=data)
        assert result.get() == result.return_value == value

    @pytest.mark.parametrize("data", [b"", b"no JSON", b"\xff", b"[" * 200_000])
    def test_a_value_of_a_worker_in_another_language(self, data: bytes) -> None:
        result = jobs.add.enqueue(1)
        end(result.id, result=data)
        assert result.get() == data

    def test_value_of_a_raw_job(self) -> None:
        result = jobs.shout.enqueue(b"a")
        end(result.id, result=b"3")
        assert result.get() == b"3"

    def test_failure(self) -> None:
        result = jobs.fail.enqueue("no")
        end(result.id, Status.FAILED, exception="builtins.ValueError", message="no", traceback="Traceback")
        with pytest.raises(JobFailed, match=r"failed with ValueError: no") as caught:
            result.get(timeout=1)
        assert (caught.value.exception, caught.value.message) == ("builtins.ValueError", "no")
        assert caught.value.traceback == "Traceback"
        (error,) = result.errors
        assert (error.exception_class_path, error.message) == ("builtins.ValueError", "no")

    @pytest.mark.parametrize("status", [Status.DEAD, Status.CANCELLED])
    def test_an_end_without_a_word(self, status: Status) -> None:
        result = jobs.add.enqueue(1)
        end(result.id, status)
        with pytest.raises(JobFailed, match=f"failed: {status.label}"):
            result.get()
        assert len(result.errors) == 1

    def test_waiting_in_a_transaction(self) -> None:
        """The test itself runs in one."""
        with pytest.raises(WaitInTransaction, match="wait after the transaction"):
            jobs.add.enqueue(1).get(timeout=1)

    def test_retry_keeps_what_a_foreign_client_asked_for(self) -> None:
        old = JobRecord.objects.create(
            function="f", reducer="total", workload=b"w", status="FAILED", max_attempts=4, timeout=5
        )
        again = JobResult(old).retry()._record
        assert [getattr(again, name) for name in ("reducer", "max_attempts", "timeout")] == ["total", 4, 5]


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("nudges")
class TestGet:
    def test_timeout(self) -> None:
        result = jobs.add.enqueue(1)
        with pytest.raises(ResponseTimeout, match=rf"job {result.id} \(.*add\) took longer than 0.01 s"):
            result.get(timeout=0.01)
        with pytest.raises(TimeoutError):
            result.get(timeout=0)

    def test_waits_for_the_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        result = jobs.add.enqueue(1)
        pauses: list[float] = []

        def sleep(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 20:
                end(result.id, result=b"2")

        monkeypatch.setattr("django_gearman.results.sleep", sleep)
        assert result.get() == 2
        assert pauses == sorted(pauses)
        assert pauses[0] < 0.01
        assert pauses[-1] == 0.25

    def test_the_record_goes_away(self, monkeypatch: pytest.MonkeyPatch) -> None:
        result = jobs.add.enqueue(1)
        monkeypatch.setattr("django_gearman.results.sleep", lambda seconds: JobRecord.objects.all().delete())
        with pytest.raises(JobResultDoesNotExist):
            result.get()


@pytest.mark.django_db
@pytest.mark.usefixtures("nudges")
class TestGetResult:
    def test_found(self) -> None:
        result = jobs.add.enqueue(1)
        assert jobs.add.get_result(result.id).id == result.id

    def test_of_another_function(self) -> None:
        result = jobs.add.enqueue(1)
        with pytest.raises(JobResultMismatch, match=r"is of tests\.app\.jobs\.add, not of shout"):
            jobs.shout.get_result(result.id)

    @pytest.mark.parametrize(
        "id", ["0", "-1", "999999", "", "x", "1.5", "9" * 30, "9" * 5000, "\0", "\u00b2"]
    )
    def test_not_found(self, id: str) -> None:
        with pytest.raises(JobResultDoesNotExist):
            jobs.add.get_result(id)


class TestPerform:
    """What a worker runs."""

    def test_plain(self) -> None:
        assert jobs.add.perform(b'{"args": [1], "kwargs": {"right": 2}}', JobContext()) == b"3"

    def test_async(self) -> None:
        assert jobs.add_later.perform(b'{"args": [1, 2], "kwargs": {}}', JobContext()) == b"3"

    def test_raw(self) -> None:
        assert jobs.shout.perform(b"\0a", JobContext()) == b"\0A"

    def test_a_raw_job_returns_bytes(self, registry: dict[str, Any]) -> None:
        made = job(raw=True)(as_text)
        with pytest.raises(TypeError, match="must return bytes, not str"):
            made.perform(b"a", JobContext())

    @pytest.mark.parametrize(
        "workload",
        [
            b"",
            b"\xff",
            b"1",
            b"null",
            b"[]",
            b"{}",
            b'{"args": []}',
            b'{"args": {}, "kwargs": {}}',
            b'{"args": [], "kwargs": []}',
        ],
    )
    def test_bad_envelopes(self, workload: bytes) -> None:
        with pytest.raises(
            TypeError, match=r"the workload of tests\.app\.jobs\.add must be JSON of the form"
        ):
            jobs.add.perform(workload, JobContext())

    def test_a_bottomless_envelope(self) -> None:
        with pytest.raises((TypeError, RecursionError)):
            jobs.add.perform(b"[" * 200_000, JobContext())

    def test_arguments_that_do_not_fit(self) -> None:
        with pytest.raises(TypeError, match="add"):
            jobs.add.perform(b'{"args": [1, 2, 3], "kwargs": {}}', JobContext())

    def test_a_value_that_json_cannot_carry(self) -> None:
        with pytest.raises(
            TypeError, match=r"the return value of tests\.app\.jobs\.return_a_set is a set.*a list of it"
        ):
            jobs.return_a_set.perform(b'{"args": [], "kwargs": {}}', JobContext())

    @pytest.mark.django_db(transaction=True)
    def test_context(self) -> None:
        reports = Reports(b'{"args": [2], "kwargs": {}}')
        assert json.loads(perform_assigned(jobs.report, reports)) == ["H:one:1.1"]
        assert reports.told == [
            ("status", 1, 2),
            ("data", b"step 1"),
            ("status", 2, 2),
            ("data", b"step 2"),
            ("warning", b"almost done"),
        ]


class TestContext:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
        now = 1000.0

        def advance(seconds: float) -> None:
            nonlocal now
            now += seconds

        monkeypatch.setattr("django_gearman.context.monotonic", lambda: now)
        return advance

    def test_progress_is_throttled(self, clock: Callable[[float], None]) -> None:
        reports = Reports()
        context = JobContext("H:1", "", reports)
        for step in range(1000):
            context.set_progress(step, 10_000)
            clock(0.001)
        assert 9 <= len(reports.told) <= 11

    @pytest.mark.parametrize("denominator", [0, 10])
    def test_that_of_more_than_there_seemed_to_be_is_throttled(
        self, clock: Callable[[float], None], denominator: int
    ) -> None:
        reports = Reports()
        context = JobContext("H:1", "", reports)
        for step in range(100, 1100):
            context.set_progress(step, denominator)
            clock(0.001)
        assert 9 <= len(reports.told) <= 11

    def test_the_last_one_is_sent(self, clock: Callable[[float], None]) -> None:
        reports = Reports()
        context = JobContext("H:1", "", reports)
        context.set_progress(1, 10)
        context.set_progress(10, 10)
        assert reports.told == [("status", 1, 10), ("status", 10, 10)]

    def test_what_was_held_back_leaves_at_the_end(self, clock: Callable[[float], None]) -> None:
        reports = Reports()
        context = JobContext("H:1", "", reports)
        context.set_progress(1, 10)
        context.set_progress(2, 10)
        context.flush()
        context.flush()
        assert reports.told == [("status", 1, 10), ("status", 2, 10)]

    def test_text_is_encoded(self) -> None:
        reports = Reports()
        context = JobContext("H:1", "", reports)
        context.send_data("\u00fc")
        context.warn(b"\xff")
        assert reports.told == [("data", b"\xc3\xbc"), ("warning", b"\xff")]

    @pytest.mark.parametrize("method", ["send_data", "warn"])
    def test_other_things_are_refused(self, method: str) -> None:
        context = JobContext("H:1", "", Reports())
        with pytest.raises(TypeError, match=rf"context\.{method}\(\) takes bytes or str, not dict"):
            getattr(context, method)({})

    def test_nobody_listens(self) -> None:
        context = JobContext()
        context.set_progress(1, 1)
        context.send_data("x")
        context.warn("x")


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


def described(function: Callable[..., Any], *args: Any) -> dict[str, str]:
    workload = json.dumps({"args": args, "kwargs": {}}).encode()
    try:
        Job(function, name="described").perform(workload, JobContext())
    except BaseException as error:
        trace = error.__traceback__
        # Without this function, where a worker's loop would be.
        told: dict[str, str] = json.loads(describe_exception(error.with_traceback(trace and trace.tb_next)))
        return told
    raise AssertionError("it did not fail")


def raise_(error: str) -> None:
    raise ValueError(error)


async def raise_later(error: str) -> None:
    await asyncio.sleep(0)
    raise ValueError(error)


async def raise_cancelled() -> None:
    raise asyncio.CancelledError


def raise_unspeakable() -> None:
    raise Unspeakable


def return_a_set() -> set[int]:
    return {1}


def raise_chain() -> None:
    try:
        raise_("first")
    except ValueError as error:
        raise KeyError("second") from error


def recurse() -> None:
    recurse()


class TestDescribeException:
    def test_all_of_it(self) -> None:
        told = described(raise_, "no")
        assert (told["exception"], told["message"]) == ("builtins.ValueError", "no")
        assert told["traceback"].startswith("Traceback (most recent call last):\n")
        assert told["traceback"].endswith("ValueError: no\n")

    @pytest.mark.parametrize("function", [raise_, raise_later])
    def test_no_frames_of_ours(self, function: Callable[..., Any]) -> None:
        lines = [
            line for line in described(function, "no")["traceback"].splitlines() if line.startswith("  File")
        ]
        assert len(lines) == 1
        assert f"in {function.__name__}" in lines[0]

    def test_a_refusal_of_ours_has_none(self) -> None:
        """It is a sentence to who wrote the function."""
        told = described(return_a_set)
        assert told["traceback"].startswith("django_gearman.exceptions.NotJSON: the return value of ")

    def test_an_error_of_ours_has_ours(self) -> None:
        assert "in _invoke" in described(plain, 1, 2, 3)["traceback"]
        told = json.loads(describe_exception(ValueError("never raised")))
        assert told["traceback"] == "ValueError: never raised\n"

    def test_causes(self) -> None:
        told = described(raise_chain)
        assert told["exception"] == "builtins.KeyError"
        assert "ValueError: first" in told["traceback"]
        assert "direct cause" in told["traceback"]

    def test_size(self) -> None:
        told = described(raise_, "\U0001f600" * 1_000_000)
        assert len(told["message"]) == 8 * 1024
        assert len(told["traceback"]) == 64 * 1024
        told = described(recurse)
        assert told["exception"] == "builtins.RecursionError"
        assert len(told["traceback"]) <= 64 * 1024

    def test_an_exception_that_cannot_speak(self) -> None:
        told = described(raise_unspeakable)
        assert told["exception"] == "tests.test_jobs.Unspeakable"
        assert "Unspeakable" in told["traceback"]

    def test_a_file_name_that_is_no_text(self) -> None:
        assert described(raise_, "\udcff")["message"] == "\udcff"

    def test_cancelled(self) -> None:
        assert described(raise_cancelled)["exception"] == "asyncio.exceptions.CancelledError"


@pytest.mark.django_db(transaction=True)
class TestDatabaseConnections:
    def test_they_are_tended_around_a_job(self, registry: dict[str, Any], settings: Any) -> None:
        """As around a request: one past its CONN_MAX_AGE is not used for the next."""
        made = job(name="count")(count_users)
        assert perform_assigned(made, Reports(b'{"args": [], "kwargs": {}}')) == b"0"
        assert connection.connection is None

    def test_those_of_an_async_job_too(self, registry: dict[str, Any]) -> None:
        """They belong to the thread of ``sync_to_async``."""
        made = job(name="acount")(acount_users)
        assert perform_assigned(made, Reports(b'{"args": [], "kwargs": {}}')) == b"0"
        assert asyncio.run(sync_to_async(lambda: connection.connection)()) is None
        failing = job(name="acount and fail")(acount_users_and_fail)
        with pytest.raises(ValueError, match="after its query"):
            perform_assigned(failing, Reports(b'{"args": [], "kwargs": {}}'))
        assert asyncio.run(sync_to_async(lambda: connection.connection)()) is None

    def test_nobody_waits_for_what_an_interrupted_job_left_there(self, registry: dict[str, Any]) -> None:
        made = job(name="leave busy")(leave_busy)
        try:
            with pytest.raises(JobTimedOut):
                perform_assigned(made, Reports(b'{"args": [], "kwargs": {}}'))
            is_free.set()
            assert asyncio.run(sync_to_async(waits.pop)())
            assert perform_assigned(job(name="acount")(acount_users), Reports(b'{"args": [], "kwargs": {}}'))
            assert asyncio.run(sync_to_async(lambda: connection.connection)()) is None
        finally:
            is_free.set()
            asyncio.run(sync_to_async(connections.close_all)())

    def test_jobs_side_by_side_leave_each_other_theirs(self, registry: dict[str, Any]) -> None:
        """That one is in the middle of a query, between two chunks, does not show."""
        names = make_users()

        async def main() -> None:
            reading, gate = await begin_reading()
            assert await aperform_assigned(job(name="acount")(acount_users), no_arguments()) == b"6"
            with pytest.raises(ValueError, match="after its query"):
                await aperform_assigned(job(name="acount and fail")(acount_users_and_fail), no_arguments())
            gate.go_on.set()
            assert json.loads(await reading) == names
            # The last out.
            assert await sync_to_async(lambda: connection.connection)() is None

        asyncio.run(main())

    def test_jobs_in_threads_too(self, registry: dict[str, Any]) -> None:
        """Each thread has an event loop, and all have one thread of ``sync_to_async``."""
        names = make_users()
        gate = Gate()

        def read() -> bytes:
            try:
                return perform_assigned(job(name="read")(read_users), no_arguments())
            finally:
                # A worker's threads last.
                attempts._kept.loop.close()

        with ThreadPoolExecutor(1) as thread:
            reading = thread.submit(read)
            try:
                assert gate.is_reached.wait(30)
                assert perform_assigned(job(name="acount")(acount_users), no_arguments()) == b"6"
            finally:
                gate.go_on.set()
            assert json.loads(reading.result()) == names
        assert asyncio.run(sync_to_async(lambda: connection.connection)()) is None

    def test_a_worker_that_always_has_a_job(
        self, registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is old is left to who may be in the middle of a query, and closed with the last of them."""
        monkeypatch.setattr(attempts, "LONGEST_SHARED", 0.0)
        names = make_users()

        async def main() -> None:
            reading, gate = await begin_reading()
            old: Any = await sync_to_async(lambda: connections["default"])()
            later, gate_of_later = await begin_reading()
            new: Any = await sync_to_async(lambda: connections["default"])()
            assert new is not old
            assert await aperform_assigned(job(name="acount")(acount_users), no_arguments()) == b"6"
            assert await sync_to_async(lambda: connections["default"])() is new, "two at the most"
            gate.go_on.set()
            assert json.loads(await reading) == names
            assert old.connection is None
            gate_of_later.go_on.set()
            assert json.loads(await later) == names
            assert new.connection is None
            assert await sync_to_async(lambda: connection.connection)() is None

        asyncio.run(main())

    def test_one_that_was_lost_beside_another_job(
        self, registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if connection.vendor != "postgresql":
            pytest.skip("ends its session as an administrator of PostgreSQL can")
        monkeypatch.setitem(connection.settings_dict, "CONN_MAX_AGE", None)
        make_users()
        made = job(name="acount")(acount_users)

        async def main() -> None:
            reading, gate = await begin_reading()
            await sync_to_async(end_session)()
            with pytest.raises(OperationalError):
                await aperform_assigned(made, no_arguments())
            assert await aperform_assigned(made, no_arguments()) == b"6"
            gate.go_on.set()
            with pytest.raises(OperationalError):
                await reading

        try:
            asyncio.run(main())
        finally:
            asyncio.run(sync_to_async(connections.close_all)())

    def test_an_async_job_s_that_was_lost(
        self, registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As by a restart of the database: one job hears of it, the next gets another."""
        if connection.vendor != "postgresql":
            pytest.skip("ends its session as an administrator of PostgreSQL can")
        monkeypatch.setitem(connection.settings_dict, "CONN_MAX_AGE", None)
        made = job(name="acount")(acount_users)
        envelope = b'{"args": [], "kwargs": {}}'
        try:
            assert perform_assigned(made, Reports(envelope)) == b"0"
            asyncio.run(sync_to_async(end_session)())
            with pytest.raises(OperationalError):
                perform_assigned(made, Reports(envelope))
            assert perform_assigned(made, Reports(envelope)) == b"0"
        finally:
            asyncio.run(sync_to_async(connections.close_all)())


@pytest.mark.django_db(transaction=True)
class TestBrokenConnections:
    """Who decides on another attempt, and who hears of the failure, finds connections that work."""

    @pytest.fixture
    def seen(self, registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
        """What ``declared`` says of the failure, and a receiver of signals."""
        monkeypatch.setitem(connection.settings_dict, "CONN_MAX_AGE", None)
        seen: list[Any] = []

        def receive(exception: BaseException, **arguments: Any) -> None:
            seen.append(User.objects.create(username=type(exception).__name__))

        signals.job_finished.connect(receive)
        yield seen
        signals.job_finished.disconnect(receive)
        asyncio.run(sync_to_async(connections.close_all)())

    def declared(self, function: Any, seen: list[Any]) -> Job[Any, Any]:
        """As a job that asks its record, and gives up."""
        return job(name="broken", max_attempts=3, backoff=lambda error, result: seen.append(result))(function)

    def assert_seen(self, seen: list[Any], error: str) -> None:
        result, user = seen
        assert result.attempts == 1
        assert user.username == error
        assert list(User.objects.filter(username__endswith="Error")) == [user], "nothing undid it"

    def test_in_a_transaction_that_was_begun_by_hand(self, seen: list[Any]) -> None:
        with pytest.raises(ValueError, match="before its commit"):
            perform_assigned(self.declared(leave_transaction, seen), no_arguments())
        self.assert_seen(seen, "ValueError")

    def test_in_a_transaction_that_is_broken(self, seen: list[Any]) -> None:
        with pytest.raises(DatabaseError) as caught:
            perform_assigned(self.declared(break_transaction, seen), no_arguments())
        self.assert_seen(seen, type(caught.value).__name__)

    def test_in_the_middle_of_a_query(self, seen: list[Any]) -> None:
        if connection.vendor != "postgresql":
            pytest.skip("other drivers wait for the end of a query")

        def ring(*args: object) -> None:
            raise JobTimedOut(1)

        before = signal.signal(signal.SIGALRM, ring)
        try:
            with pytest.raises(JobTimedOut):
                perform_assigned(self.declared(wait_in_query, seen), no_arguments())
        finally:
            signal.signal(signal.SIGALRM, before)
            end_sleepers()
        result, user = seen
        assert (result.attempts, user.username) == (1, "JobTimedOut")

    def test_of_a_session_that_was_ended(self, seen: list[Any]) -> None:
        if connection.vendor != "postgresql":
            pytest.skip("ends its session as an administrator of PostgreSQL can")
        with pytest.raises(OperationalError):
            perform_assigned(self.declared(lose_session, seen), no_arguments())
        self.assert_seen(seen, "OperationalError")

    def test_of_a_session_that_was_ended_under_a_coroutine(self, seen: list[Any]) -> None:
        if connection.vendor != "postgresql":
            pytest.skip("ends its session as an administrator of PostgreSQL can")
        with pytest.raises(OperationalError):
            asyncio.run(aperform_assigned(self.declared(alose_session, seen), no_arguments()))
        self.assert_seen(seen, "OperationalError")

    def test_and_under_one_beside_others(self, seen: list[Any]) -> None:
        if connection.vendor != "postgresql":
            pytest.skip("ends its session as an administrator of PostgreSQL can")
        make_users()
        made = self.declared(alose_session, seen)

        async def main() -> None:
            reading, gate = await begin_reading()
            with pytest.raises(OperationalError):
                await aperform_assigned(made, no_arguments())
            gate.go_on.set()
            with pytest.raises(OperationalError):
                await reading

        asyncio.run(main())
        # The reader failed after it.
        self.assert_seen(seen[:2], "OperationalError")


def leave_transaction() -> None:
    transaction.set_autocommit(False)
    User.objects.create(username="lost")
    raise ValueError("before its commit")


def break_transaction() -> None:
    transaction.set_autocommit(False)
    with connection.cursor() as cursor:
        cursor.execute("SELECT nothing FROM nowhere")


def wait_in_query() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        cursor.execute("SELECT pg_sleep(30)")


def lose_session() -> None:
    User.objects.count()
    end_session()
    User.objects.count()


def end_sleepers() -> None:
    """The server goes on with a query that nobody waits for."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND query = 'SELECT pg_sleep(30)'"
        )


async def alose_session() -> None:
    await sync_to_async(lose_session)()


def count_users() -> int:
    return User.objects.count()


async def acount_users() -> int:
    return await User.objects.acount()


def make_users() -> list[str]:
    names = [f"user {number}" for number in range(6)]
    User.objects.bulk_create(User(username=name) for name in names)
    connection.close()
    return names


class Gate:
    """Where the next job of ``read_users`` waits, in the middle of its query."""

    made: ClassVar[list[Gate]] = []

    def __init__(self) -> None:
        self.is_reached = threading.Event()
        self.go_on = threading.Event()
        self.made.append(self)


async def read_users() -> list[str]:
    gate = Gate.made.pop()
    names: list[str] = []
    async for user in User.objects.order_by("pk").aiterator(chunk_size=3):
        names.append(user.username)
        if len(names) == 3:
            gate.is_reached.set()
            await asyncio.to_thread(gate.go_on.wait, 30)
    return names


async def begin_reading() -> tuple[asyncio.Task[bytes], Gate]:
    gate = Gate()
    reading = asyncio.create_task(aperform_assigned(job(name="read")(read_users), no_arguments()))
    assert await asyncio.to_thread(gate.is_reached.wait, 30)
    return reading, gate


def no_arguments() -> Reports:
    return Reports(b'{"args": [], "kwargs": {}}')


async def acount_users_and_fail() -> None:
    await User.objects.acount()
    raise ValueError("after its query")


is_free = threading.Event()
waits: list[bool] = []


async def leave_busy() -> None:
    """As a job whose time is up while it makes a query that takes long."""
    await User.objects.acount()
    executor = SyncToAsync.single_thread_executor
    asyncio.get_running_loop().run_in_executor(executor, lambda: waits.append(is_free.wait(30)))
    raise JobTimedOut(1)


def end_session() -> None:
    """End the session of the thread's connection from another, as soon as that has happened."""
    process: Any = connection.connection.info.backend_pid
    other = connection.copy()
    try:
        with other.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s, 30000)", [process])
    finally:
        other.close()


class TestThreads:
    def test_each_alias_has_one_client(self, settings: Any) -> None:
        found: list[object] = []
        threads = [threading.Thread(target=lambda: found.append(client_for())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        first = client_for()
        settings.GEARMAN = {"default": {"TIMEOUT": 7}}
        assert client_for() is not first


class TestAttempts:
    """What becomes of a job that raised."""

    @staticmethod
    def assigned(attempt: int = 1, max_attempts: int | None = None) -> Reports:
        reports = Reports()
        reports.attempt, reports.max_attempts = attempt, max_attempts
        return reports

    def test_without_a_number_it_has_failed(self) -> None:
        assert pause_before_retry(jobs.add, self.assigned(), ValueError()) is None

    def test_pauses_grow_and_differ(self, registry: dict[str, Any]) -> None:
        patient = job(max_attempts=100)(plain)
        for attempt, middle in ((1, 2), (2, 4), (5, 32), (11, 2048), (12, 3600), (99, 3600)):
            pauses = {pause_before_retry(patient, self.assigned(attempt), OSError()) for _ in range(20)}
            assert len(pauses) > 10
            assert all(pause is not None and 0.75 * middle <= pause <= 1.25 * middle for pause in pauses)

    def test_number_of_the_row_counts_before_that_of_the_function(self, registry: dict[str, Any]) -> None:
        patient = job(max_attempts=5)(plain)
        assert pause_before_retry(patient, self.assigned(2, 2), OSError()) is None
        assert pause_before_retry(patient, self.assigned(5, 6), OSError()) is not None
        assert pause_before_retry(patient, self.assigned(5), OSError()) is None

    def test_backoff_decides(self, registry: dict[str, Any], transactional_db: None) -> None:
        told: list[tuple[BaseException, int, str]] = []

        def backoff(error: BaseException, result: JobResult[Any]) -> float | datetime.timedelta | None:
            told.append((error, result.attempts, result.function))
            return {1: 7.5, 2: HOUR, 3: -1.0}.get(result.attempts)

        patient = job(max_attempts=9, backoff=backoff)(plain)
        error = OSError()
        pauses = [pause_before_retry(patient, self.assigned(attempt), error) for attempt in (1, 2, 3, 4)]
        assert pauses == [7.5, 3600.0, 0.0, None]
        assert told[0] == (error, 1, "tests.test_jobs.plain")

    def test_backoff_that_fails_is_told_and_the_default_taken(
        self, registry: dict[str, Any], transactional_db: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        patient = job(max_attempts=9, backoff=lambda error, result: 1 / 0)(plain)
        pause = pause_before_retry(patient, self.assigned(), OSError())
        assert pause is not None
        assert 1.5 <= pause <= 2.5
        assert "The backoff of tests.test_jobs.plain failed" in caplog.text

    @pytest.mark.parametrize("pause", [float("inf"), float("nan"), 10**400, "soon"])
    def test_a_pause_without_an_end_is_told_and_the_default_taken(
        self,
        registry: dict[str, Any],
        transactional_db: None,
        caplog: pytest.LogCaptureFixture,
        pause: Any,
    ) -> None:
        patient = job(max_attempts=9, backoff=lambda error, result: pause)(plain)
        taken = pause_before_retry(patient, self.assigned(), OSError())
        assert taken is not None
        assert 1.5 <= taken <= 2.5
        assert "The backoff of tests.test_jobs.plain failed" in caplog.text
        with pytest.raises(
            ValueError, match="after of Retry must be a number of seconds or a timedelta, not"
        ):
            Retry(after=pause)

    @pytest.mark.parametrize("pause", [datetime.timedelta.max, 1e306])
    def test_the_longest_pause(
        self, registry: dict[str, Any], transactional_db: None, pause: float | datetime.timedelta
    ) -> None:
        patient = job(max_attempts=9, backoff=lambda error, result: pause)(plain)
        assert pause_before_retry(patient, self.assigned(), OSError()) == LONGEST_RETRY
        assert pause_before_retry(patient, self.assigned(), Retry(after=pause)) == LONGEST_RETRY

    def test_retry_without_a_number_has_those_of_the_setting(self, settings: Any) -> None:
        again = Retry(after=datetime.timedelta(minutes=1))
        assert pause_before_retry(jobs.add, self.assigned(2), again) == 60.0
        assert pause_before_retry(jobs.add, self.assigned(3), again) is None
        settings.GEARMAN = {"default": {"JOB_RETRIES": 0}}
        assert pause_before_retry(jobs.add, self.assigned(1000), again) == 60.0

    def test_retry_without_a_time_takes_the_backoff(self, registry: dict[str, Any]) -> None:
        pause = pause_before_retry(job(plain), self.assigned(1), Retry("later"))
        assert pause is not None
        assert 1.5 <= pause <= 2.5

    def test_discard_is_the_end(self, registry: dict[str, Any]) -> None:
        patient = job(max_attempts=5)(plain)
        assert pause_before_retry(patient, self.assigned(), Discard("no")) is None

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_attempts": 0}, "max_attempts of .*plain must be a whole number from 1 to 32767, not 0"),
            ({"max_attempts": True}, "not True"),
            ({"max_attempts": "3"}, "not '3'"),
            (
                {"timeout": 0.5},
                "timeout of .*plain must be a whole number of seconds from 1 to .*, not 0.5",
            ),
            ({"backoff": 3}, "backoff of .*plain must be a function of the exception and the JobResult"),
        ],
    )
    def test_bad_options(self, registry: dict[str, Any], options: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidJob, match=message):
            job(**options)(plain)

    def test_row_has_them(self, registry: dict[str, Any], transactional_db: None) -> None:
        job(max_attempts=7, timeout=30)(plain).enqueue(1)
        record = JobRecord.objects.get()
        assert (record.max_attempts, record.timeout) == (7, 30)


class TestUnique:
    """While a job of a unique is to do, ``enqueue`` gives that one."""

    @pytest.fixture(autouse=True)
    def _database(self, transactional_db: None) -> None:
        pass

    def test_by_an_argument(self, registry: dict[str, Any]) -> None:
        once = job(unique="left")(plain)
        first = once.enqueue(1, right=2)
        assert once.enqueue(1, right=3).id == first.id
        assert once.enqueue(left=1).id == first.id
        assert once.enqueue(2).id != first.id
        record = JobRecord.objects.get(pk=first.id)
        assert record.unique == "[1]"
        assert record.workload == b'{"args":[1],"kwargs":{"right":2}}'

    def test_by_several_with_their_defaults(self, registry: dict[str, Any]) -> None:
        once = job(unique=["right", "left"])(plain)
        first = once.enqueue(1)
        assert once.enqueue(1, 1).id == first.id
        assert once.enqueue(1, 2).id != first.id

    def test_by_a_function(self, registry: dict[str, Any]) -> None:
        once = job(unique=lambda left, right=1: f"sum {left + right}")(plain)
        first = once.enqueue(1, 3)
        assert once.enqueue(2, 2).id == first.id
        assert JobRecord.objects.get(pk=first.id).unique == "sum 4"

    def test_for_one_submission(self) -> None:
        first = jobs.add.using(unique="mine").enqueue(1)
        assert jobs.add.using(unique="mine").enqueue(2).id == first.id
        assert jobs.add.using(unique="").enqueue(1).id != first.id
        assert jobs.add.enqueue(1).id != first.id

    def test_of_another_function_is_another(self, registry: dict[str, Any]) -> None:
        first = job(unique="left")(plain).enqueue(1)
        assert job(unique="left", name="other")(plain).enqueue(1).id != first.id

    @pytest.mark.parametrize("status", [Status.SCHEDULED, Status.RUNNING, Status.RETRYING])
    def test_running_job_is_joined_too(self, status: str) -> None:
        once = jobs.add.using(unique="u")
        first = once.enqueue(1)
        JobRecord.objects.filter(pk=first.id).update(status=status)
        assert once.enqueue(1).id == first.id
        assert once.enqueue(1).status == status

    def test_ended_job_is_not(self) -> None:
        once = jobs.add.using(unique="u")
        first = once.enqueue(1)
        JobRecord.objects.filter(pk=first.id).update(status=Status.SUCCESSFUL, unique_key=None)
        assert once.enqueue(1).id != first.id

    def test_long_ones_are_hashed(self) -> None:
        once = jobs.add.using(unique="ü" * 101)
        first = once.enqueue(1)
        unique = JobRecord.objects.get(pk=first.id).unique
        assert len(unique) == 64
        assert once.enqueue(1).id == first.id
        assert jobs.add.using(unique="ü" * 102).enqueue(1).id != first.id

    def test_rollback_leaves_room(self) -> None:
        once = jobs.add.using(unique="u")
        with transaction.atomic():
            first = once.enqueue(1)
            assert once.enqueue(1).id == first.id
            transaction.set_rollback(True)
        assert not JobRecord.objects.exists()
        once.enqueue(1)
        assert JobRecord.objects.count() == 1

    def test_many_at_once(self) -> None:
        once = jobs.add.using(unique="u")
        together = threading.Barrier(8)

        def enqueue(number: int) -> str:
            try:
                together.wait(20)
                return once.enqueue(number).id
            finally:
                connection.close()

        with ThreadPoolExecutor(8) as pool:
            ids = set(pool.map(enqueue, range(8)))
        assert len(ids) == JobRecord.objects.count() == 1

    def test_many_wait_in_transactions_for_the_one_that_was_first(self) -> None:
        once = jobs.add.using(unique="u")

        def enqueue(number: int) -> str:
            try:
                with transaction.atomic():
                    return once.enqueue(number).id
            finally:
                connection.close()

        with ThreadPoolExecutor(8) as pool:
            with transaction.atomic():
                first = once.enqueue(0)
                others = [pool.submit(enqueue, number) for number in range(8)]
                assert not wait(others, 0.5).done, "they did not wait for the transaction"
            assert {other.result(60) for other in others} == {first.id}
        assert JobRecord.objects.count() == 1

    @pytest.mark.parametrize(
        ("unique", "message"),
        [
            ("middle", r"names 'middle', which is no argument .*it has left, right"),
            (["left", "middle"], "names 'middle'"),
            (3, "unique of .*plain must be a name of an argument, several, or a function, not 3"),
        ],
    )
    def test_bad_ones(self, registry: dict[str, Any], unique: Any, message: str) -> None:
        with pytest.raises(InvalidJob, match=message):
            job(unique=unique)(plain)

    def test_function_that_returns_no_text(self, registry: dict[str, Any]) -> None:
        once = job(unique=lambda left, right=1: left)(plain)
        with pytest.raises(TypeError, match=r"the unique of .*plain must be a str, not 1"):
            once.enqueue(1)


@pytest.mark.parametrize("of_role", [False, True])
@pytest.mark.parametrize("level", ["REPEATABLE_READ", "SERIALIZABLE"])
class TestUniqueInAnOlderTransaction:
    """Where a transaction sees what was when it began, a job joins none that has ended since."""

    once: ClassVar = jobs.add.using(unique="u")

    @pytest.fixture(autouse=True)
    def _isolation(
        self, transactional_db: None, level: str, of_role: bool, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[None]:
        if connection.vendor == "sqlite":
            pytest.skip("has no levels")
        name, option = "isolation_level", level.lower().replace("_", " ")
        if connection.vendor == "postgresql":
            levels = importlib.import_module("django.db.backends.postgresql.psycopg_any").IsolationLevel
            if of_role:
                # As ALTER ROLE ... SET does.
                name, option = "options", f"-c default_transaction_isolation={level.lower()}"
                option = option.replace("_read", r"\ read")
            else:
                option = levels[level]
        elif of_role:
            pytest.skip("Django tells MySQL which one it wants")
        connection.close()
        monkeypatch.setitem(connection.settings_dict["OPTIONS"], name, option)
        yield
        monkeypatch.undo()
        connection.close()

    def end(self, result: JobResult[Any]) -> None:
        """As a job server does it."""
        JobRecord.objects.filter(pk=result.id).update(status=Status.SUCCESSFUL, unique_key=None)

    def elsewhere(self, do: Callable[[], Any]) -> Any:
        """Do it in a transaction of another connection."""

        def and_close() -> Any:
            try:
                return do()
            finally:
                connection.close()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(and_close).result(30)

    def test_one_that_has_ended(self) -> None:
        first = self.once.enqueue(1)
        # PostgreSQL cannot; who begins again can.
        refused = pytest.raises(OperationalError, match="could not serialize access")
        with refused if connection.vendor == "postgresql" else nullcontext(), transaction.atomic():
            assert not User.objects.exists()
            self.elsewhere(lambda: self.end(first))
            assert self.once.enqueue(2).id != first.id
        assert self.once.enqueue(2).id != first.id
        assert JobRecord.objects.filter(status=Status.READY).count() == 1

    def test_one_that_came(self) -> None:
        with transaction.atomic():
            assert not User.objects.exists()
            first = self.elsewhere(lambda: self.once.enqueue(1))
            if connection.vendor == "mysql":
                assert self.once.enqueue(2).id == first.id
            else:
                with pytest.raises(IntegrityError) as refused:
                    self.once.enqueue(2)
                assert "begin that again" in refused.value.__notes__[0]
        assert self.once.enqueue(2).id == first.id

    def test_joined_one_may_end_meanwhile(self) -> None:
        if connection.vendor != "postgresql":
            pytest.skip("MySQL's locks stay")
        first = self.once.enqueue(1)
        with transaction.atomic():
            assert self.once.enqueue(2).id == first.id
            self.elsewhere(lambda: self.end(first))


@pytest.mark.django_db
class TestLimits:
    def test_key_stands_in_the_row_and_in_the_workload(self, registry: dict[str, Any]) -> None:
        limited = job(concurrency=1, limit_key="left")(plain)
        first = JobRecord.objects.get(pk=limited.enqueue(7).id)
        assert first.limit_key == "[7]"
        assert json.loads(first.workload)["limit"] == "[7]"
        second, third = limited.enqueue_many([((8,), {}), ((), {"left": 9})])
        keys = JobRecord.objects.filter(pk__in=[second.id, third.id]).order_by("pk")
        assert list(keys.values_list("limit_key", flat=True)) == ["[8]", "[9]"]

    def test_several_names_or_a_function(self, registry: dict[str, Any]) -> None:
        both = job(rate_limit="5/s", limit_key=("left", "right"))(plain)
        assert JobRecord.objects.get(pk=both.enqueue(7).id).limit_key == "[7,1]"
        made = job(rate_limit="5/s", name="other", limit_key=lambda left, right=1: f"half {left // 2}")(plain)
        assert JobRecord.objects.get(pk=made.enqueue(7).id).limit_key == "half 3"

    def test_long_keys_are_hashed(self, registry: dict[str, Any]) -> None:
        limited = job(concurrency=1, limit_key=lambda left, right=1: "x" * 65)(plain)
        assert len(JobRecord.objects.get(pk=limited.enqueue(7).id).limit_key or "") == 64

    def test_without_a_key_there_is_none(self, registry: dict[str, Any]) -> None:
        record = JobRecord.objects.get(pk=job(concurrency=1)(plain).enqueue(7).id)
        assert record.limit_key is None
        assert "limit" not in json.loads(record.workload)

    def test_a_retry_by_hand_keeps_it(self, registry: dict[str, Any]) -> None:
        result = job(concurrency=1, limit_key="left")(plain).enqueue(7)
        JobRecord.objects.update(status=Status.FAILED)
        assert JobRecord.objects.get(pk=result.retry().id).limit_key == "[7]"

    def test_the_key_is_no_argument(self, registry: dict[str, Any]) -> None:
        limited = job(concurrency=1, limit_key="left")(plain)
        record = JobRecord.objects.get(pk=limited.enqueue(7).id)
        assert json.loads(limited.perform(bytes(record.workload), JobContext())) == plain(7)

    def test_what_the_code_declares(self, registry: dict[str, Any]) -> None:
        job(rate_limit=" 10/m ", concurrency=2, limit_key="left")(plain)
        declared = declared_limits()[f"{plain.__module__}.{plain.__qualname__}"]
        assert declared == {"rate": "10/m", "concurrency": 2, "by_key": True}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rate_limit": "10"}, "'10' is no rate: .*such as"),
            ({"rate_limit": "0/m"}, "is no rate"),
            ({"rate_limit": "10/fortnight"}, "is no rate"),
            ({"rate_limit": 10}, "rate_limit of .* must be a text"),
            ({"concurrency": 0}, "concurrency of .* must be a whole number from 1 to 1000000, not 0"),
            ({"concurrency": "2"}, "not '2'"),
            ({"concurrency": True}, "not True"),
            (
                {"concurrency": 1, "limit_key": "middle"},
                r"limit_key of .* names 'middle', .*it has left, right",
            ),
            ({"limit_key": "left"}, "limit_key of .* needs a rate_limit or a concurrency"),
        ],
    )
    def test_bad_ones(self, registry: dict[str, Any], options: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidJob, match=message):
            job(**options)(plain)

    def test_the_page_s_code_works(self, registry: dict[str, Any]) -> None:
        exec(block_of("limits.md", "limits"), {"__name__": "shop"})
        declared = declared_limits()
        assert declared["shop.ask_registry"]["rate"] == "10/m"
        assert declared["shop.transcode"]["concurrency"] == 2
        assert declared["shop.synchronise"] == {"rate": "100/h", "concurrency": 1, "by_key": True}
        record = JobRecord.objects.get(pk=registry["shop.synchronise"].enqueue(7, full=True).id)
        # As the page says it for other languages.
        assert record.workload.decode() in (ROOT / "docs" / "limits.md").read_text()
