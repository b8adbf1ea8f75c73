"""TLS with certificates on both ends: the files, the door, the two ends, and all of it in Django."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import select
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
from django.core.exceptions import ImproperlyConfigured
from django.core.management import CommandError, call_command

from django_gearman import conf
from django_gearman.client import connection as connection_module
from django_gearman.client.admin_client import AdminClient
from django_gearman.client.aio import AsyncClient
from django_gearman.client.connection import Connection
from django_gearman.client.sync import Client
from django_gearman.exceptions import ConnectionFailed, ConnectionLost
from django_gearman.protocol.packets import RESPONSE, PacketType, encode_request, encode_response
from django_gearman.protocol.reader import PacketReader
from django_gearman.server import door
from django_gearman.server import transport as transport_module
from django_gearman.server.connection import Connection as ServerConnection
from django_gearman.server.connection import TransportLimits
from django_gearman.server.core import JobServer
from django_gearman.server.options import ServerOptions
from django_gearman.server.transport import GearmanServer, bind
from django_gearman.submission import client_for
from django_gearman.tls import TLSFilesError, client_context, server_context
from django_gearman.worker.loop import AssignedJob
from tests import harness, needs
from tests.app import jobs
from tests.client.fake_server import Peer, fake_server

P = PacketType
LARGE = 8 * 1024 * 1024
LIMIT = 60.0
"""Seconds after which a condition that should come is given up."""


class Files:
    """Certificates of a CA, ``NAME.pem`` and ``NAME.key``, and what contexts they make."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        now = datetime.now(UTC)
        ca, stranger = trustme.CA(), trustme.CA()
        ca.cert_pem.write_to_path(self["ca.pem"])
        stranger.cert_pem.write_to_path(self["stranger.pem"])
        self._write("good", ca.issue_cert("127.0.0.1", "localhost"))
        self._write("other", ca.issue_cert("127.0.0.1"))
        self._write("elsewhere", ca.issue_cert("jobs.example.org", "192.0.2.1"))
        self._write("foreign", stranger.issue_cert("127.0.0.1"))
        self._write(
            "expired",
            ca.issue_cert("127.0.0.1", not_before=now - timedelta(days=9), not_after=now - timedelta(days=2)),
        )
        Path(self["empty.pem"]).write_text("")

    def _write(self, name: str, certificate: trustme.LeafCert) -> None:
        for blob in certificate.cert_chain_pems:
            blob.write_to_path(self[f"{name}.pem"], append=True)
        certificate.private_key_pem.write_to_path(self[f"{name}.key"])

    def __getitem__(self, file: str) -> str:
        return str(self.folder / file)

    def server(self, name: str = "good", ca: str | None = "ca.pem") -> ssl.SSLContext:
        return server_context(self[f"{name}.pem"], self[f"{name}.key"], self[ca] if ca else None)

    def careless_server(self, name: str) -> ssl.SSLContext:
        """A server that does not look at what it shows."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self[f"{name}.pem"], self[f"{name}.key"])
        return context

    def client(self, name: str | None = "good", ca: str = "ca.pem") -> ssl.SSLContext:
        if name is None:
            return client_context(self[ca])
        return client_context(self[ca], self[f"{name}.pem"], self[f"{name}.key"])

    @property
    def settings(self) -> dict[str, str]:
        return {"TLS_CA": self["ca.pem"], "TLS_CERTIFICATE": self["good.pem"], "TLS_KEY": self["good.key"]}


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


class Place:
    """A job server that serves in a thread of its own."""

    def __init__(self, server: GearmanServer, address: tuple[str, int]) -> None:
        self.server = server
        self.address = address
        self.port = address[1]
        self.name = f"127.0.0.1:{self.port}"

    def plain(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=LIMIT)

    def connect(self, context: ssl.SSLContext) -> ssl.SSLSocket:
        return context.wrap_socket(self.plain(), server_hostname="127.0.0.1")

    def client(self, context: ssl.SSLContext | None) -> Client:
        return Client([self.name], tls=context, connect_timeout=LIMIT, timeout=LIMIT)

    def works(self, context: ssl.SSLContext) -> bool:
        with self.client(context) as client:
            return client.echo(b"abc") == b"abc"


@contextmanager
def serving(
    tls: ssl.SSLContext, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None, **limits: Any
) -> Iterator[Place]:
    core = JobServer(ServerOptions(name="test:1", epoch=7))
    server = GearmanServer(core, None, TransportLimits(**limits), tls)
    sockets = bind("127.0.0.1", 0)
    place = Place(server, sockets[0].getsockname())
    ready = threading.Event()
    stopped: list[asyncio.Event] = []
    failures: list[BaseException] = []

    async def serve() -> None:
        stopped.append(asyncio.Event())
        await server.serve(sockets, stopped[0], ready=ready.set)

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                runner.run(serve())
        except BaseException as error:
            failures.append(error)
            ready.set()

    thread = threading.Thread(target=run, name="server")
    thread.start()
    try:
        assert ready.wait(LIMIT)
        yield place
    finally:
        if thread.is_alive():
            # Its loop is closed already where the test has ended it.
            with suppress(RuntimeError):
                server.loop.call_soon_threadsafe(stopped[0].set)
        thread.join(LIMIT)
    assert not thread.is_alive()
    assert not failures, failures


@pytest.fixture(params=["asyncio", "uvloop"])
def loop_factory(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop] | None:
    if request.param == "asyncio":
        return None
    return needs.module("uvloop").new_event_loop


def warnings(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Ours alone: asyncio warns of a slow machine."""
    return [
        record
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name.startswith("django_gearman")
    ]


def narrow(place: Place, files: Files) -> ssl.SSLSocket:
    """A connection of a peer for which the system keeps little."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
    sock.settimeout(LIMIT)
    sock.connect(place.address)
    return files.client().wrap_socket(sock, server_hostname="127.0.0.1")


def read_all(sock: socket.socket) -> bytes:
    """What comes until the other end closes."""
    received = b""
    try:
        while data := sock.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def hear(sock: socket.socket, count: int) -> list[Any]:
    reader = PacketReader(RESPONSE)
    heard: list[Any] = []
    while len(heard) < count:
        packet = reader.take()
        if packet is None:
            data = sock.recv(65536)
            assert data, f"closed after {len(heard)}"
            reader.feed(data)
        else:
            heard.append(packet)
    return heard


class TestFiles:
    """Every mistake is one sentence that names the file."""

    @pytest.mark.parametrize(
        ("certificate", "key", "ca", "message"),
        [
            (
                "none.pem",
                "good.key",
                "ca.pem",
                r"the TLS certificate '.*none.pem' cannot be read: No such file",
            ),
            ("good.pem", "none.key", "ca.pem", r"the TLS key '.*none.key' cannot be read: No such file"),
            (
                "good.pem",
                "good.key",
                "none.pem",
                r"the TLS CA file '.*none.pem' cannot be read: No such file",
            ),
            (
                "good.pem",
                "other.key",
                "ca.pem",
                r"key .*other.key does not belong to the certificate .*good.pem",
            ),
            ("empty.pem", "good.key", "ca.pem", "are no certificate and its key in PEM form"),
            ("good.pem", "empty.pem", "ca.pem", "are no certificate and its key in PEM form"),
            ("good.pem", "good.key", "empty.pem", r"CA file .*empty.pem holds no certificates in PEM form"),
            ("good.pem", "good.key", "other.pem", r"CA file .*other.pem holds no certificate of a CA"),
        ],
    )
    def test_wrong_ones(self, files: Files, certificate: str, key: str, ca: str, message: str) -> None:
        for make in (server_context, lambda *given: client_context(given[2], *given[:2])):
            with pytest.raises(TLSFilesError, match=message):
                make(files[certificate], files[key], files[ca])

    def test_expired_certificate_of_a_server(self, files: Files) -> None:
        with pytest.raises(
            TLSFilesError, match=r"no client would accept .*expired.pem: certificate has expired"
        ):
            files.server("expired")

    def test_key_with_a_pass_phrase_asks_nobody(self, files: Files, tmp_path: Path) -> None:
        from cryptography.hazmat.primitives import serialization

        key = serialization.load_pem_private_key(Path(files["good.key"]).read_bytes(), None)
        locked = tmp_path / "locked.key"
        locked.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"secret"),
            )
        )
        with pytest.raises(TLSFilesError, match="has a pass phrase"):
            server_context(files["good.pem"], str(locked), files["ca.pem"])

    def test_contexts_are_strict(self, files: Files) -> None:
        server, client = files.server(), files.client()
        assert server.verify_mode is client.verify_mode is ssl.CERT_REQUIRED
        assert client.check_hostname
        assert min(server.minimum_version, client.minimum_version) >= ssl.TLSVersion.TLSv1_2
        assert files.server(ca=None).verify_mode is ssl.CERT_NONE


class TestSettings:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"TLS_CERTIFICATE": "a", "TLS_CA": "c"}, "needs both of TLS_CERTIFICATE and TLS_KEY"),
            ({"TLS_KEY": "a"}, "needs both of TLS_CERTIFICATE and TLS_KEY"),
            ({"TLS_CERTIFICATE": "a", "TLS_KEY": "b"}, "TLS_CERTIFICATE but no TLS_CA"),
            ({"TLS_CA": None}, r"\['TLS_CA'\] must be a string"),
        ],
    )
    def test_half_a_configuration_is_refused(
        self, settings: Any, options: dict[str, Any], message: str
    ) -> None:
        settings.GEARMAN = {"default": options}
        with pytest.raises(ImproperlyConfigured, match=message):
            conf.settings_for()

    def test_paths_may_be_paths(self, settings: Any, files: Files) -> None:
        settings.GEARMAN = {"default": {key: Path(file) for key, file in files.settings.items()}}
        options = conf.settings_for()
        assert options.tls_ca == files["ca.pem"]
        assert conf.client_tls(options) is not None

    def test_none_is_plain_text(self) -> None:
        assert conf.client_tls(conf.GearmanSettings()) is None

    def test_missing_file_is_never_plain_text(self, settings: Any) -> None:
        settings.GEARMAN = {"default": {"TLS_CA": "/nowhere/ca.pem"}}
        with pytest.raises(ImproperlyConfigured, match=r"'/nowhere/ca.pem' cannot be read"):
            conf.client_tls(conf.settings_for())
        with pytest.raises(ImproperlyConfigured, match=r"'/nowhere/ca.pem' cannot be read"):
            jobs.shout.run(b"")


class TestDoor:
    """The port speaks TLS alone, and those that cannot cost little."""

    def test_work(self, files: Files, loop_factory: Any) -> None:
        with serving(files.server(), loop_factory) as place:
            assert place.works(files.client())
            assert place.works(files.client("other"))

    @pytest.mark.parametrize("said", [b"status\n", encode_request(P.ECHO_REQ, b"x"), b"\0" * 500])
    def test_plain_text_is_closed_and_told(
        self, files: Files, loop_factory: Any, said: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        with serving(files.server(), loop_factory) as place:
            with place.plain() as sock:
                sock.sendall(said)
                assert not read_all(sock).startswith(b"\0RES")
            harness.wait_until(lambda: "127.0.0.1 refused: it speaks no TLS" in caplog.text)
            assert place.works(files.client())
            assert place.server.core.jobs == {}

    def test_many_that_fail_are_one_line(
        self, files: Files, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(door, "SILENCE", 1e9)
        with serving(files.server()) as place:
            for _ in range(50):
                with place.plain() as sock:
                    sock.sendall(b"status\n")
                    read_all(sock)
            assert place.works(files.client())
        assert len(warnings(caplog)) == 1

    def test_one_that_says_nothing_is_closed_in_time(
        self, files: Files, loop_factory: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        with serving(files.server(), loop_factory, handshake=0.1) as place:
            with place.plain() as silent, place.plain() as slow:
                slow.sendall(b"\x16\x03\x01")
                assert read_all(silent) == read_all(slow) == b""
                harness.wait_until(lambda: "no TLS handshake within 0.1 s" in caplog.text)
            # A connection that has shaken hands may be idle for ever.
            with place.connect(files.client()) as sock:
                sock.sendall(encode_request(P.ECHO_REQ, b"x"))
                assert hear(sock, 1)

    def test_look_whether_the_port_is_open_is_no_warning(
        self, files: Files, loop_factory: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, logger="django_gearman")
        with serving(files.server(), loop_factory) as place:
            place.plain().close()
            harness.wait_until(lambda: "closed by itself" in caplog.text)
        assert warnings(caplog) == []

    def test_those_that_shake_hands_count(
        self, files: Files, loop_factory: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        with (
            serving(files.server(), loop_factory, max_connections=3) as place,
            place.connect(files.client()) as first,
        ):
            first.sendall(encode_request(P.ECHO_REQ, b"x"))
            assert hear(first, 1)
            waiting = [place.plain() for _ in range(2)]
            with place.plain() as refused:
                assert read_all(refused) == b""
            harness.wait_until(lambda: "too many are open already" in caplog.text)
            for sock in waiting:
                sock.close()
            harness.wait_until(lambda: not place.server._listening[0]._handshakes)
            assert place.works(files.client())

    def test_a_crowd_in_plain_text_does_not_keep_others_out(self, files: Files) -> None:
        with serving(files.server(), handshake=1.0) as place:
            crowd = [place.plain() for _ in range(300)]
            try:
                assert place.works(files.client())
                for sock in crowd:
                    sock.sendall(b"status\n")
                assert place.works(files.client())
            finally:
                for sock in crowd:
                    sock.close()

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            (None, "it shows no certificate"),
            ("foreign", "its certificate is not trusted"),
            ("expired", "its certificate is not trusted: certificate has expired"),
        ],
    )
    def test_client_must_show_a_certificate(
        self,
        files: Files,
        loop_factory: Any,
        name: str | None,
        reason: str,
        version: ssl.TLSVersion,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        context = files.client(name)
        context.maximum_version = version
        with serving(files.server(), loop_factory) as place:
            with place.client(context) as client, pytest.raises(ConnectionFailed, match="TLS_CERTIFICATE"):
                client.do_background("f", b"")
            harness.wait_until(lambda: reason in caplog.text)
            assert place.server.core.jobs == {}
            assert place.works(files.client())

    def test_nobody_is_asked_where_the_server_is_told_so(self, files: Files) -> None:
        with serving(files.server(ca=None)) as place:
            assert place.works(files.client(None))

    def test_end_while_somebody_shakes_hands(self, files: Files, loop_factory: Any) -> None:
        with (
            serving(files.server(), loop_factory) as place,
            place.plain() as silent,
            place.connect(files.client()) as sock,
        ):
            sock.sendall(encode_request(P.ECHO_REQ, b"x"))
            hear(sock, 1)
            place.server.loop.call_soon_threadsafe(place.server._stopped.set)
            assert read_all(sock) == read_all(silent) == b""
        for sock_again in bind(*place.address):
            sock_again.close()


class TestStream:
    """The limits and turns of plain connections hold of TLS too."""

    def test_pipelined_packets(self, files: Files, loop_factory: Any) -> None:
        with serving(files.server(), loop_factory) as place, place.connect(files.client()) as sock:
            sock.sendall(b"".join(encode_request(P.ECHO_REQ, b"%d" % number) for number in range(3000)))
            assert hear(sock, 3000) == [(P.ECHO_RES, [b"%d" % number]) for number in range(3000)]

    def test_byte_by_byte(self, files: Files, loop_factory: Any) -> None:
        with serving(files.server(), loop_factory) as place, place.connect(files.client()) as sock:
            for byte in encode_request(P.ECHO_REQ, b"slowly"):
                sock.sendall(bytes([byte]))
            assert hear(sock, 1) == [(P.ECHO_RES, [b"slowly"])]

    def test_text(self, files: Files, loop_factory: Any) -> None:
        with serving(files.server(), loop_factory) as place, place.connect(files.client()) as sock:
            sock.sendall(b"status\n")
            assert sock.recv(100) == b".\n"

    def test_peer_that_does_not_read_is_closed(
        self,
        files: Files,
        loop_factory: Any,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(transport_module, "TICK", 0.01)
        limits = {"output_soft": 2**16, "output_hard": 2**18, "stuck": 0.1}
        with serving(files.server(), loop_factory, **limits) as place:
            worker, client = place.connect(files.client()), place.connect(files.client())
            with worker, client:
                worker.sendall(encode_request(P.CAN_DO, b"f"))
                client.sendall(encode_request(P.SUBMIT_JOB, b"f", b"", b""))
                ((_, (handle,)),) = hear(client, 1)
                worker.sendall(encode_request(P.GRAB_JOB))
                hear(worker, 1)
                deadline = time.monotonic() + LIMIT
                while "does not take what it is sent" not in caplog.text:
                    assert time.monotonic() < deadline
                    worker.sendall(encode_request(P.WORK_DATA, handle, b"x" * 2**18))
                    worker.sendall(encode_request(P.ECHO_REQ, b"going on"))
                    hear(worker, 1)

    def test_peer_that_takes_nothing_of_one_large_reply_is_closed(
        self,
        files: Files,
        loop_factory: Any,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(transport_module, "TICK", 0.01)
        limits = {"output_soft": 2**16, "output_hard": 2**18, "stuck": 0.1}
        with serving(files.server(), loop_factory, **limits) as place, narrow(place, files) as sock:
            sock.sendall(encode_request(P.ECHO_REQ, b"x" * LARGE))
            harness.wait_until(lambda: "does not take what it is sent" in caplog.text)
            harness.wait_until(lambda: not place.server.connections)
            assert not place.server.blocked

    def test_peer_that_takes_a_large_reply_slowly_stays(
        self, files: Files, loop_factory: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(transport_module, "TICK", 600.0)
        limits = {"output_soft": 2**16, "output_hard": 2**18, "stuck": 10.0}
        with serving(files.server(), loop_factory, **limits) as place, narrow(place, files) as sock:
            sock.sendall(encode_request(P.ECHO_REQ, b"x" * LARGE))
            harness.wait_until(lambda: len(place.server.blocked) == 1)
            (blocked,) = place.server.blocked
            # The system takes a little for it. Each look comes 20 s after the one before.
            later = itertools.count(place.server.loop.time() + 20, 20)
            harness.wait_until(lambda: blocked._is_stuck(next(later)))
            unsent, taken = blocked.unsent, 0
            assert LARGE // 2 < unsent < 2 * LARGE
            deadline = time.monotonic() + LIMIT
            # By more than what may be on its way from the one buffer to the other as we look.
            while blocked.unsent > unsent - 2**18:
                assert time.monotonic() < deadline
                taken += len(sock.recv(2**16))
            assert blocked.unsent > 2**18
            assert not blocked._is_stuck(next(later))
            while taken < LARGE + 12:
                taken += len(sock.recv(2**20))
            harness.wait_until(lambda: not place.server.blocked)
            assert blocked.unsent == 0

    def test_large_replies_come_in_order(self, files: Files, loop_factory: Any) -> None:
        replies = [b"%d" % number * (2**20 if number % 3 else 1) for number in range(12)]
        with serving(files.server(), loop_factory) as place, narrow(place, files) as sock:
            sock.sendall(b"".join(encode_request(P.ECHO_REQ, reply) for reply in replies))
            harness.wait_until(lambda: any(each.unsent > 2**20 for each in list(place.server.connections)))
            assert hear(sock, len(replies)) == [(P.ECHO_RES, [reply]) for reply in replies]

    @pytest.mark.parametrize("end", ["unreadable", "stop"])
    def test_large_reply_arrives_though_it_is_the_last(
        self, files: Files, loop_factory: Any, end: str
    ) -> None:
        question = encode_request(P.ECHO_REQ, b"x" * LARGE)
        with (
            serving(files.server(), loop_factory, output_soft=2 * LARGE) as place,
            narrow(place, files) as sock,
        ):
            if end == "unreadable":
                sock.sendall(question + b"\0FOO" + bytes(8))
            else:
                sock.sendall(question)
                harness.wait_until(lambda: any(each.unsent for each in list(place.server.connections)))
                place.server.loop.call_soon_threadsafe(place.server._stopped.set)
            assert len(read_all(sock)) == LARGE + 12

    def test_peer_that_does_not_read_is_not_read_above_the_soft_limit(
        self, files: Files, loop_factory: Any
    ) -> None:
        soft, size, count = 2**16, 2**12, 8000
        with (
            serving(files.server(), loop_factory, output_soft=soft, output_hard=2**30) as place,
            place.connect(files.client()) as sock,
        ):
            data = encode_request(P.ECHO_REQ, b"x" * size) * count
            sock.setblocking(False)
            sent = 0
            server = place.server

            def blocked() -> list[ServerConnection]:
                return [connection for connection in list(server.connections) if connection._blocked]

            deadline = time.monotonic() + LIMIT
            while not blocked():
                assert time.monotonic() < deadline
                try:
                    sent += sock.send(data[sent : sent + 2**16])
                except ssl.SSLWantWriteError:
                    pass
            assert place.works(files.client())
            # libuv reads up to 32 times, 256 KiB each, before others get their turn.
            for connection in blocked():
                assert connection.unsent < soft + 2 * 32 * 2**18 < len(data)
            # A record is half written and the answers wait: both directions move at once.
            reader = PacketReader(RESPONSE)
            heard = 0
            deadline = time.monotonic() + LIMIT
            while heard < count:
                assert time.monotonic() < deadline
                select.select([sock], [sock] if sent < len(data) else [], [], 0.1)
                try:
                    if sent < len(data):
                        sent += sock.send(data[sent : sent + 2**20])
                except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                    pass
                try:
                    reader.feed(sock.recv(2**18))
                except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                    pass
                while reader.take() is not None:
                    heard += 1

    def test_packet_that_does_not_come_to_its_end_closes(
        self, files: Files, loop_factory: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(transport_module, "TICK", 0.01)
        with (
            serving(files.server(), loop_factory, incomplete=0.05) as place,
            place.connect(files.client()) as sock,
        ):
            sock.sendall(encode_request(P.ECHO_REQ, b"never")[:-1])
            assert read_all(sock) == b""

    def test_answers_reach_one_that_says_goodbye_with_its_question(
        self, files: Files, loop_factory: Any
    ) -> None:
        with serving(files.server(), loop_factory) as place:
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            end = files.client().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
            with place.plain() as sock:
                while True:
                    try:
                        end.do_handshake()
                        break
                    except ssl.SSLWantReadError:
                        sock.sendall(outgoing.read())
                        incoming.write(sock.recv(65536))
                end.write(b"status\n")
                with pytest.raises(ssl.SSLWantReadError):
                    end.unwrap()
                sock.sendall(outgoing.read())
                incoming.write(read_all(sock))
                assert end.read(100) == b".\n"

    def test_goodbye_while_much_waits_does_not_end_the_server(self, files: Files, loop_factory: Any) -> None:
        with serving(files.server(), loop_factory) as place:
            for _ in range(5):
                incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
                end = files.client().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
                with place.plain() as sock:
                    while True:
                        try:
                            end.do_handshake()
                            break
                        except ssl.SSLWantReadError:
                            sock.sendall(outgoing.read())
                            incoming.write(sock.recv(65536))
                    end.write(encode_request(P.ECHO_REQ, b"x" * LARGE))
                    with pytest.raises(ssl.SSLWantReadError):
                        end.unwrap()
                    sock.sendall(outgoing.read())
                    read_all(sock)
                assert place.works(files.client())


class TestEnds:
    """Client and worker."""

    def test_large_payloads_both_ways(self, files: Files, loop_factory: Any) -> None:
        workload = os.urandom(LARGE)

        def reverse(job: AssignedJob) -> bytes:
            return job.workload[::-1]

        with (
            serving(files.server(), loop_factory) as place,
            harness.worker_thread(
                {"reverse": reverse}, place.port, tls=files.client(), connect_timeout=LIMIT
            ),
            place.client(files.client()) as client,
        ):
            assert client.do("reverse", workload, timeout=60) == workload[::-1]
            for number in range(100):
                assert client.do("reverse", b"a%d" % number, timeout=LIMIT) == (b"a%d" % number)[::-1]

    def test_worker_sleeps_and_is_woken(self, files: Files) -> None:
        with (
            serving(files.server()) as place,
            place.client(files.client()) as client,
            harness.worker_thread(
                {"f": lambda job: b"done"}, place.port, tls=files.client(), connect_timeout=LIMIT
            ),
        ):
            harness.wait_until(lambda: any(peer.asleep for peer in list(place.server.core.peers)))
            assert client.do("f", timeout=LIMIT) == b"done"

    @pytest.mark.parametrize(
        ("server", "ca", "message"),
        [
            ("good", "stranger.pem", "its TLS certificate is not trusted: .*TLS_CA"),
            ("foreign", "ca.pem", "its TLS certificate is not trusted: .*TLS_CA"),
            ("expired", "ca.pem", "its TLS certificate is not trusted: certificate has expired"),
            ("elsewhere", "ca.pem", "its TLS certificate is not for 127.0.0.1.*subjectAltName"),
        ],
    )
    def test_server_that_is_not_trusted(self, files: Files, server: str, ca: str, message: str) -> None:
        with serving(files.careless_server(server)) as place:
            with place.client(files.client(ca=ca)) as client, pytest.raises(ConnectionFailed, match=message):
                client.do_background("f", b"secret")
            assert place.server.core.jobs == {}

    def test_name_is_checked_as_it_is_spelled(self, files: Files) -> None:
        with (
            serving(files.server("other")) as place,  # for 127.0.0.1 alone
            Client([f"localhost:{place.port}"], tls=files.client(), connect_timeout=LIMIT) as client,
            pytest.raises(ConnectionFailed, match="not for localhost"),
        ):
            client.echo(b"")

    def test_server_that_answers_in_plain_text(self, files: Files) -> None:
        def answer(peer: Peer) -> None:
            peer.socket.recv(65536)
            peer.socket.sendall(b"ERR UNKNOWN_COMMAND Unknown+server+command\r\n")
            peer.wait_for_end()

        with (
            fake_server(answer) as port,
            pytest.raises(ConnectionFailed, match=r"does not speak TLS .*--tls-certificate"),
        ):
            Connection("127.0.0.1", port, connect_timeout=LIMIT, tls=files.client())

    @harness.tried_again
    def test_server_that_waits_for_plain_text(self, files: Files) -> None:
        with harness.server(store="memory") as server:
            started = time.monotonic()
            with (
                Client([server.address], tls=files.client(), connect_timeout=0.5) as client,
                pytest.raises(ConnectionFailed, match="speak TLS"),
            ):
                client.do_background("f", b"")
            assert time.monotonic() - started < LIMIT
            assert server.status() == {}

    @harness.tried_again
    def test_server_that_hangs_after_the_handshake(self, files: Files) -> None:
        def hang(peer: Peer) -> None:
            with files.server().wrap_socket(peer.socket, server_side=True) as sock:
                read_all(sock)

        with (
            fake_server(hang) as port,
            pytest.raises(ConnectionFailed, match="no answer after the TLS handshake in time"),
        ):
            Connection("127.0.0.1", port, connect_timeout=0.5, tls=files.client())

    def test_plain_client_is_told_that_the_server_speaks_tls(self, files: Files) -> None:
        def alert(peer: Peer) -> None:
            peer.expect(P.OPTION_REQ)
            peer.socket.sendall(b"\x15\x03\x01\0\x02\x02\x46")

        with (
            fake_server(alert) as port,
            Client([f"127.0.0.1:{port}"]) as client,
            pytest.raises(ConnectionLost, match="it speaks TLS and we do not"),
        ):
            client.echo(b"")

    def test_plain_client_at_our_port_gets_an_error(self, files: Files) -> None:
        said = "before it said anything; if it speaks TLS, TLS_CA is missing here"
        with serving(files.server()) as place, place.client(None) as client:
            with pytest.raises(ConnectionLost, match=said):
                client.do_background("f", b"")
            with pytest.raises(ConnectionLost, match=said):
                asyncio.run(AsyncClient([f"127.0.0.1:{place.port}"]).do_background("f", b""))
            with pytest.raises(ConnectionLost, match=said), AdminClient(f"127.0.0.1:{place.port}") as admin:
                admin.version()
            # With a choice, a server has to answer before it is given anything.
            names = [f"127.0.0.1:{place.port}", f"localhost:{place.port}"]
            with (
                pytest.raises(ConnectionFailed, match=said),
                Client(names, connect_timeout=LIMIT) as two,
            ):
                two.do_background("f", b"")
            assert place.server.core.jobs == {}

    def test_worker_goes_on_trying(self, files: Files, caplog: pytest.LogCaptureFixture) -> None:
        with serving(files.server()) as place:
            with harness.worker_thread(
                {"f": lambda job: b""}, place.port, tls=files.client(None), connect_timeout=LIMIT
            ):
                harness.wait_until(lambda: "TLS_CERTIFICATE" in caplog.text)
            assert place.works(files.client())

    def test_record_that_comes_in_halves_does_not_block(self, files: Files) -> None:
        first, second = threading.Event(), threading.Event()

        def halves(peer: Peer) -> None:
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            end = files.server().wrap_bio(incoming, outgoing, server_side=True)
            sock = peer.socket
            while True:
                try:
                    end.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    sock.sendall(outgoing.read())
                    incoming.write(sock.recv(65536))
            sock.sendall(outgoing.read())
            while incoming.pending == 0:
                incoming.write(sock.recv(65536))
            end.read(65536)
            end.write(encode_response(P.ECHO_RES, b""))
            sock.sendall(outgoing.read())
            end.write(encode_response(P.NOOP, b"") * 3)
            record = outgoing.read()
            sock.sendall(record[:20])
            assert first.wait(LIMIT)
            sock.sendall(record[20:])
            assert second.wait(LIMIT)

        with fake_server(halves) as port:
            connection = Connection("127.0.0.1", port, connect_timeout=LIMIT, tls=files.client())
            try:
                harness.wait_until(connection.is_readable)
                connection.fill()
                assert connection.take() is None
                assert not connection.is_readable()
                first.set()
                harness.wait_until(connection.is_readable)
                connection.fill()
                assert [connection.take() for _ in range(4)] == [(P.NOOP, [b""])] * 3 + [None]
            finally:
                second.set()
                connection.close()

    def test_decrypted_rest_of_a_record_is_seen(self, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(connection_module, "_CHUNK", 10)
        with serving(files.server()) as place:
            connection = Connection("127.0.0.1", place.port, connect_timeout=LIMIT, tls=files.client())
            try:
                connection.send(encode_request(P.ECHO_REQ, b"x" * 100))
                harness.wait_until(connection.is_readable)
                assert connection._fill(0.0)
                assert connection.has_decrypted
                connection.fill()
                assert connection.take() == (P.ECHO_RES, [b"x" * 100])
                assert not connection.has_decrypted
            finally:
                connection.close()

    def test_send_takes_no_longer_than_it_may(self, files: Files) -> None:
        done = threading.Event()

        def read_nothing(peer: Peer) -> None:
            with files.server().wrap_socket(peer.socket, server_side=True) as sock:
                sock.recv(65536)
                sock.sendall(encode_response(P.ECHO_RES, b""))
                assert done.wait(LIMIT)

        with fake_server(read_nothing) as port:
            connection = Connection("127.0.0.1", port, connect_timeout=LIMIT, tls=files.client())
            try:
                with pytest.raises(ConnectionLost):
                    connection.send(b"x" * 4 * LARGE, 0.2)
            finally:
                done.set()
                connection.close()

    def test_forked_child_has_a_session_of_its_own(self, files: Files) -> None:
        with serving(files.server()) as place, place.client(files.client()) as client:
            assert client.echo(b"parent") == b"parent"
            script = os.fork()
            if script == 0:
                code = 1
                try:
                    code = 0 if client.echo(b"child") == b"child" else 2
                    client.close()
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(script, 0)[1]) == 0
            assert client.echo(b"parent again") == b"parent again"


class TestCommand:
    """`gearman_server`: a mistake ends it before it listens."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--tls"], "TLS needs a certificate and its key"),
            (["--ssl"], "TLS needs a certificate and its key"),
            (["--tls-no-client-certificates"], "TLS needs a certificate and its key"),
            (["--tls-ca-file", "ca.pem"], "TLS needs a certificate and its key"),
            (["--tls-certificate", "good.pem"], "TLS needs a certificate and its key"),
            (["--tls-certificate", ""], "The name of a TLS file is empty"),
            (["--tls-certificate", "good.pem", "--tls-key", "good.key"], "TLS needs the CA .*--tls-ca-file"),
            (
                ["--ssl-certificate", "good.pem", "--ssl-key", "other.key", "--ssl-ca-file", "ca.pem"],
                r"TLS does not work: the TLS key .*other.key does not belong .*good.pem\.$",
            ),
            (
                ["--tls-certificate", "expired.pem", "--tls-key", "expired.key", "--tls-ca-file", "ca.pem"],
                "certificate has expired",
            ),
            (
                ["--tls-certificate", "none.pem", "--tls-key", "good.key", "--tls-ca-file", "ca.pem"],
                "'.*none.pem' cannot be read: No such file",
            ),
        ],
    )
    def test_mistakes(self, files: Files, options: list[str], message: str) -> None:
        options = [files[part] if "." in part else part for part in options]
        with pytest.raises(CommandError, match=message) as told:
            call_command("gearman_server", "--port", "0", "--store", "memory", *options)
        assert "\n" not in str(told.value)

    def test_mistake_is_one_line_and_an_exit_code(self, files: Files) -> None:
        options = ["--tls-certificate", files["good.pem"], "--tls-key", files["good.key"]]
        options += ["--tls-ca-file", files["none.pem"]]
        done = subprocess.run(
            [*harness.MANAGE, "gearman_server", "--port", "0", "--store", "memory", *options],
            cwd=harness.ROOT,
            env=harness.environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert re.fullmatch(r"CommandError: TLS does not work: .*none\.pem.*\n", done.stderr)

    def test_network_needs_certificates_of_clients(self, files: Files) -> None:
        pair = ["--tls-certificate", files["good.pem"], "--tls-key", files["good.key"]]
        everywhere = ["--listen", "0.0.0.0", "--port", "0", "--store", "memory"]
        with pytest.raises(CommandError, match="nobody there is asked for a certificate"):
            call_command("gearman_server", *everywhere, *pair, "--tls-no-client-certificates")
        with pytest.raises(CommandError, match="nobody there is asked for a certificate"):
            call_command("gearman_server", *everywhere)

    def test_network_is_open_to_certificates(self, files: Files) -> None:
        options = ["--tls-certificate", files["good.pem"], "--tls-key", files["good.key"]]
        options += ["--tls-ca-file", files["ca.pem"], "--listen", "0.0.0.0"]
        with harness.server(store="memory", options=options) as server:
            assert "(TLS)" in server.stdout
            with Client([server.address], tls=files.client(), connect_timeout=LIMIT) as client:
                assert client.echo(b"x") == b"x"

    def test_worker_without_its_files(self, files: Files, settings: Any) -> None:
        settings.GEARMAN = {"default": files.settings | {"TLS_CA": files["empty.pem"]}}
        with pytest.raises(CommandError, match=r"TLS does not work: .*empty.pem"):
            call_command("gearman_worker", "--processes", "1")


@pytest.mark.django_db(transaction=True)
class TestDjango:
    """Settings alone make server, worker and views speak TLS."""

    def test_jobs(self, files: Files, settings: Any) -> None:
        env = {"GEARMAN_TEST_TLS": str(files.folder)}
        with harness.server(env=env) as server, harness.worker(server, env=env) as worker:
            settings.GEARMAN = {
                "default": {"SERVERS": [server.address], "CONNECT_TIMEOUT": LIMIT, **files.settings}
            }
            worker.wait_connected()
            assert jobs.shout.run(b"abc") == b"ABC"
            result = jobs.add.enqueue(3, 4)
            assert result.get(timeout=LIMIT) == 7
            with socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT) as sock:
                sock.sendall(b"status\n")
                assert b"." not in read_all(sock)

    def test_nudge(self, files: Files, settings: Any) -> None:
        with serving(files.server()) as place:
            settings.GEARMAN = {"default": {"SERVERS": [place.name], **files.settings}}
            # A nudge has no patience: on a machine that is busy not even for a handshake.
            harness.wait_until(lambda: client_for().claim())
            settings.GEARMAN = {"default": {"SERVERS": [place.name], "TLS_CA": files["ca.pem"]}}
            assert not client_for().claim()


class TestReadme:
    """The commands that make certificates make ones that work."""

    def test_certificates(self, tmp_path: Path) -> None:
        if shutil.which("openssl") is None:
            needs.missing("openssl is not installed")
        readme = (harness.ROOT / "README.md").read_text()
        found = re.search(r"<!-- command: certificates -->\n```sh\n(.*?)```", readme, re.DOTALL)
        assert found is not None
        script = found[1].replace("jobs.example.org", "localhost")
        subprocess.run(["sh", "-e", "-c", script], cwd=tmp_path, check=True, capture_output=True, timeout=60)
        made = {name: str(tmp_path / name) for name in os.listdir(tmp_path)}
        assert all(os.stat(file).st_mode & 0o077 == 0 for name, file in made.items() if name.endswith(".key"))
        server = server_context(made["server.pem"], made["server.key"], made["ca.pem"])
        client = client_context(made["ca.pem"], made["client.pem"], made["client.key"])
        # What Python 3.13 asks for by default elsewhere.
        client.verify_flags |= ssl.VERIFY_X509_STRICT
        server.verify_flags |= ssl.VERIFY_X509_STRICT
        with (
            serving(server) as place,
            Client([f"localhost:{place.port}"], tls=client, connect_timeout=LIMIT) as one,
        ):
            assert one.echo(b"x") == b"x"
