"""What is known of a group or chain that was enqueued: its row, read, awaited and cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from datetime import datetime
from time import monotonic, sleep
from typing import Any, Final, Generic, TypeVar, cast

from asgiref.sync import sync_to_async
from django.db import transaction
from django.db.models import QuerySet

from . import conf, continuations
from .continuations import Plan
from .exceptions import (
    GearmanError,
    GroupDoesNotExist,
    GroupFailed,
    GroupNotFinished,
    JobFailed,
    JobNotFinished,
    ResponseTimeout,
    WaitInTransaction,
)
from .models import Cancellation, JobGroup, JobRecord
from .registry import decode_result
from .results import JobResult
from .submission import async_client_for, client_for, nudge_after_commit
from .waiting import (
    LISTEN_FOR,
    LONGEST_PAUSE_OF_GET,
    NUDGE_AGAIN,
    Patience,
    asleep_between,
    refuse_endless_wait,
    sleep_between,
    timed_out,
)

V = TypeVar("V")

LONGEST_PAUSE_BY_WIRE: Final = 1.0
"""Seconds between two looks beside the wire: who cancels the last member may write its end himself."""

ASK_AGAIN: Final = 5.0
"""Seconds after which ``get`` tries again to find a server that tells it."""


class GroupResult(Generic[V]):
    """
    A group or chain as its row shows it; ``refresh`` looks again.

    Iterating, also by ``async for``, gives the ``JobResult`` of each member in
    order, with a few hundred of them in memory at a time.
    """

    def __init__(self, group: JobGroup) -> None:
        self._group = group

    @classmethod
    def find(cls, id: str | int) -> GroupResult[Any]:
        """
        The group with that id.

        Raises:
            GroupDoesNotExist: There is none.
        """
        groups = JobGroup.objects.using(conf.settings_for().database)
        try:
            return GroupResult(groups.get(pk=int(str(id))))
        except (ValueError, OverflowError, JobGroup.DoesNotExist):
            raise GroupDoesNotExist(str(id)) from None

    @classmethod
    async def afind(cls, id: str | int) -> GroupResult[Any]:
        """As ``find``."""
        return await sync_to_async(cls.find)(id)

    @classmethod
    def of_job(cls, id: int) -> GroupResult[Any] | None:
        """The group that a record is a member of, or that it follows; None for none."""
        using = conf.settings_for().database
        wanted = JobRecord.objects.using(using).filter(pk=id).values("group")
        found = JobGroup.objects.using(using).filter(pk__in=wanted).first()
        return None if found is None else GroupResult(found)

    def __repr__(self) -> str:
        return f"<GroupResult {self.id} {self.name}: {self.finished} of {self.total}>"

    def __eq__(self, other: object) -> bool:
        """Whether it is the same group, whatever is known of it."""
        return self.id == other.id if isinstance(other, GroupResult) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def id(self) -> str:
        """The group's number, by which ``GroupResult.find`` finds it again."""
        return str(self._group.pk)

    @property
    def name(self) -> str:
        """What is in it, for people to read."""
        return self._group.name

    @property
    def total(self) -> int:
        """How many members it has; of a chain, how many steps."""
        return self._group.total

    @property
    def finished(self) -> int:
        """How many of them have ended."""
        return self._group.finished

    @property
    def successful(self) -> int:
        """How many members have ended with a value."""
        return self._group.successful

    @property
    def failed(self) -> int:
        """How many ended without a value, be it because a chain did not get to them."""
        return self._group.failed

    @property
    def is_finished(self) -> bool:
        """Whether all of them have ended; then what follows has been let go."""
        return self._group.is_finished

    @property
    def is_successful(self) -> bool:
        """Whether all of them have ended with a value."""
        return self.is_finished and not self.failed

    @property
    def enqueued_at(self) -> datetime:
        """When all of it was enqueued; aware where ``USE_TZ`` is on."""
        return self._group.enqueued_at

    @property
    def finished_at(self) -> datetime | None:
        """When the last member ended; None while one is to do."""
        return self._group.finished_at

    @property
    def on_success(self) -> JobResult[Any] | None:
        """What is run when all have succeeded; None for nothing, or when its record is gone."""
        return self._following(self._group.on_success)

    @property
    def on_complete(self) -> JobResult[Any] | None:
        """What is run when all have ended; None for nothing, or when its record is gone."""
        return self._following(self._group.on_complete)

    def _following(self, id: int | None) -> JobResult[Any] | None:
        record = JobRecord.objects.using(self._using).filter(pk=id).first() if id is not None else None
        return None if record is None else JobResult(record)

    def results(self) -> Iterator[JobResult[Any]]:
        """The members, in order; of those whose records are gone, nothing."""
        for place in range(0, self.total, continuations.READ_AT_ONCE):
            yield from self._results_from(place)

    __iter__ = results

    async def __aiter__(self) -> AsyncIterator[JobResult[Any]]:
        for place in range(0, self.total, continuations.READ_AT_ONCE):
            for result in await sync_to_async(self._results_from)(place):
                yield result

    def _results_from(self, place: int) -> list[JobResult[Any]]:
        some = self._members.filter(
            group_index__gte=place, group_index__lt=place + continuations.READ_AT_ONCE
        )
        return [JobResult(record) for record in some.order_by("group_index")]

    def refresh(self) -> None:
        """
        Count again. One query.

        Raises:
            GroupDoesNotExist: It is gone.
        """
        try:
            self._group = JobGroup.objects.using(self._using).get(pk=self._group.pk)
        except JobGroup.DoesNotExist:
            raise GroupDoesNotExist(self.id) from None

    async def arefresh(self) -> None:
        """As ``refresh``."""
        await sync_to_async(self.refresh)()

    @property
    def return_value(self) -> V:
        """
        The members' values, in order; of a chain, the last step's.

        Raises:
            GroupNotFinished: Not all have ended; ``get`` waits for that.
            GroupFailed: One ended without a value.
        """
        if not self.is_finished:
            raise GroupNotFinished(self.id, self.finished, self.total)
        if self.failed:
            raise self._failure()
        *before, last = cast(Plan, self._group.plan)["stages"]
        first = sum(stage["size"] for stage in before)
        found = continuations.results_of(self._group.pk, first, last["size"], self._using)
        values = [decode_result(*each) for each in found]
        if len(values) < last["size"]:
            raise GroupDoesNotExist(self.id)
        return cast(V, values if last["many"] else values[0])

    def _failure(self) -> GroupFailed:
        outcomes: list[object] = [GroupDoesNotExist(self.id)] * self.total
        functions = [""] * self.total
        for result in self:
            place = result._record.group_index
            assert place is not None, "a member"
            functions[place] = result.function
            try:
                outcomes[place] = result.return_value
            except (JobFailed, JobNotFinished) as error:
                outcomes[place] = error
        for place, outcome in enumerate(outcomes):
            if isinstance(outcome, GearmanError):
                return GroupFailed(place, functions[place], outcome, outcomes, self._step(place))
        raise AssertionError("no member failed")

    def _step(self, place: int) -> str:
        """Where in a chain the member stands, to read; empty in a group."""
        stages = cast(Plan, self._group.plan)["stages"]
        if len(stages) == 1 and stages[0]["many"]:
            return ""
        number = 0
        while place >= stages[number]["size"]:
            place -= stages[number]["size"]
            number += 1
        step = f"step {number + 1} of {len(stages)} of the chain"
        return f"member {place} of the group in {step}" if stages[number]["many"] else step

    def get(self, timeout: float | None = None) -> V:
        """
        Wait until all have ended; return what ``return_value`` is then.

        Args:
            timeout: Seconds to wait; None to wait for ever.
        Raises:
            GroupFailed: A member ended without a value; tells of all.
            ResponseTimeout: The time was up; they go on. ``NoWorker`` when no worker offers what is next.
            WaitInTransaction: A transaction is open that hides the jobs.
        """
        patience = Patience(timeout)
        self._look_before_waiting()
        if not self.is_finished:
            refuse_endless_wait(timeout)
        while not self.is_finished:
            with closing(client_for().watch_group(self.id)) as watch:
                ask_again = self._begin_to_wait(patience, is_told=watch.is_open)
                while self._is_awaited(ask_again):
                    if not patience.is_left:
                        raise self._too_late(timeout or 0.0)
                    if not watch.is_open:
                        sleep(patience.pause())
                    elif watch.wait(patience.pause(LONGEST_PAUSE_BY_WIRE)):
                        ask_again = 0.0
                    self.refresh()
        return self.return_value

    async def aget(self, timeout: float | None = None) -> V:
        """As ``get``."""
        patience = Patience(timeout)
        await sync_to_async(self._look_before_waiting)()
        if not self.is_finished:
            refuse_endless_wait(timeout)
        while not self.is_finished:
            watch = await async_client_for().watch_group(self.id)
            try:
                ask_again = self._begin_to_wait(patience, is_told=watch.is_open)
                while self._is_awaited(ask_again):
                    if not patience.is_left:
                        raise await sync_to_async(self._too_late)(timeout or 0.0)
                    if not watch.is_open:
                        await asyncio.sleep(patience.pause())
                    elif await watch.wait(patience.pause(LONGEST_PAUSE_BY_WIRE)):
                        ask_again = 0.0
                    await self.arefresh()
            finally:
                watch.close()
        return await sync_to_async(lambda: self.return_value)()

    def _look_before_waiting(self) -> None:
        """Refresh; raise ``WaitInTransaction`` where the end would never be seen."""
        self.refresh()
        if not self.is_finished and transaction.get_connection(self._using).in_atomic_block:
            raise WaitInTransaction(f"group {self.id} ({self.name})")

    def _begin_to_wait(self, patience: Patience, *, is_told: bool) -> float:
        """The moment at which servers are to be asked again to tell of the end."""
        if is_told:
            # The first look is soon: it may have ended before they were asked.
            patience.is_told()
        return monotonic() + (LISTEN_FOR if is_told else ASK_AGAIN)

    def _is_awaited(self, until: float) -> bool:
        return not self.is_finished and monotonic() < until

    def _too_late(self, timeout: float) -> ResponseTimeout:
        what = f"group {self.id} ({self.name}), of which {self.finished} of {self.total} have ended,"
        next_up = self._members.filter(status__in=JobRecord.SERVED).order_by("group_index")
        member = next_up.only("function", "status", "run_after").first()
        if member is None:
            return ResponseTimeout(what, timeout)
        not_before = member.run_after if member.status == JobRecord.Status.SCHEDULED else None
        return timed_out(what, timeout, member.function, self._using, not_before)

    def cancel(self) -> bool:
        """
        End all members that have not ended, as ``CANCELLED``; False when all have already.

        Those that run are told as ``JobResult.cancel`` does. What was to follow
        their success is cancelled, ``on_complete`` runs. In a transaction nothing is
        waited for: True says that what job servers have will be ended when that is committed.

        Raises:
            ResponseTimeout: Not all have been in ``TIMEOUT`` seconds; they will be, once the job
                servers that have them are there again, or others take their jobs over.
        """
        self.refresh()
        if self.is_finished:
            return False
        sleep_between(self._looks_until_cancelled())
        return True

    async def acancel(self) -> bool:
        """As ``cancel``."""
        await self.arefresh()
        if self.is_finished:
            return False
        await asleep_between(self._looks_until_cancelled())
        return True

    def _looks_until_cancelled(self) -> Iterator[float]:
        """
        End what is let go until all have ended, and yield the seconds until the next look.

        In a transaction it is one look: what comes of it shows after the commit.

        Raises:
            ResponseTimeout: They have not in ``TIMEOUT`` seconds.
        """
        limit = conf.settings_for().timeout
        deadline, pause, nudge_at = monotonic() + limit, 0.01, 0.0
        asked: set[int] = set()
        while not self.is_finished:
            following = continuations.cancel_records(
                self._group.pk, self._using, conf.settings_for().max_packet, "The group was cancelled"
            )
            held = self._members.filter(status__in=JobRecord.SERVED, server__isnull=False)
            wanted = set(held.values_list("pk", flat=True)) - asked
            asked |= wanted
            wishes = [Cancellation(job_id=id) for id in sorted(wanted)]
            Cancellation.objects.using(self._using).bulk_create(wishes, batch_size=500, ignore_conflicts=True)
            if following.laid or wanted or monotonic() >= nudge_at:
                nudge_after_commit(self._using)
                nudge_at = monotonic() + NUDGE_AGAIN
            self.refresh()
            if transaction.get_connection(self._using).in_atomic_block:
                return
            if not self.is_finished:
                if monotonic() >= deadline:
                    raise self._not_cancelled(limit)
                yield pause
                pause = min(pause * 1.5, LONGEST_PAUSE_OF_GET)

    def _not_cancelled(self, limit: float) -> ResponseTimeout:
        left = self.total - self.finished
        error = ResponseTimeout(f"the cancelling of group {self.id}, of which {left} are left,", limit)
        error.add_note(
            "It is asked for still, and will be done by the job servers that have the jobs, or by those "
            "that take their jobs over: is one running on this database?"
        )
        return error

    @property
    def _using(self) -> str:
        return self._group._state.db or conf.settings_for().database

    @property
    def _members(self) -> QuerySet[JobRecord]:
        return JobRecord.objects.using(self._using).filter(group=self._group.pk, group_index__isnull=False)
