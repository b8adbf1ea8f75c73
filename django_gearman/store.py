"""
Journal entries to rows, and rows to jobs: the durable queue in the ORM's tables.

The one writer of outcomes. Statements are set operations written once per
batch and prepared by the driver; the rows' meaning is in ``models.py``, the
journal's in ``server/entries.py``.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache, cached_property, lru_cache
from itertools import chain, repeat
from math import inf
from time import monotonic
from typing import Any, Final, NamedTuple

from django.conf import settings
from django.core.signals import setting_changed
from django.db import DatabaseError, DataError, IntegrityError, InterfaceError, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import F, Q, QuerySet
from django.db.models.functions import Now
from django.dispatch import receiver
from django.utils import timezone

from . import continuations
from .encoding import exception_of
from .exceptions import LeaseLost, StoreError
from .history import History
from .limiting import SWEEP_INTERVAL, Asked, LeaseNow, Permits
from .models import Cancellation, JobAttempt, JobRecord, ServerLease, unique_key_of
from .permits import Limit
from .scheduler import Scheduler, current_time
from .server.entries import (
    Claimed,
    Crowd,
    Entry,
    JobDue,
    JobFinished,
    JobKept,
    JobLogged,
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

logger = logging.getLogger(__name__)

Status = JobRecord.Status
Row = dict[str, Any]

LEASE: Final = 15.0
"""Seconds after which the jobs of a server that was not heard of are taken over."""

ADOPTED_AT_ONCE: Final = 10_000
"""Rows of a dead server that are freed in one transaction."""

FUNCTIONS_AT_ONCE: Final = 200
"""Functions that are looked at in one claim; the others' turn comes with the next."""

INLINE: Final = 16 * 1024
"""Bytes of a workload that is read along with its row; larger ones are read of jobs that are taken."""

CLAIM_BYTES: Final = 16 * 1024 * 1024
"""Bytes of workloads that one claim reads, as many as make it full and the last job's."""

COUNT_SHARE: Final = 20
"""Counting what lies at the door may take one part in so many of the writer's time."""

LIMITS_INTERVAL: Final = 0.9
"""Seconds between two looks at the limits; there is a claim each second."""

MAX_CROWDED: Final = 500
"""Keys of one limit that a claim passes over at the most."""

WATCH_INTERVAL: Final = 60.0
"""Seconds between two looks for groups that wait for nobody."""

DUE_INTERVAL: Final = 1.0
"""Seconds between two looks at the jobs for later: those of others come without a word."""

CANCEL_INTERVAL: Final = 0.1
"""Seconds between two looks at what is to be cancelled, however often somebody calls."""

_READY: Final = Status.READY.value
_SCHEDULED: Final = Status.SCHEDULED.value
_RUNNING: Final = Status.RUNNING.value
_RETRYING: Final = Status.RETRYING.value
_AT_DOOR: Final = (Status.READY, Status.SCHEDULED, Status.RETRYING)
"""Of a job that no server has, and that is to do."""
_MAX_PROGRESS: Final = 2**63 - 1
_OF_MEMBERS: Final = ("group", "group_index")
"""Fields that stay null in what comes over the wire."""


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
        self._using = using
        self._name = name
        self._queue_of = queue_of or (lambda function: "default")
        self._row_prefix = f"{handle_prefix or f'H:{name}'}:r"
        self._lease = lease
        self._looked_for_dead = 0.0
        self.renewed = 0.0
        """Monotonic time at which the lease was last proved to be ours."""
        self.lease_id = 0
        self._scheduler = scheduler
        self._history = history
        self._max_workload = max_workload
        self.laid = False
        self.over: list[int] = []
        self._group_of: dict[bytes, int] = {}
        """{handle: group} of the jobs that the core holds and that are members of one."""
        self._watch = continuations.Watch(using)
        self._watch_at = 0.0
        self._prepared: object = None
        """The driver's connection that ``_prepare`` has seen."""
        self._packet_limit = math.inf
        """Bytes of a statement that the database takes."""
        self._perhaps_taken: list[int] = []
        """Ids of rows that a claim with an unknown outcome may have made ours."""
        self._resuming = False
        """Whether there are more rows of an earlier run to lay at the door."""
        self._first_function = ""
        """After which function the next claim begins to look; empty for the first."""
        self._first_due_function = ""
        self._look_for_due_at = 0.0
        """Monotonic time at which jobs for later are looked at again."""
        self._has_later = False
        self._permits = Permits(using, self._leases_now)
        self._look_for_limits_at = 0.0
        """Monotonic time from which limits are read again."""
        self._sweep_at = 0.0
        self._look_for_cancelled_at = 0.0
        """Monotonic time at which what is to be cancelled is looked at again."""
        self._count_at = 0.0
        """Monotonic time from which what lies at the door is counted again."""
        self._without_schedules = 0
        """The second, since 1970, of which is known that no schedule was due."""
        self.epoch = 0
        self._fields = {field.name: field for field in JobRecord._meta.concrete_fields}
        self._kinds = {name: field.get_internal_type() for name, field in self._fields.items()}
        self._updates: dict[tuple[str, ...], tuple[str, str]] = {}
        """{columns that change: statements for one row and for a hundred}; not on PostgreSQL and MySQL."""
        self._table = connections[using].ops.quote_name(JobRecord._meta.db_table)

    def take_lease(self, address: str) -> int:
        """
        Become the server of this name; whoever held the lease can write nothing from now on.

        Returns:
            The epoch, for ``ServerOptions.epoch``.
        Raises:
            StoreError: The database is out of reach or not migrated.
        """
        began = monotonic()
        with self._transaction():
            leases = ServerLease.objects.using(self._using)
            lease, _ = leases.get_or_create(name=self._name)
            leases.filter(pk=lease.pk).update(
                epoch=F("epoch") + 1, address=address, started_at=_Now(), renewed_at=_Now()
            )
            lease.refresh_from_db(using=self._using)
        self.lease_id = lease.pk
        self.epoch = lease.epoch
        self.renewed = self._looked_for_dead = began
        return lease.epoch

    def resume(self) -> list[StoredJob]:
        with self._transaction():
            self._prove_lease()
            running = self._records().filter(server_id=self.lease_id, status=_RUNNING, background=True)
            ids = sorted(running.values_list("pk", flat=True))
            self._end_attempts(self.lease_id)
            for start in range(0, len(ids), 500):
                part = self._records().filter(pk__in=ids[start : start + 500])
                part.update(server_epoch=self.epoch)
            jobs = self._read(ids)
            self._resuming = self._free(self.lease_id, self.epoch) == ADOPTED_AT_ONCE
        return jobs

    def count_unfinished(self) -> int:
        """How many background jobs are to do that no other server has; for the start, after ``resume``."""
        with self._database_errors():
            at_door = sum(waiting.ready + waiting.later for waiting in self._count().values())
            ours = self._records().filter(server_id=self.lease_id, status__in=JobRecord.LIVE)
            # The first claim is to tell the core what lies there.
            self._count_at = 0.0
            return at_door + ours.count()

    def claim(self, limit: int, full: Mapping[bytes, int], crowded: Mapping[bytes, Crowd] = {}) -> Claimed:
        scheduler, moment = self._scheduler, current_time()
        if self._resuming:
            self._resume_more()
            if self._resuming:
                # What is older must not come behind what lies at the door already.
                return Claimed([], more=True)
        with self._database_errors():
            # Claims may follow each other by the millisecond.
            if moment == self._without_schedules:
                scheduler = None
            is_time = scheduler is not None and scheduler.has_work(moment)
        if not is_time:
            self._without_schedules = moment
        if monotonic() - self._looked_for_dead >= self._lease / 3:
            self._free_jobs_of_the_dead()
            # Some of them may be to end.
            self._look_for_cancelled_at = 0.0
        cancelled = self._cancelled()
        with self._database_errors():
            # Mostly there is nothing, and finding that out need not write.
            door = _Look() if is_time else self._look(limit, full, crowded)
        unsure = self._perhaps_taken
        taken = self._found_again()
        if door.rows or is_time or monotonic() - self.renewed >= self._lease / 3:
            try:
                with self._transaction() if is_time else self._unsynced_transaction():
                    self._prove_lease()
                    if is_time and scheduler is not None:
                        scheduler.work(moment)
                        door = self._look(limit, full, crowded)
                    taken += self._take(door.rows)
            except StoreError:
                # The connection may have been lost inside COMMIT, and what is ours is not looked for again.
                self._perhaps_taken = [*unsure, *(row.id for row in door.rows)]
                raise
        left: dict[tuple[bytes, int], Waiting] | None = None if door.is_partial else {}
        if door.is_partial and monotonic() >= self._count_at:
            with self._database_errors():
                left = self._count()
        return Claimed(
            taken, door.more, frozenset(door.emptied), left, door.due_in, self._limits(), cancelled
        )

    def read_limits(self) -> dict[bytes, Limit]:
        """Every limit that is in force; for the start, and then with claims."""
        with self._database_errors():
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
                with self._transaction():
                    self._prove_lease()
                    self._permits.sweep(self.lease_id)
            return self.read_limits()
        except StoreError as error:
            # What was claimed must be told of all the same.
            logger.warning("The limits could not be read: %s", error)
            return None

    def _leases_now(self) -> tuple[dict[int, LeaseNow], float]:
        leases: dict[int, LeaseNow] = {}
        now = 0.0
        for id, epoch, started_at, renewed_at, at in self._execute(self._sql.leases, []):
            now = _seconds(at)
            silent = now - _seconds(renewed_at) > self._lease
            leases[id] = LeaseNow(epoch, _seconds(started_at), silent)
        return leases, now

    def _give_permits(self, questions: list[Question]) -> dict[int, Reply]:
        asked = [
            Asked(question.number, question.function.decode(), question.request)
            for question in questions
            if question.request is not None
        ]
        with self._transaction():
            self._prove_lease()
            return dict(self._permits.decide(self.lease_id, self.epoch, asked, monotonic()))

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
        with self._database_errors():
            wanted = [id for (id,) in self._execute(self._sql.cancellations, [])]
            over = set(wanted)
            for start in range(0, len(wanted), 500):
                live = self._records().filter(pk__in=wanted[start : start + 500], status__in=JobRecord.LIVE)
                for id, server, handle in live.values_list("pk", "server", "handle"):
                    over.discard(id)
                    if server == self.lease_id:
                        ours.append(str(handle).encode())
                    elif server is None:
                        at_door.append(id)
        if over or at_door:
            with self._transaction():
                self._prove_lease()
                for start in range(0, len(at_door), 500):
                    # Another server may have been quicker to claim it: then it reads the same.
                    self._end_at_door(pk__in=at_door[start : start + 500])
                for start in range(0, len(wanted), 500):
                    part = over.intersection(wanted[start : start + 500])
                    Cancellation.objects.using(self._using).filter(pk__in=part).delete()
        return ours

    def _resume_more(self) -> None:
        with self._transaction():
            self._prove_lease()
            self._resuming = self._free(self.lease_id, self.epoch) == ADOPTED_AT_ONCE

    def _look(self, limit: int, full: Mapping[bytes, int], crowded: Mapping[bytes, Crowd]) -> _Look:
        """What is to be taken from the door, and what is known of the rest."""
        look = _Look()
        now = timezone.now()
        ready = [str(name) for name, *_ in self._functions(self._sql.functions_ready, self._first_function)]
        look.is_partial = (
            bool(full) or bool(crowded) or len(ready) == FUNCTIONS_AT_ONCE or bool(self._first_function)
        )
        look.more = len(ready) == FUNCTIONS_AT_ONCE
        self._first_function = ready[-1] if look.more else ""
        due = self._functions_due(now, look)
        names = [*ready, *(name for name in due if name not in ready)]
        share = max(1, limit // max(len(names), 1))
        budget = CLAIM_BYTES
        for name in names:
            above = full.get(name.encode(), -1000)
            crowd = crowded.get(name.encode())
            rows = []
            if name in ready:
                statement, but = self._but(self._sql.ready_of, crowd)
                rows = self._rows_of(statement, [name, above, *but, share])
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
        if self._connection.vendor != "mysql":
            return self._execute(statement, [after])
        found: list[Any] = []
        while len(found) < FUNCTIONS_AT_ONCE and (rows := self._execute(statement, [after])):
            found += rows
            after = rows[0][0]
        return found

    def _functions_due(self, now: datetime, look: _Look) -> list[str]:
        """Functions with jobs whose time has come; looked for once a second, and when it comes."""
        if monotonic() < self._look_for_due_at:
            look.due_in = self._look_for_due_at - monotonic()
            look.is_partial = look.is_partial or self._has_later
            return []
        times: dict[str, float] = {}
        more: list[str] = []
        for statement in self._sql.functions_due:
            found = self._functions(statement, self._first_due_function)
            for name, at in found:
                times[name] = min(times.get(name, inf), _seconds(at))
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
        self._look_for_due_at = 0.0 if due or not all_of_them else monotonic() + look.due_in
        return due

    def _but(self, statement: str, crowd: Crowd | None) -> tuple[str, list[str | int]]:
        """A statement that looks for rows of other keys of a limit than some; and its parameters for that."""
        if crowd is None:
            return statement, []
        column = self._column("limit_key")
        keys = sorted(crowd.keys)[:MAX_CROWDED]
        # Those that do not say have the empty one.
        unsaid = "" if b"" in keys else f"{column} IS NULL OR "
        marks = ", ".join(["%s"] * len(keys))
        wanted = f"({unsaid}{column} NOT IN ({marks}) OR {self._column('priority')} > %s)"
        parameters: list[str | int] = [*map(text_of, keys), crowd.priority]
        return statement.replace(" ORDER BY", f" AND {wanted} ORDER BY", 1), parameters

    def _merge(
        self, ready: list[_Row], name: str, above: int, crowd: Crowd | None, share: int, now: datetime
    ) -> list[_Row]:
        """Jobs that are ready, and those whose time has come, in the order in which they became ready."""
        at = self._fields["run_after"].get_db_prep_value(now, self._connection)
        due: list[_Row] = []
        for statement in self._sql.due_of:
            statement, but = self._but(statement, crowd)
            rows = self._rows_of(statement, [name, at, *but, share])
            due += [row for row in rows if row.job.priority > above]
        rows = sorted([*ready, *due], key=lambda row: (-row.job.priority, row.ready_at, row.id))
        return rows[:share]

    def _rows_of(self, statement: str, parameters: list[Any]) -> list[_Row]:
        rows: list[_Row] = []
        ready_at, priority = 0.0, None
        for id, size, status, enqueued_at, group, *columns in self._execute(statement, parameters):
            job = _stored_job(columns[0] or f"{self._row_prefix}{id}", columns)
            # Those that are ready have the order of their ids, whatever the clocks said.
            ready_at = max(ready_at if job.priority == priority else 0.0, _seconds(enqueued_at))
            priority = job.priority
            if status == _READY:
                # Its time has come, whatever it was.
                rows.append(_Row(id, size, job._replace(run_after=0.0), ready_at, group))
            else:
                rows.append(_Row(id, size, job, job.run_after, group))
        return rows

    def _count(self) -> dict[tuple[bytes, int], Waiting]:
        """How many jobs lie at the door; from indexes alone."""
        began = monotonic()
        counts: dict[tuple[bytes, int], Waiting] = {}
        for name, priority, count in self._execute(self._sql.count_ready, []):
            counts[name.encode(), priority] = Waiting(count, 0)
        for statement in self._sql.count_later:
            for name, count in self._execute(statement, []):
                # gearmand counts those as normal ones.
                ready, later = counts.get((name.encode(), 0), (0, 0))
                counts[name.encode(), 0] = Waiting(ready, later + count)
        now = monotonic()
        self._count_at = now + max(1.0, COUNT_SHARE * (now - began))
        return counts

    def ask(self, questions: Sequence[Question]) -> dict[int, Reply]:
        replies: dict[int, Reply] = {}
        with self._database_errors():
            self._tell_standings([q for q in questions if q.topic is Topic.STATUS], replies)
            for question in questions:
                if question.topic is Topic.UNIQUE:
                    live = self._records().filter(status__in=JobRecord.LIVE)
                    found = live.filter(unique=text_of_unique(question.unique)).order_by("-pk")
                    for columns in found.values_list("status", "numerator", "denominator")[:1]:
                        replies[question.number] = _standing(*columns)
        wanted = [question for question in questions if question.topic is Topic.PERMITS]
        if wanted:
            replies.update(self._give_permits(wanted))
        taken: list[int] = []
        try:
            for question in questions:
                if question.topic is Topic.TAKE:
                    replies[question.number] = self._take_one(question, taken)
                elif question.topic is Topic.CANCEL:
                    replies[question.number] = self._cancel(question)
                else:
                    replies.setdefault(question.number, None)
        except StoreError:
            # Nobody hears of the replies, and what is ours is not looked for again.
            self._perhaps_taken = [*self._perhaps_taken, *taken]
            raise
        return replies

    def _tell_standings(self, questions: list[Question], replies: dict[int, Reply]) -> None:
        handles: dict[str, list[int]] = {}
        for question in questions:
            handles.setdefault(text_of(question.handle), []).append(question.number)
        for part in _in_parts(list(handles)):
            live = self._records().filter(handle__in=part, status__in=JobRecord.LIVE)
            told = live.values_list("handle", "status", "numerator", "denominator")
            for handle, status, numerator, denominator in told:
                for number in handles[str(handle)]:
                    replies[number] = _standing(status, numerator, denominator)

    def _take_one(self, question: Question, noted: list[int]) -> StoredJob | None:
        """Make a job ours that lies at the door, whether its time has come or not; its id is ``noted``."""
        unsure = self._perhaps_taken
        perhaps = Q(pk__in=unsure, server=self.lease_id, server_epoch=self.epoch)
        door = self._records().filter(Q(server=None) | perhaps, status__in=_AT_DOOR)
        if question.handle:
            door = door.filter(handle=text_of(question.handle))
        else:
            unique = text_of_unique(question.unique)
            key = unique_key_of(question.function.decode(), unique, question.workload)
            door = door.filter(unique_key=key)
        with self._transaction():
            self._prove_lease()
            id = door.values_list("pk", flat=True).first()
            if id is None:
                return None
            noted.append(id)
            ((_, size, status, _, group, *columns),) = self._execute(self._sql.by_id(1), [id])
            job = _stored_job(columns[0] or f"{self._row_prefix}{id}", columns)
            is_later = status != _READY and job.run_after > timezone.now().timestamp()
            taken = self._take([_Row(id, size, job, 0.0, group)], status=status if is_later else _READY)
        self._perhaps_taken = [each for each in unsure if each != id]
        return taken[0] if taken else None

    def _cancel(self, question: Question) -> bool | None:
        """End a job that lies at the door."""
        with self._transaction():
            self._prove_lease()
            return bool(self._end_at_door(handle=text_of(question.handle))) or None

    def _end_at_door(self, **which: Any) -> int:
        """Cancel jobs that lie at the door; how many there were."""
        door = self._records().filter(server=None, status__in=_AT_DOOR, **which)
        # Locked, so that each that is counted is ended here and not claimed by somebody else.
        members = door.filter(group_index__isnull=False).select_for_update().order_by("pk")
        groups = Counter(members.values_list("group", flat=True))
        ended = door.update(
            status=Status.CANCELLED,
            finished_at=timezone.now(),
            message="The job was cancelled",
            unique_key=None,
        )
        if groups:
            self._count_members({group: continuations.Ended(failed=n) for group, n in groups.items()})
        return ended

    def _free_jobs_of_the_dead(self) -> None:
        """
        Lay the jobs of servers whose leases ran out at the door, for every server to claim.

        The compare-and-set raises the dead server's epoch: should it only have
        been asleep, it can write nothing any more.
        """
        leases = ServerLease.objects.using(self._using)
        silent = leases.filter(renewed_at__lt=_Now() - timedelta(seconds=self._lease))
        with self._database_errors():
            dead = [lease for lease in silent.exclude(pk=self.lease_id) if self._held(lease.pk, 1)]
        more = False
        for lease in dead:
            with self._transaction():
                self._prove_lease()
                if silent.filter(pk=lease.pk, epoch=lease.epoch).update(epoch=F("epoch") + 1):
                    more |= self._free_jobs_of(lease)
        if not more:
            self._looked_for_dead = monotonic()

    def _free_jobs_of(self, lease: ServerLease) -> bool:
        """Free a part of its jobs; whether there may be more."""
        self._end_attempts(lease.pk)
        freed = self._free(lease.pk)
        if freed:
            logger.warning(
                "The job server %s was not heard of for %g s: %d of its jobs were freed",
                lease.name,
                self._lease,
                freed,
            )
        return freed == ADOPTED_AT_ONCE

    def _free(self, lease_id: int, but_of_epoch: int | None = None) -> int:
        """Lay a part of a server's jobs at the door; how many."""
        some = self._held(lease_id, ADOPTED_AT_ONCE, but_of_epoch)
        for start in range(0, len(some), 500):
            self._records().filter(pk__in=some[start : start + 500]).update(server=None, server_epoch=None)
        return len(some)

    def _held(self, lease_id: int, limit: int, but_of_epoch: int | None = None) -> list[int]:
        """Ids of so many live jobs of a server, the oldest first."""
        but = -1 if but_of_epoch is None else but_of_epoch
        return [id for (id,) in self._execute(self._sql.held, [lease_id, but, limit])]

    def _end_attempts(self, lease_id: int) -> None:
        """The server ended: foreground jobs ended with it, background ones that ran wait again."""
        sql, now = self._sql, self._now()
        # The clients of foreground jobs left with it.
        self._execute(sql.end_running, [now, lease_id])
        self._execute(sql.end_waiting, [now, lease_id])
        self._execute(sql.keep_interrupted, [now, lease_id])
        self._execute(sql.interrupt, [lease_id])

    def _now(self) -> Any:
        """This machine's time, as the driver takes it."""
        return self._fields["run_after"].get_db_prep_value(timezone.now(), self._connection)

    def tend(self) -> float:
        self._watch_groups()
        return min(self._prune(), max(self._watch_at - monotonic(), 0.0))

    def _watch_groups(self) -> None:
        """Go on with groups whose rows somebody deleted by hand."""
        if monotonic() < self._watch_at:
            return
        with self._database_errors():
            stuck = self._watch.stuck()
        if stuck:
            with self._transaction():
                self._prove_lease()
                self._follow(self._watch.settle(stuck, self._workload_limit))
        self._watch_at = monotonic() + WATCH_INTERVAL

    def _prune(self) -> float:
        history = self._history
        if history is None:
            return inf
        began = monotonic()
        with self._database_errors():
            batch = history.next_batch(timezone.now())
        if batch.ids:
            try:
                with self._transaction():
                    self._prove_lease()
                    history.delete(batch)
            except StoreError:
                history.start_over()
                raise
        return history.pause_after(batch, monotonic() - began)

    def _take(self, rows: list[_Row], status: str = _READY) -> list[StoredJob]:
        """Make rows ours; those that somebody else was quicker to take stay his."""
        if not rows:
            return []
        # A handle is of a row's id, which is never used twice; handles of the wire door have an epoch
        # there. A job that another server had keeps the handle that its client knows.
        jobs = {row.id: row.job for row in rows}
        with self._connection.cursor() as cursor:
            cursor.execute(
                self._sql.take(len(jobs)), [self._row_prefix, self.lease_id, self.epoch, status, *jobs]
            )
            taken = cursor.rowcount
        if taken < len(rows):
            still_ours = self._ours(jobs)
            jobs = {id: job for id, job in jobs.items() if id in still_ours}
        for row in rows:
            if row.group is not None and row.id in jobs:
                self._group_of[row.job.handle] = row.group
        large = [row.id for row in rows if row.size > INLINE and row.id in jobs]
        for id in large:
            ((workload,),) = self._execute(self._sql.workload, [id])
            jobs[id] = jobs[id]._replace(workload=bytes(workload))
        return list(jobs.values())

    def _ours(self, ids: Collection[int]) -> set[int]:
        """Which of the rows this run of the server has."""
        ours = self._records().filter(pk__in=ids, server_id=self.lease_id, server_epoch=self.epoch)
        return set(ours.values_list("pk", flat=True))

    def _found_again(self) -> list[StoredJob]:
        """The rows that a claim took though its COMMIT seemed to fail; nobody knows of them yet."""
        if not self._perhaps_taken:
            return []
        with self._database_errors():
            # Not what was ended meanwhile, as a submission that was refused.
            live = self._records().filter(pk__in=self._perhaps_taken, status__in=JobRecord.LIVE)
            found = self._read(self._ours(list(live.values_list("pk", flat=True))))
        self._perhaps_taken = []
        return found

    def _read(self, ids: Iterable[int]) -> list[StoredJob]:
        """Jobs with their workloads, whatever their size."""
        jobs: list[StoredJob] = []
        wanted = sorted(ids)
        for start in range(0, len(wanted), 500):
            part = wanted[start : start + 500]
            for row in self._rows_of(self._sql.by_id(len(part)), part):
                if row.group is not None:
                    self._group_of[row.job.handle] = row.group
                if row.size > INLINE:
                    ((workload,),) = self._execute(self._sql.workload, [row.id])
                    jobs.append(row.job._replace(workload=bytes(workload)))
                else:
                    jobs.append(row.job)
        return jobs

    def write(self, entries: Sequence[Entry], *, again: bool) -> dict[int, str | Joined]:
        if any(isinstance(e, JobQueued | JobRequeued) and e.unclaimed and e.run_after for e in entries):
            self._look_for_due_at = 0.0
        batch = _Folded(entries, self._queue_of)
        try:
            with self._transaction():
                self._prove_lease()
                joined = self._write(batch, again=again)
        except _BadRow:
            told = self._write_apart(entries, again=again)
        else:
            told = _indexed(joined, entries)
        if self._group_of:
            for handle, change in batch.changed.items():
                # The core has it no more.
                if "finished_at" in change or "server" in change:
                    self._group_of.pop(handle, None)
        return told

    def close(self) -> None:
        # What waits here need not wait for this lease to run out.
        try:
            with self._transaction():
                self._prove_lease()
                self._execute(self._sql.leave, [self.lease_id, self.epoch])
        except (StoreError, LeaseLost):
            pass  # then others find it all the same
        self._let_go()

    # The statements.

    def _write(self, batch: _Folded, *, again: bool) -> dict[bytes, Joined]:
        """Write a batch; {handle of a submission: the job that has its unique already}."""
        queued = batch.queued
        if again and queued:
            kept = self._records().filter(handle__in=[text_of(handle) for handle in queued])
            for text, server in kept.values_list("handle", "server"):
                handle = str(text).encode()
                # What was laid at the door may have been claimed by anybody since.
                if server == self.lease_id or "server" in queued[handle]:
                    batch.is_there(handle)
        self._leave_keys_of_others(batch.changed)
        ended = self._members_that_end(batch.changed) if self._group_of else None
        # What ended makes room for the next of its unique.
        for columns, changes in batch.changes_by_columns():
            self._update(columns, changes)
        joined = self._join(queued)
        if queued:
            common = {"server": self.lease_id, "server_epoch": self.epoch}
            self._insert([common | row for row in queued.values()])
        if batch.attempts:
            self._keep_attempts(batch.attempts)
        if ended:
            self._count_members(ended)
        return joined

    def _members_that_end(self, changed: dict[bytes, Row]) -> dict[int, continuations.Ended]:
        """Of each group, how many of its members this batch ends, which did not end before."""
        here = [handle for handle in changed if handle in self._group_of and "finished_at" in changed[handle]]
        ended: dict[int, continuations.Ended] = {}
        for part in _in_parts([text_of(handle) for handle in here]):
            live = self._records().filter(
                handle__in=part, server=self.lease_id, status__in=JobRecord.SERVED, group_index__isnull=False
            )
            for text, group in live.values_list("handle", "group"):
                of = ended.setdefault(group, continuations.Ended())
                if changed[str(text).encode()]["status"] == Status.SUCCESSFUL:
                    of.successful += 1
                else:
                    of.failed += 1
        return ended

    def _count_members(self, ended: Mapping[int, continuations.Ended]) -> None:
        self._follow(continuations.count(ended, self._using, self._workload_limit))

    def _follow(self, following: continuations.Following) -> None:
        self.laid |= following.laid
        self.over += following.groups

    @property
    def _workload_limit(self) -> float:
        """Bytes that a workload may have which a result is put into."""
        # Escapes may double it in a statement.
        return min(self._max_workload, self._packet_limit / 2 - 1000)

    def _leave_keys_of_others(self, changed: dict[bytes, Row]) -> None:
        """A foreground job that is kept after all has no key where another job has it."""
        kept = {row["unique_key"]: row for row in changed.values() if row.get("unique_key")}
        for part in _in_parts(list(kept)):
            there = self._records().filter(unique_key__in=part).values_list("unique_key", "handle")
            for key, handle in there:
                if changed.get(str(handle).encode()) is not kept[key]:
                    kept[key]["unique_key"] = None

    def _join(self, queued: dict[bytes, Row]) -> dict[bytes, Joined]:
        """Take submissions out whose unique has a live row already; which job each of them joins."""
        keys = {row["unique_key"]: handle for handle, row in queued.items() if row["unique_key"]}
        joined: dict[bytes, Joined] = {}
        is_postgresql = self._connection.vendor == "postgresql"
        for part in [list(keys)] if is_postgresql and keys else _in_parts(list(keys)):
            sql = self._sql.of_keys(len(part))
            for key, pk, handle in self._execute(sql, [_array(part)] if is_postgresql else part):
                if handle is None:
                    # It waits at the door, without a name.
                    handle = f"{self._row_prefix}{pk}"
                    self._records().filter(pk=pk, handle=None).update(handle=handle)
                del queued[keys[key]]
                joined[keys[key]] = Joined(handle.encode())
        return joined

    def _keep_attempts(self, attempts: list[JobRequeued]) -> None:
        adapt = self._connection.ops.adapt_datetimefield_value
        rows = []
        for entry in attempts:
            values = [
                entry.attempt,
                text_of(entry.worker)[:128],
                adapt(_moment(entry.started_at)),
                adapt(_moment(entry.at)),
                *_failure(entry).values(),
                _storable(entry.log.decode(errors="backslashreplace")),
            ]
            rows.append((*values, text_of(entry.handle), self.lease_id, entry.attempt))
        self._execute_many(self._sql.keep_attempt, rows)

    def _write_apart(self, entries: Sequence[Entry], *, again: bool) -> dict[int, str | Joined]:
        """A row of the batch is bad: find it by halves, without refusing its neighbours."""
        refused: dict[int, str | Joined] = {}
        joined: dict[bytes, Joined] = {}

        def write(part: Sequence[Entry]) -> _BadRow | None:
            try:
                with transaction.atomic(using=self._using):
                    joined.update(self._write(_Folded(part, self._queue_of), again=again))
            except _BadRow as error:
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
            # A job that ended must not run again because its result cannot be kept.
            end = _without_data(entries[first], str(error))
            if end is not None:
                write([end])

        with self._transaction():
            self._prove_lease()
            write_halves(0, len(entries))
        return refused | _indexed(joined, entries)

    def _insert(self, rows: list[Row]) -> None:
        connection = self._connection
        prepare = self._preparer()
        told = set(chain.from_iterable(rows))
        # A column at a time: what is the same for all rows costs nothing.
        values: list[Iterable[Any]] = []
        for name, (_, default) in self._prepared_defaults.items():
            if name in told:
                values.append(prepare(name, [row.get(name, default) for row in rows]))
            else:
                values.append(repeat(default))
        names = ", ".join(connection.ops.quote_name(column) for column, _ in self._prepared_defaults.values())
        driver = connection.Database  # type: ignore[attr-defined]  # each backend has it
        if hasattr(driver, "Copy"):  # psycopg 3
            self._copy(f"COPY {self._table} ({names}) FROM STDIN", zip(*values, strict=False))
            return
        marks = f"({', '.join(['%s'] * len(values))})"
        insert = f"INSERT INTO {self._table} ({names}) VALUES "  # noqa: S608
        told_rows = self._execute_in_hundreds(insert + _a_hundred(marks), list(zip(*values, strict=False)))
        self._execute_many(insert + marks, told_rows)

    def _update(self, names: tuple[str, ...], changes: list[tuple[bytes, Row]]) -> None:
        prepare = self._preparer()
        handles = [text_of(handle) for handle, _ in changes]
        values = [[change[name] for _, change in changes] for name in names]
        if self._connection.vendor == "postgresql":
            self._update_from_arrays(names, handles, values)
            return
        columns = [prepare(name, column) for name, column in zip(names, values, strict=True)]
        match self._connection.vendor:
            case "mysql":
                self._update_by_join(names, handles, list(zip(*columns, strict=True)))
            case _:
                rows = list(zip(*columns, handles, repeat(self.lease_id), strict=False))
                if names not in self._updates:
                    self._updates[names] = self._update_of_one(names), self._update_of_a_hundred(names)
                of_one, of_a_hundred = self._updates[names]
                self._execute_many(of_one, self._execute_in_hundreds(of_a_hundred, rows))

    def _update_of_one(self, names: Sequence[str]) -> str:
        where = f"{self._column('handle')} = %s AND {self._mine}"
        assignments = ", ".join(f"{self._column(name)} = %s" for name in names)
        return f"UPDATE {self._table} SET {assignments} WHERE {where}"  # noqa: S608

    def _update_of_a_hundred(self, names: Sequence[str]) -> str:
        """SQLite's, of rows of the new values, the handle and the server."""
        new = [f"v.column{number}" for number in range(1, len(names) + 3)]
        assignments = ", ".join(f"{self._column(name)} = {c}" for name, c in zip(names, new, strict=False))
        rows = _a_hundred(f"({', '.join(['%s'] * len(new))})")
        return (
            f"UPDATE {self._table} AS t SET {assignments} FROM (VALUES {rows}) AS v "  # noqa: S608
            f"WHERE t.{self._column('handle')} = {new[-2]} AND {self._mine.replace('%s', new[-1])}"
        )

    def _update_from_arrays(self, names: Sequence[str], handles: list[str], columns: list[list[Any]]) -> None:
        """PostgreSQL's: one statement with an array for each column."""
        types = [self._fields[name].db_type(self._connection) for name in names]
        arrays = ", ".join(["%s::varchar[]", *(f"%s::{kind}[]" for kind in types)])
        new = [f"c{number}" for number in range(len(names))]
        assignments = ", ".join(f"{self._column(name)} = v.{c}" for name, c in zip(names, new, strict=True))
        sql = (
            f"UPDATE {self._table} t SET {assignments} FROM unnest({arrays}) v(handle, {', '.join(new)}) "  # noqa: S608
            f"WHERE t.{self._column('handle')} = v.handle AND {self._mine}"
        )
        self._change(sql, [*map(_array, [handles, *columns]), self.lease_id])

    def _update_by_join(self, names: Sequence[str], handles: list[str], rows: list[tuple[Any, ...]]) -> None:
        """
        MySQL's: the rows' ids first, then joins with tables made of the new values.

        By ids, since texts of such a table have a collation of their own, for which no index serves.
        """
        with self._connection.cursor() as cursor:
            wanted = ", ".join(["%s"] * len(handles))
            where = f"{self._column('handle')} IN ({wanted}) AND {self._mine}"
            cursor.execute(
                f"SELECT {self._column('handle')}, {self._column('id')} FROM {self._table} WHERE {where}",  # noqa: S608
                [*handles, self.lease_id],
            )
            ids = dict(cursor.fetchall())
        changes = [[ids[handle], *row] for handle, row in zip(handles, rows, strict=True) if handle in ids]
        new = [f"c{number}" for number in range(len(names))]
        # A bare text would have to be UTF-8 to be a column of such a table.
        marks = [f"{'_binary ' if self._kinds[name] == 'BinaryField' else ''}%s" for name in names]
        first = "SELECT %s AS id, " + ", ".join(f"{m} AS {c}" for m, c in zip(marks, new, strict=True))
        other = f" UNION ALL SELECT {', '.join(['%s', *marks])}"
        assignments = ", ".join(f"t.{self._column(name)} = v.{c}" for name, c in zip(names, new, strict=True))
        for part in self._statements_full(changes):
            sql = (
                f"UPDATE ({first}{other * (len(part) - 1)}) v STRAIGHT_JOIN {self._table} t "  # noqa: S608
                f"ON t.{self._column('id')} = v.id SET {assignments}"
            )
            self._change(sql, [value for row in part for value in row])

    def _statements_full(self, rows: list[list[Any]]) -> Iterator[list[list[Any]]]:
        """Rows in parts, each for one statement of about half a megabyte, or one row."""
        part: list[list[Any]] = []
        size = 0
        for row in rows:
            length = self._length(row)
            if part and (size + length > 500_000 or len(part) >= 500):
                yield part
                part, size = [], 0
            part.append(row)
            size += length
        if part:
            yield part

    def _length(self, row: Sequence[Any]) -> int:
        """About how many bytes a row is in a statement; exactly so many where that matters."""
        length = 64 * len(row) + sum(len(value) for value in row if isinstance(value, bytes | str))
        # Escapes may double it.
        if length * 2 > self._packet_limit:
            literal = self._connection.connection.literal
            length = 64 * len(row) + sum(len(literal(v)) for v in row if isinstance(v, bytes | str))
        if length > self._packet_limit:
            raise _BadRow(
                f"{length} bytes are more than the database's max_allowed_packet, {self._packet_limit}"
            )
        return length

    def _column(self, name: str) -> str:
        return self._connection.ops.quote_name(str(self._fields[name].column))

    @property
    def _mine(self) -> str:
        """
        Rows that this server may change, given its lease: its own, and those at the door.

        What it has laid there may have to be undone.
        """
        server = self._column("server")
        return f"({server} = %s OR {server} IS NULL)"

    def _preparer(self) -> Callable[[str, list[Any]], list[Any]]:
        """
        A function that makes of a field's values what the driver takes.

        Text, numbers and booleans go as they are: asking each field for each
        value would cost more than the statement. Many entries share a moment.
        """
        binary = self._connection.Database.Binary  # type: ignore[attr-defined]  # each backend has it
        adapt = cache(self._connection.ops.adapt_datetimefield_value)

        def prepare(name: str, values: list[Any]) -> list[Any]:
            match self._kinds[name]:
                case "BinaryField":
                    return [value if value is None else binary(value) for value in values]
                case "DateTimeField":
                    return [value if value is None else adapt(value) for value in values]
            return values

        return prepare

    @cached_property
    def _prepared_defaults(self) -> dict[str, tuple[str, Any]]:
        """{field: (column, the default as the driver takes it)} of what a job of the wire may have."""
        return {
            name: (str(field.column), field.get_db_prep_save(field.get_default(), self._connection))
            for name, field in self._fields.items()
            if not field.primary_key and name not in _OF_MEMBERS
        }

    def _execute(self, sql: str, parameters: Sequence[Any]) -> list[Any]:
        with self._connection.cursor() as cursor:
            cursor.execute(sql, parameters)
            return cursor.fetchall() if cursor.description else []

    def _execute_many(self, sql: str, rows: list[tuple[Any, ...]]) -> None:
        if not rows:
            return
        with self._bad_rows(), self._connection.cursor() as cursor:
            if self._packet_limit < math.inf:
                for row in rows:
                    self._length(row)
            cursor.executemany(sql, rows)

    def _execute_in_hundreds(self, sql: str, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """
        On SQLite, execute a statement for each hundred rows; the rows that are left.

        Between two statements the driver waits for the event loop's thread to
        let it go on, and to begin one costs as much as what it does for a row.
        """
        if self._connection.vendor != "sqlite" or not self._has_update_from:
            return rows
        end = len(rows) - len(rows) % 100
        if end:
            hundreds = (rows[start : start + 100] for start in range(0, end, 100))
            self._execute_many(sql, [tuple(chain.from_iterable(hundred)) for hundred in hundreds])
        return rows[end:]

    @cached_property
    def _has_update_from(self) -> bool:
        """SQLite's from 3.33, which also takes so many parameters."""
        driver = self._connection.Database  # type: ignore[attr-defined]  # each backend has it
        return bool(driver.sqlite_version_info >= (3, 33))

    def _change(self, sql: str, parameters: list[Any]) -> None:
        with self._bad_rows(), self._connection.cursor() as cursor:
            cursor.execute(sql, parameters)

    def _copy(self, sql: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """PostgreSQL's way to take many rows: several times as fast as statements."""
        connection = self._connection
        with (
            self._bad_rows(),
            connection.cursor() as cursor,
            connection.wrap_database_errors,
            cursor.copy(sql) as copy,
        ):
            for row in rows:
                copy.write_row(row)

    @contextmanager
    def _bad_rows(self) -> Iterator[None]:
        """What the database says of a row's content, told apart from what it says of itself."""
        try:
            yield
        except (DataError, IntegrityError, ValueError, OverflowError) as error:
            raise _BadRow(_said(error)) from error
        except DatabaseError as error:
            if _error_code(error) in _CODES_OF_BAD_ROWS:
                raise _BadRow(_said(error)) from error
            raise

    def _prove_lease(self) -> None:
        """Renew the lease; in every transaction, so that a server that was replaced commits nothing."""
        began = monotonic()
        with self._connection.cursor() as cursor:
            cursor.execute(self._sql.renew, [self.lease_id, self.epoch])
            if not cursor.rowcount:
                raise LeaseLost(self._name)
        self.renewed = began

    @cached_property
    def _sql(self) -> _Statements:
        return _Statements(self._connection)

    @property
    def _connection(self) -> BaseDatabaseWrapper:
        return connections[self._using]

    def _records(self) -> QuerySet[JobRecord]:
        return JobRecord.objects.using(self._using)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, and synced; every database error leaves as ``StoreError``."""
        with self._database_errors(), transaction.atomic(using=self._using):
            yield
            if self._connection.needs_rollback:
                # A savepoint could not be rolled back; Django would now undo everything without a word.
                raise DatabaseError("The transaction is broken")

    @contextmanager
    def _unsynced_transaction(self) -> Iterator[None]:
        """
        All or nothing, and on SQLite perhaps nothing after a power failure.

        For claims: then their rows lie at the door, as before, and nobody was told of anything.
        The next commit that is synced keeps all before it.
        """
        connection = self._connection
        with self._database_errors():
            relaxes = connection.vendor == "sqlite" and not connection.in_atomic_block
            if relaxes:
                self._execute("PRAGMA synchronous=NORMAL", [])
        try:
            with self._transaction():
                yield
        finally:
            # A connection that was let go of begins anew.
            if relaxes and self._prepared is not None:
                with self._database_errors():
                    self._execute("PRAGMA synchronous=FULL", [])

    @contextmanager
    def _database_errors(self) -> Iterator[None]:
        connection = self._connection
        # Django hands on some of the driver's own errors as they are, such as those of closing a cursor.
        driver: Any = connection.Database  # type: ignore[attr-defined]  # each backend has it
        try:
            connection.ensure_connection()
            # Inside of somebody else's transaction, as in a test case, nothing could be set.
            if connection.connection is not self._prepared and not connection.in_atomic_block:
                self._prepare(connection)
                self._prepared = connection.connection
            yield
        except (DatabaseError, InterfaceError, driver.Error) as error:
            # Whatever state it is in: the next attempt gets a new one.
            self._let_go()
            raise StoreError(_said(error)) from error

    def _let_go(self) -> None:
        self._prepared = None
        connection: Any = self._connection
        try:
            connection.close()
        except (DatabaseError, InterfaceError, connection.Database.Error):
            pass  # it was closed from the other end

    def _prepare(self, connection: BaseDatabaseWrapper) -> None:
        if connection.vendor == "sqlite":
            # A transaction that reads before it writes would otherwise fail where it could wait.
            connection.transaction_mode = "IMMEDIATE"  # type: ignore[attr-defined]  # SQLite's own
            with connection.cursor() as cursor:
                # An acknowledged job survives power loss: WAL syncs each commit only when FULL.
                cursor.execute("PRAGMA journal_mode=WAL")
                cursor.execute("PRAGMA synchronous=FULL")
        elif connection.vendor == "mysql":
            with connection.cursor() as cursor:
                cursor.execute("SELECT @@max_allowed_packet")
                self._packet_limit = cursor.fetchone()[0]


class _Statements:
    """
    The statements of claim and replay, written once.

    By hand, because statuses must stand in the text: SQLite does not use a
    partial index for a parameter. Table and column names are the model's own,
    every value is a parameter.
    """

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        quote = connection.ops.quote_name
        table = quote(JobRecord._meta.db_table)

        def by(index: str) -> str:
            # Without statistics SQLite would rather scan every live row for its status and sort.
            if connection.vendor == "sqlite":
                return f"{table} INDEXED BY {quote(index)}"
            if connection.vendor == "mysql":
                return f"{table} FORCE INDEX ({quote(index)})"
            return table

        columns = {field.name: quote(str(field.column)) for field in JobRecord._meta.concrete_fields}
        server, status, due = columns["server"], columns["status"], columns["run_after"]
        live = ", ".join(f"'{each.value}'" for each in JobRecord.SERVED)
        # Whose index on MySQL, which has no partial ones, is by the server too.
        owned = "job_claim" if connection.vendor == "mysql" else "job_owned"
        unclaimed = f"{server} IS NULL AND {status} = '{_READY}'"
        # The index of MySQL's is by the status too: two of them would have no common order.
        kinds = [[_SCHEDULED], [_RETRYING]] if connection.vendor == "mysql" else [[_SCHEDULED, _RETRYING]]
        later = [
            f"{by('job_due')} WHERE {server} IS NULL AND {status} IN ({', '.join(map(repr, kind))})"
            for kind in kinds
        ]
        at_door = ", ".join(f"'{each.value}'" for each in _AT_DOOR)
        is_mysql = connection.vendor == "mysql"
        function = columns["function"]
        row = ", ".join(
            [
                columns["id"],
                f"LENGTH({columns['workload']})",
                status,
                columns["enqueued_at"],
                # Of what is no member, such as a continuation, nothing is counted.
                f"CASE WHEN {columns['group_index']} IS NOT NULL THEN {columns['group']} END",
                *(
                    # Large ones are only read of jobs that are taken.
                    f"CASE WHEN LENGTH({columns[name]}) <= {INLINE} THEN {columns[name]} END"
                    if name == "workload"
                    else columns[name]
                    for name in _JOB_FIELDS
                ),
            ]
        )

        def names(where: str, *also: str) -> str:
            """
            The functions that rows of an index are of, after one, without reading all of the rows.

            MySQL's planner cannot, and is asked for one at a time.
            """
            if is_mysql:
                return (
                    f"SELECT {', '.join([f'{function} AS name', *also])} FROM {where} "  # noqa: S608
                    f"AND {function} > %s ORDER BY {', '.join([function, *also])} LIMIT 1"
                )
            first = f"SELECT {function} FROM {where} AND {function} > %s ORDER BY {function} LIMIT 1"  # noqa: S608
            following = first.replace("%s", "door.name")
            return (
                f"WITH RECURSIVE door(name, number) AS (SELECT ({first}), 1 UNION ALL "  # noqa: S608
                f"SELECT ({following}), number + 1 FROM door "
                f"WHERE name IS NOT NULL AND number < {FUNCTIONS_AT_ONCE}) "
                f"SELECT {', '.join(['name', *also])} FROM door WHERE name IS NOT NULL"
            )

        claim = f"{by('job_claim')} WHERE {unclaimed}"
        self.functions_ready = names(claim)
        first = f"AND {function} = door.name ORDER BY {due} LIMIT 1"
        self.functions_due = [
            # An index of MySQL's has each function's earliest first.
            names(rows, due if is_mysql else f"(SELECT {due} FROM {rows} {first})")  # noqa: S608
            for rows in later
        ]
        priority = columns["priority"]
        self.ready_of = (
            f"SELECT {row} FROM {claim} AND {function} = %s AND {priority} > %s "  # noqa: S608
            f"ORDER BY {priority} DESC, {columns['id']} LIMIT %s"
        )
        self.due_of = [
            f"SELECT {row} FROM {rows} AND {function} = %s AND {due} <= %s "  # noqa: S608
            f"ORDER BY {due}, {columns['id']} LIMIT %s"
            for rows in later
        ]
        self.count_ready = (
            f"SELECT {function}, {priority}, COUNT(*) FROM {claim} GROUP BY {function}, {priority}"  # noqa: S608
        )
        self.count_later = [
            f"SELECT {function}, COUNT(*) FROM {rows} GROUP BY {function}"  # noqa: S608
            for rows in later
        ]
        of_server = f"{by(owned)} WHERE {server} = %s AND {status} IN ({live})"
        self.held = (
            f"SELECT {columns['id']} FROM {of_server} "  # noqa: S608
            f"AND COALESCE({columns['server_epoch']}, 0) <> %s ORDER BY {columns['id']} LIMIT %s"
        )
        cancellations = quote(Cancellation._meta.db_table)
        self.cancellations = f"SELECT {quote('job_id')} FROM {cancellations} ORDER BY {quote('job_id')}"  # noqa: S608
        self.workload = f"SELECT {columns['workload']} FROM {table} WHERE {columns['id']} = %s"  # noqa: S608

        def change(assignments: str, condition: str) -> str:
            return (
                f"UPDATE {by(owned)} SET {assignments} "  # noqa: S608
                f"WHERE {server} = %s AND {status} IN ({live}) AND {condition}"
            )

        background = columns["background"]
        is_postgres = connection.vendor == "postgresql"
        is_foreground = f"{background} = {'FALSE' if is_postgres else '0'}"
        ended = (
            f"{columns['finished_at']} = %s, {columns['message']} = 'The job server ended before the job did'"
        )
        is_running = f"{status} = '{_RUNNING}'"
        self.end_running = change(f"{status} = '{Status.DEAD}', {ended}", f"{is_foreground} AND {is_running}")
        self.end_waiting = change(f"{status} = '{Status.CANCELLED}', {ended}", is_foreground)
        interruptions = columns["interruptions"]
        self.interrupt = change(
            f"{status} = '{_READY}', {columns['numerator']} = NULL, {columns['denominator']} = NULL, "
            f"{columns['log']} = '', "
            f"{interruptions} = {interruptions} + 1",
            is_running,
        )
        self.leave = (
            f"UPDATE {by(owned)} SET {server} = NULL, {columns['server_epoch']} = NULL "  # noqa: S608
            f"WHERE {server} = %s AND {status} IN ({live}) AND {columns['server_epoch']} = %s "
            f"AND {status} <> '{_RUNNING}' AND {background} <> {'FALSE' if is_postgres else '0'}"
        )
        made = f"CONCAT(%s, {columns['id']})" if is_mysql else f"%s || {columns['id']}"
        # What another server had keeps its handle.
        handle = f"COALESCE({columns['handle']}, {made})"
        by_id = f"{table} FORCE INDEX (PRIMARY)" if is_mysql else table
        self._take = (
            f"UPDATE {by_id} SET {columns['handle']} = {handle}, {server} = %s, "  # noqa: S608
            f"{columns['server_epoch']} = %s, {status} = %s "
            f"WHERE {server} IS NULL AND {status} IN ({at_door}) AND {columns['id']} IN "
        )
        self._by_id = f"SELECT {row} FROM {table} WHERE {columns['id']} IN "  # noqa: S608
        key = columns["unique_key"]
        self._of_keys = f"SELECT {key}, {columns['id']}, {columns['handle']} FROM {table} WHERE {key} "  # noqa: S608
        # The driver would look for hundreds of marks one by one.
        self._any = "= ANY(%s::varchar[])" if connection.vendor == "postgresql" else ""
        self._order = f" ORDER BY {priority} DESC, {columns['id']}"
        attempt = {field.name: quote(str(field.column)) for field in JobAttempt._meta.concrete_fields}
        kept = quote(JobAttempt._meta.db_table)
        what = ", ".join(attempt[name] for name in ("job", *_ATTEMPT_FIELDS))
        marks = ", ".join(["%s"] * len(_ATTEMPT_FIELDS))
        insert = f"INSERT INTO {kept} ({what}) SELECT {columns['id']}, "
        # Not twice, when a batch is written again because nobody knows what became of it.
        unless_kept = (
            f"NOT EXISTS (SELECT 1 FROM {kept} "  # noqa: S608
            f"WHERE {attempt['job']} = {table}.{columns['id']} AND {attempt['number']} = "
        )
        self.keep_attempt = (
            f"{insert}{marks} FROM {table} "
            # At the door it lies by now where the next attempt is later.
            f"WHERE {columns['handle']} = %s AND ({server} = %s OR {server} IS NULL) AND {unless_kept}%s)"
        )
        self.keep_interrupted = (
            f"{insert}{columns['attempts']}, {columns['worker']}, {columns['last_attempted_at']}, %s, "
            f"'', 'The job server ended before the job did', '', {columns['log']} FROM {table} "
            f"WHERE {server} = %s AND {status} = '{_RUNNING}' AND {unless_kept}{columns['attempts']})"
        )

        leases = ServerLease.objects.using(connection.alias)
        now, _ = leases.all().query.get_compiler(connection.alias).compile(_Now())
        lease = {field.name: quote(str(field.column)) for field in ServerLease._meta.concrete_fields}
        self.leases = (
            f"SELECT {lease['id']}, {lease['epoch']}, {lease['started_at']}, {lease['renewed_at']}, {now} "  # noqa: S608
            f"FROM {quote(ServerLease._meta.db_table)}"
        )
        self.renew = (
            f"UPDATE {quote(ServerLease._meta.db_table)} SET {lease['renewed_at']} = {now} "  # noqa: S608
            f"WHERE {lease['id']} = %s AND {lease['epoch']} = %s"
        )

    def take(self, rows: int) -> str:
        """Make so many rows a server's; parameters: prefix of their handles, lease, epoch, status, ids."""
        return f"{self._take}({', '.join(['%s'] * rows)})"

    def of_keys(self, keys: int) -> str:
        """Key, id and handle of the rows that have one of so many keys; of an array of them on PostgreSQL."""
        return self._of_keys + (self._any or f"IN ({', '.join(['%s'] * keys)})")

    def by_id(self, rows: int) -> str:
        return f"{self._by_id}({', '.join(['%s'] * rows)}){self._order}"


_JOB_FIELDS: Final = (
    "handle",
    "function",
    "unique",
    "workload",
    "priority",
    "attempts",
    "max_attempts",
    "reducer",
    "run_after",
    "timeout",
    "interruptions",
    "limit_key",
)


_ATTEMPT_FIELDS: Final = (
    "number",
    "worker",
    "started_at",
    "finished_at",
    "exception",
    "message",
    "traceback",
    "log",
)


class _Now(Now):
    """The database's clock. Django's own is UTC on SQLite, even when ``USE_TZ`` is off."""

    def as_sqlite(self, compiler: Any, connection: Any, **context: Any) -> Any:
        local = "" if settings.USE_TZ else ", 'localtime'"
        template = f"STRFTIME('%%%%Y-%%%%m-%%%%d %%%%H:%%%%M:%%%%f', 'NOW'{local})"
        return self.as_sql(compiler, connection, template=template, **context)

    def as_mysql(self, compiler: Any, connection: Any, **context: Any) -> Any:
        # CURRENT_TIMESTAMP would be of the database's own time zone, whatever it is.
        offset = timedelta() if settings.USE_TZ else timezone.localtime(datetime.now(UTC)).utcoffset()
        assert offset is not None, "an aware moment has an offset"
        template = f"(UTC_TIMESTAMP(6) + INTERVAL {offset.total_seconds():.0f} SECOND)"
        return self.as_sql(compiler, connection, template=template, **context)


def _indexed(joined: dict[bytes, Joined], entries: Sequence[Entry]) -> dict[int, str | Joined]:
    """Which of the entries are the submissions that joined another job."""
    if not joined:
        return {}
    return {
        index: joined[entry.handle]
        for index, entry in enumerate(entries)
        if type(entry) is JobQueued and entry.handle in joined
    }


def _a_hundred(marks: str) -> str:
    return ", ".join([marks] * 100)


def _in_parts(keys: list[str]) -> Iterator[list[str]]:
    """As many as every database takes as parameters of one statement."""
    for start in range(0, len(keys), 500):
        yield keys[start : start + 500]


def _array(values: Sequence[Any]) -> str:
    """PostgreSQL's text of an array. The driver asks for the type of each element, and is slower by far."""
    return f"{{{','.join(map(_element, values))}}}"


def _element(value: Any) -> str:
    match value:
        case None:
            return "NULL"
        case str():
            return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        case bytes():
            return f'"\\\\x{value.hex()}"'
        case datetime():
            return f'"{value.isoformat()}"'
    return str(value)


class _BadRow(Exception):
    """The database refuses a row for what is in it."""


_CODES_OF_BAD_ROWS: Final = frozenset({1153, 1301, 1366, "54000", "54001", "54011"})
"""Errors that are about what is in a row, though drivers call them operational: MySQL's and PostgreSQL's."""


def _error_code(error: DatabaseError) -> object:
    """The database's own code of an error; None when it has none."""
    cause = error.__cause__
    return getattr(cause, "sqlstate", None) or next(iter(getattr(cause, "args", ())), None)


def _said(error: Exception) -> str:
    """What an error says in one line; without PostgreSQL's details, which show what is in the row."""
    diagnosis = getattr(error.__cause__, "diag", None)
    text = getattr(diagnosis, "message_primary", None) or str(error)
    return " ".join(text.split()) or type(error).__name__


class _Folded:
    """
    A batch as one final state per job, so that each row is written once.

    ``queued`` are rows to insert, ``changed`` the columns to set in rows that
    are there: {handle: {column: value}}. ``attempts`` are those that came to nothing.
    """

    def __init__(self, entries: Sequence[Entry], queue_of: Callable[[str], str]) -> None:
        self.queued: dict[bytes, Row] = {}
        self.changed: dict[bytes, Row] = {}
        self.attempts: list[JobRequeued] = []
        self._queue_of = cache(queue_of)
        for entry in entries:
            if type(entry) is JobQueued:
                self.queued[entry.handle] = self._new_row(entry)
            else:
                row = self.queued.get(entry.handle)
                if row is None:
                    row = self.changed.setdefault(entry.handle, {})
                _change(row, entry)
            if type(entry) is JobRequeued and entry.counts:
                self.attempts.append(entry)

    def is_there(self, handle: bytes) -> None:
        """The row was inserted by an earlier attempt; only what happened since is to be written."""
        row = self.queued.pop(handle, None)
        if row is not None and "server" in row:
            # At the door it may have been claimed since, and gone on from there: only its end is news.
            if row["status"] in _AT_DOOR:
                return
            row = {name: value for name, value in row.items() if name not in ("server", "server_epoch")}
        if row is not None:
            self.changed.setdefault(handle, {}).update(row)

    def changes_by_columns(self) -> Iterator[tuple[tuple[str, ...], list[tuple[bytes, Row]]]]:
        """The changes, grouped by which columns they set: one statement each."""
        groups: dict[tuple[str, ...], list[tuple[bytes, Row]]] = {}
        for handle, change in self.changed.items():
            groups.setdefault(tuple(sorted(change)), []).append((handle, change))
        yield from groups.items()

    def _new_row(self, entry: JobQueued) -> Row:
        function = entry.function.decode()
        unique = text_of_unique(entry.unique)
        where: Row = {"server": None, "server_epoch": None} if entry.unclaimed else {}
        if entry.limit_key is not None:
            where["limit_key"] = text_of(entry.limit_key)[:64]
        return where | {
            "handle": text_of(entry.handle),
            "function": function,
            "queue_name": self._queue_of(function),
            "unique": unique,
            "unique_key": unique_key_of(function, unique, entry.workload) if entry.background else None,
            "workload": entry.workload,
            "priority": entry.priority,
            "background": entry.background,
            "client": _name_of(entry.client),
            "reducer": text_of(entry.reducer) if entry.reducer else "",
            "run_after": _moment(entry.run_after) if entry.run_after else None,
            "status": _SCHEDULED if entry.run_after > entry.at else _READY,
            "enqueued_at": _moment(entry.at),
            "attempts": entry.attempts,
        }


def _key_of(entry: JobKept) -> str | None:
    return unique_key_of(entry.function.decode(), text_of_unique(entry.unique), entry.workload)


def _change(row: Row, entry: Entry) -> None:
    """What one entry does to its job's row."""
    match entry:
        case JobStarted():
            at = _moment(entry.at)
            row.update(
                status=_RUNNING,
                worker=_name_of(entry.worker),
                attempts=entry.attempts,
                last_attempted_at=at,
            )
            if entry.attempts == 1:
                row["started_at"] = at
        case JobProgress():
            row.update(numerator=_progress(entry.numerator), denominator=_progress(entry.denominator))
        case JobLogged():
            row["log"] = _storable(entry.log.decode(errors="backslashreplace"))
        case JobRequeued():
            # What it logged stays with the attempt.
            row.update(status=_READY, numerator=None, denominator=None, log="")
            if not entry.counts:
                row["attempts"] = entry.attempt - 1
            if entry.run_after > entry.at:
                row.update(status=_RETRYING, run_after=_moment(entry.run_after))
            if entry.unclaimed:
                row.update(server=None, server_epoch=None)
        case JobDue():
            row["status"] = _READY
        case JobUnclaimed():
            row.update(server=None, server_epoch=None)
        case JobKept():
            row["background"] = True
            row["unique_key"] = _key_of(entry)
        case JobFinished():
            row.update(status=entry.outcome.value, finished_at=_moment(entry.at), unique_key=None)
            if entry.outcome is Outcome.SUCCESSFUL:
                row["result"] = entry.data
            else:
                row.update(_failure(entry))


def _without_data(entry: Entry, reason: str) -> JobFinished | None:
    """The end of a job whose data the database refuses; None when it is not about that."""
    if not isinstance(entry, JobFinished) or not entry.data:
        return None
    outcome = Outcome.FAILED if entry.outcome is Outcome.SUCCESSFUL else entry.outcome
    told = _storable(f"What the worker sent could not be stored: {reason}")
    return entry._replace(outcome=outcome, data=b"", reason=told)


def _failure(entry: JobFinished | JobRequeued) -> Row:
    """The three columns that say why an attempt failed, from what the worker or the server told."""
    if not entry.data:
        return {"exception": "", "message": entry.reason, "traceback": ""}
    told = exception_of(entry.data)
    return {
        "exception": _storable(told["exception"])[:512],
        "message": _storable(told["message"]),
        "traceback": _storable(told["traceback"]),
    }


def _storable(text: str) -> str:
    """Text as a column takes it; JSON can write NULs, and halves of characters, which are shown, not kept."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\0")


class _Row(NamedTuple):
    """A row at the door that may be taken."""

    id: int
    size: int
    """Bytes of the workload, which ``job`` has only where it is ``INLINE``."""
    job: StoredJob
    ready_at: float
    group: int | None = None
    """The group that it is a member of."""


class _Look:
    """What a look at the door has found."""

    def __init__(self) -> None:
        self.rows: list[_Row] = []
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


def _stored_job(handle: str, columns: Sequence[Any]) -> StoredJob:
    """A job of the columns ``_JOB_FIELDS``; with no workload where that was not read."""
    _, function, unique, workload, priority, attempts, most, reducer, run_after, timeout, *more = columns
    interruptions, limit_key = more
    return StoredJob(
        handle.encode(),
        function.encode(),
        bytes_of_unique(unique),
        bytes(workload or b""),
        priority,
        attempts,
        most,
        reducer.encode(),
        _seconds(run_after),
        timeout,
        interruptions,
        None if limit_key is None else limit_key.encode(),
    )


def _standing(status: str, numerator: int | None, denominator: int | None) -> Standing:
    return Standing(status == _RUNNING, b"%d" % (numerator or 0), b"%d" % (denominator or 0))


def _seconds(moment: datetime | str | None) -> float:
    """A moment as a driver gives it, in seconds since 1970; 0 for none. ``_moment`` turned around."""
    if moment is None:
        return 0.0
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    if moment.tzinfo is None and settings.USE_TZ:
        # Databases without time zones keep UTC.
        moment = moment.replace(tzinfo=UTC)
    return moment.timestamp()


@lru_cache(maxsize=1_000)
def _moment(seconds: float) -> datetime:
    """As Django has it. A turn of the loop gives the same moment to many entries."""
    return datetime.fromtimestamp(seconds, UTC if settings.USE_TZ else None)


@receiver(setting_changed)
def _forget_moments(*, setting: str, **kwargs: Any) -> None:
    if setting in ("USE_TZ", "TIME_ZONE"):
        _moment.cache_clear()


def _progress(number: bytes) -> int | None:
    """A worker's number as a column can hold it; None when it is no number."""
    try:
        return max(-_MAX_PROGRESS, min(_MAX_PROGRESS, int(float(number[:40]))))
    except (ValueError, OverflowError):
        return None


def text_of(data: bytes) -> str:
    """Bytes from the wire as a text column takes them: what is no UTF-8 and NULs are shown, not kept."""
    return data.decode(errors="backslashreplace").replace("\0", "\\0")


@lru_cache(maxsize=1_000)
def _name_of(peer: bytes) -> str:
    """A client or worker as its column takes it; many entries are of the same."""
    return text_of(peer)[:128]


def text_of_unique(unique: bytes) -> str:
    """
    A unique as its column keeps it: UTF-8 text, and any other bytes so that they come back whole.

    The others are written as Latin-1 behind U+0001.
    """
    if not unique.startswith(b"\x01"):
        try:
            return unique.decode()
        except UnicodeDecodeError:
            pass
    return "\x01" + unique.decode("latin-1")


def bytes_of_unique(text: str) -> bytes:
    """What ``text_of_unique`` was given."""
    if text.startswith("\x01"):
        return text[1:].encode("latin-1")
    return text.encode()
