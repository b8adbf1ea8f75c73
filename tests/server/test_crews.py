"""Crews: what the process that keeps workers says of them, and hears."""

from __future__ import annotations

import pytest

from django_gearman.protocol.packets import ATTEMPTS, PacketType
from django_gearman.server import crews
from django_gearman.server.entries import JobFinished, JobRequeued, JobStarted, Outcome, StoredJob

from .harness import Caller, Wire

P = PacketType
NOW = 1000.0
HANDLE = b"H:test:1:r1"


@pytest.fixture
def wire() -> Wire:
    wire = Wire(durable=True)
    wire.core.adopt([StoredJob(HANDLE, b"f", b"", b"w", 0, 0, None)])
    return wire


def member(wire: Wire, token: bytes = b"token") -> Caller:
    worker = wire.worker(b"f")
    assert worker(P.OPTION_REQ, ATTEMPTS) == [(P.OPTION_RES, ATTEMPTS)]
    assert worker(P.OPTION_REQ, b"crew " + token) == []
    return worker


def lead(wire: Wire, token: bytes = b"token") -> Caller:
    caller = wire.connect()
    caller(P.OPTION_REQ, ATTEMPTS)
    assert caller(P.OPTION_REQ, b"lead " + token) == [(P.OPTION_RES, b"lead")]
    return caller


def grab(worker: Caller) -> bytes:
    return worker(P.GRAB_JOB_UNIQ)[-1][1]


def state(wire: Wire) -> str:
    return wire.core.jobs[HANDLE].state.value


def passes(wire: Wire, seconds: float) -> None:
    wire.core.now += seconds
    wire.core.clock += seconds
    wire.core.tick()


class TestLost:
    def requeued(self, reason: str) -> JobRequeued:
        return JobRequeued(HANDLE, b"127.0.0.1", 1, NOW, NOW, reason)

    def test_reason_before_the_connection_is_seen_to_end(self, wire: Wire) -> None:
        worker, foreman = member(wire), lead(wire)
        assert grab(worker) == HANDLE
        assert foreman(P.OPTION_REQ, b"lost %s killed by SIGSEGV" % HANDLE) == []
        assert state(wire) == "ready"
        assert wire.entries()[-1] == self.requeued("killed by SIGSEGV")
        worker.leaves()
        assert wire.entries() == []

    def test_reason_after_it(self, wire: Wire) -> None:
        worker, foreman = member(wire), lead(wire)
        assert grab(worker) == HANDLE
        worker.leaves()
        assert state(wire) == "running"
        foreman(P.OPTION_REQ, b"lost %s killed by SIGSEGV" % HANDLE)
        assert state(wire) == "ready"
        assert wire.entries()[-1] == self.requeued("killed by SIGSEGV")

    def test_lead_that_says_nothing(self, wire: Wire) -> None:
        worker, _ = member(wire), lead(wire)
        grab(worker)
        worker.leaves()
        passes(wire, crews.PATIENCE - 0.1)
        assert state(wire) == "running"
        passes(wire, 0.2)
        assert state(wire) == "ready"
        entry = wire.entries()[-1]
        assert isinstance(entry, JobRequeued)
        assert entry.reason == "The worker was lost"

    @pytest.mark.parametrize("first", ["worker", "lead"])
    def test_lead_that_is_gone_is_not_waited_for(self, wire: Wire, first: str) -> None:
        worker, foreman = member(wire), lead(wire)
        grab(worker)
        for caller in [worker, foreman] if first == "worker" else [foreman, worker]:
            caller.leaves()
        assert state(wire) == "ready"

    @pytest.mark.parametrize("word", [b"lead other", b"crew other"])
    def test_lead_that_goes_to_another_crew_is_not_waited_for(self, wire: Wire, word: bytes) -> None:
        worker, foreman = member(wire), lead(wire)
        assert grab(worker) == HANDLE
        worker.leaves()
        assert state(wire) == "running"
        foreman(P.OPTION_REQ, word)
        assert state(wire) == "ready"
        foreman.leaves()
        assert not wire.core.crews._leads

    def test_at_the_last_attempt(self, wire: Wire) -> None:
        foreman = lead(wire)
        for _ in range(3):
            worker = member(wire)
            grab(worker)
            foreman(P.OPTION_REQ, b"lost %s killed by SIGSEGV" % HANDLE)
        finished = wire.entries()[-1]
        assert finished == JobFinished(
            HANDLE, Outcome.DEAD, b"", "killed by SIGSEGV at the last of 3 attempts", NOW
        )

    @pytest.mark.parametrize("word", [b"lost " + HANDLE + b" x", b"return " + HANDLE])
    def test_strangers_are_not_heard(self, wire: Wire, word: bytes) -> None:
        worker = member(wire)
        grab(worker)
        for stranger in (lead(wire, b"other"), member(wire)):
            stranger(P.OPTION_REQ, word)
            assert state(wire) == "running"

    @pytest.mark.parametrize("word", [b"lost " + HANDLE + b" x", b"return " + HANDLE])
    def test_nobody_speaks_for_workers_without_a_crew(self, wire: Wire, word: bytes) -> None:
        worker, stranger = wire.worker(b"f"), wire.connect()
        grab(worker)
        stranger(P.OPTION_REQ, ATTEMPTS)
        assert stranger(P.OPTION_REQ, b"lead ")[0][:2] == (P.ERROR, b"UNKNOWN_OPTION")
        stranger(P.OPTION_REQ, word)
        assert state(wire) == "running"

    def test_who_does_not_speak_of_attempts_hears_that_it_is_no_option(self, wire: Wire) -> None:
        for word in (b"crew t", b"lead t", b"lost H x", b"return H", b"resume 1 H"):
            assert wire.connect()(P.OPTION_REQ, word)[0][:2] == (P.ERROR, b"UNKNOWN_OPTION")


class TestReturn:
    def test_attempt_does_not_count(self, wire: Wire) -> None:
        worker, foreman = member(wire), lead(wire)
        for _ in range(9):
            grab(worker)
            foreman(P.OPTION_REQ, b"return " + HANDLE)
            entry = wire.entries()[-1]
            assert isinstance(entry, JobRequeued)
            assert (entry.attempt, entry.counts) == (1, False)
        assert [heard[0] for heard in worker(P.GRAB_JOB_UNIQ)] == [P.JOB_ASSIGN_UNIQ]
        started = wire.entries()[-1]
        assert isinstance(started, JobStarted)
        assert started.attempts == 1

    def test_by_the_worker_whatever_it_was_given(self, wire: Wire) -> None:
        worker = member(wire)
        grab(worker)
        worker(P.OPTION_REQ, b"return ")
        assert state(wire) == "ready"
        assert wire.core.jobs[HANDLE].attempts == 0


def taken(worker: Caller) -> bytes | None:
    """Grab a job, whatever is said of its attempt before; its handle."""
    heard = worker(P.GRAB_JOB)[-1]
    return heard[1] if heard[0] == P.JOB_ASSIGN else None


class TestResume:
    def test_job_that_waits_again(self, wire: Wire) -> None:
        worker = member(wire)
        grab(worker)
        worker.leaves()
        assert state(wire) == "ready"
        again = member(wire)
        assert again(P.OPTION_REQ, b"resume 1 " + HANDLE) == []
        assert state(wire) == "running"
        assert wire.worker(b"f").grabs() is None
        assert again(P.WORK_COMPLETE, HANDLE, b"late") == []
        assert wire.entries()[-1] == JobFinished(HANDLE, Outcome.SUCCESSFUL, b"late", "", NOW)

    def test_job_of_a_lost_connection_that_nobody_explained(self, wire: Wire) -> None:
        worker, _ = member(wire), lead(wire)
        grab(worker)
        worker.leaves()
        again = member(wire)
        again(P.OPTION_REQ, b"resume 1 " + HANDLE)
        passes(wire, 10)
        assert again(P.WORK_COMPLETE, HANDLE, b"late") == []
        assert wire.core.jobs == {}

    def test_after_a_restart(self, wire: Wire) -> None:
        """The store knows how often it was handed out."""
        wire = Wire(durable=True)
        wire.core.adopt([StoredJob(HANDLE, b"f", b"", b"w", 0, 2, None)])
        worker = member(wire)
        worker(P.OPTION_REQ, b"resume 2 " + HANDLE)
        assert worker(P.WORK_COMPLETE, HANDLE, b"late") == []
        assert wire.core.jobs == {}

    def test_nobody_else_gets_it_for_a_moment_after_a_restart(self) -> None:
        wire = Wire(durable=True)
        wire.core.returning.adopt([StoredJob(HANDLE, b"f", b"", b"w", 0, 1, None)])
        wire.core.adopt([StoredJob(b"H:other", b"f", b"", b"", 0, 0, None)])
        worker, other = member(wire), member(wire)
        assert taken(other) == b"H:other"
        assert taken(other) is None
        assert wire.connect().line(b"status") == b"f\t2\t1\t2\n.\n"
        passes(wire, 1)
        worker(P.OPTION_REQ, b"resume 1 " + HANDLE)
        assert wire.connect().line(b"status") == b"f\t2\t2\t2\n.\n"
        passes(wire, 10)
        assert taken(other) is None
        worker(P.WORK_COMPLETE, HANDLE, b"")
        assert not wire.core.returning

    def test_then_it_is_the_next(self) -> None:
        wire = Wire(durable=True)
        handles = [b"H:%d" % number for number in range(3)]
        wire.core.returning.adopt([StoredJob(each, b"f", b"", b"", 0, 1, None) for each in handles[:2]])
        wire.core.adopt([StoredJob(handles[2], b"f", b"", b"", 0, 0, None)])
        worker = member(wire)
        passes(wire, 1)
        passes(wire, 4)
        assert wire.core.returning
        passes(wire, 2)
        assert [taken(worker) for _ in range(4)] == [*handles, None]

    def interrupted(self) -> Wire:
        wire = Wire(durable=True)
        wire.core.returning.adopt([StoredJob(HANDLE, b"f", b"", b"w", 0, 1, None)])
        passes(wire, 1)
        return wire

    def test_lead_says_that_its_worker_is_at_it_still(self) -> None:
        wire = self.interrupted()
        foreman, worker = lead(wire), member(wire)
        assert foreman(P.OPTION_REQ, b"hold " + HANDLE) == []
        passes(wire, 100)
        assert taken(worker) is None
        worker(P.OPTION_REQ, b"resume 1 " + HANDLE)
        assert worker(P.WORK_COMPLETE, HANDLE, b"late") == []
        assert not wire.core.jobs

    @pytest.mark.parametrize("word", [b"lost " + HANDLE + b" killed", b"return " + HANDLE])
    def test_lead_says_that_it_will_not_come_back(self, word: bytes) -> None:
        wire = self.interrupted()
        foreman, worker = lead(wire), member(wire)
        foreman(P.OPTION_REQ, b"hold " + HANDLE)
        foreman(P.OPTION_REQ, word)
        assert taken(worker) == HANDLE

    def test_lead_that_leaves_holds_nothing(self) -> None:
        wire = self.interrupted()
        foreman, worker = lead(wire), member(wire)
        foreman(P.OPTION_REQ, b"hold " + HANDLE)
        foreman.leaves()
        assert taken(worker) is None
        passes(wire, 5)
        assert taken(worker) == HANDLE

    def test_lead_that_comes_back_before_its_end_is_seen(self) -> None:
        """What its first connection has said is its second one's to say."""
        wire = self.interrupted()
        former, worker = lead(wire), member(wire)
        former(P.OPTION_REQ, b"hold " + HANDLE)
        foreman = lead(wire)
        passes(wire, 4)
        foreman(P.OPTION_REQ, b"hold " + HANDLE)
        passes(wire, 100)
        assert taken(worker) is None
        # The process ends while the next connection is made: nobody names its job.
        lead(wire)
        former.leaves()
        foreman.leaves()
        assert taken(worker) is None
        passes(wire, 5)
        assert taken(worker) == HANDLE

    @pytest.mark.parametrize(
        ("kind", "arguments"),
        [(P.WORK_COMPLETE, [b"1"]), (P.WORK_FAIL, []), (P.WORK_EXCEPTION, [b"why"])],
    )
    def test_worker_that_came_back_before_the_job_was_here(self, kind: P, arguments: list[bytes]) -> None:
        """The store was slow at the start, and what its lead says comes a little later."""
        wire = Wire(durable=True)
        worker, foreman = member(wire), lead(wire)
        worker(P.OPTION_REQ, b"resume 1 " + HANDLE)
        wire.core.adopt([StoredJob(HANDLE, b"f", b"", b"w", 0, 0, None)])
        foreman(P.OPTION_REQ, b"hold " + HANDLE)
        # It is at it: nobody else gets it as yet.
        worker(P.WORK_DATA, HANDLE, b"part")
        member(wire, b"another")(kind, HANDLE, *arguments)
        assert taken(worker) is None
        assert worker(kind, HANDLE, *arguments)[0][:2] == (P.ERROR, b"JOB_NOT_FOUND")
        assert taken(worker) == HANDLE

    def test_worker_that_may_not_have_it_after_all(self) -> None:
        wire = self.interrupted()
        foreman, worker, other = lead(wire), member(wire), member(wire)
        foreman(P.OPTION_REQ, b"hold " + HANDLE)
        worker(P.OPTION_REQ, b"resume 7 " + HANDLE)
        assert taken(other) == HANDLE

    def test_nobody_else_can_hold_it(self) -> None:
        wire = self.interrupted()
        stranger, worker = member(wire), member(wire)
        stranger(P.OPTION_REQ, b"hold " + HANDLE)
        passes(wire, 5)
        assert taken(worker) == HANDLE

    def test_hand_out_that_the_crash_has_forgotten_is_held_too(self) -> None:
        wire = Wire(durable=True)
        wire.core.adopt([StoredJob(HANDLE, b"f", b"", b"w", 0, 0, None)])
        foreman, worker = lead(wire), member(wire)
        foreman(P.OPTION_REQ, b"hold " + HANDLE)
        assert taken(worker) is None

    def test_cancelled_before_its_worker_came_back(self) -> None:
        wire = Wire(durable=True)
        wire.core.returning.adopt([StoredJob(HANDLE, b"f", b"", b"w", 0, 1, None)])
        assert wire.core.cancel(HANDLE)
        passes(wire, 1)
        passes(wire, 10)
        assert taken(member(wire)) is None
        assert not wire.core.returning

    def test_attempt_that_a_crash_has_forgotten(self, wire: Wire) -> None:
        worker = member(wire)
        worker(P.OPTION_REQ, b"resume 1 " + HANDLE)
        assert worker(P.WORK_COMPLETE, HANDLE, b"late") == []
        started = wire.entries()[0]
        assert isinstance(started, JobStarted)
        assert started.attempts == 1

    @pytest.mark.parametrize("word", [b"resume 3 ", b"resume x ", b"resume 0 "])
    def test_another_attempt_is_another_s(self, wire: Wire, word: bytes) -> None:
        worker = member(wire)
        grab(worker)
        worker.leaves()
        again = member(wire)
        again(P.OPTION_REQ, word + HANDLE)
        assert again(P.WORK_COMPLETE, HANDLE, b"late")[0][:2] == (P.ERROR, b"JOB_NOT_FOUND")

    def test_who_could_not_grab_it_does_not_get_it(self, wire: Wire) -> None:
        worker = member(wire)
        grab(worker)
        worker.leaves()
        other = wire.worker(b"other")
        other(P.OPTION_REQ, ATTEMPTS)
        other(P.OPTION_REQ, b"resume 1 " + HANDLE)
        assert state(wire) == "ready"

    def test_job_that_another_has(self, wire: Wire) -> None:
        first, second = member(wire), member(wire)
        grab(first)
        second(P.OPTION_REQ, b"resume 1 " + HANDLE)
        assert second(P.WORK_COMPLETE, HANDLE, b"late")[0][:2] == (P.ERROR, b"JOB_NOT_FOUND")
        assert first(P.WORK_COMPLETE, HANDLE, b"") == []


class TestEnd:
    """A server that is stopped together with its workers."""

    def test_crew_that_is_about_to_leave(self, wire: Wire) -> None:
        worker, foreman = member(wire), lead(wire)
        grab(worker)
        assert not wire.core.crews.are_finishing()
        assert worker(P.OPTION_REQ, b"leaving") == []
        assert not wire.core.crews.are_finishing()
        assert foreman(P.OPTION_REQ, b"leaving") == []
        assert wire.core.crews.are_finishing()
        worker(P.WORK_COMPLETE, HANDLE, b"")
        assert not wire.core.crews.are_finishing()

    def test_nothing_is_handed_out(self, wire: Wire) -> None:
        wire.core.hands_out = False
        assert member(wire)(P.GRAB_JOB_UNIQ) == [(P.NO_JOB,)]


class TestCancel:
    def test_lead_is_told(self, wire: Wire) -> None:
        worker, foreman = member(wire), lead(wire)
        grab(worker)
        assert wire.core.cancel(HANDLE)
        assert foreman.hears() == [(P.OPTION_RES, b"cancel " + HANDLE)]
        assert worker.hears() == []
        assert worker(P.WORK_COMPLETE, HANDLE, b"late") == []

    def test_worker_without_a_lead_is_told_itself(self, wire: Wire) -> None:
        worker = member(wire)
        grab(worker)
        wire.core.cancel(HANDLE)
        assert worker.hears() == [(P.OPTION_RES, b"cancel " + HANDLE)]

    def test_foreign_worker_hears_nothing(self, wire: Wire) -> None:
        worker = wire.worker(b"f")
        worker(P.OPTION_REQ, ATTEMPTS)
        grab(worker)
        wire.core.cancel(HANDLE)
        assert worker.hears() == []

    def test_job_that_waits_is_nobody_s(self, wire: Wire) -> None:
        foreman = lead(wire)
        wire.core.cancel(HANDLE)
        assert foreman.hears() == []
