"""
``python -m django_gearman.testing_process COMMAND ...``: a command of ``manage.py`` for a test.

Runs with the project's settings, on the databases of the test that started it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Final

VARIABLE: Final = "GEARMAN_TESTING"
"""Environment variable that tells it in JSON: databases, GEARMAN, unmigrated apps, sys.path, parent."""


def main() -> None:
    from django.conf import settings
    from django.core.management import execute_from_command_line

    told = json.loads(os.environ.pop(VARIABLE))
    _end_with(told["parent"])
    sys.path.extend(path for path in told["path"] if path not in sys.path)
    for alias, name in told["databases"].items():
        settings.DATABASES[alias]["NAME"] = name
    settings.GEARMAN = told["gearman"]
    settings.MIGRATION_MODULES |= dict.fromkeys(told["unmigrated"])
    execute_from_command_line(["manage.py", *sys.argv[1:]])


def _end_with(parent: int) -> None:
    """Have the kernel send TERM when the test's process is killed, which then stops nothing. Linux only."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
        if os.getppid() != parent:
            sys.exit("The test that wanted this process is gone.")


if __name__ == "__main__":
    main()
