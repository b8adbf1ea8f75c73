"""
A fault at every database call of a scenario: what was promised is kept.

The real core, journal and store on the real database, one after the other in
one thread; the clock is ours. The scenario is played once to count its calls,
then once for each call and each kind of fault. DESIGN section 4.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import pytest
from django.db import OperationalError, connection, connections

from django_gearman.exceptions import StoreError
from django_gearman.models import JobGroup, JobRecord, ServerLease
from django_gearman.protocol.packets import PacketType
from django_gearman.server.core import JobServer
from django_gearman.server.jobs import NORMAL
from django_gearman.server.journal import Journal
from django_gearman.server.options import ServerOptions
from django_gearman.store import DatabaseStore
from django_gearman.store.database import Database

from .server.harness import Caller, Wire

P = PacketType
Status = JobRecord.Status

CALL, COMMIT, CONNECT = "call", "commit", "connect"


class Crash(BaseException):
    """The server's process is killed."""


class Faults:
    """The test's database connection, with a fault where it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.connection: Any = connections["default"]
        self.count = 0
        self.points: list[str] = []
        """What each call was, since ``arm``."""
        self._on = False
        self._do: Callable[[Faults, str, Callable[[], Any]], Any] | None = None
        self._first = self._last = 0
        create_cursor, commit = self.connection.create_cursor, self.connection._commit
        connect = self.connection.get_new_connection
        monkeypatch.setattr(
            self.connection, "create_cursor", lambda name=None: FaultyCursor(create_cursor(name), self)
        )
        monkeypatch.setattr(self.connection, "_commit", lambda: self.point(COMMIT, commit))
        # No power is lost here, and thousands of commits need not be synced.
        prepare = Database._prepare
        monkeypatch.setattr(
            Database, "_prepare", lambda *arguments: (prepare(*arguments), self._sync_no_more())
        )
        monkeypatch.setattr(
            self.connection, "get_new_connection", lambda params: self.point(CONNECT, lambda: connect(params))
        )

    def _sync_no_more(self) -> None:
        statements = {"sqlite": "PRAGMA synchronous=OFF", "postgresql": "SET synchronous_commit TO off"}
        statement = statements.get(self.connection.vendor)
        if statement:
            self.connection.connection.execute(statement)

    def arm(self, kind: Kind | None, number: int) -> None:
        """Let the ``number``-th call from now on, from 0, meet a fault."""
        self.count = 0
        self.points = []
        self._do = kind and kind.do
        self._first, self._last = number, number + (kind.length if kind else 0)

    def end(self) -> None:
        """No more faults."""
        self._do = None

    @property
    def fired(self) -> bool:
        return self.count > self._first

    @property
    def firing(self) -> bool:
        """Whether more calls will meet a fault."""
        return self._do is not None and self._first < self.count < self._last

    @contextmanager
    def server_at_work(self) -> Iterator[None]:
        """Only what the server does is counted and meets faults."""
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def point(self, what: str, go_on: Callable[[], Any]) -> Any:
        if not self._on:
            return go_on()
        number = self.count
        self.count += 1
        self.points.append(what)
        if self._do is None or not self._first <= number < self._last:
            return go_on()
        return self._do(self, what, go_on)

    def cut(self) -> None:
        """The connection is gone; the database rolls back what was not committed."""
        if self.connection.connection is not None:
            try:
                # SQLite's ends only with its last cursor, which a traceback may keep.
                self.connection.connection.rollback()
                self.connection.connection.close()
            except Exception:
                pass  # it is closed already

    def reset(self) -> None:
        """As in a new process."""
        self.cut()
        self.connection.connection = None
        self.connection.connect()


class FaultyCursor:
    """A driver's cursor whose statements may meet a fault."""

    def __init__(self, cursor: Any, faults: Faults) -> None:
        self._cursor = cursor
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._cursor, name)
        if name not in ("execute", "executemany", "copy"):
            return attribute
        return lambda *arguments: self._faults.point(CALL, lambda: attribute(*arguments))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._cursor)


class Kind(NamedTuple):
    """One way in which a call goes wrong."""

    do: Callable[[Faults, str, Callable[[], Any]], Any]
    length: int = 1
    """How many calls in a row."""
    refuses: bool = False
    """Whether good submissions may get ERROR."""
    crashes: bool = False


def error(faults: Faults, what: str, go_on: Callable[[], Any]) -> Any:
    raise OperationalError("a fault")


def error_after(faults: Faults, what: str, go_on: Callable[[], Any]) -> Any:
    if what == CALL:
        go_on()
    raise OperationalError("a fault after the statement")


def locked(faults: Faults, what: str, go_on: Callable[[], Any]) -> Any:
    # What drivers say of locks, as Django hands it on.
    text = {
        "sqlite": ("database is locked",),
        "postgresql": ("canceling statement due to lock timeout",),
        "mysql": (1205, "Lock wait timeout exceeded; try restarting transaction"),
    }
    raise OperationalError(*text[faults.connection.vendor])


def disconnect(faults: Faults, what: str, go_on: Callable[[], Any]) -> Any:
    """Every connection that is used from here has been cut; what the driver says is its affair."""
    faults.cut()
    if what == CONNECT:
        raise OperationalError("the database takes no connections")
    return go_on()


def lost_after(faults: Faults, what: str, go_on: Callable[[], Any]) -> Any:
    """It was done, COMMIT too, but the answer never came."""
    done = go_on()
    if what == CONNECT:
        done.close()
    faults.cut()
    raise OperationalError("server closed the connection unexpectedly")


def crash_before(faults: Faults, what: str, go_on: Callable[[], Any]) -> Any:
    raise Crash


def crash_after(faults: Faults, what: str, go_on: Callable[[], Any]) -> Any:
    done = go_on()
    if what == CONNECT:
        done.close()
    raise Crash


def lost_after_and_away(faults: Faults, what: str, go_on: Callable[[], Any]) -> Any:
    """The answer to the first call is lost, and the database is away for long."""
    if faults.count - 1 == faults._first:
        return lost_after(faults, what, go_on)
    return disconnect(faults, CONNECT, go_on)


KINDS = {
    "error": Kind(error),
    "error after": Kind(error_after),
    "locked": Kind(locked),
    "disconnect": Kind(disconnect),
    "answer lost": Kind(lost_after),
    "away for a moment": Kind(disconnect, length=6),
    "away for long": Kind(lost_after_and_away, length=25, refuses=True),
    "crash before": Kind(crash_before, crashes=True),
    "crash after": Kind(crash_after, crashes=True),
}


class Submission(NamedTuple):
    name: str
    client: Caller
    bad: bool


class World:
    """Clients and workers of one server that may be started anew, and what they were promised."""

    rounds = 3
    """How often workers come, after the scenario, until nothing is left to do."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.clock = 100.0
        self.start_time = time.time()
        self.waiting: list[Submission] = []
        """Submissions without an answer, in order."""
        self.acknowledged: set[str] = set()
        self.refused: set[str] = set()
        self.unanswered: set[str] = set()
        """Submissions whose answer a crash took."""
        self.handed_out: Counter[str] = Counter()
        self.left: set[str] = set()
        """Jobs whose worker left with them."""
        self.reported: dict[str, tuple[str, bytes]] = {}
        """{job: what its last worker reported}"""
        self.final: dict[str, tuple[Any, ...]] = {}
        """{job: its row at its end}"""
        self.start()

    # The server.

    def start(self) -> None:
        """Start the server, as often as it takes."""
        for _ in range(100):
            try:
                with self.faults.server_at_work():
                    store = DatabaseStore("default", "one")
                    epoch = store.take_lease("127.0.0.1:4730")
                    interrupted = store.resume()
            except StoreError:
                continue
            except Crash:
                self.faults.reset()
                continue
            break
        else:
            raise AssertionError("the server does not start")
        self.store = store
        self.wire = Wire(JobServer(ServerOptions(name="one", epoch=epoch, durable=True)))
        self.core.now = self.start_time + self.clock
        self.core.clock = self.clock
        self.journal = Journal(self.core)
        self.core.adopt(interrupted)
        self.waiting.clear()

    @property
    def core(self) -> JobServer:
        return self.wire.core

    def turn(self) -> None:
        """Let the journal do what it has to do now."""
        core = self.core
        core.clock = self.clock
        self.journal.ask(core.questions)
        core.questions = []
        if core.entries:
            self.journal.append(self.wire.entries(), self.clock, urgent=core.urgent, many_end=core.many_end)
            core.urgent = core.many_end = False
        batch = self.journal.next_batch(self.clock)
        if batch is not None:
            with self.faults.server_at_work():
                batch.perform(self.store)
            self.journal.done(batch, self.clock)
            assert self.journal.lease_lost is None
        self.listen()
        self.check()

    def pass_time(self, seconds: float) -> None:
        self.clock += seconds
        self.core.now += seconds
        self.core.clock = self.clock

    def settle(self) -> None:
        """Until everything is written."""
        for _ in range(200):
            self.turn()
            if self.journal.idle and not self.core.entries:
                return
            self.pass_time(1.0)
        raise AssertionError("the journal does not come to rest")

    def crashed(self) -> None:
        self.unanswered |= {each.name for each in self.waiting}
        self.faults.reset()
        self.faults.end()
        self.start()
        self.check()

    # The clients.

    def submit(
        self, *names: str, client: Caller | None = None, bad: bool = False, unique: bytes = b""
    ) -> None:
        client = client or self.wire.connect()
        for name in names:
            # Outside of the column's constraint: the database itself refuses the row.
            priority = 101 if bad else NORMAL
            self.core.submissions.submit(
                client.peer, [b"f", unique, name.encode()], priority, background=True
            )
            self.waiting.append(Submission(name, client, bad))

    def put(self, *names: str) -> None:
        """A view commits rows at the database door, and calls the server."""
        for name in names:
            JobRecord.objects.create(function="f", workload=name.encode())
            self.acknowledged.add(name)
        self.journal.claim_soon()

    def listen(self) -> None:
        """Every client hears its answers, in the order of its submissions."""
        for client in {each.client for each in self.waiting}:
            for heard in client.hears():
                if heard[0] not in (P.JOB_CREATED, P.ERROR):
                    continue
                submission = next(each for each in self.waiting if each.client is client)
                self.waiting.remove(submission)
                created = heard[0] == P.JOB_CREATED
                (self.acknowledged if created else self.refused).add(submission.name)
                assert not (created and submission.bad), f"{submission.name} was acknowledged"

    # The workers.

    def work(self, *, limit: int = 1000, leave: bool = False, fail: bool = False) -> None:
        """Run up to so many jobs; ``leave`` with the last in hand."""
        worker = self.wire.connect()
        worker(P.CAN_DO, b"f")
        for _ in range(limit):
            (heard,) = worker(P.GRAB_JOB)
            if heard[0] != P.JOB_ASSIGN:
                break
            name = heard[3].decode()
            self.handed_out[name] += 1
            worker(P.WORK_STATUS, heard[1], b"1", b"2")
            if leave:
                self.left.add(name)
                break
            data = f"{name} {self.handed_out[name]}".encode()
            worker(P.WORK_EXCEPTION if fail else P.WORK_COMPLETE, heard[1], data)
            self.reported[name] = (Status.FAILED if fail else Status.SUCCESSFUL, data)
        worker.leaves()

    # The promises.

    def rows(self) -> dict[str, JobRecord]:
        rows = list(JobRecord.objects.all())
        by_name = {bytes(row.workload).decode(): row for row in rows}
        assert len(by_name) == len(rows), "a job is there twice"
        return by_name

    def check(self) -> None:
        """What holds at every moment, for whoever looks into the database."""
        rows = self.rows()
        for name in self.acknowledged:
            assert name in rows, f"{name} was acknowledged and is not there"
        for name, row in rows.items():
            if row.is_finished:
                end = (
                    row.status,
                    row.result and bytes(row.result),
                    row.message,
                    row.finished_at,
                    row.attempts,
                )
                assert self.final.setdefault(name, end) == end, f"the outcome of {name} was changed"
                if row.status in (Status.SUCCESSFUL, Status.FAILED) and row.background:
                    told = bytes(row.result) if row.result else row.message.encode()
                    assert (row.status, told) == self.reported[name], f"the outcome of {name} is not true"

    def check_end(self, kind: Kind | None) -> None:
        """What holds when everything was run and written."""
        rows = self.rows()
        for name in self.acknowledged:
            row = rows[name]
            assert row.is_finished, f"{name} did not end: {row.status}"
            assert (row.status, bytes(row.result or b"") or row.message.encode()) == self.reported[name]
            assert row.attempts == self.handed_out[name] or (kind and kind.crashes), f"attempts of {name}"
        for name in self.refused:
            if name in rows and rows[name].unique:
                # Others may have joined it: since it was written all the same, it runs as they were told.
                assert rows[name].status in (Status.CANCELLED, Status.SUCCESSFUL), f"{name} is left behind"
                continue
            assert name not in rows or rows[name].status == Status.CANCELLED, f"{name} was refused and kept"
            assert not self.handed_out[name], f"{name} was refused and run"
        for name in self.unanswered:
            assert name not in rows or rows[name].is_finished, f"{name} is left behind"
        if kind is None or not kind.refuses:
            assert self.refused <= {"bad"}, f"good neighbours were refused: {self.refused}"
        if kind is None or not (kind.refuses or kind.crashes):
            assert self.acknowledged == {*"abcdefgu", "door 1", "door 2"}
            assert self.refused == {"bad"}
            again = {name: count for name, count in self.handed_out.items() if count > 1}
            assert again == dict.fromkeys(self.left, 2), f"ran more often than their workers left: {again}"


def submit_at_once(world: World) -> None:
    client = world.wire.connect()
    world.submit("a", client=client)
    world.submit("bad", client=client, bad=True)
    world.submit("b", "c", client=client)
    world.submit("u", unique=b"key")


def submit_foreground(world: World) -> None:
    world.wire.connect()(P.SUBMIT_JOB, b"f", b"", b"foreground")


def look_for_what_is_left_behind(world: World) -> None:
    """Rows that this server has, and does not know of, would wait for its next start."""
    for _ in range(40):
        world.pass_time(1.0)
        world.journal.claim_soon()
        world.settle()
        if not world.faults.firing:
            break
    world.pass_time(1.0)
    world.journal.claim_soon()
    world.settle()
    for row in JobRecord.objects.filter(status__in=JobRecord.LIVE, server_epoch=world.store.epoch):
        assert (row.handle or "").encode() in world.core.jobs, f"{row} is left behind"


def end_and_start(world: World) -> None:
    world.store.close()
    world.start()


SCENARIO: tuple[Callable[[World], None], ...] = (
    submit_at_once,
    World.turn,
    submit_foreground,
    lambda world: world.work(limit=1, leave=True),
    lambda world: world.put("door 1", "door 2"),
    World.turn,
    lambda world: world.work(limit=3),
    lambda world: world.submit("d"),
    World.turn,
    lambda world: world.work(limit=1, fail=True),
    lambda world: world.pass_time(1.0),
    World.turn,
    lambda world: world.work(limit=1),
    lambda world: world.submit("e", "f"),
    World.settle,
    lambda world: world.work(limit=1),
    World.settle,
    look_for_what_is_left_behind,
    end_and_start,
    lambda world: world.submit("g"),
    World.settle,
    World.work,
    World.settle,
)
"""Both doors, a bad row, hand-out, outcomes, a lost worker, a restart."""


W = TypeVar("W", bound=World)


def play(
    world_of: type[W], scenario: Sequence[Callable[[W], None]], faults: Faults, kind: Kind | None, number: int
) -> W:
    """A scenario with a fault of one kind at one of its calls, and all that is left done afterwards."""
    for model in (JobRecord, JobGroup, ServerLease):
        model.objects.all().delete()
    faults.connection.close()
    faults.arm(kind, number)
    world = world_of(faults)
    for step in scenario:
        try:
            step(world)
        except Crash:
            world.crashed()
    faults.end()
    # Rows that an outage kept at the database door, jobs that came back, and what follows them.
    for _ in range(world.rounds):
        world.pass_time(10.0)
        world.journal.claim_soon()
        world.settle()
        world.work()
        world.settle()
    world.check_end(kind)
    return world


def play_all(
    faults: Faults,
    name: str,
    play: Callable[[Faults, Kind | None, int], object],
    first: int = 0,
    step: int = 1,
) -> None:
    """A scenario with a fault of one kind at every call, or at every so many."""
    number = first
    while True:
        try:
            play(faults, KINDS[name], number)
        except BaseException as error:
            error.add_note(f"{name} at call {number}, {faults.points[number : number + 1]}")
            raise
        if not faults.fired:
            break
        number += step
    assert number > 40, "the scenario is longer"


def faulty_connection(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """For a fixture."""
    faults = Faults(monkeypatch)
    yield faults
    faults.end()
    faults.reset()
    monkeypatch.undo()
    faults.connection.close()


def play_scenario(faults: Faults, kind: Kind | None, number: int) -> World:
    return play(World, SCENARIO, faults, kind, number)


@pytest.fixture
def faults(transactional_db: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    yield from faulty_connection(monkeypatch)


def test_without_a_fault(faults: Faults) -> None:
    world = play_scenario(faults, None, 0)
    assert faults.points.count(COMMIT) > 5
    assert world.left == {"a"}


@pytest.mark.parametrize("name", KINDS)
def test_fault_at_every_call(faults: Faults, name: str) -> None:
    # Other databases take several times as long: there each call has every third kind.
    step = 1 if connection.vendor == "sqlite" else 3
    play_all(faults, name, play_scenario, first=list(KINDS).index(name) % step, step=step)
