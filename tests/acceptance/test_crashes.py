"""A thousand jobs, and everything that runs them killed on the way."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from typing import Any

import pytest
from django.db import transaction

from django_gearman.client.connection import Connection
from django_gearman.client.core import ClientProtocol, JobRequest
from django_gearman.exceptions import ConnectionFailed, ConnectionLost
from django_gearman.models import JobRecord
from tests import harness

from .conftest import SITE, Trace
from .site.jobs import leave_trace

pytestmark = pytest.mark.acceptance

Status = JobRecord.Status


class PipeliningClient(threading.Thread):
    """
    Submits background jobs, many before it reads an answer; submits again what was not acknowledged.

    Args:
        names: One job each.
        ahead: How many submissions may wait for their answers.
    """

    def __init__(self, port: int, trace: Trace, names: list[str], ahead: int = 25) -> None:
        super().__init__()
        self._port = port
        self._trace = trace
        self._left = names
        self._ahead = ahead
        self.acknowledged: dict[str, str] = {}
        """{handle: name}"""
        self.refused: list[tuple[bytes, bytes]] = []
        self.unanswered = 0
        """Submissions whose answer never came; the server may have kept them."""

    def run(self) -> None:
        while self._left:
            self._submit(harness.wait_until(self._connected, harness.START_LIMIT, "the job server"))

    def _connected(self) -> Connection | None:
        try:
            return Connection("127.0.0.1", self._port)
        except ConnectionFailed:
            return None

    def _submit(self, connection: Connection) -> None:
        protocol = ClientProtocol()
        try:
            while self._left:
                requests = {name: self._request(name) for name in self._left[: self._ahead]}
                try:
                    connection.send(b"".join(protocol.submit(each) for each in requests.values()))
                    while any(each.handle is None and each.error is None for each in requests.values()):
                        protocol.receive(connection.receive(None))
                finally:
                    self._note(requests)
        except ConnectionLost:
            pass  # the next connection submits what is left
        finally:
            connection.close()

    def _request(self, name: str) -> JobRequest:
        return JobRequest(
            function=leave_trace.name.encode(), workload=self._trace.workload(name), background=True
        )

    def _note(self, requests: dict[str, JobRequest]) -> None:
        for name, request in requests.items():
            if request.handle is not None:
                self.acknowledged[request.handle.decode()] = name
                self._left.remove(name)
            elif request.error is not None:
                self.refused.append(request.error)
            else:
                self.unanswered += 1


def name_in(workload: bytes) -> str:
    """The name that a job was given."""
    return str(json.loads(bytes(workload))["args"][1])


def names_by_handle() -> dict[str | None, str]:
    """{handle: name of the job} of every record."""
    records = JobRecord.objects.filter(function=leave_trace.name)
    return {record.handle: name_in(record.workload) for record in records}


def unrecorded(trace: Trace) -> set[str]:
    """Names of the jobs that ran, while their record does not say so."""
    done = JobRecord.objects.filter(status=Status.SUCCESSFUL).values_list("workload", flat=True)
    return set(trace.names()) - set(map(name_in, done))


def assert_told_truly(names: set[str], trace: Trace) -> list[str]:
    """Every job ran and its record says so; names of those that ran twice, once for each time."""
    counts = Counter(trace.names())
    records = list(JobRecord.objects.all())
    never = names - set(counts)
    assert not never, [
        (each.handle, each.status, each.attempts, each.message, [*each.past_attempts.values()])
        for each in records
        if name_in(each.workload) in never
    ]
    assert set(counts) == names

    assert {record.status for record in records} == {Status.SUCCESSFUL}
    handles = [record.handle for record in records]
    assert None not in handles
    assert len(set(handles)) == len(handles)
    for record in records:
        assert record.attempts >= 1, record.pk
        assert record.server is not None
        assert record.worker
        moments = [record.enqueued_at, record.started_at, record.last_attempted_at, record.finished_at]
        assert None not in moments, record.pk
        assert moments == sorted(moments), (record.pk, moments)
        assert int(record.result or b"0") > 0
    return list((counts - Counter(dict.fromkeys(counts, 1))).elements())


def wait_for_runs(trace: Trace, count: int, limit: float = 60.0) -> None:
    harness.wait_until(lambda: len(trace.names()) >= count, limit, f"{count} runs")


def all_recorded() -> bool:
    return not JobRecord.objects.filter(status__in=JobRecord.LIVE).exists()


@pytest.mark.django_db(transaction=True)
class TestThousandJobs:
    def test_survive_every_kill(self, trace: Trace, settings: Any):
        # What was lost is the next, and may be in hand at every kill: three would be the end of it.
        server = harness.GearmanServerProcess(name="the-server", options=["--job-retries", "0"], env=SITE)
        workers = [harness.WorkerProcess(server, processes=2, env=SITE) for _ in range(2)]
        settings.GEARMAN = server.setting
        with server, workers[0], workers[1]:
            enqueued = [f"enqueued-{number}" for number in range(500)]
            wired = [f"wired-{number}" for number in range(500)]
            clients = [PipeliningClient(server.port, trace, wired[part::2]) for part in range(2)]
            for client in clients:
                client.start()
            for start in range(0, 500, 50):
                with transaction.atomic():
                    for name in enqueued[start : start + 50]:
                        leave_trace.enqueue(trace.path, name)
                if start == 200:
                    # While jobs come in by both doors, and run.
                    wait_for_runs(trace, 20)
                    server.kill()
                    server.start()
            for client in clients:
                client.join(60)
                assert not client.is_alive()
                assert not client.refused
            acknowledged = {
                handle: name for client in clients for handle, name in client.acknowledged.items()
            }
            assert len(acknowledged) == 500
            unanswered = sum(client.unanswered for client in clients)
            # On disk is what was acknowledged, and perhaps what was sent again because no answer came.
            assert acknowledged.items() <= names_by_handle().items()
            assert 1000 <= JobRecord.objects.count() <= 1000 + unanswered

            # In the middle of the runs.
            wait_for_runs(trace, 300)
            server.kill()
            server.start()

            wait_for_runs(trace, 450)
            for worker in workers:
                for pid in worker.children():
                    os.kill(pid, signal.SIGKILL)
            wait_for_runs(trace, 600)
            workers[1].kill()
            workers[1].start()

            harness.wait_until(all_recorded, 60.0, "the end of all jobs")
            server.complaints_allowed = True

        repeated = assert_told_truly(set(enqueued + wired), trace)
        print(f"{len(repeated)} jobs ran again; {unanswered} submissions had no answer")
        # How many depends on what the journal had in hand at each death; which of them, the next test tells.
        assert len(repeated) < len(enqueued + wired) / 2 + unanswered

    def test_what_runs_again_is_what_was_not_recorded(self, trace: Trace, settings: Any):
        """
        A server's death repeats the jobs in hand and those whose end was not yet on disk; no other.

        But for the last result of each worker: it could not know that it had arrived, and told it again.
        """
        server = harness.GearmanServerProcess(name="the-server", env=SITE)
        worker = harness.WorkerProcess(server, processes=2, env=SITE)
        settings.GEARMAN = server.setting
        names = [f"enqueued-{number}" for number in range(200)]
        with transaction.atomic():
            for name in names:
                leave_trace.enqueue(trace.path, name)
        with server, worker:
            wait_for_runs(trace, 80)
            server.kill()
            harness.wait_until(
                lambda: worker.stderr.count("connecting again") == 2, what="two workers that noticed"
            )
            in_flight = unrecorded(trace)
            assert 0 < len(in_flight) < 100
            server.start()
            harness.wait_until(all_recorded, 60.0, "the end of all jobs")
        repeated = assert_told_truly(set(names), trace)
        assert set(repeated) <= set(in_flight)
        assert len(repeated) >= len(in_flight) - worker.processes

    def test_acknowledged_jobs_survive_a_stop_during_submission(self, trace: Trace):
        """TERM under load: exit code 0, and what was acknowledged is there."""
        server = harness.GearmanServerProcess(name="the-server", env=SITE)
        names = [f"wired-{number}" for number in range(4000)]
        with server:
            clients = [PipeliningClient(server.port, trace, names[part::2]) for part in range(2)]
            for client in clients:
                client.start()
            harness.wait_until(lambda: JobRecord.objects.count() >= 100, what="the first jobs")
            server.stop()
            assert server.stdout.endswith("gearman_server stopped.\n")
            acknowledged = {handle for client in clients for handle in list(client.acknowledged)}
            assert acknowledged
            kept = set(JobRecord.objects.values_list("handle", flat=True))
            assert acknowledged <= kept
            assert not JobRecord.objects.exclude(status=Status.READY).exists()

            # And after the restart those clients go on.
            server.start()
            for client in clients:
                client.join(60)
                assert not client.is_alive()
                assert not client.refused
            assert len(names_by_handle()) >= 4000
