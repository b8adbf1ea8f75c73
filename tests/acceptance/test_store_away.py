"""A database that hangs: whoever needs it waits up to a limit, everybody else is served as before."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import connections, transaction

from django_gearman.models import JobRecord, ServerLease
from django_gearman.protocol.packets import RESPONSE, PacketType, encode_request
from django_gearman.protocol.reader import PacketReader

from .. import harness

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]

P = PacketType
Status = JobRecord.Status


class Talker:
    """A connection that says packets and hears packets."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._reader = PacketReader(RESPONSE)

    def __enter__(self) -> Talker:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()

    def say(self, kind: P, *arguments: bytes) -> None:
        self._socket.sendall(encode_request(kind, *arguments))

    def hear(self) -> tuple[Any, ...]:
        while (packet := self._reader.take()) is None:
            data = self._socket.recv(65536)
            assert data, "the server closed the connection"
            self._reader.feed(data)
        return (P(packet[0]), *packet[1])

    @property
    def has_heard(self) -> bool:
        """Whether something came that was not looked at."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def ask(self, kind: P, *arguments: bytes) -> tuple[Any, ...]:
        self.say(kind, *arguments)
        return self.hear()


@contextmanager
def locked() -> Iterator[None]:
    """Hold what the server's every transaction needs: its lease, and on SQLite the whole file."""
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        try:
            with transaction.atomic():
                ServerLease.objects.update(address="held")
                held.set()
                release.wait(60)
        finally:
            connections.close_all()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(20)
        yield
    finally:
        release.set()
        thread.join()


def keep(server: harness.GearmanServerProcess, talker: Talker) -> None:
    """Leave a job in the hands of the server, which lays it at the store's door until it has looked there."""
    assert talker.ask(P.SUBMIT_JOB_BG, b"kept", b"", b"kept")[0] == P.JOB_CREATED
    harness.wait_until(lambda: "H:" in server.ask("show jobs"), what="the job in the server's hands")


def test_others_are_served_meanwhile() -> None:
    with (
        harness.server(options=["--store-timeout", "60"]) as server,
        Talker(server.port) as client,
        Talker(server.port) as other,
    ):
        keep(server, client)
        with locked():
            client.say(P.SUBMIT_JOB_BG, b"waits", b"", b"waits")
            harness.wait_until(lambda: "waits" in server.status(), what="the submission to arrive")
            assert other.ask(P.ECHO_REQ, b"here") == (P.ECHO_RES, b"here")
            assert server.status()["kept"] == (1, 0, 0)
            functions = {name: (lambda job, name=name: name.encode()) for name in ("kept", "front")}
            with harness.worker_thread(functions, server):
                _, handle = other.ask(P.SUBMIT_JOB, b"front", b"", b"front")
                assert other.hear() == (P.WORK_COMPLETE, handle, b"front")
                harness.wait_until(lambda: server.status()["kept"][0] == 0, what="the end of the job")
            assert not client.has_heard, "the others waited too"
        # It is back: what became of jobs is written, and who waited is answered.
        assert client.hear()[0] == P.JOB_CREATED
        record = JobRecord.objects.get(function="kept")
        harness.wait_until(
            lambda: (record.refresh_from_db(), record.status == Status.SUCCESSFUL)[1],
            60.0,
            "the kept outcome",
        )
        assert bytes(record.result or b"") == b"kept"


def test_a_submission_is_refused_after_a_limit() -> None:
    limit = 1.5
    with harness.server(options=["--store-timeout", str(limit)]) as server, Talker(server.port) as early:
        keep(server, early)
        with locked(), Talker(server.port) as client:
            asked = time.monotonic()
            client.say(P.SUBMIT_JOB_BG, b"refused", b"", b"refused")
            assert client.hear() == (P.ERROR, b"QUEUE_ERROR", b"The store is out of reach")
            assert time.monotonic() - asked >= limit - 1.1
            # The connection goes on.
            assert client.ask(P.ECHO_REQ, b"here") == (P.ECHO_RES, b"here")
        # It is back: submissions are taken.
        assert early.ask(P.SUBMIT_JOB_BG, b"later", b"", b"later")[0] == P.JOB_CREATED
        # What was refused is not there, or was undone.
        harness.wait_until(
            lambda: (
                set(JobRecord.objects.filter(function="refused").values_list("status", flat=True))
                <= {Status.CANCELLED}
            ),
            what="the refused submission to be undone",
        )
        assert server.status().get("refused", (0, 0, 0))[0] == 0


def test_the_log_says_so() -> None:
    with harness.server() as server, Talker(server.port) as client:
        keep(server, client)
        with locked():
            # The one of a database that waits for the lock, the other of one that refuses.
            words = ("The store has not answered", "The store does not take anything")
            harness.wait_until(lambda: any(word in server.stderr for word in words), 60.0, "a word on it")
        harness.wait_until(lambda: "The store answers again" in server.stderr, 60.0, "the end of it")


def test_too_much_waits() -> None:
    """A bound for what gathers in memory; the first waits for its time, the next is refused at once."""
    options = ["--store-timeout", "60", "--store-backlog", "1"]
    with (
        harness.server(options=options) as server,
        Talker(server.port) as client,
        Talker(server.port) as next,
    ):
        with locked():
            client.say(P.SUBMIT_JOB_BG, b"f", b"", bytes(800_000))
            harness.wait_until(lambda: "f" in server.status(), what="the submission to arrive")
            answer = next.ask(P.SUBMIT_JOB_BG, b"f", b"", bytes(800_000))
            assert answer == (P.ERROR, b"QUEUE_ERROR", b"Too much waits to be stored")
        assert client.hear()[0] == P.JOB_CREATED
        assert next.ask(P.SUBMIT_JOB_BG, b"f", b"", bytes(800_000))[0] == P.JOB_CREATED
        assert JobRecord.objects.filter(function="f").count() == 2
