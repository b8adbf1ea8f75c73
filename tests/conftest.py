"""Fixtures of the whole suite: real servers, and a client that records instead of calling."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from django.conf import settings as django_settings

from . import harness

# A shell has what it runs in the background ignore these, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_unconfigure() -> None:
    """Remove the folder that the settings made for this process."""
    if "GEARMAN_TEST_SCRATCH" not in os.environ:
        shutil.rmtree(django_settings.SCRATCH, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how much was simulated: of new worlds in every run, the number tells what that was worth."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "simulated":
                terminalreporter.write_line(f"{report.nodeid.partition('::')[0]}: {value}")


@pytest.fixture
def memory_server() -> Iterator[harness.GearmanServerProcess]:
    """A job server that keeps nothing and needs no database."""
    with harness.server(store="memory") as process:
        yield process


@pytest.fixture
def database_server(transactional_db: None, settings: Any) -> Iterator[harness.GearmanServerProcess]:
    """A job server on the test's database, which ``settings.GEARMAN`` leads to."""
    with harness.server() as process:
        settings.GEARMAN = process.setting
        yield process


@pytest.fixture
def nudges(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each time that a job server would have been told of new rows."""
    told: list[None] = []
    monkeypatch.setattr("django_gearman.client.sync.Client.claim", lambda client: told.append(None) or True)
    return told
