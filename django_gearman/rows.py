"""
One record: made, inserted, and looked at again, by statements that are written once.

The ORM would prepare each of them anew, which takes longer than the database
does. Where a project listens to the model's own signals, the ORM does it.
"""

from __future__ import annotations

from datetime import datetime
from functools import cache, lru_cache
from typing import Any, TypeAlias

from django.db import connections, router, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Field
from django.db.models.base import ModelState
from django.db.models.signals import post_init, post_save, pre_init, pre_save

from .models import JobRecord

_SIGNALS_OF_SAVE = (pre_save, post_save)
_SIGNALS_OF_INIT = (pre_init, post_init)

_PLAIN = frozenset({type(None), str, int, bool, bytes})
"""Types whose values every driver takes as they are."""

AnyField: TypeAlias = "Field[Any, Any]"


def new(*, enqueued_at: datetime, **values: Any) -> JobRecord:
    """An unsaved record, as ``JobRecord(**values)`` makes it, of values by the names of their columns."""
    if any(signal.has_listeners(JobRecord) for signal in _SIGNALS_OF_INIT):
        return JobRecord(enqueued_at=enqueued_at, **values)
    record = JobRecord.__new__(JobRecord)
    record.__dict__.update(_defaults(), enqueued_at=enqueued_at, **values)
    record._state = ModelState()
    return record


def insert(record: JobRecord, using: str) -> None:
    """
    Insert an unsaved record, as ``save(force_insert=True)`` does.

    Raises:
        DatabaseError: It cannot be inserted; a transaction around it is to be rolled back.
    """
    if any(signal.has_listeners(JobRecord) for signal in _SIGNALS_OF_SAVE):
        record.save(using=using, force_insert=True)
        return
    connection = connections[using]
    sql, fields, returns = _insertion(using)
    values = []
    for field in fields:
        value = getattr(record, field.attname)
        # To ask each field would take as long as to insert the row.
        if type(value) not in _PLAIN:
            value = field.get_db_prep_save(value, connection)
        values.append(value)
    with transaction.mark_for_rollback_on_error(using=using), connection.cursor() as cursor:
        cursor.execute(sql, values)
        if returns:
            (record.pk,) = cursor.fetchone()
        else:
            record.pk = connection.ops.last_insert_id(cursor, JobRecord._meta.db_table, "id")
    record._state.adding, record._state.db = False, using


def refresh(record: JobRecord, names: tuple[str, ...]) -> None:
    """
    Look at some fields of a record again, as ``refresh_from_db(fields=names)`` does.

    Raises:
        JobRecord.DoesNotExist: It is gone.
    """
    if any(signal.has_listeners(JobRecord) for signal in _SIGNALS_OF_INIT):
        # Not by the router, which may have reads go to a replica.
        record.refresh_from_db(using=record._state.db, fields=names)
        return
    connection = connections[record._state.db or router.db_for_read(JobRecord, instance=record)]
    sql, fields = _selection(connection.alias, names)
    with connection.cursor() as cursor:
        cursor.execute(sql, [record.pk])
        row = cursor.fetchone()
    if row is None:
        raise JobRecord.DoesNotExist
    for field, value in zip(fields, row, strict=True):
        if value is not None:
            value = _converted(field, value, connection)
        setattr(record, field.attname, value)


def sees_now(using: str) -> bool:
    """Whether each statement sees what is committed by then, and not what was when the transaction began."""
    connection = connections[using]
    # SQLite has one who writes at a time, and nothing to lock.
    if connection.vendor == "sqlite" or not connection.in_atomic_block:
        return True
    if connection.vendor == "postgresql":
        # Not what Django was told: a role, a database or the transaction itself may have its own.
        with connection.cursor() as cursor:
            cursor.execute("SHOW transaction_isolation")
            (level,) = cursor.fetchone()
    else:
        # None leaves it to MySQL, whose own is REPEATABLE READ.
        level = getattr(connection, "isolation_level", None)
    return str(level).lower().endswith("committed")


def live_now(record: JobRecord, using: str) -> JobRecord | None:
    """
    The live record of another's unique as it is now, though the transaction may see what was before.

    Raises:
        OperationalError: PostgreSQL has another by now than the transaction sees: begin that again.
    """
    connection = connections[using]
    table, key = map(connection.ops.quote_name, (JobRecord._meta.db_table, "unique_key"))
    # Only a lock tells: the weakest that the job's end does not go with.
    lock = "LOCK IN SHARE MODE" if connection.vendor == "mysql" else "FOR KEY SHARE"
    found = JobRecord.objects.using(using).raw(
        f"SELECT * FROM {table} WHERE {key} = %s {lock}", [record.unique_key]
    )
    with transaction.atomic(using=using):
        live = next(iter(found), None)
        # PostgreSQL lets go of it then, so that the job may end before the transaction does.
        transaction.set_rollback(True, using=using)
    return live


def _converted(field: AnyField, value: Any, connection: BaseDatabaseWrapper) -> Any:
    expression = field.cached_col
    for convert in (*connection.ops.get_db_converters(expression), *field.get_db_converters(connection)):
        value = convert(value, expression, connection)
    return value


@cache
def _defaults() -> dict[str, Any]:
    """{column: value} of a new record that nothing is told of, but for the moment."""
    return {field.attname: field.get_default() for field in JobRecord._meta.concrete_fields}


@lru_cache
def _insertion(using: str) -> tuple[str, tuple[AnyField, ...], bool]:
    """Statement, the fields whose values it wants, and whether it returns the id."""
    connection = connections[using]
    returns = connection.vendor == "postgresql"
    fields = tuple(field for field in JobRecord._meta.concrete_fields if not field.primary_key)
    columns, table, id = _names(connection, fields)
    marks = ", ".join(["%s"] * len(fields))
    sql = f"INSERT INTO {table} ({columns}) VALUES ({marks})"
    return f"{sql} RETURNING {id}" if returns else sql, fields, returns


@lru_cache
def _selection(using: str, names: tuple[str, ...]) -> tuple[str, tuple[AnyField, ...]]:
    by_name = {field.name: field for field in JobRecord._meta.concrete_fields}
    fields = tuple(by_name[name] for name in names)
    columns, table, id = _names(connections[using], fields)
    return f"SELECT {columns} FROM {table} WHERE {id} = %s", fields


def _names(connection: BaseDatabaseWrapper, fields: tuple[AnyField, ...]) -> tuple[str, str, str]:
    """Columns, table and primary key, as the database wants them."""
    quote = connection.ops.quote_name
    columns = ", ".join(quote(str(field.column)) for field in fields)
    return columns, quote(JobRecord._meta.db_table), quote("id")
