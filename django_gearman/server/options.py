"""What a job server may be told: before it starts, and of how it is to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import tzinfo
from enum import Enum


class FunctionOrder(Enum):
    """Which function's job a worker gets, of those that it offers. PROTOCOL section 5.3."""

    FAIR = "fair"
    """The highest priority first, then in turn; a job that comes back is the next. As gearmand 2.0."""
    GEARMAND = "gearmand"
    """The function registered last first, whatever the priorities; a job that comes back goes behind."""
    ROUND_ROBIN = "round-robin"
    """So too, but a function that gave a job is the last of its worker's from then. gearmand's -R."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What a job server may be told; the command line is built from it."""

    name: str = "localhost:4730"
    """Stands in every handle; must be of one server alone on a database. At most 40 characters."""

    epoch: int = 0
    """How often the lease of this name was taken; keeps handles of different runs apart."""

    durable: bool = False
    """Whether a journal writes the entries. Without it background jobs are acknowledged at once."""

    record_foreground: bool = True
    """Whether foreground jobs leave entries too, without waiting for them."""

    record_logs: bool = True
    """Whether what jobs log leaves entries, where a journal writes them."""

    handle_prefix: str | None = None
    """What every handle begins with, of this run of this server alone; None for the name and the epoch."""

    worker_wakeup: int = 1
    """How many sleeping workers get NOOP for a job that becomes ready; 0 for all."""

    job_retries: int = 3
    """How often a job without a number of its own is handed out to workers that are lost; 0 for no limit."""

    timeout_in_seconds: bool = False
    """Whether CAN_DO_TIMEOUT counts seconds, as Perl's workers and old servers do, and not milliseconds."""

    timeout_grace: float = 15.0
    """Seconds after a job's own time limit, in which its worker may end it and say so."""

    timeout_of: Callable[[str, int], int | None] | None = None
    """The time limit of a function's job that was kept with that one; None for just that."""

    zone: tzinfo | None = None
    """Whose clock the fields of SUBMIT_JOB_SCHED mean; None for this machine's."""

    function_order: FunctionOrder = FunctionOrder.FAIR
    """Which of a worker's functions gives it the next job."""

    exceptions: bool = False
    """Whether every connection gets WORK_EXCEPTION without asking for it."""

    window: int = 10_000
    """How many jobs of one function and priority wait in memory; the others only in the store."""

    window_bytes: int = 64 * 1024 * 1024
    """About how many bytes of waiting jobs there are in memory, of one function at most a quarter."""

    progress_interval: float = 1.0
    """Seconds between two entries of one job's progress."""

    max_function: int = 512
    """Bytes in a function's name."""

    max_unique: int = 255
    """Bytes in a unique."""

    max_idle_functions: int = 10_000
    """Functions without workers and jobs that stay listed."""

    max_abilities: int = 10_000
    """Functions that one connection may offer."""

    measure: bool = False
    """Whether to count how long jobs wait and run, beside how many there are."""

    allow_shutdown: bool = False
    """Whether an operator may end the server by the ``shutdown`` command."""


class Shutdown(Enum):
    """How an operator wants the server to end."""

    GRACEFUL = "graceful"
    """Take no connections, serve those that are there, and end when no job is left."""
    IMMEDIATE = "immediate"
    """Write what is left and end."""
