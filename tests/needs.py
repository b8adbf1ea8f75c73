"""
What a test needs beside the package: programs, modules, permissions.

Without it the test is skipped, with the reason; where everything must be there,
which the variable ``CI`` says, it has failed.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, NoReturn

import pytest


def missing(reason: str) -> NoReturn:
    """Skip the test, or the module that is being imported; in CI it has failed."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason, allow_module_level=True)


def module(name: str, extra: str = "test") -> Any:
    """An importable module, which comes with an extra of ours."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        missing(f"{name} is not installed; it comes with pip install -e '.[{extra}]'")
