"""
How a job leaves the process that wants it: a row and a nudge, or a packet.

The process's clients are here, which everything uses that speaks to a job
server on a view's behalf. What a row or a packet says is worked out before, by
``Job`` and ``group``.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final, TypeAlias, TypeVar

from django.core.exceptions import SynchronousOnlyOperation
from django.core.signals import setting_changed
from django.db import IntegrityError, transaction
from django.dispatch import receiver
from django.utils.asyncio import async_unsafe

from . import conf, rows
from .client.aio import AsyncClient
from .client.core import Priority
from .client.sync import Client
from .models import JobRecord

C = TypeVar("C", Client, AsyncClient)

Acknowledged: TypeAlias = Callable[[str, str], None]
"""Called with the server that has acknowledged a job, and the handle that it gave it."""

# The clients of the process.


@cache
def client_for(alias: str = conf.DEFAULT_ALIAS) -> Client:
    """The process's client for an alias of ``settings.GEARMAN``."""
    return _made(Client, alias)


@cache
def async_client_for(alias: str = conf.DEFAULT_ALIAS) -> AsyncClient:
    """The process's client for asyncio; it has connections for each event loop."""
    return _made(AsyncClient, alias)


@async_unsafe(
    "An event loop would stand still until the job has ended - use the async twin (arun, astream, ...), "
    "a thread or sync_to_async."
)
def waiting_client() -> Client:
    """
    The process's client, for who is about to wait for a job with it.

    Raises:
        SynchronousOnlyOperation: An event loop runs in this thread.
    """
    return client_for()


class _OffTheLoop:
    """Has Django's refusal of its database where an event loop runs say what to do there."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SynchronousOnlyOperation):
            raise SynchronousOnlyOperation(
                "An event loop would stand still until the database has the job - use the async twin "
                "(aenqueue, aenqueue_many), a thread or sync_to_async."
            ) from None


off_the_loop: Final = _OffTheLoop()


def client_of(server: str) -> Client:
    """The process's client for one job server alone."""
    if server not in _clients_of:
        _clients_of[server] = _made(Client, conf.DEFAULT_ALIAS, (server,))
    return _clients_of[server]


_clients_of: dict[str, Client] = {}


def _made(client: type[C], alias: str, servers: tuple[str, ...] = ()) -> C:
    options = conf.settings_for(alias)
    return client(
        servers or options.servers,
        spread=options.spread,
        connect_timeout=options.connect_timeout,
        timeout=options.timeout,
        max_packet=options.max_packet,
        tls=conf.client_tls(options),
    )


@receiver(setting_changed)
def _forget_clients(*, setting: str, **kwargs: Any) -> None:
    if setting == "GEARMAN":
        # A connection that is left to the garbage collector makes a ResourceWarning.
        if client_for.cache_info().currsize:
            client_for().close()
        while _clients_of:
            _clients_of.popitem()[1].close()
        client_for.cache_clear()
        # Its connections end with their event loops.
        async_client_for.cache_clear()


@cache
def identity(pid: int) -> str:
    """This host and process, as a record names who submitted it."""
    return f"{socket.gethostname()[:100]}:{pid}"


# The database door: rows, and the nudge for those that wait there.


def insert(record: JobRecord, using: str) -> JobRecord:
    """Insert a record and tell a job server after the commit; the live one of its unique, if there is one."""
    if record.unique_key is not None:
        found = insert_unless_there(record, using)
        if found is not None:
            return found
    else:
        rows.insert(record, using)
    nudge_after_commit(using)
    return record


def insert_unless_there(record: JobRecord, using: str) -> JobRecord | None:
    """
    Insert a record with a unique; the live record that has it already, if there is one.

    Raises:
        IntegrityError: It cannot be inserted.
        OperationalError: As ``rows.live_now``.
    """
    live = JobRecord.objects.using(using).filter(unique_key=record.unique_key)
    found = live.first()
    if found is not None and not rows.sees_now(using):
        found = rows.live_now(record, using)
    for tries in range(1, 21):
        if found is not None:
            return found
        try:
            with transaction.atomic(using=using):
                rows.insert(record, using)
        except IntegrityError as error:
            # Mostly it is not asked for: that takes PostgreSQL a statement.
            sees_now = rows.sees_now(using)
            # Somebody was quicker. To lock the row as one's own would be a deadlock on MySQL,
            # where all who come too late have a share of its lock by now.
            found = live.first() if sees_now else rows.live_now(record, using)
            if found is None and tries >= (20 if sees_now else 2):
                if not sees_now:
                    # PostgreSQL shows it to no statement of this transaction.
                    error.add_note("What it met came after this transaction began: begin that again.")
                raise
        else:
            return None
    return found


def nudge() -> None:
    """Tell a job server that there are rows to look at."""
    client_for().claim()


def nudge_after_commit(using: str) -> None:
    """Nudge once for all that the current transaction inserts; at once where there is none."""
    connection = transaction.get_connection(using)
    if not connection.in_atomic_block and not connection.get_autocommit():
        # A transaction that is managed by hand, of which Django tells no end: a server looks within a second.
        return
    waiting = connection.run_on_commit
    # One nudge is enough for all rows of a transaction. The last entry is of this
    # savepoint or of one around it: when this row survives, so does its nudge.
    if not waiting or waiting[-1][1] is not nudge:
        transaction.on_commit(nudge, using=using, robust=True)


# The wire door, after the commit.


def submit(record: JobRecord, acknowledged: Acknowledged) -> None:
    """Send a background job as an unsaved record describes it; ``acknowledged`` hears who has it."""
    options: dict[str, Any] = {"unique": record.unique, "priority": _priority_of(record)}
    if record.status == JobRecord.Status.SCHEDULED:
        assert record.run_after is not None, "scheduled for a moment"
        options["epoch"] = record.run_after.timestamp()
    acknowledged(*client_for().submit_background(record.function, bytes(record.workload), **options))


def submit_many(submissions: Sequence[tuple[JobRecord, Acknowledged]]) -> None:
    """As ``submit`` of each: side by side, but for those that are for later."""
    client = client_for()
    add = {
        "high": client.add_task_high_background,
        "normal": client.add_task_background,
        "low": client.add_task_low_background,
    }
    added = []
    try:
        for record, acknowledged in submissions:
            if record.status == JobRecord.Status.SCHEDULED:
                submit(record, acknowledged)
                continue
            task = add[_priority_of(record)](record.function, bytes(record.workload), unique=record.unique)
            added.append((task, acknowledged))
    except BaseException:
        # The thread's next call would run what was added.
        client._take_added({})
        raise
    client.run_tasks()
    for task, acknowledged in added:
        if task.handle:
            acknowledged(task.server, task.handle)
    for task, _ in added:
        task.result()


def _priority_of(record: JobRecord) -> Priority:
    return "high" if record.priority > 0 else "low" if record.priority < 0 else "normal"
