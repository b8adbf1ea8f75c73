"""
What fires schedules, and brings those of the code into the table.

Each fire happens once, whatever the number of servers: whoever moves
``next_at`` on by a compare-and-set makes the jobs in the same transaction, and
nobody else does. Which moments a schedule names is in ``schedules.py``, what a
row is in ``models.py``, and how a job of a function looks is told by
``jobs.py``, through ``record_of``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any, Final

from django.conf import settings
from django.db import DataError, IntegrityError, transaction
from django.db.models import Q, QuerySet

from . import schedules
from .exceptions import InvalidSchedule, MissingCronsim
from .models import JobRecord, Schedule

logger = logging.getLogger(__name__)

AT_ONCE: Final = 500
"""Schedules that are fired in one transaction at most; the others follow at the next look."""

SLICE: Final = 0.2
"""Seconds that this may take: acknowledgements wait meanwhile."""

REVIEW_INTERVAL: Final = 10
"""Seconds between two looks for rows that were edited without ``Schedule.save``."""

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

    def has_work(self, now: int) -> bool:
        """Whether ``work`` would do anything. Reads, and does not write."""
        if self._due(now).exists():
            return True
        if self._wants_review(now):
            if self._to_replan(now):
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
            for schedule in self._to_replan(now):
                self._try(schedule, self._replan, now)
            self._reviewed = now
            self._is_new = False
        began = monotonic()
        for schedule in self._due(now).order_by("next_at", "pk")[:AT_ONCE]:
            self._try(schedule, self._fire, now)
            if monotonic() - began > SLICE:
                break

    def _due(self, now: int) -> QuerySet[Schedule]:
        return self._readable().filter(next_at__lte=now)

    def _wants_review(self, now: int) -> bool:
        return self._reviewed is None or abs(now - self._reviewed) >= REVIEW_INTERVAL

    def _to_replan(self, now: int) -> list[Schedule]:
        """Rows whose next time does not follow from what they say, or from a clock that was right."""
        return [
            row
            for row in self._readable().filter(~Q(plan="") | Q(enabled=True, withdrawn=False)).order_by("pk")
            # What could not be fired may be what a new version of the code can.
            if row.plan != row.current_plan or (self._is_new and row.error) or _is_misled(row, now)
        ]

    def _try(self, schedule: Schedule, do: Callable[[Schedule, int], None], now: int) -> None:
        """Do it; a schedule that cannot be fired is set aside, and its neighbours are not."""
        try:
            with transaction.atomic(using=self._using):
                do(schedule, now)
        except (InvalidSchedule, TypeError, ValueError, DataError, IntegrityError) as error:
            reason = " ".join(str(error).split())
            logger.error("Schedule %s makes no jobs until it is mended: %s", schedule.name, reason)
            self._rows().filter(pk=schedule.pk).update(error=reason, next_at=None, plan=schedule.current_plan)

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
                if self._insert(record):
                    made = record
            if made is not None:
                self._rows().filter(pk=schedule.pk).update(last_job=made.pk)
        logger.debug("Schedule %s: %d jobs, next at %s", schedule.name, len(due.times), _moment(due.next_at))

    def _insert(self, record: JobRecord) -> bool:
        """Whether the job was made: of a unique there is none while the last one is to do."""
        key = record.unique_key
        if key is not None and JobRecord.objects.using(self._using).filter(unique_key=key).exists():
            return False
        try:
            with transaction.atomic(using=self._using):
                record.save(using=self._using, force_insert=True)
        except IntegrityError:
            if key is None:
                raise
            return False  # somebody was quicker
        return True

    def _readable(self) -> QuerySet[Schedule]:
        # The others are for a server that can read them.
        return self._rows() if self._has_cronsim else self._rows().filter(cron="")

    def _rows(self) -> QuerySet[Schedule]:
        return Schedule.objects.using(self._using)


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


Declared = Mapping[str, tuple[str, schedules.Declaration]]
"""{name of the row: (function, what the code says)}."""

_MERGED: Final = (("cron", "interval", "tz"), ("catch_up",), ("args", "kwargs"))
"""Fields of a declaration; those of one group are the code's or the operator's together."""


def synchronise(using: str, declared: Declared, *, complete: bool = True) -> None:
    """
    Bring the schedules that the code declares into the table, without undoing what operators did there.

    Each row remembers what the code said when it was last looked at. Where that
    has not changed, the row stays as it is. Where it has, the row follows,
    unless somebody had edited those fields: then the edit stays, and the log
    says so. Whether a schedule is enabled is never the code's to say. Rows that
    the code declares no more rest, and keep what they had for its return.

    Args:
        complete: Whether all of the code was read, so that what is missing is gone.
    Raises:
        InvalidSchedule: A declaration names no times.
    """
    rows = Schedule.objects.using(using)
    for name, (function, declaration) in sorted(declared.items()):
        with transaction.atomic(using=using):
            columns = columns_of(function, declaration)
            fresh = _declared(columns)
            row, is_new = rows.select_for_update().get_or_create(
                name=name, defaults={**columns, "declared": fresh}
            )
            if is_new:
                logger.info("Schedule %s is new", name)
                continue
            _merge(row, fresh)
            row.save(using=using)
    if complete:
        for row in rows.filter(declared__isnull=False, withdrawn=False).exclude(name__in=declared):
            logger.info("Schedule %s rests: the code declares it no more", row.name)
            row.withdrawn = True
            row.save(using=using)


def refuse_unreadable(using: str) -> None:
    """
    Notice at the start that this installation cannot read the schedules of the table.

    Raises:
        MissingCronsim: Some are crons, and the library is not installed.
    """
    if not schedules.has_cronsim() and Schedule.objects.using(using).exclude(cron="").exists():
        raise MissingCronsim


def _merge(row: Schedule, fresh: dict[str, Any]) -> None:
    known: dict[str, Any] | None = row.declared
    row.function = fresh["function"]
    row.withdrawn = False
    row.declared = fresh
    if known is None:
        logger.warning(
            "Schedule %s was made by hand before the code declared it; it stays as it is", row.name
        )
        return
    there = _columns_of(row)
    for group in _MERGED:
        if all(fresh[name] == known.get(name) for name in group):
            continue
        if all(there[name] == known.get(name) for name in group):
            for name in group:
                setattr(row, name, _values(fresh)[name])
        elif any(there[name] != fresh[name] for name in group):
            logger.warning(
                "Schedule %s was edited: what the code says now of %s is not taken",
                row.name,
                ", ".join(group),
            )


def reset(row: Schedule) -> None:
    """Take from a declared schedule's row what operators did to its times and arguments; save it then."""
    for name, value in _values(row.declared or {}).items():
        setattr(row, name, value)


def is_edited(row: Schedule) -> bool:
    """Whether its times or arguments are others than the code says."""
    declared = row.declared
    if declared is None:
        return False
    there = _columns_of(row)
    return any(there[name] != declared.get(name) for group in _MERGED for name in group)


def _columns_of(row: Schedule) -> dict[str, Any]:
    """A row as ``Schedule.declared`` keeps it."""
    return _declared({name: getattr(row, name) for group in _MERGED for name in group})


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


def _declared(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns as ``Schedule.declared`` keeps them, in JSON."""
    interval = columns["interval"]
    return {**columns, "interval": None if interval is None else int(interval.total_seconds())}


def _values(declared: Mapping[str, Any]) -> dict[str, Any]:
    """Columns from what ``Schedule.declared`` keeps."""
    values = dict(declared)
    if values.get("interval") is not None:
        values["interval"] = timedelta(seconds=values["interval"])
    return values


def current_time() -> int:
    """Now, in seconds since 1970, as schedules count."""
    return int(time.time())
