"""``docs/testing.md`` and ``docs/tasks.md``: what stands in them is run as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import django
import pytest
from django.conf import settings

from tests import harness

pytestmark = [pytest.mark.acceptance]

BLOCK = re.compile(r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", re.M | re.S)
PRINTED = re.compile(r"print\(.*\)  # (.*)$", re.M)

URLS = """
from django.urls import path
from shop import views
urlpatterns = [path("register/", views.register)]
"""
SETTINGS = """
from tests.settings import *
from tests.settings import DATABASES, INSTALLED_APPS
INSTALLED_APPS = [app for app in INSTALLED_APPS if app not in ("project.gallery", "tests.app")] + ["shop"]
ROOT_URLCONF = "shop.urls"
TASKS = {}
DATABASES["default"]["TEST"] = {"NAME": TEST_NAME}
"""
TESTS = ["test_views.py", "test_processes.py", "shop/tests.py"]


def blocks(document: str) -> dict[str, str]:
    return dict(BLOCK.findall((harness.ROOT / "docs" / document).read_text()))


def write(folder: Path, files: dict[str, str]) -> None:
    for name, code in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    (folder / "shop" / "__init__.py").touch()


def environment(folder: Path) -> dict[str, str]:
    return harness.environment() | {
        "DJANGO_SETTINGS_MODULE": "shop_settings",
        "PYTHONPATH": f"{folder}{os.pathsep}{harness.ROOT}",
    }


BY_PYTEST = ["pytest", "-q", "-n0", "-p", "django_gearman.pytest_plugin"]
BY_UNITTEST = ["django", "test", "--noinput"]


def project(folder: Path, files: dict[str, str]) -> None:
    """A project of its own, with a database of its own."""
    is_sqlite = settings.DATABASES["default"]["ENGINE"].endswith("sqlite3")
    # The others make a database of this name.
    name = str(folder / "test.sqlite3") if is_sqlite else f"test_docs_{os.getpid()}"
    own = {
        "shop_settings.py": SETTINGS.replace("TEST_NAME", repr(name)),
        "shop/urls.py": URLS,
        "pytest.ini": "[pytest]\n",
    }
    write(folder, files | own)


def run_tests(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    env = environment(folder)
    del env["GEARMAN_TEST_DATABASE"]
    python = [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "-m"]
    return subprocess.run(
        [*python, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=150
    )


def test_every_test_of_the_document_passes(transactional_db: None, tmp_path: Path) -> None:
    """By pytest and by Django's runner."""
    files = blocks("testing.md")
    assert set(files) == {"shop/jobs.py", "shop/views.py", *TESTS}
    project(tmp_path, files)
    for command, said in (
        ([*BY_PYTEST, "test_views.py", "test_processes.py"], "4 passed"),
        ([*BY_UNITTEST, "shop"], "Ran 3 tests"),
    ):
        done = run_tests(tmp_path, command)
        assert done.returncode == 0, done.stdout + done.stderr
        assert said in done.stdout + done.stderr


FAILING = """
from django.test import TransactionTestCase
from django_gearman.testing import GearmanClusterMixin
from .jobs import count

class FailingTests(GearmanClusterMixin, TransactionTestCase):
    gearman_processes = 1
    def test_that_fails(self):
        self.assertEqual(count.run(2), 3)
"""
FAILING_BY_PYTEST = """
from shop.jobs import count

def test_that_fails(gearman_cluster):
    assert count.run(2) == 3
"""


def test_a_failing_test_shows_what_the_processes_said(transactional_db: None, tmp_path: Path) -> None:
    files = blocks("testing.md")
    own = {"test_processes.py": FAILING_BY_PYTEST, "shop/tests.py": FAILING}
    project(tmp_path, {name: files[name] for name in ("shop/jobs.py", "shop/views.py")} | own)
    for command in ([*BY_PYTEST, "test_processes.py"], [*BY_UNITTEST, "shop"], [*BY_PYTEST, "shop/tests.py"]):
        done = run_tests(tmp_path, command)
        said = done.stdout + done.stderr
        assert done.returncode == 1, said
        assert "$ manage.py gearman_worker" in said
        assert "(shop.jobs.count) succeeded" in said


@pytest.fixture
def shop(transactional_db: None, tmp_path: Path) -> Iterator[Path]:
    """The files of ``docs/tasks.md``, with a server and a worker."""
    files = blocks("tasks.md")
    if django.VERSION < (6, 0):
        files = {name: code.replace("django.tasks", "django_tasks") for name, code in files.items()}
    files["shop_settings.py"] = SETTINGS.replace("TEST_NAME", "None") + files["shop_settings.py"]
    write(tmp_path, files | {"shop/urls.py": "urlpatterns = []\n"})
    env = environment(tmp_path)
    with harness.server() as server, harness.worker(server, processes=2, env=env) as worker:
        worker.wait_connected()
        (tmp_path / "address").write_text(server.address)
        yield tmp_path


@pytest.mark.skipif(not hasattr(settings, "TASKS"), reason="needs django.tasks or django-tasks")
@pytest.mark.skipif(django.VERSION[:2] == (6, 0), reason="its decorator takes no options of a backend")
def test_the_program_about_tasks_prints_what_it_says(shop: Path) -> None:
    code = (shop / "program.py").read_text()
    setup = "import django, runpy, sys; django.setup(); runpy.run_path(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", setup, str(shop / "program.py")],
        env=environment(shop) | {"GEARMAN_TEST_SERVER": (shop / "address").read_text()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == PRINTED.findall(code)
