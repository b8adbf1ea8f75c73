"""
What fires schedules, and brings those of the code into the table.

Each fire happens once, whatever the number of servers: whoever moves
``next_at`` on by a compare-and-set makes the jobs in the same transaction, and
nobody else does. Which moments a schedule names is in ``schedules.py``, what a
row is in ``models.py``, and how a job of a function looks is told by
``job_declarations.py``, through ``record_of``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any, Final

from django.conf import settings
from django.db import DatabaseError, DataError, IntegrityError, InterfaceError, connections, transaction
from django.db.models import Q, QuerySet

from . import schedules
from .declarations import DeclaredRows
from .exceptions import InvalidSchedule, MissingCronsim
from .models import JobRecord, Schedule

logger = logging.getLogger(__name__)

AT_ONCE: Final = 500
"""Schedules that are fired in one transaction at most; the others follow at the next look."""

SLICE: Final = 0.2
"""Seconds that this may take: acknowledgements wait meanwhile."""

REVIEW_INTERVAL: Final = 10
"""Seconds between two looks for rows that were edited without ``Schedule.save``."""

TRY_AGAIN: Final = 10.0
"""Seconds until the next try of a schedule whose ``unique`` or ``limit_key`` a database did not answer."""

WRONG_CLOCK: Final = 86_400
"""Seconds that a next time may lie behind what follows from the clock; if more, the clock was wrong."""

RecordOf = Callable[[Schedule], JobRecord]
"""An unsaved record of the job that a schedule asks for; raises ``TypeError`` or ``ValueError`` if none."""


class Scheduler:
    """
    Fires the schedules of a database, for a store that calls about once a second.

    Used from the writer's thread alone.

    Args:
        using: Alias of the database.
    """

    def __init__(self, using: str, record_of: RecordOf) -> None:
        self._using = using
        self._record_of = record_of
        self._has_cronsim = schedules.has_cronsim()
        self._reviewed: int | None = None
        """When all rows were last looked at; None for never."""
        self._is_new = True
        self._waiting: dict[int, float] = {}
        """{schedule that a database did not answer: when it is tried again}."""

    def has_work(self, now: int) -> bool:
        """Whether ``work`` would do anything. Reads, and does not write."""
        if self._due(now).exists():
            return True
        if self._wants_review(now):
            if self._to_replan(self._readable(), now):
                return True
            self._reviewed = now
        return False

    def work(self, now: int) -> None:
        """
        Make the jobs that are due, and plan edited rows anew; in the caller's transaction.

        Args:
            now: Seconds since 1970.
        """
        if self._wants_review(now):
            for schedule in self._to_replan(self._not_locked(self._readable()), now):
                self._try(schedule, self._replan, now)
            self._reviewed = now
            self._is_new = False
        began = monotonic()
        for schedule in self._not_locked(self._due(now)).order_by("next_at", "pk")[:AT_ONCE]:
            self._try(schedule, self._fire, now)
            if monotonic() - began > SLICE:
                break

    def _due(self, now: int) -> QuerySet[Schedule]:
        due = self._readable().filter(next_at__lte=now)
        if self._waiting:
            clock = monotonic()
            self._waiting = {row: until for row, until in self._waiting.items() if until > clock}
            due = due.exclude(pk__in=list(self._waiting))
        return due

    def _wants_review(self, now: int) -> bool:
        return self._reviewed is None or abs(now - self._reviewed) >= REVIEW_INTERVAL

    def _to_replan(self, rows: QuerySet[Schedule], now: int) -> list[Schedule]:
        """Rows whose next time does not follow from what they say, or from a clock that was right."""
        return [
            row
            for row in rows.filter(~Q(plan="") | Q(enabled=True, withdrawn=False)).order_by("pk")
            # What could not be fired may be what a new version of the code can.
            if row.plan != row.current_plan
            or (self._is_new and row.error and row.next_at is None)
            or _is_misled(row, now)
        ]

    def _try(self, schedule: Schedule, do: Callable[[Schedule, int], None], now: int) -> None:
        """Do it; a schedule that cannot be fired is set aside or put off, and its neighbours are not."""
        try:
            with transaction.atomic(using=self._using):
                do(schedule, now)
        except (InvalidSchedule, TypeError, ValueError, DataError, IntegrityError) as error:
            reason = _in_a_line(error)
            logger.error("Schedule %s makes no jobs until it is mended: %s", schedule.name, reason)
            self._rows().filter(pk=schedule.pk).update(error=reason, next_at=None, plan=schedule.current_plan)
        except (DatabaseError, InterfaceError) as error:
            if transaction.get_connection(self._using).needs_rollback:
                # The savepoint could not be undone: it is our own database that does not answer.
                raise
            self._put_off(schedule, _in_a_line(error))

    def _put_off(self, schedule: Schedule, reason: str) -> None:
        """Leave it due. What it asks may be down, or wait for a migration: who sees the row is told."""
        self._waiting[schedule.pk] = monotonic() + TRY_AGAIN
        mine = self._rows().filter(pk=schedule.pk, plan=schedule.plan, next_at=schedule.next_at)
        if mine.exclude(error=reason).update(error=reason):
            logger.error("Schedule %s makes no jobs for now, and is tried again: %s", schedule.name, reason)

    def _replan(self, schedule: Schedule, now: int) -> None:
        mine = self._rows().filter(pk=schedule.pk, plan=schedule.plan, next_at=schedule.next_at)
        last_at = schedule.last_at if (schedule.last_at or 0) <= now else None
        schedule.replan(now)
        mine.update(plan=schedule.plan, next_at=schedule.next_at, last_at=last_at, error="")

    def _fire(self, schedule: Schedule, now: int) -> None:
        next_at = schedule.next_at
        assert next_at is not None, "it is due"
        if schedule.plan != schedule.current_plan:
            return self._replan(schedule, now)
        due = schedules.due_times(schedule.timing, next_at, now, schedule.catch_up)
        moved: dict[str, Any] = {"next_at": due.next_at, "error": ""}
        if due.times:
            moved["last_at"] = due.times[-1]
        mine = self._rows().filter(pk=schedule.pk, next_at=next_at, plan=schedule.plan)
        if not mine.update(**moved):
            return  # another server was quicker, or somebody has just edited it
        if due.times:
            made = None
            for at in due.times:
                record = self._record_of(schedule)
                record.run_after = _moment(at)
                record.client = f"schedule {schedule.name}"[:128]
                if insert(record, self._using):
                    made = record
            if made is not None:
                self._rows().filter(pk=schedule.pk).update(last_job=made.pk)
        logger.debug("Schedule %s: %d jobs, next at %s", schedule.name, len(due.times), _moment(due.next_at))

    def _not_locked(self, rows: QuerySet[Schedule]) -> QuerySet[Schedule]:
        """Locked, and without what a view that takes its time has just edited."""
        if not connections[self._using].features.has_select_for_update_skip_locked:
            return rows
        return rows.select_for_update(skip_locked=True)

    def _readable(self) -> QuerySet[Schedule]:
        # The others are for a server that can read them.
        return self._rows() if self._has_cronsim else self._rows().filter(cron="")

    def _rows(self) -> QuerySet[Schedule]:
        return Schedule.objects.using(self._using)


def insert(record: JobRecord, using: str) -> bool:
    """Whether a schedule's job was made: of a unique there is none while the last one is to do."""
    key = record.unique_key
    if key is not None and JobRecord.objects.using(using).filter(unique_key=key).exists():
        return False
    try:
        with transaction.atomic(using=using):
            record.save(using=using, force_insert=True)
    except IntegrityError:
        if key is None:
            raise
        return False  # somebody was quicker
    return True


def _in_a_line(error: Exception) -> str:
    reason = " ".join(str(error).split())
    # What an error of somebody else's says may be what no database takes.
    return reason.encode(errors="replace").decode().replace("\0", "\ufffd")


def _is_misled(schedule: Schedule, now: int) -> bool:
    """Whether it was planned by a clock that was far ahead, and would rest until it is that late."""
    next_at = schedule.next_at
    if next_at is None or next_at <= now + WRONG_CLOCK:
        return False
    try:
        return schedule.timing.next_after(now, next_at) < next_at - WRONG_CLOCK
    except InvalidSchedule:
        return False


def _moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC if settings.USE_TZ else None)


# What the code says.


class _Schedules(DeclaredRows[Schedule]):
    model = Schedule
    key = "name"
    title = "Schedule %s"
    merged = (("cron", "interval", "tz"), ("catch_up",), ("args", "kwargs"))
    followed = ("function",)

    def kept(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        interval = columns["interval"]
        return {**columns, "interval": None if interval is None else int(interval.total_seconds())}

    def columns(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        columns = dict(kept)
        if columns.get("interval") is not None:
            columns["interval"] = timedelta(seconds=columns["interval"])
        return columns


_SCHEDULES: Final = _Schedules()
reset = _SCHEDULES.reset
is_edited = _SCHEDULES.is_edited


def synchronise(
    using: str, declared: Mapping[str, tuple[str, schedules.Declaration]], *, complete: bool = True
) -> None:
    """
    Bring the schedules that the code declares into the table, without undoing what operators did there.

    Args:
        declared: {name of the row: (function, what the code says)}.
        complete: Whether all of the code was read, so that what is missing is gone.
    Raises:
        InvalidSchedule: A declaration names no times.
    """
    columns = {name: columns_of(*said) for name, said in declared.items()}
    _SCHEDULES.synchronise(using, columns, complete=complete)


def columns_of(function: str, declaration: schedules.Declaration) -> dict[str, Any]:
    """A declaration as a row keeps it."""
    return {
        "function": function,
        "cron": declaration.cron,
        "interval": declaration.interval,
        "tz": declaration.tz,
        "catch_up": declaration.catch_up,
        "args": list(declaration.args),
        "kwargs": dict(declaration.kwargs),
    }


def refuse_unreadable(using: str) -> None:
    """
    Notice at the start that this installation cannot read the schedules of the table.

    Raises:
        MissingCronsim: Some are crons, and the library is not installed.
    """
    if not schedules.has_cronsim() and Schedule.objects.using(using).exclude(cron="").exists():
        raise MissingCronsim


def current_time() -> int:
    """Now, in seconds since 1970, as schedules count."""
    return int(time.time())
