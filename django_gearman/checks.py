"""System checks: what `manage.py check` says of a project's Gearman settings."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from django.apps import AppConfig
from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from . import conf
from .addresses import split_address
from .models import JobRecord


@register("gearman")
def check_settings(*, app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """Every alias of ``GEARMAN`` can be read."""
    messages: list[CheckMessage] = []
    configured = getattr(settings, "GEARMAN", {})
    for alias in configured if isinstance(configured, dict) else [conf.DEFAULT_ALIAS]:
        try:
            options = conf.settings_for(alias)
        except ImproperlyConfigured as error:
            messages.append(
                Error(str(error), hint="The README lists every setting.", id="django_gearman.E002")
            )
            continue
        if options.database not in settings.DATABASES:
            messages.append(
                Error(
                    f"GEARMAN[{alias!r}]['DATABASE'] is {options.database!r}, which is not in DATABASES.",
                    hint=f"Use one of {', '.join(settings.DATABASES)}.",
                    id="django_gearman.E009",
                )
            )
    return messages


@register("gearman")
def check_databases(*, app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """SQLite is set up so that views and the job server can write side by side."""
    messages: list[CheckMessage] = []
    try:
        alias = conf.settings_for().database
    except ImproperlyConfigured:
        return messages  # check_settings tells
    database = settings.DATABASES.get(alias, {})
    if database.get("ENGINE") == "django.db.backends.sqlite3":
        options = database.get("OPTIONS", {})
        if str(options.get("transaction_mode", "")).upper() != "IMMEDIATE":
            messages.append(
                Warning(
                    f"Transactions of the SQLite database {alias!r} may end with 'database is locked'.",
                    hint=(
                        "Add OPTIONS = {'transaction_mode': 'IMMEDIATE', "
                        "'init_command': 'PRAGMA journal_mode=WAL'} to the database."
                    ),
                    id="django_gearman.W001",
                )
            )
    return messages


@register(Tags.database)
def check_durability(
    *, app_configs: Sequence[AppConfig] | None, databases: Sequence[str] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """
    An acknowledged job survives the loss of power.

    Asks the databases themselves, and so only runs where they are named:
    ``manage.py check --database default``, and ``migrate``.
    """
    aliases = {options.database for _, options in _readable_aliases()} or {conf.GearmanSettings().database}
    messages: list[CheckMessage] = []
    for alias in sorted(aliases & set(databases or ())):
        connection = connections[alias]
        messages += [
            Warning(f"The database {alias!r} {problem}", hint=hint, id=id)
            for id, problem, hint in durability_problems(connection)
        ]
    return messages


def durability_problems(connection: BaseDatabaseWrapper) -> list[tuple[str, str, str]]:
    """
    What is wrong with how a database keeps commits, each as three texts.

    An id, a sentence that begins with the database's name, without it, and a remedy.

    Raises:
        DatabaseError: The database cannot be asked.
    """
    ask = _PROBLEMS.get(connection.vendor)
    if ask is None:
        return []
    with connection.cursor() as cursor:
        return list(ask(cursor))


_UNSYNCED: Final = "django_gearman.W004"
_NO_TRANSACTIONS: Final = "django_gearman.W005"
_SMALL_PACKETS: Final = "django_gearman.W006"


def _problems_of_sqlite(cursor: Any) -> Iterator[tuple[str, str, str]]:
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


def _problems_of_postgresql(cursor: Any) -> Iterator[tuple[str, str, str]]:
    for name in ("fsync", "synchronous_commit"):
        cursor.execute(f"SHOW {name}")
        if cursor.fetchone()[0] == "off":
            yield (
                _UNSYNCED,
                f"does not sync commits ({name} is off): acknowledged jobs may be lost with the power.",
                f"Set {name} = on for the database that keeps the jobs.",
            )


def _problems_of_mysql(cursor: Any) -> Iterator[tuple[str, str, str]]:
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
    largest = max(
        [options.max_packet for _, options in _readable_aliases()] or [conf.GearmanSettings().max_packet]
    )
    # What is no text may take two bytes for one in a statement.
    if packet < 2 * largest:
        yield (
            _SMALL_PACKETS,
            f"takes no statement above {packet} bytes (max_allowed_packet), and jobs may be of {largest}: "
            "it refuses the larger ones.",
            "Set max_allowed_packet to twice of MAX_PACKET, or MAX_PACKET to half of it.",
        )


_PROBLEMS: Final[dict[str, Callable[[Any], Iterator[tuple[str, str, str]]]]] = {
    "sqlite": _problems_of_sqlite,
    "postgresql": _problems_of_postgresql,
    "mysql": _problems_of_mysql,
}


@register("gearman")
def check_tls_files(*, app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """The files of TLS are there."""
    return [
        Error(
            f"GEARMAN[{alias!r}]['{key}'] is {file!r}, which cannot be read.",
            hint="Name a file in PEM form that this user may read; plain text is never spoken instead.",
            id="django_gearman.E010",
        )
        for alias, options in _readable_aliases()
        for key, file in (
            ("TLS_CA", options.tls_ca),
            ("TLS_CERTIFICATE", options.tls_certificate),
            ("TLS_KEY", options.tls_key),
        )
        if file and not (os.path.isfile(file) and os.access(file, os.R_OK))
    ]


@register("gearman", deploy=True)
def check_network(*, app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """What goes over a network is encrypted, and both ends are known."""
    messages: list[CheckMessage] = []
    for alias, options in _readable_aliases():
        if options.tls_ca:
            continue
        distant = [server for server in options.servers if not _is_loopback(split_address(server)[0])]
        if distant:
            messages.append(
                Warning(
                    f"Jobs of GEARMAN[{alias!r}] go to {', '.join(distant)} in plain text, "
                    "where whoever reaches the port may submit and take them.",
                    hint="Set TLS_CA, TLS_CERTIFICATE and TLS_KEY, unless the network is yours alone.",
                    id="django_gearman.W003",
                )
            )
    return messages


def _readable_aliases() -> list[tuple[str, conf.GearmanSettings]]:
    configured = getattr(settings, "GEARMAN", {})
    found = []
    for alias in configured if isinstance(configured, dict) else []:
        try:
            found.append((alias, conf.settings_for(alias)))
        except ImproperlyConfigured:
            pass  # check_settings tells
    return found


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False  # a name; whose it is may change
