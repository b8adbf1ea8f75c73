"""Jobs that fail, with real processes: what is tried again, and what the records tell."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from django_gearman.exceptions import JobFailed
from django_gearman.models import JobRecord
from tests import harness
from tests.app import jobs

from .conftest import SITE

Status = JobRecord.Status

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]


@pytest.fixture
def server(transactional_db: None, settings: Any) -> Iterator[harness.GearmanServerProcess]:
    with harness.server(env=SITE) as process:
        settings.GEARMAN = process.setting
        yield process


@pytest.fixture
def worker(server: harness.GearmanServerProcess) -> Iterator[harness.WorkerProcess]:
    with harness.worker(server, processes=1, env=SITE) as process:
        process.complaints_allowed = True
        yield process


def test_job_that_raises_is_tried_again(worker: harness.WorkerProcess):
    result = jobs.fail_first.enqueue(2)
    assert result.get(timeout=20) == [3, 3]
    assert (result.status, result.attempts) == (Status.SUCCESSFUL, 3)
    assert [error.message for error in result.errors] == ["attempt 1", "attempt 2"]
    assert all(error.exception_class_path == "builtins.ValueError" for error in result.errors)
    assert all("fail_first" in error.traceback for error in result.errors)
    assert f"backoff told of attempt 2, attempt 2 of job {result.id}" in worker.stderr
    for past in JobRecord.objects.get().past_attempts.all():
        assert past.started_at is not None
        assert past.started_at <= past.finished_at


@pytest.mark.usefixtures("worker")
class TestEnds:
    def test_last_attempt_that_raises_is_the_failure(self):
        result = jobs.fail_first.enqueue(9)
        with pytest.raises(JobFailed, match="attempt 3"):
            result.get(timeout=20)
        assert (result.status, result.attempts) == (Status.FAILED, 3)
        assert [error.message for error in result.errors] == ["attempt 1", "attempt 2", "attempt 3"]

    def test_job_may_ask_for_another_attempt(self):
        assert jobs.ask_again.enqueue(2).get(timeout=20) == 3
        result = jobs.ask_again.enqueue(9)
        with pytest.raises(JobFailed, match="not ready"):
            result.get(timeout=20)
        assert result.attempts == 3

    def test_discard_is_the_end(self):
        result = jobs.discard.enqueue()
        with pytest.raises(JobFailed, match="the photo is gone"):
            result.get(timeout=20)
        assert (result.status, result.attempts) == (Status.FAILED, 1)
        assert result.errors[0].exception_class_path == "django_gearman.exceptions.Discard"

    def test_foreground_caller_hears_of_the_first_failure(self):
        with pytest.raises(JobFailed, match="attempt 1"):
            jobs.fail_first.run(1)

    def test_job_that_kills_its_workers(self):
        result = jobs.kill_worker_twice.enqueue()
        with pytest.raises(JobFailed, match="killed by SIGKILL at the last of 2 attempts"):
            result.get(timeout=20)
        assert (result.status, result.attempts) == (Status.DEAD, 2)
        assert [error.message for error in result.errors] == [
            "The worker was lost: killed by SIGKILL",
            "The worker was lost: killed by SIGKILL at the last of 2 attempts",
        ]

    def test_job_that_takes_too_long(self):
        result = jobs.sleep_long.enqueue()
        with pytest.raises(JobFailed, match="JobTimedOut: the job took longer than 1 s"):
            result.get(timeout=20)
        assert (result.status, result.attempts) == (Status.FAILED, 2)
        assert all("in sleep_long" in error.traceback for error in result.errors)

    def test_job_that_passes_over_every_exception(self):
        with pytest.raises(JobFailed, match="the job took longer than 1 s"):
            jobs.pass_over_everything.enqueue().get(timeout=20)

    def test_foreground_job_that_takes_too_long(self):
        with pytest.raises(JobFailed, match="the job took longer than 1 s"):
            jobs.sleep_long.run()
        assert jobs.just_in_time.run() == "done"


def test_job_that_hangs_in_c(worker: harness.WorkerProcess):
    result = jobs.hang_in_c.enqueue()
    with pytest.raises(JobFailed, match="Time limit of 1 s: killed at the last of 1 attempts"):
        result.get(timeout=30)
    assert "in hang_in_c" in worker.stderr
    assert jobs.just_in_time.run() == "done"


def test_pause_survives_the_server(server: harness.GearmanServerProcess, worker: harness.WorkerProcess):
    result = jobs.fail_for_an_hour.enqueue()
    harness.wait_until(lambda: (result.refresh(), result.status == Status.RETRYING)[1])
    server.kill()
    server.start()
    record = JobRecord.objects.get()
    assert record.run_after is not None
    assert record.run_after > timezone.now() + timedelta(minutes=59)
    assert (record.status, record.attempts) == (Status.RETRYING, 1)
    # Nobody gets it before.
    assert jobs.add.enqueue(1).get(timeout=20) == 2
    result.refresh()
    assert result.status == Status.RETRYING
    assert [error.message for error in result.errors] == ["not now"]
