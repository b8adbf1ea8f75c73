"""
What the jobs of the process declare: their schedules and limits, and the jobs that schedules ask for.

A job server and the admin ask here; whose rows they become is for ``scheduler`` and ``limiting``.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

from django.db import InterfaceError, OperationalError

from . import conf, schedules
from .encoding import dumps
from .job_options import Unique
from .models import JobRecord, Schedule
from .registry import registry

if TYPE_CHECKING:
    from .jobs import Job


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
        ValueError: They are too large, or the function's ``unique`` or ``limit_key`` raised.
        OperationalError: That asked a database which cannot tell, now or until it is migrated.
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
        record = _with_named_errors(made)._new_record(args, kwargs, options)
    if schedule.queue_name:
        record.queue_name = schedule.queue_name
    if schedule.priority is not None:
        record.priority = schedule.priority
    return record


def _with_named_errors(made: Job[..., Any]) -> Job[..., Any]:
    """The same job, whose ``unique`` and ``limit_key`` raise nothing but errors that say whose they are."""
    other = copy(made)
    other.unique = _named(f"unique of {made.name}", made.unique)
    other.limit_key = _named(f"limit_key of {made.name}", made.limit_key)
    return other


def _named(name: str, given: Unique | None) -> Unique | None:
    if not callable(given):
        return given

    def make(*args: Any, **kwargs: Any) -> str:
        try:
            return given(*args, **kwargs)
        except Exception as error:
            can_tell = not isinstance(error, OperationalError | InterfaceError)
            kind = ValueError if can_tell else OperationalError
            raise kind(f"the {name} raised {type(error).__name__}: {error}") from error

    return make


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
