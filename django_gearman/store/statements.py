"""The statements of claim, replay and the lease, as text; and the database's clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Model
from django.db.models.functions import Now
from django.utils import timezone

from ..models import Cancellation, JobAttempt, JobRecord, ServerLease
from .columns import AT_DOOR, READY, RETRYING, RUNNING, SCHEDULED, Status

FUNCTIONS_AT_ONCE: Final = 200
"""Functions that are looked at in one claim; the others' turn comes with the next."""

INLINE: Final = 16 * 1024
"""Bytes of a workload that is read along with its row; larger ones are read of jobs that are taken."""

LOCK_WAIT: Final = 1
"""
Seconds that the writer waits for a row that somebody else has locked, as a view whose transaction is slow.

All that comes and ends waits with it.
"""

_HURRIED_WAIT: Final = "100ms"
"""So too on PostgreSQL while there is such a row: what another server takes to commit."""

SKIP_LOCKED: Final = " FOR UPDATE SKIP LOCKED"

JOB_FIELDS: Final = (
    "handle",
    "function",
    "unique",
    "workload",
    "priority",
    "attempts",
    "max_attempts",
    "reducer",
    "run_after",
    "timeout",
    "interruptions",
    "limit_key",
)

_ATTEMPT_FIELDS: Final = (
    "number",
    "worker",
    "started_at",
    "finished_at",
    "exception",
    "message",
    "traceback",
    "log",
)


class Statements:
    """
    The statements of claim and replay, written once.

    By hand, because statuses must stand in the text: SQLite does not use a
    partial index for a parameter. Table and column names are the model's own,
    every value is a parameter.
    """

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        self._vendor = connection.vendor
        self._has_arrays = connection.vendor == "postgresql"
        self._quote = connection.ops.quote_name
        self._table = self._quote(JobRecord._meta.db_table)
        self._columns = columns = self._columns_of(JobRecord)
        self._row = ", ".join(
            [
                columns["id"],
                f"LENGTH({columns['workload']})",
                columns["status"],
                columns["enqueued_at"],
                # Of what is no member, such as a continuation, nothing is counted.
                f"CASE WHEN {columns['group_index']} IS NOT NULL THEN {columns['group']} END",
                *(
                    # Large ones are only read of jobs that are taken.
                    f"CASE WHEN LENGTH({columns[name]}) <= {INLINE} THEN {columns[name]} END"
                    if name == "workload"
                    else columns[name]
                    for name in JOB_FIELDS
                ),
            ]
        )
        """What is read of a row at the door."""
        live = ", ".join(f"'{each.value}'" for each in JobRecord.SERVED)
        # Whose index on MySQL, which has no partial ones, is by the server too.
        self._owned = self._by("job_claim" if self._vendor == "mysql" else "job_owned")
        self._of_server = f"WHERE {columns['server']} = %s AND {columns['status']} IN ({live})"
        """The rows that a server has; they stand in ``_owned``."""
        self._look_at_door()
        self._take_from_door()
        self._end_and_leave()
        self._keep_attempts()
        self._hold_lease(connection)

    def _columns_of(self, model: type[Model]) -> dict[str, str]:
        return {field.name: self._quote(str(field.column)) for field in model._meta.concrete_fields}

    def _by(self, index: str) -> str:
        """The table of jobs, read by an index."""
        # Without statistics SQLite would rather scan every live row for its status and sort.
        if self._vendor == "sqlite":
            return f"{self._table} INDEXED BY {self._quote(index)}"
        if self._vendor == "mysql":
            return f"{self._table} FORCE INDEX ({self._quote(index)})"
        return self._table

    def _look_at_door(self) -> None:
        columns, row = self._columns, self._row
        server, status, due = columns["server"], columns["status"], columns["run_after"]
        function, priority = columns["function"], columns["priority"]
        claim = f"{self._by('job_claim')} WHERE {server} IS NULL AND {status} = '{READY}'"
        # The index of MySQL's is by the status too: two of them would have no common order.
        kinds = [[SCHEDULED], [RETRYING]] if self._vendor == "mysql" else [[SCHEDULED, RETRYING]]
        later = [
            f"{self._by('job_due')} WHERE {server} IS NULL AND {status} IN ({', '.join(map(repr, kind))})"
            for kind in kinds
        ]
        if self._vendor == "postgresql":
            # No moment of Python's: a row that waits for ever, and no reason to read nothing of any.
            later = [f"{rows} AND isfinite({due}) IS NOT FALSE" for rows in later]
        self.functions_ready = self._names(claim)
        first = f"AND {function} = door.name ORDER BY {due} LIMIT 1"
        self.functions_due = [
            # An index of MySQL's has each function's earliest first.
            self._names(rows, due if self._vendor == "mysql" else f"(SELECT {due} FROM {rows} {first})")
            for rows in later
        ]
        self.ready_of = (
            f"SELECT {row} FROM {claim} AND {function} = %s AND {priority} > %s "
            f"ORDER BY {priority} DESC, {columns['id']} LIMIT %s"
        )
        self.first_ready = (
            f"SELECT {row} FROM {claim} ORDER BY {function}, {priority} DESC, {columns['id']} LIMIT %s"
        )
        self.due_of = [
            f"SELECT {row} FROM {rows} AND {function} = %s AND {due} <= %s "
            f"ORDER BY {due}, {columns['id']} LIMIT %s"
            for rows in later
        ]
        self.count_ready = (
            f"SELECT {function}, {priority}, COUNT(*) FROM {claim} GROUP BY {function}, {priority}"
        )
        self.count_later = [f"SELECT {function}, COUNT(*) FROM {rows} GROUP BY {function}" for rows in later]
        self.workload = f"SELECT {columns['workload']} FROM {self._table} WHERE {columns['id']} = %s"
        self._by_id = f"SELECT {row} FROM {self._table} WHERE {columns['id']} IN "
        self._order = f" ORDER BY {priority} DESC, {columns['id']}"
        cancellations = self._quote(Cancellation._meta.db_table)
        job = self._quote("job_id")
        self.cancellations = f"SELECT {job} FROM {cancellations} ORDER BY {job}"

    def _names(self, where: str, *also: str) -> str:
        """
        The functions that rows of an index are of, after one, without reading all of the rows.

        MySQL's planner cannot, and is asked for one at a time.
        """
        function = self._columns["function"]
        if self._vendor == "mysql":
            return (
                f"SELECT {', '.join([f'{function} AS name', *also])} FROM {where} "
                f"AND {function} > %s ORDER BY {', '.join([function, *also])} LIMIT 1"
            )
        first = f"SELECT {function} FROM {where} AND {function} > %s ORDER BY {function} LIMIT 1"
        following = first.replace("%s", "door.name")
        return (
            f"WITH RECURSIVE door(name, number) AS (SELECT ({first}), 1 UNION ALL "
            f"SELECT ({following}), number + 1 FROM door "
            f"WHERE name IS NOT NULL AND number < {FUNCTIONS_AT_ONCE}) "
            f"SELECT {', '.join(['name', *also])} FROM door WHERE name IS NOT NULL"
        )

    def _take_from_door(self) -> None:
        columns, is_mysql = self._columns, self._vendor == "mysql"
        server, status = columns["server"], columns["status"]
        made = f"CONCAT(%s, {columns['id']})" if is_mysql else f"%s || {columns['id']}"
        # What another server had keeps its handle.
        handle = f"COALESCE({columns['handle']}, {made})"
        by_id = f"{self._table} FORCE INDEX (PRIMARY)" if is_mysql else self._table
        at_door = ", ".join(f"'{each.value}'" for each in AT_DOOR)
        is_unclaimed = f"({server} IS NULL AND {status} IN ({at_door}))"
        if self._has_arrays:
            # Not an index of the status, which all that wait have.
            is_unclaimed += " IS TRUE"
        self._take = (
            f"UPDATE {by_id} SET {columns['handle']} = {handle}, {server} = %s, "
            f"{columns['server_epoch']} = %s, {status} = %s "
            f"WHERE {is_unclaimed} AND {columns['id']} "
        )
        # A view may be ending some of them in a transaction that takes its time.
        self._free = f"SELECT {columns['id']} FROM {by_id} WHERE {is_unclaimed} AND {columns['id']} "
        key = columns["unique_key"]
        self._of_keys = f"SELECT {key}, {columns['id']}, {columns['handle']} FROM {self._table} WHERE {key} "

    def _end_and_leave(self) -> None:
        """What becomes of the jobs of a server that is not there any more, or ends."""
        columns, is_postgres = self._columns, self._vendor == "postgresql"
        status, background = columns["status"], columns["background"]
        self.held = (
            f"SELECT {columns['id']} FROM {self._owned} {self._of_server} "
            f"AND COALESCE({columns['server_epoch']}, 0) <> %s ORDER BY {columns['id']} LIMIT %s"
        )
        self.count_held = f"SELECT COUNT(*) FROM {self._owned} {self._of_server}"
        owner = f"{self._quote(ServerLease._meta.db_table)}.{self._columns_of(ServerLease)['id']}"
        # Of a lease, in a query of leases: an index is asked once for each, however many jobs there are.
        self.first_held = (
            f"SELECT {columns['id']} FROM {self._owned} {self._of_server.replace('%s', owner)} LIMIT 1"
        )

        def change(assignments: str, condition: str) -> str:
            return f"UPDATE {self._owned} SET {assignments} {self._of_server} AND {condition}"

        is_foreground = f"{background} = {'FALSE' if is_postgres else '0'}"
        ended = (
            f"{columns['finished_at']} = %s, {columns['message']} = 'The job server ended before the job did'"
        )
        is_running = f"{status} = '{RUNNING}'"
        self.end_running = change(f"{status} = '{Status.DEAD}', {ended}", f"{is_foreground} AND {is_running}")
        self.end_waiting = change(f"{status} = '{Status.CANCELLED}', {ended}", is_foreground)
        interruptions = columns["interruptions"]
        self.interrupt = change(
            f"{status} = '{READY}', {columns['numerator']} = NULL, {columns['denominator']} = NULL, "
            f"{columns['log']} = '', "
            f"{interruptions} = {interruptions} + 1",
            is_running,
        )
        self.leave = change(
            f"{columns['server']} = NULL, {columns['server_epoch']} = NULL",
            f"{columns['server_epoch']} = %s "
            f"AND {status} <> '{RUNNING}' AND {background} <> {'FALSE' if is_postgres else '0'}",
        )

    def _keep_attempts(self) -> None:
        columns, attempt = self._columns, self._columns_of(JobAttempt)
        server, status = columns["server"], columns["status"]
        kept = self._quote(JobAttempt._meta.db_table)
        what = ", ".join(attempt[name] for name in ("job", *_ATTEMPT_FIELDS))
        marks = ", ".join(["%s"] * len(_ATTEMPT_FIELDS))
        insert = f"INSERT INTO {kept} ({what}) SELECT {columns['id']}, "
        # Not twice, when a batch is written again because nobody knows what became of it.
        unless_kept = (
            f"NOT EXISTS (SELECT 1 FROM {kept} "
            f"WHERE {attempt['job']} = {self._table}.{columns['id']} AND {attempt['number']} = "
        )
        self.keep_attempt = (
            f"{insert}{marks} FROM {self._table} "
            # At the door it lies by now where the next attempt is later.
            f"WHERE {columns['handle']} = %s AND ({server} = %s OR {server} IS NULL) AND {unless_kept}%s)"
        )
        self.keep_interrupted = (
            f"{insert}{columns['attempts']}, {columns['worker']}, {columns['last_attempted_at']}, %s, "
            f"'', 'The job server ended before the job did', '', {columns['log']} FROM {self._table} "
            f"WHERE {server} = %s AND {status} = '{RUNNING}' AND {unless_kept}{columns['attempts']})"
        )

    def _hold_lease(self, connection: BaseDatabaseWrapper) -> None:
        table, lease = self._quote(ServerLease._meta.db_table), self._columns_of(ServerLease)
        leases = ServerLease.objects.using(connection.alias)
        now, _ = leases.all().query.get_compiler(connection.alias).compile(DatabaseNow())
        self.now = f"SELECT {now}"
        self._leases = (
            f"SELECT {lease['id']}, {lease['epoch']}, {lease['started_at']}, {lease['renewed_at']}, {now} "
            f"FROM {table} WHERE {lease['id']} IN "
        )
        self.renew = (
            f"UPDATE {table} SET {lease['renewed_at']} = {now} "
            f"WHERE {lease['id']} = %s AND {lease['epoch']} = %s"
        )
        self.holds = f"SELECT 1 FROM {table} WHERE {lease['id']} = %s AND {lease['epoch']} = %s"
        if self._has_arrays:
            # A queue grows and shrinks within seconds. What PostgreSQL knows of the table is older than
            # that, and it would rather read all of it than look rows up by their keys. What it has to read
            # whole, as the few leases, then seems so dear that it would be compiled first, at length.
            ways = ("enable_seqscan", "enable_hashjoin", "enable_mergejoin", "jit")
            off = (f"set_config('{way}', 'off', true)" for way in ways)
            self.renew += f" RETURNING {', '.join(off)}, set_config('lock_timeout', '{LOCK_WAIT}s', true)"
        self.renew_hurried = self.renew.replace(f"'{LOCK_WAIT}s'", f"'{_HURRIED_WAIT}'")
        """So too; what follows waits for hardly any row. On other databases the connection is set so."""

    def take(self, rows: int) -> str:
        """
        Make so many rows a server's; parameters: prefix of their handles, lease, epoch, status, ids.

        On PostgreSQL, those that nobody has locked.
        """
        if self._has_arrays:
            return f"{self._take}= ANY(ARRAY({self.free(rows)}))"
        return self._take + self._among(rows, "bigint")

    def free(self, rows: int) -> str:
        """Which of so many rows lie at the door and are locked by nobody; locks them."""
        return f"{self._free}{self._among(rows, 'bigint')}{SKIP_LOCKED}"

    def leases(self, rows: int) -> str:
        """So many leases, and the database's time."""
        return f"{self._leases}({', '.join(['%s'] * rows)})"

    def of_keys(self, keys: int) -> str:
        """Key, id and handle of the rows that have one of so many keys."""
        return self._of_keys + self._among(keys, "varchar")

    def _among(self, values: int, kind: str) -> str:
        """One of so many; on PostgreSQL of one array, as the driver would look for each of the marks."""
        return f"= ANY(%s::{kind}[])" if self._has_arrays else f"IN ({', '.join(['%s'] * values)})"

    def by_id(self, rows: int) -> str:
        return f"{self._by_id}({', '.join(['%s'] * rows)}){self._order}"


class DatabaseNow(Now):
    """The database's clock. Django's own is UTC on SQLite, even when ``USE_TZ`` is off."""

    def as_sqlite(self, compiler: Any, connection: Any, **context: Any) -> Any:
        local = "" if settings.USE_TZ else ", 'localtime'"
        template = f"STRFTIME('%%%%Y-%%%%m-%%%%d %%%%H:%%%%M:%%%%f', 'NOW'{local})"
        return self.as_sql(compiler, connection, template=template, **context)

    def as_mysql(self, compiler: Any, connection: Any, **context: Any) -> Any:
        # CURRENT_TIMESTAMP would be of the database's own time zone, whatever it is.
        offset = timedelta() if settings.USE_TZ else timezone.localtime(datetime.now(UTC)).utcoffset()
        assert offset is not None, "an aware moment has an offset"
        template = f"(UTC_TIMESTAMP(6) + INTERVAL {offset.total_seconds():.0f} SECOND)"
        return self.as_sql(compiler, connection, template=template, **context)
