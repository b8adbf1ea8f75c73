"""What jobs log: the words of ``packets.LOGS`` and ``LOG``, and how often they are recorded."""

from __future__ import annotations

import pytest

from django_gearman.protocol.packets import ATTEMPTS, LOGS, MAX_LOG, PacketType
from django_gearman.server import journal
from django_gearman.server.entries import (
    JobFinished,
    JobLogged,
    JobProgress,
    JobRequeued,
    JobStarted,
    Outcome,
    StoredJob,
)
from django_gearman.server.journal import Journal

from .harness import Caller, Wire

P = PacketType
HANDLE = b"H:test:1:r1"
STORED = StoredJob(HANDLE, b"f", b"", b"w", 0, 0, None)


@pytest.fixture
def wire() -> Wire:
    wire = Wire(durable=True)
    wire.core.adopt([STORED])
    return wire


def busy(wire: Wire) -> Caller:
    """A worker that was told that logs are kept, with the job."""
    worker = wire.worker(b"f")
    assert worker(P.OPTION_REQ, LOGS) == [(P.OPTION_RES, LOGS)]
    assert worker.grabs() == HANDLE
    assert [type(entry) for entry in wire.entries()] == [JobStarted]
    return worker


def says(worker: Caller, text: bytes, handle: bytes = HANDLE) -> None:
    assert worker(P.OPTION_REQ, b"log %s %s" % (handle, text)) == []


def passes(wire: Wire, seconds: float) -> None:
    wire.core.now += seconds
    wire.core.clock += seconds
    wire.core.tick()


@pytest.mark.parametrize("options", [{}, {"durable": True, "record_logs": False}])
def test_server_that_keeps_none_is_sent_none(options: dict[str, bool]):
    wire = Wire(**options)
    worker = wire.worker(b"f")
    for option in (LOGS, b"log H:1 line"):
        ((kind, code, _),) = worker(P.OPTION_REQ, option)
        assert (kind, code) == (P.ERROR, b"UNKNOWN_OPTION")


def test_lines_are_recorded_once_in_a_second_and_the_last_in_the_end(wire: Wire):
    worker = busy(wire)
    says(worker, b"one\0two\nthree")
    assert wire.entries() == [JobLogged(HANDLE, b"one\0two\nthree")]
    says(worker, b"four")
    passes(wire, 0.5)
    assert wire.entries() == []
    says(worker, b"five")
    worker(P.WORK_COMPLETE, HANDLE, b"")
    assert wire.entries() == [
        JobLogged(HANDLE, b"five"),
        JobFinished(HANDLE, Outcome.SUCCESSFUL, b"", "", wire.core.now),
    ]


def test_what_was_held_back_is_recorded_though_the_job_says_nothing_more(wire: Wire):
    worker = busy(wire)
    says(worker, b"one")
    worker(P.WORK_STATUS, HANDLE, b"1", b"9")
    says(worker, b"two")
    worker(P.WORK_STATUS, HANDLE, b"2", b"9")
    assert wire.entries() == [JobLogged(HANDLE, b"one"), JobProgress(HANDLE, b"1", b"9")]
    passes(wire, 1.0)
    assert wire.entries() == [JobProgress(HANDLE, b"2", b"9"), JobLogged(HANDLE, b"two")]
    passes(wire, 9.0)
    assert wire.entries() == []
    assert wire.core.results.unsaved == {}


def test_attempt_that_came_to_nothing_keeps_its_own(wire: Wire):
    worker = busy(wire)
    says(worker, b"one")
    says(worker, b"two")
    wire.entries()
    worker.leaves()
    (requeued,) = wire.entries()
    assert isinstance(requeued, JobRequeued)
    assert requeued.log == b"two"
    second = busy(wire)
    second(P.OPTION_REQ, ATTEMPTS)
    second(P.OPTION_REQ, b"retry 0 " + HANDLE)
    second(P.WORK_EXCEPTION, HANDLE, b"boom")
    (requeued,) = wire.entries()
    assert isinstance(requeued, JobRequeued)
    assert requeued.log == b""


def test_nothing_is_left_of_a_job_that_ended(wire: Wire):
    worker = busy(wire)
    says(worker, b"one")
    says(worker, b"two")
    wire.core.cancel(HANDLE)
    says(worker, b"three")
    assert isinstance(wire.entries()[-1], JobFinished)
    assert (wire.core.results.logs, wire.core.results.unsaved) == ({}, {})


def test_words_of_others_are_passed_over(wire: Wire):
    busy(wire)
    stranger = wire.worker(b"f")
    says(stranger, b"forged")
    says(stranger, b"", b"H:nobody")
    assert stranger(P.OPTION_REQ, b"log ") == []
    assert wire.entries() == []


def test_no_more_is_kept_than_a_record_has_room_for(wire: Wire):
    worker = busy(wire)
    says(worker, b"x" * MAX_LOG + b"the end")
    (logged,) = wire.entries()
    assert isinstance(logged, JobLogged)
    assert len(logged.log) == MAX_LOG
    assert logged.log.endswith(b"the end")


def test_foreground_job_without_a_record_is_not_logged():
    wire = Wire(durable=True, record_foreground=False)
    wire.connect()(P.SUBMIT_JOB, b"f", b"", b"")
    worker = wire.worker(b"f")
    handle = worker.grabs()
    assert handle is not None
    says(worker, b"one", handle)
    assert wire.entries() == []


def test_store_that_is_away_costs_memory_for_the_last_only(wire: Wire, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(journal, "COMPACT_AT", 100)
    waiting = Journal(wire.core)
    worker = busy(wire)
    for number in range(500):
        wire.core.now += 1
        says(worker, b"%d " % number + b"x" * 1000)
        waiting.append(wire.entries(), 0.0)
    assert waiting.held < 250_000
    batch = waiting.next_batch(0.0)
    assert batch is not None
    last = batch.entries[-1]
    assert isinstance(last, JobLogged)
    assert last.log.startswith(b"499 ")
    assert batch.weight == sum(1200 + len(b"%d " % (499 - n)) for n in range(len(batch.entries)))
