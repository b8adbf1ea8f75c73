"""
One blocking connection that speaks packets: the client's and the worker's.

Knows sockets, TLS and time-outs, and nothing of what packets mean.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
from collections.abc import Sequence
from time import monotonic
from typing import Any, Final

from .. import tls as tls_reasons
from ..exceptions import ConnectionFailed, ConnectionLost, ProtocolError, ResponseTimeout
from ..protocol.packets import RESPONSE, PacketType, encode_request
from ..protocol.reader import MAX_BODY, Packet, PacketReader
from .large import LargeEnds

_CHUNK: Final = 256 * 1024

_READS: Final = 16
"""How often ``fill`` receives: more may come for ever."""

TLS_ALERT: Final = b"\x15\x03"
"""How a TLS server's answer to plain text begins. RFC 8446, section 5.1."""

SPEAKS_TLS: Final = "it speaks TLS and we do not; TLS_CA would make us"

_SAID_NOTHING: Final = "before it said anything; if it speaks TLS, TLS_CA is missing here"

KEEPALIVE_IDLE: Final = 60
"""Seconds of silence after which the kernel asks whether the other end is still there."""

KEEPALIVE_INTERVAL: Final = 10
KEEPALIVE_COUNT: Final = 3
"""Seconds between two such questions, and how many it asks in vain."""


class Connection:
    """
    A connection to the job server at ``host:port``.

    Args:
        connect_timeout: Seconds to wait for the connection, the handshake of TLS included.
        tls: Speak TLS, and nothing else, with this context; None for plain text.
        send_timeout: Seconds that a packet may take to be sent.
        max_packet: Bytes of the largest packet body taken.
        prove: Wait for an answer to ECHO too: a server that hangs is connected to all the same.
    Raises:
        ConnectionFailed: Nobody answers there, or the two ends do not trust each other; no job was sent.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        connect_timeout: float = 1.0,
        send_timeout: float = 30.0,
        max_packet: int = MAX_BODY,
        tls: ssl.SSLContext | None = None,
        prove: bool = False,
    ) -> None:
        self.server = f"{host}:{port}"
        self._max_packet = max_packet
        self._reader: PacketReader | LargeEnds = PacketReader(RESPONSE, max_body=max_packet)
        self._send_timeout = send_timeout
        self._received = False
        """Whether anything ever came."""
        self._socket: socket.socket
        self._timeout: float | None = -1.0
        """The socket's own; to set it is a system call, even to what it is."""
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            deadline = monotonic() + connect_timeout
            self._socket = _connected(addresses, deadline)
        except OSError as error:
            raise ConnectionFailed(self.server, reason_of(error)) from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # What was sent and is not taken: for that the kernel would try a quarter of an hour.
            lost_after = (KEEPALIVE_IDLE + KEEPALIVE_INTERVAL * KEEPALIVE_COUNT) * 1000
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, lost_after)
        try:
            if tls is not None:
                self._start_tls(tls, host, deadline)
            elif prove:
                self._prove(deadline, host)
        except BaseException:
            self.close()
            raise

    def _start_tls(self, tls: ssl.SSLContext, host: str, deadline: float) -> None:
        try:
            wrapped = self._socket = tls.wrap_socket(
                self._socket, server_hostname=host, do_handshake_on_connect=False
            )
            self._set_timeout(_left(deadline))
            wrapped.do_handshake()
        except OSError as error:
            raise ConnectionFailed(self.server, *tls_reasons.explain(error, host)) from error
        # With TLS 1.3 our end is done before the server has seen our certificate. Only an
        # answer says that it was taken; without one, a job might be sent to nobody.
        self._prove(deadline, host)

    def _prove(self, deadline: float, host: str) -> None:
        try:
            self.send(encode_request(PacketType.ECHO_REQ, b""), _left(deadline))
        except ConnectionLost:
            pass  # it may have said why before it closed
        try:
            self.receive(deadline)
        except ConnectionLost as error:
            raise not_proven(error, host, tls=isinstance(self._socket, ssl.SSLSocket)) from error
        except ResponseTimeout as error:
            after = " after the TLS handshake" if isinstance(self._socket, ssl.SSLSocket) else ""
            raise ConnectionFailed(self.server, f"no answer{after} in time") from error

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
        timeout = self._send_timeout if timeout is None else timeout
        try:
            if isinstance(self._socket, ssl.SSLSocket):
                self._send_records(self._socket, data, timeout)
            else:
                self._set_timeout(timeout)
                self._socket.sendall(data)
        except OSError as error:
            raise self._lost(error) from error

    def _send_records(self, sock: ssl.SSLSocket, data: bytes, timeout: float) -> None:
        # sendall() of an SSLSocket would allow the time-out again for every record.
        deadline = monotonic() + timeout
        with memoryview(data) as rest:
            sent = 0
            while sent < len(data):
                self._set_timeout(_left(deadline))
                sent += sock.send(rest[sent:])

    def send_some(self, data: bytes | bytearray | memoryview) -> int:
        """
        Send what is taken without waiting; how many bytes that was.

        With TLS, hand in what was not sent again, with more behind it or not.

        Raises:
            ConnectionLost: The connection broke; the server may have read it or not.
        """
        try:
            self._set_timeout(0.0)
            return self._socket.send(data)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        except OSError as error:
            raise self._lost(error) from error

    def receive(self, deadline: float | None, what: str = "the answer of the job server") -> Packet:
        """
        The next packet, waiting for it.

        Args:
            deadline: Monotonic time until which to wait; None to wait for ever.
            what: What is waited for, to say when it does not come.
        Raises:
            ResponseTimeout: It did not come in time.
            ResultTooLarge: It had an ``end``: that is passed over, and the next may be received.
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
        """The next packet of what was received already; None when there is none. Raises as ``receive``."""
        try:
            return self._reader.take()
        except ProtocolError as error:
            self._reader = LargeEnds(self._reader, error, self.server, self._max_packet)
        return self._reader.take()

    def fill(self) -> bool:
        """Receive what is there, or 4 MiB of it, without waiting; then ``take``. Whether that was all."""
        return any(not (self.is_readable() and self._fill(0.0)) for _ in range(_READS))

    def fill_ready(self) -> None:
        """Receive once what ``select`` said is there; then ``take`` until there is nothing."""
        self._fill(0.0)

    def is_readable(self) -> bool:
        """Whether something came, be it the end of the connection, or a part of a TLS record."""
        if self.has_decrypted:
            return True
        if not hasattr(select, "poll"):
            return bool(select.select([self._socket], [], [], 0)[0])
        # select() refuses descriptors above 1,023, which a web server may have.
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    @property
    def has_decrypted(self) -> bool:
        """Whether bytes wait that ``select`` does not see any more."""
        return isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0

    @property
    def is_passing(self) -> bool:
        """Whether more is to come of what is too large, and nobody's any more."""
        return isinstance(self._reader, LargeEnds) and self._reader.is_passing

    def _fill(self, timeout: float | None) -> bool:
        """Receive once; whether something came that can be taken."""
        data = self.receive_bytes(timeout)
        if data:
            self._reader.feed(data)
        return bool(data)

    def receive_bytes(self, timeout: float | None) -> bytes:
        """
        What comes, for who reads text and no packets; nothing when nothing came in time.

        Args:
            timeout: Seconds to wait; None to wait for ever.
        Raises:
            ConnectionLost: The connection broke, or the other end closed it.
        """
        try:
            self._set_timeout(timeout)
            data = self._socket.recv(_CHUNK)
        except (TimeoutError, BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return b""
        except OSError as error:
            raise self._lost(error) from error
        if not data:
            raise self._lost(None)
        if not self._received:
            self._received = True
            if data.startswith(TLS_ALERT):
                raise ConnectionLost(self.server, SPEAKS_TLS)
        return data

    def _lost(self, error: OSError | None) -> ConnectionLost:
        """What to raise for what the system says; None where the other end closed it."""
        in_plain = not isinstance(self._socket, ssl.SSLSocket)
        return ConnectionLost(self.server, why_lost(error, was_silent=in_plain and not self._received))

    def _set_timeout(self, timeout: float | None) -> None:
        if timeout != self._timeout:
            self._socket.settimeout(timeout)
            self._timeout = timeout

    def close(self) -> None:
        """Close this process's end; in a forked child the parent's stays open."""
        self._socket.close()


def _connected(addresses: Sequence[Any], deadline: float) -> socket.socket:
    """
    A connection to the first of a host's addresses that answers.

    Each may take its share of the time that is left: one that is silent leaves some for the others.

    Raises:
        OSError: What was wrong with the last.
    """
    for left in range(len(addresses), 0, -1):
        family, kind, protocol, _, address = addresses[-left]
        try:
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(_left(deadline) / left)
                sock.connect(address)
            except BaseException:
                sock.close()
                raise
            return sock
        except OSError:
            if left == 1:
                raise
    raise OSError("it has no address")


def not_proven(error: ConnectionLost, host: str, *, tls: bool) -> ConnectionFailed:
    """What to raise when a new connection breaks before it was of any use."""
    if isinstance(error.__cause__, ssl.SSLError):
        return ConnectionFailed(error.server, *tls_reasons.explain(error.__cause__, host))
    if tls:
        reason = f"after the TLS handshake: {error.reason}"
        return ConnectionFailed(error.server, reason, tls_reasons.CERTIFICATE_HINT)
    return ConnectionFailed(error.server, error.reason)


def _left(deadline: float) -> float:
    """Seconds until then; not 0, which would mean not to wait at all."""
    return max(deadline - monotonic(), 0.001)


def why_lost(error: Exception | None, *, was_silent: bool) -> str:
    """
    Why a connection broke; ``error`` is None where the other end closed it.

    Args:
        was_silent: Whether nothing ever came, in plain text: a server that speaks TLS may close it like that.
    """
    reason = "the server closed it" if error is None else reason_of(error)
    closed = error is None or isinstance(error, ConnectionError)
    return f"{reason} {_SAID_NOTHING}" if was_silent and closed else reason


def reason_of(error: Exception) -> str:
    """What the operating system says, in its words."""
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        # asyncio has sentences of its own.
        return os.strerror(error.errno)
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
