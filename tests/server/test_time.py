"""Jobs for later, and time limits. The clock is an argument; nothing here waits."""

from __future__ import annotations

import pytest

from django_gearman.protocol.packets import PacketType as P
from django_gearman.server import core
from django_gearman.server.entries import JobDue, JobFinished, JobQueued, Outcome, StoredJob

from .harness import Caller, Wire, handle

NOW = 1000.0
"""Where a ``Wire`` starts."""


def later(client: Caller, seconds: float, *, function: bytes = b"f", unique: bytes = b"") -> None:
    due = b"%d" % (client.wire.core.now + seconds)
    client(P.SUBMIT_JOB_EPOCH, function, unique, due, b"w")


def passes(wire: Wire, seconds: float) -> None:
    wire.core.now += seconds
    wire.core.clock += seconds
    wire.core.tick()


class TestEpoch:
    """PROTOCOL: SUBMIT_JOB_EPOCH, section 5.6."""

    def test_job_is_created_and_not_handed_out_before_its_time(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        assert client(P.SUBMIT_JOB_EPOCH, b"f", b"", b"1010", b"w") == [(P.JOB_CREATED, handle(1))]
        passes(wire, 9.9)
        assert worker.grabs() is None
        passes(wire, 0.1)
        assert worker.grabs() == handle(1)

    def test_sleeping_worker_is_woken_when_it_is_due_and_not_at_submission(self):
        wire = Wire()
        worker = wire.connect().sleeps(b"f")
        later(wire.connect(), 10)
        assert worker.hears() == []
        assert wire.core.next_due() == NOW + 10
        passes(wire, 10)
        assert worker.hears() == [(P.NOOP,)]
        assert wire.core.next_due() == float("inf")

    def test_it_hides_nothing_meanwhile(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        later(client, 10)
        client(P.SUBMIT_JOB_LOW_BG, b"f", b"", b"w")
        assert worker.grabs() == handle(2)
        assert worker(P.PRE_SLEEP) == []

    def test_due_order_is_kept_whatever_the_order_of_submission(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        for seconds in (30, 10, 20):
            later(client, seconds)
        passes(wire, 40)
        assert [worker.grabs() for _ in range(4)] == [handle(2), handle(3), handle(1), None]

    @pytest.mark.parametrize("epoch", [b"", b"abc", b"0", b"-5", b"999"])
    def test_what_is_no_later_time_runs_at_once(self, epoch):
        wire = Wire()
        wire.connect()(P.SUBMIT_JOB_EPOCH, b"f", b"", epoch, b"w")
        assert wire.worker(b"f").grabs() == handle(1)

    @pytest.mark.parametrize("epoch", [b"9" * 19, b"9" * 10_000])
    def test_a_time_beyond_all_bounds_is_as_late_as_can_be(self, epoch):
        wire = Wire(durable=True)
        wire.connect()(P.SUBMIT_JOB_EPOCH, b"f", b"", epoch, b"w")
        (entry,) = wire.commit()
        assert isinstance(entry, JobQueued)
        assert entry.run_after == 253_370_764_800
        assert wire.worker(b"f").grabs() is None

    def test_it_is_counted_and_known_while_it_waits(self):
        wire = Wire()
        client = wire.connect()
        later(client, 10)
        assert client.line(b"status") == b"f\t1\t0\t0\n.\n"
        assert client(P.GET_STATUS, handle(1)) == [(P.STATUS_RES, handle(1), b"1", b"0", b"0", b"0")]

    def test_submissions_of_its_unique_join_it(self):
        wire = Wire()
        client = wire.connect()
        later(client, 10, unique=b"u")
        assert client(P.SUBMIT_JOB, b"f", b"u", b"now") == [(P.JOB_CREATED, handle(1))]
        client.leaves()
        passes(wire, 10)
        assert wire.worker(b"f").grabs() == handle(1)

    def test_journal_hears_when_it_is_due(self):
        wire = Wire(durable=True)
        client = wire.connect()
        later(client, 10)
        assert client.hears() == []
        (queued,) = wire.commit()
        assert isinstance(queued, JobQueued)
        assert (queued.run_after, queued.background, queued.priority) == (NOW + 10, True, 0)
        # It waits in the store, and costs nothing here.
        assert queued.unclaimed
        assert client.hears() == [(P.JOB_CREATED, handle(1))]
        assert not wire.core.jobs
        assert client.line(b"status") == b"f\t1\t0\t0\n.\n"

    def test_job_that_somebody_waits_for_keeps_its_time(self):
        wire = Wire(durable=True)
        wire.core.adopt([StoredJob(b"H:old", b"f", b"", b"w", 0, 0, None, b"", NOW + 10)])
        worker = wire.worker(b"f")
        assert worker.grabs() is None
        passes(wire, 10)
        assert worker.grabs() == b"H:old"
        assert wire.entries()[0] == JobDue(b"H:old")

    def test_clock_that_is_set_back_makes_it_later_but_loses_nothing(self):
        wire = Wire()
        worker = wire.worker(b"f")
        later(wire.connect(), 10)
        passes(wire, -100)
        assert worker.grabs() is None
        passes(wire, 110)
        assert worker.grabs() == handle(1)

    def test_what_was_cancelled_is_forgotten_long_before_its_time(self, monkeypatch):
        monkeypatch.setattr(core, "ENDED_LIMIT", 3)
        wire = Wire()
        worker, client = wire.worker(b"f"), wire.connect()
        later(client, 20)
        for number in range(2, 40):
            later(client, 10_000_000)
            assert wire.core.cancel(handle(number))
        assert len(wire.core._delayed) < 10
        later(client, 10)
        passes(wire, 30)
        assert [worker.grabs() for _ in range(3)] == [handle(40), handle(1), None]


class TestTimeLimit:
    """PROTOCOL: CAN_DO_TIMEOUT, sections 3 and 5.5."""

    def limited(self, wire: Wire, limit: bytes) -> Caller:
        worker = wire.connect()
        assert worker(P.CAN_DO_TIMEOUT, b"f", limit) == []
        return worker

    def test_job_is_handed_out_again_when_its_time_is_up(self):
        wire = Wire()
        slow, other = self.limited(wire, b"3000"), wire.connect().sleeps(b"f")
        client = wire.connect()
        client(P.SUBMIT_JOB, b"f", b"", b"w")
        assert other.hears() == [(P.NOOP,)]
        assert slow.grabs() == handle(1)
        other.sleeps()
        passes(wire, 2.9)
        assert other.hears() == []
        passes(wire, 0.1)
        assert other.hears() == [(P.NOOP,)]
        assert other.grabs() == handle(1)
        # The worker was not told; its late result counts no more.
        assert slow.hears() == []
        assert slow(P.WORK_COMPLETE, handle(1), b"late")[0][:2] == (P.ERROR, b"JOB_NOT_FOUND")
        other(P.WORK_COMPLETE, handle(1), b"result")
        assert client.hears() == [(P.WORK_COMPLETE, handle(1), b"result")]

    def test_last_attempt_ends_the_job_and_the_client_hears_of_it(self):
        wire = Wire(durable=True, job_retries=2)
        worker, client = self.limited(wire, b"1000"), wire.connect()
        client(P.SUBMIT_JOB, b"f", b"", b"w")
        assert client.hears() == []
        for _ in range(2):
            assert client.hears() == []
            assert worker.grabs() == handle(1)
            passes(wire, 1)
        assert client.hears() == [(P.WORK_FAIL, handle(1))]
        (finished,) = [entry for entry in wire.entries() if isinstance(entry, JobFinished)]
        assert finished.outcome is Outcome.DEAD
        assert finished.reason == "The job's time was up at the last of 2 attempts"

    def test_end_of_the_job_ends_the_limit(self):
        wire = Wire(job_retries=1)
        worker, client = self.limited(wire, b"1000"), wire.connect()
        client(P.SUBMIT_JOB, b"f", b"", b"w")
        assert worker.grabs() == handle(1)
        worker(P.WORK_COMPLETE, handle(1), b"")
        client.hears()
        passes(wire, 5)
        assert client.hears() == []
        assert client.line(b"status") == b"f\t0\t0\t1\n.\n"

    def test_sleeping_does_not_end_the_limit_of_a_job_in_hand(self):
        wire = Wire()
        worker = self.limited(wire, b"1000")
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"", b"w")
        assert worker.grabs() == handle(1)
        worker(P.PRE_SLEEP)
        passes(wire, 1)
        assert worker.hears() == [(P.NOOP,)]

    @pytest.mark.parametrize(
        ("unit", "limit", "seconds"),
        [
            (False, b"1", 1),
            (False, b"999", 1),
            (False, b"2500", 2.5),
            (True, b"2", 2),
        ],
    )
    def test_unit_and_the_shortest_limit(self, unit, limit, seconds):
        wire = Wire(timeout_in_seconds=unit)
        worker = self.limited(wire, limit)
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"", b"w")
        assert worker.grabs() == handle(1)
        passes(wire, seconds - 0.25)
        assert worker(P.PRE_SLEEP) == []
        passes(wire, 0.5)
        assert worker.hears() == [(P.NOOP,)]
        assert worker.grabs() == handle(1)

    @pytest.mark.parametrize("limit", [b"0", b"-1", b"", b"soon", b"9" * 10_000])
    def test_no_limit(self, limit):
        wire = Wire()
        worker = self.limited(wire, limit)
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"", b"w")
        assert worker.grabs() == handle(1)
        passes(wire, 1e9)
        assert worker(P.PRE_SLEEP) == []

    def test_limit_of_one_worker_is_not_that_of_another(self):
        wire = Wire()
        self.limited(wire, b"1000")
        patient = wire.worker(b"f")
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"", b"w")
        assert patient.grabs() == handle(1)
        passes(wire, 100)
        assert patient(P.WORK_COMPLETE, handle(1), b"") == []

    def test_offered_again_without_a_limit_it_has_none(self):
        wire = Wire()
        worker = self.limited(wire, b"1000")
        worker(P.CAN_DO, b"f")
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"", b"w")
        assert worker.grabs() == handle(1)
        passes(wire, 100)
        assert worker(P.WORK_COMPLETE, handle(1), b"") == []
        assert worker.line(b"status") == b"f\t0\t0\t1\n.\n"

    def test_wall_clock_does_not_count(self):
        wire = Wire()
        worker = self.limited(wire, b"1000")
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"", b"w")
        assert worker.grabs() == handle(1)
        wire.core.now += 1e6
        wire.core.tick()
        assert worker(P.WORK_COMPLETE, handle(1), b"") == []
