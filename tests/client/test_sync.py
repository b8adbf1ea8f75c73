"""``Client`` with a real job server, and with one that fails as it is told."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import pytest

from django_gearman.client import connection as connection_module
from django_gearman.client.connection import Connection
from django_gearman.client.sync import NUDGE_TIMEOUT, Client, JobStatus, UniqueStatus
from django_gearman.client.tasks import Data, Progress, Value, Warned
from django_gearman.exceptions import (
    CommandNotSupported,
    ConnectionFailed,
    ConnectionLost,
    GearmanError,
    JobFailed,
    NoWorker,
    ResponseTimeout,
    ResultTooLarge,
    ServerError,
    TooLarge,
)
from django_gearman.protocol.packets import CLAIM, PacketType, encode_request, encode_response
from django_gearman.worker.loop import AssignedJob, JobRefused, WorkerFunction
from tests import harness

from .fake_server import Peer, Script, fake_server, play

P = PacketType
TAKEN = (P.JOB_CREATED, b"H:1")


@pytest.fixture(scope="module")
def server() -> Iterator[harness.GearmanServerProcess]:
    with harness.server(store="memory") as process:
        yield process


@pytest.fixture
def client(server: harness.GearmanServerProcess) -> Iterator[Client]:
    with Client([server.address], timeout=10) as made:
        yield made


def reverse(job: AssignedJob) -> bytes:
    return job.workload[::-1]


def tell(job: AssignedJob) -> bytes:
    job.send_data(b"part")
    job.send_warning(b"careful")
    job.send_status(1, 3)
    return b"end"


def fail(job: AssignedJob) -> bytes:
    if job.workload:
        raise ValueError(job.workload.decode())
    raise JobRefused


FUNCTIONS = {"reverse": reverse, "tell": tell, "fail": fail, "name \u00fc": reverse}


@pytest.fixture(scope="module")
def worker(server: harness.GearmanServerProcess) -> Iterator[None]:
    with harness.worker_thread(FUNCTIONS, server):
        yield


@pytest.mark.usefixtures("worker")
class TestForeground:
    @pytest.mark.parametrize("method", ["do", "do_high", "do_low"])
    @pytest.mark.parametrize("workload", [b"", b"abc", b"\0\xff\0", bytes(range(256)) * 8192])
    def test_result(self, client: Client, method: str, workload: bytes) -> None:
        assert getattr(client, method)("reverse", workload, timeout=10) == workload[::-1]

    def test_names_are_text(self, client: Client) -> None:
        assert client.do("name \u00fc", b"ab", unique="\u00fc", timeout=10) == b"ba"

    def test_parts(self, client: Client) -> None:
        told: list[Any] = []
        result = client.do(
            "tell",
            timeout=10,
            on_data=lambda data: told.append(("data", data)),
            on_warning=lambda data: told.append(("warning", data)),
            on_status=lambda *numbers: told.append(("status", *numbers)),
        )
        assert result == b"end"
        assert told == [("data", b"part"), ("warning", b"careful"), ("status", b"1", b"3")]

    def test_failure_without_a_word(self, client: Client) -> None:
        with pytest.raises(JobFailed, match=r"^job fail failed$") as caught:
            client.do("fail", timeout=10)
        assert caught.value.data == b""

    def test_exception(self, client: Client) -> None:
        with pytest.raises(JobFailed, match=r"^job fail failed: ValueError\('no'\)$") as caught:
            client.do("fail", b"no", timeout=10)
        assert caught.value.data == b"ValueError('no')"
        assert client.do("reverse", b"ab", timeout=10) == b"ba"

    def test_a_callback_that_fails_leaves_a_usable_client(self, client: Client) -> None:
        with pytest.raises(ZeroDivisionError):
            client.do("tell", timeout=10, on_data=lambda data: 1 / 0)
        assert client.do("reverse", b"ab", timeout=10) == b"ba"

    @pytest.mark.parametrize(
        "error",
        [
            JobFailed("another"),
            ServerError("127.0.0.1:1", "CODE", "text"),
            ConnectionLost("127.0.0.1:1", "gone"),
        ],
    )
    def test_a_callback_that_raises_what_jobs_do_hears_no_more(
        self, server: harness.GearmanServerProcess, client: Client, error: GearmanError
    ) -> None:
        """The job runs on: what still comes of it is not told while another call waits."""
        go_on = threading.Event()
        told: list[bytes] = []

        def talk(job: AssignedJob) -> bytes:
            job.send_data(b"first")
            go_on.wait(30)
            job.send_data(b"second")
            return b""

        def on_data(data: bytes) -> None:
            told.append(data)
            raise error

        # One worker: the other job is done after this one.
        with harness.worker_thread({"talk": talk, "after it": reverse}, server):
            with pytest.raises(type(error)):
                client.do("talk", timeout=30, on_data=on_data)
            go_on.set()
            assert client.do("after it", b"ab", timeout=30) == b"ba"
        assert told == [b"first"]

    def test_a_callback_that_lost_another_connection(self, server: harness.GearmanServerProcess) -> None:
        """The job's own is there: it is not submitted again."""
        ran: list[bytes] = []

        def talk(job: AssignedJob) -> bytes:
            ran.append(job.workload)
            job.send_data(b"part")
            return b""

        def on_data(data: bytes) -> None:
            raise ConnectionLost("127.0.0.1:1", "gone")

        servers = [server.address, f"127.0.0.1:{harness.free_port()}"]
        with Client(servers, timeout=30) as client, harness.worker_thread({"talk once": talk}, server):
            with pytest.raises(ConnectionLost, match=r"127\.0\.0\.1:1 "):
                client.do("talk once", timeout=30, on_data=on_data, resubmit=True)
            # It would have been there by now.
            client.do("talk once", b"the next", timeout=30)
        assert ran == [b"", b"the next"]

    def test_a_callback_may_use_the_client(self, client: Client) -> None:
        told: list[bytes] = []
        client.do("tell", timeout=10, on_data=lambda data: told.append(client.echo(data)))
        assert told == [b"part"]


@pytest.mark.usefixtures("worker")
class TestStreams:
    def test_parts_and_the_value(self, client: Client) -> None:
        assert list(client.stream("tell", timeout=10)) == [
            Data(b"part"),
            Warned(b"careful"),
            Progress(1, 3),
            Value(b"end"),
        ]

    def test_as_they_come(self, server: harness.GearmanServerProcess, client: Client) -> None:
        go_on = threading.Event()

        def work(job: AssignedJob) -> bytes:
            job.send_data(b"first")
            assert go_on.wait(20)
            return b"end"

        with harness.worker_thread({"wait for the reader": work}, server):
            parts = client.stream("wait for the reader", timeout=20)
            assert next(parts) == Data(b"first")
            go_on.set()
            assert list(parts) == [Value(b"end")]

    def test_failure(self, client: Client) -> None:
        with pytest.raises(JobFailed):
            list(client.stream("fail", timeout=10))

    @harness.tried_again
    def test_who_leaves_abandons_the_job(self, server: harness.GearmanServerProcess, client: Client) -> None:
        with pytest.raises(ResponseTimeout):
            list(client.stream("nobody streams", timeout=0.05))
        harness.wait_until(lambda: server.status()["nobody streams"] == (0, 0, 0))
        assert client.echo(b"x") == b"x"

    def test_wrong_arguments_are_told_at_the_call(self, client: Client) -> None:
        with pytest.raises(TypeError, match="must be bytes"):
            client.stream("f", "text")


class TestBackground:
    @pytest.mark.parametrize("method", ["do_background", "do_high_background", "do_low_background"])
    def test_handle(self, client: Client, method: str) -> None:
        handle = getattr(client, method)("nobody serves this", b"x")
        assert handle.startswith("H:")
        assert client.job_status(handle) == JobStatus(known=True, running=False, numerator=0, denominator=0)

    def test_unique(self, client: Client) -> None:
        handles = {client.do_background("nobody serves this", unique="one") for _ in range(3)}
        assert len(handles) == 1
        assert client.do_background("nobody serves this") not in handles


class TestLater:
    """PROTOCOL 5.6: SUBMIT_JOB_EPOCH."""

    def test_not_before_its_time(self, server: harness.GearmanServerProcess, client: Client) -> None:
        ran: list[float] = []

        def note(job: AssignedJob) -> bytes:
            ran.append(time.time())
            return b""

        with harness.worker_thread({"later": note}, server):
            epoch = time.time() + 1.2
            assert client.do_epoch("later", epoch=epoch).startswith("H:")
            harness.wait_until(lambda: ran)
        assert ran[0] >= epoch

    def test_what_is_past_runs_at_once(self, server: harness.GearmanServerProcess, client: Client) -> None:
        ran: list[bytes] = []

        def note(job: AssignedJob) -> bytes:
            ran.append(job.workload)
            return b""

        with harness.worker_thread({"past": note}, server):
            client.do_epoch("past", b"w\0w", epoch=0)
            harness.wait_until(lambda: ran)
        assert ran == [b"w\0w"]

    @pytest.mark.parametrize("epoch", [-1, float("nan"), float("inf"), 1_800_000_000_000])
    def test_no_time(self, epoch: float) -> None:
        with pytest.raises(ValueError, match="epoch is a time in seconds since 1970"):
            Client().do_epoch("f", epoch=epoch)


class TestReduce:
    """PROTOCOL 3, "Reduce jobs"."""

    @pytest.mark.usefixtures("worker")
    def test_result(self, client: Client) -> None:
        told: list[bytes] = []
        assert client.do_reduce("tell", reducer="sum", timeout=10, on_data=told.append) == b"end"
        assert told == [b"part"]

    def test_the_worker_gets_the_reducer(self, server: harness.GearmanServerProcess, client: Client) -> None:
        handle = client.do_reduce_background("to reduce", b"w", reducer="s\u00fcm", unique="u")
        with closing(Connection("127.0.0.1", server.port)) as worker:
            worker.send(encode_request(P.CAN_DO, b"to reduce") + encode_request(P.GRAB_JOB_ALL))
            packet = worker.receive(time.monotonic() + 10)
            worker.send(encode_request(P.WORK_COMPLETE, handle.encode(), b""))
        assert packet == (
            P.JOB_ASSIGN_ALL,
            [handle.encode(), b"to reduce", b"u", "s\u00fcm".encode(), b"w"],
        )

    def test_nuls(self) -> None:
        with pytest.raises(ValueError, match=r"reducer 'a.x00b' has a NUL"):
            Client().do_reduce_background("f", reducer="a\0b")


class TestUniqueStatus:
    """PROTOCOL 3, "GET_STATUS_UNIQUE"."""

    def test_unknown(self, client: Client) -> None:
        assert client.job_status_unique("nobody's") == UniqueStatus(False, False, 0, 0, 0)

    def test_waiting(self, client: Client) -> None:
        client.do_background("nobody serves this", unique="known \u00fc")
        assert client.job_status_unique("known \u00fc") == UniqueStatus(True, False, 0, 0, 0)

    def test_running_with_clients(self, server: harness.GearmanServerProcess, client: Client) -> None:
        go_on = threading.Event()

        def work(job: AssignedJob) -> bytes:
            job.send_status(2, 5)
            go_on.wait(20)
            return b""

        def wait() -> None:
            with Client([server.address], timeout=10) as other:
                other.do("counted", unique="counted", timeout=20)

        with harness.worker_thread({"counted": work}, server), ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(wait) for _ in range(2)]
            try:
                status = UniqueStatus(known=True, running=True, numerator=2, denominator=5, clients=2)
                harness.wait_until(lambda: client.job_status_unique("counted") == status)
            finally:
                go_on.set()
            for each in waiting:
                each.result(20)


class TestOtherServers:
    """What a server does not take is told with its version."""

    @pytest.mark.parametrize(
        ("refusal", "call"),
        [
            ((b"server_error", b"no"), lambda client: client.do_epoch("f", epoch=1)),
            ((b"INVALID_COMMAND", b"no"), lambda client: client.do_reduce("f", reducer="r", timeout=10)),
            ((b"server_error", b"no"), lambda client: client.do_reduce_background("f", reducer="r")),
            ((b"server_error", b"no"), lambda client: client.do_low_background("f")),
            ((b"server_error", b"no"), lambda client: client.job_status_unique("u")),
        ],
    )
    def test_version(self, refusal: tuple[bytes, bytes], call: Any) -> None:
        asked: list[PacketType] = []

        def refuse(peer: Peer) -> None:
            peer.expect(P.OPTION_REQ)
            peer.send(P.OPTION_RES, b"exceptions")
            asked.append(peer.receive()[0])
            peer.send(P.ERROR, *refusal)

        def tell_version(peer: Peer) -> None:
            assert peer.receive_line() == b"version"
            peer.socket.sendall(b"v1.130.1\n")
            peer.wait_for_end()

        with (
            fake_server(refuse, tell_version) as port,
            Client([f"127.0.0.1:{port}"], timeout=10) as client,
            pytest.raises(CommandNotSupported) as caught,
        ):
            call(client)
        assert caught.value.version == "v1.130.1"
        assert caught.value.command == asked[0].name
        assert f"of version v1.130.1, does not know the command '{asked[0].name}'" in str(caught.value)

    def test_another_refusal_asks_nothing(self) -> None:
        script = play(P.SUBMIT_JOB_EPOCH, (P.ERROR, b"QUEUE_ERROR", b"full"), None)
        with (
            fake_server(script) as port,
            Client([f"127.0.0.1:{port}"], timeout=10) as client,
            pytest.raises(ServerError, match="QUEUE_ERROR: full") as caught,
        ):
            client.do_epoch("f", epoch=1)
        assert type(caught.value) is ServerError


class TestQuestions:
    @pytest.mark.parametrize("data", [b"", b"abc", b"a\0b", bytes(1_000_000)])
    def test_echo(self, client: Client, data: bytes) -> None:
        assert client.echo(data) == data

    def test_status_of_the_unknown(self, client: Client) -> None:
        assert client.job_status("H:nothing:1") == JobStatus(False, False, 0, 0)

    def test_status_while_it_runs(self, server: harness.GearmanServerProcess, client: Client) -> None:
        go_on = threading.Event()

        def work(job: AssignedJob) -> bytes:
            job.send_status(2, 5)
            go_on.wait(20)
            return b""

        with harness.worker_thread({"wait": work}, server):
            handle = client.do_background("wait")
            try:
                status = JobStatus(known=True, running=True, numerator=2, denominator=5)
                harness.wait_until(lambda: client.job_status(handle) == status)
            finally:
                go_on.set()
            harness.wait_until(lambda: not client.job_status(handle).known)


class TestRefusals:
    """What is wrong is told before anything is sent."""

    @pytest.mark.parametrize("submit", ["do", "do_background"])
    def test_workloads_are_bytes(self, submit: str) -> None:
        with pytest.raises(TypeError, match="the workload of f must be bytes, not str; encode it first"):
            getattr(Client(), submit)("f", "text")

    def test_nuls(self) -> None:
        with pytest.raises(ValueError, match=r"function 'a.x00b' has a NUL"):
            Client().do_background("a\0b")
        with pytest.raises(ValueError, match=r"unique 'a.x00b' has a NUL"):
            Client().do_background("a", unique="a\0b")

    def test_size(self) -> None:
        with pytest.raises(ValueError, match="has 1001 bytes, more than max_packet=1000; pass a reference"):
            Client(max_packet=1000).do_background("f", bytes(1001))

    def test_size_with_what_stands_beside_it(self) -> None:
        """No packet that is sent is larger than ``max_packet``, of whatever kind it is."""
        client = Client(max_packet=1000)
        sentence = "f has 1000 bytes, which with the names in its packet are more than max_packet=1000; pass"
        made = [
            lambda size: client._request("f", bytes(size), "unique"),
            lambda size: client._request("f", bytes(size), "unique", reducer="a longer name"),
            lambda size: client._later("f", bytes(size), "unique", 1e10),
        ]
        for make in made:
            with pytest.raises(TooLarge, match=sentence):
                make(1000)
            size = 1000
            while True:
                size -= 1
                try:
                    packet = make(size).packet
                except TooLarge:
                    continue
                break
            header = 12
            assert 980 < len(packet) - header <= 1000

    @pytest.mark.parametrize("servers", ["127.0.0.1:4730", [], ["host:port"]])
    def test_servers(self, servers: Any) -> None:
        with pytest.raises(ValueError, match=r"servers must be a sequence|not an address"):
            Client(servers)

    def test_the_server_refuses(self, client: Client) -> None:
        with pytest.raises(ServerError, match="answered INVALID_FUNCTION_NAME") as caught:
            client.do_background("a\nb")
        assert caught.value.code == "INVALID_FUNCTION_NAME"
        assert client.echo(b"x") == b"x"


class TestTimeouts:
    @harness.tried_again
    def test_a_job_that_takes_too_long(self, client: Client) -> None:
        with pytest.raises(ResponseTimeout, match="job nobody took longer than"):
            client.do("nobody", timeout=0.05)
        assert client.echo(b"x") == b"x"

    def test_an_abandoned_job_is_dropped(self, server: harness.GearmanServerProcess, client: Client) -> None:
        with pytest.raises(TimeoutError):
            client.do("abandoned", timeout=0.05)
        harness.wait_until(lambda: server.status()["abandoned"] == (0, 0, 0))

    @harness.tried_again
    def test_a_silent_server(self) -> None:
        with fake_server(play(None), play(None)) as port:
            client = Client([f"127.0.0.1:{port}"], timeout=0.1, circuit=0.0)
            with pytest.raises(ResponseTimeout):
                client.do_background("f")
            with pytest.raises(ConnectionFailed, match="no answer in time"):
                client.echo(b"x")

    @harness.tried_again
    def test_a_late_answer_is_not_taken_for_the_next(self) -> None:
        late = threading.Event()

        def too_late(peer: Peer) -> None:
            peer.expect(P.ECHO_REQ)
            late.wait(30)
            peer.send(P.ECHO_RES, b"late")

        with (
            fake_server(too_late, play(*[P.ECHO_REQ, (P.ECHO_RES, b"in time")] * 2, None)) as port,
            Client([f"127.0.0.1:{port}"], timeout=0.1, circuit=0.0) as client,
        ):
            with pytest.raises(ResponseTimeout):
                client.echo(b"x")
            late.set()
            assert client.echo(b"x") == b"in time"


class TestNobodyComes:
    def test_the_time_out_says_so(self, client: Client) -> None:
        for _ in range(2):
            client.do_background("misspelt")

        def check() -> None:
            with pytest.raises(
                NoWorker, match=r"job misspelt took longer than 0.\d+ s: 3 jobs wait for"
            ) as caught:
                client.do("misspelt", timeout=0.05)
            error = caught.value
            assert (error.function, error.waiting) == ("misspelt", 3)
            assert "no worker offers it at 127.0.0.1" in str(error)

        harness.in_one_try(check)

    @harness.tried_again
    def test_what_is_told_is_what_was_allowed(
        self, server: harness.GearmanServerProcess, client: Client
    ) -> None:
        """Not what was left of it when the job last said something."""
        go_on = threading.Event()

        def work(job: AssignedJob) -> bytes:
            go_on.wait(0.1)
            job.send_status(1, 2)
            go_on.wait(20)
            return b""

        with harness.worker_thread({"slow": work}, server):
            try:
                with pytest.raises(ResponseTimeout, match=r"^job slow took longer than 0\.5 s$") as caught:
                    client.do("slow", timeout=0.5)
            finally:
                go_on.set()
        assert caught.value.timeout == 0.5

    @harness.tried_again
    def test_not_when_they_are_busy(self, server: harness.GearmanServerProcess, client: Client) -> None:
        go_on = threading.Event()

        def work(job: AssignedJob) -> bytes:
            go_on.wait(20)
            return b""

        with harness.worker_thread({"busy": work}, server):
            try:
                harness.wait_until(lambda: server.status().get("busy"))
                with pytest.raises(ResponseTimeout) as caught:
                    client.do("busy", timeout=0.1)
            finally:
                go_on.set()
        assert type(caught.value) is ResponseTimeout


@pytest.mark.usefixtures("patience")
class TestWatch:
    """``watch``: our server's extension, ``packets.ROW``."""

    asked = P.OPTION_REQ
    """What ``exceptions`` is asked with as well, first of all."""

    def test_told(self) -> None:
        with (
            fake_server(
                play(
                    self.asked,
                    (P.OPTION_RES, b"exceptions"),
                    self.asked,
                    (P.OPTION_RES, b"listen row 5"),
                    (P.WORK_COMPLETE, b"row 5", b"what it says"),
                    P.ECHO_REQ,
                    (P.ECHO_RES, b"x"),
                    None,
                )
            ) as port,
            Client([f"127.0.0.1:{port}"], timeout=30) as client,
        ):
            with closing(client.watch("5")) as watch:
                assert watch.is_open
                assert watch.told == b""
                assert watch.wait(30)
                assert watch.wait(30)
                assert watch.told == b"what it says"
            # The same connection serves the next.
            assert client.echo(b"x") == b"x"

    def test_not_told(self) -> None:
        script = play(
            self.asked, (P.OPTION_RES, b"exceptions"), self.asked, (P.OPTION_RES, b"listen row 5"), None
        )
        with (
            fake_server(script, play(P.ECHO_REQ, (P.ECHO_RES, b"x"), None)) as port,
            Client([f"127.0.0.1:{port}"], timeout=30) as client,
        ):
            with closing(client.watch("5")) as watch:
                assert not watch.wait(0.05)
                assert watch.is_open
            # What comes late is for nobody: another connection.
            assert client.echo(b"x") == b"x"

    @pytest.mark.parametrize(("code", "asked"), [(b"JOB_NOT_FOUND", 2), (b"UNKNOWN_OPTION", 1)])
    def test_refused(self, code: bytes, asked: int) -> None:
        """A server that is none of ours is not asked again."""
        told = [self.asked, (P.ERROR, code, b"")]
        with (
            fake_server(play(self.asked, (P.OPTION_RES, b"exceptions"), *told * asked, None)) as port,
            Client([f"127.0.0.1:{port}"], timeout=30) as client,
        ):
            for number in range(2):
                with closing(client.watch("5")) as watch:
                    # What was asked may be answered already.
                    assert number < asked or not watch.is_open
                    assert not watch.wait(30)
                    assert not watch.is_open

    def test_nobody_there(self) -> None:
        with Client([f"127.0.0.1:{harness.free_port()}"]) as client:
            watch = client.watch("5")
            assert not watch.is_open
            assert not watch.wait(30)
            watch.close()

    def test_lost(self) -> None:
        with (
            fake_server(play(self.asked, (P.OPTION_RES, b"exceptions"), self.asked)) as port,
            Client([f"127.0.0.1:{port}"], timeout=30) as client,
            closing(client.watch("5")) as watch,
        ):
            assert not watch.wait(30)
            assert not watch.is_open


def listened(*then: Any) -> Script:
    """A server that lets one listen to whatever it is, and then plays on."""

    def script(peer: Peer) -> None:
        what = b""
        while not what.startswith(b"listen "):
            kind, (what,) = peer.receive()
            peer.send(P.ECHO_RES if kind == P.ECHO_REQ else P.OPTION_RES, what)
        play(*then, None)(peer)

    return script


TOLD = (P.WORK_COMPLETE, b"group 5", b"")


@pytest.mark.usefixtures("patience")
class TestWatchGroup:
    """``watch_group``: each of the servers is asked, since any may write the end of the last member."""

    @pytest.mark.parametrize("scripts", [[[TOLD]], [[TOLD], []], [[], [TOLD]]])
    def test_told_by_one_of_them(self, scripts: list[list[Any]]) -> None:
        with ExitStack() as stack:
            ports = [stack.enter_context(fake_server(listened(*script))) for script in scripts]
            client = stack.enter_context(Client([f"127.0.0.1:{port}" for port in ports], timeout=5))
            watch = stack.enter_context(closing(client.watch_group("5")))
            assert watch.is_open
            assert watch.wait(10)

    def test_not_told(self) -> None:
        with (
            fake_server(listened()) as one,
            fake_server(listened()) as two,
            Client([f"127.0.0.1:{port}" for port in (one, two)], timeout=5) as client,
            closing(client.watch_group("5")) as watch,
        ):
            assert not watch.wait(0.05)
            assert watch.is_open

    def test_one_is_away(self) -> None:
        with (
            fake_server(listened(TOLD)) as port,
            Client([f"127.0.0.1:{harness.free_port()}", f"127.0.0.1:{port}"], timeout=5) as client,
            closing(client.watch_group("5")) as watch,
        ):
            assert watch.wait(10)

    def test_nobody_there(self) -> None:
        with (
            Client([f"127.0.0.1:{harness.free_port()}"]) as client,
            closing(client.watch_group("5")) as watch,
        ):
            assert not watch.is_open


class TestWaiting:
    """``wait_for``: our server's extension, ``packets.LISTEN``."""

    @pytest.mark.parametrize("outcome", [reverse, fail])
    def test_until_the_end(
        self, server: harness.GearmanServerProcess, client: Client, outcome: WorkerFunction
    ) -> None:
        def work(job: AssignedJob) -> bytes:
            with closing(Connection("127.0.0.1", server.port)) as asking:
                harness.wait_until(lambda: count_waiting(asking, b"heard of") == 1)
            return outcome(job)

        with harness.worker_thread({"heard of": work}, server):
            handle = client.do_background("heard of", unique="heard of")
            assert client.wait_for(handle, timeout=10) is True
        assert client.wait_for(handle, timeout=10) is False

    @harness.tried_again
    def test_time_out(self, client: Client) -> None:
        handle = client.do_background("nobody's")
        with pytest.raises(ResponseTimeout, match="job H:"):
            client.wait_for(handle, timeout=0.05)
        assert client.job_status(handle).known, "the job goes on"

    def test_a_server_of_others(self) -> None:
        """gearmand's answer; it is not asked again."""
        script = play(
            P.OPTION_REQ, (P.OPTION_RES, b"exceptions"), P.OPTION_REQ, (P.ERROR, b"UNKNOWN_OPTION", b"")
        )
        with fake_server(script) as port, Client([f"127.0.0.1:{port}"], timeout=30) as client:
            assert client.wait_for("H:1", timeout=30) is False
            assert client.wait_for("H:1", timeout=30) is False


class TestFaults:
    @pytest.mark.parametrize(
        ("script", "error", "message"),
        [
            pytest.param(play(P.SUBMIT_JOB), ConnectionLost, "closed it", id="closes after the submission"),
            pytest.param(play(P.SUBMIT_JOB, TAKEN), ConnectionLost, "broke", id="closes after the answer"),
            pytest.param(play(), ConnectionLost, "broke", id="closes at once"),
            pytest.param(
                play(b"HTTP/1.1 400 Bad Request\r\n", None), ConnectionLost, "speaks no Gearman", id="HTTP"
            ),
            pytest.param(
                play(b"\0RES\0\0\0\xff\0\0\0\0", None), ConnectionLost, "speaks no Gearman", id="no type"
            ),
            pytest.param(
                play(b"\0RES\0\0\0\x08\xff\xff\xff\xff", None),
                ResultTooLarge,
                "more bytes than max_packet=67108864; raise",
                id="4 GiB",
            ),
            pytest.param(
                play(b"\0REQ\0\0\0\x08\0\0\0\x03H:1", None), ConnectionLost, "no Gearman", id="a request"
            ),
            pytest.param(
                play(b"\0RES\0\0\0\x13\0\0\0\0", None), ConnectionLost, "no Gearman", id="too short"
            ),
            pytest.param(play((P.NO_JOB,), None), ConnectionLost, "another answer", id="another answer"),
            pytest.param(
                play(P.SUBMIT_JOB, (P.ERROR, b"FULL", b"come back later"), None),
                ServerError,
                "FULL: come back",
                id="ERROR",
            ),
            pytest.param(
                play(P.SUBMIT_JOB, TAKEN, (P.WORK_FAIL, b"H:1\0"), None), JobFailed, "failed", id="fails"
            ),
        ],
    )
    def test_do(self, script: Any, error: type[GearmanError], message: str) -> None:
        with (
            fake_server(script) as port,
            Client([f"127.0.0.1:{port}"], timeout=30) as client,
            pytest.raises(error, match=message),
        ):
            client.do("f", b"w", timeout=30)

    @pytest.mark.parametrize("first", [play(P.SUBMIT_JOB_BG), play(b"nonsense\n", None), play()])
    def test_the_next_call_gets_a_new_connection(self, first: Any) -> None:
        with (
            fake_server(first, play(P.SUBMIT_JOB_BG, TAKEN, None)) as port,
            Client([f"127.0.0.1:{port}"], timeout=30) as client,
        ):
            with pytest.raises(ConnectionLost):
                client.do_background("f")
            assert client.do_background("f") == "H:1"

    def test_a_job_is_not_submitted_twice_by_itself(self) -> None:
        seen: list[bytes] = []

        def script(peer: Peer) -> None:
            seen.append(peer.expect(P.SUBMIT_JOB_BG)[2])

        with (
            fake_server(script, script) as port,
            Client([f"127.0.0.1:{port}"]) as client,
            pytest.raises(ConnectionLost),
        ):
            client.do_background("f", b"once")
        assert seen == [b"once"]

    def test_a_server_that_knows_no_exceptions(self) -> None:
        """An old gearmand refuses the option; nobody minds."""

        def script(peer: Peer) -> None:
            peer.expect(P.OPTION_REQ)
            peer.send(P.ERROR, b"UNKNOWN_OPTION", b"")
            peer.expect(P.ECHO_REQ)
            peer.send(P.ECHO_RES, b"x")
            peer.wait_for_end()

        with fake_server(script) as port, Client([f"127.0.0.1:{port}"]) as client:
            assert client.echo(b"x") == b"x"

    def test_a_progress_that_is_no_number(self) -> None:
        script = play(P.GET_STATUS, (P.STATUS_RES, b"H:1", b"1", b"1", b"half", b"1"), None)
        with (
            fake_server(script) as port,
            Client([f"127.0.0.1:{port}"], timeout=30) as client,
            pytest.raises(ConnectionLost, match="no numbers"),
        ):
            client.job_status("H:1")

    def test_a_handle_that_is_no_text(self) -> None:
        with (
            fake_server(play(P.SUBMIT_JOB_BG, (P.JOB_CREATED, b"H:\xff"), None)) as port,
            Client([f"127.0.0.1:{port}"], timeout=30) as client,
        ):
            assert client.do_background("f") == "H:\ufffd"

    def test_nobody_listens(self) -> None:
        address = f"127.0.0.1:{harness.free_port()}"
        with pytest.raises(
            ConnectionFailed, match=f"no job server answers at {address} .*refused.*gearman_server"
        ):
            Client([address]).do_background("f")

    def test_the_second_server_helps(self, server: harness.GearmanServerProcess) -> None:
        down = f"127.0.0.1:{harness.free_port()}"
        with Client([down, server.address]) as client:
            assert client.echo(b"x") == b"x"
        with pytest.raises(ConnectionFailed, match=down):
            Client([down]).echo(b"x")


class TestConnections:
    def test_a_server_that_never_stops_talking(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What it says is read for a moment only, and the next call has another connection."""
        monkeypatch.setattr(connection_module, "_CHUNK", 100)

        def talk(peer: Peer) -> None:
            peer.expect(P.ECHO_REQ)
            peer.send(P.ECHO_RES, b"1")
            peer.socket.sendall(encode_response(P.NOOP, b"") * 1000)
            peer.wait_for_end()

        with (
            fake_server(talk, play(P.ECHO_REQ, (P.ECHO_RES, b"2"), None)) as port,
            Client([f"127.0.0.1:{port}"], timeout=30) as client,
        ):
            assert client.echo(b"1") == b"1"
            ((session,),) = client._idle.values()
            came = session.connection._socket
            harness.wait_until(lambda: len(came.recv(2000, socket.MSG_PEEK)) == 2000)
            assert client.echo(b"2") == b"2"

    def test_much_is_received_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        noop = encode_response(P.NOOP, b"")
        monkeypatch.setattr(connection_module, "_CHUNK", len(noop))
        with (
            fake_server(play(noop * 20, None)) as port,
            closing(Connection("127.0.0.1", port, connect_timeout=30)) as connection,
        ):
            came = connection._socket
            harness.wait_until(lambda: len(came.recv(1000, socket.MSG_PEEK)) == 20 * len(noop))
            assert not connection.fill()
            assert len(list(iter(connection.take, None))) == 16
            assert connection.fill()
            assert len(list(iter(connection.take, None))) == 4

    def test_reopened_after_a_restart(self) -> None:
        with harness.server(store="memory") as process, Client([process.address], timeout=10) as client:
            assert client.echo(b"1") == b"1"
            process.kill()
            with pytest.raises(GearmanError):
                client.echo(b"2")
            process.start()
            assert client.echo(b"3") == b"3"
            process.restart()
            assert client.echo(b"4") == b"4"

    def test_one_for_each_thread(self, server: harness.GearmanServerProcess) -> None:
        client = Client([server.address], timeout=10)
        together = threading.Barrier(4)

        def call(number: int) -> bool:
            together.wait(30)
            try:
                return all(
                    client.echo(b"%d.%d" % (number, each)) == b"%d.%d" % (number, each) for each in range(200)
                )
            finally:
                client.close()

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(call, range(4)))

    @pytest.mark.usefixtures("worker")
    def test_a_unique_is_shared_by_threads(self, server: harness.GearmanServerProcess) -> None:
        runs: list[bytes] = []
        go_on = threading.Event()

        def work(job: AssignedJob) -> bytes:
            runs.append(job.workload)
            go_on.wait(20)
            return b"for all"

        client = Client([server.address], timeout=10)

        def call(number: int) -> bytes:
            with closing(client):
                return client.do("shared", b"%d" % number, unique="one", timeout=20)

        with harness.worker_thread({"shared": work}, server), ThreadPoolExecutor(3) as pool:
            results = [pool.submit(call, number) for number in range(3)]
            try:
                # All three wait, whichever of them was first.
                with closing(Connection("127.0.0.1", server.port)) as asking:
                    harness.wait_until(lambda: count_waiting(asking, b"one") == 3)
            finally:
                go_on.set()
            assert {result.result(20) for result in results} == {b"for all"}
        assert len(runs) == 1

    def test_threads_leave_theirs_to_the_next(self, server: harness.GearmanServerProcess) -> None:
        with Client([server.address], timeout=10) as client:
            before = count_clients(server)
            for _ in range(3):
                thread = threading.Thread(target=client.echo, args=(b"x",))
                thread.start()
                thread.join()
            assert count_clients(server) == before + 1
        harness.wait_until(lambda: count_clients(server) == before)

    def test_so_many_are_kept_at_the_most(
        self, server: harness.GearmanServerProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("django_gearman.client.sync.MAX_IDLE", 2)
        together = threading.Barrier(4)
        with Client([server.address], timeout=10) as client, ThreadPoolExecutor(4) as pool:
            before = count_clients(server)

            def call(number: int) -> None:
                with client._session([server.address]):
                    together.wait(30)

            list(pool.map(call, range(4)))
            harness.wait_until(lambda: count_clients(server) == before + 2)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="wants fork")
    def test_forked_children_have_their_own(self, client: Client) -> None:
        """As under a preloading web server: no answer goes to another process."""
        assert client.echo(b"parent") == b"parent"
        children = []
        for child in range(4):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    if all(
                        client.echo(b"%d.%d" % (child, call)) == b"%d.%d" % (child, call)
                        for call in range(200)
                    ):
                        status = 0
                finally:
                    os._exit(status)
            children.append(pid)
        assert all(client.echo(b"parent %d" % call) == b"parent %d" % call for call in range(200))
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
        assert client.echo(b"parent") == b"parent"

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="wants fork")
    def test_forked_children_keep_none_open(self, server: harness.GearmanServerProcess) -> None:
        """A job that the parent abandons is dropped, though a child goes on."""
        client = Client([server.address], timeout=10)
        before = count_clients(server)
        client.echo(b"x")
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
        os.close(read)
        try:
            client.close()
            harness.wait_until(lambda: count_clients(server) == before)
        finally:
            os.close(write)
            os.waitpid(pid, 0)

    def test_close_and_use_again(self, client: Client) -> None:
        client.echo(b"x")
        client.close()
        client.close()
        assert client.echo(b"x") == b"x"


def count_waiting(connection: Connection, unique: bytes) -> int:
    """Clients that wait for the job of this unique."""
    connection.send(encode_request(P.GET_STATUS_UNIQUE, unique))
    kind, numbers = connection.receive(time.monotonic() + 10)
    assert kind == P.STATUS_RES_UNIQUE
    return int(numbers[-1])


def count_clients(server: harness.GearmanServerProcess) -> int:
    """Connections that offer no function, but for the one that asks."""
    return sum(line.rstrip().endswith(":") for line in server.ask("workers").splitlines()) - 1


class TestClaim:
    """Telling a server of new rows never fails and never takes long."""

    def test_told(self) -> None:
        seen: list[list[bytes]] = []
        with (
            fake_server(lambda peer: seen.append(peer.expect(P.SUBMIT_JOB_BG))) as port,
            Client([f"127.0.0.1:{port}"]) as client,
        ):
            assert client.claim() is True
            harness.wait_until(lambda: seen)
        assert seen == [[CLAIM, b"", b""]]

    def test_server_of_others_is_told_once(self, caplog: pytest.LogCaptureFixture) -> None:
        """gearmand keeps it as a job; there should not be one for each row."""
        told: list[list[bytes]] = []

        def gearmand(peer: Peer) -> None:
            told.append(peer.expect(P.SUBMIT_JOB_BG))
            peer.send(P.JOB_CREATED, b"H:host:1")
            peer.expect(P.ECHO_REQ)
            peer.send(P.ECHO_RES, b"x")
            peer.wait_for_end()

        with fake_server(gearmand) as port, Client([f"127.0.0.1:{port}"], timeout=1) as client:
            assert client.claim() is True
            assert client.echo(b"x") == b"x"
            assert [client.claim() for _ in range(10)] == [False] * 10
        assert told == [[CLAIM, b"", b""]]
        assert caplog.text.count("does not look into the database") == 1

    def test_other_calls_follow(self, client: Client) -> None:
        for _ in range(10):
            assert client.claim() is True
        assert client.echo(b"x") == b"x"
        assert client.do_background("nobody serves this").startswith("H:")

    def test_many(self, client: Client) -> None:
        """Nobody reads the answers meanwhile, and they do not stop anything."""
        assert all(client.claim() for _ in range(20_000))
        assert client.echo(b"x") == b"x"

    def test_nobody_listens(self) -> None:
        client = Client([f"127.0.0.1:{harness.free_port()}"])
        started = time.monotonic()
        assert [client.claim() for _ in range(1000)] == [False] * 1000
        # To wait at each, as for a server that drops packets, would take minutes.
        assert time.monotonic() - started < 1000 * NUDGE_TIMEOUT / 8

    def test_a_server_that_takes_no_connection(self) -> None:
        """Its queue of connections is full, as when it hangs: packets are dropped."""
        with socket.socket() as listener, socket.socket() as one, socket.socket() as two:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            for sock in (one, two):
                sock.setblocking(False)
                sock.connect_ex(listener.getsockname())
            client = Client([f"127.0.0.1:{listener.getsockname()[1]}"])
            started = time.monotonic()
            answers = [client.claim() for _ in range(100)]
            # One has waited, if any.
            assert time.monotonic() - started < 100 * NUDGE_TIMEOUT / 2
            assert answers[-1] is False

    def test_a_server_that_is_slow_to_take_connections(self) -> None:
        """A nudge does not wait for it; that keeps nobody from waiting who has the time."""
        with socket.socket() as listener, socket.socket() as one, socket.socket() as two:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            for sock in (one, two):
                sock.setblocking(False)
                sock.connect_ex(listener.getsockname())
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            with Client([address], connect_timeout=0.5) as client:
                assert client.claim() is False
                began = time.monotonic()
                with pytest.raises(ConnectionFailed, match="timed out"):
                    client.echo(b"x")
                assert time.monotonic() - began > 0.4

    @pytest.mark.parametrize(
        "script", [play(), play(b"HTTP/1.1 400\r\n"), play(None), play((P.NO_JOB,), None)]
    )
    def test_a_server_that_speaks_nonsense(self, script: Any) -> None:
        with fake_server(*[script] * 20) as port, Client([f"127.0.0.1:{port}"], timeout=0.1) as client:
            for _ in range(10):
                assert client.claim() in (True, False)

    def test_a_server_that_does_not_read(self) -> None:
        """Even on the connection that a foreground job opened before."""
        stop = threading.Event()

        def script(peer: Peer) -> None:
            peer.expect(P.ECHO_REQ)
            peer.send(P.ECHO_RES, b"x")
            stop.wait(60)

        with fake_server(script, script) as port:
            client = Client([f"127.0.0.1:{port}"], timeout=30)
            try:
                client.echo(b"x")
                connection = client._idle[f"127.0.0.1:{port}"][0].connection
                # Fill what the kernels take.
                connection._socket.setblocking(False)
                while select.select([], [connection], [], 0.3)[1]:
                    connection._socket.send(bytes(65536))
                started = time.monotonic()
                assert client.claim() is False
                assert time.monotonic() - started < 25
            finally:
                stop.set()
                client.close()

    def test_what_follows_has_its_usual_time(self) -> None:
        """The haste of a nudge is not that of a large job after it on the same connection."""

        def script(peer: Peer) -> None:
            assert peer.expect(P.SUBMIT_JOB_BG)[0] == CLAIM
            peer.send(*TAKEN)
            time.sleep(0.5)  # slow, not dead
            peer.expect(P.SUBMIT_JOB_BG)
            peer.send(P.JOB_CREATED, b"H:2")
            peer.wait_for_end()

        with fake_server(script) as port, Client([f"127.0.0.1:{port}"], timeout=20) as client:
            assert client.claim() is True
            assert client.do_background("f", bytes(20_000_000)) == "H:2"
