"""Type checkers see through ``@job``: mypy reads ``right.py`` and ``wrong.py`` with our settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from django.conf import settings

pytest.importorskip("mypy", reason="mypy comes with the dev extra")
pytest.importorskip("mypy_django_plugin", reason="django-stubs comes with the dev extra")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def check(file: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-pretty", "--hide-error-context", str(HERE / file)],
        cwd=ROOT,
        env=os.environ | {"GEARMAN_TEST_SCRATCH": str(settings.SCRATCH)},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def test_right_calls_are_accepted() -> None:
    assert "Success" in check("right.py")


def test_wrong_calls_are_refused() -> None:
    lines = (HERE / "wrong.py").read_text().splitlines()
    expected = {
        (number, match[1])
        for number, line in enumerate(lines, 1)
        if (match := re.search(r"# error: ([a-z-]+)$", line))
    }
    report = check("wrong.py")
    found = {
        (int(match[1]), match[2])
        for match in re.finditer(r"wrong\.py:(\d+): error: .* \[([a-z-]+)\]$", report, re.MULTILINE)
    }
    # A decorator that was refused leaves an untyped function; that is said twice.
    assert {each for each in found if each[1] != "untyped-decorator"} == expected, report
