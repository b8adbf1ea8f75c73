"""What is written when, and what follows: the journal without threads and clocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from django_gearman.exceptions import LeaseLost, StoreError
from django_gearman.protocol.packets import LISTEN, ROW, PacketType
from django_gearman.server import journal as journal_module
from django_gearman.server.entries import (
    Claimed,
    Entry,
    JobFinished,
    JobKept,
    JobQueued,
    JobRequeued,
    JobStarted,
    Outcome,
    StoredJob,
)
from django_gearman.server.job_store import MemoryStore
from django_gearman.server.journal import CLAIM_PAUSE, GATHER, LINGER, Batch, Journal

from .harness import Caller, Wire, handle

P = PacketType
DOWN = StoreError("down")


class ScriptedStore(MemoryStore):
    """A store that does, at each call, the next thing of its script; then it works."""

    def __init__(self, *script: BaseException | dict[int, str] | None) -> None:
        super().__init__()
        self.script = list(script)
        self.writes: list[tuple[list[Entry], bool]] = []
        self.claims: list[tuple[int, dict[bytes, int]]] = []
        self.claim_error: StoreError | None = None

    def write(self, entries: Sequence[Entry], *, again: bool) -> dict[int, str]:
        self.writes.append((list(entries), again))
        step = self.script.pop(0) if self.script else None
        if isinstance(step, BaseException):
            raise step
        joined = super().write(entries, again=again)
        return step or joined

    def claim(self, limit: int, full: Mapping[bytes, int], crowded: Mapping[bytes, Any] = {}) -> Claimed:
        self.claims.append((limit, dict(full)))
        if self.claim_error is not None:
            raise self.claim_error
        return super().claim(limit, full, crowded)


def replayed(store: MemoryStore) -> list[StoredJob]:
    """What an earlier run left to be done, as the next one takes it over."""
    return [*store.resume(), *store.claim(1000, {}).jobs]


class Office:
    """A wire whose entries a journal carries to a store; the clock is in its hands."""

    def __init__(
        self,
        *script: BaseException | dict[int, str] | None,
        window: int = 10_000,
        record_foreground: bool = True,
        **options: float,
    ) -> None:
        self.wire = Wire(durable=True, window=window, record_foreground=record_foreground)
        self.store = ScriptedStore(*script)
        self.journal = Journal(self.wire.core, **options)
        self.now = 50.0

    def gather(self) -> None:
        core = self.wire.core
        core.limits.settle()
        self.journal.ask(core.questions)
        core.questions = []
        if core.claim_wanted:
            core.claim_wanted = False
            self.journal.claim_soon()
        if core.entries:
            self.journal.append(self.wire.entries(), self.now, urgent=core.urgent, many_end=core.many_end)
            core.urgent = core.many_end = False

    def begin(self) -> Batch | None:
        self.gather()
        return self.journal.next_batch(self.now)

    def trip(self) -> Batch | None:
        """One trip to the store, if there is reason for one."""
        batch = self.begin()
        if batch is not None:
            batch.perform(self.store)
            self.journal.done(batch, self.now)
        return batch

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.wire.core.now += seconds
        self.wire.core.clock += seconds


def submit(client: Caller, unique: bytes = b"") -> None:
    assert client(P.SUBMIT_JOB_BG, b"f", unique, b"w") == []


def settled(*script: BaseException | dict[int, str] | None, **options: float) -> tuple[Office, Caller]:
    """An office after its first claim, and a client."""
    office = Office(*script, **options)
    assert office.trip() is not None
    return office, office.wire.connect()


class TestBatches:
    """While one batch is written the next gathers."""

    def test_everything_gathered_is_one_batch_in_order(self):
        office, client = settled()
        for _ in range(3):
            submit(client)
        batch = office.begin()
        assert [entry.handle for entry in batch.entries] == [handle(1), handle(2), handle(3)]
        assert not batch.again

    def test_nothing_is_begun_while_the_writer_is_at_work(self):
        office, client = settled()
        submit(client)
        first = office.begin()
        submit(client)
        assert office.begin() is None
        assert office.journal.busy
        first.perform(office.store)
        office.journal.done(first, office.now)
        assert client.hears() == [(P.JOB_CREATED, handle(1))]
        second = office.begin()
        assert [entry.handle for entry in second.entries] == [handle(2)]

    def test_nothing_to_do(self):
        office, _ = settled()
        assert office.begin() is None
        assert office.journal.idle

    def test_large_crowd_is_cut_into_batches(self, monkeypatch):
        monkeypatch.setattr(journal_module, "MAX_BATCH", 3)
        office, client = settled()
        for _ in range(7):
            submit(client)
        sizes = [len(office.trip().entries) for _ in range(3)]
        assert sizes == [3, 3, 1]
        assert office.begin() is None
        assert client.hears() == [(P.JOB_CREATED, handle(n)) for n in range(1, 8)]

    def test_idle_means_that_everything_is_written(self):
        office, client = settled(DOWN)
        assert office.journal.idle
        submit(client)
        office.gather()
        assert not office.journal.idle
        office.trip()
        assert not office.journal.idle
        office.pass_time(1.0)
        batch = office.begin()
        assert not office.journal.idle
        batch.perform(office.store)
        office.journal.done(batch, office.now)
        assert office.journal.idle

    def test_what_nobody_waits_for_waits_for_company(self):
        office, client = settled()
        client(P.SUBMIT_JOB, b"f", b"", b"")
        assert office.begin() is None
        assert office.journal.next_deadline() == office.now + LINGER
        office.pass_time(LINGER)
        assert len(office.trip().entries) == 1

    def test_ends_wait_for_each_other_while_jobs_wait_for_a_worker(self):
        office, client = settled()
        worker = office.wire.connect()
        worker(P.CAN_DO, b"f")
        for _ in range(3):
            client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        office.trip()
        worker(P.GRAB_JOB)
        for number in (1, 2):
            worker(P.WORK_COMPLETE, handle(number), b"")
            worker(P.GRAB_JOB)
            assert office.begin() is None
        assert office.journal.next_deadline() == office.now + GATHER
        office.pass_time(GATHER)
        ended = [entry.handle for entry in office.trip().entries if isinstance(entry, JobFinished)]
        assert ended == [handle(1), handle(2)]
        # Nothing comes after the last one.
        worker(P.WORK_COMPLETE, handle(3), b"")
        assert [type(entry) for entry in office.trip().entries] == [JobFinished]

    def test_ends_do_not_wait_because_of_jobs_that_their_worker_does_not_run(self):
        office, client = settled()
        worker = office.wire.connect()
        worker(P.CAN_DO, b"f")
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        client(P.SUBMIT_JOB_BG, b"nobody's", b"", b"")
        office.trip()
        worker(P.GRAB_JOB)
        worker(P.WORK_COMPLETE, handle(1), b"")
        assert [type(entry) for entry in office.trip().entries] == [JobStarted, JobFinished]

    def test_an_end_that_somebody_waits_for_does_not_wait(self):
        office, client = settled()
        row = b"H:test:1:r5"
        office.wire.core.adopt([StoredJob(row, b"f", b"", b"w", 0, 0, None)])
        worker = office.wire.connect()
        worker(P.CAN_DO, b"f")
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        office.trip()
        client(P.OPTION_REQ, LISTEN + ROW + b"5")
        worker(P.GRAB_JOB)
        worker(P.WORK_COMPLETE, row, b"")
        assert [type(entry) for entry in office.trip().entries] == [JobStarted, JobFinished]

    def test_company_that_does_not_wait_takes_it_along(self):
        office, client = settled()
        client(P.SUBMIT_JOB, b"f", b"", b"")
        office.gather()
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        assert [entry.handle for entry in office.trip().entries] == [handle(1), handle(2)]

    def test_before_the_end_nothing_waits_and_nothing_is_claimed(self):
        office, client = settled()
        client(P.SUBMIT_JOB, b"f", b"", b"")
        office.gather()
        office.journal.hurry()
        office.pass_time(5.0)
        batch = office.trip()
        assert len(batch.entries) == 1
        assert not batch.claim
        office.journal.claim_soon()
        assert office.begin() is None
        assert len(office.store.claims) == 1

    def test_entry_after_hurry_has_a_deadline_that_is_not_over(self):
        """Else the timer would fire again and again until it is due."""
        office, client = settled()
        office.journal.hurry()
        assert office.begin() is None
        office.pass_time(5.0)
        client(P.SUBMIT_JOB, b"f", b"", b"")
        office.gather()
        assert office.begin() is not None or office.journal.next_deadline() > office.now


class TestCommit:
    """The store wrote: clients hear of it."""

    def test_acknowledged_job_is_in_the_store(self):
        office, client = settled()
        submit(client)
        office.trip()
        assert client.hears() == [(P.JOB_CREATED, handle(1))]
        assert list(office.store.jobs) == [handle(1)]
        assert replayed(office.store) == [StoredJob(handle(1), b"f", b"", b"w", 0, 0, None)]

    def test_refused_entry_alone_is_refused(self, caplog):
        office, client = settled({1: "not UTF-8"})
        neighbour = office.wire.connect()
        submit(neighbour)
        submit(client)
        submit(neighbour)
        office.trip()
        assert client.hears() == [(P.ERROR, b"QUEUE_ERROR", b"The job could not be stored")]
        assert neighbour.hears() == [(P.JOB_CREATED, handle(1)), (P.JOB_CREATED, handle(3))]
        assert "not UTF-8" in caplog.text
        assert handle(2).decode() in caplog.text

    def test_refused_entry_that_is_no_submission_is_only_logged(self, caplog):
        office, client = settled(None, {0: "why"})
        submit(client)
        office.trip()
        worker = office.wire.worker(b"f")
        worker.grabs()
        worker(P.WORK_COMPLETE, handle(1), b"")
        office.trip()
        assert client.hears() == [(P.JOB_CREATED, handle(1))]
        assert "Cannot keep JobStarted" in caplog.text


class TestStoreOutOfReach:
    """DESIGN section 4: the loop goes on, submissions wait up to a limit, the rest is written later."""

    def test_batch_is_tried_again_as_it_was(self):
        office, client = settled(DOWN)
        submit(client)
        office.trip()
        assert client.hears() == []
        office.pass_time(1.0)
        office.trip()
        (first, again_first), (second, again_second) = office.store.writes
        assert first == second
        assert (again_first, again_second) == (False, True)
        assert client.hears() == [(P.JOB_CREATED, handle(1))]

    def test_what_came_meanwhile_is_written_after_it(self):
        office, client = settled(DOWN)
        submit(client)
        office.trip()
        submit(client)
        office.pass_time(1.0)
        office.trip()
        office.trip()
        assert [[entry.handle for entry in entries] for entries, _ in office.store.writes] == [
            [handle(1)],
            [handle(1)],
            [handle(2)],
        ]
        assert [again for _, again in office.store.writes] == [False, True, False]

    def test_pauses_grow_up_to_a_second(self):
        office, client = settled(*[DOWN] * 8)
        submit(client)
        pauses = []
        for _ in range(8):
            assert office.trip() is not None
            assert office.trip() is None
            deadline = office.journal.next_deadline()
            pauses.append(round(deadline - office.now, 6))
            office.now = deadline
        office.trip()
        assert client.hears() == [(P.JOB_CREATED, handle(1))]
        assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]

    def test_pauses_begin_anew_after_a_success(self):
        office, client = settled(DOWN, DOWN, None, DOWN)
        submit(client)
        office.trip()
        office.pass_time(1.0)
        office.trip()
        office.pass_time(1.0)
        office.trip()
        assert client.hears() == [(P.JOB_CREATED, handle(1))]
        submit(client)
        office.trip()
        assert office.journal.next_deadline() == pytest.approx(office.now + 0.05)

    def test_claims_that_fail_pause_longer_each_time_too(self, caplog):
        """An idle server must not ask a database that is down twenty times a second."""
        office, _ = settled()
        office.store.claim_error = DOWN
        office.pass_time(1.0)
        pauses = []
        for _ in range(7):
            assert office.trip() is not None
            deadline = office.journal.next_deadline()
            pauses.append(round(deadline - office.now, 6))
            office.now = deadline
        assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
        assert caplog.text.count("does not take anything") == 1

    def test_entries_are_acknowledged_though_the_claim_behind_them_fails(self):
        office, client = settled()
        office.store.claim_error = DOWN
        office.pass_time(1.0)
        submit(client)
        office.trip()
        assert client.hears() == [(P.JOB_CREATED, handle(1))]
        submit(client)
        office.trip()
        assert client.hears() == [(P.JOB_CREATED, handle(2))]

    def test_submission_that_waited_too_long_is_refused_and_cancelled(self):
        office, client = settled(DOWN, DOWN, submit_limit=10.0)
        submit(client)
        office.trip()
        office.pass_time(9.9)
        submit(client)
        office.gather()
        assert client.hears() == []
        office.pass_time(0.1)
        office.trip()
        assert client.hears() == [(P.ERROR, b"QUEUE_ERROR", b"The store is out of reach")]
        office.pass_time(1.0)
        office.trip()
        ((entry,), again) = office.store.writes[-1]
        assert again
        assert (type(entry), entry.handle, entry.outcome) == (JobFinished, handle(1), Outcome.CANCELLED)
        office.trip()
        assert client.hears() == [(P.JOB_CREATED, handle(2))]
        assert list(office.store.jobs) == [handle(2)]

    def test_submissions_that_gather_meanwhile_are_refused_in_time_too(self):
        office, client = settled(*[DOWN] * 3, submit_limit=10.0)
        submit(office.wire.connect())
        office.trip()
        submit(client)
        office.gather()
        office.pass_time(10.0)
        office.trip()
        assert client.hears() == [(P.ERROR, b"QUEUE_ERROR", b"The store is out of reach")]

    def test_background_submission_onto_a_foreground_job_is_refused_in_time(self):
        office, background = settled(None, DOWN, DOWN, submit_limit=10.0)
        foreground = office.wire.connect()
        foreground(P.SUBMIT_JOB, b"f", b"u", b"")
        office.gather()
        office.pass_time(LINGER)
        assert len(office.trip().entries) == 1
        assert background(P.SUBMIT_JOB_BG, b"f", b"u", b"") == []
        office.trip()
        office.pass_time(10.0)
        office.trip()
        assert background.hears() == [(P.ERROR, b"QUEUE_ERROR", b"The store is out of reach")]
        worker = office.wire.worker(b"f")
        assert worker.grabs() == handle(1)
        foreground.hears()
        worker(P.WORK_COMPLETE, handle(1), b"")
        assert foreground.hears() == [(P.WORK_COMPLETE, handle(1), b"")]

    @pytest.mark.parametrize("seconds", [-3600.0, 3600.0])
    def test_jump_of_the_wall_clock_changes_nothing(self, seconds):
        office, client = settled(DOWN, DOWN, DOWN, submit_limit=10.0)
        submit(client)
        office.trip()
        office.wire.core.now += seconds
        office.pass_time(9.9)
        office.trip()
        assert client.hears() == []
        office.pass_time(0.2)
        office.trip()
        assert client.hears() == [(P.ERROR, b"QUEUE_ERROR", b"The store is out of reach")]

    def test_record_of_a_job_that_has_ended_is_not_refused(self):
        office, background = settled(None, DOWN, DOWN, submit_limit=10.0, record_foreground=False)
        foreground, worker = office.wire.connect(), office.wire.worker(b"f")
        foreground(P.SUBMIT_JOB, b"f", b"u", b"")
        worker.grabs()
        background(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        office.trip()
        worker(P.WORK_COMPLETE, handle(1), b"r")
        assert background.hears() == [(P.JOB_CREATED, handle(1))]
        office.pass_time(10.0)
        while not office.journal.idle or office.wire.core.entries:
            office.trip()
            office.pass_time(1.0)
        assert office.store.finished[handle(1)].outcome is Outcome.SUCCESSFUL

    def test_results_are_never_refused(self):
        office, client = settled(None, *[DOWN] * 30, submit_limit=10.0)
        submit(client)
        office.trip()
        worker = office.wire.worker(b"f")
        worker.grabs()
        worker(P.WORK_COMPLETE, handle(1), b"r")
        while not office.journal.idle or office.wire.core.entries:
            office.trip()
            office.pass_time(1.0)
        assert office.store.finished[handle(1)].data == b"r"


class TestStoreHangs:
    """DESIGN section 4: a stuck writer lets submissions wait up to a limit; all else goes on."""

    def test_submission_in_the_writers_hands_is_refused_in_time(self):
        office, client = settled(submit_limit=10.0)
        submit(client)
        batch = office.begin()
        office.pass_time(9.9)
        office.journal.refuse_overdue()
        assert client.hears() == []
        office.pass_time(0.1)
        office.journal.refuse_overdue()
        assert client.hears() == [(P.ERROR, b"QUEUE_ERROR", b"The store is out of reach")]
        office.journal.refuse_overdue()
        assert client.hears() == []
        assert batch is not None

    def hang(self, *script: BaseException | None, gathered: int = 0) -> tuple[Office, Caller, Batch]:
        """A batch with one submission, refused while the store has it, and a client with later ones."""
        office, client = settled(*script, submit_limit=10.0)
        submit(client)
        batch = office.begin()
        assert batch is not None
        office.pass_time(10.0)
        for _ in range(gathered):
            submit(client)
        office.gather()
        office.journal.refuse_overdue()
        assert client.hears() == [(P.ERROR, b"QUEUE_ERROR", b"The store is out of reach")]
        return office, client, batch

    def test_what_is_written_after_all_is_undone_and_not_acknowledged(self):
        office, client, batch = self.hang(gathered=1)
        batch.perform(office.store)
        office.journal.done(batch, office.now)
        assert list(office.store.jobs) == [handle(1)]
        assert client.hears() == []
        assert office.wire.worker(b"f").grabs() is None
        office.trip()
        assert list(office.store.jobs) == [handle(2)]
        assert office.store.finished[handle(1)].outcome is Outcome.CANCELLED
        assert client.hears() == [(P.JOB_CREATED, handle(2))]

    def test_what_fails_after_all_is_not_tried_again(self):
        office, client, batch = self.hang(DOWN)
        batch.perform(office.store)
        office.journal.done(batch, office.now)
        office.pass_time(1.0)
        while not office.journal.idle:
            office.trip()
            office.pass_time(0.1)
        assert office.store.jobs == {}
        assert client.hears() == []

    def test_others_may_have_joined_one_with_a_unique(self):
        office, client = settled(submit_limit=10.0)
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"w")
        batch = office.begin()
        assert batch is not None
        office.pass_time(10.0)
        office.journal.refuse_overdue()
        assert client.hears() == [(P.ERROR, b"QUEUE_ERROR", b"The store is out of reach")]
        batch.perform(office.store)
        office.journal.done(batch, office.now)
        office.trip()
        # It was laid at the door and claimed: to submit it again is to join it.
        assert client(P.SUBMIT_JOB_BG, b"f", b"u", b"w") == [(P.JOB_CREATED, handle(1))]
        assert office.wire.worker(b"f").grabs() == handle(1)

    def test_undoing_comes_before_what_gathered_meanwhile(self):
        office, _, _ = self.hang(gathered=2)
        kinds = [type(entry) for entry in office.journal._gathering]
        assert kinds == [JobFinished, JobQueued, JobQueued]

    def test_submissions_that_gather_meanwhile_leave_nothing_behind(self):
        office, client = settled(submit_limit=10.0)
        submit(client)
        office.begin()
        other = office.wire.connect()
        office.pass_time(5.0)
        submit(other)
        office.gather()
        office.pass_time(10.0)
        office.journal.refuse_overdue()
        assert other.hears() == [(P.ERROR, b"QUEUE_ERROR", b"The store is out of reach")]
        assert [entry.handle for entry in office.journal._gathering] == [handle(1)]

    def test_job_that_ended_in_the_writers_hands_keeps_its_outcome(self):
        office, background = settled(submit_limit=10.0, record_foreground=False)
        foreground, worker = office.wire.connect(), office.wire.worker(b"f")
        foreground(P.SUBMIT_JOB, b"f", b"u", b"")
        worker.grabs()
        background(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        worker(P.WORK_COMPLETE, handle(1), b"r")
        batch = office.begin()
        assert batch is not None
        assert isinstance(batch.entries[-1], JobFinished)
        office.pass_time(10.0)
        office.journal.refuse_overdue()
        batch.perform(office.store)
        office.journal.done(batch, office.now)
        office.trip()
        assert office.store.finished[handle(1)].outcome is Outcome.SUCCESSFUL

    def test_background_submission_onto_a_foreground_job(self):
        office, background = settled(submit_limit=10.0)
        foreground = office.wire.connect()
        foreground(P.SUBMIT_JOB, b"f", b"u", b"")
        office.gather()
        office.pass_time(LINGER)
        office.trip()
        assert background(P.SUBMIT_JOB_BG, b"f", b"u", b"") == []
        batch = office.begin()
        assert batch is not None
        office.pass_time(10.0)
        office.journal.refuse_overdue()
        assert background.hears() == [(P.ERROR, b"QUEUE_ERROR", b"The store is out of reach")]
        batch.perform(office.store)
        office.journal.done(batch, office.now)
        assert background.hears() == []
        worker = office.wire.worker(b"f")
        assert worker.grabs() == handle(1)
        foreground.hears()
        worker(P.WORK_COMPLETE, handle(1), b"r")
        assert foreground.hears() == [(P.WORK_COMPLETE, handle(1), b"r")]

    def test_results_are_kept(self):
        office, client = settled(submit_limit=10.0)
        submit(client)
        submit(client)
        office.trip()
        client.hears()
        worker = office.wire.worker(b"f")
        worker.grabs()
        office.gather()
        office.pass_time(LINGER)
        batch = office.begin()
        assert batch is not None
        worker(P.WORK_COMPLETE, handle(1), b"r")
        office.gather()
        office.pass_time(1000.0)
        office.journal.refuse_overdue()
        batch.perform(office.store)
        office.journal.done(batch, office.now)
        office.trip()
        assert office.store.finished[handle(1)].data == b"r"
        assert list(office.store.jobs) == [handle(2)]


class TestWords:
    """What the log says of a store that is away, or hangs."""

    HANGS = "The store has not answered for 5 s; background submissions that wait 10 s are refused"
    KEPT = "Background jobs are not handed out until the store answers: other servers may take them over"

    def pass_seconds(self, office: Office, seconds: int) -> None:
        for _ in range(seconds):
            office.pass_time(1.0)
            office.journal.notice_silence(office.now)

    @pytest.mark.parametrize("has_entries", [True, False])
    def test_store_that_hangs(self, caplog: pytest.LogCaptureFixture, has_entries: bool):
        office, client = settled()
        if has_entries:
            submit(client)
        else:
            office.pass_time(1.0)
        batch = office.begin()
        assert batch is not None
        self.pass_seconds(office, 4)
        assert not caplog.messages
        self.pass_seconds(office, 20)
        assert caplog.messages == [self.HANGS]
        assert office.journal.lag(office.wire.core.now, office.now) == 24.0
        batch.perform(office.store)
        office.journal.done(batch, office.now)
        assert caplog.messages == [self.HANGS, "The store answers again, after 24.0 s"]
        assert office.journal.lag(office.wire.core.now, office.now) == 0.0
        self.pass_seconds(office, 20)
        assert len(caplog.messages) == 2

    def test_each_reason_once(self, caplog: pytest.LogCaptureFixture):
        office, client = settled(DOWN, DOWN, StoreError("starting up"), DOWN, StoreError("starting up"))
        submit(client)
        for _ in range(6):
            assert office.trip() is not None
            self.pass_seconds(office, 2)
        assert caplog.messages == [
            "The store does not take anything: down; trying again",
            "The store does not take anything: starting up; trying again",
            "The store answers again, after 10.0 s",
        ]

    def test_next_outage_is_told_anew(self, caplog: pytest.LogCaptureFixture):
        office, client = settled(DOWN, None, DOWN)
        for _ in range(2):
            submit(client)
            office.trip()
            self.pass_seconds(office, 2)
            office.trip()
            client.hears()
        assert [line[:20] for line in caplog.messages] == ["The store does not t", "The store answers ag"] * 2

    def test_reasons_without_end(self, caplog: pytest.LogCaptureFixture):
        office, client = settled(*[StoreError(f"process {number}") for number in range(100)])
        submit(client)
        for _ in range(101):
            office.trip()
            office.pass_time(2.0)
        assert len(caplog.messages) == journal_module.COMPLAINTS + 1
        assert "answers again" in caplog.messages[-1]

    def test_store_that_is_away_while_nothing_happens(self):
        office, _ = settled()
        office.store.claim_error = DOWN
        office.pass_time(1.0)
        office.trip()
        office.pass_time(7.0)
        assert office.journal.lag(office.wire.core.now, office.now) == 7.0

    def test_jobs_that_are_kept_from_workers(self, caplog: pytest.LogCaptureFixture):
        office, client = settled(hold=20.0)
        office.journal.renewed(office.now)
        submit(client)
        assert office.begin() is not None
        self.pass_seconds(office, 19)
        assert caplog.messages == [self.HANGS]
        self.pass_seconds(office, 10)
        assert caplog.messages == [self.HANGS, self.KEPT]


class TestBacklog:
    """What waits for the store is bounded; what became of jobs is kept all the same."""

    def test_more_is_refused_at_once_until_there_is_room(self):
        office, client = settled(backlog=10_000)
        client(P.SUBMIT_JOB_BG, b"f", b"", bytes(6_000))
        batch = office.begin()
        assert batch is not None
        client(P.SUBMIT_JOB_BG, b"f", b"", bytes(6_000))
        client(P.SUBMIT_JOB_BG, b"f", b"", b"small")
        other = office.wire.connect()
        other(P.SUBMIT_JOB_BG, b"f", b"", bytes(6_000))
        office.gather()
        assert other.hears() == [(P.ERROR, b"QUEUE_ERROR", b"Too much waits to be stored")]
        batch.perform(office.store)
        office.journal.done(batch, office.now)
        client.hears()
        while not office.journal.idle:
            office.trip()
        other(P.SUBMIT_JOB_BG, b"f", b"", bytes(6_000))
        office.trip()
        assert other.hears() == [(P.JOB_CREATED, handle(5))]
        assert office.journal._held == 0

    def test_foreground_jobs_go_on_without_records(self):
        office, client = settled(backlog=1_000)
        client(P.SUBMIT_JOB_BG, b"f", b"", bytes(2_000))
        foreground = office.wire.connect()
        assert foreground(P.SUBMIT_JOB, b"f", b"", b"w")[0][0] == P.JOB_CREATED
        office.gather()
        assert client.hears()[0][0] == P.ERROR
        worker = office.wire.worker(b"f")
        assert worker.grabs() == handle(2)
        worker(P.WORK_COMPLETE, handle(2), b"r")
        assert foreground.hears() == [(P.WORK_COMPLETE, handle(2), b"r")]

    def test_results_are_kept_beyond_it(self):
        office, client = settled(backlog=1_000)
        submit(client)
        office.trip()
        assert client.hears() == [(P.JOB_CREATED, handle(1))]
        worker = office.wire.worker(b"f")
        worker.grabs()
        worker(P.WORK_COMPLETE, handle(1), bytes(5_000))
        office.gather()
        office.pass_time(LINGER)
        office.trip()
        assert office.store.finished[handle(1)].data == bytes(5_000)

    def test_large_entries_make_small_batches(self, monkeypatch):
        monkeypatch.setattr(journal_module, "MAX_BATCH_BYTES", 10_000)
        office, client = settled()
        for _ in range(5):
            client(P.SUBMIT_JOB_BG, b"f", b"", bytes(6_000))
        assert [len(office.trip().entries) for _ in range(3)] == [2, 2, 1]
        assert office.journal._held == 0

    def test_progress_that_is_overtaken_does_not_gather(self, monkeypatch):
        monkeypatch.setattr(journal_module, "COMPACT_AT", 10)
        office, client = settled()
        office.journal._compact_at = 10
        submit(client)
        office.trip()
        worker = office.wire.worker(b"f")
        worker.grabs()
        office.gather()
        for second in range(1000):
            office.pass_time(1.0)
            worker(P.WORK_STATUS, handle(1), b"%d" % second, b"1000")
            office.gather()
        gathered = list(office.journal._gathering)
        assert len(gathered) <= 12
        assert gathered[-1].numerator == b"999"
        assert type(gathered[0]) is JobStarted


class TestLostLease:
    """DESIGN section 3: a server that has lost its lease cannot acknowledge or finish anything."""

    def test_submissions_are_refused_and_nothing_is_written_any_more(self):
        office, client = settled(LeaseLost("taken"))
        submit(client)
        office.trip()
        assert client.hears() == [
            (P.ERROR, b"QUEUE_ERROR", b"This job server was replaced by another"),
        ]
        assert isinstance(office.journal.lease_lost, LeaseLost)
        submit(client)
        office.pass_time(100.0)
        assert office.begin() is None
        assert len(office.store.writes) == 1

    def test_claim_finds_it_out_too(self):
        office, _ = settled()
        office.store.claim_error = LeaseLost("taken")
        office.pass_time(1.0)
        office.trip()
        assert office.journal.lease_lost is not None


class TestClaims:
    """The database door is looked at about once a second, and when somebody calls."""

    def stored(self, number: int, function: bytes = b"f", priority: int = 0) -> StoredJob:
        return StoredJob(b"H:test:1:r%d" % number, function, b"", b"w", priority, 0, None)

    def test_first_claim_is_at_once_and_then_every_interval(self):
        office = Office(claim_interval=1.0)
        assert office.trip().claim
        office.pass_time(0.5)
        assert office.begin() is None
        assert office.journal.next_deadline() == 51.0
        office.pass_time(0.5)
        assert office.trip().claim
        assert len(office.store.claims) == 2

    def test_batch_between_does_not_claim(self):
        office, client = settled()
        submit(client)
        assert not office.trip().claim

    def test_batch_that_falls_on_the_time_does_both(self):
        office, client = settled()
        office.pass_time(1.0)
        submit(client)
        batch = office.trip()
        assert batch.claim
        assert len(batch.entries) == 1

    def test_call_makes_it_at_once(self):
        office, _ = settled()
        office.journal.claim_soon()
        assert office.trip().claim
        assert office.begin() is None

    def test_calls_are_heard_together_while_jobs_wait_anyway(self):
        office, client = settled()
        submit(client)
        office.trip()
        assert office.wire.core.ready
        office.pass_time(0.5)
        office.journal.claim_soon()
        assert office.trip().claim
        for _ in range(3):
            office.journal.claim_soon()
        assert office.begin() is None
        assert office.journal.next_deadline() == pytest.approx(office.now + CLAIM_PAUSE)
        office.pass_time(CLAIM_PAUSE)
        assert office.trip().claim
        assert office.begin() is None

    def test_claimed_jobs_are_handed_out(self):
        office = Office()
        office.store.unclaimed = [self.stored(1), self.stored(2)]
        worker = office.wire.worker(b"f").sleeps()
        office.trip()
        assert worker.hears() == [(P.NOOP,)]
        assert [worker.grabs(), worker.grabs(), worker.grabs()] == [b"H:test:1:r1", b"H:test:1:r2", None]

    def test_full_hands_are_filled_again_at_once(self, monkeypatch):
        monkeypatch.setattr(journal_module, "CLAIM_LIMIT", 2)
        office = Office()
        office.store.unclaimed = [self.stored(number) for number in range(5)]
        batches: list[Callable] = []
        while (batch := office.trip()) is not None:
            batches.append(batch)
        assert [len(batch.claimed.jobs) for batch in batches] == [2, 2, 1]
        assert office.store.claims[0] == (2, {})

    def test_functions_with_enough_in_memory_are_left_in_the_store(self):
        office = Office(window=2)
        office.store.unclaimed = [self.stored(n, b"full") for n in range(2)] + [self.stored(9, b"other")]
        office.trip()
        office.store.unclaimed = [self.stored(3, b"full"), self.stored(10, b"other")]
        office.pass_time(1.0)
        office.trip()
        assert office.store.claims[-1][1] == {b"full": 0}
        assert office.store.unclaimed == [self.stored(3, b"full")]
        office.wire.worker(b"full").grabs()
        office.pass_time(1.0)
        office.trip()
        assert office.store.unclaimed == []


class TestRefusedThoughItRuns:
    """A job that a client waits for was to be kept for another one, whose patience is at an end."""

    def start(self) -> tuple[Office, Caller, Batch, Caller]:
        office = Office(submit_limit=3.0, record_foreground=False)
        assert office.trip() is not None
        client, other = office.wire.connect(), office.wire.connect()
        client(P.SUBMIT_JOB, b"f", b"u", b"w")
        other(P.SUBMIT_JOB_BG, b"f", b"u", b"w")
        batch = office.begin()
        assert batch is not None
        worker = office.wire.worker(b"f")
        assert worker.grabs() == handle(1)
        office.gather()
        office.pass_time(5.0)
        office.wire.core.clock = office.now
        office.journal.refuse_overdue()
        assert other.hears() == [(P.ERROR, b"QUEUE_ERROR", b"The store is out of reach")]
        return office, other, batch, worker

    def test_it_stays_what_its_record_says(self):
        """Another server's submission may have joined it there."""
        office, _, batch, worker = self.start()
        batch.perform(office.store)
        office.journal.done(batch, office.now)
        office.trip()
        worker(P.WORK_COMPLETE, handle(1), b"done")
        office.trip()
        written = [type(entry) for entries, _ in office.store.writes for entry in entries]
        assert written == [JobQueued, JobStarted, JobFinished]

    def test_who_joins_it_then_waits_until_it_is_kept(self):
        office, other, batch, _ = self.start()
        assert other(P.SUBMIT_JOB_BG, b"f", b"u", b"w") == []
        batch.perform(office.store)
        office.journal.done(batch, office.now)
        assert other.hears() == [(P.JOB_CREATED, handle(1))]

    def test_it_is_tried_again(self):
        office, _, batch, _ = self.start()
        batch.error = DOWN
        office.journal.done(batch, office.now)
        office.pass_time(1.0)
        office.trip()
        assert [type(entry) for entries, again in office.store.writes for entry in entries if again] == [
            JobQueued
        ]


class TestMemoryStore:
    """The contract of ``JobStore`` in its shortest form."""

    def queued(self, number: int = 1, *, background: bool = True, priority: int = 0) -> JobQueued:
        return JobQueued(handle(number), b"f", b"", b"w", priority, background, b"c", 1000.0)

    def finished(self, number: int = 1) -> JobFinished:
        return JobFinished(handle(number), Outcome.SUCCESSFUL, b"r", "", 1001.0)

    def test_unfinished_background_jobs_are_replayed_most_urgent_first(self):
        store = MemoryStore()
        store.write(
            [self.queued(1), self.queued(2, priority=50), self.queued(3, background=False), self.queued(4)],
            again=False,
        )
        store.write(
            [JobStarted(handle(4), b"w", 2, 1000.0), JobRequeued(handle(4), b"w", 2, 1000.0, 1001.0, "lost")],
            again=False,
        )
        store.write([self.finished(1)], again=False)
        assert replayed(store) == [
            StoredJob(handle(2), b"f", b"", b"w", 50, 0, None),
            StoredJob(handle(4), b"f", b"", b"w", 0, 2, None),
        ]

    def test_foreground_job_that_was_kept_is_replayed(self):
        store = MemoryStore()
        store.write(
            [
                self.queued(background=False),
                JobStarted(handle(1), b"w", 1, 1000.0),
                JobKept(handle(1), 1.0),
            ],
            again=False,
        )
        told = [(job.handle, job.attempts, job.interruptions) for job in replayed(store)]
        assert told == [(handle(1), 1, 1)]

    @pytest.mark.parametrize("more", [[], [JobFinished(handle(1), Outcome.SUCCESSFUL, b"r", "", 1.0)]])
    def test_batch_that_was_written_may_come_again(self, more):
        store = MemoryStore()
        batch = [self.queued(background=False), JobKept(handle(1), 1.0), *more]
        tail = [JobKept(handle(1), 1.0), *more]
        store.write(batch, again=False)
        jobs = dict(store.jobs)
        assert store.write(batch, again=True) == {}
        assert store.jobs == jobs
        assert store.write(tail, again=True) == {}
        assert store.jobs == jobs
        assert store.unclaimed == []

    def test_claims_the_most_urgent_first(self):
        store = MemoryStore()
        store.unclaimed = [
            StoredJob(b"r%d" % number, b"f", b"", b"", priority, 0, None)
            for number, priority in enumerate((0, 50, -50, 50))
        ]
        assert [job.handle for job in store.claim(3, {}).jobs] == [b"r1", b"r3", b"r0"]
        assert [job.handle for job in store.claim(3, {}).jobs] == [b"r2"]
        assert len(replayed(store)) == 4
