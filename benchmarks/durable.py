"""
How fast jobs are kept, beside the C gearmand with its SQLite and PostgreSQL queues in the same run.

    python benchmarks/durable.py                    SQLite, and a PostgreSQL server of its own
    python benchmarks/durable.py --database sqlite --rounds 9
    python benchmarks/durable.py --jobs 2000 --rounds 1

Needs ``cc``. What else is missing is left out, and the end of the output says so: gearmand
(Debian: gearman-job-server); for PostgreSQL psycopg and ``initdb`` (Debian: postgresql), or
``--postgres postgres://user@host:port/`` of a server on which databases may be made and dropped.

Both servers are up at once, on free ports of the loopback, and take turns. A figure is the
median of the rounds, a ratio the median of the rounds' own ratios; only ratios mean anything,
and on a busy machine only those of many rounds, whose extremes stand behind them. gearmand gets
a tenth of the jobs, as it takes about ten times as long for each. It has one I/O thread
(``-t 1``), and each job a unique of its own, a number, since its jobs without one overwrite each
other. The line of CPU is of the servers alone, without PostgreSQL, and says least where it does most.

Nothing counts that is not durable. When the last JOB_CREATED has come, another connection must
see every job in the server's table. A drain takes until gearmand's table is empty, or ours has
the result of every job. Anything else ends the run. Commits are synced on both sides: gearmand
leaves SQLite's ``synchronous`` at FULL, our server sets it so, and PostgreSQL, one server for
both, is asked for ``fsync`` and ``synchronous_commit``. The files lie where ``TMPDIR`` says: on a
disk, since to sync a file system in memory costs nothing. The slower the disk, the higher the ratios.

``.enqueue()`` is of one process with Django while a job server is up. Ours inserts a row;
gearmand gets the same job by the wire (``ENQUEUE = "wire"``); ``create()`` is the ORM's own
insert of such a row. The three take turns within the process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any, NamedTuple
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from server import Bench, Server, compile_load, free_port, gearmand, ours

SHARE = 10
"""How many times as many jobs ours gets as gearmand."""

WORKERS = 4

PATIENCE = 60.0
"""Seconds until the table must show what a server did."""

PARTS = 5
"""Turns that each way to enqueue has within a round."""


class NotThere(Exception):
    """Why a database is left out, in a sentence."""


class NotDurable(Exception):
    """A server said what its table does not."""


class Target(NamedTuple):
    """What a figure is to reach: at least so many times its peer's, or so many a second."""

    ratio: float | None = None
    rate: float | None = None

    def __str__(self) -> str:
        if self.ratio is not None:
            return f">= {self.ratio:.2g}x"
        return f">= {self.rate:,.0f}" if self.rate is not None else ""

    def is_reached(self, rate: float, ratio: float | None) -> bool:
        if self.ratio is not None:
            return ratio is None or ratio >= self.ratio
        return self.rate is None or rate >= self.rate


@dataclass(frozen=True)
class Kind:
    """A database, and what is wanted of ours there."""

    title: str
    submissions: float
    drain: float
    many: float | None = None
    """Of ``enqueue_many``, jobs per second."""


KINDS = {
    "sqlite": Kind("SQLite", submissions=20, drain=10, many=40_000),
    "postgresql": Kind("PostgreSQL", submissions=6, drain=4),
}
CREATE = 1 / 1.2
"""What ``.enqueue()`` is to reach, of a bare ``create()``."""


class Table:
    """
    A server's table of jobs, as others see it.

    Args:
        count: Runs a statement with one parameter on a connection of its own.
        kept: Counts the jobs of a function that are to do.
        left: Tells whether there are any, for less: it is asked again and again, beside a server at work.
        ended: Counts those that are done; None where such are deleted.
    """

    def __init__(
        self, count: Callable[[str, str], int], kept: str, left: str | None = None, ended: str | None = None
    ) -> None:
        self._count = count
        self._kept = kept
        self._left = left or kept
        self._ended = ended

    def check_kept(self, function: str, jobs: int) -> None:
        there = self._count(self._kept, function)
        if there != jobs:
            raise NotDurable(f"{jobs} jobs were acknowledged, and {there} stand in the table: {self._kept}")

    def wait_until_ended(self, function: str, jobs: int) -> None:
        deadline = monotonic() + PATIENCE
        while True:
            asked = monotonic()
            if not self._count(self._left, function):
                break
            answered = monotonic()
            if answered > deadline:
                raise NotDurable(f"{jobs} jobs were run, and some still stand in the table: {self._kept}")
            # A fifth of a core at the most: the server and its database are still at work.
            sleep(max(0.002, 4 * (answered - asked)))
        if self._ended is not None and (there := self._count(self._ended, function)) != jobs:
            raise NotDurable(f"{jobs} jobs were run, and {there} results stand in the table: {self._ended}")


def our_table(count: Callable[[str, str], int]) -> Table:
    rows = "FROM django_gearman_jobrecord WHERE function = %s AND status"
    to_do = f"{rows} IN ('READY', 'RUNNING')"
    return Table(
        count,
        f"SELECT count(*) {to_do}",
        # The last that came ends last.
        f"SELECT count(*) FROM (SELECT 1 {to_do} ORDER BY id DESC LIMIT 1) AS last",
        f"SELECT count(*) {rows} = 'SUCCESSFUL' AND length(result) = 100",
    )


def their_table(count: Callable[[str, str], int], name: str) -> Table:
    return Table(count, f"SELECT count(*) FROM {name} WHERE function_name = %s")


@dataclass(frozen=True)
class Side:
    """A server that is up, its table, and the load that it gets."""

    bench: Bench
    server: Server
    table: Table
    jobs: int

    def submit(self, function: str, connections: int) -> dict[str, float]:
        load = self.bench.load(function, "submit", connections, self.jobs)
        self.table.check_kept(function, self.jobs)
        return {"per second": load.per_second, "CPU": load.cpu_per_job}

    def drain(self, function: str) -> dict[str, float]:
        used = self.server.cpu
        load = self.bench.load(function, "drain", WORKERS, self.jobs)
        began = perf_counter()
        self.table.wait_until_ended(function, self.jobs)
        seconds = load.seconds + perf_counter() - began
        return {"per second": self.jobs / seconds, "CPU": (self.server.cpu - used) / self.jobs * 1e6}


class Started(NamedTuple):
    """The two servers on one kind of database."""

    version: str
    server: Server
    table: Table
    database: str | None
    """URL of ours; None for a SQLite file in the folder."""
    peer: Server | None
    peer_table: Table


# The databases.


@contextmanager
def on_sqlite(folder: Path, *, with_peer: bool) -> Iterator[Started]:
    def count_in(name: str) -> Callable[[str, str], int]:
        def count(sql: str, function: str) -> int:
            with closing(sqlite3.connect(folder / name, timeout=PATIENCE)) as connection:
                number: int = connection.execute(sql.replace("%s", "?"), [function]).fetchone()[0]
                return number

        return count

    with ExitStack() as stack:
        server = stack.enter_context(ours(folder, durable=True))
        peer = stack.enter_context(gearmand(folder, durable=True)) if with_peer else None
        yield Started(
            sqlite3.sqlite_version,
            server,
            our_table(count_in("db.sqlite3")),
            None,
            peer,
            their_table(count_in("gearmand.sqlite3"), "gearman_queue"),
        )


@contextmanager
def on_postgresql(folder: Path, cluster: str, *, with_peer: bool) -> Iterator[Started]:
    import psycopg

    def count_in(name: str) -> Callable[[str, str], int]:
        connection = stack.enter_context(psycopg.connect(cluster, dbname=name, autocommit=True))

        def count(sql: str, function: str) -> int:
            row = connection.execute(sql, [function]).fetchone()
            assert row is not None, "a count is a row"
            number: int = row[0]
            return number

        return count

    mine, theirs = (f"gearman_benchmark_{os.getpid()}_{whose}" for whose in ("ours", "peer"))
    with ExitStack() as stack:
        maintenance = stack.enter_context(psycopg.connect(cluster, autocommit=True))
        for setting in ("fsync", "synchronous_commit"):
            row = maintenance.execute(f"SHOW {setting}").fetchone()
            if row is None or row[0] != "on":
                raise NotThere(f"{setting} is not on; set it so, since nothing is durable without it")
        for name in (mine, theirs):
            maintenance.execute(f"CREATE DATABASE {name}")
            stack.callback(maintenance.execute, f"DROP DATABASE {name} WITH (FORCE)")
        url = urlsplit(cluster)._replace(path=f"/{mine}").geturl()
        server = stack.enter_context(ours(folder, durable=True, database=url))
        peer = None
        if with_peer:
            info = psycopg.conninfo.make_conninfo(cluster, dbname=theirs)
            queue = ["-q", "Postgres", "--libpq-conninfo", info]
            peer = stack.enter_context(gearmand(folder, durable=True, queue=queue))
        version = maintenance.info.server_version
        # gearmand makes its table when it starts; without it nobody asks.
        peer_table = their_table(count_in(theirs), "queue")
        yield Started(
            f"{version // 10000}.{version % 10000}", server, our_table(count_in(mine)), url, peer, peer_table
        )


@contextmanager
def new_cluster() -> Iterator[str]:
    """A PostgreSQL server as ``initdb`` makes it, in a temporary folder; its URL."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    path = os.pathsep.join([*map(str, reversed(programs)), os.environ["PATH"]])
    initdb, pg_ctl = (shutil.which(name, path=path) for name in ("initdb", "pg_ctl"))
    if initdb is None or pg_ctl is None:
        raise NotThere("initdb is not installed (Debian: postgresql); install it, or give --postgres URL")
    as_user: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="gearman-benchmark-") as folder:
        if os.getuid() == 0:
            # PostgreSQL does not run as root.
            shutil.chown(folder, "postgres")
            as_user = {"user": "postgres", "group": "postgres", "extra_groups": [], "cwd": folder}
        data, port = f"{folder}/data", free_port()
        quiet: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL, **as_user}
        subprocess.run([initdb, "--no-sync", "-D", data, "-A", "trust", "-U", "postgres"], **quiet)
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories="
        try:
            subprocess.run([pg_ctl, "-D", data, "-w", "-l", f"{folder}/log", "-o", options, "start"], **quiet)
            yield f"postgres://postgres@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([pg_ctl, "-D", data, "-m", "immediate", "stop"], **{**quiet, "check": False})


# What Django does, in a process of its own.


def enqueue(jobs: int, wire_port: int | None) -> None:
    """Print how many jobs a second each way enqueues; in the environment of ``project.settings``."""
    import django

    os.environ["DJANGO_SETTINGS_MODULE"] = "project.settings"
    django.setup()
    from django.db import transaction
    from django.test.utils import override_settings

    from django_gearman.models import JobRecord
    from project.gallery.jobs import reverse

    workload = b"x" * 100
    by_wire = {"default": {"SERVERS": [f"127.0.0.1:{wire_port}"], "ENQUEUE": "wire"}}

    def in_one_transaction(count: int) -> None:
        with transaction.atomic():
            one_by_one(count)

    def one_by_one(count: int) -> None:
        for _ in range(count):
            reverse.enqueue(workload)

    def create(count: int) -> None:
        for _ in range(count):
            JobRecord.objects.create(function="reverse", workload=workload)

    def to_gearmand(count: int) -> None:
        with override_settings(GEARMAN=by_wire):
            one_by_one(count)

    def many(count: int) -> None:
        reverse.enqueue_many([((workload,), {}) for _ in range(count)])

    ways: dict[str, Callable[[int], None]] = {
        "create": create,
        "enqueue": one_by_one,
        "transaction": in_one_transaction,
    }
    if wire_port is not None:
        ways["wire"] = to_gearmand
    if hasattr(reverse, "enqueue_many"):
        ways["many"] = many
    used = dict.fromkeys(ways, 0.0)
    count = max(jobs // PARTS, 1)
    for way in ways.values():
        way(1)  # connections
    for _ in range(PARTS):
        for name, way in ways.items():
            began = perf_counter()
            way(count)
            used[name] += perf_counter() - began
    for name, seconds in used.items():
        print(name, PARTS * count / seconds)


def enqueue_rates(folder: Path, started: Started, jobs: int) -> dict[str, float]:
    environment = {
        **os.environ,
        "PROJECT_VAR": str(folder),
        "GEARMAN_SERVERS": f"127.0.0.1:{started.server.port}",
    }
    environment.pop("DATABASE_URL", None)
    if started.database is not None:
        environment["DATABASE_URL"] = started.database
    command = [sys.executable, __file__, "--enqueue", str(jobs)]
    if started.peer is not None:
        command += ["--wire-port", str(started.peer.port)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    return {name: float(rate) for name, rate in map(str.split, output.decode().splitlines())}


# The figures.


@dataclass
class Figure:
    """A line of the table; a value of each round."""

    target: Target
    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)

    def line(self, title: str) -> str:
        rate = statistics.median(self.ours)
        if not self.peer:
            reached = self.target.is_reached(rate, None)
            return f"{title:42}{rate:10,.0f}{'':26}{self.target!s:>10}" + ("" if reached else "  missed")
        ratios = [mine / other for mine, other in zip(self.ours, self.peer, strict=True)]
        ratio = statistics.median(ratios)
        extremes = f"{min(ratios):.3g}-{max(ratios):.3g}"
        reached = self.target.is_reached(rate, ratio)
        return (
            f"{title:42}{rate:10,.0f}{statistics.median(self.peer):10,.0f}{ratio:8.2f}{extremes:>14}"
            f"{self.target!s:>10}{'' if reached else '  missed'}"
        )


def measure(kind: Kind, started: Started, program: Path, folder: Path, options: argparse.Namespace) -> None:
    """Print the table of one kind of database."""
    notes: dict[str, None] = {}
    figures: dict[str, Figure] = {}

    def note(title: str, target: Target, values: list[float]) -> None:
        figure = figures.setdefault(title, Figure(target))
        figure.ours.append(values[0])
        figure.peer += values[1:]

    sides = [Side(Bench(program, started.server, notes), started.server, started.table, options.jobs)]
    if started.peer is not None:
        jobs = max(options.jobs // SHARE // 8 * 8, 8)
        sides.append(Side(Bench(program, started.peer, notes), started.peer, started.peer_table, jobs))

    for number in range(options.rounds):
        for connections in (1, 8):
            function = f"round{number}x{connections}"
            done = [side.submit(function, connections) for side in sides]
            load = f"{connections} connection{'s'[: connections - 1]}"
            note(f"submissions/s, {load}", Target(kind.submissions), [each["per second"] for each in done])
            note(f"  CPU us per job, {load}", Target(), [each["CPU"] for each in done])
        done = [side.drain(f"round{number}x8") for side in sides]
        note(f"drain/s, {WORKERS} workers", Target(kind.drain), [each["per second"] for each in done])
        note("  CPU us per job, drained", Target(), [each["CPU"] for each in done])
        rates = enqueue_rates(folder, started, options.enqueued)
        wire = [rates["wire"]] if "wire" in rates else []
        note(".enqueue()/s", Target(), [rates["enqueue"], *wire])
        note(".enqueue()/s, beside create()", Target(CREATE), [rates["enqueue"], rates["create"]])
        note(".enqueue()/s in one transaction", Target(), [rates["transaction"]])
        if "many" in rates:
            note("enqueue_many/s", Target(rate=kind.many), [rates["many"]])

    head = f"{kind.title} {started.version}"
    print(f"\n{head:42}{'ours':>10}{'peer':>10}{'ratio':>8}{'of rounds':>14}{'target':>10}")
    for title, figure in figures.items():
        print(figure.line(title))
    for line in notes:
        print(line)
    if "enqueue_many/s" not in figures:
        print("! enqueue_many was not measured: a @job has no such method")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--database", choices=KINDS, help="only this one")
    parser.add_argument("--postgres", metavar="URL", help="a PostgreSQL server to use, not one of its own")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved; medians are shown")
    parser.add_argument("--jobs", type=int, default=40_000, help="per load of ours; a tenth for gearmand")
    parser.add_argument("--enqueued", type=int, default=1_000, help="jobs of each way to enqueue")
    parser.add_argument("--enqueue", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--wire-port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.enqueue:
        enqueue(options.enqueue, options.wire_port)
        return 0
    if options.rounds < 1 or options.jobs < 80 or options.enqueued < PARTS:
        parser.error(f"at least 1 round, 80 jobs, and {PARTS} enqueued; fewer say nothing")
    options.jobs -= options.jobs % 8
    # Whoever ends this run ends the servers that it started.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with_peer = shutil.which("gearmand") is not None
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        program = compile_load(Path(scratch))
        for name, kind in KINDS.items():
            if options.database not in (None, name):
                continue
            folder = Path(scratch) / name
            folder.mkdir()
            try:
                with ExitStack() as stack:
                    if name == "sqlite":
                        started = stack.enter_context(on_sqlite(folder, with_peer=with_peer))
                    else:
                        cluster = options.postgres or stack.enter_context(new_cluster())
                        started = stack.enter_context(on_postgresql(folder, cluster, with_peer=with_peer))
                    measure(kind, started, program, folder, options)
            except NotDurable as error:
                sys.exit(f"! {kind.title}: {error}")
            except subprocess.CalledProcessError as error:
                # Each says on standard error what was in the way.
                sys.exit(f"! {kind.title}: {Path(error.cmd[0]).name} gave up: {error.cmd[1:]}")
            except (NotThere, ImportError) as error:
                failed.append(f"! {kind.title} was left out: {error}")
    print()
    if not with_peer:
        failed.append("! gearmand is not installed (Debian: gearman-job-server): nothing to compare with")
    for line in failed:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
