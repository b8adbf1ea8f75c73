"""Where jobs outlive the server, as the journal asks it to; and a store that keeps them in memory alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Protocol

from ..permits import Book
from .entries import (
    Claimed,
    Crowd,
    Entry,
    JobFinished,
    JobKept,
    JobProgress,
    JobQueued,
    JobRequeued,
    JobStarted,
    JobUnclaimed,
    Joined,
    Question,
    Reply,
    Standing,
    StoredJob,
    Topic,
    Waiting,
    has_key,
)


class JobStore(Protocol):
    """
    Where jobs outlive the server.

    Every method but ``close`` is called from one thread, may take its time, and
    raises ``StoreError`` when the store is out of reach for now (nothing was
    written, or it is unknown) and ``LeaseLost`` when it is for good.
    """

    @property
    def renewed(self) -> float:
        """Monotonic time at which this server last proved its jobs to be its own; infinite without rivals."""

    laid: bool
    """Whether it has laid jobs at the door by itself, to be claimed soon; set back by who sees it."""

    over: list[int]
    """Groups of which it has written the last member's end; emptied by who sees it."""

    def write(self, entries: Sequence[Entry], *, again: bool) -> dict[int, str | Joined]:
        """
        Write a batch in one transaction, in order.

        Args:
            again: The batch was tried before with an unknown outcome: what is
                there already must not be there twice.
        Returns:
            {index of an entry that is not kept: why, or which job it joined}; all others are kept.
        """

    def claim(self, limit: int, full: Mapping[bytes, int], crowded: Mapping[bytes, Crowd] = ...) -> Claimed:
        """
        Take about ``limit`` jobs from the door: those that no server has, and that are due.

        Of each function the most urgent first, then in the order in which they
        became ready. Called about once a second whatever happens: it also proves
        that this server is alive.

        Args:
            full: {function: priority from which down none of its jobs is wanted}.
            crowded: {function: keys of its limit of which no more are wanted}.
        """

    def ask(self, questions: Sequence[Question]) -> dict[int, Reply]:
        """What the store knows of jobs that the server does not hold: {number of a question: reply}."""

    def resume(self) -> list[StoredJob]:
        """
        Take over what an earlier run of this server left unfinished. Called once, and first.

        What waited is laid at the door; foreground jobs ended with their server.

        Returns:
            What was running, and waits again: its workers may come back with it at any moment.
        """

    def tend(self) -> float:
        """
        Do a little of the store's own housekeeping, for no longer than a submission can wait.

        Returns:
            Seconds after which to be called again; infinite for never.
        """

    def close(self) -> None:
        """Let go of everything; called last, from the writer's thread."""


class MemoryStore:
    """
    A store that forgets everything when the process ends.

    The contract of ``JobStore`` in its shortest form, for tests and for
    embedding; ``gearman_server --store memory`` needs no store at all.

    Args:
        clock: Wall time in seconds since 1970.
        monotonic: The core's clock.
    """

    renewed = math.inf
    laid = False

    def __init__(
        self, clock: Callable[[], float] = time.time, monotonic: Callable[[], float] = monotonic
    ) -> None:
        self.over: list[int] = []
        self.jobs: dict[bytes, StoredJob] = {}
        """Unfinished background jobs that the server has, in the order they came."""
        self.unclaimed: list[StoredJob] = []
        """What lies at the door, in the order it came."""
        self.book = Book()
        """Limits of functions, and who has permits."""
        self._clock = clock
        self._monotonic = monotonic
        self._foreground: dict[bytes, StoredJob] = {}
        self._running: dict[bytes, Standing] = {}
        self.finished: dict[bytes, JobFinished] = {}

    def write(self, entries: Sequence[Entry], *, again: bool) -> dict[int, str | Joined]:
        joined: dict[int, str | Joined] = {}
        # What ended makes room for the next of its unique, wherever in the batch it stands.
        ended = {entry.handle for entry in entries if isinstance(entry, JobFinished)}
        for index, entry in enumerate(entries):
            handle = entry.handle
            if isinstance(entry, JobQueued):
                if again and (handle in self.jobs or any(job.handle == handle for job in self.unclaimed)):
                    continue
                other = self.find_live(*entry[1:4]) if entry.background else None
                if other is not None and other.handle not in (handle, *ended) and handle not in ended:
                    joined[index] = Joined(other.handle)
                    continue
                self._keep(entry)
            elif isinstance(entry, JobKept):
                # Not there when the batch was written before: kept already, or ended.
                if handle in self._foreground:
                    self.jobs[handle] = self._foreground.pop(handle)
            elif isinstance(entry, JobStarted):
                self._running[handle] = Standing(running=True)
                for jobs in (self.jobs, self._foreground):
                    if handle in jobs:
                        jobs[handle] = jobs[handle]._replace(attempts=entry.attempts)
            elif isinstance(entry, JobProgress):
                self._running[handle] = Standing(True, entry.numerator, entry.denominator)
            elif isinstance(entry, JobRequeued):
                self._running.pop(handle, None)
                if handle in self.jobs and not entry.counts:
                    self.jobs[handle] = self.jobs[handle]._replace(attempts=entry.attempt - 1)
                if handle in self.jobs and entry.run_after:
                    self.jobs[handle] = self.jobs[handle]._replace(run_after=entry.run_after)
                if handle in self.jobs and entry.unclaimed:
                    self.unclaimed.append(self.jobs.pop(handle))
            elif isinstance(entry, JobUnclaimed):
                if handle in self.jobs:
                    self.unclaimed.append(self.jobs.pop(handle))
            elif isinstance(entry, JobFinished):
                self._forget(handle)
                self.finished[handle] = entry
        return joined

    def _keep(self, entry: JobQueued) -> None:
        job = StoredJob(
            entry.handle,
            entry.function,
            entry.unique,
            entry.workload,
            entry.priority,
            entry.attempts,
            None,
            entry.reducer,
            entry.run_after,
            limit_key=entry.limit_key,
        )
        if entry.unclaimed:
            self.unclaimed.append(job)
        else:
            (self.jobs if entry.background else self._foreground)[entry.handle] = job

    def _forget(self, handle: bytes) -> None:
        self._running.pop(handle, None)
        self.jobs.pop(handle, None)
        self._foreground.pop(handle, None)
        self.unclaimed = [job for job in self.unclaimed if job.handle != handle]

    def find_live(self, function: bytes, unique: bytes, workload: bytes) -> StoredJob | None:
        """The job to do that has the unique; ``-`` stands for the workload."""
        if not has_key(unique, workload):
            return None
        wanted = workload if unique == b"-" else None
        for job in (*self.jobs.values(), *self.unclaimed):
            if (job.function, job.unique) == (function, unique) and wanted in (None, job.workload):
                return job
        return None

    def claim(self, limit: int, full: Mapping[bytes, int], crowded: Mapping[bytes, Crowd] = {}) -> Claimed:
        now = self._clock()
        wanted = [
            job
            for job in self.unclaimed
            if job.run_after <= now
            and (job.function not in full or job.priority > full[job.function])
            and not (
                job.function in crowded
                and (job.limit_key or b"") in crowded[job.function].keys
                and job.priority <= crowded[job.function].priority
            )
        ]
        # Those for later became ready when they were due; nobody knows that of the others.
        wanted.sort(key=lambda job: (-job.priority, job.run_after))
        claimed = wanted[:limit]
        for job in claimed:
            self._claim(job)
        left: dict[tuple[bytes, int], Waiting] = {}
        for job in self.unclaimed:
            ready, later = left.get((job.function, job.priority), (0, 0))
            is_later = job.run_after > now
            left[job.function, job.priority] = Waiting(ready + (not is_later), later + is_later)
        due_in = min((job.run_after - now for job in self.unclaimed if job.run_after > now), default=math.inf)
        limits = dict(self.book.limits)
        return Claimed(claimed, more=len(wanted) > limit, left=left, due_in=due_in, limits=limits)

    def _claim(self, job: StoredJob) -> None:
        self.unclaimed.remove(job)
        self.jobs[job.handle] = job

    def ask(self, questions: Sequence[Question]) -> dict[int, Reply]:
        return {question.number: self._reply(question) for question in questions}

    def _reply(self, question: Question) -> Reply:
        handle = question.handle
        match question.topic:
            case Topic.STATUS:
                known = handle in self.jobs or any(job.handle == handle for job in self.unclaimed)
                return self._running.get(handle, Standing(running=False)) if known else None
            case Topic.UNIQUE:
                known = any(job.unique == question.unique for job in (*self.jobs.values(), *self.unclaimed))
                return Standing(running=False) if known else None
            case Topic.TAKE:
                for job in self.unclaimed:
                    same = job is self.find_live(question.function, question.unique, question.workload)
                    if job.handle == handle or same:
                        self._claim(job)
                        return job
                return None
            case Topic.CANCEL:
                there = any(job.handle == handle for job in self.unclaimed)
                self._forget(handle)
                return there or None
            case Topic.PERMITS:
                assert question.request is not None, "it says what is wanted"
                now = self._clock()
                return self.book.decide(question.function, question.request, "", now, self._monotonic())

    def resume(self) -> list[StoredJob]:
        self._foreground.clear()
        interrupted = {
            handle: job._replace(interruptions=job.interruptions + 1)
            for handle, job in self.jobs.items()
            if handle in self._running
        }
        self.unclaimed += [job for handle, job in self.jobs.items() if handle not in interrupted]
        self.jobs = interrupted
        self._running.clear()
        return list(interrupted.values())

    def tend(self) -> float:
        return math.inf

    def close(self) -> None:
        pass
