"""``AdminClient`` with our job server, with gearmand, and with servers that say anything."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

import django_gearman
from django_gearman import AdminClient, Client
from django_gearman.client import admin_client
from django_gearman.client.admin_client import (
    FunctionCounters,
    FunctionStatus,
    HeldJob,
    PriorityStatus,
    RunningJob,
    WorkerStatus,
)
from django_gearman.exceptions import (
    CommandNotSupported,
    ConnectionFailed,
    ConnectionLost,
    JobFailed,
    ResponseTimeout,
    ServerError,
)
from tests import harness
from tests.acceptance.conftest import program

from .fake_server import Peer, Script, fake_server


@pytest.fixture(scope="module")
def ours() -> Iterator[str]:
    with harness.server(store="memory") as process:
        yield process.address


@pytest.fixture(scope="module")
def gearmand() -> Iterator[str]:
    path = program("gearmand")
    port = harness.free_port()
    process = subprocess.Popen(
        [path, "-L", "127.0.0.1", "-p", str(port), "-l", "none"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answers() -> bool:
        try:
            return harness.ask(port, "version").startswith("OK")
        except OSError:
            return False

    try:
        harness.wait_until(answers, what="gearmand")
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=["ours", "gearmand"])
def address(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def admin(address: str) -> Iterator[AdminClient]:
    with AdminClient(address, timeout=10.0) as made:
        yield made


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client([address], timeout=10.0) as made:
        yield made


class TestEveryServer:
    """Ours and gearmand: the same questions, the same answers."""

    def test_functions_and_their_jobs(self, admin: AdminClient, client: Client):
        client.do_high_background("counted", b"")
        client.do_background("counted", b"", unique="a unique")
        low = client.do_low_background("counted", b"")
        assert FunctionStatus("counted", 3, 0, 0) in admin.status()
        assert PriorityStatus("counted", 1, 1, 1, 0) in admin.priority_status()
        assert HeldJob(low, 0, ignored=False, stored=True) in admin.jobs()
        assert "a unique" in admin.uniques()
        assert len(admin.uniques()) == len(admin.jobs())

    def test_workers(self, admin: AdminClient, address: str):
        port = int(address.rpartition(":")[2])
        functions: dict[str, Any] = {"one": len, "two": len}
        with harness.worker_thread(functions, port, client_id="a name"):
            found = harness.wait_until(
                lambda: [worker for worker in admin.workers() if len(worker.functions) == 2],
                what="the worker",
            )
            (worker,) = found
            assert (worker.address, worker.client_id) == ("127.0.0.1", "a name")
            assert sorted(worker.functions) == ["one", "two"]
            assert worker.fd > 2
        assert any(not worker.functions for worker in admin.workers()), "it lists this connection too"

    def test_create_and_drop_function(self, admin: AdminClient):
        admin.create_function("made")
        admin.create_function("made")
        assert FunctionStatus("made", 0, 0, 0) in admin.status()
        admin.drop_function("made")
        assert "made" not in [function.name for function in admin.status()]
        with pytest.raises(ServerError) as caught:
            admin.drop_function("made")
        assert (caught.value.code, caught.value.text) == ("ERR", "function not found")

    def test_drop_of_a_function_in_use(self, admin: AdminClient, address: str):
        port = int(address.rpartition(":")[2])
        functions: dict[str, Any] = {"used": len}
        with harness.worker_thread(functions, port):
            harness.wait_until(lambda: FunctionStatus("used", 0, 0, 1) in admin.status(), what="the worker")
            with pytest.raises(ServerError, match="still connected workers"):
                admin.drop_function("used")

    def test_cancel(self, admin: AdminClient, client: Client):
        handle = client.do_background("cancelled", b"")
        admin.cancel(handle)
        with pytest.raises(ServerError) as caught:
            admin.cancel("H:nobody:1")
        assert caught.value.code == "UNKNOWN_JOB"

    def test_queue_limit(self, admin: AdminClient, client: Client):
        admin.create_function("limited")
        admin.set_queue_limit("limited", 1)
        client.do_background("limited", b"")
        with pytest.raises(ServerError, match="Job queue is full"):
            client.do_background("limited", b"")
        admin.set_queue_limit("limited", high=3, normal=1)
        client.do_high_background("limited", b"")
        with pytest.raises(ServerError, match="Job queue is full"):
            client.do_background("limited", b"")
        admin.set_queue_limit("limited")
        client.do_background("limited", b"")

    def test_the_process(self, admin: AdminClient):
        assert admin.version().startswith(("1.", django_gearman.__version__))
        os.kill(admin.pid(), 0)
        assert admin.verbosity() in {"ERROR", "WARNING", "INFO", "DEBUG"}

    @pytest.mark.parametrize("graceful", [False, True])
    def test_shutdown_is_not_known(self, admin: AdminClient, graceful: bool):
        with pytest.raises(CommandNotSupported) as caught:
            admin.shutdown(graceful=graceful)
        assert caught.value.version == admin.version()
        assert caught.value.version in str(caught.value)
        assert caught.value.code == "UNKNOWN_COMMAND"


class TestOurServer:
    """What gearmand does otherwise, and real processes."""

    def test_cancelled_job_is_gone(self, ours: str):
        with AdminClient(ours) as admin, Client([ours]) as client:
            handle = client.do_background("gone", b"", unique="gone")
            admin.cancel(handle)
            assert handle not in [job.handle for job in admin.jobs()]
            with pytest.raises(ServerError, match="UNKNOWN_JOB"):
                admin.cancel(handle)
            assert client.do_background("gone", b"", unique="gone") != handle

    def test_client_of_a_running_job_is_told_at_once(self, ours: str):
        def cancel(job: Any) -> bytes:
            with AdminClient(ours) as admin:
                admin.cancel(job.handle.decode())
            return b"too late"

        port = int(ours.rpartition(":")[2])
        functions = {"cancel": cancel, "after": lambda job: b"well"}
        with harness.worker_thread(functions, port), Client([ours]) as client:
            with pytest.raises(JobFailed):
                client.do("cancel", timeout=10.0)
            assert client.do("after", timeout=10.0) == b"well"

    @pytest.mark.parametrize("graceful", [False, True])
    def test_shutdown(self, graceful: bool):
        with harness.server(store="memory", options=["--allow-shutdown"]) as process:
            with AdminClient(process.address) as admin:
                admin.shutdown(graceful=graceful)
            assert process.wait() == 0

    def test_signal_for_a_graceful_end(self):
        with harness.server(store="memory") as process, AdminClient(process.address) as admin:
            with Client([process.address]) as client:
                handle = client.do_background("last", b"")
            assert admin.jobs()
            process.signal(signal.SIGUSR1)
            harness.wait_until(lambda: "Shutting down" in process.stderr, what="the signal's effect")
            assert process.is_running
            admin.cancel(handle)
            assert process.wait() == 0

    def test_nobody_there(self):
        with AdminClient(f"127.0.0.1:{harness.free_port()}") as admin, pytest.raises(ConnectionFailed):
            admin.status()


def says(*answers: bytes) -> Script:
    """Give each line its answer, whatever it asks."""

    def script(peer: Peer) -> None:
        for answer in answers:
            assert peer.receive_line()
            peer.socket.sendall(answer)
        peer.wait_for_end()

    return script


def asked(port: int, **options: Any) -> AdminClient:
    return AdminClient(f"127.0.0.1:{port}", timeout=10.0, **options)


class TestHostileServers:
    """Names in listings are anybody's words, and not every port is a job server's."""

    def test_rows_that_are_none_are_left_out(self, caplog):
        rows = (
            b"f\t1\t2\t3\nfour\nx\t-1\t0\t0\ny\t1\t1\t" + b"9" * 5000 + b"\n\n\xb2\t\xb2\t\xb2\t\xb2\n"
            b"a\tb\t4\t5\t6\n\xff\t0\t0\t0\nERR x\t0\t0\t0\n.\n"
        )
        with fake_server(says(rows)) as port, asked(port) as admin:
            assert admin.status() == [
                FunctionStatus("f", 1, 2, 3),
                FunctionStatus("a\tb", 4, 5, 6),
                FunctionStatus("\\xff", 0, 0, 0),
                FunctionStatus("ERR x", 0, 0, 0),
            ]
        assert caplog.text.count("is left out") == 5

    def test_rows_of_workers(self):
        rows = b"1 ::1  :\n2 10.0.0.1 a b : g f\n3 x\n4 y - \nfive 10.0.0.1 - : f\n6 10.0.0.1 - : f:g :h\n.\n"
        with fake_server(says(rows)) as port, asked(port) as admin:
            assert admin.workers() == [
                WorkerStatus(1, "::1", "", ()),
                WorkerStatus(2, "10.0.0.1", "a b", ("g", "f")),
                WorkerStatus(6, "10.0.0.1", "-", ("f:g", ":h")),
            ]

    def test_what_comes_after_the_listings_end_is_no_answer_to_the_next_question(self):
        forged = says(b"u\n.\nOK 1\n.\n")
        with fake_server(forged, says(b"OK 2\n")) as port, asked(port) as admin:
            assert admin.uniques() == ["u"]
            assert admin.pid() == 2

    def test_connection_that_was_closed_is_opened_again(self):
        def once(peer: Peer) -> None:
            peer.receive_line()
            peer.socket.sendall(b"OK 1\n")

        with fake_server(once, once) as port, asked(port) as admin:
            assert admin.pid() == 1
            assert admin._connection is not None
            harness.wait_until(admin._connection.is_readable, what="the end of the connection")
            assert admin.pid() == 1

    @pytest.mark.parametrize("answer", [b"OK\n", b"OK -1\n", b"OK 1_0\n", b"220 mail.example.org ESMTP\r\n"])
    def test_process_id_that_is_none(self, answer):
        with fake_server(says(answer)) as port, asked(port) as admin, pytest.raises(ConnectionLost) as caught:
            admin.pid()
        assert "is no process id" in str(caught.value)

    def test_perls_errors_and_version(self):
        script = says(b"ERR unknown_command \r\n", b"v1.130.1\n")
        with fake_server(script) as port, asked(port) as admin:
            with pytest.raises(CommandNotSupported, match=r"v1\.130\.1") as caught:
                admin.jobs()
            assert caught.value.command == "show jobs"

    def test_server_that_knows_no_command_at_all(self):
        script = says(b"ERR UNKNOWN_COMMAND x\r\n", b"ERR UNKNOWN_COMMAND x\r\n")
        with fake_server(script) as port, asked(port) as admin, pytest.raises(CommandNotSupported) as caught:
            admin.status()
        assert "of version unknown" in str(caught.value)

    def test_end_before_the_answer(self):
        def half(peer: Peer) -> None:
            peer.receive_line()
            peer.socket.sendall(b"f\t1")

        with fake_server(half) as port, asked(port) as admin, pytest.raises(ConnectionLost):
            admin.status()

    def test_no_answer_in_time(self):
        def silent(peer: Peer) -> None:
            peer.wait_for_end()

        with fake_server(silent) as port, AdminClient(f"127.0.0.1:{port}", timeout=0.05) as admin:
            with pytest.raises(ResponseTimeout):
                admin.status()
            # The late answer to the first would be taken for the second's.
            assert admin._connection is None

    @pytest.mark.parametrize("answer", [b"x" * 2000, b"x\n" * 1000])
    def test_answer_without_end(self, monkeypatch, answer):
        monkeypatch.setattr(admin_client, "MAX_REPLY", 1000)
        with fake_server(says(answer)) as port, asked(port) as admin, pytest.raises(ConnectionLost) as caught:
            admin.uniques()
        assert "longer than" in str(caught.value)


class TestWords:
    """What cannot be said is refused before anything is sent."""

    @pytest.mark.parametrize("name", ["", "two words", "a\nshutdown", "tab\t", "nul\0", "del\x7f"])
    def test_names(self, name: str):
        admin = AdminClient("127.0.0.1:1")
        for method in (admin.cancel, admin.create_function, admin.drop_function, admin.set_queue_limit):
            with pytest.raises(ValueError, match="cannot be said"):
                method(name)

    def test_limits(self):
        admin = AdminClient("127.0.0.1:1")
        with pytest.raises(ValueError, match="not both"):
            admin.set_queue_limit("f", 1, high=2)
        with pytest.raises(ValueError, match="or 0 for no limit"):
            admin.set_queue_limit("f", -1)

    def test_address(self):
        with pytest.raises(ValueError, match="is not an address"):
            AdminClient("127.0.0.1:x")


class TestInsight:
    """What only our server tells."""

    def test_running_and_counters(self):
        def tell(peer: Peer) -> None:
            assert peer.receive_line().strip() == b"running"
            peer.socket.sendall(b"H:1\tf\t7\t2\t90\t-1\t10\nH:2\tg\tx\t2\t90\t-1\t10\nH:3\tg\n.\n")
            assert peer.receive_line().strip() == b"counters"
            peer.socket.sendall(b"a\tb\t1\t2\t3\t4\t5\t6\t7\nf\t1\n.\n")
            peer.wait_for_end()

        with fake_server(tell) as port, AdminClient(f"127.0.0.1:{port}", timeout=30) as admin:
            assert admin.running() == [RunningJob("H:1", "f", 7, 2, 90, -1, 10)]
            assert admin.counters() == [FunctionCounters("a\tb", 1, 2, 3, 4, 5, 6, 7)]

    @pytest.mark.foreign
    def test_gearmand_does_not_know_them(self, gearmand: str):
        with AdminClient(gearmand, timeout=30) as admin:
            for ask in (admin.running, admin.counters):
                with pytest.raises(CommandNotSupported):
                    ask()
