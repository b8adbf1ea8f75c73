"""
``@job``: a function that can be run elsewhere.

The decorator registers a function under a name and gives it ``enqueue`` (the
database door: a row in the caller's transaction), ``run`` (a foreground job:
wait for the value), ``stream`` (the same, with what it tells meanwhile) and
``call`` (here and now), each with a twin for asyncio. Arguments and results
travel as JSON, ``{"args": [...], "kwargs": {...}}``, or as plain bytes for ``raw``
jobs, so that programs in any language can submit and serve them.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import logging
import math
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import (
    AsyncGenerator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AbstractContextManager, aclosing, closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache, cached_property, partial, update_wrapper
from importlib import import_module
from time import monotonic, sleep
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Final,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    overload,
)

from asgiref.sync import sync_to_async
from django.core.signals import setting_changed
from django.db import IntegrityError, close_old_connections, connections, reset_queries, transaction
from django.dispatch import Signal, receiver
from django.utils import timezone

from . import conf, continuations, logs, permits, reports, rows, schedules, signals, tracing
from .client.admin_client import AdminClient
from .client.aio import AsyncClient
from .client.core import Priority
from .client.sync import Client
from .client.tasks import EXPLANATION_TIMEOUT, Part, Value
from .encoding import dumps, exception_of, refuse_unless_json
from .exceptions import (
    ConnectionFailed,
    ConnectionLost,
    Discard,
    GearmanError,
    GroupDoesNotExist,
    InvalidJob,
    JobCancelled,
    JobFailed,
    JobNotFinished,
    JobResultDoesNotExist,
    JobResultMismatch,
    JobTimedOut,
    NoWorker,
    ResponseTimeout,
    ResultNotKept,
    Retry,
    ServerError,
    TooLarge,
    WaitInTransaction,
)
from .insertion import insert_workloads, like
from .models import Cancellation, JobRecord, Schedule, unique_key_of

if TYPE_CHECKING:
    from .groups import GroupResult

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

MIN_PRIORITY: Final = -100
MAX_PRIORITY: Final = 100

PROGRESS_INTERVAL: Final = 0.1
"""Seconds between two progress reports of one job; the last one is always sent."""


LOG_INTERVAL: Final = 1.0
"""Seconds for which lines that a job logged are held back; the last ones always leave."""
LONGEST_PAUSE_OF_GET: Final = 0.25
"""Seconds between two looks at a record that ``get`` waits for, where the wire does not tell."""

LISTEN_AFTER: Final = 0.02
"""Pause between two looks from which on ``get`` asks the wire instead; short jobs have ended by then."""

LISTENING_PAUSE: Final = 0.005
"""Seconds after which ``get`` looks by itself though a job server was to tell it."""

NUDGE_AGAIN: Final = 0.2
"""Seconds after which job servers are told once more that somebody waits for a job's end."""

LISTEN_FOR: Final = 30.0
"""Seconds that ``get`` waits by the wire before it looks at the record all the same."""


class Reports(Protocol):
    """What a running job can tell; the worker's ``AssignedJob``, or nobody when it is called in-process."""

    @property
    def takes_log(self) -> bool: ...
    def send_log(self, text: bytes) -> None: ...
    def send_status(self, numerator: int, denominator: int) -> None: ...
    def send_data(self, data: bytes) -> None: ...
    def send_warning(self, data: bytes) -> None: ...
    @property
    def cancelled(self) -> bool: ...


class JobContext:
    """
    The first argument of a job with ``takes_context=True``: its line to whoever waits.

    For any thread and task of the job.

    Attributes:
        handle: The Gearman handle; empty when the function was called in-process.
        unique: The submitter's key, empty when it gave none.
        attempt: Which attempt this is, from 1; with ``handle`` it tells a second run from the first.
        max_attempts: How many there are; None when the job has no number of its own.
        function: The job's name on the wire.
        tail: The last lines that it logged; None where nobody keeps them.

    A job that an orderly stop puts back before its end begins the same attempt again.
    """

    def __init__(
        self,
        handle: str = "",
        unique: str = "",
        reports: Reports | None = None,
        attempt: int = 1,
        max_attempts: int | None = None,
        function: str = "",
    ) -> None:
        self.handle = handle
        self.unique = unique
        self.attempt = attempt
        self.max_attempts = max_attempts
        self.function = function
        self.tail: logs.Tail | None = None
        self._reports = reports
        self._reported_at = -math.inf
        self._progress: tuple[int, int] | None = None
        self._unreported: tuple[int, int] | None = None
        self._has_unsent_lines = False
        self._sending = threading.Lock()
        if reports is not None and reports.takes_log:
            self.tail = logs.Tail(self._logged)

    @property
    def id(self) -> str:
        """The record's id, as of ``JobResult``; empty for a job that did not come from ``enqueue``."""
        before, _, digits = self.handle.rpartition(":r")
        return digits if before and digits.isascii() and digits.isdigit() else ""

    @cached_property
    def group(self) -> GroupResult[Any] | None:
        """The group that the job is a member of, or that it follows; None for none. One query."""
        # Of the public names: groups.py stands on this file.
        from . import GroupResult

        return GroupResult.of_job(int(self.id)) if self.id else None

    async def agroup(self) -> GroupResult[Any] | None:
        """As ``group``, for an ``async def``."""
        return await sync_to_async(lambda: self.group)()

    @cached_property
    def logger(self) -> logs.JobLogger:
        """A logger of the function's name, whose lines are kept with the record, from INFO on."""
        return logs.JobLogger(logging.getLogger(self.function or __name__), self)

    @property
    def cancelled(self) -> bool:
        """
        Whether somebody cancelled the job, who waits for its end no more.

        A function that asks now and then has two seconds to end by itself when
        the answer is True; in others ``JobCancelled`` is raised at once.
        """
        return self._reports is not None and self._reports.cancelled

    def set_progress(self, numerator: int, denominator: int) -> None:
        """
        Say that ``numerator`` of ``denominator`` parts are done.

        Waiting clients and the admin see it. Cheap enough for an inner loop: no
        more than ten a second leave, and the last one within a tenth of a second.
        """
        progress = (numerator, denominator)
        if progress == self._progress:
            return
        self._progress = progress
        held_back = self._unreported is not None
        self._unreported = progress
        if numerator >= denominator or monotonic() - self._reported_at >= PROGRESS_INTERVAL:
            self.flush(log=False)
        elif not held_back and self._reports is not None:
            reports.flusher.flush_at(self, time.monotonic() + PROGRESS_INTERVAL)

    def send_data(self, data: bytes | str) -> None:
        """Send a part of the result to the clients that wait; it is not kept."""
        data = _as_bytes("send_data", data)
        if self._reports is not None:
            self._reports.send_data(data)

    def warn(self, data: bytes | str) -> None:
        """Send a warning to the clients that wait; it is not kept."""
        data = _as_bytes("warn", data)
        if self._reports is not None:
            self._reports.send_warning(data)

    def flush(self, *, log: bool = True) -> None:
        """Send progress and lines of the log that were held back."""
        with self._sending:
            progress, self._unreported = self._unreported, None
            if self._reports is None:
                return
            if progress is not None:
                self._reports.send_status(*progress)
                self._reported_at = monotonic()
            if log and self._has_unsent_lines and self.tail is not None:
                self._has_unsent_lines = False
                self._reports.send_log(self.tail.text())

    def close(self) -> None:
        """Send what was held back, and nothing from now on: the job has ended."""
        reports.flusher.forget(self)
        self.flush()
        with self._sending:
            self._reports = None

    def _logged(self) -> None:
        if not self._has_unsent_lines:
            self._has_unsent_lines = True
            reports.flusher.flush_at(self, time.monotonic() + LOG_INTERVAL)


def _as_bytes(method: str, data: bytes | str) -> bytes:
    if isinstance(data, str):
        return data.encode()
    if not isinstance(data, bytes):
        raise TypeError(f"context.{method}() takes bytes or str, not {type(data).__name__}; encode it first")
    return data


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

    A superset of Django's ``TaskResult``.
    """

    def __init__(self, record: JobRecord) -> None:
        self._record = record

    @classmethod
    def _of_many(cls, template: JobRecord, id: int, workload: bytes) -> JobResult[R]:
        """One of thousands, whose record is only made when it is looked at."""
        result = cls.__new__(cls)
        result._made_of = template, id, workload
        return result

    if not TYPE_CHECKING:  # for which every name would be an attribute

        def __getattr__(self, name: str) -> Any:
            if name != "_record" or "_made_of" not in self.__dict__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            self._record = like(*self._made_of)
            return self._record

    def __repr__(self) -> str:
        return f"<JobResult {self.id} {self._record.function} {self.status}>"

    _made_of: tuple[JobRecord, int, bytes]

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
            return cast(R, _decode_result(record.function, bytes(record.result or b"")))
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
        past = record.past_attempts.order_by("number") if record.attempts > 1 or not self.is_finished else ()
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
        patience = _Patience(timeout)
        self.refresh()
        if self.is_finished:
            return self.return_value
        if transaction.get_connection(self._record._state.db).in_atomic_block:
            raise WaitInTransaction(self._name)
        with closing(client_for().watch(self.id)) as watch:
            if watch.is_open:
                patience.is_told()
            while not self.is_finished:
                if not patience.is_left:
                    raise self._too_late(timeout or 0.0)
                if patience.listens:
                    watch.close()
                if watch.is_open:
                    watch.wait(patience.pause())
                elif not (patience.listens and self.handle) or not patience.heard(self._hear(patience.left)):
                    sleep(patience.pause())
                self.refresh()
        return self.return_value

    async def aget(self, timeout: float | None = None) -> R:
        """As ``get``."""
        patience = _Patience(timeout)
        await self.arefresh()
        while not self.is_finished:
            if not patience.is_left:
                raise await sync_to_async(self._too_late)(timeout or 0.0)
            if not (patience.listens and self.handle) or not patience.heard(await self._ahear(patience.left)):
                await asyncio.sleep(patience.pause())
            await self.arefresh()
        return self.return_value

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
        return _timed_out(f"job {self._name}", timeout, self.function, self._record._state.db)

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
        limit = conf.settings_for().timeout
        if not self._wait_for_cancelled(monotonic() + limit):
            raise self._not_cancelled(limit)
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
            _nudge_after_commit(using)
        return True

    def _wait_for_cancelled(self, deadline: float) -> bool:
        """Whether it has ended by then; at once where nothing can be seen of it before the commit."""
        if transaction.get_connection(self._record._state.db).in_atomic_block:
            return True
        pause, nudge_at = 0.002, monotonic() + NUDGE_AGAIN
        while True:
            self.refresh()
            if self.is_finished or monotonic() >= deadline:
                return self.is_finished
            if monotonic() >= nudge_at:
                # The server that heard of it may have looked a moment before.
                nudge_at = monotonic() + NUDGE_AGAIN
                _nudge()
            sleep(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE_OF_GET)

    def _not_cancelled(self, limit: float) -> ResponseTimeout:
        error = ResponseTimeout(f"the cancelling of job {self._name}", limit)
        error.add_note(
            "It is asked for still, and will be done by the job server that has the job, or by the one "
            "that takes its jobs over: is one running on this database?"
        )
        return error

    async def acancel(self) -> bool:
        """As ``cancel``."""
        return await sync_to_async(self.cancel)()

    def retry(self) -> JobResult[R]:
        """
        Enqueue the same job again: the same function and arguments, in a record of its own.

        A member of a group was counted there at its end: what is made here is no member.

        Raises:
            JobNotFinished: It has not ended yet.
            JobResultDoesNotExist: Its record is gone.
        """
        self.refresh()
        if not self.is_finished:
            raise JobNotFinished(self._name, self.status)
        old = self._record
        again = JobRecord(
            function=old.function,
            queue_name=old.queue_name,
            workload=bytes(old.workload),
            unique=old.unique,
            unique_key=unique_key_of(old.function, old.unique, bytes(old.workload)),
            reducer=old.reducer,
            priority=old.priority,
            client=_identity(os.getpid()),
            max_attempts=old.max_attempts,
            limit_key=old.limit_key,
            timeout=old.timeout,
            # What follows a group may ask for its results again.
            group_id=old.group_id if old.group_index is None else None,
        )
        return JobResult(_insert(again, old._state.db or conf.settings_for().database))

    async def aretry(self) -> JobResult[R]:
        """As ``retry``."""
        return await sync_to_async(self.retry)()

    @property
    def _name(self) -> str:
        return f"{self.id} ({self._record.function})"


class _Patience:
    """How long ``get`` has waited, and how it goes on."""

    def __init__(self, timeout: float | None) -> None:
        self._deadline = math.inf if timeout is None else monotonic() + timeout
        self._pause = 0.001

    @property
    def left(self) -> float:
        return self._deadline - monotonic()

    @property
    def is_left(self) -> bool:
        return self.left > 0

    @property
    def listens(self) -> bool:
        """Whether it has been long enough to ask a job server."""
        return self._pause >= LISTEN_AFTER

    def is_told(self) -> None:
        """A job server will say when it is time to look; that another has the job is the exception."""
        self._pause = LISTENING_PAUSE

    def heard(self, told: bool) -> bool:
        """Whether a job server told something: then the record will say so at once."""
        if told:
            self._pause = 0.001
        return told

    def pause(self) -> float:
        """Seconds until the next look."""
        pause = min(self._pause, max(self.left, 0.0))
        self._pause = min(self._pause * 1.5, LONGEST_PAUSE_OF_GET)
        return pause


class WireJobResult(JobResult[R]):
    """
    A job that was submitted to any Gearman server, by ``ENQUEUE = "wire"``.

    Such a server tells whether a job waits or runs, and forgets it at its end:
    there is no value to wait for, and a failure looks like a success.
    """

    @property
    def id(self) -> str:
        """The job's unique."""
        return self._record.unique

    @property
    def return_value(self) -> R:
        raise self._not_kept()

    def refresh(self) -> None:
        """
        Ask the server; before the transaction commits, nothing is there to ask for.

        Raises:
            ResultNotKept: It knows the job no more: it has ended, or was lost.
        """
        record = self._record
        if record.handle is None:
            return
        standing = client_for().job_status_unique(record.unique)
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
            ServerError: It does not take the command from here.
        """
        return self.handle != "" and _cancel_by_wire(self.handle)

    def retry(self) -> JobResult[R]:
        """Not to be had: raises ``ResultNotKept``; nothing is kept of its arguments."""
        raise self._not_kept()

    def _not_kept(self) -> ResultNotKept:
        server = conf.settings_for().servers[0]
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


Backoff: TypeAlias = "Callable[[BaseException, JobResult[Any]], float | timedelta | None]"
"""Seconds until the next attempt of a job that raised; None when there is to be none."""

Unique: TypeAlias = str | Sequence[str] | Callable[..., str]
"""Which jobs of a function are one: a name of an argument, several, or a function of the arguments."""

RunCoroutine: TypeAlias = "Callable[[Coroutine[Any, Any, Any]], Any]"

MAX_LIMIT_KEY: Final = 64
"""Bytes of a limit's key that is sent as it is; longer ones are hashed."""

MAX_UNIQUE: Final = 200
"""Bytes of a unique that is sent as it is; longer ones are hashed."""

LONGEST_PAUSE: Final = 3600.0
"""Seconds between two attempts at the most, where no ``backoff`` says otherwise."""


def exponential(attempt: int) -> float:
    """Seconds until the next attempt: about 2, 4, 8, ... and an hour at the most, never all at once."""
    return float(min(2 ** min(attempt, 20), LONGEST_PAUSE) * random.uniform(0.75, 1.25))  # noqa: S311


class JobOptions(TypedDict, total=False):
    """What ``@job`` may be told beside ``takes_context``."""

    name: str
    raw: bool
    queue_name: str
    priority: int
    max_attempts: int
    backoff: Backoff
    timeout: int
    unique: Unique
    rate_limit: str
    concurrency: int
    limit_key: Unique
    schedule: schedules.Declaration | Sequence[schedules.Declaration]


class Job(Generic[P, R]):
    """
    A function that can be run elsewhere; made by ``@job``.

    Calling it runs it here, as before it was decorated.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str = "",
        raw: bool = False,
        queue_name: str = "default",
        priority: int = 0,
        takes_context: bool = False,
        max_attempts: int | None = None,
        backoff: Backoff | None = None,
        timeout: int | None = None,
        unique: Unique | None = None,
        rate_limit: str = "",
        concurrency: int | None = None,
        limit_key: Unique | None = None,
        schedule: object = None,
    ) -> None:
        thing: object = function
        if isinstance(thing, type | Job) or not callable(thing) or not hasattr(thing, "__qualname__"):
            raise InvalidJob(f"@job is for functions, not for {function!r}")
        self.function = function
        self.name = name or f"{function.__module__}.{function.__qualname__}"
        self.raw = raw
        self.queue_name = queue_name
        self.priority = priority
        self.takes_context = takes_context
        self.max_attempts = max_attempts
        self.backoff = backoff
        self.timeout = timeout
        self.unique = unique
        self.rate_limit = rate_limit
        self.concurrency = concurrency
        self.limit_key = limit_key
        self.schedules = schedules.declarations(schedule)
        self.run_after: datetime | timedelta | None = None
        self.run_timeout: float | None = None
        self.resubmit = False
        self._signature = self._inspect()
        self._validate()
        update_wrapper(self, function)

    def __repr__(self) -> str:
        return f"<Job {self.name}>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function in this process, as ``call`` does."""
        return self.call(*args, **kwargs)

    def call(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function in this process and return its value."""
        return cast(R, self._invoke(JobContext(function=self.name), args, kwargs))

    def using(
        self,
        *,
        priority: int | None = None,
        run_after: datetime | timedelta | None = None,
        unique: str | None = None,
        run_timeout: float | None = None,
        resubmit: bool = False,
    ) -> Job[P, R]:
        """
        The same job with other options for the submissions made through it.

        Args:
            priority: -100 to 100, higher first.
            run_after: Not before this moment, or this long after the submission; datetimes
                are aware when ``USE_TZ`` is on, and naive when it is off.
            unique: While a job of this function with the same is to do, this is that one; empty for none.
            run_timeout: Seconds that ``run``, ``stream`` and their twins wait, in place of ``RUN_TIMEOUT``.
            resubmit: Let ``run`` and ``arun`` submit it to another server when their connection breaks,
                though it may run twice then.
        """
        other = Job.__new__(Job)
        other.__dict__.update(self.__dict__)
        if priority is not None:
            other.priority = priority
        if run_after is not None:
            other.run_after = run_after
        if unique is not None:
            other.unique = _Always(unique)
        if run_timeout is not None:
            other.run_timeout = run_timeout
        if resubmit:
            other.resubmit = True
        other._validate()
        return other

    def s(self, *args: Any, **kwargs: Any) -> Signature[R]:
        """
        This call, to be made later: a member of a ``group`` or ``chain``, or what follows one.

        There it gets the value of what came before as its first argument, ahead of
        these, where anything did. That is why types say little of them: how many
        there are to be is only known where the call is put in its place, and checked there.

        Raises:
            NotJSON: JSON cannot carry an argument.
            TypeError: The arguments cannot fit the function.
        """
        return Signature(self, args, kwargs)

    def si(self, *args: P.args, **kwargs: P.kwargs) -> Signature[R]:
        """As ``s``, with these arguments and no others, whatever came before."""
        return Signature(self, args, kwargs, takes_result=False)

    def __copy__(self) -> Job[P, R]:
        other: Job[P, R] = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __reduce__(self) -> Any:
        """Pickled by name, with what ``using`` changed."""
        known = registry.get(self.name)
        if known is None:
            return super().__reduce__()
        names = ("priority", "run_after", "unique", "run_timeout", "resubmit")
        changes = {name: value for name in names if (value := getattr(self, name)) != getattr(known, name)}
        return _found, (self.function.__module__, self.name, changes)

    def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> JobResult[R]:
        """
        Have the function run by a worker.

        The job is a row of the database, inserted here: it exists exactly if
        the current transaction commits. No job server needs to be up.

        With ``ENQUEUE = "wire"`` it is submitted to a job server when the
        current transaction has committed; if that fails, the commit stays, the
        job is not, and who committed gets the error: ``ConnectionFailed``, or
        ``ConnectionLost`` and ``ResponseTimeout`` when the server may have it.

        Raises:
            TypeError: The arguments do not fit the function, or JSON cannot carry one.
        """
        options = conf.settings_for()
        record = self._new_record(args, kwargs, options)
        if options.enqueue == "wire":
            # gearmand's stores would overwrite jobs without a unique.
            record.unique = record.unique or uuid.uuid4().hex
            transaction.on_commit(partial(_submit, record), using=options.database)
            return self._enqueued(WireJobResult(record))
        return self._insert_one(record, options.database)

    def _insert_one(self, record: JobRecord, using: str) -> JobResult[R]:
        inserted = _insert(record, using)
        result: JobResult[R] = JobResult(inserted)
        # A job of its unique that was there already is told of once.
        return self._enqueued(result) if inserted is record else result

    def _enqueued(self, result: JobResult[R]) -> JobResult[R]:
        # Who listens for one function names it by the decorated one, not by what ``using`` made of it.
        signals.job_enqueued.send_robust(sender=registry.get(self.name, self), result=result)
        return result

    async def aenqueue(self, *args: P.args, **kwargs: P.kwargs) -> JobResult[R]:
        """As ``enqueue``, in the thread of Django's other database calls."""
        return await sync_to_async(self.enqueue)(*args, **kwargs)

    def enqueue_many(self, calls: Iterable[tuple[Sequence[Any], Mapping[str, Any]]]) -> list[JobResult[R]]:
        """
        As ``enqueue`` for each pair of positional and named arguments: all of them, or none.

        One statement for thousands of rows, and one nudge.

        Returns:
            A result for each, in their order; equal uniques have the same job.
        Raises:
            TypeError: Arguments do not fit the function, or JSON cannot carry one; nothing was enqueued.
        """
        options = conf.settings_for()
        pairs = [(tuple(args), kwargs) for args, kwargs in calls]
        if not pairs:
            return []
        if self.unique is not None or self.limit_key is not None or options.enqueue == "wire":
            return self._enqueue_each(pairs, options)
        workloads = self._encode_many(pairs, options.max_packet)
        args, kwargs = pairs[0]
        template = self._new_record(args, kwargs, options)
        ids = insert_workloads(template, workloads, options.database)
        template._state.adding, template._state.db = False, options.database
        _nudge_after_commit(options.database)
        results: list[JobResult[R]] = [
            JobResult._of_many(template, id, workload) for id, workload in zip(ids, workloads, strict=True)
        ]
        if signals.job_enqueued.has_listeners(registry.get(self.name, self)):
            for result in results:
                self._enqueued(result)
        return results

    async def aenqueue_many(
        self, calls: Iterable[tuple[Sequence[Any], Mapping[str, Any]]]
    ) -> list[JobResult[R]]:
        """As ``enqueue_many``."""
        return await sync_to_async(self.enqueue_many)(calls)

    def _enqueue_each(
        self, pairs: list[tuple[tuple[Any, ...], Mapping[str, Any]]], options: conf.GearmanSettings
    ) -> list[JobResult[R]]:
        records = [self._new_record(args, kwargs, options) for args, kwargs in pairs]
        if options.enqueue != "wire":
            with transaction.atomic(using=options.database):
                return [self._insert_one(record, options.database) for record in records]
        for record in records:
            record.unique = record.unique or uuid.uuid4().hex
        transaction.on_commit(partial(_submit_many, records), using=options.database)
        return [self._enqueued(WireJobResult(record)) for record in records]

    def _encode_many(self, pairs: list[tuple[tuple[Any, ...], Mapping[str, Any]]], limit: int) -> list[bytes]:
        if self.raw:
            return [self._encode(args, kwargs, limit) for args, kwargs in pairs]
        workloads = []
        trace = tracing.current()
        traced: dict[str, Any] = {tracing.KEY: trace} if trace else {}
        fitting: set[tuple[object, ...]] = set()
        for args, kwargs in pairs:
            # Whether arguments fit depends on how many there are, and on their names.
            shape = (len(args), *kwargs)
            try:
                if shape not in fitting:
                    raise TypeError
                for value in args:
                    refuse_unless_json(value, "")
                for value in kwargs.values():
                    refuse_unless_json(value, "")
                workload = dumps({"args": args, "kwargs": kwargs, **traced})
                if len(workload) > limit:
                    raise TypeError
            except TypeError:
                # By the way that says what is wrong.
                workload = self._encode(args, kwargs, limit)
                fitting.add(shape)
            workloads.append(workload)
        return workloads

    def _unique_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """What a submission has in common with those that it is to be one with; empty for nothing."""
        return self._made_of("unique", self.unique, args, kwargs, MAX_UNIQUE)

    def _limit_key_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """What the limit of a submission is counted by; None where it is counted for all of them."""
        if self.limit_key is None:
            return None
        return self._made_of("limit_key", self.limit_key, args, kwargs, MAX_LIMIT_KEY)

    def _made_of(
        self, option: str, given: Unique | None, args: tuple[Any, ...], kwargs: Mapping[str, Any], limit: int
    ) -> str:
        """A text that tells submissions apart by some of their arguments; empty where nothing was given."""
        if given is None:
            return ""
        if callable(given):
            made: object = given(*args, **kwargs)
            if not isinstance(made, str):
                raise TypeError(f"the {option} of {self.name} must be a str, not {made!r}")
        else:
            names = [given] if isinstance(given, str) else list(given)
            bound = self._signature.bind(*args, **kwargs)
            bound.apply_defaults()
            made = dumps([bound.arguments[name] for name in names]).decode()
        made = made.strip()
        return made if len(made.encode()) <= limit else hashlib.sha256(made.encode()).hexdigest()

    def _new_record(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: conf.GearmanSettings
    ) -> JobRecord:
        now = timezone.now()
        run_after = now + self.run_after if isinstance(self.run_after, timedelta) else self.run_after
        is_later = run_after is not None and run_after > now
        if is_later and self.priority and options.enqueue == "wire":
            raise ValueError(
                f"{self.name} cannot be for later and of priority {self.priority} with ENQUEUE = 'wire': "
                "the protocol has no such submission; leave out run_after or the priority"
            )
        workload, unique = self._encode_both(args, kwargs, options.max_packet)
        return JobRecord(
            function=self.name,
            queue_name=self.queue_name,
            workload=workload,
            unique=unique,
            unique_key=unique_key_of(self.name, unique, workload),
            priority=self.priority,
            client=_identity(os.getpid()),
            run_after=run_after,
            max_attempts=self.max_attempts,
            limit_key=self._limit_key_of(args, kwargs),
            timeout=self.timeout or options.job_timeout,
            status=JobRecord.Status.SCHEDULED if is_later else JobRecord.Status.READY,
            enqueued_at=now,
        )

    def run(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """
        Have the function run by a worker at once, and wait for its value.

        A foreground job: nothing is kept of it when this process or the job
        server ends. Waits for ``RUN_TIMEOUT`` seconds at the most.

        Raises:
            JobFailed: The function raised; the attributes say what and where.
            ResponseTimeout: It took too long; a worker may still be at it.
            ConnectionFailed: No job server answers.
        """
        client = client_for()
        do = {"high": client.do_high, "normal": client.do, "low": client.do_low}[self._wire_priority]
        workload, unique, timeout = self._prepared(args, kwargs)
        try:
            result = do(self.name, workload, unique=unique, timeout=timeout, resubmit=self.resubmit)
        except JobFailed as error:
            raise self._as_told(error) from None
        return self._value_of(result)

    async def arun(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """As ``run``, on asyncio: any number of them wait side by side over one connection."""
        client = async_client_for()
        do = {"high": client.do_high, "normal": client.do, "low": client.do_low}[self._wire_priority]
        workload, unique, timeout = self._prepared(args, kwargs)
        try:
            result = await do(self.name, workload, unique=unique, timeout=timeout, resubmit=self.resubmit)
        except JobFailed as error:
            raise self._as_told(error) from None
        return self._value_of(result)

    def stream(self, *args: P.args, **kwargs: P.kwargs) -> Generator[Part | Value[R], None, None]:
        """
        As ``run``, yielding ``Progress``, ``Data`` and ``Warned`` as the job tells them, and last ``Value``.

        Closing the generator, as a streaming response does when its client
        leaves, abandons the job.
        """
        return self._stream(*self._prepared(args, kwargs))

    def astream(self, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Part | Value[R], None]:
        """As ``stream``, on asyncio."""
        return self._astream(*self._prepared(args, kwargs))

    async def acall(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """As ``call``: an ``async def`` runs in this event loop, any other function in Django's thread."""
        if not inspect.iscoroutinefunction(self.function):
            return await sync_to_async(self.call)(*args, **kwargs)
        if self.takes_context:
            return cast(R, await self.function(JobContext(), *args, **kwargs))
        return cast(R, await self.function(*args, **kwargs))

    def _stream(self, workload: bytes, unique: str, timeout: float) -> Generator[Part | Value[R], None, None]:
        parts = client_for().stream(
            self.name, workload, unique=unique, priority=self._wire_priority, timeout=timeout
        )
        try:
            with closing(parts):
                for part in parts:
                    yield Value(self._value_of(part.value)) if isinstance(part, Value) else part
        except JobFailed as error:
            raise self._as_told(error) from None

    async def _astream(
        self, workload: bytes, unique: str, timeout: float
    ) -> AsyncGenerator[Part | Value[R], None]:
        parts = async_client_for().stream(
            self.name, workload, unique=unique, priority=self._wire_priority, timeout=timeout
        )
        try:
            async with aclosing(parts):
                async for part in parts:
                    yield Value(self._value_of(part.value)) if isinstance(part, Value) else part
        except JobFailed as error:
            raise self._as_told(error) from None

    @property
    def _wire_priority(self) -> Priority:
        return "high" if self.priority > 0 else "low" if self.priority < 0 else "normal"

    def _prepared(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[bytes, str, float]:
        """Workload, unique and seconds to wait of a foreground job."""
        options = conf.settings_for()
        workload, unique = self._encode_both(args, kwargs, options.max_packet)
        timeout = options.run_timeout if self.run_timeout is None else self.run_timeout
        return workload, unique, timeout

    def _value_of(self, result: bytes) -> R:
        return cast(R, result if self.raw else _decode_result(self.name, result))

    def _as_told(self, error: JobFailed) -> JobFailed:
        """The failure with what a worker of ours said of it."""
        return JobFailed(self.name, data=error.data, **exception_of(error.data))

    def get_result(self, id: str) -> JobResult[R]:
        """
        The job with that id.

        Raises:
            JobResultDoesNotExist: There is none.
            JobResultMismatch: It is of another function.
            ResultNotKept: With ``ENQUEUE = "wire"``, it has ended, or there was none.
        """
        if conf.settings_for().enqueue == "wire":
            found: WireJobResult[R] = WireJobResult(JobRecord(function=self.name, unique=id, handle=""))
            found.refresh()
            return found
        records = JobRecord.objects.using(conf.settings_for().database)
        try:
            record = records.get(pk=int(id))
        except (ValueError, OverflowError, JobRecord.DoesNotExist):
            raise JobResultDoesNotExist(str(id)) from None
        if record.function != self.name:
            raise JobResultMismatch(str(id), record.function, self.name)
        return JobResult(record)

    @property
    def is_async(self) -> bool:
        """Whether the function is an ``async def``."""
        return inspect.iscoroutinefunction(self.function)

    def perform(self, workload: bytes, context: JobContext, *, run: RunCoroutine = asyncio.run) -> bytes:
        """
        Run the function for a workload from the wire; what a worker does.

        Raises whatever the function raises, and ``TypeError`` for a workload or
        a return value that is not what it should be.

        Args:
            run: Runs the coroutine of an ``async def``.
        """
        args, kwargs = self._decode_workload(workload)
        return self._encode_result(self._invoke(context, args, kwargs, run), context)

    async def aperform(self, workload: bytes, context: JobContext) -> bytes:
        """``perform`` of an ``async def``, on the event loop that runs."""
        if _RESULTS in workload:
            # Which are read from the database.
            args, kwargs = await sync_to_async(self._decode_workload)(workload)
        else:
            args, kwargs = self._decode_workload(workload)
        if self.takes_context:
            args = (context, *args)
        return self._encode_result(await self.function(*args, **kwargs), context)

    def _decode_workload(self, workload: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((workload,), {}) if self.raw else self._decode(workload)

    def _encode_result(self, value: Any, context: JobContext) -> bytes:
        if not self.raw:
            refuse_unless_json(value, f"the return value of {self.name}")
            value = dumps(value)
        elif not isinstance(value, bytes):
            raise TypeError(f"raw job {self.name} must return bytes, not {type(value).__name__}")
        context.flush()
        return cast(bytes, value)

    def _invoke(
        self,
        context: JobContext,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        run: RunCoroutine = asyncio.run,
    ) -> Any:
        if self.takes_context:
            args = (context, *args)
        value = self.function(*args, **kwargs)
        return run(value) if inspect.iscoroutine(value) else value

    def _encode_both(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], limit: int) -> tuple[bytes, str]:
        """The workload of a submission, and its unique."""
        workload = self._encode(args, kwargs, limit)
        unique = self._unique_of(args, kwargs)
        if unique == "-":
            # Equal workloads are one job, whoever asks for it.
            workload = self._encode(args, kwargs, limit, traced=False)
        return workload, unique

    def _encode(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], limit: int, *, traced: bool = True
    ) -> bytes:
        """
        The workload of a submission.

        Args:
            limit: Bytes that it may have.
            traced: Whether the current trace goes along.
        """
        if self.raw:
            if kwargs or len(args) != 1 or not isinstance(args[0], bytes):
                raise TypeError(f"raw job {self.name} takes one bytes object, its workload")
            workload = args[0]
        else:
            bound = self._bind(args, kwargs)
            for name, value in bound.items():
                refuse_unless_json(value, f"argument {name!r} of {self.name}")
            envelope: dict[str, Any] = {"args": args, "kwargs": kwargs}
            if self.limit_key is not None:
                envelope["limit"] = self._limit_key_of(args, kwargs)
            if traced and (trace := tracing.current()):
                envelope[tracing.KEY] = trace
            workload = dumps(envelope)
        if len(workload) > limit:
            raise TooLarge(f"the workload of {self.name}", len(workload), limit, setting="MAX_PACKET")
        return workload

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return self._signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{self.name}() {error}") from None

    def _decode(self, workload: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
        try:
            envelope = json.loads(workload)
            args, kwargs = envelope["args"], envelope["kwargs"]
            is_envelope = isinstance(args, list) and isinstance(kwargs, dict)
            results = envelope.get(continuations.RESULTS)
        except (ValueError, TypeError, KeyError, RecursionError):
            is_envelope = False
        if not is_envelope:
            raise TypeError(
                f"the workload of {self.name} must be JSON of the form "
                '{"args": [...], "kwargs": {...}}; declare the job with raw=True to take any bytes'
            )
        if results is not None:
            args = [_results_of(results), *args]
        return tuple(args), kwargs

    def _inspect(self) -> inspect.Signature:
        signature = inspect.signature(self.function)
        if not self.takes_context:
            return signature
        names = list(signature.parameters)
        if not names or names[0] != "context":
            raise InvalidJob(f"{self.name} has takes_context=True: its first argument must be `context`")
        return signature.replace(parameters=[signature.parameters[name] for name in names[1:]])

    def _validate_names(self, option: str, given: object) -> None:
        if given is None or callable(given):
            return
        names = [given] if isinstance(given, str) else given
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise InvalidJob(
                f"{option} of {self.name} must be a name of an argument, several, or a function, "
                f"not {given!r}"
            )
        known = self._signature.parameters
        for name in names:
            if self.raw or name not in known:
                has = "its workload, bytes" if self.raw else ", ".join(known) or "none"
                raise InvalidJob(
                    f"{option} of {self.name} names {name!r}, which is no argument that JSON can carry "
                    f"(it has {has})"
                )

    def _validate_limits(self) -> None:
        rate: object = self.rate_limit
        if not isinstance(rate, str):
            raise InvalidJob(f'rate_limit of {self.name} must be a text such as "10/m", not {rate!r}')
        if rate:
            try:
                permits.parse_rate(rate)
            except ValueError as error:
                raise InvalidJob(f"rate_limit of {self.name}: {error}") from error
        most = self.concurrency
        if most is not None and (type(most) is not int or not 1 <= most <= permits.MOST):
            raise InvalidJob(
                f"concurrency of {self.name} must be a whole number from 1 to {permits.MOST}, not {most!r}"
            )
        self._validate_names("limit_key", self.limit_key)
        if self.limit_key is not None and not rate and most is None:
            raise InvalidJob(f"limit_key of {self.name} needs a rate_limit or a concurrency that it is for")

    def _validate(self) -> None:
        if "<" in self.function.__qualname__:
            raise InvalidJob(f"{self.name} must be defined at the module's level, where a worker can find it")
        name: object = self.name
        if not isinstance(name, str) or not name.isprintable() or len(name.encode()) > 512:
            raise InvalidJob(
                f"{self.name!r} is no name for a job: at most 512 bytes, without control characters"
            )
        priority: object = self.priority
        if not isinstance(priority, int) or not MIN_PRIORITY <= priority <= MAX_PRIORITY:
            raise InvalidJob(
                f"priority of {self.name} must be a whole number from {MIN_PRIORITY} to {MAX_PRIORITY}, "
                f"not {self.priority!r}"
            )
        queue_name: object = self.queue_name
        if not isinstance(queue_name, str) or not 0 < len(queue_name) <= 100:
            raise InvalidJob(
                f"queue_name of {self.name} must be 1 to 100 characters, not {self.queue_name!r}"
            )
        for option, highest in (("max_attempts", 32_767), ("timeout", 2**31 - 1)):
            number = getattr(self, option)
            if number is not None and (type(number) is not int or not 1 <= number <= highest):
                raise InvalidJob(
                    f"{option} of {self.name} must be a whole number from 1 to {highest}, not {number!r}"
                )
        self._validate_names("unique", self.unique)
        self._validate_limits()
        if self.backoff is not None and not callable(self.backoff):
            raise InvalidJob(
                f"backoff of {self.name} must be a function of the exception and the JobResult, "
                f"not {self.backoff!r}"
            )
        run_after: object = self.run_after
        if isinstance(run_after, datetime):
            _refuse_wrong_zone(self.name, run_after)
        elif run_after is not None and not isinstance(run_after, timedelta):
            raise InvalidJob(f"run_after of {self.name} must be a datetime or a timedelta, not {run_after!r}")


@dataclass(frozen=True)
class _Always:
    """A unique of all submissions, whatever their arguments."""

    unique: str

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return self.unique


def _found(module: str, name: str, changes: dict[str, Any]) -> Job[Any, Any]:
    """What was pickled."""
    import_module(module)
    known = registry[name]
    if not changes:
        return known
    job: Job[Any, Any] = Job.__new__(Job)
    job.__dict__.update(known.__dict__ | changes)
    return job


@dataclass(frozen=True)
class Signature(Generic[R]):
    """
    A call to be made later; made by ``job.s(...)`` and ``job.si(...)``.

    Can be pickled.
    """

    job: Job[Any, R]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    takes_result: bool = True
    """Whether the value of what came before, where anything did, is its first argument."""

    def __post_init__(self) -> None:
        if not self.takes_result:
            self.job._encode(self.args, self.kwargs, conf.settings_for().max_packet, traced=False)
            return
        if self.job.raw:
            if self.kwargs or len(self.args) > 1 or not all(isinstance(arg, bytes) for arg in self.args):
                raise TypeError(f"raw job {self.job.name} takes one bytes object, its workload")
            return
        try:
            bound = self.job._signature.bind_partial(*self.args, **self.kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{self.job.name}() {error}") from None
        for name, value in bound.items():
            refuse_unless_json(value, f"argument {name!r} of {self.job.name}")

    def __str__(self) -> str:
        given = [*map(repr, self.args), *(f"{name}={value!r}" for name, value in self.kwargs.items())]
        return f"{self.job.name}({', '.join(given)})"


_RESULTS: Final = f'"{continuations.RESULTS}"'.encode()


def _results_of(told: object) -> list[Any]:
    """
    The values of a group's members, for what follows it.

    Raises:
        GroupDoesNotExist: Somebody deleted them.
    """
    match told:
        case [int() as group, int() as first, int() as size] if min(group, first, size) >= 0:
            pass
        case _:
            raise TypeError(f"{continuations.RESULTS!r} of a workload is [group, first place, how many]")
    found = continuations.results_of(group, first, size, conf.settings_for().database)
    values = [_decode_result(*each) for each in found]
    if len(values) < size:
        raise GroupDoesNotExist(str(group))
    return values


def _insert(record: JobRecord, using: str) -> JobRecord:
    """Insert a record and tell a job server after the commit; the live one of its unique, if there is one."""
    if record.unique_key is not None:
        found = _insert_unless_there(record, using)
        if found is not None:
            return found
    else:
        rows.insert(record, using)
    _nudge_after_commit(using)
    return record


def _insert_unless_there(record: JobRecord, using: str) -> JobRecord | None:
    """Insert a record with a unique; the live record that has it already, if there is one."""
    live = JobRecord.objects.using(using).filter(unique_key=record.unique_key)
    for _ in range(20):
        found = live.first()
        if found is not None:
            return found
        try:
            with transaction.atomic(using=using):
                rows.insert(record, using)
        except IntegrityError:
            # Somebody was quicker. A snapshot of ours may not show it, which a lock does.
            if connections[using].features.has_select_for_update:
                with transaction.atomic(using=using):
                    found = live.select_for_update().first()
                if found is not None:
                    return found
            continue
        return None
    raise JobResultDoesNotExist(f"of unique {record.unique}")


def _decode_result(name: str, data: bytes) -> object:
    """A result of a ``@job``; the bytes themselves for a raw one, known or not."""
    known = registry.get(name)
    if known is not None and known.raw:
        return data
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return data


def _refuse_wrong_zone(name: str, moment: datetime) -> None:
    from django.conf import settings

    if settings.USE_TZ and timezone.is_naive(moment):
        raise InvalidJob(
            f"run_after of {name} must be an aware datetime, such as timezone.now() + timedelta(hours=1)"
        )
    if not settings.USE_TZ and timezone.is_aware(moment):
        raise InvalidJob(f"run_after of {name} must be a naive datetime, since USE_TZ is off")


# The decorator. The callable classes make the overloads tell `async def` from `def`.


class _TakesContext(Protocol):
    @overload
    def __call__(
        self, function: Callable[Concatenate[JobContext, P], Coroutine[Any, Any, R]], /
    ) -> Job[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[JobContext, P], R], /) -> Job[P, R]: ...


class _TakesNone(Protocol):
    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> Job[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Job[P, R]: ...


@overload
def job(function: Callable[P, Coroutine[Any, Any, R]], /) -> Job[P, R]: ...
@overload
def job(function: Callable[P, R], /) -> Job[P, R]: ...
@overload
def job(*, takes_context: Literal[True], **options: Unpack[JobOptions]) -> _TakesContext: ...
@overload
def job(*, takes_context: Literal[False] = ..., **options: Unpack[JobOptions]) -> _TakesNone: ...
def job(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """
    Make a function a job: ``@job``, or ``@job(queue_name="video", ...)``.

    Args:
        name: The function's name on the wire; its import path by default.
        raw: The function takes and returns bytes, for programs in other languages.
        queue_name: Workers can be told which queues to serve.
        priority: -100 to 100, higher first; on the wire below, at or above 0 is low, normal or high.
        schedule: When job servers make jobs of it by themselves: ``cron(...)``, ``every(...)``, or several.
        takes_context: The function's first argument is a ``JobContext`` named ``context``.
        max_attempts: How often it is run at the most, when it raises or its worker is lost. Without
            it, only a lost worker or ``Retry`` makes another attempt, up to ``JOB_RETRIES``.
        backoff: Called with the exception and the ``JobResult``; seconds until the next
            attempt, or None for none. By default about 2, 4, 8, ... up to an hour.
        unique: While a job with the same is to do, a submission is that one: a name of an argument,
            several, or a function of the arguments that returns a str.
        rate_limit: How many may begin in any period, over all workers and servers: ``"10/m"``, ``"5/30s"``;
            s, m, h or d.
        concurrency: How many may run at once, over all workers and servers.
        limit_key: Lets both hold for each key by itself: a name of an argument, several, or a function
            of the arguments that returns a str.
        timeout: Seconds that one attempt may take; then ``JobTimedOut`` is raised in it, and its
            process is killed soon after if it goes on. The setting ``JOB_TIMEOUT`` by default.
    Raises:
        InvalidJob: The function cannot be that, or the name is taken.
    """
    if function is None:
        return partial(_register, **options)
    return _register(function)


def _register(function: Callable[..., Any], **options: Any) -> Job[Any, Any]:
    try:
        made: Job[Any, Any] = Job(function, **options)
    except (TypeError, ValueError) as error:
        if isinstance(error, InvalidJob):
            raise
        raise InvalidJob(f"@job of {function.__qualname__}: {error}") from error
    known = registry.get(made.name)
    if known is not None and _origin(known) != _origin(made):
        raise InvalidJob(
            f"two jobs are named {made.name!r}: {_origin(known)} and {_origin(made)}; give one another name="
        )
    registry[made.name] = made
    return made


def _origin(made: Job[Any, Any]) -> str:
    return f"{made.function.__module__}.{made.function.__qualname__}"


registry: dict[str, Job[Any, Any]] = {}
"""Every job of the process, by its name on the wire."""


def queue_of(function: str) -> str:
    """The queue of a function; "default" for those that are not ours."""
    known = registry.get(function)
    return known.queue_name if known is not None else "default"


# Schedules.


def declared_schedules() -> dict[str, tuple[str, schedules.Declaration]]:
    """{name of its row: (function, declaration)} of every schedule of the process."""
    return {
        declaration.row_name(made.name): (made.name, declaration)
        for made in registry.values()
        for declaration in made.schedules
    }


def scheduled_record(schedule: Schedule) -> JobRecord:
    """
    An unsaved record of the job that a schedule asks for.

    A raw job gets its one argument, which JSON can only carry as text, in UTF-8.

    Raises:
        TypeError: The arguments do not fit the function.
        ValueError: They are too large.
    """
    made = registry.get(schedule.function)
    options = conf.settings_for()
    args, kwargs = tuple(schedule.args), schedule.kwargs
    if made is None:
        # Some worker's, in whatever language.
        workload = dumps({"args": args, "kwargs": kwargs})
        record = JobRecord(function=schedule.function, workload=workload)
    else:
        if made.raw:
            args = tuple(arg.encode() if isinstance(arg, str) else arg for arg in args or ("",))
        record = made._new_record(args, kwargs, options)
    if schedule.queue_name:
        record.queue_name = schedule.queue_name
    if schedule.priority is not None:
        record.priority = schedule.priority
    return record


# Limits.


def declared_limits() -> dict[str, dict[str, Any]]:
    """{function: what its row says} of every limited job of the process."""
    return {
        made.name: {
            "rate": made.rate_limit.strip(),
            "concurrency": made.concurrency,
            "by_key": made.limit_key is not None,
        }
        for made in registry.values()
        if made.rate_limit or made.concurrency is not None
    }


# What a worker runs.


class Assigned(Reports, Protocol):
    """A job as the worker's loop hands it over."""

    @property
    def handle(self) -> bytes: ...
    @property
    def unique(self) -> bytes: ...
    @property
    def workload(self) -> bytes: ...
    @property
    def attempt(self) -> int: ...
    @property
    def max_attempts(self) -> int | None: ...
    @property
    def may_return(self) -> bool: ...
    def as_told(self, error: BaseException) -> BaseException: ...

    decision: tuple[float | None] | None
    """What ``pause_before_retry`` has said of it; None before."""


def perform_assigned(job: Job[Any, Any], assigned: Assigned) -> bytes:
    """Run an assigned job, with the database connections tended as around a request."""
    # As reset_queries() and close_old_connections(), with one look at them: most jobs use none.
    for connection in connections.all(initialized_only=True):
        connection.queries_log.clear()
        connection.close_if_unusable_or_obsolete()
    try:
        return attempt_assigned(job, assigned)
    except (JobTimedOut, JobCancelled):
        # It may have been in the middle of a query.
        connections.close_all()
        raise
    finally:
        close_old_connections()


def attempt_assigned(job: Job[Any, Any], assigned: Assigned) -> bytes:
    """Run an assigned job, on the database connections as they are."""
    attempt = _Attempt(job, assigned)
    with closing(attempt.context), logs.logging_as(attempt.context), attempt.traced():
        attempt.tell_start()
        try:
            result = job.perform(assigned.workload, attempt.context, run=_run_on_kept_loop)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            attempt.tell_failure(error)
            raise
        attempt.tell_success()
        return result


class _Attempt:
    """
    What is around one run of an assigned job: its context, its log and trace, and its signals.

    At the end of the context all that was held back leaves.
    """

    def __init__(self, job: Job[Any, Any], assigned: Assigned) -> None:
        self._job = job
        self._assigned = assigned
        # Who listens for one function names it by the decorated one.
        self._sender = registry.get(job.name, job)
        self._began = 0.0
        logs.install()
        self.context = JobContext(
            assigned.handle.decode(errors="replace"),
            assigned.unique.decode(errors="replace"),
            assigned,
            assigned.attempt,
            assigned.max_attempts or job.max_attempts,
            job.name,
        )

    def traced(self) -> AbstractContextManager[object]:
        """A span of the trace that the job comes with."""
        workload = b"" if self._job.raw else self._assigned.workload
        return tracing.continued(self._job.name, workload, self.context.handle)

    def tell_start(self) -> None:
        self._began = time.monotonic()
        signals.job_started.send_robust(self._sender, context=self.context)

    def tell_success(self) -> None:
        self._tell(signals.job_finished, exception=None)

    def tell_failure(self, error: BaseException) -> None:
        """Decide on another attempt, once and for all, and tell; inside of ``except``."""
        error = self._assigned.as_told(error)
        pause = None
        if self._assigned.may_return and not isinstance(error, JobCancelled):
            pause = pause_before_retry(self._job, self._assigned, error)
        self._assigned.decision = (pause,)
        if pause is None:
            self._tell(signals.job_finished, exception=error)
        else:
            self._tell(signals.job_retried, exception=error, pause=pause)

    def _tell(self, signal: Signal, **arguments: Any) -> None:
        seconds = time.monotonic() - self._began
        signal.send_robust(self._sender, context=self.context, seconds=seconds, **arguments)


async def aperform_assigned(job: Job[Any, Any], assigned: Assigned) -> bytes:
    """
    Run an assigned ``async def``, with the connections tended that its ``sync_to_async`` uses.

    Receivers of signals, and what decides on another attempt, may query: they run beside the event loop.
    """
    attempt = _Attempt(job, assigned)
    await sync_to_async(_tend_connections)()
    try:
        with closing(attempt.context), logs.logging_as(attempt.context), attempt.traced():
            await sync_to_async(attempt.tell_start)()
            try:
                result = await job.aperform(assigned.workload, attempt.context)
            except BaseException as error:
                await sync_to_async(attempt.tell_failure)(error)
                raise
            await sync_to_async(attempt.tell_success)()
            return result
    finally:
        await sync_to_async(_tend_connections)()


def _tend_connections() -> None:
    reset_queries()
    for connection in connections.all(initialized_only=True):
        # Of the jobs that share this thread, one may be in the middle of a transaction.
        if not connection.in_atomic_block:
            connection.close_if_unusable_or_obsolete()


_kept = threading.local()


def _run_on_kept_loop(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run an ``async def`` on the event loop of the thread, so that jobs can share what they open there."""
    loop: asyncio.AbstractEventLoop | None = getattr(_kept, "loop", None)
    if loop is None:
        loop = _kept.loop = asyncio.new_event_loop()
    task = loop.create_task(coroutine)
    try:
        return loop.run_until_complete(task)
    except BaseException:
        if not task.done():
            # The loop was interrupted: the function is to hear of it, too.
            task.cancel()
            loop.run_until_complete(asyncio.wait([task]))
        raise


def pause_before_retry(job: Job[Any, Any], assigned: Assigned, error: BaseException) -> float | None:
    """
    What becomes of a job that raised: seconds until its next attempt, or None when it has failed.

    The job's own ``max_attempts`` counts; only ``Retry`` has attempts without.
    """
    if assigned.decision is not None:
        # Receivers of signals were told.
        return assigned.decision[0]
    if isinstance(error, Discard):
        return None
    budget = assigned.max_attempts or job.max_attempts
    if budget is None:
        budget = conf.settings_for().job_retries if isinstance(error, Retry) else 1
    if 0 < budget <= assigned.attempt:
        return None
    if isinstance(error, Retry) and error.after is not None:
        return max(error.after, 0.0)
    if job.backoff is None:
        return exponential(assigned.attempt)
    try:
        pause = job.backoff(error, _result_of(job, assigned))
        if isinstance(pause, timedelta):
            pause = pause.total_seconds()
        return None if pause is None else max(float(pause), 0.0)
    except Exception:
        logger.exception("The backoff of %s failed; its default is taken", job.name)
        return exponential(assigned.attempt)


def _result_of(job: Job[Any, Any], assigned: Assigned) -> JobResult[Any]:
    handle = assigned.handle.decode(errors="replace")
    record = JobRecord.objects.using(conf.settings_for().database).filter(handle=handle).first()
    if record is None:
        # It came over the wire, to a server that keeps no records here.
        record = JobRecord(function=job.name, handle=handle)
    # The server writes it a moment later.
    record.attempts = assigned.attempt
    return JobResult(record)


# The wire door, after the commit.


def _submit(record: JobRecord) -> None:
    client = client_for()
    function, workload, unique = record.function, bytes(record.workload), record.unique
    if record.status == JobRecord.Status.SCHEDULED:
        assert record.run_after is not None, "scheduled for a moment"
        record.handle = client.do_epoch(function, workload, epoch=record.run_after.timestamp(), unique=unique)
    elif record.priority > 0:
        record.handle = client.do_high_background(function, workload, unique=unique)
    elif record.priority < 0:
        record.handle = client.do_low_background(function, workload, unique=unique)
    else:
        record.handle = client.do_background(function, workload, unique=unique)


def _submit_many(records: list[JobRecord]) -> None:
    client = client_for()
    added = []
    for record in records:
        if record.status == JobRecord.Status.SCHEDULED:
            _submit(record)
            continue
        add = client.add_task_background
        if record.priority:
            add = client.add_task_high_background if record.priority > 0 else client.add_task_low_background
        added.append((record, add(record.function, bytes(record.workload), unique=record.unique)))
    client.run_tasks()
    for record, task in added:
        record.handle = task.handle or None
    for _, task in added:
        task.result()


# Why nobody came, and the end of what nobody wants any more.


def _admins() -> Generator[AdminClient, None, None]:
    """Each job server, to ask or tell in a hurry."""
    options = conf.settings_for()
    for server in options.servers:
        timeout = min(options.connect_timeout, EXPLANATION_TIMEOUT)
        with AdminClient(
            server, connect_timeout=timeout, timeout=timeout, tls=conf.client_tls(options)
        ) as admin:
            yield admin


def _timed_out(what: str, timeout: float, function: str, using: str | None) -> ResponseTimeout:
    """What ``get`` raises: with the reason, when it is that nobody can run the job."""
    error = ResponseTimeout(what, timeout)
    asked = 0
    for admin in _admins():
        try:
            rows = admin.status()
        except GearmanError:
            continue
        asked += 1
        if any(row.name == function and row.workers for row in rows):
            return error
    servers = ", ".join(conf.settings_for().servers)
    if not asked:
        error.add_note(f"No job server answers at {servers}; is `manage.py gearman_server` running?")
        return error
    ready = JobRecord.objects.using(using).filter(function=function, status=JobRecord.Status.READY)
    return NoWorker(what, timeout, function=function, waiting=max(ready.count(), 1), server=servers)


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
        _nudge_after_commit(using)
    return cancelled


def cancel_all(results: Iterable[JobResult[Any]], limit: float) -> tuple[int, int]:
    """
    Cancel jobs at once; how many were, and how many are only asked to be after ``limit`` seconds.

    Those that ended before, or whose records are gone, are in neither.
    """
    deadline = monotonic() + limit
    asked = []
    for result in results:
        try:
            if result._ask_to_cancel():
                asked.append(result)
        except JobResultDoesNotExist:
            continue
    done = waiting = 0
    for result in asked:
        try:
            if not result._wait_for_cancelled(deadline):
                waiting += 1
            elif not result.is_finished or result.status == JobRecord.Status.CANCELLED:
                done += 1
        except JobResultDoesNotExist:
            continue
    return done, waiting


def _cancel_by_wire(handle: str) -> bool:
    """
    Whether one of the job servers had the job, and has ended it.

    Raises:
        ServerError: One of ours may have it, and takes the command from its own machine alone.
    """
    refusal: ServerError | None = None
    for admin in _admins():
        try:
            admin.cancel(handle)
        except ServerError as error:
            if error.code == "PERMISSION_DENIED":
                refusal = error
        except (GearmanError, ValueError):
            continue
        else:
            return True
    if refusal is not None:
        raise refusal
    return False


# The nudge: rows wait at the database door.


@cache
def client_for(alias: str = conf.DEFAULT_ALIAS) -> Client:
    """The process's client for an alias of ``settings.GEARMAN``."""
    options = conf.settings_for(alias)
    return Client(
        options.servers,
        spread=options.spread,
        connect_timeout=options.connect_timeout,
        timeout=options.timeout,
        max_packet=options.max_packet,
        tls=conf.client_tls(options),
    )


@cache
def async_client_for(alias: str = conf.DEFAULT_ALIAS) -> AsyncClient:
    """The process's client for asyncio; it has connections for each event loop."""
    options = conf.settings_for(alias)
    return AsyncClient(
        options.servers,
        spread=options.spread,
        connect_timeout=options.connect_timeout,
        timeout=options.timeout,
        max_packet=options.max_packet,
        tls=conf.client_tls(options),
    )


def _nudge() -> None:
    client_for().claim()


def _nudge_after_commit(using: str) -> None:
    waiting = transaction.get_connection(using).run_on_commit
    # One nudge is enough for all rows of a transaction. The last entry is of this
    # savepoint or of one around it: when this row survives, so does its nudge.
    if not waiting or waiting[-1][1] is not _nudge:
        transaction.on_commit(_nudge, using=using, robust=True)


@cache
def _identity(pid: int) -> str:
    return f"{socket.gethostname()[:100]}:{pid}"


@receiver(setting_changed)
def _forget_clients(*, setting: str, **kwargs: Any) -> None:
    if setting == "GEARMAN":
        if client_for.cache_info().currsize:
            # A connection that is left to the garbage collector makes a ResourceWarning.
            client_for().close()
        client_for.cache_clear()
        # Its connections end with their event loops.
        async_client_for.cache_clear()
