"""
Clients and workers of every language, with one face.

A client hands a job in and tells what it heard of it as events: data, status,
warning, and one of complete, fail and exception. A worker is a process whose
functions begin with a prefix. The programs lie in ``programs``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, NamedTuple

from django.conf import settings

from django_gearman import Client
from django_gearman.exceptions import JobFailed
from tests import harness
from tests.acceptance.conftest import call, missing, program

from .gearmand import Gearmand

PROGRAMS: Final = Path(__file__).parent / "programs"
SITE: Final = {"DJANGO_SETTINGS_MODULE": "tests.interop.site.settings"}
LIMIT: Final = 60.0
"""Seconds in which a job that is expected to end does."""

Server = harness.GearmanServerProcess | Gearmand


class Event(NamedTuple):
    name: str
    value: bytes


def require_php() -> str:
    path = program("php")
    if "gearman" not in call([path, "-m"]).stdout.decode().split():
        missing("the gearman extension of PHP is not installed")
    return path


def require_perl() -> str:
    path = program("perl")
    if subprocess.run([path, "-MGearman::Client", "-e1"], capture_output=True, check=False).returncode:
        missing("Perl's Gearman::Client is not installed")
    return path


def compiled(name: str) -> str:
    """The path of a C program of this folder, compiled when it is first asked for in this process."""
    made = Path(settings.SCRATCH) / f"interop-{os.getpid()}-{name}"
    if not made.exists():
        compiler = program("cc")
        if not Path("/usr/include/libgearman-1.0/gearman.h").exists():
            missing("libgearman-dev is not installed")
        source = str(PROGRAMS / f"{name}.c")
        call(
            [
                compiler,
                "-std=gnu11",
                "-O1",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-o",
                str(made),
                source,
                "-lgearman",
            ]
        )
    return str(made)


def interpreter(language: str, name: str) -> list[str]:
    """The command that runs the program of that name in a language: php, perl or c."""
    if language == "php":
        return [require_php(), "-d", "display_errors=stderr", str(PROGRAMS / f"{name}.php")]
    if language == "perl":
        return [require_perl(), str(PROGRAMS / f"{name}.pl")]
    return [compiled(name)]


# Clients.


class ScriptClient:
    """A client program of this folder."""

    def __init__(self, language: str) -> None:
        self.language = language
        self._command = interpreter(language, "client")

    def command(self, server: Server, *arguments: str) -> list[str]:
        return [*self._command, str(server.port), *arguments]

    def ask(self, server: Server, *arguments: str, workload: bytes = b"") -> str:
        return call(self.command(server, *arguments), workload, limit=LIMIT).stdout.decode().rstrip("\n")

    def run(
        self,
        server: Server,
        function: str,
        workload: bytes = b"a",
        *,
        priority: str = "normal",
        unique: str = "",
        how: str = "task",
    ) -> list[Event]:
        """What it heard of a foreground job; ``how`` is ``do`` for the calls that know no call-backs."""
        told = read_events(self.ask(server, how, priority, function, unique, workload=workload))
        return [Event(name, value) for _, name, value in told]

    def background(
        self,
        server: Server,
        function: str,
        workload: bytes = b"a",
        *,
        priority: str = "normal",
        unique: str = "",
    ) -> str:
        """The handle of a background job."""
        return self.ask(server, "background", priority, function, unique, workload=workload)

    def tasks(self, server: Server, tasks: Mapping[str, str]) -> list[tuple[str, str, bytes]]:
        """What it heard of several jobs at once: function, event, value."""
        return read_events(self.ask(server, "tasks", *(f"{name}={text}" for name, text in tasks.items())))

    def status(self, server: Server, handle: str) -> tuple[int, ...]:
        """Known, running, numerator, denominator."""
        return tuple(map(int, self.ask(server, "status", handle).split()))

    def unique_status(self, server: Server, unique: str) -> tuple[int, ...]:
        """As ``status``, and the number of clients that wait where the library tells it."""
        return tuple(map(int, self.ask(server, "unique-status", unique).split()))


class ToolClient:
    """``gearman`` of the command line."""

    language = "tool"

    def command(self, server: Server, *options: str) -> list[str]:
        return [program("gearman"), "-h", "127.0.0.1", "-p", str(server.port), *options]

    def options(self, function: str, priority: str, unique: str) -> list[str]:
        chosen = {"high": ["-I"], "normal": [], "low": ["-L"]}[priority]
        return ["-f", function, *chosen, *(["-u", unique] if unique else [])]

    def run(
        self,
        server: Server,
        function: str,
        workload: bytes = b"a",
        *,
        priority: str = "normal",
        unique: str = "",
    ) -> list[Event]:
        """What it printed, as one event: it does not part data from the result."""
        command = self.command(server, *self.options(function, priority, unique))
        done = subprocess.run(command, input=workload, capture_output=True, timeout=LIMIT, check=False)
        if done.returncode == 0:
            return [Event("complete", done.stdout)]
        assert b"Job failed" in done.stderr, done.stderr
        return [Event("fail", b"")]

    def background(
        self,
        server: Server,
        function: str,
        workload: bytes = b"a",
        *,
        priority: str = "normal",
        unique: str = "",
    ) -> str:
        """Nothing: it does not tell the handle."""
        call(self.command(server, "-b", *self.options(function, priority, unique)), workload)
        return ""


class OurClient:
    """``django_gearman.Client``."""

    language = "ours"

    def run(
        self,
        server: Server,
        function: str,
        workload: bytes = b"a",
        *,
        priority: str = "normal",
        unique: str = "",
    ) -> list[Event]:
        told: list[Event] = []
        with Client([server.address]) as client:
            do = {"high": client.do_high, "normal": client.do, "low": client.do_low}[priority]
            try:
                result = do(
                    function,
                    workload,
                    unique=unique,
                    timeout=LIMIT,
                    on_data=lambda data: told.append(Event("data", data)),
                    on_warning=lambda data: told.append(Event("warning", data)),
                    on_status=lambda *step: told.append(Event("status", b"/".join(step))),
                )
            except JobFailed as error:
                told.append(Event("exception" if error.data else "fail", error.data))
            else:
                told.append(Event("complete", result))
        return told

    def background(
        self,
        server: Server,
        function: str,
        workload: bytes = b"a",
        *,
        priority: str = "normal",
        unique: str = "",
    ) -> str:
        with Client([server.address]) as client:
            submit = {
                "high": client.do_high_background,
                "normal": client.do_background,
                "low": client.do_low_background,
            }[priority]
            return submit(function, workload, unique=unique)

    def status(self, server: Server, handle: str) -> tuple[int, ...]:
        with Client([server.address]) as client:
            told = client.job_status(handle)
        return told.known, told.running, told.numerator, told.denominator

    def unique_status(self, server: Server, unique: str) -> tuple[int, ...]:
        with Client([server.address]) as client:
            told = client.job_status_unique(unique)
        return told.known, told.running, told.numerator, told.denominator, told.clients


AnyClient = ScriptClient | ToolClient | OurClient

CLIENTS: Final = ("php", "perl", "c", "tool", "ours")
WORKERS: Final = ("php", "perl", "c", "tool", "ours")
SCRIPTS: Final = ("php", "perl", "c")


def client_of(language: str) -> AnyClient:
    if language in SCRIPTS:
        return ScriptClient(language)
    return ToolClient() if language == "tool" else OurClient()


def read_events(output: str) -> list[tuple[str, str, bytes]]:
    lines = [line.split("\t") for line in output.splitlines()]
    return [(label, name, bytes.fromhex(value)) for label, name, value in lines]


def whole(events: Sequence[Event]) -> bytes:
    """All that came of a job that ended well, parts and result in one."""
    assert events[-1].name == "complete", events
    return b"".join(event.value for event in events if event.name in ("data", "complete"))


# Workers.

_SHELL: Final = {
    # The program writes the whole workload before it reads: a filter that answers meanwhile would hang.
    "reverse": ["perl", "-0777", "-e", "my $all = <STDIN>; print scalar reverse defined $all ? $all : ''"],
    "fail": ["false"],
    "hold": [
        "sh",
        "-c",
        'p=$(cat); echo $$ >> "$p.pids"; until [ -e "$p" ]; do sleep 0.01; done; printf $$',
    ],
    "meet": [
        "sh",
        "-c",
        'd=$(cat); : > "$d/$$"; for i in $(seq 1000); do '
        'if [ $(ls "$d" | wc -l) -ge 3 ]; then printf met; exit; fi; sleep 0.01; done; exit 1',
    ],
}
"""What ``gearman -w`` runs; each function is a process of its own."""

FUNCTIONS: Final = {
    "php": ("reverse", "report", "unique", "fail", "throw", "hold", "meet"),
    "perl": ("reverse", "report", "fail", "throw", "die", "hold", "meet", "zero", "empty"),
    "c": ("reverse", "report", "unique", "fail", "throw", "hold", "meet", "map"),
    "tool": ("reverse", "fail", "hold", "meet"),
    "ours": ("reverse", "report", "unique", "throw", "hold", "meet"),
}
"""What the worker of each language offers."""


class ForeignWorker:
    """A worker of a language, as processes."""

    def __init__(
        self, language: str, server: Server, prefix: str | None = None, limit: int | None = None
    ) -> None:
        self.language = language
        self.prefix = f"{language}." if prefix is None else prefix
        self._server = server
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stderr = tempfile.TemporaryFile(dir=settings.SCRATCH)  # noqa: SIM115  # closed with the process
        if language == "tool":
            tool = [program("gearman"), "-h", "127.0.0.1", "-p", str(server.port), "-w"]
            commands = [[*tool, "-f", self.prefix + name, "--", *_SHELL[name]] for name in FUNCTIONS["tool"]]
        else:
            limits = [] if limit is None else [str(limit)]
            commands = [[*interpreter(language, "worker"), str(server.port), self.prefix, *limits]]
        self._commands = commands

    def start(self) -> None:
        before = self._workers()
        for command in self._commands:
            self._processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._stderr,
                    start_new_session=True,
                )
            )

        def is_there() -> bool:
            assert self.is_alive, self.stderr
            now = self._workers()
            return all(now[name] > before[name] for name in now)

        harness.wait_until(is_there, LIMIT, f"the worker of {self.language}")

    def _workers(self) -> dict[str, int]:
        """{function: how many offer it, as the server sees it}."""
        status = self._server.status()
        names = [self.prefix + name for name in FUNCTIONS[self.language]]
        return {name: status.get(name, (0, 0, 0))[2] for name in names}

    def _is_seen_off(self, before: dict[str, int]) -> bool:
        try:
            now = self._workers()
        except OSError:
            return True  # the server went first
        return all(now[name] < before[name] for name in now)

    @property
    def is_alive(self) -> bool:
        return all(process.poll() is None for process in self._processes)

    @property
    def stderr(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace")

    def kill(self) -> None:
        """End it with KILL, as a crash would."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes.clear()

    def __enter__(self) -> ForeignWorker:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        before: dict[str, int] = {}
        if self._processes and self.is_alive:
            with suppress(OSError):
                before = self._workers()
        for process in self._processes:
            with suppress(ProcessLookupError):
                # What it runs, too.
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._stderr.close()
        if before and all(before.values()):
            # The next worker of that name is counted from what is left.
            harness.wait_until(
                lambda: self._is_seen_off(before), LIMIT, f"the end of {self.language}'s worker"
            )


def our_worker(server: Server, prefix: str = "ours.", processes: int = 1) -> harness.WorkerProcess:
    """``manage.py gearman_worker`` with the functions of ``site.jobs``."""
    return harness.WorkerProcess(
        server.address,
        processes=processes,
        functions=[prefix + name for name in FUNCTIONS["ours"]],
        env=SITE | {"INTEROP_PREFIX": prefix},
    )


def start_worker(
    stack: ExitStack, language: str, server: Server, prefix: str | None = None
) -> ForeignWorker | harness.WorkerProcess:
    """A worker of a language that is ready for jobs, until the stack is left."""
    if language != "ours":
        return stack.enter_context(ForeignWorker(language, server, prefix))
    process: harness.WorkerProcess = stack.enter_context(our_worker(server, prefix or "ours."))
    process.wait_connected()
    return process


def pids_of(path: Path) -> list[int]:
    """Who has run ``hold`` with that path so far."""
    try:
        return [int(line) for line in Path(f"{path}.pids").read_text().splitlines()]
    except FileNotFoundError:
        return []


def wait_for_pids(path: Path, count: int) -> list[int]:
    return harness.wait_until(
        lambda: pids if len(pids := pids_of(path)) >= count else None, what=f"{count} runs of hold"
    )
