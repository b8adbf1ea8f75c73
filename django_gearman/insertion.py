"""
Many rows that differ in their workload alone, in few statements.

Models and the database's own SQL; nothing of what a job is. Django's
``bulk_create`` would spend ten times as long on preparing every column of
every row, which are all the same here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Final

from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from .models import JobRecord

ROWS_AT_ONCE: Final = 5_000
BYTES_AT_ONCE: Final = 8 * 1024 * 1024
"""What one statement carries at the most, or one row."""

_OWN: Final = ("group_index", "workload")
"""Fields in which the rows differ."""

_UNITED: Final = 1_000
"""Parts of a UNION that MariaDB's parser takes without complaint."""


def insert_workloads(
    template: JobRecord, workloads: Sequence[bytes], using: str, places: Sequence[int | None] = ()
) -> list[int]:
    """
    Insert a row like the template for each workload, all or none.

    Args:
        template: An unsaved record without a unique.
        using: Alias of the database.
        places: The place of each in its group; none for jobs without one.
    Returns:
        The rows' ids, in the workloads' order.
    """
    connection = connections[using]
    insert = {"sqlite": _insert_by_sqlite, "postgresql": _insert_by_postgresql}.get(connection.vendor)
    if insert is None:
        # MySQL does not tell the ids of many rows.
        insert = _insert_by_mariadb if getattr(connection, "mysql_is_mariadb", False) else _insert_singly
    ids: list[int] = []
    with transaction.atomic(using=using):
        for part in _in_parts(workloads):
            of_part: list[int | None] = [None] * len(part)
            if places:
                of_part = list(places[len(ids) : len(ids) + len(part)])
            ids += insert(connection, template, part, of_part)
    return ids


def like(template: JobRecord, id: int, workload: bytes) -> JobRecord:
    """The record of one of the rows."""
    record = copy.copy(template)
    record._state = copy.copy(template._state)
    record.pk = id
    record.workload = workload
    return record


def _in_parts(workloads: Sequence[bytes]) -> Iterator[list[bytes]]:
    part: list[bytes] = []
    size = 0
    for workload in workloads:
        if part and (len(part) >= ROWS_AT_ONCE or size + len(workload) > BYTES_AT_ONCE):
            yield part
            part, size = [], 0
        part.append(workload)
        size += len(workload)
    if part:
        yield part


def _columns(connection: BaseDatabaseWrapper, template: JobRecord) -> dict[str, Any]:
    """{quoted column: the template's value, as the driver takes it}, ``_OWN`` last, without the id."""
    fields = [field for field in JobRecord._meta.concrete_fields if not field.primary_key]
    fields.sort(key=lambda field: _OWN.index(field.name) + 1 if field.name in _OWN else 0)
    quote = connection.ops.quote_name
    return {
        quote(str(field.column)): field.get_db_prep_save(field.pre_save(template, True), connection)
        for field in fields
    }


def _insert_by_sqlite(
    connection: BaseDatabaseWrapper, template: JobRecord, workloads: list[bytes], places: list[int | None]
) -> list[int]:
    columns = _columns(connection, template)
    *constants, _, _ = columns.values()
    table = connection.ops.quote_name(JobRecord._meta.db_table)
    marks = ", ".join(["%s"] * len(columns))
    with connection.cursor() as cursor:
        cursor.executemany(
            f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})",
            [(*constants, *own) for own in zip(places, workloads, strict=True)],
        )
        # Nobody else writes before this transaction ends: the ids follow each other.
        cursor.execute("SELECT last_insert_rowid()")
        last = int(cursor.fetchone()[0])
    return list(range(last - len(workloads) + 1, last + 1))


def _insert_by_postgresql(
    connection: BaseDatabaseWrapper, template: JobRecord, workloads: list[bytes], places: list[int | None]
) -> list[int]:
    columns = _columns(connection, template)
    *constants, _, _ = columns.values()
    table = connection.ops.quote_name(JobRecord._meta.db_table)
    id = connection.ops.quote_name("id")
    types = {
        connection.ops.quote_name(str(field.column)): field.db_type(connection)
        for field in JobRecord._meta.concrete_fields
    }
    marks = "".join(f"%s::{types[name]}, " for name in list(columns)[:-2])
    with connection.cursor() as cursor:
        # Defaults, as the id's, are worked out in the order of the rows.
        cursor.execute(
            f"INSERT INTO {table} ({', '.join(columns)}) SELECT {marks} w.index, w.workload "
            "FROM unnest(%s::integer[], %s::bytea[]) WITH ORDINALITY AS w(index, workload, place) "
            f"ORDER BY w.place RETURNING {id}",
            [*constants, places, workloads],
        )
        return sorted(id for (id,) in cursor.fetchall())


def _insert_by_mariadb(
    connection: BaseDatabaseWrapper, template: JobRecord, workloads: list[bytes], places: list[int | None]
) -> list[int]:
    columns = _columns(connection, template)
    *constants, _, _ = columns.values()
    table = connection.ops.quote_name(JobRecord._meta.db_table)
    marks = "%s, " * len(constants)
    ids: list[int] = []
    for start in range(0, len(workloads), _UNITED):
        part = workloads[start : start + _UNITED]
        # A bare text would have to be UTF-8 to be a column of such a table.
        rows = " UNION ALL SELECT %s, %s, _binary %s" * (len(part) - 1)
        own = zip(places[start : start + _UNITED], part, strict=True)
        numbered = [value for place, values in enumerate(own) for value in (place, *values)]
        with connection.cursor() as cursor:
            cursor.execute(
                f"INSERT INTO {table} ({', '.join(columns)}) SELECT {marks} w.member, w.workload "
                f"FROM (SELECT %s AS place, %s AS member, _binary %s AS workload{rows}) w "
                "ORDER BY w.place RETURNING id",
                [*constants, *numbered],
            )
            ids += sorted(id for (id,) in cursor.fetchall())
    return ids


def _insert_singly(
    connection: BaseDatabaseWrapper,
    template: JobRecord,
    workloads: list[bytes],
    places: list[int | None],
) -> list[int]:
    ids = []
    for place, workload in zip(places, workloads, strict=True):
        record = like(template, 0, workload)
        record.pk = None
        record.group_index = place
        record.save(using=connection.alias, force_insert=True)
        ids.append(int(record.pk))
    return ids
