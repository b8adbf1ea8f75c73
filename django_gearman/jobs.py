"""
``@job``: a function that can be run elsewhere.

The decorator registers a function under a name and gives it ``enqueue`` (the
database door: a row in the caller's transaction), ``run`` (a foreground job:
wait for the value) and ``call`` (here and now). Arguments and results travel
as JSON, ``{"args": [...], "kwargs": {...}}``, or as plain bytes for ``raw``
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
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache, partial, update_wrapper
from time import monotonic, sleep
from typing import (
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
from django.dispatch import receiver
from django.utils import timezone

from . import conf, schedules
from .client.admin_client import AdminClient
from .client.sync import Client
from .encoding import dumps, exception_of, refuse_unless_json
from .exceptions import (
    ConnectionFailed,
    Discard,
    GearmanError,
    InvalidJob,
    JobCancelled,
    JobFailed,
    JobNotFinished,
    JobResultDoesNotExist,
    JobResultMismatch,
    JobTimedOut,
    ResponseTimeout,
    ResultNotKept,
    Retry,
    WaitInTransaction,
)
from .models import JobRecord, Schedule, unique_key_of

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

MIN_PRIORITY: Final = -100
MAX_PRIORITY: Final = 100

PROGRESS_INTERVAL: Final = 0.1
"""Seconds between two progress reports of one job; the last one is always sent."""


class Reports(Protocol):
    """What a running job can tell; the worker's ``AssignedJob``, or nobody when it is called in-process."""

    def send_status(self, numerator: int, denominator: int) -> None: ...
    def send_data(self, data: bytes) -> None: ...
    def send_warning(self, data: bytes) -> None: ...
    @property
    def cancelled(self) -> bool: ...


class JobContext:
    """
    The first argument of a job with ``takes_context=True``: its line to whoever waits.

    Attributes:
        handle: The Gearman handle; empty when the function was called in-process.
        unique: The submitter's key, empty when it gave none.
        attempt: Which attempt this is, from 1; with ``handle`` it tells a second run from the first.
        max_attempts: How many there are; None when the job has no number of its own.

    A job that an orderly stop puts back before its end begins the same attempt again.
    """

    def __init__(
        self,
        handle: str = "",
        unique: str = "",
        reports: Reports | None = None,
        attempt: int = 1,
        max_attempts: int | None = None,
    ) -> None:
        self.handle = handle
        self.unique = unique
        self.attempt = attempt
        self.max_attempts = max_attempts
        self._reports = reports
        self._reported_at = -math.inf
        self._unreported: tuple[int, int] | None = None

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

        Waiting clients and the admin see it. Cheap enough for an inner loop:
        no more than ten a second leave, and the last one always does.
        """
        self._unreported = (numerator, denominator)
        if numerator >= denominator or monotonic() - self._reported_at >= PROGRESS_INTERVAL:
            self.flush()

    def send_data(self, data: bytes | str) -> None:
        """Send a part of the result to the clients that wait; it is not kept."""
        if self._reports is not None:
            self._reports.send_data(_as_bytes("send_data", data))

    def warn(self, data: bytes | str) -> None:
        """Send a warning to the clients that wait; it is not kept."""
        if self._reports is not None:
            self._reports.send_warning(_as_bytes("warn", data))

    def flush(self) -> None:
        """Send progress that was held back."""
        if self._unreported is not None and self._reports is not None:
            self._reports.send_status(*self._unreported)
            self._reported_at = monotonic()
        self._unreported = None


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

    def __repr__(self) -> str:
        return f"<JobResult {self.id} {self._record.function} {self.status}>"

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
            self._record.refresh_from_db(fields=_STANDING)
        except JobRecord.DoesNotExist:
            raise JobResultDoesNotExist(self.id) from None

    def get(self, timeout: float | None = None) -> R:
        """
        Wait for the end, and return what the function returned.

        Args:
            timeout: Seconds to wait; None to wait for ever.
        Raises:
            JobFailed: It ended without a value; the attributes say why.
            ResponseTimeout: The time was up; the job goes on.
            WaitInTransaction: A transaction is open that hides the job.
        """
        deadline = None if timeout is None else monotonic() + timeout
        pause = 0.001
        self.refresh()
        while not self.is_finished:
            if transaction.get_connection(self._record._state.db).in_atomic_block:
                raise WaitInTransaction(self._name)
            left = math.inf if deadline is None else deadline - monotonic()
            if left <= 0:
                raise ResponseTimeout(f"job {self._name}", timeout or 0.0)
            sleep(min(pause, left))
            pause = min(pause * 1.5, 0.25)
            self.refresh()
        return self.return_value

    def cancel(self) -> bool:
        """
        End the job, as ``CANCELLED``; False when it has ended already.

        A worker of ours that runs it is told: ``JobCancelled`` is raised in the
        function, and its process is killed if it goes on. What any worker says
        of the job is passed over.

        Raises:
            ConnectionFailed: The job server that has it cannot be told.
            JobResultDoesNotExist: The record is gone.
        """
        waiting = JobRecord.objects.using(self._record._state.db).filter(
            pk=self._record.pk, server=None, status__in=JobRecord.LIVE
        )
        deadline = monotonic() + conf.settings_for().timeout
        while True:
            self.refresh()
            if self.is_finished:
                return False
            # What no server has claimed is nobody's; from then on it is that server's alone.
            cancelled = waiting.update(
                status=JobRecord.Status.CANCELLED,
                unique_key=None,
                finished_at=timezone.now(),
                message="Cancelled before a job server had it",
            )
            if cancelled or _cancel_by_wire(self.handle):
                break
            if monotonic() >= deadline:
                raise ConnectionFailed(
                    ", ".join(conf.settings_for().servers),
                    f"none of them has job {self._name}",
                    "is the job server that has it in SERVERS?",
                )
            sleep(0.05)
        # A job server writes it a moment later.
        pause = 0.001
        while monotonic() < deadline:
            self.refresh()
            if self.is_finished:
                break
            sleep(pause)
            pause = min(pause * 1.5, 0.25)
        return True

    @property
    def _name(self) -> str:
        return f"{self.id} ({self._record.function})"


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
        self.schedules = schedules.declarations(schedule)
        self.run_after: datetime | timedelta | None = None
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
        return cast(R, self._invoke(JobContext(), args, kwargs))

    def using(
        self,
        *,
        priority: int | None = None,
        run_after: datetime | timedelta | None = None,
        unique: str | None = None,
    ) -> Job[P, R]:
        """
        The same job with other options for the submissions made through it.

        Args:
            priority: -100 to 100, higher first.
            run_after: Not before this moment, or this long after the submission; datetimes
                are aware when ``USE_TZ`` is on, and naive when it is off.
            unique: While a job of this function with the same is to do, this is that one; empty for none.
        """
        other = Job.__new__(Job)
        other.__dict__.update(self.__dict__)
        if priority is not None:
            other.priority = priority
        if run_after is not None:
            other.run_after = run_after
        if unique is not None:
            other.unique = lambda *args, **kwargs: unique
        other._validate()
        return other

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
            return WireJobResult(record)
        if record.unique_key is not None:
            found = _insert_unless_there(record, options.database)
            if found is not None:
                return JobResult(found)
        else:
            record.save(using=options.database, force_insert=True)
        _nudge_after_commit(options.database)
        return JobResult(record)

    def _unique_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """What a submission has in common with those that it is to be one with; empty for nothing."""
        if self.unique is None:
            return ""
        if callable(self.unique):
            unique: object = self.unique(*args, **kwargs)
            if not isinstance(unique, str):
                raise TypeError(f"the unique of {self.name} must be a str, not {unique!r}")
        else:
            names = [self.unique] if isinstance(self.unique, str) else list(self.unique)
            bound = self._signature.bind(*args, **kwargs)
            bound.apply_defaults()
            unique = dumps([bound.arguments[name] for name in names]).decode()
        unique = unique.strip()
        return unique if len(unique.encode()) <= MAX_UNIQUE else hashlib.sha256(unique.encode()).hexdigest()

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
        workload = self._encode(args, kwargs, options.max_packet)
        unique = self._unique_of(args, kwargs)
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
        options = conf.settings_for()
        workload = self._encode(args, kwargs, options.max_packet)
        client = client_for()
        if self.priority > 0:
            do = client.do_high
        elif self.priority < 0:
            do = client.do_low
        else:
            do = client.do
        unique = self._unique_of(args, kwargs)
        try:
            result = do(self.name, workload, unique=unique, timeout=options.run_timeout)
        except JobFailed as error:
            told = exception_of(error.data)
            raise JobFailed(self.name, data=error.data, **told) from None
        return cast(R, result if self.raw else _decode_result(self.name, result))

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

    def _encode(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], limit: int) -> bytes:
        if self.raw:
            if kwargs or len(args) != 1 or not isinstance(args[0], bytes):
                raise TypeError(f"raw job {self.name} takes one bytes object, its workload")
            workload = args[0]
        else:
            bound = self._bind(args, kwargs)
            for name, value in bound.items():
                refuse_unless_json(value, f"argument {name!r} of {self.name}")
            workload = dumps({"args": args, "kwargs": kwargs})
        if len(workload) > limit:
            raise ValueError(
                f"the arguments of {self.name} take {len(workload)} bytes, more than MAX_PACKET={limit}; "
                "pass a reference, such as a key or a path"
            )
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
        except (ValueError, TypeError, KeyError, RecursionError):
            is_envelope = False
        if not is_envelope:
            raise TypeError(
                f"the workload of {self.name} must be JSON of the form "
                '{"args": [...], "kwargs": {...}}; declare the job with raw=True to take any bytes'
            )
        return tuple(args), kwargs

    def _inspect(self) -> inspect.Signature:
        signature = inspect.signature(self.function)
        if not self.takes_context:
            return signature
        names = list(signature.parameters)
        if not names or names[0] != "context":
            raise InvalidJob(f"{self.name} has takes_context=True: its first argument must be `context`")
        return signature.replace(parameters=[signature.parameters[name] for name in names[1:]])

    def _validate_unique(self) -> None:
        unique: object = self.unique
        if unique is None or callable(unique):
            return
        names = [unique] if isinstance(unique, str) else unique
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise InvalidJob(
                f"unique of {self.name} must be a name of an argument, several, or a function, not {unique!r}"
            )
        known = self._signature.parameters
        for name in names:
            if self.raw or name not in known:
                has = "its workload, bytes" if self.raw else ", ".join(known) or "none"
                raise InvalidJob(
                    f"unique of {self.name} names {name!r}, which is no argument that JSON can carry "
                    f"(it has {has})"
                )

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
        self._validate_unique()
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


def _insert_unless_there(record: JobRecord, using: str) -> JobRecord | None:
    """Insert a record with a unique; the live record that has it already, if there is one."""
    live = JobRecord.objects.using(using).filter(unique_key=record.unique_key)
    for _ in range(20):
        found = live.first()
        if found is not None:
            return found
        try:
            with transaction.atomic(using=using):
                record.save(using=using, force_insert=True)
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


def perform_assigned(job: Job[Any, Any], assigned: Assigned) -> bytes:
    """Run an assigned job, with the database connections tended as around a request."""
    reset_queries()
    close_old_connections()
    try:
        return job.perform(assigned.workload, _context(job, assigned), run=_run_on_kept_loop)
    except (JobTimedOut, JobCancelled):
        # It may have been in the middle of a query.
        connections.close_all()
        raise
    finally:
        close_old_connections()


async def aperform_assigned(job: Job[Any, Any], assigned: Assigned) -> bytes:
    """Run an assigned ``async def``, with the connections tended that its ``sync_to_async`` uses."""
    await sync_to_async(_tend_connections)()
    try:
        return await job.aperform(assigned.workload, _context(job, assigned))
    finally:
        await sync_to_async(_tend_connections)()


def _tend_connections() -> None:
    reset_queries()
    for connection in connections.all(initialized_only=True):
        # Of the jobs that share this thread, one may be in the middle of a transaction.
        if not connection.in_atomic_block:
            connection.close_if_unusable_or_obsolete()


def _context(job: Job[Any, Any], assigned: Assigned) -> JobContext:
    return JobContext(
        assigned.handle.decode(errors="replace"),
        assigned.unique.decode(errors="replace"),
        assigned,
        assigned.attempt,
        assigned.max_attempts or job.max_attempts,
    )


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


def _cancel_by_wire(handle: str) -> bool:
    """Whether one of the job servers had the job, and has ended it."""
    options = conf.settings_for()
    for server in options.servers:
        admin = AdminClient(server, connect_timeout=options.connect_timeout, tls=conf.client_tls(options))
        try:
            admin.cancel(handle)
        except (GearmanError, ValueError):
            continue
        finally:
            admin.close()
        return True
    return False


# The nudge: rows wait at the database door.


@cache
def client_for(alias: str = conf.DEFAULT_ALIAS) -> Client:
    """The process's client for an alias of ``settings.GEARMAN``."""
    options = conf.settings_for(alias)
    return Client(
        options.servers,
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
