"""Attempts: how often a job is handed out, and what a worker of ours may say of it."""

from __future__ import annotations

import pytest

from django_gearman.protocol.packets import ATTEMPTS, PacketType
from django_gearman.server.entries import (
    Claimed,
    JobDue,
    JobFinished,
    JobRequeued,
    JobStarted,
    Outcome,
    StoredJob,
)

from .harness import Caller, Wire, handle

P = PacketType
NOW = 1000.0


def stored(number: int = 1, **fields: object) -> StoredJob:
    job = StoredJob(b"H:test:1:r%d" % number, b"f", b"", b"w", 0, 0, None)
    return job._replace(**fields)


def speaker(wire: Wire) -> Caller:
    """A worker of ours, that speaks of attempts."""
    worker = wire.worker(b"f")
    assert worker(P.OPTION_REQ, ATTEMPTS) == [(P.OPTION_RES, ATTEMPTS)]
    return worker


def passes(wire: Wire, seconds: float) -> None:
    wire.core.now += seconds
    wire.core.clock += seconds
    wire.core.tick()


class TestTelling:
    """What a worker of ours hears ahead of a job, and others do not."""

    def test_first_attempt_of_any_number_is_not_worth_a_word(self):
        wire = Wire(durable=True)
        wire.core.adopt([stored()])
        assert [heard[0] for heard in speaker(wire)(P.GRAB_JOB_UNIQ)] == [P.JOB_ASSIGN_UNIQ]

    def test_number_of_attempts(self):
        wire = Wire(durable=True)
        wire.core.adopt([stored(max_attempts=4, attempts=1)])
        told, job = speaker(wire)(P.GRAB_JOB_UNIQ)
        assert told == (P.OPTION_RES, b"attempt 2 4")
        assert job[0] == P.JOB_ASSIGN_UNIQ

    def test_second_attempt_of_any_number(self):
        wire = Wire(durable=True)
        wire.core.adopt([stored(attempts=1)])
        assert speaker(wire)(P.GRAB_JOB_UNIQ)[0] == (P.OPTION_RES, b"attempt 2 0")

    def test_others_hear_what_gearmand_would_say(self):
        wire = Wire(durable=True)
        wire.core.adopt([stored(max_attempts=4, attempts=1)])
        assert [heard[0] for heard in wire.worker(b"f")(P.GRAB_JOB_UNIQ)] == [P.JOB_ASSIGN_UNIQ]

    def test_retry_of_who_did_not_say_so_is_an_unknown_option(self):
        wire = Wire(durable=True)
        wire.core.adopt([stored()])
        worker = wire.worker(b"f")
        assert worker.grabs() == stored().handle
        ((kind, code, _),) = worker(P.OPTION_REQ, b"retry 0 " + stored().handle)
        assert (kind, code) == (P.ERROR, b"UNKNOWN_OPTION")
        worker(P.WORK_EXCEPTION, stored().handle, b"boom")
        assert wire.core.jobs == {}


class TestRetry:
    def raised(self, wire: Wire, delay: bytes = b"5000", **fields: object) -> Caller:
        """A job of ours was tried, raised, and is to be tried again."""
        wire.core.adopt([stored(**fields)])
        worker = speaker(wire)
        heard = worker(P.GRAB_JOB_UNIQ)
        assert heard[-1][1] == stored().handle
        assert worker(P.OPTION_REQ, b"retry %s %s" % (delay, stored().handle)) == []
        assert worker(P.WORK_EXCEPTION, stored().handle, b"boom") == []
        return worker

    def test_job_comes_back_after_its_pause(self):
        wire = Wire(durable=True)
        worker = self.raised(wire, max_attempts=3)
        assert wire.entries() == [
            JobStarted(stored().handle, b"127.0.0.1", 1, NOW),
            JobRequeued(stored().handle, b"127.0.0.1", 1, NOW, NOW, "", b"boom", NOW + 5, unclaimed=True),
        ]
        assert worker(P.GRAB_JOB_UNIQ) == [(P.NO_JOB,)]
        assert worker(P.PRE_SLEEP) == []
        # Until then it lies at the store's door.
        assert not wire.core.jobs
        assert worker.line(b"status") == b"f\t1\t0\t1\n.\n"
        passes(wire, 5)
        wire.core.window.claimed(Claimed([stored(attempts=1, max_attempts=3, run_after=NOW + 5)]))
        assert worker.hears() == [(P.NOOP,)]
        assert worker.line(b"status") == b"f\t1\t0\t1\n.\n"
        told, job = worker(P.GRAB_JOB_UNIQ)
        assert (told, job[1]) == ((P.OPTION_RES, b"attempt 2 3"), stored().handle)

    def test_without_a_pause_it_is_the_next(self):
        wire = Wire(durable=True)
        worker = self.raised(wire, b"0", max_attempts=2)
        wire.core.adopt([stored(2)])
        assert worker(P.GRAB_JOB_UNIQ)[-1][1] == stored().handle

    def test_last_attempt_is_the_last(self):
        wire = Wire(durable=True)
        worker = self.raised(wire, max_attempts=2, attempts=1)
        assert wire.core.jobs == {}
        finished = wire.entries()[-1]
        assert finished == JobFinished(stored().handle, Outcome.FAILED, b"boom", "", NOW)
        # And Perl's habit is excused here too.
        assert worker(P.WORK_FAIL, stored().handle) == []

    def test_who_waits_for_a_background_job_goes_on_waiting(self):
        wire = Wire(durable=True)
        wire.core.adopt([stored(unique=b"u", max_attempts=2)])
        client = wire.connect()
        client(P.OPTION_REQ, b"exceptions")
        assert client(P.SUBMIT_JOB, b"f", b"u", b"") == [(P.JOB_CREATED, stored().handle)]
        worker = speaker(wire)
        worker(P.GRAB_JOB_UNIQ)
        worker(P.OPTION_REQ, b"retry 0 " + stored().handle)
        worker(P.WORK_EXCEPTION, stored().handle, b"boom")
        assert client.hears() == []
        worker(P.GRAB_JOB_UNIQ)
        worker(P.WORK_COMPLETE, stored().handle, b"done")
        assert client.hears() == [(P.WORK_COMPLETE, stored().handle, b"done")]

    def test_client_of_a_foreground_job_hears_the_exception(self):
        wire = Wire()
        client = wire.connect()
        client(P.SUBMIT_JOB, b"f", b"", b"")
        worker = speaker(wire)
        worker(P.GRAB_JOB_UNIQ)
        worker(P.OPTION_REQ, b"retry 0 " + handle(1))
        worker(P.WORK_EXCEPTION, handle(1), b"boom")
        assert client.hears() == [(P.WORK_FAIL, handle(1))]
        assert wire.core.jobs == {}

    def test_word_of_one_job_is_not_of_another(self):
        wire = Wire(durable=True)
        wire.core.adopt([stored(1), stored(2)])
        worker = speaker(wire)
        worker(P.GRAB_JOB_UNIQ)
        worker(P.GRAB_JOB_UNIQ)
        worker(P.OPTION_REQ, b"retry 0 " + stored(2).handle)
        worker(P.WORK_EXCEPTION, stored(1).handle, b"boom")
        assert set(wire.core.jobs) == {stored(2).handle}
        # It was of the exception that came next.
        worker(P.WORK_EXCEPTION, stored(2).handle, b"boom")
        assert wire.core.jobs == {}

    @pytest.mark.parametrize("delay", [b"", b"x", b"-7", b"-" + b"9" * 5000])
    def test_no_number_is_no_pause(self, delay):
        wire = Wire(durable=True)
        worker = self.raised(wire, delay, max_attempts=2)
        assert worker(P.GRAB_JOB_UNIQ)[-1][1] == stored().handle

    def test_pause_has_a_bound(self):
        wire = Wire(durable=True)
        self.raised(wire, b"9" * 5000, max_attempts=2)
        assert wire.entries()[-1].run_after < 2**33

    def test_who_waits_for_it_goes_on_waiting(self):
        """Then it stays here, where its client hears of it."""
        wire = Wire(durable=True)
        wire.core.adopt([stored(unique=b"u", max_attempts=2)])
        client = wire.connect()
        client(P.SUBMIT_JOB, b"f", b"u", b"")
        worker = speaker(wire)
        worker(P.GRAB_JOB_UNIQ)
        worker(P.OPTION_REQ, b"retry 5000 " + stored().handle)
        worker(P.WORK_EXCEPTION, stored().handle, b"boom")
        assert not wire.entries()[-1].unclaimed
        assert wire.core.next_due() == NOW + 5
        assert client(P.SUBMIT_JOB_BG, b"f", b"u", b"")[-1] == (P.JOB_CREATED, stored().handle)
        passes(wire, 5)
        assert wire.entries() == [JobDue(stored().handle)]
        assert worker(P.GRAB_JOB_UNIQ)[-1][1] == stored().handle

    def test_attempt_that_a_server_interrupted_is_not_counted(self):
        wire = Wire(durable=True)
        wire.core.adopt([stored(max_attempts=2, attempts=1, interruptions=1)])
        worker = speaker(wire)
        worker(P.GRAB_JOB_UNIQ)
        worker(P.OPTION_REQ, b"retry 0 " + stored().handle)
        worker(P.WORK_EXCEPTION, stored().handle, b"boom")
        assert [type(entry) for entry in wire.entries()] == [JobStarted, JobRequeued]
        assert worker(P.GRAB_JOB_UNIQ)[0] == (P.OPTION_RES, b"attempt 3 2")

    def test_later_attempt_of_a_job_that_is_not_kept_yet(self):
        wire = Wire(durable=True)
        foreground, background = wire.connect(), wire.connect()
        foreground(P.SUBMIT_JOB, b"f", b"u", b"")
        wire.commit()
        worker = speaker(wire)
        worker(P.GRAB_JOB_UNIQ)
        assert background(P.SUBMIT_JOB_BG, b"f", b"u", b"") == []
        foreground.leaves()
        worker(P.OPTION_REQ, b"retry 5000 " + handle(1))
        worker(P.WORK_EXCEPTION, handle(1), b"boom")
        wire.commit()
        assert background.hears() == [(P.JOB_CREATED, handle(1))]
        passes(wire, 5.0)
        assert [heard[0] for heard in worker(P.GRAB_JOB_UNIQ)] == [P.OPTION_RES, P.JOB_ASSIGN_UNIQ]


class TestLost:
    """A job whose workers are lost."""

    def lose(self, wire: Wire) -> None:
        worker = wire.worker(b"f")
        assert worker.grabs() == stored().handle
        worker.leaves()

    def test_number_of_its_own_counts_before_that_of_the_server(self):
        wire = Wire(durable=True, job_retries=5)
        wire.core.adopt([stored(max_attempts=2)])
        self.lose(wire)
        self.lose(wire)
        finished = wire.entries()[-1]
        assert isinstance(finished, JobFinished)
        assert (finished.outcome, finished.reason) == (
            Outcome.DEAD,
            "The worker was lost at the last of 2 attempts",
        )

    def test_each_is_kept_with_its_worker_and_its_times(self):
        wire = Wire(durable=True, job_retries=5)
        wire.core.adopt([stored()])
        self.lose(wire)
        wire.core.now += 60
        self.lose(wire)
        lost = [entry for entry in wire.entries() if isinstance(entry, JobRequeued)]
        assert [(entry.attempt, entry.started_at, entry.reason) for entry in lost] == [
            (1, NOW, "The worker was lost"),
            (2, NOW + 60, "The worker was lost"),
        ]


class TestTimeout:
    """The time limit of a row, beside that of CAN_DO_TIMEOUT."""

    def test_attempt_is_over_when_its_time_is_up(self):
        wire = Wire(durable=True, timeout_grace=0.0)
        wire.core.adopt([stored(timeout=10, max_attempts=2)])
        worker = wire.worker(b"f")
        assert worker.grabs() == stored().handle
        passes(wire, 9.9)
        assert worker.grabs() is None
        passes(wire, 0.2)
        assert worker.grabs() == stored().handle
        passes(wire, 11)
        finished = wire.entries()[-1]
        assert isinstance(finished, JobFinished)
        assert (finished.outcome, finished.reason) == (
            Outcome.DEAD,
            "The job's time was up at the last of 2 attempts",
        )

    @pytest.mark.parametrize(("row", "offer"), [(10, b"20000"), (20, b"10000"), (10, b"0")])
    def test_shorter_limit_counts(self, row, offer):
        wire = Wire(durable=True, timeout_grace=0.0)
        wire.core.adopt([stored(timeout=row)])
        worker = wire.connect()
        worker(P.CAN_DO_TIMEOUT, b"f", offer)
        assert worker.grabs() == stored().handle
        passes(wire, 10)
        assert worker.grabs() == stored().handle

    @pytest.mark.parametrize("now", [60, None])
    def test_the_code_may_say_something_else_since(self, now):
        """A deployment gave the function more time: its worker takes it, and nobody else gets the job."""
        asked = []

        def timeout_of(function, kept):
            asked.append((function, kept))
            return now

        wire = Wire(durable=True, timeout_grace=0.0, timeout_of=timeout_of)
        wire.core.adopt([stored(timeout=10), stored(handle=b"H:other", timeout=None)])
        assert asked == [("f", 10)]
        worker, other = wire.worker(b"f"), wire.worker(b"f")
        assert worker.grabs() == stored().handle
        assert other.grabs() == b"H:other"
        passes(wire, 59.9)
        assert other.grabs() is None
        passes(wire, 0.2)
        assert other.grabs() == (None if now is None else stored().handle)

    def test_its_worker_may_end_it_before(self):
        wire = Wire(durable=True)
        wire.core.adopt([stored(timeout=10)])
        worker = wire.worker(b"f")
        assert worker.grabs() == stored().handle
        passes(wire, 24.9)
        assert worker.grabs() is None
        passes(wire, 0.2)
        assert worker.grabs() == stored().handle
