"""Fixtures of the acceptance tests: foreign programs, and the site's settings for servers and workers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import harness
from tests.needs import missing

SITE = {"DJANGO_SETTINGS_MODULE": "tests.acceptance.site.settings"}
"""Environment of servers and workers that know the jobs of ``tests.acceptance.site``."""

LIMIT = 60.0
"""Seconds after which a foreign program is given up."""


def program(name: str) -> str:
    """
    Where a foreign program is.

    Without it the test is skipped, and fails where everything must be there: in CI.
    """
    path = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin")
    if path is None:
        missing(f"{name} is not installed")
    return path


def call(
    command: list[str], stdin: bytes = b"", *, code: int | None = 0, limit: float = LIMIT
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end; ``code`` is the exit code that it must have, None for any but 0."""
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=limit, check=False)
    right = done.returncode != 0 if code is None else done.returncode == code
    assert right, f"{command[:6]} ended with {done.returncode}: {done.stdout[:500]!r} {done.stderr[:500]!r}"
    return done


@pytest.fixture
def site_server(transactional_db: None, settings: Any) -> Iterator[harness.GearmanServerProcess]:
    """A job server on the test's database, which ``settings.GEARMAN`` leads to."""
    with harness.server(env=SITE) as process:
        settings.GEARMAN = process.setting
        yield process


class Trace:
    """A file with a line for every run of ``leave_trace``."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self.path = str(path)

    def names(self) -> list[str]:
        """Names of the runs, in order."""
        return [line.split()[0] for line in Path(self.path).read_text().splitlines()]

    def workload(self, name: str) -> bytes:
        """The workload of a run of that name, as any Gearman client can send it."""
        return json.dumps({"args": [self.path, name], "kwargs": {}}).encode()


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    return Trace(tmp_path / "trace")
