"""
Many rows at once, as each database takes them soonest: inserts, updates and attempts of a batch.

Knows fields and values; what they mean is decided elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from itertools import chain, repeat
from typing import Any, Final

from django.db import DatabaseError, DataError, IntegrityError

from ..server.entries import JobRequeued
from .columns import Row, failure_columns, moment_of, storable, text_of
from .database import Database, error_code, is_of_lock, said
from .lease import Lease

_OF_MEMBERS: Final = ("group", "group_index")
"""Fields that stay null in what comes over the wire."""


class SetOperations:
    """What is written once per batch; with the lease's id, inside a transaction that has proved it."""

    def __init__(self, db: Database, lease: Lease) -> None:
        self._db = db
        self._lease = lease
        self._kinds = {name: field.get_internal_type() for name, field in db.fields.items()}
        self._updates: dict[tuple[str, ...], tuple[str, str]] = {}
        """{columns that change: statements for one row and for a hundred}; not on PostgreSQL and MySQL."""

    def insert(self, rows: list[Row]) -> None:
        connection = self._db.connection
        prepare = self._preparer()
        told = set(chain.from_iterable(rows))
        # A column at a time: what is the same for all rows costs nothing.
        values: list[Iterable[Any]] = []
        for name, (_, default) in self._prepared_defaults.items():
            if name in told:
                values.append(prepare(name, [row.get(name, default) for row in rows]))
            else:
                values.append(repeat(default))
        names = ", ".join(connection.ops.quote_name(column) for column, _ in self._prepared_defaults.values())
        driver = connection.Database  # type: ignore[attr-defined]  # each backend has it
        if hasattr(driver, "Copy"):  # psycopg 3
            self._copy(f"COPY {self._db.table} ({names}) FROM STDIN", zip(*values, strict=False))
            return
        marks = f"({', '.join(['%s'] * len(values))})"
        insert = f"INSERT INTO {self._db.table} ({names}) VALUES "
        told_rows = self._execute_in_hundreds(insert + _a_hundred(marks), list(zip(*values, strict=False)))
        self._execute_many(insert + marks, told_rows)

    def update(self, names: tuple[str, ...], changes: list[tuple[bytes, Row]]) -> None:
        prepare = self._preparer()
        handles = [text_of(handle) for handle, _ in changes]
        values = [[change[name] for _, change in changes] for name in names]
        if self._db.connection.vendor == "postgresql":
            self._update_from_arrays(names, handles, values)
            return
        columns = [prepare(name, column) for name, column in zip(names, values, strict=True)]
        match self._db.connection.vendor:
            case "mysql":
                self._update_by_join(names, handles, list(zip(*columns, strict=True)))
            case _:
                rows = list(zip(*columns, handles, repeat(self._lease.id), strict=False))
                if names not in self._updates:
                    self._updates[names] = self._update_of_one(names), self._update_of_a_hundred(names)
                of_one, of_a_hundred = self._updates[names]
                self._execute_many(of_one, self._execute_in_hundreds(of_a_hundred, rows))

    def _update_of_one(self, names: Sequence[str]) -> str:
        column = self._db.column
        where = f"{column('handle')} = %s AND {self._mine}"
        assignments = ", ".join(f"{column(name)} = %s" for name in names)
        return f"UPDATE {self._db.table} SET {assignments} WHERE {where}"

    def _update_of_a_hundred(self, names: Sequence[str]) -> str:
        """SQLite's, of rows of the new values, the handle and the server."""
        column = self._db.column
        new = [f"v.column{number}" for number in range(1, len(names) + 3)]
        assignments = ", ".join(f"{column(name)} = {c}" for name, c in zip(names, new, strict=False))
        rows = _a_hundred(f"({', '.join(['%s'] * len(new))})")
        return (
            f"UPDATE {self._db.table} AS t SET {assignments} FROM (VALUES {rows}) AS v "
            f"WHERE t.{column('handle')} = {new[-2]} AND {self._mine.replace('%s', new[-1])}"
        )

    def _update_from_arrays(self, names: Sequence[str], handles: list[str], columns: list[list[Any]]) -> None:
        """PostgreSQL's: one statement with an array for each column."""
        column = self._db.column
        types = [self._db.fields[name].db_type(self._db.connection) for name in names]
        arrays = ", ".join(["%s::varchar[]", *(f"%s::{kind}[]" for kind in types)])
        new = [f"c{number}" for number in range(len(names))]
        assignments = ", ".join(f"{column(name)} = v.{c}" for name, c in zip(names, new, strict=True))
        sql = (
            f"UPDATE {self._db.table} t SET {assignments} FROM unnest({arrays}) v(handle, {', '.join(new)}) "
            # Not an index of the server: it finds far more rows than one.
            f"WHERE t.{column('handle')} = v.handle AND {self._mine} IS TRUE"
        )
        self._change(sql, [*map(array, [handles, *columns]), self._lease.id])

    def _update_by_join(self, names: Sequence[str], handles: list[str], rows: list[tuple[Any, ...]]) -> None:
        """
        MySQL's: the rows' ids first, then joins with tables made of the new values.

        By ids, since texts of such a table have a collation of their own, for which no index serves.
        """
        column, table = self._db.column, self._db.table
        with self._db.connection.cursor() as cursor:
            wanted = ", ".join(["%s"] * len(handles))
            where = f"{column('handle')} IN ({wanted}) AND {self._mine}"
            cursor.execute(
                f"SELECT {column('handle')}, {column('id')} FROM {table} WHERE {where}",
                [*handles, self._lease.id],
            )
            ids = dict(cursor.fetchall())
        changes = [[ids[handle], *row] for handle, row in zip(handles, rows, strict=True) if handle in ids]
        new = [f"c{number}" for number in range(len(names))]
        # A bare text would have to be UTF-8 to be a column of such a table.
        marks = [f"{'_binary ' if self._kinds[name] == 'BinaryField' else ''}%s" for name in names]
        first = "SELECT %s AS id, " + ", ".join(f"{m} AS {c}" for m, c in zip(marks, new, strict=True))
        other = f" UNION ALL SELECT {', '.join(['%s', *marks])}"
        assignments = ", ".join(f"t.{column(name)} = v.{c}" for name, c in zip(names, new, strict=True))
        for part in self._statements_full(changes):
            sql = (
                f"UPDATE ({first}{other * (len(part) - 1)}) v STRAIGHT_JOIN {table} t "
                f"ON t.{column('id')} = v.id SET {assignments}"
            )
            self._change(sql, [value for row in part for value in row])

    def _statements_full(self, rows: list[list[Any]]) -> Iterator[list[list[Any]]]:
        """Rows in parts, each for one statement of about half a megabyte, or one row."""
        part: list[list[Any]] = []
        size = 0
        for row in rows:
            length = self._length(row)
            if part and (size + length > 500_000 or len(part) >= 500):
                yield part
                part, size = [], 0
            part.append(row)
            size += length
        if part:
            yield part

    def _length(self, row: Sequence[Any]) -> int:
        """About how many bytes a row is in a statement; exactly so many where that matters."""
        length = 64 * len(row) + sum(len(value) for value in row if isinstance(value, bytes | str))
        # Escapes may double it.
        if length * 2 > self._db.packet_limit:
            literal = self._db.connection.connection.literal
            length = 64 * len(row) + sum(len(literal(v)) for v in row if isinstance(v, bytes | str))
        if length > self._db.packet_limit:
            raise BadRow(
                f"{length} bytes are more than the database's max_allowed_packet, {self._db.packet_limit}"
            )
        return length

    @property
    def _mine(self) -> str:
        """
        Rows that this server may change, given its lease: its own, and those at the door.

        What it has laid there may have to be undone.
        """
        server = self._db.column("server")
        return f"({server} = %s OR {server} IS NULL)"

    def _preparer(self) -> Callable[[str, list[Any]], list[Any]]:
        """
        A function that makes of a field's values what the driver takes.

        Text, numbers and booleans go as they are: asking each field for each
        value would cost more than the statement. Many entries share a moment.
        """
        binary = self._db.connection.Database.Binary  # type: ignore[attr-defined]  # each backend has it
        adapt = self._db.connection.ops.adapt_datetimefield_value
        adapted: dict[datetime | None, Any] = {None: None}

        def prepare(name: str, values: list[Any]) -> list[Any]:
            match self._kinds[name]:
                case "BinaryField":
                    return [value if value is None else binary(value) for value in values]
                case "DateTimeField":
                    for value in values:
                        if value not in adapted:
                            adapted[value] = adapt(value)
                    return [adapted[value] for value in values]
            return values

        return prepare

    @cached_property
    def _prepared_defaults(self) -> dict[str, tuple[str, Any]]:
        """{field: (column, the default as the driver takes it)} of what a job of the wire may have."""
        return {
            name: (str(field.column), field.get_db_prep_save(field.get_default(), self._db.connection))
            for name, field in self._db.fields.items()
            if not field.primary_key and name not in _OF_MEMBERS
        }

    def keep_attempts(self, attempts: list[JobRequeued]) -> None:
        adapt = self._db.connection.ops.adapt_datetimefield_value
        rows = []
        for entry in attempts:
            values = [
                entry.attempt,
                text_of(entry.worker)[:128],
                adapt(moment_of(entry.started_at)),
                adapt(moment_of(entry.at)),
                *failure_columns(entry).values(),
                storable(entry.log.decode(errors="backslashreplace")),
            ]
            rows.append((*values, text_of(entry.handle), self._lease.id, entry.attempt))
        self._execute_many(self._db.sql.keep_attempt, rows)

    def _execute_many(self, sql: str, rows: list[tuple[Any, ...]]) -> None:
        if not rows:
            return
        with self.bad_rows():
            if self._db.packet_limit < math.inf:
                for row in rows:
                    self._length(row)
            self._db.change_each(sql, rows)

    def _execute_in_hundreds(self, sql: str, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """
        On SQLite, execute a statement for each hundred rows; the rows that are left.

        Between two statements the driver waits for the event loop's thread to
        let it go on, and to begin one costs as much as what it does for a row.
        """
        if self._db.connection.vendor != "sqlite" or not self._has_update_from:
            return rows
        end = len(rows) - len(rows) % 100
        if end:
            hundreds = (rows[start : start + 100] for start in range(0, end, 100))
            self._execute_many(sql, [tuple(chain.from_iterable(hundred)) for hundred in hundreds])
        return rows[end:]

    @cached_property
    def _has_update_from(self) -> bool:
        """SQLite's from 3.33, which also takes so many parameters."""
        driver = self._db.connection.Database  # type: ignore[attr-defined]  # each backend has it
        return bool(driver.sqlite_version_info >= (3, 33))

    def _change(self, sql: str, parameters: list[Any]) -> None:
        with self.bad_rows(), self._db.connection.cursor() as cursor:
            cursor.execute(sql, parameters)

    def _copy(self, sql: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """PostgreSQL's way to take many rows: several times as fast as statements."""
        connection = self._db.connection
        with (
            self.bad_rows(),
            connection.cursor() as cursor,
            connection.wrap_database_errors,
            cursor.copy(sql) as copy,
        ):
            for row in rows:
                copy.write_row(row)

    @contextmanager
    def bad_rows(self) -> Iterator[None]:
        """What the database says of a row's content, told apart from what it says of itself."""
        try:
            yield
        except (DataError, IntegrityError, ValueError, OverflowError) as error:
            raise BadRow(said(error)) from error
        except DatabaseError as error:
            if error_code(error) in _CODES_OF_BAD_ROWS:
                raise BadRow(said(error)) from error
            if is_of_lock(error):
                raise BusyRow(f"another transaction holds the row, or its unique: {said(error)}") from error
            raise


def _a_hundred(marks: str) -> str:
    return ", ".join([marks] * 100)


def array(values: Sequence[Any]) -> str:
    """PostgreSQL's text of an array. The driver asks for the type of each element, and is slower by far."""
    first = values[0] if values else None
    if values.count(first) == len(values):
        return f"{{{','.join([_element(first)] * len(values))}}}"
    # Of one type they are joined without a look at each of them.
    kinds = set(map(type, values))
    if kinds == {bytes}:
        digits = '","\\\\x'.join(map(bytes.hex, values))
        return f'{{"\\\\x{digits}"}}'
    if kinds == {datetime}:
        return f"{{{','.join(map(datetime.isoformat, values))}}}"
    if kinds == {str}:
        texts = '","'.join(values)
        if "\\" not in texts and texts.count('"') == 2 * (len(values) - 1):
            return f'{{"{texts}"}}'
    return f"{{{','.join(map(_element, values))}}}"


def _element(value: Any) -> str:
    match value:
        case None:
            return "NULL"
        case str():
            return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        case bytes():
            return f'"\\\\x{value.hex()}"'
        case datetime():
            return f'"{value.isoformat()}"'
    return str(value)


class BadRow(Exception):
    """The database refuses a row for what is in it."""


class BusyRow(BadRow):
    """Somebody else has the row locked, or is about to insert one with the same unique."""


_CODES_OF_BAD_ROWS: Final = frozenset({1153, 1301, 1366, "54000", "54001", "54011"})
"""Errors that are about what is in a row, though drivers call them operational: MySQL's and PostgreSQL's."""
