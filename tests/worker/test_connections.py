"""``Worker``: servers that go, that come back, and that say nothing any more."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from time import monotonic
from typing import Any

import pytest

from django_gearman.client.connection import Connection
from django_gearman.client.sync import Client
from django_gearman.exceptions import ConnectionFailed
from django_gearman.protocol.packets import ATTEMPTS, WAITS, PacketType, encode_request
from django_gearman.worker import loop
from django_gearman.worker.loop import AssignedJob
from tests import harness
from tests.client.fake_server import Peer, fake_server

P = PacketType


def reverse(job: AssignedJob) -> bytes:
    return job.workload[::-1]


class Proxy:
    """A way to a server that can become a black hole: connections stay, and nothing comes through."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self.swallows = False
        """Whether connections that are there now carry nothing more."""
        self._wake = socket.socketpair()
        self._is_ending = False
        self._dead: set[socket.socket] = set()
        self.taken = 0
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def swallow(self) -> None:
        """From now on nothing comes through what is connected; nor through what connects later."""
        self.swallows = True

    def heal(self) -> None:
        """New connections work; the old ones stay dead."""
        self._dead |= {sock for pair in self._pairs for sock in pair}
        self.swallows = False
        self._wake[1].send(b"x")

    def _serve(self) -> None:
        while not self._is_ending:
            ends = {one: other for pair in self._pairs for one, other in (pair, pair[::-1])}
            watched = [self._listener, self._wake[0]]
            watched += [] if self.swallows else [end for end in ends if end not in self._dead]
            for ready in select.select(watched, [], [], 0.05)[0]:
                if ready is self._listener:
                    near, _ = self._listener.accept()
                    self.taken += 1
                    self._pairs.append((near, socket.create_connection(("127.0.0.1", self._target))))
                elif ready is self._wake[0]:
                    ready.recv(100)
                elif not self.swallows:
                    with suppress(OSError):
                        data = ready.recv(65536)
                        if data:
                            ends[ready].sendall(data)
                            continue
                    self._pairs = [pair for pair in self._pairs if ready not in pair]
                    for end in (ready, ends[ready]):
                        end.close()
                    break

    def close(self) -> None:
        self._is_ending = True
        self._thread.join()
        for sock in (self._listener, *self._wake, *(sock for pair in self._pairs for sock in pair)):
            sock.close()


@contextmanager
def proxy(port: int) -> Iterator[Proxy]:
    made = Proxy(port)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def server() -> Iterator[harness.GearmanServerProcess]:
    with harness.server(store="memory") as process:
        yield process


class TestSilence:
    def test_silent_server_does_not_delay_the_others(
        self, server: harness.GearmanServerProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Longer than the calls may take: to wait for it once is to fail.
        monkeypatch.setattr(loop, "ANSWER_LIMIT", 60.0)
        with (
            harness.server(store="memory") as other,
            proxy(other.port) as hole,
            harness.worker_thread({"reverse": reverse}, hole.port, server),
            Client([server.address], timeout=30) as client,
        ):
            harness.wait_until(lambda: other.status().get("reverse") == (0, 0, 1))
            hole.swallow()
            until = time.monotonic() + 3
            while time.monotonic() < until:
                assert client.do("reverse", b"ab", timeout=30) == b"ba"

    def test_server_that_hangs_when_asked(
        self, server: harness.GearmanServerProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It has granted all and answers no more: its place is another's after a second."""
        monkeypatch.setattr(loop, "ANSWER_LIMIT", 60.0)

        def hung(peer: Peer) -> None:
            peer.wait_for_end()

        with (
            fake_server(*[hung] * 30) as port,
            harness.worker_thread({"reverse": reverse}, port, server),
            Client([server.address], timeout=30) as client,
        ):
            for _ in range(30):
                assert client.do("reverse", b"ab", timeout=30) == b"ba"

    def test_connection_that_is_open_at_our_end_alone(
        self, server: harness.GearmanServerProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loop, "RECHECK", 0.2)
        monkeypatch.setattr(loop, "ANSWER_LIMIT", 0.3)
        with (
            proxy(server.port) as hole,
            harness.worker_thread({"half": reverse}, hole.port),
            Client([server.address], timeout=20) as client,
        ):
            assert client.do("half", b"ab", timeout=30) == b"ba"
            hole.swallow()
            hole.heal()

            def check() -> None:
                assert client.do("half", b"cd", timeout=30) == b"dc"

            # It may give up a server that is only slow, and its job with it.
            harness.in_one_try(check)
            assert hole.taken >= 2

    def test_while_all_places_are_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is to be asked for, so it asks whether anybody is there."""
        monkeypatch.setattr(loop, "DELIVERY_LIMIT", 0.1)
        monkeypatch.setattr(loop, "RECHECK", 0.1)
        monkeypatch.setattr(loop, "ANSWER_LIMIT", 0.3)
        resumed: list[bytes] = []
        done = threading.Event()

        def first(peer: Peer) -> None:
            peer.expect(P.SET_CLIENT_ID)
            peer.expect(P.CAN_DO)
            for handle in (b"H:1", b"H:2"):
                peer.expect(P.GRAB_JOB_UNIQ)
                peer.send(P.JOB_ASSIGN_UNIQ, handle, b"wait", b"", b"")
            peer.expect(P.ECHO_REQ)
            # And no answer.
            peer.wait_for_end()

        def second(peer: Peer) -> None:
            peer.expect(P.SET_CLIENT_ID)
            assert peer.expect(P.OPTION_REQ) == [ATTEMPTS]
            peer.expect(P.CAN_DO)
            resumed.extend(peer.expect(P.OPTION_REQ) + peer.expect(P.OPTION_REQ))
            done.set()
            while len(resumed) < 4:
                kind, arguments = peer.receive()
                if kind == P.WORK_COMPLETE:
                    resumed.append(arguments[0])
            peer.wait_for_end()

        def wait(job: AssignedJob) -> bytes:
            assert done.wait(30)
            return b""

        with (
            fake_server(first, second) as port,
            harness.worker_thread({"wait": wait}, port, threads=2, retry=lambda job, error: None),
        ):
            harness.wait_until(lambda: len(resumed) == 4)
        assert resumed[:2] == [b"resume 1 H:1", b"resume 1 H:2"]
        assert sorted(resumed[2:]) == [b"H:1", b"H:2"]


class TestWords:
    """Each reason why a server is out of reach is told once."""

    def test_server_that_went_and_does_not_come_back(self, caplog: pytest.LogCaptureFixture) -> None:
        def told() -> list[str]:
            return [line for line in caplog.messages if "Trying until one does" in line]

        with (
            harness.server(store="memory") as server,
            harness.worker_thread({"reverse": reverse}, server) as worker,
        ):
            harness.wait_until(lambda: server.status().get("reverse") == (0, 0, 1))
            server.stop()
            harness.wait_until(lambda: bool(told()), what="a word on why it cannot be reached")
            assert "connecting again" in caplog.text
            (link,) = worker._links
            harness.wait_until(lambda: link._pause >= 0.8, what="further attempts")
            assert len(told()) == 1

    def test_another_reason(self, caplog: pytest.LogCaptureFixture) -> None:
        options: dict[str, Any] = {"describe": lambda error: b"", "retry": lambda job, error: None}
        worker = loop.Worker({"reverse": reverse}, [("127.0.0.1", 1)], client_id="x", **options)
        (link,) = worker._links
        for reason in ("refused", "refused", "its TLS certificate is not trusted", "refused"):
            link.lost(ConnectionFailed("127.0.0.1:1", reason))
        told = [reason for line in caplog.messages for reason in ("refused", "not trusted") if reason in line]
        assert told == ["refused", "not trusted", "refused"]


class TestDelivery:
    """The result of a job whose server was away when it ended."""

    @pytest.fixture(autouse=True)
    def _events(self) -> None:
        self.begun, self.gone = threading.Event(), threading.Event()

    def reverse(self, job: AssignedJob) -> bytes:
        self.begun.set()
        assert self.gone.wait(30)
        return job.workload[::-1]

    def assign(self, peer: Peer) -> None:
        """Hand the job out, and be gone before it ends."""
        peer.send(P.JOB_ASSIGN_UNIQ, b"H:1", b"reverse", b"", b"ab")
        assert self.begun.wait(30)
        peer.socket.close()
        self.gone.set()

    def test_to_who_takes_it(self, caplog: pytest.LogCaptureFixture) -> None:
        told: list[Any] = []

        def first(peer: Peer) -> None:
            peer.expect(P.SET_CLIENT_ID)
            peer.expect(P.CAN_DO)
            peer.expect(P.GRAB_JOB_UNIQ)
            peer.send(P.OPTION_RES, b"attempt 2 0")
            self.assign(peer)

        def second(peer: Peer) -> None:
            peer.expect(P.SET_CLIENT_ID)
            assert peer.expect(P.OPTION_REQ) == [ATTEMPTS]
            peer.send(P.OPTION_RES, ATTEMPTS)
            assert peer.expect(P.OPTION_REQ) == [WAITS]
            peer.expect(P.CAN_DO)
            told.append(peer.expect(P.OPTION_REQ))
            told.append(peer.expect(P.WORK_COMPLETE))
            peer.expect(P.GRAB_JOB_UNIQ)
            peer.send(P.NO_JOB)
            # What has arrived is not told again.
            peer.expect(P.PRE_SLEEP)

        def third(peer: Peer) -> None:
            peer.expect(P.SET_CLIENT_ID)
            peer.expect(P.CAN_DO)
            told.append(peer.expect(P.GRAB_JOB_UNIQ))
            peer.send(P.NO_JOB)
            peer.wait_for_end()

        with (
            caplog.at_level(logging.INFO, "django_gearman"),
            fake_server(first, second, third) as port,
            harness.worker_thread({"reverse": self.reverse}, port, retry=lambda job, error: None) as worker,
        ):
            harness.wait_until(lambda: len(told) == 3)
        assert told[:2] == [[b"resume 2 H:1"], [b"H:1", b"ba"]]
        assert worker.jobs_done == 1

    def test_not_to_a_server_of_another_kind(self, caplog: pytest.LogCaptureFixture) -> None:
        done = threading.Event()

        def first(peer: Peer) -> None:
            assert peer.receive()[0] == P.SET_CLIENT_ID
            assert peer.receive() == (P.OPTION_REQ, [ATTEMPTS])
            peer.send(P.ERROR, b"UNKNOWN_OPTION", b"Server does not recognize given option")
            peer.expect(P.CAN_DO)
            peer.expect(P.GRAB_JOB_UNIQ)
            self.assign(peer)

        def second(peer: Peer) -> None:
            peer.expect(P.SET_CLIENT_ID)
            peer.expect(P.CAN_DO)
            peer.expect(P.GRAB_JOB_UNIQ)
            done.set()
            peer.wait_for_end()

        with (
            fake_server(first, second) as port,
            harness.worker_thread({"reverse": self.reverse}, port, retry=lambda job, error: None),
        ):
            assert done.wait(30)
        assert "it will run again" in caplog.text

    def test_before_the_worker_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told: list[Any] = []
        control_read, control_write = os.pipe()

        def first(peer: Peer) -> None:
            peer.expect(P.SET_CLIENT_ID)
            peer.expect(P.CAN_DO)
            peer.expect(P.GRAB_JOB_UNIQ)
            self.assign(peer)

        def second(peer: Peer) -> None:
            while True:
                kind, arguments = peer.receive()
                if kind == P.WORK_COMPLETE:
                    told.append(arguments)
                elif kind == P.ECHO_REQ:
                    peer.send(P.ECHO_RES, b"")

        def last(job: AssignedJob) -> bytes:
            os.write(control_write, b"x")
            return self.reverse(job)

        with fake_server(first, second) as port:
            worker = loop.Worker(
                {"reverse": last},
                [("127.0.0.1", port)],
                client_id="x",
                describe=lambda error: b"",
                retry=lambda job, error: None,
            )
            worker.run(control_read)
            assert told == [[b"H:1", b"ba"]]
        for descriptor in (control_read, control_write):
            os.close(descriptor)


def test_no_job_for_a_process_that_is_gone() -> None:
    """A submission is read before the end of the worker that waits: the job is for whoever comes next."""
    with (
        harness.server(store="memory") as server,
        closing(Connection("127.0.0.1", server.port)) as client,
        closing(Connection("127.0.0.1", server.port)) as waiting,
        closing(Connection("127.0.0.1", server.port)) as other,
    ):
        for option in (ATTEMPTS, WAITS):
            waiting.send(encode_request(P.OPTION_REQ, option))
        waiting.send(encode_request(P.CAN_DO, b"f") + encode_request(P.GRAB_JOB_UNIQ))
        while waiting.receive(monotonic() + 30)[0] != P.NO_JOB:
            pass
        server.signal(signal.SIGSTOP)
        client.send(encode_request(P.SUBMIT_JOB_BG, b"f", b"", b"x"))
        waiting.close()
        server.signal(signal.SIGCONT)
        assert client.receive(monotonic() + 30)[0] == P.JOB_CREATED
        other.send(encode_request(P.OPTION_REQ, ATTEMPTS) + encode_request(P.CAN_DO, b"f"))
        other.send(encode_request(P.GRAB_JOB_UNIQ))
        assert other.receive(monotonic() + 30) == (P.OPTION_RES, [ATTEMPTS])
        # Without a word before it: this is the first attempt.
        assert other.receive(monotonic() + 30)[0] == P.JOB_ASSIGN_UNIQ
