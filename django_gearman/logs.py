"""
What jobs log: every record says whose it is, and the last lines are kept for the job's record.

The job that runs is told from others by a context variable, so that threads
and tasks each have their own. Nothing of the project's ``LOGGING`` is touched:
records are marked, and read along, where they are made.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final, Protocol

MAX_LINES: Final = 100
"""Records of one attempt that are kept, the last ones."""

MAX_BYTES: Final = 16_000
"""Bytes of them, in UTF-8."""

MAX_RECORD: Final = 4_000
"""Characters of one of them, its traceback included."""


class RunningJob(Protocol):
    """Whose records they are; the job's ``JobContext``."""

    @property
    def id(self) -> str: ...
    @property
    def handle(self) -> str: ...
    @property
    def function(self) -> str: ...
    @property
    def attempt(self) -> int: ...
    @property
    def tail(self) -> Tail | None: ...


_current: ContextVar[RunningJob | None] = ContextVar("gearman_job", default=None)


class logging_as:
    """Let what is logged in the block be the job's. A class: a generator would cost more than it does."""

    __slots__ = ("_job", "_token")

    def __init__(self, job: RunningJob) -> None:
        self._job = job

    def __enter__(self) -> None:
        self._token = _current.set(self._job)

    def __exit__(self, *exc: object) -> None:
        _current.reset(self._token)


class Tail:
    """
    The last lines that a job logged, for any thread.

    Args:
        changed: Called after each line, in the thread that logged it.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._lines: deque[bytes] = deque()
        self._size = 0
        self._left_out = 0
        # As that of logging: what the garbage collector ends here may log.
        self._lock = threading.RLock()

    def add(self, line: str) -> None:
        data = (line if len(line) <= MAX_RECORD else line[: MAX_RECORD - 1] + "…").encode(
            errors="backslashreplace"
        )
        with self._lock:
            self._lines.append(data)
            self._size += len(data) + 1
            while self._size > MAX_BYTES or len(self._lines) > MAX_LINES:
                self._size -= len(self._lines.popleft()) + 1
                self._left_out += 1
        self._changed()

    def text(self) -> bytes:
        """All of it, with a line that says how much is left out."""
        with self._lock:
            lines = list(self._lines)
            left_out = self._left_out
        if left_out:
            lines.insert(0, b"[%d earlier lines are left out]" % left_out)
        return b"\n".join(lines)


def line_of(record: logging.LogRecord) -> str:
    """A record as a line, or as several when it has a traceback."""
    try:
        message = record.getMessage()
    except Exception:
        # Wrong arguments are told where the record is shown; here they must not end the job.
        message = str(record.msg)
    at = time.strftime("%H:%M:%S", time.localtime(record.created))
    line = f"{at} {record.levelname} {record.name}: {message}"
    if record.exc_info and record.exc_info[0] is not None:
        line += "\n" + logging.Formatter().formatException(record.exc_info)
    return line


def mark(record: logging.LogRecord) -> RunningJob | None:
    """Say in a record which job it is of; empty texts and 0 when it is of none."""
    job = _current.get()
    record.job_id = "" if job is None else job.id or job.handle
    record.job_handle = "" if job is None else job.handle
    record.job_function = "" if job is None else job.function
    record.job_attempt = 0 if job is None else job.attempt
    return job


class JobFilter(logging.Filter):
    """
    Lets every record pass, and gives it ``job_id``, ``job_handle``, ``job_function`` and ``job_attempt``.

    For ``LOGGING``, where a formatter names them: in processes that run no jobs
    they would be missing otherwise.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        # One that came through a queue was marked in its own thread.
        if not hasattr(record, "job_id"):
            mark(record)
        return True


class JobLogger(logging.LoggerAdapter[logging.Logger]):
    """
    ``context.logger``: the logger of the function's name.

    What ``LOGGING`` does not let pass is kept with the job's record all the same, from INFO on.
    """

    def __init__(self, logger: logging.Logger, job: RunningJob) -> None:
        super().__init__(logger, {})
        self._job = job

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        # The adapter's own would put its empty extra in the place of the caller's.
        return msg, kwargs

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        if self.logger.isEnabledFor(level):
            # Also in a thread that was begun without the job's context.
            with logging_as(self._job):
                super().log(level, msg, *args, **{**kwargs, "stacklevel": kwargs.get("stacklevel", 1) + 1})
        elif level >= logging.INFO and self._job.tail is not None:
            record = logging.LogRecord(self.logger.name, level, "", 0, msg, args, None)
            self._job.tail.add(line_of(record))


_installing = threading.Lock()
_installed = False


def install() -> None:
    """
    From now on mark every record that this process makes, and read along what jobs log.

    What was the factory of records before goes on making them.
    """
    global _installed
    if _installed:
        return
    with _installing:
        if _installed:
            return
        _installed = True
        make = logging.getLogRecordFactory()

        def make_and_note(name: Any, *args: Any, **kwargs: Any) -> logging.LogRecord:
            record: logging.LogRecord = make(name, *args, **kwargs)
            job = mark(record)
            # One without a name is being rebuilt from elsewhere, by makeLogRecord().
            if job is not None and job.tail is not None and name is not None:
                job.tail.add(line_of(record))
            return record

        logging.setLogRecordFactory(make_and_note)
