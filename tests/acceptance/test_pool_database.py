"""PostgreSQL restarted in the middle of a run: a cluster of the test's own, so that no other test sees it."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from django.db import connection

from django_gearman.client.sync import Client
from tests import harness

from .conftest import SITE, Trace, program
from .site.jobs import ask_database, leave_trace

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.port = harness.free_port()
        self._bin = Path(program("pg_ctl")).resolve().parent
        self._data = folder / "data"
        # It does not run as root.
        self._as = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self._as:
            subprocess.run(["chown", "postgres", str(folder)], check=True)
        self._run("initdb", "-A", "trust", "-U", "postgres")
        self.start()

    def _run(self, name: str, *arguments: str) -> None:
        command = [*self._as, str(self._bin / name), "-D", str(self._data), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60, cwd="/")

    def start(self) -> None:
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories="
        self._run("pg_ctl", "-w", "-l", f"{self._data}/log", "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-w", "-m", "immediate", "stop")

    def rows(self, statement: str) -> list[tuple[object, ...]]:
        with psycopg.connect(f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres") as made:
            return made.execute(statement).fetchall()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    if connection.vendor != "postgresql":
        pytest.skip("DATABASE_URL names no PostgreSQL")
    with tempfile.TemporaryDirectory(prefix="gearman-pg-", ignore_cleanup_errors=True) as folder:
        made = Cluster(Path(folder))
        yield made
        made.stop()


def test_restart_costs_at_most_the_jobs_that_were_using_it(cluster: Cluster, trace: Trace):
    env = SITE | {
        "DATABASE_URL": f"postgres://postgres@127.0.0.1:{cluster.port}/postgres",
        "GEARMAN_TEST_DATABASE": "postgres",
        "GEARMAN_TEST_CONN_MAX_AGE": "600",
    }
    command = [*harness.MANAGE, "migrate", "--verbosity", "0"]
    subprocess.run(command, check=True, cwd=harness.ROOT, env=harness.environment() | env, timeout=60)
    names = [f"job{number}" for number in range(120)]
    ended = "SELECT count(*) FROM django_gearman_jobrecord WHERE status NOT IN ('READY', 'RUNNING')"
    with (
        harness.server(env=env) as server,
        harness.worker(server, processes=3, options=["--max-jobs", "1000"], env=env) as worker,
    ):
        server.complaints_allowed = worker.complaints_allowed = True
        worker.wait_connected()
        children = worker.children()
        with Client([server.address], timeout=30) as client:
            for name in names:
                client.do_background(leave_trace.name, trace.workload(name))
                client.do_background(ask_database.name, b'{"args": [], "kwargs": {}}')
        harness.wait_until(lambda: len(trace.names()) >= 20)
        cluster.stop()
        cluster.start()
        harness.wait_until(lambda: len(set(trace.names())) == len(names), 60.0, "all jobs")
        harness.wait_until(lambda: cluster.rows(ended) == [(2 * len(names),)], 60.0, "all records")
        # Of those that asked the database, so many failed as can have been at it.
        failed = cluster.rows(
            "SELECT function, count(*) FROM django_gearman_jobrecord WHERE status <> 'SUCCESSFUL' GROUP BY 1"
        )
        assert dict(failed).get(leave_trace.name) is None
        assert int(str(dict(failed).get(ask_database.name, 0))) <= 120 // 2
        # And those that come after it find it again.
        with Client([server.address], timeout=30) as client:
            assert client.do(ask_database.name, b'{"args": [], "kwargs": {}}', timeout=20)
        assert worker.children() == children
