"""Connections of the HTTP ports: requests to packets for the core, and its packets to replies."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from typing import TYPE_CHECKING, Final

from ..protocol.packets import RESPONSE
from ..protocol.reader import PacketReader
from .connection import PROGRESS, Connection
from .http import MAX_AHEAD, Conversation, MetricsConversation

if TYPE_CHECKING:
    from .transport import GearmanServer

logger = logging.getLogger(__name__)

LINGER: Final = 5.0
"""Seconds in which an HTTP client may take the last reply; closed at once, it might not see why."""


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
