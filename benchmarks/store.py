"""
How many rows a second the store writes: submissions, and the ends of jobs.

    DATABASE_URL=postgres://... python benchmarks/store.py

Works in a database of its own beside the configured one, as tests do. Each
figure is the median of several runs; a commit is synced as the database is set.
"""

# ruff: noqa: E402  (what is imported last wants Django set up)

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")

import django

django.setup()

from django.db import connection

from django_gearman.server.entries import (
    Entry,
    JobFinished,
    JobQueued,
    JobStarted,
    Outcome,
)
from django_gearman.store import DatabaseStore

ROWS = 10_000
"""Rows of one run."""

RUNS = 3


def rows_per_second(
    store: DatabaseStore, first: int, size: int, *batches: Callable[[int], list[Entry]]
) -> list[float]:
    """Write ``ROWS`` rows in commits of ``size``, once with each maker of entries."""
    rates = []
    for make in batches:
        made = [
            [entry for number in range(start, start + size) for entry in make(number)]
            for start in range(first, first + ROWS, size)
        ]
        begin = time.perf_counter()
        for entries in made:
            assert store.write(entries, again=False) == {}
        rates.append(ROWS / (time.perf_counter() - begin))
    return rates


def submitted(number: int) -> list[Entry]:
    return [JobQueued(b"H:one:1.%d" % number, b"f", b"", b"w" * 1000, 0, True, b"127.0.0.1", 1.7e9)]


def ended(number: int) -> list[Entry]:
    handle = b"H:one:1.%d" % number
    return [
        JobStarted(handle, b"worker", 1, 1.7e9),
        JobFinished(handle, Outcome.SUCCESSFUL, b"r" * 100, "", 1.7e9),
    ]


def main() -> None:
    name = connection.creation.create_test_db(verbosity=0, autoclobber=True)
    try:
        store = DatabaseStore("default", "one")
        store.take_lease("")
        print(f"{connection.vendor} ({name}), {ROWS} jobs of 1 KB, rows a second (median of {RUNS})")
        first = 1
        for size in (100, 1000):
            figures = []
            for _ in range(RUNS):
                figures.append(rows_per_second(store, first, size, submitted, ended))
                first += ROWS
            inserted, changed = (statistics.median(each) for each in zip(*figures, strict=True))
            print(f"  {size:5} per commit: {inserted:8,.0f} submitted {changed:8,.0f} ended")
    finally:
        connection.creation.destroy_test_db(name, verbosity=0)


if __name__ == "__main__":
    main()
