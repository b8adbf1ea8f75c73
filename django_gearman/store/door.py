"""
The database door: rows that no server has.

Which of them are to be taken and how many there are, and how one is taken or ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from math import inf
from time import monotonic
from typing import Any, Final, NamedTuple

from django.db.models import Q
from django.utils import timezone

from .. import continuations
from ..models import JobRecord, unique_key_of
from ..server.entries import Crowd, Question, StoredJob, Waiting
from .columns import AT_DOOR, READY, Status, bytes_of_unique, seconds_of, text_of, text_of_unique
from .database import Database
from .lease import Lease
from .members import Members
from .set_operations import array
from .statements import FUNCTIONS_AT_ONCE, INLINE, SKIP_LOCKED

CLAIM_BYTES: Final = 16 * 1024 * 1024
"""Bytes of workloads that one claim reads, as many as make it full and the last job's."""

COUNT_SHARE: Final = 20
"""Counting what lies at the door may take one part in so many of the writer's time."""

MAX_CROWDED: Final = 500
"""Keys of one limit that a claim passes over at the most."""

DUE_INTERVAL: Final = 1.0
"""Seconds between two looks at the jobs for later: those of others come without a word."""

LOCKED_FOR: Final = 5.0
"""Seconds for which looks pass over locked rows, after one was met: they may be all that would be seen."""


class DoorRow(NamedTuple):
    """A row at the door that may be taken."""

    id: int
    size: int
    """Bytes of the workload, which ``job`` has only where it is ``INLINE``."""
    job: StoredJob
    ready_at: float
    group: int | None = None
    """The group that it is a member of."""


class Look:
    """What a look at the door has found."""

    def __init__(self) -> None:
        self.rows: list[DoorRow] = []
        self.emptied: set[bytes] = set()
        """Functions of which nothing ready will be left."""
        self.more = False
        """Whether there may be more that is wanted."""
        self.is_partial = False
        """Whether anything may lie there that was not seen."""
        self.due_in = inf
        """Seconds until there is something to be seen that waits for its time."""

    def cut(self, name: str) -> None:
        """There may be more of that function."""
        self.emptied.discard(name.encode())
        self.more = self.is_partial = True


class Door:
    """
    The door of one database, as one server looks at it.

    Args:
        prefix: What the handles of rows begin with.
    """

    def __init__(self, db: Database, lease: Lease, members: Members, prefix: str) -> None:
        self._db = db
        self._lease = lease
        self._members = members
        self._row_prefix = prefix
        self.perhaps_taken: list[int] = []
        """Ids of rows that a claim with an unknown outcome may have made ours."""
        self._first_function = ""
        """After which function the next claim begins to look; empty for the first."""
        self._first_due_function = ""
        self.look_for_due_at = 0.0
        """Monotonic time at which jobs for later are looked at again."""
        self._has_later = False
        self._locking = ""
        """What the statements of this look end with."""
        self._locked_until = 0.0
        """Monotonic time until which some of what lies here may be locked by others than servers."""
        self.count_at = 0.0
        """Monotonic time from which what lies here is counted again."""

    @property
    def has_locked(self) -> bool:
        """Whether rows here may be locked: then ``look`` is to lock what it finds."""
        return monotonic() < self._locked_until

    def look(
        self, limit: int, full: Mapping[bytes, int], crowded: Mapping[bytes, Crowd], *, locks: bool = False
    ) -> Look:
        """
        What is to be taken from the door, and what is known of the rest.

        Args:
            locks: Lock it, in the transaction that takes it, and pass over what others have locked.
        """
        self._locking = SKIP_LOCKED if locks else ""
        look = Look()
        now = timezone.now()
        first: list[DoorRow] | None = None
        if not full and not crowded:
            # Mostly one job waits, or none: then this statement has told all.
            first = self._rows_of(self._db.sql.first_ready + self._locking, [2])
            if len(first) > 1:
                first = None
        if first is not None:
            ready = [row.job.function.decode() for row in first]
        else:
            found = self._functions(self._db.sql.functions_ready, self._first_function)
            ready = [str(name) for name, *_ in found]
        look.is_partial = (
            bool(full) or bool(crowded) or len(ready) == FUNCTIONS_AT_ONCE or bool(self._first_function)
        )
        look.more = len(ready) == FUNCTIONS_AT_ONCE
        self._first_function = ready[-1] if look.more else ""
        due = self._functions_due(now, look)
        names = [*ready, *(name for name in due if name not in ready)]
        # Of those that the server has enough of there is little to take: the others get their share.
        names.sort(key=lambda name: name.encode() not in full)
        budget = CLAIM_BYTES
        for number, name in enumerate(names):
            share = max(1, (limit - len(look.rows)) // (len(names) - number))
            above = full.get(name.encode(), -1000)
            crowd = crowded.get(name.encode())
            rows = []
            if first and name in ready:
                rows = first
                look.emptied.add(name.encode())
            elif name in ready:
                statement, but = self._but(self._db.sql.ready_of, crowd)
                rows = self._rows_of(statement + self._locking, [name, above, *but, share])
                if len(rows) < share and name.encode() not in full and crowd is None:
                    look.emptied.add(name.encode())
            if name in due:
                rows = self._merge(rows, name, above, crowd, share, now)
            for row in rows[:share]:
                if budget <= 0:
                    look.cut(name)
                    break
                budget -= row.size
                look.rows.append(row)
            if len(rows) >= share:
                look.cut(name)
        # Functions that nobody was served of take turns in the order in which their first jobs came.
        look.rows.sort(key=lambda row: (-row.job.priority, row.ready_at, row.id))
        return look

    def _functions(self, statement: str, after: str) -> list[Any]:
        """Rows of a statement that tells which functions come after one, in order; so many at a time."""
        if self._db.connection.vendor != "mysql":
            return self._db.execute(statement, [after])
        found: list[Any] = []
        while len(found) < FUNCTIONS_AT_ONCE and (rows := self._db.execute(statement, [after])):
            found += rows
            after = rows[0][0]
        return found

    def _functions_due(self, now: datetime, look: Look) -> list[str]:
        """Functions with jobs whose time has come; looked for once a second, and when it comes."""
        if monotonic() < self.look_for_due_at:
            look.due_in = self.look_for_due_at - monotonic()
            look.is_partial = look.is_partial or self._has_later
            return []
        times: dict[str, float] = {}
        more: list[str] = []
        for statement in self._db.sql.functions_due:
            found = self._functions(statement, self._first_due_function)
            for name, at in found:
                times[name] = min(times.get(name, inf), seconds_of(at, self._zone))
            if len(found) == FUNCTIONS_AT_ONCE:
                more.append(found[-1][0])
        all_of_them = not more
        # Some may be looked at twice, none is left out.
        self._first_due_function = "" if all_of_them else min(more)
        self._has_later = bool(times)
        look.is_partial = look.is_partial or self._has_later
        due = [name for name, at in times.items() if at <= now.timestamp()]
        next_due = min((at for name, at in times.items() if name not in due), default=inf)
        # Jobs that are due and stay, because their function has enough, are looked at again in their turn.
        look.due_in = min(max(next_due - now.timestamp(), 0.0), DUE_INTERVAL)
        self.look_for_due_at = 0.0 if due or not all_of_them else monotonic() + look.due_in
        return due

    def _but(self, statement: str, crowd: Crowd | None) -> tuple[str, list[str | int]]:
        """A statement that looks for rows of other keys of a limit than some; and its parameters for that."""
        if crowd is None:
            return statement, []
        column = self._db.column("limit_key")
        keys = sorted(crowd.keys)[:MAX_CROWDED]
        # Those that do not say have the empty one.
        unsaid = "" if b"" in keys else f"{column} IS NULL OR "
        marks = ", ".join(["%s"] * len(keys))
        wanted = f"({unsaid}{column} NOT IN ({marks}) OR {self._db.column('priority')} > %s)"
        parameters: list[str | int] = [*map(text_of, keys), crowd.priority]
        return statement.replace(" ORDER BY", f" AND {wanted} ORDER BY", 1), parameters

    def _merge(
        self, ready: list[DoorRow], name: str, above: int, crowd: Crowd | None, share: int, now: datetime
    ) -> list[DoorRow]:
        """Jobs that are ready, and those whose time has come, in the order in which they became ready."""
        at = self._db.fields["run_after"].get_db_prep_value(now, self._db.connection)
        due: list[DoorRow] = []
        for statement in self._db.sql.due_of:
            statement, but = self._but(statement, crowd)
            rows = self._rows_of(statement + self._locking, [name, at, *but, share])
            due += [row for row in rows if row.job.priority > above]
        rows = sorted([*ready, *due], key=lambda row: (-row.job.priority, row.ready_at, row.id))
        return rows[:share]

    def _rows_of(self, statement: str, parameters: list[Any]) -> list[DoorRow]:
        rows: list[DoorRow] = []
        ready_at, priority, zone = 0.0, None, self._zone
        for id, size, status, enqueued_at, group, *columns in self._db.execute(statement, parameters):
            job = _stored_job(columns[0] or f"{self._row_prefix}{id}", columns, zone)
            # Those that are ready have the order of their ids, whatever the clocks said.
            ready_at = max(ready_at if job.priority == priority else 0.0, seconds_of(enqueued_at, zone))
            priority = job.priority
            if status != READY:
                rows.append(DoorRow(id, size, job, job.run_after, group))
                continue
            if job.run_after:
                # Its time has come, whatever it was.
                job = job._replace(run_after=0.0)
            rows.append(DoorRow(id, size, job, ready_at, group))
        return rows

    @property
    def _zone(self) -> tzinfo:
        """In which the database keeps moments, if it keeps no zone with them."""
        return self._db.connection.timezone or UTC

    def count(self) -> dict[tuple[bytes, int], Waiting]:
        """How many jobs lie at the door; from indexes alone."""
        began = monotonic()
        counts: dict[tuple[bytes, int], Waiting] = {}
        try:
            for name, priority, count in self._db.execute(self._db.sql.count_ready, []):
                counts[name.encode(), priority] = Waiting(count, 0)
            for statement in self._db.sql.count_later:
                for name, count in self._db.execute(statement, []):
                    # gearmand counts those as normal ones.
                    ready, later = counts.get((name.encode(), 0), (0, 0))
                    counts[name.encode(), 0] = Waiting(ready, later + count)
        finally:
            # After one that took too long for the database, too.
            now = monotonic()
            self.count_at = now + max(1.0, COUNT_SHARE * (now - began))
        return counts

    def take_one(self, question: Question, noted: list[int]) -> StoredJob | None:
        """Make a job ours that lies at the door, whether its time has come or not; its id is ``noted``."""
        unsure = self.perhaps_taken
        perhaps = Q(pk__in=unsure, server=self._lease.id, server_epoch=self._lease.epoch)
        door = self._db.records().filter(Q(server=None) | perhaps, status__in=AT_DOOR)
        if question.handle:
            door = door.filter(handle=text_of(question.handle))
        else:
            unique = text_of_unique(question.unique)
            key = unique_key_of(question.function.decode(), unique, question.workload)
            door = door.filter(unique_key=key)
        with self._lease.transaction():
            id = door.values_list("pk", flat=True).first()
            if id is None:
                return None
            noted.append(id)
            ((_, size, status, _, group, *columns),) = self._db.execute(self._db.sql.by_id(1), [id])
            job = _stored_job(columns[0] or f"{self._row_prefix}{id}", columns, self._zone)
            is_later = status != READY and job.run_after > timezone.now().timestamp()
            taken = self.take([DoorRow(id, size, job, 0.0, group)], status=status if is_later else READY)
        self.perhaps_taken = [each for each in unsure if each != id]
        return taken[0] if taken else None

    def cancel(self, question: Question) -> bool | None:
        """End a job that lies at the door."""
        with self._lease.transaction():
            return bool(self.end(handle=text_of(question.handle))) or None

    def end(self, **which: Any) -> int:
        """Cancel jobs that lie at the door; how many there were."""
        door = self._db.records().filter(server=None, status__in=AT_DOOR, **which)
        # Locked, so that each that is counted is ended here and not claimed by somebody else. What is
        # locked already is just being ended or claimed.
        locked = door.select_for_update(skip_locked=self._db.skips_locked).order_by("pk")
        groups: Counter[int] = Counter()
        ids: list[int] = []
        for id, group, place in locked.values_list("pk", "group", "group_index"):
            ids.append(id)
            if place is not None:
                groups[group] += 1
        ended = door.filter(pk__in=ids).update(
            status=Status.CANCELLED,
            finished_at=timezone.now(),
            message="The job was cancelled",
            unique_key=None,
        )
        if groups:
            self._members.count({group: continuations.Ended(failed=n) for group, n in groups.items()})
        return ended

    def take(self, rows: list[DoorRow], status: str = READY) -> list[StoredJob]:
        """Make rows ours; those that somebody else was quicker to take stay his, or has locked."""
        if not rows:
            return []
        is_postgresql = self._db.connection.vendor == "postgresql"
        # A handle is of a row's id, which is never used twice; handles of the wire door have an epoch
        # there. A job that another server had keeps the handle that its client knows.
        jobs = {row.id: row.job for row in rows}
        ids: list[Any] = [array(list(jobs))] if is_postgresql else list(jobs)
        if self._db.skips_locked and not is_postgresql:
            ids = [id for (id,) in self._db.execute(self._db.sql.free(len(ids)), ids)]
        taken = 0
        if ids:
            parameters = [self._row_prefix, self._lease.id, self._lease.epoch, status, *ids]
            taken = self._db.change(self._db.sql.take(len(ids)), parameters)
        if taken < len(rows):
            still_ours = self._ours(jobs)
            self._note_locked([id for id in jobs if id not in still_ours])
            jobs = {id: job for id, job in jobs.items() if id in still_ours}
        for row in rows:
            if row.group is not None and row.id in jobs:
                self._members.group_of[row.job.handle] = row.group
        large = [row.id for row in rows if row.size > INLINE and row.id in jobs]
        for id in large:
            ((workload,),) = self._db.execute(self._db.sql.workload, [id])
            jobs[id] = jobs[id]._replace(workload=_bytes_of(workload))
        return list(jobs.values())

    def _note_locked(self, ids: list[int]) -> None:
        """Of rows that were not to be had: whether some still lie here."""
        here = self._db.records().filter(pk__in=ids, server=None, status__in=AT_DOOR)
        if ids and self._db.skips_locked and here.exists():
            self._locked_until = monotonic() + LOCKED_FOR

    def _ours(self, ids: Collection[int]) -> set[int]:
        """Which of the rows this run of the server has."""
        ours = self._db.records().filter(pk__in=ids, server_id=self._lease.id, server_epoch=self._lease.epoch)
        return set(ours.values_list("pk", flat=True))

    def found_again(self) -> list[StoredJob]:
        """The rows that a claim took though its COMMIT seemed to fail; nobody knows of them yet."""
        if not self.perhaps_taken:
            return []
        with self._db.errors():
            # Not what was ended meanwhile, as a submission that was refused.
            live = self._db.records().filter(pk__in=self.perhaps_taken, status__in=JobRecord.LIVE)
            found = self.read(self._ours(list(live.values_list("pk", flat=True))))
        self.perhaps_taken = []
        return found

    def read(self, ids: Iterable[int]) -> list[StoredJob]:
        """Jobs with their workloads, whatever their size."""
        jobs: list[StoredJob] = []
        wanted = sorted(ids)
        for start in range(0, len(wanted), 500):
            part = wanted[start : start + 500]
            for row in self._rows_of(self._db.sql.by_id(len(part)), part):
                if row.group is not None:
                    self._members.group_of[row.job.handle] = row.group
                if row.size > INLINE:
                    ((workload,),) = self._db.execute(self._db.sql.workload, [row.id])
                    jobs.append(row.job._replace(workload=_bytes_of(workload)))
                else:
                    jobs.append(row.job)
        return jobs


def _stored_job(handle: str, columns: Sequence[Any], zone: tzinfo) -> StoredJob:
    """A job of the columns ``JOB_FIELDS``; with no workload where that was not read."""
    _, function, unique, workload, priority, attempts, most, reducer, run_after, timeout, *more = columns
    interruptions, limit_key = more
    return StoredJob(
        handle.encode(),
        function.encode(),
        bytes_of_unique(unique),
        _bytes_of(workload),
        priority,
        attempts,
        most,
        reducer.encode(),
        seconds_of(run_after, zone),
        timeout,
        interruptions,
        None if limit_key is None else limit_key.encode(),
    )


def _bytes_of(workload: Any) -> bytes:
    """SQLite keeps text in any column, as somebody may have written it by hand."""
    return workload.encode() if isinstance(workload, str) else bytes(workload or b"")
