"""``manage.py gearman_status``, of our server and gearmand."""

from __future__ import annotations

import io
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command

import django_gearman
from django_gearman.client.sync import Client
from django_gearman.worker.loop import AssignedJob
from tests import harness
from tests.client.fake_server import Peer, fake_server
from tests.interop.gearmand import Gearmand
from tests.test_tls import Files

from .conftest import LIMIT

pytestmark = pytest.mark.acceptance


@pytest.fixture
def ours() -> Iterator[str]:
    with harness.server(store="memory", options=["--allow-shutdown"]) as process:
        yield process.address


@pytest.fixture
def gearmand() -> Iterator[str]:
    with Gearmand() as server:
        yield server.address


@pytest.fixture(params=["ours", pytest.param("gearmand", marks=pytest.mark.foreign)])
def server(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(request.param)
    return found


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def status(*arguments: str) -> str:
    """The command in this process; what it wrote to standard output."""
    out = io.StringIO()
    call_command("gearman_status", *arguments, stdout=out, stderr=io.StringIO())
    return out.getvalue()


def refusal(*arguments: str, code: int = 1) -> str:
    with pytest.raises(CommandError) as caught:
        status(*arguments)
    assert caught.value.returncode == code
    return str(caught.value)


def seen(*arguments: str) -> list[dict[str, Any]]:
    """The servers, as ``--format json`` tells of them."""
    found: list[dict[str, Any]] = json.loads(status(*arguments, "--format", "json"))["servers"]
    return found


def tables(text: str) -> list[list[list[str]]]:
    """The words of each line of each table."""
    return [[line.split() for line in table.splitlines()] for table in text.split("\n\n")]


@pytest.fixture
def busy(server: str) -> Iterator[str]:
    """A server with jobs that wait and one that runs."""
    go_on = threading.Event()

    def hold(job: AssignedJob) -> bytes:
        assert go_on.wait(LIMIT)
        return b""

    functions = {"hold": hold, "idle": hold}
    with (
        Client([server], timeout=LIMIT) as client,
        harness.worker_thread(functions, port_of(server), client_id="a-worker"),
    ):
        try:
            running = client.do_background("hold")
            harness.wait_until(lambda: client.job_status(running).running)
            client.do_high_background("hold", unique="one of many")
            client.do_low_background("hold")
            client.do_background("nobody serves this")
            yield server
        finally:
            go_on.set()
            harness.wait_until(lambda: "hold\t0" in harness.ask(port_of(server), "status"))


class TestJSON:
    def test_everything(self, busy: str):
        (found,) = seen("--servers", busy, "functions", "workers", "jobs", "uniques")
        assert (found["server"], found["up"]) == (busy, True)
        assert found["version"]
        assert found["pid"] == int(harness.ask(port_of(busy), "getpid").split()[1])
        functions = {function["name"]: function for function in found["functions"]}
        assert functions["hold"] == {
            "name": "hold",
            "total": 3,
            "running": 1,
            "workers": 1,
            "high": 1,
            "normal": 0,
            "low": 1,
        }
        assert functions["nobody serves this"]["normal"] == 1
        assert functions["idle"]["total"] == 0
        (worker,) = (worker for worker in found["workers"] if worker["functions"])
        assert (worker["client_id"], worker["address"]) == ("a-worker", "127.0.0.1")
        assert sorted(worker["functions"]) == ["hold", "idle"]
        # This connection and the client's.
        assert sum(not worker["functions"] for worker in found["workers"]) == 2
        assert len(found["jobs"]) == 4
        assert {job["stored"] for job in found["jobs"]} == {True}
        assert sorted(found["uniques"]) == ["", "", "", "one of many"]
        assert "unsupported" not in found

    def test_what_is_chosen(self, busy: str):
        (found,) = seen("--servers", busy, "uniques", "jobs")
        assert sorted(found) == ["jobs", "pid", "server", "uniques", "up", "version"]
        (found,) = seen("--servers", busy)
        assert {"functions", "workers", "jobs"} < set(found)
        assert "uniques" not in found


class TestTables:
    def test_everything(self, busy: str):
        servers, functions, workers, jobs, uniques = tables(
            status("functions", "workers", "jobs", "uniques", "--servers", busy)
        )
        version, pid = servers[1][1:3]
        assert servers == [
            ["SERVER", "VERSION", "PID", "FUNCTIONS", "JOBS", "RUNNING", "WORKERS", "CONNECTIONS"],
            [busy, version, pid, "3", "4", "1", "1", "3"],
        ]
        assert functions[0] == ["FUNCTION", "JOBS", "RUNNING", "HIGH", "NORMAL", "LOW", "WORKERS"]
        assert ["hold", "3", "1", "1", "0", "1", "1"] in functions
        assert len(functions) == 4
        assert workers[0] == ["FD", "ADDRESS", "CLIENT", "ID", "FUNCTIONS"]
        assert [worker[1:3] for worker in workers[1:]] == [["127.0.0.1", "a-worker"]]
        assert jobs[0] == ["JOB", "KIND", "RETRIES"]
        assert len(jobs) == 5
        assert {tuple(job[1:]) for job in jobs[1:]} == {("background", "0")}
        assert uniques == [["UNIQUE"], ["one", "of", "many"]]

    def test_columns_stand_below_each_other(self, busy: str):
        lines = status("functions", "--servers", busy).split("\n\n")[1].splitlines()
        assert lines[0].startswith("FUNCTION            JOBS")
        assert "nobody serves this     1        0     0       1    0        0" in lines

    def test_rows_are_limited(self, busy: str):
        jobs = status("jobs", "--servers", busy, "--limit", "1").split("\n\n")[1].splitlines()
        assert len(jobs) == 3
        assert jobs[2] == "... and 3 more; --limit 0 shows all."
        assert "more" not in status("jobs", "--servers", busy, "--limit", "0")

    def test_nothing(self, ours: str):
        assert status("--servers", ours).split("\n\n")[1:] == [
            "No functions.\n".rstrip(),
            "No workers.",
            "No jobs.\n",
        ]

    def test_names_forge_no_rows(self, gearmand: str):
        """gearmand takes any name; what it lists must not steer the terminal."""
        with Client([gearmand], timeout=LIMIT) as client:
            client.do_background("a\tb \x1b[31mred")
        functions = tables(status("functions", "--servers", gearmand))[1]
        assert functions[1:] == [["a\\tb", "\\x1b[31mred", "1", "0", "0", "1", "0", "0"]]


class TestSeveralServers:
    @pytest.mark.foreign
    def test_side_by_side(self, ours: str, gearmand: str, settings: Any):
        settings.GEARMAN = {"default": {"SERVERS": [ours, gearmand]}}
        for address in (ours, gearmand):
            with Client([address], timeout=LIMIT) as client:
                client.do_background("held")
        servers, functions, jobs = tables(status("functions", "jobs"))
        assert [row[0] for row in servers] == ["SERVER", ours, gearmand]
        assert servers[1][1] == django_gearman.__version__
        assert functions[0][:2] == ["SERVER", "FUNCTION"]
        assert [row[:3] for row in functions[1:]] == [[ours, "held", "1"], [gearmand, "held", "1"]]
        assert [row[0] for row in jobs] == ["SERVER", ours, gearmand]
        assert [found["server"] for found in seen()] == [ours, gearmand]

    def test_one_is_down(self, ours: str, tmp_path: Path):
        down = f"127.0.0.1:{harness.free_port()}"
        done = subprocess.run(
            [*harness.MANAGE, "gearman_status", "--servers", f"{down},{ours}"],
            cwd=harness.ROOT,
            env=harness.environment(),
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        assert done.returncode == 1
        lines = done.stdout.splitlines()
        assert lines[1].split() == [down, "down", *["-"] * 6]
        assert lines[2].split()[:2] == [ours, django_gearman.__version__]
        assert lines[3].startswith(f"No job server answers at {down} ")
        assert done.stderr == f"CommandError: 1 of 2 job servers cannot be asked: {down}.\n"

    def test_one_is_down_in_json(self, ours: str):
        down = f"127.0.0.1:{harness.free_port()}"
        out = io.StringIO()
        with pytest.raises(CommandError, match=down):
            call_command("gearman_status", "--servers", f"{down},{ours}", "--format", "json", stdout=out)
        first, second = json.loads(out.getvalue())["servers"]
        assert (first["server"], first["up"], second["up"]) == (down, False, True)
        assert first["error"].startswith(f"No job server answers at {down} ")

    def test_the_only_one_is_down(self):
        down = f"127.0.0.1:{harness.free_port()}"
        assert refusal("--servers", down).startswith(f"No job server answers at {down} ")

    def test_one_speaks_nonsense(self, settings: Any):
        settings.GEARMAN = {"default": {"TIMEOUT": 0.5}}

        def script(peer: Peer) -> None:
            peer.receive_line()
            peer.socket.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        with fake_server(script) as port:
            assert f"127.0.0.1:{port}" in refusal("--servers", f"127.0.0.1:{port}")


class TestOtherServers:
    def test_what_it_cannot_tell(self):
        """PROTOCOL 12: Perl's server has ``status``, ``workers`` and ``version`` of all this."""

        def script(peer: Peer) -> None:
            answers = {
                b"version": b"v1.130.1\n",
                b"status": b"f\t2\t1\t1\n.\n",
                b"workers": b"7 127.0.0.1 - : f\n.\n",
            }
            while True:
                peer.socket.sendall(answers.get(peer.receive_line(), b"ERR unknown_command \r\n"))

        with fake_server(script) as port:
            address = f"127.0.0.1:{port}"
            out, err = io.StringIO(), io.StringIO()
            call_command("gearman_status", "--servers", address, stdout=out, stderr=err)
        servers, functions, workers = tables(out.getvalue())
        assert servers[1] == [address, "v1.130.1", "-", "1", "2", "1", "1", "1"]
        assert functions[1] == ["f", "2", "1", "-", "-", "-", "1"]
        assert workers[1] == ["7", "127.0.0.1", "-", "f"]
        assert [line.split("'")[1] for line in err.getvalue().splitlines()] == [
            "getpid",
            "prioritystatus",
            "show jobs",
        ]
        assert err.getvalue().count("of version v1.130.1") == 3

    @pytest.mark.foreign
    def test_shutdown(self, gearmand: str):
        sentence = refusal("--servers", gearmand, "--shutdown")
        assert f"at {gearmand}, of version 1.1." in sentence
        assert "'shutdown'" in sentence
        assert harness.ask(port_of(gearmand), "version").startswith("OK 1.1.")


class TestActions:
    def test_functions(self, server: str):
        assert status("--servers", server, "--create-function", "made") == (
            f"{server}: function made is listed.\n"
        )
        assert [function["name"] for function in seen("--servers", server)[0]["functions"]] == ["made"]
        assert status("--servers", server, "--drop-function", "made").endswith(
            ": function made is dropped.\n"
        )
        assert seen("--servers", server)[0]["functions"] == []
        assert "function not found" in refusal("--servers", server, "--drop-function", "made")

    def test_queue_limit(self, server: str):
        status("--servers", server, "--create-function", "limited")
        status("--servers", server, "--set-queue-limit", "limited", "2,1,1")
        with Client([server], timeout=LIMIT) as client:
            client.do_background("limited")
            with pytest.raises(django_gearman.exceptions.ServerError, match="QUEUE_ERROR"):
                client.do_background("limited")
            client.do_high_background("limited")
            status("--servers", server, "--set-queue-limit", "limited", "3")
            client.do_background("limited")
            with pytest.raises(django_gearman.exceptions.ServerError, match="QUEUE_ERROR"):
                client.do_high_background("limited")
            status("--servers", server, "--set-queue-limit", "limited", "0")
            client.do_background("limited")
        # Servers say OK to this, and nothing happens.
        assert refusal("--servers", server, "--set-queue-limit", "nobody", "1") == (
            "There is no function 'nobody' to limit; list it first, with --create-function nobody."
        )

    def test_cancel(self, server: str):
        with Client([server], timeout=LIMIT) as client:
            handle = client.do_background("held")
            assert (
                status("--servers", server, "--cancel", handle) == f"{server}: job {handle} is cancelled.\n"
            )
        with harness.worker_thread({"held": lambda job: b""}, port_of(server)):
            harness.wait_until(lambda: seen("--servers", server)[0]["jobs"] == [])
        assert refusal("--servers", server, "--cancel", handle) == (
            f"The job server at {server} has no such job: it ended, or never was there."
        )

    @pytest.mark.parametrize("how", [[], ["graceful"], ["immediate"]])
    def test_shutdown(self, how: list[str]):
        with harness.server(store="memory", options=["--allow-shutdown"]) as process:
            assert status("--servers", process.address, "--shutdown", *how).endswith(": it shuts down.\n")
            assert process.wait() == 0
            process.forget()

    def test_shutdown_that_is_not_allowed(self, memory_server: harness.GearmanServerProcess):
        sentence = refusal("--servers", memory_server.address, "--shutdown")
        assert f"of version {django_gearman.__version__}" in sentence
        assert "was not started to allow it" in sentence

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--servers", "a,b", "--shutdown"], "This is for one server, and there are 2: name it"),
            (["jobs", "--cancel", "H:1"], "Show jobs, or tell the server what to do; not both at once."),
            (["--cancel", "a b"], "'a b' cannot be said in a line of words"),
            (["--create-function", ""], "'' cannot be said in a line of words"),
            (["--set-queue-limit", "f", "many"], "'many' is not a limit: use a number of jobs, or HIGH,"),
            (["--set-queue-limit", "f", "1,2"], "'1,2' is not a limit"),
            (["--set-queue-limit", "f", "-1"], "'-1' is not a limit"),
        ],
    )
    def test_refusals(self, ours: str, arguments: list[str], sentence: str):
        if "--servers" not in arguments:
            arguments = [*arguments, "--servers", ours]
        assert sentence in refusal(*arguments, code=2)

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["everything"], "'everything' is no section: choose from functions, workers, jobs, uniques"),
            (["--limit", "-1"], "'-1' is not a number of rows"),
            (["--servers", "host:port"], "'host:port' is not an address"),
            (["--shutdown", "now"], "'now'"),
            (["--shutdown", "--cancel", "H:1"], "not allowed with"),
        ],
    )
    def test_refusals_of_the_parser(self, arguments: list[str], sentence: str):
        assert sentence in refusal(*arguments)

    def test_settings(self, settings: Any):
        settings.GEARMAN = {"default": {"SERVER": []}}
        assert "did you mean 'SERVERS'?" in refusal(code=2)
        settings.GEARMAN = {"default": {"TLS_CA": "/nothing.pem"}}
        assert "TLS does not work" in refusal(code=2)


def test_tls(tmp_path: Path, settings: Any):
    files = Files(tmp_path)
    with harness.server(store="memory", env={"GEARMAN_TEST_TLS": str(files.folder)}) as process:
        settings.GEARMAN = {
            "default": {"SERVERS": [process.address], "CONNECT_TIMEOUT": LIMIT, **files.settings}
        }
        assert seen()[0]["version"] == django_gearman.__version__
        settings.GEARMAN = {"default": {"SERVERS": [process.address]}}
        assert process.address in refusal()
