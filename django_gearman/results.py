"""
``JobResult``: a job as whoever enqueued it holds it, to wait for, to cancel, to enqueue again.

It reads the record, asks job servers when it is worth a look, and writes nothing
of a job that a server has: what is to be cancelled is a wish, a row of its own.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import transaction

from . import conf, continuations, rows
from .client.admin_client import AdminClient
from .client.tasks import JobStatus
from .exceptions import (
    ConnectionFailed,
    ConnectionLost,
    InvalidCall,
    JobFailed,
    JobNotFinished,
    JobResultDoesNotExist,
    ResponseTimeout,
    ResultNotKept,
    ServerError,
    WaitInTransaction,
)
from .insertion import like
from .models import Cancellation, JobRecord, unique_key_of
from .registry import decode_result, registry
from .submission import async_client_for, client_for, client_of, identity, insert, nudge, nudge_after_commit
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

R = TypeVar("R")

NEW_FOR: Final = 0.0005
"""Seconds after its commit in which a job has hardly ended; one that has is seen at the next look."""


@dataclass(frozen=True)
class JobError:
    """Why a job failed."""

    exception_class_path: str
    """Import path of the exception's class; empty when the worker told none."""

    message: str
    traceback: str


class JobResult(Generic[R]):
    """
    A job as its record shows it; ``refresh`` looks again.

    In the words of Django's ``TaskResult``, of which it has all but the task, its arguments,
    the backend and the workers; with more statuses, and progress, logs, waiting and cancelling.
    """

    def __init__(self, record: JobRecord) -> None:
        self._record = record

    if not TYPE_CHECKING:  # for which every name would be an attribute

        def __getattr__(self, name: str) -> Any:
            if name != "_record" or "_made_of" not in self.__dict__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            self._record = like(*self._made_of)
            return self._record

    def __repr__(self) -> str:
        return f"<JobResult {self.id} {self._record.function} {self.status}>"

    def __eq__(self, other: object) -> bool:
        """Whether it is the same job, whatever is known of it."""
        if not isinstance(other, JobResult):
            return NotImplemented
        return (self.id, self.function) == (other.id, other.function)

    def __hash__(self) -> int:
        return hash(self.id)

    _made_of: tuple[JobRecord, int, bytes]

    _new_until = 0.0
    """Monotonic time until which a look would show nothing that is not known: a server will tell its end."""

    def _note_new(self) -> None:
        """The job was inserted just now."""
        if not transaction.get_connection(self._record._state.db).in_atomic_block:
            self._new_until = monotonic() + NEW_FOR

    @property
    def id(self) -> str:
        return str(self._record.pk)

    @property
    def function(self) -> str:
        """The job's name on the wire."""
        return self._record.function

    @property
    def handle(self) -> str:
        """The Gearman handle; empty until a job server has the job."""
        return self._record.handle or ""

    @property
    def status(self) -> str:
        """One of ``JobRecord.Status``."""
        return str(self._record.status)

    @property
    def is_finished(self) -> bool:
        return self._record.is_finished

    @property
    def progress(self) -> tuple[int, int] | None:
        """Numerator and denominator as the job last told them; None when it told none."""
        if self._record.numerator is None or self._record.denominator is None:
            return None
        return self._record.numerator, self._record.denominator

    @property
    def return_value(self) -> R:
        """
        What the function returned.

        Raises:
            JobNotFinished: It has not ended; ``get`` waits for it.
            JobFailed: It ended without a value.
        """
        record = self._record
        if record.status == JobRecord.Status.SUCCESSFUL:
            return cast(R, decode_result(record.function, bytes(record.result or b"")))
        if not record.is_finished:
            raise JobNotFinished(self._name, self.status)
        raise JobFailed(
            self._name,
            exception=record.exception,
            message=record.message or record.get_status_display(),
            traceback=record.traceback,
        )

    @property
    def errors(self) -> list[JobError]:
        """Why each attempt failed, in order; the last of a job that failed is why it did."""
        record = self._record
        past = (
            record.past_attempts.db_manager(record._state.db).order_by("number")
            if record.attempts > 1 or not self.is_finished
            else ()
        )
        told = [JobError(each.exception, each.message, each.traceback) for each in past]
        if record.status in JobRecord.FAILURES:
            told.append(JobError(record.exception, record.message, record.traceback))
        return told

    @property
    def log(self) -> str:
        """The last lines that its last attempt logged, as the record has them now; empty for none."""
        records = JobRecord.objects.using(self._record._state.db).filter(pk=self._record.pk)
        return records.values_list("log", flat=True).first() or ""

    @property
    def attempts(self) -> int:
        """How often it was handed to a worker."""
        return self._record.attempts

    @property
    def enqueued_at(self) -> datetime:
        return self._record.enqueued_at

    @property
    def started_at(self) -> datetime | None:
        return self._record.started_at

    @property
    def last_attempted_at(self) -> datetime | None:
        return self._record.last_attempted_at

    @property
    def finished_at(self) -> datetime | None:
        return self._record.finished_at

    def refresh(self) -> None:
        """
        Look at the record again.

        Raises:
            JobResultDoesNotExist: It is gone.
        """
        try:
            rows.refresh(self._record, _STANDING)
        except JobRecord.DoesNotExist:
            raise JobResultDoesNotExist(self.id) from None

    async def arefresh(self) -> None:
        """As ``refresh``."""
        await sync_to_async(self.refresh)()

    def get(self, timeout: float | None = None) -> R:
        """
        Wait for the end, and return what the function returned.

        One of our job servers tells when the record has it, if it can be asked;
        else, or when another server has the job, looks at the record now and then.

        Args:
            timeout: Seconds to wait; None to wait for ever.
        Raises:
            JobFailed: It ended without a value; the attributes say why.
            ResponseTimeout: The time was up; the job goes on. ``NoWorker`` when no worker offers it.
            WaitInTransaction: A transaction is open that hides the job.
        """
        patience = Patience(timeout)
        if monotonic() >= self._new_until:
            self._look_before_waiting()
        if self.is_finished:
            return self.return_value
        refuse_endless_wait(timeout)
        with closing(client_for().watch(self.id)) as watch:
            if watch.is_open:
                patience.is_told()
            while not self.is_finished:
                if not patience.is_left:
                    raise self._too_late(timeout or 0.0)
                if patience.listens and self.handle:
                    watch.close()
                if watch.is_open:
                    if watch.wait(patience.pause()):
                        if watch.told:
                            self._learn(watch.told)
                            break
                        watch.close()
                elif not (patience.listens and self.handle) or not patience.heard(self._hear(patience.left)):
                    sleep(patience.pause())
                self.refresh()
        return self.return_value

    def _learn(self, told: bytes) -> None:
        """Take over what a job server tells of the row of a job that has succeeded. See ``packets.ROW``."""
        handle, began, ended, value = told.split(b"\0", 3)
        record = self._record
        record.status, record.handle, record.result = JobRecord.Status.SUCCESSFUL, handle.decode(), value
        record.attempts = 1
        zone = UTC if settings.USE_TZ else None
        record.started_at = record.last_attempted_at = datetime.fromtimestamp(float(began), zone)
        record.finished_at = datetime.fromtimestamp(float(ended), zone)

    async def aget(self, timeout: float | None = None) -> R:
        """As ``get``."""
        patience = Patience(timeout)
        if monotonic() >= self._new_until:
            await sync_to_async(self._look_before_waiting)()
        if self.is_finished:
            return self.return_value
        refuse_endless_wait(timeout)
        watch = await async_client_for().watch(self.id)
        try:
            if watch.is_open:
                patience.is_told()
            while not self.is_finished:
                if not patience.is_left:
                    raise await sync_to_async(self._too_late)(timeout or 0.0)
                if patience.listens and self.handle:
                    watch.close()
                if watch.is_open:
                    if await watch.wait(patience.pause()):
                        if watch.told:
                            self._learn(watch.told)
                            break
                        watch.close()
                elif not (patience.listens and self.handle) or not patience.heard(
                    await self._ahear(patience.left)
                ):
                    await asyncio.sleep(patience.pause())
                await self.arefresh()
        finally:
            watch.close()
        return self.return_value

    def _look_before_waiting(self) -> None:
        """Refresh; raise ``WaitInTransaction`` where the end would never be seen."""
        self.refresh()
        if not self.is_finished and transaction.get_connection(self._record._state.db).in_atomic_block:
            raise WaitInTransaction(self._name)

    def _hear(self, left: float) -> bool:
        """Wait by the wire; whether the job's end, or a good part of the time, has come."""
        try:
            return client_for().wait_for(self.handle, timeout=min(left, LISTEN_FOR))
        except ResponseTimeout:
            return True
        except (ConnectionFailed, ConnectionLost):
            return False

    async def _ahear(self, left: float) -> bool:
        try:
            return await async_client_for().wait_for(self.handle, timeout=min(left, LISTEN_FOR))
        except ResponseTimeout:
            return True
        except (ConnectionFailed, ConnectionLost):
            return False

    def _too_late(self, timeout: float) -> ResponseTimeout:
        record = self._record
        is_later = record.status == JobRecord.Status.SCHEDULED
        not_before = record.run_after if is_later else None
        return timed_out(f"job {self._name}", timeout, self.function, record._state.db, not_before)

    def cancel(self) -> bool:
        """
        End the job, as ``CANCELLED``; False when it has ended before.

        A worker of ours that runs it is told: ``JobCancelled`` is raised in the
        function, and its process is killed if it goes on. What any worker says
        of the job is passed over.

        The job server that has the job reads in the database that it is to end,
        within a second, wherever it runs. In a transaction nothing is waited for:
        True says that it will be asked to when that is committed.

        Raises:
            ResponseTimeout: Nobody has carried it out in ``TIMEOUT`` seconds; it will be, once the job
                server that has the job is there again, or another takes its jobs over.
            JobResultDoesNotExist: The record is gone.
        """
        if not self._ask_to_cancel():
            return False
        sleep_between(self._looks_until_cancelled(conf.settings_for().timeout))
        return self._is_to_be_cancelled

    async def acancel(self) -> bool:
        """As ``cancel``."""
        if not await sync_to_async(self._ask_to_cancel)():
            return False
        await asleep_between(self._looks_until_cancelled(conf.settings_for().timeout))
        return self._is_to_be_cancelled

    @property
    def _is_to_be_cancelled(self) -> bool:
        """Of one that was to be: whether it is, or will be at the commit."""
        return not self.is_finished or self.status == JobRecord.Status.CANCELLED

    def _ask_to_cancel(self) -> bool:
        """End what no server has, and let the others know what is to end; False when it has ended before."""
        using = self._record._state.db or conf.settings_for().database
        self.refresh()
        if self.is_finished:
            return False
        # What no server has claimed is nobody's; from then on it is that server's alone.
        if _cancel_at_door(self._record.pk, using):
            self.refresh()
        else:
            wish = Cancellation(job_id=self._record.pk)
            Cancellation.objects.using(using).bulk_create([wish], ignore_conflicts=True)
            nudge_after_commit(using)
        return True

    def _looks_until_cancelled(self, limit: float) -> Iterator[float]:
        """
        Look until it has ended, and yield the seconds until the next look; not before the commit.

        Raises:
            ResponseTimeout: It has not in ``limit`` seconds.
        """
        if transaction.get_connection(self._record._state.db).in_atomic_block:
            return
        began = monotonic()
        pause, nudge_at = 0.002, began + NUDGE_AGAIN
        while True:
            self.refresh()
            if self.is_finished:
                return
            if monotonic() >= began + limit:
                raise self._not_cancelled(limit)
            if monotonic() >= nudge_at:
                # The server that heard of it may have looked a moment before.
                nudge_at = monotonic() + NUDGE_AGAIN
                nudge()
            yield pause
            pause = min(pause * 1.5, LONGEST_PAUSE_OF_GET)

    def _not_cancelled(self, limit: float) -> ResponseTimeout:
        error = ResponseTimeout(f"the cancelling of job {self._name}", limit)
        error.add_note(
            "It is asked for still, and will be done by the job server that has the job, or by the one "
            "that takes its jobs over: is one running on this database?"
        )
        return error

    def retry(self) -> JobResult[R]:
        """
        Enqueue the same job again: the same function and arguments, in a record of its own.

        A member of a group was counted there at its end: what is made here is no member.
        While a job of the same unique is to do, that is returned, and no other is made.

        Raises:
            JobNotFinished: It has not ended yet.
            JobResultDoesNotExist: Its record is gone.
        """
        self.refresh()
        if not self.is_finished:
            raise JobNotFinished(self._name, self.status)
        using = self._record._state.db or conf.settings_for().database
        return _insert_again(self._record, using)[0]

    async def aretry(self) -> JobResult[R]:
        """As ``retry``."""
        return await sync_to_async(self.retry)()

    @property
    def _name(self) -> str:
        return f"{self.id} ({self._record.function})"


def one_of_many(template: JobRecord, id: int, workload: bytes) -> JobResult[Any]:
    """The result of one of thousands, whose record is only made when it is looked at."""
    result: JobResult[Any] = JobResult.__new__(JobResult)
    result._made_of = template, id, workload
    return result


class WireJobResult(JobResult[R]):
    """
    A job that was submitted to any Gearman server, by ``ENQUEUE = "wire"``.

    Such a server tells whether a job waits or runs, and forgets it at its end:
    there is no value to wait for, and a failure looks like a success.
    """

    def __init__(self, record: JobRecord) -> None:
        super().__init__(record)
        self._server = ""
        """Which of the servers has it, and gave it its handle; empty when that is not known."""

    def acknowledged(self, server: str, handle: str) -> None:
        """A job server has it now."""
        self._server = server
        self._record.handle = handle

    @property
    def id(self) -> str:
        """The job's unique."""
        return self._record.unique

    @property
    def return_value(self) -> R:
        raise self._not_kept()

    @property
    def errors(self) -> list[JobError]:
        """Not to be had: raises ``ResultNotKept``."""
        raise self._not_kept()

    def refresh(self) -> None:
        """
        Ask the server; before the transaction commits, nothing is there to ask for.

        Raises:
            ResultNotKept: It knows the job no more: it has ended, or was lost.
            ConnectionFailed, ConnectionLost: The server that has the job does not answer.
        """
        record = self._record
        if record.handle is None:
            return
        standing = self._standing()
        if not standing.known:
            raise self._not_kept()
        if standing.running:
            record.status = JobRecord.Status.RUNNING
        if standing.denominator:
            record.numerator, record.denominator = standing.numerator, standing.denominator

    def get(self, timeout: float | None = None) -> R:
        """Not to be had: raises ``ResultNotKept``; wait with ``run``."""
        raise self._not_kept()

    async def aget(self, timeout: float | None = None) -> R:
        """Not to be had: raises ``ResultNotKept``; wait with ``arun``."""
        raise await sync_to_async(self._not_kept)()

    def cancel(self) -> bool:
        """
        End the job; False when the server has it no more, or it was not submitted yet.

        gearmand keeps one that runs until it ends. Our own server takes the command from its own
        machine alone: elsewhere, cancel jobs of its records.

        Raises:
            ConnectionFailed, ConnectionLost: The server that has the job does not answer.
            InvalidCall: The job is there, and its handle is not known: the result is of ``get_result``, or
                the server was started again since.
            ResultNotKept: It is of that, and the job is there no more.
            ServerError: It does not take the command from here.
        """
        if self._record.handle is None:
            return False
        if not self.handle:
            self.refresh()
        elif not self._standing().known:
            return False
        # Handles are a server's own, and of one run of it: another's job may have the same by now.
        elif client_of(self._server).job_status(self.handle).known:
            return _cancel_by_wire(self.handle, self._server)
        elif not self._standing().known:
            return False
        raise InvalidCall(
            f"job {self.id} ({self.function})",
            "no handle here",
            "a job server cancels by the handle alone, and does not tell it for an id",
            "keep the result of enqueue(), or its handle for `manage.py gearman_status --cancel`",
        )

    async def acancel(self) -> bool:
        """As ``cancel``."""
        return await sync_to_async(self.cancel)()

    def _standing(self) -> JobStatus:
        """What the server that has the job says of its unique; each is asked where that is not known."""
        client = client_of(self._server) if self._server else client_for()
        return client.job_status_unique(self._record.unique)

    def retry(self) -> JobResult[R]:
        """Not to be had: raises ``ResultNotKept``; nothing is kept of its arguments."""
        raise self._not_kept()

    def _not_kept(self) -> ResultNotKept:
        server = self._server or conf.settings_for().servers[0]
        return ResultNotKept(self.id, server, client_for().server_version(server))


_STANDING: Final = (
    "status",
    "handle",
    "attempts",
    "numerator",
    "denominator",
    "result",
    "exception",
    "message",
    "traceback",
    "started_at",
    "last_attempted_at",
    "finished_at",
)
"""Fields of a record that change after it was made."""


# The end of what nobody wants any more, and the same again.


def _cancel_at_door(id: int, using: str) -> bool:
    """Whether no job server had the job, and it was ended."""
    member = JobRecord.objects.using(using).filter(pk=id, server=None, group_index__isnull=False)
    cancelled, following = continuations.cancel_record(
        id,
        member.values_list("group", flat=True).first(),
        using,
        conf.settings_for().max_packet,
        "Cancelled before a job server had it",
    )
    if following.laid:
        nudge_after_commit(using)
    return cancelled


def _same_again(old: JobRecord) -> JobRecord:
    """An unsaved record of the same call."""
    return JobRecord(
        function=old.function,
        queue_name=old.queue_name,
        workload=bytes(old.workload),
        unique=old.unique,
        unique_key=unique_key_of(old.function, old.unique, bytes(old.workload)),
        reducer=old.reducer,
        priority=old.priority,
        client=identity(os.getpid()),
        max_attempts=old.max_attempts,
        limit_key=old.limit_key,
        timeout=old.timeout,
        # What follows a group may ask for its results again.
        group_id=old.group_id if old.group_index is None else None,
    )


def _insert_again(old: JobRecord, using: str) -> tuple[JobResult[Any], bool]:
    """The job that is to do in place of one that has ended; whether it was made here, and not joined."""
    record = _same_again(old)
    inserted = insert(record, using)
    result: JobResult[Any] = JobResult(inserted)
    known = registry.get(record.function)
    if inserted is record and known is not None:
        # Of a function that the process does not know there is no sender.
        known._enqueued(result)
    return result, inserted is record


def retry_all(ids: Iterable[int], using: str) -> tuple[int, int, int]:
    """
    Enqueue jobs again by the ids of their records, in that order: all of them, or none.

    Returns:
        How many were enqueued; how many have a unique of which a job is still to do, and joined it;
        how many have not ended. Those whose records are gone are in none of these.
    """
    made = joined = unfinished = 0
    # Only one of the workloads is in memory at a time, and nothing of how the jobs ended.
    records = JobRecord.objects.using(using).defer("result", "exception", "message", "traceback", "log")
    with transaction.atomic(using=using):
        for id in ids:
            old = records.filter(pk=id).first()
            if old is None:
                continue
            if not old.is_finished:
                unfinished += 1
                continue
            _, is_new = _insert_again(old, using)
            made, joined = made + is_new, joined + (not is_new)
    return made, joined, unfinished


def cancel_all(ids: Sequence[int], using: str, limit: float) -> tuple[int, int]:
    """
    Cancel jobs together by the ids of their records: how many were, how many are only asked to be.

    Those that ended before, or whose records are gone, are in neither. In a transaction nothing is
    waited for, and what is asked for counts as done.

    Args:
        limit: Seconds to wait for job servers.
    """
    deadline, pause = monotonic() + limit, 0.002
    records = JobRecord.objects.using(using)
    asked = list(records.filter(pk__in=ids, status__in=JobRecord.LIVE).values_list("pk", flat=True))
    following = continuations.cancel_unclaimed(
        asked, using, conf.settings_for().max_packet, "Cancelled before a job server had it"
    )
    live = records.filter(pk__in=asked, status__in=JobRecord.LIVE)
    wishes = [Cancellation(job_id=id) for id in live.order_by("pk").values_list("pk", flat=True)]
    Cancellation.objects.using(using).bulk_create(wishes, batch_size=500, ignore_conflicts=True)
    if following.laid or wishes:
        nudge_after_commit(using)
    done = records.filter(pk__in=asked, status=JobRecord.Status.CANCELLED)
    if transaction.get_connection(using).in_atomic_block:
        return done.count() + len(wishes), 0
    nudge_at = monotonic() + NUDGE_AGAIN
    while wishes and live.exists() and monotonic() < deadline:
        if monotonic() >= nudge_at:
            # The server that heard of it may have looked a moment before.
            nudge_at = monotonic() + NUDGE_AGAIN
            nudge()
        sleep(pause)
        pause = min(pause * 1.5, LONGEST_PAUSE_OF_GET)
    waiting = live.count() if wishes else 0
    return done.count(), waiting


def _cancel_by_wire(handle: str, server: str) -> bool:
    """
    Whether the job server had the job, and has ended it.

    Raises:
        ServerError: It is ours, and takes the command from its own machine alone.
    """
    options = conf.settings_for()
    tls = conf.client_tls(options)
    try:
        with AdminClient(
            server, connect_timeout=options.connect_timeout, timeout=options.timeout, tls=tls
        ) as admin:
            admin.cancel(handle)
    except ServerError as error:
        if error.code == "UNKNOWN_JOB":
            return False
        raise
    return True
