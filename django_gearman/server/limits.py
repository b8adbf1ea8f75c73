"""
Functions of which only so many jobs may run, or begin, at a time.

Of a limited function a job is only shown to workers when there is a permit
for it; until then it waits behind its ``Gate``, one for each key, in order.
Permits are the store's, for all servers together (``permits.py``), and asked
for when a job and a worker for it are there, or one that would take it next;
without a store they are counted here. A job has its permit until its attempt is
over. What is not used within a moment goes back, so that another server may
have it.

Of a gate one question is open at a time. It says what the server has, so that
nothing depends on which questions were answered. No store, no permits: limited
functions rest while it is away.
"""

from __future__ import annotations

import heapq
import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from ..permits import Book, Granted, Limit, Request
from .entries import Crowd, Question, Reply, Topic
from .jobs import Function, Job, JobState

if TYPE_CHECKING:
    from .core import JobServer
    from .peers import Peer

UNUSED: Final = 1.0
"""Seconds after which a permit that no worker came for goes back."""

UNUSED_BY_BUSY: Final = 10.0
"""The same while workers of the function have jobs in hand: one of them may have it next."""

LOOK: Final = 0.0001
"""Seconds until the next look at what busy workers could do next, for each function: there may be many."""

MAX_ASKED: Final = 100
"""Gates of which a question is open at a time; the others' turn comes with the replies."""

SHARES: Final = 100
"""Of so many keys one may take its part of the window; what is more of it stays at the store's door."""

MAX_KEY: Final = 64
"""Bytes of a key; longer ones are hashed by who makes them, and cut here."""


class Gate:
    """The jobs of one key, and the permits that this server has for them."""

    __slots__ = (
        "asked",
        "blocked",
        "excess",
        "free",
        "held",
        "key",
        "limiter",
        "not_before",
        "overdue",
        "queues",
        "started",
        "told",
        "turn",
    )

    def __init__(self, limiter: Limiter, key: bytes) -> None:
        self.limiter = limiter
        self.key = key
        self.queues: dict[int, OrderedDict[Job, None]] = {}
        """{priority: jobs that wait for a permit, in order}, without empty ones."""
        self.blocked = 0
        """How many these are."""
        self.excess = 0
        """How many jobs it has beyond its part of the window."""
        self.held: dict[Job, None] = {}
        """Jobs that have a permit."""
        self.free: dict[Job, float] = {}
        """{job that has one and waits for a worker: the clock's time from which}."""
        self.started: list[tuple[int, float]] = []
        """(number, the clock's time) of starts that the store may not know of."""
        self.overdue = False
        """Whether it is time to tell of them: until then they count as if they happened later."""
        self.asked = False
        """Whether a question is open."""
        self.not_before = 0.0
        """The clock's time before which asking for more is in vain; infinite until one is given back."""
        self.told = 0
        """How many permits the store thinks that there are."""
        self.turn: tuple[int, int] | None = None
        """Its place among those that are to be asked for; None when it has none."""

    @property
    def is_over(self) -> bool:
        return not (self.blocked or self.held or self.started or self.asked or self.told)

    def front(self) -> Job:
        """The next job; only to be asked while some are ``blocked``."""
        return next(iter(self.queues[max(self.queues)]))

    def next_turn(self) -> tuple[int, int]:
        """What its turn among the gates depends on: they take turns by their next jobs."""
        front = self.front()
        return -front.priority, front.serial

    def put(self, job: Job, *, first: bool) -> None:
        queue = self.queues.setdefault(job.priority, OrderedDict())
        queue[job] = None
        if first:
            queue.move_to_end(job, last=False)
        self.blocked += 1

    def take(self, job: Job) -> None:
        queue = self.queues[job.priority]
        del queue[job]
        if not queue:
            del self.queues[job.priority]
        self.blocked -= 1


class Limiter:
    """What is limited of one function."""

    __slots__ = (
        "asking",
        "counts",
        "crowded",
        "excess",
        "function",
        "gates",
        "is_lifted",
        "limit",
        "name",
        "turns",
    )

    def __init__(self, name: bytes, limit: Limit, function: Function | None) -> None:
        self.name = name
        self.limit = limit
        self.is_lifted = False
        """Whether the function is limited no more, or in another way."""
        self.function = function
        """None while the server does not list it."""
        self.gates: dict[bytes, Gate] = {}
        self.counts: dict[int, int] = {}
        """{priority: how many jobs wait for a permit}, without zeros."""
        self.crowded: dict[bytes, None] = {}
        """Keys of which so many wait here that no more are taken in."""
        self.excess = 0
        """How many jobs these have beyond that."""
        self.asking = 0
        """How many permits the open questions ask for."""
        self.turns: list[tuple[tuple[int, int], int, Gate]] = []
        """Heap of gates by the priority and age of their next jobs; some stand there in vain."""

    @property
    def free(self) -> int:
        """Jobs with a permit that no worker has taken yet."""
        return self.function.waiting if self.function is not None else 0

    def next_priority(self) -> int:
        """Of the job whose turn it is to be asked for; only to be asked while there are ``turns``."""
        return -self.turns[0][0][0]

    def crowded_from(self) -> int:
        """The priority from which down no more jobs of the crowded keys are taken in."""
        gates = [self.gates[key] for key in self.crowded]
        return max(job.priority for gate in gates for job in ((gate.front(),) if gate.blocked else gate.free))

    def key_of(self, job: Job) -> bytes:
        """What its limit is counted by."""
        if not self.limit.keyed:
            return b""
        if job.limit_key is None:
            job.limit_key = key_in(job.workload)
        return job.limit_key[:MAX_KEY]


def key_in(workload: bytes) -> bytes:
    """The key that stands in a job's envelope; empty where there is none."""
    try:
        envelope = json.loads(workload)
        key = envelope.get("limit", "") if isinstance(envelope, dict) else ""
    except (ValueError, RecursionError):
        return b""
    return key.encode(errors="replace")[:MAX_KEY] if isinstance(key, str) else b""


class Limits:
    """The limited functions of one server."""

    def __init__(self, server: JobServer, *, durable: bool) -> None:
        self._server = server
        self.limiters: dict[bytes, Limiter] = {}
        self.blocked: dict[Function, None] = {}
        """Functions of which jobs wait for permits."""
        self.unsettled: dict[Function, None] = {}
        """Those of them for which something has changed; ``settle`` looks at them."""
        self._hungry: dict[Peer, None] = {}
        """Who has just asked for a job in vain, and does not sleep yet."""
        self._busy: dict[Peer, int] = {}
        """{who has just been given a job: the priority that another must have to be its next}"""
        self._look_at = 0.0
        """The clock's time from which to ask for these."""
        self._untold: dict[Gate, None] = {}
        """Gates that have given permits back, or begun jobs, of which the store does not know."""
        self._asked: dict[int, tuple[Gate, Question]] = {}
        self._retries: list[tuple[float, int, Gate]] = []
        """Heap of gates by the clock's time at which to ask for them again."""
        self._numbers = 0
        self._starts = 0
        self._share = max(server.options.window // SHARES, 1)
        """How many jobs of one key may wait here."""
        self._book = None if durable else Book()

    # What is limited.

    def learn(self, limits: Mapping[bytes, Limit]) -> None:
        """These are the limits from now on; called with what the store says, and at the start."""
        if self._book is not None:
            self._book.limits = dict(limits)
        for name in [name for name in self.limiters if name not in limits]:
            self._lift(name)
        for name, limit in limits.items():
            limiter = self.limiters.get(name)
            if limiter is not None and limiter.limit == limit:
                continue
            if limiter is not None and limiter.limit.keyed == limit.keyed:
                limiter.limit = limit
                for gate in limiter.gates.values():
                    gate.not_before = 0.0
                    self._line_up(gate)
                self._unsettle(limiter)
                continue
            if limiter is not None:
                self._lift(name)
            self._impose(name, limit)

    def attach(self, function: Function) -> None:
        """A function was listed anew."""
        limiter = self.limiters.get(function.name)
        if limiter is not None:
            limiter.function = function
            function.limiter = limiter

    def _impose(self, name: bytes, limit: Limit) -> None:
        server = self._server
        function = server.functions.get(name)
        limiter = self.limiters[name] = Limiter(name, limit, function)
        if function is None:
            return
        waiting = function.take_all()
        function.limiter = limiter
        server.ready.pop(function, None)
        for job in waiting:
            self.hold(job)
        for job in server.jobs.values():
            if job.function is function and (job.state is JobState.RUNNING or job in server.returning):
                self.force(job)

    def _lift(self, name: bytes) -> None:
        limiter = self.limiters.pop(name)
        limiter.is_lifted = True
        function = limiter.function
        waiting = [job for gate in limiter.gates.values() for queue in gate.queues.values() for job in queue]
        for gate in limiter.gates.values():
            for job in (*gate.held, *(job for queue in gate.queues.values() for job in queue)):
                job.gate = None
            gate.queues.clear()
            gate.held.clear()
            gate.free.clear()
            gate.blocked = 0
            self._untold[gate] = None
        if function is not None:
            function.limiter = None
            function.blocked = 0
            limiter.crowded.clear()
            limiter.excess = 0
            self.blocked.pop(function, None)
            for job in sorted(waiting, key=lambda job: job.serial):
                self._server.offer(job)

    # What happens to jobs.

    def hold(self, job: Job, *, first: bool = False) -> None:
        """A job of a limited function is ready: it waits for a permit."""
        if job.gate is not None:
            self.give_back(job)
        limiter = job.function.limiter
        assert limiter is not None, "others need no permit"
        gate = self._gate(limiter, job)
        job.gate = gate
        after = self._worse_than(gate, job, first=first)
        self._block(gate, job, first=first)
        if after is not None:
            # The permit of one that nobody has taken yet is for the first.
            self.expose(gate.front())
            self._conceal(after, give_back=False)
        self._unsettle(limiter)

    def _worse_than(self, gate: Gate, job: Job, *, first: bool) -> Job | None:
        for other in reversed(gate.free):
            if other.priority < job.priority or (first and other.priority == job.priority):
                return other
        return None

    def force(self, job: Job) -> None:
        """It runs, or may: its permit is out of question."""
        limiter = job.function.limiter
        assert limiter is not None, "others need no permit"
        gate = job.gate = self._gate(limiter, job)
        gate.held[job] = None
        self._untold[gate] = None

    def started(self, job: Job) -> None:
        """A worker has it."""
        gate = job.gate
        assert gate is not None, "it was handed out without a permit"
        del gate.free[job]
        self._note_crowd(gate)
        if gate.limiter.limit.rate is not None:
            self._starts += 1
            gate.started.append((self._starts, self._server.clock))
            self._untold[gate] = None
            if len(gate.started) == 1:
                self._look_again(gate, self._server.clock + min(gate.limiter.limit.period / 20, 1.0))

    def give_back(self, job: Job) -> None:
        """Its attempt is over, or there is none."""
        gate = job.gate
        assert gate is not None, "it has none"
        job.gate = None
        gate.held.pop(job, None)
        if gate.free.pop(job, None) is not None:
            self._note_crowd(gate)
        self._has_room(gate)
        self._unsettle(gate.limiter)

    def _has_room(self, gate: Gate) -> None:
        """A permit of it is free."""
        self._untold[gate] = None
        if gate.limiter.limit.concurrency is not None:
            gate.not_before = min(gate.not_before, self._server.clock)
            self._line_up(gate)

    def take_out(self, job: Job) -> None:
        """Take one out that is ready, wherever it waits."""
        gate = job.gate
        assert gate is not None, "it waits elsewhere"
        if job in gate.free:
            self._withdraw(job)
            self.give_back(job)
        else:
            self._unblock(gate, job)
            job.gate = None
            self._drop_if_over(gate)

    def expose(self, job: Job) -> None:
        """It has a permit: the next worker may have it."""
        gate = job.gate
        assert gate is not None, "permits are a gate's"
        self._unblock(gate, job)
        gate.held[job] = None
        gate.free[job] = self._server.clock
        self._note_crowd(gate)
        self._server.offer(job)

    def _conceal(self, job: Job, *, give_back: bool) -> None:
        """Nobody came for it: it waits as before."""
        gate = job.gate
        assert gate is not None, "it has a permit"
        self._withdraw(job)
        del gate.free[job], gate.held[job]
        self._block(gate, job, first=True)
        if give_back:
            self._has_room(gate)

    def _withdraw(self, job: Job) -> None:
        function = job.function
        function.withdraw(job)
        if not function.waiting:
            del self._server.ready[function]

    def _block(self, gate: Gate, job: Job, *, first: bool) -> None:
        function = job.function
        gate.put(job, first=first)
        counts = gate.limiter.counts
        counts[job.priority] = counts.get(job.priority, 0) + 1
        function.blocked += 1
        self.blocked[function] = None
        self._note_crowd(gate)
        if gate.front() is job:
            self._line_up(gate)

    def _unblock(self, gate: Gate, job: Job) -> None:
        function = job.function
        gate.take(job)
        counts = gate.limiter.counts
        counts[job.priority] -= 1
        if not counts[job.priority]:
            del counts[job.priority]
        function.blocked -= 1
        if not function.blocked:
            self.blocked.pop(function, None)
        self._note_crowd(gate)

    def _note_crowd(self, gate: Gate) -> None:
        limiter = gate.limiter
        if not limiter.limit.keyed:
            return
        here = gate.blocked + len(gate.free)
        excess = max(here - self._share, 0)
        limiter.excess += excess - gate.excess
        gate.excess = excess
        if here >= self._share:
            limiter.crowded[gate.key] = None
        else:
            limiter.crowded.pop(gate.key, None)

    def is_crowded(self, job: Job) -> bool:
        """Whether so many of its key wait here that a new one is to wait at the store's door."""
        limiter = job.function.limiter
        if limiter is None or not limiter.crowded or limiter.key_of(job) not in limiter.crowded:
            return False
        return job.priority <= limiter.crowded_from()

    def crowded(self) -> dict[bytes, Crowd]:
        """Of each function the keys of which no more jobs are wanted."""
        return {
            name: Crowd(frozenset(limiter.crowded), limiter.crowded_from())
            for name, limiter in self.limiters.items()
            if limiter.crowded
        }

    def _gate(self, limiter: Limiter, job: Job) -> Gate:
        key = limiter.key_of(job)
        gate = limiter.gates.get(key)
        if gate is None:
            gate = limiter.gates[key] = Gate(limiter, key)
        return gate

    # What workers want.

    def want(self, peer: Peer, *, sleeps: bool) -> None:
        """A worker has nothing to do."""
        if not sleeps:
            self._hungry[peer] = None
        else:
            self._hungry.pop(peer, None)
        for function in self.blocked:
            if function.name in peer.abilities:
                self.unsettled[function] = None

    def may_want(self, peer: Peer, priority: int) -> None:
        """A worker has a job, and would take one of at least that priority next, though others wait too."""
        self._busy[peer] = priority

    def _look_for_busy(self) -> None:
        """Settle with the functions of which those could take a job that are at work."""
        lowest = min(self._busy.values())
        for function in self.blocked:
            limiter = function.limiter
            if limiter is not None and limiter.turns and limiter.next_priority() >= lowest:
                self.unsettled[function] = None
        self._look_at = self._server.clock + LOOK * len(self.blocked)

    def _takers(self, limiter: Limiter, function: Function) -> int:
        """How many workers that do not sleep would take its next job."""
        name = function.name
        hungry = sum(name in peer.abilities for peer in self._hungry)
        if not self._busy or not limiter.turns:
            return hungry
        best = limiter.next_priority()
        return hungry + sum(
            best >= priority and name in peer.abilities for peer, priority in self._busy.items()
        )

    # What the store is asked.

    @property
    def due(self) -> float:
        """The clock's time at which ``ask_again`` has something to do; infinite for none."""
        due = self._retries[0][0] if self._retries else math.inf
        return min(due, self._look_at) if self._busy else due

    def ask_again(self) -> None:
        """Time passed."""
        clock = self._server.clock
        while self._retries and self._retries[0][0] <= clock:
            gate = heapq.heappop(self._retries)[2]
            gate.overdue = bool(gate.started)
            self._line_up(gate)
            self._unsettle(gate.limiter)

    def settle(self) -> None:
        """Ask for what is needed and tell what is not, after all that has happened in a turn."""
        looks = bool(self._busy) and self._server.clock >= self._look_at
        if looks:
            self._look_for_busy()
        unsettled, self.unsettled = self.unsettled, {}
        for function in unsettled:
            if function.limiter is not None:
                self._ask_for(function.limiter, function)
        self._hungry.clear()
        if looks:
            self._busy.clear()
        for gate in list(self._untold):
            if gate.asked:
                continue
            is_given_back = len(gate.held) != gate.told and gate.limiter.limit.concurrency is not None
            if is_given_back or gate.overdue:
                # Others may wait for it.
                self._ask(gate, 0)

    def tick(self) -> None:
        """A second passed: tell of starts, and give back what nobody came for."""
        clock = self._server.clock
        for function in list(self.blocked):
            self.unsettled[function] = None
        for limiter in self.limiters.values():
            if limiter.function is None or not limiter.free:
                continue
            is_busy = any(peer.running for peer in limiter.function.workers)
            last = clock - (UNUSED_BY_BUSY if is_busy else UNUSED)
            for gate in limiter.gates.values():
                for job in reversed([job for job, at in gate.free.items() if at <= last]):
                    self._conceal(job, give_back=True)
        self.ask_again()
        self.settle()
        for gate in list(self._untold):
            if not gate.asked:
                self._ask(gate, 0)

    def _ask_for(self, limiter: Limiter, function: Function) -> None:
        """Ask for as many permits as workers could use now, beside those that wait for them already."""
        server = self._server
        clock = server.clock
        if not server.hands_out or clock >= server.hand_out_until:
            return
        turns = limiter.turns
        takers = self._takers(limiter, function)
        while turns and len(self._asked) < MAX_ASKED:
            demand = len(function.sleepers) + takers - limiter.free - limiter.asking
            if demand <= 0:
                return
            turn, _, gate = heapq.heappop(turns)
            if gate.turn != turn:
                continue  # it has another
            gate.turn = None
            if not gate.blocked or gate.asked or gate.not_before > clock:
                continue
            if gate.next_turn() > turn:
                self._line_up(gate)
                continue
            self._ask(gate, min(demand, gate.blocked))

    def _ask(self, gate: Gate, wanted: int) -> None:
        self._untold.pop(gate, None)
        gate.overdue = False
        request = Request(gate.key, len(gate.held), len(gate.free), wanted, tuple(gate.started))
        name = gate.limiter.name
        gate.asked = True
        gate.limiter.asking += wanted
        self._numbers -= 1
        server = self._server
        question = Question(Topic.PERMITS, self._numbers, server.clock, function=name, request=request)
        self._asked[self._numbers] = gate, question
        if self._book is None:
            server.questions.append(question)
        else:
            self.replied(question, self._book.decide(name, request, "", server.clock, server.clock))

    def is_open(self, question: Question) -> bool:
        return question.number in self._asked

    def replied(self, question: Question, reply: Reply) -> None:
        """The store has answered: so many permits there are."""
        asked = self._asked.pop(question.number, None)
        request = question.request
        if asked is None or request is None:
            return
        gate, _ = asked
        granted = reply if isinstance(reply, Granted) else Granted(0)
        limiter = gate.limiter
        gate.asked = False
        limiter.asking -= request.wanted
        gate.told = request.held + granted.permits
        del gate.started[: len(request.started)]
        clock = self._server.clock
        if limiter.is_lifted:
            self._tell_instead(gate)
            return
        if granted.permits < request.wanted:
            gate.not_before = clock + granted.again_in
            if granted.again_in < math.inf:
                self._look_again(gate, gate.not_before)
        for _ in range(granted.permits):
            if gate.blocked:
                self.expose(gate.front())
        if len(gate.held) < gate.told and gate.not_before == math.inf:
            # Some were given back meanwhile.
            gate.not_before = 0.0
        if len(gate.held) != gate.told or gate.started:
            self._untold[gate] = None
        self._drop_if_over(gate)
        self._line_up(gate)
        self._unsettle(limiter)

    def _drop_if_over(self, gate: Gate) -> None:
        """There may be as many keys as there are customers: those that nobody uses are forgotten."""
        gates = gate.limiter.gates
        if gate.is_over and gates.get(gate.key) is gate:
            del gates[gate.key]
            # Another one of the key tells what there is from now on.
            self._untold.pop(gate, None)

    def _tell_instead(self, gate: Gate) -> None:
        """A gate that is no more was answered: what its key has now is what another one has, or nothing."""
        limiter = self.limiters.get(gate.limiter.name)
        other = limiter.gates.get(gate.key) if limiter is not None else None
        if other is not None:
            self._untold[other] = None
        elif gate.told:
            self._untold[gate] = None

    def _line_up(self, gate: Gate) -> None:
        """It may be its turn to be asked for."""
        if gate.blocked and not gate.asked and gate.not_before <= self._server.clock:
            turn = gate.next_turn()
            if gate.turn is None or turn < gate.turn:
                gate.turn = turn
                self._numbers -= 1
                turns = gate.limiter.turns
                heapq.heappush(turns, (turn, self._numbers, gate))
                if len(turns) > 2 * len(gate.limiter.gates) + SHARES:
                    self._drop_vain_turns(gate.limiter)

    def _drop_vain_turns(self, limiter: Limiter) -> None:
        """Of keys whose jobs were cancelled while no worker was there, for whom they would be looked at."""
        kept = []
        for turn, number, gate in limiter.turns:
            if gate.turn == turn and gate.blocked:
                kept.append((turn, number, gate))
            elif gate.turn == turn:
                gate.turn = None
        limiter.turns[:] = kept
        heapq.heapify(limiter.turns)

    def _look_again(self, gate: Gate, at: float) -> None:
        self._numbers -= 1
        heapq.heappush(self._retries, (at, self._numbers, gate))

    def _unsettle(self, limiter: Limiter) -> None:
        if limiter.function is not None:
            self.unsettled[limiter.function] = None

    # What is told of it.

    def standing(self) -> Iterator[tuple[Limiter, int, int]]:
        """(limiter, how many permits this server has, how many jobs wait for one) of each function."""
        for limiter in self.limiters.values():
            gates = limiter.gates.values()
            yield limiter, sum(len(gate.held) for gate in gates), sum(gate.blocked for gate in gates)
