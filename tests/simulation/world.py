"""
A world that a seed decides: servers on one database, time, faults, and what was promised.

A ``Shape`` says how large and how troubled it is. In each step something
happens to one part of it: a packet comes, a trip to the store begins, is done,
is told of; time passes, a process ends or stands still, a clock jumps. In the
end everything works again for long enough, and every promise of DESIGN
section 4 must have been kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from django_gearman.exceptions import LeaseLost, StoreError
from django_gearman.permits import Limit
from django_gearman.protocol.packets import PacketType
from django_gearman.server import core, journal, window
from django_gearman.server.entries import (
    Entry,
    JobFinished,
    JobKept,
    JobQueued,
    JobRequeued,
    JobStarted,
    Joined,
    Outcome,
    StoredJob,
    has_key,
)
from django_gearman.server.jobs import HIGH, LOW, NORMAL
from django_gearman.server.journal import Batch
from django_gearman.server.options import FunctionOrder

from .model import SUBMISSIONS, Broken, ModelJob, ModelPeer, Server, promise
from .store import Database, Row, SimulatedStore, key_of

LEASE = 15.0
WALL = 1_000_000.0
"""The wall clock where the monotonic one is zero."""
MANY = 1_000_000
"""A limit that no world comes to."""

QUIET_ROUNDS = 400
"""After so many rounds without faults nothing may be left to do."""


class Shape:
    """What a world is like. Most are small and troubled, each in a few ways."""

    def __init__(self, dice: random.Random, *, several: bool) -> None:
        choice, chance = dice.choice, dice.random
        self.durable = several or chance() < 0.85
        self.servers = choice((2, 2, 3)) if several else 1
        self.record_foreground = chance() < 0.7
        self.steps = choice((60, 120, 120, 200, 200, 300, 300, 1_000))
        self.peers = choice((1, 2, 4, 8))
        self.functions = [b"a", b"b", b"c", b"d"][: choice((1, 1, 2, 4))]
        self.uniques = choice(([b""], [b"", b"1"], [b"", b"-", b"1", b"2", b"3"], [b"1"]))
        self.bad = chance() < 0.2
        self.workloads = [b"", b"x", b"y", b"bad"] if self.bad else [b"x", b"y"]
        kinds = choice(("all", "all", "background", "plain"))
        self.submissions = {
            "all": SUBMISSIONS,
            "background": [kind for kind in SUBMISSIONS if kind[2]],
            "plain": [kind for kind in SUBMISSIONS if kind[0] is PacketType.SUBMIT_JOB_BG],
        }[kinds]
        self.retries = choice((0, 1, 2, 3, 3))
        self.order = choice((FunctionOrder.FAIR, FunctionOrder.FAIR, *FunctionOrder))
        self.wakeup = choice((1, 1, 1, 0, 2))
        self.time_limits = choice((0.0, 0.0, 0.5))
        self.cancelled_limit = choice((1, 1_000))
        self.ended_limit = choice((1, 3, 1_000))
        self.submit_limit = choice((2.0, 5.0, 10.0))
        self.lease = LEASE
        self.backlog = choice((2**28, 2**28, 3_000))
        self.batch = choice((1, 3, MANY, MANY))
        self.claim = choice((1, 3, MANY))
        self.window = choice((1, 2, 5, MANY))
        self.window_bytes = choice((2_000, 2**26, 2**26, 2**26))
        self.counted = choice((1.0, 0.5, 0.1))
        self.questions = choice((2, MANY, MANY))
        self.compact_at = choice((4, MANY))
        self.freed_at_once = choice((1, 3, 1_000))
        self.pauses = choice(((0.05, 0.2, 1.0), (0.2, 1.0, 2.0), (1.0, 3.0, 6.0)))
        self.troubles = choice(((0.0,), (0.0,), (0.0, 0.3), (0.0, 0.0, 0.3, 0.95)))
        self.limits = chance() < 0.2
        self.operator = chance() < 0.3

        def sometimes(weight: float) -> float:
            return weight if chance() < 0.4 else 0.0

        self.stored = {
            World.insert_row: choice((0, 2, 6)),
            World.crash: sometimes(0.6),
            World.stop: sometimes(0.4),
            World.pause: sometimes(1.0 if several else 0.3),
            World.replace: sometimes(0.3),
            World.hang: sometimes(0.6),
            World.change_trouble: 1.0 if len(self.troubles) > 1 else 0.0,
            World.database_clock_jumps: sometimes(0.3) if chance() < 0.3 else 0.0,
        }
        self.limited: dict[bytes, Limit] = {}
        self.limits_change = 0.0
        if chance() < 0.3:
            self.workloads = [*self.workloads, b'{"limit":"k"}', b'{"limit":"l"}']
            self.limits_change = sometimes(0.5)
            for function in self.functions[: choice((1, 1, 2))]:
                self.limited[function] = self.some_limit(dice)
        self.clock_jumps = sometimes(0.5)
        self.leave = choice((1.5, 1.5, 6.0))
        self.give_back = choice((0.0, 0.0, 3.0))
        self.waits = choice((0.0, 0.5, 1.0))

    def some_limit(self, dice: random.Random) -> Limit:
        rate, concurrency = dice.choice(((None, 1), (None, 2), (1, None), (3, None), (2, 1), (5, 2)))
        return Limit(rate, dice.choice((1.0, 4.0)), concurrency, dice.random() < 0.3)


class World:
    """Everything random, what happened, and what was promised."""

    def __init__(self, seed: int, *, trace: list[str] | None = None) -> None:
        self.seed = seed
        several = bool(seed % 2)
        self.dice = dice = random.Random(seed)
        self.random = dice.random
        self.trace = trace
        self.shape = shape = Shape(dice, several=several)
        self.several = several
        core.ENDED_LIMIT = shape.ended_limit
        core.CANCELLED_LIMIT = shape.cancelled_limit
        journal.MAX_BATCH = shape.batch
        journal.CLAIM_LIMIT = shape.claim
        window.LEAST_SHARE = 700
        window.MAX_QUESTIONS = shape.questions
        journal.COMPACT_AT = shape.compact_at
        self.events = 0
        self.clock = 1000.0
        self.jumps: dict[str, float] = {}
        """How far the wall clock of a server's machine is from right."""
        self.trouble = 0.0
        self.hanging = False
        self.counted = shape.counted
        """How often a claim counts what it leaves."""
        self.cancelled_at_door: dict[bytes, None] = {}
        self.epochs = 0
        self.connections = 0
        self.results = 0
        self.database = Database()
        self.database.now = self.clock
        self.database.limits = dict(shape.limited)
        self.limits_changed = False
        self.begun: dict[tuple[bytes, bytes], list[float]] = {}
        """{(function, key): when jobs of limited functions began}"""
        self.servers: list[Server] = []
        self.awake: list[Server] = []
        self.down: list[str] = []
        self.names = [f"s{number}" for number in range(1, shape.servers + 1)]

        self.promised: dict[bytes, None] = {}
        """Handles that somebody was told of in the background."""
        self.handed: dict[bytes, int] = {}
        self.runners: dict[bytes, Server] = {}
        """Who handed a job out last."""
        self.started: dict[bytes, int] = {}
        """The number of the last attempt that the store has heard of."""
        self.decisions: dict[bytes, list[tuple[Server, str, bytes, int, bytes]]] = {}
        """How a job ended: says who, outcome, data, attempt, worker."""
        self.fruitless: dict[bytes, dict[int, Server]] = {}
        """{handle: {number of an attempt that came to nothing: who says so}}"""
        self.disowned: dict[bytes, None] = {}
        self.late: dict[bytes, Server] = {}
        """Submissions that were refused, though the store may have them."""
        self.kept_late: set[bytes] = set()
        """Jobs that may have run before they were kept, since their unique was another's at first: what they
        did before then is in no record."""
        self.escaped: dict[bytes, None] = {}
        """Those of them that another server claimed before they were undone."""
        self.broken: list[tuple[bytes, int]] = []
        """Jobs, and which attempt it was, of workers that lost their connection."""
        self.due: dict[bytes, float] = {}
        """Before when a job must not run."""
        self.fifo: dict[tuple[bytes, int], dict[bytes, tuple[int, int]]] = {}
        """{(function, priority): {handle: (submitted at, acknowledged at), as numbers of events}}."""
        self.database_jumped = False
        self._held_lease = True

        self.tables = {mood: self._table(sleepy=mood) for mood in (False, True)}
        self.table = self.tables[False]
        for name in self.names:
            self.start(name)

    def _table(self, *, sleepy: bool) -> list[tuple[int, Any]]:
        shape = self.shape
        connections: dict[Any, float] = {
            Server.submit: 2 if sleepy else 18,
            Server.grab: 20 if sleepy else 22,
            Server.work: 22,
            Server.sleep: 30 if sleepy else 8,
            Server.ask: 5,
            Server.give_back: shape.give_back,
            Server.resume: shape.give_back * 3,
            Server.offer: 8,
            Server.withdraw: shape.leave / 2,
            Server.leave: shape.leave,
        }
        servers: dict[Any, float] = {
            Server.connect: 8,
            Server.tick: 5,
            Server.cancel: 1 if shape.operator else 0,
            Server.limit: 1 if shape.limits else 0,
            Server.end_turn: 12 if shape.limited else 0,
        }
        world: dict[Any, float] = {
            World.pass_time: 6,
            World.change_mood: 0.6,
            World.change_limits: shape.limits_change,
            World.clock_jumps: shape.clock_jumps,
        }
        if shape.durable:
            servers[Server.write] = 30
            world |= shape.stored
            world[World.start_again] = 3
        table: list[tuple[int, Any]] = []
        for kind, weights in enumerate((connections, servers, world)):
            for action, weight in weights.items():
                table += [(kind, action)] * round(weight * 10)
        return table

    # Time.

    def wall(self, name: str) -> float:
        return WALL + self.clock + self.jumps.get(name, 0.0)

    def advance(self, seconds: float) -> None:
        self.clock += seconds
        self.database.now += seconds

    def next_epoch(self) -> int:
        self.epochs += 1
        return self.epochs

    # What happens to the world.

    def step(self) -> None:
        kind, action = self.table[int(self.random() * len(self.table))]
        if kind == 2:
            self.events += 1
            action(self)
            return
        awake = self.awake
        if not awake:
            self.start_again()
            return
        server = awake[int(self.random() * len(awake))] if len(awake) > 1 else awake[0]
        server.look_at_clock()
        if kind == 1:
            self.events += 1
            action(server)
            if server.lost:
                self.end_process(server, "has lost its lease")
            return
        peers = server.peers
        if peers:
            action(server, peers[int(self.random() * len(peers))])
        else:
            server.connect()

    def pass_time(self) -> None:
        seconds = self.dice.choice(self.shape.pauses)
        self.advance(seconds)
        if self.trace is not None:
            self.note(f"{seconds:g} s pass")

    def change_mood(self) -> None:
        self.table = self.tables[self.random() < 0.3]

    def change_trouble(self) -> None:
        self.trouble = self.dice.choice(self.shape.troubles)
        if self.trace is not None:
            self.note(f"{self.trouble:.0%} of all transactions fail")

    def hang(self) -> None:
        self.hanging = not self.hanging
        if self.trace is not None:
            self.note("the store hangs" if self.hanging else "the store answers again")

    def clock_jumps(self) -> None:
        name = self.dice.choice(self.names)
        self.jumps[name] = self.dice.choice((0.0, 3.0, 30.0, 3600.0, -3.0, -30.0, -3600.0))
        if self.trace is not None:
            self.note(f"the clock of {name} is wrong by {self.jumps[name]:g} s")

    def database_clock_jumps(self) -> None:
        seconds = self.dice.choice((5.0, 20.0, 3600.0, -5.0, -20.0))
        self.database.now += seconds
        self.database_jumped = True
        if self.trace is not None:
            self.note(f"the database's clock jumps by {seconds:g} s")

    def insert_row(self) -> None:
        """The database door: a committed row is a promise by itself."""
        choice = self.dice.choice
        shape = self.shape
        function, unique = choice(shape.functions), choice(shape.uniques)
        if key_of(function, unique, b"row") in self.database.keys:
            return  # the table has one live row for each unique
        delay = choice((0.0, 0.0, 0.0, 2.0, 7.0))
        row = Row(
            function,
            unique,
            b"row",
            choice((HIGH, NORMAL, NORMAL, LOW)),
            run_after=WALL + self.clock + delay if delay else 0.0,
            later=bool(delay),
            max_attempts=choice((None, None, 1, 2, 4)),
            timeout=choice((None, None, 2)),
            limit_key=choice((None, b"k", b"l")) if shape.limited else None,
        )
        row.door = True
        self.database.insert(row)
        if self.trace is not None:
            self.note(
                f"a view inserts row {row.id} of {function!r}, unique {unique!r}, priority {row.priority}"
            )
        awake = self.awake
        if awake and self.random() < 0.5:
            awake[int(self.random() * len(awake))].core.claim_wanted = True

    def change_limits(self) -> None:
        """An operator edits a limit, makes one, or lifts it."""
        function = self.dice.choice(self.shape.functions)
        limits = dict(self.database.limits)
        limits.pop(function, None)
        if self.random() < 0.7:
            limits[function] = self.shape.some_limit(self.dice)
        self.database.limits = limits
        self.limits_changed = True
        self.note(f"the limits are {limits}")
        if not self.shape.durable:
            for server in self.servers:
                server.look_at_clock()
                server.core.limits.learn(limits)
                server.hear()

    def start(self, name: str) -> None:
        """A process begins, the first of its name, the next, or one that takes its place."""
        if not self.shape.durable:
            server = Server(self, name, None)
            server.core.limits.learn(self.database.limits)
            self._add(server)
            return
        store = SimulatedStore(
            self.database,
            name,
            clock=lambda: self.clock,
            wall=lambda: self.wall(name),
            fault=self._fault,
            is_bad=self._is_bad if self.shape.bad else lambda entry: False,
            lease=self.shape.lease,
            freed_at_once=self.shape.freed_at_once,
            is_counted=lambda: self.random() < self.counted,
        )
        try:
            store.take_lease()
            interrupted = store.resume()
        except StoreError as error:
            if self.trace is not None:
                self.note(f"{name} cannot start: {error}")
            if name not in self.down:
                self.down.append(name)
            return
        if self.trace is not None:
            self.note(f"{name} starts, epoch {store.epoch}")
        server = Server(self, name, store)
        server.core.limits.learn(self.database.limits)
        self._add(server)
        server.core.adopt(interrupted)

    def _add(self, server: Server) -> None:
        self.servers.append(server)
        self.awake.append(server)
        if server.name in self.down:
            self.down.remove(server.name)

    def start_again(self) -> None:
        if self.down:
            self.start(self.down[0])
        elif self.servers and self.random() < 0.3:
            for server in self.servers:
                if server.paused:
                    self.resume(server)
                    break

    def end_process(self, server: Server, how: str) -> None:
        """It is gone with all that it knew; its connections end."""
        if self.trace is not None:
            self.note(f"{server.label} {how}")
        self.servers.remove(server)
        self.broken += [(job.handle, job.attempts) for job in server.jobs.values() if job.worker is not None]
        for waiting in self.fifo.values():
            for handle in [handle for handle, (_, at) in waiting.items() if not at]:
                del waiting[handle]
        if server in self.awake:
            self.awake.remove(server)
        if not any(other.name == server.name for other in self.servers) and server.name not in self.down:
            self.down.append(server.name)

    def crash(self) -> None:
        """A process ends between two instructions; what is in the store is all that is left of it."""
        if not self.servers:
            return
        server = self.dice.choice(self.servers)
        if server.batch is not None and not server.performed and self.random() < 0.5:
            # Its last transaction reached the database.
            server.perform()
        self.end_process(server, "is killed")

    def stop(self) -> None:
        """A process ends by itself: it writes what is left, for as long as that may take."""
        if not self.awake:
            return
        server = self.dice.choice(self.awake)
        server.look_at_clock()
        server.turn()
        server.journal.hurry()
        for _ in range(20):
            if server.lost or (server.journal.idle and server.batch is None) or self.hanging:
                break
            server.write()
        server.hear()
        if server.store is not None:
            server.store.close()
        self.end_process(server, "stops")

    def pause(self) -> None:
        """A process stands still, or goes on."""
        if not self.servers:
            return
        server = self.dice.choice(self.servers)
        if server.paused:
            self.resume(server)
            return
        server.paused = True
        self.awake.remove(server)
        if self.trace is not None:
            self.note(f"{server.label} stands still")
        if self.random() < 0.5:
            # Long enough to lose its lease, if anybody looks.
            for _ in range(4):
                self.advance(self.shape.lease / 3)
                for other in self.awake:
                    other.look_at_clock()
                    other.tick()
                    for _ in range(4):
                        other.write()
                        self.events += 1
                for other in [other for other in self.awake if other.lost]:
                    self.end_process(other, "has lost its lease")

    def resume(self, server: Server) -> None:
        server.paused = False
        self.awake.append(server)
        if self.trace is not None:
            self.note(f"{server.label} goes on")

    def replace(self) -> None:
        """Somebody starts a second process of the same name."""
        if len(self.servers) < 4:
            self.start(self.dice.choice(self.names))

    def _fault(self, place: str) -> None:
        if self.trouble and self.random() < self.trouble:
            if place == "before":
                raise StoreError("nothing was written")
            raise StoreError("it was written, but who knows")

    def _is_bad(self, entry: Entry) -> bool:
        kind = type(entry)
        if kind is JobQueued:
            return entry.workload == b"bad"
        if kind is JobFinished:
            return entry.data.startswith(b"unstorable")
        return kind is JobKept and entry.unique == b"3"

    def some_result(self) -> bytes:
        """No two are alike, so that a record tells whose result it has."""
        self.results += 1
        if self.shape.bad and self.random() < 0.2:
            return b"unstorable %d" % self.results
        return b"result %d" % self.results

    # What was promised.

    def holds(self, server: Server) -> bool:
        """Whether the server's lease is its own."""
        return self.database.leases[server.name].epoch == server.epoch

    def performing(self, server: Server, batch: Batch) -> None:
        assert server.store is not None
        server.store.taken = 0
        for entry in batch.entries if self.late else ():
            if type(entry) is JobFinished and entry.handle in self.late:
                self._note_escape(server, entry.handle)
        self._held_lease = self.holds(server)

    def performed(self, server: Server, batch: Batch) -> None:
        if self.trace is not None:
            self.note(f"{server.label} store: {batch.error or 'done'}" + _told(batch))
        for entry in batch.entries:
            if type(entry) is JobRequeued and not entry.counts and entry.handle in self.started:
                self.started[entry.handle] = min(self.started[entry.handle], entry.attempt - 1)
        if not self._held_lease:
            if batch.written and batch.entries:
                raise Broken(f"{server.label} wrote, though its lease is another's")
            assert server.store is not None
            promise(not server.store.taken, f"{server.label} claimed, though its lease is another's")
        # Operators come after what is written, in the same trip.
        cancelled = {q.handle for q in batch.questions if batch.replies.get(q.number) is True}
        for index, other in batch.refused.items():
            if type(other) is Joined and other.handle not in cancelled:
                entry = batch.entries[index]
                assert isinstance(entry, JobQueued)
                row = self.database.by_handle[other.handle]
                promise(
                    row.id in self.database.live, f"{entry.handle!r} joins {other.handle!r}, which has ended"
                )
                promise(
                    row.wanted == key_of(entry.function, entry.unique, entry.workload),
                    "joined another unique",
                )
        promise(not self.database.rewritten, f"the outcomes of {self.database.rewritten} were written over")

    def committed(self, server: Server, entry: Entry) -> None:
        kind = type(entry)
        if kind is JobQueued:
            promise(entry.handle in self.database.by_handle, f"{entry.handle!r} is not in the store")
        elif type(entry) is JobRequeued and not entry.counts:
            self.started[entry.handle] = entry.attempt - 1
        elif kind is JobStarted and entry.handle in self.database.by_handle:
            self.started[entry.handle] = entry.attempts

    def acknowledged(self, server: Server, handle: bytes) -> None:
        row = self.database.by_handle.get(handle)
        promise(row is not None, f"{handle!r} is acknowledged and not in the store")
        assert row is not None
        promise(row.background, f"{handle!r} is acknowledged and its record says foreground")
        self.promised[handle] = None
        waiting = self.fifo.get((row.function, row.priority))
        if waiting is not None and handle in waiting:
            waiting[handle] = waiting[handle][0], self.events

    def refused(self, server: Server, entry: JobQueued | JobKept, reason: str) -> None:
        self.disowned[entry.handle] = None
        self.out_of_line(entry.handle)
        self.late[entry.handle] = server
        if type(entry) is JobQueued and has_key(entry.unique, entry.workload):
            # Others may have joined it: if it was written all the same, it runs.
            self.escaped[entry.handle] = None
        self._note_escape(server, entry.handle)
        job = server.jobs.get(entry.handle)
        match reason:
            case "The job could not be stored":
                # What was refused too late has a row, which was cancelled: its handle cannot be kept again.
                cause: object = self._is_bad(entry) or entry.handle in self.database.by_handle
            case "The store is out of reach":
                awaits = job is not None and job.awaited is entry
                waited = [slot.at for slot in (job.slots or () if job is not None and awaits else ())]
                cause = not waited or self.clock - min(waited) >= self.shape.submit_limit - 1e-6
            case "Too much waits to be stored":
                cause = self.shape.backlog == 3_000
            case _:
                cause = not self.holds(server)
        promise(cause, f"{entry.handle!r} was refused for nothing: {reason}")

    def _note_escape(self, server: Server, handle: bytes) -> None:
        """Is a submission that its server refused, or undoes, another server's by now?"""
        row = self.database.by_handle.get(handle)
        if row is not None and server.store is not None and row.server not in (None, server.store.lease_id):
            self.escaped[handle] = None

    def adopted(self, server: Server, stored: StoredJob) -> None:
        handle = stored.handle
        row = self.database.by_handle[handle]
        late = self.late.get(handle)
        if (late is not None and late is not server) or handle in self.handed:
            self.escaped[handle] = None
        promise(
            handle not in server.refused or handle in self.escaped, f"{handle!r} was refused and comes back"
        )
        for other in self.servers if self.holds(server) else ():
            held = other.jobs.get(handle)
            if other is not server and held is not None and held.recorded and self.holds(other):
                if held.state == "pending":
                    continue  # laid at the door, which it does not know yet
                raise Broken(f"{handle!r} is adopted by {server.label} and {other.label} has it")
        handed = self.handed.get(handle, 0)
        told = self.started.get(handle, 0)
        promise(
            told <= stored.attempts <= handed or not self.holds(server),
            f"{handle!r} comes with {stored.attempts} attempts; it had {handed}, of which {told} are written",
        )
        promise(stored.max_attempts == row.max_attempts, "a job's own number of attempts is another")

    def check_limit(self, server: Server, job: ModelJob) -> None:
        """No more than are allowed run, and began within the period, of all servers together."""
        limit = self.database.limits.get(job.function)
        if limit is None or self.limits_changed or not (server.store is None or self.holds(server)):
            return
        key = server.limit_key_of(job)
        if limit.concurrency is not None:
            running = [
                other.handle
                for each in self.servers
                if each.store is None or self.holds(each)
                for other in each.jobs.values()
                if other.worker is not None
                and not other.resumed
                and other.function == job.function
                and each.limit_key_of(other) == key
            ]
            promise(len(running) <= limit.concurrency, f"{running} run at once, and {limit} are allowed")
        begun = self.begun.setdefault((job.function, key), [])
        begun.append(self.clock)
        if limit.rate is not None and len(begun) > limit.rate and not self.database_jumped:
            since = self.clock - begun[-1 - limit.rate]
            promise(
                since >= limit.period - 1e-6, f"{limit.rate + 1} began within {since:g} s, allowed is {limit}"
            )

    def handed_out(self, server: Server, job: ModelJob, *, resumed: bool = False) -> None:
        if not resumed and job.function in server.limited:
            self.check_limit(server, job)
        if server.store is None:
            return
        handle = job.handle
        if not resumed:
            self.handed[handle] = self.handed.get(handle, 0) + 1
            self.check_order(server, job)
        promise(handle not in server.refused or handle in self.escaped, f"{handle!r} was refused and runs")
        if not job.background:
            return
        row = self.database.by_handle.get(handle)
        if job.slots is None and job.recorded:
            promise(row is not None, f"{handle!r} runs and is not in the store")
        if not self.shape.clock_jumps:
            # One that was replaced cannot know what its successor put off, nor can it write that it ran.
            put_off = row.run_after if row is not None and self.holds(server) else 0.0
            due = max(self.due.get(handle, 0.0), put_off)
            promise(due <= server.core.now, f"{handle!r} runs before its time")
        lease = self.database.leases[server.name]
        if lease.taken_over >= server.epoch:
            promise(
                self.database_jumped or not job.recorded,
                f"{server.label} handed {handle!r} out, though its jobs were taken over",
            )
        runner = self.runners.get(handle)
        if not self.holds(server):
            return  # it has been replaced, and does not know yet
        if runner is not None and runner is not server and runner in self.servers and self.holds(runner):
            running = runner.jobs.get(handle)
            if running is not None and running.worker is not None:
                raise Broken(f"{handle!r} runs at {runner.label} and at {server.label}")
        self.runners[handle] = server

    def submitted(self, server: Server, job: ModelJob) -> None:
        """A background job was made of a submission, and is not yet written."""
        if job.due:
            self.due[job.handle] = job.due
        if not self.several and not job.due:
            waiting = self.fifo.setdefault((job.function, job.priority), {})
            waiting[job.handle] = self.events, 0

    def check_order(self, server: Server, job: ModelJob) -> None:
        """Of a function and priority, what was acknowledged before another was submitted goes first."""
        waiting = self.fifo.get((job.function, job.priority))
        if waiting is None or job.handle not in waiting:
            return
        if job.function in server.limited or self.limits_changed:
            return  # its keys take turns, which the model looks at
        row = self.database.by_handle.get(job.handle)
        if row is not None and row.id in self.database.asked_for:
            del waiting[job.handle]
            return
        submitted, _ = waiting[job.handle]
        for handle, (_, acknowledged) in waiting.items():
            if handle == job.handle:
                break
            if acknowledged and acknowledged < submitted:
                raise Broken(f"{job.handle!r} overtakes {handle!r}")
        del waiting[job.handle]

    def out_of_line(self, handle: bytes) -> None:
        """Nobody need wait for it any more, nor it for others."""
        for waiting in self.fifo.values():
            waiting.pop(handle, None)

    def decided(self, server: Server, job: ModelJob, outcome: Outcome, data: bytes) -> None:
        worker = b"w%d" % job.worker.number if job.worker is not None else b""
        if job.worker is None:
            self.out_of_line(job.handle)
        self.decisions.setdefault(job.handle, []).append((server, outcome.value, data, job.attempts, worker))

    def came_to_nothing(self, server: Server, job: ModelJob) -> None:
        # A job that is to be kept, but has no record yet, has none of its attempts either.
        if job.recorded and job.handle in self.database.by_handle:
            self.fruitless.setdefault(job.handle, {})[job.attempts] = server

    # The end.

    def run(self) -> None:
        for _ in range(self.shape.steps):
            self.step()
            if self.events % 40 == 0:
                for server in self.awake:
                    server.check_state()
        self.quiet()

    def quiet(self) -> None:
        """Everything works again, and workers take all that there is: every promise is kept."""
        self.note("everything works again")
        self.trouble = 0.0
        self.hanging = False
        self.counted = 1.0
        self.jumps.clear()
        for server in self.servers:
            if server.paused:
                self.resume(server)
        self._settle()
        helpers: dict[Server, ModelPeer] = {}
        for round in range(QUIET_ROUNDS):
            while self.down:
                self.start(self.down[0])
            if self._is_over():
                break
            for server in list(self.awake):
                self._serve(server, helpers)
            self.advance(min(0.5 * 1.3**round, 100.0))
        else:
            left = [row.handle or row.id for row in self.database.live.values()]
            raise Broken(f"it does not end: {left} wait, or {[len(s.jobs) for s in self.servers]} jobs")
        self.check_end()

    def _settle(self) -> None:
        """Nobody does anything for some seconds: then every server knows how much waits, and says so."""
        for _ in range(4):
            while self.down:
                self.start(self.down[0])
            for server in list(self.awake):
                self._serve(server, None)
            self.advance(1.1)
        if not self.awake:
            return
        server = self.awake[-1]
        for function in server.core.functions.values():
            name = function.name
            here = sum(job.function == name and job.state != "pending" for job in server.jobs.values())
            rows = [row for row in self.database.live.values() if row.server is None and row.function == name]
            promise(
                function.total == here + len(rows),
                f"{server.label} counts {function.total} of {name!r}; {here} are here, {len(rows)} away",
            )

    def _is_over(self) -> bool:
        if self.database.live:
            return False
        return all(
            not (server.jobs or server.open)
            and (server.store is None or (server.journal.idle and not server.core.entries))
            for server in self.servers
        )

    def _serve(self, server: Server, helpers: dict[Server, ModelPeer] | None) -> None:
        """A server's part of a second in which all goes well; without helpers nobody does the work."""
        server.look_at_clock()
        self.events += 1
        server.tick()
        if server.store is not None:
            for _ in range(3_000):
                if not server.write():
                    break
                self.events += 1
                if server.lost:
                    self.end_process(server, "has lost its lease")
                    return
        if helpers is None:
            return
        for peer in list(server.peers):
            for job in server.held_by(peer):
                self.events += 1
                server.report(peer, job, 0.5)
        helper = helpers.get(server)
        if helper is None:
            server.shape.peers += 1
            # This one grabs all that it runs.
            server.shape.waits = 0.0
            server.connect()
            helper = helpers[server] = server.peers[-1]
            for function in server.functions:
                helper.abilities.append(function)
                server.say(helper, PacketType.CAN_DO, function)
        for _ in range(100):
            while not helper.line and server.candidates(helper):
                self.events += 2
                server.grab(helper)
                for job in server.held_by(helper):
                    server.report(helper, job, 0.5)
            if helper.line or not any(map(server.count_blocked, server.functions)):
                break
            # For who sleeps there may be permits.
            server.sleep(helper)
            server.turn()
            for _ in range(10):
                if server.store is None or not server.write() or server.lost:
                    break
                self.events += 1
            if server.lost:
                self.end_process(server, "has lost its lease")
                return
            if not server.candidates(helper):
                break

    def check_end(self) -> None:
        for server in self.servers:
            server.check_state()
            promise(not server.core.ready, "something is ready")
            for peer in server.peers:
                promise(not peer.line, f"peer {peer.number} was never answered")
        database = self.database
        for handle in self.promised:
            row = database.by_handle[handle]
            if row.status == "CANCELLED":
                self._check_cancelled(row)
            else:
                promise(self.handed.get(handle), f"{handle!r} was acknowledged and never ran")
        for row in database.rows:
            self._check_record(row)

    def _check_cancelled(self, row: Row) -> None:
        assert row.handle is not None
        decisions = self.decisions.get(row.handle, ())
        if row.handle in self.cancelled_at_door:
            return
        promise(
            any(decision[1] == "CANCELLED" for decision in decisions),
            f"{row.handle!r} was acknowledged, and ended without a reason: {row.reason}",
        )

    def _check_record(self, row: Row) -> None:
        """It tells the truth of the job's last attempt."""
        handle = row.handle
        promise(handle is not None, "a row was never claimed")
        assert handle is not None
        if handle in self.disowned:
            late = self.late[handle]
            assert late.store is not None
            if late in self.servers and handle in late.refused and handle not in self.escaped:
                # Unless another server was quicker to claim it at the door.
                promise(
                    row.status == "CANCELLED", f"{handle!r} was refused, and its record says {row.status}"
                )
            return
        if not row.background and row.reason.startswith("The job server ended"):
            return
        if handle in self.cancelled_at_door and row.status == "CANCELLED":
            return
        for _, outcome, data, attempts, worker in reversed(self.decisions.get(handle, ())):
            if data.startswith(b"unstorable"):
                outcome, data = "FAILED", b""
            if (row.status, row.data) != (outcome, data):
                continue
            if handle in self.kept_late:
                break
            if row.attempts == attempts and (not worker or row.worker == worker):
                break
        else:
            told = row.status, row.data, row.attempts, row.worker
            raise Broken(f"the record of {handle!r} lies: {told}, and it was {self.decisions.get(handle)}")
        for number, server in self.fruitless.get(handle, {}).items():
            if server in self.servers and handle not in self.kept_late:
                promise(number in row.kept_attempts, f"attempt {number} of {handle!r} was forgotten")
        promise(len(set(row.kept_attempts)) == len(row.kept_attempts), f"{handle!r} has an attempt twice")

    # What is told when it fails.

    def note(self, line: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.clock - 1000:9.2f}  {line}")

    def note_said(
        self, server: Server, peer: ModelPeer, kind: PacketType, arguments: tuple[bytes, ...]
    ) -> None:
        told = " ".join(argument.decode() or "''" for argument in arguments)
        self.note(f"{server.label} peer {peer.number} < {kind.name} {told}")

    def note_heard(self, server: Server, peer: ModelPeer, packets: list[bytes]) -> None:
        for packet in packets:
            if packet[:1] != b"\0":
                self.note(f"{server.label} operator     > {packet!r}")
                continue
            kind = PacketType(int.from_bytes(packet[4:8], "big"))
            told = " ".join(argument.decode() or "''" for argument in packet[12:].split(b"\0"))
            self.note(f"{server.label} peer {peer.number}     > {kind.name} {told}")

    def note_batch(self, server: Server, batch: Batch) -> None:
        told = [
            f"{type(entry).__name__} {entry.handle.decode()}"
            + (" at the door" if getattr(entry, "unclaimed", False) else "")
            for entry in batch.entries
        ]
        again = " again" if batch.again else ""
        asks = " and claims" if batch.claim else ""
        self.note(f"{server.label} writes{again}{asks}: {', '.join(told) or 'nothing'}")


def _told(batch: Batch) -> str:
    told = ""
    for index, reason in batch.refused.items():
        told += f"; {batch.entries[index].handle.decode()}: {reason}"
    for question in batch.questions:
        told += f"; {question.topic.name} {question.handle.decode()}: {batch.replies.get(question.number)}"
    if batch.claimed is not None and batch.claimed.jobs:
        told += f"; claimed {', '.join(job.handle.decode() for job in batch.claimed.jobs)}"
    if batch.claimed is not None and batch.claimed.left:
        told += f"; left {batch.claimed.left}"
    return told


__all__ = ["Broken", "Callable", "LeaseLost", "Shape", "World"]
