"""
Every job of the process, and what is asked by a function's name alone.

``@job`` writes here; who reads need not know what a job can do.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .jobs import Job

registry: dict[str, Job[Any, Any]] = {}
"""Every job of the process, by its name on the wire."""


def queue_of(function: str) -> str:
    """The queue of a function; "default" for those that are not ours."""
    known = registry.get(function)
    return known.queue_name if known is not None else "default"


def decode_result(name: str, data: bytes) -> object:
    """A result of a ``@job``; the bytes themselves for a raw one, known or not."""
    known = registry.get(name)
    if known is not None and known.raw:
        return data
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return data
