"""
The job server under load, beside the C gearmand in the same run.

    python benchmarks/server.py [--seconds 2] [--jobs 20000] [--rounds 3] [--durable] [--profile]

Prints a table with a column per server; only the ratios mean anything, and on a
machine that does something else, only those of CPU and of memory. Both are
started here on free ports of the loopback and stopped at the end. gearmand
runs with one I/O thread (``-t 1``), its fast mode on few cores, and is left
out when it is not installed. ``--durable`` measures with the database store
(a SQLite file in a temporary folder) and gearmand's SQLite queue instead.

The load comes from ``load.c``, compiled here: clients and workers on one
thread, so that the server is what is measured. Where it used more CPU than a
server all the same, a line says so: that figure is of both.

``--profile`` runs our server alone, under cProfile, and shows where its time
goes under each load.
"""

from __future__ import annotations

import argparse
import os
import pstats
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

ROOT = Path(__file__).resolve().parent.parent

IDLE_WORKERS = 2_000
DEEPER = 5
"""How many times ``--jobs`` the long queue has."""


@dataclass(frozen=True)
class Server:
    """A running job server, as the system sees it."""

    name: str
    pid: int
    port: int

    @property
    def cpu(self) -> float:
        """Seconds of CPU that it has used, of all its threads."""
        threads = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9

    @property
    def memory(self) -> int:
        """Bytes of memory that it occupies."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Load:
    """What the load generator saw."""

    seconds: float
    jobs: float
    p50: float
    """Microseconds of a job's round trip."""
    p99: float
    cpu: float
    """Seconds that it used itself."""
    server_cpu: float
    """Seconds that the server used meanwhile."""

    @property
    def per_second(self) -> float:
        return self.jobs / self.seconds

    @property
    def cpu_per_job(self) -> float:
        """Microseconds of the server's CPU; what else the machine does hardly changes it."""
        return self.server_cpu / self.jobs * 1e6


class Bench:
    """
    The load generator, at one server.

    Args:
        program: The compiled ``load.c``.
        notes: Gets a line for each load that used more CPU than the server.
    """

    def __init__(self, program: Path, server: Server, notes: dict[str, None]) -> None:
        self._program = str(program)
        self._server = server
        self._notes = notes

    def load(self, function: str, mode: str, *numbers: float) -> Load:
        command = [self._program, str(self._server.port), function, mode, *map(str, numbers)]
        before = self._server.cpu
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        used = self._server.cpu - before
        seconds, jobs, p50, p99, cpu = map(float, done.stdout.split())
        load = Load(seconds, jobs, p50, p99, cpu, used)
        if load.cpu > load.server_cpu:
            what = f"{mode} {' x '.join(map(str, numbers[:2]))}"
            shares = f"{load.cpu / load.seconds:.0%} of a core and {load.server_cpu / load.seconds:.0%}"
            self._notes[f"! {what}: the load used more CPU than {self._server.name}, {shares}"] = None
        return load

    def idle_worker_memory(self) -> float:
        """Bytes that the server grows by for each worker that sleeps; of a server that did nothing else."""
        # The first ones find room that was left when the server started.
        with self._sleepers():
            before = self._server.memory
            with self._sleepers():
                return (self._server.memory - before) / IDLE_WORKERS

    @contextmanager
    def _sleepers(self) -> Iterator[None]:
        command = [self._program, str(self._server.port), "idle", "idle", str(IDLE_WORKERS)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError(f"{self._server.name} did not take {IDLE_WORKERS} workers")
            yield
            process.stdin.close()

    def measure(self, seconds: float, jobs: int, *, durable: bool) -> Iterator[tuple[str, float]]:
        """Each figure with its title."""
        yield "submissions/s, 1 connection", self.load("one", "submit", 1, jobs).per_second
        yield "drain/s, 1 worker", self.load("one", "drain", 1, jobs).per_second
        submitted = self.load("eight", "submit", 8, jobs)
        yield "submissions/s, 8 connections", submitted.per_second
        yield "  server's CPU us per job, submitted", submitted.cpu_per_job
        drained = self.load("eight", "drain", 4, jobs)
        yield "drain/s, 4 workers", drained.per_second
        yield "  server's CPU us per job, drained", drained.cpu_per_job
        if not durable:
            alone = self.load("alone", "foreground", 1, 1, seconds)
            yield "round trip, median us", alone.p50
            yield "round trip, p99 us", alone.p99
            many = self.load("many", "foreground", 8, 8, seconds)
            yield "foreground/s, 8 clients, 8 workers", many.per_second
            yield "  server's CPU us per job, foreground", many.cpu_per_job
            # gearmand looks through its jobs for a unique, and slows down as they become more.
            deep = jobs * DEEPER
            before = self._server.memory
            yield f"submissions/s, to {deep:,} waiting", self.load("deep", "submit", 8, deep).per_second
            yield f"bytes per queued job, of {deep:,}", (self._server.memory - before) / deep
            yield f"drain/s, of {deep:,} waiting", self.load("deep", "drain", 4, deep).per_second


# The servers.


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def ours(
    scratch: Path, *, durable: bool, profile: Path | None = None, database: str | None = None
) -> Iterator[Server]:
    """Our server; its database is a SQLite file in ``scratch``, or of this URL."""
    port = free_port()
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "project.settings",
        "PROJECT_VAR": str(scratch),
        "GEARMAN_SERVERS": f"127.0.0.1:{port}",
    }
    environment.pop("DATABASE_URL", None)
    if database is not None:
        environment["DATABASE_URL"] = database
    manage = [str(ROOT / "manage.py")]
    if durable:
        subprocess.run([sys.executable, *manage, "migrate", "-v0"], check=True, env=environment)
    if profile is not None:
        manage = ["-m", "cProfile", "-o", str(profile), *manage]
    store = "database" if durable else "memory"
    command = [sys.executable, *manage, "gearman_server", "-v0", "--store", store]
    with _running("django_gearman", command, port, environment) as server:
        yield server


@contextmanager
def gearmand(scratch: Path, *, durable: bool, queue: Sequence[str] | None = None) -> Iterator[Server]:
    """The peer; ``durable`` is with its SQLite queue, unless the options of another ``queue`` are given."""
    port = free_port()
    command = ["gearmand", "-L", "127.0.0.1", "-p", str(port), "-t", "1", "-l", "none", "--verbose", "ERROR"]
    # Ours; with its own 32, thousands that connect at once would wait for seconds.
    command += ["-b", "1024"]
    if durable:
        command += queue or ["-q", "libsqlite3", "--libsqlite3-db", str(scratch / "gearmand.sqlite3")]
    with _running("gearmand", command, port, dict(os.environ)) as server:
        yield server


@contextmanager
def _running(name: str, command: list[str], port: int, environment: dict[str, str]) -> Iterator[Server]:
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        _wait_for(port, process)
        yield Server(name, process.pid, port)
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = monotonic() + 20
    while monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            sleep(0.05)
    raise RuntimeError(f"{process.args!r} does not listen on {port}")


# The command.


def compile_load(scratch: Path) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        sys.exit("The load generator is written in C, and there is no cc: install a C compiler, such as gcc.")
    program = scratch / "load"
    subprocess.run([compiler, "-O2", "-o", str(program), str(ROOT / "benchmarks" / "load.c")], check=True)
    return program


def compare(program: Path, scratch: Path, options: argparse.Namespace) -> None:
    kinds: dict[str, Callable[..., AbstractContextManager[Server]]] = {"django_gearman": ours}
    if shutil.which("gearmand"):
        kinds["gearmand"] = gearmand
    results: dict[str, dict[str, list[float]]] = {}
    notes: dict[str, None] = {}

    def note(name: str, title: str, value: float) -> None:
        results.setdefault(title, {}).setdefault(name, []).append(value)

    for number in range(options.rounds):
        for name, start in kinds.items():
            folder = scratch / f"{name}{number}"
            folder.mkdir()
            with start(folder, durable=options.durable) as server:
                bench = Bench(program, server, notes)
                for title, value in bench.measure(options.seconds, options.jobs, durable=options.durable):
                    note(name, title, value)
            # Memory that was once taken is used again: a new server.
            with start(folder, durable=False) as server:
                used = Bench(program, server, notes).idle_worker_memory()
                note(name, f"bytes per idle worker, of {IDLE_WORKERS:,}", used)
    print(f"{'':38}" + "".join(f"{name:>16}" for name in kinds) + f"{'ratio':>8}")
    for title, by_server in results.items():
        values = [statistics.median(by_server[name]) for name in kinds]
        # Memory need not grow for a few jobs.
        ratio = f"{values[0] / values[1]:8.2f}" if len(values) > 1 and values[1] else ""
        print(f"{title:38}" + "".join(f"{value:16,.{0 if value >= 100 else 1}f}" for value in values) + ratio)
    if len(kinds) == 1:
        print("gearmand is not installed: there is nothing to compare with.")
    for line in notes:
        print(line)


def profile(program: Path, scratch: Path, options: argparse.Namespace) -> None:
    jobs = options.jobs
    loads: dict[str, Callable[[Bench], object]] = {
        "submissions, 8 connections": lambda bench: bench.load("f", "submit", 8, jobs),
        "submissions and drain, 4 workers": lambda bench: (
            bench.load("f", "submit", 8, jobs),
            bench.load("f", "drain", 4, jobs),
        ),
        "foreground, 8 clients, 8 workers": lambda bench: bench.load(
            "f", "foreground", 8, 8, options.seconds
        ),
    }
    for number, (title, load) in enumerate(loads.items()):
        folder = scratch / str(number)
        folder.mkdir()
        file = folder / "profile"
        with ours(folder, durable=options.durable, profile=file) as server:
            load(Bench(program, server, {}))
        print(f"\n=== {title}")
        pstats.Stats(str(file)).strip_dirs().sort_stats("tottime").print_stats(14)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="per timed load")
    parser.add_argument("--jobs", type=int, help="per load of background jobs (default: 20000, durable 5000)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved; medians are shown")
    parser.add_argument("--durable", action="store_true", help="with a database behind both servers")
    parser.add_argument("--profile", action="store_true", help="where our server's time goes")
    options = parser.parse_args()
    options.jobs = options.jobs or (5_000 if options.durable else 20_000)
    # The servers started here inherit it, and take some thousand connections.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        program = compile_load(scratch)
        (profile if options.profile else compare)(program, scratch, options)


if __name__ == "__main__":
    main()
