"""
Journal entries to rows, and rows to jobs: the durable queue in the ORM's tables.

The one writer of outcomes. Statements are set operations written once per
batch and prepared by the driver; the rows' meaning is in ``models.py``, the
journal's in ``server/entries.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache, cached_property
from math import inf
from time import monotonic
from typing import Any, Final

from django.conf import settings
from django.db import DatabaseError, DataError, IntegrityError, InterfaceError, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import F, QuerySet
from django.db.models.functions import Now
from django.utils import timezone

from .encoding import exception_of
from .exceptions import LeaseLost, StoreError
from .history import History
from .models import JobRecord, ServerLease
from .scheduler import Scheduler, current_time
from .server.entries import (
    Entry,
    JobDue,
    JobFinished,
    JobKept,
    JobProgress,
    JobQueued,
    JobRequeued,
    JobStarted,
    Outcome,
    StoredJob,
)

Status = JobRecord.Status
Row = dict[str, Any]

RENEW_INTERVAL: Final = 5.0
"""Seconds after which a server with nothing to write says that it is alive."""

_READY: Final = Status.READY.value
_SCHEDULED: Final = Status.SCHEDULED.value
_RUNNING: Final = Status.RUNNING.value
_MAX_PROGRESS: Final = 2**63 - 1


class DatabaseStore:
    """
    The ``JobStore`` that lives in the database.

    Made where the command starts, used from the writer's thread alone, after
    ``take_lease``.

    Args:
        using: Alias of the database.
        name: The server's name, unique among the servers of the database.
        queue_of: The queue name of a function; foreign clients do not tell one.
        scheduler: Fires the schedules that are due, with each claim; None for none.
        history: Prunes what ended long ago; None to keep everything.
        handle_prefix: What the handles of rows begin with; None for ``H:`` and the name.
    """

    def __init__(
        self,
        using: str,
        name: str,
        *,
        queue_of: Callable[[str], str] | None = None,
        handle_prefix: str | None = None,
        scheduler: Scheduler | None = None,
        history: History | None = None,
    ) -> None:
        self._using = using
        self._name = name
        self._queue_of = queue_of or (lambda function: "default")
        self._scheduler = scheduler
        self._history = history
        self._row_prefix = f"{handle_prefix or f'H:{name}'}:r"
        self._renewed = 0.0
        self.lease_id = 0
        self.epoch = 0
        self._fields = {field.name: field for field in JobRecord._meta.concrete_fields}
        self._table = connections[using].ops.quote_name(JobRecord._meta.db_table)

    def take_lease(self, address: str) -> int:
        """
        Become the server of this name; whoever held the lease can write nothing from now on.

        Returns:
            The epoch, for ``ServerOptions.epoch``.
        Raises:
            StoreError: The database is out of reach or not migrated.
        """
        with self._transaction():
            leases = ServerLease.objects.using(self._using)
            lease, _ = leases.get_or_create(name=self._name)
            leases.filter(pk=lease.pk).update(
                epoch=F("epoch") + 1, address=address, started_at=_Now(), renewed_at=_Now()
            )
            lease.refresh_from_db(using=self._using)
        self.lease_id = lease.pk
        self.epoch = lease.epoch
        return lease.epoch

    def replay(self) -> list[StoredJob]:
        sql = self._sql
        with self._transaction():
            self._prove_lease()
            owned = self._records().filter(server_id=self.lease_id, status__in=JobRecord.LIVE)
            # The clients of foreground jobs left with the last run.
            ended = {"finished_at": timezone.now(), "message": "The job server ended before the job did"}
            owned.filter(background=False, status=_RUNNING).update(status=Status.DEAD, **ended)
            owned.filter(background=False).update(status=Status.CANCELLED, **ended)
            owned.filter(status=_RUNNING).update(
                status=_READY, server_epoch=self.epoch, numerator=None, denominator=None
            )
            rows = self._execute(sql.owned, [self.lease_id])
        return [_stored_job(str(row[1]), row) for row in rows]

    def claim(self, limit: int, full: Sequence[bytes]) -> list[StoredJob]:
        sql = self._sql
        scheduler, moment = self._scheduler, current_time()
        with self._database_errors():
            # Mostly there is nothing, and finding that out need not write.
            now = self._fields["run_after"].get_db_prep_value(timezone.now(), self._connection)
            is_due = bool(self._execute(sql.due, [now]))
            is_time = scheduler is not None and scheduler.has_work(moment)
            rows = [] if is_due or is_time else self._unclaimed(limit, full)
        if not rows and not is_due and not is_time and monotonic() - self._renewed < RENEW_INTERVAL:
            return []
        with self._transaction():
            self._prove_lease()
            if is_time and scheduler is not None:
                scheduler.work(moment)
            if is_due:
                self._execute(sql.make_ready, [now])
            if is_due or is_time:
                rows = self._unclaimed(limit, full)
            return self._take(rows)

    def tend(self) -> float:
        history = self._history
        if history is None:
            return inf
        began = monotonic()
        with self._database_errors():
            batch = history.next_batch(timezone.now())
        if batch.ids:
            try:
                with self._transaction():
                    self._prove_lease()
                    history.delete(batch)
            except StoreError:
                history.start_over()
                raise
        return history.pause_after(batch, monotonic() - began)

    def _unclaimed(self, limit: int, full: Sequence[bytes]) -> list[Any]:
        names = [name.decode() for name in full]
        return self._execute(self._sql.unclaimed(len(names)), [*names, limit])

    def _take(self, rows: list[Any]) -> list[StoredJob]:
        """Make rows ours; those that somebody else was quicker to take stay his."""
        if not rows:
            return []
        jobs = {row[0]: _stored_job(f"{self._row_prefix}{row[0]}", row) for row in rows}
        # Of a row's id, which is never used twice; handles of the wire door have an epoch there.
        handles = [[text_of(job.handle), self.lease_id, self.epoch, id] for id, job in jobs.items()]
        taken = self._execute_many(self._sql.take, handles)
        if taken == len(rows):
            return list(jobs.values())
        ours = self._records().filter(pk__in=jobs, server_id=self.lease_id, server_epoch=self.epoch)
        still_ours = set(ours.values_list("pk", flat=True))
        return [job for id, job in jobs.items() if id in still_ours]

    def write(self, entries: Sequence[Entry], *, again: bool) -> dict[int, str]:
        batch = _Folded(entries, self._queue_of)
        try:
            with self._transaction():
                self._prove_lease()
                self._write(batch, again=again)
        except _BadRow:
            return self._write_one_by_one(entries, again=again)
        return {}

    def close(self) -> None:
        connections[self._using].close()

    # The statements.

    def _write(self, batch: _Folded, *, again: bool) -> None:
        queued = batch.queued
        if again and queued:
            kept = self._records().filter(handle__in=[text_of(handle) for handle in queued])
            for handle in kept.values_list("handle", flat=True):
                batch.is_there(str(handle).encode())
        if queued:
            common = {"server": self.lease_id, "server_epoch": self.epoch}
            self._insert([row | common for row in queued.values()])
        for columns, changes in batch.changes_by_columns():
            self._update(columns, changes)

    def _write_one_by_one(self, entries: Sequence[Entry], *, again: bool) -> dict[int, str]:
        """A row of the batch is bad: find it, without refusing its neighbours."""
        refused: dict[int, str] = {}
        for index, entry in enumerate(entries):
            try:
                with self._transaction():
                    self._prove_lease()
                    self._write(_Folded([entry], self._queue_of), again=again)
            except _BadRow as error:
                refused[index] = str(error)
        return refused

    def _insert(self, rows: list[Row]) -> None:
        quote = self._connection.ops.quote_name
        names = ", ".join(quote(column) for column, _ in self._prepared_defaults.values())
        marks = ", ".join(["%s"] * len(self._prepared_defaults))
        prepare = self._preparer()
        defaults = {name: default for name, (_, default) in self._prepared_defaults.items()}
        values = [[prepare(value) for value in {**defaults, **row}.values()] for row in rows]
        self._execute_many(f"INSERT INTO {self._table} ({names}) VALUES ({marks})", values)  # noqa: S608

    def _update(self, names: tuple[str, ...], changes: list[tuple[bytes, Row]]) -> None:
        quote = self._connection.ops.quote_name
        prepare = self._preparer()
        assignments = ", ".join(f"{quote(self._prepared_defaults[name][0])} = %s" for name in names)
        values = [
            [*(prepare(change[name]) for name in names), text_of(handle), self.lease_id]
            for handle, change in changes
        ]
        where = f"{quote('handle')} = %s AND {quote('server_id')} = %s"
        self._execute_many(f"UPDATE {self._table} SET {assignments} WHERE {where}", values)  # noqa: S608

    def _preparer(self) -> Callable[[Any], Any]:
        """
        A function that makes of a row's value what the driver takes.

        Text, numbers and booleans go as they are: asking each field for each
        value would cost more than the statement. Many entries share a moment.
        """
        binary = self._connection.Database.Binary  # type: ignore[attr-defined]  # each backend has it
        adapt = cache(self._connection.ops.adapt_datetimefield_value)

        def prepare(value: Any) -> Any:
            kind = type(value)
            if kind is bytes:
                return binary(value)
            return adapt(value) if kind is datetime else value

        return prepare

    @cached_property
    def _prepared_defaults(self) -> dict[str, tuple[str, Any]]:
        """{field: (column, the default as the driver takes it)} for all but the id."""
        return {
            name: (str(field.column), field.get_db_prep_save(field.get_default(), self._connection))
            for name, field in self._fields.items()
            if not field.primary_key
        }

    def _execute(self, sql: str, parameters: Sequence[Any]) -> list[Any]:
        with self._connection.cursor() as cursor:
            cursor.execute(sql, parameters)
            return cursor.fetchall() if cursor.description else []

    def _execute_many(self, sql: str, rows: list[list[Any]]) -> int:
        """How many rows were written."""
        with self._connection.cursor() as cursor:
            try:
                cursor.executemany(sql, rows)
            except (DataError, IntegrityError, ValueError, OverflowError) as error:
                raise _BadRow(str(error)) from error
            return int(cursor.rowcount)

    def _prove_lease(self) -> None:
        """Renew the lease; in every transaction, so that a server that was replaced commits nothing."""
        with self._connection.cursor() as cursor:
            cursor.execute(self._sql.renew, [self.lease_id, self.epoch])
            if not cursor.rowcount:
                raise LeaseLost(self._name)
        self._renewed = monotonic()

    @cached_property
    def _sql(self) -> _Statements:
        return _Statements(self._connection)

    @property
    def _connection(self) -> BaseDatabaseWrapper:
        return connections[self._using]

    def _records(self) -> QuerySet[JobRecord]:
        return JobRecord.objects.using(self._using)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, and synced; every database error leaves as ``StoreError``."""
        with self._database_errors(), transaction.atomic(using=self._using):
            yield

    @contextmanager
    def _database_errors(self) -> Iterator[None]:
        connection = self._connection
        try:
            if connection.connection is None:
                connection.connect()
                self._prepare(connection)
            yield
        except (DatabaseError, InterfaceError) as error:
            # Whatever state it is in: the next attempt gets a new one.
            connection.close()
            raise StoreError(" ".join(str(error).split()) or type(error).__name__) from error

    def _prepare(self, connection: BaseDatabaseWrapper) -> None:
        if connection.vendor == "sqlite":
            # A transaction that reads before it writes would otherwise fail where it could wait.
            connection.transaction_mode = "IMMEDIATE"  # type: ignore[attr-defined]  # SQLite's own
            with connection.cursor() as cursor:
                # An acknowledged job survives power loss: WAL syncs each commit only when FULL.
                cursor.execute("PRAGMA journal_mode=WAL")
                cursor.execute("PRAGMA synchronous=FULL")


class _Statements:
    """
    The statements of claim and replay, written once.

    By hand, because statuses must stand in the text: SQLite does not use a
    partial index for a parameter. Table and column names are the model's own,
    every value is a parameter.
    """

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        quote = connection.ops.quote_name
        table = quote(JobRecord._meta.db_table)

        def by(index: str) -> str:
            # Without statistics SQLite would rather scan every live row for its status and sort.
            return f"{table} INDEXED BY {quote(index)}" if connection.vendor == "sqlite" else table

        columns = {field.name: quote(str(field.column)) for field in JobRecord._meta.concrete_fields}
        server, status, due = columns["server"], columns["status"], columns["run_after"]
        job = ", ".join(columns[name] for name in ("id", *_JOB_FIELDS))
        order = f"ORDER BY {columns['priority']} DESC, {columns['id']}"
        live = ", ".join(f"'{each.value}'" for each in JobRecord.LIVE)
        unclaimed = f"{server} IS NULL AND {status} = '{_READY}'"
        later = (
            f"{server} IS NULL AND {status} IN ('{Status.SCHEDULED}', '{Status.RETRYING}') AND {due} <= %s"
        )

        self.due = f"SELECT 1 FROM {by('job_due')} WHERE {later} LIMIT 1"  # noqa: S608
        self.make_ready = f"UPDATE {by('job_due')} SET {status} = '{_READY}' WHERE {later}"  # noqa: S608
        self.owned = (
            f"SELECT {job} FROM {by('job_owned')} WHERE {server} = %s AND {status} IN ({live}) {order}"  # noqa: S608
        )
        self.take = (
            f"UPDATE {table} SET {columns['handle']} = %s, {server} = %s, {columns['server_epoch']} = %s "  # noqa: S608
            f"WHERE {columns['id']} = %s AND {unclaimed}"
        )
        self._unclaimed = f"SELECT {job} FROM {by('job_claim')} WHERE {unclaimed}"  # noqa: S608
        self._not_in = f" AND {columns['function']} NOT IN "
        self._first = f" {order} LIMIT %s"

        leases = ServerLease.objects.using(connection.alias)
        now, _ = leases.all().query.get_compiler(connection.alias).compile(_Now())
        lease = {field.name: quote(str(field.column)) for field in ServerLease._meta.concrete_fields}
        self.renew = (
            f"UPDATE {quote(ServerLease._meta.db_table)} SET {lease['renewed_at']} = {now} "  # noqa: S608
            f"WHERE {lease['id']} = %s AND {lease['epoch']} = %s"
        )

    def unclaimed(self, excluded: int) -> str:
        """Claimable rows, most urgent first, of all but so many functions; then the limit."""
        but = f"{self._not_in}({', '.join(['%s'] * excluded)})" if excluded else ""
        return self._unclaimed + but + self._first


_JOB_FIELDS: Final = (
    "handle",
    "function",
    "unique",
    "workload",
    "priority",
    "attempts",
    "max_attempts",
    "reducer",
    "run_after",
)


class _Now(Now):
    """The database's clock. Django's own is UTC on SQLite, even when ``USE_TZ`` is off."""

    def as_sqlite(self, compiler: Any, connection: Any, **context: Any) -> Any:
        local = "" if settings.USE_TZ else ", 'localtime'"
        template = f"STRFTIME('%%%%Y-%%%%m-%%%%d %%%%H:%%%%M:%%%%f', 'NOW'{local})"
        return self.as_sql(compiler, connection, template=template, **context)


class _BadRow(Exception):
    """The database refuses a row for what is in it."""


class _Folded:
    """
    A batch as one final state per job, so that each row is written once.

    ``queued`` are rows to insert, ``changed`` the columns to set in rows that
    are there: {handle: {column: value}}.
    """

    def __init__(self, entries: Sequence[Entry], queue_of: Callable[[str], str]) -> None:
        self.queued: dict[bytes, Row] = {}
        self.changed: dict[bytes, Row] = {}
        self._queue_of = queue_of
        for entry in entries:
            if type(entry) is JobQueued:
                self.queued[entry.handle] = self._new_row(entry)
            else:
                row = self.queued.get(entry.handle)
                if row is None:
                    row = self.changed.setdefault(entry.handle, {})
                _change(row, entry)

    def is_there(self, handle: bytes) -> None:
        """The row was inserted by an earlier attempt; only what happened since is to be written."""
        row = self.queued.pop(handle, None)
        if row is not None:
            self.changed.setdefault(handle, {}).update(row)

    def changes_by_columns(self) -> Iterator[tuple[tuple[str, ...], list[tuple[bytes, Row]]]]:
        """The changes, grouped by which columns they set: one statement each."""
        groups: dict[tuple[str, ...], list[tuple[bytes, Row]]] = {}
        for handle, change in self.changed.items():
            groups.setdefault(tuple(sorted(change)), []).append((handle, change))
        yield from groups.items()

    def _new_row(self, entry: JobQueued) -> Row:
        function = entry.function.decode()
        return {
            "handle": text_of(entry.handle),
            "function": function,
            "queue_name": self._queue_of(function),
            "unique": text_of_unique(entry.unique),
            "workload": entry.workload,
            "priority": entry.priority,
            "background": entry.background,
            "client": text_of(entry.client)[:128],
            "reducer": text_of(entry.reducer),
            "run_after": _moment(entry.run_after) if entry.run_after else None,
            "status": _SCHEDULED if entry.run_after > entry.at else _READY,
            "enqueued_at": _moment(entry.at),
        }


def _change(row: Row, entry: Entry) -> None:
    """What one entry does to its job's row."""
    match entry:
        case JobStarted():
            at = _moment(entry.at)
            row.update(
                status=_RUNNING,
                worker=text_of(entry.worker)[:128],
                attempts=entry.attempts,
                last_attempted_at=at,
            )
            if entry.attempts == 1:
                row["started_at"] = at
        case JobProgress():
            row.update(numerator=_progress(entry.numerator), denominator=_progress(entry.denominator))
        case JobRequeued():
            row.update(status=_READY, numerator=None, denominator=None)
        case JobDue():
            row["status"] = _READY
        case JobKept():
            row["background"] = True
        case JobFinished():
            row.update(status=entry.outcome.value, finished_at=_moment(entry.at))
            if entry.outcome is Outcome.SUCCESSFUL:
                row["result"] = entry.data
            else:
                row.update(_failure(entry))


def _failure(entry: JobFinished) -> Row:
    """The three columns that say why a job failed, from what the worker or the server told."""
    if not entry.data:
        return {"exception": "", "message": entry.reason, "traceback": ""}
    told = exception_of(entry.data)
    return {
        "exception": _storable(told["exception"])[:512],
        "message": _storable(told["message"]),
        "traceback": _storable(told["traceback"]),
    }


def _storable(text: str) -> str:
    """Text as a column takes it; JSON can write NULs, and halves of characters, which are shown, not kept."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\0")


def _stored_job(handle: str, row: Sequence[Any]) -> StoredJob:
    _, _, function, unique, workload, priority, attempts, max_attempts, reducer, run_after = row
    return StoredJob(
        handle.encode(),
        function.encode(),
        bytes_of_unique(unique),
        bytes(workload),
        priority,
        attempts,
        max_attempts,
        reducer.encode(),
        _seconds(run_after),
    )


def _seconds(moment: datetime | str | None) -> float:
    """A moment as a driver gives it, in seconds since 1970; 0 for none. ``_moment`` turned around."""
    if moment is None:
        return 0.0
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    if moment.tzinfo is None and settings.USE_TZ:
        # Databases without time zones keep UTC.
        moment = moment.replace(tzinfo=UTC)
    return moment.timestamp()


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC if settings.USE_TZ else None)


def _progress(number: bytes) -> int | None:
    """A worker's number as a column can hold it; None when it is no number."""
    try:
        return max(-_MAX_PROGRESS, min(_MAX_PROGRESS, int(float(number[:40]))))
    except (ValueError, OverflowError):
        return None


def text_of(data: bytes) -> str:
    """Bytes from the wire as a text column takes them: what is no UTF-8 and NULs are shown, not kept."""
    return data.decode(errors="backslashreplace").replace("\0", "\\0")


def text_of_unique(unique: bytes) -> str:
    """
    A unique as its column keeps it: UTF-8 text, and any other bytes so that they come back whole.

    The others are written as Latin-1 behind U+0001.
    """
    if not unique.startswith(b"\x01"):
        try:
            return unique.decode()
        except UnicodeDecodeError:
            pass
    return "\x01" + unique.decode("latin-1")


def bytes_of_unique(text: str) -> bytes:
    """What ``text_of_unique`` was given."""
    if text.startswith("\x01"):
        return text[1:].encode("latin-1")
    return text.encode()
