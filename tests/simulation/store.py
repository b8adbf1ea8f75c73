"""
A database in memory, for several servers: ``JobStore`` with leases, epochs and a door.

What it promises is ``DatabaseStore``'s: every trip is a transaction that proves
the lease, rows are claimed and leases taken over by compare-and-set, and a row
belongs to one server. What can go wrong goes wrong here: a trip may come to
nothing, or be done and say that it was not. The suite of ``tests/test_store.py``
keeps it honest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from django_gearman.exceptions import LeaseLost, StoreError
from django_gearman.permits import GRACE, Book, Granted, Limit
from django_gearman.server.entries import (
    Claimed,
    Crowd,
    Entry,
    JobDue,
    JobFinished,
    JobKept,
    JobProgress,
    JobQueued,
    JobRequeued,
    JobStarted,
    JobUnclaimed,
    Joined,
    Outcome,
    Question,
    Reply,
    Standing,
    StoredJob,
    Topic,
    Waiting,
)

Key = tuple[bytes, bytes, bytes]
"""Function, unique, and the workload where the unique is ``-``."""


class Row:
    """One job's record."""

    __slots__ = (
        "attempts",
        "background",
        "data",
        "denominator",
        "door",
        "enqueued_at",
        "epoch",
        "function",
        "handle",
        "id",
        "interrupted",
        "interruptions",
        "kept_attempts",
        "key",
        "limit_key",
        "max_attempts",
        "numerator",
        "outcome",
        "priority",
        "reason",
        "reducer",
        "run_after",
        "server",
        "status",
        "timeout",
        "unique",
        "wanted",
        "worker",
        "workload",
    )

    def __init__(
        self,
        function: bytes,
        unique: bytes,
        workload: bytes,
        priority: int,
        *,
        handle: bytes | None = None,
        background: bool = True,
        reducer: bytes = b"",
        run_after: float = 0.0,
        later: bool = False,
        max_attempts: int | None = None,
        timeout: int | None = None,
        enqueued_at: float = 0.0,
        limit_key: bytes | None = None,
    ) -> None:
        self.id = 0
        self.handle = handle
        self.function = function
        self.unique = unique
        self.workload = workload
        self.priority = priority
        self.background = background
        self.reducer = reducer
        self.run_after = run_after
        self.max_attempts = max_attempts
        self.timeout = timeout
        self.enqueued_at = enqueued_at
        self.limit_key = limit_key
        self.wanted = key_of(function, unique, workload)
        self.key: Key | None = self.wanted if background else None
        """Its place in the index of uniques, which only one job to do can have."""
        self.server: int | None = None
        """Id of the lease that it belongs to; None while it lies at the door."""
        self.epoch: int | None = None
        self.status = "SCHEDULED" if later else "READY"
        self.attempts = 0
        self.worker = b""
        self.data = b""
        self.reason = ""
        self.numerator: bytes | None = None
        self.denominator: bytes | None = None
        self.kept_attempts: list[int] = []
        """Numbers of attempts that came to nothing."""
        self.interrupted: list[int] = []
        """Those of them that the server did not outlive."""
        self.interruptions = 0
        self.outcome: str | None = None
        """How it ended, whatever was written since."""
        self.door = False
        """Whether a view inserted it."""

    def stored(self) -> StoredJob:
        assert self.handle is not None, "what a server has was named"
        return StoredJob(
            self.handle,
            self.function,
            self.unique,
            self.workload,
            self.priority,
            self.attempts,
            self.max_attempts,
            self.reducer,
            self.run_after,
            self.timeout,
            self.interruptions,
            self.limit_key,
        )


LATER = ("SCHEDULED", "RETRYING")


def key_of(function: bytes, unique: bytes, workload: bytes) -> Key | None:
    if not unique or (unique == b"-" and not workload):
        return None
    return function, unique, workload if unique == b"-" else b""


class Lease:
    __slots__ = ("epoch", "id", "name", "renewed", "started", "taken_over")

    def __init__(self, id: int, name: str) -> None:
        self.id = id
        self.name = name
        self.epoch = 0
        self.renewed = 0.0
        """By the database's clock."""
        self.started = 0.0
        self.taken_over = 0
        """The last epoch that another server ended, because it was silent."""


class Database:
    """Tables, and a clock of its own that only ``advance`` and jumps move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rows: list[Row] = []
        self.live: dict[int, Row] = {}
        """Rows of jobs that have not ended, by id."""
        self.by_handle: dict[bytes, Row] = {}
        self.keys: dict[Key, Row] = {}
        self.leases: dict[str, Lease] = {}
        self.by_lease: dict[int, Lease] = {}
        self.book = Book()
        self.rewritten: list[bytes] = []
        self.asked_for: set[int] = set()
        """Ids of rows that were taken for somebody who waits, and need not wait for others."""
        """Handles of jobs whose outcome was written over by another one."""

    def insert(self, row: Row) -> None:
        assert row.key is None or row.key not in self.keys, "the index of uniques takes none twice"
        self.rows.append(row)
        row.id = len(self.rows)
        self.live[row.id] = row
        if row.handle is not None:
            self.by_handle[row.handle] = row
        if row.key is not None:
            self.keys[row.key] = row

    @property
    def limits(self) -> dict[bytes, Limit]:
        """{function: what is allowed of it}."""
        return self.book.limits

    @limits.setter
    def limits(self, limits: dict[bytes, Limit]) -> None:
        self.book.limits = limits

    def free_key(self, row: Row) -> None:
        if row.key is not None:
            del self.keys[row.key]
            row.key = None

    def end(self, row: Row, status: str) -> None:
        row.status = row.outcome = status
        self.free_key(row)
        self.live.pop(row.id, None)


def nothing_goes_wrong(place: str) -> None:
    """The fault of a store that works."""


class SimulatedStore:
    """
    One server's way to the ``Database``.

    Args:
        clock: Monotonic seconds of the server's machine.
        wall: Seconds since 1970 as the server's machine has them.
        fault: Called with ``before`` and ``after`` of each transaction; raises ``StoreError`` to let it fail.
        is_bad: Whether the database refuses what an entry holds.
        freed_at_once: Rows of a dead server that are freed in one transaction.
        is_counted: Whether a claim counts what it leaves, if there may be any.
    """

    def __init__(
        self,
        database: Database,
        name: str,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
        fault: Callable[[str], None] = nothing_goes_wrong,
        is_bad: Callable[[Entry], bool] = lambda entry: False,
        lease: float = 15.0,
        freed_at_once: int = 10_000,
        is_counted: Callable[[], bool] = lambda: True,
    ) -> None:
        self.database = database
        self.name = name
        self._clock = clock
        self._wall = wall
        self._fault = fault
        self._is_bad = is_bad
        self._lease = lease
        self._freed_at_once = freed_at_once
        self._is_counted = is_counted
        self.renewed = 0.0
        self.laid = False
        self.over: list[int] = []
        self.lease_id = 0
        self.epoch = 0
        self._looked_for_dead = 0.0
        self._perhaps_taken: list[Row] = []
        self._resuming = False
        self._again = False
        self._has_counted = False
        self.taken = 0
        """How many rows were made this server's, since somebody set it to zero."""

    def take_lease(self) -> int:
        """Become the server of this name; the epoch."""
        self._fault("before")
        database = self.database
        lease = database.leases.get(self.name)
        if lease is None:
            lease = database.leases[self.name] = Lease(len(database.leases) + 1, self.name)
            database.by_lease[lease.id] = lease
        lease.epoch += 1
        lease.renewed = lease.started = database.now
        self._fault("after")
        self.lease_id = lease.id
        self.epoch = lease.epoch
        self.renewed = self._looked_for_dead = self._clock()
        return lease.epoch

    def resume(self) -> list[StoredJob]:
        self._fault("before")
        self._prove_lease()
        running = [row for row in self._held(self.lease_id) if row.background and row.status == "RUNNING"]
        self._end_attempts(self.lease_id)
        for row in running:
            row.epoch = self.epoch
        resuming = self._free(self.lease_id, self.epoch)
        self._fault("after")
        self._resuming = resuming
        return [row.stored() for row in running]

    def write(self, entries: Sequence[Entry], *, again: bool) -> dict[int, str | Joined]:
        self._fault("before")
        self._prove_lease()
        self._again = again
        database = self.database
        by_handle = database.by_handle
        refused: dict[int, str | Joined] = {}
        new: dict[bytes, Row] = {}
        laid: dict[bytes, bool] = {}
        ends: list[tuple[Row, JobFinished]] = []
        for index, entry in enumerate(entries):
            handle = entry.handle
            kind = type(entry)
            if kind is JobQueued:
                if self._is_bad(entry):
                    refused[index] = "bad"
                    continue
                there = by_handle.get(handle)
                if there is None:
                    laid[handle] = entry.unclaimed
                    new[handle] = self._new_row(entry)
                elif not (again and (there.server == self.lease_id or entry.unclaimed)):
                    refused[index] = "there is a job of that handle"
                continue
            queued = new.get(handle)
            row = queued if queued is not None else by_handle.get(handle)
            # What this server has laid at the door may have to be undone.
            if row is None or (queued is None and row.server not in (self.lease_id, None)):
                continue
            if kind is JobFinished:
                if self._is_bad(entry):
                    refused[index] = "bad"
                    entry = _without_data(entry)
                # What ended makes room for the next of its unique, wherever in the batch it stands.
                if queued is None:
                    self._finish(row, entry)
                else:
                    ends.append((row, entry))
                    row.key = None
            elif kind is JobKept and self._is_bad(entry):
                refused[index] = "bad"
            else:
                self._change(row, entry)
                if queued is not None and kind is JobRequeued and entry.unclaimed:
                    laid[handle] = True
        for handle, row in new.items():
            if row.key is not None:
                other = database.keys.get(row.key)
                if other is not None:
                    if other.handle is None:
                        # It waits at the door, without a name.
                        self._name(other)
                    assert other.handle is not None
                    for place, entry in enumerate(entries):
                        if entry.handle == handle and type(entry) is JobQueued:
                            refused[place] = Joined(other.handle)
                    continue
            if not laid[handle]:
                row.server = self.lease_id
                row.epoch = self.epoch
            database.insert(row)
        for row, entry in ends:
            if row.id:
                self._finish(row, entry)
        self._fault("after")
        return refused

    def _new_row(self, entry: JobQueued) -> Row:
        row = Row(
            entry.function,
            entry.unique,
            entry.workload,
            entry.priority,
            handle=entry.handle,
            background=entry.background,
            reducer=entry.reducer,
            run_after=entry.run_after,
            later=entry.run_after > entry.at,
            enqueued_at=entry.at,
            limit_key=entry.limit_key,
        )
        row.attempts = entry.attempts
        return row

    def _change(self, row: Row, entry: Entry) -> None:
        kind = type(entry)
        if kind is JobStarted:
            row.status = "RUNNING"
            row.worker = entry.worker
            row.attempts = entry.attempts
        elif kind is JobProgress:
            row.numerator = entry.numerator
            row.denominator = entry.denominator
        elif kind is JobRequeued:
            row.status = "READY"
            row.numerator = row.denominator = None
            if entry.run_after > entry.at:
                row.status = "RETRYING"
                row.run_after = entry.run_after
            if entry.unclaimed:
                row.server = row.epoch = None
            if not entry.counts:
                row.attempts = entry.attempt - 1
            elif entry.attempt not in row.kept_attempts:
                row.kept_attempts.append(entry.attempt)
        elif kind is JobDue:
            row.status = "READY"
        elif kind is JobUnclaimed:
            row.server = row.epoch = None
        elif kind is JobKept:
            row.background = True
            if row.key is None and row.wanted is not None and row.wanted not in self.database.keys:
                row.key = row.wanted
                if row.id:
                    self.database.keys[row.key] = row

    def _finish(self, row: Row, entry: JobFinished) -> None:
        before = row.outcome
        if not self._again and before not in (None, "CANCELLED", entry.outcome.value):
            self.database.rewritten.append(entry.handle)
        row.data = entry.data
        row.reason = entry.reason
        self.database.end(row, entry.outcome.value)

    def claim(self, limit: int, full: Mapping[bytes, int], crowded: Mapping[bytes, Crowd] = {}) -> Claimed:
        self._fault("before")
        if self._resuming:
            self._prove_lease()
            resuming = self._free(self.lease_id, but_of_epoch=self.epoch)
            self._fault("after")
            self._resuming = resuming
            if resuming:
                # What is older must not come behind what lies at the door already.
                return Claimed([], more=True)
        if self._clock() - self._looked_for_dead >= self._lease / 3:
            self._free_jobs_of_the_dead()
        database = self.database
        wall = self._wall()
        rows, emptied, more = self._look(limit, full, crowded, wall)
        unsure = self._perhaps_taken
        ours = [row for row in unsure if (row.server, row.epoch) == (self.lease_id, self.epoch)]
        # Not what was ended meanwhile, as a submission that was refused.
        found = [row for row in ours if row.id in database.live]
        self._perhaps_taken = []
        if rows or self._clock() - self.renewed >= self._lease / 3:
            try:
                self._fault("before")
                self._prove_lease()
                for row in rows:
                    self._take(row)
                self._fault("after")
            except StoreError:
                # The connection may have been lost inside COMMIT, and what is ours is not looked for again.
                self._perhaps_taken = [*unsure, *rows]
                raise
        left, due_in = self._count(wall)
        jobs = [row.stored() for row in (*found, *rows)]
        # At first nothing is known of it.
        counted = left if not self._has_counted or self._is_counted() else None
        self._has_counted = True
        return Claimed(jobs, more, frozenset(emptied), counted, due_in, dict(database.limits))

    def _look(
        self,
        limit: int,
        full: Mapping[bytes, int],
        crowded: Mapping[bytes, Crowd],
        wall: float,
    ) -> tuple[list[Row], set[bytes], bool]:
        """Rows to take, functions of which nothing ready will be left, and whether there may be more."""
        ready: dict[bytes, list[Row]] = {}
        due: dict[bytes, list[Row]] = {}
        for row in self.database.live.values():
            if row.server is None:
                crowd = crowded.get(row.function)
                is_crowded = crowd is not None and (row.limit_key or b"") in crowd.keys
                if crowd is not None and is_crowded and row.priority <= crowd.priority:
                    continue
                if row.status not in LATER:
                    ready.setdefault(row.function, []).append(row)
                elif row.run_after <= wall:
                    due.setdefault(row.function, []).append(row)
        names = sorted({*ready, *due}, key=lambda name: (name not in full, name))
        taken: list[Row] = []
        emptied: set[bytes] = set()
        more = False
        for number, name in enumerate(names):
            share = max(1, (limit - len(taken)) // (len(names) - number))
            above = full.get(name, -1000)
            at = 0.0
            priority = None
            wanted = []
            of_name = sorted(ready.get(name, ()), key=lambda row: (-row.priority, row.id))
            for row in [row for row in of_name if row.priority > above][:share]:
                # Those that are ready have the order of their ids, whatever the clocks said.
                at = max(at if row.priority == priority else 0.0, row.enqueued_at)
                priority = row.priority
                wanted.append((-row.priority, at, row.id, row))
            if name in ready and len(wanted) < share and name not in full and name not in crowded:
                emptied.add(name)
            of_name = sorted(due.get(name, ()), key=lambda row: (row.run_after, row.id))[:share]
            wanted += [(-row.priority, row.run_after, row.id, row) for row in of_name if row.priority > above]
            wanted.sort()
            taken += [row for *_, row in wanted[:share]]
            if len(wanted) >= share:
                more = True
                emptied.discard(name)
        return taken, emptied, more

    def _count(self, wall: float) -> tuple[dict[tuple[bytes, int], Waiting], float]:
        """What lies at the door, and in how many seconds more of it is due."""
        left: dict[tuple[bytes, int], Waiting] = {}
        due_in = math.inf
        for row in self.database.live.values():
            if row.server is None:
                is_later = row.status in LATER
                key = row.function, 0 if is_later else row.priority
                ready, later = left.get(key, (0, 0))
                left[key] = Waiting(ready + (not is_later), later + is_later)
                if is_later and row.run_after > wall:
                    due_in = min(due_in, row.run_after - wall, 1.0)
        return left, due_in

    def _take(self, row: Row, status: str = "READY") -> None:
        if row.handle is None:
            self._name(row)
        row.server = self.lease_id
        row.epoch = self.epoch
        row.status = status
        self.taken += 1

    def ask(self, questions: Sequence[Question]) -> dict[int, Reply]:
        replies: dict[int, Reply] = {}
        taken: list[Row] = []
        try:
            for question in questions:
                self._fault("before")
                replies[question.number] = self._reply(question, taken)
        except StoreError:
            # Nobody hears of the replies, and what is ours is not looked for again.
            self._perhaps_taken += taken
            raise
        return replies

    def _reply(self, question: Question, taken: list[Row]) -> Reply:
        match question.topic:
            case Topic.STATUS:
                return self._standing(self.database.by_handle.get(question.handle))
            case Topic.UNIQUE:
                last = None
                for row in self.database.live.values():
                    last = row if row.unique == question.unique else last
                return self._standing(last)
            case Topic.TAKE:
                return self._take_one(question, taken)
            case Topic.CANCEL:
                return self._cancel(question.handle)
            case Topic.PERMITS:
                return self._give_permits(question)

    def _give_permits(self, question: Question) -> Granted:
        assert question.request is not None
        self._prove_lease()
        database = self.database
        granted = database.book.decide(
            question.function,
            question.request,
            f"{self.lease_id}.{self.epoch}",
            database.now,
            self._clock(),
            self._is_alive,
        )
        self._fault("after")
        return granted

    def _is_alive(self, name: str) -> bool:
        id, epoch = map(int, name.split("."))
        database = self.database
        lease = database.by_lease[id]
        if epoch != lease.epoch:
            # It was started again, or it was silent and others have its jobs.
            return epoch == lease.epoch - 1 and 0 <= database.now - lease.started < GRACE
        if lease.renewed >= database.now - self._lease or id == self.lease_id:
            return True
        lease.taken_over = lease.epoch
        lease.epoch += 1
        return False

    def _standing(self, row: Row | None) -> Standing | None:
        if row is None or row.id not in self.database.live:
            return None
        return Standing(row.status == "RUNNING", row.numerator or b"0", row.denominator or b"0")

    def _take_one(self, question: Question, taken: list[Row]) -> StoredJob | None:
        """Make a job ours that lies at the door, whether its time has come or not."""
        database = self.database
        self._prove_lease()
        if question.handle:
            row = database.by_handle.get(question.handle)
        else:
            key = key_of(question.function, question.unique, question.workload)
            row = database.keys.get(key) if key is not None else None
        if row is None or row.id not in database.live:
            return None
        if row in self._perhaps_taken and (row.server, row.epoch) == (self.lease_id, self.epoch):
            self._perhaps_taken.remove(row)
        elif row.server is not None:
            return None
        taken.append(row)
        database.asked_for.add(row.id)
        self._take(row, row.status if row.status in LATER and row.run_after > self._wall() else "READY")
        self._fault("after")
        return row.stored()

    def _cancel(self, handle: bytes) -> bool | None:
        """End a job that lies at the door."""
        database = self.database
        self._prove_lease()
        row = database.by_handle.get(handle)
        if row is None or row.server is not None or row.id not in database.live:
            return None
        database.end(row, "CANCELLED")
        row.reason = "The job was cancelled"
        self._fault("after")
        return True

    def _name(self, row: Row) -> None:
        row.handle = b"H:%s:r%d" % (self.name.encode(), row.id)
        self.database.by_handle[row.handle] = row

    def _free_jobs_of_the_dead(self) -> None:
        database = self.database
        more = False
        for lease in database.leases.values():
            is_silent = lease.renewed < database.now - self._lease
            if lease.id == self.lease_id or not is_silent or not self._held(lease.id):
                continue
            self._fault("before")
            self._prove_lease()
            lease.taken_over = lease.epoch
            lease.epoch += 1
            more |= self._free_jobs_of(lease)
            self._fault("after")
        if not more:
            self._looked_for_dead = self._clock()

    def _free_jobs_of(self, lease: Lease) -> bool:
        """Free a part of its jobs; whether there may be more."""
        self._end_attempts(lease.id)
        return self._free(lease.id)

    def _free(self, lease: int, but_of_epoch: int | None = None) -> bool:
        some = [row for row in self._held(lease) if row.epoch != but_of_epoch][: self._freed_at_once]
        for row in some:
            row.server = row.epoch = None
        return len(some) == self._freed_at_once

    def _held(self, lease: int) -> list[Row]:
        return [row for row in self.database.live.values() if row.server == lease]

    def _end_attempts(self, lease: int) -> None:
        """The server ended: foreground jobs ended with it, background ones that ran wait again."""
        for row in self._held(lease):
            if not row.background:
                row.reason = "The job server ended before the job did"
                self.database.end(row, "DEAD" if row.status == "RUNNING" else "CANCELLED")
            elif row.status == "RUNNING":
                row.status = "READY"
                row.numerator = row.denominator = None
                row.interruptions += 1
                if row.attempts not in row.kept_attempts:
                    row.kept_attempts.append(row.attempts)
                    row.interrupted.append(row.attempts)

    def _prove_lease(self) -> None:
        lease = self.database.by_lease[self.lease_id]
        if lease.epoch != self.epoch:
            raise LeaseLost(self.name)
        lease.renewed = self.database.now
        self.renewed = self._clock()

    def tend(self) -> float:
        self._fault("before")
        self._prove_lease()
        self._fault("after")
        return 5.0

    def close(self) -> None:
        """What waits here need not wait for this lease to run out."""
        try:
            self._fault("before")
            self._prove_lease()
        except StoreError:
            return  # then others find it all the same
        for row in self._held(self.lease_id):
            if row.epoch == self.epoch and row.status != "RUNNING" and row.background:
                row.server = row.epoch = None


def _without_data(entry: JobFinished) -> JobFinished:
    """A job that ended must not run again because its result cannot be kept."""
    outcome = Outcome.FAILED if entry.outcome is Outcome.SUCCESSFUL else entry.outcome
    return entry._replace(outcome=outcome, data=b"", reason="What the worker sent could not be stored")
