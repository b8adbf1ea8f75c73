"""
Sockets and time around the core: bytes in, bytes out, limits and timers.

What packets mean is the core's affair; here they are read, and its output is
written: once per peer and turn of the event loop, however many packets that
turn brought.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import select
import socket
import ssl
import sys
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, cast

from ..exceptions import ProtocolError, UnreadableStream
from ..protocol.packets import REQUEST, RESPONSE
from ..protocol.reader import MAX_BODY, MAX_LINE, TEXT, PacketReader
from . import journal, text
from .core import JobServer
from .door import TLSDoor
from .http import MAX_AHEAD, Conversation, MetricsConversation
from .journal import SUBMIT_LIMIT, JobStore, Journal, JournalThread
from .metrics import Page
from .options import Shutdown
from .peers import Peer

logger = logging.getLogger(__name__)

HEAR_LIMIT: Final = 0.5
"""Seconds in which workers that are stopped with the server say so."""

FINISH_LIMIT: Final = 25.0
"""Seconds that it waits for their last results, before it writes what is left; see docs/gearmand.md."""

TICK: Final = 1.0
"""Seconds between two looks at what no packet announces."""

FIRST_LOOK: Final = 0.5
"""Seconds at the start for which nobody is let in before the store was looked into; it may hang."""

PACKETS_PER_TURN: Final = 200
"""Packets of one connection before the others get their turn."""

PROGRESS: Final = 256 * 1024
"""Bytes of a packet that are to come in ``TransportLimits.incomplete`` seconds, unless it is whole before."""

TLS_PART: Final = 64 * 1024
"""Bytes handed to TLS at a time: what it has encrypted and passed on, nobody counts any more."""

LOSES_WRITER: Final = (3, 12) <= sys.version_info < (3, 12, 9) or (3, 13) <= sys.version_info < (3, 13, 2)
"""Whether asyncio fails, again and again, when TLS writes on after its socket was closed (gh-115514)."""

LATE: Final = 0.005
"""
Seconds for which what may wait for company stays in the core: entries, which the journal lets wait longer,
and output that nobody waits for. To send it would cost a system call, and wake a process.
"""

TEND_AFTER: Final = 5.0
"""Seconds from the start to the store's first housekeeping: replayed jobs and clients come first."""

LINGER: Final = 5.0
"""Seconds in which an HTTP client may take the last reply; closed at once, it might not see why."""


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
            logger.warning("Connection from %s closed: %s are open already", address, limits.max_connections)
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
                elif not self._answer_text(packet[1][0]):
                    break
            else:
                self._stale = None
                # Others first; what is in the buffer waits, and so does the socket.
                self._transport.pause_reading()
                server.loop.call_soon(self._go_on)
            self._wait_for_store()
        except Exception:
            # Ours: no input may end the server, and this connection's state is not to be trusted.
            logger.exception("Error in a packet of %s; its connection is closed", self.peer.address)
            self._transport.abort()
        server.heard(self.peer)

    def _go_on(self) -> None:
        if not self._blocked and not self._ahead and not self._transport.is_closing():
            self._transport.resume_reading()
            self._read()

    def _wait_for_store(self) -> None:
        """If too many replies wait, read nothing more until half are given: memory is not the queue."""
        line = self.peer.line
        if line is None or self._transport.is_closing():
            return
        if len(line) >= self._server.limits.unanswered:
            self._ahead = True
            self._stale = None
            self._transport.pause_reading()

    def _answer_text(self, line: bytes) -> bool:
        """Answer, or close the connection and say False."""
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
            line = self.peer.line
            if line is None or len(line) <= self._server.limits.unanswered // 2:
                self._ahead = False
                self._server.loop.call_soon(self._go_on)
        if self._blocked and self.unsent > self._server.limits.output_hard:
            self._server.bound_output(self._server.blocked)

    @property
    def unsent(self) -> int:
        """Bytes that wait to be sent."""
        return self._held + self._transport.get_write_buffer_size()

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


class HTTPConnection(Connection):
    """One socket of the HTTP port: requests to packets for the core, and its packets to replies."""

    __slots__ = ("_conversation", "_lingers", "_stage", "_unsent")

    def __init__(self, server: GearmanServer) -> None:
        super().__init__(server)
        # Of what the core leaves for the peer: nothing in it is too large.
        self._reader = PacketReader(RESPONSE, max_body=2**32 - 1)
        self._conversation = Conversation(max_body=server.limits.max_packet, hosts=server.http_hosts)
        self._stage = ""
        """What is waited for, since ``_stale`` was set."""
        self._lingers = False
        """Whether the last reply is on its way, and what comes is thrown away."""
        self._unsent = sys.maxsize
        """Bytes that the peer had not taken when last looked at."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._await_client()

    def data_received(self, data: bytes) -> None:
        if self._lingers:
            return
        self._arrived += len(data)
        self._conversation.feed(data)
        self._read()
        if self._conversation.busy and self._conversation.ahead > MAX_AHEAD:
            self._transport.pause_reading()

    def _read(self) -> None:
        if self._transport.is_closing():
            return
        server = self._server
        core = server.core
        core.now = time.time()
        core.clock = server.loop.time()
        self._conversation.now = core.now
        try:
            packet = self._conversation.take()
            if packet is not None:
                core.receive(self.peer, packet)
                core.serve_woken()
            elif self._conversation.more:
                self._transport.pause_reading()
                server.loop.call_soon(self._go_on)
        except Exception:
            # Ours: no input may end the server, and this connection's state is not to be trusted.
            logger.exception("Error in a request of %s; its connection is closed", self.peer.address)
            self._transport.abort()
        self._send()
        server.schedule_turn()

    def write(self, output: list[bytes]) -> None:
        if self._transport.is_closing():
            return
        self._conversation.now = self._server.core.now
        self._reader.feed(b"".join(output))
        while (packet := self._reader.take()) is not None:
            self._conversation.hear(packet)
        self._send()
        if not self._conversation.busy:
            # The next request may be there already.
            self._server.loop.call_soon(self._go_on)

    def _send(self) -> None:
        conversation = self._conversation
        output, conversation.output = conversation.output, []
        if self._transport.is_closing():
            return
        if output:
            self._transport.write(b"".join(output))
            self._unsent = sys.maxsize
        if conversation.closed and not self._lingers:
            if conversation.refusal is not None:
                logger.warning("Connection of %s closed: %s", self.peer.address, conversation.refusal)
            self._lingers = True
            self._transport.write_eof()
            self._transport.resume_reading()
        self._await_client()

    def _await_client(self) -> None:
        """Note until when the client must have done what it is to do; anew when that is something else."""
        limits = self._server.limits
        if self._lingers:
            stage, limit = "take the reply", LINGER
        elif self._conversation.busy:
            stage, limit = "", None
        elif self._conversation.incomplete:
            stage, limit = "end the request", limits.incomplete
            if self._arrived >= PROGRESS:
                self._stage = ""
        else:
            stage, limit = "begin a request", limits.http_idle
        if stage != self._stage:
            self._stage = stage
            self._arrived = 0
            self._stale = None if limit is None else self._server.loop.time() + limit

    def close_if_stale(self, now: float) -> None:
        """Close a connection that does nothing, or not what it began."""
        if self._stale is None or now < self._stale:
            return
        unsent = self._transport.get_write_buffer_size()
        if 0 < unsent < self._unsent:
            # A long reply, and a slow client.
            self._unsent = unsent
            self._expect_progress()
        elif unsent or self._lingers or self._transport.is_closing():
            self._transport.abort()
        else:
            self._conversation.now = self._server.core.now
            self._conversation.expire()
            self._send()

    def resume_writing(self) -> None:
        self._blocked = False
        self._server.blocked.discard(self)
        self._go_on()

    def close(self) -> None:
        self._conversation.now = self._server.core.now
        self._conversation.end()
        self._send()
        self._transport.close()


class MetricsConnection(HTTPConnection):
    """One socket of the port of the metrics."""

    __slots__ = ()

    def __init__(self, server: GearmanServer) -> None:
        super().__init__(server)
        self._conversation = MetricsConversation(server.metrics.text, hosts=server.http_hosts)


class GearmanServer:
    """
    A job server on an event loop.

    Args:
        core: With the lease's epoch, and with what the store replayed, if there is one.
        store: Keeps the background jobs; None when nothing is kept.
        limits: What a connection may ask for.
        tls: Speak TLS, and nothing else, with this context; None for plain text.
        http_hosts: Names by which HTTP clients may call this server, beside ``localhost`` and IP addresses.
        hold: As of ``Journal``.
        submit_limit: Seconds that a background submission waits for the store before it gets ERROR.
        backlog: Bytes that may wait for the store before background submissions get ERROR at once.
    """

    def __init__(
        self,
        core: JobServer,
        store: JobStore | None = None,
        limits: TransportLimits | None = None,
        tls: ssl.SSLContext | None = None,
        http_hosts: Collection[str] = (),
        *,
        submit_limit: float = SUBMIT_LIMIT,
        backlog: int = journal.BACKLOG,
        hold: float = math.inf,
    ) -> None:
        self.core = core
        core.is_gone = _is_gone
        self.limits = limits or TransportLimits()
        self.http_hosts = http_hosts
        self.connections: set[Connection] = set()
        self.blocked: set[Connection] = set()
        """Those that do not take what they are sent."""
        self.loop: asyncio.AbstractEventLoop
        self.metrics: Page
        self._store = store
        self._tls = tls
        self._journal = Journal(core, submit_limit=submit_limit, backlog=backlog, hold=hold)
        self._thread: JournalThread | None = None
        self._turn_scheduled = False
        self._late_turn_scheduled = False
        self._permits_timer: asyncio.TimerHandle | None = None
        self._permits_at = math.inf
        """When it fires."""
        self._ended: asyncio.Future[None]
        self._emptied: asyncio.Event | None = None
        self._listening: list[asyncio.Server | TLSDoor] = []
        self._stopped: asyncio.Event

    async def serve(
        self,
        sockets: list[socket.socket],
        stopped: asyncio.Event,
        *,
        http_sockets: Collection[socket.socket] = (),
        metrics_sockets: Collection[socket.socket] = (),
        ready: Callable[[], None] | None = None,
    ) -> None:
        """
        Serve bound sockets until ``stopped`` is set; then write what is left and return.

        The core sets it when an operator told it to ``shut_down``.

        Args:
            http_sockets: Bound sockets that speak HTTP, without TLS.
            metrics_sockets: Bound sockets where Prometheus asks, without TLS.
            ready: Called once connections are taken.
        Raises:
            StoreError: The store is gone for good; nothing more can be promised.
        """
        self.loop = asyncio.get_running_loop()
        self._ended = self.loop.create_future()
        self._stopped = stopped
        self.loop.set_exception_handler(self._handle_error)
        if self._store is not None:
            self._journal.tend_at = self.loop.time() + TEND_AFTER
            self._journal.renewed(self._store.renewed)
            self._thread = JournalThread(
                self._journal, self._store, self.loop, changed=self._turn, failed=self._fail
            )
            await self._thread.start(FIRST_LOOK)
        await self._listen(sockets)
        for sock in http_sockets:
            self._listening.append(
                await self.loop.create_server(
                    lambda: HTTPConnection(self), sock=sock, backlog=self.limits.backlog
                )
            )
        self.metrics = Page(self.core, None if self._store is None else self._journal, time.time())
        for sock in metrics_sockets:
            self._listening.append(
                await self.loop.create_server(
                    lambda: MetricsConnection(self), sock=sock, backlog=self.limits.backlog
                )
            )
        if ready is not None:
            ready()
        ticker = self.loop.create_task(self._tick())
        waiter = self.loop.create_task(stopped.wait())
        try:
            waited: list[asyncio.Future[Any]] = [self._ended, waiter, ticker]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if waiter.done() and self.core.shutdown_wanted is None:
                await self._let_workers_finish()
        finally:
            ticker.cancel()
            waiter.cancel()
            self._stop_listening()
            await self._stop_journal()
            await self._close_connections()
        if self._ended.done():
            self._ended.result()
        if ticker.done() and not ticker.cancelled():
            ticker.result()

    async def _listen(self, sockets: list[socket.socket]) -> None:
        if self._tls is None:
            self._listening = [
                await self.loop.create_server(
                    lambda: Connection(self), sock=sock, backlog=self.limits.backlog
                )
                for sock in sockets
            ]
            return
        self._listening = [
            TLSDoor(
                sockets,
                self._tls,
                lambda: Connection(self),
                has_room=lambda shaking: len(self.connections) + shaking < self.limits.max_connections,
                limit=self.limits.handshake,
                backlog=self.limits.backlog,
            )
        ]

    def _stop_listening(self) -> None:
        for server in self._listening:
            server.close()
        self._listening = []

    def shut_down(self, how: Shutdown) -> None:
        """End the server, as an operator's command does."""
        self.core.shut_down(how)
        self.schedule_turn()

    def _approach_end(self, how: Shutdown) -> None:
        """The end is wanted: now, or when the last job is gone. Called again with every turn."""
        if self._listening:
            logger.info("Shutting down (%s): no more connections are taken", how.value)
        self._stop_listening()
        # Rows that nobody claimed yet stay in the database.
        self._journal.claim_no_more()
        if how is Shutdown.GRACEFUL and (self.core.jobs or self._journal.busy):
            return
        self._stopped.set()

    async def _let_workers_finish(self) -> None:
        """
        Take the results of workers that are told to stop as we are, and hand out nothing more.

        A service manager stops all at once; without this, the jobs that they
        finish meanwhile would run again.
        """
        core = self.core
        core.hands_out = False
        self._journal.claim_no_more()
        begun = self.loop.time()
        while any(peer.running for peer in core.peers):
            waited = self.loop.time() - begun
            if waited >= FINISH_LIMIT or (waited >= HEAR_LIMIT and not core.crews.are_finishing()):
                return
            await asyncio.sleep(0.02)

    async def _stop_journal(self) -> None:
        self._turn()
        if self._thread is not None and not await self._thread.stop(limit=10.0):
            logger.error("The store did not take the last entries; these jobs will run again")
        self._turn()

    async def _close_connections(self) -> None:
        """Send what is left to who takes it within a second, and close."""
        for connection in list(self.connections):
            connection.close()
        if self.connections:
            self._emptied = asyncio.Event()
            try:
                await asyncio.wait_for(self._emptied.wait(), 1.0)
            except TimeoutError:
                for connection in list(self.connections):
                    connection.abort()

    def forget(self, connection: Connection) -> None:
        """A connection is gone."""
        self.connections.discard(connection)
        self.blocked.discard(connection)
        if self._emptied is not None and not self.connections:
            self._emptied.set()

    def _handle_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """
        Stop on an error of our own in a callback: the journal would not go on, and nobody would know.

        A transport's errors come here too; its connection is lost, which is no reason.
        """
        loop.default_exception_handler(context)
        error = context.get("exception")
        if "handle" in context and isinstance(error, Exception):
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)

    async def _tick(self) -> None:
        while True:
            core = self.core
            await asyncio.sleep(min(max(core.next_due() - time.time(), 0.0), TICK))
            now = self.loop.time()
            core.now = time.time()
            core.clock = now
            waiting = 0
            for connection in list(self.connections):
                connection.close_if_stale(now)
                waiting += connection.unsent
            if waiting > self.limits.output_total:
                self.bound_output(self.connections)
            core.tick()
            core.serve_woken()
            self._journal.refuse_overdue()
            self.schedule_turn()

    def serve_woken(self) -> None:
        """Hand out jobs to who was woken by other things than packets: now, not when the last one came."""
        core = self.core
        if core.woken:
            core.now = time.time()
            core.clock = self.loop.time()
            core.serve_woken()

    def _settle_limits(self) -> None:
        """Have the core ask for permits, and be back when it is to ask again."""
        limits = self.core.limits
        limits.settle()
        if limits.due < self._permits_at:
            if self._permits_timer is not None:
                self._permits_timer.cancel()
            self._permits_at = limits.due
            self._permits_timer = self.loop.call_at(limits.due, self._ask_for_permits)

    def _ask_for_permits(self) -> None:
        self._permits_timer = None
        self._permits_at = math.inf
        core = self.core
        core.now = time.time()
        core.clock = self.loop.time()
        core.limits.ask_again()
        self.schedule_turn()

    def heard(self, peer: Peer) -> None:
        """
        A peer's input was read: answer at once where one other is concerned at the most, as by a grab.

        A turn for that would cost the loop as much as the answer itself. Who waits for more jobs is not
        that other: what comes of them may be one write. What is left for the journal may wait, too.
        """
        core = self.core
        if (
            self._turn_scheduled
            or core.urgent
            or core.woken
            or core.questions
            or core.shutdown_wanted is not None
            or core.limits.limiters
            or len(core.dirty) > 2
            or any(each.listens for each in core.dirty if each is not peer)
        ):
            self.schedule_turn()
            return
        if core.dirty and core.dirty[0] is peer:
            # Who spoke has time: the other gets a job, or the end of one.
            core.dirty.reverse()
        self._send()
        if core.claim_wanted:
            self._claim()
        if core.entries:
            self._schedule_late_turn()

    def _schedule_late_turn(self) -> None:
        if not self._late_turn_scheduled:
            self._late_turn_scheduled = True
            self.loop.call_later(LATE, self._late_turn)

    def _late_turn(self) -> None:
        self._late_turn_scheduled = False
        core = self.core
        patient, core.patient = core.patient, []
        for peer in patient:
            # Some were sent it since, with other things.
            if peer.is_patient and peer.output:
                core.dirty.append(peer)
            peer.is_patient = False
        self._turn()

    def bound_output(self, among: Collection[Connection]) -> None:
        """While too much waits to be sent to these together, close the connection for which the most does."""
        waiting = {connection: connection.unsent for connection in among}
        while sum(waiting.values()) > self.limits.output_total:
            largest = max(waiting, key=waiting.__getitem__)
            unsent = waiting.pop(largest) / 2**20
            # Not again before the loop has forgotten it.
            self.blocked.discard(largest)
            largest.drop(f"{unsent:.0f} MiB wait to be sent to it, and it takes them too slowly")

    def schedule_turn(self) -> None:
        """Something happened in the core: send and write what it left, once this turn's input is read."""
        if not self._turn_scheduled:
            self._turn_scheduled = True
            self.loop.call_soon(self._turn)

    def _send(self) -> None:
        """Write what the core left for peers."""
        core = self.core
        if core.dirty:
            dirty, core.dirty = core.dirty, []
            for peer in dirty:
                output, peer.output = peer.output, []
                cast(Connection, peer.shell).write(output)
        if core.patient:
            self._schedule_late_turn()

    def _turn(self) -> None:
        self._turn_scheduled = False
        core = self.core
        self.serve_woken()
        if core.limits.limiters:
            self._settle_limits()
            self.serve_woken()
        self._send()
        if core.shutdown_wanted is not None:
            self._approach_end(core.shutdown_wanted)
        if self._thread is None:
            return
        if core.entries:
            self._journal.append(core.entries, self.loop.time(), urgent=core.urgent, many_end=core.many_end)
            core.entries = []
            core.urgent = core.many_end = False
            self._thread.kick()
            if core.dirty:
                # Submissions that it refused.
                self.schedule_turn()
        if core.questions:
            self._journal.ask(core.questions)
            core.questions = []
            self._thread.kick()
        if core.claim_wanted:
            self._claim()

    def _claim(self) -> None:
        """Have the journal look at the database door, which the core wants it to."""
        self.core.claim_wanted = False
        if self._thread is not None:
            self._journal.claim_soon()
            self._thread.kick()


def bind(host: str, port: int) -> list[socket.socket]:
    """
    Sockets bound to every address of a host that this machine has, not yet listening.

    Binding first finds a taken port before the lease and the jobs are touched.

    Raises:
        OSError: No address is ours, or the port is taken at one.
    """
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        try:
            sockets.append(_bound(family, kind, protocol, address))
        except OSError as error:
            # Many a machine without IPv6 says that localhost is ::1 too.
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                missing = error
                continue
            for sock in sockets:
                sock.close()
            raise
    if missing is not None and not sockets:
        raise missing
    return sockets


def _is_gone(peer: Peer) -> bool:
    """Whether the other end of a connection is closed; the event loop may read others before that."""
    poll = select.poll()
    # Linux has an event for it; elsewhere it shows where both directions are closed.
    poll.register(peer.number, getattr(select, "POLLRDHUP", 0))
    return bool(poll.poll(0))


def _bound(family: int, kind: int, protocol: int, address: Any) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock
