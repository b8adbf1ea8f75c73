"""What `manage.py check --database` and the start of a server say of how a database keeps commits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from django.db.backends.base.base import BaseDatabaseWrapper

from .models import JobRecord


def durability_problems(connection: BaseDatabaseWrapper, max_packet: int) -> list[tuple[str, str, str]]:
    """
    What is wrong with how a database keeps commits, each as three texts.

    An id, a sentence that begins with the database's name, without it, and a remedy.

    Args:
        max_packet: Bytes of the max_packet job or result that is to be kept.
    Raises:
        DatabaseError: The database cannot be asked.
    """
    ask = _PROBLEMS.get(connection.vendor)
    if ask is None:
        return []
    with connection.cursor() as cursor:
        return list(ask(cursor, max_packet))


_UNSYNCED: Final = "django_gearman.W004"
_NO_TRANSACTIONS: Final = "django_gearman.W005"
_SMALL_PACKETS: Final = "django_gearman.W006"


def _problems_of_sqlite(cursor: Any, max_packet: int) -> Iterator[tuple[str, str, str]]:
    cursor.execute("PRAGMA journal_mode")
    (mode,) = cursor.fetchone()
    cursor.execute("PRAGMA synchronous")
    (synchronous,) = cursor.fetchone()
    hint = (
        "Set OPTIONS = {'init_command': 'PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL'} for it. "
        "(The job server does so for its own connection; this is about the rows that enqueue inserts.)"
    )
    # In WAL mode NORMAL syncs at checkpoints only.
    if synchronous < (2 if mode == "wal" else 1):
        yield _UNSYNCED, "does not sync commits: a job that was enqueued may be lost with the power.", hint
    elif mode not in ("wal", "memory"):
        yield _UNSYNCED, f"has no write-ahead log (its journal_mode is {mode!r}).", hint


def _problems_of_postgresql(cursor: Any, max_packet: int) -> Iterator[tuple[str, str, str]]:
    for name in ("fsync", "synchronous_commit"):
        cursor.execute(f"SHOW {name}")
        if cursor.fetchone()[0] == "off":
            yield (
                _UNSYNCED,
                f"does not sync commits ({name} is off): acknowledged jobs may be lost with the power.",
                f"Set {name} = on for the database that keeps the jobs.",
            )


def _problems_of_mysql(cursor: Any, max_packet: int) -> Iterator[tuple[str, str, str]]:
    cursor.execute("SELECT @@innodb_flush_log_at_trx_commit, @@max_allowed_packet")
    flush, packet = cursor.fetchone()
    if flush != 1:
        yield (
            _UNSYNCED,
            f"does not sync commits (innodb_flush_log_at_trx_commit is {flush}): "
            "acknowledged jobs may be lost with the power.",
            "Set innodb_flush_log_at_trx_commit = 1.",
        )
    table = JobRecord._meta.db_table
    cursor.execute(
        "SELECT engine FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name = %s",
        [table],
    )
    engine = (cursor.fetchone() or ("InnoDB",))[0]
    if engine != "InnoDB":
        yield (
            _NO_TRANSACTIONS,
            f"keeps jobs in a table without transactions (of {engine}): they may be lost or run twice.",
            f"ALTER TABLE {table} ENGINE = InnoDB, and set default_storage_engine = InnoDB.",
        )
    # What is no text may take two bytes for one in a statement.
    if packet < 2 * max_packet:
        yield (
            _SMALL_PACKETS,
            f"takes no statement above {packet} bytes (max_allowed_packet), and jobs may be of {max_packet}: "
            "it refuses the larger ones.",
            "Set max_allowed_packet to twice of MAX_PACKET, or MAX_PACKET to half of it.",
        )


_PROBLEMS: Final[dict[str, Callable[[Any, int], Iterator[tuple[str, str, str]]]]] = {
    "sqlite": _problems_of_sqlite,
    "postgresql": _problems_of_postgresql,
    "mysql": _problems_of_mysql,
}
