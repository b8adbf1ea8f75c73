"""
What ``@job`` and ``using`` may be told, and what they refuse.

The options' types, the words of other libraries for them, and the sentences
about what none of them can be. Knows of a job no more than its options.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypedDict

from django.conf import settings
from django.utils import timezone

from . import permits, schedules
from .exceptions import InvalidJob

if TYPE_CHECKING:
    from .jobs import Job
    from .results import JobResult

MIN_PRIORITY: Final = -100
MAX_PRIORITY: Final = 100

Backoff: TypeAlias = "Callable[[BaseException, JobResult[Any]], float | timedelta | None]"
"""Seconds until the next attempt of a job that raised; None when there is to be none."""

Unique: TypeAlias = str | Sequence[str] | Callable[..., str]
"""Which jobs of a function are one: a name of an argument, several, or a function of the arguments."""

LONGEST_PAUSE: Final = 3600.0
"""Seconds between two attempts at the most, where no ``backoff`` says otherwise."""


def exponential(attempt: int) -> float:
    """Seconds until the next attempt: about 2, 4, 8, ... and an hour at the most, never all at once."""
    return float(min(2 ** min(attempt, 20), LONGEST_PAUSE) * random.uniform(0.75, 1.25))


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


class CallOptions(TypedDict, total=False):
    """What ``using`` may be told."""

    priority: int | None
    run_after: datetime | timedelta | None
    unique: str | None
    run_timeout: float | None
    resubmit: bool


OTHER_WORDS: Final = {
    "delay": "enqueue(...)",
    "delay_on_commit": "enqueue(...), whose row is of the current transaction",
    "apply_async": "enqueue(...), after using(run_after=..., priority=...) where options are needed",
    "apply": "call(...)",
    "enqueue_in": "using(run_after=timedelta(...)).enqueue(...)",
    "enqueue_at": "using(run_after=...).enqueue(...)",
    "signature": "s(...)",
    "subtask": "s(...)",
    "AsyncResult": "get_result(id)",
}
"""What those look for who come from other libraries."""

_OTHER_OPTIONS: Final = {
    "bind": "takes_context",
    "queue": "queue_name",
    "max_retries": "max_attempts",
    "retries": "max_attempts",
    "retry": "max_attempts",
    "autoretry_for": "max_attempts",
    "retry_backoff": "backoff",
    "retry_delay": "backoff",
    "default_retry_delay": "backoff",
    "time_limit": "timeout",
    "soft_time_limit": "timeout",
    "job_timeout": "timeout",
    "result_ttl": "the setting KEEP_SUCCESSFUL_DAYS",
    "ignore_result": "the setting KEEP_SUCCESSFUL_DAYS",
    "run_after": "using(run_after=...)",
    "countdown": "using(run_after=...)",
    "eta": "using(run_after=...)",
    "run_timeout": "using(run_timeout=...)",
    "resubmit": "using(resubmit=True)",
    "expires": "an argument that says until when, and raise Discard after that",
    "lock": "unique or concurrency",
}

OF_JOB: Final = (*JobOptions.__annotations__, "takes_context")
OF_USING: Final = tuple(CallOptions.__annotations__)


def refuse_unknown_options(where: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise ``InvalidJob`` for what is not known there, saying what it is called here."""
    for name in given:
        if name in known:
            continue
        near = [name] if name in OF_JOB else get_close_matches(name, known, 1)
        meant = _OTHER_OPTIONS.get(name) or (near[0] if near else "")
        if meant in OF_JOB and meant not in known:
            meant = f"@job({meant}=...), which is for all calls"
        raise InvalidJob(
            f"{where} has no option {name!r}; "
            + (f"use {meant}" if meant else f"it has {', '.join(sorted(known))}")
        )


def validate(job: Job[Any, Any]) -> None:
    """Raise ``InvalidJob`` for an option that cannot be what it is."""
    if "<" in job.function.__qualname__:
        raise InvalidJob(f"{job.name} must be defined at the module's level, where a worker can find it")
    name: object = job.name
    if not isinstance(name, str) or not name.isprintable() or len(name.encode()) > 512:
        raise InvalidJob(f"{job.name!r} is no name for a job: at most 512 bytes, without control characters")
    priority: object = job.priority
    if not isinstance(priority, int) or not MIN_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidJob(
            f"priority of {job.name} must be a whole number from {MIN_PRIORITY} to {MAX_PRIORITY}, "
            f"not {job.priority!r}"
        )
    queue_name: object = job.queue_name
    if not isinstance(queue_name, str) or not 0 < len(queue_name) <= 100:
        raise InvalidJob(f"queue_name of {job.name} must be 1 to 100 characters, not {job.queue_name!r}")
    for option, highest in (("max_attempts", 32_767), ("timeout", 2**31 - 1)):
        number = getattr(job, option)
        if number is not None and (type(number) is not int or not 1 <= number <= highest):
            kind = "whole number of seconds" if option == "timeout" else "whole number"
            raise InvalidJob(f"{option} of {job.name} must be a {kind} from 1 to {highest}, not {number!r}")
    _validate_names(job, "unique", job.unique)
    _validate_limits(job)
    if job.backoff is not None and not callable(job.backoff):
        raise InvalidJob(
            f"backoff of {job.name} must be a function of the exception and the JobResult, "
            f"not {job.backoff!r}"
        )
    seconds: object = job.run_timeout
    if seconds is not None and (not isinstance(seconds, int | float) or not seconds > 0):
        raise InvalidJob(f"run_timeout of {job.name} must be a number of seconds above 0, not {seconds!r}")
    run_after: object = job.run_after
    if isinstance(run_after, datetime):
        _refuse_wrong_zone(job.name, run_after)
    elif run_after is not None and not isinstance(run_after, timedelta):
        raise InvalidJob(f"run_after of {job.name} must be a datetime or a timedelta, not {run_after!r}")
    else:
        try:
            _ = timezone.now() + (run_after or timedelta())
        except OverflowError:
            raise InvalidJob(f"run_after of {job.name} is beyond the year 9999: {run_after!r}") from None


def _validate_names(job: Job[Any, Any], option: str, given: object) -> None:
    if given is None or callable(given):
        return
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise InvalidJob(
            f"{option} of {job.name} must be a name of an argument, several, or a function, not {given!r}"
        )
    known = job._signature.parameters
    for name in names:
        if job.raw or name not in known:
            has = "its workload, bytes" if job.raw else ", ".join(known) or "none"
            raise InvalidJob(
                f"{option} of {job.name} names {name!r}, which is no argument that JSON can carry "
                f"(it has {has})"
            )


def _validate_limits(job: Job[Any, Any]) -> None:
    rate: object = job.rate_limit
    if not isinstance(rate, str):
        raise InvalidJob(f'rate_limit of {job.name} must be a text such as "10/m", not {rate!r}')
    if rate:
        try:
            permits.parse_rate(rate)
        except ValueError as error:
            raise InvalidJob(f"rate_limit of {job.name}: {error}") from error
    most = job.concurrency
    if most is not None and (type(most) is not int or not 1 <= most <= permits.MOST):
        raise InvalidJob(
            f"concurrency of {job.name} must be a whole number from 1 to {permits.MOST}, not {most!r}"
        )
    _validate_names(job, "limit_key", job.limit_key)
    if job.limit_key is not None and not rate and most is None:
        raise InvalidJob(f"limit_key of {job.name} needs a rate_limit or a concurrency that it is for")


def _refuse_wrong_zone(name: str, moment: datetime) -> None:
    if settings.USE_TZ and timezone.is_naive(moment):
        raise InvalidJob(
            f"run_after of {name} must be an aware datetime, such as timezone.now() + timedelta(hours=1)"
        )
    if not settings.USE_TZ and timezone.is_aware(moment):
        raise InvalidJob(f"run_after of {name} must be a naive datetime, since USE_TZ is off")
    try:
        _ = moment.astimezone(UTC) if settings.USE_TZ else moment
    except OverflowError:
        raise InvalidJob(f"run_after of {name} is a moment that UTC has no date for: {moment!r}") from None
