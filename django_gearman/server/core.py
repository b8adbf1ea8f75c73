"""
What each packet means to the job server.

No sockets, no asyncio, no database, no clock: the shell says what happened
(``connected``, ``receive``, ``disconnected``, ``committed``, ``rejected``,
``joined``, ``tick``; to the ``window`` what the store claimed and replied) and
then performs what the core left behind: ``dirty`` peers with ``output`` to
send, ``entries`` and ``questions`` for the journal. Behaviour follows
gearmand's PROTOCOL document; where we differ or it is silent, the handler says
so.

Here jobs move: they are admitted, handed out, lost and ended. What the other
packets mean is told in ``submissions``, ``results``, ``status`` and
``abilities``.

The law of these files: JOB_CREATED of a background job leaves when the journal
has written the job, answers keep the order of their requests, and a final
packet is the last one.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from ..protocol.packets import (
    ATTEMPTS,
    GROUP,
    HIGHEST_TYPE,
    LISTEN,
    LOG,
    LOGS,
    RETRY,
    ROW,
    WAITS,
    PacketType,
    atoi,
    encode_response,
)
from ..protocol.reader import Packet
from .abilities import SECOND, Abilities
from .crews import Crews
from .entries import (
    Entry,
    JobDue,
    JobFinished,
    JobKept,
    JobLogged,
    JobQueued,
    JobRequeued,
    JobStarted,
    Outcome,
    Question,
    StoredJob,
    Topic,
)
from .jobs import DELAYED, GONE, HIGHEST, PENDING, READY, RUNNING, Function, Job, unique_key
from .limits import Limits
from .metrics import SECONDS, Histogram
from .options import FunctionOrder, ServerOptions, Shutdown
from .peers import Answer, Handler, Peer
from .results import Results
from .returning import Returning
from .status import StatusRequests
from .submissions import Submissions
from .watchers import Watchers, told_of_row
from .window import Window

ENDED_LIMIT: Final = 1_000
"""Ended jobs that may lie among a function's waiting ones; more only if more than those wait."""

CANCELLED_LIMIT: Final = 1_000
"""Cancelled jobs of one worker whose late results are passed over; of more, the first get an ERROR."""

SUCCESSFUL: Final = Outcome.SUCCESSFUL

LONGEST_RETRY: Final = 10 * 365 * 86_400.0
"""Seconds; a worker's number is not trusted to be a time."""

_NO_JOB = encode_response(PacketType.NO_JOB)
_NOOP = encode_response(PacketType.NOOP)


class JobServer:
    """
    The state of one job server, and what each event does to it.

    After every call ``serve_woken``. Before the next wait: send ``output`` of the ``dirty`` peers, and in a
    moment that of the ``patient`` ones, give ``entries`` and ``questions`` to the journal, and look at
    ``claim_wanted`` and ``shutdown_wanted``. Set ``now`` (seconds since 1970) and ``clock`` (monotonic
    seconds, for time limits) before events are handed in.
    """

    def __init__(self, options: ServerOptions | None = None) -> None:
        self.options = options or ServerOptions()
        self.now = 0.0
        self.clock = 0.0
        self.hand_out_until = math.inf
        """The clock's time from which jobs that are kept may be another server's: none is handed out."""
        self.hands_out = True
        """Whether any job is handed out; not when the server is about to end."""
        self.peers: dict[Peer, None] = {}
        self.functions: dict[bytes, Function] = {}
        self.jobs: dict[bytes, Job] = {}
        """Every job that is pending, ready or running, by handle."""
        self.ready: dict[Function, None] = {}
        """Functions with jobs to hand out."""
        self.dirty: list[Peer] = []
        self.patient: list[Peer] = []
        self.woken: deque[Peer] = deque()
        """Who slept and is to be handed a job: see ``packets.WAITS``."""
        self.is_gone: Callable[[Peer], bool] = lambda peer: False
        """Whether a peer's end is there to be read, though nobody has; the transport knows."""
        self.entries: list[Entry] = []
        self.urgent = False
        """Whether somebody waits for one of the ``entries``, or would lose by a crash before."""
        self.many_end = False
        """Whether a background job is among them that ended while others wait for its worker."""
        self.claim_wanted = False
        """Whether jobs wait at the store's door for which there is room, or somebody said so."""
        self.questions: list[Question] = []
        """What only the store knows; each is answered by the window's ``replied``."""
        self.shutdown_wanted: Shutdown | None = None
        """How an operator said that the server is to end; None while it goes on."""
        self._delayed: list[tuple[float, int, Job]] = []
        """Heap of jobs by the time that they are due; some may have ended."""
        self._forgotten = 0
        """At most so many of them have, since it was last looked through."""
        self._limited: dict[Job, float] = {}
        """{running job with a time limit: the clock's time when it is up}"""
        prefix = self.options.handle_prefix or f"H:{self.options.name}:{self.options.epoch}."
        self.handle_prefix = prefix.encode()
        """What every handle of this run begins with."""
        self._serial = 0
        self._served = 0
        self.durable = self.options.durable
        self._record_logs = self.options.durable and self.options.record_logs
        self._measures = self.options.measure
        self._fair = self.options.function_order is FunctionOrder.FAIR
        self._takes_turns = self.options.function_order is not FunctionOrder.GEARMAND
        row_prefix = f"{self.options.handle_prefix or f'H:{self.options.name}'}:r"
        self._watchers = Watchers(row_prefix.encode())
        self.abilities = Abilities(self)
        self.submissions = Submissions(self)
        self.results = Results(self)
        self.returning = Returning(self)
        self.crews = Crews(self)
        self.window = Window(self)
        self.limits = Limits(self, durable=self.durable)
        self._handlers = self._make_handlers()

    # What the shell says.

    def connected(self, number: int, address: str, shell: object = None) -> Peer:
        """A connection was opened; hand the peer in with everything that it sends."""
        peer = Peer(number, address, exceptions=self.options.exceptions, shell=shell)
        self.peers[peer] = None
        return peer

    def disconnected(self, peer: Peer) -> None:
        """
        A connection is gone, however it ended.

        Its running jobs go back to the queue; foreground jobs that nobody else
        waits for are dropped. PROTOCOL is silent; gearmand requeues alike.
        """
        del self.peers[peer]
        peer.line = None
        peer.asleep = False
        for function in list(peer.abilities.values()):
            self.abilities.forget(peer, function)
        for job in list(peer.listens):
            assert job.listeners is not None
            job.listeners = [listener for listener in job.listeners if listener is not peer] or None
            self.drop_if_abandoned(job)
        if self._watchers:
            self._watchers.forget(peer)
        if not self.crews.waits_for_word(peer):
            self.lose_jobs_of(peer)
        self.crews.peer_left(peer)
        self.pass_on_wake(peer, None)

    def receive(self, peer: Peer, packet: Packet) -> None:
        """A packet came. PROTOCOL: "Binary Packet"."""
        kind, arguments = packet
        self._handlers[kind](peer, arguments)

    def refuse(self, peer: Peer, code: bytes, text: bytes) -> None:
        """Answer ERROR. The connection goes on."""
        self.send(peer, encode_response(PacketType.ERROR, code, text))

    def committed(self, entries: Iterable[Entry]) -> None:
        """The journal has written these: acknowledge and hand out what waited for it."""
        if self._watchers:
            entries = list(entries)
            self._tell_watchers(entries)
        for entry in entries:
            if (type(entry) is JobQueued and entry.background) or type(entry) is JobKept:
                job = self.jobs.get(entry.handle)
                if job is None or job.awaited is not entry:
                    continue
                self._give_answers(job, encode_response(PacketType.JOB_CREATED, job.handle))
                if job.state is PENDING:
                    if job.spilled:
                        self.window.lay(job)
                    else:
                        self.admit(job)

    def _tell_watchers(self, entries: list[Entry]) -> None:
        begun: dict[bytes, float] = {}
        for entry in entries:
            if type(entry) is JobStarted and entry.attempts == 1:
                begun[entry.handle] = entry.at
            elif type(entry) is JobFinished:
                row, peers = self._watchers.ended(entry.handle)
                told = b""
                if peers and entry.handle in begun and entry.outcome is SUCCESSFUL:
                    told = told_of_row(entry, begun[entry.handle])
                self._tell_each(row, peers, told)
            elif type(entry) is not JobLogged:
                # It is not all of what the row says.
                begun.pop(entry.handle, None)

    def groups_ended(self, groups: Iterable[int]) -> None:
        """The journal has written the ends of the last members of these, or tried to."""
        if self._watchers:
            for id in groups:
                self._tell_each(*self._watchers.group_ended(id))

    def _tell_each(self, what: bytes, peers: list[Peer], told: bytes = b"") -> None:
        for peer in peers:
            self.send(peer, encode_response(PacketType.WORK_COMPLETE, what, told))

    def rejected(self, entry: JobQueued | JobKept, reason: str, *, perhaps_kept: bool = False) -> None:
        """
        The journal could not keep a submission: its clients get ERROR instead of JOB_CREATED.

        Args:
            entry: As it was left in ``entries``.
            reason: Shown to the client; must not contain secrets.
            perhaps_kept: It may be written all the same. A job that runs here for others then stays what
                its record may say, since whoever saw that may have joined it.
        """
        job = self.jobs.get(entry.handle)
        if job is None or self._is_overtaken(job, entry):
            return
        stays = perhaps_kept and job.state is not PENDING
        if type(entry) is JobQueued and not stays:
            job.recorded = False
        if job.answers is None:
            return
        refused = {answer.peer for answer in job.answers}
        self._give_answers(job, encode_response(PacketType.ERROR, b"QUEUE_ERROR", reason.encode()))
        if job.state is PENDING:
            for peer in refused:
                peer.listens.discard(job)
            job.listeners = None
            self.remove(job)
        elif stays:
            # Who joins it now is not told that it is kept before it is.
            job.answers = []
            job.awaited = entry
        else:
            # It was foreground before somebody wanted it kept, and is again.
            job.background = False
            self.drop_if_abandoned(job)

    def _is_overtaken(self, job: Job, entry: JobQueued | JobKept) -> bool:
        """
        Whether another entry is to keep the job by now, so that nothing depends on this one.

        Of a foreground job that several wanted kept, and that was refused in between. A job that is to
        be kept is lost with its record, though.
        """
        awaited = job.awaited
        if awaited is None:
            return type(entry) is JobKept
        return awaited is not entry and not (type(entry) is JobQueued and type(awaited) is JobKept)

    def joined(self, entry: JobQueued, handle: bytes) -> None:
        """
        The store has a live job of the same function and unique: the submission is of that one.

        It is another server's, or waits at the database door. Clients that have
        joined in the foreground meanwhile cannot hear of it there: for them the
        job is run here, and not kept.
        """
        job = self.jobs.get(entry.handle)
        if job is None or self._is_overtaken(job, entry):
            return
        job.recorded = False
        other = self.jobs.get(handle)
        is_pending = job.state is PENDING
        if not is_pending or (job.listeners and other is None):
            named = job.handle if is_pending else handle
            self._give_answers(job, encode_response(PacketType.JOB_CREATED, named))
            job.background = False
            if is_pending:
                self.admit(job)
            else:
                self.drop_if_abandoned(job)
            return
        self._give_answers(job, encode_response(PacketType.JOB_CREATED, handle))
        for listener in job.listeners or ():
            listener.listens.discard(job)
            if other is not None:
                self.listen(listener, other)
        job.listeners = None
        key = job.key
        self.remove(job)
        if other is not None and other.key is None and key is not None:
            other.key = key
            other.function.uniques[key] = other

    def adopt(self, jobs: Iterable[StoredJob]) -> None:
        """The store handed these over: from now on they are this server's."""
        timeout_of = self.options.timeout_of
        for stored in jobs:
            held = self.jobs.get(stored.handle)
            if held is not None:
                self._take_back(held, stored)
                continue
            function = self.functions.get(stored.function) or self.abilities.add(stored.function)
            job = Job(
                stored.handle,
                function,
                stored.unique,
                stored.workload,
                stored.priority,
                background=True,
                recorded=True,
            )
            job.reducer = stored.reducer
            job.due = stored.run_after
            job.attempts = stored.attempts
            job.interruptions = stored.interruptions
            job.max_attempts = stored.max_attempts
            job.timeout = stored.timeout
            if stored.timeout is not None and timeout_of is not None:
                job.timeout = timeout_of(stored.function.decode(), stored.timeout)
            job.limit_key = stored.limit_key
            if not stored.attempts and not stored.handle.startswith(self.handle_prefix):
                # Others came here before, and were counted.
                function.tally.submitted += 1
            key = unique_key(stored.unique, stored.workload)
            if key is not None and key not in function.uniques:
                job.key = key
                function.uniques[key] = job
            self.hold(job)
            self.admit(job)

    def _take_back(self, job: Job, stored: StoredJob) -> None:
        """
        A job that was laid at the door is this server's again, and is held here for those who wait for it.

        It may have been given up meanwhile as another server's: then it is kept again from now on.
        """
        if job.state is PENDING:
            self.admit(job)
        elif job.elsewhere:
            job.elsewhere = False
            job.background = job.recorded = True
            job.interruptions = stored.interruptions
            if job.worker is not None:
                self.entries.append(JobStarted(job.handle, job.worker.identity, job.attempts, job.started_at))
            else:
                # Those that came to nothing while nobody kept it are not in its record.
                job.attempts = stored.attempts

    def next_due(self) -> float:
        """Wall time when the next job for later is due; infinite when there is none."""
        return self._delayed[0][0] if self._delayed else math.inf

    def tick(self) -> None:
        """
        Time passed; call it about once a second, and at ``next_due``.

        Jobs that are due become ready, those whose time is up are taken from
        their workers. A worker that was woken may be stuck or may have died
        unseen: while jobs wait, more are woken.
        """
        delayed = self._delayed
        while delayed and delayed[0][0] <= self.now:
            job = heapq.heappop(delayed)[2]
            if job.state is DELAYED:
                job.function.delayed -= 1
                if job.recorded:
                    self.entries.append(JobDue(job.handle))
                self._make_ready(job)
        self.results.tick()
        self.returning.tick()
        self.crews.tick()
        for job in [job for job, up in self._limited.items() if up <= self.clock]:
            self.lose_worker(job, "The job's time was up")
        for function in self.ready:
            if function.sleepers:
                self.wake(function)
        self.window.tick()
        self.limits.tick()
        self._watchers.tick(self.clock)

    # Packets of workers.

    def _pre_sleep(self, peer: Peer, arguments: list[bytes]) -> None:
        if self._best_function(peer) is not None:
            # The job came between NO_JOB and now: no sleep.
            peer.asleep = False
            self.send(peer, _NOOP)
            return
        peer.asleep = True
        if not peer.enlisted:
            for function in peer.abilities.values():
                function.sleepers[peer] = None
            peer.enlisted = True
        if self.limits.blocked:
            self.limits.want(peer, sleeps=True)

    def _grab_job(self, peer: Peer, arguments: list[bytes]) -> None:
        job = self._hand_out(peer)
        if job is not None:
            self.send(
                peer, encode_response(PacketType.JOB_ASSIGN, job.handle, job.function.name, job.workload)
            )

    def _grab_job_uniq(self, peer: Peer, arguments: list[bytes]) -> None:
        job = self._hand_out(peer)
        if job is None:
            if peer.waits:
                self._pre_sleep(peer, arguments)
        else:
            self.send(
                peer,
                encode_response(
                    PacketType.JOB_ASSIGN_UNIQ, job.handle, job.function.name, job.unique, job.workload
                ),
            )

    def _grab_job_all(self, peer: Peer, arguments: list[bytes]) -> None:
        job = self._hand_out(peer)
        if job is None:
            return
        if job.reducer:
            packet = encode_response(
                PacketType.JOB_ASSIGN_ALL,
                job.handle,
                job.function.name,
                job.unique,
                job.reducer,
                job.workload,
            )
        else:
            packet = encode_response(
                PacketType.JOB_ASSIGN_UNIQ, job.handle, job.function.name, job.unique, job.workload
            )
        self.send(peer, packet)

    def serve_woken(self) -> None:
        """Hand out jobs to those who were woken and need not be told; one may have another woken."""
        while self.woken:
            self.serve_next_woken()

    def serve_next_woken(self) -> None:
        """Hand the first of them a job, as if it had grabbed."""
        peer = self.woken.popleft()
        if peer.woken_for is None:
            return  # it is gone
        if peer.line is not None:
            # The job could not be sent yet.
            self.send(peer, _NOOP)
        elif self._best_function(peer) is not None:
            self._grab_job_uniq(peer, [])
        else:
            # Somebody was quicker, or nobody may have it for now.
            peer.woken_for = None
            self._pre_sleep(peer, [])

    def _hand_out(self, peer: Peer) -> Job | None:
        peer.asleep = False
        function = self._best_function(peer)
        if peer.woken_for is not None:
            self.pass_on_wake(peer, function)
        if function is None:
            if peer.waits:
                self.send_at_leisure(peer, _NO_JOB)
            else:
                self.send(peer, _NO_JOB)
            if self.limits.blocked:
                self.limits.want(peer, sleeps=False)
            return None
        job = function.take() if self.clock < self.hand_out_until else function.take_foreground()
        if not function.waiting:
            del self.ready[function]
        if job.gate is not None:
            self.limits.started(job)
        if self.limits.blocked and self._takes_turns:
            self.limits.may_want(peer, job.priority if self._fair else -HIGHEST)
        self.window.unload(job)
        if function.left and self.window.wants_more(function, job.priority):
            self.claim_wanted = True
        self._served = function.served = self._served + 1
        if self.options.function_order is FunctionOrder.ROUND_ROBIN:
            # To the far end of what ``_best_function`` looks through.
            del peer.abilities[function.name]
            peer.abilities = {function.name: function} | peer.abilities
        function.running += 1
        job.state = RUNNING
        job.worker = peer
        job.attempts += 1
        job.started_at = self.now
        function.tally.started += 1
        if self._measures:
            self._measure_wait(job)
        peer.running[job.handle] = job
        self.note_time_limit(job, peer)
        if peer.attempts and (job.attempts > 1 or job.max_attempts is not None):
            told = b"attempt %d %d" % (job.attempts, job.max_attempts or 0)
            self.send(peer, encode_response(PacketType.OPTION_RES, told))
        if job.recorded:
            self.entries.append(JobStarted(job.handle, peer.identity, job.attempts, self.now))
        return job

    def note_time_limit(self, job: Job, peer: Peer) -> None:
        """Note when the time of a job is up that the peer has been given."""
        if peer.timeouts is not None or job.timeout is not None:
            own = None if job.timeout is None else job.timeout + self.options.timeout_grace
            limits = [own, (peer.timeouts or {}).get(job.function.name)]
            given = [limit for limit in limits if limit is not None]
            if given:
                self._limited[job] = self.clock + min(given)

    def _best_function(self, peer: Peer) -> Function | None:
        """
        The function whose job the peer gets next: highest priority first, then in turn.

        gearmand 1.1 looks at priority inside one function only; 2.0 does as we do. In its order the
        function that registered last is asked first.
        """
        abilities = peer.abilities
        ready = self.ready
        if not ready or not self.hands_out:
            return None
        if self.clock >= self.hand_out_until:
            # Limits are kept together with others, who may count us out by now.
            offered = (each for each in abilities.values() if each.limiter is None)
            return next((each for each in offered if each.has_foreground()), None)
        if len(abilities) == 1:
            (function,) = abilities.values()
            return (
                function
                if function.waiting and not (function.left and self.window.must_wait(function))
                else None
            )
        if not self._fair:
            offered = (each for each in reversed(abilities.values()) if each.waiting)
            return next((each for each in offered if not (each.left and self.window.must_wait(each))), None)
        if len(abilities) <= len(ready):
            candidates = [function for function in abilities.values() if function.waiting]
        else:
            candidates = [function for function in ready if function.name in abilities]
        if self.window.away:
            candidates = [each for each in candidates if not (each.left and self.window.must_wait(each))]
        if len(candidates) > 1:
            return max(candidates, key=lambda function: (function.best_priority(), -function.served))
        return candidates[0] if candidates else None

    # Packets of both.

    def _echo(self, peer: Peer, arguments: list[bytes]) -> None:
        self.send(peer, encode_response(PacketType.ECHO_RES, arguments[0]))

    def _set_client_id(self, peer: Peer, arguments: list[bytes]) -> None:
        # Cut as gearmand does; control characters would forge lines of the listing.
        peer.client_id = bytes(byte if byte >= 0x20 and byte != 0x7F else 0x3F for byte in arguments[0][:127])

    def _option_req(self, peer: Peer, arguments: list[bytes]) -> None:
        option = arguments[0]
        if option == ATTEMPTS:
            peer.attempts = True
            self.send(peer, encode_response(PacketType.OPTION_RES, option))
        elif peer.attempts and option.startswith(RETRY):
            delay, _, handle = option.removeprefix(RETRY).partition(b" ")
            peer.retry = handle, min(max(atoi(delay), 0) / SECOND, LONGEST_RETRY)
        elif option.startswith(LOG) and self._record_logs:
            handle, _, text = option[len(LOG) :].partition(b" ")
            self.results.log(peer, handle, text)
        elif option == LOGS and self._record_logs:
            self.send(peer, encode_response(PacketType.OPTION_RES, option))
        elif option.startswith((LISTEN + ROW, LISTEN + GROUP)) and self.durable:
            if self._watchers.add(peer, option.removeprefix(LISTEN), self.clock):
                self.send_at_leisure(peer, encode_response(PacketType.OPTION_RES, option))
            else:
                self.refuse(peer, b"JOB_NOT_FOUND", b"No such job to listen to")
        elif option.startswith(LISTEN):
            job = self.jobs.get(option.removeprefix(LISTEN))
            if job is None or job.state is PENDING:
                self.refuse(peer, b"JOB_NOT_FOUND", b"No such job to listen to")
                return
            self.send(peer, encode_response(PacketType.OPTION_RES, option))
            self.listen(peer, job)
        elif option == WAITS and peer.local:
            peer.waits = True
            self.send(peer, encode_response(PacketType.OPTION_RES, option))
        elif peer.attempts and self.crews.hear(peer, option):
            pass
        elif arguments[0].rstrip(b"\0").lower() == b"exceptions":
            peer.exceptions = True
            self.send(peer, encode_response(PacketType.OPTION_RES, arguments[0]))
        else:
            self.refuse(peer, b"UNKNOWN_OPTION", b"Server does not recognize given option")

    def _unexpected(self, peer: Peer, arguments: list[bytes]) -> None:
        self.refuse(peer, b"INVALID_COMMAND", b"Command not expected")

    # What an operator says.

    def cancel(self, handle: bytes) -> bool:
        """
        End a job whatever its state; False when there is none.

        Its clients are told WORK_FAIL, once and last. A worker of ours that runs
        it is told to end it; others go on. What they say of it is passed over.
        gearmand only marks the job, and lets the worker's packets follow.
        """
        job = self.jobs.get(handle)
        if job is None:
            return False
        if job.worker is not None:
            cancelled = job.worker.cancelled
            cancelled[handle] = None
            if len(cancelled) > CANCELLED_LIMIT:
                del cancelled[next(iter(cancelled))]
            self.crews.tell_cancelled(job.worker, handle)
        self.fail(job, Outcome.CANCELLED, "The job was cancelled")
        return True

    def cancel_for(self, peer: Peer, handle: bytes, done: bytes, missing: bytes) -> None:
        """End a job, wherever it waits, and answer with one of two texts in the peer's turn."""
        if handle in self.jobs or not self.durable:
            self.send(peer, done if self.cancel(handle) else missing)
            return
        place = self.keep_place(peer)
        self.window.ask(
            Topic.CANCEL, lambda reply: self.fill(place, done if reply else missing), handle=handle
        )

    def shut_down(self, how: Shutdown) -> None:
        """Have the shell end the server. An immediate end overtakes a graceful one."""
        if self.shutdown_wanted is not Shutdown.IMMEDIATE:
            self.shutdown_wanted = how

    # Moving jobs.

    def admit(self, job: Job) -> None:
        """A new job is kept: it waits for a worker, or for its time first."""
        if job.state is PENDING:
            if job.spilled:
                self.window.load(job)
            self._arrive(job)
        if job.due > self.now:
            job.state = DELAYED
            job.function.delayed += 1
            heapq.heappush(self._delayed, (job.due, job.serial, job))
        else:
            self._make_ready(job)

    def _arrive(self, job: Job) -> None:
        """It is pending no more."""
        function = job.function
        if not job.spilled:
            function.arriving -= 1
            return
        count = function.spilling.pop(job.priority)
        if count > 1:
            function.spilling[job.priority] = count - 1
        job.spilled = False

    def _make_ready(self, job: Job) -> None:
        job.state = READY
        job.ready_at = self.now
        function = job.function
        if function.limiter is not None:
            self.limits.hold(job)
            return
        self.offer(job)

    def offer(self, job: Job) -> None:
        """A job may be handed out: tell who sleeps."""
        function = job.function
        function.put(job)
        self.ready[function] = None
        if function.sleepers:
            count = len(function.sleepers)
            for _ in range(min(self.options.worker_wakeup or count, count)):
                self.wake(function)

    def take_out(self, job: Job) -> None:
        """Take one out that waits."""
        if job.gate is not None:
            self.limits.take_out(job)
            return
        function = job.function
        function.withdraw(job)
        if not function.waiting:
            del self.ready[function]

    def wake(self, function: Function) -> None:
        """
        NOOP to one worker that sleeps on the function, the last to fall asleep; or the job, if it waits.

        One for each job that becomes ready is enough, since a woken worker grabs
        until nothing is left; gearmand wakes all.
        """
        sleepers = function.sleepers
        while sleepers:
            peer, _ = sleepers.popitem()
            peer.enlisted = False
            # A job that is sent to one that is gone would count as an attempt.
            if peer.asleep and not (peer.waits and self.is_gone(peer)):
                peer.asleep = False
                peer.woken_for = function
                if peer.waits:
                    self.woken.append(peer)
                else:
                    self.send(peer, _NOOP)
                return

    def wait_no_more(self, peer: Peer) -> None:
        """A worker is about to leave: no job is handed to it unasked from now on."""
        if peer.waits:
            peer.waits = peer.asleep = False
            self.pass_on_wake(peer, None)

    def pass_on_wake(self, peer: Peer, taken: Function | None) -> None:
        """A woken worker left, or takes another function's job: somebody else must wake for its own."""
        function = peer.woken_for
        peer.woken_for = None
        if function is not None and function is not taken and function.waiting:
            self.wake(function)

    def lose_jobs_of(self, peer: Peer) -> None:
        """A worker is gone, and nobody says why."""
        # Put back in reverse, each before the last: the order of hand-out is restored.
        for job in reversed(list(peer.running.values())):
            self.lose_worker(job)

    def give_back(self, job: Job) -> None:
        """A job that runs was put back on purpose: it waits again as if it had not been handed out."""
        if not job.background and not job.listeners:
            self.finish(job, Outcome.CANCELLED, b"", "The client left, and then the worker")
        else:
            self.requeue(job, "", counts=False)

    def lose_worker(self, job: Job, cause: str = "The worker was lost") -> None:
        """The worker left, gave the job back or took too long: no outcome, so it waits again."""
        limit = self.options.job_retries if job.max_attempts is None else job.max_attempts
        if not job.background and not job.listeners:
            self.finish(job, Outcome.CANCELLED, b"", "The client left, and then the worker")
        elif limit and job.attempts - job.interruptions >= limit:
            self.fail(job, Outcome.DEAD, f"{cause} at the last of {job.attempts} attempts")
        else:
            self.requeue(job, cause)

    def may_try_again(self, job: Job) -> bool:
        """Whether its worker may ask for another attempt: a client that waits wants the exception."""
        if not job.background:
            return False
        return job.max_attempts is None or job.attempts - job.interruptions < job.max_attempts

    def requeue(
        self, job: Job, reason: str, data: bytes = b"", due: float = 0.0, *, counts: bool = True
    ) -> None:
        """An attempt came to nothing: the job waits again, before all others or for its time."""
        assert job.worker is not None, "only a job that runs comes back"
        if counts:
            job.function.tally.retried += 1
        log = self.results.forget(job)
        # Who waits for it, or for its being kept, must hear of it here.
        is_awaited = bool(job.listeners) or job.answers is not None
        unclaimed = due > self.now and job.recorded and job.background and not is_awaited
        if job.recorded:
            entry = JobRequeued(
                job.handle,
                job.worker.identity,
                job.attempts,
                job.started_at,
                self.now,
                reason,
                data,
                due,
                log,
                unclaimed,
            )
            self.entries.append(entry if counts else entry._replace(counts=False))
        if not counts:
            job.attempts -= 1
        self.release(job)
        if unclaimed:
            self.window.lay_for_later(job.function)
            self.remove(job)
            return
        self.window.load(job)
        job.numerator = job.denominator = b"0"
        job.progress_unsaved = False
        if due > self.now:
            job.due = due
            self.admit(job)
            return
        self.put_first(job)

    def put_first(self, job: Job) -> None:
        """Let a job wait that was handed out in vain: before all others, or in gearmand's order behind."""
        job.state = READY
        job.ready_at = self.now
        function = job.function
        if function.limiter is not None:
            self.limits.hold(job, first=self._fair)
            return
        if self._fair:
            function.put_back(job)
        else:
            function.put(job)
        self.ready[function] = None
        if function.sleepers:
            self.wake(function)

    def release(self, job: Job) -> None:
        """Take it from the worker that runs it, if one does."""
        if job.worker is not None:
            del job.worker.running[job.handle]
            job.worker = None
            job.function.running -= 1
            self._limited.pop(job, None)
            if job.gate is not None:
                self.limits.give_back(job)

    def fail(self, job: Job, outcome: Outcome, reason: str) -> None:
        """End a job without a result, and tell its listeners."""
        self.tell(job, PacketType.WORK_FAIL, [job.handle])
        self.finish(job, outcome, b"", reason)

    def finish(self, job: Job, outcome: Outcome, data: bytes, reason: str = "") -> None:
        """The job has ended and its listeners were told: forget it, but for its record."""
        if outcome is SUCCESSFUL:
            job.function.tally.successful += 1
        else:
            job.function.tally.otherwise[outcome] += 1
        if self._measures and job.worker is not None:
            self._measure_run(job)
        worker = job.worker
        self.release(job)
        if job.listeners is not None:
            for listener in job.listeners:
                listener.listens.discard(job)
            job.listeners = None
        if job.answers is not None:
            # It ran before the journal could say that it is kept: there is nothing left to lose.
            self._give_answers(job, encode_response(PacketType.JOB_CREATED, job.handle))
        if self.results.unsaved or self.results.logs:
            self.results.save_last(job)
        if job.recorded:
            self.entries.append(JobFinished(job.handle, outcome, data, reason, self.now))
            if job.background:
                if (
                    self.ready
                    and worker is not None
                    and self._best_function(worker) is not None
                    and not self._watchers.waits_for(job.handle)
                ):
                    # There is more to do than workers to do it: ends come in numbers.
                    self.many_end = True
                else:
                    self.urgent = True
        self.remove(job)

    def remove(self, job: Job) -> None:
        """Forget a job, whatever its state."""
        function = job.function
        if job.state is not RUNNING and not job.spilled:
            self.window.unload(job)
        if job.state is PENDING:
            self._arrive(job)
        elif job.state is DELAYED:
            function.delayed -= 1
            self.returning.forget(job)
            self._forgotten += 1
            if job.gate is not None:
                self.limits.give_back(job)
        elif job.state is READY and job.gate is not None:
            self.limits.take_out(job)
        elif job.state is READY:
            function.waiting -= 1
            function.counts[job.priority] -= 1
            function.ended += 1
            if not function.waiting:
                del self.ready[function]
        job.state = GONE
        job.workload = b""
        if self._forgotten > len(self._delayed) // 2 + ENDED_LIMIT:
            self._delayed = [each for each in self._delayed if each[2].state is DELAYED]
            heapq.heapify(self._delayed)
            self._forgotten = 0
        del self.jobs[job.handle]
        function.held -= 1
        if job.key is not None:
            del function.uniques[job.key]
            job.key = None
        if not function.waiting and function.levels:
            # Nothing but ended jobs lies there.
            function.levels.clear()
            function.counts.clear()
            function.priorities.clear()
            function.ended = 0
        elif function.ended > function.waiting + ENDED_LIMIT:
            function.drop_ended()
        if function.idle:
            self.abilities.note_if_idle(function)

    def _measure_wait(self, job: Job) -> None:
        counts = job.function.tally
        if counts.waited is None:
            counts.waited = Histogram(SECONDS)
        # The clock may have been set back.
        counts.waited.note(max(self.now - job.ready_at, 0.0))

    def _measure_run(self, job: Job) -> None:
        counts = job.function.tally
        if counts.ran is None:
            counts.ran = Histogram(SECONDS)
        counts.ran.note(max(self.now - job.started_at, 0.0))

    def drop_if_abandoned(self, job: Job) -> None:
        """A foreground job that waits ends when nobody listens to it any more."""
        if job.state in (READY, DELAYED) and not job.background and not job.listeners:
            self.finish(job, Outcome.CANCELLED, b"", "The client left before a worker took the job")

    # Small parts.

    def send(self, peer: Peer, data: bytes) -> None:
        """Send it in its turn: behind what waits in the peer's line."""
        if peer.line is not None:
            peer.line.append(data)
            peer.lined += len(data)
            return
        if not peer.output or peer.is_patient:
            self.dirty.append(peer)
            peer.is_patient = False
        peer.output.append(data)

    def send_at_leisure(self, peer: Peer, data: bytes) -> None:
        """Send what nobody waits for: in a moment, or with the next thing that somebody does wait for."""
        if peer.line is not None or (peer.output and not peer.is_patient):
            self.send(peer, data)
            return
        if not peer.output:
            self.patient.append(peer)
            peer.is_patient = True
        peer.output.append(data)

    def answer_later(self, peer: Peer, job: Job) -> None:
        """JOB_CREATED follows when the job is kept."""
        if job.answers is None:
            job.answers = []
        job.answers.append(self.keep_place(peer))

    def keep_place(self, peer: Peer) -> Answer:
        """A place in the peer's line for an answer that is not known; ``fill`` it."""
        answer = Answer(peer)
        if peer.line is None:
            peer.line = deque()
        peer.line.append(answer)
        return answer

    def _give_answers(self, job: Job, data: bytes) -> None:
        answers = job.answers or ()
        job.answers = job.awaited = None
        for answer in answers:
            self.fill(answer, data)

    def fill(self, answer: Answer, data: bytes) -> None:
        """The answer is known: send it in its turn."""
        answer.data = data
        if answer.peer.line is not None:  # else it is gone
            self.send_line(answer.peer)

    def send_line(self, peer: Peer) -> None:
        """Send what stands in a peer's line before the first answer that is not known."""
        line = peer.line
        assert line is not None, "nothing stands there"
        if not peer.output or peer.is_patient:
            self.dirty.append(peer)
            peer.is_patient = False
        while line:
            head = line[0]
            if isinstance(head, Answer):
                if head.data is None:
                    break
                head = head.data
            else:
                peer.lined -= len(head)
            peer.output.append(head)
            line.popleft()
        else:
            peer.line = None

    def tell(self, job: Job, kind: PacketType, arguments: list[bytes]) -> None:
        """A packet to all who listen to the job."""
        if job.listeners is not None:
            packet = encode_response(kind, *arguments)
            for listener in job.listeners:
                self.send(listener, packet)

    def listen(self, peer: Peer, job: Job) -> None:
        """The peer hears of the job from now on."""
        if job.listeners is None:
            job.listeners = []
        job.listeners.append(peer)
        peer.listens.add(job)

    def hold(self, job: Job) -> None:
        """A new job is here."""
        self.jobs[job.handle] = job
        job.function.held += 1
        self._serial += 1
        job.serial = self._serial
        if not job.spilled:
            self.window.load(job)

    def _make_handlers(self) -> list[Handler]:
        """What to do with each type of packet."""
        own = {
            PacketType.PRE_SLEEP: self._pre_sleep,
            PacketType.GRAB_JOB: self._grab_job,
            PacketType.GRAB_JOB_UNIQ: self._grab_job_uniq,
            PacketType.GRAB_JOB_ALL: self._grab_job_all,
            PacketType.ECHO_REQ: self._echo,
            PacketType.SET_CLIENT_ID: self._set_client_id,
            PacketType.OPTION_REQ: self._option_req,
        }
        handlers: list[Handler] = [self._unexpected] * (HIGHEST_TYPE + 1)
        for of_room in (
            own,
            self.abilities.handlers(),
            self.submissions.handlers(),
            self.results.handlers(),
            StatusRequests(self).handlers(),
        ):
            for kind, handler in of_room.items():
                handlers[kind] = handler
        return handlers
