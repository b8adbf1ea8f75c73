"""Jobs that take too long, too much memory or their process with them."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from django_gearman.exceptions import JobFailed
from django_gearman.models import JobRecord
from tests import harness
from tests.app import jobs

from .conftest import SITE
from .site import pools

Server = harness.GearmanServerProcess
Status = JobRecord.Status

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]


def told(result: Any, limit: float = 20.0) -> str:
    """Why the job failed."""
    with pytest.raises(JobFailed) as caught:
        result.get(timeout=limit)
    return caught.value.message


def settings_of_worker(**options: Any) -> dict[str, str]:
    return SITE | {"GEARMAN_TEST_SETTINGS": json.dumps(options)}


class TestTime:
    def test_soft_limit_ends_the_function_wherever_it_is(self, site_server: Server, tmp_path: Path):
        with harness.worker(site_server, processes=4, env=SITE) as worker:
            worker.wait_connected()
            children = worker.children()
            results = [
                jobs.sleep_long.enqueue(),
                jobs.pass_over_everything.enqueue(),
                pools.join_thread.enqueue(),
            ]
            cleaned = pools.clean_up.enqueue(str(tmp_path / "cleaned"))
            for result in results:
                assert told(result) == "the job took longer than 1 s"
            assert cleaned.get(timeout=30) == "cleaned up"
            # In none of them a process was lost.
            assert worker.children() == children
        assert (tmp_path / "cleaned").exists()

    @pytest.mark.parametrize("options", [[], ["--concurrency", "3"]])
    def test_an_async_def_ends_as_it_wants_to(self, options: list[str], site_server: Server, tmp_path: Path):
        """Where it hears of the limit at an ``await``, and goes on: as any other function."""
        with harness.worker(site_server, processes=2, options=options, env=SITE):
            cleaned = pools.clean_up_as_task.enqueue(str(tmp_path / "cleaned"), "")
            failed = pools.clean_up_as_task.enqueue(str(tmp_path / "failed"), "no")
            passed = pools.sleep_as_task.enqueue()
            assert cleaned.get(timeout=30) == "cleaned up"
            assert told(failed) == "no"
            assert told(passed) == "the job took longer than 1 s"
        assert {path.read_text() for path in tmp_path.iterdir()} == {"CancelledError"}

    def test_hard_limit_kills_what_goes_on_and_no_other(self, site_server: Server, tmp_path: Path):
        with harness.worker(site_server, processes=3, env=SITE) as worker:
            held = pools.hold.enqueue(str(tmp_path), "held")
            results = [jobs.hang_in_c.enqueue(), pools.pass_over_base_exceptions.enqueue()]
            for result in results:
                assert told(result) == "Time limit of 1 s: killed at the last of 1 attempts"
                assert (result.status, result.attempts) == (Status.DEAD, 1)
            (tmp_path / "go").touch()
            assert held.get(timeout=30)
            assert held.attempts == 1
            # It showed where it hung.
            assert "in hang_in_c" in worker.stderr

    def test_default_limit(self, site_server: Server):
        with harness.worker(site_server, processes=1, env=settings_of_worker(JOB_TIMEOUT=1)):
            assert told(pools.sleep_for.enqueue(30)) == "the job took longer than 1 s"
            assert pools.sleep_for.enqueue(0).get(timeout=30)


class TestDeath:
    def test_record_says_of_what_the_process_died(self, site_server: Server):
        with harness.worker(site_server, processes=2, env=SITE) as worker:
            results = {
                "killed by SIGKILL": jobs.kill_worker_twice.enqueue(),
                "killed by SIGSEGV": pools.segfault.enqueue(),
                "exit status 7": pools.exit_hard.enqueue(7),
                "exit status 0": pools.exit_hard.enqueue(0),
            }
            for cause, result in results.items():
                assert told(result).startswith(f"The worker was lost: {cause} at the last of ")
                assert all(cause in error.message for error in result.errors)
            harness.wait_until(lambda: len(worker.children()) == 2, 60.0, "as many processes as before")

    def test_keyboard_interrupt_of_a_function_ends_its_job_alone(self, site_server: Server):
        with harness.worker(site_server, processes=1, env=SITE) as worker:
            worker.wait_connected()
            children = worker.children()
            result = pools.interrupt_itself.enqueue()
            assert told(result) == "its own"
            assert (result.status, result.attempts) == (Status.FAILED, 1)
            assert jobs.add.enqueue(1).get(timeout=30) == 2
            assert worker.children() == children

    def test_next_job_does_not_wait(self, site_server: Server):
        with harness.worker(site_server, processes=1, env=SITE) as worker:
            worker.wait_connected()
            told(pools.segfault.enqueue())
            assert jobs.add.enqueue(1).get(timeout=30) == 2
        assert "another starts in 0 s" in worker.stderr


class TestRecycling:
    def test_after_so_many_jobs(self, site_server: Server):
        options = ["--max-jobs", "3"]
        with harness.worker(site_server, processes=1, options=options, env=SITE) as worker:
            results = [pools.sleep_for.enqueue(0) for _ in range(10)]
            counts = Counter(result.get(timeout=20) for result in results)
            assert max(counts.values()) == 3
            assert all(result.attempts == 1 for result in results)
            assert "another starts" not in worker.stderr
            assert "ends after 3 jobs, its limit (--max-jobs)" in worker.stderr

    @pytest.mark.parametrize("limit", ["+60", "400,+60"])
    def test_of_one_that_grows(self, site_server: Server, limit: str):
        options = ["--max-memory", limit]
        with harness.worker(site_server, processes=1, options=options, env=SITE) as worker:
            results = [pools.leak.enqueue(25) for _ in range(9)]
            counts = Counter(result.get(timeout=20) for result in results)
            assert max(counts.values()) == 3
            assert all(result.attempts == 1 for result in results)
            assert re.search(r"ends with \d+ MiB, more than its limit, \d+ \(--max-memory\)", worker.stderr)

    def test_limit_below_what_a_process_begins_with_replaces_none(self, site_server: Server):
        options = ["--max-memory", "1"]
        with harness.worker(site_server, processes=1, options=options, env=SITE) as worker:
            worker.wait_connected()
            pids = {pools.sleep_for.enqueue(0).get(timeout=20) for _ in range(5)}
            assert pids == set(worker.children())


def test_process_that_cannot_begin_ends_the_command(site_server: Server, tmp_path: Path):
    (tmp_path / "setproctitle.py").write_text(
        "def setproctitle(text):\n    'supervisor' in text or no_such\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    worker = harness.WorkerProcess(site_server, processes=2, env=SITE | {"PYTHONPATH": path})
    with worker:
        assert worker.wait() == 1
        assert "CommandError: A worker process cannot start: NameError: name 'no_such'" in worker.stderr
        assert worker.stderr.count("could not begin") <= 2
        worker.forget()
