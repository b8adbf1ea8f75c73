"""
Group commit in front of any job store.

While one batch is being written by the one writer thread, the next gathers;
when the write returns the next starts at once. There is no timer to tune: the
batch grows as the database slows down. Only what nobody waits for (that a job
started, how far it is, anything of a foreground job) lets a moment pass, since
the job's end often follows and both are then one change of the row.

``Journal`` decides: no threads, no clock, tested as it is. ``JournalThread``
carries it out. The store is the only part that may wait.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from time import monotonic
from typing import Final, TypeGuard

from ..exceptions import LeaseLost, StoreError
from .core import JobServer
from .entries import (
    Claimed,
    Crowd,
    Entry,
    JobFinished,
    JobKept,
    JobLogged,
    JobProgress,
    JobQueued,
    JobRequeued,
    JobUnclaimed,
    Joined,
    Outcome,
    Question,
    Reply,
    StoredJob,
    has_key,
)
from .job_store import JobStore
from .metrics import StoreCounts

logger = logging.getLogger(__name__)

MAX_BATCH: Final = 2_000
"""Entries in one transaction: more would not be faster, and would keep acknowledgements waiting."""

MAX_BATCH_BYTES: Final = 32 * 1024 * 1024
"""Bytes in one transaction, as many as make it full and the last entry's."""

CLAIM_LIMIT: Final = 1_000
"""Jobs claimed from the store's door at once."""

CLAIM_PAUSE: Final = 0.005
"""Seconds between two claims while jobs wait in memory anyway: each claim is a commit."""

LINGER: Final = 0.1
"""Seconds that an entry which nobody waits for may wait for company."""

GATHER: Final = 0.05
"""Seconds that the end of a background job may wait for others, while more jobs wait for its worker.

A commit costs as much as dozens of the rows in it. Whoever listens to the job, or to its row, does not wait.
"""

TEND_AGAIN: Final = 10.0
"""Seconds after which housekeeping is tried again when the store could not be reached."""

SUBMIT_LIMIT: Final = 10.0
"""Seconds that a background submission waits for a store that is out of reach or hangs."""

SILENCE: Final = 5.0
"""Seconds without an answer of the store after which the log says so."""

COMPLAINTS: Final = 20
"""Lines at the most about one outage of the store; there may be a new reason at each attempt."""

OUT_OF_REACH: Final = "The store is out of reach"
"""What the client of a submission is told that has waited for so long."""

BACKLOG: Final = 256 * 1024 * 1024
"""Bytes that may wait to be written before background submissions are refused at once."""

COMPACT_AT: Final = 20_000
"""Entries that have gathered when progress that later progress has overtaken is dropped."""


@dataclass(slots=True)
class Batch:
    """What one trip to the store is for."""

    entries: list[Entry]
    again: bool = False
    claim: bool = False
    full: dict[bytes, int] = field(default_factory=dict)
    """{function: priority from which down its jobs are to stay at the door}."""
    crowded: dict[bytes, Crowd] = field(default_factory=dict)
    """{function: keys of its limit whose jobs are to stay at the door}."""
    questions: list[Question] = field(default_factory=list)
    tend: bool = False
    weight: int = 0
    """About how many bytes the entries are."""
    late: set[int] = field(default_factory=set)
    """Which of the entries are submissions that were refused while the store had them."""

    # Filled in by ``perform``.
    refused: dict[int, str | Joined] = field(default_factory=dict)
    claimed: Claimed | None = None
    replies: dict[int, Reply] = field(default_factory=dict)
    written: bool = False
    write_seconds: float = 0.0
    renewed: float = math.inf
    """When the store last proved that the jobs are this server's."""
    error: StoreError | None = None
    tend_after: float = TEND_AGAIN
    """Seconds after which the store wants to be tended again."""
    laid: bool = False
    """Whether the store laid jobs at the door, after it was looked at."""
    over: list[int] = field(default_factory=list)
    """Groups all of whose members have ended."""

    def perform(self, store: JobStore) -> None:
        """Do the trip; never raises a ``StoreError``. Runs in the writer's thread."""
        try:
            if self.entries:
                began = monotonic()
                self.refused = store.write(self.entries, again=self.again)
                self.write_seconds = monotonic() - began
            self.written = True
            if self.questions:
                self.replies = store.ask(self.questions)
            if self.claim:
                store.laid = False
                self.claimed = store.claim(CLAIM_LIMIT, self.full, self.crowded)
            if self.tend:
                self.tend_after = store.tend()
        except StoreError as error:
            self.error = error
        self.laid, store.laid = store.laid, False
        self.over, store.over = store.over, []
        self.renewed = store.renewed


class Journal:
    """
    What is to be written next, and what follows when it was.

    Args:
        server: Told of everything that was committed, rejected or claimed.
        claim_interval: Seconds between two looks at the database door when nobody calls.
        hold: Seconds after the last proof of its lease during which the server may hand out what it keeps:
            then others may be about to take it over.
        tend_at: Monotonic time of the first housekeeping; infinite for none at all.
        submit_limit: Seconds that a background submission waits for a store that is out of reach or hangs.
        backlog: Bytes that may wait before background submissions are refused at once. What becomes of
            jobs is kept beyond it.
    """

    def __init__(
        self,
        server: JobServer,
        *,
        claim_interval: float = 1.0,
        submit_limit: float = SUBMIT_LIMIT,
        backlog: int = BACKLOG,
        hold: float = math.inf,
        tend_at: float = math.inf,
    ) -> None:
        self._server = server
        self._backlog = backlog
        self._claim_interval = claim_interval
        self._submit_limit = submit_limit
        self._hold = hold
        self._gathering: deque[Entry] = deque()
        self._questions: list[Question] = []
        self._ask_at = -math.inf
        """When they may be asked: not at once again of a store that is out of reach."""
        self._failed: Batch | None = None
        self._in_flight: Batch | None = None
        """What the writer is at work on."""
        self._began_at = 0.0
        """When it was given that."""
        self._away_since: float | None = None
        """When the store first did not answer, or only with an error; None while all is well."""
        self._complaints: set[str] = set()
        """What was said of that."""
        self._held = 0
        """About how many bytes wait, those in flight too."""
        self._compact_at = COMPACT_AT
        self._closing = False
        self._next_claim = 0.0
        self._claimed_at = -math.inf
        self.tend_at = tend_at
        self._write_at = math.inf
        """When what has gathered is to be written."""
        self._retry_at = 0.0
        self._pause = 0.0
        self.lease_lost: LeaseLost | None = None
        self.counts = StoreCounts()

    @property
    def held(self) -> int:
        """About how many bytes wait to be written."""
        return self._held

    def lag(self, wall: float, now: float) -> float:
        """
        Seconds that the store is behind: as long as the oldest change waits, or nothing is answered.

        Args:
            wall: Seconds since 1970.
            now: Monotonic time.
        """
        oldest = self._oldest_at()
        waiting = 0.0 if oldest is None else wall - oldest
        silent = now - self._began_at if self._in_flight else 0.0
        away = 0.0 if self._away_since is None else now - self._away_since
        return max(waiting, silent, away, 0.0)

    def _oldest_at(self) -> float | None:
        """Wall time of the oldest change that is not written yet; None when all are, or nobody knows."""
        for entries in (
            self._in_flight.entries if self._in_flight else (),
            self._failed.entries if self._failed else (),
            self._gathering,
        ):
            for entry in islice(entries, 100):
                # Not every kind has its time, but others come between.
                at: float | None = getattr(entry, "at", None)
                if at is not None:
                    return at
        return None

    @property
    def busy(self) -> bool:
        """Whether the writer is at work."""
        return self._in_flight is not None

    @property
    def idle(self) -> bool:
        """Whether everything is written."""
        return not (self._gathering or self._in_flight or self._failed)

    def renewed(self, at: float) -> None:
        """At that monotonic time the store has proved that the jobs are this server's; first at the start."""
        self._server.hand_out_until = at + self._hold

    def append(
        self, entries: Sequence[Entry], now: float, *, urgent: bool = True, many_end: bool = False
    ) -> None:
        """
        Take entries over from the core, in order.

        Args:
            urgent: Whether they must not wait for company.
            many_end: Whether they may wait for a moment, ``GATHER``, and no longer.
        """
        held = self._held + sum(map(_weight, entries))
        if held > self._backlog:
            entries = self._without_submissions(entries)
            held = self._held + sum(map(_weight, entries))
        self._held = held
        self._gathering.extend(entries)
        if len(self._gathering) > self._compact_at:
            self._compact()
        linger = 0.0 if urgent else GATHER if many_end else LINGER
        self._write_at = min(self._write_at, now + linger)

    def ask(self, questions: Iterable[Question]) -> None:
        """Take over what the core wants to know."""
        self._questions.extend(questions)

    def refuse_overdue(self) -> None:
        """
        Let no submission wait longer than its limit while the writer is stuck; call it about once a second.

        Those that the store has right now may be written all the same: what
        follows them then undoes that, but for those with a unique: they run, and
        whoever submits one again joins it. A server that is killed before may run
        others too when it starts again, though their clients were told of an error.
        """
        if self._failed is not None or not self._in_flight:
            return  # the next attempt begins soon, and ``done`` refuses what is overdue
        batch = self._in_flight
        undone: list[Entry] = []
        for index, entry in enumerate(batch.entries):
            if _is_submission(entry) and self._is_overdue(entry) and index not in batch.late:
                instead = self._refuse(entry)
                if instead is not entry:
                    batch.late.add(index)
                    undone.append(instead)
        gathered = self._without_overdue(self._gathering, tried=False)
        if undone or len(gathered) != len(self._gathering):
            self._gathering = deque([*undone, *gathered])
            self._weigh_again()
            self._write_at = -math.inf

    def notice_silence(self, now: float) -> None:
        """Say in the log that the store hangs, and what follows; call it about once a second."""
        if self._in_flight and now - self._began_at >= SILENCE:
            if self._away_since is None:
                self._away_since = self._began_at
            self._complain(
                f"The store has not answered for {SILENCE:g} s;"
                f" background submissions that wait {self._submit_limit:g} s are refused"
            )
        if self._away_since is not None and now >= self._server.hand_out_until:
            self._complain(
                "Background jobs are not handed out until the store answers: other servers may take them over"
            )

    def _complain(self, line: str) -> None:
        """Each thing once, as long as the trouble lasts."""
        if line not in self._complaints and len(self._complaints) < COMPLAINTS:
            self._complaints.add(line)
            logger.error("%s", line)

    def claim_soon(self) -> None:
        """Somebody says that rows wait at the database door; at once, unless workers have enough to do."""
        self._next_claim = min(
            self._next_claim, self._claimed_at + CLAIM_PAUSE if self._server.ready else 0.0
        )

    def claim_no_more(self) -> None:
        """Leave the rows at the database door: the server ends when its jobs have."""
        self._closing = True

    def next_deadline(self) -> float:
        """The monotonic time at which ``next_batch`` may have something by itself; infinite for never."""
        if self._failed:
            return self._retry_at
        ask_at = self._ask_at if self._questions else math.inf
        if self._closing:
            return min(self._write_at, ask_at)
        return min(self._next_claim, self._write_at, self.tend_at, ask_at)

    def hurry(self) -> None:
        """Let nothing wait any longer, and claim nothing more: the server is about to stop."""
        self._write_at = 0.0
        self.claim_no_more()

    def next_batch(self, now: float) -> Batch | None:
        """
        What the writer is to do now; None while it is at work or there is nothing.

        Call ``done`` with the batch when it was performed.
        """
        if self._in_flight or self.lease_lost:
            return None
        if self._failed is not None:
            if now < self._retry_at:
                return None
            batch, self._failed = self._failed, None
        else:
            claim = now >= self._next_claim and not self._closing
            if now >= self.tend_at and not self._closing:
                # A trip of its own, so that nothing that was claimed or written waits to be told of.
                self._in_flight = Batch([], tend=True)
                self._began_at = now
                return self._in_flight
            ask = bool(self._questions) and now >= self._ask_at
            if not claim and not ask and (not self._gathering or now < self._write_at):
                return None
            batch = self._gather()
            if not self._gathering:
                self._write_at = math.inf
            if claim:
                self._next_claim = now + self._claim_interval
                self._claimed_at = now
                batch.claim = True
                batch.full = self._server.window.full()
                batch.crowded = self._server.limits.crowded()
        batch.questions = [question for question in self._questions if self._server.window.is_open(question)]
        self._questions = []
        self._in_flight = batch
        self._began_at = now
        return batch

    def done(self, batch: Batch, now: float) -> None:
        """The writer is back: tell the core what became of it."""
        self._in_flight = None
        server = self._server
        self.renewed(batch.renewed)
        if batch.error is None:
            self._pause = 0.0
            if self._away_since is not None:
                logger.warning("The store answers again, after %.1f s", now - self._away_since)
                self._away_since = None
                self._complaints.clear()
        else:
            self.counts.failures += 1
        if batch.written and batch.entries:
            self.counts.entries.note(len(batch.entries))
            self.counts.commit_seconds.note(batch.write_seconds)
        if batch.tend:
            self.tend_at = now + batch.tend_after
        if batch.laid:
            self.claim_soon()
        if batch.over:
            # Even if it failed, which may be unknown: who waits looks, and asks again.
            server.groups_ended(batch.over)
        if batch.written:
            self._held -= batch.weight
            refused = batch.refused
            for index, reason in refused.items():
                entry = batch.entries[index]
                if isinstance(reason, Joined):
                    assert isinstance(entry, JobQueued), "nothing else can join"
                    server.joined(entry, reason.handle)
                    continue
                logger.error(
                    "Cannot keep %s of job %s: %s", type(entry).__name__, entry.handle.decode(), reason
                )
                if isinstance(entry, JobQueued | JobKept):
                    server.rejected(entry, "The job could not be stored")
            self._claim_when_due(batch.entries, now)
            if refused:
                server.committed(entry for index, entry in enumerate(batch.entries) if index not in refused)
            else:
                server.committed(batch.entries)
            for question in batch.questions:
                if question.number in batch.replies:
                    reply = batch.replies[question.number]
                    has_ended = isinstance(reply, StoredJob) and reply.handle in self._ended(batch)
                    server.window.replied(question, None if has_ended else reply)
            if batch.claimed is not None:
                self._adopt(batch, batch.claimed, now)
        if batch.error is None:
            return
        # Those that nobody waits for any more are left out then.
        self._questions = [q for q in batch.questions if q.number not in batch.replies] + self._questions
        if isinstance(batch.error, LeaseLost):
            self.lease_lost = batch.error
            self._reject_submissions(batch.entries, "This job server was replaced by another")
            return
        self._postpone(batch, now)

    def _adopt(self, batch: Batch, claimed: Claimed, now: float) -> None:
        """Give the core what was claimed, but for what has ended since it was laid at the door."""
        ended = self._ended(batch)
        if ended:
            claimed = claimed._replace(jobs=[job for job in claimed.jobs if job.handle not in ended])
        self._server.window.claimed(claimed)
        if claimed.more:
            self._next_claim = 0.0
        self._next_claim = min(self._next_claim, now + claimed.due_in)

    def _ended(self, batch: Batch) -> set[bytes]:
        """Handles of jobs that have ended, or were refused, and of which the store does not know it yet."""
        late = {batch.entries[index].handle for index in batch.late}
        waiting = (*self._gathering, *self._server.entries)
        return late | {entry.handle for entry in waiting if type(entry) in (JobFinished, JobUnclaimed)}

    def _claim_when_due(self, entries: Iterable[Entry], now: float) -> None:
        """Jobs for later were laid at the door: look there when they are due."""
        server = self._server
        for entry in entries:
            if isinstance(entry, JobQueued | JobRequeued) and entry.unclaimed and entry.run_after:
                # The core's two clocks were read at one moment, which may be past.
                due_in = entry.run_after - server.now - (now - server.clock)
                self._next_claim = min(self._next_claim, now + due_in)

    def _postpone(self, batch: Batch, now: float) -> None:
        """The store is out of reach: keep what happened, refuse what may not wait longer."""
        if self._away_since is None:
            self._away_since = self._began_at
        self._complain(f"The store does not take anything: {batch.error}; trying again")
        self._pause = min(self._pause * 2 or 0.05, 1.0)
        self._retry_at = self._ask_at = now + self._pause
        if batch.written:
            self._next_claim = self._retry_at
            return
        waiting = [entry for index, entry in enumerate(batch.entries) if index not in batch.late]
        entries = self._without_overdue(waiting, tried=True)
        self._gathering = deque(self._without_overdue(self._gathering, tried=False))
        self._failed = Batch(entries, again=True, claim=batch.claim, full=batch.full, crowded=batch.crowded)
        self._weigh_again()

    def _without_overdue(self, entries: Iterable[Entry], *, tried: bool) -> list[Entry]:
        kept: list[Entry] = []
        for entry in entries:
            if not _is_submission(entry) or not self._is_overdue(entry):
                kept.append(entry)
            elif tried:
                kept.append(self._refuse(entry))
            else:
                self._server.rejected(entry, OUT_OF_REACH)
        return kept

    def _is_overdue(self, entry: JobQueued | JobKept) -> bool:
        """Whether its client has waited long enough. Of a job that has ended nobody waits for the record."""
        server = self._server
        return server.clock - entry.clock >= self._submit_limit and entry.handle in server.jobs

    def _refuse(self, entry: JobQueued | JobKept) -> Entry:
        """Tell the clients of a submission that it is lost, though it may be written; what follows then."""
        server = self._server
        server.rejected(entry, OUT_OF_REACH, perhaps_kept=True)
        if entry.handle in server.jobs:
            # It lives on for others.
            return entry
        assert isinstance(entry, JobQueued), "a job that is to be kept after all has others who wait for it"
        if has_key(entry.unique, entry.workload):
            # Another server's submission may have joined it, whose client was told that it is kept.
            return JobUnclaimed(entry.handle)
        return JobFinished(entry.handle, Outcome.CANCELLED, b"", OUT_OF_REACH, server.now)

    def _without_submissions(self, entries: Iterable[Entry]) -> list[Entry]:
        """Too much waits already: refuse what can be refused. Records of foreground jobs are left out."""
        kept: list[Entry] = []
        for entry in entries:
            if isinstance(entry, JobQueued | JobKept):
                self._server.rejected(entry, "Too much waits to be stored")
            else:
                kept.append(entry)
        return kept

    def _compact(self) -> None:
        """Of each job's progress and log only the last matters: a store that is away must not cost memory."""
        kinds = (JobProgress, JobLogged)
        last = {(type(entry), entry.handle): entry for entry in self._gathering if isinstance(entry, kinds)}
        self._gathering = deque(
            entry
            for entry in self._gathering
            if not isinstance(entry, kinds) or last[type(entry), entry.handle] is entry
        )
        self._compact_at = max(COMPACT_AT, 2 * len(self._gathering))
        self._weigh_again()

    def _weigh_again(self) -> None:
        if self._failed is not None:
            self._failed.weight = sum(map(_weight, self._failed.entries))
        held = [batch.weight for batch in (self._failed, self._in_flight) if batch is not None]
        self._held = sum(held) + sum(map(_weight, self._gathering))

    def _reject_submissions(self, entries: Sequence[Entry], reason: str) -> None:
        for entry in entries:
            if isinstance(entry, JobQueued | JobKept):
                self._server.rejected(entry, reason)

    def _gather(self) -> Batch:
        gathering = self._gathering
        entries: list[Entry] = []
        weight = 0
        while gathering and len(entries) < MAX_BATCH and weight < MAX_BATCH_BYTES:
            entry = gathering.popleft()
            entries.append(entry)
            weight += _weight(entry)
        return Batch(entries, weight=weight)


def _is_submission(entry: Entry) -> TypeGuard[JobQueued | JobKept]:
    """Whether a client waits for it."""
    return isinstance(entry, JobKept) or (isinstance(entry, JobQueued) and entry.background)


def _weight(entry: Entry) -> int:
    """About how many bytes of memory it takes."""
    kind = type(entry)
    if kind is JobQueued:
        return 400 + len(entry.workload)  # type: ignore[union-attr]  # it is a JobQueued
    if kind is JobLogged:
        return 200 + len(entry.log)  # type: ignore[union-attr]  # it is a JobLogged
    return 200 + len(entry.data) if kind is JobFinished else 200  # type: ignore[union-attr]  # a JobFinished
