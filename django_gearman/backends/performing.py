"""
A ``Task`` as the worker's ``Job``, and a ``JobRecord`` as a ``TaskResult``.

A task's function has its import path for a name on the wire. In another queue
than the one that it was declared for it is ``path@queue``, since workers choose
queues by the functions that they offer.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final, cast

from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import DatabaseError, InterfaceError, connections
from django.utils import timezone

from .. import conf
from ..attempts import mend_connections, mend_shared_connections, pause_after, refuse_too_large
from ..context import JobContext
from ..encoding import describe_exception, dumps, exception_of, refuse_unless_json
from ..exceptions import InvalidJob
from ..jobs import Job
from ..models import JobRecord
from ..registry import registry
from ..results import JobResult
from . import (
    GearmanBackend,
    GearmanTaskContext,
    InvalidTask,
    Task,
    TaskError,
    TaskResult,
    TaskResultDoesNotExist,
    TaskResultStatus,
    gearman_backends,
    is_queue_name,
    normalize_json,
    task_enqueued,
    task_finished,
    task_started,
)

logger = logging.getLogger(__name__)

_UNTOLD: Final = "django_gearman.exceptions.JobFailed"
"""The class of an error that no exception was the reason of, such as the loss of a worker."""

_STATUSES: Final = {
    JobRecord.Status.WAITING: TaskResultStatus.READY,
    JobRecord.Status.SCHEDULED: TaskResultStatus.READY,
    JobRecord.Status.READY: TaskResultStatus.READY,
    JobRecord.Status.RETRYING: TaskResultStatus.READY,
    JobRecord.Status.RUNNING: TaskResultStatus.RUNNING,
    JobRecord.Status.SUCCESSFUL: TaskResultStatus.SUCCESSFUL,
    JobRecord.Status.FAILED: TaskResultStatus.FAILED,
    JobRecord.Status.DEAD: TaskResultStatus.FAILED,
    JobRecord.Status.CANCELLED: TaskResultStatus.FAILED,
}


class TaskJob(Job[Any, Any]):
    """The function of a task, as a worker runs it."""

    def __init__(self, task: Task[Any, Any], queue_name: str) -> None:
        self.task = task
        backoff = getattr(task, "backoff", None)
        super().__init__(
            task.func,
            name=wire_name(task.module_path, queue_name, declared_for=task.queue_name),
            queue_name=queue_name,
            priority=int(task.priority),
            takes_context=task.takes_context,
            max_attempts=getattr(task, "max_attempts", None),
            timeout=getattr(task, "timeout", None),
            backoff=None if backoff is None else self._pause,
        )

    @property
    def backend(self) -> GearmanBackend:
        """Where the task is declared; the first of ours when that is another's."""
        own = gearman_backends()
        return next((backend for backend in own if backend.alias == self.task.backend), own[0])

    def refuse_misfit(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise the ``TypeError`` that says how the arguments do not fit the function."""
        self._bind(args, kwargs)

    def _pause(self, error: BaseException, result: JobResult[Any]) -> float | timedelta | None:
        """The task's ``backoff``; asked once of each exception, by the signals and by the worker."""
        pauses = error.__dict__.setdefault("_gearman_pauses", {})
        attempt = result.handle, result.attempts
        if attempt not in pauses:
            task_result = result_of(self.backend, self.task, result._record)
            pauses[attempt] = self.task.backoff(error, task_result)  # type: ignore[attr-defined]  # our ``Task``
        return cast("float | timedelta | None", pauses[attempt])

    def perform(self, workload: bytes, context: JobContext, **options: Any) -> bytes:
        """Run the function for a workload from the wire, and tell the receivers of Django's signals."""
        args, kwargs = self._decode(workload)
        result = self._running(context, args, kwargs)
        sender = type(self.backend)
        task_started.send_robust(sender, task_result=result)
        given: Any = GearmanTaskContext(task_result=result, job=context)
        try:
            value = as_json(self._invoke(given, args, kwargs, **options), f"the return value of {self.name}")
            encoded = self._encoded(value, context)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and _hears_interrupts(context):
                raise
            if self._note_failure(context, result, error, mend_connections):
                task_finished.send_robust(sender, task_result=result)
            raise
        _note_success(result, value)
        task_finished.send_robust(sender, task_result=result)
        return encoded

    async def aperform(self, workload: bytes, context: JobContext) -> bytes:
        """``perform`` of an ``async def``, on the event loop that runs."""
        args, kwargs = self._decode(workload)
        result = await sync_to_async(self._running)(context, args, kwargs)
        sender = type(self.backend)
        await task_started.asend_robust(sender, task_result=result)
        if self.takes_context:
            args = (GearmanTaskContext(task_result=result, job=context), *args)
        try:
            value = as_json(await self.function(*args, **kwargs), f"the return value of {self.name}")
            encoded = self._encoded(value, context)
        except BaseException as error:
            if await sync_to_async(self._note_failure)(context, result, error, mend_shared_connections):
                await task_finished.asend_robust(sender, task_result=result)
            raise
        _note_success(result, value)
        await task_finished.asend_robust(sender, task_result=result)
        return encoded

    def _encoded(self, value: Any, context: JobContext) -> bytes:
        """What ``as_json`` made of a return value, for the wire."""
        encoded = dumps(value)
        assigned: Any = context._reports
        if assigned is not None:
            refuse_too_large(self, assigned, encoded)
        context.flush()
        return encoded

    def _running(
        self, context: JobContext, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> TaskResult[Any, Any]:
        """The result as it is while the function runs, which its record will say a moment later."""
        record = self._find_record(context.handle) if context.handle else None
        now = timezone.now()
        if record is None:
            # A foreground job, or of a server that keeps no records here.
            record = JobRecord(function=self.name, handle=context.handle, enqueued_at=now)
            record.workload = dumps({"args": args, "kwargs": kwargs})
        # After a lost worker the server may not have written of that one, nor of this attempt.
        known = {record.attempts: record.worker}
        record.status = JobRecord.Status.RUNNING
        record.attempts = context.attempt
        record.worker = f"{socket.gethostname()}:{os.getpid()}"
        record.started_at = record.started_at or now
        record.last_attempted_at = now
        return result_of(self.backend, self.task, record, workers=known)

    def _find_record(self, handle: str) -> JobRecord | None:
        connection = connections[conf.settings_for().database]
        # Django hands on some of the driver's own errors as they are.
        driver: Any = connection.Database  # type: ignore[attr-defined]  # each backend has it
        try:
            return JobRecord.objects.using(connection.alias).filter(handle=handle).first()
        except (DatabaseError, InterfaceError, driver.Error) as error:
            # What the function needs is its own affair; it should not get a connection that is broken.
            logger.warning("The record of job %s (%s) cannot be read: %s", handle, self.name, error)
            if not connection.in_atomic_block:
                connection.close_if_unusable_or_obsolete()
            return None

    def _note_failure(
        self,
        context: JobContext,
        result: TaskResult[Any, Any],
        error: BaseException,
        mend: Callable[[BaseException], None],
    ) -> bool:
        """Write into the result what was raised; whether that is its end."""
        assigned: Any = context._reports
        if assigned is not None:
            mend(error)
            error = assigned.as_told(error)
        told = exception_of(describe_exception(error))
        result.errors.append(TaskError(exception_class_path=told["exception"], traceback=told["traceback"]))
        if assigned is not None and pause_after(self, assigned, error) is not None:
            object.__setattr__(result, "status", TaskResultStatus.READY)
            return False
        object.__setattr__(result, "status", TaskResultStatus.FAILED)
        object.__setattr__(result, "finished_at", timezone.now())
        return True


def _hears_interrupts(context: JobContext) -> bool:
    """Whether a KeyboardInterrupt comes from the terminal; without a worker, too."""
    assigned: Any = context._reports
    return assigned is None or bool(assigned.hears_interrupts)


def _note_success(result: TaskResult[Any, Any], value: Any) -> None:
    object.__setattr__(result, "_return_value", value)
    object.__setattr__(result, "status", TaskResultStatus.SUCCESSFUL)
    object.__setattr__(result, "finished_at", timezone.now())


def wire_name(path: str, queue_name: str, *, declared_for: str) -> str:
    """The name on the wire of a task's function in a queue."""
    return path if queue_name == declared_for else f"{path}@{queue_name}"


def register(task: Task[Any, Any], backends: Sequence[GearmanBackend]) -> None:
    """
    Have the task's function among those that workers offer: in its own queue, and in those of the backends.

    What ``using`` made of a task is no news. What is no name for a queue is left to the checks
    to tell of, which run when the apps are loaded.

    Raises:
        InvalidTask: Another function has its name.
    """
    known = registry.get(task.module_path)
    if known is not None and not isinstance(known, TaskJob):
        raise InvalidTask(f"{task.module_path} is the name of a @job; give that another name=")
    declared = known.task if isinstance(known, TaskJob) and known.function is task.func else task
    queues = {declared.queue_name: None} | {
        queue: None for backend in backends for queue in sorted(filter(is_queue_name, backend.queues))
    }
    for queue in queues:
        name = wire_name(declared.module_path, queue, declared_for=declared.queue_name)
        known = registry.get(name)
        if not isinstance(known, TaskJob) or known.function is not declared.func:
            try:
                registry[name] = TaskJob(declared, queue)
            except InvalidJob as error:
                raise InvalidTask(str(error)) from error


# At the caller.


def enqueue(
    backend: GearmanBackend, task: Task[Any, Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> TaskResult[Any, Any]:
    """Insert the task's record; ``backend.enqueue``, for a task that is valid."""
    job = _job_of(backend, task)
    path = task.module_path
    job.refuse_misfit(tuple(args), kwargs)
    args = [as_json(value, f"argument {name} of {path}") for name, value in enumerate(args, 1)]
    kwargs = {name: as_json(value, f"argument {name!r} of {path}") for name, value in kwargs.items()}
    given = job.using(priority=int(task.priority), run_after=_moment(task.run_after))
    # A queue without workers of its own is a label.
    given.queue_name = task.queue_name
    made = given.enqueue(*args, **kwargs)
    result = result_of(backend, task, made._record, id=made.id)
    task_enqueued.send(type(backend), task_result=result)
    return result


def get_result(backend: GearmanBackend, result_id: str) -> TaskResult[Any, Any]:
    """``backend.get_result``."""
    records = JobRecord.objects.using(conf.settings_for().database)
    try:
        record = records.get(pk=int(str(result_id)))
    except (TypeError, ValueError, OverflowError, JobRecord.DoesNotExist):
        raise TaskResultDoesNotExist(result_id) from None
    # The path was written by whoever submitted: it is looked up, not imported.
    known = registry.get(record.function)
    if not isinstance(known, TaskJob):
        raise TaskResultDoesNotExist(
            f"{result_id} is a job of {record.function}, which is no task that this process knows"
        )
    return result_of(backend, known.task, record)


def _job_of(backend: GearmanBackend, task: Task[Any, Any]) -> TaskJob:
    """The job of a task in the queue that it was given; its plain one when the backend has no such queue."""
    known = registry.get(task.module_path)
    if not isinstance(known, TaskJob) or known.function is not task.func:
        # Declared for another backend, outside of the modules that are looked through.
        register(task, [backend])
    plain = registry[task.module_path]
    declared_for = plain.queue_name
    name = wire_name(task.module_path, task.queue_name, declared_for=declared_for)
    found = registry.get(name, plain)
    assert isinstance(found, TaskJob), "register saw to it"
    return found


def _moment(run_after: datetime | None) -> datetime | None:
    if run_after is not None and not settings.USE_TZ and timezone.is_aware(run_after):
        return timezone.make_naive(run_after)
    return run_after


def as_json(value: object, what: str) -> Any:
    """
    A value as every backend of tasks hands it on: lists for tuples, text for bytes, keys as JSON has them.

    Raises:
        TypeError: JSON cannot carry it.
        ValueError: It has bytes that are no UTF-8, or a number that JSON has no word for.
    """
    try:
        return json.loads(json.dumps(normalize_json(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        try:
            refuse_unless_json(value, what)
        except TypeError as told:
            raise kind(f"{error}: {told}") from None
        raise


# A record as a result.


def result_of(
    backend: GearmanBackend,
    task: Task[Any, Any],
    record: JobRecord,
    *,
    id: str = "",
    workers: Mapping[int, str] = {},
) -> TaskResult[Any, Any]:
    """
    What a record tells, in Django's words.

    Args:
        task: As it was declared; the record has the options that it was enqueued with.
        id: The result's id, where it is not the record's.
        workers: Who made attempts of which the record tells nothing, by their number.
    """
    past = {}
    if not record._state.adding and _is_retried(record):
        past = {
            attempt.number: attempt
            for attempt in record.past_attempts.db_manager(record._state.db).order_by("number")
        }
    errors = [_error(attempt.exception, attempt.message, attempt.traceback) for attempt in past.values()]
    if record.status in JobRecord.FAILURES:
        errors.append(_error(record.exception, record.message, record.traceback))
    known = {**workers, record.attempts: record.worker}
    known.update((number, attempt.worker) for number, attempt in past.items())
    args, kwargs = _arguments(record)
    result: TaskResult[Any, Any] = TaskResult(
        task=_as_enqueued(task, backend, record),
        id=id or str(record.pk or record.handle or ""),
        status=_STATUSES[JobRecord.Status(record.status)],
        enqueued_at=record.enqueued_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        last_attempted_at=record.last_attempted_at,
        args=args,
        kwargs=kwargs,
        backend=backend.alias,
        errors=errors,
        worker_ids=[known.get(number, "") for number in range(1, record.attempts + 1)],
    )
    if record.status == JobRecord.Status.SUCCESSFUL:
        object.__setattr__(result, "_return_value", _value(bytes(record.result or b"")))
    return result


def _as_enqueued(task: Task[Any, Any], backend: GearmanBackend, record: JobRecord) -> Task[Any, Any]:
    """The task with the options that the record was made with; as declared when they are valid no more."""
    if record._state.adding:
        return task
    given: dict[str, Any] = {
        "backend": backend.alias,
        "priority": record.priority,
        "queue_name": record.queue_name,
        # From the second attempt on, the record has the moment of that one.
        "run_after": None if _is_retried(record) else record.run_after,
    }
    if all(getattr(task, name) == value for name, value in given.items()):
        return task
    try:
        return replace(task, **given)
    except InvalidTask:
        return task


def _is_retried(record: JobRecord) -> bool:
    """Whether an attempt came to nothing, and another was or is to be made."""
    waits = record.status in (JobRecord.Status.RETRYING, JobRecord.Status.READY)
    return record.attempts > 1 or (record.attempts == 1 and waits)


def _error(exception: str, message: str, traceback: str) -> TaskError:
    return TaskError(exception_class_path=exception or _UNTOLD, traceback=traceback or f"{message}\n")


def _value(result: bytes) -> Any:
    try:
        return json.loads(result)
    except (ValueError, RecursionError):
        return result.decode(errors="replace")  # of a worker that is not ours


def _arguments(record: JobRecord) -> tuple[list[Any], dict[str, Any]]:
    try:
        envelope = json.loads(bytes(record.workload))
        args: object = envelope["args"]
        kwargs: object = envelope["kwargs"]
        if isinstance(args, list) and isinstance(kwargs, dict):
            return args, kwargs
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    # A foreign client's; the worker will say what is wrong with it.
    return [], {}
