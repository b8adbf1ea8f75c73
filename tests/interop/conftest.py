"""Fixtures of the interoperability suite."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from tests import harness

from .gearmand import Gearmand
from .languages import Server


@pytest.fixture(scope="module")
def our_server() -> Iterator[harness.GearmanServerProcess]:
    """Our job server, without a database, for all tests of a file."""
    with harness.server(store="memory") as process:
        yield process


@pytest.fixture(scope="module")
def their_server() -> Iterator[Gearmand]:
    """The C gearmand, for all tests of a file."""
    with Gearmand() as process:
        yield process


@pytest.fixture(scope="module", params=["ours", "gearmand"])
def either_server(request: pytest.FixtureRequest) -> Server:
    """Each of the two in turn: what holds with both is what programs rely on."""
    name = "our_server" if request.param == "ours" else "their_server"
    return request.getfixturevalue(name)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What a test starts, to be stopped at its end."""
    with ExitStack() as made:
        yield made


@pytest.fixture
def site_server(transactional_db: None, settings: Any) -> Iterator[harness.GearmanServerProcess]:
    """Our job server on the test's database, which ``settings.GEARMAN`` leads to."""
    with harness.server() as process:
        settings.GEARMAN = process.setting
        yield process


@pytest.fixture
def background_program() -> Iterator[Callable[[list[str]], subprocess.Popen[bytes]]]:
    """Start programs that run until the test ends."""
    started: list[subprocess.Popen[bytes]] = []

    def start(command: list[str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            # What it runs, too.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
