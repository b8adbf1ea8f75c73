"""``manage.py gearman_submit``, against our server and gearmand."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.core.management import CommandError, call_command

from django_gearman.client.connection import Connection
from django_gearman.client.sync import Client
from django_gearman.encoding import describe_exception
from django_gearman.management.commands.gearman_submit import _moment
from django_gearman.protocol.packets import PacketType, encode_request
from django_gearman.worker.loop import AssignedJob
from tests import harness
from tests.client.fake_server import Peer, fake_server, play
from tests.interop.gearmand import Gearmand
from tests.test_tls import Files

from .conftest import LIMIT

pytestmark = pytest.mark.acceptance

P = PacketType

go_on = threading.Event()
"""What the function ``slow`` waits for."""


@pytest.fixture(scope="module")
def ours() -> Iterator[str]:
    with harness.server(store="memory") as process:
        yield process.address


@pytest.fixture(scope="module")
def gearmand() -> Iterator[str]:
    with Gearmand() as server:
        yield server.address


@pytest.fixture(params=["ours", pytest.param("gearmand", marks=pytest.mark.foreign)])
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server of each kind, with a worker."""
    address: str = request.getfixturevalue(request.param)
    with harness.worker_thread(FUNCTIONS, port_of(address), describe=describe_exception):
        yield address


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def reverse(job: AssignedJob) -> bytes:
    return job.workload[::-1]


def tell(job: AssignedJob) -> bytes:
    job.send_data(b"\xff\0part ")
    job.send_warning(b"care\x1b[31mful\xff")
    job.send_status(1, 3)
    return b"end"


def fail(job: AssignedJob) -> bytes:
    raise ValueError(job.workload.decode())


def slow(job: AssignedJob) -> bytes:
    job.send_data(b"at once")
    job.send_status(1, 2)
    assert go_on.wait(LIMIT)
    job.send_data(b", later")
    return b", at the end"


FUNCTIONS = {"reverse": reverse, "tell": tell, "fail": fail, "slow": slow}


def command(server: str, *arguments: str) -> dict[str, Any]:
    return {
        "args": [*harness.MANAGE, "gearman_submit", *arguments],
        "cwd": harness.ROOT,
        "env": harness.environment() | {"GEARMAN_TEST_SERVER": server},
    }


def submit(
    server: str, *arguments: str, stdin: bytes = b"", code: int = 0
) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        **command(server, *arguments), input=stdin, capture_output=True, timeout=LIMIT, check=False
    )
    assert done.returncode == code, done
    assert b"Traceback" not in done.stderr
    return done


def status(server: str) -> dict[str, tuple[int, ...]]:
    """{function: (waiting and running jobs, running jobs, workers)}."""
    rows = [line.split("\t") for line in harness.ask(port_of(server), "status").splitlines()]
    return {name: tuple(map(int, numbers)) for name, *numbers in rows}


class TestWorkload:
    def test_from_everywhere(self, server: str, tmp_path: Path):
        file = tmp_path / "workload"
        file.write_bytes(bytes(range(256)))
        assert submit(server, "reverse", "hello").stdout == b"olleh"
        assert submit(server, "reverse", stdin=b"\0\xffinput").stdout == b"tupni\xff\0"
        assert submit(server, "reverse", "--file", str(file)).stdout == bytes(range(255, -1, -1))
        assert submit(server, "reverse", "--file", "-", stdin=b"ab").stdout == b"ba"
        assert submit(server, "reverse", stdin=bytes(3_000_000)).stdout == bytes(3_000_000)
        assert submit(server, "reverse", "").stdout == b""

    def test_arguments_as_json(self, server: str):
        sent = submit(server, "reverse", "--args", '[1, "zwö"]', "--kwargs", '{"size": 3}').stdout[::-1]
        assert json.loads(sent) == {"args": [1, "zwö"], "kwargs": {"size": 3}}
        assert json.loads(submit(server, "reverse", "--kwargs", "{}").stdout[::-1]) == {
            "args": [],
            "kwargs": {},
        }

    def test_behind_options(self, server: str):
        assert submit(server, "--priority", "high", "reverse", "--timeout", "20", "ab").stdout == b"ba"

    def test_bytes_of_the_command_line(self, ours: str):
        with harness.worker_thread(FUNCTIONS, port_of(ours)):
            done = subprocess.run(
                [*map(os.fsencode, command(ours)["args"]), b"reverse", b"a\xff"],
                cwd=harness.ROOT,
                env=command(ours)["env"],
                capture_output=True,
                timeout=LIMIT,
                check=True,
            )
        assert done.stdout == b"\xffa"


class TestForeground:
    def test_parts_warnings_and_progress(self, server: str):
        done = submit(server, "tell")
        assert done.stdout == b"\xff\0part end"
        # What comes from elsewhere does not steer the terminal.
        assert done.stderr.decode().splitlines() == ["care\\x1b[31mful\\xff", "33% (1/3)"]

    def test_output_comes_at_once(self, server: str, tmp_path: Path):
        out, err = tmp_path / "out", tmp_path / "err"
        go_on.clear()
        started = command(server, "slow", "x")
        # It would do so without us.
        started["env"].pop("PYTHONUNBUFFERED", None)
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(**started, stdout=stdout, stderr=stderr)
        try:
            harness.wait_until(lambda: out.read_bytes() == b"at once", LIMIT)
            harness.wait_until(lambda: err.read_text() == "50% (1/2)\n", LIMIT)
            assert process.poll() is None
        finally:
            go_on.set()
            process.wait(LIMIT)
        assert out.read_bytes() == b"at once, later, at the end"
        assert process.returncode == 0

    def test_failure(self, server: str):
        done = submit(server, "fail", "no luck", code=1)
        assert done.stdout == b""
        assert done.stderr == b"CommandError: Job fail failed with ValueError: no luck.\n"

    def test_failure_with_its_traceback(self, ours: str):
        with harness.worker_thread(FUNCTIONS, port_of(ours), describe=describe_exception):
            done = subprocess.run(
                **command(ours, "fail", "no luck", "--verbosity", "2"), capture_output=True, timeout=LIMIT
            )
        assert done.returncode == 1
        assert b"in fail\n    raise ValueError(job.workload.decode())\n" in done.stderr

    def test_many(self, server: str):
        assert submit(server, "reverse", "ab ", "--count", "3").stdout == b" ba ba ba"
        done = submit(server, "fail", "no luck", "--count", "2", code=1)
        line = "Job fail failed with ValueError: no luck."
        assert done.stderr.decode().splitlines() == [line, line, "CommandError: 2 of 2 jobs failed."]

    def test_time_limit(self, server: str):
        done = submit(server, "nobody serves this", "x", "--timeout", "0.1", code=3)
        assert b"took longer than" in done.stderr
        # The job is abandoned: a worker would not get it.
        with harness.worker_thread({"nobody serves this": reverse}, port_of(server)):
            harness.wait_until(lambda: status(server)["nobody serves this"] == (0, 0, 1))

    def test_result_of_a_job_of_ours(self, ours: str):
        with harness.worker(ours, processes=1, functions=["tests.app.jobs.add", "tests.app.jobs.fail"]):
            assert (
                submit(ours, "tests.app.jobs.add", "--args", "[2]", "--kwargs", '{"right": 3}').stdout == b"5"
            )
            done = submit(ours, "tests.app.jobs.fail", "--args", '["no luck"]', code=1)
        assert b"failed with ValueError: no luck." in done.stderr

    def test_whoever_reads_leaves(self, ours: str):
        go_on.clear()
        with harness.worker_thread(FUNCTIONS, port_of(ours)):
            process = subprocess.Popen(
                **command(ours, "slow", "x"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            assert process.stdout is not None
            assert process.stderr is not None
            try:
                assert process.stdout.read(7) == b"at once"
                process.stdout.close()
            finally:
                go_on.set()
                process.wait(LIMIT)
            with process.stderr:
                assert process.stderr.read() == b"50% (1/2)\n"
        assert process.returncode == 141

    def test_interrupted(self, ours: str):
        process = subprocess.Popen(
            **command(ours, "nobody at all", "x"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            harness.wait_until(lambda: status(ours).get("nobody at all") == (1, 0, 0), LIMIT)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
            process.wait()
        assert (process.returncode, out, err) == (130, b"", b"Interrupted.\n")
        harness.wait_until(lambda: status(ours)["nobody at all"] == (0, 0, 0))


class TestBackground:
    def test_handles(self, server: str):
        lines = submit(server, "held", "x", "--background", "--count", "2").stdout.decode().splitlines()
        assert len(set(lines)) == 2
        with Client([server], timeout=LIMIT) as client:
            assert all(client.job_status(handle).known for handle in lines)

    def test_unique(self, server: str):
        options = ["held", "x", "--background", "--unique", "one of many"]
        first, second = (submit(server, *options).stdout for _ in range(2))
        assert first == second
        with Client([server], timeout=LIMIT) as client:
            assert client.job_status_unique("one of many").known

    def test_priorities(self, server: str):
        for priority in ("low", "normal", "high"):
            submit(server, "ordered", priority, "-b", "--priority", priority)
        rows = harness.ask(port_of(server), "prioritystatus").splitlines()
        assert "ordered\t1\t1\t1\t0" in rows

    def test_foreground_priority(self, ours: str):
        seen: list[PacketType] = []

        def script(peer: Peer) -> None:
            peer.expect(P.OPTION_REQ)
            peer.send(P.OPTION_RES, b"exceptions")
            seen.append(peer.receive()[0])
            peer.send(P.JOB_CREATED, b"H:1")
            peer.send(P.WORK_COMPLETE, b"H:1", b"done")
            peer.wait_for_end()

        for priority in ("low", "normal", "high"):
            with fake_server(script) as port:
                call(f"127.0.0.1:{port}", "f", "x", "--priority", priority)
        assert seen == [P.SUBMIT_JOB_LOW, P.SUBMIT_JOB, P.SUBMIT_JOB_HIGH]

    def test_later(self, server: str):
        """PROTOCOL 5.6: gearmand takes such jobs too, though it wakes nobody for them."""
        submitted = time.time()
        submit(server, "due", "x", "--run-after", "2s")
        with closing(Connection("127.0.0.1", port_of(server))) as worker:
            worker.send(encode_request(P.CAN_DO, b"due"))

            def grabbed() -> bool:
                worker.send(encode_request(P.GRAB_JOB))
                return worker.receive(time.monotonic() + LIMIT)[0] == P.JOB_ASSIGN

            harness.wait_until(grabbed, LIMIT)
        assert time.time() >= submitted + 2

    def test_far_later(self, server: str):
        submit(server, "far", "x", "--run-after", "2999-01-01T08:00")
        assert status(server)["far"] == (1, 0, 0)


class TestServers:
    def test_the_first_that_answers(self, ours: str):
        down = f"127.0.0.1:{harness.free_port()}"
        with harness.worker_thread(FUNCTIONS, port_of(ours)):
            assert submit(down, "reverse", "ab", "--servers", f"{down},{ours}").stdout == b"ba"

    def test_nobody_answers(self):
        address = f"127.0.0.1:{harness.free_port()}"
        done = submit(address, "reverse", "ab", code=3)
        assert done.stderr.startswith(b"CommandError: No job server answers at " + address.encode())
        assert done.stderr.count(b"\n") == 1

    def test_a_server_that_breaks_off(self):
        with fake_server(play(P.SUBMIT_JOB)) as port:
            assert refusal(f"127.0.0.1:{port}", "f", "x", code=3).startswith(
                "The connection to the job server"
            )

    def test_a_server_that_cannot(self):
        """PROTOCOL 12: Perl's server knows no jobs for later."""

        def refuse(peer: Peer) -> None:
            peer.expect(P.SUBMIT_JOB_EPOCH)
            peer.send(P.ERROR, b"server_error", b"unknown")

        def tell_version(peer: Peer) -> None:
            assert peer.receive_line() == b"version"
            peer.socket.sendall(b"v1.130.1\n")
            peer.wait_for_end()

        with fake_server(refuse, tell_version) as port:
            sentence = refusal(f"127.0.0.1:{port}", "f", "x", "--run-after", "1", code=3)
        assert "of version v1.130.1, does not know the command 'SUBMIT_JOB_EPOCH'" in sentence

    def test_tls(self, tmp_path: Path):
        env = {"GEARMAN_TEST_TLS": str(Files(tmp_path).folder)}
        with harness.server(store="memory", env=env) as process:
            options = command(process.address, "held", "x", "--background")
            options["env"] |= env
            done = subprocess.run(**options, capture_output=True, timeout=LIMIT, check=True)
            assert done.stdout.startswith(b"H:")
            # Without the settings it is plain text, which the server does not take.
            assert b"broke" in submit(process.address, "held", "x", "--background", code=3).stderr


def call(server: str, *arguments: str, stdin: bytes = b"") -> str:
    """The command in this process; what it wrote to standard output."""
    out = io.StringIO()
    call_command("gearman_submit", *arguments, "--servers", server, stdout=out, stderr=io.StringIO())
    return out.getvalue()


def refusal(server: str, *arguments: str, code: int = 2) -> str:
    with pytest.raises(CommandError) as caught:
        call(server, *arguments)
    assert caught.value.returncode == code
    return str(caught.value)


class TestCall:
    """From Python, where standard output gathers text."""

    def test_result(self, ours: str):
        with harness.worker_thread(FUNCTIONS, port_of(ours)):
            assert call(ours, "tell", "") == "\\xff\0part end"


NOWHERE = "127.0.0.1:9"


class TestRefusals:
    """One sentence that names the value, before anything is sent."""

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (
                ["f", "x", "--args", "[1]"],
                "The workload comes from WORKLOAD and --args or --kwargs: choose one.",
            ),
            (["f", "x", "--file", "-"], "The workload comes from WORKLOAD and --file: choose one."),
            (["f", "--file", "/nothing"], "Cannot read /nothing: No such file or directory."),
            (["f", "--file", "/"], "Cannot read /: Is a directory."),
            (
                ["f", "x", "--run-after", "1", "--priority", "low"],
                "Jobs for later have normal priority: leave out --priority or --run-after.",
            ),
            (["a\0b", "x"], r"Function 'a\x00b' has a NUL, which ends an argument on the wire."),
            (
                ["f", "x", "--unique", "a\0b"],
                r"Unique 'a\x00b' has a NUL, which ends an argument on the wire.",
            ),
        ],
    )
    def test_of_ours(self, arguments: list[str], sentence: str):
        assert refusal(NOWHERE, *arguments) == sentence

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["f", "--args", "1"], "'1' is not a list in JSON"),
            (["f", "--args", "[NaN]"], "NaN is no JSON; use null or a string"),
            (["f", "--args", "[1"], "'[1' is not JSON: "),
            (["f", "--kwargs", "[]"], "'[]' is not an object in JSON"),
            (["f", "--run-after", "soon"], "'soon' is not a time: use a moment such as"),
            (["f", "--run-after", ""], "'' is not a time"),
            (["f", "--run-after", "nan"], "'nan' is not a time"),
            (["f", "--run-after", "1e30"], "'1e30' is not a time"),
            (["f", "--run-after", "999999999d"], "'999999999d' is not a time"),
            (["f", "--count", "0"], "'0' is not a number of jobs from 1"),
            (["f", "--count", "many"], "'many' is not a number of jobs from 1"),
            (["f", "--timeout", "0"], "'0' is not a number of seconds above 0"),
            (["f", "--timeout", "inf"], "'inf' is not a number of seconds above 0"),
            (["f", "--priority", "urgent"], "'urgent'"),
            (["f", "--servers", "host:port"], "'host:port' is not an address"),
        ],
    )
    def test_of_options(self, arguments: list[str], sentence: str):
        assert sentence in refusal(NOWHERE, *arguments, code=1)

    def test_a_file_without_end(self, settings: Any):
        settings.GEARMAN = {"default": {"MAX_PACKET": 1000}}
        assert "has 1001 bytes, more than max_packet=1000" in refusal(NOWHERE, "f", "--file", "/dev/zero")

    def test_settings(self, settings: Any):
        settings.GEARMAN = {"default": {"SERVER": []}}
        assert "did you mean 'SERVERS'?" in refusal(NOWHERE, "f", "x")
        settings.GEARMAN = {"default": {"TLS_CA": "/nothing.pem"}}
        assert "TLS does not work" in refusal(NOWHERE, "f", "x")

    def test_exit_status(self):
        done = submit(NOWHERE, "f", "--file", "/nothing", code=2)
        assert done.stderr == b"CommandError: Cannot read /nothing: No such file or directory.\n"
        assert submit(NOWHERE, code=2).stderr.endswith(b"required: FUNCTION\n")


class TestRunAfter:
    """What ``--run-after`` takes."""

    @pytest.mark.parametrize(
        ("text", "seconds"),
        [
            ("0", 0),
            ("90", 90),
            ("1.5", 1.5),
            ("10s", 10),
            ("10m", 600),
            ("2h", 7200),
            ("1d", 86400),
            ("1d12h", 129600),
            ("1h30m5s", 5405),
        ],
    )
    def test_from_now(self, text: str, seconds: float):
        before = time.time()
        moment = _moment(text)
        assert before + seconds <= moment <= time.time() + seconds

    def test_moments(self, settings: Any):
        assert _moment("2027-01-31T08:00:00Z") == 1801382400
        assert _moment("2027-01-31T08:00+02:00") == 1801382400 - 7200
        assert _moment("2027-01-31 08:00:00.5+00:00") == 1801382400.5
        assert _moment("1970-01-01T00:00Z") == 0

    def test_moments_without_a_zone_are_the_projects(self, settings: Any):
        settings.TIME_ZONE = "Asia/Tokyo"
        moment = datetime(2027, 1, 31, 8, tzinfo=ZoneInfo("Asia/Tokyo"))
        assert _moment("2027-01-31T08:00") == moment.timestamp()
        assert _moment("2027-01-31") == (moment - timedelta(hours=8)).timestamp()
