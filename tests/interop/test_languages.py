"""``docs/languages.md``: every program in it is run as it stands there, on a port of the test's own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import harness
from tests.acceptance.conftest import call, program

from .languages import require_perl, require_php

pytestmark = [pytest.mark.acceptance, pytest.mark.foreign]

DOCUMENT = harness.ROOT / "docs" / "languages.md"
BLOCK = re.compile(r"^<!-- (?:file|command): (\S+) -->\n```\w+\n(.*?)^```$", re.M | re.S)
BLOCKS = dict(BLOCK.findall(DOCUMENT.read_text()))

SETTINGS = """
from tests.settings import *
from tests.settings import INSTALLED_APPS
INSTALLED_APPS = [app for app in INSTALLED_APPS if app not in ("project.gallery", "tests.app")] + ["shop"]
ROOT_URLCONF = "tests.admin.urls"
"""
PLAIN = "import runpy, sys; sys.modules['django'] = None; runpy.run_path(sys.argv[1])"
"""Runs a script that cannot import Django."""

SETUP = "import django, runpy, sys; django.setup(); runpy.run_path(sys.argv[1])"

Server = harness.GearmanServerProcess
Start = Callable[[list[str]], "subprocess.Popen[bytes]"]


class Page:
    """The document's files in a folder, led to a server."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder = folder
        self.server = server
        self._used: set[str] = set()
        for name, code in BLOCKS.items():
            if "." in name:
                path = folder / name
                path.parent.mkdir(exist_ok=True)
                path.write_text(self.led(code))
        (folder / "shop" / "__init__.py").touch()
        (folder / "shop_settings.py").write_text(SETTINGS)

    def led(self, code: str) -> str:
        """The code with the server's port for Gearman's own, and one second for three."""
        port = self.server.port
        code = code.replace("4730", str(port)).replace("addServer()", f'addServer("127.0.0.1", {port})')
        code = re.sub(r"^((?:.*\| )?gear(?:man|admin)) ", rf"\1 -h 127.0.0.1 -p {port} ", code, flags=re.M)
        return code.replace("sleep(3)", "sleep(1)")

    @property
    def environment(self) -> dict[str, str]:
        env = harness.environment() | {
            "DJANGO_SETTINGS_MODULE": "shop_settings",
            "PYTHONPATH": f"{self.folder}{os.pathsep}{harness.ROOT}",
            "GEARMAN_TEST_SERVER": self.server.address,
        }
        # What a user's own script does with its sockets is not looked at here.
        return {name: value for name, value in env.items() if name != "PYTHONDEVMODE"}

    def command(self, name: str, *, django: bool = False) -> list[str]:
        path = str(self.folder / name)
        if name.endswith(".php"):
            return [require_php(), "-d", "display_errors=stderr", path]
        if name.endswith(".pl"):
            return [require_perl(), path]
        # "env", since not all that starts it gives it an environment.
        python = ["env", f"PYTHONPATH={self.environment['PYTHONPATH']}", sys.executable, "-c"]
        return [*python, SETUP if django else PLAIN, path]

    def run(self, name: str, *, django: bool = False) -> str:
        done = subprocess.run(
            self.command(name, django=django),
            env=self.environment,
            capture_output=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        assert not done.stderr, done.stderr.decode()
        return done.stdout.decode()


@pytest.fixture
def page(tmp_path: Path, site_server: Server) -> Page:
    return Page(tmp_path, site_server)


@pytest.fixture
def start(page: Page, background_program: Start) -> Callable[[list[str], str, int], None]:
    """Start a worker so many times, and wait until it offers a function."""

    def start(command: list[str], function: str, count: int = 1) -> None:
        for _ in range(count):
            background_program(command)
        harness.wait_until(
            lambda: page.server.status().get(function, (0, 0, 0))[2] == count,
            what=f"{count} workers for {function}",
        )

    return start


@pytest.fixture
def our_worker(page: Page, stack: ExitStack) -> Callable[[], None]:
    """Start ``manage.py gearman_worker`` for the document's jobs."""

    def start() -> None:
        options = {"processes": 3, "env": page.environment | {"PYTHONDEVMODE": "1"}}
        stack.enter_context(harness.worker(page.server, **options)).wait_connected()

    return start


def with_do_normal(page: Page, name: str) -> None:
    """What the document says to do where PHP's extension has no ``do``."""
    has_do = call([require_php(), "-r", 'echo (int) method_exists("GearmanClient", "do");']).stdout
    path = page.folder / name
    if has_do != b"1":
        done = subprocess.run(page.command(name), capture_output=True, timeout=30, check=False)
        assert b"Call to undefined method GearmanClient::do()" in done.stderr
        path.write_text(path.read_text().replace("->do(", "->doNormal("))


def test_every_program_is_named():
    """What is not named would not be run."""
    fences = re.findall(r"^```\w+$", DOCUMENT.read_text(), re.M)
    assert len(fences) == len(BLOCKS)
    tested = Path(__file__).read_text()
    unused = [name for name in BLOCKS if f'"{name}"' not in tested and name != "shop/jobs.py"]
    assert not unused


class TestTutorials:
    @pytest.mark.parametrize("worker", ["php", "ours"])
    @pytest.mark.parametrize(
        ("name", "theirs_works", "clients", "answer"),
        [
            ("reverse", "reverse_worker.php", ("reverse_client.php", "reverse_client.py"), "!dlroW olleH"),
            ("title", "title_worker.php", ("title_client.php", "title_client.py"), "5"),
        ],
    )
    def test_one_job(self, page: Page, start, our_worker, worker, name, theirs_works, clients, answer):
        if worker == "php":
            start(page.command(theirs_works), name)
        else:
            our_worker()
        theirs, ours = clients
        with_do_normal(page, theirs)
        assert page.run(theirs) == answer
        assert page.run(ours, django=True) == f"{answer}\n"

    @pytest.mark.parametrize("worker", ["php", "ours"])
    def test_three_tasks_take_the_time_of_one(self, page: Page, start, our_worker, worker: str):
        """Each takes a second here."""
        if worker == "php":
            start(page.command("tasks_worker.php"), "baconate", 3)
        else:
            our_worker()
        for client in ("tasks_client.php", "threads_client.py", "tasks_client.py"):
            printed = ""

            def check(client: str = client) -> None:
                nonlocal printed
                printed = page.run(client, django=client == "tasks_client.py")
                (seconds,) = re.findall(r"Got user info in: (\d+\.\d+) seconds", printed)
                assert 0.9 < float(seconds) < 3

            harness.in_one_try(check)
            assert "(joe@joe.com) is 7 feet tall and awkward" in printed
            assert "(joe@joe.com) is 1 degree away from Kevin Bacon" in printed
            assert "(joe@joe.com) has no posts, sorry!" in printed


class TestLanguages:
    def test_php(self, page: Page, start):
        start(page.command("report_worker.php"), "report")
        lines = page.run("report_client.php").splitlines()
        assert lines[:-1] == ["part: ONE", "done: 1 of 2", "part: TWO", "done: 2 of 2", "result: 2 lines"]
        assert lines[-1] in ("it waits or runs", "it ended already")

    def test_php_enqueued_as_a_row(self, page: Page, start, stack: ExitStack):
        # Our own worker knows the function and is told to leave it.
        with (page.folder / "shop" / "jobs.py").open("a") as file:
            file.write("\nfrom . import others\n")
        assert "`gearman_worker --exclude report`" in DOCUMENT.read_text()
        env = page.environment | {"PYTHONDEVMODE": "1"}
        own = harness.worker(page.server, options=["--exclude", "report"], processes=1, env=env)
        stack.enter_context(own).wait_connected()
        start(page.command("report_worker.php"), "report")
        assert {"shop/others.py", "report_later.py"} <= BLOCKS.keys()
        assert page.run("report_later.py", django=True) == "2 lines\n"

    def test_perl(self, page: Page, start):
        start(page.command("reverse_worker.pl"), "reverse")
        lines = page.run("reverse_client.pl").splitlines()
        assert lines[0] == "!dlroW olleH"
        assert sorted(lines[1:4]) == ["one: eno", "three: eerht", "two: owt"]
        assert lines[4] in ("it waits or runs", "it ended already")

    def test_c(self, page: Page, start):
        program("cc")
        call(["sh", "-ec", f"cd {page.folder}\n" + BLOCKS["compile"]])
        start([str(page.folder / "reverse_worker")], "reverse")
        assert call([str(page.folder / "reverse_client")]).stdout == b"!dlroW olleH\n"
        assert {"reverse_client.c", "reverse_worker.c"} <= BLOCKS.keys()

    def test_command_line(self, page: Page, start):
        program("gearman")
        start(page.command("plain_worker.py"), "reverse")
        printed = call(["sh", "-ec", page.led(BLOCKS["tools"])]).stdout.decode()
        # The worker says once for each job that half of it is done.
        assert printed.count("50% Complete\n") == 3
        printed = printed.replace("50% Complete\n", "")
        assert printed.startswith("!dlroW olleH\neno\nowt")
        assert "reverse\t" in printed
        assert printed.endswith(".\n")
        start(["sh", "-c", page.led(BLOCKS["tool-worker"])], "wc")

    def test_python_without_django(self, page: Page, start):
        start(page.command("plain_worker.py"), "reverse")
        assert page.run("plain_client.py").splitlines()[:3] == ["!dlroW olleH", "half done", "failed"]

    def test_envelope(self, page: Page, our_worker):
        our_worker()
        assert sorted(page.run("thumbnail_client.php").splitlines()) == [
            "400 x 266",
            "800 x 533",
            "builtins.ValueError: 9999 is too large",
        ]
