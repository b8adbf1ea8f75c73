"""
What the journal keeps: the facts of a job's life, in the order they happened.

The core makes entries, the journal carries them in batches, a store writes
them. They are values: nothing in them changes once made, so that the writer's
thread never sees the core's state. Names are the wire's bytes; ``at`` is wall
time in seconds since 1970.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Outcome(StrEnum):
    """How a job ended; each final status of a record but no other."""

    SUCCESSFUL = "SUCCESSFUL"
    FAILED = "FAILED"
    DEAD = "DEAD"
    CANCELLED = "CANCELLED"


class JobQueued(NamedTuple):
    """A client submitted a job. When ``background`` is true the client hears of it once this is written."""

    handle: bytes
    function: bytes
    unique: bytes
    workload: bytes
    priority: int
    background: bool
    client: bytes
    at: float
    reducer: bytes = b""
    run_after: float = 0.0
    """Wall time before which it must not run; 0 for none."""


class JobDue(NamedTuple):
    """The time of a job for later has come; it waits as others do."""

    handle: bytes


class JobKept(NamedTuple):
    """A background submission joined a foreground job: from now on it stays whoever leaves."""

    handle: bytes
    at: float = 0.0
    """When it was submitted: its client does not wait for the store for ever."""

    function: bytes = b""
    unique: bytes = b""
    workload: bytes = b""
    """Of the job, which from now on is to be found by its unique; the workload only where that is ``-``."""


class JobStarted(NamedTuple):
    """The job was handed to a worker for the ``attempts``-th time."""

    handle: bytes
    worker: bytes
    attempts: int
    at: float


class JobProgress(NamedTuple):
    """The worker told how far it is; decimal text as it came from the wire."""

    handle: bytes
    numerator: bytes
    denominator: bytes


class JobRequeued(NamedTuple):
    """
    An attempt came to nothing, and the job waits again.

    ``data`` is the exception's when the worker wants another attempt; ``reason``
    is the server's own word when the worker was lost.
    """

    handle: bytes
    worker: bytes
    attempt: int
    """Which attempt it was, from 1."""

    started_at: float
    at: float
    reason: str
    data: bytes = b""
    run_after: float = 0.0
    """Wall time before which there is no other attempt; 0 for none."""

    counts: bool = True
    """Whether it is one of the job's attempts: not when it was given back on purpose."""


class JobFinished(NamedTuple):
    """
    The job ended, once and for all.

    ``data`` is the result of a successful job, the exception's data of a failed
    one when the worker sent any; ``reason`` is the server's own word when no
    worker spoke.
    """

    handle: bytes
    outcome: Outcome
    data: bytes
    reason: str
    at: float


class Joined(NamedTuple):
    """
    What became of a submission instead of a row: its unique has one already.

    Of a job that another server has, or that waits at the database door.
    """

    handle: bytes


Entry = JobQueued | JobDue | JobKept | JobStarted | JobProgress | JobRequeued | JobFinished


class StoredJob(NamedTuple):
    """A job that the store hands to the core: claimed from the database door, or replayed."""

    handle: bytes
    function: bytes
    unique: bytes
    workload: bytes
    priority: int
    attempts: int
    max_attempts: int | None
    reducer: bytes = b""
    run_after: float = 0.0
    timeout: int | None = None
    """Seconds that one attempt may take."""
