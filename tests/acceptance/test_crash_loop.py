"""The server killed again and again under load; and a look at when it syncs."""

from __future__ import annotations

import os
import random
import re
import subprocess
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from django.db import OperationalError, connection
from django.db.models import QuerySet

from django_gearman.client.connection import Connection
from django_gearman.client.core import ClientProtocol, JobRequest
from django_gearman.exceptions import ConnectionFailed, ConnectionLost
from django_gearman.models import JobRecord
from tests import harness

from .conftest import SITE, Trace, missing, program
from .site.jobs import leave_trace
from .test_crashes import name_in, names_by_handle

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]

Status = JobRecord.Status
CYCLES = int(os.environ.get("GEARMAN_CRASH_CYCLES", "4"))
AHEAD = 20


class Submitter(threading.Thread):
    """Pipelines background jobs until it is told to stop; every second one has a unique of its own."""

    def __init__(self, port: int, trace: Trace, number: int, stop: threading.Event) -> None:
        super().__init__(name=f"submitter {number}")
        self._port = port
        self._trace = trace
        self._number = number
        self._stop_wanted = stop
        self._serial = 0
        self.acknowledged: dict[str, str] = {}
        """{handle: name}"""
        self.submitted = 0
        self.refused: list[tuple[bytes, bytes]] = []

    def run(self) -> None:
        while not self._stop_wanted.is_set():
            try:
                connection = Connection("127.0.0.1", self._port)
            except ConnectionFailed:
                self._stop_wanted.wait(0.01)
                continue
            try:
                while not self._stop_wanted.is_set():
                    self._submit_some(connection)
            except ConnectionLost:
                pass
            finally:
                connection.close()

    def _submit_some(self, connection: Connection) -> None:
        protocol = ClientProtocol()
        requests = dict(self._request() for _ in range(AHEAD))
        self.submitted += AHEAD
        try:
            connection.send(b"".join(protocol.submit(each) for each in requests.values()))
            while any(each.handle is None and each.error is None for each in requests.values()):
                protocol.receive(connection.receive(None))
        finally:
            for name, request in requests.items():
                if request.handle is not None:
                    self.acknowledged[request.handle.decode()] = name
                elif request.error is not None:
                    self.refused.append(request.error)

    def _request(self) -> tuple[str, JobRequest]:
        self._serial += 1
        name = f"wire-{self._number}-{self._serial}"
        unique = name.encode() if self._serial % 2 else b""
        return name, JobRequest(
            function=leave_trace.name.encode(),
            workload=self._trace.workload(name),
            unique=unique,
            background=True,
        )


class Enqueuer(threading.Thread):
    """Inserts rows at the database door, one after the other."""

    def __init__(self, trace: Trace, stop: threading.Event) -> None:
        super().__init__(name="enqueuer")
        self._trace = trace
        self._stop_wanted = stop
        self.names: list[str] = []

    def run(self) -> None:
        number = 0
        try:
            while not self._stop_wanted.wait(0.01):
                number += 1
                try:
                    leave_trace.enqueue(self._trace.path, f"door-{number}")
                except OperationalError:
                    continue  # locked for too long: it was not enqueued, and whoever did was told
                self.names.append(f"door-{number}")
        finally:
            connection.close()


def workloads(records: QuerySet[JobRecord]) -> list[bytes]:
    return list(records.values_list("workload", flat=True))


class TestCrashLoop:
    @pytest.mark.timeout(60 + 10 * CYCLES)
    def test_nothing_that_was_acknowledged_is_lost(self, trace: Trace, settings: Any):
        dice = random.Random()
        stop = threading.Event()
        server = harness.GearmanServerProcess(name="the-server", env=SITE, options=["--job-retries", "0"])
        settings.GEARMAN = server.setting
        with server, harness.worker(server, processes=2, env=SITE) as worker:
            submitters = [Submitter(server.port, trace, number, stop) for number in range(4)]
            enqueuer = Enqueuer(trace, stop)
            for thread in (*submitters, enqueuer):
                thread.start()
            try:
                for _ in range(CYCLES):
                    wanted = sum(len(each.acknowledged) for each in submitters) + dice.randrange(400)
                    harness.wait_until(
                        lambda wanted=wanted: sum(len(each.acknowledged) for each in submitters) >= wanted,
                        60.0,
                        "acknowledgements",
                    )
                    if dice.random() < 0.2:
                        for pid in worker.children():
                            os.kill(pid, 9)
                    server.kill()
                    server.start()
            finally:
                stop.set()
                for thread in (*submitters, enqueuer):
                    thread.join(60)
            assert not any(thread.is_alive() for thread in (*submitters, enqueuer))
            acknowledged = {handle: name for each in submitters for handle, name in each.acknowledged.items()}
            kept = names_by_handle()
            missing = acknowledged.keys() - kept.keys()
            assert not missing, f"{len(missing)} of {len(acknowledged)} acknowledged jobs are not there"
            assert acknowledged.items() <= kept.items()
            # Rows that no server has yet have no handle.
            assert set(enqueuer.names) <= set(map(name_in, workloads(JobRecord.objects.all())))
            left = JobRecord.objects.filter(status__in=JobRecord.LIVE).count()
            # What waits still need not run for the proof: the records are what a crash may lose.
            JobRecord.objects.filter(status=Status.READY, server=None).delete()
            server.complaints_allowed = worker.complaints_allowed = True
        runs = Counter(trace.names())
        told = set(map(name_in, workloads(JobRecord.objects.filter(status=Status.SUCCESSFUL))))
        assert told <= set(runs), "a record tells of a run that was not"
        assert not JobRecord.objects.filter(status__in=JobRecord.FAILURES).exists()
        twice = sum(count - 1 for count in runs.values())
        print(
            f"{CYCLES} kills: {len(acknowledged)} acknowledged and {len(enqueuer.names)} enqueued, "
            f"none lost; {len(runs)} run, {twice} of them again, {left} wait"
        )


class TestSync:
    """SQLite: what was acknowledged is on the disk, and many share one trip to it."""

    def trace_syscalls(self, trace: Trace, log: Path, jobs: int) -> list[str]:
        """Calls of a server that takes ``jobs`` background jobs sent at once: ``sync`` and ``created N``."""
        server = harness.GearmanServerProcess(env=SITE)
        with server:
            tracer = subprocess.Popen(
                [
                    program("strace"),
                    *("-f", "-qq", "-s", "65536", "-xx", "-o", str(log)),
                    *("-e", "trace=fsync,fdatasync,write,writev,sendto,sendmsg"),
                    *("-p", str(server.pid)),
                ],
                stderr=subprocess.PIPE,
            )
            try:
                tasks = Path(f"/proc/{server.pid}/task")
                harness.wait_until(
                    lambda: (
                        tracer.poll() is not None
                        or all(
                            "TracerPid:\t0" not in (task / "status").read_text() for task in tasks.iterdir()
                        )
                    ),
                    what="strace",
                )
                if tracer.poll() is not None:
                    assert tracer.stderr is not None
                    missing(f"nobody may be traced here: {tracer.stderr.read().decode()}")
                self.submit(server.port, trace, jobs)
            finally:
                tracer.terminate()
                tracer.communicate()
        calls = []
        header = re.escape("".join(f"\\x{byte:02x}" for byte in b"\0RES\0\0\0\x08"))
        for line in log.read_text().splitlines():
            # One that another thread interrupts is done where it is resumed.
            if re.search(r"\bf(data)?sync(\(.*\)| resumed)", line):
                calls.append("sync")
            elif found := re.findall(header, line):
                calls.append(f"created {len(found)}")
        return calls

    def submit(self, port: int, trace: Trace, jobs: int) -> None:
        connection = Connection("127.0.0.1", port)
        protocol = ClientProtocol()
        requests = [
            JobRequest(function=b"nobody's", workload=trace.workload(str(number)), background=True)
            for number in range(jobs)
        ]
        try:
            connection.send(b"".join(protocol.submit(each) for each in requests))
            while any(each.handle is None for each in requests):
                protocol.receive(connection.receive(None))
        finally:
            connection.close()

    @pytest.mark.skipif(connection.vendor != "sqlite", reason="other databases sync by themselves")
    def test_no_acknowledgement_leaves_before_a_sync(self, trace: Trace, tmp_path: Path):
        calls = self.trace_syscalls(trace, tmp_path / "strace", 200)
        created = [int(call.split()[1]) for call in calls if call.startswith("created")]
        assert sum(created) == 200
        first = next(index for index, call in enumerate(calls) if call.startswith("created"))
        assert "sync" in calls[:first], calls
        # Each part of the answers follows a sync of its own.
        waiting_for_sync = True
        for call in calls:
            if call == "sync":
                waiting_for_sync = False
            else:
                assert not waiting_for_sync, calls
        last = max(index for index, call in enumerate(calls) if call.startswith("created"))
        assert calls[:last].count("sync") <= 10, calls
