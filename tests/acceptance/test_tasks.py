"""Tasks of ``django.tasks``, run by real workers."""

# ruff: noqa: E402  (what is imported last may not be there)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import django
import pytest
from django.contrib.auth.models import User
from django.test import Client

from tests import needs

needs.module("django.tasks" if django.VERSION >= (6, 0) else "django_tasks")

from django_gearman.backends import TaskResultStatus
from django_gearman.exceptions import JobFailed, JobTimedOut
from django_gearman.models import JobRecord
from django_gearman.submission import client_for
from tests import harness
from tests.app import tasks

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]

SUCCESSFUL, FAILED = TaskResultStatus.SUCCESSFUL, TaskResultStatus.FAILED


def ended(result: Any) -> Any:
    def is_finished() -> bool:
        result.refresh()
        return bool(result.is_finished)

    harness.wait_until(is_finished, what=f"the end of {result}")
    return result


@pytest.fixture
def worker(database_server: harness.GearmanServerProcess) -> Iterator[harness.WorkerProcess]:
    with harness.worker(database_server, processes=2) as process:
        yield process


class TestTasks:
    def test_one_after_the_other(self, worker: harness.WorkerProcess, client: Client) -> None:
        """In one cluster, since starting it takes longest."""
        result = ended(tasks.echo.enqueue(1, two=[3]))
        assert (result.status, result.return_value) == (SUCCESSFUL, [[1], {"two": [3]}])
        (worker_id,) = result.worker_ids
        assert JobRecord.objects.get(pk=result.id).worker == worker_id
        assert result.enqueued_at <= result.started_at <= result.finished_at
        assert ended(tasks.noop_task_async.enqueue()).status == SUCCESSFUL
        result = ended(tasks.get_task_id.enqueue())
        assert result.return_value == result.id
        assert ended(tasks.check_context.enqueue(1)).status == SUCCESSFUL

        result = ended(tasks.failing_task_system_exit.enqueue())
        assert (result.status, result.errors[0].exception_class) == (FAILED, SystemExit)
        assert "(tests.app.tasks.failing_task_system_exit) failed after" in worker.stderr

        # A program in any language may call a task, and wait for its value.
        value = client_for().do("tests.app.tasks.echo", b'{"args": [1], "kwargs": {}}', timeout=20)
        assert value == b"[[1],{}]"

        User.objects.create_superuser("admin", password="admin")
        client.login(username="admin", password="admin")
        page = client.get("/admin/django_gearman/jobrecord/").content.decode()
        assert "tests.app.tasks.failing_task_system_exit" in page

    @pytest.mark.skipif(django.VERSION[:2] == (6, 0), reason="its decorator takes no options of a backend")
    def test_attempts(self, worker: harness.WorkerProcess) -> None:
        again, lost, late = (
            tasks.fail_first.enqueue(2),
            tasks.kill_worker_twice.enqueue(),
            tasks.sleep_long.enqueue(),
        )
        assert ended(again).return_value == 3
        assert (again.attempts, len(set(again.worker_ids))) in [(3, 1), (3, 2), (3, 3)]
        assert [error.exception_class for error in again.errors] == [ValueError, ValueError]
        # Once for each attempt.
        assert worker.stderr.count(f"of task {again.id}\n") == 2
        ended(lost)
        assert (lost.status, lost.attempts) == (FAILED, 2)
        assert [error.exception_class for error in lost.errors] == [JobFailed, JobFailed]
        assert len(set(lost.worker_ids)) == 2
        ended(late)
        assert (late.status, late.errors[0].exception_class) == (FAILED, JobTimedOut)

    def test_queues(self, database_server: harness.GearmanServerProcess) -> None:
        plain = tasks.noop_task.enqueue()
        slow = tasks.noop_task.using(queue_name="slow").enqueue()
        with harness.worker(database_server, processes=1, queues=["slow"]):
            assert ended(slow).status == SUCCESSFUL
            assert ended(tasks.in_the_slow_queue.enqueue()).return_value == "slow"
            plain.refresh()
            assert plain.status == TaskResultStatus.READY
        with harness.worker(database_server, processes=1, queues=["default"]):
            assert ended(plain).status == SUCCESSFUL
