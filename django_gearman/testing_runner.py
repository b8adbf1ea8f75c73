"""A job server and a worker without sockets, in one thread: what runs the jobs that a test has recorded."""

from __future__ import annotations

import copy
import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from asgiref.sync import async_to_sync
from django.db import DatabaseError, connections
from django.db.models import Count

from . import conf
from .attempts import attempt_assigned, pause_before_retry
from .encoding import describe_exception
from .models import JobRecord
from .protocol.packets import ATTEMPTS, RESPONSE, RETRY, PacketType, encode_request
from .protocol.reader import PacketReader
from .registry import queue_of, registry
from .server.core import JobServer
from .server.entries import Waiting
from .server.journal import Journal
from .server.options import ServerOptions
from .store import DatabaseStore
from .store.columns import AT_DOOR, READY
from .store.door import Door, DoorRow
from .worker.loop import AssignedJob


class Runner:
    """
    The core of the job server on a store, and one worker that says and hears its packets.

    All in the calling thread, on its own connection to the database: in the
    transaction of a test.
    """

    def __init__(self, using: str, raised: Mapping[str, BaseException]) -> None:
        self._using = using
        self._raised = raised
        name = "tests"
        self._store = _TestStore(using, name, queue_of=queue_of)
        epoch = self._store.take_lease("")
        self._core = JobServer(
            ServerOptions(name=name, epoch=epoch, durable=True, job_retries=conf.settings_for().job_retries)
        )
        self._journal = Journal(self._core)
        self._answers = PacketReader(RESPONSE)
        self._requests = PacketReader()
        self._set_clock()
        self._peer = self._core.connected(1, "127.0.0.1")
        client_id = f"{socket.gethostname()}:{os.getpid()}".encode()
        self.say(PacketType.SET_CLIENT_ID, client_id)
        self.say(PacketType.OPTION_REQ, ATTEMPTS)
        self._offered: set[str] = set()
        self._link: Any = _Link(self)
        self._hear()

    def run_next(self, after: int) -> str | None:
        """Make one attempt at one job with an id above; its handle, or None when nothing is to do."""
        self._store.pass_over(after)
        for name in registry.keys() - self._offered:
            self.say(PacketType.CAN_DO, name.encode())
            self._offered.add(name)
        self._set_clock()
        self._journal.claim_soon()
        self._settle()
        # What was claimed may have become due since the clock was set.
        self._set_clock()
        self._core.tick()
        assigned = self._grab()
        if assigned is None and self._end_pause(after):
            self._settle()
            assigned = self._grab()
        if assigned is None:
            return None
        self._settle()
        self._perform(assigned)
        self._settle()
        return assigned.handle.decode()

    def _end_pause(self, after: int) -> bool:
        """As if the pause before the next attempt of a job had passed; whether one was between two."""
        records = JobRecord.objects.using(self._using)
        waiting = records.filter(status=JobRecord.Status.RETRYING, server=None, pk__gt=after)
        id = waiting.order_by("run_after", "pk").values_list("pk", flat=True).first()
        if id is None:
            return False
        records.filter(pk=id).update(status=JobRecord.Status.READY)
        self._journal.claim_soon()
        return True

    def say(self, kind: PacketType, *arguments: bytes) -> None:
        """A packet of the worker."""
        self._requests.feed(encode_request(kind, *arguments))
        packet = self._requests.take()
        assert packet is not None, "encode_request makes whole packets"
        self._core.receive(self._peer, packet)

    def _set_clock(self) -> None:
        # As a server's: backwards too, when a test comes back from a time to which it travelled.
        self._core.now = time.time()
        self._core.clock = time.monotonic()

    def _hear(self) -> list[tuple[int, list[bytes]]]:
        """The packets that came for the worker."""
        output, self._peer.output = self._peer.output, []
        self._answers.feed(b"".join(output))
        heard = []
        while (packet := self._answers.take()) is not None:
            heard.append(packet)
        return heard

    def _settle(self) -> None:
        """Write what happened and take new rows, until there is neither."""
        while True:
            if self._core.entries:
                entries, self._core.entries = self._core.entries, []
                self._journal.append(entries, time.monotonic())
            batch = self._journal.next_batch(time.monotonic())
            if batch is None:
                return
            batch.perform(self._store)
            self._journal.done(batch, time.monotonic())
            if batch.error is not None:
                raise batch.error

    def _grab(self) -> AssignedJob | None:
        self.say(PacketType.GRAB_JOB_UNIQ)
        attempt, max_attempts = 1, None
        for kind, arguments in self._hear():
            if kind == PacketType.OPTION_RES and arguments[0].startswith(b"attempt "):
                numbers = arguments[0].split(b" ")
                attempt, max_attempts = int(numbers[1]), int(numbers[2]) or None
            elif kind == PacketType.JOB_ASSIGN_UNIQ:
                handle, function, unique, workload = arguments
                return AssignedJob(self._link, handle, function, unique, workload, attempt, max_attempts)
        return None

    def _perform(self, assigned: AssignedJob) -> None:
        """Run the function and report, as a worker does."""
        job = offered = registry[assigned.function.decode()]
        # Of a task, in other queues too.
        error_of = self._raised.get(job.name) or self._raised.get(job.name.partition("@")[0])
        if error_of is not None:
            job = copy.copy(offered)
            job.function = _raising(error_of)
        error: BaseException | None = None
        with _kept_transactions() as broken:
            try:
                result = attempt_assigned(job, assigned, run=_run_in_transaction)
            except KeyboardInterrupt:
                raise
            except BaseException as caught:  # whatever a job raises ends the job, not the test
                error = caught
                broken(caught)
        if error is None:
            self.say(PacketType.WORK_COMPLETE, assigned.handle, result)
            return
        pause = pause_before_retry(offered, assigned, error)
        if pause is not None:
            self.say(PacketType.OPTION_REQ, RETRY + b"%d %s" % (pause * 1000, assigned.handle))
        self.say(PacketType.WORK_EXCEPTION, assigned.handle, describe_exception(error))


class _TestStore(DatabaseStore):
    """A store for one test: what others left in its database is not taken."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._door = self._narrow_door = _TestDoor(self._db, self._lease, self._members, self._row_prefix)

    def pass_over(self, last: int) -> None:
        """Take no row up to an id, and look at those for later: a test's clock may have leapt."""
        self._narrow_door.last_passed_over = last
        self._narrow_door.look_for_due_at = 0.0

    def _limits(self) -> None:
        """A test does not wait for the next minute."""
        return None


class _TestDoor(Door):
    last_passed_over = 0

    def _rows_of(self, statement: str, parameters: list[Any]) -> list[DoorRow]:
        if " ORDER BY" in statement:
            newer = f" AND {self._db.column('id')} > %s ORDER BY"
            statement = statement.replace(" ORDER BY", newer, 1)
            parameters = [*parameters[:-1], self.last_passed_over, parameters[-1]]
        return super()._rows_of(statement, parameters)

    def count(self) -> dict[tuple[bytes, int], Waiting]:
        """As a server's, without what is passed over: for one that is more urgent the core would wait."""
        counts: dict[tuple[bytes, int], Waiting] = {}
        rows = self._db.records().filter(server=None, status__in=AT_DOOR, pk__gt=self.last_passed_over)
        each = rows.order_by().values_list("function", "priority", "status").annotate(Count("pk"))
        for function, priority, status, count in each:
            is_ready = status == READY
            key = function.encode(), priority if is_ready else 0
            ready, later = counts.get(key, (0, 0))
            counts[key] = Waiting(ready + count, later) if is_ready else Waiting(ready, later + count)
        return counts


class _Link:
    """What an ``AssignedJob`` speaks to: the connection of a real worker."""

    tells_attempts = True
    takes_logs = True
    is_copy = False

    def __init__(self, runner: Runner) -> None:
        self.report = runner.say

    def listen(self) -> None:
        """Nobody cancels while a job runs: all is in one thread."""


def _run_in_transaction(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run an ``async def`` whose queries are made here, in the test's thread and its transaction."""
    return async_to_sync(_awaited)(coroutine)


async def _awaited(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return await coroutine


def _raising(error: BaseException) -> Callable[..., None]:
    def function(*args: object, **kwargs: object) -> None:
        raise error

    return function


@contextmanager
def _kept_transactions() -> Iterator[Callable[[BaseException], None]]:
    """
    Keep the test's transactions whole, whatever the job does to its own.

    A worker's job begins outside of any transaction. In a test's, an error of the
    database would break all that follows: then what the job wrote is undone. A
    real worker would keep what was written before the error.
    """
    points: dict[str, str] = {}
    for alias in connections:
        connection = connections[alias]
        if connection.in_atomic_block and not connection.needs_rollback and (point := connection.savepoint()):
            points[alias] = point
    failures: list[BaseException] = []
    try:
        yield failures.append
    finally:
        is_broken = any(isinstance(failure, DatabaseError) for failure in failures)
        for alias, point in points.items():
            if is_broken or connections[alias].needs_rollback:
                connections[alias].needs_rollback = False
                connections[alias].savepoint_rollback(point)
            else:
                connections[alias].savepoint_commit(point)
