"""
Random worlds against a model of the promises.

Clients, workers, commits, refusals, an unreachable store, ticks and crashes
come in an order that a seed decides. A small model, written without looking
for speed, says what each connection must hear; what it hears must be that,
no more and no less, after every step. A failure names its seed, which
``GEARMAN_SIMULATION_SEED`` plays again; ``GEARMAN_SIMULATION_STEPS`` makes
the runs longer.
"""

from __future__ import annotations

import math
import os
import random
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest

from django_gearman.exceptions import StoreError
from django_gearman.protocol.packets import ATTEMPTS, PacketType
from django_gearman.server import core, text
from django_gearman.server.core import HIGH, LOW, NORMAL, JobServer, ServerOptions
from django_gearman.server.entries import Entry, JobKept, JobQueued, Joined, Outcome, StoredJob
from django_gearman.server.jobs import JobState
from django_gearman.server.journal import Batch, Journal, MemoryStore

from .harness import Caller, Heard, Wire

P = PacketType
SUBMISSIONS = {
    P.SUBMIT_JOB: (NORMAL, False),
    P.SUBMIT_JOB_HIGH: (HIGH, False),
    P.SUBMIT_JOB_LOW: (LOW, False),
    P.SUBMIT_JOB_BG: (NORMAL, True),
    P.SUBMIT_JOB_HIGH_BG: (HIGH, True),
    P.SUBMIT_JOB_LOW_BG: (LOW, True),
}
FUNCTIONS = [b"a", b"b", b"c", b"d"]
UNIQUES = [b"", b"-", b"1", b"2", b"3"]
WORKLOADS = [b"", b"x", b"y", b"bad"]
RETRIES = 3
STEPS = int(os.environ.get("GEARMAN_SIMULATION_STEPS", "8000"))
SEED = os.environ.get("GEARMAN_SIMULATION_SEED")
SEEDS = [int(SEED)] if SEED else [*range(1, 7), None]
"""None stands for a new one each time."""


class FlakyStore(MemoryStore):
    """Now and then it cannot be reached, or writes and cannot say so; never does it keep ``bad``."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__()
        self.dice = dice
        self.trouble = 0.0

    def write(self, entries: Sequence[Entry], *, again: bool) -> dict[int, str | Joined]:
        if self.dice.random() < self.trouble:
            raise StoreError("nothing was written")
        refused: dict[int, str | Joined] = {}
        kept: list[Entry] = []
        places: list[int] = []
        for index, entry in enumerate(entries):
            if isinstance(entry, JobQueued) and entry.workload == b"bad" and entry.function == b"d":
                refused[index] = "bad"
            elif isinstance(entry, JobKept) and not self._knows(entry.handle, kept):
                refused[index] = "unknown"
            else:
                kept.append(entry)
                places.append(index)
        joined = super().write(kept, again=again)
        refused |= {places[index]: other for index, other in joined.items()}
        if self.dice.random() < self.trouble:
            raise StoreError("it was written, but who knows")
        return refused

    def _knows(self, handle: bytes, entries: list[Entry]) -> bool:
        known = (self.jobs, self._foreground, self.finished)
        return any(handle in jobs for jobs in known) or any(entry.handle == handle for entry in entries)


class Watched(JobServer):
    """Tells the model, before it acts, what the journal tells it."""

    world: World

    def committed(self, entries: Iterable[Entry]) -> None:
        entries = list(entries)
        for entry in entries:
            self.world.model_committed(entry)
        super().committed(entries)

    def rejected(self, entry: JobQueued | JobKept, reason: str) -> None:
        self.world.model_rejected(entry, reason)
        super().rejected(entry, reason)

    def joined(self, entry: JobQueued, handle: bytes) -> None:
        self.world.model_joined(entry, handle)
        super().joined(entry, handle)

    def adopt(self, jobs: Iterable[StoredJob]) -> None:
        jobs = list(jobs)
        for job in jobs:
            self.world.model_adopted(job)
        super().adopt(jobs)


@dataclass(eq=False)
class Slot:
    """A place in a connection's line of replies; empty until its content is known."""

    packet: Heard | None = None


@dataclass(eq=False)
class ModelPeer:
    caller: Caller
    trade: list[bytes]
    """What it may offer."""
    abilities: list[bytes] = field(default_factory=list)
    line: deque[Slot] = field(default_factory=deque)
    asleep: bool = False
    naps: int = 0
    """PRE_SLEEPs that were not yet answered by a NOOP: each may be once."""
    woken_for: bytes | None = None
    """Whose job it was woken for and did not look for yet; known only of who offers one function."""
    exceptions: bool = False
    excused: bytes | None = None
    cancelled: set[bytes] = field(default_factory=set)
    """Jobs that were cancelled while it ran them."""
    limits: dict[bytes, float] = field(default_factory=dict)
    """Seconds that it may take for a job of a function."""
    tells_attempts: bool = False

    def expects(self, *packet: bytes | PacketType) -> None:
        self.line.append(Slot(packet))


@dataclass(eq=False)
class ModelJob:
    handle: bytes
    function: bytes
    unique: bytes
    workload: bytes
    priority: int
    background: bool
    key: tuple[bytes, ...] | None = None
    state: str = "ready"
    worker: ModelPeer | None = None
    listeners: list[ModelPeer] = field(default_factory=list)
    slots: list[Slot] | None = None
    recorded: bool = False
    attempts: int = 0
    max_attempts: int | None = None
    due: float = 0.0
    timeout: int | None = None
    up: float = math.inf
    """When the time of its worker is up."""
    serial: int = 0
    taken: int = 0
    """Serial of its hand-out."""
    numbers: tuple[bytes, bytes] = (b"0", b"0")

    def tell(self, kind: PacketType, *arguments: bytes) -> None:
        for listener in self.listeners:
            listener.expects(kind, self.handle, *arguments)


class World:
    """Everything random, and the model of what must follow."""

    def __init__(self, seed: int, *, durable: bool, record_foreground: bool) -> None:
        self.dice = random.Random(seed)
        self.durable = durable
        self.record_foreground = durable and record_foreground
        self.store = FlakyStore(self.dice)
        self.epoch = 0
        self.rows = 0
        self.now = 1000.0
        self.sleepy = False
        """Whether little happens just now, so that most workers sleep."""
        self.acknowledged: set[bytes] = set()
        self.outcomes: dict[bytes, Outcome] = {}
        self.disowned: set[bytes] = set()
        """Jobs whose record was refused: it need not tell how they ended."""
        self.start()

    def start(self) -> None:
        """A server begins, the first or the next after a crash."""
        self.epoch += 1
        server = Watched(
            ServerOptions(
                name="test:1",
                epoch=self.epoch,
                durable=self.durable,
                record_foreground=self.record_foreground,
                job_retries=RETRIES,
                timeout_grace=0.0,
            )
        )
        server.world = self
        self.wire = Wire(server)
        self.core = server
        self.core.now = self.core.clock = self.now
        self.operator = self.wire.connect()
        self.journal = Journal(server, submit_limit=5.0)
        self.batch: Batch | None = None
        self.created = 0
        self.served: Counter[bytes] = Counter()
        self.serial = 0
        self.held = 0
        self.peers: list[ModelPeer] = []
        self.jobs: dict[bytes, ModelJob] = {}
        self.queues: dict[bytes, list[ModelJob]] = {function: [] for function in FUNCTIONS}

    # The model.

    def live(self, function: bytes, key: tuple[bytes, ...] | None) -> ModelJob | None:
        if key is None:
            return None
        return next((job for job in self.jobs.values() if (job.function, job.key) == (function, key)), None)

    def key(self, unique: bytes, workload: bytes) -> tuple[bytes, ...] | None:
        if unique == b"-":
            return (b"workload", workload) if workload else None
        return (unique,) if unique else None

    def enqueue(self, job: ModelJob) -> None:
        if job.due > self.now:
            job.state = "delayed"
            return
        job.state = "ready"
        self.queues[job.function].append(job)

    def hold(self, job: ModelJob) -> None:
        self.held += 1
        job.serial = self.held
        self.jobs[job.handle] = job

    def end(self, job: ModelJob, outcome: Outcome) -> None:
        if job.state == "ready":
            self.queues[job.function].remove(job)
        if job.slots is not None:
            self.answer(job, P.JOB_CREATED, job.handle)
        del self.jobs[job.handle]
        self.outcomes[job.handle] = outcome

    def answer(self, job: ModelJob, *packet: bytes | PacketType) -> None:
        for slot in job.slots or ():
            slot.packet = packet
        job.slots = None

    def drop_if_abandoned(self, job: ModelJob) -> None:
        if job.state == "ready" and not job.background and not job.listeners:
            self.end(job, Outcome.CANCELLED)

    def lose(self, job: ModelJob) -> None:
        """Its worker is gone."""
        job.worker = None
        if not job.background and not job.listeners:
            self.end(job, Outcome.CANCELLED)
        elif job.attempts >= (job.max_attempts or RETRIES):
            job.tell(P.WORK_FAIL)
            self.end(job, Outcome.DEAD)
        else:
            self.put_back(job)

    def put_back(self, job: ModelJob, due: float = 0.0) -> None:
        job.worker = None
        job.numbers = (b"0", b"0")
        if due > self.now:
            job.due = due
            job.state = "delayed"
        else:
            job.state = "ready"
            self.queues[job.function].insert(0, job)

    def held_by(self, peer: ModelPeer) -> list[ModelJob]:
        """In the order in which it got them."""
        return sorted((job for job in self.jobs.values() if job.worker is peer), key=lambda job: job.taken)

    def model_committed(self, entry: Entry) -> None:
        if not (isinstance(entry, JobKept) or (isinstance(entry, JobQueued) and entry.background)):
            return
        job = self.jobs.get(entry.handle)
        if job is None or job.slots is None:
            return
        self.answer(job, P.JOB_CREATED, job.handle)
        if job.state == "pending":
            self.enqueue(job)

    def model_rejected(self, entry: JobQueued | JobKept, reason: str) -> None:
        self.disowned.add(entry.handle)
        job = self.jobs.get(entry.handle)
        if job is None:
            return
        if isinstance(entry, JobQueued):
            job.recorded = False
        if job.slots is None:
            return
        self.answer(job, P.ERROR, b"QUEUE_ERROR", reason.encode())
        if job.state == "pending":
            del self.jobs[job.handle]
        else:
            job.background = False
            self.drop_if_abandoned(job)

    def model_joined(self, entry: JobQueued, handle: bytes) -> None:
        self.disowned.add(entry.handle)
        job = self.jobs.get(entry.handle)
        if job is None:
            return
        job.recorded = False
        other = self.jobs.get(handle)
        if job.state == "pending" and not (job.listeners and other is None):
            self.answer(job, P.JOB_CREATED, handle)
            del self.jobs[job.handle]
            if other is not None:
                other.listeners += job.listeners
                other.key = other.key or job.key
            return
        self.answer(job, P.JOB_CREATED, job.handle if job.state == "pending" else handle)
        job.background = False
        if job.state == "pending":
            self.enqueue(job)
        else:
            self.drop_if_abandoned(job)

    def model_adopted(self, stored: StoredJob) -> None:
        assert stored.handle not in self.jobs, "the store handed a job over twice"
        job = ModelJob(
            stored.handle, stored.function, stored.unique, stored.workload, stored.priority, background=True
        )
        job.attempts = stored.attempts
        job.max_attempts = stored.max_attempts
        job.timeout = stored.timeout
        job.due = stored.run_after
        job.recorded = True
        key = self.key(stored.unique, stored.workload)
        if self.live(stored.function, key) is None:
            job.key = key
        self.hold(job)
        self.acknowledged.add(job.handle)
        self.enqueue(job)

    # What happens.

    def connect(self) -> None:
        if len(self.peers) < 12:
            trade = self.dice.sample(FUNCTIONS, self.dice.choice([1, 1, 2, 4]))
            self.peers.append(ModelPeer(self.wire.connect(), trade))

    def leave(self, peer: ModelPeer) -> None:
        self.peers.remove(peer)
        for job in list(self.jobs.values()):
            if peer in job.listeners:
                job.listeners = [listener for listener in job.listeners if listener is not peer]
                self.drop_if_abandoned(job)
        for job in reversed(self.held_by(peer)):
            self.lose(job)
        peer.caller.leaves()
        self.hear()
        if peer.woken_for is not None:
            self.check_somebody_is_awake(peer.woken_for)

    def submit(self, peer: ModelPeer) -> None:
        kind = self.dice.choice([*SUBMISSIONS, P.SUBMIT_JOB_EPOCH])
        function = self.dice.choice(FUNCTIONS)
        unique, workload = self.dice.choice(UNIQUES), self.dice.choice(WORKLOADS)
        priority, background = SUBMISSIONS.get(kind, (NORMAL, True))
        options = []
        due = 0.0
        if kind == P.SUBMIT_JOB_EPOCH:
            due = float(int(self.now) + self.dice.choice([0, 1, 2, 7]))
            options = [b"%d" % due]
        key = self.key(unique, workload)
        job = self.live(function, key)
        slot = Slot()
        peer.line.append(slot)
        if job is None:
            self.created += 1
            handle = b"H:test:1:%d.%d" % (self.epoch, self.created)
            job = ModelJob(handle, function, unique, workload, priority, background, key)
            job.recorded = self.durable if background else self.record_foreground
            job.due = due
            self.hold(job)
            if background and self.durable:
                job.state = "pending"
                job.slots = []
            else:
                self.enqueue(job)
        elif background and not job.background:
            job.background = True
            if self.durable:
                job.recorded = True
                job.slots = []
        if job.slots is not None and (background or job.state == "pending"):
            job.slots.append(slot)
        else:
            slot.packet = (P.JOB_CREATED, job.handle)
        if not background:
            job.listeners.append(peer)
        self.say(peer, kind, function, unique, *options, workload)

    def offer(self, peer: ModelPeer) -> None:
        function = self.dice.choice(peer.trade)
        # Offered while asleep it does not wake for what waits already, so nobody does that here.
        if not peer.asleep and not peer.line:
            if function not in peer.abilities:
                peer.abilities.append(function)
                peer.woken_for = None
            peer.limits.pop(function, None)
            if self.dice.random() < 0.3:
                peer.limits[function] = self.dice.choice([1.0, 3.0])
                self.say(peer, P.CAN_DO_TIMEOUT, function, b"%d" % (peer.limits[function] * 1000))
            else:
                self.say(peer, P.CAN_DO, function)

    def withdraw(self, peer: ModelPeer) -> None:
        withdrawn = [self.dice.choice(FUNCTIONS)] if self.dice.random() < 0.8 else list(FUNCTIONS)
        peer.abilities = [function for function in peer.abilities if function not in withdrawn]
        peer.limits = {
            function: limit for function, limit in peer.limits.items() if function not in withdrawn
        }
        for job in reversed(self.held_by(peer)):
            if job.function in withdrawn:
                self.lose(job)
        if len(withdrawn) == 1:
            self.say(peer, P.CANT_DO, *withdrawn)
        else:
            self.say(peer, P.RESET_ABILITIES)

    def candidates(self, peer: ModelPeer) -> list[ModelJob]:
        """Of these is the peer's next job: most urgent first, then from the function not served longest."""
        fronts = []
        for function in peer.abilities:
            queue = self.queues[function]
            if queue:
                fronts.append(max(queue, key=lambda job: job.priority))
        if not fronts:
            return []
        best = max(job.priority for job in fronts)
        fronts = [job for job in fronts if job.priority == best]
        longest = min(self.served[job.function] for job in fronts)
        return [job for job in fronts if self.served[job.function] == longest]

    def grab(self, peer: ModelPeer) -> None:
        # What waits in a line is not heard: only who hears at once can tell the model what it got.
        if peer.line:
            return
        peer.asleep = False
        peer.woken_for = None
        candidates = self.candidates(peer)
        kind = self.dice.choice([P.GRAB_JOB, P.GRAB_JOB_UNIQ, P.GRAB_JOB_ALL])
        heard = self.without_noops(peer, peer.caller(kind))
        if not candidates:
            assert heard == [(P.NO_JOB,)]
            return
        *told, (_, handle, function, *rest) = heard
        job = self.jobs[handle]
        assert job in candidates, f"{handle} was handed out before its turn"
        unique = [] if kind == P.GRAB_JOB else [job.unique]
        expected = [*unique, job.workload]
        assert (function, rest) == (job.function, expected)
        assert job.worker is None, f"{handle} has a worker already"
        self.queues[function].remove(job)
        self.serial += 1
        self.served[function] = job.taken = self.serial
        job.state = "running"
        job.worker = peer
        job.attempts += 1
        is_told = peer.tells_attempts and (job.attempts > 1 or job.max_attempts is not None)
        attempt = b"attempt %d %d" % (job.attempts, job.max_attempts or 0)
        assert told == ([(P.OPTION_RES, attempt)] if is_told else [])
        job.up = self.now + min(job.timeout or math.inf, peer.limits.get(function, math.inf))

    def sleep(self, peer: ModelPeer) -> None:
        if peer.line:
            return
        if self.candidates(peer):
            assert peer.caller(P.PRE_SLEEP) == [(P.NOOP,)]
            peer.asleep = False
            return
        peer.asleep = True
        peer.naps += 1
        self.say(peer, P.PRE_SLEEP)

    def work(self, peer: ModelPeer) -> None:
        held = self.held_by(peer)
        if self.dice.random() < 0.9 and held:
            self.report(peer, self.dice.choice(held), self.dice.random())
            return
        # Of somebody else, or of the past.
        handle = self.dice.choice([*self.jobs, *list(self.outcomes)[-5:], b"H:no:1"])
        if handle in self.jobs and self.jobs[handle].worker is peer:
            return
        kind = self.dice.choice([P.WORK_COMPLETE, P.WORK_FAIL, P.WORK_DATA, P.WORK_STATUS, P.WORK_EXCEPTION])
        arguments = {P.WORK_FAIL: [], P.WORK_STATUS: [b"1", b"2"]}.get(kind, [b"late"])
        reason = {
            P.WORK_DATA: b"Job does not exist on server",
            P.WORK_EXCEPTION: b"An exception was received for a job that does not exist",
        }.get(kind, b"Job given in work result not found")
        if handle not in peer.cancelled and not (kind == P.WORK_FAIL and peer.excused == handle):
            peer.expects(P.ERROR, b"JOB_NOT_FOUND", reason)
        self.say(peer, kind, handle, *arguments)

    def report(self, peer: ModelPeer, job: ModelJob, luck: float) -> None:
        handle = job.handle
        if luck < 0.2:
            job.numbers = (b"%d" % self.dice.randrange(9), b"10")
            job.tell(P.WORK_STATUS, *job.numbers)
            self.say(peer, P.WORK_STATUS, handle, *job.numbers)
        elif luck < 0.4:
            kind = self.dice.choice([P.WORK_DATA, P.WORK_WARNING])
            job.tell(kind, b"part")
            self.say(peer, kind, handle, b"part")
        elif luck < 0.8:
            job.tell(P.WORK_COMPLETE, b"result")
            self.end(job, Outcome.SUCCESSFUL)
            self.say(peer, P.WORK_COMPLETE, handle, b"result")
        elif luck < 0.87:
            job.tell(P.WORK_FAIL)
            self.end(job, Outcome.FAILED)
            self.say(peer, P.WORK_FAIL, handle)
        else:
            if peer.tells_attempts and luck < 0.96:
                delay = self.dice.choice([0, 0, 1500, 4000])
                self.say(peer, P.OPTION_REQ, b"retry %d %s" % (delay, handle))
                if job.background and (job.max_attempts is None or job.attempts < job.max_attempts):
                    peer.excused = handle
                    self.put_back(job, self.now + delay / 1000)
                    self.say(peer, P.WORK_EXCEPTION, handle, b"boom")
                    return
            for listener in job.listeners:
                if listener.exceptions:
                    listener.expects(P.WORK_EXCEPTION, handle, b"boom")
                else:
                    listener.expects(P.WORK_FAIL, handle)
            self.end(job, Outcome.FAILED)
            peer.excused = handle
            self.say(peer, P.WORK_EXCEPTION, handle, b"boom")

    def ask(self, peer: ModelPeer) -> None:
        if self.dice.random() < 0.5:
            data = b"%d" % self.dice.randrange(1000)
            peer.expects(P.ECHO_RES, data)
            self.say(peer, P.ECHO_REQ, data)
        elif self.dice.random() < 0.4:
            peer.tells_attempts = True
            peer.expects(P.OPTION_RES, ATTEMPTS)
            self.say(peer, P.OPTION_REQ, ATTEMPTS)
        elif self.dice.random() < 0.1:
            peer.exceptions = True
            peer.expects(P.OPTION_RES, b"exceptions")
            self.say(peer, P.OPTION_REQ, b"exceptions")
        else:
            handle = self.dice.choice([*self.jobs, *list(self.outcomes)[-3:], b"H:no:1"])
            job = self.jobs.get(handle)
            if job is None or job.state == "pending":
                numbers = [b"0"] * 4
            else:
                numbers = [b"1", b"1" if job.worker else b"0", *job.numbers]
            peer.expects(P.STATUS_RES, handle, *numbers)
            self.say(peer, P.GET_STATUS, handle)

    def cancel(self) -> None:
        """By an operator, who is no part of the model: its answers come at once."""
        handle = self.dice.choice([*self.jobs, *list(self.outcomes)[-3:], b"H:no:1"])
        job = self.jobs.get(handle)
        answer = self.operator.line(b"cancel job " + handle)
        assert answer == (b"OK\r\n" if job else b"ERR UNKNOWN_JOB\r\n")
        if job is not None:
            if job.worker is not None:
                job.worker.cancelled.add(handle)
            job.tell(P.WORK_FAIL)
            self.end(job, Outcome.CANCELLED)

    def tick(self) -> None:
        self.pass_time(self.dice.choice([0.1, 0.5, 1.0, 2.0]))
        jobs = sorted(self.jobs.values(), key=lambda job: (job.due, job.serial))
        for job in jobs:
            if job.state == "delayed" and job.due <= self.now:
                self.enqueue(job)
        for job in sorted(self.jobs.values(), key=lambda job: job.taken):
            if job.worker is not None and job.up <= self.now:
                self.lose(job)
        asleep = {
            function: [peer for peer in self.peers if peer.asleep and function in peer.abilities]
            for function in FUNCTIONS
        }
        self.core.tick()
        self.hear()
        for function in FUNCTIONS:
            self.check_somebody_is_awake(function)
            if self.queues[function] and asleep[function]:
                # Who has a line may have been woken without hearing of it yet.
                woken = [peer for peer in asleep[function] if not peer.asleep or peer.line]
                assert woken, f"the tick woke nobody for {function!r}"

    def check_somebody_is_awake(self, function: bytes) -> None:
        if self.queues[function]:
            able = [peer for peer in self.peers if function in peer.abilities]
            asleep = [peer for peer in able if peer.asleep and not peer.line]
            assert not asleep or len(asleep) < len(able), f"all sleep while {function!r} has jobs"

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.core.now = self.core.clock = self.now

    def write(self) -> None:
        """One half of a trip to the store."""
        if self.batch is None:
            if self.core.entries:
                self.journal.append(self.wire.entries(), self.now, urgent=self.core.urgent)
                self.core.urgent = False
            self.batch = self.journal.next_batch(self.now)
        else:
            batch, self.batch = self.batch, None
            batch.perform(self.store)
            self.journal.done(batch, self.now)

    def insert_row(self) -> None:
        """The database door: a committed row is a promise by itself."""
        self.rows += 1
        row = StoredJob(
            b"H:test:1:r%d" % self.rows,
            self.dice.choice(FUNCTIONS),
            self.dice.choice(UNIQUES),
            b"row",
            self.dice.choice([HIGH, NORMAL, LOW]),
            0,
            self.dice.choice([None, None, 1, 2, 4]),
            timeout=self.dice.choice([None, None, 2]),
        )
        # The table has one live row for each unique.
        if self.store.find_live(row.function, row.unique, row.workload) is None:
            self.store.unclaimed.append(row)

    def crash(self) -> None:
        """The process ends between two instructions; what is in the store is all that is left."""
        if self.batch is not None and self.dice.random() < 0.5:
            self.batch.perform(self.store)
        replayed = self.store.replay()
        kept = {job.handle for job in (*replayed, *self.store.unclaimed)}
        lost = self.acknowledged - set(self.outcomes) - kept
        assert not lost, f"acknowledged, not ended, and gone: {lost}"
        for job in replayed:
            # It ended, but nobody wrote that: it runs again.
            self.outcomes.pop(job.handle, None)
        self.start()
        self.core.adopt(replayed)

    # What is heard.

    def say(self, peer: ModelPeer, kind: PacketType, *arguments: bytes) -> None:
        self.compare(peer, peer.caller(kind, *arguments))

    def hear(self) -> None:
        for peer in self.peers:
            self.compare(peer, peer.caller.hears())
        self.core.dirty.clear()

    def without_noops(self, peer: ModelPeer, heard: list[Heard]) -> list[Heard]:
        noops = heard.count((P.NOOP,))
        if noops:
            assert noops <= peer.naps, "a NOOP that nobody slept for"
            peer.naps -= noops
            if peer.asleep and len(peer.abilities) == 1:
                (peer.woken_for,) = peer.abilities
            peer.asleep = False
        return [packet for packet in heard if packet != (P.NOOP,)]

    def compare(self, peer: ModelPeer, heard: list[Heard]) -> None:
        expected: list[Heard] = []
        while peer.line and peer.line[0].packet is not None:
            expected.append(peer.line.popleft().packet)
        assert self.without_noops(peer, heard) == expected
        if not self.durable:
            return
        for packet in expected:
            if packet[0] == P.JOB_CREATED:
                job = self.jobs.get(packet[1])
                if job is None or (job.background and job.slots is None):
                    self.acknowledge(packet[1])

    def acknowledge(self, handle: bytes) -> None:
        if handle in self.outcomes:
            return
        kept = (*self.store.jobs, *(job.handle for job in self.store.unclaimed))
        assert handle in kept, f"{handle} is acknowledged and not in the store"
        self.acknowledged.add(handle)

    def check_state(self) -> None:
        """The core's books agree with each other and with the model."""
        server = self.core
        assert server.jobs.keys() == self.jobs.keys()
        assert list(server.ready) == [function for function in server.ready if function.waiting]
        assert {f.name for f in server.ready} == {name for name, queue in self.queues.items() if queue}
        states = Counter((job.function, job.state) for job in server.jobs.values())
        rows = {}
        for function in server.functions.values():
            lying = [job for level in function.levels.values() for job in level]
            assert sum(job.state is JobState.READY for job in lying) == function.waiting
            assert states[function, JobState.READY] == function.waiting == len(self.queues[function.name])
            assert states[function, JobState.RUNNING] == function.running
            assert states[function, JobState.DELAYED] == function.delayed
            assert function.held == sum(job.function is function for job in server.jobs.values())
            assert all(job.key == key and job.handle in server.jobs for key, job in function.uniques.items())
            assert set(function.sleepers) <= set(function.workers)
            workers = sum(function.name in peer.abilities for peer in self.peers)
            delayed = [job for job in self.jobs.values() if job.state == "delayed"]
            total = (
                function.waiting + function.running + sum(job.function == function.name for job in delayed)
            )
            rows[function.name] = (total, function.running, workers)
        lines = text.answer(server, self.operator.peer, b"status").splitlines()
        assert lines == [*(b"%s\t%d\t%d\t%d" % (name, *numbers) for name, numbers in rows.items()), b"."]
        for peer in self.peers:
            assert set(peer.caller.peer.running) == {job.handle for job in self.held_by(peer)}
            listens = {job.handle for job in self.jobs.values() if peer in job.listeners}
            assert {job.handle for job in peer.caller.peer.listens} == listens

    # The course of things.

    def step(self) -> None:
        actions = {
            self.submit: 2 if self.sleepy else 16,
            self.grab: 20 if self.sleepy else 22,
            self.work: 22,
            self.sleep: 30 if self.sleepy else 10,
            self.ask: 8,
            self.offer: 8,
            self.withdraw: 1,
            self.leave: 2 if self.sleepy else 1,
        }
        world_actions = {self.connect: 8, self.tick: 3, self.cancel: 1}
        if self.durable:
            world_actions |= {self.write: 25, self.insert_row: 0.1 if self.sleepy else 2}
        if self.dice.random() < 0.001 and self.durable:
            self.crash()
        if self.dice.random() < 0.005:
            self.sleepy = not self.sleepy
            self.store.trouble = self.dice.choice([0.0, 0.0, 0.3, 0.95])
        choices = {**actions, **world_actions} if self.peers else world_actions
        (action,) = self.dice.choices(list(choices), list(choices.values()))
        if action in actions:
            action(self.dice.choice(self.peers))
        else:
            action()
        self.hear()

    def drain(self) -> None:
        """Everything works again, and a worker takes all that there is: every promise is kept."""
        self.store.trouble = 0.0
        for peer in list(self.peers):
            for job in self.held_by(peer):
                self.report(peer, job, 0.5)
                self.hear()
        helper = ModelPeer(self.wire.connect(), FUNCTIONS)
        self.peers.append(helper)
        for function in FUNCTIONS:
            helper.abilities.append(function)
            self.say(helper, P.CAN_DO, function)
        for _ in range(10):
            self.pass_time(2.0)
            for _ in range(10 if self.durable else 0):
                self.write()
                self.hear()
            self.tick()
            while self.candidates(helper):
                self.grab(helper)
                (job,) = self.held_by(helper)
                self.report(helper, job, 0.5)
                self.hear()
        assert not self.jobs
        assert not self.core.ready
        assert all(not peer.line for peer in self.peers), "a request was never answered"
        assert self.acknowledged <= set(self.outcomes), "an acknowledged job never ran to its end"
        if self.durable:
            assert self.journal.idle
            assert self.store.jobs == {}
            for handle, entry in self.store.finished.items():
                if handle not in self.disowned:
                    assert entry.outcome == self.outcomes[handle], f"the record of {handle} lies"
        self.check_state()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("durable", "record_foreground"),
    [(True, True), (True, False), (False, False)],
    ids=["durable", "durable background only", "in memory"],
)
class TestRandomWorlds:
    """DESIGN section 4, the promises."""

    def test_promises_are_kept(self, monkeypatch, seed, durable, record_foreground):
        # In these small worlds so few do what many do in a large one.
        monkeypatch.setattr(core, "ENDED_LIMIT", 3)
        if seed is None:
            seed = random.SystemRandom().randrange(10**9)
        world = World(seed, durable=durable, record_foreground=record_foreground)
        step = 0
        try:
            for step in range(STEPS):
                world.step()
                if step % 10 == 0:
                    world.check_state()
            world.drain()
        except Exception as error:
            error.add_note(f"GEARMAN_SIMULATION_SEED={seed}, step {step}")
            raise
