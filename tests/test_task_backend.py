"""
``django.tasks`` on our backend.

What Django's own tests ask of a backend (``tests/tasks`` of its repository, as
far as it holds for any), run through a job server without sockets; and what is
ours: options, queues, retries, records.

Of Django's, these say nothing of ours: that its ImmediateBackend keeps no
results and refuses ``run_after``, that its DummyBackend has ``results`` and
``clear`` (both are Django's classes here too), that a backend without
``enqueue`` is abstract and that one may have ``OPTIONS`` (ours has none, by a
check), ``test_utils.py``, and what is not in a released Django yet: order and
hash of a ``TaskResult``, and metadata.
"""

# ruff: noqa: E402  (what is imported last may not be there)

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import pickle
import socket
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import django
import pytest
from asgiref.sync import async_to_sync
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, connection, transaction
from django.test import override_settings
from django.utils import timezone
from django.utils.module_loading import import_string

from tests import needs

needs.module("django.tasks" if django.VERSION >= (6, 0) else "django_tasks")

from django_gearman import JobContext, group, job
from django_gearman.attempts import aperform_assigned, perform_assigned
from django_gearman.backends import (
    DummyBackend,
    GearmanBackend,
    GearmanTask,
    ImmediateBackend,
    InvalidTask,
    InvalidTaskBackend,
    Task,
    TaskContext,
    TaskResultDoesNotExist,
    TaskResultStatus,
    performing,
    task_backends,
    task_enqueued,
    task_finished,
    task_started,
)
from django_gearman.exceptions import InvalidGroup, JobCancelled, JobFailed, JobTimedOut, TooLarge
from django_gearman.models import JobAttempt, JobRecord
from django_gearman.registry import registry
from django_gearman.testing import GearmanJobs

from .app import jobs as app_jobs
from .app import tasks

if django.VERSION >= (6, 0):
    from django.tasks import default_task_backend, task
    from django.tasks.exceptions import TaskResultMismatch

    LOGGER = "django.tasks"
else:
    from django_tasks import default_task_backend, task
    from django_tasks.exceptions import TaskResultMismatch

    LOGGER = "django_tasks"

READY, RUNNING = TaskResultStatus.READY, TaskResultStatus.RUNNING
SUCCESSFUL, FAILED = TaskResultStatus.SUCCESSFUL, TaskResultStatus.FAILED
GEARMAN = "django_gearman.backends.GearmanBackend"
NOTHING = "999999999"
"""An id that no record has."""

with_options = pytest.mark.skipif(
    django.VERSION[:2] == (6, 0), reason="the decorator of Django 6.0 takes no options of a backend"
)
is_6_1 = pytest.mark.skipif(django.VERSION < (6, 1), reason="from Django 6.1 on")

pytestmark = pytest.mark.django_db


def with_another(path: str) -> dict[str, Any]:
    """``TASKS`` with ours, and another backend beside it."""
    return {"default": {"BACKEND": GEARMAN}, "other": {"BACKEND": path}}


def finished(result: Any, jobs: GearmanJobs) -> Any:
    """The result after everything was run."""
    jobs.run_all()
    result.refresh()
    return result


HOLDS_ITSELF: list[Any] = []
HOLDS_ITSELF.append(HOLDS_ITSELF)


class TestTask:
    """``test_tasks.py``: what holds of a task on any backend."""

    def test_using_correct_backend(self) -> None:
        assert default_task_backend == task_backends["default"]
        assert isinstance(task_backends["default"], GearmanBackend)
        assert default_task_backend.alias == "default"
        assert default_task_backend.options == {}

    def test_the_four_flags(self) -> None:
        backend = task_backends["default"]
        assert backend.supports_defer is True
        assert backend.supports_async_task is True
        assert backend.supports_get_result is True
        assert backend.supports_priority is True

    def test_task_decorator(self) -> None:
        for each in (tasks.noop_task, tasks.noop_task_async, tasks.noop_task_from_bare_decorator):
            assert isinstance(each, Task)
            assert isinstance(each, GearmanTask)

    def test_using_leaves_the_task_as_it_is(self) -> None:
        now = timezone.now()
        plain = tasks.noop_task
        assert plain.using(priority=1).priority == 1
        assert plain.using(queue_name="slow").queue_name == "slow"
        assert plain.using(run_after=now).run_after == now
        assert (plain.priority, plain.queue_name, plain.run_after) == (0, "default", None)
        later = plain.using(run_after=now)
        assert (later.using(priority=10).priority, later.using(priority=10).run_after) == (10, now)
        assert later.priority == 0

    def test_using_creates_new_instance(self) -> None:
        assert tasks.noop_task.using() == tasks.noop_task
        assert tasks.noop_task.using() is not tasks.noop_task

    def test_using_unknown_backend(self) -> None:
        with pytest.raises(InvalidTaskBackend, match="The connection 'unknown' doesn't exist"):
            tasks.noop_task.using(backend="unknown")

    def test_using_missing_backend(self) -> None:
        with (
            override_settings(TASKS=with_another("does.not.exist")),
            pytest.raises(InvalidTaskBackend, match=r"Could not find backend 'does\.not\.exist'"),
        ):
            tasks.noop_task.using(backend="other")

    def test_naive_datetime(self) -> None:
        with pytest.raises(InvalidTask, match=r"run_after must be an aware datetime\."):
            tasks.noop_task.using(run_after=datetime.now())

    @pytest.mark.parametrize("priority", [-101, 101, 3.1])
    def test_invalid_priority(self, priority: float) -> None:
        with pytest.raises(InvalidTask, match="priority must be a whole number between -100 and 100"):
            tasks.noop_task.using(priority=priority)

    @pytest.mark.parametrize("priority", [100, -100, 0])
    def test_valid_priority(self, priority: int) -> None:
        assert tasks.noop_task.using(priority=priority).enqueue().task.priority == priority

    def test_unknown_queue_name(self) -> None:
        with pytest.raises(InvalidTask, match="Queue 'queue-2' is not valid for backend"):
            tasks.noop_task.using(queue_name="queue-2")
        with override_settings(TASKS={"default": {"BACKEND": GEARMAN, "QUEUES": []}}):
            assert tasks.noop_task.using(queue_name="queue-2").queue_name == "queue-2"

    def test_call_task(self) -> None:
        assert tasks.calculate_meaning_of_life.call() == 42
        assert asyncio.run(tasks.calculate_meaning_of_life.acall()) == 42
        assert asyncio.run(tasks.noop_task_async.acall()) is None
        assert tasks.noop_task_async.call() is None

    def test_invalid_function(self) -> None:
        for function in (any, self.test_invalid_function, lambda: None):
            with pytest.raises(InvalidTask, match=r"Task function must be defined at a module level\."):
                task()(function)

    def test_get_backend(self) -> None:
        assert tasks.noop_task.backend == "default"
        assert isinstance(tasks.noop_task.get_backend(), GearmanBackend)

    def test_name_and_module_path(self) -> None:
        assert tasks.noop_task.name == "noop_task"
        assert tasks.noop_task.module_path == "tests.app.tasks.noop_task"
        assert import_string(tasks.noop_task.module_path) is tasks.noop_task
        assert import_string(tasks.noop_task_async.module_path) is tasks.noop_task_async

    def test_for_another_backend(self) -> None:
        path = "django_gearman.backends.ImmediateBackend"
        with override_settings(TASKS=with_another(path)):
            other = tasks.noop_task.using(backend="other")
            assert other.backend == "other"
            assert isinstance(other.get_backend(), ImmediateBackend)
            assert other.enqueue().status == SUCCESSFUL
        assert not JobRecord.objects.exists()

    @is_6_1
    @pytest.mark.parametrize("path", ["does.not.exist.fake_task", "builtins.any"])
    def test_unpickle_what_is_no_task(self, path: str) -> None:
        with pytest.raises(ValueError, match=f"Expected '{path}' to point to a Task instance"):
            GearmanTask._reconstruct({"func": path})

    @is_6_1
    def test_pickle(self) -> None:
        assert pickle.loads(pickle.dumps(tasks.noop_task)) == tasks.noop_task
        result = tasks.noop_task.enqueue()
        assert pickle.loads(pickle.dumps(result)) == result

    def test_no_backends(self) -> None:
        with (
            override_settings(TASKS={"other": {"BACKEND": GEARMAN}}),
            pytest.raises(InvalidTaskBackend),
        ):
            tasks.noop_task.enqueue()

    def test_takes_context_without_taking_context(self) -> None:
        with pytest.raises(InvalidTask, match="Task takes context but does not have a first argument"):
            task(takes_context=True)(tasks.calculate_meaning_of_life.func)

    def test_run_after_in_decorator(self) -> None:
        with pytest.raises(TypeError, match="run_after"):
            task(run_after=timezone.now())(tasks.calculate_meaning_of_life.func)

    @with_options
    def test_unknown_option(self) -> None:
        with pytest.raises(TypeError, match="unknown_param"):
            task(unknown_param=123)(tasks.noop_task.func)

    @with_options
    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"rate_limit": "10/m"}, "has no option 'rate_limit'; limit it in the admin"),
            ({"concurrency": 2}, "has no option 'concurrency'; limit it in the admin"),
            ({"unique": "x"}, "has no option 'unique'; declare it with @job"),
            ({"colour": "red"}, "has no option 'colour'; it has backend, backoff, max_attempts, "),
            ({"priority": "high"}, "priority of .* must be a whole number, not 'high'"),
        ],
    )
    def test_options_that_it_does_not_have(self, options: dict[str, Any], sentence: str) -> None:
        with pytest.raises(InvalidTask, match=sentence):
            task(**options)(tasks.noop_task.func)

    def test_moments(self) -> None:
        with pytest.raises(
            InvalidTask, match=r"must be a datetime, such as timezone\.now.*, not datetime\.timed"
        ):
            tasks.noop_task.using(run_after=timedelta(hours=1))

    @pytest.mark.parametrize(
        ("value", "error", "sentence"),
        [
            (float("nan"), ValueError, "argument 1 of .*noop_task is nan, which JSON cannot carry"),
            (10**5000, ValueError, "argument 1 of .*noop_task has more digits than JSON's readers take"),
            (HOLDS_ITSELF, TypeError, "argument 1 of .*noop_task is nested too deeply, or contains itself"),
        ],
        ids=["nan", "digits", "itself"],
    )
    @pytest.mark.django_db
    def test_arguments(self, value: Any, error: type[Exception], sentence: str) -> None:
        with pytest.raises(error, match=sentence):
            tasks.noop_task.enqueue(value)

    def test_calls_are_of_jobs(self) -> None:
        with pytest.raises(AttributeError, match=r"a task has no s\(\): .* declare it with @job"):
            tasks.noop_task.s()
        with pytest.raises(
            InvalidGroup, match=r"not the task tests\.app\.tasks\.noop_task; only functions with"
        ):
            group(tasks.noop_task)


class TestEnqueue:
    """``test_dummy_backend.py``: before anybody runs it."""

    @pytest.mark.parametrize("name", ["noop_task", "noop_task_async", "noop_task_from_bare_decorator"])
    def test_enqueue_task(self, name: str) -> None:
        one: Any = getattr(tasks, name)
        result = one.enqueue(1, two=3)
        assert result.status == READY
        assert not result.is_finished
        assert (result.started_at, result.last_attempted_at, result.finished_at) == (None, None, None)
        with pytest.raises(ValueError, match="Task has not finished yet"):
            _ = result.return_value
        assert result.task == one
        assert (result.args, result.kwargs) == ([1], {"two": 3})
        assert (result.attempts, result.worker_ids, result.errors) == (0, [], [])
        assert result.enqueued_at is not None
        assert result.backend == "default"

    def test_enqueue_task_async(self) -> None:
        async def enqueue() -> Any:
            result = await tasks.noop_task.aenqueue(1)
            await result.arefresh()
            assert await tasks.noop_task.aget_result(result.id) == result
            return result

        result = async_to_sync(enqueue)()
        assert (result.status, result.args, result.kwargs) == (READY, [1], {})

    def test_invalid_argument(self) -> None:
        with pytest.raises(TypeError, match=r"Unsupported type.*argument 1 of .*noop_task is a datetime"):
            tasks.noop_task.enqueue(datetime.now())
        with pytest.raises(TypeError, match=r"argument 'id' of .*noop_task is a UUID.*pass str"):
            tasks.noop_task.enqueue(id=uuid.uuid4())
        assert not JobRecord.objects.exists()

    def test_arguments_that_do_not_fit(self) -> None:
        with pytest.raises(TypeError, match="missing a required argument: 'attempt'"):
            tasks.check_context.enqueue()

    def test_refresh_changes_nothing_before_it_ran(self) -> None:
        result = tasks.noop_task.enqueue(1, two=[3])
        before = dataclasses.asdict(result)
        result.refresh()
        assert dataclasses.asdict(result) == before

    def test_get_result(self) -> None:
        result = default_task_backend.enqueue(tasks.noop_task, (), {})
        assert tasks.noop_task.get_result(result.id) == result
        assert default_task_backend.get_result(result.id) == result

    def test_get_result_of_a_task_with_options(self) -> None:
        when = timezone.now() + timedelta(hours=1)
        given = tasks.noop_task.using(priority=7, queue_name="slow", run_after=when)
        result = given.enqueue()
        found = tasks.noop_task.get_result(result.id)
        assert found == result
        assert found.task == given
        assert found.status == READY

    @pytest.mark.parametrize("id", [NOTHING, "abc", "", str(2**70), "-1"])
    def test_get_missing_result(self, id: str) -> None:
        with pytest.raises(TaskResultDoesNotExist):
            tasks.noop_task.get_result(id)

    def test_get_incorrect_result(self) -> None:
        result = tasks.noop_task_async.enqueue()
        with pytest.raises(TaskResultMismatch, match="Task does not match"):
            tasks.noop_task.get_result(result.id)

    def test_a_job_is_no_task(self) -> None:
        result = app_jobs.add.enqueue(1)
        with pytest.raises(
            TaskResultDoesNotExist, match=r"is a job of tests\.app\.jobs\.add, which is no task"
        ):
            default_task_backend.get_result(result.id)

    def test_a_path_from_the_wire_is_not_imported(self) -> None:
        record = JobRecord.objects.create(function="os.system", workload=b'{"args": ["true"], "kwargs": {}}')
        with pytest.raises(TaskResultDoesNotExist, match=r"os\.system"):
            default_task_backend.get_result(str(record.pk))

    def test_logs_and_signal(self, caplog: pytest.LogCaptureFixture) -> None:
        told: list[tuple[Any, str]] = []

        def hear(sender: Any, task_result: Any, **kwargs: Any) -> None:
            told.append((sender, task_result.id))

        task_enqueued.connect(hear)
        try:
            with caplog.at_level(logging.DEBUG, LOGGER):
                result = tasks.noop_task.enqueue()
        finally:
            task_enqueued.disconnect(hear)
        assert told == [(GearmanBackend, result.id)]
        (line,) = [record.getMessage() for record in caplog.records if record.name == LOGGER]
        assert "enqueued" in line
        assert result.id in line

    def test_validate_on_enqueue(self) -> None:
        with override_settings(TASKS={"default": {"BACKEND": GEARMAN, "QUEUES": []}}):
            given = tasks.noop_task.using(queue_name="unknown_queue")
        with pytest.raises(InvalidTask, match="Queue 'unknown_queue' is not valid for backend"):
            given.enqueue()
        with pytest.raises(InvalidTask, match="Queue 'unknown_queue' is not valid for backend"):
            async_to_sync(given.aenqueue)()

    def test_a_transaction_that_is_rolled_back(self) -> None:
        """As Django has it, nothing waits for the commit; the row is of the transaction."""
        with transaction.atomic():
            result = tasks.noop_task.enqueue()
            assert default_task_backend.get_result(result.id) == result
            transaction.set_rollback(True)
        with pytest.raises(TaskResultDoesNotExist):
            result.refresh()

    def test_without_time_zones(self, settings: Any) -> None:
        settings.USE_TZ = False
        naive = datetime(2040, 1, 2, 3, 4, 5)
        assert tasks.noop_task.using(run_after=naive).enqueue().task.run_after == naive
        aware = timezone.make_aware(naive, timezone.get_default_timezone())
        result = tasks.noop_task.using(run_after=aware).enqueue()
        assert JobRecord.objects.get(pk=result.id).run_after == naive

    def test_over_the_wire_nothing_is_kept(self, settings: Any) -> None:
        settings.GEARMAN = {"default": {"ENQUEUE": "wire", "SERVERS": ["127.0.0.1:9"]}}
        result = tasks.noop_task.enqueue()
        assert len(result.id) == 32
        assert result.status == READY
        assert default_task_backend.supports_get_result is False
        with pytest.raises(NotImplementedError, match="does not support retrieving"):
            result.refresh()


class TestRun:
    """``test_immediate_backend.py``: when it has run."""

    @pytest.mark.parametrize("name", ["noop_task", "noop_task_async"])
    def test_success(self, gearman_jobs: GearmanJobs, name: str) -> None:
        one: Any = getattr(tasks, name)
        result = finished(one.enqueue(1, two=3), gearman_jobs)
        assert result.status == SUCCESSFUL
        assert result.is_finished
        assert result.enqueued_at <= result.started_at <= result.finished_at
        assert result.last_attempted_at is not None
        assert result.return_value is None
        assert result.task == one
        assert (result.args, result.kwargs) == ([1], {"two": 3})
        assert result.attempts == 1
        (worker,) = result.worker_ids
        assert worker
        assert result.errors == []

    @pytest.mark.parametrize(
        ("name", "kind", "message"),
        [
            ("failing_task_value_error", ValueError, "This Task failed due to ValueError"),
            ("failing_task_system_exit", SystemExit, "This Task failed due to SystemExit"),
            ("exit_task", SystemExit, "1"),
        ],
    )
    def test_failure(
        self,
        gearman_jobs: GearmanJobs,
        caplog: pytest.LogCaptureFixture,
        name: str,
        kind: type[BaseException],
        message: str,
    ) -> None:
        one: Any = getattr(tasks, name)
        result = finished(one.enqueue(), gearman_jobs)
        (line,) = [line for line in caplog.records if line.name == LOGGER and line.levelno == logging.ERROR]
        assert line.exc_info is not None
        assert line.exc_info[0] is kind
        assert result.status == FAILED
        assert result.is_finished
        with pytest.raises(ValueError, match="Task failed"):
            _ = result.return_value
        assert result.enqueued_at <= result.started_at <= result.finished_at
        (error,) = result.errors
        assert error.exception_class is kind
        assert error.traceback.endswith(f"{kind.__name__}: {message}\n")
        assert result.attempts == 1

    def test_keyboard_interrupt(self, gearman_jobs: GearmanJobs, caplog: pytest.LogCaptureFixture) -> None:
        tasks.failing_task_keyboard_interrupt.enqueue()
        with pytest.raises(KeyboardInterrupt):
            gearman_jobs.run_all()
        assert not [line for line in caplog.records if line.name == LOGGER and line.levelno == logging.ERROR]

    def test_complex_exception(self, gearman_jobs: GearmanJobs) -> None:
        result = finished(tasks.complex_exception.enqueue(), gearman_jobs)
        assert result.status == FAILED
        assert result._return_value is None
        assert result.errors[0].exception_class is ValueError
        assert 'ValueError(ValueError("This task failed"))' in result.errors[0].traceback

    def test_complex_return_value(self, gearman_jobs: GearmanJobs) -> None:
        result = finished(tasks.complex_return_value.enqueue(), gearman_jobs)
        assert result.status == FAILED
        assert result._return_value is None
        assert result.errors[0].exception_class is TypeError
        assert "Unsupported type" in result.errors[0].traceback
        assert "the return value of tests.app.tasks.complex_return_value" in result.errors[0].traceback

    def test_result(self, gearman_jobs: GearmanJobs) -> None:
        assert finished(tasks.calculate_meaning_of_life.enqueue(), gearman_jobs).return_value == 42

    def test_values_as_json_has_them(self, gearman_jobs: GearmanJobs) -> None:
        """Django's list for a tuple and text for bytes; keys as whatever stores them would make them."""
        result = tasks.echo.enqueue((1, b"two"), three={4: None})
        assert (result.args, result.kwargs) == ([[1, "two"]], {"three": {"4": None}})
        assert finished(result, gearman_jobs).return_value == [[[1, "two"]], {"three": {"4": None}}]
        result = finished(tasks.return_what_json_changes.enqueue(), gearman_jobs)
        assert result.return_value == {"1": ["bytes", 2.5], "null": {"x": True}}
        result = finished(tasks.return_not_a_number.enqueue(), gearman_jobs)
        assert result.errors[0].exception_class is ValueError

    def test_enqueue_logs(self, gearman_jobs: GearmanJobs, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.DEBUG, LOGGER):
            result = finished(tasks.noop_task.enqueue(), gearman_jobs)
        lines = [record.getMessage() for record in caplog.records if record.name == LOGGER]
        assert len(lines) == 3
        for line, words in zip(lines, ("enqueued", "state=RUNNING", "state=SUCCESSFUL"), strict=True):
            assert words in line
            assert f"id={result.id} " in line
            assert "None" not in line

    def test_failed_logs(self, gearman_jobs: GearmanJobs, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.DEBUG, LOGGER):
            finished(tasks.failing_task_value_error.enqueue(), gearman_jobs)
        lines = [record.getMessage() for record in caplog.records if record.name == LOGGER]
        assert len(lines) == 3
        assert "state=FAILED" in lines[2]

    def test_takes_context(self, gearman_jobs: GearmanJobs) -> None:
        result = finished(tasks.get_task_id.enqueue(), gearman_jobs)
        assert result.return_value == result.id
        assert finished(tasks.check_context.enqueue(1), gearman_jobs).status == SUCCESSFUL

    def test_context_has_more_of_ours(self, gearman_jobs: GearmanJobs) -> None:
        result = finished(tasks.report_progress.enqueue(3), gearman_jobs)
        assert result.return_value == 3
        record = JobRecord.objects.get(pk=result.id)
        assert (record.numerator, record.denominator) == (3, 3)

    def test_higher_priority_first(self, gearman_jobs: GearmanJobs) -> None:
        ids = {priority: tasks.noop_task.using(priority=priority).enqueue().id for priority in (-100, 0, 100)}
        assert [each.id for each in gearman_jobs.run_all()] == [ids[100], ids[0], ids[-100]]

    def test_not_before_its_time(self, gearman_jobs: GearmanJobs) -> None:
        result = tasks.noop_task.using(run_after=timezone.now() + timedelta(hours=1)).enqueue()
        assert finished(result, gearman_jobs).status == READY
        gearman_jobs.run_all(scheduled=True)
        result.refresh()
        assert result.status == SUCCESSFUL

    @pytest.mark.parametrize(
        ("status", "expected"),
        [
            ("SCHEDULED", READY),
            ("READY", READY),
            ("RETRYING", READY),
            ("RUNNING", RUNNING),
            ("SUCCESSFUL", SUCCESSFUL),
            ("FAILED", FAILED),
            ("DEAD", FAILED),
            ("CANCELLED", FAILED),
        ],
    )
    def test_every_status_of_a_record(self, status: str, expected: TaskResultStatus) -> None:
        result = tasks.noop_task.enqueue()
        JobRecord.objects.update(status=status, message="The worker was lost")
        result.refresh()
        assert result.status == expected
        if expected == FAILED:
            (error,) = result.errors
            assert error.exception_class is JobFailed
            assert error.traceback == "The worker was lost\n"

    def test_errors_are_read_where_the_record_is(self, settings: Any) -> None:
        """And not from the replica that a router names."""

        class Replica:
            def db_for_read(self, model: Any, **hints: Any) -> str:
                return "replica"

        result = tasks.noop_task.enqueue()
        JobRecord.objects.update(status="RETRYING", attempts=1)
        JobAttempt.objects.create(
            job_id=int(result.id), number=1, exception="builtins.ValueError", finished_at=timezone.now()
        )
        settings.DATABASE_ROUTERS = [Replica()]
        result.refresh()
        assert [error.exception_class for error in result.errors] == [ValueError]

    def test_arguments_of_a_foreign_client(self, gearman_jobs: GearmanJobs) -> None:
        record = JobRecord.objects.create(function="tests.app.tasks.echo", workload=b"not JSON")
        result = default_task_backend.get_result(str(record.pk))
        assert (result.args, result.kwargs) == ([], {})
        assert finished(result, gearman_jobs).errors[0].exception_class is TypeError


class TestSignals:
    @pytest.fixture
    def told(self) -> Iterator[list[tuple[Any, ...]]]:
        heard: list[tuple[Any, ...]] = []

        def started(sender: Any, task_result: Any, **kwargs: Any) -> None:
            heard.append(("started", sender, task_result.status, task_result.attempts))

        def ended(sender: Any, task_result: Any, **kwargs: Any) -> None:
            heard.append(("finished", sender, task_result.status, task_result.attempts))

        task_started.connect(started)
        task_finished.connect(ended)
        yield heard
        task_started.disconnect(started)
        task_finished.disconnect(ended)

    def test_success(self, gearman_jobs: GearmanJobs, told: list[Any]) -> None:
        finished(tasks.noop_task.enqueue(), gearman_jobs)
        assert told == [("started", GearmanBackend, RUNNING, 1), ("finished", GearmanBackend, SUCCESSFUL, 1)]

    @with_options
    def test_only_the_last_attempt_is_the_end(self, gearman_jobs: GearmanJobs, told: list[Any]) -> None:
        finished(tasks.fail_first.enqueue(2), gearman_jobs)
        assert [(name, status, attempts) for name, _, status, attempts in told] == [
            ("started", RUNNING, 1),
            ("started", RUNNING, 2),
            ("started", RUNNING, 3),
            ("finished", SUCCESSFUL, 3),
        ]

    @with_options
    @pytest.mark.django_db(transaction=True)
    @pytest.mark.parametrize("name", ["be_cancelled", "be_cancelled_on_the_loop"])
    def test_a_cancelled_task_ends_whatever_attempts_are_left(self, told: list[Any], name: str) -> None:
        assigned: Any = Assigned()
        assigned.error = JobCancelled()
        found = registry[f"tests.app.tasks.{name}"]
        perform: Any = async_to_sync(aperform_assigned) if found.is_async else perform_assigned
        with pytest.raises((JobCancelled, asyncio.CancelledError)):
            perform(found, assigned)
        assert [(name, status) for name, _, status, _ in told] == [("started", RUNNING), ("finished", FAILED)]
        assert assigned.decision == (None,)

    @pytest.mark.django_db(transaction=True)
    @pytest.mark.parametrize("hears", [False, True], ids=["function", "terminal"])
    def test_keyboard_interrupt(self, told: list[Any], hears: bool) -> None:
        """The end of the task, unless it comes from the terminal."""
        assigned: Any = Assigned()
        assigned.hears_interrupts = hears
        with pytest.raises(KeyboardInterrupt):
            perform_assigned(registry["tests.app.tasks.failing_task_keyboard_interrupt"], assigned)
        assert [name for name, *_ in told] == ["started"] + ["finished"] * (not hears)

    @pytest.mark.django_db(transaction=True)
    @pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
    def test_a_result_that_fits_in_no_packet(self, told: list[Any], settings: Any, is_async: bool) -> None:
        settings.GEARMAN = {"default": {"MAX_PACKET": 70_000}}
        made: Any = task(areturn_much if is_async else return_much)
        perform: Any = async_to_sync(aperform_assigned) if is_async else perform_assigned
        try:
            with pytest.raises(TooLarge, match="more than MAX_PACKET=70000; store it"):
                perform(registry[made.module_path], Assigned())
        finally:
            del registry[made.module_path], registry[f"{made.module_path}@slow"]
        assert [(name, status) for name, _, status, _ in told] == [("started", RUNNING), ("finished", FAILED)]

    @with_options
    @pytest.mark.django_db(transaction=True)
    def test_a_connection_that_a_task_left_broken(self, told: list[Any]) -> None:
        """Its ``backoff`` gets another, and decides."""
        asked: list[Any] = []
        options: Any = {"max_attempts": 3, "backoff": lambda error, result: asked.append(result.attempts)}
        made: Any = task(**options)(break_transaction)
        try:
            with pytest.raises(DatabaseError):
                perform_assigned(registry[made.module_path], Assigned())
        finally:
            del registry[made.module_path], registry[f"{made.module_path}@slow"]
        assert asked == [1]
        assert [(name, status) for name, _, status, _ in told] == [("started", RUNNING), ("finished", FAILED)]

    @with_options
    @pytest.mark.django_db(transaction=True)
    def test_a_time_limit_is_told_as_such(self) -> None:
        """On the loop, the function hears of it as of a cancellation."""
        assigned: Any = Assigned()
        assigned.error = JobTimedOut(3)
        told: list[str] = []

        def ended(task_result: Any, **kwargs: Any) -> None:
            told.extend(error.exception_class_path for error in task_result.errors)

        found: Any = registry["tests.app.tasks.be_cancelled_on_the_loop"]
        assigned.attempt = found.max_attempts
        task_finished.connect(ended)
        try:
            with pytest.raises(asyncio.CancelledError):
                asyncio.run(aperform_assigned(found, assigned))
        finally:
            task_finished.disconnect(ended)
        assert told == ["django_gearman.exceptions.JobTimedOut"]

    def test_a_receiver_that_raises_costs_no_task(self, gearman_jobs: GearmanJobs) -> None:
        def careless(**kwargs: Any) -> None:
            raise RuntimeError("receiver")

        task_started.connect(careless)
        try:
            assert finished(tasks.noop_task.enqueue(), gearman_jobs).status == SUCCESSFUL
        finally:
            task_started.disconnect(careless)

    def test_async_on_the_loop_of_a_worker(self, told: list[Any]) -> None:
        found = registry["tests.app.tasks.noop_task_async"]
        assert isinstance(found, performing.TaskJob)
        context = JobContext(attempt=2)
        assert asyncio.run(found.aperform(b'{"args": [], "kwargs": {}}', context)) == b"null"
        assert told == [("started", GearmanBackend, RUNNING, 2), ("finished", GearmanBackend, SUCCESSFUL, 2)]
        with pytest.raises(TypeError, match="must be JSON"):
            asyncio.run(found.aperform(b"", context))

    @pytest.mark.django_db(transaction=True)
    def test_a_foreground_job(self, told: list[Any]) -> None:
        """Its record, if there is one, is written when it has ended."""
        assigned: Any = Assigned()
        assert perform_assigned(registry["tests.app.tasks.get_task_id"], assigned) == b'"H:x:1.1"'
        assert [name for name, *_ in told] == ["started", "finished"]

    @pytest.mark.parametrize(
        ("written", "others"),
        [(0, ["", ""]), (1, ["lost:1", ""]), (2, ["", "lost:1"]), (3, ["", ""])],
    )
    def test_workers_that_were_lost(self, written: int, others: list[str]) -> None:
        """The server may write of them, and of the attempt that begins, a moment later."""
        result = tasks.noop_task.enqueue()
        record = JobRecord.objects.filter(pk=result.id)
        record.update(handle="H:x:1.1", attempts=written, worker="lost:1" if written else "")
        heard: list[list[str]] = []

        def started(task_result: Any, **kwargs: Any) -> None:
            heard.append(task_result.worker_ids)

        task_started.connect(started)
        try:
            context = JobContext("H:x:1.1", attempt=3)
            registry["tests.app.tasks.noop_task"].perform(b'{"args": [], "kwargs": {}}', context)
            JobAttempt.objects.create(job=record.get(), number=1, worker="lost:0", finished_at=timezone.now())
            registry["tests.app.tasks.noop_task"].perform(b'{"args": [], "kwargs": {}}', context)
        finally:
            task_started.disconnect(started)
        own = f"{socket.gethostname()}:{os.getpid()}"
        assert heard == [[*others, own], ["lost:0", others[1], own]]

    @pytest.mark.django_db(transaction=True)
    def test_a_connection_to_the_database_that_is_lost(self, caplog: pytest.LogCaptureFixture) -> None:
        """The worker's; the function gets another."""
        if connection.vendor == "mysql":
            pytest.skip("its driver does not close what is closed")
        made: Any = task(count_records)
        try:
            connection.ensure_connection()
            connection.connection.close()
            found = registry[made.module_path]
            assert found.perform(b'{"args": [], "kwargs": {}}', JobContext("H:x:1.1")) == b"0"
        finally:
            del registry[made.module_path], registry[f"{made.module_path}@slow"]
        assert "The record of job H:x:1.1" in caplog.text


class Assigned:
    """A job as a worker has it, of a server that keeps no record here."""

    handle, unique, workload = b"H:x:1.1", b"", b'{"args": [], "kwargs": {}}'
    attempt, max_attempts = 1, None
    takes_log, may_return, hears_interrupts, cancelled, decision = False, True, False, False, None
    error: BaseException | None = None
    """Why the worker interrupted it."""

    def end_copy(self, failure: BaseException | None = None) -> None:
        pass

    def as_told(self, error: BaseException) -> BaseException:
        return self.error or error


def return_much() -> str:
    return "x" * 70_000


async def areturn_much() -> str:
    return return_much()


def break_transaction() -> None:
    transaction.set_autocommit(False)
    with connection.cursor() as cursor:
        cursor.execute("SELECT nothing FROM nowhere")


def count_records() -> int:
    return JobRecord.objects.count()


@with_options
class TestOptions:
    def test_they_are_those_of_the_task(self) -> None:
        assert tasks.fail_first.max_attempts == 3
        assert tasks.fail_first.backoff is tasks.soon
        assert tasks.fail_first.using(priority=3).max_attempts == 3
        record = JobRecord.objects.get(pk=tasks.fail_first.enqueue(1).id)
        assert record.max_attempts == 3
        assert JobRecord.objects.get(pk=tasks.sleep_long.enqueue().id).timeout == 1

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"max_attempts": 0}, "max_attempts of .* must be a whole number from 1 to 32767, not 0"),
            ({"max_attempts": True}, "not True"),
            ({"timeout": 1.5}, "timeout of .* must be a whole number of seconds from 1"),
            ({"backoff": 3}, "backoff of .* must be a function of the exception and the TaskResult, not 3"),
        ],
    )
    @pytest.mark.parametrize("backend", ["GearmanBackend", "ImmediateBackend", "DummyBackend"])
    def test_what_is_refused(self, backend: str, options: dict[str, Any], said: str) -> None:
        with (
            override_settings(TASKS={"default": {"BACKEND": f"django_gearman.backends.{backend}"}}),
            pytest.raises(InvalidTask, match=said),
        ):
            task(**options)(tasks.noop_task.func)

    def test_errors_are_told_between_the_pause_and_the_next_attempt(self, gearman_jobs: GearmanJobs) -> None:
        result = tasks.fail_first.enqueue(2)
        gearman_jobs.run_one()
        JobRecord.objects.update(status=JobRecord.Status.READY)
        result.refresh()
        assert (result.status, result.attempts) == (READY, 1)
        assert [error.exception_class for error in result.errors] == [ValueError]

    def test_attempts(self, gearman_jobs: GearmanJobs) -> None:
        tasks.noted.clear()
        result = tasks.fail_first.enqueue(2)
        gearman_jobs.run_one()
        result.refresh()
        assert result.status == READY
        assert result.attempts == 1
        assert [error.exception_class for error in result.errors] == [ValueError]
        finished(result, gearman_jobs)
        assert result.status == SUCCESSFUL
        assert result.return_value == 3
        assert result.attempts == 3
        assert all(result.worker_ids)
        assert [error.traceback.splitlines()[-1] for error in result.errors] == [
            "ValueError: attempt 1",
            "ValueError: attempt 2",
        ]
        assert tasks.fail_first.get_result(result.id) == result
        # Once for each attempt that failed, with what Django's proposal says.
        path = "tests.app.tasks.fail_first"
        assert tasks.noted == [("attempt 1", 1, result.id, path), ("attempt 2", 2, result.id, path)]

    def test_the_last_attempt(self, gearman_jobs: GearmanJobs) -> None:
        result = finished(tasks.fail_first.enqueue(9), gearman_jobs)
        assert (result.status, result.attempts, len(result.errors)) == (FAILED, 3, 3)
        result = finished(tasks.fail_always.enqueue(), gearman_jobs)
        assert (result.status, result.attempts, len(result.errors)) == (FAILED, 2, 2)

    def test_discard(self, gearman_jobs: GearmanJobs) -> None:
        result = finished(tasks.discard.enqueue(), gearman_jobs)
        assert (result.status, result.attempts) == (FAILED, 1)


class TestErrorsOfAResult:
    """``test_tasks.py``: an exception's class is imported when it is asked for, and only if it is one."""

    @pytest.fixture
    def failed(self, gearman_jobs: GearmanJobs) -> Any:
        return finished(tasks.failing_task_value_error.enqueue(), gearman_jobs)

    def test_a_path_that_is_no_exception(self, failed: Any) -> None:
        JobRecord.objects.update(exception="subprocess.run")
        failed.refresh()
        with pytest.raises(ValueError, match=r"'subprocess\.run' does not reference a valid exception"):
            _ = failed.errors[0].exception_class

    def test_a_module_that_is_not_there(self, failed: Any) -> None:
        JobRecord.objects.update(exception="does.not.exist")
        failed.refresh()
        with pytest.raises(ImportError):
            _ = failed.errors[0].exception_class


class TestAsync:
    """The twins of what is tried above, as Django's tests have them."""

    def test_refused_arguments(self) -> None:
        with pytest.raises(TypeError, match="Unsupported type"):
            async_to_sync(tasks.noop_task.aenqueue)(datetime.now())

    def test_results(self) -> None:
        async def look() -> None:
            result = await tasks.noop_task_async.aenqueue()
            assert await default_task_backend.aget_result(result.id) == result
            with pytest.raises(TaskResultMismatch, match="Task does not match"):
                await tasks.noop_task.aget_result(result.id)
            with pytest.raises(TaskResultDoesNotExist):
                await tasks.noop_task.aget_result(NOTHING)
            with pytest.raises(TaskResultDoesNotExist):
                await default_task_backend.aget_result(NOTHING)

        async_to_sync(look)()

    def test_refresh(self, gearman_jobs: GearmanJobs) -> None:
        result = async_to_sync(tasks.calculate_meaning_of_life.aenqueue)()
        before = dataclasses.asdict(result)
        async_to_sync(result.arefresh)()
        assert dataclasses.asdict(result) == before
        gearman_jobs.run_all()
        assert result.status == READY
        async_to_sync(result.arefresh)()
        assert (result.status, result.return_value) == (SUCCESSFUL, 42)

    def test_where_a_backend_could_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What Django refuses for a backend's flags it would refuse for ours, too, were they others."""
        monkeypatch.setattr(GearmanBackend, "supports_async_task", False)
        with pytest.raises(InvalidTask, match=r"Backend does not support async [Tt]asks\."):
            default_task_backend.validate_task(tasks.noop_task_async)
        monkeypatch.setattr(GearmanBackend, "supports_priority", False)
        with pytest.raises(InvalidTask, match=r"Backend does not support setting priority of [Tt]asks\."):
            tasks.noop_task.using(priority=10)
        monkeypatch.setattr(GearmanBackend, "supports_defer", False)
        with pytest.raises(InvalidTask, match=r"Backend does not support run_after\."):
            tasks.noop_task.using(run_after=timezone.now())


class TestTwins:
    """The backends for tests and development know our options."""

    @pytest.mark.parametrize("module", ["backends", "testing"])
    @pytest.mark.parametrize(
        ("name", "kind", "status"),
        [("ImmediateBackend", ImmediateBackend, SUCCESSFUL), ("DummyBackend", DummyBackend, READY)],
    )
    def test_twin(self, module: str, name: str, kind: type, status: TaskResultStatus) -> None:
        with override_settings(TASKS={"default": {"BACKEND": f"django_gearman.{module}.{name}"}}):
            assert isinstance(task_backends["default"], kind)
            made: Any = task(tasks.calculate_meaning_of_life.func)
            assert isinstance(made, GearmanTask)
            if django.VERSION[:2] != (6, 0):
                made = task(max_attempts=3, backoff=tasks.soon, timeout=5)(made.func)
                assert (made.max_attempts, made.timeout) == (3, 5)
            with transaction.atomic():
                result = made.enqueue()
                # Neither waits for the commit.
                assert result.status == status
        assert not JobRecord.objects.exists()

    def test_context_has_our_job(self) -> None:
        """As in the example of docs/tasks.md, though no worker listens."""
        with override_settings(TASKS=with_another("django_gearman.testing.ImmediateBackend")):
            for made in (tasks.report_progress, tasks.report_progress_async):
                result = made.using(backend="other").enqueue(3)
                assert (result.status, result.errors) == (SUCCESSFUL, [])
                assert result.return_value == 3

    def test_context_of_a_call(self) -> None:
        context: Any = TaskContext(task_result=tasks.report_progress.enqueue(3))
        assert tasks.report_progress.call(context, 3) == 3
        assert async_to_sync(tasks.report_progress_async.acall)(context, steps=3) == 3


class TestQueues:
    def test_a_name_on_the_wire_for_each(self) -> None:
        assert registry["tests.app.tasks.noop_task"].queue_name == "default"
        assert registry["tests.app.tasks.noop_task@slow"].queue_name == "slow"
        assert registry["tests.app.tasks.in_the_slow_queue"].queue_name == "slow"
        assert registry["tests.app.tasks.in_the_slow_queue@default"].queue_name == "default"

    @pytest.mark.parametrize(
        ("name", "queue", "function"),
        [
            ("noop_task", "default", "noop_task"),
            ("noop_task", "slow", "noop_task@slow"),
            ("in_the_slow_queue", "slow", "in_the_slow_queue"),
            ("in_the_slow_queue", "default", "in_the_slow_queue@default"),
        ],
    )
    def test_enqueued_in(self, gearman_jobs: GearmanJobs, name: str, queue: str, function: str) -> None:
        one: Any = getattr(tasks, name)
        result = one.using(queue_name=queue).enqueue()
        record = JobRecord.objects.get(pk=result.id)
        assert (record.function, record.queue_name) == (f"tests.app.tasks.{function}", queue)
        assert one.get_result(result.id) == result
        assert finished(result, gearman_jobs).status == SUCCESSFUL

    def test_what_fails_does_in_any_queue(self, gearman_jobs: GearmanJobs) -> None:
        gearman_jobs.fail_with(tasks.noop_task, ConnectionError("the mail server is down"))
        results = [tasks.noop_task.enqueue(), tasks.noop_task.using(queue_name="slow").enqueue()]
        assert [finished(result, gearman_jobs).status for result in results] == [FAILED, FAILED]

    def test_any_queue_is_a_label(self, gearman_jobs: GearmanJobs) -> None:
        with override_settings(TASKS={"default": {"BACKEND": GEARMAN, "QUEUES": []}}):
            result = tasks.noop_task.using(queue_name="mine").enqueue()
            record = JobRecord.objects.get(pk=result.id)
            assert (record.function, record.queue_name) == ("tests.app.tasks.noop_task", "mine")
            assert finished(result, gearman_jobs).task.queue_name == "mine"

    def test_a_queue_that_is_gone(self) -> None:
        with override_settings(TASKS={"default": {"BACKEND": GEARMAN, "QUEUES": []}}):
            result = tasks.noop_task.using(queue_name="mine").enqueue()
        assert default_task_backend.get_result(result.id).task == tasks.noop_task

    def test_priority_of_the_declaration(self) -> None:
        assert JobRecord.objects.get(pk=tasks.in_the_slow_queue.enqueue().id).priority == 20


def of_no_module_that_is_looked_through(left: int) -> int:
    return left + 1


class TestRegistry:
    """Which functions a worker may run."""

    @pytest.fixture(autouse=True)
    def restore(self) -> Iterator[None]:
        before = dict(registry)
        yield
        registry.clear()
        registry.update(before)

    NAME = f"{__name__}.of_no_module_that_is_looked_through"

    def test_the_decorator_is_enough(self, gearman_jobs: GearmanJobs) -> None:
        assert self.NAME not in registry
        made: Any = task(of_no_module_that_is_looked_through)
        assert self.NAME in registry
        assert finished(made.enqueue(1), gearman_jobs).return_value == 2

    def test_tasks_of_another_backend_that_are_sent_here(self, gearman_jobs: GearmanJobs) -> None:
        other = {
            "default": {"BACKEND": GEARMAN},
            "other": {"BACKEND": "django_gearman.backends.DummyBackend"},
        }
        with override_settings(TASKS=other):
            made: Any = task(backend="other")(of_no_module_that_is_looked_through)
            assert self.NAME not in registry
            result = made.using(backend="default").enqueue(1)
            assert finished(result, gearman_jobs).return_value == 2
            assert result.backend == "default"

    def test_a_name_that_a_job_has(self) -> None:
        job(of_no_module_that_is_looked_through)
        with pytest.raises(InvalidTask, match=r"is the name of a @job; give that another name="):
            task(of_no_module_that_is_looked_through)
        registry.clear()
        job(name="other")(of_no_module_that_is_looked_through)
        task(of_no_module_that_is_looked_through)
        assert set(registry) == {"other", self.NAME, f"{self.NAME}@slow"}

    def test_what_is_no_queue_is_left_to_the_checks(self) -> None:
        backend = {"BACKEND": GEARMAN, "QUEUES": ["default", "slow", 7, "", "a\n"]}
        with override_settings(TASKS={"default": backend}):
            task(of_no_module_that_is_looked_through)
            assert set(registry) >= {self.NAME, f"{self.NAME}@slow"}
            ids = [message.id for message in run_checks()]
        assert ids.count("django_gearman.E016") == 3

    def test_declared_twice_by_a_reload(self) -> None:
        first: Any = task(of_no_module_that_is_looked_through)
        known = registry[self.NAME]
        first.using(priority=5)
        assert registry[self.NAME] is known


class TestChecks:
    @staticmethod
    def ids(backend: dict[str, Any]) -> list[str | None]:
        with override_settings(TASKS={"default": {"BACKEND": GEARMAN, **backend}}):
            return [message.id for message in task_backends["default"].check()]

    def test_those_of_the_tests(self) -> None:
        assert list(default_task_backend.check()) == []

    def test_options(self) -> None:
        assert self.ids({"OPTIONS": {"SERVERS": []}}) == ["django_gearman.E015"]

    def test_queues(self) -> None:
        assert self.ids({"QUEUES": ["fine", "a\tb", "", "q" * 101]}) == ["django_gearman.E016"] * 3

    def test_manage_check_asks(self) -> None:
        with override_settings(TASKS={"default": {"BACKEND": GEARMAN, "OPTIONS": {"X": 1}}}):
            assert "django_gearman.E015" in [message.id for message in run_checks()]

    def test_without_the_app(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("django.apps.apps.is_installed", lambda name: False)
        assert self.ids({}) == ["django_gearman.E014"]
        with pytest.raises(ImproperlyConfigured, match='add "django_gearman" to INSTALLED_APPS'):
            tasks.noop_task.enqueue()


def test_context_type_is_djangos() -> None:
    assert issubclass(performing.GearmanTaskContext, TaskContext)
