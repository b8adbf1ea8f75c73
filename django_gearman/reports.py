"""
When a running job's progress and log leave: not with every call, and not never.

What is held back leaves when its time has come, even if the job says nothing
more: a thread sees to it, which is there only while something is held back.
"""

from __future__ import annotations

import logging
import os
import threading
from time import monotonic
from typing import Final, Protocol

logger = logging.getLogger(__name__)

_TICK: Final = 0.05
"""Seconds between two looks at what is held back."""

_LINGER: Final = 0.5
"""Seconds for which the thread stays when nothing is."""


class HoldsBack(Protocol):
    def flush(self) -> None: ...


class Flusher:
    """Flushes each at its time, from a thread of its own."""

    def __init__(self) -> None:
        self._due: dict[HoldsBack, float] = {}
        # Of the same thread: what the garbage collector ends here may log, which comes this way again.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None

    def flush_at(self, job: HoldsBack, at: float) -> None:
        """Flush it at that monotonic time, or before if that was asked for."""
        with self._lock:
            if at < self._due.get(job, at + 1.0):
                self._due[job] = at
            if self._thread is not None:
                return
            thread = threading.Thread(target=self._run, name="gearman-reports", daemon=True)
            if self._thread is not None:
                return
            self._thread = thread
            try:
                thread.start()
            except RuntimeError:
                self._thread = None  # the system has none left: it leaves at the job's end

    def forget(self, job: HoldsBack) -> None:
        """There is nothing more to flush."""
        if job in self._due:
            with self._lock:
                self._due.pop(job, None)

    def _run(self) -> None:
        pause = threading.Event()
        idle_until = monotonic() + _LINGER
        while True:
            now = monotonic()
            with self._lock:
                due = [job for job, at in list(self._due.items()) if at <= now]
                for job in due:
                    self._due.pop(job, None)
                if self._due or due:
                    idle_until = now + _LINGER
                elif now >= idle_until:
                    self._thread = None
                    return
            for job in due:
                try:
                    job.flush()
                except Exception:
                    logger.exception("What a job reports could not be sent")
            pause.wait(_TICK)


flusher = Flusher()


def _begin_anew() -> None:
    """In a forked child: the thread is not there, and its lock may be held for ever."""
    global flusher
    flusher = Flusher()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
