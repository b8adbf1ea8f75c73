"""
One job server, and a model of it that knows what every connection must hear.

The server is real: core and journal. The model beside it is written without
looking for speed or memory; after each packet what was heard must be what the
model expected, no more and no less. What the model cannot know, what becomes
of entries in the store, it learns from what the journal tells the core; whether
that was the truth is for the ``World`` to judge.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from django_gearman.exceptions import StoreError
from django_gearman.permits import Limit
from django_gearman.protocol.packets import ATTEMPTS, RESUME, RETURN, WAITS, PacketType, encode_response
from django_gearman.server import text
from django_gearman.server import window as window_module
from django_gearman.server.core import JobServer
from django_gearman.server.entries import (
    Entry,
    JobKept,
    JobQueued,
    Outcome,
    Question,
    Reply,
    Standing,
    StoredJob,
    Topic,
)
from django_gearman.server.jobs import HIGH, LOW, NORMAL, Job, JobState
from django_gearman.server.journal import Batch, Journal
from django_gearman.server.limits import UNUSED, UNUSED_BY_BUSY, Limits, key_in
from django_gearman.server.options import FunctionOrder, ServerOptions
from django_gearman.server.peers import Peer
from django_gearman.server.window import Window

from .store import SimulatedStore

if TYPE_CHECKING:
    from .world import World

P = PacketType
NOOP = encode_response(P.NOOP)
NO_JOB = encode_response(P.NO_JOB)
HEADER = 12
SUBMISSIONS: list[tuple[PacketType, int, bool]] = [
    (P.SUBMIT_JOB, NORMAL, False),
    (P.SUBMIT_JOB_HIGH, HIGH, False),
    (P.SUBMIT_JOB_LOW, LOW, False),
    (P.SUBMIT_JOB_BG, NORMAL, True),
    (P.SUBMIT_JOB_HIGH_BG, HIGH, True),
    (P.SUBMIT_JOB_LOW_BG, LOW, True),
    (P.SUBMIT_JOB_EPOCH, NORMAL, True),
    (P.SUBMIT_REDUCE_JOB, NORMAL, False),
    (P.SUBMIT_REDUCE_JOB_BACKGROUND, NORMAL, True),
]
NOBODY = b"H:no:1"


class Broken(AssertionError):
    """A promise is broken."""


def promise(kept: object, sentence: str) -> None:
    if not kept:
        raise Broken(sentence)


class Slot:
    """A place in a connection's line of replies; empty until its content is known."""

    __slots__ = ("acknowledged", "at", "packet")

    def __init__(self, at: float) -> None:
        self.at = at
        self.packet: bytes | None = None
        self.acknowledged: bytes | None = None
        """Handle of the job that must be in the store when this is heard."""


class ModelPeer:
    """A connection, client and worker at once."""

    __slots__ = (
        "abilities",
        "asleep",
        "cancelled",
        "exceptions",
        "excused",
        "limits",
        "line",
        "naps",
        "number",
        "peer",
        "tells_attempts",
        "touched",
        "trade",
        "waits",
    )

    def __init__(self, number: int, trade: list[bytes]) -> None:
        self.number = number
        self.peer: Peer
        self.trade = trade
        """What it may offer."""
        self.abilities: list[bytes] = []
        self.line: deque[Slot | bytes] = deque()
        self.asleep = False
        self.naps = 0
        """PRE_SLEEPs that were not yet answered by a NOOP: each may be once, or by a job for who waits."""
        self.waits = False
        self.exceptions = False
        self.excused: bytes | None = None
        self.cancelled: dict[bytes, None] = {}
        """Jobs that were cancelled while it ran them."""
        self.limits: dict[bytes, float] = {}
        """Seconds that it may take for a job of a function."""
        self.tells_attempts = False
        self.touched = False
        """Whether something was put into its line that was not compared yet."""


class ModelJob:
    __slots__ = (
        "attempts",
        "awaited",
        "background",
        "blocked",
        "due",
        "elsewhere",
        "function",
        "handle",
        "interruptions",
        "key",
        "limit_key",
        "listeners",
        "max_attempts",
        "numbers",
        "priority",
        "recorded",
        "reducer",
        "resumed",
        "serial",
        "slots",
        "state",
        "taken",
        "timeout",
        "unique",
        "up",
        "worker",
        "workload",
    )

    def __init__(
        self, handle: bytes, function: bytes, unique: bytes, workload: bytes, priority: int, background: bool
    ) -> None:
        self.handle = handle
        self.function = function
        self.unique = unique
        self.workload = workload
        self.priority = priority
        self.background = background
        self.reducer = b""
        self.key: tuple[bytes, ...] | None = None
        self.state = "ready"
        self.worker: ModelPeer | None = None
        self.listeners: list[ModelPeer] = []
        self.slots: list[Slot] | None = None
        """Replies that wait for the commit."""
        self.awaited: Entry | None = None
        """The entry whose commit they wait for."""
        self.recorded = False
        self.elsewhere = False
        """Whether it is kept, but perhaps as another server's."""
        self.attempts = 0
        self.interruptions = 0
        self.max_attempts: int | None = None
        self.due = 0.0
        self.timeout: int | None = None
        self.up = math.inf
        """When the time of its worker is up."""
        self.serial = 0
        self.taken = 0
        """Serial of its hand-out."""
        self.numbers = (b"0", b"0")
        self.limit_key: bytes | None = None
        self.blocked: bytes | None = None
        """The key of whose permits it waits for one."""
        self.resumed = False
        """Whether its worker came back to it, permit or none."""


def key_of(unique: bytes, workload: bytes) -> tuple[bytes, ...] | None:
    if unique == b"-":
        return (b"workload", workload) if workload else None
    return (unique,) if unique else None


def numbers_of(reply: Reply) -> tuple[bytes, ...]:
    """Known, running and progress, as a status tells them."""
    if not isinstance(reply, Standing):
        return (b"0",) * 4
    return b"1", b"1" if reply.running else b"0", reply.numerator, reply.denominator


class Watched(JobServer):
    """Tells the model, before it acts, what the journal tells it."""

    model: Server

    def committed(self, entries: Iterable[Entry]) -> None:
        entries = list(entries)
        for entry in entries:
            self.model.committed(entry)
        super().committed(entries)

    def rejected(self, entry: JobQueued | JobKept, reason: str, *, perhaps_kept: bool = False) -> None:
        self.model.rejected(entry, reason, perhaps_kept=perhaps_kept)
        super().rejected(entry, reason, perhaps_kept=perhaps_kept)

    def joined(self, entry: JobQueued, handle: bytes) -> None:
        self.model.joined(entry, handle)
        super().joined(entry, handle)

    def adopt(self, jobs: Iterable[StoredJob]) -> None:
        jobs = list(jobs)
        for job in jobs:
            self.model.adopted(job)
        super().adopt(jobs)


class WatchedWindow(Window):
    """So too of what the store was asked."""

    def __init__(self, core: Watched) -> None:
        super().__init__(core)
        self.model = core.model

    def replied(self, question: Question, reply: Reply) -> None:
        super().replied(question, reply)
        self.model.replied(question, reply)


class WatchedLimits(Limits):
    """So too of permits: the model cannot know what there is, but whose turn it is."""

    def __init__(self, core: Watched, *, durable: bool) -> None:
        super().__init__(core, durable=durable)
        self.model = core.model

    def learn(self, limits: Mapping[bytes, Limit]) -> None:
        self.model.learn(limits)
        super().learn(limits)

    def hold(self, job: Job, *, first: bool = False) -> None:
        self.model.moves.append(("hold", job.handle, first))
        super().hold(job, first=first)

    def expose(self, job: Job) -> None:
        self.model.moves.append(("show", job.handle, False))
        super().expose(job)

    def _conceal(self, job: Job, *, give_back: bool) -> None:
        self.model.moves.append(("hide", job.handle, False))
        super()._conceal(job, give_back=give_back)

    def tick(self) -> None:
        super().tick()
        clock = self.model.core.clock
        for limiter in self.limiters.values():
            if limiter.function is None or not limiter.free:
                continue
            # In the end each server has workers for all that it keeps from the others.
            is_busy = any(peer.running for peer in limiter.function.workers)
            most = UNUSED_BY_BUSY if is_busy else UNUSED
            for gate in limiter.gates.values():
                unused = [job.handle for job, at in gate.free.items() if clock - at >= most]
                promise(not unused, f"{unused} keep permits that nobody came for in {most:g} s")


class Server:
    """One run of one server: its core, its journal, its connections, and the model."""

    def __init__(self, world: World, name: str, store: SimulatedStore | None) -> None:
        self.world = world
        self.random = world.dice.random
        self.name = name
        self.store = store
        shape = world.shape
        self.shape = shape
        self.durable = store is not None
        self.record_foreground = self.durable and shape.record_foreground
        self.functions = shape.functions
        self.limited: dict[bytes, Limit] = {}
        self.blocked: dict[bytes, dict[bytes, dict[int, list[ModelJob]]]] = {}
        """{function: {key: {priority: jobs that wait for a permit, in order}}}"""
        self.to_block: dict[bytes, bool] = {}
        """{job that is to wait for a permit: whether before all others}."""
        self.seen: set[bytes] = set()
        self.moves: list[tuple[str, bytes, bool]] = []
        """Jobs that the core has let wait, shown to workers, or hidden again, since the model last looked."""
        epoch = store.epoch if store is not None else world.next_epoch()
        self.epoch = epoch
        self.label = f"{name}/{epoch}"
        options = ServerOptions(
            name=name,
            epoch=epoch,
            durable=self.durable,
            record_foreground=shape.record_foreground,
            job_retries=shape.retries,
            worker_wakeup=shape.wakeup,
            function_order=shape.order,
            timeout_grace=0.0,
            window=shape.window,
            window_bytes=shape.window_bytes,
        )
        self.core = core = Watched(options)
        core.model = self
        core.window = WatchedWindow(core)
        core.limits = WatchedLimits(core, durable=self.durable)
        core.now = world.wall(name)
        core.clock = world.clock
        core.window.door_seen = not self.durable
        self.journal = Journal(
            core,
            submit_limit=shape.submit_limit,
            hold=shape.lease * 2 / 3 if self.durable else math.inf,
            backlog=shape.backlog,
            tend_at=world.clock + 3.0,
        )
        if store is not None:
            self.journal.renewed(store.renewed)
        self.batch: Batch | None = None
        self.performed = False
        """Whether the store did what the batch is for, though the server does not know."""
        self.paused = False
        self.held_back = False
        """Whether it did not hand out what it keeps, at some time since the last tick."""
        self.fair = shape.order is FunctionOrder.FAIR
        self.prefix = b"H:%s:%d." % (name.encode(), epoch)
        self.created = 0
        self.served: Counter[bytes] = Counter()
        self.serial = 0
        self.held = 0
        self.peers: list[ModelPeer] = []
        self.touched: list[ModelPeer] = []
        self.to_wake: list[tuple[bytes, list[ModelPeer]]] = []
        self.woken_in_vain: list[ModelPeer] = []
        """Those who were woken in this event, and sleep on."""
        self.jobs: dict[bytes, ModelJob] = {}
        self.uniques: dict[tuple[bytes, tuple[bytes, ...]], ModelJob] = {}
        self.queues: dict[bytes, dict[int, list[ModelJob]]] = {
            function: {HIGH: [], NORMAL: [], LOW: []} for function in self.functions
        }
        self.waiting: dict[bytes, int] = dict.fromkeys(self.functions, 0)
        self.count: Counter[bytes] = Counter()
        """Jobs of each function, of any state."""
        self.limits: dict[bytes, tuple[int, int, int]] = {}
        self.ended: deque[bytes] = deque(maxlen=5)
        self.over: dict[bytes, None] = {}
        """Every job that ended here."""
        self.refused: dict[bytes, None] = {}
        """Submissions that were answered ERROR."""
        self.disowned: dict[bytes, None] = {}
        """Jobs whose record was refused: it need not tell how they ended."""
        self.operator = ModelPeer(0, [])
        self.operator.peer = core.connected(0, "unix", self.operator)
        self.lost = False
        """Whether its lease is another's and it ends."""
        self.to_keep: ModelJob | None = None
        """The job that the packet now being sent is to keep."""
        self.asked = 0
        self.open: dict[int, tuple[float, Topic, Callable[[Reply], None]]] = {}
        """What the core has asked the store, and what follows the reply."""

    # The model: how jobs move.

    def wait(self, job: ModelJob) -> None:
        """It is kept, and waits for a worker or for its time."""
        if job.due > self.core.now:
            job.state = "delayed"
            return
        self.put(job)

    def put(self, job: ModelJob, *, first: bool = False) -> None:
        job.state = "ready"
        if job.function in self.limited:
            self.block(job, first=first)
            return
        queue = self.queues[job.function][job.priority]
        if first:
            queue.insert(0, job)
        else:
            queue.append(job)
        self.waiting[job.function] += 1
        self.must_wake(job.function)

    def sleepers(self, function: bytes) -> list[ModelPeer]:
        return [peer for peer in self.peers if peer.asleep and function in peer.abilities]

    def must_wake(self, function: bytes) -> None:
        """Of those who sleep on it now one at least has to hear of it by the end of the event."""
        sleepers = self.sleepers(function)
        if sleepers:
            self.to_wake.append((function, sleepers))

    def must_pass_on(self, peer: ModelPeer, taken: bytes | None = None) -> None:
        """One who was woken leaves, or takes something else: another has to wake in its place."""
        function = peer.peer.woken_for
        if function is not None and function.name != taken and self.waiting[function.name]:
            self.must_wake(function.name)

    def limit_key_of(self, job: ModelJob) -> bytes:
        if not self.limited[job.function].keyed:
            return b""
        return key_in(job.workload) if job.limit_key is None else job.limit_key

    def block(self, job: ModelJob, *, first: bool = False) -> None:
        """It is to wait for a permit, which the core says next, in its order."""
        job.blocked = self.limit_key_of(job)
        self.to_block[job.handle] = first

    def wait_for_permit(self, job: ModelJob, *, first: bool) -> None:
        assert job.blocked is not None
        queues = self.blocked.setdefault(job.function, {}).setdefault(job.blocked, {})
        queue = queues.setdefault(job.priority, [])
        if first:
            queue.insert(0, job)
        else:
            queue.append(job)

    def unblock(self, job: ModelJob) -> None:
        assert job.blocked is not None
        if self.to_block.pop(job.handle, None) is None:
            self.blocked[job.function][job.blocked][job.priority].remove(job)
        job.blocked = None

    def next_blocked(self, job: ModelJob) -> ModelJob:
        """Whose turn it is of a job's key."""
        assert job.blocked is not None
        queues = self.blocked[job.function][job.blocked]
        return queues[max(priority for priority, queue in queues.items() if queue)][0]

    def count_blocked(self, function: bytes) -> int:
        return sum(
            len(queue) for queues in self.blocked.get(function, {}).values() for queue in queues.values()
        )

    def look_at_permits(self) -> None:
        """What the core has shown to workers must be what is next."""
        moves, self.moves = self.moves, []
        for place, (what, handle, first) in enumerate(moves):
            job = self.jobs.get(handle)
            if handle not in self.seen or (
                what == "hold" and job is not None and handle not in self.to_block
            ):
                # The core was told of it first.
                self.moves = moves[place:]
                return
            if job is None or job.function not in self.limited:
                continue
            if what == "hold":
                promise(self.to_block.pop(handle) == first, f"{handle!r} waits in another place")
                self.wait_for_permit(job, first=first)
            elif what == "hide":
                self.queues[job.function][job.priority].remove(job)
                self.waiting[job.function] -= 1
                job.blocked = self.limit_key_of(job)
                self.wait_for_permit(job, first=True)
            else:
                promise(self.next_blocked(job) is job, f"{handle!r} has a permit, and it is not its turn")
                self.unblock(job)
                self.queues[job.function][job.priority].append(job)
                self.waiting[job.function] += 1
                self.must_wake(job.function)

    def learn(self, limits: Mapping[bytes, Limit]) -> None:
        """These functions are limited from now on."""
        self.look_at_permits()
        for function in self.functions:
            before, now = self.limited.get(function), limits.get(function)
            if before is not None and (now is None or now.keyed != before.keyed):
                del self.limited[function]
                keys = self.blocked.pop(function, {}).values()
                jobs = [job for queues in keys for queue in queues.values() for job in queue]
                for job in sorted(jobs, key=lambda job: job.serial):
                    job.blocked = None
                    self.put(job)
                before = None
            if now is None:
                continue
            self.limited[function] = now
            if before is None:
                for priority in (HIGH, NORMAL, LOW):
                    queue = self.queues[function][priority]
                    for job in queue:
                        self.block(job)
                    queue.clear()
                self.waiting[function] = 0

    def end_turn(self) -> None:
        """What has happened is over: the core asks for the permits that it needs."""
        self.core.limits.ask_again()
        self.core.limits.settle()
        self.hear()

    def take(self, job: ModelJob) -> None:
        self.look_at_permits()
        if job.blocked is not None:
            self.unblock(job)
            return
        self.queues[job.function][job.priority].remove(job)
        self.waiting[job.function] -= 1

    def hold(self, job: ModelJob) -> None:
        self.held += 1
        job.serial = self.held
        self.jobs[job.handle] = job
        self.seen.add(job.handle)
        self.count[job.function] += 1

    def remove(self, job: ModelJob) -> None:
        del self.jobs[job.handle]
        job.state = "gone"
        self.count[job.function] -= 1
        if job.key is not None:
            del self.uniques[job.function, job.key]
            job.key = None

    def end(self, job: ModelJob, outcome: Outcome, data: bytes = b"") -> None:
        if job.state == "ready":
            self.take(job)
        if job.slots is not None:
            # It ended before the journal could say that it is kept: there is nothing left to lose.
            self.answer(job, encode_response(P.JOB_CREATED, job.handle), None)
        self.remove(job)
        self.ended.append(job.handle)
        self.over[job.handle] = None
        if job.recorded:
            self.world.decided(self, job, outcome, data)

    def answer(self, job: ModelJob, packet: bytes, acknowledged: bytes | None) -> None:
        slots = job.slots
        job.slots = job.awaited = None
        for slot in slots or ():
            slot.packet = packet
            slot.acknowledged = acknowledged

    def drop_if_abandoned(self, job: ModelJob) -> None:
        if job.state in ("ready", "delayed") and not job.background and not job.listeners:
            self.end(job, Outcome.CANCELLED)

    def lose(self, job: ModelJob) -> None:
        """Its worker is gone."""
        limit = self.shape.retries if job.max_attempts is None else job.max_attempts
        if not job.background and not job.listeners:
            self.end(job, Outcome.CANCELLED)
        elif limit and job.attempts - job.interruptions >= limit:
            self.tell(job, P.WORK_FAIL)
            self.end(job, Outcome.DEAD)
        else:
            self.put_back(job)

    def put_back(self, job: ModelJob, due: float = 0.0, *, counts: bool = True) -> None:
        if counts:
            self.world.came_to_nothing(self, job)
        else:
            job.attempts -= 1
        is_awaited = bool(job.listeners) or job.slots is not None
        if due > self.core.now and job.recorded and job.background and not is_awaited:
            # Until then it lies at the door.
            self.remove(job)
            return
        job.worker = None
        job.numbers = (b"0", b"0")
        if due > self.core.now:
            job.due = due
            job.state = "delayed"
        else:
            self.put(job, first=self.fair)

    def held_by(self, peer: ModelPeer) -> list[ModelJob]:
        """In the order in which it got them."""
        return sorted((job for job in self.jobs.values() if job.worker is peer), key=lambda job: job.taken)

    def expect(self, peer: ModelPeer, packet: bytes) -> None:
        peer.line.append(packet)
        if not peer.touched:
            peer.touched = True
            self.touched.append(peer)

    def tell(self, job: ModelJob, kind: PacketType, *arguments: bytes) -> None:
        if job.listeners:
            packet = encode_response(kind, job.handle, *arguments)
            for listener in job.listeners:
                self.expect(listener, packet)

    # The model: what the journal tells.

    def committed(self, entry: Entry) -> None:
        self.world.committed(self, entry)
        kind = type(entry)
        if not (kind is JobKept or (kind is JobQueued and entry.background)):
            return
        job = self.jobs.get(entry.handle)
        if job is None or job.awaited is not entry:
            return
        self.answer(job, encode_response(P.JOB_CREATED, job.handle), job.handle)
        if job.state != "pending":
            return
        if kind is not JobQueued or not entry.unclaimed:
            self.wait(job)
        elif job.listeners:
            self.ask_store(Topic.TAKE, lambda reply: self.take_back(job, reply))
        else:
            self.remove(job)

    def take_back(self, job: ModelJob, reply: Reply) -> None:
        """It was laid at the door, and somebody waits for it here."""
        if job.state != "pending":
            return
        self.world.out_of_line(job.handle)
        if not isinstance(reply, StoredJob):
            # Another server has it: for those who wait here it runs here, and is not kept.
            job.background = job.recorded = False
            job.elsewhere = True
            self.disowned[job.handle] = None
        self.wait(job)
        self.drop_if_abandoned(job)

    def ask_store(self, topic: Topic, then: Callable[[Reply], None]) -> None:
        if len(self.open) >= window_module.MAX_QUESTIONS:
            then(self.guess(topic))
            return
        self.asked += 1
        self.open[self.asked] = self.core.clock, topic, then

    def guess(self, topic: Topic) -> Reply:
        """What is told without the store: a job that may be there is not gone."""
        asks = topic in (Topic.STATUS, Topic.UNIQUE)
        return Standing(running=False) if asks and self.core.window.away else None

    def replied(self, question: Question, reply: Reply) -> None:
        _, _, then = self.open.pop(question.number, (0.0, None, None))
        if isinstance(reply, StoredJob):
            # Somebody waits for it: it is taken in before others.
            self.world.out_of_line(reply.handle)
        if then is not None:
            then(reply)

    def fill(self, peer: ModelPeer, slot: Slot, packet: bytes) -> None:
        slot.packet = packet
        if not peer.touched:
            peer.touched = True
            self.touched.append(peer)

    def rejected(self, entry: JobQueued | JobKept, reason: str, *, perhaps_kept: bool) -> None:
        handle = entry.handle
        job = self.jobs.get(handle)
        if job is not None and perhaps_kept and job.state != "pending":
            # It runs here for others, and stays what its record may say.
            if job.slots is not None and not self.is_overtaken(job, entry):
                self.answer(job, encode_response(P.ERROR, b"QUEUE_ERROR", reason.encode()), None)
                job.slots = []
                job.awaited = entry
            return
        self.world.refused(self, entry, reason)
        self.disowned[handle] = None
        if job is None or self.is_overtaken(job, entry):
            return
        if isinstance(entry, JobQueued):
            job.recorded = False
        if job.slots is None:
            return
        self.answer(job, encode_response(P.ERROR, b"QUEUE_ERROR", reason.encode()), None)
        if job.state == "pending":
            self.refused[handle] = None
            self.remove(job)
        else:
            job.background = False
            self.drop_if_abandoned(job)

    def is_overtaken(self, job: ModelJob, entry: JobQueued | JobKept) -> bool:
        """Whether another entry is to keep it by now."""
        if job.awaited is None:
            return isinstance(entry, JobKept)
        if isinstance(entry, JobQueued) and isinstance(job.awaited, JobKept):
            return False  # which cannot be without it
        return job.awaited is not entry

    def joined(self, entry: JobQueued, handle: bytes) -> None:
        self.world.out_of_line(entry.handle)
        self.disowned[entry.handle] = None
        self.world.kept_late.add(entry.handle)
        job = self.jobs.get(entry.handle)
        if job is None or self.is_overtaken(job, entry):
            return
        job.recorded = False
        other = self.jobs.get(handle)
        is_pending = job.state == "pending"
        if not is_pending or (job.listeners and other is None):
            self.answer(job, encode_response(P.JOB_CREATED, job.handle if is_pending else handle), handle)
            job.background = False
            if is_pending:
                self.wait(job)
            else:
                self.drop_if_abandoned(job)
            return
        self.answer(job, encode_response(P.JOB_CREATED, handle), handle)
        key = job.key
        self.remove(job)
        if other is not None:
            other.listeners += job.listeners
            if other.key is None and key is not None:
                other.key = key
                self.uniques[other.function, key] = other

    def adopted(self, stored: StoredJob) -> None:
        handle = stored.handle
        self.world.adopted(self, stored)
        held = self.jobs.get(handle)
        if held is not None:
            # It was laid at the door, and somebody waits for it here.
            if held.state == "pending":
                self.wait(held)
            elif held.elsewhere:
                held.elsewhere = False
                held.background = held.recorded = True
                held.interruptions = stored.interruptions
                if held.worker is None:
                    held.attempts = stored.attempts
                self.disowned.pop(handle, None)
            return
        job = ModelJob(
            handle, stored.function, stored.unique, stored.workload, stored.priority, background=True
        )
        job.attempts = stored.attempts
        job.interruptions = stored.interruptions
        job.max_attempts = stored.max_attempts
        job.timeout = stored.timeout
        job.due = stored.run_after
        job.reducer = stored.reducer
        job.limit_key = stored.limit_key
        job.recorded = True
        key = key_of(stored.unique, stored.workload)
        if key is not None and (job.function, key) not in self.uniques:
            job.key = key
            self.uniques[job.function, key] = job
        self.hold(job)
        self.wait(job)

    # What connections do.

    def choose(self, things: Any) -> Any:
        return things[int(self.random() * len(things))]

    def connect(self) -> None:
        if len(self.peers) < self.shape.peers:
            functions = self.functions
            trade = functions if self.random() < 0.4 else [self.choose(functions)]
            self.world.connections += 1
            peer = ModelPeer(self.world.connections, trade)
            peer.peer = self.core.connected(peer.number, "127.0.0.1", peer)
            self.peers.append(peer)
            # Whose workers tell them apart: a record names the worker.
            self.say(peer, P.SET_CLIENT_ID, b"w%d" % peer.number)
            if self.shape.give_back:
                self.tell_attempts(peer)
            if self.random() < self.shape.waits:
                self.tell_waits(peer)

    def leave(self, peer: ModelPeer) -> None:
        self.peers.remove(peer)
        for job in list(self.jobs.values()):
            if peer in job.listeners:
                job.listeners = [listener for listener in job.listeners if listener is not peer]
                self.drop_if_abandoned(job)
        for job in reversed(self.held_by(peer)):
            self.world.broken.append((job.handle, job.attempts))
            self.lose(job)
        if self.world.trace is not None:
            self.world.note(f"{self.label} peer {peer.number} leaves")
        self.must_pass_on(peer)
        self.core.disconnected(peer.peer)
        self.hear()

    def submit(self, peer: ModelPeer) -> None:
        kind, priority, background = self.choose(self.shape.submissions)
        function = self.choose(self.functions)
        unique = self.choose(self.shape.uniques)
        workload = self.choose(self.shape.workloads)
        options: tuple[bytes, ...] = ()
        due = 0.0
        reducer = b""
        if kind is P.SUBMIT_JOB_EPOCH:
            due = float(int(self.core.now) + self.choose((0, 1, 2, 7, 20)))
            options = (b"%d" % due,)
        elif kind is P.SUBMIT_REDUCE_JOB or kind is P.SUBMIT_REDUCE_JOB_BACKGROUND:
            reducer = b"sum"
            options = (reducer, b"0")
        job = ModelJob(b"", function, unique, workload, priority, background)
        job.due = due if due > self.core.now else 0.0
        job.reducer = reducer
        slot = Slot(self.world.clock)
        peer.line.append(slot)
        known = self.core.functions.get(function)
        key = key_of(unique, workload)
        if (
            not background
            and key is not None
            and known is not None
            and known.away
            and (function, key) not in self.uniques
        ):
            # The store may have one of that unique.
            self.ask_store(Topic.TAKE, lambda reply: self.submitted(peer, job, slot))
        else:
            self.submitted(peer, job, slot)
        self.receive(peer, kind, function, unique, *options, workload)
        if self.to_keep is not None:
            kept, self.to_keep = self.to_keep, None
            for entry in self.core.entries:
                if entry.handle == kept.handle and isinstance(entry, JobQueued | JobKept):
                    kept.awaited = entry
        self.hear()

    def submitted(self, peer: ModelPeer, new: ModelJob, slot: Slot) -> None:
        """Of all answers to a submission one goes into its slot."""
        if peer.peer not in self.core.peers:
            return
        function, background, priority = new.function, new.background, new.priority
        key = key_of(new.unique, new.workload)
        job = self.uniques.get((function, key)) if key is not None else None
        if job is None and function in self.limits:
            high, normal, low = self.limits[function]
            limit = high if priority == HIGH else low if priority == LOW else normal
            if limit and self.count[function] + self.core.functions[function].away >= limit:
                self.fill(peer, slot, encode_response(P.ERROR, b"QUEUE_ERROR", b"Job queue is full"))
                return
        if job is None:
            job = new
            self.created += 1
            job.handle = self.prefix + b"%d" % self.created
            job.recorded = self.durable if background else self.record_foreground
            if key is not None:
                job.key = key
                self.uniques[function, key] = job
            self.hold(job)
            if background and self.durable:
                job.state = "pending"
                job.slots = []
                self.to_keep = job
                self.world.submitted(self, job)
            else:
                self.wait(job)
        elif background and not job.background and not job.elsewhere:
            job.background = True
            if self.durable:
                job.recorded = True
                job.slots = []
                self.to_keep = job
        if job.slots is not None and (background or job.state == "pending"):
            job.slots.append(slot)
        else:
            if background and self.durable:
                slot.acknowledged = job.handle
            self.fill(peer, slot, encode_response(P.JOB_CREATED, job.handle))
        if not background:
            job.listeners.append(peer)

    def offer(self, peer: ModelPeer) -> None:
        # Offered while asleep it does not wake for what waits already, so nobody does that here.
        if peer.asleep or peer.line:
            return
        function = self.choose(peer.trade)
        if function not in peer.abilities:
            peer.abilities.append(function)
        peer.limits.pop(function, None)
        if self.random() < self.shape.time_limits:
            peer.limits[function] = self.choose((1.0, 3.0))
            self.say(peer, P.CAN_DO_TIMEOUT, function, b"%d" % (peer.limits[function] * 1000))
        else:
            self.say(peer, P.CAN_DO, function)

    def withdraw(self, peer: ModelPeer) -> None:
        withdrawn = [self.choose(self.functions)] if self.random() < 0.8 else self.functions
        peer.abilities = [function for function in peer.abilities if function not in withdrawn]
        for function in withdrawn:
            peer.limits.pop(function, None)
        for job in reversed(self.held_by(peer)):
            if job.function in withdrawn:
                self.lose(job)
        woken_for = peer.peer.woken_for
        if woken_for is not None and woken_for.name in withdrawn and woken_for.name in peer.peer.abilities:
            self.must_pass_on(peer)
        if withdrawn is self.functions:
            self.say(peer, P.RESET_ABILITIES)
        else:
            self.say(peer, P.CANT_DO, withdrawn[0])

    def candidates(self, peer: ModelPeer) -> list[ModelJob]:
        """Of these is the peer's next job."""
        self.look_at_permits()
        waiting = self.waiting
        able = [function for function in peer.abilities if waiting[function]]
        if not able:
            return []
        if self.core.clock >= self.core.hand_out_until:
            self.held_back = True
            for function in able:
                if function in self.limited:
                    continue
                for queue in self.queues[function].values():
                    for job in queue:
                        if not job.background:
                            return [job]
            return []
        able = [function for function in able if not self.must_wait(function)]
        if not self.fair:
            return [self.front(able[-1])] if able else []
        fronts = [self.front(function) for function in able]
        if len(fronts) > 1:
            # Most urgent first, then from the function not served longest.
            best = max(job.priority for job in fronts)
            fronts = [job for job in fronts if job.priority == best]
            served = self.served
            longest = min(served[job.function] for job in fronts)
            fronts = [job for job in fronts if served[job.function] == longest]
        return fronts

    def must_wait(self, function: bytes) -> bool:
        """Whether more urgent jobs are about to be fetched from the door, of which the core knows."""
        core = self.core
        limiter = core.functions[function].limiter
        left = core.functions[function].left
        best = self.front(function).priority
        if limiter is not None and limiter.crowded:
            # Up to there they are to stay.
            best = max(best, limiter.crowded_from())
        if (
            not any(priority > best for priority in left)
            or core.clock - core.window.claimed_at >= window_module.STORE_AWAY
        ):
            return False
        self.held_back = True
        return True

    def front(self, function: bytes) -> ModelJob:
        queues = self.queues[function]
        return (queues[HIGH] or queues[NORMAL] or queues[LOW])[0]

    def grab(self, peer: ModelPeer) -> None:
        # What waits in a line is not heard: only who hears at once can tell the model what it got.
        if peer.line:
            return
        peer.asleep = False
        woken_for = peer.peer.woken_for
        asleep = [] if woken_for is None else self.sleepers(woken_for.name)
        candidates = self.candidates(peer)
        kind = P.GRAB_JOB_UNIQ if peer.waits else self.choose((P.GRAB_JOB, P.GRAB_JOB_UNIQ, P.GRAB_JOB_ALL))
        self.receive(peer, kind)
        core_peer = peer.peer
        heard, core_peer.output = core_peer.output, []
        if self.world.trace is not None:
            self.world.note_heard(self, peer, heard)
        heard = [packet for packet in heard if not self.is_noop(peer, packet)]
        if not candidates:
            promise(heard == [NO_JOB], f"{heard} where there was no job to hand out")
            taken = None
            if peer.waits:
                peer.asleep = True
                peer.naps += 1
        else:
            taken = self.assigned(peer, kind, candidates, heard).function
        if woken_for is not None and woken_for.name != taken and asleep and self.waiting[woken_for.name]:
            self.to_wake.append((woken_for.name, asleep))
        self.hear()

    def serve_woken(self) -> None:
        """Those who were woken and wait get the jobs whose turn it is, or sleep on."""
        core = self.core
        while core.woken:
            core_peer = core.woken[0]
            peer = core_peer.shell
            is_here = core_peer in core.peers and core_peer.woken_for is not None
            candidates = self.candidates(peer) if is_here and core_peer.line is None else []
            woken_for = core_peer.woken_for
            others = [] if woken_for is None else [p for p in self.sleepers(woken_for.name) if p is not peer]
            heard, core_peer.output = core_peer.output, []
            core.serve_next_woken()
            said, core_peer.output = core_peer.output, heard
            if not is_here or core_peer.line is not None:
                # It is gone, or hears NOOP in its turn.
                core_peer.output += said
                continue
            if self.world.trace is not None:
                self.world.note_heard(self, peer, said)
            promise(peer.asleep, "a job for one who did not sleep")
            if candidates:
                peer.naps -= 1
                peer.asleep = False
                taken = self.assigned(peer, P.GRAB_JOB_UNIQ, candidates, said).function
                assert woken_for is not None, "it is here"
                if woken_for.name != taken and others and self.waiting[woken_for.name]:
                    self.to_wake.append((woken_for.name, others))
            else:
                promise(not said, f"{said} where there was no job to hand out")
                self.woken_in_vain.append(peer)

    def assigned(
        self, peer: ModelPeer, kind: PacketType, candidates: list[ModelJob], heard: list[bytes]
    ) -> ModelJob:
        promise(heard and heard[-1] != NO_JOB, f"no job, though {candidates[0].handle!r} is to be handed out")
        handle = heard[-1][HEADER:].partition(b"\0")[0]
        job = self.jobs.get(handle)
        promise(job is not None, f"{handle!r} was handed out, which is not there")
        assert job is not None
        promise(job.worker is None, f"{handle!r} has a worker already")
        turn = [candidate.handle for candidate in candidates]
        promise(job in candidates, f"{handle!r} was handed out, and it was the turn of {turn}")
        self.take(job)
        self.serial += 1
        function = job.function
        self.served[function] = job.taken = self.serial
        if self.shape.order is FunctionOrder.ROUND_ROBIN:
            peer.abilities.remove(function)
            peer.abilities.insert(0, function)
        job.state = "running"
        job.resumed = False
        job.worker = peer
        job.attempts += 1
        told = []
        if peer.tells_attempts and (job.attempts > 1 or job.max_attempts is not None):
            told.append(
                encode_response(P.OPTION_RES, b"attempt %d %d" % (job.attempts, job.max_attempts or 0))
            )
        if kind is P.GRAB_JOB:
            packet = encode_response(P.JOB_ASSIGN, handle, function, job.workload)
        elif kind is P.GRAB_JOB_ALL and job.reducer:
            packet = encode_response(
                P.JOB_ASSIGN_ALL, handle, function, job.unique, job.reducer, job.workload
            )
        else:
            packet = encode_response(P.JOB_ASSIGN_UNIQ, handle, function, job.unique, job.workload)
        promise(heard == [*told, packet], f"{heard} instead of {[*told, packet]}")
        self.limit_time(job, peer)
        self.world.handed_out(self, job)
        return job

    def sleep(self, peer: ModelPeer) -> None:
        if peer.line:
            return
        if self.candidates(peer):
            peer.naps += 1
            peer.asleep = True
            self.say(peer, P.PRE_SLEEP)
            promise(not peer.asleep, "a worker sleeps while there is a job for it")
            return
        peer.asleep = True
        peer.naps += 1
        self.say(peer, P.PRE_SLEEP)

    def work(self, peer: ModelPeer) -> None:
        held = [job for job in self.jobs.values() if job.worker is peer]
        if held and self.random() < 0.95:
            self.report(peer, self.choose(held), self.random())
            return
        if self.random() > 0.1:
            return
        # Of somebody else, or of the past.
        handle = self.some_handle()
        if handle in self.jobs and self.jobs[handle].worker is peer:
            return
        kind = self.choose((P.WORK_COMPLETE, P.WORK_FAIL, P.WORK_DATA, P.WORK_STATUS, P.WORK_EXCEPTION))
        arguments: tuple[bytes, ...] = (b"late",)
        reason = b"Job given in work result not found"
        if kind is P.WORK_FAIL:
            arguments = ()
        elif kind is P.WORK_STATUS:
            arguments = (b"1", b"2")
        elif kind is P.WORK_DATA:
            reason = b"Job does not exist on server"
        elif kind is P.WORK_EXCEPTION:
            reason = b"An exception was received for a job that does not exist"
        if handle not in peer.cancelled and not (kind is P.WORK_FAIL and peer.excused == handle):
            self.expect(peer, encode_response(P.ERROR, b"JOB_NOT_FOUND", reason))
        self.say(peer, kind, handle, *arguments)

    def some_handle(self) -> bytes:
        luck = self.random()
        if luck < 0.6 and self.jobs:
            return self.choose(list(self.jobs))
        if luck < 0.9 and self.ended:
            return self.choose(self.ended)
        return NOBODY

    def report(self, peer: ModelPeer, job: ModelJob, luck: float) -> None:
        handle = job.handle
        if luck < 0.1:
            job.numbers = (b"%d" % int(self.random() * 9), b"10")
            self.tell(job, P.WORK_STATUS, *job.numbers)
            self.say(peer, P.WORK_STATUS, handle, *job.numbers)
        elif luck < 0.2:
            kind = P.WORK_DATA if luck < 0.15 else P.WORK_WARNING
            self.tell(job, kind, b"part")
            self.say(peer, kind, handle, b"part")
        elif luck < 0.75:
            data = self.world.some_result()
            self.tell(job, P.WORK_COMPLETE, data)
            self.end(job, Outcome.SUCCESSFUL, data)
            self.say(peer, P.WORK_COMPLETE, handle, data)
        elif luck < 0.82:
            self.tell(job, P.WORK_FAIL)
            self.end(job, Outcome.FAILED)
            self.say(peer, P.WORK_FAIL, handle)
        else:
            data = self.world.some_result()
            if peer.tells_attempts and luck < 0.96:
                delay = self.choose((0, 0, 1500, 4000))
                self.say(peer, P.OPTION_REQ, b"retry %d %s" % (delay, handle))
                tried = job.attempts - job.interruptions
                if job.background and (job.max_attempts is None or tried < job.max_attempts):
                    peer.excused = handle
                    self.put_back(job, self.core.now + delay / 1000)
                    self.say(peer, P.WORK_EXCEPTION, handle, data)
                    return
            for listener in job.listeners:
                if listener.exceptions:
                    self.expect(listener, encode_response(P.WORK_EXCEPTION, handle, data))
                else:
                    self.expect(listener, encode_response(P.WORK_FAIL, handle))
            self.end(job, Outcome.FAILED, data)
            peer.excused = handle
            self.say(peer, P.WORK_EXCEPTION, handle, data)

    def give_back(self, peer: ModelPeer) -> None:
        """A worker puts back on purpose what it has, or one of it: that is no attempt."""
        held = self.held_by(peer)
        if not held or not peer.tells_attempts:
            return
        handle = b""
        if self.random() < 0.7:
            held = [self.choose(held)]
            handle = held[0].handle
        elif peer.waits:
            peer.waits = peer.asleep = False
            self.must_pass_on(peer)
        for job in reversed(held):
            if not job.background and not job.listeners:
                self.end(job, Outcome.CANCELLED)
            else:
                self.put_back(job, counts=False)
        self.say(peer, P.OPTION_REQ, RETURN + handle)

    def resume(self, peer: ModelPeer) -> None:
        """A worker whose connection broke says that it has the job still."""
        broken = self.world.broken
        if not broken or not peer.tells_attempts:
            return
        # Workers come back soon, and some to several servers.
        place = -1 - int(self.random() * min(len(broken), 3))
        handle, attempt = broken[place] if self.random() < 0.7 else broken.pop(place)
        job = self.jobs.get(handle)
        if (
            job is not None
            and attempt - job.attempts in (0, 1)
            and job.state == "ready"
            and job.function in peer.abilities
            and self.core.clock < self.core.hand_out_until
        ):
            self.take(job)
            self.serial += 1
            job.taken = self.serial
            job.state = "running"
            job.resumed = True
            job.worker = peer
            job.attempts = attempt
            self.limit_time(job, peer)
            self.world.handed_out(self, job, resumed=True)
        self.say(peer, P.OPTION_REQ, RESUME + b"%d " % attempt + handle)

    def limit_time(self, job: ModelJob, peer: ModelPeer) -> None:
        own = math.inf if job.timeout is None else job.timeout
        job.up = self.core.clock + min(own, peer.limits.get(job.function, math.inf))

    def ask(self, peer: ModelPeer) -> None:
        luck = self.random()
        if luck < 0.35:
            data = b"%d" % (luck * 1000)
            self.expect(peer, encode_response(P.ECHO_RES, data))
            self.say(peer, P.ECHO_REQ, data)
        elif luck < 0.45:
            self.tell_attempts(peer)
        elif luck < 0.5:
            self.tell_waits(peer)
        elif luck < 0.55:
            peer.exceptions = True
            self.expect(peer, encode_response(P.OPTION_RES, b"exceptions"))
            self.say(peer, P.OPTION_REQ, b"exceptions")
        elif luck < 0.65:
            self.ask_by_unique(peer)
        else:
            handle = self.some_handle()
            job = self.jobs.get(handle)
            if job is None and self.durable:
                slot = Slot(self.world.clock)
                peer.line.append(slot)
                self.ask_store(
                    Topic.STATUS,
                    lambda reply: self.fill(
                        peer, slot, encode_response(P.STATUS_RES, handle, *numbers_of(reply))
                    ),
                )
            else:
                numbers: tuple[bytes, ...] = (b"0", b"0", b"0", b"0")
                if job is not None and job.state != "pending":
                    numbers = (b"1", b"1" if job.worker else b"0", *job.numbers)
                self.expect(peer, encode_response(P.STATUS_RES, handle, *numbers))
            self.say(peer, P.GET_STATUS, handle)

    def tell_attempts(self, peer: ModelPeer) -> None:
        """Be one of our own workers, who speak of attempts."""
        peer.tells_attempts = True
        self.expect(peer, encode_response(P.OPTION_RES, ATTEMPTS))
        self.say(peer, P.OPTION_REQ, ATTEMPTS)

    def tell_waits(self, peer: ModelPeer) -> None:
        """Take jobs without asking again, once told that there is none."""
        peer.waits = True
        self.expect(peer, encode_response(P.OPTION_RES, WAITS))
        self.say(peer, P.OPTION_REQ, WAITS)

    def ask_by_unique(self, peer: ModelPeer) -> None:
        unique = self.choose(self.shape.uniques)
        found = [job for job in self.jobs.values() if job.key == (unique,)]
        known = [job for job in found if job.state != "pending"]
        if not found and self.durable and unique not in (b"", b"-"):
            slot = Slot(self.world.clock)
            peer.line.append(slot)
            self.ask_store(
                Topic.UNIQUE,
                lambda reply: self.fill(
                    peer, slot, encode_response(P.STATUS_RES_UNIQUE, unique, *numbers_of(reply), b"0")
                ),
            )
        else:
            numbers = [b"0"] * 5
            if known:
                job = max(known, key=lambda job: job.serial)
                running = b"1" if job.worker else b"0"
                numbers = [b"1", running, *job.numbers, b"%d" % len(job.listeners)]
            self.expect(peer, encode_response(P.STATUS_RES_UNIQUE, unique, *numbers))
        self.say(peer, P.GET_STATUS_UNIQUE, unique)

    # What operators do.

    def command(self, line: bytes) -> bytes:
        answer = text.answer(self.core, self.operator.peer, line)
        if self.world.trace is not None:
            self.world.note(f"{self.label} operator: {line.decode()} -> {answer!r}")
        assert answer is not None
        return answer

    def cancel(self) -> None:
        handle = self.some_handle()
        job = self.jobs.get(handle)
        operator = self.operator
        slot = Slot(self.world.clock)
        operator.line.append(slot)

        def answered(reply: Reply) -> None:
            self.fill(operator, slot, b"OK\r\n" if reply else b"ERR UNKNOWN_JOB\r\n")

        if job is not None:
            if job.worker is not None:
                cancelled = job.worker.cancelled
                cancelled[handle] = None
                if len(cancelled) > self.shape.cancelled_limit:
                    del cancelled[next(iter(cancelled))]
            self.tell(job, P.WORK_FAIL)
            self.end(job, Outcome.CANCELLED)
            answered(True)
        elif self.durable:
            self.world.cancelled_at_door[handle] = None
            self.world.out_of_line(handle)
            self.ask_store(Topic.CANCEL, answered)
        else:
            answered(None)
        promise(self.command(b"cancel job " + handle) == b"", "an answer that does not keep its place")
        self.hear()

    def limit(self) -> None:
        function = self.choose(self.functions)
        if function in self.core.functions:
            limits = tuple(self.choose((0, 1, 2, 5)) for _ in range(3))
            self.limits.pop(function, None)
            if any(limits):
                self.limits[function] = limits  # three of them
            self.command(b"maxqueue %s %d %d %d" % (function, *limits))

    # Time and the store.

    def look_at_clock(self) -> None:
        core = self.core
        core.clock = self.world.clock
        core.now = self.world.wall(self.name)

    def tick(self) -> None:
        core = self.core
        if self.durable:
            self.turn()
        now = core.now
        jobs = sorted(
            (job for job in self.jobs.values() if job.state == "delayed" and job.due <= now),
            key=lambda job: (job.due, job.serial),
        )
        for job in jobs:
            self.put(job)
        running = [job for job in self.jobs.values() if job.worker is not None and job.up <= core.clock]
        for job in sorted(running, key=lambda job: job.taken):
            self.lose(job)
        asleep = [peer for peer in self.peers if peer.asleep]
        while self.open:
            number, (at, topic, then) = next(iter(self.open.items()))
            if core.clock - at < window_module.PATIENCE:
                break
            del self.open[number]
            then(self.guess(topic))
        if self.world.trace is not None:
            self.world.note(f"{self.label} ticks")
        core.tick()
        self.journal.refuse_overdue()
        self.hear()
        held_back = core.clock >= core.hand_out_until
        for function in self.functions:
            if not self.waiting[function]:
                continue
            sleepers = [peer for peer in asleep if function in peer.abilities]
            if sleepers:
                # Who has a line may have been woken without hearing of it yet.
                woken = [peer for peer in sleepers if not peer.asleep or peer.line]
                promise(woken or self.held_back, f"the tick woke nobody for {function!r}")
            if not (held_back or self.held_back):
                self.check_somebody_is_awake(function)
        self.held_back = held_back
        self.check_waits()

    def check_somebody_is_awake(self, function: bytes) -> None:
        if self.waiting[function] and not self.held_back:
            able = [peer for peer in self.peers if function in peer.abilities]
            promise(
                not able or any(not peer.asleep or peer.line for peer in able),
                f"all sleep while {function!r} has jobs",
            )

    def check_waits(self) -> None:
        """While the writer is at work nobody waits longer for a JOB_CREATED than a submission may."""
        if self.batch is None or self.batch.tend:
            return
        oldest = self.core.clock - self.shape.submit_limit - 1e-6
        for job in self.jobs.values():
            if job.slots and job.slots[0].at < oldest:
                raise Broken(f"the client of {job.handle!r} waits longer than it may")

    def turn(self) -> None:
        """The end of the event loop's turn: what happened goes to the journal."""
        core = self.core
        self.end_turn()
        if core.entries:
            entries, core.entries = core.entries, []
            self.journal.append(entries, core.clock, urgent=core.urgent, many_end=core.many_end)
            core.urgent = core.many_end = False
            if core.dirty:
                self.hear()
        if core.questions:
            self.journal.ask(core.questions)
            core.questions = []
        if core.claim_wanted:
            core.claim_wanted = False
            self.journal.claim_soon()

    def write(self) -> bool:
        """One third of a trip to the store; whether there was anything to do."""
        if self.batch is None:
            self.turn()
            self.batch = self.journal.next_batch(self.core.clock)
            if self.batch is None:
                return False
            if self.world.trace is not None:
                self.world.note_batch(self, self.batch)
        elif not self.performed:
            if not self.world.hanging:
                self.perform()
        else:
            self.done()
        return True

    def perform(self) -> None:
        assert self.batch is not None
        assert self.store is not None
        self.world.performing(self, self.batch)
        self.batch.perform(self.store)
        self.performed = True
        self.world.performed(self, self.batch)

    def done(self) -> None:
        batch, self.batch, self.performed = self.batch, None, False
        assert batch is not None
        if self.world.trace is not None:
            self.world.note(f"{self.label} hears of its batch: {batch.error or 'written'}")
        self.journal.done(batch, self.core.clock)
        self.hear()
        if self.journal.lease_lost is not None:
            self.lost = True

    # What is heard.

    def receive(self, peer: ModelPeer, kind: PacketType, *arguments: bytes) -> None:
        if self.world.trace is not None:
            self.world.note_said(self, peer, kind, arguments)
        # As the reader gives it: a packet without arguments has one, which is empty.
        self.core.receive(peer.peer, (kind, list(arguments) or [b""]))

    def say(self, peer: ModelPeer, kind: PacketType, *arguments: bytes) -> None:
        self.receive(peer, kind, *arguments)
        self.hear()

    def is_noop(self, peer: ModelPeer, packet: bytes) -> bool:
        if packet != NOOP:
            return False
        promise(peer.naps > 0, "a NOOP that nobody slept for")
        peer.naps -= 1
        peer.asleep = False
        return True

    def hear(self) -> None:
        """Compare what was sent with what was expected, of all whom it may concern."""
        core = self.core
        if self.moves:
            self.look_at_permits()
        if core.woken:
            self.serve_woken()
        if core.dirty or core.patient:
            dirty, core.dirty, core.patient = core.dirty + core.patient, [], []
            for each in dirty:
                if each.output and each.shell is not None:
                    self.compare(each.shell)
        if self.touched:
            touched, self.touched = self.touched, []
            for peer in touched:
                peer.touched = False
                self.compare(peer)
        if self.to_wake:
            to_wake, self.to_wake = self.to_wake, []
            for function, sleepers in to_wake:
                # Who has a line may have been woken without hearing of it yet.
                woken = any(not peer.asleep or peer.line or peer not in self.peers for peer in sleepers)
                in_vain = any(peer in self.woken_in_vain for peer in sleepers)
                promise(woken or in_vain, f"nobody was woken for {function!r}")
        self.woken_in_vain = []

    def compare(self, peer: ModelPeer) -> None:
        core_peer = peer.peer
        heard = core_peer.output
        line = peer.line
        if heard:
            core_peer.output = []
            if self.world.trace is not None:
                self.world.note_heard(self, peer, heard)
        for packet in heard:
            if packet == NOOP and self.is_noop(peer, packet):
                continue
            head: Slot | bytes | None = line[0] if line else None
            slot = None
            if type(head) is Slot:
                slot = head
                head = slot.packet
            if packet != head:
                raise Broken(f"peer {peer.number} heard {packet!r} instead of {head!r}")
            line.popleft()
            if slot is not None and slot.acknowledged is not None:
                self.world.acknowledged(self, slot.acknowledged)
        if line:
            head = line[0]
            if type(head) is Slot:
                head = head.packet
            if head is not None and core_peer in self.core.peers:
                raise Broken(f"peer {peer.number} did not hear {head!r}")

    # The whole.

    def check_permits(self) -> None:
        """Whoever of a limited function runs or may be taken has a permit, and nobody else."""
        core = self.core
        for limiter in core.limits.limiters.values():
            for gate in limiter.gates.values():
                for job in gate.held:
                    promise(job.gate is gate and job.handle in core.jobs, "a permit is of no job")
        for job in core.jobs.values():
            runs = job.state is JobState.RUNNING
            if runs and job.function.limiter is not None:
                promise(job.gate is not None and job in job.gate.held, f"{job.handle!r} runs without permit")
            if job.function.limiter is None:
                promise(job.gate is None, f"{job.handle!r} has a permit and needs none")

    def check_state(self) -> None:
        """The core's books agree with each other and with the model."""
        core = self.core
        self.look_at_permits()
        promise(not self.to_block, f"{self.to_block} do not wait for permits")
        self.check_permits()
        promise(core.jobs.keys() == self.jobs.keys(), "the core's jobs are not the model's")
        ready = {function.name for function in core.ready}
        waiting = {name for name, count in self.waiting.items() if count}
        promise(ready == waiting, f"{self.label}: ready are {ready}, not {waiting}")
        states = Counter((job.function, job.state) for job in self.jobs.values())
        lines = []
        for function in core.functions.values():
            name = function.name
            lying = {
                priority: sum(job.state is JobState.READY for job in level)
                for priority, level in function.levels.items()
            }
            promise(lying == function.counts, f"{name!r} has {lying}, not {function.counts}")
            promise(
                sum(lying.values()) == function.waiting, f"{name!r} does not have the jobs that it counts"
            )
            counted = (function.waiting, function.running, function.delayed, function.held)
            there = (
                self.waiting[name],
                states[name, "running"],
                states[name, "delayed"],
                self.count[name],
            )
            promise(counted == there, f"{name!r} counts {counted} and has {there}")
            held = [job for job in core.jobs.values() if job.function is function]
            weight = sum(job.weight for job in held if job.state is not JobState.RUNNING and not job.spilled)
            promise(function.weight == weight, f"{name!r} weighs {weight}, not {function.weight}")
            pending = [job for job in held if job.state is JobState.PENDING]
            promise(
                function.arriving == sum(not job.spilled for job in pending),
                f"{name!r} does not have the {function.arriving} jobs that are to come",
            )
            spilling = Counter(job.priority for job in pending if job.spilled)
            promise(function.spilling == spilling, f"{name!r} does not have {function.spilling} on their way")
            for key, job in function.uniques.items():
                promise(job.key == key and job.handle in core.jobs, f"the unique {key!r} is of no job")
            promise(set(function.sleepers) <= set(function.workers), "one sleeps who is no worker")
            workers = sum(name in peer.abilities for peer in self.peers)
            blocked = self.count_blocked(name)
            promise(function.blocked == blocked, f"{name!r} counts {function.blocked} without permits")
            total = sum(there[:3]) + blocked + function.away
            lines.append(b"%s\t%d\t%d\t%d\n" % (name, total, there[1], workers))
        status = text.answer(core, self.operator.peer, b"status")
        promise(status == b"".join(lines) + b".\n", f"status tells {status!r}")
        running: dict[ModelPeer, set[bytes]] = {}
        listens: dict[ModelPeer, set[bytes]] = {}
        for each in self.jobs.values():
            if each.worker is not None:
                running.setdefault(each.worker, set()).add(each.handle)
            for listener in each.listeners:
                listens.setdefault(listener, set()).add(each.handle)
        for peer in self.peers:
            core_peer = peer.peer
            promise(not core_peer.output, "the shell does not know that there is output")
            promise(set(core_peer.running) == running.get(peer, set()), "a worker runs something else")
            heard = {job.handle for job in core_peer.listens}
            promise(heard == listens.get(peer, set()), "a client listens to something else")


Action = Callable[[], None]
__all__ = ["Action", "Broken", "ModelJob", "ModelPeer", "Server", "StoreError", "promise"]
