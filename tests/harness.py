"""
Real job servers and workers for tests: ``manage.py gearman_server`` and
``manage.py gearman_worker`` as processes of their own.

    with server() as s, worker(s, processes=2) as w:
        ...

Each runs in a session of its own on the test's database, with every warning an
error. Leaving the block ends it with TERM and looks at how it ended: exit code,
what it left on stderr, and whether a process stayed behind.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
from django.conf import settings
from django.db import connection, transaction

from django_gearman.exceptions import GearmanError
from django_gearman.testing import free_port
from django_gearman.worker.loop import Worker, WorkerFunction

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
START_LIMIT = 60.0
"""Seconds in which a process says that it is up."""

MANAGE = (sys.executable, "-W", "error", "manage.py")
"""The beginning of every command of ``manage.py``."""

STOP_LIMIT = 60.0
"""Seconds in which a process ends after TERM."""


def wait_until(condition: Callable[[], T], limit: float = 60.0, what: str = "") -> T:
    """
    Ask until the answer is true, and return it.

    Args:
        limit: Seconds to wait.
        what: What is waited for, to say when it does not come.
    Raises:
        AssertionError: It did not come in time.
    """
    deadline = time.monotonic() + limit
    pause = 0.002
    while not (answer := condition()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"{what or condition} did not come true within {limit:g} s")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    return answer


def in_one_try(check: Callable[[], object], tries: int = 5) -> None:
    """
    Check what must not take long: it has to come true once in some tries.

    A machine that is busy with something else makes any one of them late. What waits where it
    should not is late each time.
    """
    for number in range(1, tries + 1):
        try:
            check()
        except (AssertionError, GearmanError, pytest.fail.Exception):
            if number == tries:
                raise
        else:
            return


def tried_again(test: Callable[..., object]) -> Callable[..., None]:
    """A test with a time-out that is short to save time: ``in_one_try``."""

    @wraps(test)
    def tried(*args: Any, **kwargs: Any) -> None:
        in_one_try(lambda: test(*args, **kwargs))

    return tried


def ask(port: int, line: str, limit: float = 30.0) -> str:
    """The answer of a job server to one line of the administrative protocol, up to its final dot."""
    with socket.create_connection(("127.0.0.1", port), timeout=limit) as sock, sock.makefile("rw") as stream:
        stream.write(line + "\n")
        stream.flush()
        listings = (
            "status",
            "workers",
            "show jobs",
            "show unique jobs",
            "prioritystatus",
            "running",
            "counters",
        )
        if line not in (*listings, "running", "counters"):
            return stream.readline()
        lines = []
        while (text := stream.readline()) not in (".\n", ""):
            lines.append(text)
        return "".join(lines)


class ProcessInfo(NamedTuple):
    pid: int
    parent: int
    group: int
    state: str


def running_processes() -> list[ProcessInfo]:
    """Every process of the machine but those that ended and wait to be reaped."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                text = (folder / "stat").read_text(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            # The name, in parentheses, may hold anything.
            state, parent, group = text.rpartition(")")[2].split()[:3]
            if state not in "ZX":
                found.append(ProcessInfo(int(folder.name), int(parent), int(group), state))
    return found


def is_running(pid: int) -> bool:
    return any(process.pid == pid for process in running_processes())


def environment() -> dict[str, str]:
    """Variables of a process that a test starts: on the test's database, with the settings of the suite."""
    env = os.environ | {
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "PYTHONDEVMODE": "1",
        "GEARMAN_TEST_DATABASE": str(connection.settings_dict["NAME"]),
        "GEARMAN_TEST_SCRATCH": str(settings.SCRATCH),
    }
    # pytest's own; a process of the test is not one of its workers.
    for name in ("PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER"):
        env.pop(name, None)
    return env


class ManagedProcess:
    """
    A command of ``manage.py``, in a session of its own.

    Args:
        arguments: The command and its options.
        started: Text of its standard output that says that it is up.
        env: Environment variables beside those that every process gets.
    """

    def __init__(self, arguments: Sequence[str], *, started: str, env: dict[str, str] | None = None) -> None:
        self.arguments = list(arguments)
        self._started = started
        self._env = env or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix=f"{arguments[0]}-", dir=settings.SCRATCH))
        self._runs = 0
        self.complaints_allowed = False
        """Whether an error that Python had to swallow is no failure of the test."""

    def _command(self) -> list[str]:
        return [*MANAGE, *self.arguments]

    def start(self) -> None:
        """Start, and wait for the start-up line."""
        assert self._process is None, "it runs already"
        self._runs += 1
        self._out = self._folder / f"{self._runs}.out"
        self._err = self._folder / f"{self._runs}.err"
        # To append, since supervisord opens its own standard output once more for its programs.
        with self._out.open("ab") as out, self._err.open("ab") as err:
            self._process = subprocess.Popen(
                self._command(),
                cwd=ROOT,
                env=environment() | self._env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        try:
            wait_until(
                lambda: (
                    self._process is None
                    or self._process.poll() is not None
                    or (self._started in self.stdout and self.stdout.endswith("\n"))
                ),
                START_LIMIT,
                "the start-up line",
            )
            if self._process.poll() is not None:
                raise AssertionError(f"it ended with exit code {self._process.returncode}")
        except BaseException as error:
            self._clean_up()
            error.add_note(self.story())
            raise

    @property
    def pid(self) -> int:
        assert self._process is not None, "it does not run"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def stdout(self) -> str:
        """What it wrote since it was started last."""
        return self._out.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What it logged since it was started last."""
        return self._err.read_text(errors="replace")

    def story(self) -> str:
        """All that it said, for failure messages."""
        return f"$ manage.py {' '.join(self.arguments)}\n{self.stdout}{self.stderr}"

    def children(self) -> list[int]:
        """Process ids of its running children, oldest first."""
        pid = self.pid
        return sorted(process.pid for process in running_processes() if process.parent == pid)

    def group(self) -> list[int]:
        """Process ids of all that runs in its process group, its own included."""
        pid = self.pid
        return sorted(process.pid for process in running_processes() if process.group == pid)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def signal_group(self, number: signal.Signals) -> None:
        os.killpg(self.pid, number)

    def wait(self, limit: float = STOP_LIMIT) -> int:
        """Wait for its end; its exit code, negative for a signal."""
        assert self._process is not None, "it does not run"
        try:
            return self._process.wait(limit)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"it did not end within {limit:g} s\n{self.story()}") from error

    def stop(self, limit: float = STOP_LIMIT) -> None:
        """End it with TERM, and check how it ended. No matter if it ended already."""
        if self._process is None:
            return
        try:
            if self._process.poll() is None:
                self.signal(signal.SIGTERM)
            code = self.wait(limit)
            assert code == 0, f"exit code {code}\n{self.story()}"
            self._check_nothing_left()
            for complaint in ("Exception ignored in", "ResourceWarning", "was never awaited"):
                assert self.complaints_allowed or complaint not in self.stderr, self.story()
        finally:
            self._clean_up()

    def kill(self) -> None:
        """End it with KILL, and wait for its end; for its children too, which die with it."""
        assert self._process is not None, "it does not run"
        try:
            self.signal(signal.SIGKILL)
            self.wait()
            self._check_nothing_left()
        finally:
            self._clean_up()

    def forget(self) -> None:
        """It has ended as it should; do not look at how when the block is left."""
        assert not self.is_running, "it runs still"
        self._clean_up()

    def restart(self) -> None:
        """Start again where it was; end it first if it runs."""
        self.stop()
        self.start()

    def _check_nothing_left(self) -> None:
        wait_until(lambda: not self.group(), what=f"the end of the process group\n{self.story()}")

    def _clean_up(self) -> None:
        if self._process is None:
            return
        if self.group():
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.stop()
        else:
            error.add_note(self.story())
            self._clean_up()


class GearmanServerProcess(ManagedProcess):
    """
    ``manage.py gearman_server``.

    Args:
        store: ``database`` or ``memory``.
        port: Where it listens; None for a free port.
        name: ``--name``; None for the command's default.
        options: More command-line options.
    """

    def __init__(
        self,
        *,
        store: str = "database",
        port: int | None = None,
        name: str | None = None,
        options: Sequence[str] = (),
        env: dict[str, str] | None = None,
    ) -> None:
        self.port = port or free_port()
        self.address = f"127.0.0.1:{self.port}"
        arguments = ["gearman_server", "--listen", "127.0.0.1", "--port", str(self.port), "--store", store]
        if name is not None:
            arguments += ["--name", name]
        super().__init__(
            [*arguments, *options],
            started="listens on",
            env={"GEARMAN_TEST_SERVER": self.address, **(env or {})},
        )

    @property
    def setting(self) -> dict[str, dict[str, Any]]:
        """A value for ``settings.GEARMAN`` that leads to this server."""
        return {"default": {"SERVERS": [self.address]}}

    def ask(self, line: str) -> str:
        """Its answer to a line such as ``status`` or ``workers``."""
        return ask(self.port, line)

    def status(self) -> dict[str, tuple[int, int, int]]:
        """{function: (waiting and running jobs, running jobs, workers)}."""
        rows = [line.split("\t") for line in self.ask("status").splitlines()]
        return {name: (int(total), int(running), int(workers)) for name, total, running, workers in rows}


class WorkerProcess(ManagedProcess):
    """
    ``manage.py gearman_worker``.

    Args:
        server: Where it takes jobs from: one process of this file or more, or ``host:port`` texts.
        processes: How many children.
        queues: Names of the queues to serve; None for all.
        functions: Names of the functions to serve; none for all.
        options: More command-line options.
    """

    def __init__(
        self,
        server: GearmanServerProcess | str | Sequence[GearmanServerProcess | str],
        *,
        processes: int = 2,
        queues: Sequence[str] | None = None,
        functions: Sequence[str] = (),
        options: Sequence[str] = (),
        env: dict[str, str] | None = None,
    ) -> None:
        servers = [server] if isinstance(server, GearmanServerProcess | str) else list(server)
        addresses = [each if isinstance(each, str) else each.address for each in servers]
        self.processes = processes
        self._links = processes * len(addresses)
        arguments = ["gearman_worker", "--processes", str(processes), "--servers", ",".join(addresses)]
        if queues is not None:
            arguments += ["--queues", ",".join(queues)]
        super().__init__(
            [*arguments, *functions, *options],
            started="gearman_worker: ",
            env={"GEARMAN_TEST_SERVER": addresses[0], **(env or {})},
        )

    def wait_connected(self, limit: float = START_LIMIT) -> None:
        """Wait until every child has reached every server at least once since the start."""
        wait_until(
            lambda: self.stderr.count("Connected to the job server") >= self._links,
            limit,
            "the connection of every child",
        )


@contextmanager
def worker_thread(
    functions: Mapping[str, WorkerFunction], *servers: GearmanServerProcess | int, **options: Any
) -> Iterator[Worker]:
    """A ``Worker`` in a thread of the test's process, for servers of this file or ports of 127.0.0.1."""
    ports = [each if isinstance(each, int) else each.port for each in servers]
    options = {"client_id": "thread", "describe": lambda error: repr(error).encode(), **options}
    made = Worker(functions, [("127.0.0.1", port) for port in ports], **options)
    control_read, control_write = os.pipe()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            made.run(control_read)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="worker")
    thread.start()
    try:
        yield made
    finally:
        os.close(control_write)
        thread.join(STOP_LIMIT)
        os.close(control_read)
    assert not thread.is_alive(), "the worker did not stop"
    assert not failures, failures


@contextmanager
def held_elsewhere(do: Callable[[], object]) -> Iterator[None]:
    """Do it in a transaction of another connection, as a view does, that is open as long as the block."""
    if not connection.features.has_select_for_update_skip_locked:
        pytest.skip("this database does not lock rows")
    has_done, goes_on = threading.Event(), threading.Event()

    def hold() -> None:
        try:
            with transaction.atomic():
                do()
                has_done.set()
                goes_on.wait(60)
        finally:
            has_done.set()
            connection.close()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert has_done.wait(60)
        yield
    finally:
        goes_on.set()
        thread.join(60)


@contextmanager
def server(**options: Any) -> Iterator[GearmanServerProcess]:
    """A running job server; the arguments are those of ``GearmanServerProcess``."""
    with GearmanServerProcess(**options) as process:
        yield process


@contextmanager
def worker(
    server: GearmanServerProcess | str | Sequence[GearmanServerProcess | str], **options: Any
) -> Iterator[WorkerProcess]:
    """A running worker; the arguments are those of ``WorkerProcess``."""
    with WorkerProcess(server, **options) as process:
        yield process
