"""What the long-running commands share: log lines on the terminal, and a check of the tables."""

from __future__ import annotations

import logging
import sys

from django.core.management.base import CommandError
from django.db import DatabaseError, connections
from django.db.migrations.executor import MigrationExecutor

APP_LABEL = "django_gearman"

_LEVELS = {0: logging.ERROR, 1: logging.INFO, 2: logging.DEBUG, 3: logging.DEBUG}


def log_to_terminal(verbosity: int) -> None:
    """Show the package's log lines on stderr, unless the project's ``LOGGING`` says where they go."""
    logger = logging.getLogger(APP_LABEL)
    if logger.hasHandlers():
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s [%(process)d] %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(_LEVELS[verbosity])


def require_tables(using: str) -> None:
    """
    Refuse to start on a database that lacks our tables, or parts of them.

    Raises:
        CommandError: It is not migrated, or out of reach.
    """
    try:
        executor = MigrationExecutor(connections[using])
        leaves = [node for node in executor.loader.graph.leaf_nodes() if node[0] == APP_LABEL]
        is_missing = bool(executor.migration_plan(leaves))
    except DatabaseError as error:
        # Drivers tell it on several lines.
        reason = " ".join(str(error).split())
        raise CommandError(f"The database {using!r} is out of reach: {reason}") from error
    if is_missing:
        option = "" if using == "default" else f" --database {using}"
        raise CommandError(
            f"The database {using!r} lacks tables of {APP_LABEL}; run: python manage.py migrate{option}"
        )
