"""
Jobs whose workers may come back with them.

They ran when the server ended, or when their worker lost its connection:
nobody else gets them for a moment. Who speaks for a worker is in ``crews.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from .entries import JobStarted, StoredJob
from .jobs import DELAYED, READY, RUNNING, Job

if TYPE_CHECKING:
    from .core import JobServer
    from .peers import Peer

WORKERS_RETURN: Final = 5.0
"""Seconds after the start in which workers may come back with jobs that they had when the server ended."""


class Returning:
    """Which jobs wait for their workers. They count as delayed."""

    def __init__(self, server: JobServer) -> None:
        self._server = server
        self._until: dict[Job, float | None] = {}
        """{job that ran when the server ended: the clock's time until which its worker may come back}.

        None before the first tick.
        """

    def __bool__(self) -> bool:
        return bool(self._until)

    def __contains__(self, job: Job) -> bool:
        return job in self._until

    def adopt(self, jobs: Iterable[StoredJob]) -> None:
        """
        The store handed over what ran when an earlier run of the server ended.

        The workers may be at it still, and come back: nobody else gets the
        jobs for a moment.
        """
        server = self._server
        interrupted = list(jobs)
        server.adopt(interrupted)
        for stored in interrupted:
            job = server.jobs[stored.handle]
            if job.state is READY:
                self._set_aside(job)

    def _set_aside(self, job: Job) -> None:
        """Let one that waits wait for its worker to come back."""
        self._server.take_out(job)
        if job.function.limiter is not None:
            # Its worker may be at it.
            self._server.limits.force(job)
        job.state = DELAYED
        job.function.delayed += 1
        self._until[job] = None

    def hold(self, job: Job, *, for_ever: bool) -> bool:
        """
        Who speaks for its worker says that it is at the job still, or is gone himself.

        Returns:
            Whether the job waits for its worker to come back.
        """
        if for_ever and job.state is READY and job.background:
            # The hand-out was not written down before the server ended.
            self._set_aside(job)
        if job not in self._until:
            return False
        self._until[job] = math.inf if for_ever else self._server.clock + WORKERS_RETURN
        return True

    def give_up(self, job: Job) -> None:
        """The worker will not come back with the job: it is the next."""
        if self._until.pop(job, 0.0) != 0.0:
            job.function.delayed -= 1
            self._server.put_first(job)

    def forget(self, job: Job) -> None:
        """It has ended."""
        self._until.pop(job, None)

    def tick(self) -> None:
        """Who has not come back by now has lost the job: it is the next."""
        for job, until in reversed(list(self._until.items())):
            if until is None:
                self._until[job] = self._server.clock + WORKERS_RETURN
            elif until <= self._server.clock:
                self.give_up(job)

    def resume(self, job: Job, peer: Peer, attempt: int) -> None:
        """A worker that had lost its connection has the job still; nothing happens if it may not have it."""
        server = self._server
        function = job.function
        if function.name not in peer.abilities or server.clock >= server.hand_out_until:
            return
        if job.state is READY:
            server.take_out(job)
            server.window.unload(job)
        elif job in self._until:
            del self._until[job]
            function.delayed -= 1
            server.window.unload(job)
        elif job.state is RUNNING:
            server.release(job)
        else:
            return
        function.running += 1
        job.state = RUNNING
        job.worker = peer
        job.attempts = attempt
        peer.running[job.handle] = job
        server.note_time_limit(job, peer)
        if function.limiter is not None:
            server.limits.force(job)
        if job.recorded:
            server.entries.append(JobStarted(job.handle, peer.identity, job.attempts, server.now))
