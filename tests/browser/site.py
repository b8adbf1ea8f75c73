"""
The example site as a visitor meets it: job server, worker and gunicorn with
``project.settings``, each a process of its own, on a database and in a folder
that exist for the test only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.parse
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.harness import ROOT, START_LIMIT, free_port, running_processes, wait_until

USER, PASSWORD = "admin", "correct horse battery staple"

STOP_LIMIT = 40.0
"""Seconds in which a program ends after TERM, with a job or a request in hand."""

COMPLAINTS = ("Exception ignored in", "ResourceWarning", "was never awaited", "Internal Server Error")
"""What no program may have to say."""


class Program:
    """
    One program of the site, in a session of its own.

    Args:
        arguments: Of this Python.
        started: Text of its output that says that it is up.
    """

    def __init__(self, name: str, arguments: Sequence[str], *, started: str, env: dict[str, str], log: Path):
        self.name = name
        self._command = [sys.executable, *arguments]
        self._started = started
        self._env = env
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it is up."""
        assert self._process is None, f"{self.name} runs already"
        before = len(self.output)
        with self._log.open("ab") as log:
            process = self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait_until(
                lambda: self._started in self.output[before:] or process.poll() is not None,
                START_LIMIT,
                f"the start of {self.name}",
            )
        except AssertionError as error:
            error.add_note(self.output)
            raise
        assert process.poll() is None, f"{self.name} ended with exit code {process.returncode}\n{self.output}"

    @property
    def is_running(self) -> bool:
        return self._process is not None

    @property
    def output(self) -> str:
        """Everything that it said since the test began."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def stop(self) -> None:
        """End it with TERM, and check how it ended. No matter if it does not run."""
        process = self._process
        if process is None:
            return
        try:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_LIMIT) == 0, f"{self.name}: {process.returncode}\n{self.output}"
            wait_until(lambda: not self._group(), 60.0, f"the end of all processes of {self.name}")
            for complaint in COMPLAINTS:
                assert complaint not in self.output, self.output
        finally:
            if self._group():
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._process = None

    def _group(self) -> list[int]:
        assert self._process is not None, "only asked of a program that was started"
        return [each.pid for each in running_processes() if each.group == self._process.pid]


class Site:
    """
    The three programs.

    Args:
        folder: Becomes PROJECT_VAR.
        database: A DATABASE_URL; empty for SQLite in the folder.
    """

    def __init__(self, folder: Path, database: str) -> None:
        self.folder = folder
        self.media = folder / "media"
        self.address = f"127.0.0.1:{free_port()}"
        self.url = f"http://{self.address}"
        self._env = environment(
            PROJECT_VAR=str(folder),
            WEB_ADDRESS=self.address,
            GEARMAN_SERVERS=f"127.0.0.1:{free_port()}",
            DATABASE_URL=database,
        )
        manage = [str(ROOT / "manage.py")]
        self.server = self._program("gearman_server", [*manage, "gearman_server"], started=" listens on ")
        self.worker = self._program(
            "gearman_worker", [*manage, "gearman_worker", "--processes", "2"], started="gearman_worker: "
        )
        self.web = self._program(
            "gunicorn",
            ["-m", "gunicorn", "--config", str(ROOT / "project" / "gunicorn.conf.py"), "project.wsgi"],
            started="Booting worker",
            # CONN_MAX_AGE: every thread keeps its connection to PostgreSQL until the
            # process ends, of which psycopg has something to say.
            PYTHONWARNINGS="ignore:<psycopg.Connection object:ResourceWarning",
        )

    def _program(self, name: str, arguments: Sequence[str], *, started: str, **env: str) -> Program:
        log = self.folder / f"{name}.log"
        return Program(name, arguments, started=started, env=self._env | env, log=log)

    def manage(self, *arguments: str, **env: str) -> str:
        """Run a command of ``manage.py`` to its end; its output."""
        done = subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=ROOT,
            env=self._env | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"$ manage.py {' '.join(arguments)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def prepare(self) -> None:
        self.manage("migrate", "--verbosity", "0")
        self.manage("collectstatic", "--no-input", "--verbosity", "0")
        self.manage(
            *("createsuperuser", "--no-input", "--username", USER, "--email", "admin@example.com"),
            DJANGO_SUPERUSER_PASSWORD=PASSWORD,
        )

    def story(self) -> str:
        """The last that each program said, for failure messages."""
        return "\n".join(
            f"{program.name}:\n{program.output[-5000:]}" for program in (self.server, self.worker, self.web)
        )


def environment(**site: str) -> dict[str, str]:
    """That of the test, without what it says of other sites, and with what is given; empty is unset."""
    foreign = ("DJANGO_", "GEARMAN_", "GUNICORN_", "PYTEST_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    env |= site | {
        "DJANGO_SETTINGS_MODULE": "project.settings",
        "PYTHONDEVMODE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return {name: value for name, value in env.items() if value or name not in site}


@contextmanager
def running_site(folder: Path) -> Iterator[Site]:
    """A site with job server and web server, but without a worker: tests say when that starts."""
    with own_database() as database:
        site = Site(folder, database)
        site.prepare()
        programs = (site.web, site.worker, site.server)
        try:
            site.server.start()
            site.web.start()
            yield site
        finally:
            errors = [error for program in programs if (error := _error_of_stopping(program))]
        if errors:
            raise errors[0]


def _error_of_stopping(program: Program) -> Exception | None:
    """Every program is stopped, however another one ended."""
    try:
        program.stop()
    except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
        return error
    return None


@contextmanager
def own_database() -> Iterator[str]:
    """A DATABASE_URL that nobody else uses, where $DATABASE_URL leads to PostgreSQL; empty elsewhere."""
    given = urllib.parse.urlsplit(os.environ.get("DATABASE_URL", ""))
    if not given.scheme.startswith("postgres"):
        yield ""
        return
    import psycopg

    name = f"gallery_{uuid.uuid4().hex}"
    maintenance = given._replace(scheme="postgresql", path="/postgres").geturl()
    with psycopg.connect(maintenance, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        try:
            yield given._replace(path=f"/{name}").geturl()
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
