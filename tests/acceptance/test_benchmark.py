"""``benchmarks/server.py`` runs; what it measures is for people to read."""

from __future__ import annotations

import sys

import pytest

from tests import harness

from .conftest import call, program

pytestmark = [pytest.mark.acceptance, pytest.mark.foreign]


def test_every_figure_of_both_servers():
    program("cc")
    program("gearmand")
    script = harness.ROOT / "benchmarks" / "server.py"
    options = ["--rounds", "1", "--seconds", "0.1", "--jobs", "800"]
    lines = call([sys.executable, str(script), *options], limit=120).stdout.decode().splitlines()
    assert lines[0].split() == ["django_gearman", "gearmand", "ratio"]
    rows = {line[:38].strip(): line[38:].split() for line in lines[1:] if not line.startswith("!")}
    assert list(rows) == [
        "submissions/s, 1 connection",
        "drain/s, 1 worker",
        "submissions/s, 8 connections",
        "server's CPU us per job, submitted",
        "drain/s, 4 workers",
        "server's CPU us per job, drained",
        "round trip, median us",
        "round trip, p99 us",
        "foreground/s, 8 clients, 8 workers",
        "server's CPU us per job, foreground",
        "submissions/s, to 4,000 waiting",
        "bytes per queued job, of 4,000",
        "drain/s, of 4,000 waiting",
        "bytes per idle worker, of 2,000",
    ]
    assert all(len(row) == 3 for title, row in rows.items() if "bytes" not in title), rows
