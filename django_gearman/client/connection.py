"""
One blocking connection that speaks packets: the client's and the worker's.

Knows sockets and time-outs, and nothing of what packets mean.
"""

from __future__ import annotations

import select
import socket
from time import monotonic
from typing import Final

from ..exceptions import ConnectionFailed, ConnectionLost, ProtocolError, ResponseTimeout
from ..protocol.packets import RESPONSE
from ..protocol.reader import MAX_BODY, Packet, PacketReader

_CHUNK: Final = 256 * 1024

KEEPALIVE_IDLE: Final = 60
"""Seconds of silence after which the kernel asks whether the other end is still there."""


class Connection:
    """
    A connection to the job server at ``host:port``.

    Args:
        connect_timeout: Seconds to wait for the connection.
        send_timeout: Seconds that a packet may take to be sent.
        max_packet: Bytes of the largest packet body taken.
    Raises:
        ConnectionFailed: Nobody answers there; nothing was sent.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        connect_timeout: float = 1.0,
        send_timeout: float = 30.0,
        max_packet: int = MAX_BODY,
    ) -> None:
        self.server = f"{host}:{port}"
        self._reader = PacketReader(RESPONSE, max_body=max_packet)
        self._send_timeout = send_timeout
        try:
            self._socket = socket.create_connection((host, port), timeout=connect_timeout)
        except OSError as error:
            raise ConnectionFailed(self.server, _reason(error)) from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, data: bytes, timeout: float | None = None) -> None:
        """
        Send whole packets.

        Args:
            timeout: Seconds that it may take; None for ``send_timeout``.
        Raises:
            ConnectionLost: The connection broke; the server may have read them or not.
        """
        try:
            self._socket.settimeout(self._send_timeout if timeout is None else timeout)
            self._socket.sendall(data)
        except OSError as error:
            raise ConnectionLost(self.server, _reason(error)) from error

    def receive(self, deadline: float | None, what: str = "the answer of the job server") -> Packet:
        """
        The next packet, waiting for it.

        Args:
            deadline: Monotonic time until which to wait; None to wait for ever.
            what: What is waited for, to say when it does not come.
        Raises:
            ResponseTimeout: It did not come in time.
            ConnectionLost: The connection broke, or the other end is no job server.
        """
        started = monotonic()
        while True:
            packet = self.take()
            if packet is not None:
                return packet
            timeout = None if deadline is None else deadline - monotonic()
            if timeout is not None and timeout <= 0:
                raise ResponseTimeout(what, max(monotonic() - started, 0.0))
            self._fill(timeout)

    def take(self) -> Packet | None:
        """The next packet of what was received already; None when there is none."""
        try:
            return self._reader.take()
        except ProtocolError as error:
            raise ConnectionLost(self.server, f"it speaks no Gearman: {error}") from error

    def fill(self) -> None:
        """Receive what is there, without waiting; then ``take``."""
        while self.is_readable():
            self._fill(0.0)

    def is_readable(self) -> bool:
        """Whether something came, be it the end of the connection."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def _fill(self, timeout: float | None) -> None:
        try:
            self._socket.settimeout(timeout)
            data = self._socket.recv(_CHUNK)
        except (TimeoutError, BlockingIOError):
            return
        except OSError as error:
            raise ConnectionLost(self.server, _reason(error)) from error
        if not data:
            raise ConnectionLost(self.server, "the server closed it")
        self._reader.feed(data)

    def close(self) -> None:
        """Close this process's end; in a forked child the parent's stays open."""
        self._socket.close()


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
