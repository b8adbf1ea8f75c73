"""System checks: what `manage.py check` says of a project's Gearman settings."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Final

from django.apps import AppConfig, apps
from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, DatabaseError, connections
from django.utils.module_loading import import_string

from . import conf
from .addresses import split_address
from .durability import durability_problems
from .exceptions import InvalidSchedule, MissingCronsim
from .job_declarations import declared_schedules, scheduled_record
from .models import Schedule
from .registry import registry
from .scheduler import columns_of
from .schedules import time_zone

_OF_OURS: Final = " in the repository of django_gearman"
"""Where the pages are that a hint names: a wheel has none."""


@register("gearman")
def check_settings(*, app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """Every alias of ``GEARMAN`` can be read."""
    messages: list[CheckMessage] = []

    def refuse(error: ImproperlyConfigured) -> None:
        hint = f"The README{_OF_OURS} lists every setting."
        messages.append(Error(str(error), hint=hint, id="django_gearman.E002"))

    try:
        configured = conf.aliases()
    except ImproperlyConfigured as error:
        refuse(error)
        return messages
    for alias in configured:
        try:
            options = conf.settings_for(alias)
        except ImproperlyConfigured as error:
            refuse(error)
            continue
        if alias != conf.DEFAULT_ALIAS:
            messages.append(
                Warning(
                    f"GEARMAN[{alias!r}] is used by nobody: jobs, workers and job servers have the settings "
                    f"of GEARMAN[{conf.DEFAULT_ALIAS!r}].",
                    hint=f"Move what is to hold to {conf.DEFAULT_ALIAS!r}, and leave the rest out.",
                    id="django_gearman.W010",
                )
            )
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
        if _lacks_log(database):
            messages.append(
                Warning(
                    f"The SQLite database {alias!r} has no write-ahead log: "
                    "views cannot read while the job server writes.",
                    hint=(
                        "Add 'init_command': 'PRAGMA journal_mode=WAL' to its OPTIONS. "
                        "(A job server turns it on when it starts, for good.)"
                    ),
                    id="django_gearman.W007",
                )
            )
    return messages


def _lacks_log(database: Mapping[str, Any]) -> bool:
    """Whether an SQLite file is there that has no write-ahead log, and no setting turns it on."""
    command = str(database.get("OPTIONS", {}).get("init_command", ""))
    if re.search(r"journal_mode\s*=\s*['\"]?wal", command, re.IGNORECASE):
        return False
    try:
        # Not by a connection, which a plain check must not open. https://www.sqlite.org/fileformat.html
        with open(str(database.get("NAME", "")), "rb") as file:
            header = file.read(20)
    except (OSError, ValueError):
        return False  # in memory, or not made yet
    return len(header) == 20 and header[18:20] != b"\2\2"


@register("gearman")
def check_transactions(*, app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """``enqueue`` and what a view changes beside it are of one transaction, or it waits for its commit."""
    return [
        Warning(
            f"GEARMAN[{alias!r}]['DATABASE'] is {options.database!r}, another database than 'default': "
            "a job may exist though what belongs to it was rolled back, or the other way round.",
            hint=(
                "Keep jobs in 'default', or enqueue in transaction.on_commit() and silence this check by "
                "SILENCED_SYSTEM_CHECKS."
            ),
            id="django_gearman.W008",
        )
        for alias, options in _readable_aliases()
        if options.database != DEFAULT_DB_ALIAS and options.database in settings.DATABASES
    ]


@register("gearman")
def check_task_backends(*, app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """The backends of ``TASKS`` can be imported, and Django looks at them."""
    messages: list[CheckMessage] = []
    for alias, path in conf.task_backend_paths():
        try:
            import_string(path)
        except ImportError as error:
            messages.append(
                Error(
                    f"TASKS[{alias!r}]['BACKEND'] is {path!r}, which cannot be imported: {error}.",
                    hint=f'Ours is "django_gearman.backends.GearmanBackend"; see docs/tasks.md{_OF_OURS}.',
                    id="django_gearman.E017",
                )
            )
            continue
        if (
            path.startswith("django_gearman.")
            and find_spec("django.tasks") is None
            and not apps.is_installed("django_tasks")
        ):
            messages.append(
                Warning(
                    "TASKS is there, but the app of the django-tasks package is not: "
                    "backends are not checked, and what becomes of tasks is not logged.",
                    hint='Add "django_tasks" to INSTALLED_APPS.',
                    id="django_gearman.W009",
                )
            )
            break
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
    largest = max(
        [options.max_packet for _, options in _readable_aliases()] or [conf.GearmanSettings().max_packet]
    )
    messages: list[CheckMessage] = []
    for alias in sorted(aliases & set(databases or ())):
        connection = connections[alias]
        messages += [
            Warning(f"The database {alias!r} {problem}", hint=hint, id=id)
            for id, problem, hint in durability_problems(connection, largest)
        ]
    return messages


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


@register("gearman")
def check_workers(*, app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """What the groups of ``WORKERS`` serve is there."""
    options = dict(_readable_aliases()).get(conf.DEFAULT_ALIAS)
    if options is None or not registry:
        return []
    queues = {job.queue_name for job in registry.values()}
    no_function = "which is no function under @job or @task: gearman_worker does not start with it"
    return [
        Warning(
            f"GEARMAN[{conf.DEFAULT_ALIAS!r}]['WORKERS'][{group.name!r}]['{key}'] names {name!r}, {problem}.",
            hint=f"Known are {', '.join(sorted(known))}.",
            id="django_gearman.W011",
        )
        for group in options.workers.values()
        for key, names, known, problem in (
            ("FUNCTIONS", group.functions, registry.keys(), no_function),
            ("EXCLUDE", group.exclude, registry.keys(), no_function),
            ("QUEUES", group.queues, queues, "a queue without functions"),
        )
        for name in names
        if name not in known
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


@register("gearman")
def check_schedules(*, app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """Every schedule of the code names times, and calls its function as it can be called."""
    messages: list[CheckMessage] = []
    for name, (function, declaration) in declared_schedules().items():
        try:
            row = Schedule(name=name, **columns_of(function, declaration))
            time_zone(row.zone_name)
            row.timing  # noqa: B018  # it refuses
            scheduled_record(row)
        except MissingCronsim as error:
            messages.append(
                Error(f"{error}.", hint=f"The schedule of {name} is a cron.", id="django_gearman.E011")
            )
            break
        except (InvalidSchedule, ImproperlyConfigured, TypeError, ValueError, DatabaseError) as error:
            if isinstance(error, DatabaseError) or isinstance(error.__cause__, DatabaseError):
                continue  # a unique that asks the database, which may not even be migrated yet
            messages.append(
                Error(
                    f"The schedule of {name} does not work: {error}.",
                    hint=f"See cron(), every() and their arguments in docs/schedules.md{_OF_OURS}.",
                    id="django_gearman.E006",
                )
            )
    return messages


def _readable_aliases() -> list[tuple[str, conf.GearmanSettings]]:
    found = []
    try:
        configured = conf.aliases()
    except ImproperlyConfigured:
        return []  # check_settings tells
    for alias in configured:
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
