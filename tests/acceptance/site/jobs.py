"""Jobs that leave traces of when and by whom they were run."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

from django.db import connection

from django_gearman import cron, every, job

from . import pools as pools


@job
def leave_trace(path: str, name: str) -> int:
    """Work for a moment, then add a line to a file; small appends are not torn."""
    time.sleep(0.008)
    with open(path, "a") as file:
        file.write(f"{name} {os.getpid()}\n")
    return os.getpid()


@job
def ask_database() -> int:
    """Use the database; the number of the connection, or 0 where connections have none."""
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("SELECT pg_backend_pid()")
        else:
            cursor.execute("SELECT 0")
        return int(cursor.fetchone()[0])


@job
def die_once(path: str) -> str:
    """Kill the worker at the first attempt, and end well at the second."""
    if not os.path.exists(path):
        Path(path).touch()
        os.kill(os.getpid(), 9)
    return "second"


if "GEARMAN_TEST_LIMITS" in os.environ:
    # Not for all: every server would write down and keep their limits.
    from . import limited as limited

if "GEARMAN_TEST_SCHEDULE" in os.environ:
    # Seconds, or a cron; a file to leave traces in follows.
    _when, _, _path = os.environ["GEARMAN_TEST_SCHEDULE"].partition("@")

    @job(
        schedule=every(timedelta(seconds=int(_when)), args=[_path])
        if _when.isdecimal()
        else cron(_when, args=[_path])
    )
    def leave_line(path: str) -> None:
        with open(path, "a") as file:
            file.write("ran\n")
