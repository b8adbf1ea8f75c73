"""A server that plays a script instead of serving jobs: for what a real one does only when it fails."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from django_gearman.protocol.packets import PacketType, encode_response
from django_gearman.protocol.reader import TEXT, Packet, PacketReader


class Peer:
    """The server's end of one connection, in words of packets."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._reader = PacketReader()

    def receive(self) -> tuple[PacketType, list[bytes]]:
        kind, arguments = self._receive()
        return PacketType(kind), arguments

    def receive_line(self) -> bytes:
        """The next line of text."""
        kind, (line,) = self._receive()
        assert kind == TEXT, kind
        return line

    def _receive(self) -> Packet:
        while (packet := self._reader.take()) is None:
            data = self.socket.recv(65536)
            if not data:
                raise ConnectionError("the client left")
            self._reader.feed(data)
        return packet

    def expect(self, kind: PacketType) -> list[bytes]:
        """The next packet of that type; options are granted meanwhile."""
        while True:
            received, arguments = self.receive()
            if received == PacketType.OPTION_REQ and kind != PacketType.OPTION_REQ:
                self.send(PacketType.OPTION_RES, arguments[0])
                continue
            assert received == kind, received
            return arguments

    def send(self, kind: PacketType, *arguments: bytes) -> None:
        self.socket.sendall(encode_response(kind, *arguments))

    def wait_for_end(self) -> None:
        """Take what comes until the client closes."""
        with suppress(ConnectionError):
            while self.socket.recv(65536):
                pass


Script = Callable[[Peer], None]


@contextmanager
def fake_server(*scripts: Script) -> Iterator[int]:
    """
    Play a script for each connection, in the order they come; the port.

    What a script asserts is asserted at the end.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    failures: list[BaseException] = []
    open_sockets: list[socket.socket] = []

    def serve() -> None:
        for script in scripts:
            try:
                sock, _ = listener.accept()
            except OSError:
                return  # the test is over
            open_sockets.append(sock)
            try:
                script(Peer(sock))
            except (ConnectionError, ValueError):
                pass  # the client left first, as it may
            except BaseException as error:
                failures.append(error)
            finally:
                sock.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for sock in open_sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        thread.join(30)
    assert not thread.is_alive()
    assert not failures, failures


def play(*steps: Any) -> Script:
    """A script of packets: a type to expect, or a tuple of what to send."""

    def script(peer: Peer) -> None:
        for step in steps:
            if isinstance(step, tuple):
                peer.send(*step)
            elif isinstance(step, bytes):
                peer.socket.sendall(step)
            elif step is None:
                peer.wait_for_end()
            else:
                peer.expect(step)

    return script
