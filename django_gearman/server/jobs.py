"""
Jobs, and the functions that they wait for.

A ``Function`` is everything the server knows under one name: its waiting jobs
by priority, its uniques, its workers and which of them sleep. No packets here
and no peers' affairs: the core moves jobs between these places.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Final

from .metrics import Counts

if TYPE_CHECKING:
    from .entries import Entry
    from .limits import Gate, Limiter
    from .peers import Answer, Peer

OVERHEAD: Final = 600
"""About how many bytes a job takes beside its workload."""

HIGHEST: Final = 100
"""The most urgent priority that there is."""

HIGH: Final = 50
NORMAL: Final = 0
LOW: Final = -50
"""Those that packets name."""

UniqueKey = bytes | tuple[bytes]
"""A unique as sent, or the workload in a tuple where the unique was ``-``."""


class JobState(Enum):
    PENDING = "pending"
    """Not yet written: nobody may run it."""
    DELAYED = "delayed"
    """Written, and waiting for its time."""
    READY = "ready"
    RUNNING = "running"
    GONE = "gone"
    """Ended; may still lie in a queue, where it is passed over."""


PENDING, DELAYED, READY, RUNNING, GONE = JobState


class Job:
    """One job that the server holds."""

    __slots__ = (
        "answers",
        "attempts",
        "awaited",
        "background",
        "denominator",
        "due",
        "elsewhere",
        "function",
        "gate",
        "handle",
        "interruptions",
        "key",
        "limit_key",
        "listeners",
        "max_attempts",
        "numerator",
        "priority",
        "progress_at",
        "progress_unsaved",
        "ready_at",
        "recorded",
        "reducer",
        "serial",
        "spilled",
        "started_at",
        "state",
        "timeout",
        "unique",
        "worker",
        "workload",
    )

    def __init__(
        self,
        handle: bytes,
        function: Function,
        unique: bytes,
        workload: bytes,
        priority: int,
        *,
        background: bool,
        recorded: bool,
    ) -> None:
        self.handle = handle
        self.function = function
        self.unique = unique
        self.workload = workload
        self.priority = priority
        self.background = background
        """Whether the job stays when no client listens."""
        self.recorded = recorded
        """Whether the store has, or will have, a row of it."""
        self.serial = 0
        """Order of creation among the jobs of this run."""
        self.reducer = b""
        self.due = 0.0
        """Wall time before which it must not run; 0 for none."""
        self.key: UniqueKey | None = None
        """Its place in ``function.uniques``; None when it can not be joined."""
        self.state = JobState.READY
        self.worker: Peer | None = None
        self.listeners: list[Peer] | None = None
        """Who gets the worker's packets; a peer that submitted twice is listed twice."""
        self.answers: list[Answer] | None = None
        """JOB_CREATED replies that wait for the commit; None when there is nothing to wait for."""
        self.awaited: Entry | None = None
        """Which of the core's entries they wait for."""
        self.spilled = False
        """Whether it is only held until the store has it: it waits at the store's door."""
        self.elsewhere = False
        """Whether it is kept, but perhaps as another server's: it was laid at the door."""
        self.attempts = 0
        self.interruptions = 0
        """How many of the attempts ended with their server."""
        self.max_attempts: int | None = None
        """How often it may be handed out; None for the server's own limit."""
        self.timeout: int | None = None
        """Seconds that one attempt may take."""
        self.started_at = 0.0
        """Wall time of the last hand-out."""
        self.numerator = b"0"
        self.denominator = b"0"
        self.progress_at = 0.0
        """When progress was last recorded."""
        self.progress_unsaved = False
        """Whether there was some since."""
        self.ready_at = 0.0
        """Wall time from which it could be run."""
        self.gate: Gate | None = None
        """Where it waits for a permit, or has one from; None where its function is not limited."""
        self.limit_key: bytes | None = None
        """What its function's limit is counted by; None when it was not looked at."""

    @property
    def weight(self) -> int:
        """About how many bytes of memory it takes."""
        return OVERHEAD + len(self.workload)


class Function:
    """All that waits, runs and serves under one name."""

    __slots__ = (
        "arriving",
        "blocked",
        "counts",
        "delayed",
        "ended",
        "held",
        "later",
        "left",
        "levels",
        "limiter",
        "limits",
        "name",
        "priorities",
        "running",
        "served",
        "sleepers",
        "spilling",
        "tally",
        "uniques",
        "waiting",
        "weight",
        "workers",
    )

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.levels: dict[int, deque[Job]] = {}
        """{priority: its jobs in order}; ended jobs stay until they come to the front."""
        self.counts: dict[int, int] = {}
        """{priority: how many of the jobs that lie there are ready}."""
        self.priorities: list[int] = []
        """The keys of ``levels``, negated, so that the most urgent is first."""
        self.held = 0
        """Jobs of any state but GONE: pending ones too."""
        self.waiting = 0
        """Jobs that are ready to be handed out."""
        self.limiter: Limiter | None = None
        """What keeps count of it while only so many of its jobs may run, or begin, at a time."""
        self.blocked = 0
        """Jobs that are ready, but for a permit; none without a ``limiter``."""
        self.ended = 0
        """At most so many ended jobs still lie in ``levels``."""
        self.running = 0
        self.delayed = 0
        """Jobs that wait for their time."""
        self.arriving = 0
        """Pending jobs that are to wait here."""
        self.weight = 0
        """About how many bytes those are that wait here, or are to."""
        self.left: dict[int, int] = {}
        """{priority: ready jobs that lie at the store's door, as far as is known}, without zeros."""
        self.later = 0
        """Jobs that wait there for their time."""
        self.spilling: dict[int, int] = {}
        """{priority: pending jobs that are on their way there}, without zeros."""
        self.served = 0
        """Serial of the last hand-out of any function: those of equal priority take turns by it."""
        self.limits: tuple[int, int, int] | None = None
        """How many jobs it may hold when one of high, normal or low priority comes; 0 for no limit."""
        self.uniques: dict[UniqueKey, Job] = {}
        self.tally = Counts()
        self.workers: dict[Peer, None] = {}
        self.sleepers: dict[Peer, None] = {}
        """Workers to wake, the last to sleep at the end. Some may be awake by now."""

    @property
    def total(self) -> int:
        """Waiting, delayed and running jobs, as ``status`` counts them: in the store too."""
        return self.waiting + self.blocked + self.delayed + self.running + self.away

    @property
    def away(self) -> int:
        """Jobs that only the store has."""
        return self.later + sum(self.left.values()) if self.left else self.later

    @property
    def idle(self) -> bool:
        """Whether nothing would be lost with it."""
        return not self.held and not self.workers and self.limits is None and not self.away

    def is_full(self, priority: int) -> bool:
        """Whether a new job of that priority is one too many; only to be asked while there are ``limits``."""
        assert self.limits is not None, "without limits it is never full"
        high, normal, low = self.limits
        limit = high if priority > 0 else low if priority < 0 else normal
        return limit > 0 and self.held + self.away >= limit

    def count_waiting(self) -> tuple[int, int, int]:
        """How many jobs wait of high priority, above 0, of normal, delayed ones too, and of low, below 0."""
        high, normal, low = 0, self.delayed + self.later, 0
        counts = dict(self.left)
        for priority, count in self.counts_here().items():
            counts[priority] = counts.get(priority, 0) + count
        for priority, count in counts.items():
            if priority > 0:
                high += count
            elif priority < 0:
                low += count
            else:
                normal += count
        return high, normal, low

    def full_from(self, window: int) -> int | None:
        """The priority from which down as many jobs wait, or come, as fit; None while there is room."""
        here = self.waiting + self.blocked + self.arriving
        if self.limiter is not None:
            # One key must not keep the others away.
            here -= self.limiter.excess
        if here < window:
            return None
        if self.arriving >= window:
            return HIGHEST
        counts = self.counts_here()
        for priority in sorted(counts, reverse=True):
            if counts[priority] + self.arriving >= window:
                return priority
        return None

    def counts_here(self) -> dict[int, int]:
        """{priority: how many jobs are ready}, with those that wait for a permit."""
        if self.limiter is None or not self.blocked:
            return self.counts
        counts = dict(self.counts)
        for priority, count in self.limiter.counts.items():
            counts[priority] = counts.get(priority, 0) + count
        return counts

    def put(self, job: Job) -> None:
        """Let a job wait behind those of its priority."""
        self._level(job.priority).append(job)
        self.counts[job.priority] += 1
        self.waiting += 1

    def put_back(self, job: Job) -> None:
        """Let a job that was handed out in vain wait before all others of its priority."""
        self._level(job.priority).appendleft(job)
        self.counts[job.priority] += 1
        self.waiting += 1

    def _level(self, priority: int) -> deque[Job]:
        level = self.levels.get(priority)
        if level is None:
            level = self.levels[priority] = deque()
            insort(self.priorities, -priority)
            self.counts[priority] = 0
        return level

    def drop_ended(self) -> None:
        """Look through all levels and keep only what waits."""
        for priority, level in self.levels.items():
            self.levels[priority] = deque(job for job in level if job.state is JobState.READY)
        self.ended = 0

    def best_priority(self) -> int:
        """The highest priority that waits; only to be asked while ``waiting``."""
        while True:
            priority = -self.priorities[0]
            level = self.levels[priority]
            while level:
                if level[0].state is JobState.READY:
                    return priority
                level.popleft()
            del self.levels[priority], self.counts[priority], self.priorities[0]

    def take(self) -> Job:
        """The next job in order; only to be called while ``waiting``."""
        priority = self.best_priority()
        self.waiting -= 1
        self.counts[priority] -= 1
        return self.levels[priority].popleft()

    def withdraw(self, job: Job) -> None:
        """Take out one that waits, wherever it stands."""
        self.levels[job.priority].remove(job)
        self.counts[job.priority] -= 1
        self.waiting -= 1

    def take_all(self) -> list[Job]:
        """Take out all that wait, in order."""
        levels = (self.levels[-priority] for priority in self.priorities)
        jobs = [job for level in levels for job in level if job.state is JobState.READY]
        self.levels.clear()
        self.counts.clear()
        self.priorities.clear()
        self.waiting = self.ended = 0
        return jobs

    def has_foreground(self) -> bool:
        """Whether a job waits that is not kept. Looks through all of them."""
        return self._first_foreground() is not None

    def take_foreground(self) -> Job:
        """The next job that is not kept; only to be called when it ``has_foreground``."""
        job = self._first_foreground()
        assert job is not None, "asked for a job that is not there"
        self.levels[job.priority].remove(job)
        self.counts[job.priority] -= 1
        self.waiting -= 1
        return job

    def _first_foreground(self) -> Job | None:
        for priority in self.priorities:
            for job in self.levels[-priority]:
                if job.state is JobState.READY and not job.background:
                    return job
        return None


def unique_key(unique: bytes, workload: bytes) -> UniqueKey | None:
    """What tells jobs of a function apart; None for jobs that are all apart."""
    # PROTOCOL is silent on it, but gearmand (job.cc) and Perl's Job.pm agree:
    # the unique "-" stands for the workload itself.
    if unique == b"-":
        return (workload,) if workload else None
    return unique or None
