"""``Worker``: in a thread of the test, with real job servers and with one that plays a script."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from asyncio import CancelledError
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from time import monotonic
from typing import Any

import pytest

from django_gearman.client.sync import Client
from django_gearman.client.tasks import BESIDE
from django_gearman.exceptions import JobFailed
from django_gearman.protocol.packets import ATTEMPTS, RETURN, WAITS, PacketType, encode_response
from django_gearman.worker import link, loop
from django_gearman.worker.loop import AssignedJob, JobRefused, Worker
from tests import harness
from tests.client.fake_server import Peer, fake_server

P = PacketType


@pytest.fixture(scope="module")
def server() -> Iterator[harness.GearmanServerProcess]:
    with harness.server(store="memory") as process:
        yield process


@pytest.fixture
def client(server: harness.GearmanServerProcess) -> Iterator[Client]:
    with Client([server.address], timeout=30) as made:
        yield made


def reverse(job: AssignedJob) -> bytes:
    return job.workload[::-1]


def have_nothing(peer: Peer) -> None:
    """Let the worker sleep, where it sees that it is to stop."""
    peer.expect(P.GRAB_JOB_UNIQ)
    peer.send(P.NO_JOB)
    peer.wait_for_end()


class TestJobs:
    def test_what_the_function_sees(self, server: harness.GearmanServerProcess, client: Client) -> None:
        seen: list[AssignedJob] = []

        def work(job: AssignedJob) -> bytes:
            seen.append(job)
            return b""

        with harness.worker_thread({"see": work}, server):
            client.do("see", b"\0w", unique="key", timeout=30)
        (job,) = seen
        assert (job.function, job.unique, job.workload) == (b"see", b"key", b"\0w")
        assert job.handle.startswith(b"H:")

    def test_what_the_server_sees(self, server: harness.GearmanServerProcess) -> None:
        with harness.worker_thread({"one": reverse, "two": reverse}, server, client_id="it is me"):
            line = harness.wait_until(
                lambda: [line for line in server.ask("workers").splitlines() if "it is me" in line]
            )[0]
            assert {"one", "two"} <= set(line.rpartition(": ")[2].split())
        harness.wait_until(lambda: "it is me" not in server.ask("workers"))

    def test_many(self, server: harness.GearmanServerProcess, client: Client) -> None:
        with harness.worker_thread({"reverse": reverse}, server) as worker:
            for number in range(500):
                assert client.do("reverse", b"a%d" % number, timeout=30) == (b"a%d" % number)[::-1]
        assert worker.jobs_done == 500

    def test_connection_whose_descriptor_is_above_1023(
        self, server: harness.GearmanServerProcess, client: Client
    ) -> None:
        resource = pytest.importorskip("resource")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and hard < 2048:
            pytest.skip(f"the system gives {hard} descriptors only")
        resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
        opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
        try:
            with harness.worker_thread({"reverse": reverse}, server):
                for number in range(10):
                    assert client.do("reverse", b"a%d" % number, timeout=30) == (b"a%d" % number)[::-1]
        finally:
            for descriptor in opened:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def test_a_job_as_large_as_allowed(self, server: harness.GearmanServerProcess) -> None:
        """The server adds a handle to what the client was allowed to send."""
        function, unique = "f" * 500, "u" * 250
        size = 1_000_000
        with (
            harness.worker_thread({function: reverse}, server, max_packet=size),
            Client([server.address], timeout=30, max_packet=size) as client,
        ):
            for spare in (BESIDE, 100):
                workload = bytes(size - len(function) - len(unique) - spare)
                assert client.do(function, workload, unique=unique, timeout=30) == workload


class TestFailures:
    """Whatever a function does, the client hears of it and the worker goes on."""

    @pytest.fixture
    def outcome(self, server: harness.GearmanServerProcess, client: Client) -> Iterator[Any]:
        doing: list[Any] = []

        def work(job: AssignedJob) -> Any:
            return doing.pop()(job)

        with harness.worker_thread({"do": work, "reverse": reverse}, server):

            def outcome(function: Any) -> bytes:
                doing.append(function)
                try:
                    return client.do("do", timeout=30)
                except JobFailed as error:
                    assert client.do("reverse", b"ab", timeout=30) == b"ba"
                    return b"failed: " + error.data

            yield outcome

    @pytest.mark.parametrize(
        "error", [ValueError("no"), SystemExit(1), RecursionError("deep"), MemoryError(), GeneratorExit()]
    )
    def test_exceptions(self, outcome: Any, error: BaseException) -> None:
        def work(job: AssignedJob) -> bytes:
            raise error

        assert outcome(work) == b"failed: " + repr(error).encode()

    @pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=["exit", "interrupt"])
    def test_task_that_a_job_began(
        self, server: harness.GearmanServerProcess, client: Client, error: BaseException
    ) -> None:
        """asyncio raises these two out of its event loop, too: the jobs on it go on."""
        has_begun, go_on = threading.Event(), threading.Event()

        async def inner() -> None:
            await asyncio.sleep(0)
            raise error

        async def gather(job: AssignedJob) -> bytes:
            await asyncio.gather(inner())
            return b""

        async def hold(job: AssignedJob) -> bytes:
            has_begun.set()
            while not go_on.is_set():
                await asyncio.sleep(0.01)
            return b"held"

        with (
            harness.worker_thread({}, server, tasks={"gather": gather, "hold": hold}, concurrency=2),
            Client([server.address], timeout=30) as other,
            ThreadPoolExecutor() as threads,
        ):
            held = threads.submit(other.do, "hold", timeout=60)
            try:
                assert has_begun.wait(30)
                for _ in range(2):
                    with pytest.raises(JobFailed) as caught:
                        client.do("gather", timeout=30)
                    assert caught.value.data == repr(error).encode()
            finally:
                go_on.set()
            assert held.result(60) == b"held"

    def test_log_has_one_printable_line(self, outcome: Any, caplog: pytest.LogCaptureFixture) -> None:
        def work(job: AssignedJob) -> bytes:
            raise ValueError("no\n12:00 INFO forged \x1b[31m\u202e" + "x" * 10_000)

        outcome(work)
        (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert "ValueError: no\\n12:00 INFO forged \\x1b[31m\\u202exxx" in line
        assert line.isprintable()
        assert len(line) < 1200

    def test_cancelled(self, outcome: Any) -> None:
        """What an ``async def`` raises when a task that it waits for was cancelled is no ``Exception``."""

        def work(job: AssignedJob) -> bytes:
            raise CancelledError

        assert outcome(work) == b"failed: CancelledError()"

    def test_refused(self, outcome: Any) -> None:
        def work(job: AssignedJob) -> bytes:
            raise JobRefused

        assert outcome(work) == b"failed: "

    @pytest.mark.parametrize("result", [None, "text", 3, bytearray(b"x"), []])
    def test_only_bytes(self, outcome: Any, result: Any) -> None:
        told = outcome(lambda job: result)
        assert told.startswith(b"failed: TypeError(")
        assert type(result).__name__.encode() in told

    def test_an_exception_that_cannot_speak(self, outcome: Any) -> None:
        class Unspeakable(Exception):
            def __str__(self) -> str:
                raise ZeroDivisionError

        def work(job: AssignedJob) -> bytes:
            raise Unspeakable

        assert outcome(work) == b"failed: Unspeakable()"

    def test_a_result_too_large(self, server: harness.GearmanServerProcess, client: Client) -> None:
        with harness.worker_thread({"large": lambda job: bytes(1000)}, server, max_packet=1000):
            with pytest.raises(JobFailed) as caught:
                client.do("large", timeout=30)
            assert caught.value.data == b"TooLarge('the result of large', 1000, 1000)"

    def test_a_function_that_was_not_offered(self) -> None:
        told: list[list[bytes]] = []

        def script(peer: Peer) -> None:
            peer.expect(P.SET_CLIENT_ID)
            peer.expect(P.CAN_DO)
            peer.expect(P.GRAB_JOB_UNIQ)
            peer.send(P.JOB_ASSIGN_UNIQ, b"H:1", b"other", b"", b"")
            told.append(peer.expect(P.WORK_EXCEPTION))
            have_nothing(peer)

        with fake_server(script) as port, harness.worker_thread({"reverse": reverse}, port):
            harness.wait_until(lambda: told)
        assert told[0][0] == b"H:1"
        assert b"does not offer other" in told[0][1]


class TestStop:
    def test_before_it_begins(self) -> None:
        worker = Worker({"f": reverse}, [("127.0.0.1", 9)], client_id="x", describe=lambda error: b"")
        worker.stop()
        worker.run()

    def test_by_its_control_while_it_sleeps(self, server: harness.GearmanServerProcess) -> None:
        with harness.worker_thread({"asleep": reverse}, server):
            harness.wait_until(lambda: server.status().get("asleep") == (0, 0, 1))
        # worker_thread closes the control, and joins.

    def test_by_its_control_while_no_server_is_there(self) -> None:
        with harness.worker_thread({"f": reverse}, harness.free_port()):
            pass

    def test_the_job_in_hand_is_finished(self, server: harness.GearmanServerProcess, client: Client) -> None:
        has_begun, go_on = threading.Event(), threading.Event()

        def work(job: AssignedJob) -> bytes:
            has_begun.set()
            go_on.wait(20)
            return b"done"

        control_read, control_write = os.pipe()
        worker = Worker(
            {"hold": work}, [("127.0.0.1", server.port)], client_id="x", describe=lambda error: b""
        )
        thread = threading.Thread(target=worker.run, args=(control_read,))
        thread.start()
        results: list[bytes] = []
        caller = threading.Thread(target=lambda: results.append(client.do("hold", timeout=20)))
        caller.start()
        waiting = client_handle = None
        try:
            assert has_begun.wait(30)
            with Client([server.address]) as other:
                client_handle = other.do_background("hold")
                os.write(control_write, b"x")
                go_on.set()
                thread.join(30)
                caller.join(30)
                waiting = other.job_status(client_handle)
        finally:
            go_on.set()
            os.close(control_write)
            thread.join(30)
            os.close(control_read)
        assert results == [b"done"]
        assert not thread.is_alive()
        assert waiting.known
        assert not waiting.running
        assert worker.jobs_done == 1

    def test_from_within_a_function(self, server: harness.GearmanServerProcess, client: Client) -> None:
        with harness.worker_thread({"last": lambda job: b"" if worker.stop() else b"bye"}, server) as worker:
            assert client.do("last", timeout=30) == b"bye"
            harness.wait_until(lambda: "last\t0\t0\t0" in server.ask("status"))


class TestReconnect:
    def test_after_a_restart(self) -> None:
        with (
            harness.server(store="memory") as server,
            harness.worker_thread({"reverse": reverse}, server),
            Client([server.address], timeout=30) as client,
        ):
            assert client.do("reverse", b"ab", timeout=30) == b"ba"
            for end in (server.stop, server.kill):
                end()
                server.start()
                client.close()
                assert client.do("reverse", b"ab", timeout=20) == b"ba"

    def test_the_pauses_grow(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setattr(link, "FIRST_PAUSE", 0.001)
        monkeypatch.setattr(link, "LONGEST_PAUSE", 0.05)
        monkeypatch.setattr(link.random, "uniform", lambda low, high: high)
        tried: list[float] = []
        connect = loop.Connection

        def record(*args: Any, **options: Any) -> Any:
            tried.append(monotonic())
            return connect(*args, **options)

        monkeypatch.setattr(loop, "Connection", record)
        with (
            caplog.at_level(logging.WARNING, "django_gearman"),
            harness.worker_thread({"f": reverse}, harness.free_port()),
        ):
            harness.wait_until(lambda: len(tried) >= 10)
        pauses = [later - earlier for earlier, later in pairwise(tried)]
        for pause, least in zip(pauses, (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.05, 0.05), strict=False):
            assert pause >= least
        # One line for all of them.
        assert len(caplog.records) == 1
        assert "Trying until one does" in caplog.records[0].getMessage()

    def test_a_server_that_takes_connections_and_drops_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As when it has too many: the worker must not come back ten times a second."""
        monkeypatch.setattr(link, "FIRST_PAUSE", 0.001)
        monkeypatch.setattr(loop, "ANSWER_LIMIT", 0.5)
        monkeypatch.setattr(link.random, "uniform", lambda low, high: high)
        came: list[float] = []

        def script(peer: Peer) -> None:
            came.append(monotonic())

        with fake_server(*[script] * 9) as port, harness.worker_thread({"f": reverse}, port):
            harness.wait_until(lambda: len(came) >= 9)
        assert came[8] - came[7] >= 0.128

    def test_two_servers(self, server: harness.GearmanServerProcess, client: Client) -> None:
        with (
            harness.server(store="memory") as other,
            Client([other.address], timeout=30) as other_client,
            harness.worker_thread({"reverse": reverse}, server, other),
        ):
            for _ in range(3):
                assert client.do("reverse", b"ab", timeout=30) == b"ba"
                assert other_client.do("reverse", b"ab", timeout=30) == b"ba"
            other.kill()
            for _ in range(3):
                assert client.do("reverse", b"ab", timeout=30) == b"ba"
            other.start()
            other_client.close()
            assert other_client.do("reverse", b"ab", timeout=20) == b"ba"

    def test_the_server_goes_while_a_job_runs(self) -> None:
        runs: list[bytes] = []
        is_back = threading.Event()

        def work(job: AssignedJob) -> bytes:
            runs.append(job.workload)
            if len(runs) == 1:
                server.kill()
                for _ in range(3):
                    job.send_data(b"to nobody")
                server.start()
                is_back.set()
            return b"done"

        with (
            harness.server(store="memory") as server,
            harness.worker_thread({"work": work}, server),
            Client([server.address], timeout=30) as client,
        ):
            client.do_background("work", b"1")
            assert is_back.wait(30)
            client.close()
            assert client.do("work", b"2", timeout=20) == b"done"
        assert runs == [b"1", b"2"]

    def test_a_server_that_speaks_nonsense(self) -> None:
        served: list[bytes] = []

        def nonsense(peer: Peer) -> None:
            peer.socket.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            peer.wait_for_end()

        def good(peer: Peer) -> None:
            peer.expect(P.SET_CLIENT_ID)
            peer.expect(P.CAN_DO)
            peer.expect(P.GRAB_JOB_UNIQ)
            peer.send(P.ERROR, b"CODE", b"a word beside the matter")
            peer.send(P.NOOP)
            peer.send(P.NO_JOB)
            peer.expect(P.PRE_SLEEP)
            peer.send(P.NOOP)
            peer.expect(P.GRAB_JOB_UNIQ)
            peer.send(P.JOB_ASSIGN_UNIQ, b"H:1", b"reverse", b"", b"ab")
            served.extend(peer.expect(P.WORK_COMPLETE))
            have_nothing(peer)

        with fake_server(nonsense, good) as port, harness.worker_thread({"reverse": reverse}, port):
            harness.wait_until(lambda: served)
        assert served == [b"H:1", b"ba"]

    def test_more_jobs_than_were_asked_for(self, caplog: pytest.LogCaptureFixture) -> None:
        """There is no place for the third."""
        go_on = threading.Event()
        is_back = threading.Event()

        def wait(job: AssignedJob) -> bytes:
            assert go_on.wait(30)
            return b""

        def generous(peer: Peer) -> None:
            peer.socket.sendall(encode_response(P.JOB_ASSIGN_UNIQ, b"H:1", b"wait", b"", b"") * 3)
            peer.wait_for_end()

        def again(peer: Peer) -> None:
            is_back.set()
            peer.wait_for_end()

        with fake_server(generous, again) as port, harness.worker_thread({"wait": wait}, port, threads=2):
            try:
                assert is_back.wait(30)
            finally:
                go_on.set()
        assert "more jobs than it was asked for" in caplog.text

    @pytest.mark.parametrize("attempt", [b"9" * 5000 + b" 1", b"1 " + b"9" * 5000, b"one of two"])
    def test_an_attempt_that_is_no_number(self, attempt: bytes) -> None:
        seen: list[int] = []

        def work(job: AssignedJob) -> bytes:
            seen.append(job.attempt)
            return b""

        def script(peer: Peer) -> None:
            for kind in (P.SET_CLIENT_ID, P.CAN_DO, P.GRAB_JOB_UNIQ):
                peer.expect(kind)
            peer.send(P.OPTION_RES, b"attempt " + attempt)
            peer.send(P.JOB_ASSIGN_UNIQ, b"H:1", b"work", b"", b"")
            peer.expect(P.WORK_COMPLETE)
            have_nothing(peer)

        with fake_server(script) as port, harness.worker_thread({"work": work}, port):
            harness.wait_until(lambda: seen)
        assert seen == [1]

    def test_a_lost_noop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loop, "RECHECK", 0.05)
        asked = threading.Event()

        def script(peer: Peer) -> None:
            peer.expect(P.SET_CLIENT_ID)
            peer.expect(P.CAN_DO)
            for _ in range(3):
                peer.expect(P.GRAB_JOB_UNIQ)
                peer.send(P.NO_JOB)
                peer.expect(P.PRE_SLEEP)
            asked.set()
            peer.wait_for_end()

        with fake_server(script) as port, harness.worker_thread({"f": reverse}, port):
            assert asked.wait(30)

    def test_a_hung_server_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loop, "ANSWER_LIMIT", 0.05)
        again = threading.Event()

        def hung(peer: Peer) -> None:
            peer.wait_for_end()

        def good(peer: Peer) -> None:
            again.set()
            peer.wait_for_end()

        with fake_server(hung, good) as port, harness.worker_thread({"f": reverse}, port):
            assert again.wait(30)


class TestWaiting:
    """``packets.WAITS``: a server of ours sends a job to who it said had none."""

    def introduce(self, peer: Peer) -> None:
        peer.expect(P.SET_CLIENT_ID)
        assert peer.expect(P.OPTION_REQ) == [ATTEMPTS]
        assert peer.expect(P.OPTION_REQ) == [WAITS]
        peer.send(P.OPTION_RES, ATTEMPTS)
        peer.send(P.OPTION_RES, WAITS)
        peer.expect(P.CAN_DO)
        peer.expect(P.GRAB_JOB_UNIQ)

    def test_a_job_that_comes_unasked(self) -> None:
        told: list[Any] = []

        def script(peer: Peer) -> None:
            self.introduce(peer)
            for number in range(3):
                peer.send(P.NO_JOB)
                peer.send(P.JOB_ASSIGN_UNIQ, b"H:%d" % number, b"reverse", b"", b"ab")
                told.append(peer.receive())
                told.append(peer.receive()[0])
            peer.send(P.NO_JOB)
            # The question that is not to be answered is taken back.
            told.append(peer.receive())
            peer.wait_for_end()

        with fake_server(script) as port:
            with harness.worker_thread({"reverse": reverse}, port, retry=lambda job, error: None) as worker:
                harness.wait_until(lambda: len(told) == 6)
            harness.wait_until(lambda: len(told) == 7)
        for number in range(3):
            assert told[2 * number :][:2] == [
                (P.WORK_COMPLETE, [b"H:%d" % number, b"ba"]),
                P.GRAB_JOB_UNIQ,
            ]
        assert told[6] == (P.OPTION_REQ, [RETURN])
        assert worker.jobs_done == 3

    def test_it_asks_whether_the_server_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And not for another job: it has a place for one."""
        monkeypatch.setattr(loop, "RECHECK", 0.05)
        monkeypatch.setattr(loop, "ANSWER_LIMIT", 0.5)
        is_back = threading.Event()

        def script(peer: Peer) -> None:
            self.introduce(peer)
            peer.send(P.NO_JOB)
            for _ in range(3):
                assert peer.receive()[0] == P.ECHO_REQ
                peer.send(P.ECHO_RES, b"")
            # And now it hangs.
            peer.wait_for_end()

        def again(peer: Peer) -> None:
            is_back.set()
            peer.wait_for_end()

        with (
            fake_server(script, again) as port,
            harness.worker_thread({"f": reverse}, port, retry=lambda job, error: None),
        ):
            assert is_back.wait(10)

    def test_not_of_one_of_several_servers(self) -> None:
        """The place may be taken by a job of the other."""
        told: list[Any] = []

        def script(peer: Peer) -> None:
            peer.expect(P.SET_CLIENT_ID)
            told.append(peer.expect(P.OPTION_REQ))
            told.append(peer.receive()[0])
            peer.wait_for_end()

        with (
            fake_server(script) as port,
            fake_server(lambda peer: peer.wait_for_end()) as other,
            harness.worker_thread({"f": reverse}, port, other, retry=lambda job, error: None),
        ):
            harness.wait_until(lambda: len(told) == 2)
        assert told == [[ATTEMPTS], P.CAN_DO]


class TestLogs:
    """``packets.LOGS``: only servers that keep logs are sent any."""

    @pytest.fixture(autouse=True)
    def begin(self) -> None:
        self.is_over = threading.Event()

    def end(self, peer: Peer) -> None:
        """Have no other job; from now on the worker may be stopped."""
        peer.expect(P.GRAB_JOB_UNIQ)
        self.is_over.set()
        peer.send(P.NO_JOB)
        peer.wait_for_end()

    def work(self, port: int) -> bool:
        """Have a worker run one job that logs; whether it was told that its log is kept."""
        seen: list[bool] = []

        def log(job: AssignedJob) -> bytes:
            seen.append(job.takes_log)
            if job.takes_log:
                job.send_log(b"one\ntwo")
            return b""

        with harness.worker_thread({"log": log}, port, logs=True):
            assert self.is_over.wait(30)
        return seen[0]

    def test_server_that_keeps_them(self) -> None:
        def keep(peer: Peer) -> None:
            for kind in (P.SET_CLIENT_ID, P.CAN_DO, P.GRAB_JOB_UNIQ):
                peer.expect(kind)
            peer.send(P.JOB_ASSIGN_UNIQ, b"H:1", b"log", b"", b"")
            assert peer.expect(P.OPTION_REQ) == [b"log H:1 one\ntwo"]
            peer.expect(P.WORK_COMPLETE)
            self.end(peer)

        with fake_server(keep) as port:
            assert self.work(port)

    def test_other_server(self) -> None:
        def know_nothing(peer: Peer) -> None:
            while (received := peer.receive())[0] != P.GRAB_JOB_UNIQ:
                if received[0] == P.OPTION_REQ:
                    assert received[1] == [b"logs"]
                    peer.send(P.ERROR, b"UNKNOWN_OPTION", b"Server does not recognize given option")
            peer.send(P.JOB_ASSIGN_UNIQ, b"H:1", b"log", b"", b"")
            # Nothing comes between.
            assert peer.receive()[0] == P.WORK_COMPLETE
            self.end(peer)

        with fake_server(know_nothing) as port:
            assert not self.work(port)
