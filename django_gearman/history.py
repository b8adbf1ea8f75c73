"""
How long finished jobs are kept, and how they go: oldest first, a few at a time.

``History`` finds, by the index ``job_history``, what may go, and remembers how
far it has read: rows that stay for longer than their neighbours are passed by
once, not with each batch. Used by job servers (through ``store``) and by
``gearman_prune``. Rows of live jobs are never touched.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from django.db import connections, transaction
from django.db.models import Q, QuerySet
from django.db.models.functions import Length

from .conf import GearmanSettings
from .models import JobGroup, JobRecord

Status = JobRecord.Status

FINISHED: Final = (Status.SUCCESSFUL, *JobRecord.FAILURES)

SLICE: Final = 0.05
"""Seconds that a batch is to take: as long as a submission may have to wait for it."""

MIN_ROWS: Final = 50
MAX_ROWS: Final = 2_000

MAX_BYTES: Final = 16 * 1024 * 1024
"""Bytes of workloads and results that go in one batch: large ones take long to be freed."""

SOON: Final = 1.0
"""Seconds to the next batch while there is more."""

IDLE: Final = 60.0
"""Seconds to the next look when nothing was old enough."""

START_OVER: Final = 3600.0
"""Seconds after which everything is read again, for what was passed by and may go now."""


@dataclass(frozen=True, kw_only=True)
class Retention:
    """How long records stay after their jobs ended; None for ever."""

    successful: timedelta | None = None
    failed: timedelta | None = None
    """Of all that ended without a value: FAILED, DEAD and CANCELLED."""

    functions: Mapping[str, timedelta | None] = field(default_factory=dict)
    """{function: how long, however its jobs ended}, in place of the above."""

    def of(self, status: str) -> timedelta | None:
        return self.successful if status == Status.SUCCESSFUL else self.failed


def configured(options: GearmanSettings) -> Retention:
    """What the settings say."""
    return Retention(
        successful=_age(options.keep_successful_days),
        failed=_age(options.keep_failed_days),
        functions={function: _age(days) for function, days in options.keep_function_days.items()},
    )


def _age(days: float | None) -> timedelta | None:
    return timedelta(days=days) if days else None


@dataclass
class Lane:
    """Finished records of one status that are kept equally long, and how far they were read."""

    status: str
    age: timedelta
    functions: frozenset[str] | None
    """Of these functions alone; None for all."""
    but: frozenset[str] = frozenset()
    """Not of these functions."""

    since: datetime | None = None
    last_id: int = 0
    """The record that was read last, by the end of its job and its id; None for none."""

    def takes(self, function: str) -> bool:
        return function in self.functions if self.functions is not None else function not in self.but

    def only(self, functions: frozenset[str]) -> Lane | None:
        """What it has in common with these functions; None for nothing."""
        both = functions & self.functions if self.functions is not None else functions - self.but
        return Lane(self.status, self.age, both) if both else None


def lanes_of(retention: Retention, statuses: Iterable[str] = FINISHED) -> list[Lane]:
    """What is to be read, one after the other; nothing of what is kept for ever."""
    ages: dict[timedelta, set[str]] = {}
    for function, age in retention.functions.items():
        if age is not None:
            ages.setdefault(age, set()).add(function)
    lanes = []
    for status in statuses:
        rest = retention.of(status)
        if rest is not None:
            lanes.append(Lane(status, rest, None, frozenset(retention.functions)))
        lanes += [Lane(status, age, frozenset(functions)) for age, functions in ages.items()]
    return lanes


@dataclass
class Batch:
    """Records that may go."""

    lane: Lane | None = None
    first: datetime | None = None
    last: datetime | None = None
    """When the job of the first record that was looked at ended, and that of the last."""
    ids: list[int] = field(default_factory=list)
    groups: set[int] = field(default_factory=set)
    """Groups that some of them are of."""
    read: int = 0
    """Records that were looked at."""
    more: bool = False
    """Whether there may be others."""
    deleted: int = 0


class History:
    """
    Finished records of a database, and which of them may go.

    Args:
        using: Alias of the database.
        lanes: See ``lanes_of``.
    """

    def __init__(self, using: str, lanes: list[Lane]) -> None:
        self._using = using
        self._lanes = lanes
        self._lane = 0
        self.rows = 200
        """Records of the next batch; follows the database's speed."""
        self._began: datetime | None = None
        """When everything is read from the beginning; None for the next time."""

    def next_batch(self, now: datetime) -> Batch:
        """What may go next; nothing when everything is young enough. Reads, and does not write."""
        if self._began is None or abs(now - self._began) > timedelta(seconds=START_OVER):
            self._began = now
            for lane in self._lanes:
                lane.since, lane.last_id = None, 0
        for _ in self._lanes:
            lane = self._lanes[self._lane]
            batch = self._read(lane, now - lane.age)
            if batch.read:
                return batch
            self._lane = (self._lane + 1) % len(self._lanes)
        return Batch()

    def _read(self, lane: Lane, cutoff: datetime) -> Batch:
        rows = self._ended(lane.status).filter(finished_at__lt=cutoff)
        if lane.since is not None:
            rows = rows.filter(
                Q(finished_at__gt=lane.since) | Q(id__gt=lane.last_id), finished_at__gte=lane.since
            )
        columns = rows.order_by("finished_at", "id").values_list(
            "id", "function", "finished_at", Length("workload"), Length("result"), "group"
        )
        groups: dict[int, int] = {}
        batch = Batch(lane, more=True)
        size = 0
        for id, function, finished_at, workload, result, group in columns[: self.rows]:
            size += (workload or 0) + (result or 0)
            if size > MAX_BYTES and batch.read:
                break
            batch.read += 1
            batch.first = batch.first or finished_at
            batch.last = lane.since = finished_at
            lane.last_id = id
            if lane.takes(function):
                batch.ids.append(id)
                if group is not None:
                    groups[id] = group
        if groups:
            # What their groups run at the end may read the results.
            busy = _busy(groups.values(), self._using)
            batch.ids = [id for id in batch.ids if groups.get(id) not in busy]
            batch.groups = set(groups.values()) - busy
        return batch

    def _ended(self, status: str) -> QuerySet[JobRecord]:
        return JobRecord.objects.using(self._using).filter(status=status)

    def delete(self, batch: Batch) -> None:
        """
        Delete a batch; call it in a transaction.

        Records that another server is just deleting, or that are not what they
        were when they were read, are left alone.
        """
        assert batch.lane is not None, "of next_batch"
        # Databases may look for the times before the ids: both ends keep that to this batch.
        rows = self._ended(batch.lane.status).filter(
            pk__in=batch.ids, finished_at__gte=batch.first, finished_at__lte=batch.last
        )
        if connections[self._using].features.has_select_for_update_skip_locked:
            locked = rows.select_for_update(skip_locked=True).order_by("pk").values_list("pk", flat=True)
            rows = JobRecord.objects.using(self._using).filter(pk__in=list(locked))
        # Django reads rows before it deletes them when others point to them.
        _, deleted = rows.only("pk").delete()
        batch.deleted = deleted.get(JobRecord._meta.label, 0)
        _forget(batch.groups, self._using)

    def start_over(self) -> None:
        """A batch was not deleted: read everything again."""
        self._began = None

    def pause_after(self, batch: Batch, seconds: float) -> float:
        """
        Seconds to wait before the next batch.

        Args:
            seconds: How long this one took.
        """
        if not batch.more:
            # Servers that were started together need not look together.
            return IDLE * random.uniform(0.8, 1.2)
        if seconds > SLICE:
            self.rows = max(MIN_ROWS, int(self.rows * max(SLICE / seconds, 0.25)))
        elif seconds < SLICE / 2:
            self.rows = min(MAX_ROWS, self.rows * 2)
        return SOON

    def prune(self, now: datetime) -> Batch:
        """Find the next batch and delete it, in a transaction of its own; it has no ``more`` at the end."""
        batch = self.next_batch(now)
        if batch.ids:
            with transaction.atomic(using=self._using):
                self.delete(batch)
        return batch

    def count(self, now: datetime) -> int:
        """How many records may go."""
        total = 0
        for lane in self._lanes:
            rows = self._ended(lane.status).filter(finished_at__lt=now - lane.age)
            if lane.functions is not None:
                rows = rows.filter(function__in=lane.functions)
            elif lane.but:
                rows = rows.exclude(function__in=lane.but)
            total += rows.count()
        return total


def _busy(groups: Iterable[int], using: str) -> set[int]:
    """Which of the groups are not over, or have something to run yet that may read their results."""
    rows = JobGroup.objects.using(using).filter(pk__in=set(groups))
    at_work: set[int] = set()
    next_of: dict[int, int] = {}
    for id, finished_at, *following in rows.values_list("pk", "finished_at", "on_success", "on_complete"):
        if finished_at is None:
            at_work.add(id)
        next_of.update((each, id) for each in following if each is not None)
    live = JobRecord.objects.using(using).filter(pk__in=next_of, status__in=JobRecord.LIVE)
    return at_work | {next_of[id] for id in live.values_list("pk", flat=True)}


def _forget(groups: Iterable[int], using: str) -> None:
    """Delete those of the groups that have no jobs any more."""
    for id in sorted(set(groups)):
        if not JobRecord.objects.using(using).filter(group=id).exists():
            JobGroup.objects.using(using).filter(pk=id).delete()
