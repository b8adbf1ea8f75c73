"""A job in a worker's hands: what its function sees of it, and can say while it runs."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress

from ..protocol.packets import LOG, PacketType
from .board import Place
from .link import Link
from .pool import Interruptible

logger = logging.getLogger(__name__)


class AssignedJob:
    """A job as the function that runs it sees it."""

    __slots__ = (
        "_is_cancelled",
        "attempt",
        "decision",
        "function",
        "handle",
        "has_looked",
        "limit",
        "link",
        "max_attempts",
        "place",
        "report",
        "running",
        "started",
        "unique",
        "workload",
    )

    def __init__(
        self,
        link: Link,
        handle: bytes,
        function: bytes,
        unique: bytes,
        workload: bytes,
        attempt: int = 1,
        max_attempts: int | None = None,
        place: Place | None = None,
        limit: float | None = None,
    ) -> None:
        self.link = link
        """The connection that it came by, and that what is said of it goes by."""
        self.place = place
        """Where the parent of a child sees that it is in hand; None where there is no such."""
        self.handle = handle
        self.function = function
        self.unique = unique
        self.workload = workload
        self.attempt = attempt
        """Which hand-out of the job this is, from 1; always 1 where the server does not tell."""
        self.max_attempts = max_attempts
        """How many it may have; None where the job has no number of its own."""
        self.decision: tuple[float | None] | None = None
        """What was decided of another attempt already, for the ``RetryPolicy``; None for nothing."""
        self.limit = limit
        """Seconds that it may take; None for no limit."""
        self.started = 0.0
        self.running: Interruptible | None = None
        """Its run, where that is beside the worker's own thread."""
        self.report = b""
        """The packets that say how it ended, once it has."""
        self.has_looked = False
        """Whether its function has asked whether it was cancelled."""
        self._is_cancelled = False

    @property
    def may_return(self) -> bool:
        """Whether its server hands a job out again that raised."""
        return self.link.tells_attempts

    @property
    def takes_log(self) -> bool:
        """Whether its server keeps what it logs."""
        return self.link.takes_logs

    def send_log(self, text: bytes) -> None:
        """Say what is to be kept of all that it logged so far; only to a server that ``takes_log``."""
        self.link.report(PacketType.OPTION_REQ, LOG + self.handle + b" " + text)

    @property
    def is_cancelled(self) -> bool:
        """What is known of it, without asking anybody."""
        return self._is_cancelled or (self.place is not None and self.place.cancelled)

    @property
    def cancelled(self) -> bool:
        """Whether it was cancelled, for its function, which thereby says that it ends by itself then."""
        self.has_looked = True
        if not self.is_cancelled:
            self.link.listen()
        return self.is_cancelled

    def cancel(self) -> None:
        self._is_cancelled = True

    @property
    def hears_interrupts(self) -> bool:
        """Whether a KeyboardInterrupt in its function comes from the terminal, not from the function."""
        # A child, which shows what it has in hand, passes over SIGINT.
        return self.place is None

    def end_copy(self, failure: BaseException | None = None) -> None:
        """In a process that its function forked and that comes back, too: end there, as Python would."""
        if not self.link.is_copy:
            return
        status: object = failure
        if isinstance(failure, SystemExit):
            status = failure.code
        elif failure is not None:
            logger.error(
                "A process that job %s forked has failed",
                self.handle.decode(errors="replace"),
                exc_info=failure,
            )
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(status & 0xFF if isinstance(status, int) else int(status is not None))

    def as_told(self, error: BaseException) -> BaseException:
        """What ended its function, as it is to be told: why it was interrupted, and not how."""
        return error if self.running is None else self.running.told(error)

    def send_status(self, numerator: int, denominator: int) -> None:
        """Tell waiting clients how far it is. PROTOCOL: WORK_STATUS."""
        self.link.report(PacketType.WORK_STATUS, self.handle, b"%d" % numerator, b"%d" % denominator)

    def send_data(self, data: bytes) -> None:
        """Send a part of the result. PROTOCOL: WORK_DATA."""
        self.link.report(PacketType.WORK_DATA, self.handle, data)

    def send_warning(self, data: bytes) -> None:
        """Send a warning. PROTOCOL: WORK_WARNING."""
        self.link.report(PacketType.WORK_WARNING, self.handle, data)


class JobRefused(Exception):
    """Raised by a function to report plain WORK_FAIL, without a word on why."""


WorkerFunction = Callable[[AssignedJob], bytes]
TaskFunction = Callable[[AssignedJob], Awaitable[bytes]]
RetryPolicy = Callable[[AssignedJob, BaseException], float | None]
"""Seconds until a job that raised is tried again; None when it has failed."""
