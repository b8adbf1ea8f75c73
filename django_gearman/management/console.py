"""What the long-running commands share: where log lines go, a check of the tables, no connection."""

from __future__ import annotations

import logging
import os
import sys
from logging.handlers import SYSLOG_UDP_PORT, SysLogHandler, WatchedFileHandler
from typing import Final, TextIO

from django.core.management.base import CommandError, OutputWrapper
from django.db import DatabaseError, connections
from django.db.migrations.executor import MigrationExecutor

from ..addresses import split_address
from ..models import JobRecord

APP_LABEL = "django_gearman"

SYSLOG: Final = "/dev/log"
"""The socket of this machine's syslog."""

VERBOSITY: Final = {0: logging.ERROR, 1: logging.INFO, 2: logging.DEBUG, 3: logging.DEBUG}
"""Levels of Django's ``--verbosity``."""

VERBOSE: Final = {
    "FATAL": logging.CRITICAL,
    "ALERT": logging.CRITICAL,
    "CRITICAL": logging.CRITICAL,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "NOTICE": logging.INFO,
    "INFO": logging.INFO,
    "DEBUG": logging.DEBUG,
}
"""Levels of gearmand's ``--verbose``."""

_GREEN: Final = "\x1b[32m"
_PLAIN: Final = "\x1b[0m"
_COLOURS: Final = {
    logging.ERROR: "\x1b[31m",
    logging.WARNING: "\x1b[33m",
    logging.INFO: "",
    logging.NOTSET: "\x1b[2m",
}
"""{level: how its lines are shown}, the gravest first."""

_LINE: Final = "%(asctime)s %(levelname)s [%(process)d] %(message)s"


def log_to_terminal(verbosity: int) -> None:
    """Show the package's log lines on stderr, unless the project's ``LOGGING`` says where they go."""
    if not has_log():
        log_to_stderr()
        set_level(VERBOSITY[verbosity])


def has_log() -> bool:
    """Whether the project's ``LOGGING``, or an earlier call, says where the log goes."""
    return logging.getLogger(APP_LABEL).hasHandlers()


def set_level(level: int) -> None:
    """Log what is as grave as that, or graver."""
    logging.getLogger(APP_LABEL).setLevel(level)


def log_to_stderr() -> None:
    formatter = ColouredFormatter if is_coloured(sys.stderr) else logging.Formatter
    _add(logging.StreamHandler(sys.stderr), formatter(_LINE, "%H:%M:%S"))


def is_coloured(stream: TextIO | None) -> bool:
    """Whether a terminal shows it that has colours, and nobody said no. See https://no-color.org."""
    is_terminal = stream is not None and stream.isatty()
    return is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class ColouredFormatter(logging.Formatter):
    """Lines whose colour says how grave they are."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno == logging.INFO and " succeeded in " in text:
            return f"{_GREEN}{text}{_PLAIN}"
        colours = (colour for level, colour in _COLOURS.items() if record.levelno >= level)
        colour = next(colours, "")
        return f"{colour}{text}{_PLAIN}" if colour else text


def open_standard_files() -> None:
    """Where some were closed, open nothing in their place: sockets would get their numbers."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def say(stream: OutputWrapper, line: str) -> None:
    """Tell whoever reads the command's output, at once. That nobody does ends no server and no worker."""
    try:
        stream.write(line)
        stream.flush()
    except BrokenPipeError:
        # Neither what Python says at its end, nor what jobs print, is to meet it again.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (AttributeError, OSError, ValueError):
        pass  # it was closed, and Python has None for it; or the disk is full


def log_to_file(path: str) -> None:
    """
    Append to a file; when it was moved away, begin a new one.

    Raises:
        CommandError: It cannot be written.
    """
    try:
        handler = WatchedFileHandler(path, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"Cannot write the log file {path}: {error.strerror}.") from error
    _add(handler, logging.Formatter(_LINE), apart=True)


def log_to_syslog(program: str, address: str = SYSLOG) -> None:
    """
    Log as a daemon does.

    Args:
        program: Stands before each line.
        address: The path of a socket, or ``host[:port]`` for UDP.
    Raises:
        CommandError: Nobody is there.
    """
    try:
        if "/" not in address:
            with_port = address if ":" in address else f"{address}:{SYSLOG_UDP_PORT}"
            handler = SysLogHandler(split_address(with_port), SysLogHandler.LOG_DAEMON)
        elif os.path.exists(address):
            handler = SysLogHandler(address, SysLogHandler.LOG_DAEMON)
        else:
            raise FileNotFoundError(f"there is no socket {address}")
    except (OSError, ValueError) as error:
        raise CommandError(f"Syslog is out of reach at {address!r}: {error}.") from error
    _add(handler, logging.Formatter(f"{program}[%(process)d]: %(levelname)s %(message)s"), apart=True)


def log_nowhere() -> None:
    """Keep Python from showing warnings on stderr because nobody else shows them."""
    _add(logging.NullHandler(), None, apart=True)


def reopen_log_files() -> None:
    """Begin new files where the old ones were moved away."""
    for handler in logging.getLogger(APP_LABEL).handlers:
        if isinstance(handler, WatchedFileHandler):
            handler.reopenIfNeeded()


def _add(handler: logging.Handler, formatter: logging.Formatter | None, *, apart: bool = False) -> None:
    handler.setFormatter(formatter)
    logging.getLogger(APP_LABEL).addHandler(handler)
    if apart:
        # Its warnings would go to stderr, where nobody looks now.
        logging.getLogger("asyncio").addHandler(handler)


def close_connections() -> None:
    """Close what this process has open to databases, pools included: nothing may be shared with a child."""
    for connection in connections.all(initialized_only=True):
        connection.close()
        # With Django's own pool, closing has only given the connection back.
        if hasattr(connection, "close_pool"):
            connection.close_pool()


def require_tables(using: str) -> None:
    """
    Refuse to start on a database that lacks our tables, or parts of them.

    Raises:
        CommandError: It is not migrated, or out of reach.
    """
    connection = connections[using]
    try:
        executor = MigrationExecutor(connection)
        leaves = [node for node in executor.loader.graph.leaf_nodes() if node[0] == APP_LABEL]
        is_missing = bool(executor.migration_plan(leaves))
        is_seen = JobRecord._meta.db_table in connection.introspection.table_names()
    except DatabaseError as error:
        # Drivers tell it on several lines.
        reason = " ".join(str(error).split())
        raise CommandError(f"The database {using!r} is out of reach: {reason}") from error
    if is_missing:
        option = "" if using == "default" else f" --database {using}"
        raise CommandError(
            f"The database {using!r} lacks tables of {APP_LABEL}; run: python manage.py migrate{option}"
        )
    if not is_seen:
        # `migrate` keeps a migration as done also where a router had nothing done.
        raise CommandError(
            f"The database {using!r} lacks the tables of {APP_LABEL}, though its migrations were run: a "
            "router of DATABASE_ROUTERS keeps them out (allow_migrate), or they are in no schema of the "
            "search_path."
        )
