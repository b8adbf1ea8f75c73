"""Schedules and pruning by real servers, with real workers."""

from __future__ import annotations

import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.db import transaction
from django.utils import timezone

from django_gearman.models import JobRecord, Schedule
from tests import harness

from .conftest import SITE, Trace

pytestmark = pytest.mark.acceptance

NAME = "tests.acceptance.site.jobs.leave_line"
SECOND = timedelta(seconds=1)


def times(**columns: Any) -> list[float]:
    """The times that jobs of schedules were made for, in the order they were made."""
    records = JobRecord.objects.filter(client__startswith="schedule ", **columns).order_by("pk")
    return [record.run_after.timestamp() for record in records if record.run_after]


def leave_traces(trace: Trace, **columns: Any) -> Schedule:
    return Schedule.objects.create(
        name="traces", function="tests.acceptance.site.jobs.leave_trace", args=[trace.path, "x"], **columns
    )


def start(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A server that does not start."""
    return subprocess.run(
        [*harness.MANAGE, "gearman_server", "--port", "0"],
        cwd=harness.ROOT,
        env=harness.environment() | env,
        capture_output=True,
        text=True,
        timeout=harness.START_LIMIT,
        check=False,
    )


class TestFiring:
    def test_every_second(self, site_server: harness.GearmanServerProcess, trace: Trace):
        schedule = leave_traces(trace, interval=SECOND)
        began = time.time()
        with harness.worker(site_server, env=SITE, processes=1):
            harness.wait_until(lambda: len(trace.names()) >= 4, what="four runs")
        found = times()
        assert found == [found[0] + number for number in range(len(found))]
        assert found[0] >= int(began)
        for record in JobRecord.objects.filter(status="SUCCESSFUL"):
            assert record.run_after is not None
            assert record.started_at is not None
            assert record.started_at >= record.run_after, "never early"
        with transaction.atomic():  # of one moment, since the server goes on
            schedule.refresh_from_db()
            found = times()
            last = JobRecord.objects.order_by("pk").last()
        assert schedule.next_at == found[-1] + 1
        assert last is not None
        assert schedule.last_job == last.pk

    def test_two_servers_make_one_job_for_each_time(self, transactional_db: None, trace: Trace):
        with harness.server(env=SITE) as first, harness.server(env=SITE) as second:
            leave_traces(trace, interval=SECOND)
            with harness.worker([first, second], env=SITE, processes=2):
                harness.wait_until(lambda: len(trace.names()) >= 5, what="five runs")
        found = times()
        assert found == [found[0] + number for number in range(len(found))]
        assert len(found) - 2 <= len(trace.names()) <= len(found)

    def test_an_edit_is_honoured_at_the_next_look(
        self, site_server: harness.GearmanServerProcess, trace: Trace
    ):
        schedule = leave_traces(trace, cron="0 0 1 1 *")
        schedule.cron, schedule.interval = "", SECOND
        schedule.save()
        harness.wait_until(times, 60.0, "a job")
        schedule.enabled = False
        schedule.save()
        count = len(times())
        now = time.time()
        harness.wait_until(lambda: time.time() > now + 3, 60.0)
        assert len(times()) == count

    def test_what_was_missed_while_no_server_was_up(self, transactional_db: None, trace: Trace):
        schedule = leave_traces(trace, interval=timedelta(hours=1), catch_up="all")
        start = int(time.time()) - 3 * 3600 - 60
        Schedule.objects.filter(pk=schedule.pk).update(next_at=start)
        with harness.server(env=SITE):
            harness.wait_until(times, 60.0, "the jobs")
        assert times() == [start + 3600 * number for number in range(4)]


class TestOfTheCode:
    def test_from_the_code_to_the_worker(self, transactional_db: None, tmp_path: Path):
        path = tmp_path / "lines"
        env = SITE | {"GEARMAN_TEST_SCHEDULE": f"1@{path}"}
        with harness.server(env=env) as server, harness.worker(server, env=env, processes=1):
            harness.wait_until(lambda: path.exists() and path.read_text().count("ran") >= 2, what="two runs")
        assert Schedule.objects.get().name == NAME

    def test_edits_survive_a_restart(self, transactional_db: None, tmp_path: Path):
        env = SITE | {"GEARMAN_TEST_SCHEDULE": f"15 3 * * *@{tmp_path / 'lines'}"}
        with harness.server(env=env) as server:
            schedule = Schedule.objects.get(name=NAME)
            assert schedule.cron == "15 3 * * *"
            schedule.cron, schedule.enabled = "20 4 * * *", False
            schedule.save()
            server.restart()
            assert list(Schedule.objects.values_list("cron", "enabled")) == [("20 4 * * *", False)]

    def test_gone_from_the_code_it_rests(self, transactional_db: None, tmp_path: Path):
        env = SITE | {"GEARMAN_TEST_SCHEDULE": f"1@{tmp_path / 'lines'}"}
        with harness.server(env=env):
            pass
        with harness.server(env=SITE) as server:
            assert list(Schedule.objects.values_list("withdrawn", "next_at")) == [(True, None)]
            assert "the code declares it no more" in server.stderr

    def test_a_cron_that_is_none_stops_the_start(self, transactional_db: None):
        done = start(SITE | {"GEARMAN_TEST_SCHEDULE": "61 * * * *@x"})
        assert done.returncode == 1
        assert "(django_gearman.E006)" in done.stderr
        assert f"The schedule of {NAME} does not work: the cron '61 * * * *' cannot be read" in done.stderr
        assert "Traceback" not in done.stderr


class TestWithoutCronsim:
    ENV = SITE | {"GEARMAN_TEST_NO_CRONSIM": "1"}

    def test_intervals_need_nothing(self, transactional_db: None, tmp_path: Path):
        with harness.server(env=self.ENV | {"GEARMAN_TEST_SCHEDULE": f"1@{tmp_path / 'lines'}"}):
            harness.wait_until(times, 60.0, "a job")

    @pytest.mark.parametrize("of_the_code", [False, True])
    def test_crons_stop_the_start_with_the_remedy(self, transactional_db: None, of_the_code: bool):
        if not of_the_code:
            Schedule.objects.create(name="n", function="f", cron="* * * * *")
        done = start(self.ENV | ({"GEARMAN_TEST_SCHEDULE": "* * * * *@x"} if of_the_code else {}))
        assert done.returncode == 1
        assert "pip install cronsim (our extra [schedules];" in done.stderr
        assert "Traceback" not in done.stderr


class TestPruning:
    def test_a_server_deletes_what_is_old(self, transactional_db: None):
        old = timezone.now() - timedelta(days=8)
        young = timezone.now() - timedelta(days=6)
        for ended in (old, young):
            JobRecord.objects.bulk_create(
                JobRecord(function="f", status=status, finished_at=ended, enqueued_at=ended)
                for status in ("SUCCESSFUL", "FAILED")
                for _ in range(700)
            )
        JobRecord.objects.create(
            function="f", status="SCHEDULED", enqueued_at=old, run_after=timezone.now() + 60 * SECOND
        )
        with harness.server(env=SITE):
            harness.wait_until(lambda: JobRecord.objects.count() == 2101, 60.0, "the pruning")
        assert not JobRecord.objects.filter(status="SUCCESSFUL", finished_at__lt=young).exists()
