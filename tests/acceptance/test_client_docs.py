"""``docs/client.md``: every program in it is run as it stands there, and prints what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import harness

pytestmark = [pytest.mark.acceptance]

DOCUMENT = harness.ROOT / "docs" / "client.md"
BLOCK = re.compile(r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", re.M | re.S)
BLOCKS = dict(BLOCK.findall(DOCUMENT.read_text()))
PRINTED = re.compile(r"print\(.*\)  # (.*)$", re.M)

SETTINGS = """
from tests.settings import *
from tests.settings import INSTALLED_APPS
INSTALLED_APPS = [app for app in INSTALLED_APPS if app not in ("project.gallery", "tests.app")] + ["shop"]
ROOT_URLCONF = "tests.admin.urls"
"""
SETUP = "import django, runpy, sys; django.setup(); runpy.run_path(sys.argv[1])"
PLAIN = "import runpy, sys; sys.modules['django'] = None; runpy.run_path(sys.argv[1])"
VIEWS = """
import asyncio
from django.test import RequestFactory
from shop import views

print(b"".join(views.lines(RequestFactory().get("/"))).decode(), end="")

async def main():
    async for part in await views.alines(RequestFactory().get("/")):
        print(part.decode(), end="")

asyncio.run(main())
"""


@pytest.fixture
def folder(transactional_db: None, tmp_path: Path) -> Iterator[Path]:
    """The document's files, led to a server with a worker for their jobs."""
    with harness.server() as server:
        for name, code in BLOCKS.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(code.replace("4730", str(server.port)))
        (tmp_path / "shop" / "__init__.py").touch()
        (tmp_path / "shop_settings.py").write_text(SETTINGS)
        (tmp_path / "views.py").write_text(VIEWS)
        os.environ["GEARMAN_TEST_SERVER"] = server.address
        env = environment(tmp_path)
        try:
            with harness.worker(server, processes=2, env=env | {"PYTHONDEVMODE": "1"}) as worker:
                worker.wait_connected()
                yield tmp_path
        finally:
            del os.environ["GEARMAN_TEST_SERVER"]


def environment(folder: Path) -> dict[str, str]:
    return harness.environment() | {
        "DJANGO_SETTINGS_MODULE": "shop_settings",
        "PYTHONPATH": f"{folder}{os.pathsep}{harness.ROOT}",
    }


def run(folder: Path, name: str, *, django: bool = True) -> list[str]:
    # Django leaves the connections of its threads open when a script ends.
    python = [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "-c"]
    done = subprocess.run(
        [*python, SETUP if django else PLAIN, str(folder / name)],
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{name}: {done.stderr}"
    assert not done.stderr, f"{name}: {done.stderr}"
    return done.stdout.splitlines()


def test_every_program_does_what_it_says(folder: Path) -> None:
    steps = ["1 of 2", "step 1", "2 of 2", "step 2", "counted"]
    expected = {name: PRINTED.findall(code) for name, code in BLOCKS.items()}
    assert run(folder, "later.py") == expected.pop("later.py")
    assert run(folder, "now.py") == expected.pop("now.py") + steps
    assert run(folder, "asynchronous.py") == expected.pop("asynchronous.py")
    assert run(folder, "errors.py") == expected.pop("errors.py")
    parts = ["Progress(numerator=1, denominator=1)", "Value(value=b'\"counted\"')"]
    assert run(folder, "plain.py", django=False) == expected.pop("plain.py") + parts
    assert run(folder, "plain_async.py", django=False) == expected.pop("plain_async.py")
    assert run(folder, "views.py") == ["1/2", "2/2", "counted"] * 2
    assert set(expected) == {"shop/jobs.py", "shop/views.py"}, "what is not named is not run"


def test_every_block_has_a_name() -> None:
    fences = re.findall(r"^```\w+$", DOCUMENT.read_text(), re.M)
    assert len(fences) == len(BLOCKS)
