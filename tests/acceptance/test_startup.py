"""How servers and workers start, and how they refuse to."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from django_gearman import Client
from django_gearman.exceptions import ConnectionFailed, ConnectionLost, ServerError
from django_gearman.models import JobRecord, ServerLease
from tests import harness
from tests.app.jobs import shout

from .conftest import SITE

pytestmark = pytest.mark.acceptance


def refused(*arguments: str, **env: str) -> str:
    """The one line that a command leaves on stderr when it does not start."""
    done = subprocess.run(
        [*harness.MANAGE, *arguments],
        cwd=harness.ROOT,
        env=harness.environment() | SITE | env,
        capture_output=True,
        text=True,
        timeout=harness.START_LIMIT,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    story = f"{done.stdout}\n{done.stderr}"
    assert done.returncode not in (0, -9, -11), story
    assert "Traceback" not in story
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    # The parser of options tells how the command is used before it tells what is wrong.
    if lines[0].startswith("usage:"):
        lines = lines[-1:]
    assert len(lines) == 1, story
    return lines[0]


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


class TestServerRefuses:
    def test_port_taken(self):
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = str(other.getsockname()[1])
            line = refused("gearman_server", "--listen", "127.0.0.1", "--port", port)
        assert f"127.0.0.1:{port}" in line
        assert (
            "in use. Is another server running there? --port, or the first of SERVERS, names another" in line
        )

    def test_database_that_is_not_migrated(self, tmp_path: Path):
        url = f"sqlite:///{tmp_path / 'empty.sqlite3'}"
        line = refused(
            "gearman_server", "--port", "0", DATABASE_URL=url, GEARMAN_TEST_DATABASE=str(tmp_path / "empty")
        )
        assert "manage.py migrate" in line

    def test_database_without_tables_that_is_told_to_be_migrated(self, tmp_path: Path):
        """As where a router refuses ``allow_migrate``, of which ``migrate`` says nothing."""
        file = str(tmp_path / "faked.sqlite3")
        there = {"DATABASE_URL": f"sqlite:///{file}", "GEARMAN_TEST_DATABASE": file}
        subprocess.run(
            [*harness.MANAGE, "migrate", "--fake", "django_gearman"],
            cwd=harness.ROOT,
            env=harness.environment() | SITE | there,
            capture_output=True,
            timeout=harness.START_LIMIT,
            check=True,
        )
        line = refused("gearman_server", "--port", "0", **there)
        assert "though its migrations were run: a router of DATABASE_ROUTERS keeps them out" in line

    def test_database_that_is_not_there(self, tmp_path: Path):
        url = f"postgres://nobody@127.0.0.1:{harness.free_port()}/nothing"
        line = refused("gearman_server", "--port", "0", DATABASE_URL=url, GEARMAN_TEST_DATABASE="nothing")
        assert "out of reach" in line
        line = refused(
            "gearman_server",
            "--port",
            "0",
            DATABASE_URL="sqlite:////nothing",
            GEARMAN_TEST_DATABASE=str(tmp_path / "no" / "folder" / "db"),
        )
        assert "out of reach" in line

    @pytest.mark.parametrize("address", ["0.0.0.0", "::"])
    def test_address_that_others_reach(self, address: str):
        if ":" in address and not has_ipv6():
            pytest.skip("this machine has no IPv6")
        assert "--insecure" in refused(
            "gearman_server", "--listen", address, "--port", "0", "--store", "memory"
        )

    def test_address_that_is_not_ours(self):
        line = refused("gearman_server", "--listen", "192.0.2.1", "--port", "4730", "--insecure")
        assert "192.0.2.1:4730" in line
        assert "assign requested address. It is none of this machine's addresses: listen on" in line

    @pytest.mark.parametrize("options", [[], ["--insecure"]])
    @pytest.mark.parametrize("host", ["", "x" * 70])
    def test_address_that_is_none(self, host: str, options: list[str]):
        line = refused("gearman_server", f"--listen={host}", "--port=4730", *options)
        assert f"listen on {host}:4730" in line

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("--port", "70000"),
            ("--port", "no-such-service"),
            ("--store", "paper"),
            ("--name", "two words"),
            ("--name", ""),
            ("--job-retries", "-1"),
            ("--job-retries", "many"),
        ],
    )
    def test_value(self, option: str, value: str):
        line = refused("gearman_server", f"{option}={value}")
        assert option in line
        assert repr(value) in line


class TestWorkerRefuses:
    def test_no_functions(self):
        line = refused("gearman_worker", GEARMAN_TEST_NO_JOBS="1")
        assert "jobs.py with a function under @job" in line
        assert "tasks.py with one under @task" in line

    def test_unknown_function(self):
        line = refused("gearman_worker", "shout", "shuot")
        assert "'shuot'" in line
        assert "tests.app.jobs.add" in line

    def test_unknown_queue(self):
        line = refused("gearman_worker", "--queues", "express")
        assert "'express'" in line
        assert "default" in line

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("--processes", "0"),
            ("--processes", "two"),
            ("--grace", "-1"),
            ("--grace", "nan"),
            ("--servers", "127.0.0.1:many"),
            ("--servers", ""),
        ],
    )
    def test_value(self, option: str, value: str):
        assert option in refused("gearman_worker", f"{option}={value}")


class TestGreeting:
    def test_one_line_each(self, database_server: harness.GearmanServerProcess):
        with harness.worker(database_server, processes=1, functions=["shout", "reverse"]) as worker:
            assert database_server.stdout.count("\n") == 1
            assert f"listens on {database_server.address}" in database_server.stdout
            assert "jobs are kept in the database 'default', 0 jobs replayed." in database_server.stdout
            assert worker.stdout == (
                f"gearman_worker: 1 process serves reverse, shout for {database_server.address}.\n"
            )
            worker.wait_connected()

    def test_address_that_others_reach_when_told_so(self):
        server = harness.GearmanServerProcess(store="memory", options=["--listen", "0.0.0.0", "--insecure"])
        with server:
            assert f"listens on 0.0.0.0:{server.port}" in server.stdout
            assert server.ask("status") == ""


@pytest.mark.django_db(transaction=True)
class TestTwoServersOfOneName:
    def test_the_first_stops_and_writes_no_more(self):
        first = harness.GearmanServerProcess(name="the-server")
        second = harness.GearmanServerProcess(name="the-server")
        with first:
            client = Client([first.address], timeout=20.0)
            kept = client.do_background("later", b"kept")
            with second:
                assert "1 jobs replayed" in second.stdout
                harness.wait_until(lambda: "later\t1" in second.ask("status"), what="the first one's job")
                try:
                    # It has lost the lease: what it cannot keep it must not acknowledge.
                    with pytest.raises((ServerError, ConnectionLost, ConnectionFailed)):
                        client.do_background("later", b"not kept")
                    assert first.wait() == 1
                    # Before, it has told what else there is, such as a database that does not sync.
                    lines = first.stderr.splitlines()
                    (line,) = [each for each in lines if each.startswith("CommandError: ")]
                    assert lines[-1] == line
                    assert "the job server 'the-server' was replaced" in line
                    assert "--name" in line
                    assert list(JobRecord.objects.values_list("handle", flat=True)) == [kept]
                    lease = ServerLease.objects.get()
                    assert (lease.epoch, lease.address) == (2, second.address)
                    # The second one works.
                    with Client([second.address]) as other:
                        other.do_background("later", b"kept too")
                    assert JobRecord.objects.count() == 2
                finally:
                    client.close()
                    first.forget()

    def test_the_first_notices_without_anything_to_write(self):
        first = harness.GearmanServerProcess(name="the-server")
        second = harness.GearmanServerProcess(name="the-server")
        with first, second:
            assert first.wait() == 1
            assert second.is_running
            first.forget()


class TestWorkerWithoutServer:
    def test_says_so_once_and_connects_when_it_comes(self, settings: Any):
        server = harness.GearmanServerProcess(store="memory")
        settings.GEARMAN = server.setting
        with harness.worker(server, processes=1) as worker:
            harness.wait_until(lambda: "Trying until one does" in worker.stderr, what="a word on it")
            # It tries some more times until the server is up.
            with server:
                worker.wait_connected()
                assert shout.run(b"hello") == b"HELLO"
                (problem,) = (line for line in worker.stderr.splitlines() if "INFO" not in line)
                assert server.address in problem


class TestWithoutOutput:
    """Nobody needs to hear them: they go on, and end well."""

    @pytest.mark.parametrize("how", ["closed", "not read"])
    def test_server_and_worker(self, how: str):
        port = harness.free_port()
        address = f"127.0.0.1:{port}"
        server = self.start(how, "gearman_server", "--store=memory", "--listen=127.0.0.1", f"--port={port}")
        worker = self.start(how, "gearman_worker", f"--servers={address}", "--processes=1", "shout")
        try:
            with Client([address]) as client:
                harness.wait_until(
                    lambda: self.answers(client, server, worker), harness.START_LIMIT, "the server"
                )
                assert client.do("shout", b"hello", timeout=harness.START_LIMIT) == b"HELLO"
            for process in (worker, server):
                process.terminate()
                assert process.wait(harness.START_LIMIT) == 0
        finally:
            for process in (worker, server):
                process.kill()
                process.wait()

    def start(self, how: str, *arguments: str) -> subprocess.Popen[bytes]:
        reading, writing = os.pipe()
        os.close(reading)
        # With the shell's own words the files are not there at all.
        closing = ">&- 2>&-" if how == "closed" else ""
        command = ["sh", "-c", f'exec "$@" {closing}', "sh", *harness.MANAGE, *arguments]
        try:
            return subprocess.Popen(
                command, cwd=harness.ROOT, env=harness.environment() | SITE, stdout=writing, stderr=writing
            )
        finally:
            os.close(writing)

    def answers(self, client: Client, *processes: subprocess.Popen[bytes]) -> bool:
        assert [process.poll() for process in processes] == [None, None]
        try:
            return client.echo(b"x") == b"x"
        except ConnectionFailed:
            return False
