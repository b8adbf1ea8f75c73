"""
Journal entries to rows, and rows to jobs: the durable queue in the ORM's tables.

The one writer of outcomes. Statements are set operations written once per
batch and prepared by the driver; the rows' meaning is in ``models.py``, the
journal's in ``server/entries.py``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from math import inf
from time import monotonic
from typing import Final

from django.db import transaction
from django.db.models import Q
from django.utils import timezone

from ..exceptions import LeaseLost, StoreError
from ..history import History
from ..limiting import SWEEP_INTERVAL, Asked, Permits
from ..models import Cancellation, JobRecord
from ..permits import Limit
from ..scheduler import Scheduler, current_time
from ..server.entries import (
    Claimed,
    Crowd,
    Entry,
    JobKept,
    JobQueued,
    JobRequeued,
    Joined,
    Question,
    Reply,
    StoredJob,
    Topic,
    Waiting,
)
from .columns import RUNNING, Row, in_parts, standing_of, text_of, text_of_unique
from .database import Database
from .door import Door, Look
from .folding import Folded, indexed, without_data
from .lease import LEASE, Lease
from .members import Members
from .set_operations import BadRow, BusyRow, SetOperations, array

logger = logging.getLogger(__name__)

LIMITS_INTERVAL: Final = 0.9
"""Seconds between two looks at the limits; there is a claim each second."""

HURRIED_FOR: Final = 10.0
"""Seconds for which batches wait for no row, after one had to: its client may come again and again."""

CANCEL_INTERVAL: Final = 0.1
"""Seconds between two looks at what is to be cancelled, however often somebody calls."""


class DatabaseStore:
    """
    The ``JobStore`` that lives in the database.

    Made where the command starts, used from the writer's thread alone, after
    ``take_lease``.

    Args:
        using: Alias of the database.
        name: The server's name, unique among the servers of the database.
        queue_of: The queue name of a function; foreign clients do not tell one.
        handle_prefix: What the handles of rows begin with; None for ``H:`` and the name.
        lease: Seconds for which a server may be silent before others take its jobs over; of all the same.
        scheduler: Fires the schedules that are due, with each claim; None for none.
        history: Prunes what ended long ago; None to keep everything.
        max_workload: Bytes of a workload that a result is put into.
    """

    def __init__(
        self,
        using: str,
        name: str,
        *,
        queue_of: Callable[[str], str] | None = None,
        handle_prefix: str | None = None,
        lease: float = LEASE,
        scheduler: Scheduler | None = None,
        history: History | None = None,
        max_workload: float = math.inf,
    ) -> None:
        self._queue_of = lru_cache(maxsize=1_000)(queue_of or (lambda function: "default"))
        self._row_prefix = f"{handle_prefix or f'H:{name}'}:r"
        self._db = Database(using)
        self._lease = Lease(self._db, name, lease)
        self._members = Members(self._db, self._lease, max_workload)
        self._door = Door(self._db, self._lease, self._members, self._row_prefix)
        self._set_operations = SetOperations(self._db, self._lease)
        self._scheduler = scheduler
        self._history = history
        self._permits = Permits(using, self._lease.those_of)
        self._look_for_limits_at = 0.0
        """Monotonic time from which limits are read again."""
        self._sweep_at = 0.0
        self._look_for_cancelled_at = 0.0
        """Monotonic time at which what is to be cancelled is looked at again."""
        self._hurried_until = 0.0
        """Monotonic time until which batches wait for no row that somebody else has locked."""
        self._without_schedules = 0
        """The second, since 1970, of which is known that no schedule was due."""

    @property
    def lease_id(self) -> int:
        return self._lease.id

    @property
    def epoch(self) -> int:
        return self._lease.epoch

    @property
    def renewed(self) -> float:
        """Monotonic time at which the lease was last proved to be ours."""
        return self._lease.renewed

    @property
    def laid(self) -> bool:
        """Whether it has laid jobs at the door by itself, since this was last set back."""
        return self._members.laid

    @laid.setter
    def laid(self, laid: bool) -> None:
        self._members.laid = laid

    @property
    def over(self) -> list[int]:
        """Groups of which it has written the last member's end, since this was last emptied."""
        return self._members.over

    @over.setter
    def over(self, over: list[int]) -> None:
        self._members.over = over

    def take_lease(self, address: str) -> int:
        """
        Become the server of this name; whoever held the lease can write nothing from now on.

        Returns:
            The epoch, for ``ServerOptions.epoch``.
        Raises:
            StoreError: The database is out of reach or not migrated.
        """
        return self._lease.take(address)

    def resume(self) -> list[StoredJob]:
        with self._lease.transaction():
            running = self._db.records().filter(server_id=self._lease.id, status=RUNNING, background=True)
            ids = sorted(running.values_list("pk", flat=True))
            self._lease.end_attempts(self._lease.id)
            for start in range(0, len(ids), 500):
                part = self._db.records().filter(pk__in=ids[start : start + 500])
                part.update(server_epoch=self._lease.epoch)
            jobs = self._door.read(ids)
            self._lease.free_earlier()
        return jobs

    def count_unfinished(self) -> int:
        """How many background jobs are to do that no other server has; for the start, after ``resume``."""
        with self._db.errors():
            at_door = sum(waiting.ready + waiting.later for waiting in self._door.count().values())
            ((ours,),) = self._db.execute(self._db.sql.count_held, [self._lease.id])
            # The first claim is to tell the core what lies there.
            self._door.count_at = 0.0
            return at_door + int(ours)

    def claim(self, limit: int, full: Mapping[bytes, int], crowded: Mapping[bytes, Crowd] = {}) -> Claimed:
        scheduler, moment = self._scheduler, current_time()
        if self._lease.has_earlier:
            with self._lease.transaction():
                self._lease.free_earlier()
            if self._lease.has_earlier:
                # What is older must not come behind what lies at the door already.
                return Claimed([], more=True)
        with self._db.errors():
            # Claims may follow each other by the millisecond.
            if moment == self._without_schedules:
                scheduler = None
            is_time = scheduler is not None and scheduler.has_work(moment)
        if not is_time:
            self._without_schedules = moment
        if self._lease.wants_a_look_at_others:
            self._lease.free_jobs_of_the_dead()
            # Some of them may be to end.
            self._look_for_cancelled_at = 0.0
        cancelled = self._cancelled()
        self._members.recount()
        with self._db.errors():
            # Mostly there is nothing, and finding that out need not write.
            locks = self._door.has_locked
            door = Look() if is_time or locks else self._door.look(limit, full, crowded)
        unsure = self._door.perhaps_taken
        taken = self._door.found_again()
        if door.rows or is_time or locks or self._lease.wants_proof:
            try:
                with self._lease.transaction(synced=is_time):
                    if is_time and scheduler is not None:
                        scheduler.work(moment)
                    if is_time or locks:
                        door = self._door.look(limit, full, crowded, locks=locks)
                    taken += self._door.take(door.rows)
            except StoreError:
                # The connection may have been lost inside COMMIT, and what is ours is not looked for again.
                self._door.perhaps_taken = [*unsure, *(row.id for row in door.rows)]
                raise
        left: dict[tuple[bytes, int], Waiting] | None = None if door.is_partial else {}
        # What is locked would be counted as jobs that are about to be claimed.
        if door.is_partial and not self._door.has_locked and monotonic() >= self._door.count_at:
            left = self._count()
        return Claimed(
            taken, door.more, frozenset(door.emptied), left, door.due_in, self._limits(), cancelled
        )

    def _count(self) -> dict[tuple[bytes, int], Waiting] | None:
        """How much lies at the door; None when nobody can tell now."""
        try:
            with self._db.errors():
                return self._door.count()
        except StoreError as error:
            # What was claimed is ours, must be told of all the same, and is not looked for again.
            logger.warning("What waits could not be counted: %s", error)
            return None

    def read_limits(self) -> dict[bytes, Limit]:
        """Every limit that is in force; for the start, and then with claims."""
        with self._db.errors():
            limits = self._permits.look()
        self._look_for_limits_at = monotonic() + LIMITS_INTERVAL
        return limits

    def _limits(self) -> dict[bytes, Limit] | None:
        """So too, when it is time for it; None when it is not, or nobody can tell now."""
        now = monotonic()
        if now < self._look_for_limits_at:
            return None
        try:
            if now >= self._sweep_at and self._permits.limits:
                self._sweep_at = now + SWEEP_INTERVAL
                with self._lease.transaction():
                    self._permits.sweep(self._lease.id)
            return self.read_limits()
        except StoreError as error:
            # What was claimed must be told of all the same.
            logger.warning("The limits could not be read: %s", error)
            return None

    def _give_permits(self, questions: list[Question]) -> dict[int, Reply]:
        asked = [
            Asked(question.number, question.function.decode(), question.request)
            for question in questions
            if question.request is not None
        ]
        with self._lease.transaction():
            return dict(self._permits.decide(self._lease.id, self._lease.epoch, asked, monotonic()))

    def _cancelled(self) -> list[bytes]:
        """
        Handles of this server's jobs that somebody wants to end; ends those that lie at the door.

        Each other server sees to its own. The wish is forgotten once the job has ended, however it did.
        """
        if monotonic() < self._look_for_cancelled_at:
            return []
        self._look_for_cancelled_at = monotonic() + CANCEL_INTERVAL
        ours: list[bytes] = []
        at_door: list[int] = []
        with self._db.errors():
            wanted = [id for (id,) in self._db.execute(self._db.sql.cancellations, [])]
            over = set(wanted)
            for start in range(0, len(wanted), 500):
                part = wanted[start : start + 500]
                live = self._db.records().filter(pk__in=part, status__in=JobRecord.LIVE)
                for id, server, handle in live.values_list("pk", "server", "handle"):
                    over.discard(id)
                    if server == self._lease.id:
                        ours.append(str(handle).encode())
                    elif server is None:
                        at_door.append(id)
        for start in range(0, len(at_door), 500):
            # Each by itself, since groups are locked after rows. Another server may have been quicker to
            # claim some: then it reads the same.
            with self._lease.transaction():
                self._door.end(pk__in=at_door[start : start + 500])
        if over:
            with self._lease.transaction():
                for start in range(0, len(wanted), 500):
                    gone = over.intersection(wanted[start : start + 500])
                    Cancellation.objects.using(self._db.using).filter(pk__in=gone).delete()
        return ours

    def ask(self, questions: Sequence[Question]) -> dict[int, Reply]:
        replies: dict[int, Reply] = {}
        with self._db.errors():
            self._tell_standings([q for q in questions if q.topic is Topic.STATUS], replies)
            for question in questions:
                if question.topic is Topic.UNIQUE:
                    live = self._db.records().filter(status__in=JobRecord.LIVE)
                    # What an empty one would say anyway lets SQLite use the index of those that are not.
                    found = live.filter(~Q(unique=""), unique=text_of_unique(question.unique)).order_by("-pk")
                    for columns in found.values_list("status", "numerator", "denominator")[:1]:
                        replies[question.number] = standing_of(*columns)
        wanted = [question for question in questions if question.topic is Topic.PERMITS]
        if wanted:
            replies.update(self._give_permits(wanted))
        taken: list[int] = []
        try:
            for question in questions:
                if question.topic is Topic.TAKE:
                    replies[question.number] = self._door.take_one(question, taken)
                elif question.topic is Topic.CANCEL:
                    replies[question.number] = self._door.cancel(question)
                else:
                    replies.setdefault(question.number, None)
        except StoreError:
            # Nobody hears of the replies, and what is ours is not looked for again.
            self._door.perhaps_taken = [*self._door.perhaps_taken, *taken]
            raise
        return replies

    def _tell_standings(self, questions: list[Question], replies: dict[int, Reply]) -> None:
        handles: dict[str, list[int]] = {}
        for question in questions:
            handles.setdefault(text_of(question.handle), []).append(question.number)
        for part in in_parts(list(handles)):
            live = self._db.records().filter(handle__in=part, status__in=JobRecord.LIVE)
            told = live.values_list("handle", "status", "numerator", "denominator")
            for handle, status, numerator, denominator in told:
                for number in handles[str(handle)]:
                    replies[number] = standing_of(status, numerator, denominator)

    def tend(self) -> float:
        self._members.watch()
        return min(self._prune(), max(self._members.watch_at - monotonic(), 0.0))

    def _prune(self) -> float:
        history = self._history
        if history is None:
            return inf
        began = monotonic()
        with self._db.errors():
            batch = history.next_batch(timezone.now())
        if batch.ids:
            try:
                with self._lease.transaction():
                    history.delete(batch)
            except StoreError:
                history.start_over()
                raise
        return history.pause_after(batch, monotonic() - began)

    def write(self, entries: Sequence[Entry], *, again: bool) -> dict[int, str | Joined]:
        if any(isinstance(e, JobQueued | JobRequeued) and e.unclaimed and e.run_after for e in entries):
            self._door.look_for_due_at = 0.0
        batch = Folded(entries, self._queue_of)
        is_hurried = monotonic() < self._hurried_until
        try:
            with self._db.hurried() if is_hurried else nullcontext(), self._lease.transaction():
                joined = self._write(batch, again=again)
        except BusyRow:
            self._hurried_until = monotonic() + HURRIED_FOR
            with self._db.hurried():
                told = self._write_apart(entries, again=again)
        except BadRow:
            told = self._write_apart(entries, again=again)
        else:
            told = indexed(joined, entries)
        if self._members.group_of:
            for handle, change in batch.changed.items():
                # The core has it no more.
                if "finished_at" in change or "server" in change:
                    self._members.group_of.pop(handle, None)
        return told

    def close(self) -> None:
        # What waits here need not wait for this lease to run out.
        try:
            with self._lease.transaction():
                self._db.execute(self._db.sql.leave, [self._lease.id, self._lease.epoch])
        except (StoreError, LeaseLost):
            pass  # then others find it all the same
        self._db.let_go()

    def _write(self, batch: Folded, *, again: bool) -> dict[bytes, Joined]:
        """Write a batch; {handle of a submission: the job that has its unique already}."""
        queued = batch.queued
        if again and queued:
            kept = self._db.records().filter(handle__in=[text_of(handle) for handle in queued])
            for text, server in kept.values_list("handle", "server"):
                handle = str(text).encode()
                # What was laid at the door may have been claimed by anybody since.
                if server == self._lease.id or "server" in queued[handle]:
                    batch.is_there(handle)
        self._leave_keys_of_others(batch.changed)
        ended = self._members.that_end(batch.changed) if self._members.group_of else None
        # What ended makes room for the next of its unique.
        for columns, changes in batch.changes_by_columns():
            self._set_operations.update(columns, changes)
        joined = self._join(queued)
        if queued:
            common = {"server": self._lease.id, "server_epoch": self._lease.epoch}
            self._set_operations.insert([common | row for row in queued.values()])
        if batch.attempts:
            self._set_operations.keep_attempts(batch.attempts)
        if ended:
            self._members.count(ended)
        return joined

    def _leave_keys_of_others(self, changed: dict[bytes, Row]) -> None:
        """A foreground job that is kept after all has no key where another job has it."""
        kept = {row["unique_key"]: row for row in changed.values() if row.get("unique_key")}
        for part in in_parts(list(kept)):
            there = self._db.records().filter(unique_key__in=part).values_list("unique_key", "handle")
            for key, handle in there:
                if changed.get(str(handle).encode()) is not kept[key]:
                    kept[key]["unique_key"] = None

    def _join(self, queued: dict[bytes, Row]) -> dict[bytes, Joined]:
        """Take submissions out whose unique has a live row already; which job each of them joins."""
        keys = {row["unique_key"]: handle for handle, row in queued.items() if row["unique_key"]}
        joined: dict[bytes, Joined] = {}
        is_postgresql = self._db.connection.vendor == "postgresql"
        for part in [list(keys)] if is_postgresql and keys else in_parts(list(keys)):
            sql = self._db.sql.of_keys(len(part))
            for key, pk, handle in self._db.execute(sql, [array(part)] if is_postgresql else part):
                if handle is None:
                    # It waits at the door, without a name.
                    handle = f"{self._row_prefix}{pk}"
                    with self._set_operations.bad_rows():
                        self._db.records().filter(pk=pk, handle=None).update(handle=handle)
                del queued[keys[key]]
                joined[keys[key]] = Joined(handle.encode())
        return joined

    def _write_apart(self, entries: Sequence[Entry], *, again: bool) -> dict[int, str | Joined]:
        """A row of the batch is bad: find it by halves, without refusing its neighbours."""
        refused: dict[int, str | Joined] = {}
        joined: dict[bytes, Joined] = {}

        def write(part: Sequence[Entry]) -> BadRow | None:
            try:
                with transaction.atomic(using=self._db.using):
                    joined.update(self._write(Folded(part, self._queue_of), again=again))
            except BadRow as error:
                return error
            return None

        def write_halves(first: int, last: int) -> None:
            error = write(entries[first:last])
            if error is None:
                return
            if last - first > 1:
                middle = (first + last) // 2
                write_halves(first, middle)
                write_halves(middle, last)
                return
            refused[first] = str(error)
            if isinstance(error, BusyRow) and not isinstance(entries[first], JobQueued | JobKept):
                # Nothing is wrong with it, and nobody is to be refused: all of it is tried again.
                raise StoreError(str(error))
            # A job that ended must not run again because its result cannot be kept.
            end = without_data(entries[first], str(error))
            if end is not None:
                write([end])

        with self._lease.transaction():
            write_halves(0, len(entries))
        return refused | indexed(joined, entries)
