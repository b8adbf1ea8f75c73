"""
The writer's connection to the database: how it is set up, its transactions, and what its errors become.

Knows no rows. Every database error leaves as ``StoreError``, and the next
attempt gets a new connection.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from threading import get_ident
from typing import Any, Final

from django.db import DatabaseError, InterfaceError, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import QuerySet

from ..exceptions import StoreError
from ..models import JobRecord
from .statements import LOCK_WAIT, Statements

_CODES_OF_LOCKS: Final = frozenset({1205, 3572, "55P03"})
"""Errors that say that a row was locked for too long: MySQL's and PostgreSQL's."""

_OPTIONS_OF_VIEWS: Final = ("pool", "isolation_level")


class Database:
    """
    A database as its one writer uses it, from one thread.

    Args:
        using: Its alias.
    """

    def __init__(self, using: str) -> None:
        self.using = using
        self.packet_limit = math.inf
        """Bytes of a statement that the database takes."""
        self.fields = {field.name: field for field in JobRecord._meta.concrete_fields}
        """{name: field} of a record."""
        self.table = connections[using].ops.quote_name(JobRecord._meta.db_table)
        """The records' table, quoted."""
        self._connection: tuple[int, BaseDatabaseWrapper] | None = None
        """The thread that asked last, and its connection: Django is slower to find it than SQLite a row."""
        self._prepared: object = None
        """The driver's connection that ``_prepare`` has seen."""
        self.is_hurried = False
        """Whether the transactions of now wait for no row."""

    @contextmanager
    def transaction(self, *, synced: bool = True) -> Iterator[None]:
        """
        All or nothing; every database error leaves as ``StoreError``.

        Args:
            synced: Without, on SQLite, perhaps nothing after a power failure. For claims: then their rows
                lie at the door, as before, and nobody was told of anything. The next commit that is
                synced keeps all before it.
        """
        with self.errors():
            connection = self.connection
            relaxes = not synced and connection.vendor == "sqlite" and not connection.in_atomic_block
            if relaxes:
                self.execute("PRAGMA synchronous=NORMAL", [])
            try:
                with transaction.atomic(using=self.using):
                    yield
                    if connection.needs_rollback:
                        # A savepoint could not be rolled back; Django would undo all without a word.
                        raise DatabaseError("The transaction is broken")
            finally:
                # A connection that was let go of begins anew.
                if relaxes and self._prepared is not None:
                    self.execute("PRAGMA synchronous=FULL", [])

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Connected and set up. A database error closes the connection, and leaves as ``StoreError``."""
        connection = self.connection
        # Django hands on some of the driver's own errors as they are, such as those of closing a cursor.
        driver: Any = connection.Database  # type: ignore[attr-defined]  # each backend has it
        try:
            # Inside of somebody else's transaction, as in a test case, nothing could be set.
            is_new = connection.connection is None or connection.connection is not self._prepared
            if is_new and not connection.in_atomic_block:
                _leave_options_to_views(connection)
                connection.ensure_connection()
                self._prepare(connection)
                self._prepared = connection.connection
            yield
        except (DatabaseError, InterfaceError, driver.Error) as error:
            # Whatever state it is in: the next attempt gets a new one.
            self.let_go()
            raise StoreError(said(error)) from error

    @contextmanager
    def hurried(self) -> Iterator[None]:
        """Transactions in here wait for hardly any row that others have locked; put it around them."""
        self.is_hurried = True
        try:
            with self.errors():
                self._set_lock_wait()
            yield
        finally:
            self.is_hurried = False
            # A connection that was let go of begins anew.
            if self._prepared is not None:
                with self.errors():
                    self._set_lock_wait()

    def _set_lock_wait(self) -> None:
        """For how long a statement waits; on PostgreSQL each transaction says so itself."""
        connection = self.connection
        if connection.vendor == "mysql":
            # MySQL makes a second of 0.
            with connection.cursor() as cursor:
                cursor.execute(
                    "SET SESSION innodb_lock_wait_timeout = %s", [0 if self.is_hurried else LOCK_WAIT]
                )

    def let_go(self) -> None:
        """Close the connection, whatever state it is in."""
        self._prepared = None
        connection: Any = self.connection
        try:
            connection.close()
        except (DatabaseError, InterfaceError, connection.Database.Error):
            pass  # it was closed from the other end

    def _prepare(self, connection: BaseDatabaseWrapper) -> None:
        if connection.vendor == "sqlite":
            # A transaction that reads before it writes would otherwise fail where it could wait.
            connection.transaction_mode = "IMMEDIATE"  # type: ignore[attr-defined]  # SQLite's own
            with connection.cursor() as cursor:
                # An acknowledged job survives power loss: WAL syncs each commit only when FULL.
                cursor.execute("PRAGMA journal_mode=WAL")
                cursor.execute("PRAGMA synchronous=FULL")
        elif connection.vendor == "mysql":
            with connection.cursor() as cursor:
                cursor.execute("SELECT @@max_allowed_packet")
                self.packet_limit = cursor.fetchone()[0]
            self._set_lock_wait()
        elif connection.vendor == "postgresql":
            from django.db.backends.postgresql.psycopg_any import IsolationLevel

            # Said with each BEGIN: the role or the database may have another, and a pooler no memory.
            connection.connection.isolation_level = IsolationLevel.READ_COMMITTED

    def execute(self, sql: str, parameters: Sequence[Any]) -> list[Any]:
        """The rows of a statement; none of one that has none."""
        connection = self.connection
        if _is_direct(connection):
            with connection.wrap_database_errors:
                rows: list[Any] = connection.connection.execute(_for_sqlite(sql), parameters).fetchall()
            return rows
        with connection.cursor() as cursor:
            cursor.execute(sql, parameters)
            return cursor.fetchall() if cursor.description else []

    def change(self, sql: str, parameters: Sequence[Any]) -> int:
        """How many rows a statement has changed."""
        connection = self.connection
        if _is_direct(connection):
            with connection.wrap_database_errors:
                changed = connection.connection.execute(_for_sqlite(sql), parameters).rowcount
            return int(changed)
        with connection.cursor() as cursor:
            cursor.execute(sql, parameters)
            return int(cursor.rowcount)

    def change_each(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Execute a statement for each row of parameters."""
        connection = self.connection
        if _is_direct(connection):
            with connection.wrap_database_errors:
                connection.connection.executemany(_for_sqlite(sql), rows)
            return
        with connection.cursor() as cursor:
            cursor.executemany(sql, rows)

    @property
    def is_alone_at_work(self) -> bool:
        """Whether nobody else can write while a transaction of ours is open: SQLite has one lock for all."""
        return self.connection.vendor == "sqlite"

    @property
    def skips_locked(self) -> bool:
        """Whether a statement can pass over rows that others have locked."""
        return bool(self.connection.features.has_select_for_update_skip_locked)

    @cached_property
    def sql(self) -> Statements:
        return Statements(self.connection)

    def forget_statements(self) -> None:
        """Write them anew: that of the time has the offset of local time in it on MySQL."""
        vars(self).pop("sql", None)

    @property
    def connection(self) -> BaseDatabaseWrapper:
        thread = get_ident()
        if self._connection is None or self._connection[0] != thread:
            self._connection = thread, connections[self.using]
        return self._connection[1]

    def records(self) -> QuerySet[JobRecord]:
        return JobRecord.objects.using(self.using)

    def column(self, name: str) -> str:
        """A field's column, quoted."""
        return self.connection.ops.quote_name(str(self.fields[name].column))


def _leave_options_to_views(connection: BaseDatabaseWrapper) -> None:
    """
    Do without some that are good for views alone.

    It keeps its one connection, and after an outage a pool comes back when it sees fit, a minute late. An
    isolation above Django's own would end transactions because others renew leases beside them; that of a
    role or a database is dealt with when the connection is made.
    """
    options = connection.settings_dict["OPTIONS"]
    if not options.keys().isdisjoint(_OPTIONS_OF_VIEWS):
        # Somebody may have looked around before the writer came.
        connection.close()
        own = {name: value for name, value in options.items() if name not in _OPTIONS_OF_VIEWS}
        connection.settings_dict = {**connection.settings_dict, "OPTIONS": own}


def _is_direct(connection: BaseDatabaseWrapper) -> bool:
    """
    Whether a statement goes to the driver without Django's cursor: on SQLite, where nobody wants to see it.

    What Django does around one takes longer than what SQLite does for most of ours.
    """
    if connection.vendor != "sqlite" or connection.execute_wrappers or connection.queries_logged:
        return False
    connection.validate_no_broken_transaction()
    return connection.connection is not None


@lru_cache(maxsize=200)
def _for_sqlite(sql: str) -> str:
    """A statement with the driver's own marks; Django's cursor writes it anew each time."""
    return re.sub(r"(?<!%)%s", "?", sql).replace("%%", "%")


def error_code(error: DatabaseError) -> object:
    """The database's own code of an error; None when it has none."""
    cause = error.__cause__
    return getattr(cause, "sqlstate", None) or next(iter(getattr(cause, "args", ())), None)


def is_of_lock(error: DatabaseError) -> bool:
    """Whether it says that somebody else has a row locked, and nothing worse."""
    return error_code(error) in _CODES_OF_LOCKS


def said(error: Exception) -> str:
    """What an error says in one line; without PostgreSQL's details, which show what is in the row."""
    diagnosis = getattr(error.__cause__, "diag", None)
    text = getattr(diagnosis, "message_primary", None) or str(error)
    return " ".join(text.split()) or type(error).__name__
