"""Background jobs whose acknowledgement means that they are written."""

import pytest

from django_gearman import __version__
from django_gearman.protocol.packets import PacketType, encode_response
from django_gearman.server.entries import (
    JobFinished,
    JobKept,
    JobProgress,
    JobQueued,
    JobRequeued,
    JobStarted,
    Outcome,
    StoredJob,
)

from .harness import Caller, Wire, handle

P = PacketType
CREATED = (P.JOB_CREATED, handle(1))
REFUSED = (P.ERROR, b"QUEUE_ERROR", b"full")


@pytest.fixture
def wire() -> Wire:
    return Wire(durable=True)


@pytest.fixture
def client(wire) -> Caller:
    return wire.connect()


def queued(number: int = 1, *, background: bool = True, **changes) -> JobQueued:
    entry = JobQueued(handle(number), b"f", b"u", b"w", 0, background, b"127.0.0.1", 1000.0)
    return entry._replace(**changes)


class TestAcknowledgement:
    """DESIGN section 3: JOB_CREATED of a background job means that it is on disk."""

    @pytest.mark.parametrize("kind", [P.SUBMIT_JOB_BG, P.SUBMIT_JOB_HIGH_BG, P.SUBMIT_JOB_LOW_BG])
    def test_nothing_is_heard_before_the_commit(self, wire, client, kind):
        assert client(kind, b"f", b"u", b"w") == []
        wire.commit()
        assert client.hears() == [CREATED]

    def test_job_is_not_handed_out_before_the_commit(self, wire, client):
        worker = wire.worker(b"f").sleeps()
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"w")
        assert worker.hears() == []
        assert worker.grabs() is None
        assert worker.line(b"status") == b"f\t0\t0\t1\n.\n"
        assert wire.connect()(P.GET_STATUS, handle(1))[0][2:] == (b"0", b"0", b"0", b"0")
        worker.sleeps()
        wire.commit()
        assert worker.hears() == [(P.NOOP,)]
        assert worker.grabs() == handle(1)

    def test_foreground_job_waits_for_nothing(self, wire, client):
        assert client(P.SUBMIT_JOB, b"f", b"u", b"w") == [CREATED]
        assert wire.worker(b"f").grabs() == handle(1)

    def test_many_jobs_are_acknowledged_in_order(self, wire, client):
        for _ in range(5):
            assert client(P.SUBMIT_JOB_BG, b"f", b"", b"") == []
        entries = wire.entries()
        wire.core.committed(entries[:2])
        assert client.hears() == [(P.JOB_CREATED, handle(1)), (P.JOB_CREATED, handle(2))]
        wire.core.committed(entries[2:])
        assert client.hears() == [(P.JOB_CREATED, handle(n)) for n in (3, 4, 5)]

    def test_peer_that_left_before_the_commit_leaves_its_job(self, wire, client):
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"w")
        client.leaves()
        wire.commit()
        assert client.takes() == b""
        assert wire.worker(b"f").grabs() == handle(1)

    def test_joining_an_uncommitted_job_waits_for_its_commit(self, wire, client):
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"w")
        others = [wire.connect(), wire.connect()]
        assert others[0](P.SUBMIT_JOB_BG, b"f", b"u", b"") == []
        assert others[1](P.SUBMIT_JOB, b"f", b"u", b"") == []
        assert len(wire.commit()) == 1
        assert [peer.hears() for peer in (client, *others)] == [[CREATED]] * 3

    def test_without_a_journal_everything_is_acknowledged_at_once(self):
        wire = Wire(durable=False)
        assert wire.connect()(P.SUBMIT_JOB_BG, b"f", b"u", b"w") == [CREATED]
        worker = wire.worker(b"f")
        worker.grabs()
        worker(P.WORK_COMPLETE, handle(1), b"")
        assert wire.entries() == []


class TestOrderOfAnswers:
    """DESIGN section 2: a waiting answer holds its place, on its own connection only."""

    def test_later_replies_wait_behind_the_uncommitted_job(self, wire, client):
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"w")
        assert client(P.ECHO_REQ, b"1") == []
        assert client(P.GET_STATUS, b"H:no") == []
        (question,) = wire.core.questions
        assert client(P.GRAB_JOB) == []
        assert client.line(b"version") == b""
        wire.commit()
        assert client.takes() == b"".join(
            [encode_response(P.JOB_CREATED, handle(1)), encode_response(P.ECHO_RES, b"1")]
        )
        # Only the store knows that there is no such job.
        wire.core.window.replied(question, None)
        assert client.takes() == b"".join(
            [
                encode_response(P.STATUS_RES, b"H:no", b"0", b"0", b"0", b"0"),
                encode_response(P.NO_JOB),
                b"OK " + __version__.encode() + b"\n",
            ]
        )

    def test_replies_between_two_uncommitted_jobs(self, wire, client):
        client(P.ECHO_REQ, b"0")
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        client(P.ECHO_REQ, b"1")
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        client(P.ECHO_REQ, b"2")
        first, second = wire.entries()
        wire.core.committed([second])
        assert client.hears() == []
        wire.core.committed([first])
        assert client.hears() == [
            CREATED,
            (P.ECHO_RES, b"1"),
            (P.JOB_CREATED, handle(2)),
            (P.ECHO_RES, b"2"),
        ]
        assert client(P.ECHO_REQ, b"3") == [(P.ECHO_RES, b"3")]

    def test_other_connections_do_not_wait(self, wire, client):
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"w")
        assert wire.connect()(P.ECHO_REQ, b"1") == [(P.ECHO_RES, b"1")]

    def test_workers_packets_keep_their_place_too(self, wire, client):
        worker = wire.worker(b"f")
        client(P.SUBMIT_JOB, b"f", b"", b"")
        worker.grabs()
        client(P.SUBMIT_JOB_BG, b"g", b"", b"")
        worker(P.WORK_COMPLETE, handle(1), b"r")
        assert client.hears() == []
        wire.commit()
        assert client.hears() == [(P.JOB_CREATED, handle(2)), (P.WORK_COMPLETE, handle(1), b"r")]

    def test_assignment_behind_an_uncommitted_job_is_not_lost(self, wire):
        wire.connect()(P.SUBMIT_JOB, b"f", b"", b"w")
        both = wire.worker(b"f")
        both(P.SUBMIT_JOB_BG, b"g", b"", b"")
        assert both(P.GRAB_JOB) == []
        wire.commit()
        assert both.hears() == [(P.JOB_CREATED, handle(2)), (P.JOB_ASSIGN, handle(1), b"f", b"w")]


class TestRejection:
    """DESIGN section 4, "At each crash point": ERROR to the bad part, never to its good neighbours."""

    def test_exactly_the_submitters_hear_an_error(self, wire, client):
        other, neighbour = wire.connect(), wire.connect()
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"w")
        other(P.SUBMIT_JOB_BG, b"f", b"u", b"w")
        neighbour(P.SUBMIT_JOB_BG, b"f", b"v", b"w")
        bad, good = wire.entries()
        wire.core.rejected(bad, "full")
        wire.core.committed([good])
        assert client.hears() == [REFUSED]
        assert other.hears() == [REFUSED]
        assert neighbour.hears() == [(P.JOB_CREATED, handle(2))]

    def test_rejected_job_is_forgotten(self, wire, client):
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"w")
        attached = wire.connect()
        attached(P.SUBMIT_JOB, b"f", b"u", b"w")
        (entry,) = wire.entries()
        wire.core.rejected(entry, "full")
        assert attached.hears() == [REFUSED]
        assert client.hears() == [REFUSED]
        assert wire.worker(b"f").grabs() is None
        assert wire.entries() == []
        attached.leaves()
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"w")
        wire.commit()
        assert client.hears() == [(P.JOB_CREATED, handle(2))]

    def test_replies_behind_it_follow(self, wire, client):
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"w")
        client(P.ECHO_REQ, b"1")
        (entry,) = wire.entries()
        wire.core.rejected(entry, "full")
        assert client.hears() == [REFUSED, (P.ECHO_RES, b"1")]

    def test_peer_that_left_hears_nothing_and_the_job_is_gone(self, wire, client):
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"w")
        client.leaves()
        (entry,) = wire.entries()
        wire.core.rejected(entry, "full")
        assert client.takes() == b""
        assert wire.core.jobs == {}

    def test_foreground_job_that_could_not_be_recorded_goes_on(self, wire, client):
        client(P.SUBMIT_JOB, b"f", b"u", b"w")
        (entry,) = wire.entries()
        wire.core.rejected(entry, "full")
        worker = wire.worker(b"f")
        assert worker.grabs() == handle(1)
        worker(P.WORK_COMPLETE, handle(1), b"r")
        assert client.hears() == [(P.WORK_COMPLETE, handle(1), b"r")]
        assert wire.entries() == []

    def test_rejection_that_comes_too_late_changes_nothing(self, wire, client):
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"w")
        (entry,) = wire.commit()
        worker = wire.worker(b"f")
        worker.grabs()
        worker(P.WORK_COMPLETE, handle(1), b"r")
        wire.core.rejected(entry, "full")
        assert client.hears() == [CREATED]


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "not recorded"])
class TestBackgroundOntoForeground:
    """PROTOCOL section 5.1 and section 14, 3: the job becomes permanent, once that is written."""

    def start(self, recorded: bool) -> tuple[Wire, Caller, Caller]:
        """A wire, the foreground client and the background one, with one job, written as it is."""
        wire = Wire(durable=True, record_foreground=recorded)
        foreground, background = wire.connect(), wire.connect()
        assert foreground(P.SUBMIT_JOB, b"f", b"u", b"w") == [CREATED]
        assert wire.commit() == ([queued(background=False)] if recorded else [])
        return wire, foreground, background

    def test_it_is_heard_once_that_is_written(self, recorded):
        wire, foreground, background = self.start(recorded)
        assert background(P.SUBMIT_JOB_BG, b"f", b"u", b"other") == []
        assert wire.commit() == [JobKept(handle(1), 1000.0, b"f", b"u") if recorded else queued()]
        assert background.hears() == [CREATED]
        assert foreground.hears() == []
        foreground.leaves()
        assert wire.worker(b"f").grabs() == handle(1)

    def test_second_one_is_answered_with_the_first(self, recorded):
        wire, _, background = self.start(recorded)
        background(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        assert background(P.SUBMIT_JOB_BG, b"f", b"u", b"") == []
        assert len(wire.commit()) == 1
        assert background.hears() == [CREATED, CREATED]
        assert background(P.SUBMIT_JOB_BG, b"f", b"u", b"") == [CREATED]
        assert wire.entries() == []

    def test_foreground_client_leaves_before_it_is_written(self, recorded):
        wire, foreground, background = self.start(recorded)
        background(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        foreground.leaves()
        wire.commit()
        assert background.hears() == [CREATED]
        assert wire.worker(b"f").grabs() == handle(1)

    def test_running_job_that_nobody_waits_for_is_kept_from_its_workers_end(self, recorded):
        wire, foreground, background = self.start(recorded)
        worker = wire.worker(b"f")
        worker.grabs()
        wire.entries()
        background(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        entries = wire.commit()
        started = JobStarted(handle(1), b"127.0.0.1", 1, 1000.0)
        assert entries == ([JobKept(handle(1), 1000.0, b"f", b"u")] if recorded else [queued(), started])
        foreground.leaves()
        worker.leaves()
        assert wire.worker(b"f").grabs() == handle(1)

    def test_job_that_ends_before_it_is_written_is_answered(self, recorded):
        wire, foreground, background = self.start(recorded)
        worker = wire.worker(b"f")
        worker.grabs()
        background(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        background(P.ECHO_REQ, b"behind")
        worker(P.WORK_COMPLETE, handle(1), b"r")
        wire.commit()
        assert background.hears() == [CREATED, (P.ECHO_RES, b"behind")]
        assert foreground.hears() == [(P.WORK_COMPLETE, handle(1), b"r")]

    def test_record_that_it_never_had_cannot_be_kept(self, recorded):
        wire = Wire(durable=True, record_foreground=True)
        foreground, background = wire.connect(), wire.connect()
        foreground(P.SUBMIT_JOB, b"f", b"u", b"w")
        background(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        queued_entry, kept = wire.entries()
        wire.core.rejected(queued_entry, "full")
        assert background.hears() == [REFUSED]
        background(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        wire.core.committed([kept])
        assert background.hears() == []
        wire.commit()
        assert background.hears() == [CREATED]

    def test_refusal_leaves_it_a_foreground_job(self, recorded):
        wire, foreground, background = self.start(recorded)
        background(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        (entry,) = wire.entries()
        wire.core.rejected(entry, "full")
        assert background.hears() == [REFUSED]
        assert foreground.hears() == []
        foreground.leaves()
        assert wire.worker(b"f").grabs() is None

    def test_second_wish_to_keep_it_is_not_answered_by_the_first(self, recorded):
        wire, _, background = self.start(recorded)
        background(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        (first,) = wire.entries()
        # Its client waited too long, while the store had it.
        wire.core.rejected(first, "full")
        assert background.hears() == [REFUSED]
        background(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        (second,) = wire.entries()
        wire.core.committed([first])
        assert background.hears() == []
        wire.core.rejected(first, "full")
        assert background.hears() == []
        wire.core.committed([second])
        assert background.hears() == [CREATED]

    def test_refusal_after_its_clients_left_ends_it(self, recorded):
        wire, foreground, background = self.start(recorded)
        background(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        foreground.leaves()
        (entry,) = wire.entries()
        wire.core.rejected(entry, "full")
        assert wire.core.jobs == {}

    def test_foreground_client_that_joins_meanwhile_neither_waits_nor_is_refused(self, recorded):
        wire, _, background = self.start(recorded)
        background(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        late = wire.connect()
        assert late(P.SUBMIT_JOB, b"f", b"u", b"") == [CREATED]
        (entry,) = wire.entries()
        wire.core.rejected(entry, "full")
        assert late.hears() == []
        worker = wire.worker(b"f")
        worker.grabs()
        worker(P.WORK_COMPLETE, handle(1), b"r")
        assert late.hears() == [(P.WORK_COMPLETE, handle(1), b"r")]


class TestEntries:
    """``entries.py``: the facts of each life of a job, in order."""

    def life(self, kind: PacketType = P.SUBMIT_JOB_BG, **options) -> tuple[Wire, Caller, Caller]:
        """A job that a worker has, and everything written so far taken away."""
        wire = Wire(durable=True, **options)
        client, worker = wire.connect("10.0.0.1"), wire.connect("10.0.0.2")
        worker(P.CAN_DO, b"f")
        client(kind, b"f", b"u", b"w")
        wire.commit()
        assert worker.grabs() == handle(1)
        return wire, client, worker

    def finished(self, outcome: Outcome, data: bytes = b"", reason: str = "") -> JobFinished:
        return JobFinished(handle(1), outcome, data, reason, 1000.0)

    @pytest.mark.parametrize(
        ("kind", "priority", "background"),
        [
            (P.SUBMIT_JOB_HIGH, 50, False),
            (P.SUBMIT_JOB, 0, False),
            (P.SUBMIT_JOB_LOW, -50, False),
            (P.SUBMIT_JOB_HIGH_BG, 50, True),
            (P.SUBMIT_JOB_BG, 0, True),
            (P.SUBMIT_JOB_LOW_BG, -50, True),
        ],
    )
    def test_submission(self, wire, client, kind, priority, background):
        client(P.SET_CLIENT_ID, b"me")
        client(kind, b"f", b"u", b"w")
        assert wire.entries() == [queued(priority=priority, background=background, client=b"me")]

    def test_success(self):
        wire, _, worker = self.life()
        worker(P.WORK_COMPLETE, handle(1), b"r")
        assert wire.entries() == [
            JobStarted(handle(1), b"10.0.0.2", 1, 1000.0),
            self.finished(Outcome.SUCCESSFUL, b"r"),
        ]

    def test_failure(self):
        wire, _, worker = self.life()
        wire.entries()
        worker(P.WORK_FAIL, handle(1))
        assert wire.entries() == [
            self.finished(Outcome.FAILED, reason="The worker reported that the job failed")
        ]

    def test_exception(self):
        wire, _, worker = self.life()
        wire.entries()
        worker(P.WORK_EXCEPTION, handle(1), b"boom")
        worker(P.WORK_FAIL, handle(1))
        assert wire.entries() == [self.finished(Outcome.FAILED, b"boom")]

    def test_lost_worker(self):
        wire, _, worker = self.life()
        wire.entries()
        worker.leaves()
        (entry,) = wire.entries()
        assert entry == JobRequeued(handle(1), b"10.0.0.2", 1, 1000.0, 1000.0, "The worker was lost")
        wire.worker(b"f").grabs()
        assert wire.entries() == [JobStarted(handle(1), b"127.0.0.1", 2, 1000.0)]

    def test_last_lost_worker(self):
        wire, _, worker = self.life(job_retries=1)
        wire.entries()
        worker.leaves()
        (entry,) = wire.entries()
        assert entry.outcome == Outcome.DEAD

    def test_client_that_left_a_waiting_foreground_job(self, wire, client):
        client(P.SUBMIT_JOB, b"f", b"u", b"w")
        wire.entries()
        client.leaves()
        (entry,) = wire.entries()
        assert (entry.handle, entry.outcome) == (handle(1), Outcome.CANCELLED)

    def test_client_and_then_worker_that_left(self):
        wire, client, worker = self.life(P.SUBMIT_JOB)
        wire.entries()
        client.leaves()
        assert wire.entries() == []
        worker.leaves()
        (entry,) = wire.entries()
        assert entry.outcome == Outcome.CANCELLED

    def test_progress_is_written_at_most_once_per_interval(self):
        wire, _, worker = self.life(progress_interval=1.0)
        wire.entries()
        for number, now in enumerate((1000.0, 1000.5, 1000.9, 1001.0, 1001.5)):
            wire.core.now = now
            worker(P.WORK_STATUS, handle(1), b"%d" % number, b"5")
        assert wire.entries() == [JobProgress(handle(1), b"0", b"5"), JobProgress(handle(1), b"3", b"5")]

    def test_foreground_jobs_need_not_be_recorded(self):
        wire, _, worker = self.life(P.SUBMIT_JOB, record_foreground=False)
        worker(P.WORK_STATUS, handle(1), b"1", b"2")
        worker(P.WORK_COMPLETE, handle(1), b"")
        assert wire.entries() == []


class TestJoined:
    """The store has a live job of the unique that this server has not: the submission is of that one."""

    THEIRS = b"H:other:3.5"

    def submitted(self, *, waits: bool = False) -> tuple[Wire, Caller, Caller, JobQueued]:
        wire = Wire(durable=True)
        background, foreground = wire.connect(), wire.connect()
        assert background(P.SUBMIT_JOB_BG, b"f", b"u", b"w") == []
        if waits:
            assert foreground(P.SUBMIT_JOB, b"f", b"u", b"w") == []
        (entry,) = wire.entries()
        return wire, background, foreground, entry

    def test_client_hears_of_the_other_and_no_second_is_made(self):
        wire, background, _, entry = self.submitted()
        wire.core.joined(entry, self.THEIRS)
        assert background.hears() == [(P.JOB_CREATED, self.THEIRS)]
        assert wire.core.jobs == {}
        assert wire.worker(b"f").grabs() is None
        assert background(P.SUBMIT_JOB_BG, b"f", b"u", b"w") == []

    def test_who_waits_has_it_run_here(self):
        wire, background, foreground, entry = self.submitted(waits=True)
        wire.core.joined(entry, self.THEIRS)
        assert background.hears() == foreground.hears() == [CREATED]
        worker = wire.worker(b"f")
        assert worker.grabs() == handle(1)
        worker(P.WORK_COMPLETE, handle(1), b"done")
        assert foreground.hears() == [(P.WORK_COMPLETE, handle(1), b"done")]
        # Nothing of it is kept: the other job is.
        assert wire.entries() == []

    def test_who_waits_hears_of_one_that_was_claimed_meanwhile(self):
        wire, background, foreground, entry = self.submitted(waits=True)
        wire.core.adopt([StoredJob(self.THEIRS, b"f", b"u", b"w", 0, 0, None)])
        wire.core.joined(entry, self.THEIRS)
        created = (P.JOB_CREATED, self.THEIRS)
        assert background.hears() == foreground.hears() == [created]
        assert background(P.SUBMIT_JOB_BG, b"f", b"u", b"w") == [created]
        worker = wire.worker(b"f")
        assert worker.grabs() == self.THEIRS
        assert worker(P.GRAB_JOB) == [(P.NO_JOB,)]
        worker(P.WORK_COMPLETE, self.THEIRS, b"done")
        assert foreground.hears() == [(P.WORK_COMPLETE, self.THEIRS, b"done")]
        assert background.hears() == []

    def test_client_that_left_is_not_missed(self):
        wire, background, foreground, entry = self.submitted(waits=True)
        background.leaves()
        foreground.leaves()
        wire.core.joined(entry, self.THEIRS)
        assert wire.core.jobs == {}


class TestHold:
    """A server whose lease may be another's hands out nothing that is kept."""

    def wire(self) -> Wire:
        wire = Wire(durable=True)
        client = wire.connect()
        client(P.SUBMIT_JOB_HIGH_BG, b"f", b"", b"kept")
        wire.commit()
        client(P.SUBMIT_JOB, b"f", b"", b"foreground")
        wire.core.hand_out_until = 10.0
        return wire

    def test_kept_jobs_wait_and_foreground_jobs_do_not(self):
        wire = self.wire()
        worker = wire.worker(b"f")
        wire.core.clock = 10.0
        assert worker.grabs() == handle(2)
        assert worker(P.GRAB_JOB) == [(P.NO_JOB,)]
        assert worker(P.PRE_SLEEP) == []
        wire.core.tick()
        # It may be woken in vain, and sleeps again.
        worker.hears()
        assert worker(P.GRAB_JOB) == [(P.NO_JOB,)]
        assert worker(P.PRE_SLEEP) == []
        wire.core.hand_out_until = 20.0
        wire.core.tick()
        assert worker.hears() == [(P.NOOP,)]
        assert worker.grabs() == handle(1)

    def test_until_then_all_are_handed_out(self):
        wire = self.wire()
        wire.core.clock = 9.9
        worker = wire.worker(b"f")
        assert [worker.grabs(), worker.grabs()] == [handle(1), handle(2)]
