"""
A database in memory, for several servers: ``JobStore`` with leases, epochs and a door.

What it promises is ``DatabaseStore``'s: every trip is a transaction that proves
the lease, rows are claimed and leases taken over by compare-and-set, and a row
belongs to one server. What can go wrong goes wrong here: a trip may come to
nothing, or be done and say that it was not. The suite of ``tests/test_store.py``
keeps it honest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from django_gearman.exceptions import LeaseLost, StoreError
from django_gearman.server.entries import (
    Entry,
    JobDue,
    JobFinished,
    JobKept,
    JobProgress,
    JobQueued,
    JobRequeued,
    JobStarted,
    Joined,
    Outcome,
    StoredJob,
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
        "epoch",
        "function",
        "handle",
        "id",
        "interrupted",
        "key",
        "kept_attempts",
        "max_attempts",
        "numerator",
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
        )


def key_of(function: bytes, unique: bytes, workload: bytes) -> Key | None:
    if not unique or (unique == b"-" and not workload):
        return None
    return function, unique, workload if unique == b"-" else b""


class Lease:
    __slots__ = ("epoch", "id", "name", "renewed", "taken_over")

    def __init__(self, id: int, name: str) -> None:
        self.id = id
        self.name = name
        self.epoch = 0
        self.renewed = 0.0
        """By the database's clock."""
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
        self.rewritten: list[bytes] = []
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

    def free_key(self, row: Row) -> None:
        if row.key is not None:
            del self.keys[row.key]
            row.key = None

    def end(self, row: Row, status: str) -> None:
        row.status = status
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
    ) -> None:
        self.database = database
        self.name = name
        self._clock = clock
        self._wall = wall
        self._fault = fault
        self._is_bad = is_bad
        self._lease = lease
        self._freed_at_once = freed_at_once
        self.renewed = 0.0
        self.lease_id = 0
        self.epoch = 0
        self._looked_for_dead = 0.0
        self._perhaps_taken: list[Row] = []
        self._again = False

    def take_lease(self) -> int:
        """Become the server of this name; the epoch."""
        self._fault("before")
        database = self.database
        lease = database.leases.get(self.name)
        if lease is None:
            lease = database.leases[self.name] = Lease(len(database.leases) + 1, self.name)
            database.by_lease[lease.id] = lease
        lease.epoch += 1
        lease.renewed = database.now
        self._fault("after")
        self.lease_id = lease.id
        self.epoch = lease.epoch
        self.renewed = self._looked_for_dead = self._clock()
        return lease.epoch

    def replay(self) -> list[StoredJob]:
        self._fault("before")
        self._prove_lease()
        self._end_attempts(self.lease_id, epoch=self.epoch)
        rows = [row for row in self.database.live.values() if row.server == self.lease_id]
        self._fault("after")
        return [row.stored() for row in sorted(rows, key=lambda row: (-row.priority, row.id))]

    def write(self, entries: Sequence[Entry], *, again: bool) -> dict[int, str | Joined]:
        self._fault("before")
        self._prove_lease()
        self._again = again
        database = self.database
        by_handle = database.by_handle
        refused: dict[int, str | Joined] = {}
        new: dict[bytes, tuple[int, Row]] = {}
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
                    new[handle] = index, self._new_row(entry)
                elif not (again and there.server == self.lease_id):
                    refused[index] = "there is a job of that handle"
                continue
            queued = new.get(handle)
            row = queued[1] if queued is not None else by_handle.get(handle)
            if row is None or (queued is None and row.server != self.lease_id):
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
        for handle, (index, row) in new.items():
            if row.key is not None:
                other = database.keys.get(row.key)
                if other is not None:
                    if other.handle is None:
                        # It waits at the door, without a name.
                        self._name(other)
                    assert other.handle is not None
                    refused[index] = Joined(other.handle)
                    continue
            row.server = self.lease_id
            row.epoch = self.epoch
            database.insert(row)
        for row, entry in ends:
            if row.id:
                self._finish(row, entry)
        self._fault("after")
        return refused

    def _new_row(self, entry: JobQueued) -> Row:
        return Row(
            entry.function,
            entry.unique,
            entry.workload,
            entry.priority,
            handle=entry.handle,
            background=entry.background,
            reducer=entry.reducer,
            run_after=entry.run_after,
            later=entry.run_after > entry.at,
        )

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
            if entry.attempt not in row.kept_attempts:
                row.kept_attempts.append(entry.attempt)
        elif kind is JobDue:
            row.status = "READY"
        elif kind is JobKept:
            row.background = True
            if row.key is None and row.wanted is not None and row.wanted not in self.database.keys:
                row.key = row.wanted
                if row.id:
                    self.database.keys[row.key] = row

    def _finish(self, row: Row, entry: JobFinished) -> None:
        ended = row.id not in self.database.live and not self._again
        if ended and (row.status, row.data) != (entry.outcome.value, entry.data):
            self.database.rewritten.append(entry.handle)
        row.data = entry.data
        row.reason = entry.reason
        self.database.end(row, entry.outcome.value)

    def claim(self, limit: int, full: Sequence[bytes]) -> list[StoredJob]:
        self._fault("before")
        database = self.database
        wall = self._wall()
        due = [
            row
            for row in database.live.values()
            if row.server is None and row.status in ("SCHEDULED", "RETRYING") and row.run_after <= wall
        ]
        if self._clock() - self._looked_for_dead >= self._lease / 3:
            self._free_jobs_of_the_dead()
        rows = [] if due else self._unclaimed(limit, full)
        unsure = self._perhaps_taken
        found = [row for row in unsure if (row.server, row.epoch) == (self.lease_id, self.epoch)]
        self._perhaps_taken = []
        if not rows and not due and self._clock() - self.renewed < self._lease / 3:
            return [row.stored() for row in found]
        try:
            self._fault("before")
            self._prove_lease()
            for row in due:
                row.status = "READY"
            if due:
                rows = self._unclaimed(limit, full)
            for row in rows:
                self._take(row)
            self._fault("after")
        except StoreError:
            # The connection may have been lost inside COMMIT, and what is ours is not looked for again.
            self._perhaps_taken = [*unsure, *rows]
            raise
        return [row.stored() for row in (*found, *rows)]

    def _unclaimed(self, limit: int, full: Sequence[bytes]) -> list[Row]:
        rows = [
            row
            for row in self.database.live.values()
            if row.server is None and row.status == "READY" and row.function not in full
        ]
        rows.sort(key=lambda row: (-row.priority, row.id))
        return rows[:limit]

    def _take(self, row: Row) -> None:
        if row.handle is None:
            self._name(row)
        row.server = self.lease_id
        row.epoch = self.epoch

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
        self._end_attempts(lease.id)
        some = self._held(lease.id)[: self._freed_at_once]
        for row in some:
            row.server = row.epoch = None
        return len(some) == self._freed_at_once

    def _held(self, lease: int) -> list[Row]:
        return [row for row in self.database.live.values() if row.server == lease]

    def _end_attempts(self, lease: int, epoch: int | None = None) -> None:
        """The server ended: foreground jobs ended with it, background ones that ran wait again."""
        for row in self._held(lease):
            if not row.background:
                row.reason = "The job server ended before the job did"
                self.database.end(row, "DEAD" if row.status == "RUNNING" else "CANCELLED")
            elif row.status == "RUNNING":
                row.status = "READY"
                row.numerator = row.denominator = None
                if row.attempts not in row.kept_attempts:
                    row.kept_attempts.append(row.attempts)
                    row.interrupted.append(row.attempts)
                if epoch is not None:
                    row.epoch = epoch

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
        pass


def _without_data(entry: JobFinished) -> JobFinished:
    """A job that ended must not run again because its result cannot be kept."""
    outcome = Outcome.FAILED if entry.outcome is Outcome.SUCCESSFUL else entry.outcome
    return entry._replace(outcome=outcome, data=b"", reason="What the worker sent could not be stored")


