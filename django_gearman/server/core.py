"""
What each packet means to the job server.

No sockets, no asyncio, no database, no clock: the shell says what happened
(``connected``, ``receive``, ``disconnected``, ``committed``, ``rejected``,
``joined``, ``tick``; to the ``window`` what the store claimed and replied) and
then performs what the core left behind: ``dirty`` peers with ``output`` to
send, ``entries`` and ``questions`` for the journal. Behaviour follows
gearmand's PROTOCOL document; where we differ or it is silent, the handler says
so.

The law of this file: JOB_CREATED of a background job leaves when the journal
has written the job, answers keep the order of their requests, and a final
packet is the last one.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import tzinfo
from enum import Enum
from ipaddress import ip_address
from typing import Final

from ..protocol.packets import (
    ATTEMPTS,
    CLAIM,
    CLAIMED,
    HIGHEST_TYPE,
    LISTEN,
    LOG,
    LOGS,
    MAX_LOG,
    RETRY,
    ROW,
    WAITS,
    PacketType,
    encode_response,
)
from ..protocol.reader import Packet
from .crews import Crews
from .cron import next_match
from .entries import (
    Entry,
    JobDue,
    JobFinished,
    JobKept,
    JobLogged,
    JobProgress,
    JobQueued,
    JobRequeued,
    JobStarted,
    Outcome,
    Question,
    Reply,
    Standing,
    StoredJob,
    Topic,
)
from .jobs import Function, Job, JobState, UniqueKey
from .limits import Limits
from .metrics import SECONDS, Histogram
from .watchers import Watchers, told_of_row
from .window import Window

HIGH: Final = 50
NORMAL: Final = 0
LOW: Final = -50

ENDED_LIMIT: Final = 1_000
"""Ended jobs that may lie among a function's waiting ones; more only if more than those wait."""

CANCELLED_LIMIT: Final = 1_000
"""Cancelled jobs of one worker whose late results are passed over; of more, the first get an ERROR."""

WORKERS_RETURN: Final = 5.0
"""Seconds after the start in which workers may come back with jobs that they had when the server ended."""

PENDING, DELAYED, READY, RUNNING, GONE = JobState
SUCCESSFUL: Final = Outcome.SUCCESSFUL

SECOND: Final = 1000
"""Milliseconds; gearmand takes no shorter time limit."""

LONGEST_RETRY: Final = 10 * 365 * 86_400.0
"""Seconds; a worker's number is not trusted to be a time."""

MAX_HANDLE: Final = 63
"""Bytes in a handle that is not ours; gearmand has no longer ones."""

LATEST: Final = 253_370_764_800
"""The year 9999, in seconds since 1970: as late as a database's column goes."""

_HANDLE_TOO_LARGE = b"Error occurred due to GEARMAND_JOB_HANDLE_SIZE being too small from snprintf"
_NO_JOB = encode_response(PacketType.NO_JOB)
_NOOP = encode_response(PacketType.NOOP)
_SUBMISSIONS: dict[PacketType, tuple[int, bool]] = {
    PacketType.SUBMIT_JOB: (NORMAL, False),
    PacketType.SUBMIT_JOB_HIGH: (HIGH, False),
    PacketType.SUBMIT_JOB_LOW: (LOW, False),
    PacketType.SUBMIT_JOB_BG: (NORMAL, True),
    PacketType.SUBMIT_JOB_HIGH_BG: (HIGH, True),
    PacketType.SUBMIT_JOB_LOW_BG: (LOW, True),
}


class FunctionOrder(Enum):
    """Which function's job a worker gets, of those that it offers. PROTOCOL section 5.3."""

    FAIR = "fair"
    """The highest priority first, then in turn; a job that comes back is the next. As gearmand 2.0."""
    GEARMAND = "gearmand"
    """The function registered last first, whatever the priorities; a job that comes back goes behind."""
    ROUND_ROBIN = "round-robin"
    """So too, but a function that gave a job is the last of its worker's from then. gearmand's -R."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What a job server may be told; the command line is built from it."""

    name: str = "localhost:4730"
    """Stands in every handle; must be of one server alone on a database. At most 40 characters."""

    epoch: int = 0
    """How often the lease of this name was taken; keeps handles of different runs apart."""

    durable: bool = False
    """Whether a journal writes the entries. Without it background jobs are acknowledged at once."""

    record_foreground: bool = True
    """Whether foreground jobs leave entries too, without waiting for them."""

    record_logs: bool = True
    """Whether what jobs log leaves entries, where a journal writes them."""

    handle_prefix: str | None = None
    """What every handle begins with, of this run of this server alone; None for the name and the epoch."""

    worker_wakeup: int = 1
    """How many sleeping workers get NOOP for a job that becomes ready; 0 for all."""

    job_retries: int = 3
    """How often a job without a number of its own is handed out to workers that are lost; 0 for no limit."""

    timeout_in_seconds: bool = False
    """Whether CAN_DO_TIMEOUT counts seconds, as Perl's workers and old servers do, and not milliseconds."""

    timeout_grace: float = 15.0
    """Seconds after a job's own time limit, in which its worker may end it and say so."""

    zone: tzinfo | None = None
    """Whose clock the fields of SUBMIT_JOB_SCHED mean; None for this machine's."""

    function_order: FunctionOrder = FunctionOrder.FAIR
    """Which of a worker's functions gives it the next job."""

    exceptions: bool = False
    """Whether every connection gets WORK_EXCEPTION without asking for it."""

    window: int = 10_000
    """How many jobs of one function and priority wait in memory; the others only in the store."""

    window_bytes: int = 64 * 1024 * 1024
    """About how many bytes of waiting jobs there are in memory, of one function at most a quarter."""

    progress_interval: float = 1.0
    """Seconds between two entries of one job's progress."""

    max_function: int = 512
    """Bytes in a function's name."""

    max_unique: int = 255
    """Bytes in a unique."""

    max_idle_functions: int = 10_000
    """Functions without workers and jobs that stay listed."""

    max_abilities: int = 10_000
    """Functions that one connection may offer."""

    measure: bool = False
    """Whether to count how long jobs wait and run, beside how many there are."""

    allow_shutdown: bool = False
    """Whether an operator may end the server by the ``shutdown`` command."""


class Shutdown(Enum):
    """How an operator wants the server to end."""

    GRACEFUL = "graceful"
    """Take no connections, serve those that are there, and end when no job is left."""
    IMMEDIATE = "immediate"
    """Write what is left and end."""


class Answer:
    """A reply that holds its place in the peer's line until its content is known."""

    __slots__ = ("data", "peer")

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.data: bytes | None = None


class Log:
    """The last lines that a running job has logged."""

    __slots__ = ("recorded_at", "text", "unsaved")

    def __init__(self) -> None:
        self.text = b""
        self.recorded_at = 0.0
        """When they were last recorded."""
        self.unsaved = False
        """Whether there were more since."""


class Peer:
    """One connection: client, worker or both."""

    __slots__ = (
        "abilities",
        "address",
        "asleep",
        "attempts",
        "cancelled",
        "client_id",
        "crew",
        "enlisted",
        "exceptions",
        "excused",
        "line",
        "listens",
        "number",
        "output",
        "retry",
        "running",
        "shell",
        "timeouts",
        "waits",
        "woken_for",
    )

    def __init__(self, number: int, address: str, *, exceptions: bool, shell: object) -> None:
        self.number = number
        """Descriptor of the socket, as ``workers`` shows it."""
        self.address = address
        self.client_id = b"-"
        self.exceptions = exceptions
        self.abilities: dict[bytes, Function] = {}
        self.timeouts: dict[bytes, float] | None = None
        """{function: seconds that it may take}, for those that it offered with a time limit."""
        self.asleep = False
        self.enlisted = False
        """Whether it stands among the sleepers of every function it offers."""
        self.running: dict[bytes, Job] = {}
        self.listens: set[Job] = set()
        self.attempts = False
        """Whether it speaks of attempts: the extension that ``packets.ATTEMPTS`` tells of."""
        self.crew = b""
        """The token that it shares with those that it works with; empty when it named none."""
        self.retry: tuple[bytes, float] | None = None
        """Handle of the job whose exception comes next and is not its end; seconds until another attempt."""
        self.excused: bytes | None = None
        """Handle of its last WORK_EXCEPTION: Perl's workers send WORK_FAIL after it."""
        self.cancelled: dict[bytes, None] = {}
        """Handles of jobs that were cancelled while it ran them: it goes on, and need not hear of it."""
        self.output: list[bytes] = []
        """What the shell is to send."""
        self.line: deque[bytes | Answer] | None = None
        """Replies behind one that waits for its commit, which is the first; None when none waits."""
        self.waits = False
        """Whether it takes a job without asking again: the extension that ``packets.WAITS`` tells of."""
        self.woken_for: Function | None = None
        """Whose job it was woken for, until it grabs."""
        self.shell = shell
        """The transport's own; the core does not look at it."""

    @property
    def identity(self) -> bytes:
        return self.client_id if self.client_id != b"-" else self.address.encode()

    @property
    def local(self) -> bool:
        """Whether it is on this machine: a unix socket or the loopback address."""
        if self.address == "unix":
            return True
        try:
            address = ip_address(self.address)
        except ValueError:
            return False
        # What an IPv6 socket shows of an IPv4 peer is no loopback address to Python before 3.13.
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback


class JobServer:
    """
    The state of one job server, and what each event does to it.

    After every call ``serve_woken``. Before the next wait: send ``output`` of the
    ``dirty`` peers, give ``entries`` and ``questions`` to the journal, and look at ``claim_wanted`` and
    ``shutdown_wanted``. Set ``now`` (seconds since 1970) and ``clock`` (monotonic seconds, for time limits)
    before events are handed in.
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
        self.woken: list[Peer] = []
        """Who slept and is to be handed a job: see ``packets.WAITS``."""
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
        self._returning: dict[Job, float | None] = {}
        """{job that ran when the server ended: the clock's time until which its worker may come back}.

        None before the first tick. They count as delayed.
        """
        self._limited: dict[Job, float] = {}
        """{running job with a time limit: the clock's time when it is up}"""
        self._logs: dict[Job, Log] = {}
        """{running job: what it logged}, of those that did."""
        self._unsaved: dict[Job, None] = {}
        """Jobs whose progress or log is newer than what is recorded."""
        prefix = self.options.handle_prefix or f"H:{self.options.name}:{self.options.epoch}."
        self._handle_prefix = prefix.encode()
        self._idle: OrderedDict[Function, None] = OrderedDict()
        """Functions that were without workers and jobs when last looked at, longest first."""
        self._serial = 0
        self._created = 0
        self._served = 0
        self._durable = self.options.durable
        self._record_foreground = self.options.durable and self.options.record_foreground
        self._record_logs = self.options.durable and self.options.record_logs
        self._measures = self.options.measure
        self._fair = self.options.function_order is FunctionOrder.FAIR
        row_prefix = f"{self.options.handle_prefix or f'H:{self.options.name}'}:r"
        self._watchers = Watchers(row_prefix.encode())
        self.crews = Crews(self)
        self.window = Window(self)
        self.limits = Limits(self, durable=self._durable)
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
            self._forget_ability(peer, function)
        for job in list(peer.listens):
            assert job.listeners is not None
            job.listeners = [listener for listener in job.listeners if listener is not peer] or None
            self.drop_if_abandoned(job)
        if self._watchers:
            self._watchers.forget(peer)
        if not self.crews.waits_for_word(peer):
            self.lose_jobs_of(peer)
        self.crews.peer_left(peer)
        self._pass_on_wake(peer, None)

    def receive(self, peer: Peer, packet: Packet) -> None:
        """A packet came. PROTOCOL: "Binary Packet"."""
        kind, arguments = packet
        self._handlers[kind](peer, arguments)

    def refuse(self, peer: Peer, code: bytes, text: bytes) -> None:
        """Answer ERROR. The connection goes on."""
        self._send(peer, encode_response(PacketType.ERROR, code, text))

    def say(self, peer: Peer, text: bytes) -> None:
        """Answer a line of the administrative protocol, in its turn."""
        self._send(peer, text)

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
                for peer in peers:
                    self._send(peer, encode_response(PacketType.WORK_COMPLETE, row, told))
            elif type(entry) is not JobLogged:
                # It is not all of what the row says.
                begun.pop(entry.handle, None)

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
                self._listen(listener, other)
        job.listeners = None
        key = job.key
        self.remove(job)
        if other is not None and other.key is None and key is not None:
            other.key = key
            other.function.uniques[key] = other

    def adopt(self, jobs: Iterable[StoredJob]) -> None:
        """The store handed these over: from now on they are this server's."""
        for stored in jobs:
            held = self.jobs.get(stored.handle)
            if held is not None:
                self._take_back(held, stored)
                continue
            function = self.functions.get(stored.function) or self.add_function(stored.function)
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
            job.limit_key = stored.limit_key
            if not stored.attempts and not stored.handle.startswith(self._handle_prefix):
                # Others came here before, and were counted.
                function.tally.submitted += 1
            key = self._unique_key(stored.unique, stored.workload)
            if key is not None and key not in function.uniques:
                job.key = key
                function.uniques[key] = job
            self._hold(job)
            self.admit(job)

    def adopt_interrupted(self, jobs: Iterable[StoredJob]) -> None:
        """
        The store handed over what ran when an earlier run of the server ended.

        The workers may be at it still, and come back: nobody else gets the
        jobs for a moment.
        """
        interrupted = list(jobs)
        self.adopt(interrupted)
        for stored in interrupted:
            job = self.jobs[stored.handle]
            if job.state is READY:
                self._set_aside(job)

    def _set_aside(self, job: Job) -> None:
        """Let one that waits wait for its worker to come back."""
        self._take_out(job)
        if job.function.limiter is not None:
            # Its worker may be at it.
            self.limits.force(job)
        job.state = DELAYED
        job.function.delayed += 1
        self._returning[job] = None

    def hold(self, job: Job, *, for_ever: bool) -> bool:
        """
        Who speaks for its worker says that it is at the job still, or is gone himself.

        Returns:
            Whether the job waits for its worker to come back.
        """
        if for_ever and job.state is READY and job.background:
            # The hand-out was not written down before the server ended.
            self._set_aside(job)
        if job not in self._returning:
            return False
        self._returning[job] = math.inf if for_ever else self.clock + WORKERS_RETURN
        return True

    def is_returning(self, job: Job) -> bool:
        """Whether it waits for its worker to come back."""
        return job in self._returning

    def expect_no_more(self, job: Job) -> None:
        """The worker will not come back with the job: it is the next."""
        if self._returning.pop(job, 0.0) != 0.0:
            job.function.delayed -= 1
            self._put_first(job)

    def _take_out(self, job: Job) -> None:
        """Take one out that waits."""
        if job.gate is not None:
            self.limits.take_out(job)
            return
        function = job.function
        function.withdraw(job)
        if not function.waiting:
            del self.ready[function]

    def _expect_no_more(self) -> None:
        """Who has not come back by now has lost the job: it is the next."""
        for job, until in reversed(list(self._returning.items())):
            if until is None:
                self._returning[job] = self.clock + WORKERS_RETURN
            elif until <= self.clock:
                self.expect_no_more(job)

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
        for job in list(self._unsaved):
            self._save_if_due(job)
        if self._returning:
            self._expect_no_more()
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

    def _can_do(self, peer: Peer, arguments: list[bytes]) -> None:
        self._offer(peer, arguments[0])
        if peer.timeouts is not None:
            peer.timeouts.pop(arguments[0], None)

    def _can_do_timeout(self, peer: Peer, arguments: list[bytes]) -> None:
        """A time limit of milliseconds; below a second is a second, none is none. gearmand since 1.1.19."""
        name, limit = arguments
        self._offer(peer, name)
        if name in peer.abilities:
            amount = atoi(limit) * (SECOND if self.options.timeout_in_seconds else 1)
            if peer.timeouts is None:
                peer.timeouts = {}
            if amount > 0:
                peer.timeouts[name] = max(amount, SECOND) / SECOND
            else:
                peer.timeouts.pop(name, None)

    def _all_yours(self, peer: Peer, arguments: list[bytes]) -> None:
        """The worker has no other server; nothing depends on it. Not in gearmand."""

    def _offer(self, peer: Peer, name: bytes) -> None:
        if name in peer.abilities:
            return
        if len(peer.abilities) >= self.options.max_abilities:
            self.refuse(peer, b"ARGUMENT_TOO_LARGE", b"Too many functions on one connection")
            return
        function = self._function(peer, name)
        if function is not None:
            peer.abilities[name] = function
            function.workers[peer] = None
            if peer.enlisted:
                function.sleepers[peer] = None

    def _cant_do(self, peer: Peer, arguments: list[bytes]) -> None:
        function = peer.abilities.get(arguments[0])
        if function is not None:
            self._withdraw(peer, {function})

    def _reset_abilities(self, peer: Peer, arguments: list[bytes]) -> None:
        self._withdraw(peer, set(peer.abilities.values()))

    def _withdraw(self, peer: Peer, functions: Collection[Function]) -> None:
        # As in gearmand, who no longer offers a function gives back its jobs.
        for function in functions:
            self._forget_ability(peer, function)
        for job in reversed(list(peer.running.values())):
            if job.function in functions:
                self.lose_worker(job)
        if peer.woken_for in functions:
            self._pass_on_wake(peer, None)

    def _forget_ability(self, peer: Peer, function: Function) -> None:
        del peer.abilities[function.name]
        del function.workers[peer]
        if peer.timeouts is not None:
            peer.timeouts.pop(function.name, None)
        function.sleepers.pop(peer, None)
        self.note_if_idle(function)

    def _pre_sleep(self, peer: Peer, arguments: list[bytes]) -> None:
        if self._best_function(peer) is not None:
            # The job came between NO_JOB and now: no sleep.
            peer.asleep = False
            self._send(peer, _NOOP)
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
            self._send(
                peer, encode_response(PacketType.JOB_ASSIGN, job.handle, job.function.name, job.workload)
            )

    def _grab_job_uniq(self, peer: Peer, arguments: list[bytes]) -> None:
        job = self._hand_out(peer)
        if job is None:
            if peer.waits:
                self._pre_sleep(peer, arguments)
        else:
            self._send(
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
        self._send(peer, packet)

    def serve_woken(self) -> None:
        """Hand out jobs to those who were woken and need not be told, as if they had grabbed."""
        woken, self.woken = self.woken, []
        for peer in woken:
            if peer.woken_for is None:
                continue  # it is gone
            if peer.line is not None:
                # The job could not be sent yet.
                self._send(peer, _NOOP)
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
            self._pass_on_wake(peer, function)
        if function is None:
            self._send(peer, _NO_JOB)
            if self.limits.blocked:
                self.limits.want(peer, sleeps=False)
            return None
        job = function.take() if self.clock < self.hand_out_until else function.take_foreground()
        if not function.waiting:
            del self.ready[function]
        if job.gate is not None:
            self.limits.started(job)
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
        self._limit(job, peer)
        if peer.attempts and (job.attempts > 1 or job.max_attempts is not None):
            told = b"attempt %d %d" % (job.attempts, job.max_attempts or 0)
            self._send(peer, encode_response(PacketType.OPTION_RES, told))
        if job.recorded:
            self.entries.append(JobStarted(job.handle, peer.identity, job.attempts, self.now))
        return job

    def _limit(self, job: Job, peer: Peer) -> None:
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

    def _work_status(self, peer: Peer, arguments: list[bytes]) -> None:
        handle, numerator, denominator = arguments
        job = peer.running.get(handle)
        if job is None:
            self._refuse_result(peer, handle, b"Job given in work result not found")
            return
        job.numerator = numerator
        job.denominator = denominator
        self._tell(job, PacketType.WORK_STATUS, arguments)
        job.progress_unsaved = True
        self._unsaved[job] = None
        self._save_if_due(job)

    def _log(self, peer: Peer, handle: bytes, text: bytes) -> None:
        """What is said of a job that is not kept, or not the worker's any more, is passed over."""
        job = peer.running.get(handle)
        if job is None or not job.recorded:
            return
        log = self._logs.get(job)
        if log is None:
            log = self._logs[job] = Log()
        log.text = text[-MAX_LOG:]
        log.unsaved = True
        self._unsaved[job] = None
        self._save_if_due(job)

    def _save_if_due(self, job: Job) -> None:
        """Record progress and log, each no more often than once in ``progress_interval``; the rest waits."""
        interval = self.options.progress_interval
        if job.progress_unsaved and self.now - job.progress_at >= interval:
            self._save_progress(job)
        log = self._logs.get(job)
        if log is not None and log.unsaved and self.now - log.recorded_at >= interval:
            self._save_log(job, log)
        if not job.progress_unsaved and (log is None or not log.unsaved):
            self._unsaved.pop(job, None)

    def _save_log(self, job: Job, log: Log) -> None:
        log.recorded_at = self.now
        log.unsaved = False
        self.entries.append(JobLogged(job.handle, log.text))

    def _save_progress(self, job: Job) -> None:
        job.progress_at = self.now
        job.progress_unsaved = False
        if job.recorded:
            self.entries.append(JobProgress(job.handle, job.numerator, job.denominator))

    def _work_data(self, peer: Peer, arguments: list[bytes]) -> None:
        self._pass_on(peer, PacketType.WORK_DATA, arguments)

    def _work_warning(self, peer: Peer, arguments: list[bytes]) -> None:
        self._pass_on(peer, PacketType.WORK_WARNING, arguments)

    def _pass_on(self, peer: Peer, kind: PacketType, arguments: list[bytes]) -> None:
        job = peer.running.get(arguments[0])
        if job is None:
            self._refuse_result(peer, arguments[0], b"Job does not exist on server")
            return
        self._tell(job, kind, arguments)

    def _work_complete(self, peer: Peer, arguments: list[bytes]) -> None:
        job = peer.running.get(arguments[0])
        if job is None:
            self._refuse_result(peer, arguments[0], b"Job given in work result not found")
            return
        self._tell(job, PacketType.WORK_COMPLETE, arguments)
        self._finish(job, Outcome.SUCCESSFUL, arguments[1])

    def _work_fail(self, peer: Peer, arguments: list[bytes]) -> None:
        handle = arguments[0].rstrip(b"\0")
        job = peer.running.get(handle)
        if job is None:
            if handle == peer.excused:
                return
            if len(handle) > MAX_HANDLE and handle not in peer.cancelled:
                # gearmand says so here alone.
                self.refuse(peer, b"ARGUMENT_TOO_LARGE", _HANDLE_TOO_LARGE)
                return
            self._refuse_result(peer, handle, b"Job given in work result not found")
            return
        self._fail(job, Outcome.FAILED, "The worker reported that the job failed")

    def _work_exception(self, peer: Peer, arguments: list[bytes]) -> None:
        """WORK_EXCEPTION is final, as in gearmand; a WORK_FAIL of the same worker after it is passed over."""
        handle, data = arguments
        job = peer.running.get(handle)
        if job is None:
            self._refuse_result(peer, handle, b"An exception was received for a job that does not exist")
            return
        peer.excused = handle
        retry, peer.retry = peer.retry, None
        if retry is not None and retry[0] == handle and self._may_try_again(job):
            self._requeue(job, "", data, self.now + retry[1])
            return
        failed = encode_response(PacketType.WORK_FAIL, handle)
        exception = encode_response(PacketType.WORK_EXCEPTION, handle, data)
        for listener in job.listeners or ():
            self._send(listener, exception if listener.exceptions else failed)
        self._finish(job, Outcome.FAILED, data)

    def _refuse_result(self, peer: Peer, handle: bytes, text: bytes) -> None:
        # Perl's workers end on an ERROR; that the job was cancelled is not their fault.
        if handle in peer.cancelled:
            return
        self.refuse(peer, b"JOB_NOT_FOUND", text)

    # Packets of clients.

    def _submit_epoch(self, peer: Peer, arguments: list[bytes]) -> None:
        """In the background, of normal priority, not before a time; what is no number is no time."""
        name, unique, epoch, workload = arguments
        due = float(min(atoi(epoch), LATEST))
        self._submit(peer, [name, unique, workload], NORMAL, background=True, due=due)

    def _submit_sched(self, peer: Peer, arguments: list[bytes]) -> None:
        """In the background, once, at the next moment that five cron fields name. In no C server."""
        name, unique, *fields, workload = arguments
        try:
            due = next_match(fields, self.now, self.options.zone)
        except ValueError as error:
            self.refuse(peer, b"INVALID_ARGUMENT", str(error).encode())
            return
        self._submit(peer, [name, unique, workload], NORMAL, background=True, due=due)

    def _submit_reduce(self, peer: Peer, arguments: list[bytes], *, background: bool) -> None:
        """gearmand reads the aggregator, which its document leaves out, and drops it too."""
        name, unique, reducer, _, workload = arguments
        if len(reducer) > self.options.max_function or not is_printable(reducer):
            self.refuse(peer, b"ARGUMENT_TOO_LARGE", b"Reducer is no function name")
            return
        self._submit(peer, [name, unique, workload], NORMAL, background=background, reducer=reducer)

    def _submit_reduce_job(self, peer: Peer, arguments: list[bytes]) -> None:
        self._submit_reduce(peer, arguments, background=False)

    def _submit_reduce_job_background(self, peer: Peer, arguments: list[bytes]) -> None:
        self._submit_reduce(peer, arguments, background=True)

    def _submit(
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
        name, unique, workload = arguments
        function = self.functions.get(name)
        if function is None:
            if name == CLAIM and background:
                self._claim(peer)
                return
            function = self._function(peer, name)
            if function is None:
                return
        if len(unique) > self.options.max_unique:
            self.refuse(peer, b"ARGUMENT_TOO_LARGE", b"Unique value too large")
            return
        key = self._unique_key(unique, workload)
        if key is not None:
            job = function.uniques.get(key)
            if job is not None:
                self._join(peer, job, background=background)
                return
            if not background and not asked and function.away:
                self._ask_before_submitting(peer, arguments, priority, reducer)
                return
        if function.limits is not None and function.is_full(priority):
            self.refuse(peer, b"QUEUE_ERROR", b"Job queue is full")
            return
        self._created += 1
        function.tally.submitted += 1
        handle = self._handle_prefix + b"%d" % self._created
        recorded = self._durable if background else self._record_foreground
        job = Job(handle, function, unique, workload, priority, background=background, recorded=recorded)
        job.reducer = reducer
        if due > self.now:
            job.due = due
        if background and recorded:
            job.state = PENDING
            job.spilled = job.due > 0 or self.window.is_behind(function, priority)
            if function.limiter is not None and self.limits.is_crowded(job):
                job.spilled = True
            if job.spilled:
                function.spilling[priority] = function.spilling.get(priority, 0) + 1
            else:
                function.arriving += 1
        self._hold(job)
        if key is not None:
            job.key = key
            function.uniques[key] = job
        if recorded:
            self._record(job, peer)
        if job.state is PENDING:
            job.awaited = self.entries[-1]
            self.urgent = True
            self._answer_later(peer, job)
            return
        self._send(peer, encode_response(PacketType.JOB_CREATED, handle))
        if not background:
            self._listen(peer, job)
        self.admit(job)

    def _ask_before_submitting(
        self, peer: Peer, arguments: list[bytes], priority: int, reducer: bytes
    ) -> None:
        """
        Submit a foreground job once it is known whether one of its unique waits at the store's door.

        That one is taken in then, ahead of others that wait there: somebody waits for it now.
        """
        name, unique, workload = arguments
        place = self._keep_place(peer)

        def submit(reply: Reply) -> None:
            if isinstance(reply, StoredJob):
                self.adopt([reply])
            if peer.line is None:
                return  # it is gone
            line, peer.line = peer.line, deque()
            self._submit(peer, arguments, priority, background=False, reducer=reducer, asked=True)
            at = line.index(place)
            del line[at]
            for item in reversed(peer.line):
                line.insert(at, item)
            peer.line = line
            self._send_line(peer)

        self.window.ask(Topic.TAKE, submit, function=name, unique=unique, workload=workload)

    def _join(self, peer: Peer, job: Job, *, background: bool) -> None:
        """Attach a submission to the live job of the same unique, which keeps its own workload."""
        if background and not job.background and not job.elsewhere:
            # gearmand lets the job die with its foreground clients all the same.
            job.background = True
            if self._durable:
                self.urgent = True
                if job.recorded:
                    workload = job.workload if job.unique == b"-" else b""
                    self.entries.append(
                        JobKept(job.handle, self.now, job.function.name, job.unique, workload, self.clock)
                    )
                    job.awaited = self.entries[-1]
                else:
                    job.recorded = True
                    self._record(job, peer)
                    job.awaited = self.entries[-1]
                    if job.worker is not None:
                        self.entries.append(
                            JobStarted(job.handle, job.worker.identity, job.attempts, self.now)
                        )
                job.answers = []
        # Who only waits for a job that runs already need not wait for its being kept, nor for its refusal.
        if job.answers is not None and (background or job.state is PENDING):
            self._answer_later(peer, job)
        else:
            self._send(peer, encode_response(PacketType.JOB_CREATED, job.handle))
        if not background:
            self._listen(peer, job)

    def _claim(self, peer: Peer) -> None:
        self.claim_wanted = True
        self._send(peer, encode_response(PacketType.JOB_CREATED, self._handle_prefix + CLAIMED))

    def _get_status(self, peer: Peer, arguments: list[bytes]) -> None:
        handle = arguments[0].rstrip(b"\0")
        job = self.jobs.get(handle)
        if job is None and len(handle) > MAX_HANDLE:
            # gearmand does not answer.
            self.refuse(peer, b"ARGUMENT_TOO_LARGE", b"Job handle too large")
            return
        if job is None and self._durable:
            place = self._keep_place(peer)

            def answer(reply: Reply) -> None:
                numbers = _status_numbers(reply)
                self._fill(place, encode_response(PacketType.STATUS_RES, handle, *numbers))

            self.window.ask(Topic.STATUS, answer, handle=handle)
            return
        if job is None or job.state is PENDING:
            self._send(peer, encode_response(PacketType.STATUS_RES, handle, b"0", b"0", b"0", b"0"))
            return
        running = b"1" if job.state is RUNNING else b"0"
        self._send(
            peer,
            encode_response(
                PacketType.STATUS_RES,
                handle,
                b"1",
                running,
                _as_unsigned(job.numerator),
                _as_unsigned(job.denominator),
            ),
        )

    def _get_status_unique(self, peer: Peer, arguments: list[bytes]) -> None:
        """Of several functions' jobs with the unique, the last created answers, as in gearmand."""
        unique = arguments[0].rstrip(b"\0")
        found = [
            function.uniques[unique] for function in self.functions.values() if unique in function.uniques
        ]
        known = [job for job in found if job.state is not PENDING]
        if known:
            job = max(known, key=lambda job: job.serial)
            numbers = [
                b"1",
                b"1" if job.state is RUNNING else b"0",
                _as_unsigned(job.numerator),
                _as_unsigned(job.denominator),
                b"%d" % len(job.listeners or ()),
            ]
        elif not found and self._durable and unique:
            place = self._keep_place(peer)

            def answer(reply: Reply) -> None:
                told = [*_status_numbers(reply), b"0"]
                self._fill(place, encode_response(PacketType.STATUS_RES_UNIQUE, unique, *told))

            self.window.ask(Topic.UNIQUE, answer, unique=unique)
            return
        else:
            numbers = [b"0"] * 5
        self._send(peer, encode_response(PacketType.STATUS_RES_UNIQUE, unique, *numbers))

    # Packets of both.

    def _echo(self, peer: Peer, arguments: list[bytes]) -> None:
        self._send(peer, encode_response(PacketType.ECHO_RES, arguments[0]))

    def _set_client_id(self, peer: Peer, arguments: list[bytes]) -> None:
        # Cut as gearmand does; control characters would forge lines of the listing.
        peer.client_id = bytes(byte if byte >= 0x20 and byte != 0x7F else 0x3F for byte in arguments[0][:127])

    def _option_req(self, peer: Peer, arguments: list[bytes]) -> None:
        option = arguments[0]
        if option == ATTEMPTS:
            peer.attempts = True
            self._send(peer, encode_response(PacketType.OPTION_RES, option))
        elif peer.attempts and option.startswith(RETRY):
            delay, _, handle = option.removeprefix(RETRY).partition(b" ")
            peer.retry = handle, min(max(atoi(delay), 0) / SECOND, LONGEST_RETRY)
        elif option.startswith(LOG) and self._record_logs:
            handle, _, text = option[len(LOG) :].partition(b" ")
            self._log(peer, handle, text)
        elif option == LOGS and self._record_logs:
            self._send(peer, encode_response(PacketType.OPTION_RES, option))
        elif option.startswith(LISTEN + ROW) and self._durable:
            if self._watchers.add(peer, option.removeprefix(LISTEN), self.clock):
                self._send(peer, encode_response(PacketType.OPTION_RES, option))
            else:
                self.refuse(peer, b"JOB_NOT_FOUND", b"No such job to listen to")
        elif option.startswith(LISTEN):
            job = self.jobs.get(option.removeprefix(LISTEN))
            if job is None or job.state is PENDING:
                self.refuse(peer, b"JOB_NOT_FOUND", b"No such job to listen to")
                return
            self._send(peer, encode_response(PacketType.OPTION_RES, option))
            self._listen(peer, job)
        elif option == WAITS and peer.local:
            peer.waits = True
            self._send(peer, encode_response(PacketType.OPTION_RES, option))
        elif peer.attempts and self.crews.hear(peer, option):
            pass
        elif arguments[0].rstrip(b"\0").lower() == b"exceptions":
            peer.exceptions = True
            self._send(peer, encode_response(PacketType.OPTION_RES, arguments[0]))
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
        self._fail(job, Outcome.CANCELLED, "The job was cancelled")
        return True

    def cancel_for(self, peer: Peer, handle: bytes, done: bytes, missing: bytes) -> None:
        """End a job, wherever it waits, and answer with one of two texts in the peer's turn."""
        if handle in self.jobs or not self._durable:
            self._send(peer, done if self.cancel(handle) else missing)
            return
        place = self._keep_place(peer)
        self.window.ask(
            Topic.CANCEL, lambda reply: self._fill(place, done if reply else missing), handle=handle
        )

    def create_function(self, name: bytes) -> tuple[bytes, bytes] | None:
        """List a function before anybody uses it; code and text of the error when the name is refused."""
        if name in self.functions:
            return None
        refusal = self._refusal_of(name)
        if refusal is None:
            self.add_function(name)
        return refusal

    def drop_function(self, name: bytes) -> bool:
        """
        Forget a function that is listed; False when it has workers or jobs.

        gearmand drops it with its waiting jobs, which then nobody can run.

        Raises:
            KeyError: There is none of that name.
        """
        function = self.functions[name]
        if function.held or function.workers or function.away:
            return False
        del self.functions[name]
        self._idle.pop(function, None)
        return True

    def limit_function(self, name: bytes, high: int, normal: int, low: int) -> None:
        """
        Let the function hold so many jobs, of any kind, before one of each priority is refused.

        0 is no limit. Nothing happens, as in gearmand, when the function is not listed.
        """
        function = self.functions.get(name)
        if function is not None:
            function.limits = (high, normal, low) if high or normal or low else None
            self.note_if_idle(function)

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
            if peer.asleep:
                peer.asleep = False
                peer.woken_for = function
                if peer.waits:
                    self.woken.append(peer)
                else:
                    self._send(peer, _NOOP)
                return

    def wait_no_more(self, peer: Peer) -> None:
        """A worker is about to leave: no job is handed to it unasked from now on."""
        if peer.waits:
            peer.waits = peer.asleep = False
            self._pass_on_wake(peer, None)

    def _pass_on_wake(self, peer: Peer, taken: Function | None) -> None:
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
            self._finish(job, Outcome.CANCELLED, b"", "The client left, and then the worker")
        else:
            self._requeue(job, "", counts=False)

    def resume(self, job: Job, peer: Peer, attempt: int) -> None:
        """A worker that had lost its connection has the job still; nothing happens if it may not have it."""
        function = job.function
        if function.name not in peer.abilities or self.clock >= self.hand_out_until:
            return
        if job.state is READY:
            self._take_out(job)
            self.window.unload(job)
        elif job in self._returning:
            del self._returning[job]
            function.delayed -= 1
            self.window.unload(job)
        elif job.state is RUNNING:
            self._release(job)
        else:
            return
        function.running += 1
        job.state = RUNNING
        job.worker = peer
        job.attempts = attempt
        peer.running[job.handle] = job
        self._limit(job, peer)
        if function.limiter is not None:
            self.limits.force(job)
        if job.recorded:
            self.entries.append(JobStarted(job.handle, peer.identity, job.attempts, self.now))

    def lose_worker(self, job: Job, cause: str = "The worker was lost") -> None:
        """The worker left, gave the job back or took too long: no outcome, so it waits again."""
        limit = self.options.job_retries if job.max_attempts is None else job.max_attempts
        if not job.background and not job.listeners:
            self._finish(job, Outcome.CANCELLED, b"", "The client left, and then the worker")
        elif limit and job.attempts - job.interruptions >= limit:
            self._fail(job, Outcome.DEAD, f"{cause} at the last of {job.attempts} attempts")
        else:
            self._requeue(job, cause)

    def _may_try_again(self, job: Job) -> bool:
        """Whether its worker may ask for another attempt: a client that waits wants the exception."""
        if not job.background:
            return False
        return job.max_attempts is None or job.attempts - job.interruptions < job.max_attempts

    def _requeue(
        self, job: Job, reason: str, data: bytes = b"", due: float = 0.0, *, counts: bool = True
    ) -> None:
        """An attempt came to nothing: the job waits again, before all others or for its time."""
        assert job.worker is not None, "only a job that runs comes back"
        if counts:
            job.function.tally.retried += 1
        log = self._logs.pop(job, None)
        self._unsaved.pop(job, None)
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
                b"" if log is None else log.text,
                unclaimed,
            )
            self.entries.append(entry if counts else entry._replace(counts=False))
        if not counts:
            job.attempts -= 1
        self._release(job)
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
        self._put_first(job)

    def _put_first(self, job: Job) -> None:
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

    def _release(self, job: Job) -> None:
        if job.worker is not None:
            del job.worker.running[job.handle]
            job.worker = None
            job.function.running -= 1
            self._limited.pop(job, None)
            if job.gate is not None:
                self.limits.give_back(job)

    def _fail(self, job: Job, outcome: Outcome, reason: str) -> None:
        self._tell(job, PacketType.WORK_FAIL, [job.handle])
        self._finish(job, outcome, b"", reason)

    def _finish(self, job: Job, outcome: Outcome, data: bytes, reason: str = "") -> None:
        """The job has ended and its listeners were told: forget it, but for its record."""
        if outcome is SUCCESSFUL:
            job.function.tally.successful += 1
        else:
            job.function.tally.otherwise[outcome] += 1
        if self._measures and job.worker is not None:
            self._measure_run(job)
        worker = job.worker
        self._release(job)
        if job.listeners is not None:
            for listener in job.listeners:
                listener.listens.discard(job)
            job.listeners = None
        if job.answers is not None:
            # It ran before the journal could say that it is kept: there is nothing left to lose.
            self._give_answers(job, encode_response(PacketType.JOB_CREATED, job.handle))
        if job.progress_unsaved:
            self._save_progress(job)
        if self._logs:
            log = self._logs.pop(job, None)
            if log is not None and log.unsaved:
                self._save_log(job, log)
        if self._unsaved:
            self._unsaved.pop(job, None)
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
        function = job.function
        if job.state is not RUNNING and not job.spilled:
            self.window.unload(job)
        if job.state is PENDING:
            self._arrive(job)
        elif job.state is DELAYED:
            function.delayed -= 1
            self._returning.pop(job, None)
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
        self.note_if_idle(function)

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
        if job.state in (READY, DELAYED) and not job.background and not job.listeners:
            self._finish(job, Outcome.CANCELLED, b"", "The client left before a worker took the job")

    # Small parts.

    def _send(self, peer: Peer, data: bytes) -> None:
        if peer.line is not None:
            peer.line.append(data)
            return
        if not peer.output:
            self.dirty.append(peer)
        peer.output.append(data)

    def _answer_later(self, peer: Peer, job: Job) -> None:
        if job.answers is None:
            job.answers = []
        job.answers.append(self._keep_place(peer))

    def _keep_place(self, peer: Peer) -> Answer:
        answer = Answer(peer)
        if peer.line is None:
            peer.line = deque()
        peer.line.append(answer)
        return answer

    def _give_answers(self, job: Job, data: bytes) -> None:
        answers = job.answers or ()
        job.answers = job.awaited = None
        for answer in answers:
            self._fill(answer, data)

    def _fill(self, answer: Answer, data: bytes) -> None:
        answer.data = data
        if answer.peer.line is not None:  # else it is gone
            self._send_line(answer.peer)

    def _send_line(self, peer: Peer) -> None:
        """Send what stands in a peer's line before the first answer that is not known."""
        line = peer.line
        assert line is not None, "nothing stands there"
        if not peer.output:
            self.dirty.append(peer)
        while line:
            head = line[0]
            if isinstance(head, Answer):
                if head.data is None:
                    break
                head = head.data
            peer.output.append(head)
            line.popleft()
        else:
            peer.line = None

    def _tell(self, job: Job, kind: PacketType, arguments: list[bytes]) -> None:
        if job.listeners is not None:
            packet = encode_response(kind, *arguments)
            for listener in job.listeners:
                self._send(listener, packet)

    def _listen(self, peer: Peer, job: Job) -> None:
        if job.listeners is None:
            job.listeners = []
        job.listeners.append(peer)
        peer.listens.add(job)

    def _record(self, job: Job, peer: Peer) -> None:
        entry = JobQueued(
            job.handle,
            job.function.name,
            job.unique,
            job.workload,
            job.priority,
            job.background,
            peer.identity,
            self.now,
            job.reducer,
            job.due,
            job.spilled,
            self.clock,
            job.attempts - (job.worker is not None),
        )
        limiter = job.function.limiter
        if limiter is not None and limiter.limit.keyed:
            entry = entry._replace(limit_key=limiter.key_of(job))
        self.entries.append(entry)

    def _unique_key(self, unique: bytes, workload: bytes) -> UniqueKey | None:
        # PROTOCOL is silent on it, but gearmand (job.cc) and Perl's Job.pm agree:
        # the unique "-" stands for the workload itself.
        if unique == b"-":
            return (workload,) if workload else None
        return unique or None

    def _function(self, peer: Peer, name: bytes) -> Function | None:
        """The function of that name, made when it is new; None when it is refused."""
        function = self.functions.get(name)
        if function is not None:
            return function
        refusal = self._refusal_of(name)
        if refusal is not None:
            self.refuse(peer, *refusal)
            return None
        return self.add_function(name)

    def _refusal_of(self, name: bytes) -> tuple[bytes, bytes] | None:
        """Code and text of the error about a new function's name; None when it may be made."""
        if len(name) > self.options.max_function:
            return b"ARGUMENT_TOO_LARGE", b"Function name too large"
        if name == CLAIM or not is_printable(name):
            # A line end or a tab would forge a row of the listings.
            return b"INVALID_FUNCTION_NAME", b"Function names are UTF-8 without control characters"
        return None

    def add_function(self, name: bytes) -> Function:
        function = self.functions[name] = Function(name)
        self.limits.attach(function)
        self.note_if_idle(function)
        return function

    def note_if_idle(self, function: Function) -> None:
        """
        Functions without workers and jobs stay listed, but not without limit.

        gearmand keeps each for ever and grows under names that are made up.
        """
        if not function.idle:
            return
        idle = self._idle
        idle[function] = None
        if len(idle) > self.options.max_idle_functions:
            oldest, _ = idle.popitem(last=False)
            if oldest is not function and oldest.idle:
                del self.functions[oldest.name]

    def _hold(self, job: Job) -> None:
        self.jobs[job.handle] = job
        job.function.held += 1
        self._serial += 1
        job.serial = self._serial
        if not job.spilled:
            self.window.load(job)

    def _make_handlers(self) -> list[Callable[[Peer, list[bytes]], None]]:
        handlers: list[Callable[[Peer, list[bytes]], None]] = [self._unexpected] * (HIGHEST_TYPE + 1)
        for kind, (priority, background) in _SUBMISSIONS.items():
            handlers[kind] = self._submission(priority, background)
        handlers[PacketType.CAN_DO] = self._can_do
        handlers[PacketType.CANT_DO] = self._cant_do
        handlers[PacketType.RESET_ABILITIES] = self._reset_abilities
        handlers[PacketType.PRE_SLEEP] = self._pre_sleep
        handlers[PacketType.GRAB_JOB] = self._grab_job
        handlers[PacketType.GRAB_JOB_UNIQ] = self._grab_job_uniq
        handlers[PacketType.GRAB_JOB_ALL] = self._grab_job_all
        handlers[PacketType.CAN_DO_TIMEOUT] = self._can_do_timeout
        handlers[PacketType.ALL_YOURS] = self._all_yours
        handlers[PacketType.SUBMIT_JOB_EPOCH] = self._submit_epoch
        handlers[PacketType.SUBMIT_JOB_SCHED] = self._submit_sched
        handlers[PacketType.SUBMIT_REDUCE_JOB] = self._submit_reduce_job
        handlers[PacketType.SUBMIT_REDUCE_JOB_BACKGROUND] = self._submit_reduce_job_background
        handlers[PacketType.GET_STATUS_UNIQUE] = self._get_status_unique
        handlers[PacketType.WORK_STATUS] = self._work_status
        handlers[PacketType.WORK_COMPLETE] = self._work_complete
        handlers[PacketType.WORK_FAIL] = self._work_fail
        handlers[PacketType.WORK_EXCEPTION] = self._work_exception
        handlers[PacketType.WORK_DATA] = self._work_data
        handlers[PacketType.WORK_WARNING] = self._work_warning
        handlers[PacketType.GET_STATUS] = self._get_status
        handlers[PacketType.ECHO_REQ] = self._echo
        handlers[PacketType.SET_CLIENT_ID] = self._set_client_id
        handlers[PacketType.OPTION_REQ] = self._option_req
        return handlers

    def _submission(self, priority: int, background: bool) -> Callable[[Peer, list[bytes]], None]:
        def handle(peer: Peer, arguments: list[bytes]) -> None:
            self._submit(peer, arguments, priority, background=background)

        return handle


def _status_numbers(reply: Reply) -> list[bytes]:
    """Known, running and progress, as both kinds of status tell them."""
    if not isinstance(reply, Standing):
        return [b"0"] * 4
    running = b"1" if reply.running else b"0"
    return [b"1", running, _as_unsigned(reply.numerator), _as_unsigned(reply.denominator)]


def is_printable(name: bytes) -> bool:
    """Whether it is UTF-8 without control characters, which would forge rows of a listing."""
    try:
        text = name.decode()
    except UnicodeDecodeError:
        return False
    return not any(character < " " or "\x7f" <= character < "\xa0" for character in text)


def atoi(number: bytes) -> int:
    """
    A number as C's ``atoi`` reads it: leading digits, else 0.

    The digits are bounded before they become an integer: a long run of them
    would cost time that grows with its square.
    """
    text = number.strip()[:20]
    sign = -1 if text[:1] == b"-" else 1
    digits = text[1:] if text[:1] in (b"+", b"-") else text
    length = 0
    while length < len(digits) and 0x30 <= digits[length] <= 0x39:
        length += 1
    return sign * int(digits[:length] or b"0")


def _as_unsigned(number: bytes) -> bytes:
    """A worker's number as STATUS_RES shows it: in 32 bits without sign, as gearmand does."""
    return b"%d" % (atoi(number) % 2**32)
