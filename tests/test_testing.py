"""What projects test with: recorded jobs, settings for a test, a cluster of real processes."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from asgiref.sync import async_to_sync
from django.conf import settings as django_settings
from django.contrib.auth.models import User
from django.core.exceptions import ImproperlyConfigured
from django.db import IntegrityError, connection, transaction
from django.db.migrations.recorder import MigrationRecorder
from django.test import SimpleTestCase, TestCase
from django.utils import timezone

from django_gearman import GroupResult, JobContext, JobResult, Retry, chain, conf, group, job, testing
from django_gearman.exceptions import ConnectionFailed, JobFailed, ResponseTimeout
from django_gearman.models import FunctionLimit, JobRecord, ServerLease
from django_gearman.registry import registry
from django_gearman.testing import (
    GearmanCluster,
    GearmanClusterMixin,
    GearmanJobs,
    GearmanJobsMixin,
    override_gearman,
)
from django_gearman.testing_process import VARIABLE

from .app import jobs
from .harness import environment, free_port, is_running, wait_until

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    before = dict(registry)
    yield
    registry.clear()
    registry.update(before)


def make_user(name: str) -> int:
    return User.objects.create(username=name).pk


def anything(value: Any, at: Any = None) -> Any:
    return value


def enqueue_for_tomorrow(times: int) -> None:
    if times:
        job(enqueue_for_tomorrow).using(run_after=timedelta(days=1)).enqueue(times - 1)


async def amake_user(name: str) -> list[str]:
    await User.objects.acreate(username=name)
    return [user.username async for user in User.objects.order_by("username")]


async def fail_on_the_loop() -> None:
    raise ValueError("from there")


def make_user_twice(name: str) -> None:
    make_user(name)
    make_user(name)


def make_user_and_catch(name: str) -> str:
    make_user(name)
    try:
        with transaction.atomic():
            make_user(name)
    except IntegrityError:
        return "caught"
    return "not caught"


def make_user_and_fail(name: str) -> None:
    make_user(name)
    raise ValueError(name)


def spoil_transaction(name: str) -> None:
    with transaction.atomic():
        make_user(name)
        try:
            make_user(name)
        except IntegrityError:
            pass
    raise AssertionError("the block raises")


def enqueue_another(times: int) -> None:
    if times:
        job(enqueue_another).enqueue(times - 1)


def talk(context: JobContext) -> None:
    context.set_progress(1, 4)
    context.send_data("some")
    context.warn("careful")


@pytest.mark.django_db
class TestRecorded:
    def test_what_was_enqueued(self, gearman_jobs: GearmanJobs) -> None:
        when = timezone.now() + timedelta(hours=1)
        jobs.add.enqueue(1, right=2)
        jobs.add_later.using(run_after=when, priority=5, unique="one").enqueue(3, 4)
        jobs.shout.enqueue(b"hey")
        first, second, third = gearman_jobs.enqueued()
        assert (first.function, first.args, first.kwargs) == ("tests.app.jobs.add", [1], {"right": 2})
        assert (first.status, first.queue_name, first.run_after) == ("READY", "default", None)
        assert (second.priority, second.run_after, second.unique) == (5, when, "one")
        assert (third.args, third.kwargs) == ([b"hey"], {})
        assert [each.id for each in gearman_jobs.enqueued(jobs.shout)] == [third.id]
        assert [each.id for each in gearman_jobs.enqueued("tests.app.jobs.add")] == [first.id]
        assert str(first) == f"tests.app.jobs.add(1, right=2) [{first.id}, READY]"

    def test_limits_hold_nothing_up(self, gearman_jobs: GearmanJobs) -> None:
        limited = job(rate_limit="1/d", concurrency=1, limit_key="name")(make_user)
        FunctionLimit.objects.create(function=limited.name, rate="1/d", concurrency=1, by_key=True)
        for name in ("ann", "bob", "bob"):
            limited.enqueue(name)
        assert [each.args for each in gearman_jobs.enqueued(limited)] == [["ann"], ["bob"], ["bob"]]
        assert gearman_jobs.assert_enqueued(limited, "bob")._record.limit_key == '["bob"]'
        # The second bob is there already.
        assert [each.status for each in gearman_jobs.run_all()] == ["SUCCESSFUL", "SUCCESSFUL", "FAILED"]

    def test_what_is_no_function(self, gearman_jobs: GearmanJobs) -> None:
        for thing in (5, len, jobs.add.function):
            with pytest.raises(TypeError, match="a function is a @job, a @task or a name on the wire, not "):
                gearman_jobs.enqueued(thing)  # type: ignore[arg-type]
        for error in ("boom", ValueError):
            with pytest.raises(TypeError, match="what the function is to raise is an exception"):
                gearman_jobs.fail_with(jobs.add, error)  # type: ignore[arg-type]

    def test_only_since_it_was_made(self, transactional_db: None) -> None:
        jobs.add.enqueue(1)
        with GearmanJobs() as recorded:
            recorded.assert_not_enqueued()
            jobs.add.enqueue(2)
            assert [each.args for each in recorded.enqueued()] == [[2]]
            recorded.clear()
            assert recorded.enqueued() == []

    @pytest.mark.parametrize(
        ("args", "kwargs"), [((7,), {}), ((7, 1), {}), ((), {"left": 7}), ((mock.ANY,), {}), ((), {})]
    )
    def test_assert_enqueued(
        self, gearman_jobs: GearmanJobs, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        jobs.add.enqueue(8, 8)
        wanted = jobs.add.enqueue(left=7)
        assert gearman_jobs.assert_enqueued(jobs.add, *args, **kwargs).id == wanted.id

    def test_assert_enqueued_with_tuples_in_lists(self, gearman_jobs: GearmanJobs) -> None:
        made = job(name="anything")(anything)
        made.enqueue([(1, 2)], at={"place": (3, (4,))})
        gearman_jobs.assert_enqueued(made, [(1, 2)], at={"place": (3, (4,))})
        gearman_jobs.assert_enqueued(made, [[1, mock.ANY]], at={"place": mock.ANY})
        with pytest.raises(AssertionError, match="was not enqueued"):
            gearman_jobs.assert_enqueued(made, [(1, 3)], at={"place": (3, (4,))})

    def test_assert_enqueued_fails_with_what_there_is(self, gearman_jobs: GearmanJobs) -> None:
        with pytest.raises(
            AssertionError, match=r"^tests\.app\.jobs\.add\(7\) was not enqueued\.\nNothing was\.$"
        ):
            gearman_jobs.assert_enqueued(jobs.add, 7)
        jobs.fail.enqueue("x")
        result = jobs.add.enqueue(7, right=8)
        for args in ((8,), (7,), (7, 8, 9)):
            with pytest.raises(AssertionError) as raised:
                gearman_jobs.assert_enqueued(jobs.add, *args)
            assert "tests.app.jobs.add(7" in str(raised.value)
            assert "These were:\n  tests.app.jobs.fail('x') [" in str(raised.value)
            assert f"  tests.app.jobs.add(7, right=8) [{result.id}, READY]" in str(raised.value)
        with pytest.raises(AssertionError, match=r"^shout was not enqueued"):
            gearman_jobs.assert_enqueued(jobs.shout)

    def test_assert_not_enqueued(self, gearman_jobs: GearmanJobs) -> None:
        gearman_jobs.assert_not_enqueued()
        jobs.fail.enqueue("x")
        gearman_jobs.assert_not_enqueued(jobs.add)
        with pytest.raises(AssertionError, match=r"^tests\.app\.jobs\.fail was enqueued.\nThese were:\n"):
            gearman_jobs.assert_not_enqueued(jobs.fail)
        with pytest.raises(AssertionError, match=r"^A job was enqueued"):
            gearman_jobs.assert_not_enqueued()

    def test_strict_json(self, gearman_jobs: GearmanJobs) -> None:
        with pytest.raises(TypeError, match=r"argument 'message' of .*fail is a PosixPath"):
            jobs.fail.enqueue(Path("x"))
        result = jobs.return_a_set.enqueue()
        gearman_jobs.run_all()
        result.refresh()
        assert result.errors[0].exception_class_path == "django_gearman.exceptions.NotJSON"

    def test_rolled_back_with_the_view(self, gearman_jobs: GearmanJobs) -> None:
        with transaction.atomic():
            jobs.add.enqueue(1)
            transaction.set_rollback(True)
        gearman_jobs.assert_not_enqueued()

    def test_no_server_is_reached(self, gearman_jobs: GearmanJobs) -> None:
        with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:9 .* or ask for gearman_cluster$"):
            jobs.add.run(1)
        with pytest.raises(ConnectionFailed, match=r"ask for gearman_cluster$"):
            group(jobs.add.s(1)).run()

    @pytest.mark.django_db(transaction=True)
    def test_no_end_is_waited_for(self, gearman_jobs: GearmanJobs) -> None:
        results: list[JobResult[Any] | GroupResult[Any]] = [
            jobs.add.enqueue(1),
            group(jobs.add.s(1)).enqueue(),
        ]
        for result in results:
            with pytest.raises(ConnectionFailed, match=r"by its run_all\(\)"):
                result.get()
            with pytest.raises(ConnectionFailed, match=r"by its run_all\(\)"):
                async_to_sync(result.aget)()
            with pytest.raises(ResponseTimeout, match=r"by its run_all\(\)"):
                result.get(timeout=0.01)
        gearman_jobs.run_all()
        assert [result.get() for result in results] == [2, [2]]

    def test_in_another_thread(self, gearman_jobs: GearmanJobs) -> None:
        """As of pytest-asyncio's and anyio's tests: what they enqueued was not of the test's transaction."""
        with ThreadPoolExecutor() as pool:
            for call in gearman_jobs.enqueued, gearman_jobs.run_all, gearman_jobs.run_one, gearman_jobs.clear:
                with pytest.raises(
                    ImproperlyConfigured, match=r"another thread .* django_db\(transaction=True\)"
                ):
                    pool.submit(call).result()


@pytest.mark.django_db
class TestRun:
    def test_run_all(self, gearman_jobs: GearmanJobs) -> None:
        results = [jobs.add.enqueue(1), jobs.add_later.enqueue(2, 3), jobs.shout.enqueue(b"hey")]
        ended = gearman_jobs.run_all()
        # By priority.
        assert [each.id for each in ended] == [results[1].id, results[0].id, results[2].id]
        for result in results:
            result.refresh()
        assert [result.return_value for result in results] == [2, 5, b"HEY"]
        record = JobRecord.objects.get(pk=results[0].id)
        assert record.attempts == 1
        assert record.worker
        assert record.handle == f"H:tests:r{record.pk}"
        assert record.enqueued_at <= record.started_at <= record.finished_at
        assert gearman_jobs.pending == []
        assert gearman_jobs.run_all() == []

    def test_what_jobs_enqueue_runs_too(self, gearman_jobs: GearmanJobs) -> None:
        job(enqueue_another).enqueue(3)
        assert [each.args for each in gearman_jobs.run_all()] == [[3], [2], [1], [0]]

    def test_run_one(self, gearman_jobs: GearmanJobs) -> None:
        jobs.fail_first.enqueue(1)
        one = gearman_jobs.run_one()
        assert one is not None
        # On a busy machine its pause of 50 ms may be over by now.
        assert one.status in ("RETRYING", "READY")
        assert one.attempts == 1
        (pending,) = gearman_jobs.pending
        assert pending.id == one.id
        one = gearman_jobs.run_one()
        assert one is not None
        assert (one.status, one.return_value) == ("SUCCESSFUL", [2, 3])
        assert gearman_jobs.run_one() is None

    def test_pauses_before_attempts_are_passed_over(self, gearman_jobs: GearmanJobs) -> None:
        result = jobs.fail_for_an_hour.enqueue()
        (ended,) = gearman_jobs.run_all()
        assert (ended.id, ended.status, ended.attempts) == (result.id, "FAILED", 2)
        assert [error.message for error in ended.errors] == ["not now", "not now"]

    def test_a_pause_without_an_end(self, gearman_jobs: GearmanJobs) -> None:
        job(max_attempts=2, backoff=lambda error, result: math.inf)(fail_on_the_loop).enqueue()
        (ended,) = gearman_jobs.run_all()
        assert (ended.attempts, ended.errors[-1].message) == (2, "from there")

    def test_for_later(self, gearman_jobs: GearmanJobs) -> None:
        when = timezone.now() + timedelta(days=1)
        result = jobs.add.using(run_after=when).enqueue(1)
        assert gearman_jobs.run_all() == []
        (ended,) = gearman_jobs.run_all(scheduled=True)
        assert (ended.id, ended.status) == (result.id, "SUCCESSFUL")

    def test_for_later_when_the_clock_leaps(
        self, gearman_jobs: GearmanJobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        leap = timedelta(0)
        # As time-machine does, which leaves the monotonic clock alone.
        now, seconds = timezone.now, time.time
        monkeypatch.setattr(timezone, "now", lambda: now() + leap)
        monkeypatch.setattr(time, "time", lambda: seconds() + leap.total_seconds())
        result = jobs.add.using(run_after=timedelta(hours=1)).enqueue(1)
        assert gearman_jobs.run_all() == []
        leap = timedelta(hours=2)
        assert gearman_jobs.run_all() == [result]

        leap = timedelta(0)  # and back
        jobs.add.enqueue(2)
        (ended,) = gearman_jobs.run_all()
        assert ended.finished_at is not None
        assert ended.finished_at <= timezone.now()
        jobs.add.using(run_after=timedelta(hours=1)).enqueue(3)
        assert gearman_jobs.run_all() == []

    def test_steps_of_a_chain_for_later(self, gearman_jobs: GearmanJobs) -> None:
        tomorrow = jobs.add.using(run_after=timedelta(days=1))
        steps = chain(jobs.add.s(1), tomorrow.s(), jobs.add.s(), tomorrow.s(10)).enqueue()
        assert [each.args for each in gearman_jobs.run_all()] == [[1]]
        assert [each.return_value for each in gearman_jobs.run_all(scheduled=True)] == [3, 4, 14]
        steps.refresh()
        assert steps.is_finished

    def test_what_is_enqueued_for_later_meanwhile_stays(self, gearman_jobs: GearmanJobs) -> None:
        """A job that enqueues itself for another day would never end."""
        job(enqueue_for_tomorrow).enqueue(2)
        assert [each.args for each in gearman_jobs.run_all(scheduled=True)] == [[2]]
        assert [each.args for each in gearman_jobs.run_all(scheduled=True)] == [[1]]
        assert [each.status for each in gearman_jobs.pending] == ["SCHEDULED"]

    def test_check_raises_what_failed(self, gearman_jobs: GearmanJobs) -> None:
        jobs.fail.enqueue("the reason")
        with pytest.raises(JobFailed, match="ValueError: the reason"):
            gearman_jobs.run_all(check=True)

    def test_fail_with(self, gearman_jobs: GearmanJobs) -> None:
        gearman_jobs.fail_with(jobs.add, ConnectionError("the printer is off"))
        result = jobs.add.enqueue(1)
        gearman_jobs.run_all()
        result.refresh()
        assert result.status == "FAILED"
        assert result.errors[0].exception_class_path == "builtins.ConnectionError"
        gearman_jobs.fail_with(jobs.add, Retry("not yet"))
        again = jobs.add.enqueue(1)
        gearman_jobs.run_all()
        again.refresh()
        assert again.attempts == conf.settings_for().job_retries

    def test_unique(self, gearman_jobs: GearmanJobs) -> None:
        first = jobs.add.using(unique="one").enqueue(1)
        assert jobs.add.using(unique="one").enqueue(1).id == first.id
        assert len(gearman_jobs.run_all()) == 1
        assert jobs.add.using(unique="one").enqueue(1).id != first.id

    def test_context(self, gearman_jobs: GearmanJobs) -> None:
        result = job(takes_context=True)(talk).enqueue()
        gearman_jobs.run_all(check=True)
        result.refresh()
        assert result.progress == (1, 4)

    def test_what_was_forgotten_is_not_run(self, gearman_jobs: GearmanJobs) -> None:
        forgotten = [jobs.add.enqueue(number) for number in range(5)]
        forgotten.append(jobs.add.using(priority=50).enqueue(5))
        forgotten.append(jobs.add.using(run_after=timezone.now() + timedelta(days=1)).enqueue(6))
        forgotten.append(jobs.fail_for_an_hour.enqueue())
        gearman_jobs.run_one()
        gearman_jobs.clear()
        assert gearman_jobs.run_all(scheduled=True) == []
        result = jobs.add.enqueue(7)
        assert [each.id for each in gearman_jobs.run_all(scheduled=True)] == [result.id]
        assert JobRecord.objects.filter(status="SUCCESSFUL").count() == 2

    def test_what_was_forgotten_is_not_waited_for(self, gearman_jobs: GearmanJobs) -> None:
        """It is more urgent than the rest, of which there is more than a claim takes."""
        jobs.shout.using(priority=5).enqueue(b"forgotten")
        jobs.shout.using(priority=5, run_after=timezone.now() + timedelta(days=1)).enqueue(b"forgotten")
        gearman_jobs.clear()
        results = [jobs.shout.enqueue(b"x" * 2**20) for _ in range(20)]
        urgent = jobs.shout.using(priority=3).enqueue(b"x")
        ids = [each.id for each in gearman_jobs.run_all(check=True)]
        assert ids == [urgent.id, *(result.id for result in results)]
        assert gearman_jobs.pending == []

    def test_functions_that_nobody_here_has(self, gearman_jobs: GearmanJobs) -> None:
        JobRecord.objects.create(function="of.php")
        assert gearman_jobs.run_all() == []
        assert [each.function for each in gearman_jobs.pending] == ["of.php"]

    async def of_async_tests(self, gearman_jobs: GearmanJobs) -> list[Any]:
        await jobs.add_later.aenqueue(1, 2)
        return [each.return_value for each in await gearman_jobs.arun_all()]

    def test_in_async_tests(self, gearman_jobs: GearmanJobs) -> None:
        assert async_to_sync(self.of_async_tests)(gearman_jobs) == [3]

    def test_queries_of_an_async_job_are_of_the_transaction(self, gearman_jobs: GearmanJobs) -> None:
        made = job(amake_user)
        make_user("ann")
        made.enqueue("bob")
        (ended,) = gearman_jobs.run_all(check=True)
        assert ended.return_value == ["ann", "bob"]
        assert User.objects.count() == 2
        made.enqueue("bob")
        (ended,) = gearman_jobs.run_all()
        assert ended.errors[0].exception_class_path == "django.db.utils.IntegrityError"
        assert User.objects.count() == 2

    def test_an_async_job_s_traceback_begins_with_it(self, gearman_jobs: GearmanJobs) -> None:
        job(fail_on_the_loop).enqueue()
        (ended,) = gearman_jobs.run_all()
        assert ended.errors[0].traceback.splitlines()[1].endswith("in fail_on_the_loop")

    async def of_async_tests_with_queries(self, gearman_jobs: GearmanJobs) -> list[str]:
        await job(amake_user).aenqueue("bob")
        (ended,) = await gearman_jobs.arun_all(check=True)
        assert await User.objects.acount() == 1
        return list(ended.return_value)

    def test_queries_in_async_tests(self, gearman_jobs: GearmanJobs) -> None:
        assert async_to_sync(self.of_async_tests_with_queries)(gearman_jobs) == ["bob"]
        assert User.objects.count() == 1

    def test_queries_are_counted_still(
        self, gearman_jobs: GearmanJobs, django_assert_max_num_queries: Any
    ) -> None:
        jobs.add.enqueue(1)
        with django_assert_max_num_queries(100) as captured:
            gearman_jobs.run_all()
        assert len(captured) > 3


class TestTransactions:
    """A job of a test does to the database what a worker's would, and nothing to the test's transaction."""

    @pytest.fixture(params=["db", "transactional_db"])
    def recorded(self, request: pytest.FixtureRequest) -> Iterator[GearmanJobs]:
        request.getfixturevalue(request.param)
        with GearmanJobs() as recorded:
            yield recorded

    @pytest.mark.parametrize(
        ("function", "status", "users"),
        [
            (make_user, "SUCCESSFUL", 1),
            (make_user_and_catch, "SUCCESSFUL", 1),
            (make_user_and_fail, "FAILED", 1),
            (spoil_transaction, "FAILED", 0),
        ],
    )
    def test_what_stays(self, recorded: GearmanJobs, function: Any, status: str, users: int) -> None:
        made = job(function)
        result = made.enqueue("kim")
        recorded.run_all()
        result.refresh()
        assert result.status == status
        assert User.objects.count() == users
        assert not connection.needs_rollback

    @pytest.mark.django_db
    def test_an_error_of_the_database(self, gearman_jobs: GearmanJobs) -> None:
        """In a test's transaction it undoes what the job wrote: the transaction would be lost otherwise."""
        result = job(make_user_twice).enqueue("kim")
        gearman_jobs.run_all()
        result.refresh()
        assert result.status == "FAILED"
        assert result.errors[0].exception_class_path == "django.db.utils.IntegrityError"
        assert not User.objects.exists()


class TestSettings:
    def test_a_context(self) -> None:
        before = conf.settings_for()
        with override_gearman(RUN_TIMEOUT=1, SERVERS=["a:1"]):
            assert conf.settings_for().run_timeout == 1
            with override_gearman(RUN_TIMEOUT=2):
                assert conf.settings_for().run_timeout == 2
                assert conf.settings_for().servers == ("a:1",)
            assert conf.settings_for().run_timeout == 1
        assert conf.settings_for() == before

    @override_gearman(RUN_TIMEOUT=3)
    def test_a_function(self) -> None:
        assert conf.settings_for().run_timeout == 3
        assert conf.settings_for().servers == ("127.0.0.1:9",)

    def test_a_misspelt_setting(self) -> None:
        before = conf.settings_for()
        with pytest.raises(ImproperlyConfigured, match="RUN_TIMEOUT"):
            override_gearman(RUN_TIMOUT=1).enable()
        with pytest.raises(ImproperlyConfigured, match="a number above 0"):
            override_gearman(RUN_TIMEOUT=-1)(type("Tests", (SimpleTestCase,), {}))
        assert conf.settings_for() == before

    def test_other_aliases_stay(self, settings: Any) -> None:
        settings.GEARMAN = {"default": {}, "other": {"TIMEOUT": 5}}
        with override_gearman(TIMEOUT=6):
            assert (conf.settings_for("other").timeout, conf.settings_for().timeout) == (5, 6)


@override_gearman(RUN_TIMEOUT=4)
class OverriddenClassTests(SimpleTestCase):
    def test_of_a_class(self) -> None:
        self.assertEqual(conf.settings_for().run_timeout, 4)


@override_gearman(CONNECT_TIMEOUT=2)
class OverriddenSubclassTests(OverriddenClassTests):
    def test_of_both_classes(self) -> None:
        self.assertEqual(conf.settings_for().run_timeout, 4)
        self.assertEqual(conf.settings_for().connect_timeout, 2)


@pytest.mark.parametrize("mixin", [GearmanJobsMixin, GearmanClusterMixin])
def test_a_mixin_after_the_test_case(mixin: type) -> None:
    """It would not be set up, and jobs of the test would go to a developer's server."""
    shared = type("Shared", (mixin,), {})
    said = r"Wrong must name Shared before TestCase, .*: class Wrong\(Shared, TestCase\)"
    with pytest.raises(TypeError, match=said):
        type("Wrong", (TestCase, shared), {})
    type("Right", (shared, TestCase), {})


class MixinTests(GearmanJobsMixin, TestCase):
    """The same for ``unittest``."""

    def test_assertions(self) -> None:
        jobs.add.enqueue(7)
        self.assertEqual(self.assertJobEnqueued(jobs.add, 7).args, [7])
        self.assertJobNotEnqueued(jobs.fail)
        with self.assertRaises(AssertionError):
            self.assertJobEnqueued(jobs.add, 8)
        with self.assertRaises(AssertionError):
            self.assertJobNotEnqueued()
        (ended,) = self.gearman_jobs.run_all()
        self.assertEqual(ended.return_value, 8)

    def test_each_begins_with_none(self) -> None:
        self.assertJobNotEnqueued()
        self.assertFalse(ServerLease.objects.exists())


class TestCluster:
    @pytest.fixture(autouse=True)
    def scratch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The settings of the suite would make a folder for each process.
        monkeypatch.setenv("GEARMAN_TEST_SCRATCH", str(django_settings.SCRATCH))

    @pytest.mark.django_db(transaction=True)
    def test_real_processes(self) -> None:
        """docs/testing.md has the fixture and the mixin."""
        failure = AssertionError("of the test")
        try:
            with GearmanCluster(processes=1) as cluster:
                assert conf.settings_for().servers == (cluster.address,)
                assert jobs.add.enqueue(1, 2).get(timeout=20) == 3
                assert jobs.shout.run(b"hey") == b"HEY"
                with pytest.raises(JobFailed, match="the reason"):
                    jobs.fail.enqueue("the reason").get(timeout=20)
                assert ServerLease.objects.get().renewed_at is not None
                pids = [process._process.pid for process in cluster._running]
                assert all(is_running(pid) for pid in pids)
                raise failure
        except AssertionError as error:
            if error is not failure:
                raise
        # What they said is told with a failure.
        (told,) = failure.__notes__
        assert "$ manage.py gearman_server" in told
        assert "the reason" in told
        assert not any(is_running(pid) for pid in pids)

    @pytest.mark.django_db(transaction=True)
    def test_a_process_that_cannot_start(self) -> None:
        with (
            pytest.raises(AssertionError, match=r"(?s)ended at once.*No function is in the queues 'nowhere'"),
            GearmanCluster(options=["--queues", "nowhere"]),
        ):
            pass
        assert conf.settings_for().servers == ("127.0.0.1:9",)

    @pytest.mark.django_db(transaction=True)
    def test_tables_that_no_migration_made(self, settings: Any) -> None:
        applied = MigrationRecorder(connection).migration_qs.filter(app="django_gearman")
        rows = list(applied)
        # As pytest's --nomigrations says it.
        settings.MIGRATION_MODULES = {"django_gearman": None}
        applied.all().delete()
        try:
            with GearmanCluster(processes=1):
                assert jobs.add.enqueue(1, 2).get(timeout=20) == 3
        finally:
            applied.bulk_create(rows)

    def test_a_database_that_is_not_migrated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert testing._unmigrated() == []
        monkeypatch.setitem(connection.settings_dict["TEST"], "MIGRATE", False)
        assert {"auth", "django_gearman"} <= set(testing._unmigrated())

    @pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own")
    def test_its_processes_end_with_a_test_that_is_killed(self) -> None:
        port = free_port()
        server = ["gearman_server", "--store", "memory", "--listen", "127.0.0.1", "--port", str(port)]
        code = f"""
            import json, os, signal, subprocess, sys
            told = dict(databases={{}}, gearman={{}}, unmigrated=[], path=[], parent=os.getpid())
            started = subprocess.Popen(
                [sys.executable, "-m", "django_gearman.testing_process", *{server!r}],
                env=os.environ | {{{VARIABLE!r}: json.dumps(told)}},
                stdout=subprocess.PIPE,
            )
            assert b"listens" in started.stdout.readline()
            print(started.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        """
        killed = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
        )
        assert killed.returncode == -signal.SIGKILL
        wait_until(lambda: not is_running(int(killed.stdout)), 60.0, "the end of the server")

    def test_a_database_in_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if connection.vendor != "sqlite":
            pytest.skip("SQLite's own")
        monkeypatch.setitem(
            connection.settings_dict, "NAME", "file:memorydb_default?mode=memory&cache=shared"
        )
        with pytest.raises(ImproperlyConfigured, match=r"'TEST': \{'NAME'"), GearmanCluster():
            pass


class TestPlugin:
    """Every run of pytest loads it where the package is installed."""

    def test_it_imports_nothing(self) -> None:
        code = (
            "import sys, pytest; before = set(sys.modules); import django_gearman.pytest_plugin; "
            "print(sorted(name.split('.')[0] + '/' + name for name in set(sys.modules) - before))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
        loaded = json.loads(done.stdout.replace("'", '"'))
        assert loaded == ["django_gearman/django_gearman", "django_gearman/django_gearman.pytest_plugin"]

    def test_entry_point(self) -> None:
        import tomllib

        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        # Equal to the module, so that -p and the entry point load one plug-in.
        assert project["entry-points"]["pytest11"] == {
            "django_gearman.pytest_plugin": "django_gearman.pytest_plugin"
        }
