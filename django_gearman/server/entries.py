"""
What the journal keeps: the facts of a job's life, in the order they happened.

The core makes entries, the journal carries them in batches, a store writes
them. They are values: nothing in them changes once made, so that the writer's
thread never sees the core's state. Names are the wire's bytes; ``at`` is wall
time in seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, StrEnum
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

    unclaimed: bool = False
    """Whether it is laid at the store's door, for any server to claim, and not kept by this one."""

    clock: float = 0.0
    """Monotonic time of the submission: its client does not wait for the store for ever."""

    attempts: int = 0
    """How often it was handed out before it was to be kept."""


class JobDue(NamedTuple):
    """The time of a job for later has come; it waits as others do."""

    handle: bytes


class JobKept(NamedTuple):
    """A background submission joined a foreground job: from now on it stays whoever leaves."""

    handle: bytes
    at: float = 0.0
    """When it was submitted."""

    function: bytes = b""
    unique: bytes = b""
    workload: bytes = b""
    """Of the job, which from now on is to be found by its unique; the workload only where that is ``-``."""

    clock: float = 0.0
    """Monotonic time of the submission, as of ``JobQueued``."""


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


class JobLogged(NamedTuple):
    """The last lines that the job's attempt has logged so far: all that is kept of them."""

    handle: bytes
    log: bytes


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

    log: bytes = b""
    """The last lines that the attempt logged."""

    unclaimed: bool = False
    """Whether it is laid at the store's door until then."""

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


class JobUnclaimed(NamedTuple):
    """The server knows nothing more of the job: if it is in the store, it lies at the door again."""

    handle: bytes


class Joined(NamedTuple):
    """
    What became of a submission instead of a row: its unique has one already.

    Of a job that another server has, or that waits at the database door.
    """

    handle: bytes


Entry = (
    JobQueued
    | JobDue
    | JobKept
    | JobStarted
    | JobProgress
    | JobLogged
    | JobRequeued
    | JobFinished
    | JobUnclaimed
)


def has_key(unique: bytes, workload: bytes) -> bool:
    """Whether jobs of that unique are to be one; ``-`` stands for the workload, if there is any."""
    return bool(workload) if unique == b"-" else bool(unique)


class StoredJob(NamedTuple):
    """A job that the store hands to the core: what it claimed at the door."""

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

    interruptions: int = 0
    """Attempts that ended with their server, which is no fault of the job's."""


class Waiting(NamedTuple):
    """How many jobs of one function and priority lie at the store's door."""

    ready: int
    later: int
    """Those that wait for their time."""


class Claimed(NamedTuple):
    """What a server took from the store's door, and what it knows of the rest."""

    jobs: list[StoredJob]
    more: bool = False
    """Whether there may be others that it would have taken."""

    emptied: frozenset[bytes] = frozenset()
    """Functions of which nothing ready is left there."""

    left: dict[tuple[bytes, int], Waiting] | None = None
    """{(function, priority): what is left there}, of all functions; None when it was not counted."""

    due_in: float = float("inf")
    """Seconds until the next job for later is due; infinite for none."""

    cancelled: Sequence[bytes] = ()
    """Handles of jobs of this server that somebody wants to end."""


class Topic(Enum):
    """What a question is about."""

    STATUS = "status"
    """How the job of a handle stands: the answer is a ``Standing``."""
    UNIQUE = "unique"
    """How the last job of a unique stands: a ``Standing``."""
    TAKE = "take"
    """The job of a function and unique, or of a handle, is to be this server's if it lies at the door:
    a ``StoredJob``."""
    CANCEL = "cancel"
    """The job of a handle is to end if it lies at the door: True."""


class Question(NamedTuple):
    """What the core does not know, since it holds only those jobs that are next."""

    topic: Topic
    number: int
    """Tells it from others."""

    at: float
    """When it was asked, by the core's clock; nobody waits for the store for long."""

    handle: bytes = b""
    function: bytes = b""
    unique: bytes = b""
    workload: bytes = b""
    """The unique's, where that is ``-``."""


class Standing(NamedTuple):
    """How a job stands that is to do, and that this server does not hold."""

    running: bool
    numerator: bytes = b"0"
    denominator: bytes = b"0"


Reply = Standing | StoredJob | bool | None
"""What becomes of a question; None when there is no such job."""
