"""
``settings.GEARMAN``, read once into frozen dataclasses.

The one place that reads settings: everything below gets keyword arguments.
``GEARMAN`` is a dict of aliases, as ``DATABASES`` and ``CACHES`` are. Others than
``default`` are checked, and used by nothing yet.
"""

from __future__ import annotations

import math
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, fields
from dataclasses import field as dataclass_field
from difflib import get_close_matches
from functools import cache
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.dispatch import receiver

from .addresses import DEFAULT_PORT, split_address
from .tls import TLSFilesError, client_context

DEFAULT_ALIAS = "default"
ENQUEUE_DOORS = ("database", "wire")
MAX_DAYS = 100_000
MAX_PROCESSES = 1000


@dataclass(frozen=True, kw_only=True)
class WorkerGroup:
    """A group of worker processes: an entry of ``WORKERS``, or what the command line says."""

    name: str = ""
    processes: tuple[int, int] = (1, 1)
    """How many at a time, and how many while all have work."""

    threads: int = 1
    """Jobs of plain functions that each has at a time."""

    concurrency: int = 1
    """Jobs of ``async def`` functions that each has at a time."""

    functions: tuple[str, ...] = ()
    queues: tuple[str, ...] = ()
    """Which functions it serves; with neither, all that no other group names."""

    exclude: tuple[str, ...] = ()
    """Functions that it does not serve."""

    max_jobs: int | None = None
    """Jobs after which a process is replaced; None for any number."""

    max_memory: tuple[int | None, int | None] = (None, None)
    """MiB that a process may have, and that it may grow, before it is replaced."""


def process_range(value: object) -> tuple[int, int]:
    """
    ``4`` or ``"2..8"`` as a pair.

    Raises:
        ValueError: It is neither; the sentence is to be shown.
    """
    low, dots, high = str(value).partition("..")
    numbers = (low, high) if dots else (low, low)
    if not isinstance(value, bool) and all(part.isascii() and part.isdecimal() for part in numbers):
        pair = int(numbers[0][:9]), int(numbers[1][:9])
        if 1 <= pair[0] <= pair[1] <= MAX_PROCESSES:
            return pair
    raise ValueError(
        f"{value!r} is not a number of processes: use 1 to {MAX_PROCESSES}, or a range such as 2..8"
    )


def memory_limits(value: object) -> tuple[int | None, int | None]:
    """
    ``500``, ``"+200"`` or ``"500,+200"``: MiB that a process may have, and that it may grow.

    Raises:
        ValueError: It is none of these; the sentence is to be shown.
    """
    limits: list[int | None] = [None, None]
    for part in str(value).split(","):
        number = part.strip().removeprefix("+")
        if isinstance(value, bool) or not (number.isascii() and number.isdecimal() and int(number[:9]) > 0):
            raise ValueError(
                f"{value!r} is no limit of memory: use MiB in all, such as 500, of growth, such as +200, "
                "or both: 500,+200"
            )
        limits[part.strip().startswith("+")] = int(number[:9])
    return limits[0], limits[1]


@dataclass(frozen=True, kw_only=True)
class GearmanSettings:
    """One alias of ``settings.GEARMAN``; the keys are these names in upper case."""

    servers: tuple[str, ...] = (f"127.0.0.1:{DEFAULT_PORT}",)
    """``host:port`` of each job server; the first is also where ``gearman_server`` listens."""

    spread: bool = False
    """Whether clients choose the server by a hash of a job's unique, and not the first that answers."""

    database: str = "default"
    """Alias of the database that keeps the jobs."""

    enqueue: str = "database"
    """How ``enqueue`` submits: "database" for a row that our own servers find, "wire" for any job server."""

    connect_timeout: float = 1.0
    """Seconds to wait for a connection."""

    timeout: float = 30.0
    """Seconds to wait for a server's answer; not for the end of a job."""

    run_timeout: float = 60.0
    """Seconds that ``run`` waits for the end of a foreground job."""

    max_packet: int = 64 * 1024 * 1024
    """Bytes of the largest packet body that is sent or taken."""

    job_retries: int = 3
    """How often a job is handed out that has no ``max_attempts`` and loses its workers; 0 for no limit."""

    job_timeout: int | None = None
    """Seconds that an attempt of a job without a ``timeout`` of its own may take; None for no limit."""

    workers: Mapping[str, WorkerGroup] = dataclass_field(default_factory=dict)
    """{name: group} of the processes that ``gearman_worker`` runs when its command line names none."""

    lease: float = 15.0
    """Seconds after which the jobs of a job server that was not heard of are taken over by another."""

    record_foreground: bool = True
    """Whether foreground jobs leave records too."""

    record_logs: bool = True
    """Whether the last lines that a job logged are kept with its record."""

    autodiscover: bool = True
    """Whether each installed app's ``jobs.py`` is imported at start, and its ``tasks.py`` for our backend."""

    keep_successful_days: float | None = 7.0
    """Days that the record of a successful job is kept; None or 0 for ever."""

    keep_failed_days: float | None = 30.0
    """Days that the record of a job that ended otherwise is kept; None or 0 for ever."""

    keep_function_days: Mapping[str, float | None] = dataclass_field(default_factory=dict)
    """{function: days that its records are kept, however its jobs ended}; None or 0 for ever."""

    tls_ca: str = ""
    """File with the CAs that sign the certificates of the other end; not empty turns TLS on."""

    tls_certificate: str = ""
    """File with this end's certificate; ``gearman_server`` and its clients show one to each other."""

    tls_key: str = ""
    """File with that certificate's private key, without a pass phrase."""


@cache
def settings_for(alias: str = DEFAULT_ALIAS) -> GearmanSettings:
    """
    The settings of one alias; everything has a default, so ``GEARMAN`` may be missing.

    Raises:
        ImproperlyConfigured: A key or value is wrong; the sentence names it.
    """
    configured = aliases()
    if alias not in configured:
        if alias == DEFAULT_ALIAS:
            return GearmanSettings()
        known = ", ".join(map(repr, configured)) or "none"
        raise ImproperlyConfigured(f"GEARMAN has no alias {alias!r} (it has {known})")
    options = configured[alias]
    if not isinstance(options, Mapping):
        raise ImproperlyConfigured(f"GEARMAN[{alias!r}] must be a dict, not {options!r}")
    return checked(alias, options)


def aliases() -> Mapping[str, Any]:
    """
    ``settings.GEARMAN`` itself, whose values are not looked at.

    Raises:
        ImproperlyConfigured: Its keys are no aliases, or none of them is the one that is used.
    """
    configured = getattr(settings, "GEARMAN", {})
    if not isinstance(configured, Mapping):
        raise ImproperlyConfigured(f"GEARMAN must be a dict of aliases, not {configured!r}")
    names = [field.name.upper() for field in fields(GearmanSettings)]
    for key, value in configured.items():
        if key in names or (str(key).upper() in names and not isinstance(value, Mapping)):
            raise ImproperlyConfigured(
                f"GEARMAN[{key!r}] is no alias but a setting; put it under GEARMAN[{DEFAULT_ALIAS!r}]"
            )
    if not configured or DEFAULT_ALIAS in configured:
        return configured
    known = ", ".join(map(repr, configured))
    guess = get_close_matches(DEFAULT_ALIAS, map(str, configured), n=1)
    hint = f"; is {guess[0]!r} it, misspelt?" if guess else ""
    raise ImproperlyConfigured(
        f"GEARMAN has no {DEFAULT_ALIAS!r}, whose settings are used (it has {known}){hint}"
    )


def checked(alias: str, options: Mapping[str, Any]) -> GearmanSettings:
    """
    The settings that an alias would have with these.

    Raises:
        ImproperlyConfigured: A key or value is wrong; the sentence names it.
    """
    names = {field.name.upper(): field for field in fields(GearmanSettings)}
    values: dict[str, Any] = {}
    for key, value in options.items():
        field = names.get(key)
        where = f"GEARMAN[{alias!r}][{key!r}]"
        if field is None:
            guess = get_close_matches(str(key).upper(), names, n=1)
            hint = f"did you mean {guess[0]!r}?" if guess else f"known are {', '.join(names)}"
            raise ImproperlyConfigured(f"{where} is not a setting; {hint}")
        if field.name == "servers":
            value = _servers(where, value)
        elif field.name == "job_retries":
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ImproperlyConfigured(f"{where} must be a whole number from 0, not {value!r}")
        elif field.name == "job_timeout":
            if value is not None and (type(value) is not int or not 1 <= value < 2**31):
                raise ImproperlyConfigured(
                    f"{where} must be a whole number of seconds from 1, or None, not {value!r}"
                )
        elif field.name == "workers":
            if not isinstance(value, Mapping):
                raise ImproperlyConfigured(f"{where} must be a dict of names and groups, not {value!r}")
            value = {name: _group(f"{where}[{name!r}]", name, group) for name, group in value.items()}
        elif field.name == "keep_function_days":
            if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
                raise ImproperlyConfigured(f"{where} must be a dict of functions and days, not {value!r}")
            value = {name: _days(f"{where}[{name!r}]", days) for name, days in value.items()}
        elif field.name.startswith("keep_"):
            value = _days(where, value)
        elif isinstance(field.default, bool):
            if not isinstance(value, bool):
                raise ImproperlyConfigured(f"{where} must be True or False, not {value!r}")
        elif isinstance(field.default, int | float):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ImproperlyConfigured(f"{where} must be a number above 0, not {value!r}")
        elif field.name == "enqueue":
            if value not in ENQUEUE_DOORS:
                raise ImproperlyConfigured(f"{where} must be 'database' or 'wire', not {value!r}")
        elif field.name.startswith("tls_") and isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif isinstance(field.default, str) and not isinstance(value, str):
            raise ImproperlyConfigured(f"{where} must be a string, not {value!r}")
        values[field.name] = value
    made = GearmanSettings(**values)
    _check_tls(f"GEARMAN[{alias!r}]", made)
    return made


def _group(where: str, name: object, options: object) -> WorkerGroup:
    if not isinstance(name, str) or not name.isprintable() or not name:
        raise ImproperlyConfigured(f"{where} must have a name that is a string")
    if not isinstance(options, Mapping):
        raise ImproperlyConfigured(f"{where} must be a dict, not {options!r}")
    known = [field.name.upper() for field in fields(WorkerGroup) if field.name != "name"]
    values: dict[str, Any] = {"name": name}
    for key, value in options.items():
        here = f"{where}[{key!r}]"
        if key not in known:
            raise ImproperlyConfigured(f"{here} is not a setting; known are {', '.join(known)}")
        try:
            if key == "PROCESSES":
                value = process_range(value)
            elif key == "MAX_MEMORY":
                value = (None, None) if value is None else memory_limits(value)
            elif key in ("FUNCTIONS", "QUEUES", "EXCLUDE"):
                if isinstance(value, str) or not all(isinstance(each, str) for each in value):
                    raise ValueError(f"it must be a list of names, not {value!r}")
                value = tuple(value)
            elif not (key == "MAX_JOBS" and value is None) and (
                type(value) is not int or not 1 <= value <= 1_000_000
            ):
                raise ValueError(f"it must be a whole number from 1, not {value!r}")
        except (TypeError, ValueError) as error:
            raise ImproperlyConfigured(f"{here}: {error}") from error
        values[key.lower()] = value
    return WorkerGroup(**values)


def _check_tls(where: str, options: GearmanSettings) -> None:
    # Half a configuration must not turn out as plain text.
    if bool(options.tls_certificate) != bool(options.tls_key):
        raise ImproperlyConfigured(f"{where} needs both of TLS_CERTIFICATE and TLS_KEY, or none")
    if options.tls_certificate and not options.tls_ca:
        raise ImproperlyConfigured(
            f"{where} has TLS_CERTIFICATE but no TLS_CA, by which to know the other end"
        )


def client_tls(options: GearmanSettings) -> ssl.SSLContext | None:
    """
    What a client or worker of an alias speaks; None for plain text, when ``TLS_CA`` is not set.

    Raises:
        ImproperlyConfigured: A file is missing or wrong; the sentence names it.
    """
    if not options.tls_ca:
        return None
    try:
        return client_context(options.tls_ca, options.tls_certificate or None, options.tls_key or None)
    except TLSFilesError as error:
        raise ImproperlyConfigured(f"TLS does not work: {error}") from error


def task_backend_paths() -> list[tuple[str, str]]:
    """Alias and import path of each backend of ``settings.TASKS`` that is not Django's own."""
    tasks = getattr(settings, "TASKS", None)
    if not isinstance(tasks, Mapping):
        return []
    paths = [(alias, params.get("BACKEND")) for alias, params in tasks.items() if isinstance(params, Mapping)]
    return [
        (str(alias), path)
        for alias, path in paths
        if isinstance(path, str) and not path.startswith(("django.", "django_tasks."))
    ]


def _days(where: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_DAYS:
        raise ImproperlyConfigured(
            f"{where} must be a number of days, or None or 0 to keep records for ever, not {value!r}"
        )
    return float(value) or None


def _servers(where: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple) or not value:
        raise ImproperlyConfigured(f'{where} must be a list such as ["127.0.0.1:4730"], not {value!r}')
    for server in value:
        try:
            split_address(server)
        except (AttributeError, ValueError) as error:
            raise ImproperlyConfigured(f"{where}: {error}") from error
    return tuple(value)


@receiver(setting_changed)
def _forget(*, setting: str, **kwargs: Any) -> None:
    if setting == "GEARMAN":
        settings_for.cache_clear()
