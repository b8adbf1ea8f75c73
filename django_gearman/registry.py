"""
Every job of the process, and what is asked by a function's name alone.

``@job`` writes here; who reads need not know what a job can do.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from . import conf

if TYPE_CHECKING:
    from .jobs import Job

registry: dict[str, Job[Any, Any]] = {}
"""Every job of the process, by its name on the wire."""


def queue_of(function: str) -> str:
    """The queue of a function; "default" for those that are not ours."""
    known = registry.get(function)
    return known.queue_name if known is not None else "default"


def timeout_of(function: str, kept: int) -> int | None:
    """
    Seconds after which the server may end a job that was made with that time limit; None for none.

    Its worker goes by what the code says now, and is to end it first.
    """
    known = registry.get(function)
    if known is None:
        return kept
    now = known.timeout or conf.settings_for().job_timeout
    return None if now is None else max(kept, now)


def decode_result(name: str, data: bytes) -> object:
    """A result of a ``@job``; the bytes themselves for a raw one, known or not."""
    known = registry.get(name)
    if known is not None and known.raw:
        return data
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return data
