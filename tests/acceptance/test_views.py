"""What a view that calls jobs feels of the job server, and what it leaves behind."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from statistics import median
from time import monotonic, perf_counter
from typing import Any

import pytest
from django.test import Client as Browser

from django_gearman import JobResult
from django_gearman.client import sync
from django_gearman.client.servers import CIRCUIT
from django_gearman.client.sync import NUDGE_TIMEOUT
from django_gearman.models import JobRecord
from django_gearman.submission import client_for
from tests import harness
from tests.app.jobs import add

from .conftest import SITE

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]

Status = JobRecord.Status
CALLS = 60


@pytest.fixture(autouse=True)
def _site(settings: Any) -> None:
    settings.ROOT_URLCONF = "tests.acceptance.site.urls"


def call_views(first: int) -> list[float]:
    """Seconds that each of some requests took."""
    browser = Browser()
    seconds = []
    for number in range(first, first + CALLS):
        started = perf_counter()
        response = browser.get("/enqueue/", {"left": number})
        seconds.append(perf_counter() - started)
        assert response.status_code == 200
        assert response.json()["left"] == number
    return seconds


def assert_no_waiting(seconds: list[float], with_server: list[float]) -> None:
    """Calls took what they take with a server; on a busy machine one or the other may be late."""
    assert median(seconds) < 3 * median(with_server) + NUDGE_TIMEOUT / 2


def assert_results(count: int) -> None:
    harness.wait_until(
        lambda: JobRecord.objects.filter(status=Status.SUCCESSFUL).count() == count, what=f"{count} ends"
    )
    for record in JobRecord.objects.all():
        result = add.get_result(str(record.pk))
        assert result.return_value == int(bytes(record.workload).split(b"[")[1].split(b"]")[0]) + 1


class TestTransaction:
    def test_view_that_raises_leaves_no_job(self, database_server: harness.GearmanServerProcess):
        response = Browser(raise_request_exception=False).get("/enqueue-and-raise/")

        assert response.status_code == 500
        assert not JobRecord.objects.exists()
        # The next one is not disturbed by it.
        assert Browser().get("/enqueue/", {"left": 1}).status_code == 200
        assert JobRecord.objects.count() == 1


class TestGet:
    """``JobResult.get`` right after ``enqueue``."""

    def test_is_told_when_the_record_has_the_end(self, site_server: harness.GearmanServerProcess):
        told = 0
        with harness.worker(site_server, processes=1, env=SITE) as worker:
            worker.wait_connected()
            for number in range(20):
                result = add.enqueue(number)
                with closing(client_for().watch(result.id)) as watch:
                    if watch.wait(10.0):
                        told += 1
                        result.refresh()
                        assert result.is_finished
                assert result.get(timeout=20) == number + 1
        # The server is asked before the job is claimed, but for a caller that is held up.
        assert told >= 15

    def claimed_by(self, prefix: str) -> JobResult[int]:
        """A job of the server whose handles begin so; others look at the door once a second."""
        for _ in range(20):
            result = add.enqueue(1)
            record = JobRecord.objects.filter(pk=result.id).exclude(handle=None)
            if harness.wait_until(record.first, what="a claim").handle.startswith(prefix):
                return result
        raise AssertionError("another server was quicker each time")

    def test_of_a_job_that_another_server_has(self, site_server: harness.GearmanServerProcess, settings: Any):
        """The first of the servers is told of the row, and another one has claimed it."""
        with harness.server(name="other", env=SITE) as other:
            address = settings.GEARMAN["default"]["SERVERS"][0]
            settings.GEARMAN = other.setting
            result = self.claimed_by("H:other:")
            settings.GEARMAN = {"default": {"SERVERS": [address, other.address]}}
            with harness.worker(other, processes=1, env=SITE):
                assert result.get(timeout=20) == 2


class TestServerOutOfReach:
    def test_view_does_not_notice_that_the_server_is_down(self, settings: Any):
        server = harness.GearmanServerProcess(env=SITE)
        settings.GEARMAN = server.setting
        with server, harness.worker(server, processes=1, env=SITE):
            with_server = call_views(0)
            assert_results(CALLS)
            server.stop()

            without = call_views(CALLS)
            assert JobRecord.objects.filter(status=Status.READY).count() == CALLS

            server.start()
            assert_results(2 * CALLS)
            assert_no_waiting(without, with_server)

    def test_view_does_not_notice_that_the_server_hangs(self, settings: Any):
        server = harness.GearmanServerProcess(env=SITE)
        settings.GEARMAN = server.setting
        with server, harness.worker(server, processes=1, env=SITE):
            with_server = call_views(0)
            assert_results(CALLS)
            server.signal(signal.SIGSTOP)
            try:
                hanging = call_views(CALLS)
            finally:
                server.signal(signal.SIGCONT)
            assert_results(2 * CALLS)
            assert_no_waiting(hanging, with_server)

    @pytest.fixture
    def black_hole(self) -> Iterator[int]:
        """A port that answers nothing, neither yes nor no: its line of waiting connections is full."""
        callers = []
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", harness.free_port()))
            listener.listen(0)
            port = listener.getsockname()[1]
            for _ in range(8):
                caller = socket.socket()
                callers.append(caller)
                caller.setblocking(False)
                caller.connect_ex(("127.0.0.1", port))
            yield port
            for caller in callers:
                caller.close()

    def test_view_does_not_wait_for_a_host_that_is_silent(
        self, black_hole: int, settings: Any, monkeypatch: pytest.MonkeyPatch
    ):
        settings.GEARMAN = {"default": {"SERVERS": [f"127.0.0.1:{black_hole}"]}}
        tried: list[tuple[float, float]] = []
        connect = sync.Connection

        def note(*args: Any, **options: Any) -> Any:
            tried.append((monotonic(), options["connect_timeout"]))
            return connect(*args, **options)

        monkeypatch.setattr(sync, "Connection", note)
        call_views(0)
        # Tried once in a while, not for each request, and given up soon.
        assert tried
        assert all(timeout <= NUDGE_TIMEOUT for _, timeout in tried)
        assert all(later - earlier >= CIRCUIT for (earlier, _), (later, _) in pairwise(tried))
        assert JobRecord.objects.filter(status=Status.READY).count() == CALLS

    def test_jobs_that_nobody_told_of_are_found(self, settings: Any):
        """The views lead to a port where nobody listens: the server has to look by itself."""
        with harness.server(env=SITE) as server, harness.worker(server, processes=1, env=SITE) as worker:
            worker.wait_connected()
            call_views(0)
            assert_results(CALLS)
