"""
The window: which jobs are here, and what lies behind them at the store's door.

A queue may be larger than memory. Of each function and priority the next jobs
are here, by number and by weight; those behind them, and all that wait for
their time, lie where any server of the store may claim them. What lies there
is counted as it is laid and claimed, and corrected by what the store counts
now and then. What a server does not hold it can only ask about: a question
keeps its place among a client's answers, and nobody waits for one for long.

Which job is next, and who gets it, is the core's affair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from .entries import Claimed, Question, Reply, Standing, StoredJob, Topic
from .jobs import HIGHEST, Function, Job, JobState

if TYPE_CHECKING:
    from .core import JobServer

LEAST_SHARE: Final = 256 * 1024
"""Bytes of jobs that every function may have waiting, however much of memory others take."""

PATIENCE: Final = 1.0
"""Seconds that a client waits for what only the store knows."""

MAX_QUESTIONS: Final = 10_000
"""Questions that may wait for the store; what is asked beyond gets the answer that is given without it."""

STORE_AWAY: Final = 3.0
"""Seconds without a claim after which the store must be out of reach; there is one each second."""


class Window:
    """What one server has of the store's queue, what it knows of the rest, and what it has asked."""

    def __init__(self, server: JobServer) -> None:
        self._server = server
        self.door_seen = True
        """Whether the store has told what lies at its door. Set it to False, where anything may lie there."""
        self.away: dict[Function, None] = {}
        """Functions of which jobs lie at the store's door, as far as is known."""
        self.weight = 0
        """Of all jobs that wait here."""
        self.claimed_at = 0.0
        """The clock's time of the last claim."""
        self._open: dict[int, tuple[Question, Callable[[Reply], None]]] = {}
        """{number of a question: itself, and what is done with the reply}, the oldest first."""
        self._asked = 0

    # What is here.

    def load(self, job: Job) -> None:
        """It waits here: what it weighs counts."""
        weight = job.weight
        job.function.weight += weight
        self.weight += weight

    def unload(self, job: Job) -> None:
        """It waits here no more."""
        weight = job.weight
        job.function.weight -= weight
        self.weight -= weight

    def is_behind(self, function: Function, priority: int) -> bool:
        """Whether a new job is to wait at the store's door: others of its kind do, or the window is full."""
        if priority in function.left or priority in function.spilling or not self.door_seen:
            return True
        full_from = self._full_from(function)
        return full_from is not None and priority <= full_from

    def full(self) -> dict[bytes, int]:
        """{function: priority from which down no more of its jobs are taken in}."""
        found = {}
        for function in {**self._server.ready, **self._server.limits.blocked}:
            priority = self._full_from(function)
            if priority is not None:
                found[function.name] = priority
        return found

    def _full_from(self, function: Function) -> int | None:
        """The priority from which down no more of its jobs are taken in; None while there is room."""
        options = self._server.options
        weight = function.weight
        if weight >= LEAST_SHARE and (
            weight >= options.window_bytes // 4 or self.weight >= options.window_bytes
        ):
            here = (priority for priority, count in function.counts_here().items() if count)
            return max(here, default=HIGHEST)
        return function.full_from(options.window)

    def wants_more(self, function: Function, taken: int) -> bool:
        """Whether it is time to claim more, after a job of some priority was taken; ahead of the need."""
        options = self._server.options
        half = (options.window + 1) // 2
        ready = function.waiting + function.blocked
        if ready >= half and (taken not in function.left or function.counts_here().get(taken, 0) >= half):
            return False
        return function.weight < options.window_bytes // 8

    def must_wait(self, function: Function) -> bool:
        """
        Whether the jobs here must wait since more urgent ones lie at the store's door.

        They are about to be claimed. Not when the store is away: then nobody knows for how long.
        """
        best = function.best_priority()
        if function.limiter is not None and function.limiter.crowded:
            # Up to there they are to stay where they are.
            best = max(best, function.limiter.crowded_from())
        if all(priority <= best for priority in function.left):
            return False
        return self._server.clock - self.claimed_at < STORE_AWAY

    # What lies at the door.

    def lay(self, job: Job) -> None:
        """The store has it at its door: forget it until it is claimed."""
        server, function = self._server, job.function
        self.away[function] = None
        if job.due:
            function.later += 1
        else:
            function.left[job.priority] = function.left.get(job.priority, 0) + 1
        if not job.listeners:
            server.remove(job)
            return

        def take_back(reply: Reply) -> None:
            if job.state is not JobState.PENDING:
                return
            if not isinstance(reply, StoredJob):
                # Another server has it. Who waits for it here cannot hear of it there.
                job.background = job.recorded = False
                job.elsewhere = True
            server.admit(job)
            server.drop_if_abandoned(job)

        self.ask(Topic.TAKE, take_back, handle=job.handle)

    def lay_for_later(self, function: Function) -> None:
        """One that ran is there until its time comes."""
        function.later += 1
        self.away[function] = None

    def claimed(self, claim: Claimed) -> None:
        """The store has looked at its door: take the jobs over, and note what is left there."""
        server = self._server
        self.claimed_at = server.clock
        if claim.left is not None:
            self.door_seen = True
            for function in list(self.away):
                function.left.clear()
                function.later = 0
            for (name, priority), waiting in claim.left.items():
                function = server.functions.get(name) or server.abilities.add(name)
                if waiting.ready:
                    function.left[priority] = waiting.ready
                function.later += waiting.later
                self.away[function] = None
        else:
            for job in claim.jobs:
                self._take_from_door(job)
            for name in claim.emptied:
                if name in server.functions:
                    server.functions[name].left.clear()
        for function in list(self.away):
            self._note_if_all_here(function)
        if claim.limits is not None:
            server.limits.learn(claim.limits)
        server.adopt(claim.jobs)
        for handle in claim.cancelled:
            # Those that have ended meanwhile are not here.
            server.cancel(handle)

    def _take_from_door(self, job: StoredJob) -> None:
        """Count one less there."""
        function = self._server.functions.get(job.function)
        if function is None:
            return
        if job.run_after:
            function.later = max(function.later - 1, 0)
        else:
            # It may be one that nobody had counted, from a view or another server: the last is only
            # taken off when the store says that nothing is left, or what came later would go first.
            count = function.left.get(job.priority, 0)
            if count > 1:
                function.left[job.priority] = count - 1
        self._note_if_all_here(function)

    def _note_if_all_here(self, function: Function) -> None:
        if not function.away:
            self.away.pop(function, None)
            self._server.abilities.note_if_idle(function)
            for _ in range(min(function.waiting, len(function.sleepers))):
                # They may have waited for more urgent ones, which another server took.
                self._server.wake(function)

    # What only the store knows.

    def ask(
        self,
        topic: Topic,
        then: Callable[[Reply], None],
        *,
        handle: bytes = b"",
        function: bytes = b"",
        unique: bytes = b"",
        workload: bytes = b"",
    ) -> None:
        """Ask the store; ``then`` is told within ``PATIENCE``, and at once if too much is asked."""
        if len(self._open) >= MAX_QUESTIONS:
            then(self._guess(topic))
            return
        self._asked += 1
        # Of a workload only what tells jobs apart is needed.
        sent = workload if unique == b"-" else b""
        question = Question(topic, self._asked, self._server.clock, handle, function, unique, sent)
        self._open[self._asked] = question, then
        self._server.questions.append(question)

    def is_open(self, question: Question) -> bool:
        """Whether somebody still waits for the reply."""
        if question.topic is Topic.PERMITS:
            return self._server.limits.is_open(question)
        return question.number in self._open

    def replied(self, question: Question, reply: Reply) -> None:
        """The store has answered. A job that it handed over is taken over, also when nobody waits for it."""
        if question.topic is Topic.PERMITS:
            self._server.limits.replied(question, reply)
            return
        if isinstance(reply, StoredJob):
            self._take_from_door(reply)
            # Perhaps it was the last there.
            self._server.claim_wanted = True
        _, then = self._open.pop(question.number, (None, None))
        if then is not None:
            then(reply)
        elif isinstance(reply, StoredJob):
            self._server.adopt([reply])

    def tick(self) -> None:
        """Whoever has waited too long for what only the store knows is told what can be said without it."""
        while self._open:
            question, then = next(iter(self._open.values()))
            if self._server.clock - question.at < PATIENCE:
                break
            del self._open[question.number]
            then(self._guess(question.topic))

    def _guess(self, topic: Topic) -> Reply:
        """Who asks how a job stands asks again while it is there: rather so than that it were gone."""
        return Standing(running=False) if self.away and topic in (Topic.STATUS, Topic.UNIQUE) else None
