"""
Submissions: what SUBMIT_JOB and its like make of a packet.

A new job, a place among those that listen to a live one of the same unique, or
a refusal. JOB_CREATED of a background job leaves when the journal has written
it: ``JobServer.committed``.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from ..protocol.packets import CLAIM, CLAIMED, PacketType, atoi, encode_response
from .abilities import is_printable
from .cron import next_match
from .entries import JobKept, JobQueued, JobStarted, Reply, StoredJob, Topic
from .jobs import HIGH, LOW, NORMAL, PENDING, Job, unique_key

if TYPE_CHECKING:
    from .core import JobServer
    from .peers import Handler, Peer

LATEST: Final = 253_370_764_800
"""The year 9999, in seconds since 1970: as late as a database's column goes."""

_PRIORITIES: dict[PacketType, tuple[int, bool]] = {
    PacketType.SUBMIT_JOB: (NORMAL, False),
    PacketType.SUBMIT_JOB_HIGH: (HIGH, False),
    PacketType.SUBMIT_JOB_LOW: (LOW, False),
    PacketType.SUBMIT_JOB_BG: (NORMAL, True),
    PacketType.SUBMIT_JOB_HIGH_BG: (HIGH, True),
    PacketType.SUBMIT_JOB_LOW_BG: (LOW, True),
}


class Submissions:
    """The packets of those who want something done."""

    def __init__(self, server: JobServer) -> None:
        self._server = server
        self._created = 0
        self._durable = server.options.durable
        self._record_foreground = server.options.durable and server.options.record_foreground

    def handlers(self) -> dict[PacketType, Handler]:
        """What to do with each of the packets."""
        plain = {kind: self._submission(*how) for kind, how in _PRIORITIES.items()}
        return plain | {
            PacketType.SUBMIT_JOB_EPOCH: self._submit_epoch,
            PacketType.SUBMIT_JOB_SCHED: self._submit_sched,
            PacketType.SUBMIT_REDUCE_JOB: self._submit_reduce_job,
            PacketType.SUBMIT_REDUCE_JOB_BACKGROUND: self._submit_reduce_job_background,
        }

    def _submission(self, priority: int, background: bool) -> Handler:
        submit = self.submit

        def handle(peer: Peer, arguments: list[bytes]) -> None:
            submit(peer, arguments, priority, background=background)

        return handle

    def _submit_epoch(self, peer: Peer, arguments: list[bytes]) -> None:
        """In the background, of normal priority, not before a time; what is no number is no time."""
        name, unique, epoch, workload = arguments
        due = float(min(atoi(epoch), LATEST))
        self.submit(peer, [name, unique, workload], NORMAL, background=True, due=due)

    def _submit_sched(self, peer: Peer, arguments: list[bytes]) -> None:
        """In the background, once, at the next moment that five cron fields name. In no C server."""
        name, unique, *fields, workload = arguments
        try:
            due = next_match(fields, self._server.now, self._server.options.zone)
        except ValueError as error:
            self._server.refuse(peer, b"INVALID_ARGUMENT", str(error).encode())
            return
        self.submit(peer, [name, unique, workload], NORMAL, background=True, due=due)

    def _submit_reduce(self, peer: Peer, arguments: list[bytes], *, background: bool) -> None:
        """gearmand reads the aggregator, which its document leaves out, and drops it too."""
        name, unique, reducer, _, workload = arguments
        if len(reducer) > self._server.options.max_function or not is_printable(reducer):
            self._server.refuse(peer, b"ARGUMENT_TOO_LARGE", b"Reducer is no function name")
            return
        self.submit(peer, [name, unique, workload], NORMAL, background=background, reducer=reducer)

    def _submit_reduce_job(self, peer: Peer, arguments: list[bytes]) -> None:
        self._submit_reduce(peer, arguments, background=False)

    def _submit_reduce_job_background(self, peer: Peer, arguments: list[bytes]) -> None:
        self._submit_reduce(peer, arguments, background=True)

    def submit(
        self,
        peer: Peer,
        arguments: list[bytes],
        priority: int,
        *,
        background: bool,
        reducer: bytes = b"",
        due: float = 0.0,
        asked: bool = False,
    ) -> None:
        server = self._server
        name, unique, workload = arguments
        function = server.functions.get(name)
        if function is None:
            if name == CLAIM and background:
                self._claim(peer)
                return
            function = server.abilities.function(peer, name)
            if function is None:
                return
        if len(unique) > server.options.max_unique:
            server.refuse(peer, b"ARGUMENT_TOO_LARGE", b"Unique value too large")
            return
        key = unique_key(unique, workload)
        if key is not None:
            job = function.uniques.get(key)
            if job is not None:
                self._join(peer, job, background=background)
                return
            if not background and not asked and function.away:
                self._ask_first(peer, arguments, priority, reducer)
                return
        if function.limits is not None and function.is_full(priority):
            server.refuse(peer, b"QUEUE_ERROR", b"Job queue is full")
            return
        self._created += 1
        function.tally.submitted += 1
        handle = server.handle_prefix + b"%d" % self._created
        recorded = self._durable if background else self._record_foreground
        job = Job(handle, function, unique, workload, priority, background=background, recorded=recorded)
        job.reducer = reducer
        if due > server.now:
            job.due = due
        if background and recorded:
            job.state = PENDING
            job.spilled = job.due > 0 or server.window.is_behind(function, priority)
            if function.limiter is not None and server.limits.is_crowded(job):
                job.spilled = True
            if job.spilled:
                function.spilling[priority] = function.spilling.get(priority, 0) + 1
            else:
                function.arriving += 1
        server.hold(job)
        if key is not None:
            job.key = key
            function.uniques[key] = job
        if recorded:
            self._record(job, peer)
        if job.state is PENDING:
            job.awaited = server.entries[-1]
            server.urgent = True
            server.answer_later(peer, job)
            return
        server.send(peer, encode_response(PacketType.JOB_CREATED, handle))
        if not background:
            server.listen(peer, job)
        server.admit(job)

    def _ask_first(self, peer: Peer, arguments: list[bytes], priority: int, reducer: bytes) -> None:
        """
        Submit a foreground job once it is known whether one of its unique waits at the store's door.

        That one is taken in then, ahead of others that wait there: somebody waits for it now.
        """
        server = self._server
        name, unique, workload = arguments
        place = server.keep_place(peer)

        def submit(reply: Reply) -> None:
            if isinstance(reply, StoredJob):
                server.adopt([reply])
            if peer.line is None:
                return  # it is gone
            line, peer.line = peer.line, deque()
            self.submit(peer, arguments, priority, background=False, reducer=reducer, asked=True)
            at = line.index(place)
            del line[at]
            for item in reversed(peer.line):
                line.insert(at, item)
            peer.line = line
            server.send_line(peer)

        server.window.ask(Topic.TAKE, submit, function=name, unique=unique, workload=workload)

    def _join(self, peer: Peer, job: Job, *, background: bool) -> None:
        """Attach a submission to the live job of the same unique, which keeps its own workload."""
        server = self._server
        if background and not job.background and not job.elsewhere:
            # gearmand lets the job die with its foreground clients all the same.
            job.background = True
            if self._durable:
                server.urgent = True
                if job.recorded:
                    workload = job.workload if job.unique == b"-" else b""
                    server.entries.append(
                        JobKept(job.handle, server.now, job.function.name, job.unique, workload, server.clock)
                    )
                    job.awaited = server.entries[-1]
                else:
                    job.recorded = True
                    self._record(job, peer)
                    job.awaited = server.entries[-1]
                    if job.worker is not None:
                        server.entries.append(
                            JobStarted(job.handle, job.worker.identity, job.attempts, server.now)
                        )
                job.answers = []
        # Who only waits for a job that runs already need not wait for its being kept, nor for its refusal.
        if job.answers is not None and (background or job.state is PENDING):
            server.answer_later(peer, job)
        else:
            server.send(peer, encode_response(PacketType.JOB_CREATED, job.handle))
        if not background:
            server.listen(peer, job)

    def _claim(self, peer: Peer) -> None:
        server = self._server
        server.claim_wanted = True
        created = encode_response(PacketType.JOB_CREATED, server.handle_prefix + CLAIMED)
        server.send_at_leisure(peer, created)

    def _record(self, job: Job, peer: Peer) -> None:
        server = self._server
        entry = JobQueued(
            job.handle,
            job.function.name,
            job.unique,
            job.workload,
            job.priority,
            job.background,
            peer.identity,
            server.now,
            job.reducer,
            job.due,
            job.spilled,
            server.clock,
            job.attempts - (job.worker is not None),
        )
        limiter = job.function.limiter
        if limiter is not None and limiter.limit.keyed:
            entry = entry._replace(limit_key=limiter.key_of(job))
        server.entries.append(entry)
