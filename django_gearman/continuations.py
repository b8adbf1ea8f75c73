"""
What follows from the end of a group's member: the count, the next stage, and what is run when all is over.

Everything here happens in the transaction that writes the member's outcome, in
whichever process: a job server's writer, or a view that cancels a job that no
server has. It locks the group's row first, by counting, so that of several who
write the ends of the last members one comes last and sees it. What is run next
are rows that wait in the table already: to let one go is an UPDATE that only
happens while it waits. So a batch that is written twice does no harm.

Models alone; nothing of functions, and nothing of sockets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, TypedDict

from django.db import connections, transaction
from django.db.models import F, QuerySet
from django.utils import timezone

from .models import JobGroup, JobRecord

Status = JobRecord.Status

RESULTS: Final = "results"
"""
Name, in the envelope of a workload, of results that are to be its first argument.

``[group, first place, how many]``: the worker reads them when it runs the job, so
that thousands of them need not fit into a packet.
"""

READ_AT_ONCE: Final = 500
"""Members whose results are read by one statement."""

AT_ONCE: Final = 100
"""Groups that are looked after in one go."""

TAKES_NOTHING: Final = "-"
TAKES_JSON: Final = "j"
"""The value of the stage before is put before the arguments in the envelope."""
TAKES_BYTES: Final = "r"
"""The result of the stage before is the workload, as it is."""

ARGUMENTS: Final = b'{"args":['
"""How an envelope begins that takes a value."""


class Stage(TypedDict):
    """Members that run side by side."""

    size: int
    many: bool
    """Whether its value is the list of its members' values, be it one."""
    takes: str
    """What of the stage before its members take: a letter for all of them, or one for each."""


class Plan(TypedDict):
    """``JobGroup.plan``."""

    stages: list[Stage]
    on_success: str
    """What it takes of the last stage."""
    delays: dict[str, float]
    """{place of a member, ``on_success`` or ``on_complete``: seconds that it is to wait from then on}."""


@dataclass
class Ended:
    """How many members of one group have ended at once."""

    successful: int = 0
    failed: int = 0
    waited: int = 0
    """Of later stages, that were cancelled before their turn."""


@dataclass
class Following:
    """What came of it."""

    laid: bool = False
    """Whether jobs were let go, which now lie at the door."""
    groups: list[int] = field(default_factory=list)
    """Groups that are over."""


def count(ended: Mapping[int, Ended], using: str, limit: float) -> Following:
    """
    Count members that have ended, and do what follows; call it in the transaction that writes their ends.

    Each end is to be counted once.

    Args:
        ended: By the group's id.
        limit: Bytes that a workload may have.
    """
    following = Following()
    # In one order, so that nobody waits for who waits for him.
    for id in sorted(ended):
        of = ended[id]
        groups = JobGroup.objects.using(using).filter(pk=id, finished_at=None)
        locked = groups.update(
            left=F("left") - of.successful - of.failed,
            successful=F("successful") + of.successful,
            failed=F("failed") + of.failed + of.waited,
        )
        if locked:
            _Group(groups.get(), using, limit, following).go_on()
    return following


def begin(group: JobGroup, using: str, limit: float) -> None:
    """Do what follows from a first stage without members, in the transaction that inserts the group."""
    _Group(group, using, limit, Following()).go_on()


class _Group:
    """A group whose row is locked."""

    def __init__(self, group: JobGroup, using: str, limit: float, following: Following) -> None:
        self._group = group
        self._using = using
        self._limit = limit
        self._following = following
        self._plan: Plan = group.plan
        self._now = timezone.now()

    def go_on(self) -> None:
        """As far as it goes now."""
        group = self._group
        if group.left > 0:
            return
        stages = self._plan["stages"]
        while group.left <= 0 and not group.failed and group.stage + 1 < len(stages):
            self._begin_stage(group.stage + 1)
        if group.left <= 0:
            self._end()
        group.save(using=self._using, update_fields=["stage", "left", "failed", "finished_at"])

    def _begin_stage(self, number: int) -> None:
        group, stage = self._group, self._plan["stages"][number]
        first = self._first_of(number)
        group.stage = number
        places = range(first, first + stage["size"])
        singly = {place for place in places if str(place) in self._plan["delays"]}
        takes = stage["takes"]
        if len(takes) > 1:
            singly.update(
                place for place, letter in zip(places, takes, strict=True) if letter != TAKES_NOTHING
            )
        elif takes != TAKES_NOTHING:
            singly.update(places)
        group.left = self._let_go_together(places, singly)
        for place in sorted(singly):
            letter = takes[place - first] if len(takes) > 1 else takes
            waiting = self._waiting.filter(group=group.pk, group_index=place)
            group.left += self._let_go(waiting, letter, self._plan["delays"].get(str(place)))
        # Somebody deleted rows, or a value was too large for the next.
        group.failed += stage["size"] - group.left

    def _end(self) -> None:
        """All members that will ever run have ended."""
        group, plan = self._group, self._plan
        group.finished_at = self._now
        if group.failed:
            later = self._waiting.filter(group=group.pk, group_index__isnull=False)
            group.failed += later.update(**_cancelled("What it waited for did not succeed", self._now))
            if group.on_success is not None:
                self._waiting.filter(pk=group.on_success).update(
                    **_cancelled("The group did not succeed", self._now)
                )
        elif group.on_success is not None:
            delay = plan["delays"].get("on_success")
            self._let_go(self._waiting.filter(pk=group.on_success), plan["on_success"], delay)
        if group.on_complete is not None:
            delay = plan["delays"].get("on_complete")
            self._let_go(self._waiting.filter(pk=group.on_complete), TAKES_NOTHING, delay)
        self._following.groups.append(group.pk)

    @property
    def _waiting(self) -> QuerySet[JobRecord]:
        return JobRecord.objects.using(self._using).filter(status=Status.WAITING)

    def _first_of(self, number: int) -> int:
        """Place of a stage's first member."""
        return sum(stage["size"] for stage in self._plan["stages"][:number])

    def _let_go_together(self, places: range, but: set[int]) -> int:
        """Members that have nothing of their own; how many."""
        if len(but) == len(places):
            return 0
        waiting = self._waiting.filter(
            group=self._group.pk, group_index__gte=places.start, group_index__lt=places.stop
        )
        if but:
            # Not many: each has a letter of the plan.
            waiting = waiting.exclude(group_index__in=but)
        later = waiting.filter(run_after__gt=self._now).update(status=Status.SCHEDULED)
        together = later + waiting.update(status=Status.READY)
        self._following.laid |= together > 0
        return together

    def _let_go(self, waiting: QuerySet[JobRecord], takes: str, delay: float | None) -> int:
        """One job that waits; 1 if it is to run now, 0 if it waits no more or cannot run."""
        row = waiting.values("pk", "workload", "run_after").first()
        if row is None:
            return 0
        changes: dict[str, Any] = {}
        run_after: datetime | None = row["run_after"]
        if delay is not None:
            changes["run_after"] = run_after = self._now + timedelta(seconds=delay)
        if takes != TAKES_NOTHING:
            changes["workload"] = workload = self._with_value(bytes(row["workload"]), takes)
            if len(workload) > self._limit:
                told = (
                    f"It was to get the result of the job before: its workload would have {len(workload)} "
                    f"bytes, more than the {self._limit:.0f} allowed; return a reference, such as a path"
                )
                waiting.update(status=Status.FAILED, message=told, unique_key=None, finished_at=self._now)
                return 0
        is_later = run_after is not None and run_after > self._now
        changes["status"] = Status.SCHEDULED if is_later else Status.READY
        let_go = waiting.filter(pk=row["pk"]).update(**changes)
        self._following.laid |= let_go > 0
        return let_go

    def _with_value(self, workload: bytes, takes: str) -> bytes:
        """A workload with the value of the stage before, which has one member."""
        stages = self._plan["stages"]
        # Of the last stage when all is over, whose number is the present one.
        number = self._group.stage - 1 if self._group.finished_at is None else self._group.stage
        place = self._first_of(number)
        assert not stages[number]["many"], "several are read by the worker"
        before = JobRecord.objects.using(self._using).filter(group=self._group.pk, group_index=place)
        result = bytes(before.values_list("result", flat=True).get() or b"")
        return result if takes == TAKES_BYTES else with_first_argument(workload, result)


def with_first_argument(workload: bytes, value: bytes) -> bytes:
    """An envelope with a value, which is JSON, before its arguments."""
    assert workload.startswith(ARGUMENTS), "written by us"
    rest = workload[len(ARGUMENTS) :]
    return ARGUMENTS + value + (b"" if rest.startswith(b"]") else b",") + rest


def _cancelled(message: str, now: datetime) -> dict[str, Any]:
    return {"status": Status.CANCELLED, "message": message, "unique_key": None, "finished_at": now}


def cancel_record(
    id: int, group: int | None, using: str, limit: float, message: str
) -> tuple[bool, Following]:
    """
    End a job that no server has, whether it waits for others or for a worker, and count it; not in a hurry.

    Args:
        group: The group that it is a member of; None for none.
    Returns:
        Whether it was there to be ended, and what came of it.
    """
    rows = JobRecord.objects.using(using).filter(pk=id, server=None)
    ended = _cancelled(message, timezone.now())
    if group is None:
        return bool(rows.filter(status__in=JobRecord.LIVE).update(**ended)), Following()
    waiting = rows.filter(status=Status.WAITING)
    # Looked at before anything is locked: a group is locked before what waits, and after all else.
    if waiting.exists():
        with transaction.atomic(using=using):
            _lock(group, using)
            if waiting.update(**ended):
                return True, count({group: Ended(waited=1)}, using, limit)
    with transaction.atomic(using=using):
        if rows.filter(status__in=JobRecord.SERVED).update(**ended):
            return True, count({group: Ended(failed=1)}, using, limit)
    return False, Following()


def cancel_records(group: int, using: str, limit: float, message: str) -> Following:
    """
    End all members of a group that no server has.

    In parts, each in a transaction of its own unless one is open: none locks what a
    server is just claiming.
    """
    waiting = _members(group, using).filter(status=Status.WAITING)
    served = _members(group, using).filter(server=None, status__in=JobRecord.SERVED)
    following = Following()
    # Of later stages first: what ends now would otherwise begin them.
    for rows, is_waiting in ((waiting, True), (served, False)):
        last: int | None = -1
        while True:
            with transaction.atomic(using=using):
                of_part = rows.filter(group_index__gt=last).order_by("group_index")
                seen = dict(of_part.values_list("group_index", "pk")[:READ_AT_ONCE])
                if not seen:
                    break
                *_, last = seen
                if is_waiting:
                    _lock(group, using)
                # By their ids: MySQL may lock what it only passes by, such as members that servers run.
                free = rows.filter(pk__in=seen.values()).select_for_update(skip_locked=_can_skip(using))
                ids = list(free.values_list("pk", flat=True))
                # Where nothing can be locked, it may be claimed in between.
                ended = rows.filter(pk__in=ids).update(**_cancelled(message, timezone.now()))
                of = Ended(waited=ended) if is_waiting else Ended(failed=ended)
                if ended:
                    came = count({group: of}, using, limit)
                    following.laid |= came.laid
                    following.groups += came.groups
    return following


def cancel_unclaimed(ids: Sequence[int], using: str, limit: float, message: str) -> Following:
    """
    End those of some jobs that no server has, and count those of them that are members.

    In parts, as ``cancel_records``.
    """
    following = Following()
    for start in range(0, len(ids), READ_AT_ONCE):
        part = ids[start : start + READ_AT_ONCE]
        with transaction.atomic(using=using):
            rows = JobRecord.objects.using(using).filter(pk__in=part, server=None, status__in=JobRecord.LIVE)
            waiting = rows.filter(status=Status.WAITING, group_index__isnull=False)
            for group in sorted(set(waiting.values_list("group", flat=True))):
                _lock(group, using)
            some = rows.select_for_update(skip_locked=_can_skip(using)).order_by("pk")
            ours: list[int] = []
            ended: dict[int, Ended] = {}
            for id, status, group, place in some.values_list("pk", "status", "group", "group_index"):
                ours.append(id)
                if place is not None:  # a member
                    of = ended.setdefault(group, Ended())
                    if status == Status.WAITING:
                        of.waited += 1
                    else:
                        of.failed += 1
            rows.filter(pk__in=ours).update(**_cancelled(message, timezone.now()))
            came = count(ended, using, limit)
            following.laid |= came.laid
            following.groups += came.groups
    return following


def _lock(group: int, using: str) -> None:
    """Before rows that wait are: who lets them go has the group's row by then, and wants theirs."""
    JobGroup.objects.using(using).filter(pk=group).update(left=F("left"))


def _can_skip(using: str) -> bool:
    return bool(connections[using].features.has_select_for_update_skip_locked)


def _members(group: int, using: str) -> QuerySet[JobRecord]:
    return JobRecord.objects.using(using).filter(group=group, group_index__isnull=False)


def results_of(group: int, first: int, size: int, using: str) -> Iterator[tuple[str, bytes]]:
    """Function and result of members, in order; a few hundred in memory at a time."""
    at = first
    while at < first + size:
        members = JobRecord.objects.using(using).filter(
            group=group, group_index__gte=at, group_index__lt=min(at + READ_AT_ONCE, first + size)
        )
        for function, result in members.order_by("group_index").values_list("function", "result"):
            yield function, bytes(result or b"")
        at += READ_AT_ONCE


class Watch:
    """
    Looks for groups that wait for nobody: somebody deleted or changed rows of theirs by hand.

    Args:
        using: Alias of the database.
    """

    def __init__(self, using: str) -> None:
        self._using = using
        self._last = 0
        self._places: dict[int, int] = {}
        """{group: place before which its members have ended}; no group is read from the beginning again."""

    def stuck(self) -> list[int]:
        """Groups at work none of whose members is; of some, the others' turn comes next time. Reads."""
        at_work = JobGroup.objects.using(self._using).filter(finished_at=None, pk__gt=self._last)
        groups = list(at_work.order_by("pk").values_list("pk", flat=True)[:AT_ONCE])
        if len(groups) < AT_ONCE:
            self._last = 0
            self._places = {id: self._places[id] for id in groups if id in self._places}
        else:
            self._last = groups[-1]
        return [id for id in groups if not self._has_work(id)]

    def _has_work(self, group: int) -> bool:
        members = JobRecord.objects.using(self._using).filter(
            group=group, group_index__gte=self._places.get(group, 0), status__in=JobRecord.SERVED
        )
        place = members.order_by("group_index").values_list("group_index", flat=True).first()
        if place is None:
            return False
        self._places[group] = place
        return True

    def settle(self, groups: Iterable[int], limit: float) -> Following:
        """Count the groups' members anew, and go on with those of which none is at work; in a transaction."""
        following = Following()
        for id in sorted(groups):
            rows = JobGroup.objects.using(self._using).filter(pk=id, finished_at=None)
            # Locked, so that nothing that is counted at this moment is missed.
            if not rows.update(left=F("left")):
                continue
            members = JobRecord.objects.using(self._using).filter(group=id, group_index__isnull=False)
            group = rows.get()
            plan: Plan = group.plan
            begun = sum(stage["size"] for stage in plan["stages"][: group.stage + 1])
            begun_members = members.filter(group_index__lt=begun)
            group.left = begun_members.filter(status__in=JobRecord.SERVED).count()
            group.successful = begun_members.filter(status=Status.SUCCESSFUL).count()
            group.failed = begun - group.left - group.successful
            later = members.filter(group_index__gte=begun)
            group.failed += group.total - begun - later.filter(status=Status.WAITING).count()
            group.save(using=self._using, update_fields=["left", "successful", "failed"])
            _Group(group, self._using, limit, following).go_on()
        return following
