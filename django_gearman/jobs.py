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
import os
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
from contextlib import aclosing, closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial, update_wrapper
from importlib import import_module
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
    TypeVar,
    Unpack,
    cast,
    overload,
)

from asgiref.sync import sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.db import transaction
from django.utils import timezone

from . import conf, continuations, rows, schedules, signals, tracing
from .client.core import Priority
from .client.tasks import Part, Value, refuse_too_large
from .context import JobContext
from .encoding import dumps, exception_of, refuse_unless_json
from .exceptions import (
    GroupDoesNotExist,
    InvalidCall,
    InvalidJob,
    JobFailed,
    JobResultDoesNotExist,
    JobResultMismatch,
    NotJSON,
    TooLarge,
)
from .insertion import insert_workloads
from .job_options import (
    OF_JOB,
    OF_USING,
    OTHER_WORDS,
    Backoff,
    CallOptions,
    JobOptions,
    Unique,
    refuse_unknown_options,
    validate,
)
from .models import JobRecord, unique_key_of
from .registry import decode_result, registry
from .results import JobResult, WireJobResult, one_of_many
from .submission import (
    async_client_for,
    identity,
    insert,
    nudge_after_commit,
    off_the_loop,
    submit,
    submit_many,
    waiting_client,
)

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

RunCoroutine: TypeAlias = "Callable[[Coroutine[Any, Any, Any]], Any]"

MAX_LIMIT_KEY: Final = 64
"""Bytes of a limit's key that is sent as it is; longer ones are hashed."""

MAX_UNIQUE: Final = 200
"""Bytes of a unique that is sent as it is; longer ones are hashed."""

MAX_WIRE_UNIQUE: Final = 63
"""Bytes that gearmand keeps of a unique: longer ones are hashed with ``ENQUEUE = "wire"``."""


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
        validate(self)
        update_wrapper(self, function)

    def __repr__(self) -> str:
        return f"<Job {self.name}>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function in this process, as ``call`` does."""
        return self.call(*args, **kwargs)

    def call(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """
        Run the function in this process and return its value.

        Raises:
            SynchronousOnlyOperation: It is an ``async def``, and an event loop runs in this thread.
        """
        if self.is_async:
            self._refuse_on_a_loop()
        return cast(R, self._invoke(JobContext(function=self.name), args, kwargs))

    def _refuse_on_a_loop(self) -> None:
        """Raise where ``asyncio.run`` would, before there is a coroutine that nobody awaits."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return
        raise SynchronousOnlyOperation(
            f"{self.name} is an async def, and an event loop runs here - await its acall(...) instead."
        )

    def using(self, **options: Unpack[CallOptions]) -> Job[P, R]:
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
        Raises:
            InvalidJob: An option cannot be that, or there is none of that name.
        """
        if not options.keys() <= CallOptions.__optional_keys__:
            refuse_unknown_options(f"using() of {self.name}", options, OF_USING)
        given: object = options.get("unique")
        if given is not None and not isinstance(given, str):
            raise InvalidJob(f"the unique that using() gives {self.name} must be a str, not {given!r:.200}")
        other = Job.__new__(Job)
        other.__dict__.update(self.__dict__)
        other.__dict__.update({name: value for name, value in options.items() if value is not None})
        if given is not None:
            other.unique = _Always(given)
        validate(other)
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

    if not TYPE_CHECKING:  # for which every name would be an attribute

        def __getattr__(self, name: str) -> Any:
            hint = f"; use {OTHER_WORDS[name]}" if name in OTHER_WORDS else ""
            raise AttributeError(f"a @job has no attribute {name!r}{hint}")

    def __copy__(self) -> Job[P, R]:
        other: Job[P, R] = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __reduce__(self) -> Any:
        """Pickled by name, with what ``using`` changed."""
        known = registry.get(self.name)
        if known is None:
            return super().__reduce__()
        changes = {name: value for name in OF_USING if (value := getattr(self, name)) != getattr(known, name)}
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
            SynchronousOnlyOperation: An event loop runs in this thread.
        """
        options = conf.settings_for()
        with off_the_loop:
            record = self._new_record(args, kwargs, options)
            if options.enqueue == "wire":
                # gearmand's stores would overwrite jobs without a unique.
                record.unique = record.unique or uuid.uuid4().hex
                result: WireJobResult[R] = WireJobResult(record)
                transaction.on_commit(partial(submit, record, result.acknowledged), using=options.database)
                return self._enqueued(result)
            return self._insert_one(record, options.database)

    def _insert_one(self, record: JobRecord, using: str) -> JobResult[R]:
        inserted = insert(record, using)
        result: JobResult[R] = JobResult(inserted)
        if inserted is not record:
            # A job of its unique that was there already is told of once.
            return result
        self._enqueued(result)
        result._note_new()
        return result

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

        One statement for thousands of rows, and one nudge; a statement for each on
        MySQL, and of a job with ``unique`` or ``limit_key``. Jobs with a unique get
        their ids, and their turns, in the order of the uniques. With ``ENQUEUE = "wire"``
        what was submitted before one that cannot be stays submitted.

        Returns:
            A result for each, in their order; equal uniques have the same job.
        Raises:
            TypeError: Arguments do not fit the function, or JSON cannot carry one; nothing was enqueued.
                It says of which call, counted from 0.
        """
        options = conf.settings_for()
        given: object = calls
        calls = list(calls) if isinstance(given, Iterable) else [cast(Any, calls)]
        try:
            pairs = [_pair(*call) for call in calls]
        except (TypeError, ValueError):
            raise _no_pair(self.name, calls) from None
        if not pairs:
            return []
        if self.unique is not None or self.limit_key is not None or options.enqueue == "wire":
            with off_the_loop:
                return self._enqueue_each(pairs, options)
        workloads = self._encode_many(pairs, options.max_packet)
        args, kwargs = pairs[0]
        template = self._new_record(args, kwargs, options)
        with off_the_loop:
            ids = insert_workloads(template, workloads, options.database)
        template._state.adding, template._state.db = False, options.database
        nudge_after_commit(options.database)
        results: list[JobResult[R]] = [
            one_of_many(template, id, workload) for id, workload in zip(ids, workloads, strict=True)
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
        records: list[JobRecord] = []
        try:
            for args, kwargs in pairs:
                records.append(self._new_record(args, kwargs, options))
        except (TypeError, TooLarge) as error:
            self._name_call(error, len(records))
            raise
        if options.enqueue != "wire":
            # Each waits for whoever has enqueued its unique and not committed: in an order that is the
            # same for all, or two that have some in common would wait for each other.
            in_order = sorted(enumerate(records), key=lambda numbered: _order_of_uniques(numbered[1]))
            with transaction.atomic(using=options.database):
                made = {place: self._insert_one(record, options.database) for place, record in in_order}
            return [made[place] for place in range(len(records))]
        results: list[WireJobResult[R]] = []
        for record in records:
            record.unique = record.unique or uuid.uuid4().hex
            results.append(WireJobResult(record))
        submissions = [(record, each.acknowledged) for record, each in zip(records, results, strict=True)]
        transaction.on_commit(partial(submit_many, submissions), using=options.database)
        return [self._enqueued(each) for each in results]

    def _encode_many(self, pairs: list[tuple[tuple[Any, ...], Mapping[str, Any]]], limit: int) -> list[bytes]:
        workloads: list[bytes] = []
        trace = tracing.current()
        traced: dict[str, Any] = {tracing.KEY: trace} if trace else {}
        fitting: set[tuple[object, ...]] = set()
        for args, kwargs in pairs:
            # Whether arguments fit depends on how many there are, and on their names.
            shape = (len(args), *kwargs)
            try:
                if self.raw or shape not in fitting:
                    raise TypeError
                for value in args:
                    refuse_unless_json(value, "")
                for value in kwargs.values():
                    refuse_unless_json(value, "")
                workload = dumps({"args": args, "kwargs": kwargs, **traced})
                if len(workload) > limit:
                    raise TypeError
            except TypeError:
                workload = self._encode_one_of_many(args, kwargs, limit, len(workloads))
                fitting.add(shape)
            workloads.append(workload)
        return workloads

    def _encode_one_of_many(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], limit: int, place: int
    ) -> bytes:
        """By the way that says what is wrong, and of which call."""
        try:
            return self._encode(args, kwargs, limit)
        except (TypeError, TooLarge) as error:
            self._name_call(error, place)
            raise

    def _name_call(self, error: TypeError | TooLarge, place: int) -> None:
        """Say in an error's sentence which call of ``enqueue_many`` it is of."""
        where = f"call {place} of {self.name}.enqueue_many(): "
        if isinstance(error, NotJSON | TooLarge):
            error.what = where + error.what
        elif type(error) is TypeError:
            error.args = (f"{where}{error}",)

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
        try:
            if len(made.encode()) <= limit and "\0" not in made:
                return made
        except UnicodeEncodeError:
            pass  # no packet or column takes it, either
        return hashlib.sha256(made.encode(errors="surrogatepass")).hexdigest()

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
        if options.enqueue == "wire":
            self._refuse_lost_key(args, kwargs)
        workload, unique = self._encode_both(args, kwargs, options)
        if options.enqueue == "wire":
            self._refuse_too_large(workload, unique or uuid.uuid4().hex, options)
        return rows.new(
            function=self.name,
            queue_name=self.queue_name,
            workload=workload,
            unique=unique,
            unique_key=unique_key_of(self.name, unique, workload),
            priority=self.priority,
            client=identity(os.getpid()),
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

        A foreground job: it is gone when this process or the job server ends
        before it does. Its record tells of it, unless ``RECORD_FOREGROUND`` is
        off. Waits for ``RUN_TIMEOUT`` seconds at the most.

        Raises:
            JobFailed: The function raised; the attributes say what and where.
            ResponseTimeout: It took too long; a worker may still be at it.
            ConnectionFailed: No job server answers.
        """
        client = waiting_client()
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
        return self._stream(*self._prepared_to_stream(args, kwargs))

    def astream(self, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Part | Value[R], None]:
        """As ``stream``, on asyncio."""
        return self._astream(*self._prepared_to_stream(args, kwargs))

    async def acall(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """As ``call``: an ``async def`` runs in this event loop, any other function in Django's thread."""
        if not inspect.iscoroutinefunction(self.function):
            return await sync_to_async(self.call)(*args, **kwargs)
        if self.takes_context:
            return cast(R, await self.function(JobContext(function=self.name), *args, **kwargs))
        return cast(R, await self.function(*args, **kwargs))

    def _stream(self, workload: bytes, unique: str, timeout: float) -> Generator[Part | Value[R], None, None]:
        parts = waiting_client().stream(
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
        if self.run_after is not None:
            raise InvalidCall(
                self.name,
                "run_after",
                "what is waited for runs at once",
                "have it run later by enqueue(), or leave run_after out",
            )
        self._refuse_lost_key(args, kwargs)
        workload, unique = self._encode_both(args, kwargs, options)
        self._refuse_too_large(workload, unique, options)
        timeout = options.run_timeout if self.run_timeout is None else self.run_timeout
        return workload, unique, timeout

    def _prepared_to_stream(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[bytes, str, float]:
        if self.resubmit:
            raise InvalidCall(
                self.name,
                "resubmit",
                "a stream has told of one run and cannot go on with another",
                "run() it, or leave resubmit out",
            )
        return self._prepared(args, kwargs)

    def _refuse_lost_key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise for a key of a limit that would not get to the job server."""
        if self.raw and self.limit_key is not None and self._limit_key_of(args, kwargs):
            raise InvalidCall(
                self.name,
                "limit_key",
                "the packets of a raw job have no place for the key, and it would be counted with others",
                'enqueue() it with ENQUEUE = "database", or leave limit_key or raw out',
            )

    def _refuse_too_large(self, workload: bytes, unique: str, options: conf.GearmanSettings) -> None:
        """Raise for what no packet takes, though a row would."""
        names = len(self.name.encode()) + len(unique.encode())
        refuse_too_large(self.name, workload, names, options.max_packet, setting="MAX_PACKET")

    def _value_of(self, result: bytes) -> R:
        return cast(R, result if self.raw else decode_result(self.name, result))

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
            # A number with a fraction is nobody's id.
            record = records.get(pk=int(str(id)))
        except (ValueError, OverflowError, JobRecord.DoesNotExist):
            raise JobResultDoesNotExist(str(id)) from None
        if record.function != self.name:
            raise JobResultMismatch(str(id), record.function, self.name)
        return JobResult(record)

    async def aget_result(self, id: str) -> JobResult[R]:
        """As ``get_result``."""
        return await sync_to_async(self.get_result)(id)

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

    def _encode_both(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: conf.GearmanSettings
    ) -> tuple[bytes, str]:
        """The workload of a submission, and its unique."""
        workload = self._encode(args, kwargs, options.max_packet)
        unique = self._unique_of(args, kwargs)
        if unique == "-":
            # Equal workloads are one job, whoever asks for it.
            workload = self._encode(args, kwargs, options.max_packet, traced=False)
        if unique and options.enqueue == "wire":
            unique = self._wire_unique(unique, workload)
        return workload, unique

    def _wire_unique(self, unique: str, workload: bytes) -> str:
        """
        A unique as a job server is to have it that is asked for the job by that alone.

        It answers for a unique whichever the function, and for ``-`` not at all. What somebody made
        himself stays as it is where it is short enough: others may submit the same.
        """
        if unique == "-":
            return hashlib.sha256(self.name.encode() + b"\0" + workload).hexdigest()[:MAX_WIRE_UNIQUE]
        named = f"{self.name}:{unique}"
        sent = unique if callable(self.unique) else named
        if len(sent.encode()) <= MAX_WIRE_UNIQUE:
            return sent
        return hashlib.sha256(named.encode()).hexdigest()[:MAX_WIRE_UNIQUE]

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
        names = list(signature.parameters)
        if names and names[0] in ("self", "cls") and "." in self.function.__qualname__:
            raise InvalidJob(
                f"{self.name} is a method, and a worker has no `{names[0]}` for it; "
                "make it a function, or put @staticmethod above @job"
            )
        if not self.takes_context:
            return signature
        if not names or names[0] != "context":
            raise InvalidJob(f"{self.name} has takes_context=True: its first argument must be `context`")
        return signature.replace(parameters=[signature.parameters[name] for name in names[1:]])


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
class Signature(Generic[R_co]):
    """
    A call to be made later; made by ``job.s(...)`` and ``job.si(...)``.

    Can be pickled.
    """

    job: Job[Any, R_co]
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


def told(thing: object) -> str:
    """What somebody took for a call of a job, and what to write instead."""
    if isinstance(thing, Job):
        return f"the job itself; write {thing.name.rpartition('.')[2]}.s(...)"
    if isinstance(thing, Signature):
        return f"the call {thing}; hand in the job itself"
    if isinstance(thing, JobResult):
        return f"a job that is enqueued already; write {thing.function.rpartition('.')[2]}.s(...)"
    if hasattr(thing, "module_path"):
        return f"the task {thing.module_path}; only functions with @job have such calls, by .s(...)"
    name = getattr(thing, "__name__", None)
    if callable(thing) and isinstance(name, str):
        return f"the function {name}; decorate it with @job and write {name}.s(...)"
    return f"{thing!r:.200}; was the function called? Write .s(...) in place of the plain call"


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
    values = [decode_result(*each) for each in found]
    if len(values) < size:
        raise GroupDoesNotExist(str(group))
    return values


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
            attempt, or None for none. By default about 2, 4, 8, ... up to an hour. Without
            ``max_attempts`` only ``Retry`` asks it.
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
    if hasattr(function, "__qualname__"):
        refuse_unknown_options(f"@job of {function.__qualname__}", options, OF_JOB)
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


# Many at once.


def _order_of_uniques(record: JobRecord) -> tuple[int, str, str]:
    """Shorter ones first, so that numbers come as numbers do; those without any stay in their order."""
    # The key tells those of "-" apart.
    return len(record.unique), record.unique, record.unique_key or ""


def _pair(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """A call of ``enqueue_many``, or a ``TypeError``."""
    if isinstance(args, str | bytes | Mapping) or not isinstance(kwargs, Mapping):
        raise TypeError
    return tuple(args), kwargs


def _no_pair(name: str, calls: Sequence[Any]) -> TypeError:
    """Says which call of ``enqueue_many`` is not what it takes."""
    for place, call in enumerate(calls):
        try:
            _pair(*call)
        except (TypeError, ValueError):
            return TypeError(
                f"call {place} of {name}.enqueue_many() is {call!r:.200}, and no pair of positional and "
                "named arguments, such as ((7,), {}); write [((value,), {}) for value in values]"
            )
    raise AssertionError("all are pairs")
