"""What the records say of jobs that foreign clients handed in, or foreign workers ran."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest

from django_gearman import Client
from django_gearman.models import JobRecord
from tests import harness
from tests.acceptance.conftest import call, program

from .languages import SCRIPTS, ForeignWorker, OurClient, ScriptClient, start_worker

pytestmark = [pytest.mark.acceptance, pytest.mark.foreign]

Status = JobRecord.Status
Start = Callable[[list[str]], "subprocess.Popen[bytes]"]
Server = harness.GearmanServerProcess


def gearman(server: Server, *options: str) -> list[str]:
    return [program("gearman"), "-h", "127.0.0.1", "-p", str(server.port), *options]


def wait_for_worker(server: Server, function: str, count: int = 1) -> None:
    harness.wait_until(
        lambda: server.status().get(function, (0, 0, 0))[2] == count, what=f"{count} workers for {function}"
    )


def wait_for_end(**filters: object) -> JobRecord:
    """The one job of the test, once it ended."""
    records = JobRecord.objects.filter(**filters)
    harness.wait_until(lambda: records.exclude(status__in=JobRecord.LIVE).exists(), what="the job's end")
    return records.get()


class TestGearmanAsClient:
    """``gearman`` without -w, our server, our worker."""

    def test_foreground(self, site_server: Server):
        with harness.worker(site_server, processes=1):
            done = call(gearman(site_server, "-f", "shout"), b"hello")
            assert done.stdout == b"HELLO"
            assert call(gearman(site_server, "-f", "shout", "as an argument")).stdout == b"AS AN ARGUMENT"
            assert call(gearman(site_server, "-s", "-f", "shout")).stdout == b""
            assert call(gearman(site_server, "-I", "-f", "shout"), b"high").stdout == b"HIGH"
            assert call(gearman(site_server, "-L", "-f", "shout"), b"low").stdout == b"LOW"

            # Every byte there is, and more than any buffer on the way. (The program
            # itself takes half a minute to read 8 MB: see TestPerl for those.)
            every_byte = bytes(range(256))
            assert call(gearman(site_server, "-f", "shout"), every_byte).stdout == every_byte.upper()
            large = random.Random(1).randbytes(1024 * 1024)
            assert call(gearman(site_server, "-f", "shout"), large).stdout == large.upper()

            records = JobRecord.objects.filter(function="shout", background=False)
            harness.wait_until(lambda: records.filter(status=Status.SUCCESSFUL).count() == 7)
            assert list(records.order_by("id").values_list("priority", flat=True)) == [0, 0, 0, 50, -50, 0, 0]

    def test_one_job_per_line(self, site_server: Server):
        with harness.worker(site_server, processes=1):
            lines = b"".join(b"line %d\n" % number for number in range(20))
            assert call(gearman(site_server, "-n", "-f", "shout"), lines).stdout == lines.upper()

            record = JobRecord.objects.filter(function="shout")
            harness.wait_until(lambda: record.filter(status=Status.SUCCESSFUL).count() == 20)

    def test_background(self, site_server: Server):
        call(gearman(site_server, "-b", "-f", "shout"), b"later")
        record = JobRecord.objects.get()
        assert (record.status, record.background, bytes(record.workload)) == (Status.READY, True, b"later")

        with harness.worker(site_server, processes=1):
            record = wait_for_end()
        assert record.status == Status.SUCCESSFUL
        assert bytes(record.result or b"") == b"LATER"
        assert record.attempts == 1

    def test_equal_uniques_are_one_job(self, site_server: Server):
        for text in (b"first", b"second"):
            call(gearman(site_server, "-b", "-u", "same", "-f", "shout"), text)
        assert bytes(JobRecord.objects.get(unique="same").workload) == b"first"

    def test_failure(self, site_server: Server):
        workload = json.dumps({"args": ["no luck"], "kwargs": {}}).encode()
        with harness.worker(site_server, processes=1):
            call(gearman(site_server, "-f", "tests.app.jobs.fail"), workload, code=None)
            record = wait_for_end()
        assert (record.status, record.exception, record.message) == (
            Status.FAILED,
            "builtins.ValueError",
            "no luck",
        )


class TestGearmanAsWorker:
    """``gearman -w``, our server, our client."""

    def test_jobs_of_our_client(self, site_server: Server, background_program: Start):
        background_program(gearman(site_server, "-w", "-f", "upper", "tr", "a-z", "A-Z"))
        wait_for_worker(site_server, "upper")

        with Client([site_server.address]) as client:
            assert client.do("upper", b"hello", timeout=30) == b"HELLO"
            handle = client.do_background("upper", b"later")
        record = wait_for_end(handle=handle)
        assert (record.status, bytes(record.result or b"")) == (Status.SUCCESSFUL, b"LATER")

    def test_killed_worker_leaves_its_job_to_the_next(
        self, site_server: Server, background_program: Start, tmp_path: Path
    ):
        # The first says that it has the job, and reads what nobody writes until the test ends.
        busy, never = tmp_path / "busy", tmp_path / "never"
        os.mkfifo(never)
        script = tmp_path / "script"
        script.write_text(f"touch {busy}; exec cat {never}")
        first = background_program(gearman(site_server, "-w", "-f", "upper", "sh", str(script)))
        with Client([site_server.address]) as client:
            handle = client.do_background("upper", b"late")
            harness.wait_until(busy.exists, what="the first worker's start")
            assert client.job_status(handle).running
            background_program(gearman(site_server, "-w", "-f", "upper", "tr", "a-z", "A-Z"))
            wait_for_worker(site_server, "upper", 2)
            first.kill()
        record = wait_for_end(handle=handle)
        assert (record.status, record.attempts) == (Status.SUCCESSFUL, 2)
        assert bytes(record.result or b"") == b"LATE"
        # What the killed program had started ends here.
        os.close(os.open(never, os.O_WRONLY))


class TestScripts:
    """PHP, Perl and C, our server, our worker."""

    @pytest.mark.parametrize("language", SCRIPTS)
    def test_handle_leads_to_the_record(self, site_server: Server, language: str):
        client = ScriptClient(language)
        unique = f"photo 7 of {language}"
        handle = client.background(site_server, "shout", b"later", priority="high", unique=unique)
        record = JobRecord.objects.get(handle=handle)
        assert (record.status, record.priority, record.unique) == (Status.READY, 50, unique)
        with harness.worker(site_server, processes=1):
            record = wait_for_end(handle=handle)
        assert (record.status, bytes(record.result or b"")) == (Status.SUCCESSFUL, b"LATER")

    def test_large_binary_workload(self, site_server: Server):
        large = random.Random(1).randbytes(8 * 1024 * 1024)
        with harness.worker(site_server, processes=1):
            handle = ScriptClient("perl").background(site_server, "shout", large)
            record = wait_for_end(handle=handle)
        assert record.status == Status.SUCCESSFUL
        assert bytes(record.workload) == large
        assert bytes(record.result or b"") == large.upper()

    def test_job_for_later(self, site_server: Server):
        client = ScriptClient("c")
        handle = client.ask(site_server, "epoch", "4102444800", "shout", "u", workload=b"x")
        record = JobRecord.objects.get(handle=handle)
        assert (record.status, record.run_after) == (Status.SCHEDULED, datetime(2100, 1, 1, tzinfo=UTC))

    @pytest.mark.parametrize("language", ["php", "perl", "c"])
    def test_failures_of_foreign_workers(self, site_server: Server, language: str, stack: ExitStack):
        start_worker(stack, language, site_server)
        handles = {
            name: OurClient().background(site_server, f"{language}.{name}", b"abc")
            for name in ("fail", "throw", "reverse")
        }
        ended = {name: wait_for_end(handle=handle) for name, handle in handles.items()}
        assert ended["fail"].status == ended["throw"].status == Status.FAILED
        assert "no luck" in ended["throw"].message
        assert (ended["reverse"].status, bytes(ended["reverse"].result or b"")) == (Status.SUCCESSFUL, b"cba")

    def test_perl_worker_goes_on_after_it_died(self, site_server: Server, stack: ExitStack):
        worker = start_worker(stack, "perl", site_server)
        for _ in range(3):
            handle = OurClient().background(site_server, "perl.die")
            record = wait_for_end(handle=handle)
            # Its exception is in a form of Perl's own.
            assert (record.status, record.attempts) == (Status.FAILED, 1)
            assert "no luck" in record.message
        handle = OurClient().background(site_server, "perl.reverse", b"abc")
        assert bytes(wait_for_end(handle=handle).result or b"") == b"cba"
        assert isinstance(worker, ForeignWorker)
        assert worker.is_alive
        assert worker.stderr.count("died: no luck") == 3
