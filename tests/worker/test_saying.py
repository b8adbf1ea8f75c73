"""What functions say while they run: data, warnings, progress, from each kind of pool."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import pytest

from django_gearman.client.sync import Client
from django_gearman.client.tasks import Data, Progress, Value, Warned
from django_gearman.exceptions import JobTimedOut
from django_gearman.protocol.packets import PacketType
from django_gearman.worker import link, loop
from django_gearman.worker.loop import AssignedJob, Worker
from tests import harness
from tests.client.fake_server import Peer, fake_server

P = PacketType
Function = Callable[[AssignedJob], bytes]

POOLS = ("main", "threads", "tasks")


@pytest.fixture(scope="module")
def server() -> Iterator[harness.GearmanServerProcess]:
    with harness.server(store="memory") as process:
        yield process


@contextlib.contextmanager
def pool(kind: str, function: Function, port: int, **options: Any) -> Iterator[Worker]:
    """A worker that runs a function "say" in a pool of some kind."""

    async def task(job: AssignedJob) -> bytes:
        return function(job)

    if kind == "tasks":
        options |= {"tasks": {"say": task}, "concurrency": 2}
    if kind == "threads":
        options["threads"] = 2
    with harness.worker_thread({} if kind == "tasks" else {"say": function}, port, **options) as worker:
        yield worker


def hand_out(
    peer: Peer,
    handle: bytes,
    workload: bytes = b"",
    *,
    greeted: threading.Event | None = None,
    after: threading.Event | None = None,
) -> None:
    """Take a worker's introduction, which sets ``greeted``, and give it a job, ``after`` something else."""
    peer.expect(P.SET_CLIENT_ID)
    peer.expect(P.CAN_DO)
    if greeted is not None:
        greeted.set()
    peer.expect(P.GRAB_JOB_UNIQ)
    if after is not None:
        assert after.wait(30)
    peer.send(P.JOB_ASSIGN_UNIQ, handle, b"say", b"", workload)


def receive(peer: Peer) -> tuple[PacketType, list[bytes]]:
    """The next packet that is about a job."""
    while True:
        kind, arguments = peer.receive()
        if kind == P.GRAB_JOB_UNIQ:
            peer.send(P.NO_JOB)
        elif kind == P.ECHO_REQ:
            peer.send(P.ECHO_RES, arguments[0])
        elif kind != P.PRE_SLEEP:
            return kind, arguments


def answer_until_end(peer: Peer) -> None:
    while True:
        receive(peer)


@pytest.mark.parametrize("kind", POOLS)
def test_all_of_it_arrives_in_order_and_in_the_same_parts(
    server: harness.GearmanServerProcess, kind: str
) -> None:
    sizes = [0, 1, 100, 70_000, 3, 300_000, 2] + [number % 50 for number in range(3000)]

    def say(job: AssignedJob) -> bytes:
        for number, size in enumerate(sizes):
            job.send_data(b"%d:" % number + bytes(size))
            if number % 10 == 0:
                job.send_warning(b"%d" % number)
            if number % 100 == 0:
                job.send_status(number, len(sizes))
        return b"end"

    expected: list[Any] = []
    for number, size in enumerate(sizes):
        expected.append((Data, b"%d:" % number + bytes(size)))
        if number % 10 == 0:
            expected.append((Warned, b"%d" % number))
        if number % 100 == 0:
            expected.append((Progress, number))
    with pool(kind, say, server.port), Client([server.address], timeout=20) as client:
        heard: list[Any] = []
        for part in client.stream("say", b""):
            match part:
                case Progress():
                    heard.append((Progress, part.numerator))
                case Value():
                    heard.append((Value, part.value))
                case _:
                    heard.append((type(part), part.data))
    assert heard == [*expected, (Value, b"end")]


@pytest.mark.parametrize("kind", [*POOLS, "beside main"])
def test_the_last_word_does_not_wait_for_another(server: harness.GearmanServerProcess, kind: str) -> None:
    heard = threading.Event()

    def say(job: AssignedJob) -> bytes:
        def speak() -> None:
            for number in range(5):
                job.send_data(b"%d" % number)

        if kind == "beside main":
            thread = threading.Thread(target=speak)
            thread.start()
            thread.join()
        else:
            speak()
        return b"%d" % heard.wait(20)

    with pool(kind, say, server.port), Client([server.address], timeout=30) as client:
        parts = []
        for part in client.stream("say", b""):
            parts.append(part)
            if len(parts) == 5:
                heard.set()
    assert parts[-1] == Value(b"1")


@pytest.mark.parametrize("kind", POOLS)
def test_a_call_costs_no_more_than_a_few_system_calls_that_wake_nobody(kind: str) -> None:
    count = 20_000
    parts = 10
    spent: list[float] = []

    def say(job: AssignedJob) -> bytes:
        for _ in range(parts):
            began = time.thread_time()
            for _ in range(count // parts):
                job.send_data(b"some data")
            spent.append(time.thread_time() - began)
        return b""

    def hear(peer: Peer) -> None:
        hand_out(peer, b"H:x:1")
        answer_until_end(peer)

    with fake_server(hear) as port, pool(kind, say, port):
        harness.wait_until(lambda: len(spent) == parts)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as ours,
    ):
        theirs, _ = listener.accept()
        with theirs:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 1024 * 1024)
            ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            began = time.thread_time()
            for _ in range(count // parts):
                ours.send(b"some data")
            one_by_one = time.thread_time() - began
    # The caches are others' too: not each part has the processor for itself.
    assert median(spent) < 2.5 * one_by_one


@pytest.mark.parametrize("kind", POOLS)
def test_who_says_more_than_the_server_takes_waits(kind: str) -> None:
    """It goes on when the server does; what it said meanwhile is bounded."""
    said: list[int] = []
    go_on = threading.Event()
    size = 100_000
    count = 400

    def say(job: AssignedJob) -> bytes:
        for number in range(count):
            job.send_data(bytes(size))
            said.append(number)
        return b""

    def hear(peer: Peer) -> None:
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        hand_out(peer, b"H:x:1")
        go_on.wait(20)
        for _ in range(count):
            assert receive(peer) == (P.WORK_DATA, [b"H:x:1", bytes(size)])
        assert receive(peer)[0] == P.WORK_COMPLETE
        answer_until_end(peer)

    def has_stopped() -> bool:
        before = len(said)
        time.sleep(0.1)  # nothing happens, and that is what is waited for
        return 0 < before == len(said)

    with fake_server(hear) as port, pool(kind, say, port):
        harness.wait_until(has_stopped)
        assert len(said) < count
        go_on.set()
        harness.wait_until(lambda: len(said) == count)


@pytest.mark.parametrize("kind", POOLS)
def test_server_that_takes_nothing_is_given_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "SEND_LIMIT", 0.3)
    monkeypatch.setattr(loop, "DELIVERY_LIMIT", 0.0)
    done = threading.Event()

    def say(job: AssignedJob) -> bytes:
        for _ in range(400):
            job.send_data(bytes(100_000))
        done.set()
        return b""

    def hear(peer: Peer) -> None:
        hand_out(peer, b"H:x:1")
        assert done.wait(30)

    with fake_server(hear) as port, pool(kind, say, port):
        assert done.wait(30)


def test_who_waits_for_the_server_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "DELIVERY_LIMIT", 0.0)
    ended: list[BaseException] = []

    def say(job: AssignedJob) -> bytes:
        try:
            while True:
                job.send_data(bytes(100_000))
        except JobTimedOut as error:
            ended.append(error)
            raise

    def hear(peer: Peer) -> None:
        hand_out(peer, b"H:x:1")
        harness.wait_until(lambda: ended)

    with fake_server(hear) as port, pool("threads", say, port, limits={"say": 0.5}):
        harness.wait_until(lambda: ended)


def test_result_that_is_slow_to_leave_does_not_wait_for_the_next_job() -> None:
    """A job of another server keeps the worker's own thread busy; the result leaves all the same."""
    begun, arrived, greeted = threading.Event(), threading.Event(), threading.Event()

    def say(job: AssignedJob) -> bytes:
        if job.workload == b"large":
            return bytes(30_000_000)
        begun.set()
        return b"%d" % arrived.wait(30)

    def slow(peer: Peer) -> None:
        # Asked again, it would not answer: the other is to be there by then.
        hand_out(peer, b"H:x:1", b"large", after=greeted)
        assert begun.wait(30)
        assert len(receive(peer)[1][1]) == 30_000_000
        arrived.set()
        answer_until_end(peer)

    def other(peer: Peer) -> None:
        hand_out(peer, b"H:y:1", b"small", greeted=greeted)
        assert receive(peer) == (P.WORK_COMPLETE, [b"H:y:1", b"1"])
        answer_until_end(peer)

    with (
        fake_server(slow) as first,
        fake_server(other) as second,
        harness.worker_thread({"say": say}, first, second),
    ):
        assert arrived.wait(30)
