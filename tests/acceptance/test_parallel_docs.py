"""``docs/parallel.md``: every program in it is run as it stands there, and prints what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import harness

pytestmark = [pytest.mark.acceptance]

DOCUMENT = harness.ROOT / "docs" / "parallel.md"
BLOCKS = dict(re.findall(r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", DOCUMENT.read_text(), re.M | re.S))
PRINTED = re.compile(r"print\(.*\)  # (.*)$", re.M)
SETTINGS = """
from tests.settings import *
from tests.settings import INSTALLED_APPS
INSTALLED_APPS = [app for app in INSTALLED_APPS if app not in ("project.gallery", "tests.app")]
INSTALLED_APPS += ["shop", "weblogs"]
ROOT_URLCONF = "tests.admin.urls"
"""
SETUP = "import django, runpy, sys; django.setup(); runpy.run_path(sys.argv[1])"
LINE = '10.0.0.1 - - [10/Oct/2026:13:55:36 +0000] "GET /photos/{}/ HTTP/1.1" {} 2326\n'


@pytest.mark.django_db(transaction=True)
def test_every_program_does_what_it_says(tmp_path: Path) -> None:
    for name, code in BLOCKS.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code.replace("8 * 1024 * 1024", "100"))
        (path.parent / "__init__.py").touch()
    statuses = ["200"] * 15 + ["304"] * 9 + ["404"] * 6
    lines = [LINE.format("x" * number, status) for number, status in enumerate(statuses)]
    (tmp_path / "access.log").write_text("".join(lines))
    (tmp_path / "shop_settings.py").write_text(SETTINGS)
    env = harness.environment() | {
        "DJANGO_SETTINGS_MODULE": "shop_settings",
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{harness.ROOT}",
    }
    # The log is named from where the program is; the workers are elsewhere.
    count = (tmp_path / "weblogs" / "count.py").read_text()
    (tmp_path / "weblogs" / "count.py").write_text(
        count.replace('"access.log"', repr(str(tmp_path / "access.log")))
    )
    with harness.server() as server, harness.worker(server, processes=2, env=env) as worker:
        worker.wait_connected()
        for name in ("now.py", "later.py", "weblogs/count.py"):
            done = subprocess.run(
                # Django leaves the connections of its threads open when a script ends.
                [
                    sys.executable,
                    "-W",
                    "error",
                    "-W",
                    "ignore::ResourceWarning",
                    "-c",
                    SETUP,
                    str(tmp_path / name),
                ],
                env=env | {"GEARMAN_TEST_SERVER": server.address},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert (done.returncode, done.stderr) == (0, ""), name
            expected = PRINTED.findall(BLOCKS[name])
            assert expected, "it says something"
            assert done.stdout.splitlines() == expected
    assert set(BLOCKS) == {"shop/jobs.py", "now.py", "later.py", "weblogs/jobs.py", "weblogs/count.py"}


def test_every_block_has_a_name() -> None:
    assert len(re.findall(r"^```\w+$", DOCUMENT.read_text(), re.M)) == len(BLOCKS)
