"""
One attempt at a job, as a worker's process makes it.

What is around the function: database connections, context, log, trace and
signals; and what becomes of the job when it raises. How a job reads its
workload is in ``jobs.py``, how the worker interrupts it in ``worker/pool.py``.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Coroutine
from contextlib import AbstractContextManager, closing
from datetime import timedelta
from typing import Any, Final, Protocol

from asgiref.sync import sync_to_async
from django.db import close_old_connections, connections, reset_queries
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from django.dispatch import Signal

from . import conf, logs, signals, tracing
from .context import JobContext, Reports
from .exceptions import Discard, JobCancelled, JobTimedOut, Retry, TooLarge
from .job_options import exponential
from .jobs import Job, RunCoroutine
from .models import JobRecord
from .registry import registry
from .results import JobResult

logger = logging.getLogger(__name__)

LONGEST_SHARED: Final = 60.0
"""Seconds past its ``CONN_MAX_AGE`` after which a connection that always has a job takes no more."""

MOST_PAUSE: Final = 10 * 365 * 86_400.0
"""Seconds until the next attempt at the most, as the job server has it."""


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
    @property
    def hears_interrupts(self) -> bool: ...
    def end_copy(self, failure: BaseException | None = None) -> None: ...
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


def attempt_assigned(job: Job[Any, Any], assigned: Assigned, *, run: RunCoroutine | None = None) -> bytes:
    """
    Run an assigned job, on the database connections as they are.

    Args:
        run: Runs the coroutine of an ``async def``; None for the event loop of the thread, tended.
    """
    attempt = _Attempt(job, assigned)
    with closing(attempt.context), logs.logging_as(attempt.context), attempt.traced():
        attempt.tell_start()
        try:
            result = job.perform(assigned.workload, attempt.context, run=run or _run_on_kept_loop)
            assigned.end_copy()
            refuse_too_large(job, assigned, result)
        except BaseException as error:
            assigned.end_copy(error)
            if not (isinstance(error, KeyboardInterrupt) and assigned.hears_interrupts):
                mend_connections(error)
                attempt.tell_failure(error)
            raise
        attempt.tell_success()
        return result


def refuse_too_large(job: Job[Any, Any], assigned: Assigned, result: bytes) -> None:
    """Raise the ``TooLarge`` with which a job ends whose result fits in no packet."""
    limit = conf.settings_for().max_packet
    if len(result) + len(assigned.handle) + 1 > limit:
        # Another attempt would take as long, and end the same.
        assigned.decision = (None,)
        what, remedy = f"the result of {job.name}", "store it, and return a reference"
        raise TooLarge(what, len(result), limit, setting="MAX_PACKET", remedy=remedy)


def mend_connections(error: BaseException) -> None:
    """Close what a failed function left broken: its ``backoff`` and receivers of signals may query."""
    is_interrupted = isinstance(error, JobTimedOut | JobCancelled)
    for connection in connections.all(initialized_only=True):
        # That of a test, with its own transaction around the job, stays.
        if connection.connection is None or connection.in_atomic_block:
            continue
        if is_interrupted:
            # It may have been in the middle of a query.
            connection.close()
        elif connection.errors_occurred or not _is_plain(connection):
            connection.close_if_unusable_or_obsolete()


def _is_plain(connection: BaseDatabaseWrapper) -> bool:
    """Whether an open connection is in no transaction that its user began by hand."""
    return bool(connection.get_autocommit() == connection.settings_dict["AUTOCOMMIT"])


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
        pause = pause_after(self._job, self._assigned, error)
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
    guest = object()
    _guests.add(guest)
    try:
        await sync_to_async(_tend_connections)(guest)
        with closing(attempt.context), logs.logging_as(attempt.context), attempt.traced():
            await sync_to_async(attempt.tell_start)()
            try:
                result = await job.aperform(assigned.workload, attempt.context)
                refuse_too_large(job, assigned, result)
            except BaseException as error:
                await sync_to_async(_tell_beside)(attempt, error)
                raise
            await sync_to_async(attempt.tell_success)()
            return result
    finally:
        _guests.discard(guest)
        await sync_to_async(_tend_connections)(guest)


def _tell_beside(attempt: _Attempt, error: BaseException) -> None:
    mend_shared_connections(error)
    attempt.tell_failure(error)


def mend_shared_connections(error: BaseException) -> None:
    """``mend_connections`` for a coroutine job, in the thread of ``sync_to_async``."""
    if len(_guests) < 2:
        mend_connections(error)
        return
    for connection in connections.all(initialized_only=True):
        if connection.connection is not None and not connection.in_atomic_block:
            _tend_shared(connection, set(_guests))


_guests: Final[set[object]] = set()
"""A mark of each coroutine job under way: they share the thread of ``sync_to_async`` and its connections."""


class _Aside(threading.local):
    """Connections of a thread that are left to the jobs which may be in the middle of a query there."""

    def __init__(self) -> None:
        self.connections: dict[str, tuple[BaseDatabaseWrapper, set[object]]] = {}
        """{alias: (connection, marks of those jobs)}; one of an alias at a time."""


_aside = _Aside()


def _tend_connections(guest: object) -> None:
    """
    Before and after a coroutine job: in the thread of ``sync_to_async``, so that nobody queries meanwhile.

    Whether another job is in the middle of a query, as between two chunks of
    ``aiterator()``, does not show. Only who is alone closes what still works.
    """
    reset_queries()
    others = _guests - {guest}
    for connection in connections.all(initialized_only=True):
        # One may be in the middle of a transaction.
        if connection.in_atomic_block:
            continue
        if not others:
            connection.close_if_unusable_or_obsolete()
        elif connection.connection is not None:
            _tend_shared(connection, others)
    for alias, (connection, users) in list(_aside.connections.items()):
        if users.isdisjoint(_guests):
            del _aside.connections[alias]
            connection.close()


def _tend_shared(connection: BaseDatabaseWrapper, others: set[object]) -> None:
    """Close what is broken; leave what has long been obsolete to the jobs that may be at a query there."""
    connection.health_check_done = False  # type: ignore[attr-defined]  # as CONN_HEALTH_CHECKS has it
    if connection.errors_occurred:
        if not connection.is_usable():
            connection.close()
            return
        connection.errors_occurred = False
    # A worker that always has a job would keep it for ever. From here on each query gets another.
    is_old = connection.close_at is not None and time.monotonic() >= connection.close_at + LONGEST_SHARED
    if is_old and _is_plain(connection) and connection.alias not in _aside.connections:
        _aside.connections[connection.alias] = connection, others
        del connections[connection.alias]


_kept = threading.local()


def _run_on_kept_loop(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run an ``async def`` on the event loop of the thread, so that jobs can share what they open there."""
    loop: asyncio.AbstractEventLoop | None = getattr(_kept, "loop", None)
    if loop is None:
        loop = _kept.loop = asyncio.new_event_loop()
    task = loop.create_task(_tended(coroutine))
    try:
        return loop.run_until_complete(task)
    except BaseException as error:
        if not task.done():
            # The loop was interrupted: the function is to hear of it, too.
            task.cancel()
            loop.run_until_complete(asyncio.wait([task]))
            # Of what was interrupted before its first step nothing was awaited.
            coroutine.close()
            if isinstance(error, JobTimedOut | JobCancelled) and not task.cancelled():
                # It goes on, as a `def` may that catches the error: what comes of it then is its end.
                return task.result()
        raise


async def _tended(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Await an ``async def``, with the connections tended that its ``sync_to_async`` uses."""
    guest = object()
    # In another thread of jobs there may be one, too.
    _guests.add(guest)
    try:
        if _opened_beside.is_set():
            await sync_to_async(_tend_beside)(guest)
        value = await coroutine
    except Exception:
        await _tend_after(guest)
        raise
    except BaseException:
        # What was interrupted may be at a query still, for which nobody is to wait: the next one tends.
        _guests.discard(guest)
        raise
    await _tend_after(guest)
    return value


async def _tend_after(guest: object) -> None:
    _guests.discard(guest)
    if _opened_beside.is_set():
        await sync_to_async(_tend_beside)(guest)


_opened_beside = threading.Event()
"""
Set while the thread of ``sync_to_async`` may have an open connection to a database.

To change threads takes longer than many a job: it is not done for nothing.
"""


def _note_connection(**kwargs: object) -> None:
    if threading.current_thread() is not threading.main_thread():
        _opened_beside.set()


connection_created.connect(_note_connection)


def _tend_beside(guest: object) -> None:
    _tend_connections(guest)
    if _aside.connections:
        return
    if all(connection.connection is None for connection in connections.all(initialized_only=True)):
        _opened_beside.clear()


def pause_after(job: Job[Any, Any], assigned: Assigned, error: BaseException) -> float | None:
    """``pause_before_retry`` for an error as it is told; None, too, where the server has no other attempt."""
    if not assigned.may_return or isinstance(error, JobCancelled):
        return None
    return pause_before_retry(job, assigned, error)


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
        return min(max(0.0, error.after), MOST_PAUSE)
    if job.backoff is None:
        return exponential(assigned.attempt)
    try:
        pause = job.backoff(error, _result_of(job, assigned))
        if isinstance(pause, timedelta):
            pause = pause.total_seconds()
        if pause is None:
            return None
        if not math.isfinite(pause):
            raise ValueError(f"it must return seconds, a timedelta or None, not {pause!r}")
        return min(max(float(pause), 0.0), MOST_PAUSE)
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
