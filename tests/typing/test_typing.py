"""
Type checkers see through ``@job``: mypy and pyright read ``right.py`` and ``wrong.py`` with our settings.

What mypy is to say of a line of ``wrong.py`` stands in its comment; pyright is to find an error there, too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from django.conf import settings

from tests import needs

for name in ("mypy", "mypy_django_plugin", "basedpyright"):
    needs.module(name)

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def call(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | {"GEARMAN_TEST_SCRATCH": str(settings.SCRATCH)},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def mypy(file: str) -> str:
    return call("mypy", "--no-pretty", "--hide-error-context", str(HERE / file))


def pyright(file: str) -> list[dict[str, Any]]:
    report = call("basedpyright", "--pythonpath", sys.executable, "--outputjson", str(HERE / file))
    found = json.loads(report)
    assert found["summary"]["filesAnalyzed"] == 1, report
    diagnostics: list[dict[str, Any]] = found["generalDiagnostics"]
    return diagnostics


def wrong_lines() -> dict[int, str]:
    """{line of ``wrong.py`` that is an error: what mypy calls it}"""
    lines = (HERE / "wrong.py").read_text().splitlines()
    found = {
        number: match[1]
        for number, line in enumerate(lines, 1)
        if (match := re.search(r"# error: ([a-z-]+)$", line))
    }
    assert len(found) > 30
    return found


def test_mypy_accepts_right_calls() -> None:
    assert "Success" in mypy("right.py")


def test_pyright_accepts_right_calls() -> None:
    assert pyright("right.py") == []


def test_mypy_refuses_wrong_calls() -> None:
    report = mypy("wrong.py")
    found = {
        (int(match[1]), match[2])
        for match in re.finditer(r"wrong\.py:(\d+): error: .* \[([a-z-]+)\]$", report, re.MULTILINE)
    }
    # A decorator that was refused leaves an untyped function; that is said twice.
    assert {each for each in found if each[1] != "untyped-decorator"} == set(wrong_lines().items()), report


def test_pyright_refuses_wrong_calls() -> None:
    found = pyright("wrong.py")
    errors = {each["range"]["start"]["line"] + 1 for each in found if each["severity"] == "error"}
    assert errors == set(wrong_lines()), found
