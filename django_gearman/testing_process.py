"""
``python -m django_gearman.testing_process COMMAND ...``: a command of ``manage.py`` for a test.

Runs with the project's settings, on the databases of the test that started it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Final

VARIABLE: Final = "GEARMAN_TESTING"
"""Environment variable with what the process is told: databases, ``GEARMAN`` and ``sys.path``, as JSON."""


def main() -> None:
    from django.conf import settings
    from django.core.management import execute_from_command_line

    told = json.loads(os.environ.pop(VARIABLE))
    sys.path.extend(path for path in told["path"] if path not in sys.path)
    for alias, name in told["databases"].items():
        settings.DATABASES[alias]["NAME"] = name
    settings.GEARMAN = told["gearman"]
    execute_from_command_line(["manage.py", *sys.argv[1:]])


if __name__ == "__main__":
    main()
