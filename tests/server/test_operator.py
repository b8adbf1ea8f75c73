"""What an operator's word does to jobs: cancel, on every way that a job may go."""

from __future__ import annotations

import pytest

from django_gearman.exceptions import StoreError
from django_gearman.protocol.packets import PacketType
from django_gearman.server import core
from django_gearman.server.entries import JobFinished, JobKept, JobQueued, JobStarted, Outcome
from django_gearman.server.job_store import MemoryStore
from django_gearman.server.journal import Journal

from .harness import Wire, handle

P = PacketType
REASON = "The job was cancelled"


def finished(number: int, reason: str = REASON) -> JobFinished:
    return JobFinished(handle(number), Outcome.CANCELLED, b"", reason, 1000.0)


@pytest.fixture(params=[False, True], ids=["in memory", "durable"])
def wire(request: pytest.FixtureRequest) -> Wire:
    return Wire(durable=request.param)


class TestWaitingJob:
    """PROTOCOL section 6, "Cancel", without gearmand's bugs."""

    def test_clients_hear_one_failure_at_once(self, wire: Wire):
        client, other, operator = wire.connect(), wire.connect(), wire.connect()
        client(P.SUBMIT_JOB, b"f", b"u", b"")
        other(P.SUBMIT_JOB, b"f", b"u", b"")
        wire.commit()
        assert operator.line(b"cancel job " + handle(1)) == b"OK\r\n"
        assert client.hears() == other.hears() == [(P.WORK_FAIL, handle(1))]
        assert wire.commit() == ([finished(1)] if wire.core.options.durable else [])
        assert client.hears() == other.hears() == []

    def test_nobody_gets_it(self, wire: Wire):
        client, worker = wire.connect(), wire.worker(b"f")
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        wire.commit()
        assert wire.core.cancel(handle(1))
        assert worker.grabs() == handle(2)
        assert worker.grabs() is None
        assert not wire.core.cancel(handle(1))
        if not wire.core.options.durable:  # else the store is asked
            assert client(P.GET_STATUS, handle(1))[-1] == (P.STATUS_RES, handle(1), b"0", b"0", b"0", b"0")

    def test_the_only_one_leaves_nothing_to_grab(self, wire: Wire):
        client, worker = wire.connect(), wire.worker(b"f")
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        wire.commit()
        assert wire.core.cancel(handle(1))
        assert worker(P.PRE_SLEEP) == []
        assert not wire.core.ready
        assert not wire.core.jobs

    def test_unique_is_free_again(self, wire: Wire):
        client = wire.connect()
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        wire.commit()
        client.hears()
        assert wire.core.cancel(handle(1))
        assert client(P.SUBMIT_JOB, b"f", b"u", b"") == [(P.JOB_CREATED, handle(2))]

    def test_job_for_later_never_becomes_due(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        client(P.SUBMIT_JOB_EPOCH, b"f", b"u", b"2000", b"")
        wire.commit()
        assert wire.core.cancel(handle(1))
        assert client.line(b"status").endswith(b"f\t0\t0\t1\n.\n")
        wire.core.now = 2001.0
        wire.core.tick()
        assert worker.grabs() is None

    def test_adopted_row(self, wire: Wire):
        store = MemoryStore()
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"", b"")
        store.write([JobQueued(b"H:r1", b"f", b"", b"", 5, True, b"", 0.0)], again=False)
        wire.core.adopt(store.resume())
        wire.core.window.claimed(store.claim(1, {}))
        assert wire.core.cancel(b"H:r1")
        assert [entry.handle for entry in wire.entries() if type(entry) is JobFinished] == [b"H:r1"]


class TestJobThatIsNotWrittenYet:
    """The record follows: JobQueued, then JobFinished."""

    def test_answered_and_ended(self):
        wire = Wire(durable=True)
        client, other = wire.connect(), wire.connect()
        assert client(P.SUBMIT_JOB_BG, b"f", b"u", b"") == []
        assert other(P.SUBMIT_JOB, b"f", b"u", b"") == []
        assert wire.core.cancel(handle(1))
        assert client.hears() == [(P.JOB_CREATED, handle(1))]
        assert other.hears() == [(P.JOB_CREATED, handle(1)), (P.WORK_FAIL, handle(1))]
        queued, *rest = wire.commit()
        assert type(queued) is JobQueued
        assert rest == [finished(1)]
        assert client.hears() == other.hears() == []
        assert wire.worker(b"f").grabs() is None

    def test_new_job_of_its_unique_is_another(self):
        wire = Wire(durable=True)
        client = wire.connect()
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        wire.core.cancel(handle(1))
        assert client(P.SUBMIT_JOB_BG, b"f", b"u", b"") == [(P.JOB_CREATED, handle(1))]
        entries = wire.commit()
        assert [(type(entry), entry.handle) for entry in entries] == [
            (JobQueued, handle(1)),
            (JobFinished, handle(1)),
            (JobQueued, handle(2)),
        ]
        assert client.hears() == [(P.JOB_CREATED, handle(2))]

    def test_under_way_to_the_store(self):
        wire = Wire(durable=True)
        journal, store = Journal(wire.core), MemoryStore()
        client = wire.connect()
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        journal.append(wire.entries(), 0.0)
        batch = journal.next_batch(0.0)
        assert wire.core.cancel(handle(1))
        batch.perform(store)
        journal.done(batch, 0.0)
        assert client.hears() == [(P.JOB_CREATED, handle(1))]
        assert not wire.core.jobs
        journal.append(wire.entries(), 0.0)
        batch = journal.next_batch(0.0)
        batch.perform(store)
        assert store.jobs == {}
        assert store.finished[handle(1)].outcome is Outcome.CANCELLED

    def test_store_out_of_reach(self):
        class Gone(MemoryStore):
            def write(self, entries, *, again):
                raise StoreError("gone")

        wire = Wire(durable=True)
        journal, store = Journal(wire.core, submit_limit=5.0), MemoryStore()
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"", b"")
        assert wire.core.cancel(handle(1))
        journal.append(wire.entries(), 0.0)
        batch = journal.next_batch(0.0)
        batch.perform(Gone())
        wire.core.clock = 1000.0
        journal.done(batch, 0.0)
        batch = journal.next_batch(10.0)
        batch.perform(store)
        journal.done(batch, 10.0)
        assert store.jobs == {}
        assert store.finished[handle(1)].outcome is Outcome.CANCELLED
        assert wire.worker(b"f").grabs() is None

    def test_wish_to_keep_a_foreground_job(self):
        wire = Wire(durable=True)
        client, keeper = wire.connect(), wire.connect()
        client(P.SUBMIT_JOB, b"f", b"u", b"")
        assert keeper(P.SUBMIT_JOB_BG, b"f", b"u", b"") == []
        assert wire.core.cancel(handle(1))
        assert keeper.hears() == [(P.JOB_CREATED, handle(1))]
        assert client.hears() == [(P.WORK_FAIL, handle(1))]
        assert [type(entry) for entry in wire.commit()] == [JobQueued, JobKept, JobFinished]


class TestRunningJob:
    """Clients are told once; the worker goes on, and nobody hears of it any more."""

    @pytest.mark.parametrize(
        ("kind", "arguments"),
        [
            (P.WORK_STATUS, [b"1", b"2"]),
            (P.WORK_DATA, [b"part"]),
            (P.WORK_WARNING, [b"careful"]),
            (P.WORK_COMPLETE, [b"result"]),
            (P.WORK_EXCEPTION, [b"boom"]),
            (P.WORK_FAIL, []),
        ],
    )
    def test_late_results_are_accepted_and_go_nowhere(self, wire: Wire, kind, arguments):
        client, worker = wire.connect(), wire.worker(b"f")
        client(P.OPTION_REQ, b"exceptions")
        client(P.SUBMIT_JOB, b"f", b"", b"")
        worker.grabs()
        assert wire.core.cancel(handle(1))
        assert client.hears() == [(P.WORK_FAIL, handle(1))]
        wire.commit()
        assert worker(kind, handle(1), *arguments) == []
        assert client.hears() == []
        assert wire.entries() == []

    def test_perls_two_last_packets(self, wire: Wire):
        client, worker = wire.connect(), wire.worker(b"f")
        client(P.SUBMIT_JOB, b"f", b"", b"")
        worker.grabs()
        wire.core.cancel(handle(1))
        assert worker(P.WORK_EXCEPTION, handle(1), b"boom") == []
        assert worker(P.WORK_FAIL, handle(1)) == []
        assert worker(P.WORK_FAIL, handle(1) + b"\0") == []

    def test_record(self):
        wire = Wire(durable=True)
        client, worker = wire.connect(), wire.worker(b"f")
        client(P.SUBMIT_JOB, b"f", b"", b"")
        worker.grabs()
        worker(P.WORK_STATUS, handle(1), b"1", b"2")
        worker(P.WORK_STATUS, handle(1), b"2", b"2")
        wire.core.cancel(handle(1))
        entries = wire.commit()
        assert [type(entry) for entry in entries[:2]] == [JobQueued, JobStarted]
        assert entries[-1] == finished(1)
        assert entries[-2].numerator == b"2"

    def test_counts_and_the_next_job(self, wire: Wire):
        client, worker = wire.connect(), wire.worker(b"f")
        for _ in range(2):
            client(P.SUBMIT_JOB, b"f", b"u", b"")
        worker.grabs()
        wire.core.cancel(handle(1))
        assert wire.connect().line(b"status") == b"f\t0\t0\t1\n.\n"
        client.hears()
        assert client(P.SUBMIT_JOB, b"f", b"u", b"") == [(P.JOB_CREATED, handle(2))]
        assert worker.grabs() == handle(2)
        assert worker(P.WORK_COMPLETE, handle(1), b"late") == []
        assert worker(P.WORK_COMPLETE, handle(2), b"right") == []
        assert client.hears() == [(P.WORK_COMPLETE, handle(2), b"right")]

    def test_several_of_one_worker(self, wire: Wire):
        client, worker = wire.connect(), wire.worker(b"f")
        for number in range(1, 4):
            client(P.SUBMIT_JOB, b"f", b"", b"")
            worker.grabs()
            assert wire.core.cancel(handle(number))
        for number in range(1, 4):
            assert worker(P.WORK_COMPLETE, handle(number), b"") == []

    def test_another_worker_is_not_excused(self, wire: Wire):
        client, worker, other = wire.connect(), wire.worker(b"f"), wire.worker(b"f")
        client(P.SUBMIT_JOB, b"f", b"", b"")
        worker.grabs()
        wire.core.cancel(handle(1))
        ((kind, code, _),) = other(P.WORK_COMPLETE, handle(1), b"")
        assert (kind, code) == (P.ERROR, b"JOB_NOT_FOUND")

    def test_worker_that_leaves_does_not_bring_it_back(self, wire: Wire):
        client, worker = wire.connect(), wire.worker(b"f")
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        wire.commit()
        worker.grabs()
        wire.core.cancel(handle(1))
        worker.leaves()
        assert wire.worker(b"f").grabs() is None
        assert not wire.core.jobs

    def test_time_limit_ends_with_it(self, wire: Wire):
        client, worker = wire.connect(), wire.connect()
        worker(P.CAN_DO_TIMEOUT, b"f", b"1000")
        client(P.SUBMIT_JOB, b"f", b"", b"")
        worker.grabs()
        wire.core.cancel(handle(1))
        wire.core.clock += 10.0
        wire.core.tick()
        assert wire.worker(b"f").grabs() is None

    def test_what_is_remembered_is_bounded(self, wire: Wire, monkeypatch):
        monkeypatch.setattr(core, "CANCELLED_LIMIT", 3)
        client, worker = wire.connect(), wire.worker(b"f")
        for number in range(1, 11):
            client(P.SUBMIT_JOB, b"f", b"", b"")
            worker.grabs()
            wire.core.cancel(handle(number))
        assert list(worker.peer.cancelled) == [handle(8), handle(9), handle(10)]
