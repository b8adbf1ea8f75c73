"""
One connection: its bytes to packets for the core, and what the core answers to bytes.

Here is what one peer may cost: how long a packet may take, how much may wait to be sent.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from ..exceptions import ProtocolError, UnreadableStream
from ..protocol.packets import REQUEST
from ..protocol.reader import MAX_BODY, MAX_LINE, TEXT, PacketReader
from . import text
from .door import TOO_MANY

if TYPE_CHECKING:
    from .peers import Peer
    from .transport import GearmanServer

logger = logging.getLogger(__name__)

PACKETS_PER_TURN: Final = 200
"""Packets of one connection before the others get their turn."""

PROGRESS: Final = 256 * 1024
"""Bytes of a packet that are to come in ``TransportLimits.incomplete`` seconds, unless it is whole before."""

TLS_PART: Final = 64 * 1024
"""Bytes handed to TLS at a time: what it has encrypted and passed on, nobody counts any more."""

LOSES_WRITER: Final = (3, 12) <= sys.version_info < (3, 12, 9) or (3, 13) <= sys.version_info < (3, 13, 2)
"""Whether asyncio fails, again and again, when TLS writes on after its socket was closed (gh-115514)."""


@dataclass(frozen=True, kw_only=True)
class Keepalive:
    """How the system asks whether a silent peer's machine is still there; None for the system's own value."""

    idle: int | None = None
    """Seconds of silence before the first probe."""

    interval: int | None = None
    """Seconds between two probes."""

    count: int | None = None
    """Probes without answer after which the connection is lost."""

    def watch(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = {"TCP_KEEPIDLE": self.idle, "TCP_KEEPINTVL": self.interval, "TCP_KEEPCNT": self.count}
        for name, value in options.items():
            # Not every system has all three.
            if value is not None and hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


@dataclass(frozen=True, kw_only=True)
class TransportLimits:
    """What one connection may ask of the server's memory and patience."""

    max_packet: int = MAX_BODY
    """Bytes of a packet's body."""

    max_line: int = MAX_LINE
    """Bytes of a line of text."""

    output_soft: int = 16 * 1024 * 1024
    """Bytes waiting to be sent to a peer above which nothing more is read from it."""

    output_hard: int = 32 * 1024 * 1024
    """Bytes waiting to be sent to a peer above which it is closed when it takes nothing for ``stuck``."""

    output_total: int = 256 * 1024 * 1024
    """Bytes waiting to be sent to all peers above which the one is closed for which the most waits."""

    stuck: float = 10.0
    """Seconds in which a peer takes something of what is sent to it, when much waits."""

    incomplete: float = 30.0
    """Seconds that each ``PROGRESS`` bytes of a packet may take to arrive; between packets it may be idle."""

    http_idle: float = 60.0
    """Seconds that an HTTP connection may be open without a request."""

    handshake: float = 10.0
    """Seconds that the handshake of TLS may take."""

    max_connections: int = 10_000
    """Connections at a time; more are closed at once."""

    backlog: int = 1024
    """Connections that may wait to be taken; the system may have a lower limit."""

    unanswered: int = 4_000
    """Replies of one connection that may wait for the store before nothing more is read from it."""

    keepalive: Keepalive | None = None
    """How to notice that a silent peer's machine is gone; None for not at all."""


class Connection(asyncio.Protocol):
    """One socket: feeds the reader, and the core from it."""

    __slots__ = (
        "_ahead",
        "_arrived",
        "_blocked",
        "_full",
        "_handed",
        "_held",
        "_reader",
        "_rest",
        "_server",
        "_stale",
        "_taken",
        "_taken_at",
        "_transport",
        "peer",
    )

    def __init__(self, server: GearmanServer) -> None:
        self._server = server
        limits = server.limits
        self._reader = PacketReader(REQUEST, max_body=limits.max_packet, max_line=limits.max_line)
        self._blocked = False
        """Whether the peer does not take what it is sent. Then what follows is told."""
        self._rest: deque[memoryview] | None = None
        """What TLS was not given yet; None of a connection in plain text, whose transport keeps it all."""
        self._held = 0
        """Bytes of it."""
        self._full = False
        """Whether TLS takes no more for now. As long as it does, nothing is kept from it."""
        self._handed = 0
        """Bytes that waited to be sent, or came to be, since it is so."""
        self._taken = 0
        """Bytes of these that it had taken when it was last looked at."""
        self._taken_at = 0.0
        """When it was last seen to have taken more."""
        self._ahead = False
        """Whether the peer has submitted more than the store can take for now; nothing is read from it."""
        self._stale: float | None = None
        """When a packet that has begun must have gone on, or a closing connection be gone; None for never."""
        self._arrived = 0
        """Bytes that came since that was noted."""
        self._transport: asyncio.Transport
        self.peer: Peer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._server.limits.keepalive is not None:
                self._server.limits.keepalive.watch(sock)
        name = transport.get_extra_info("peername")
        # One that is gone already has no name, and is nobody of ours.
        address = name[0] if isinstance(name, tuple) else "unix" if sock.family == socket.AF_UNIX else "?"
        limits = self._server.limits
        if transport.get_extra_info("sslcontext") is None:
            self._transport.set_write_buffer_limits(high=limits.output_soft, low=limits.output_soft // 4)
        else:
            self._rest = deque()
            self._transport.set_write_buffer_limits(high=TLS_PART, low=TLS_PART // 4)
        self.peer = self._server.core.connected(sock.fileno(), address, self)
        connections = self._server.connections
        connections.add(self)
        if len(connections) > limits.max_connections:
            self._server.refusals.tell(address, TOO_MANY, self._server.loop.time())
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest, self._held = None, 0
        self._server.forget(self)
        self._server.core.disconnected(self.peer)
        self._server.serve_woken()
        self._server.schedule_turn()

    def data_received(self, data: bytes) -> None:
        self._arrived += len(data)
        self._reader.feed(data)
        self._read()

    def _read(self) -> None:
        if self._transport.is_closing():
            return
        server = self._server
        core = server.core
        core.now = time.time()
        core.clock = server.loop.time()
        take = self._reader.take
        try:
            for count in range(PACKETS_PER_TURN):
                try:
                    packet = take()
                except UnreadableStream as error:
                    self._close(f"{error}")
                    break
                except ProtocolError as error:
                    core.refuse(self.peer, error.code, error.text)
                    continue
                if packet is None:
                    self._note_incomplete(went_on=count > 0)
                    break
                if packet[0] != TEXT:
                    core.receive(self.peer, packet)
                    if core.woken:
                        core.serve_woken()
                else:
                    if self._answer_text(packet[1][0]):
                        # Seven bytes may be answered by megabytes: these are sent before the next are made.
                        self._let_others()
                    break
            else:
                self._let_others()
            self._wait_for_store()
        except Exception:
            # Ours: no input may end the server, and this connection's state is not to be trusted.
            logger.exception("Error in a packet of %s; its connection is closed", self.peer.address)
            self._transport.abort()
        server.heard(self.peer)

    def _let_others(self) -> None:
        """Others first; what is in the buffer waits, and so does the socket."""
        self._stale = None
        self._transport.pause_reading()
        self._server.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if not self._blocked and not self._ahead and not self._transport.is_closing():
            self._transport.resume_reading()
            self._read()

    def _wait_for_store(self) -> None:
        """If too many replies wait, read nothing more until half are given: memory is not the queue."""
        line = self.peer.line
        if line is None or self._transport.is_closing():
            return
        limits = self._server.limits
        if len(line) >= limits.unanswered or self.peer.lined > limits.output_soft:
            self._ahead = True
            self._stale = None
            self._transport.pause_reading()

    def _answer_text(self, line: bytes) -> bool:
        """Answer, or close the connection and say False."""
        if text.is_http(line):
            self._close("this is HTTP, which has a port of its own")
            return False
        answer = text.answer(self._server.core, self.peer, line)
        if answer is None:
            self._close("a line of too many words")
            return False
        self._server.core.send(self.peer, answer)
        return True

    def _close(self, reason: str) -> None:
        logger.warning("Connection of %s closed: %s", self.peer.address, reason)
        # What was answered before belongs to the peer still.
        output, self.peer.output = self.peer.output, []
        self.write(output)
        self._hand_all()
        self._transport.close()
        self._expect_progress()

    def _note_incomplete(self, *, went_on: bool) -> None:
        if not self._reader.incomplete:
            self._stale = None
        elif went_on or self._stale is None or self._arrived >= PROGRESS:
            # A large packet may come slowly, as over a long line; libgearman takes half a second for a MiB.
            self._arrived = 0
            self._expect_progress()

    def _expect_progress(self) -> None:
        self._stale = self._server.loop.time() + self._server.limits.incomplete

    def close_if_stale(self, now: float) -> None:
        """Close a connection that does not take its output, or whose packet does not come to its end."""
        if self._blocked and self._is_stuck(now):
            self.drop("it does not take what it is sent")
            return
        if self._stale is None or now < self._stale:
            return
        if self._transport.is_closing():
            self._transport.abort()
        elif not self._blocked:
            self._close("an incomplete packet")

    def eof_received(self) -> None:
        # The transport closes by itself, once everything is sent; of TLS, it takes nothing more to send.
        output, self.peer.output = self.peer.output, []
        self.write(output)
        self._hand_all()
        if (
            LOSES_WRITER
            and isinstance(self._server.loop, asyncio.SelectorEventLoop)
            and self._transport.get_extra_info("sslcontext") is not None
            and self._transport.get_write_buffer_size()
        ):
            # The error would be taken for one of ours, and end the server.
            self._transport.abort()
            return
        self._expect_progress()

    def write(self, output: list[bytes]) -> None:
        """Send what the core left for the peer."""
        transport = self._transport
        if transport.is_closing():
            return
        # One packet may stand there ten thousand times, for a peer that listens to its job as often.
        if len(output) > 1 and (size := sum(map(len, output))) > self._server.limits.output_total:
            self.drop(f"{size / 2**20:.0f} MiB were to be sent to it at once")
            return
        data = b"".join(output)
        if self._blocked:
            self._handed += len(data)
        if self._rest is None or (not self._full and len(data) <= TLS_PART):
            transport.write(data)
        else:
            self._rest.append(memoryview(data))
            self._held += len(data)
            self._hand_some()
        if self._ahead:
            line, limits = self.peer.line, self._server.limits
            if line is None or (
                len(line) <= limits.unanswered // 2 and self.peer.lined <= limits.output_soft // 4
            ):
                self._ahead = False
                self._server.loop.call_soon(self._go_on)
        if self._blocked and self.unsent > self._server.limits.output_hard:
            self._server.bound_output(self._server.blocked)

    @property
    def unsent(self) -> int:
        """Bytes that wait to be sent."""
        return self._held + self._transport.get_write_buffer_size()

    @property
    def kept(self) -> int:
        """Bytes that are kept for the peer: these, and what waits for the store before it can be sent."""
        return self.unsent + self.peer.lined

    def _hand_some(self) -> None:
        """Give TLS of what it was not given yet as much as it takes for now."""
        rest = self._rest
        assert rest is not None, "a connection in plain text keeps nothing back"
        while rest and not self._full:
            part = rest.popleft()
            if len(part) > TLS_PART:
                rest.appendleft(part[TLS_PART:])
                part = part[:TLS_PART]
            self._held -= len(part)
            self._transport.write(part)
        soft = self._server.limits.output_soft
        if not self._blocked and self._held > soft:
            self._block()
        elif self._blocked and self._held <= soft // 4:
            self._unblock()

    def _hand_all(self) -> None:
        """Give TLS all of it, before the transport is closed: that sends what it has."""
        while self._rest:
            self._transport.write(self._rest.popleft())
        self._held = 0

    def _is_stuck(self, now: float) -> bool:
        """Whether much waits, and the peer has taken nothing of it for long. A slow one is none of these."""
        unsent = self.unsent
        taken = self._handed - unsent
        if taken > self._taken:
            self._taken, self._taken_at = taken, now
        limits = self._server.limits
        return unsent > limits.output_hard and now - self._taken_at >= limits.stuck

    def drop(self, reason: str) -> None:
        """Close at once, and throw away what waits to be sent."""
        logger.warning("Connection of %s closed: %s", self.peer.address, reason)
        self._rest, self._held = None, 0
        self._transport.abort()

    def pause_writing(self) -> None:
        if self._rest is None:
            self._block()
        else:
            self._full = True

    def resume_writing(self) -> None:
        if self._rest is None:
            self._unblock()
        else:
            self._full = False
            self._hand_some()

    def _block(self) -> None:
        self._blocked = True
        self._handed, self._taken, self._taken_at = self.unsent, 0, self._server.loop.time()
        self._server.blocked.add(self)
        self._transport.pause_reading()

    def _unblock(self) -> None:
        self._blocked = False
        self._server.blocked.discard(self)
        # The rest of a packet could not be read meanwhile.
        self._stale = None
        self._go_on()

    def abort(self) -> None:
        self._transport.abort()

    def close(self) -> None:
        if not self._transport.is_closing():
            self._hand_all()
            self._transport.close()
