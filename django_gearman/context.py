"""
``JobContext``: what a running function knows of its job, and can tell.

Where that goes is the worker's: here it is only held back, so that an inner
loop may say as much as it likes.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from functools import cached_property
from operator import index
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Protocol

from asgiref.sync import sync_to_async

from . import logs, reports

if TYPE_CHECKING:
    from .group_results import GroupResult

PROGRESS_INTERVAL: Final = 0.1
"""Seconds between two progress reports of one job; the last one is always sent."""

LOG_INTERVAL: Final = 1.0
"""Seconds for which lines that a job logged are held back; the last ones always leave."""


class Reports(Protocol):
    """What a running job can tell; the worker's ``AssignedJob``, or nobody when it is called in-process."""

    @property
    def takes_log(self) -> bool: ...
    def send_log(self, text: bytes) -> None: ...
    def send_status(self, numerator: int, denominator: int) -> None: ...
    def send_data(self, data: bytes) -> None: ...
    def send_warning(self, data: bytes) -> None: ...
    @property
    def cancelled(self) -> bool: ...


class JobContext:
    """
    The first argument of a job with ``takes_context=True``: its line to whoever waits.

    For any thread and task of the job.

    Attributes:
        handle: The Gearman handle; empty when the function was called in-process.
        unique: The submitter's key, empty when it gave none.
        attempt: Which attempt this is, from 1; with ``handle`` it tells a second run from the first.
        max_attempts: How many there are; None when the job has no number of its own.
        function: The job's name on the wire.
        tail: The last lines that it logged; None where nobody keeps them.

    A job that an orderly stop puts back before its end begins the same attempt again.
    """

    def __init__(
        self,
        handle: str = "",
        unique: str = "",
        reports: Reports | None = None,
        attempt: int = 1,
        max_attempts: int | None = None,
        function: str = "",
    ) -> None:
        self.handle = handle
        self.unique = unique
        self.attempt = attempt
        self.max_attempts = max_attempts
        self.function = function
        self.tail: logs.Tail | None = None
        self._reports = reports
        self._reported_at = -math.inf
        self._progress: tuple[int, int] | None = None
        self._unreported: tuple[int, int] | None = None
        self._has_unsent_lines = False
        self._sending = threading.Lock()
        if reports is not None and reports.takes_log:
            self.tail = logs.Tail(self._logged)

    @property
    def id(self) -> str:
        """The record's id, as of ``JobResult``; empty for a job that did not come from ``enqueue``."""
        before, _, digits = self.handle.rpartition(":r")
        return digits if before and digits.isascii() and digits.isdigit() else ""

    @cached_property
    def group(self) -> GroupResult[Any] | None:
        """The group that the job is a member of, or that it follows; None for none. One query."""
        # Of the public names: group_results.py stands on this file.
        from . import GroupResult

        return GroupResult.of_job(int(self.id)) if self.id else None

    async def agroup(self) -> GroupResult[Any] | None:
        """As ``group``, for an ``async def``."""
        return await sync_to_async(lambda: self.group)()

    @cached_property
    def logger(self) -> logs.JobLogger:
        """A logger of the function's name, whose lines are kept with the record, from INFO on."""
        return logs.JobLogger(logging.getLogger(self.function or "django_gearman.jobs"), self)

    @property
    def cancelled(self) -> bool:
        """
        Whether somebody cancelled the job, who waits for its end no more.

        A function that asks now and then has two seconds to end by itself when
        the answer is True; in others ``JobCancelled`` is raised at once.
        """
        return self._reports is not None and self._reports.cancelled

    def set_progress(self, numerator: int, denominator: int) -> None:
        """
        Say that ``numerator`` of ``denominator`` parts are done.

        Waiting clients and the admin see it. Cheap enough for an inner loop: no
        more than ten a second leave, and the last one within a tenth of a second.

        Raises:
            TypeError: They are no whole numbers.
        """
        progress = (numerator, denominator)
        if progress == self._progress:
            return
        try:
            # numpy's numbers are whole ones, too.
            index(numerator), index(denominator)
        except TypeError:
            raise TypeError(
                f"context.set_progress() takes two whole numbers, such as 3 and 10, not {numerator!r:.50} "
                f"and {denominator!r:.50}; a fraction is round(100 * fraction) of 100"
            ) from None
        self._progress = progress
        held_back = self._unreported is not None
        self._unreported = progress
        if numerator == denominator or monotonic() - self._reported_at >= PROGRESS_INTERVAL:
            self.flush(log=False)
        elif not held_back and self._reports is not None:
            reports.flusher.flush_at(self, time.monotonic() + PROGRESS_INTERVAL)

    def send_data(self, data: bytes | str) -> None:
        """Send a part of the result to the clients that wait; it is not kept."""
        data = _as_bytes("send_data", data)
        if self._reports is not None:
            self._reports.send_data(data)

    def warn(self, data: bytes | str) -> None:
        """Send a warning to the clients that wait; it is not kept."""
        data = _as_bytes("warn", data)
        if self._reports is not None:
            self._reports.send_warning(data)

    def flush(self, *, log: bool = True) -> None:
        """Send progress and lines of the log that were held back."""
        with self._sending:
            progress, self._unreported = self._unreported, None
            if self._reports is None:
                return
            if progress is not None:
                self._reports.send_status(*progress)
                self._reported_at = monotonic()
            if log and self._has_unsent_lines and self.tail is not None:
                self._has_unsent_lines = False
                self._reports.send_log(self.tail.text())

    def close(self) -> None:
        """Send what was held back, and nothing from now on: the job has ended."""
        reports.flusher.forget(self)
        self.flush()
        with self._sending:
            self._reports = None

    def _logged(self) -> None:
        if not self._has_unsent_lines:
            self._has_unsent_lines = True
            reports.flusher.flush_at(self, time.monotonic() + LOG_INTERVAL)


def _as_bytes(method: str, data: bytes | str) -> bytes:
    if isinstance(data, str):
        return data.encode()
    if not isinstance(data, bytes):
        raise TypeError(f"context.{method}() takes bytes or str, not {type(data).__name__}; encode it first")
    return data
